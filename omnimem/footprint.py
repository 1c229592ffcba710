"""Memory estimate of a run per device, from shapes alone, without loading a model.

Rows for parameters, optimizer and memory are exact; rows for activations and encoders are estimates and marked `~`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import final, get_args

import torch

from omnimem.backbones.shapes import Shapes, TextShape
from omnimem.errors import counted
from omnimem.sketches import Bits, stored
from omnimem.tuning import LoraOptions
from omnimem.tuning.gradient.options import Horizon, Mode, Recompute
from omnimem.tuning.lora import ATTENTION, Target

COVERAGE = 20  # bytes saved by autograd per feature element when coverage is differentiable (measured: 20.8)
TOGETHER = 32  # segments per encoder pass


@final
@dataclass(frozen=True, kw_only=True)
class Load:
    """The settings of a run that determine its memory use."""

    dtype: torch.dtype  # of the frozen weights, keys and values
    lora: LoraOptions
    saved: int = 0  # weights of projectors that are trained in full
    unprojected: int = 0  # bytes of their input, for all tokens of the longest stream
    projected: int = 0  # bytes of their output
    quantized: bool = False  # the projections of the decoder layers, to 4 bits
    feature: int  # width of the vectors that redundancy or coverage reads; 0: not stored
    sketch: Bits | None = None  # they are sketches, of so many bits per number
    places: int = 0  # parts of a place that are carried
    covered: int = 0  # width of the features that coverage compares, where the score is differentiable
    per_head: bool = False  # every key-value head keeps its own tokens, each with side state and an owner of one byte
    entries: int  # audio and visual slots, summed over the layers; with a "full" budget those of full memory
    limited: int | None = None  # those of the largest limited budget, where "full" is drawn too; None: as `entries`
    selector_entries: int = 0  # those of the untuned model's own memory with `selection_from: base`; 0: it has none
    selector_feature: int = 0  # the same width of it
    chunk_tokens: int  # longest chunk
    chunks: int  # of the longest stream
    text_tokens: int  # of the stream; never evicted
    question_tokens: int  # of all questions of a sample
    frame: tuple[int, int]  # height and width after resizing
    frames_per_segment: int
    half: bool  # DeepSpeed's or autocast's bf16 / fp16
    stage: int | None  # ZeRO stage; None: without DeepSpeed
    ranks: int = 1
    batch: int = 1  # streams per pass
    recompute: Recompute = "chunk"
    gradient: Mode = "full"
    horizon: Horizon = "all"
    stop_layer: int = 0  # for released and paper
    offload: bool = False  # memories of earlier chunks are kept on the host
    teacher_tokens: int = 0  # audio and visual tokens in the memory of a loss's teacher; 0: no teacher


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    bytes: int
    how: str
    exact: bool


def footprint(shapes: Shapes, load: Load) -> tuple[Row, ...]:
    """Rows of the memory table, per device; their sum is an upper bound of the estimated peak."""
    return (*_states(shapes, load), *_memory(shapes, load), *_activations(shapes, load), *_encoders(shapes, load))


def _exact(what: str, size: int, how: str) -> Row:
    return Row(what=what, bytes=size, how=how, exact=True)


def _estimate(what: str, size: int, how: str) -> Row:
    return Row(what=what, bytes=size, how=how, exact=False)


def _states(shapes: Shapes, load: Load) -> list[Row]:
    """Weights, and the adapter with its gradients and AdamW states, sharded over the ranks by ZeRO."""
    text, half = shapes.text, load.half and load.stage is not None
    sizes = [text.projection(name) for _, name in load.lora.matched(text.layers)]
    adapter = sum(load.lora.r * sum(size) + (size[1] if load.lora.dora else 0) for size in sizes) + load.saved
    name = "trained" if load.saved else "LoRA"

    def row(what: str, count: int, size: int, stage: int) -> Row:
        """A row that is sharded from this ZeRO stage on."""
        ranks = load.ranks if (load.stage or 0) >= stage else 1
        how = f"{count:,} x {size} B" + (f" / {counted(ranks, 'rank')}" if ranks > 1 else "")
        return _exact(what, ceil(count * size / ranks), how)

    return [
        *_frozen(shapes, load, row),
        row(f"{name} weights", adapter, 2 if half else 4, 3),
        row(f"{name} gradients", adapter, 2 if half else 4, 2),
        row("AdamW states", adapter, 12 if half else 8, 1),  # with a float32 copy of 16-bit weights
    ]


def _frozen(shapes: Shapes, load: Load, row: Callable[[str, int, int, int], Row]) -> list[Row]:
    """The base model; quantized, the projections of its decoder layers have half a byte and scales per weight."""
    if not load.quantized:
        return [row("weights, frozen", shapes.parameters, load.dtype.itemsize, 3)]
    names = ATTENTION if shapes.text.experts else get_args(Target)
    packed = shapes.text.layers * sum(prod(shapes.text.projection(name)) for name in names)
    size = ceil(packed * (1 / 2 + 1 / 64 + 4 / (64 * 256)))  # 4 bits, a byte per 64 weights, 4 bytes per 256 of those
    return [
        row("weights, frozen", shapes.parameters - packed, load.dtype.itemsize, 3),
        _exact("weights, frozen, 4 bits", size, f"{packed:,} x 0.516 B"),
    ]


def _memory(shapes: Shapes, load: Load) -> list[Row]:
    """The memories of all layers, and the tensors that the graph of one stream keeps for the backward pass."""
    # 1. memory
    layers = shapes.text.layers
    pair, side = shapes.entry(load.feature, load.dtype, sketch=load.sketch, places=load.places)
    side = shapes.text.kv_heads * (side + 1) if load.per_head else side
    entries = load.batch * (load.entries + load.text_tokens * layers)
    rows = [
        _exact("memory: keys and values", entries * pair, f"{counted(entries, 'entry')} x {pair} B"),
        _exact("memory: side state", entries * side, f"{counted(entries, 'entry')} x {side} B"),
    ]
    # 2. layer inputs stored with kept tokens, from which keys and values are recomputed
    storing = {"full": 0, "states": layers}.get(load.gradient, load.stop_layer + 1)
    stored, size = entries * storing // layers, shapes.text.width * load.dtype.itemsize
    if stored:
        rows.append(_estimate("memory: layer inputs", stored * size, f"{counted(stored, 'entry')} x {size:,} B"))
    # 3. graph, projectors, selector and teacher
    rows.append(_earlier_chunks(shapes, load, entries * (pair + side), stored * size))
    if load.projected:
        how = f"their input of the stream, {gibibytes(load.unprojected)}, and its tokens in the graph"
        rows.append(_estimate("projectors", load.batch * (load.unprojected + load.projected), how))
    if load.selector_entries:
        rows.append(_selector(shapes, load))
    if load.teacher_tokens:
        taught = load.batch * layers * (load.teacher_tokens + load.text_tokens)
        rows.append(_exact("teacher's full memory", taught * pair, f"{counted(taught, 'entry')} x {pair} B"))
    return rows


def _selector(shapes: Shapes, load: Load) -> Row:
    """The memory of the untuned model that chooses the tokens; it is in no graph."""
    pair, side = shapes.entry(load.selector_feature, load.dtype, sketch=load.sketch, places=load.places)
    size = pair + (shapes.text.kv_heads * (side + 1) if load.per_head else side)
    entries = load.batch * (load.selector_entries + load.text_tokens * shapes.text.layers)
    return _exact("selector's memory", entries * size, f"{counted(entries, 'entry')} x {size} B (selection_from: base)")


def _earlier_chunks(shapes: Shapes, load: Load, memory: int, inputs: int) -> Row:
    """Memories of earlier chunks kept for the backward pass."""
    # 1. bounded by the horizon, or none
    name, earlier = "memories in the graph", max(0, load.chunks - 1)
    if load.gradient == "full" and load.horizon != "all":
        within = min(earlier, load.horizon - 1)
        return _estimate(name, within * memory, f"{counted(within, 'chunk')} within tuning.horizon x memory")
    if load.gradient == "states":
        return _exact(name, 0, "none: chunks keep no graph")
    if load.offload:
        return _estimate(name, 0, "on the host")
    # 2. growing with the stream
    if load.gradient == "full":
        # under full memory each chunk adds a block, which the graph holds once (`FullGradient.blocks`)
        whole = load.limited is not None and load.recompute != "none"
        share = 1.0 if load.limited is None or not load.entries else load.limited / load.entries
        evicting = ceil(earlier * memory * (share if whole else 1.0))
        if whole and memory >= evicting:
            return _estimate(name, memory, "the blocks of full memory, once; none with tuning.offload: true")
        how = f"{counted(earlier, 'earlier chunk')} x memory; none with tuning.offload: true"
        return _estimate(name, evicting, how)
    layer = memory // shapes.text.layers + inputs // (load.stop_layer + 1)
    chunk = load.batch * load.chunk_tokens * shapes.text.width * load.dtype.itemsize
    how = f"{counted(earlier, 'earlier chunk')} x (one layer's memory and input); none with tuning.offload: true"
    return _estimate(name, earlier * (layer + chunk), how)


def _activations(shapes: Shapes, load: Load) -> list[Row]:
    """Activations that exist at once in backward (`tuning.recompute`), and the logits of the answers."""
    # 1. saved tensors of one layer and one chunk
    text, size, tokens = shapes.text, load.dtype.itemsize, load.chunk_tokens
    pool = tokens + ceil(load.entries / text.layers) + load.text_tokens
    token = layer_activations(text, load.lora, load.dtype, pool)
    feature, kind = (
        (load.feature, load.dtype) if load.sketch is None else stored(load.feature, load.sketch, learns=False)
    )
    keys = 2 * text.kv_heads * text.dim * size + feature * kind.itemsize + COVERAGE * load.covered
    layer, entering = tokens * token + pool * keys, tokens * text.width * size
    one = f"{counted(tokens, 'token')} x {token:,} B + {counted(pool, 'key')} x {keys:,} B"
    # 2. layers and chunks that exist at once
    match load.recompute:
        case "none":
            what, held = "of all chunks", load.chunks * text.layers * layer
            how = f"{counted(load.chunks, 'chunk')} x {counted(text.layers, 'layer')} x ({one})"
        case "chunk":
            what, held, how = "of one chunk", text.layers * layer, f"{counted(text.layers, 'layer')} x ({one})"
        case "layer":
            what, held = "of one layer", layer + text.layers * entering
            how = f"{one} + {counted(text.layers, 'input')} of {gibibytes(entering)}"
    # 3. rows
    rows = load.batch * load.question_tokens
    how = f"({how}) x {counted(load.batch, 'stream')}" if load.batch > 1 else how
    logits = f"{counted(rows, 'row')} x {text.vocabulary:,} x {size + 8} B"
    return [
        _estimate(f"activations {what}", load.batch * held, how),
        _estimate("logits of the answers", rows * text.vocabulary * (size + 8), logits),
    ]


def layer_activations(text: TextShape, lora: LoraOptions, dtype: torch.dtype, pool: int) -> int:
    """Bytes per token that autograd saves in one layer with frozen base weights (formula; ours).

    In float32: the inputs of both norms, the states used for redundancy (twice), and the input of the adapters; with
    dropout one copy and one mask byte per projection. In the model's precision: queries, attention output, three inner
    states of the MLP, and for float32 models a mask row over `pool` keys, which the 16-bit kernels do not need.
    """
    size = dtype.itemsize
    mask = pool if size == 4 else 0
    inputs = {name: text.projection(name)[0] for _, name in lora.matched(text.layers)}
    adapted = 5 * sum(inputs.values()) if lora.dropout else 4 * sum({text.width, *inputs.values()})
    adapted += 4 * lora.r * len(inputs)
    return 16 * text.width + adapted + 4 * text.heads + size * (2 * text.heads * text.dim + mask + 3 * text.inner)


def _encoders(shapes: Shapes, load: Load) -> list[Row]:
    """Peak inside each tower, which encodes up to `TOGETHER` segments without a graph."""
    # 1. vision
    vision, audio, size, block = shapes.vision, shapes.audio, load.dtype.itemsize, shapes.geometry.segment_seconds
    together = TOGETHER if shapes.pass_seconds is None else max(1, min(TOGETHER, int(shapes.pass_seconds / block)))
    height, width = load.frame
    grids = ceil(load.frames_per_segment / vision.temporal_patch)
    patches = together * grids * (height // vision.patch) * (width // vision.patch)
    visual = patches * (vision.row * (4 + size) + vision.width * (4 * size + 8) + 3 * vision.inner * size)
    rows = [_estimate("vision tower, peak", visual, f"{counted(patches, 'patch')} of {counted(together, 'segment')}")]
    # 2. audio
    if audio is not None:
        mel = shapes.geometry.mel
        frames = together * int(block * mel.rate / mel.hop)
        heard = frames * (audio.mels * (4 + size) + audio.width * 2 * size) + frames // 2 * audio.inner * 2 * size
        rows.append(
            _estimate("audio tower, peak", heard, f"{counted(frames, 'mel frame')} of {counted(together, 'segment')}")
        )
    return rows


def render(rows: tuple[Row, ...]) -> str:
    """The table as text; the sum overestimates, because the encoders run before the backward pass."""
    lines = [f"{row.what:<26}{gibibytes(row.bytes):>12}  {'' if row.exact else '~ '}{row.how}" for row in rows]
    total = sum(row.bytes for row in rows)
    return "\n".join([*lines, f"{'sum':<26}{gibibytes(total):>12}  ~ an upper estimate: not all rows peak together"])


def gibibytes(count: int) -> str:
    """A number of bytes with a binary unit."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.2f} {unit}"
    return f"{count} B"
