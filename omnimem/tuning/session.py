"""One micro-step: stream a batch of samples through the policy, ask their questions, return the loss."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from omnimem.attach import Seam
from omnimem.backbones import Turn
from omnimem.feeding import IGNORED, Feeder, Opened, play
from omnimem.policy import Policy
from omnimem.stream import Carry, Stream, Usage
from omnimem.tokens import Modality
from omnimem.tuning.losses import answer_loss


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
    temperature: float | None,
    carry: Carry,
) -> Outcome:
    """Mean answer cross-entropy over all questions of samples of one layout, through the policy used in evaluation.

    Raises ValueError when no answer is to be learned.
    """
    started, losses, weights = time.perf_counter(), [], []
    stream = Stream(seam, policy, batch=len(batch), temperature=temperature, carry=carry)
    for numbers in play(stream, feeder.chunks(batch), batch[0].times):
        prompt = feeder.prompt([_turns(opened, numbers) for opened in batch], batch[0].tracks)
        if prompt.labels is None or not bool((prompt.labels != IGNORED).any()):
            continue
        rows = prompt.labels != IGNORED
        hidden = stream.ask(prompt).hidden[rows]  # the head sees answer rows only
        losses.append(answer_loss(feeder.backbone.head(hidden), prompt.labels[rows]))
        weights.append(int(rows.sum()))
    if not losses:
        names = ", ".join(opened.sample.id for opened in batch)
        raise ValueError(f"{names}: no answer to learn from; give an assistant message with loss: true")
    loss = sum(part * weight for part, weight in zip(losses, weights, strict=True)) / sum(weights)
    counts = stream.memory.counts()
    kept = {kind.name.lower(): sum(layer[kind] for layer in counts) for kind in Modality}
    elapsed = (time.perf_counter() - started) / max(1, stream.usage.chunks)
    return Outcome(loss=torch.as_tensor(loss), usage=stream.usage, kept=kept, seconds_per_chunk=elapsed)


def _turns(opened: Opened, numbers: Sequence[int]) -> list[Turn]:
    questions = opened.sample.questions
    return [
        Turn(text=questions[number].text, answer=questions[number].answer)
        for number in numbers
        if questions[number].loss and questions[number].answer is not None
    ]
