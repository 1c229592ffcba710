"""Policies by name: presets of OmniMem, controls, and baselines; one per file."""

from omnimem.policies.baselines.controls import ControlOptions
from omnimem.policies.baselines.h2o import H2OOptions
from omnimem.policies.baselines.hermes import HermesOptions
from omnimem.policies.baselines.infinipot_v import InfiniPotVOptions
from omnimem.policies.baselines.input_uniform import InputUniformOptions
from omnimem.policies.baselines.k_center import KCenterOptions
from omnimem.policies.baselines.keydiff import KeyDiffOptions
from omnimem.policies.baselines.lava import LavaOptions
from omnimem.policies.baselines.oracle import OracleOptions
from omnimem.policies.baselines.pyramidkv import PyramidKVOptions
from omnimem.policies.baselines.recent_frames import RecentFramesOptions
from omnimem.policies.baselines.recursive_uniform import RecursiveUniformOptions
from omnimem.policies.baselines.similarity import SimilarityOptions
from omnimem.policies.baselines.snapkv import SnapKVOptions
from omnimem.policies.baselines.streaming_llm import StreamingLLMOptions
from omnimem.policies.baselines.streammem import StreamMemOptions
from omnimem.policies.baselines.value_norm import ValueNormOptions
from omnimem.policies.distinct import DistinctOptions
from omnimem.policies.perturbation import PerturbationOptions

PolicyOptions = (
    DistinctOptions
    | PerturbationOptions
    | ControlOptions
    | H2OOptions
    | HermesOptions
    | InfiniPotVOptions
    | InputUniformOptions
    | KCenterOptions
    | KeyDiffOptions
    | LavaOptions
    | OracleOptions
    | PyramidKVOptions
    | RecentFramesOptions
    | RecursiveUniformOptions
    | SimilarityOptions
    | SnapKVOptions
    | StreamingLLMOptions
    | StreamMemOptions
    | ValueNormOptions
)

__all__ = ["ControlOptions", "DistinctOptions", "PerturbationOptions", "PolicyOptions"]
