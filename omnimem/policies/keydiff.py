"""KeyDiff: the tokens whose keys differ most from the mean key stay (arXiv 2504.15364, as kvpress writes it)."""

from dataclasses import dataclass
from typing import Any, Literal, final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from omnimem.budget import Budget
from omnimem.policies.presets import Preset, allotted, settings
from omnimem.policies.ranked import AbstractRanking, RankedPolicy, learning
from omnimem.selection import Room
from omnimem.view import LayerView

PRESETS: dict[str, dict[str, Any]] = {"as_published": {"per_head": True}}


@final
@dataclass(frozen=True, kw_only=True)
class KeyDifference(AbstractRanking):
    """-cos(k, mean of the normalised keys), mean over the key-value heads of a row.

    The source is silent on streams and on text: keys are as stored (after RoPE), and the mean is taken over the whole
    pool [memory ; chunk], text included, as it is over the whole cache there.
    """

    def __call__(self, view: LayerView, room: Room, depth: float) -> Float[Tensor, "batch tokens"]:
        with learning(view, "content"):
            keys = F.normalize(view.pool.keys.float(), dim=-1)
            anchor = F.normalize(keys.mean(dim=2, keepdim=True), dim=-1)
            return -(keys * anchor).sum(dim=-1).mean(dim=1)


@final
@dataclass(frozen=True, kw_only=True)
class KeyDiffOptions:
    """A text method, judged after every chunk instead of once.

    as_published  every key-value head keeps its own tokens, of one pool of audio and visual tokens
    shared_split  the same with the audio-visual split of the budget
    """

    name: Literal["keydiff"] = "keydiff"
    preset: Preset = "as_published"
    per_head: bool | None = None  # every key-value head keeps its own tokens

    def build(self, budget: Budget | None) -> RankedPolicy:
        """The policy at a budget; None: full memory."""
        chosen = settings(self, PRESETS)
        return RankedPolicy(
            name=self.name, ranking=KeyDifference(), budget=allotted(budget, self.preset), per_head=chosen["per_head"]
        )
