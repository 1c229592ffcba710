"""PyramidKV: SnapKV's score, with a budget that shrinks from layer to layer (arXiv 2406.02069)."""

from dataclasses import dataclass, replace
from typing import Any, Literal, final

from omnimem.budget import Budget, Slots
from omnimem.budget.apportion import apportion
from omnimem.policies.baselines.presets import Preset, allotted, part, settings
from omnimem.policies.baselines.ranked import Pooling, RankedPolicy
from omnimem.policies.baselines.snapkv import Window, refuse

PRESETS: dict[str, dict[str, Any]] = {
    "as_published": {"window": 32, "kernel": 5, "pooling": "mean", "beta": 20.0, "per_head": True}
}


@final
@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """Slots that fall linearly with depth, from max = 2 base - base / beta down to base / beta, and the window on top.

    base is the mean number of slots without the window w. Of N arrived tokens no layer can keep more than N - w beside
    the window: then max = N - w and min = 2 base - max; below 2 base all layers have the same number. The source rounds
    the step down, which leaves a remainder; here slots are apportioned, so that the sum is exact.
    """

    window: int
    beta: float

    def __call__(self, budget: Budget, arrived: int) -> Budget:
        """A budget of the same total, after `arrived` audio and visual tokens."""
        layers = budget.layers
        window = min(self.window, budget.total // layers // 2)
        past = budget.total - layers * window
        base = past / layers
        least, most = base / self.beta, 2 * base - base / self.beta
        if arrived < 2 * base or layers == 1:
            least = most = base
        elif most >= arrived - window:
            least, most = 2 * base - (arrived - window), float(arrived - window)
        falling = [most - number * (most - least) / max(1, layers - 1) for number in range(layers)]
        sizes = apportion(falling, past, [0] * layers, [past] * layers)
        pairs = zip(budget.slots, sizes, strict=True)
        return replace(budget, slots=tuple(resplit(slots, size + window, budget.split) for slots, size in pairs))


def resplit(slots: Slots, size: int, split: bool) -> Slots:
    """`size` slots in the same audio-visual proportion; all of them in a shared pool."""
    if not split:
        return 0, size
    audio, visual = apportion([float(part) for part in slots], size, [min(1, size // 2)] * 2, [size] * 2)
    return audio, visual


@final
@dataclass(frozen=True, kw_only=True)
class PyramidKVOptions:
    """The end of every chunk counts as the end of the prefill; N is the number of arrived tokens (there: the prompt).

    as_published  window 32, mean over 5 neighbours, beta 20; one pool of audio and visual tokens per layer
    shared_split  the same layers; within each, audio and visual slots in the budget's audio-visual split
    The window is at most half of the mean slots of a layer. All other choices are those of SnapKV.
    """

    name: Literal["pyramidkv"] = "pyramidkv"
    preset: Preset = "as_published"
    window: int | None = None  # number of queries, whose tokens are always kept
    kernel: int | None = None  # neighbours that are pooled; odd
    pooling: Pooling | None = None  # of the scores of neighbours
    beta: float | None = None  # base over the slots of the last layer
    per_head: bool | None = None  # every key-value head keeps tokens of its own

    def __post_init__(self) -> None:
        refuse(self.window, self.kernel)
        if self.beta is not None and self.beta < 1:
            raise ValueError(f"policy.beta = {self.beta:g} must be at least 1; at 1 all layers have the same slots")

    def build(self, budget: Budget | None) -> RankedPolicy:
        """The policy at a budget; None: full memory."""
        chosen = settings(self, PRESETS) | {"budget": allotted(budget, self.preset)}
        return part(RankedPolicy, {**chosen, "ranking": part(Window, chosen), "reshape": part(Pyramid, chosen)})
