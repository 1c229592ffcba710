"""What a chunk carries for later comparisons: the sketch of its layer inputs, and these inputs beside it."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from support.streams import policy_of
from torch.nn import functional as F

from omnimem.policies.base import ScoredPolicy, sketch
from omnimem.sketches import Bits, encoded, stored
from omnimem.streaming.chunk_pass import ChunkAttention, ReadConfig

WIDTH, NARROW = 64, 16


def config(bits: Bits = 16, *, per_head: bool = False, on_inputs: bool = False) -> ReadConfig:
    policy = policy_of("omnimem")
    assert isinstance(policy, ScoredPolicy)
    policy = replace(policy, per_head=per_head, measures=replace(policy.measures, sketch=bits))
    policy = policy.on_inputs() if on_inputs else policy
    return ReadConfig(policy=policy, softness=None, recorder=None, projection=sketch(WIDTH, NARROW))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bits", get_args(Bits))
def test_a_sketch_is_computed_in_full_precision_and_rounded_once(bits, dtype, autocast) -> None:
    states = (300 * torch.randn(2, 50, WIDTH, generator=torch.Generator().manual_seed(3))).to(dtype)
    expected = encoded(F.normalize(states.float() @ sketch(WIDTH, NARROW), dim=-1), bits, learns=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = config(bits).feature(states)
    assert found.dtype == expected.dtype == stored(NARROW, bits, learns=False)[1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("per_head", [False, True])
def test_the_exact_inputs_go_beside_a_sketch_once_for_each_row(per_head) -> None:
    """Rows are streams, or the heads of the first stream, then those of the second."""
    states, attention = torch.randn(2, 5, WIDTH), object.__new__(ChunkAttention)
    chunk: Any = type("Chunk", (), {"config": config(per_head=per_head)})
    attention.chunk = chunk
    found = attention._arrived(states, 3)
    assert found is not None
    assert torch.equal(found, states[[0, 0, 0, 1, 1, 1]] if per_head else states)
    chunk.config = config(per_head=per_head, on_inputs=True)
    assert attention._arrived(states, 3) is None
