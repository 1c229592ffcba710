"""One micro-step: stream a batch of samples through the policy, ask their questions, return the loss."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnimem.backbones import Turn
from omnimem.memory import Memory
from omnimem.policies.base import Policy
from omnimem.selection import Softness
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import MemoryStep
from omnimem.streaming.feeder import IGNORED, EncodedSample, Feeder, feed_until_due
from omnimem.streaming.prompt_pass import Prompt, PromptState
from omnimem.streaming.stream import Stream, Usage
from omnimem.tokens import Chunk, Modality
from omnimem.tuning.lora import StreamedModel
from omnimem.tuning.losses import AbstractLoss, AnswerLoss, Rows


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The loss of a batch, and what its streams took."""

    loss: Tensor  # weighted sum of the losses: where backward starts
    losses: dict[str, Tensor]  # by name, without weights and out of the graph, of those that took part
    rows: dict[str, int]  # answer tokens that took part, by loss; 0: the streams are longer than the loss takes
    streams: int
    usage: Usage
    kept: dict[str, int | float]  # entries at answer time by modality, per stream, summed over layers
    seconds_per_chunk: float  # the teacher's time with it


@final
@dataclass(frozen=True, kw_only=True)
class _Lesson:
    """What is streamed and what is asked on the way: the same for teacher and student."""

    feeder: Feeder
    batch: Sequence[EncodedSample]
    chunk_tokens: int | None

    def __post_init__(self) -> None:
        silent = [opened.sample.id for opened in self.batch if not _turns(opened, opened.moments)]
        if silent:
            raise ValueError(f"{', '.join(silent)}: no answer to learn from; give an assistant message with loss: true")

    def chunks(self) -> Iterator[Chunk]:
        return self.feeder.chunks(self.batch, self.chunk_tokens)

    def prompts(self, stream: Stream) -> Iterator[tuple[Prompt, Int[Tensor, "batch tokens"]]]:
        """Feeds the stream, and yields prompt and labels whenever answers are due."""
        for due in feed_until_due(stream, self.chunks(), self.batch[0].moments):
            prompt = self.feeder.prompt([_turns(opened, due) for opened in self.batch], self.batch[0].tracks)
            if prompt.labels is not None and bool((prompt.labels != IGNORED).any()):
                yield prompt, prompt.labels


def streamed_loss(
    attached: StreamedAttention,
    feeder: Feeder,
    batch: Sequence[EncodedSample],
    policy: Policy,
    *,
    softness: Softness | None,
    carry: MemoryStep,
    losses: Sequence[AbstractLoss] = (AnswerLoss(),),
    model: StreamedModel | None = None,
    chunk_tokens: int | None = None,
) -> Outcome:
    """Weighted sum of the losses, each the mean over streams of its mean over a stream's answer tokens.

    A stream counts the same in a batch, in an accumulated step and on a rank of its own, however many answers it has;
    in a loss that does not take it, as 0. One of the losses at least takes every stream. `model` is the one whose
    adapter the teacher does without, where a loss needs one. Raises ValueError when a stream has no answer.
    """
    started = time.perf_counter()
    lesson = _Lesson(feeder=feeder, batch=batch, chunk_tokens=chunk_tokens)
    taking = [loss for loss in losses if loss.takes(batch[0].tokens)]
    if any(loss.needs_teacher for loss in taking):
        taught = _taught(attached, lesson, policy, model)
        taking = [loss for loss in taking if not loss.needs_teacher or taught]
    else:
        taught = []
    stream = feeder.stream(
        attached, feeder.with_oracle(policy, batch), batch=len(batch), softness=softness, carry=carry
    )
    values, owners = [], []
    for number, (prompt, labels) in enumerate(lesson.prompts(stream)):
        teacher = taught[number] if taught else None
        loss = _loss_of(taking, stream.reader(prompt), labels, feeder.backbone.head, teacher)
        values.append(stream.read(loss))
        owners.append((labels != IGNORED).nonzero()[:, 0])
    means = _means_over_streams(torch.cat(values, dim=1), torch.cat(owners), len(batch))
    weights = means.new_tensor([loss.weight for loss in taking])
    rows = sum(len(each) for each in owners)
    counts = stream.memory.counts()
    return Outcome(
        loss=(weights * means).sum(),
        losses={loss.name: mean for loss, mean in zip(taking, means.detach(), strict=True)},
        rows={loss.name: rows if loss in taking else 0 for loss in losses},
        streams=len(batch),
        usage=stream.usage,
        kept={kind.name.lower(): sum(layer[kind] for layer in counts) for kind in Modality},
        seconds_per_chunk=(time.perf_counter() - started) / max(1, stream.usage.chunks),
    )


@torch.no_grad()
def _taught(
    attached: StreamedAttention, lesson: _Lesson, policy: Policy, model: StreamedModel | None
) -> list[Float[Tensor, "rows width"]]:
    """Final hidden states at the answers' rows, moment by moment, of the untouched model with full memory.

    Empty where the stream outgrows the model's positions: kept tokens move up, a full memory cannot.
    """
    if model is None:
        raise ValueError("a loss needs the teacher; give streamed_loss the model whose adapter it does without")
    stream = lesson.feeder.stream(attached, policy.with_budget(None), batch=len(lesson.batch))
    last = stream.last_position
    if last is not None and any(int(chunk.positions.max()) >= last for chunk in lesson.chunks()):
        return []
    with model.disable_adapter():  # and so without its dropout
        return [stream.ask(prompt).hidden[labels != IGNORED] for prompt, labels in lesson.prompts(stream)]


def _loss_of(
    losses: Sequence[AbstractLoss],
    read: Callable[[Memory], PromptState],
    labels: Int[Tensor, "batch tokens"],
    head: Callable[[Tensor], Tensor],
    taught: Float[Tensor, "rows width"] | None,
) -> Callable[[Memory], Float[Tensor, "losses rows"]]:
    """Each loss of each answer token as a function of the memory; the head sees the answers' rows only.

    What waits for backward of the teacher is as wide as the model, not as the vocabulary.
    """
    rows = labels != IGNORED

    def loss(memory: Memory) -> Tensor:
        teacher = None if taught is None else head(taught)
        seen = Rows(logits=head(read(memory).hidden[rows]), labels=labels[rows], teacher=teacher)
        return torch.stack([each(seen) for each in losses])

    return loss


def _means_over_streams(
    values: Float[Tensor, "losses rows"], owners: Int[Tensor, " rows"], streams: int
) -> Float[Tensor, " losses"]:
    """Of each loss the mean over the streams of the mean over their rows."""
    counts = owners.bincount(minlength=streams)
    return (values / counts[owners]).sum(dim=1) / streams


def _turns(opened: EncodedSample, due: Sequence[float | None]) -> list[Turn]:
    questions = opened.sample.questions
    return [
        Turn(text=questions[number].text, answer=questions[number].answer)
        for number in opened.asked(due)
        if questions[number].loss and questions[number].answer is not None
    ]
