"""What a chunk carries for later comparisons, and the queries by which its attention is measured."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from support.models import text_model
from support.policy_streams import LENGTHS, SPLIT, cut, opened, whole_stream
from support.streams import policy_of
from torch import Tensor
from torch.nn import functional as F

from omnimem.attention.blocked import Every, mass
from omnimem.policies import PerturbationOptions, PolicyOptions
from omnimem.policies.base import ScoredPolicy, sketch
from omnimem.policies.baselines.h2o import H2OOptions
from omnimem.selection import Softness
from omnimem.sketches import Bits, References, encoded, stored
from omnimem.streaming.attach import attach
from omnimem.streaming.chunk_pass import ChunkAttention, ReadConfig
from omnimem.tuning import FullGradient
from omnimem.view import LayerView

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
    vector, kinds = states.float() @ sketch(WIDTH, NARROW), torch.full((2, 50), 2, dtype=torch.int8)
    vector = References().beyond(0, vector, kinds) if bits == 2 else F.normalize(vector, dim=-1)
    expected = encoded(vector, bits, learns=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = config(bits).feature(0, states, kinds)
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


STRIDED: dict[str, PolicyOptions] = {
    "omnimem": PerturbationOptions(query_stride=4),
    "paper": PerturbationOptions(name="paper", query_stride=4),
    "released": PerturbationOptions(name="released", query_stride=4),
    "h2o": H2OOptions(query_stride=4),
}
ALL_QUERIES: dict[str, PolicyOptions] = {"omnimem": PerturbationOptions(), "h2o": H2OOptions()}


def read(options: PolicyOptions, stream: int | None = None, **settings: Any) -> tuple[list[LayerView], list[Tensor]]:
    """What every layer saw of each chunk of two streams (or one of them), and the arrival numbers that it keeps."""
    policy, views = options.build(SPLIT), []

    def record(layer: int, view: LayerView) -> None:
        views.append(replace(view, measured=view.mass.detach()))  # as in the pass, whatever `measures` say

    whole = whole_stream(batch=2)
    if stream is not None:
        names = ("embeddings", "positions", "modality", "place")
        whole = replace(whole, **{name: getattr(whole, name)[[stream]] for name in names})
    with attach(text_model("qwen2_5_omni")) as attached:
        fed = opened(attached, policy, batch=whole.modality.shape[0], recorder=record, **settings)
        for chunk in cut(whole):
            fed.feed(chunk)
    return views, [layer.order for layer in fed.memory.layers]


@pytest.mark.parametrize("name", STRIDED)
def test_the_attention_of_the_drawn_queries_is_measured_in_every_layer(name) -> None:
    with torch.no_grad():
        views, _ = read(STRIDED[name])
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    drawn = set()
    for number, view in enumerate(views):
        chunk, layer = divmod(number, 4)
        every = Every.drawn(4, LENGTHS[chunk], starts[chunk], layer)
        drawn.add(every)
        asking = view.queries[:, :, every.first :: every.stride]
        expected = (
            every.stride
            * torch.stack(
                [  # one query at a time, with the keys that it sees
                    F.pad(
                        mass(asking[:, :, [row]], view.pool.keys[:, :, :seen], **settings), (0, view.pool.count - seen)
                    )
                    for row in range(asking.shape[2])
                    for seen in [view.pool.count - view.new + every.first + row * every.stride + 1]
                    for settings in [
                        {"scale": view.scale, "heads": view.measures.heads, "gate": view.pool.gate[:, :seen]}
                    ]
                ]
            ).sum(dim=0)
        )
        torch.testing.assert_close(view.mass, expected, rtol=1e-5, atol=1e-6)
    assert len(drawn) > 6


@pytest.mark.parametrize("name", ALL_QUERIES)
def test_the_same_tokens_are_kept_in_training_in_a_batch_and_again(name) -> None:
    """And others than by all queries."""
    with torch.no_grad():
        _, kept = read(STRIDED[name])
        _, again = read(STRIDED[name])
        _, whole = read(ALL_QUERIES[name])
        alone = [read(STRIDED[name], stream)[1] for stream in (0, 1)]
    _, trained = read(STRIDED[name], carry=FullGradient(), softness=Softness(temperature=0.0))
    for layer, orders in enumerate(kept):
        assert torch.equal(orders, again[layer])
        assert torch.equal(orders, trained[layer])
        assert torch.equal(orders, torch.cat([each[layer] for each in alone]))
    assert any(not torch.equal(*pair) for pair in zip(kept, whole, strict=True))


@pytest.mark.parametrize("bits", get_args(Bits))
def test_a_fork_that_reads_first_changes_nothing_that_its_parent_reads(bits) -> None:
    """The first tokens of a modality set a reference in 2 bits: for each stream and fork its own."""
    policy = PerturbationOptions(feature=NARROW, sketch_bits=bits).build(SPLIT)
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        quiet, asked = (opened(attached, policy) for _ in range(2))
        for chunk in cut(whole_stream()):
            fork = asked.fork()
            fork.feed(replace(chunk, embeddings=chunk.embeddings.flip(1)))
            asked.feed(chunk)
            quiet.feed(chunk)
    assert all(map(torch.equal, asked.memory.tensors(), quiet.memory.tensors()))
    assert not torch.equal(fork.memory.layers[0].feature, asked.memory.layers[0].feature)


@pytest.mark.parametrize("gradient", ["redundancy", "both", "none"])
@pytest.mark.parametrize("bits", get_args(Bits))
def test_softened_selection_at_temperature_0_keeps_by_a_sketch_what_evaluation_keeps(bits, gradient) -> None:
    """Where every token is discounted, so that rounding in one of them alone would show."""
    policy = PerturbationOptions(feature=NARROW, sketch_bits=bits, coverage_above=-1.0, coverage=2.0).build(SPLIT)
    kept = []
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        for softness in (None, Softness(temperature=0.0, gradient=gradient)):
            stream = opened(attached, policy, batch=2, softness=softness)
            for chunk in cut(whole_stream(batch=2)):
                stream.feed(chunk)
            kept.append([layer.order for layer in stream.memory.layers])
    assert all(map(torch.equal, *kept))
