"""One micro-step: stream a batch of samples through the policy, ask their questions, return the loss."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from omnimem.attach import Seam
from omnimem.backbones import Turn
from omnimem.feeding import IGNORED, Feeder, Opened, play
from omnimem.memory import Memory
from omnimem.policy import Policy
from omnimem.selection import Softness
from omnimem.stream import Reading, Usage
from omnimem.tokens import Modality
from omnimem.tuning.gradient import Gradient
from omnimem.tuning.losses import answer_losses


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The loss of a batch, and what its streams took."""

    loss: Tensor
    usage: Usage
    kept: dict[str, int]  # entries at answer time by modality, per stream, summed over layers
    seconds_per_chunk: float


def streamed_loss(
    seam: Seam,
    feeder: Feeder,
    batch: Sequence[Opened],
    policy: Policy,
    *,
    softness: Softness | None,
    carry: Gradient,
) -> Outcome:
    """Mean over streams of the mean cross-entropy of their answer tokens, through the policy used in evaluation.

    A stream counts the same in a batch, in an accumulated step and on a rank of its own, however many answers it has.
    Raises ValueError when a stream has no answer to learn from.
    """
    started, losses, streams = time.perf_counter(), [], []
    stream = feeder.stream(seam, policy, batch=len(batch), softness=softness, carry=carry)
    for due in play(stream, feeder.chunks(batch), batch[0].moments):
        prompt = feeder.prompt([_turns(opened, due) for opened in batch], batch[0].tracks)
        if prompt.labels is None or not bool((prompt.labels != IGNORED).any()):
            continue
        losses.append(carry.read(_loss_of(stream.reader(prompt), prompt.labels, feeder.backbone.head), stream.memory))
        streams.append((prompt.labels != IGNORED).nonzero()[:, 0])
    loss = _mean_over_streams(losses, streams, batch)
    counts = stream.memory.counts()
    kept = {kind.name.lower(): sum(layer[kind] for layer in counts) for kind in Modality}
    elapsed = (time.perf_counter() - started) / max(1, stream.usage.chunks)
    return Outcome(loss=loss, usage=stream.usage, kept=kept, seconds_per_chunk=elapsed)


def _loss_of(
    read: Callable[[Memory], Reading], labels: Tensor, head: Callable[[Tensor], Tensor]
) -> Callable[[Memory], Tensor]:
    """Loss of each answer token as a function of the memory; the head sees the answers' rows only."""
    rows = labels != IGNORED
    return lambda memory: answer_losses(head(read(memory).hidden[rows]), labels[rows])


def _mean_over_streams(losses: Sequence[Tensor], streams: Sequence[Tensor], batch: Sequence[Opened]) -> Tensor:
    """Mean over the streams of the mean over their rows."""
    owners = torch.cat(list(streams)) if streams else torch.zeros(0, dtype=torch.long)
    counts = owners.bincount(minlength=len(batch))
    silent = [opened.sample.id for opened, count in zip(batch, counts.tolist(), strict=True) if count == 0]
    if silent:
        raise ValueError(f"{', '.join(silent)}: no answer to learn from; give an assistant message with loss: true")
    return (torch.cat(list(losses)) / counts[owners]).sum() / len(batch)


def _turns(opened: Opened, due: Sequence[float | None]) -> list[Turn]:
    questions = opened.sample.questions
    return [
        Turn(text=questions[number].text, answer=questions[number].answer)
        for number in opened.asked(due)
        if questions[number].loss and questions[number].answer is not None
    ]
