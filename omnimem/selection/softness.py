"""Softened selection in training: options of a run, temperature over its steps, and the settings of one step."""

import math
from dataclasses import dataclass, field
from typing import Literal, final

from omnimem.view import ScoreGradient

Softening = Literal["hard", "straight_through", "soft"]

WIDTH = 3  # `soft` keeps at most this many times the tokens of hard selection
FULL_WIDTH = 0.2  # temperature from which it keeps that many; below, the surplus is proportional to it


@final
@dataclass(frozen=True, kw_only=True)
class Softness:
    """How one training step softens selection; without one, selection is hard."""

    temperature: float  # T, in standard deviations of the scores
    form: Literal["straight_through", "soft"] = "straight_through"
    gradient: ScoreGradient = "redundancy"  # which part of the score has gradient

    def stay(self, kept: int, size: int) -> int:
        """How many of `size` tokens are kept where hard selection keeps `kept`: kept + floor(2 kept min(1, T / 0.2)).

        The number depends on T alone, so it is the same for all streams of a batch and on all ranks, and known in
        advance. It is proportional to T because tokens with a noticeable weight lie within a few T of the threshold:
        for bell-shaped scores of which one in five is kept, those left out below T = 0.2 weigh under 0.003 each.
        """
        if self.form == "straight_through":
            return kept
        return min(size, kept + int((WIDTH - 1) * kept * min(1.0, self.temperature / FULL_WIDTH)))


@final
@dataclass(frozen=True, kw_only=True)
class TemperatureOptions:
    """T of softened selection over the steps of a run, in standard deviations of the scores."""

    start: float = 1.0  # T at the first step
    end: float = 0.05  # T at the last step
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # of T between them

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise ValueError(
                f"temperature start = {self.start:g} and end = {self.end:g} must both be finite numbers above 0; "
                "the defaults are 1 and 0.05"
            )

    def at(self, progress: float) -> float:
        """T at a fraction of the run: `start` throughout, or from `start` at 0 to `end` at 1."""
        done = min(1.0, max(0.0, progress))
        if self.schedule == "constant":
            return self.start
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@final
@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Softening of selection in training; evaluation is hard (docs/paper.md, "Softened selection")."""

    softening: Softening = "straight_through"  # gates that let the scores learn, or hard selection
    temperature: TemperatureOptions = field(default_factory=TemperatureOptions)
    gradient: Literal["redundancy", "both"] = "redundancy"  # part of the score that learns; both: attention mass too

    def __post_init__(self) -> None:
        if self.softening == "hard" and self.gradient == "both":
            raise ValueError(
                "gradient = both has no effect with softening = hard, under which scores do not learn; "
                "choose straight_through or soft, or leave gradient out"
            )

    def at(self, progress: float) -> Softness | None:
        """The softness of a step at a fraction of the run; None: hard."""
        if self.softening == "hard":
            return None
        return Softness(temperature=self.temperature.at(progress), form=self.softening, gradient=self.gradient)

    def most(self, slots: int) -> int:
        """The largest number of entries after an eviction in training, where evaluation keeps `slots`."""
        widest = max(self.temperature.start, self.temperature.end)
        form = "soft" if self.softening == "soft" else "straight_through"
        return Softness(temperature=widest, form=form).stay(slots, WIDTH * slots)
