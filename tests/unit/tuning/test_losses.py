"""Losses: what they are by plain loops, what they see of a stream, who counts, and that learning reaches LoRA alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, final

import pytest
import torch
from support import reference_losses as reference
from support.episodes import IGNORED, Episode, KeptByChunk, OneShot
from support.gradients import assert_same_gradient, episode_from, gradient, opened, policy_at
from support.thinkers import write_folder
from torch import Tensor, nn

from omnimem.backbones import LayoutError, ModelOptions
from omnimem.backbones.qwen2_5_omni import Qwen25Omni
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import QUESTION_ROOM, EncodedSample, Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.tuning import (
    AbstractLoss,
    AnswerLoss,
    FullGradient,
    FullMemoryKL,
    LoraOptions,
    Outcome,
    Pass,
    Rows,
    StreamedModel,
    add_adapter,
    answer_losses,
    running_means,
    step_metrics,
    streamed_loss,
    streamed_scores,
    trainable,
)
from omnimem.tuning.losses import kl_divergences

TIMES = (7.0, 9.0, 9.0, None)  # on the way, twice at once, and after the end
LORA = LoraOptions(r=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj", "up_proj"))


@final
@dataclass(frozen=True, kw_only=True)
class Taught:
    """An adapted thinker in float64, and the untouched one loaded on its own."""

    backbone: Qwen25Omni
    model: StreamedModel
    base: Qwen25Omni

    def feeder(self, chunk_tokens: int = 12) -> Feeder:
        return Feeder(self.backbone, StreamOptions(chunk_tokens=chunk_tokens))


def taught(folder: Path, *, std: float, dropout: float = 0.0) -> Taught:
    """With every B drawn at this deviation."""
    backbone, base = (Qwen25Omni.load(ModelOptions(path=str(folder))) for _ in range(2))
    model = add_adapter(backbone.model, replace(LORA, dropout=dropout)).train()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std, generator=generator)
    backbone.model.double()
    base.model.double().requires_grad_(False)
    return Taught(backbone=backbone, model=model, base=base)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("thinker"), rates="tiny")


@pytest.fixture(scope="module")
def tuned(thinker: Path) -> Taught:
    return taught(thinker, std=0.2)


def batch_of() -> list[EncodedSample]:
    """Two streams with answers of unequal length."""
    return [opened(1, TIMES, ["red", "blue", "green", "red"]), opened(2, TIMES, ["dark red", "red", "blue", "a b c"])]


def streamed(
    attached: StreamedAttention, tuned: Taught, batch: Sequence[EncodedSample], slots: int | None, **settings: Any
) -> Outcome:
    """`streamed_loss` with hard selection and the full gradient."""
    given = {"carry": FullGradient(), "model": tuned.model, "feeder": tuned.feeder(), **settings}
    return streamed_loss(attached, given.pop("feeder"), batch, policy_at(slots), softness=None, **given)


def learned(
    tuned: Taught, batch: Sequence[EncodedSample], slots: int | None, *losses: AbstractLoss
) -> tuple[Outcome, Tensor]:
    """The outcome, its loss out of the graph, and the gradient of that loss."""
    with attach(tuned.backbone.text_model) as attached:
        outcome = streamed(attached, tuned, batch, slots, losses=losses)
        found = gradient(outcome.loss, tuned.backbone.model)
    return replace(outcome, loss=outcome.loss.detach()), found


def outcome_of(tuned: Taught, batch: Sequence[EncodedSample], slots: int | None, *losses: AbstractLoss) -> Outcome:
    return learned(tuned, batch, slots, *losses)[0]


def stock_logits(backbone: Qwen25Omni, episode: Episode) -> list[list[Tensor]]:
    """[stream][answer] rows x vocabulary: transformers' own pass over what had come and one question, at a time."""
    embed = backbone.text_model.get_input_embeddings()
    found: list[list[Tensor]] = [[] for _ in episode.modality]
    for seen, prompt in episode.asked:
        past = torch.cat([chunk.embeddings for chunk in episode.chunks[:seen]], dim=1)
        places = torch.cat([chunk.positions for chunk in episode.chunks[:seen]], dim=2)
        for stream, rows in enumerate(found):
            for number in range(int(prompt.segments[stream].max()) + 1):
                mine = prompt.segments[stream] == number
                ids, labels = prompt.ids[stream, mine], prompt.labels[stream, mine]
                following = (prompt.offsets[stream, mine] + places.max() + 1).expand(3, -1)
                hidden = backbone.text_model(
                    inputs_embeds=torch.cat([past[stream], embed(ids)])[None],
                    position_ids=torch.cat([places[stream], following], dim=1)[:, None],
                    use_cache=False,
                ).last_hidden_state
                rows.append(backbone.head(hidden[0, -len(ids) :][labels != IGNORED]))
    return found


def labels_of(episode: Episode) -> list[list[list[int]]]:
    """[stream][answer] tokens."""
    return [
        [
            [int(label) for label in prompt.labels[stream][prompt.segments[stream] == number] if label != IGNORED]
            for _, prompt in episode.asked
            for number in range(int(prompt.segments[stream].max()) + 1)
        ]
        for stream in range(len(episode.modality))
    ]


@pytest.mark.parametrize("slots", [6, None])
def test_scores_of_a_validation_are_the_losses_of_evaluation(tuned, slots) -> None:
    """Without dropout, gates or gradient: each stream as it is read alone, and none of its questions right."""
    with attach(tuned.backbone.text_model) as attached:
        scores = streamed_scores(attached, tuned.feeder(), batch_of(), policy_at(slots))
        for score, one in zip(scores, batch_of(), strict=True):
            outcome = streamed(attached, tuned, [one], slots)
            assert score.loss == pytest.approx(float(outcome.loss.detach()), rel=1e-5)
    assert [(score.questions, score.correct) for score in scores] == [(4, 0), (4, 0)]


class Knowing:
    """A feeder whose head predicts every label, but for one row of the first pass."""

    def __init__(self, feeder: Feeder, wrong: int) -> None:
        self.feeder, self.wrong = feeder, wrong
        self.backbone = SimpleNamespace(head=self.head)
        self.labels: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.feeder, name)

    def prompt(self, *given: Any) -> Any:
        prompt = self.feeder.prompt(*given)
        assert prompt.labels is not None
        self.labels.append(prompt.labels[prompt.labels != IGNORED])
        return prompt

    def head(self, hidden: Tensor) -> Tensor:
        labels = self.labels[-1].clone()
        if len(self.labels) == 1:
            labels[self.wrong] += 1
        return nn.functional.one_hot(labels, int(labels.max()) + 1).double()


def test_a_question_is_right_when_every_token_of_its_answer_is_the_most_likely_one(tuned) -> None:
    for wrong in range(2):
        with attach(tuned.backbone.text_model) as attached:
            feeder: Any = Knowing(tuned.feeder(), wrong)
            scores = streamed_scores(attached, feeder, batch_of(), policy_at(6))
        assert [(score.questions, score.correct) for score in scores] == [(4, 3), (4, 4)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_kl_and_its_slope_equal_plain_loops(temperature) -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 7, 23, generator=generator, dtype=torch.float64) * 3
    student.requires_grad_()
    found = kl_divergences(student, teacher, temperature)
    (slope,) = torch.autograd.grad(found.sum(), student)
    rows = list(zip(student.tolist(), teacher.tolist(), strict=True))
    expected = [reference.kl(s, t, temperature) for s, t in rows]
    slopes = [reference.kl_slope(s, t, temperature) for s, t in rows]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, torch.tensor(slopes, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32


def test_answer_losses_equal_plain_loops() -> None:
    generator = torch.Generator().manual_seed(6)
    logits, labels = torch.randn(5, 11, generator=generator), torch.tensor([3, 0, 10, 3, 7])
    pairs = zip(logits.tolist(), labels.tolist(), strict=True)
    expected = [reference.cross_entropy(row, label) for row, label in pairs]
    torch.testing.assert_close(answer_losses(logits, labels), torch.tensor(expected))


def test_a_question_on_the_way_sees_what_had_come_and_nothing_later(tuned) -> None:
    """With full memory: each answer as by transformers' own pass over the stream until then, and its question."""
    batch = batch_of()
    outcome = outcome_of(tuned, batch, None, AnswerLoss())
    with attach(tuned.backbone.text_model) as attached:
        episode = episode_from(attached, tuned.feeder(), batch)
    with torch.no_grad():
        logits = stock_logits(tuned.backbone, episode)
    assert [seen for seen, _ in episode.asked] == [3, 4, 6]
    rows = [
        [
            reference.cross_entropy(row.tolist(), label)
            for asked, wanted in zip(answers, expected, strict=True)
            for row, label in zip(asked, wanted, strict=True)
        ]
        for answers, expected in zip(logits, labels_of(episode), strict=True)
    ]
    assert {len(row) for row in rows} == {8, 16}
    assert float(outcome.loss) == pytest.approx(reference.mean_over_streams(rows), rel=1e-6)
    assert outcome.rows == {"answer": 24}


def teacher_logits(tuned: Taught, episode: Episode) -> list[list[Tensor]]:
    """By transformers' own pass of a model that never had an adapter."""
    with torch.no_grad():
        return stock_logits(tuned.base, episode)


def test_distillation_equals_a_slow_reference_in_value_and_gradient(tuned) -> None:
    """The student in one pass with masks by layer, the teacher in stock passes over everything, the rest in loops."""
    batch, loss = batch_of(), FullMemoryKL(weight=0.7, temperature=2.0)
    noting = KeptByChunk(FullGradient())
    with attach(tuned.backbone.text_model) as attached:
        outcome = streamed(attached, tuned, batch, 6, carry=noting, losses=(AnswerLoss(weight=0.5), loss))
        got = gradient(outcome.loss, tuned.backbone.model)
        episode = episode_from(attached, tuned.feeder(), batch)
        step = OneShot(episode, noting.kept)
        hidden = attached.run(step, episode.embeddings(attached), episode.positions)[:, step.streamed :]
        labels = torch.cat([prompt.labels for _, prompt in episode.asked], dim=1)
        student = [tuned.backbone.head(row[label != IGNORED]) for row, label in zip(hidden, labels, strict=True)]
        teacher = [torch.cat(rows) for rows in teacher_logits(tuned, episode)]
        wanted = [label[label != IGNORED] for label in labels]
        plain = [
            0.5 * nn.functional.cross_entropy(s, w)
            + 0.7 * 4 * nn.functional.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean")
            for s, t, w in zip(student, teacher, wanted, strict=True)
        ]
        expected = gradient(torch.stack(plain).mean(), tuned.backbone.model)
    rows = [
        [reference.kl(s, t, 2.0) for s, t in zip(mine.tolist(), theirs.tolist(), strict=True)]
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    assert float(outcome.losses["full_memory_kl"]) == pytest.approx(reference.mean_over_streams(rows), rel=1e-6)
    assert float(outcome.losses["full_memory_kl"]) > 0.1
    total = 0.5 * outcome.losses["answer"] + 0.7 * outcome.losses["full_memory_kl"]
    torch.testing.assert_close(outcome.loss.detach(), total, rtol=1e-6, atol=0)
    assert_same_gradient(got, expected, 1e-5)


def test_an_adapter_that_does_nothing_is_at_no_distance_with_full_memory_and_at_some_with_a_budget(thinker) -> None:
    fresh = taught(thinker, std=0.0)
    whole, evicting = (outcome_of(fresh, batch_of(), slots, FullMemoryKL(temperature=2.0)) for slots in (None, 6))
    assert abs(float(whole.loss)) <= 1e-6
    assert float(evicting.loss) > 0.01
    tuned = taught(thinker, std=0.2)
    assert float(outcome_of(tuned, batch_of(), None, FullMemoryKL()).loss) > 0.01  # adapter on against adapter off


@final
@dataclass(frozen=True, kw_only=True)
class Noted(AbstractLoss):
    """A loss of the test's own, as a user would write one: notes the teacher's rows."""

    name: ClassVar[str] = "noted"
    seen: list[Tensor]

    @property
    def needs_teacher(self) -> bool:
        return True

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.teacher is not None
        assert not rows.teacher.requires_grad
        self.seen.append(rows.teacher)
        return rows.logits.float().square().mean(dim=-1)


def test_the_teacher_is_the_untouched_model_without_dropout_whatever_the_mode_of_the_adapter(thinker) -> None:
    wild = taught(thinker, std=0.2, dropout=0.5)
    batch, runs = batch_of(), (Noted(seen=[]), Noted(seen=[]))
    first, second = (outcome_of(wild, batch, 6, noted) for noted in runs)
    assert float(first.loss) != float(second.loss)  # the student does have dropout
    with attach(wild.backbone.text_model) as attached:
        episode = episode_from(attached, wild.feeder(), batch)
    expected = torch.cat([torch.cat(rows) for rows in teacher_logits(wild, episode)])
    owners = torch.cat([(prompt.labels != IGNORED).nonzero()[:, 0] for _, prompt in episode.asked])
    for noted in runs:
        forward = torch.cat(noted.seen[: len(episode.asked)])  # backward, which computes them again, comes after
        torch.testing.assert_close(forward[owners.argsort(stable=True)], expected, rtol=1e-9, atol=1e-9)


def test_gradient_reaches_lora_alone(thinker) -> None:
    tuned = taught(thinker, std=0.2)
    with attach(tuned.backbone.text_model) as attached:
        streamed(attached, tuned, batch_of(), 6, losses=(FullMemoryKL(temperature=2.0),)).loss.backward()
    reached = {name for name, weight in tuned.model.named_parameters() if weight.grad is not None}
    assert reached == {name for name, _ in tuned.model.named_parameters() if "lora_" in name}
    assert all(bool(weight.grad.any()) for weight in trainable(tuned.model) if weight.grad is not None)


def test_the_adapter_is_on_again_after_the_teacher_and_after_an_exception_in_it(tuned) -> None:
    batch, losses = batch_of(), (AnswerLoss(), FullMemoryKL())
    learning = len(trainable(tuned.model))
    before = float(outcome_of(tuned, batch, 6, *losses).loss)
    with attach(tuned.backbone.text_model) as attached, pytest.raises(LayoutError, match="chunk_tokens"):
        # a segment has 6 tokens: the teacher, which streams first, cannot cut it
        streamed(attached, tuned, batch, 6, losses=losses, chunk_tokens=5)
    assert tuned.model.get_model_status().enabled is True
    assert len(trainable(tuned.model)) == learning
    assert float(outcome_of(tuned, batch, 6, *losses).loss) == before


def test_a_stream_longer_than_full_memory_fits_is_left_out_and_counted(tuned) -> None:
    batch = batch_of()
    assert batch[0].tokens == 48
    answer = AnswerLoss()
    plain = outcome_of(tuned, batch, 6, answer)
    fits, skipped = (outcome_of(tuned, batch, 6, answer, FullMemoryKL(max_tokens=limit)) for limit in (48, 47))
    assert fits.rows == {"answer": 24, "full_memory_kl": 24}
    assert skipped.rows == {"answer": 24, "full_memory_kl": 0}
    assert set(skipped.losses) == {"answer"}
    assert float(skipped.loss) == float(plain.loss) < float(fits.loss)


def test_a_step_of_long_streams_alone_teaches_nothing_and_still_has_a_gradient(tuned) -> None:
    """So that no rank lacks what the others reduce."""
    outcome, found = learned(tuned, batch_of(), 6, AnswerLoss(weight=0.0), FullMemoryKL(max_tokens=1))
    assert float(outcome.loss) == 0
    assert float(outcome.losses["answer"]) > 1
    assert not found.any()


def test_a_stream_beyond_the_trained_positions_has_no_teacher_where_kept_tokens_move_up(tuned) -> None:
    """A full memory cannot move up; with original positions it can be asked."""
    backbone, batch = tuned.backbone, [opened(1, (None,), ["red"], seconds=48)]
    config, rows = backbone.text_model.config, {}
    before = config.max_position_embeddings
    config.max_position_embeddings = QUESTION_ROOM + 60
    try:
        for positions in ("original", "compact"):
            feeder = Feeder(backbone, StreamOptions(chunk_tokens=12, positions=positions))
            with attach(backbone.text_model) as attached:
                outcome = streamed(attached, tuned, batch, 6, losses=(AnswerLoss(), FullMemoryKL()), feeder=feeder)
            rows[positions] = outcome.rows["full_memory_kl"]
    finally:
        config.max_position_embeddings = before
    assert rows == {"original": 2, "compact": 0}


def test_a_stream_counts_the_same_alone_and_in_a_batch_for_every_loss(tuned) -> None:
    streams = [opened(1, [None], ["red"]), opened(2, [None] * 3, ["dark red", "blue and a b c", "green"])]
    losses = (AnswerLoss(), FullMemoryKL(temperature=2.0))
    both, first, second = (outcome_of(tuned, batch, 6, *losses) for batch in (streams, streams[:1], streams[1:]))
    for name in ("answer", "full_memory_kl"):
        mean = (first.losses[name] + second.losses[name]) / 2
        torch.testing.assert_close(both.losses[name], mean, rtol=1e-6, atol=0)
        assert abs(float(first.losses[name] - second.losses[name])) > 1e-3
        assert both.rows[name] == first.rows[name] + second.rows[name]


def test_a_loss_of_weight_0_is_measured_and_not_learned_from(tuned) -> None:
    alone, expected = learned(tuned, batch_of(), 6, AnswerLoss())
    beside, got = learned(tuned, batch_of(), 6, AnswerLoss(), FullMemoryKL(weight=0.0))
    assert float(alone.loss) == float(beside.loss)
    assert float(beside.losses["full_memory_kl"]) > 0
    assert_same_gradient(got, expected, 1e-12)


def passed(step: int, budget: str, loss: float, streams: int = 1, kl: float | None = None) -> Pass:
    losses = {"answer": loss} if kl is None else {"answer": loss, "full_memory_kl": kl}
    rows = {"answer": 3 * streams, "full_memory_kl": 0 if kl is None else 3 * streams}
    return Pass(step=step, budget=budget, streams=streams, loss=loss, losses=losses, rows=rows)


def test_losses_are_told_by_name_over_the_streams_that_took_part() -> None:
    told = step_metrics([passed(0, "18", 1.0, kl=4.0), passed(0, "18", 4.0, streams=2)])
    assert told == {"losses/answer": 3.0, "rows/answer": 9.0, "losses/full_memory_kl": 4.0, "rows/full_memory_kl": 3.0}
    nobody = step_metrics([passed(0, "18", 1.0)])
    assert nobody == {"losses/answer": 1.0, "rows/answer": 3.0, "rows/full_memory_kl": 0.0}
    assert step_metrics([]) == {}


def test_each_budget_has_a_running_mean_that_goes_on_from_the_log() -> None:
    """Of a step the streams of all passes and ranks alike; 4/5 of what was, 1/5 of the newest step."""
    first = [passed(0, "18", 1.0), passed(0, "18", 3.0), passed(1, "full", 0.5), passed(2, "18", 3.0, streams=2)]
    means = running_means(first, [])
    assert means == pytest.approx({"loss_at/18": 2 + 0.2 * (3 - 2), "loss_at/full": 0.5})
    history = [{"loss": 9.0, "step": 1}, {"loss_at/18": 7.0}, {**means, "loss": 1.0}, {"loss_at/full": 0.4}]
    later = running_means([passed(4, "18", 1.2), passed(3, "9", 5.0)], history)
    assert later == pytest.approx({"loss_at/18": 2.2 - 0.2, "loss_at/9": 5.0})
