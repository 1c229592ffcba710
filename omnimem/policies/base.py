"""Policy: which tokens each layer keeps after a chunk; training and evaluation use the same object."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, final

import torch
from jaxtyping import Bool, Int, Int8
from torch import Tensor

from omnimem.budget import Budget
from omnimem.errors import UserError
from omnimem.scoring import AbstractScorer, Compared, Covered
from omnimem.selection import LayerSlots, Softness, groups, select
from omnimem.tokens import ABSENT, Chunk, Modality, Tokens
from omnimem.view import Contest, LayerView, Measures

# The gradient modes (`tuning.gradient`), measuring a budget's signals under the policy, gradient through the attention
# that tokens receive (`selection.gradient: both`), and keeping what the model without its adapter keeps.
Mode = Literal["full", "states", "released", "paper", "calibration", "learned_importance", "base_selection"]
SelectionFrom = Literal["tuned", "base"]
Markers = Literal["keep", "with_group"]


class PolicyError(UserError):
    """A policy that cannot work on the streams it is given; the message gives the reason and the fix."""


@final
@dataclass(frozen=True, kw_only=True)
class ProbePrompt:
    """A text that is asked of the memory after every chunk, in place of the questions that no policy may know."""

    text: str | None  # None: the tokens that the chat template puts after a question
    full_pass: bool = True  # it passes all layers, as a question does; False: each layer projects its embeddings


@final
@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the stream must know of a policy: how its memory is stored, and what is measured for it."""

    per_head: bool = False  # every key-value head keeps tokens of its own
    ragged: bool = False  # streams of a batch, or heads of a stream, may keep unequal numbers of tokens
    merges: bool = False  # some kept tokens are averages of others
    reindex: bool = False  # the kept tokens move up to contiguous times after every chunk
    probes: tuple[ProbePrompt, ...] = ()  # asked after every chunk; the view has their queries and keys in this order
    needs_mass: bool = (
        False  # the attention that a chunk gives to the pool, mean over heads, is measured in every layer
    )
    needs_novelty: bool = False  # the feature on which redundancy is measured must be carried
    needs_place: bool = False  # frame, row and column of kept tokens must be carried
    compared: Compared | None = None  # vectors of a token that are compared with those of tokens of higher score
    needs_oracle: bool = False  # it must know the content of a stream before it is read: no streaming method


@final
@dataclass(frozen=True, kw_only=True)
class StreamOutline:
    """The content of a stream, known before it is read: for baselines and bounds that are no streaming methods."""

    modality: Int8[Tensor, " tokens"]  # of all tokens, in order of arrival
    place: Int[Tensor, "places tokens"]  # frame, row, column and group, as in `Chunk`
    needles: tuple[int, ...] = ()  # arrival numbers of the tokens that hold the answers, most important first


@final
@dataclass(frozen=True, kw_only=True)
class Prefiltered:
    """The part of a chunk that is read."""

    chunk: Chunk
    order: Int[Tensor, "batch tokens"]  # arrival numbers; those of dropped tokens are missing


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Which tokens each layer keeps after a chunk.

    The cycle: every layer reads [memory ; chunk], then keeps its budget of that pool (`keep`). A method that does more
    than that says so in its `traits`, or overrides `prefilter` or `with_oracle`.
    """

    name: str
    budget: Budget | None  # None: full memory, nothing is evicted
    measures: Measures = field(default_factory=Measures)
    # the model whose scores choose: the one that answers, or that one without its adapter. A stream reads it; not in
    # the repr, which identifies results: without adapter, or with full memory, both are the same
    selection_from: SelectionFrom = field(default="tuned", repr=False)
    # text of the stream (timestamps, markers of groups of frames): all of it stays, or that of a group only while the
    # layer keeps one of its audio or visual tokens
    markers: Markers = "keep"

    def supports(self, mode: Mode) -> bool:
        """Whether the policy works in this mode; by default in those that need no score per token and layer.

        A choice can be repeated in another model unless some kept tokens are averages.
        """
        if mode == "base_selection":
            return not self.traits.merges
        return mode in ("full", "learned_importance")

    @property
    def traits(self) -> Traits:
        """Its special properties; by default it has none."""
        return Traits()

    def prefilter(self, chunk: Chunk, order: Int[Tensor, "batch tokens"]) -> Prefiltered:
        """The part of a chunk that the model reads, by default all; `order` are the arrival numbers of its tokens."""
        return Prefiltered(chunk=chunk, order=order)

    def with_oracle(self, streams: Sequence[StreamOutline]) -> "Policy":
        """The policy for streams of this content; a streaming method ignores it."""
        return self

    def with_budget(self, budget: Budget | None) -> "Policy":
        """The same policy at another budget."""
        return replace(self, budget=budget)

    def layer_slots(self, layer: int) -> LayerSlots | None:
        """Slots of one layer; None: unlimited."""
        return None if self.budget is None else slots_of_layer(self.budget, layer)

    @abstractmethod
    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; with a softness, selection is softened (training)."""


@dataclass(frozen=True, kw_only=True)
class JointPolicy(Policy):
    """A policy whose layers decide together, once all of them have read the chunk."""

    @abstractmethod
    def select_joint(self, views: list[LayerView], softness: Softness | None = None) -> list[Tokens]:
        """The memory of every layer; requires a budget.

        Empties the list layer by layer, so that a pool is freed before the next layer copies what it keeps.
        """

    @final
    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """All tokens: `select_joint` evicts after the pass, and without a budget nothing is evicted."""
        return view.pool


def keep_highest(
    pool: Tokens,
    scores: Tensor,
    slots: LayerSlots,
    softness: Softness | None = None,
    markers: Markers = "keep",
    settles: bool = False,
) -> Tokens:
    """All text and the tokens of the highest scores, with their gates (`select`); markers as chosen.

    Only the device knows how much text is left out with its group. With `settles` it is not asked: that text is kept
    as ABSENT tokens at the end (`LayerView.settles`). Rows that leave out unequal numbers are padded so too.
    """
    # 1. choose
    counts = pool.counts
    selected = select(scores, pool.modality, slots, softness, pool.gate, counts)
    index, gate = selected.index, selected.gate
    # 2. leave out the text of groups that have lost all their tokens
    present = None  # of text that leaves at the end of the pass
    if markers == "with_group" and (counts or pool.counted).grouped != 0:
        stays = with_groups(pool.modality.gather(1, index), pool.group.gather(1, index))
        places = (~stays).to(torch.int8).argsort(dim=1, stable=True)
        if not settles:
            places = places[:, : int(stays.sum(dim=1).max())]
        present = stays.gather(1, places) if settles or len(stays) > 1 else None
        index, counts, gate = index.gather(1, places), None, gate if gate is None else gate.gather(1, places)
    # 3. copy what is kept, once; where all of it is, nothing is copied
    if counts is not None:
        counts = counts._replace(media=selected.media, audio=selected.audio)
    kept = pool if index.shape[1] == pool.count and present is None else pool.gather(index)
    kept = replace(kept, counts=counts, gate=kept.gate if gate is None else gate)
    return kept if present is None else kept.masked(present)


def with_groups(modality: Int8[Tensor, "batch kept"], group: Int[Tensor, "batch kept"]) -> Bool[Tensor, "batch kept"]:
    """Which kept tokens are not the text of a group of which no audio or visual token is kept (ours).

    The latest group keeps its text, and text that belongs to no group (the prompt before the stream) stays. So the text
    of a stream is bounded by the slots, however long it is. Padding does not stay.
    """
    present = modality != ABSENT
    marker = Modality.TEXT.mask(modality) & (group >= 0)
    # the largest number of a group of kept tokens stands for those of other tokens: it always stays
    latest = torch.where(present, group, torch.full_like(group, -1)).amax(dim=1, keepdim=True)
    media = torch.where(modality > 0, group, latest)
    held = torch.stack([torch.isin(row, of_media) for row, of_media in zip(group, media, strict=True)])
    return present & (~marker | held)


def slots_of_layer(budget: Budget, layer: int) -> LayerSlots:
    """The slots of one layer of a budget."""
    audio, visual = budget.layer(layer)
    return LayerSlots(audio=audio, visual=visual, split=budget.split, lend=budget.lend)


@final
@dataclass(frozen=True, kw_only=True)
class ScoredPolicy(Policy):
    """Keeps the highest scores of each modality within the layer's slots; each layer decides alone, in the pass."""

    per_head: bool = False  # every key-value head keeps tokens of its own
    scorer: AbstractScorer

    @property
    def traits(self) -> Traits:
        """Those that follow from the scorer."""
        compared = self.scorer.compared if isinstance(self.scorer, Covered) else None
        return Traits(
            per_head=self.per_head,
            needs_mass=self.scorer.needs_importance and self.measures.heads == "probabilities",
            needs_novelty=self.scorer.needs_novelty,
            needs_place=self.scorer.needs_place,
            compared=compared,
        )

    def supports(self, mode: Mode) -> bool:
        """Every mode, but for those that carry one choice for all heads, and scores that measure no attention."""
        if mode in ("states", "paper", "calibration"):
            return not self.per_head
        return self.scorer.needs_importance if mode == "learned_importance" else True

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The layer's memory after the chunk in `view`; with a softness, selection is softened (training)."""
        slots = self.layer_slots(layer)
        if slots is None:
            return view.pool
        if view.heads > 1 and self.markers == "with_group" and view.pool.counted.grouped:
            raise PolicyError(
                "markers: with_group keeps unequal numbers of text tokens in the heads of a layer; set per_head: "
                "false, or markers: keep"
            )
        if softness is None:
            contests = groups(view.modality, slots, view.pool.counts)
            view = replace(view, contests=tuple(Contest(group.member, group.kept) for group in contests))
        return keep_highest(self._observed(view), self.scorer(view), slots, softness, self.markers, view.settles)

    def on_inputs(self) -> "ScoredPolicy":
        """The same, but with layer inputs carried in place of a sketch, for who measures redundancy in the pool."""
        if not self.measures.sketch:
            return self
        scorer = self.scorer
        if isinstance(scorer, Covered) and scorer.compared == "sketch":
            scorer = replace(scorer, compared="inputs")
        return replace(self, scorer=scorer, measures=replace(self.measures, sketch=False, feature=None))

    def _observed(self, view: LayerView) -> Tokens:
        """The pool with importance and novelty as measured on this chunk."""
        pool = view.pool
        if self.scorer.needs_importance:
            pool = replace(pool, importance=view.importance)
        if self.scorer.needs_novelty:
            pool = replace(pool, novelty=view.novelty)
        return pool


@cache
def sketch(width: int, feature: int) -> Tensor:
    """Fixed orthonormal projection width -> feature, float32; cosines err by sqrt(1 / feature - 1 / width) or less."""
    generator = torch.Generator().manual_seed(2606_07577)
    return torch.linalg.qr(torch.randn(width, feature, generator=generator, dtype=torch.float64)).Q.float()


def projection(width: int, feature: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed random projection width -> feature; keeps cosines to about 1 / sqrt(feature) (Johnson-Lindenstrauss)."""
    generator = torch.Generator().manual_seed(2606_07577)
    matrix = torch.randn(width, feature, generator=generator) / feature**0.5
    return matrix.to(dtype=dtype, device=device)
