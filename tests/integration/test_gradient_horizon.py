"""Gradient within a horizon: of each loss, that of one plain pass in which older chunks are constants."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.episodes import Episode, KeptByChunk, OneShot, ScoresByChunk, Softened, one_shot_loss
from support.gradients import HELD, adapted, assert_same_gradient, episode_of, gradient, head_of, streamed_loss_of
from support.streams import policy_of
from torch import Tensor

from omnimem.memory import Memory
from omnimem.policies.base import Policy
from omnimem.selection import Softness
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.chunk_pass import ChunkStep, DirectStep, MemoryStep
from omnimem.tuning import FullGradient, HorizonGradient


def cut_gradient(
    attached: StreamedAttention, episode: Episode, kept: list[list[Tensor]], softened: Softened | None, chunks: int
) -> Tensor:
    """Mean over the moments of asking, each with the `chunks` before it alone in the graph, by one plain pass each."""
    parts = []
    for seen, prompt in episode.asked:
        part = Episode(chunks=episode.chunks[:seen], asked=[(seen, prompt)])
        step = OneShot(part, kept, softened, constant=max(0, seen - chunks))
        parts.append(gradient(one_shot_loss(attached, head_of(attached.text_model), part, step), attached.text_model))
    return torch.stack(parts).mean(dim=0)


@torch.no_grad()
def noted(
    attached: StreamedAttention, episode: Episode, policy: Policy, softness: Softness | None
) -> tuple[list[list[Tensor]], Softened | None]:
    """What was kept after each chunk, and the scores that decided it."""
    noting, scores = KeptByChunk(DirectStep()), ScoresByChunk(inner=policy.scorer)
    streamed_loss_of(attached, episode, replace(policy, scorer=scores), noting, softness)
    if softness is None:
        return noting.kept, None
    return noting.kept, Softened(policy=policy, scores=scores.seen, temperature=softness.temperature)


class CutOnce:
    """Plain autograd with the memory detached before chunk number `before` (from 1)."""

    def __init__(self, before: int) -> None:
        self.before, self.read_so_far = before, 0

    def __call__(self, step: ChunkStep, memory: Memory, embeddings: Tensor) -> tuple[Memory, MemoryStep]:
        self.read_so_far += 1
        return step(memory.detached() if self.read_so_far == self.before else memory, embeddings), self

    def read(self, loss: Callable[[Memory], Tensor], memory: Memory) -> Tensor:
        return loss(memory)


def test_gradient_reaches_as_many_chunks_back_as_the_horizon_says(family) -> None:
    """Questions after the third and the fifth chunk."""
    model, episode = adapted(family), episode_of(family)
    with attach(model) as attached:
        kept, _ = noted(attached, episode, policy_of("omnimem"), None)
        loss = streamed_loss_of(attached, episode, policy_of("omnimem"), HorizonGradient(chunks=2))
        assert_same_gradient(gradient(loss, model), cut_gradient(attached, episode, kept, None, 2), 1e-12)


@pytest.mark.slow
def test_every_chunk_within_the_horizon_adds_some_of_the_full_gradient() -> None:
    """A horizon of 4 takes in all that the first of both questions has seen, one of 5 all there is."""
    model, episode, found = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni"), []
    with attach(model) as attached:
        kept, _ = noted(attached, episode, policy_of("omnimem"), None)
        full = streamed_loss_of(attached, episode, policy_of("omnimem"), FullGradient())
        for chunks in (1, 2, 4, 5):
            loss = streamed_loss_of(attached, episode, policy_of("omnimem"), HorizonGradient(chunks=chunks))
            assert torch.equal(loss, full)
            found.append(gradient(loss, model))
            assert_same_gradient(found[-1], cut_gradient(attached, episode, kept, None, chunks), 1e-12)
        whole = gradient(full, model)
    distances = [float((part - whole).norm() / whole.norm()) for part in found]
    assert distances[0] > distances[1] > distances[2] > 1e-3
    assert distances[3] < 1e-6  # RMSNorm rounds to float32, here each loss by itself


@pytest.mark.parametrize("preset", ["omnimem", "paper"])
def test_scores_learn_within_the_horizon_alone(preset) -> None:
    """In the pool, the novelty of an old token hangs on new neighbours too."""
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni", batch=2)
    policy, softness = policy_of(preset), Softness(temperature=0.3)
    with attach(model) as attached:
        kept, softened = noted(attached, episode, policy, softness)
        carry = HorizonGradient(chunks=2)
        soft = gradient(streamed_loss_of(attached, episode, policy, carry, softness), model)
        hard = gradient(streamed_loss_of(attached, episode, policy, carry), model)
        assert_same_gradient(soft, cut_gradient(attached, episode, kept, softened, 2), 1e-5)  # scores are float32
    assert float((soft - hard).norm() / soft.norm()) > 1e-3


@pytest.mark.parametrize(("each", "by_layer"), HELD.values(), ids=HELD)
def test_chunks_that_are_read_again_drop_and_keep_what_they_did(each, by_layer) -> None:
    """With dropout and moved positions, loss and gradient are those of a memory cut before chunk t - N + 1."""
    model, episode = adapted("qwen2_5_omni", torch.float32, dropout=0.3), episode_of("qwen2_5_omni", torch.float32)
    last = Episode(chunks=episode.chunks, asked=episode.asked[1:])
    softness = Softness(temperature=0.3)
    found = []
    carry, once = HorizonGradient(chunks=3, each=each), CutOnce
    for way, layers, limit in ((carry, by_layer, 40), (once(before=3), False, 40), (once(before=3), False, 1000)):
        with attach(model, recompute_layers=layers) as attached:
            torch.manual_seed(5)
            loss = streamed_loss_of(attached, last, policy_of("omnimem"), way, softness, last_position=limit)
            torch.manual_seed(6)
            found.append((loss.detach(), gradient(loss, model)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.allclose(found[1][1], found[2][1], rtol=1e-3)  # they did move
