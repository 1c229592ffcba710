"""Gradient as the release trains, and as the paper words it: that of the obvious way, layer by layer over states."""

from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from support import reference
from support.episodes import Episode
from support.gradients import HELD, adapted, assert_same_gradient, episode_of, gradient, head_of, streamed_loss_of
from support.models import FAMILIES, row_of
from support.released_reference import SlowRelease
from support.streams import UNEQUAL, policy_of
from torch import Tensor, nn

from omnimem.policies.base import Policy, ScoredPolicy
from omnimem.scoring import AbstractScorer
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Tokens
from omnimem.tuning import FullGradient, GradientError, ReleasedGradient, by_similarity
from omnimem.view import LayerView

STOP = 2


def at_the_end(episode: Episode) -> Episode:
    return Episode(chunks=episode.chunks, asked=episode.asked[1:])


@pytest.mark.parametrize("whole", [False, True], ids=["released", "paper"])
@pytest.mark.parametrize(("family", "preset", "stop"), [
    *((family, "released", STOP) for family in FAMILIES), ("qwen2_5_omni", "paper", 1), ("qwen2_5_omni", "paper", 3)
])  # fmt: skip
def test_loss_gradient_and_kept_tokens_are_those_of_the_obvious_way(family, preset, stop, whole) -> None:
    model, episode = adapted(family), at_the_end(episode_of(family))
    policy, carry = by_similarity(policy_of(preset)), ReleasedGradient(stop_layer=stop, whole_last_chunk=whole)
    with attach(model) as attached:
        orders = kept_by_chunk(attached, episode, policy, carry, stop)
        loss = streamed_loss_of(attached, episode, policy, carry)
        got = gradient(loss, model)
    slow = SlowRelease(model, UNEQUAL, reference.PRESETS[preset], stop, whole)
    model.set_attn_implementation("eager")
    expected = slow.loss(episode.chunks, episode.asked[0][1], head_of(model))
    assert orders == slow.kept
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # norms round to float32, each use by itself
    assert_same_gradient(got, gradient(expected, model), 1e-6)


def kept_by_chunk(
    attached: StreamedAttention, episode: Episode, policy: Policy, carry: ReleasedGradient, stop: int
) -> list[list[list[int]]]:
    stream, found = Stream(attached, policy, carry=carry), []
    for chunk in episode.chunks:
        stream.feed(chunk)
        assert all(layer.count == 0 for layer in stream.memory.layers[stop + 1 :])
        found.append([layer.order[0].tolist() for layer in stream.memory.layers[: stop + 1]])
    return found


def by_layer(model: nn.Module, loss: Tensor) -> list[float]:
    """Norm of the gradient of each decoder layer."""
    named = [(name, part) for name, part in model.named_parameters() if part.requires_grad]
    parts = torch.autograd.grad(loss, [part for _, part in named], allow_unused=True)
    found = [0.0] * len(model.layers)
    for (name, _), part in zip(named, parts, strict=True):
        found[int(name.split(".")[1])] += 0.0 if part is None else float(part.norm())
    return found


def test_chunks_teach_the_layer_below_the_stop_layer_and_the_last_one_those_above() -> None:
    """docs/paper.md, "Gradient in the release", by cutting the question off: its own pass teaches every layer."""
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni")
    policy = by_similarity(policy_of("released"))
    with attach(model) as attached:
        for whole, learning in ((False, [1, 2, 3]), (True, [0, 1, 2, 3])):
            carry = ReleasedGradient(stop_layer=STOP, whole_last_chunk=whole)
            stream = Stream(attached, policy, carry=carry)
            for chunk in episode.chunks:
                stream.feed(chunk)
            loss = stream.read(lambda memory: sum(layer.values.sum() for layer in memory.layers))
            found = by_layer(model, loss)
            assert [layer for layer, norm in enumerate(found) if norm > 0] == learning


@pytest.mark.parametrize("preset", ["released", "omnimem", "distinct", "random"])
def test_below_the_stop_layer_the_memory_is_that_of_full(preset) -> None:
    """To the bit, under the same policy: as the paper words it the run's own, attention mass and all."""
    model, episode = adapted("qwen2_5_omni", torch.float32), episode_of("qwen2_5_omni", torch.float32, batch=2)
    for policy in (policy_of(preset), by_similarity(policy_of(preset))):
        found = []
        with attach(model) as attached:
            for carry in (ReleasedGradient(stop_layer=3, whole_last_chunk=True), FullGradient()):
                stream = Stream(attached, policy, batch=2, carry=carry)
                for chunk in episode.chunks:
                    stream.feed(chunk)
                found.append([replace(layer, states=layer.states[..., :0]) for layer in stream.memory.layers[:3]])
        for ours, theirs in zip(*found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))


@final
@dataclass(frozen=True, kw_only=True)
class Carrying(AbstractScorer):
    """The same score, of a policy that carries the feature on which redundancy is judged."""

    inner: AbstractScorer

    @property
    def needs_novelty(self) -> bool:
        return True

    def __call__(self, view: LayerView) -> Tensor:
        return self.inner(view)


def test_the_stop_layer_judges_its_inputs_whether_or_not_the_policy_carries_them() -> None:
    model, episode = adapted("qwen2_5_omni", torch.float32), at_the_end(episode_of("qwen2_5_omni", torch.float32))
    bare, carry, found = policy_of("random"), ReleasedGradient(stop_layer=STOP, whole_last_chunk=True), []
    assert not bare.traits.needs_novelty
    with attach(model) as attached:
        for policy in (bare, replace(bare, scorer=Carrying(inner=bare.scorer))):
            orders = kept_by_chunk(attached, episode, policy, carry, STOP)
            loss = streamed_loss_of(attached, episode, policy, carry)
            found.append((orders, loss.detach(), gradient(loss, model)))
        other = [row[STOP] for row in kept_by_chunk(attached, episode, bare, FullGradient(), 3)]
    assert found[0][0] == found[1][0]
    assert [row[STOP] for row in found[0][0]] != other  # by similarity, not at random
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


def test_redundancy_reads_the_exact_inputs_beside_a_narrow_sketch_in_every_layer() -> None:
    """Of a policy whose score is redundancy alone the sketch chooses nothing, below, at and above the stop layer."""
    model, episode = adapted("qwen2_5_omni", torch.float32), at_the_end(episode_of("qwen2_5_omni", torch.float32))
    ours, found = policy_of("omnimem"), []
    assert isinstance(ours, ScoredPolicy)
    narrow = replace(ours, measures=replace(ours.measures, feature=2))
    with attach(model) as attached:
        for policy in (by_similarity(narrow), by_similarity(ours.on_inputs())):
            carry = ReleasedGradient(stop_layer=STOP)
            orders = kept_by_chunk(attached, episode, policy, carry, STOP)
            found.append((orders, streamed_loss_of(attached, episode, policy, carry).detach()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("whole", [False, True], ids=["released", "paper"])
@pytest.mark.parametrize(("each", "by_layer"), HELD.values(), ids=HELD)
def test_every_way_of_keeping_gives_the_same_bits_with_dropout(each, by_layer, whole) -> None:
    model = adapted("qwen2_5_omni", torch.float32, dropout=0.3)
    episode = episode_of("qwen2_5_omni", torch.float32, batch=2)
    policy, found = policy_of("distinct") if whole else by_similarity(policy_of("omnimem")), []
    for way, layers in ((each, by_layer), (FullGradient(recompute=False), False)):
        with attach(model, recompute_layers=layers) as attached:
            carry = ReleasedGradient(stop_layer=STOP, whole_last_chunk=whole, each=way)
            torch.manual_seed(5)
            loss = streamed_loss_of(attached, episode, policy, carry)
            torch.manual_seed(6)  # what happens to the generator before backward does not matter
            found.append((loss.detach(), gradient(loss, model)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_streams_of_a_batch_and_questions_on_the_way_are_read_as_alone() -> None:
    """Two streams with questions after the third and the fifth chunk; each alone, as if it ended where it is asked."""
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni", batch=2)
    policy, carry, parts = by_similarity(policy_of("omnimem")), ReleasedGradient(stop_layer=STOP), []
    with attach(model) as attached:
        together = gradient(streamed_loss_of(attached, episode, policy, carry), model)
        for row in range(2):
            for seen, prompt in episode.asked:
                chunks = [row_of(chunk, row) for chunk in episode.chunks[:seen]]
                alone = Episode(chunks=chunks, asked=[(seen, row_of(prompt, row))])
                parts.append(gradient(streamed_loss_of(attached, alone, policy, carry), model))
    assert_same_gradient(together, torch.stack(parts).mean(dim=0), 1e-6)


def test_the_layers_above_measure_the_drawn_queries_too(monkeypatch) -> None:
    """Of [carrier ; chunk] and of what the stop layer keeps, as every other layer of its chunk."""
    measured: list[tuple[int, int]] = []
    plain = ScoredPolicy.keep

    def keep(self: ScoredPolicy, layer: int, view: LayerView, *args: Any) -> Tokens:
        if self.scorer.needs_importance:
            measured.append((view.queries.shape[2], view.every.stride))
        return plain(self, layer, view, *args)

    monkeypatch.setattr(ScoredPolicy, "keep", keep)
    model, episode, policy = adapted("qwen2_5_omni"), at_the_end(episode_of("qwen2_5_omni")), policy_of("paper")
    policy = replace(policy, measures=replace(policy.measures, query_stride=4))
    with attach(model) as attached:
        streamed_loss_of(attached, episode, policy, ReleasedGradient(stop_layer=STOP, whole_last_chunk=True))
    layers = attached.shape.layers
    assert len(measured) >= layers - STOP
    assert all(stride == min(4, queries) for queries, stride in measured)


def test_positions_that_move_up_take_the_carrier_along() -> None:
    model, episode = adapted("qwen2_5_omni"), at_the_end(episode_of("qwen2_5_omni"))
    policy, found = by_similarity(policy_of("omnimem")), []
    with attach(model) as attached:
        for carry, last in ((ReleasedGradient(stop_layer=STOP), 40), (ReleasedGradient(stop_layer=STOP), 1000)):
            stream = Stream(attached, policy, carry=carry, last_position=last)
            for chunk in episode.chunks:
                stream.feed(chunk)
            carrier = stream.memory.layers[STOP]
            found.append(carrier)
            assert int(carrier.positions[:, 0].max()) < last
            loss = streamed_loss_of(attached, episode, policy, carry, last_position=last)
            assert bool(gradient(loss, model).isfinite().all())
    assert torch.equal(found[0].order[:, :3], found[1].order[:, :3])  # the opening's text
    assert int(found[0].positions[:, 0].max()) < int(found[1].positions[:, 0].max())


def test_a_stop_layer_below_the_last_visual_features_is_refused() -> None:
    model, episode = adapted("qwen3_vl"), episode_of("qwen3_vl")
    with (
        attach(model) as attached,
        pytest.raises(GradientError, match=r"^tuning.stop_layer = 1: .* raise it to at least 2$"),
    ):
        streamed_loss_of(attached, episode, policy_of("released"), ReleasedGradient(stop_layer=1))
