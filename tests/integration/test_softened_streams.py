"""Soft selection over streams: hard selection as its limit, the exact gradient, and the truth about entries."""

import math
from dataclasses import replace

import pytest
import torch
from support import reference
from support.episodes import KeptByChunk, OneShot, ScoresByChunk, Softened, one_shot_loss
from support.gradients import adapted, assert_same_gradient, episode_of, gradient, head_of, streamed_loss_of
from support.models import FAMILIES, assert_equal_logits, cut, row_of, text_model, whole_stream
from support.streams import LENGTHS, UNEQUAL, fed, levels_of, orders, policy_of, prompt_of
from torch import Tensor

from omnimem.attention import blocked
from omnimem.budget import Budget
from omnimem.policies import PerturbationOptions
from omnimem.selection import SelectionOptions, Softness
from omnimem.streaming.attach import attach
from omnimem.streaming.chunk_pass import DirectStep
from omnimem.tokens import Modality
from omnimem.tuning import FullGradient, TuningOptions, gradient_of

VANISHING = 1e-6


def soft(temperature: float, gradient: str = "redundancy") -> Softness:
    return Softness(temperature=temperature, form="soft", gradient=gradient)


@pytest.mark.parametrize(
    ("family", "preset"), [(f, "omnimem") for f in FAMILIES] + [(FAMILIES[0], p) for p in ("paper", "released")]
)
def test_at_a_vanishing_temperature_answers_equal_those_of_hard_selection(family, preset) -> None:
    chunks = cut(whole_stream(levels=levels_of(family)), LENGTHS)
    with attach(text_model(family)) as attached, torch.no_grad():
        hard, softly, warm = (
            fed(attached, policy_of(preset), chunks, softness=s) for s in (None, soft(VANISHING), soft(1.0))
        )
        assert orders(hard) == orders(softly)
        assert hard.usage == softly.usage
        prompt = prompt_of([[[5, 6], [7]]])
        assert_equal_logits(softly.ask(prompt).hidden, hard.ask(prompt).hidden)
        assert float((warm.ask(prompt).hidden - hard.ask(prompt).hidden).abs().max()) > 0.01


@pytest.mark.parametrize("preset", ["paper", "omnimem"])
def test_a_soft_stream_is_the_same_alone_and_in_a_batch(preset) -> None:
    whole = whole_stream(batch=3)
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        together = fed(attached, policy_of(preset), cut(whole, LENGTHS), softness=soft(0.3))
        answers = together.ask(prompt_of([[[5, 6], [7]]] * 3)).hidden
        for number in range(3):
            alone = fed(attached, policy_of(preset), cut(row_of(whole, number), LENGTHS), softness=soft(0.3))
            assert orders(alone) == [[layer[number]] for layer in orders(together)]
            assert_equal_logits(answers[number : number + 1], alone.ask(prompt_of([[[5, 6], [7]]])).hidden)
    assert orders(together)[1][0] != orders(together)[1][1]


def test_soft_training_reports_more_entries_than_the_budget_and_evaluation_never_holds_more() -> None:
    """Five chunks of 96 tokens; the same seam and policy, before and after a soft stream."""
    chunks, policy = cut(whole_stream(), LENGTHS), policy_of("omnimem")
    budget = sum(map(sum, UNEQUAL))
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        before, training, after = (fed(attached, policy, chunks, softness=s) for s in (None, soft(1.0), None))
    for evaluation in (before, after):
        assert evaluation.usage.kept_entries == evaluation.memory.entries == budget
        assert not any(bool(layer.gate.any()) for layer in evaluation.memory.layers)
    held = [sum(count for kind, count in row.items() if kind != Modality.TEXT) for row in training.memory.counts()]
    assert training.usage.kept_entries == training.memory.entries == sum(held)
    assert budget < sum(held) <= SelectionOptions(softening="soft").most(budget) == 3 * budget
    assert all(count <= 3 * sum(slots) for count, slots in zip(held, UNEQUAL, strict=True))
    assert training.usage.bytes > before.usage.bytes


@pytest.mark.parametrize(
    ("preset", "temperature"),
    [("omnimem", 1.0), ("omnimem", 0.05), ("distinct", 0.3), ("paper", 0.3), ("released", 0.3)],
)
def test_soft_gradient_equals_one_shot_with_gates(preset, temperature) -> None:
    """Gates written out from their definition in one plain pass with masks by layer, over every eviction."""
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni", batch=2)
    policy = policy_of(preset)
    noting, scores = KeptByChunk(FullGradient()), ScoresByChunk(inner=policy.scorer)
    with attach(model) as attached:
        loss = streamed_loss_of(attached, episode, replace(policy, scorer=scores), noting, soft(temperature))
        got = gradient(loss, model)
        power = 0.5 if preset == "released" else 1.0
        softened = Softened(
            policy=policy, scores=scores.seen, temperature=temperature, novelty_power=power, form="soft"
        )
        plain = one_shot_loss(attached, head_of(model), episode, OneShot(episode, noting.kept, softened))
        assert_same_gradient(got, gradient(plain, model), 1e-9)
        torch.testing.assert_close(loss, plain, rtol=1e-11, atol=0)
        hard = gradient(streamed_loss_of(attached, episode, policy, FullGradient()), model)
    assert float((got - hard).norm() / hard.norm()) > 1e-2
    assert any(not torch.equal(*tokens) for tokens in noting.kept[-1])  # each stream keeps its own


@pytest.mark.parametrize(
    "way",
    [TuningOptions(horizon=1), TuningOptions(gradient="states"), TuningOptions(offload=True)],
    ids=["horizon", "states", "offload"],
)
def test_every_gradient_mode_reads_a_soft_memory_alike(way) -> None:
    """The gates have values, so the loss is that of plain autograd under soft selection, whoever learns."""
    model, episode = adapted("qwen2_5_omni", torch.float32), episode_of("qwen2_5_omni", torch.float32)
    carries = (gradient_of(way, 4), DirectStep())
    with attach(model) as attached:
        losses = [streamed_loss_of(attached, episode, policy_of("omnimem"), carry, soft(0.5)) for carry in carries]
        hard = streamed_loss_of(attached, episode, policy_of("omnimem"), DirectStep())
        assert bool(gradient(losses[0], model).isfinite().all())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert abs(float((losses[1] - hard).detach())) > 1e-4


@pytest.mark.parametrize("part", ["redundancy", "both"])
def test_recomputed_soft_gradient_equals_the_stored_one_bit_for_bit(part) -> None:
    model, episode = adapted("qwen2_5_omni", torch.float32, dropout=0.3), episode_of("qwen2_5_omni", torch.float32)
    found = []
    for way, by_layer in ((FullGradient(), False), (FullGradient(offload=True), True), (DirectStep(), False)):
        with attach(model, recompute_layers=by_layer) as attached:
            torch.manual_seed(5)
            loss = streamed_loss_of(attached, episode, policy_of("omnimem"), way, soft(0.3, part))
            found.append(gradient(loss, model))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("form", ["straight_through", "soft"])
def test_the_gradient_through_attention_received_equals_autograd_of_a_plain_softmax(form, monkeypatch) -> None:
    """Over all layers and evictions, with the carried sums; it differs from that through redundancy alone."""
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni")
    policy = PerturbationOptions(sharpness=0.5).build(Budget(slots=UNEQUAL))

    def found(part: str) -> Tensor:
        softness = Softness(temperature=0.3, form=form, gradient=part)
        return gradient(streamed_loss_of(attached, episode, policy, FullGradient(), softness), model)

    with attach(model) as attached:
        both, redundancy = found("both"), found("redundancy")
        monkeypatch.setattr(blocked, "mass", plain_mass)
        assert_same_gradient(both, found("both"), 1e-9)
    assert float((both - redundancy).norm() / both.norm()) > 1e-3


def plain_mass(
    queries: Tensor, keys: Tensor, *, scale: float, gate: Tensor, heads: str, every: blocked.Every
) -> Tensor:
    """Attention mass of all queries by one softmax that autograd stores in full."""
    assert (heads, every) == ("probabilities", blocked.ALL)
    wide = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    count, total = queries.shape[2], keys.shape[2]
    seen = torch.tensor(reference.visible(count, total))
    logits = (queries @ wide.mT * scale + gate[:, None, None]).masked_fill(~seen, -math.inf)
    return logits.softmax(dim=-1).mean(dim=1).sum(dim=1)
