"""Memory estimate of a run per device, from shapes alone, without loading a model.

Rows for parameters, optimizer and memory are exact; rows for activations and encoders are estimates and marked `~`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import final, get_args

import torch

from omnimem.backbones.shapes import Shapes, TextShape
from omnimem.errors import counted
from omnimem.sketches import Bits
from omnimem.tuning import LoraOptions
from omnimem.tuning.gradient.options import Horizon, Mode, Recompute
from omnimem.tuning.lora import ATTENTION, Target

SCORES = 160  # bytes saved by autograd per token of the pool when scores are differentiable (measured: 74 to 172)
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
    gated: bool = False  # kept tokens stand behind gates: softened selection
    weighed: bool = False  # attention mass is differentiable too
    per_head: bool = False  # every key-value head keeps its own tokens, each with side state and an owner of one byte
    entries: int  # audio and visual slots, summed over the layers; with a "full" budget those of full memory
    limited: int | None = None  # those of the largest limited budget, where "full" is drawn too; None: as `entries`
    selector_entries: int = 0  # those of the untuned model's own memory with `selection_from: base`; 0: it has none
    selector_feature: int = 0  # the same width of it
    chunk_tokens: int  # longest chunk
    chunks: int  # of the longest stream
    text_tokens: int  # of the stream; never evicted
    question_tokens: int  # of all questions of a sample
    moments: int = 1  # times at which they are asked
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
    rows = (*_states(shapes, load), *_memory(shapes, load), *_stream(shapes, load), *_activations(shapes, load))
    return (*rows, *_encoders(shapes, load))


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
    # 1. memory; full memory is never compared and carries no features
    layers, limited = shapes.text.layers, load.limited is None
    pair, side = _entry(shapes, load, load.feature if limited else 0)
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
    rows.append(_earlier_chunks(shapes, load))
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
    size = sum(_entry(shapes, load, load.selector_feature))
    entries = load.batch * (load.selector_entries + load.text_tokens * shapes.text.layers)
    return _exact("selector's memory", entries * size, f"{counted(entries, 'entry')} x {size} B (selection_from: base)")


def _entry(shapes: Shapes, load: Load, feature: int) -> tuple[int, int]:
    """Bytes of an entry with a feature of this width: keys and values, side state."""
    pair, side = shapes.entry(feature, load.dtype, sketch=load.sketch if feature else None, places=load.places)
    return pair, shapes.text.kv_heads * (side + 1) if load.per_head else side


def _held(load: Load, entries: int, layers: int, chunks: int) -> int:
    """Tokens that a layer holds of a stream after so many chunks, within `entries` of all layers."""
    return min(ceil(entries / layers), chunks * load.chunk_tokens) + load.text_tokens


def _earlier_chunks(shapes: Shapes, load: Load) -> Row:
    """Memories of earlier chunks that the backward pass needs: inputs of what it computes again."""
    name, layers, earlier = "memories in the graph", shapes.text.layers, max(0, load.chunks - 1)

    def memories(first: int, last: int, entries: int, inputs: int = 0) -> int:
        """Bytes of the memories after the chunks `first` to `last`, from 1; with `inputs` bytes of a layer input."""
        tokens = sum(_held(load, entries, layers, number) for number in range(first, last + 1))
        return load.batch * layers * tokens * (sum(_entry(shapes, load, load.feature)) + inputs)

    width = shapes.text.width * load.dtype.itemsize
    # 1. none, or those that questions were asked of
    if load.offload:
        return _estimate(name, 0, "on the host")
    if load.gradient == "states":
        asked = min(earlier, load.moments - 1)
        size = memories(load.chunks - asked, earlier, load.entries, width)
        how = f"read by {counted(asked, 'earlier question')}" if asked else "none: chunks keep no graph"
        return _estimate(name, size, how)
    # 2. half of the layers run on chunks
    if load.gradient != "full":
        size = memories(1, earlier, load.entries, width) // layers + earlier * load.batch * load.chunk_tokens * width
        below = load.stop_layer * memories(load.chunks, load.chunks, load.entries) // layers
        pool = memories(load.chunks, load.chunks, load.entries, width) // layers
        pool += load.batch * load.chunk_tokens * (sum(_entry(shapes, load, load.feature)) + width)
        read = pool if load.gradient == "released" else 2 * pool + below  # the last chunk is read again
        how = (
            f"{counted(earlier, 'earlier chunk')} x (one layer's memory and input), and what the layers above read; "
            "none with tuning.offload: true"
        )
        return _estimate(name, size + read, how)
    if load.recompute == "none":
        return _estimate(name, 0, "none: attention saves them with the activations")
    # 3. within the horizon: those before its chunks, and of each loss those that it computes again
    if load.horizon != "all":
        before, again = min(earlier, load.horizon), min(earlier, load.horizon - 1)
        size = memories(load.chunks - before, earlier, load.entries)
        size += load.moments * memories(load.chunks - again + 1, load.chunks, load.entries)
        how = f"{counted(before, 'chunk')} within tuning.horizon, and {again} again for each loss, x memory"
        return _estimate(name, size, how)
    # 4. growing with the stream; under full memory each chunk adds a block, once (`FullGradient.blocks`)
    limited = load.entries if load.limited is None else load.limited
    size = memories(1, earlier, limited)
    how = f"{counted(earlier, 'earlier chunk')} x memory; none with tuning.offload: true"
    if load.limited is not None:
        blocks = load.batch * layers * _held(load, load.entries, layers, load.chunks) * sum(_entry(shapes, load, 0))
        if blocks >= size:
            size, how = blocks, "the blocks of full memory, once; none with tuning.offload: true"
    return _estimate(name, size, how)


def _stream(shapes: Shapes, load: Load) -> list[Row]:
    """Encoder outputs of the whole stream, and the chunks made of them that are read again in backward."""
    size, parts = load.chunk_tokens * shapes.text.width * load.dtype.itemsize, []
    if not load.projected:  # else a row of its own
        parts.append((load.chunks, "encoder outputs"))
    if load.gradient == "full" and load.recompute != "none" and not load.offload:
        again = load.chunks if load.horizon == "all" else min(load.chunks, load.horizon)
        parts.append((again, f"inputs of {counted(again, 'chunk')}"))
    total, how = load.batch * size * sum(count for count, _ in parts), " and ".join(name for _, name in parts)
    return [_estimate("tokens of the stream", total, how)] if parts else []


def _activations(shapes: Shapes, load: Load) -> list[Row]:
    """Activations that exist at once in backward (`tuning.recompute`), and the logits of the answers."""
    if load.limited is not None:  # full memory is not scored; steps at a limited budget may still need more
        unscored = replace(load, limited=None, covered=0, gated=False, weighed=False)
        cases = [unscored, replace(load, limited=None, entries=load.limited)] if load.limited else [unscored]
        return max((_activations(shapes, case) for case in cases), key=lambda rows: rows[0].bytes)
    # 1. saved tensors of one layer and a chunk, by the number of chunks before it
    text, size, tokens = shapes.text, load.dtype.itemsize, load.chunk_tokens
    keys = text.kv_heads * 2 * (text.dim + 8 * load.gated) * size + COVERAGE * load.covered
    keys += text.kv_heads * text.dim * 4 * load.weighed + SCORES * (load.covered > 0)

    def pool(before: int) -> int:
        return tokens + _held(load, load.entries, text.layers, before)

    def layer(pool: int) -> int:
        return tokens * layer_activations(text, load.lora, load.dtype, pool) + pool * keys

    last = pool(load.chunks - 1)
    token, entering = layer_activations(text, load.lora, load.dtype, last), tokens * text.width * size
    one = f"{counted(tokens, 'token')} x {token:,} B + {counted(last, 'key')} x {keys:,} B"
    # 2. layers and chunks that exist at once
    match load.recompute:
        case "none":
            what, graph = "of all chunks", _in_graph(load, text.layers)
            held = sum(layers * layer(pool(load.chunks - 1 - back)) for back, layers in enumerate(graph))
            how = f"{counted(sum(graph), 'layer')} in {counted(len(graph), 'chunk')}, at most {one}"
        case "chunk":
            what, held, how = "of one chunk", text.layers * layer(last), f"{counted(text.layers, 'layer')} x ({one})"
        case "layer":
            what, held = "of one layer", layer(last) + text.layers * entering
            how = f"{one} + {counted(text.layers, 'input')} of {gibibytes(entering)}"
    # 3. rows
    rows = load.batch * load.question_tokens
    how = f"({how}) x {counted(load.batch, 'stream')}" if load.batch > 1 else how
    logits = f"{counted(rows, 'row')} x {text.vocabulary:,} x {size + 8} B"
    return [
        _estimate(f"activations {what}", load.batch * held, how),
        _estimate("logits of the answers", rows * text.vocabulary * (size + 8), logits),
    ]


def _in_graph(load: Load, layers: int) -> list[int]:
    """Layers whose activations live at once without recomputation, of each chunk from the last one back."""
    match load.gradient:
        case "states":
            return [layers]  # of the question
        case "released" | "paper":
            last = layers if load.gradient == "paper" else layers - load.stop_layer
            return [last + 1, *[1] * (load.chunks - 1)]
        case "full":
            each = load.chunks if load.horizon == "all" else min(load.chunks, load.horizon)
            again = 0 if load.horizon == "all" else load.moments * min(load.chunks, load.horizon - 1)
            return [layers] * (each + again)


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
