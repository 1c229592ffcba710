"""Training metrics: each loss by its name, and the loss at each budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import final

from omnimem.tuning.session import Outcome

WEIGHT = 0.2  # weight of the newest step in a running mean


@final
@dataclass(frozen=True, kw_only=True)
class Pass:
    """The metrics of one batch on one rank."""

    step: int
    budget: str  # name of its curve
    streams: int
    loss: float
    losses: dict[str, float]  # unweighted, by name; only losses that were computed
    rows: dict[str, int]  # answer tokens by loss

    @classmethod
    def of(cls, outcome: Outcome, *, step: int, budget: str) -> "Pass":
        """Convert the tensors of an outcome to numbers."""
        losses = {name: float(value) for name, value in outcome.losses.items()}
        loss, rows = float(outcome.loss), outcome.rows
        return cls(step=step, budget=budget, streams=outcome.streams, loss=loss, losses=losses, rows=rows)


def step_metrics(passes: Sequence[Pass]) -> dict[str, float]:
    """`losses/NAME`: mean over the streams with this loss; `rows/NAME`: their number of answer tokens."""
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for each in passes for name in each.rows):
        taking = [each for each in passes if name in each.losses]
        streams = sum(each.streams for each in taking)
        if streams:
            metrics[f"losses/{name}"] = sum(each.losses[name] * each.streams for each in taking) / streams
        metrics[f"rows/{name}"] = float(sum(each.rows[name] for each in passes))
    return metrics


def running_means(passes: Sequence[Pass], history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`loss_at/BUDGET` for the budgets of these passes: a running mean over the steps at that budget.

    `passes` are those of all ranks. Continues from the newest value in the log history, also in a resumed run.
    """
    means: dict[str, float] = {}
    for budget, loss in step_losses(passes):
        name = f"loss_at/{budget}"
        before = means.get(name, next((line[name] for line in reversed(history) if name in line), loss))
        means[name] = before + WEIGHT * (loss - before)
    return means


def step_losses(passes: Sequence[Pass]) -> list[tuple[str, float]]:
    """Budget and loss of each step in which a stream was read: the mean over its streams on all ranks, in nats."""
    losses = []
    for _, members in groupby(sorted(passes, key=lambda each: each.step), key=lambda each: each.step):
        same = list(members)
        losses.append((same[0].budget, sum(each.loss * each.streams for each in same) / sum(p.streams for p in same)))
    return losses
