"""Options of every policy, and the stream of frames and audio on which they are compared."""

from typing import Any

import torch

from omnimem.budget import Budget
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions, PolicyOptions
from omnimem.policies.base import Policy
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
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk
from support import models
from support.grid_streams import layout

LENGTHS = [3, 30, 1, 31, 9, 31]  # the opening, then cuts anywhere
STEPS = 12
SPLIT = Budget(slots=((4, 10), (2, 7), (3, 9), (3, 10)))  # 48 in all
LAYERS = 4
OPTIONS: dict[str, PolicyOptions] = {
    "distinct": DistinctOptions(),
    "distinct_heads": DistinctOptions(per_head=True),
    "distinct_inputs": DistinctOptions(compared="inputs", coverage=1.0),
    "omnimem": PerturbationOptions(),
    "similarity": SimilarityOptions(),
    "similarity_released": SimilarityOptions(preset="as_released"),
    "random": ControlOptions(name="random", preset="as_published"),
    "recency": ControlOptions(name="recency"),
    "uniform": ControlOptions(name="uniform"),
    "recursive_uniform": RecursiveUniformOptions(),
    "input_uniform": InputUniformOptions(),
    "input_uniform_split": InputUniformOptions(preset="shared_split"),
    "recent_frames": RecentFramesOptions(),
    "recent_frames_split": RecentFramesOptions(preset="shared_split"),
    "streaming_llm": StreamingLLMOptions(),
    "streaming_llm_split": StreamingLLMOptions(preset="shared_split"),
    "value_norm": ValueNormOptions(),
    "value_norm_layer": ValueNormOptions(per_head=False),
    "value_norm_split": ValueNormOptions(preset="shared_split"),
    "keydiff": KeyDiffOptions(),
    "k_center": KCenterOptions(),
    "k_center_heads_split": KCenterOptions(preset="shared_split", per_head=True),
    "h2o": H2OOptions(),
    "h2o_split": H2OOptions(preset="shared_split"),
    "snapkv": SnapKVOptions(),
    "snapkv_released": SnapKVOptions(preset="as_released"),
    "snapkv_split": SnapKVOptions(preset="shared_split"),
    "pyramidkv": PyramidKVOptions(),
    "pyramidkv_split": PyramidKVOptions(preset="shared_split"),
    "lava": LavaOptions(),
    "lava_released": LavaOptions(preset="as_released"),
    "lava_split": LavaOptions(preset="shared_split"),
    "infinipot_v": InfiniPotVOptions(),
    "infinipot_v_released": InfiniPotVOptions(preset="as_released"),
    "infinipot_v_reindexed": InfiniPotVOptions(reindex=True, keys="unrotated"),
    "infinipot_v_split": InfiniPotVOptions(preset="shared_split"),
    "streammem": StreamMemOptions(),
    "streammem_plain": StreamMemOptions(frame_filter=False, prototypes=False),
    "streammem_heads": StreamMemOptions(frame_filter=False, per_head=True),
    "streammem_split": StreamMemOptions(preset="shared_split"),
    "hermes": HermesOptions(),
    "hermes_released": HermesOptions(preset="as_released"),
    "hermes_reindexed": HermesOptions(reindex=True),
    "hermes_split": HermesOptions(preset="shared_split"),
    "oracle": OracleOptions(),
}


def whole_stream(batch: int = 1, seed: int = 1, still: bool = False) -> Chunk:
    """Frames of 2 x 3 cells with two audio tokens each; every third frame repeats the one before nearly."""
    table = layout(STEPS)
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(batch, len(table), 64, generator=generator)
    for k, (kind, _) in enumerate(table):
        if kind == 2 and k > 20 and (k // 8) % 3 == 2:
            embeddings[:, k] = embeddings[:, k - 8] + 0.05 * embeddings[:, k]
    if still:
        embeddings = embeddings[:, :1].expand_as(embeddings).clone()
    kinds = torch.tensor([kind for kind, _ in table], dtype=torch.int8)
    places = torch.tensor([place for _, place in table]).T
    return Chunk(embeddings=embeddings, positions=places.expand(batch, 3, -1), modality=kinds.expand(batch, -1))


def cut(whole: Chunk) -> list[Chunk]:
    assert sum(LENGTHS) == whole.count
    return models.cut(whole, LENGTHS)


def opened(attached: StreamedAttention, policy: Policy, batch: int = 1, **settings: Any) -> Stream:
    probes = [torch.tensor([7, 8, 9 + number]) for number, _ in enumerate(policy.traits.probes)]
    return Stream(attached, policy, batch=batch, probes=probes, **settings)
