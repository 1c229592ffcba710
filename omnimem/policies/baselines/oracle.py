"""Oracle: knows which tokens hold the answers; an upper bound, not a method."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from omnimem.budget import Budget
from omnimem.policies.base import Policy, PolicyError, StreamOutline, Traits, keep_highest
from omnimem.policies.baselines.presets import Preset, allotted
from omnimem.selection import Softness
from omnimem.tokens import Tokens
from omnimem.view import LayerView


@final
@dataclass(frozen=True, kw_only=True)
class OraclePolicy(Policy):
    """The needles in order of importance, then the most recent tokens."""

    needles: tuple[tuple[int, ...], ...] = ()  # arrival numbers, stream by stream, most important first

    @property
    def traits(self) -> Traits:
        """Under a budget it must know the needles."""
        return Traits(needs_oracle=self.budget is not None)

    def with_oracle(self, streams: Sequence[StreamOutline]) -> "OraclePolicy":
        """The policy with the needles of each stream.

        Raises PolicyError when a stream has none.
        """
        if any(not outline.needles for outline in streams) and self.budget is not None:
            raise PolicyError(
                "policy oracle must know which tokens hold the answers, and a stream has no `needles` in its meta; "
                "make recall streams with omnimem synthesize"
            )
        return replace(self, needles=tuple(outline.needles for outline in streams))

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; selection has no gradient."""
        slots = self.layer_slots(layer)
        return view.pool if slots is None else keep_highest(view.pool, self._scores(view), slots)

    def _scores(self, view: LayerView) -> Float[Tensor, "batch tokens"]:
        if len(self.needles) != len(view.order):
            raise PolicyError("policy oracle does not know these streams; call Feeder.with_oracle first")
        scores = view.order.float()
        top = float(view.order.max()) + 1
        for row, needles in enumerate(self.needles):
            for place, number in enumerate(reversed(needles)):
                scores[row].masked_fill_(view.order[row] == number, top + place)
        return scores


@final
@dataclass(frozen=True, kw_only=True)
class OracleOptions:
    """One copy of every event, in every layer: the fewest tokens that answer all questions of a recall stream.

    as_published  one pool of audio and visual tokens per layer
    shared_split  the audio-visual split of the budget
    """

    name: Literal["oracle"] = "oracle"
    preset: Preset = "as_published"

    def build(self, budget: Budget | None) -> OraclePolicy:
        """The policy at a budget; None: full memory."""
        return OraclePolicy(name=self.name, budget=allotted(budget, self.preset))
