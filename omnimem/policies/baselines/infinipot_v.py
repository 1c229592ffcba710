"""InfiniPot-V: keys unlike the same cell of recent frames, and long values (arXiv 2506.15745)."""

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from omnimem.budget import Budget
from omnimem.policies.baselines.presets import PresetWithRelease, allotted, part, settings
from omnimem.policies.baselines.ranked import AbstractRanking, RankedPolicy, above_all, best, from_end, newest
from omnimem.positions import rotate
from omnimem.selection import LayerSlots
from omnimem.selection.layer_slots import groups
from omnimem.tokens import Modality
from omnimem.view import LayerView

Grid = Literal["slot", "true"]
Smoothing = Literal["none", "paper", "release"]

PRESETS: dict[str, dict[str, Any]] = {
    "as_published": {
        "temporal_share": 0.5,
        "recent_share": 0.125,
        "grid": "true",
        "smoothing": "paper",
        "keys": "stored",
        "reindex": False,
        "per_head": True,
    },
    "as_released": {"recent_share": 0.25, "grid": "slot", "smoothing": "none"},
}
KERNELS = (7, 5, 3, 1)  # by quarter of the depth


@final
@dataclass(frozen=True, kw_only=True)
class Cells:
    """Frame (counted from the latest, 0) and cell within the frame of the visual tokens of each row."""

    frame: Int[Tensor, "batch tokens"]
    cell: Int[Tensor, "batch tokens"]
    frames: Int[Tensor, " batch"]  # in each row
    rows: int  # of a frame
    columns: int


@final
@dataclass(frozen=True, kw_only=True)
class TemporalAndValue(AbstractRanking):
    """TaR fills a fraction of the slots, value norm the rest.

    TaR   -mean over the r most recent frames of cos(K[t, cell], K[t', cell]): difference from the last frames
    VaN   |V|_2, averaged over neighbouring cells of its frame
    I_TaR = the recent frames and the best of the past by TaR, temporal_share x slots in all; then the highest VaN,
    those of I_TaR first.
    """

    temporal_share: float  # alpha
    recent_share: float  # r over the number of frames held
    grid: Grid
    smoothing: Smoothing
    keys: Literal["stored", "unrotated"]

    @property
    def needs_place(self) -> bool:
        """For the size of a frame, if not the frame itself."""
        return True

    def __call__(self, view: LayerView, slots: LayerSlots, depth: float) -> Float[Tensor, "batch tokens"]:
        with torch.no_grad():
            cells = slot_cells(view) if self.grid == "slot" else true_cells(view)
            distinct, recent = self._temporal(view, cells)
            norms = view.pool.values.float().norm(dim=-1).mean(dim=1)
            scores = smoothed(norms, view.modality == Modality.VISUAL, cells, self.smoothing, depth)
            first = torch.zeros_like(recent)
            for group in groups(view.modality, slots):
                latest = recent & group.member
                past = group.member & ~recent
                slots_left = (round(self.temporal_share * group.kept) - latest.sum(dim=1)).clamp_min(0)
                first |= latest | best(distinct, past, slots_left)
            return above_all(scores, first)

    def _temporal(self, view: LayerView, cells: Cells) -> tuple[Tensor, Bool[Tensor, "batch tokens"]]:
        """TaR of every token, and the recent tokens: by frames for visual tokens, by number for audio."""
        keys = F.normalize(_unrotated(view) if self.keys == "unrotated" else view.pool.keys.float(), dim=-1)
        visual, audio = view.modality == Modality.VISUAL, view.modality == Modality.AUDIO
        frames = (self.recent_share * cells.frames).round().clamp_min(1)
        latest = (self.recent_share * audio.sum(dim=1)).round().clamp_min(1)
        recent_visual = visual & (cells.frame < frames[:, None])
        recent_audio = newest(audio, latest[:, None])
        size = cells.rows * cells.columns
        place = torch.where(audio, size, cells.cell)  # all audio is one more cell
        alike = _likeness(keys, place, recent_visual | recent_audio, size + 1)
        return -alike, recent_visual | recent_audio


def _likeness(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    cell: Int[Tensor, "batch tokens"],
    recent: Bool[Tensor, "batch tokens"],
    cells: int,
) -> Float[Tensor, "batch tokens"]:
    """Mean cosine of each token to the recent tokens of its cell (0: none), mean over heads."""
    batch, heads, _, dim = keys.shape
    index = cell.clamp(0, cells - 1)[:, None, :, None].expand_as(keys)
    total = keys.new_zeros(batch, heads, cells, dim).scatter_add(2, index, keys * recent[:, None, :, None])
    count = keys.new_zeros(batch, cells).scatter_add(1, cell.clamp(0, cells - 1), recent.to(keys.dtype))
    mean = total / count.clamp_min(1)[:, None, :, None]
    return (keys * mean.gather(2, index)).sum(dim=-1).mean(dim=1)


def slot_cells(view: LayerView) -> Cells:
    """As released: the kept visual tokens, in order, count as frames of p tokens, whatever was evicted in between.

    p is the number of cells of a frame. Counted from the end, so that new frames have their own cells
    where the number of tokens is not a multiple of p (the release keeps whole multiples).
    """
    visual = view.modality == Modality.VISUAL
    rows, columns, _, _ = _extent(view)
    size = rows * columns
    back = from_end(visual) - 1
    frames = (visual.sum(dim=1) + size - 1) // size
    return Cells(
        frame=back // size, cell=size - 1 - back % size, frames=frames.clamp_min(1), rows=rows, columns=columns
    )


def true_cells(view: LayerView) -> Cells:
    """By the tokens' own frame, row and column."""
    visual = view.modality == Modality.VISUAL
    time, height, width = view.pool.place[:, :3].long().unbind(dim=1)
    rows, columns, top, left = _extent(view)
    cell = ((height - top) * columns + width - left).clamp(0, rows * columns - 1)
    latest_first = _ranks(torch.where(visual, -time, 1))
    frames = torch.where(visual, latest_first, -1).amax(dim=1) + 1
    return Cells(frame=latest_first, cell=cell, frames=frames.clamp_min(1), rows=rows, columns=columns)


def _ranks(values: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """The rank of each value among the distinct ones of its row, the smallest 0."""
    ordered, order = values.sort(dim=1)
    steps = torch.cat([torch.zeros_like(ordered[:, :1]), (ordered[:, 1:] != ordered[:, :-1]).long()], dim=1)
    return torch.zeros_like(values).scatter(1, order, steps.cumsum(dim=1))


def _extent(view: LayerView) -> tuple[int, int, int, int]:
    """Rows, columns, first row and first column of the visual tokens; one cell without visual tokens."""
    visual = view.modality == Modality.VISUAL
    if not bool(visual.any()):
        return 1, 1, 0, 0
    axes = [view.pool.place[:, axis][visual] for axis in (1, 2)]
    (top, bottom), (left, right) = ((int(places.min()), int(places.max())) for places in axes)
    return bottom - top + 1, right - left + 1, top, left


def smoothed(
    norms: Float[Tensor, "batch tokens"],
    visual: Bool[Tensor, "batch tokens"],
    cells: Cells,
    smoothing: Smoothing,
    depth: float,
) -> Float[Tensor, "batch tokens"]:
    """Norms of visual tokens averaged over the neighbouring tokens in memory, by quarter of the depth.

    paper    squares of 7, 5, 3, 1 cells of a frame: its thresholds on the variation of the norms are not published,
             so the kernels follow the depth, as they do in the release
    release  7 x 7 x 7 frames and cells, 5 x 5 cells, 3 tokens in a row, none (a switch that is off by default)
    """
    quarter = min(3, int(4 * depth))
    if smoothing == "none" or quarter == 3:
        return norms
    frames, kernel = int(cells.frames.max()), KERNELS[quarter]
    if smoothing == "release" and quarter == 2:
        return torch.where(visual, _along(norms, visual, kernel), norms)
    over_time = kernel if smoothing == "release" and quarter == 0 else 1
    sizes = [
        _fitting(wanted, size)
        for wanted, size in zip((over_time, kernel, kernel), (frames, cells.rows, cells.columns), strict=True)
    ]
    return torch.where(visual, _around(norms, visual, cells, frames, sizes), norms)


def _fitting(kernel: int, size: int) -> int:
    """The kernel, or the largest odd number that is no larger than `size`."""
    return min(kernel, size - (size + 1) % 2)


def _around(
    norms: Tensor, visual: Tensor, cells: Cells, frames: int, kernel: list[int]
) -> Float[Tensor, "batch tokens"]:
    """Mean over the tokens within a box of frames, rows and columns."""
    size = cells.rows * cells.columns
    place = (cells.frame * size + cells.cell).clamp(0, frames * size - 1)
    shape = (norms.shape[0], 1, frames, cells.rows, cells.columns)
    sums, counts = (
        F.avg_pool3d(
            torch.zeros(norms.shape[0], frames * size, device=norms.device).scatter_add(1, place, part).view(shape),
            kernel,
            stride=1,
            padding=[width // 2 for width in kernel],
        )
        for part in (norms * visual, visual.float())
    )
    mean = (sums / counts.clamp_min(1e-9)).flatten(1)
    return mean.gather(1, place)


def _along(norms: Tensor, visual: Tensor, kernel: int) -> Float[Tensor, "batch tokens"]:
    """Mean over neighbours in the sequence of visual tokens."""
    front = (~visual).to(torch.int8).argsort(dim=1, stable=True)
    sums, counts = (
        F.avg_pool1d(part.gather(1, front)[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]
        for part in (norms * visual, visual.float())
    )
    return torch.zeros_like(norms).scatter(1, front, sums / counts.clamp_min(1e-9))


def _unrotated(view: LayerView) -> Float[Tensor, "batch kv_heads tokens dim"]:
    """The keys as they were before RoPE."""
    if view.rotary is None:
        raise ValueError("policy.keys = unrotated needs a text model's rotary embedding; feed the policy by a Stream")
    cos, sin = view.rotary(-view.pool.positions.transpose(0, 1))
    return rotate(view.pool.keys.float(), cos, sin)


@final
@dataclass(frozen=True, kw_only=True)
class InfiniPotVOptions:
    """Compressed after every chunk to the slots of the layer (|C|), every key-value head by itself.

    as_published  alpha 0.5, r = 0.125 of the frames held; frames and cells by the tokens' own positions (the text does
                  not say what a cell is after an eviction); kernels 7, 5, 3, 1 by quarter of the depth; original
                  positions
    as_released   r = 0.25, cells by slot, no smoothing (its switch is off)
    shared_split  as published, each modality in its own slots
    Choices where the source says nothing: all audio is one cell, and r of it counts tokens; audio is never smoothed. r
    is at least one frame; if that is more than alpha of the slots, TaR chooses no older tokens. Keys are compared as
    stored, after RoPE, so age matters; `keys: unrotated` removes it. `reindex` is the streaming form: contiguous times
    after every chunk, by rank over both modalities; rows and columns stay.
    """

    name: Literal["infinipot_v"] = "infinipot_v"
    preset: PresetWithRelease = "as_published"
    temporal_share: float | None = None  # alpha
    recent_share: float | None = None  # r over the number of frames held
    grid: Grid | None = None  # cells by slot as released, or by the token's own row and column
    smoothing: Smoothing | None = None  # of value norms
    keys: Literal["stored", "unrotated"] | None = None  # on which TaR is judged
    reindex: bool | None = None  # contiguous positions after every chunk
    per_head: bool | None = None  # every key-value head keeps tokens of its own

    def __post_init__(self) -> None:
        for name in ("temporal_share", "recent_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"policy.{name} = {value:g} must be between 0 and 1")

    def build(self, budget: Budget | None) -> RankedPolicy:
        """The policy at a budget; None: full memory."""
        chosen = settings(self, PRESETS) | {"budget": allotted(budget, self.preset)}
        return part(RankedPolicy, {**chosen, "ranking": part(TemporalAndValue, chosen)})
