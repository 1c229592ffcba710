"""Policies by name: presets of OmniMem, the controls it must beat, and its rivals; one a file."""

from omnimem.policies.controls import ControlOptions
from omnimem.policies.distinct import DistinctOptions
from omnimem.policies.h2o import H2OOptions
from omnimem.policies.hermes import HermesOptions
from omnimem.policies.infinipot_v import InfiniPotVOptions
from omnimem.policies.input_uniform import InputUniformOptions
from omnimem.policies.k_center import KCenterOptions
from omnimem.policies.keydiff import KeyDiffOptions
from omnimem.policies.lava import LavaOptions
from omnimem.policies.oracle import OracleOptions
from omnimem.policies.perturbation import PerturbationOptions
from omnimem.policies.pyramidkv import PyramidKVOptions
from omnimem.policies.recent_frames import RecentFramesOptions
from omnimem.policies.recursive_uniform import RecursiveUniformOptions
from omnimem.policies.similarity import SimilarityOptions
from omnimem.policies.snapkv import SnapKVOptions
from omnimem.policies.streaming_llm import StreamingLLMOptions
from omnimem.policies.streammem import StreamMemOptions
from omnimem.policies.value_norm import ValueNormOptions

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
