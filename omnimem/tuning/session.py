"""One forward pass of training: stream a batch of samples under the policy, ask the questions, compute the losses."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from omnimem.backbones import Turn
from omnimem.backbones.base import Tracks
from omnimem.memory import Memory
from omnimem.policies.base import Policy
from omnimem.selection import Softness
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import MemoryStep
from omnimem.streaming.feeder import feed_until_due
from omnimem.streaming.prompt_pass import IGNORED, Prompt, PromptState
from omnimem.streaming.stream import Stream, Usage
from omnimem.tokens import Chunk, Modality
from omnimem.tuning.lora import StreamedModel
from omnimem.tuning.losses import AbstractLoss, AnswerLoss, Rows, answer_losses


@runtime_checkable
class TrainingStream(Protocol):
    """A stream with questions to learn from: `EncodedSample` of media, `TextSample` of plain text, or your own."""

    @property
    def id(self) -> str: ...

    @property
    def tokens(self) -> int:
        """Evictable tokens of the stream; losses with a teacher are left out above their `max_tokens`."""
        ...

    @property
    def moments(self) -> tuple[float | None, ...]:
        """The distinct times of the questions, as `Chunk.seconds` counts them; None (after the end) is the last."""
        ...

    @property
    def tracks(self) -> Tracks | None: ...

    def turns(self, due: Sequence[float | None]) -> Sequence[Turn]:
        """The questions at these times with an answer to train on."""
        ...


@runtime_checkable
class HasHead(Protocol):
    """What a loss needs of a backbone."""

    @property
    def head(self) -> Callable[[Tensor], Tensor]: ...


@runtime_checkable
class StreamFeeder(Protocol):
    """Makes chunks and prompts of streams: `Feeder`, `TextFeeder`, or your own (docs/adding_a_model.md)."""

    @property
    def backbone(self) -> HasHead: ...

    def chunks(
        self, batch: Sequence[Any], chunk_tokens: int | None = None, *, rests: bool = False
    ) -> Iterator[Chunk]: ...

    def prompt(self, rows: Sequence[Sequence[Turn]], tracks: Tracks | None) -> Prompt: ...

    def stream(self, attached: StreamedAttention, policy: Policy, *, batch: int = 1, **settings: Any) -> Stream: ...

    def with_oracle(self, policy: Policy, batch: Sequence[Any]) -> Policy: ...


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The loss of a batch, and statistics of its streams."""

    loss: Tensor  # weighted sum of the losses, to call backward on
    losses: dict[str, Tensor]  # unweighted and detached, by name; only losses that were computed
    rows: dict[str, int]  # answer tokens by loss; 0 when the streams are too long for the loss
    streams: int
    usage: Usage
    kept: dict[str, int | float]  # entries at answer time by modality, per stream, summed over layers
    seconds_per_chunk: float  # including the teacher


@final
@dataclass(frozen=True, kw_only=True)
class _TrainingBatch:
    """The chunks and prompts of a batch, the same for teacher and student."""

    feeder: StreamFeeder
    batch: Sequence[TrainingStream]
    chunk_tokens: int | None

    def __post_init__(self) -> None:
        unanswered = [stream.id for stream in self.batch if not stream.turns(stream.moments)]
        if unanswered:
            raise ValueError(
                f"{', '.join(unanswered)}: no answer to train on; give an assistant message with loss: true"
            )

    def chunks(self) -> Iterator[Chunk]:
        return self.feeder.chunks(self.batch, self.chunk_tokens, rests=True)

    def prompts(self, stream: Stream) -> Iterator[tuple[Stream, Prompt, Int[Tensor, "batch tokens"]]]:
        """Feed the stream, and yield (stream to ask, prompt, labels) at each time with answers to train on."""
        for due in feed_until_due(stream, self.chunks(), self.batch[0].moments):
            prompt = self.feeder.prompt([one.turns(due.moments) for one in self.batch], self.batch[0].tracks)
            if prompt.labels is not None and bool((prompt.labels != IGNORED).any()):
                yield due.stream, prompt, prompt.labels


def streamed_loss(
    attached: StreamedAttention,
    feeder: StreamFeeder,
    batch: Sequence[TrainingStream],
    policy: Policy,
    *,
    softness: Softness | None,
    carry: MemoryStep,
    losses: Sequence[AbstractLoss] = (AnswerLoss(),),
    model: StreamedModel | None = None,
    chunk_tokens: int | None = None,
) -> Outcome:
    """Weighted sum of the losses, each a mean over streams of the mean over a stream's answer tokens.

    Each stream has the same weight, whatever its number of answers, and however streams are split into batches,
    accumulation steps and ranks. It adds 0 to a loss that does not apply to it; at least one loss applies to every
    stream. `model` is needed for a loss with a teacher, which is the model without its adapter.
    Raises ValueError when a stream has no answer.
    """
    # 1. the teacher's hidden states
    started = time.perf_counter()
    data = _TrainingBatch(feeder=feeder, batch=batch, chunk_tokens=chunk_tokens)
    applied = [loss for loss in losses if loss.applies_to(batch[0].tokens)]
    if any(loss.needs_teacher for loss in applied):
        teacher_states = _teacher_states(attached, data, policy, model)
        applied = [loss for loss in applied if not loss.needs_teacher or teacher_states]
    else:
        teacher_states = []
    # 2. stream the chunks, ask the questions
    stream = feeder.stream(
        attached, feeder.with_oracle(policy, batch), batch=len(batch), softness=softness, carry=carry
    )
    values, owners = [], []
    asked = stream
    for number, (asked, prompt, labels) in enumerate(data.prompts(stream)):
        teacher = teacher_states[number] if teacher_states else None
        loss = _loss_of(applied, asked.reader(prompt), labels, feeder.backbone.head, teacher)
        values.append(asked.read(loss))
        owners.append((labels != IGNORED).nonzero()[:, 0])
    # 3. reduce
    means = _means_over_streams(torch.cat(values, dim=1), torch.cat(owners), len(batch))
    weights = means.new_tensor([loss.weight for loss in applied])
    rows = sum(len(each) for each in owners)
    counts = asked.memory.counts()
    return Outcome(
        loss=(weights * means).sum(),
        losses={loss.name: mean for loss, mean in zip(applied, means.detach(), strict=True)},
        rows={loss.name: rows if loss in applied else 0 for loss in losses},
        streams=len(batch),
        usage=asked.usage,
        kept={kind.name.lower(): sum(layer[kind] for layer in counts) for kind in Modality},
        seconds_per_chunk=(time.perf_counter() - started) / max(1, asked.usage.chunks),
    )


@final
@dataclass(frozen=True, kw_only=True)
class Score:
    """What one stream answers without learning."""

    loss: float  # mean of -log q over the answer tokens
    questions: int
    correct: int  # questions whose every answer token, and its end, is the most likely one: what greedy decoding gives


@torch.no_grad()
def streamed_scores(
    attached: StreamedAttention, feeder: StreamFeeder, batch: Sequence[TrainingStream], policy: Policy
) -> list[Score]:
    """The answers to each stream of a batch, read as in evaluation: hard selection, chunks of `stream.chunk_tokens`.

    Raises ValueError when a stream has no answer.
    """
    # 1. stream the chunks, ask the questions
    data = _TrainingBatch(feeder=feeder, batch=batch, chunk_tokens=None)
    stream = feeder.stream(attached, feeder.with_oracle(policy, batch), batch=len(batch))
    losses: list[list[float]] = [[] for _ in batch]
    wrong: list[dict[tuple[int, int], bool]] = [{} for _ in batch]  # by (pass, question)
    for number, (asked, prompt, labels) in enumerate(data.prompts(stream)):
        rows = labels != IGNORED
        logits = feeder.backbone.head(asked.ask(prompt).hidden[rows])
        found = answer_losses(logits, labels[rows]).tolist()
        missed = (logits.argmax(dim=-1) != labels[rows]).tolist()
        places = zip(rows.nonzero()[:, 0].tolist(), prompt.segments[rows].tolist(), strict=True)
        for (owner, question), loss, miss in zip(places, found, missed, strict=True):
            losses[owner].append(loss)
            wrong[owner][number, question] = wrong[owner].get((number, question), False) or miss
    # 2. a score per stream
    return [
        Score(loss=fmean(each), questions=len(verdicts), correct=len(verdicts) - sum(verdicts.values()))
        for each, verdicts in zip(losses, wrong, strict=True)
    ]


@torch.no_grad()
def _teacher_states(
    attached: StreamedAttention, data: _TrainingBatch, policy: Policy, model: StreamedModel | None
) -> list[Float[Tensor, "rows width"]]:
    """Final hidden states at the answers' rows of the model without adapter and with full memory, one per prompt.

    Empty when the stream exceeds the positions of the model: a full memory cannot move its tokens to lower positions.
    """
    if model is None:
        raise ValueError("a loss needs the teacher; pass the model to streamed_loss")
    stream = data.feeder.stream(attached, policy.with_budget(None), batch=len(data.batch))
    last = stream.last_position
    if last is not None and any(int(chunk.positions.max()) >= last for chunk in data.chunks()):
        return []
    with model.disable_adapter():  # also disables its dropout
        return [asked.ask(prompt).hidden[labels != IGNORED] for asked, prompt, labels in data.prompts(stream)]


def _loss_of(
    losses: Sequence[AbstractLoss],
    read: Callable[[Memory], PromptState],
    labels: Int[Tensor, "batch tokens"],
    head: Callable[[Tensor], Tensor],
    teacher_states: Float[Tensor, "rows width"] | None,
) -> Callable[[Memory], Float[Tensor, "losses rows"]]:
    """Each loss of each answer token as a function of the memory; the head is applied to the answers' rows only.

    Until backward the teacher's hidden states are stored, which are smaller than its logits.
    """
    rows = labels != IGNORED

    def loss(memory: Memory) -> Tensor:
        teacher = None if teacher_states is None else head(teacher_states)
        seen = Rows(logits=head(read(memory).hidden[rows]), labels=labels[rows], teacher=teacher)
        return torch.stack([each(seen) for each in losses])

    return loss


def _means_over_streams(
    values: Float[Tensor, "losses rows"], owners: Int[Tensor, " rows"], streams: int
) -> Float[Tensor, " losses"]:
    """For each loss, the mean over streams of the mean over their rows."""
    counts = owners.bincount(minlength=streams)
    return (values / counts[owners]).sum(dim=1) / streams
