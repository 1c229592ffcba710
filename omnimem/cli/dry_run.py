"""--dry-run: settings, training, one sample as model input, budget and memory table; no weights, no network.

Shapes come from the model's folder or cache, else from configs/models. Text is tokenized by the model's tokenizer, else
by that of the tiny checkpoint, and then marked `approximate`.
"""

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from math import ceil
from pathlib import Path
from typing import Any, Literal, final

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import AutoTokenizer

from omnimem.backbones import Backbone, Encoded, LayoutError, Turn
from omnimem.backbones.files import require_whole
from omnimem.backbones.load import checked_path, family_at, family_of, read_shapes, read_tables
from omnimem.backbones.projectors import Track
from omnimem.backbones.settings import PREPROCESSORS
from omnimem.backbones.shapes import Shapes
from omnimem.budget import AudioVisualBudget, SplitBudget
from omnimem.calibration import too_short
from omnimem.cli.build import known_budget, policies_of, refuse_unpadded, training_samples, validation_samples
from omnimem.cli.cache_size import describe_cache, encoded_bytes
from omnimem.cli.preflight import adapter_targets, unevicted
from omnimem.comparison.formatting import span
from omnimem.config import CONFIGS, ConfigError, RunConfig, dump
from omnimem.data import ManifestError, Message, Sample
from omnimem.errors import counted
from omnimem.footprint import Load, footprint, render
from omnimem.media import FileSource, LiveSource, MediaError, Segment, Source
from omnimem.policies.base import Policy
from omnimem.rows import tracks_of
from omnimem.run import RunFolder
from omnimem.shipped import shipped
from omnimem.sketches import Bits
from omnimem.sources import looked_in, missing_sources, named
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder, require_supported
from omnimem.streaming.prompt_pass import IGNORED
from omnimem.streaming.trained_range import beyond
from omnimem.textfile import read_stored
from omnimem.tokens import Modality, Tracks
from omnimem.training.zero3 import stage_of
from omnimem.tuning import add_adapter, check_start, described, gradient_of, policy_in_training
from omnimem.tuning.gradient.build import stop_layer_of
from omnimem.tuning.gradient.options import HALF_WAY
from omnimem.tuning.saved_modules import copies
from omnimem.view import Measures

TINY = CONFIGS / "models" / "tiny"
SECONDS, HEIGHT, WIDTH = 64, 360, 640  # of the synthetic sample
SHOWN = 3  # questions
_TRACK: dict[Modality, Track] = {Modality.AUDIO: "audio", Modality.VISUAL: "visual"}


@final
@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """The backbone without weights (meta device)."""

    backbone: Backbone
    shapes: Shapes
    approximate: bool  # the tokenizer is that of another model


@final
@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """A sample and its size as model input."""

    sample: Sample
    tracks: Tracks | None
    source: Source | None  # read to its end; None: the sample is text alone
    frame: tuple[int, int]  # height and width after resizing
    tokens: dict[Modality, int]  # of the stream
    chunks: tuple[int, ...]  # tokens of each chunk with audio or video
    last_position: int
    learned: int  # answer tokens with a label


def preview(
    run: RunConfig, name: str | None = None, steps: Iterable[str] = (), budgeted: RunFolder | None = None
) -> None:
    """Print the plan of a run, with the sample of the id `name`, or the first one; `steps` is about its training.

    `budgeted` is its folder if that holds the budget.

    Missing files are listed at the end and are not errors.
    """
    missing: list[str] = []
    _section("settings", dump(run).splitlines())
    _section("training", steps)
    _section("DeepSpeed", [_deepspeed(run)])
    skeleton = skeleton_of(run, missing)
    if skeleton is not None:
        refuse_unpadded(run, skeleton.backbone)
        _section("set-up", set_up(run, skeleton.backbone, budgeted))
        facts = read_sample(run, skeleton, missing, name)
        check_lengths(run, skeleton, facts, budgeted)
        _section("sample", describe_sample(skeleton, facts, run.stream.positions, every=name is not None))
        if facts.source is not None:
            _section("budget", describe_budget(run, skeleton.shapes, facts))
            known = [] if missing_sources(run.data) else training_samples(run)
            before = skeleton.backbone.unprojected
            cached = describe_cache(run, skeleton.shapes, facts.tokens, facts.source.seconds, known, before)
            _section("encoder cache", cached)
            rows = footprint(skeleton.shapes, load_of(run, skeleton.shapes, facts, skeleton.backbone))
            _section("memory of a device", render(rows).splitlines())
    for benchmark in run.evaluate.benchmarks:
        for gap in benchmark.gaps():
            missing.append(f"benchmark {benchmark.label} ({gap.what}); {gap.how}")
    _section("missing", [f"missing: {line}" for line in missing])


def set_up(run: RunConfig, backbone: Backbone, budgeted: RunFolder | None) -> Iterator[str]:
    """What a run builds before its first step, by the same functions, from a model without weights.

    Raises AdapterError, BudgetError, PolicyError, GradientError and LayoutError as the run.
    """
    # 1. the adapter
    lora, begun = run.tuning.lora, run.model.adapter
    if begun is not None:
        check_start(backbone.model, lora, Path(begun), shipped(run.model.path))
        yield f"training starts from {begun}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # of peft, about weights on the meta device
        model = add_adapter(backbone.model, lora)
    yield adapter_targets(run, model)
    # 2. the budget: known, or until it is measured the same for every layer
    with attach(backbone.text_model, recompute_layers=run.tuning.recompute == "layer") as attached:
        layers, wanted = attached.shape.layers, run.memory.budget
        budget = known_budget(run, layers, budgeted)
        if budget is None:
            assert isinstance(wanted, AudioVisualBudget)
            even = SplitBudget(visual_audio_ratio=wanted.visual_audio_ratio)
            budget = even.build(layers, run.memory.slots_per_layer)
        # 3. the policy and its stream at every size that may be drawn, the gradient
        policies, feeder = policies_of(run, budget), Feeder(backbone, run.stream)
        yield f"policy in training: {described(run.tuning, policies(None), layers)}"
        gradient_of(run.tuning, layers)
        for slots in dict.fromkeys([*run.tuning.slots(run.memory.slots_per_layer), run.memory.slots_per_layer]):
            feeder.stream(attached, policy_in_training(run.tuning, policies(slots)))


def skeleton_of(run: RunConfig, missing: list[str]) -> Skeleton | None:
    """The backbone from its configuration files only; None if its shapes are unknown."""
    # 1. configuration files
    path = checked_path(run.model.path)
    if Path(path).is_dir():
        require_whole(Path(path))
    folder = _folder(path)
    if folder is None or not any(folder.glob("*.safetensors")):
        missing.append(f"weights of {path}; get them with `hf download {path}`, or set model.path to a local folder")
    described = folder or CONFIGS / "models" / f"{Path(path).name}.json"
    if not described.exists():
        missing.append(f"shapes of {path}; get its config.json as above; sample and memory need it")
        return None
    config, preprocessor = read_tables(described)
    family = family_of(config, described)
    if not family.described:
        what = f"a dry run does not know those of {family.name}; sample and memory are left out"
        missing.append(f"shapes of {path}: {what}")
        return None
    # 2. model on the meta device, tokenizer
    shapes = read_shapes(described)
    texts = folder
    if run.model.processor is not None and Path(run.model.processor).is_dir():
        texts = Path(run.model.processor)
    elif run.model.processor is not None and (texts := _folder(run.model.processor, "tokenizer_config.json")) is None:
        missing.append(f"tokenizer and processors of {run.model.processor}; get them with `hf download`")
    if Path(path).is_dir() and texts is not None:
        _require_processor(texts)
    own = texts is not None and any((texts / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    tokenizer = AutoTokenizer.from_pretrained(str(texts if own else TINY), local_files_only=True)
    backbone = family.skeleton(config, preprocessor, tokenizer, run.model.system)
    return Skeleton(backbone=backbone, shapes=shapes, approximate=not own)


def _require_processor(folder: Path) -> None:
    """Raises ConfigError if a local folder lacks the tokenizer or the processor that a run loads from it."""
    for what, names in (("tokenizer", ("tokenizer.json", "vocab.json")), ("processor", PREPROCESSORS)):
        if not any((folder / name).is_file() for name in names):
            raise ConfigError(
                [
                    f"model.processor: {folder} has no {what} ({', '.join(names)}); "
                    "give the folder with tokenizer and preprocessor_config.json, which a release may have apart"
                ]
            )


def _folder(path: str, name: str = "config.json") -> Path | None:
    """Folder on this machine that holds a file of a model: its own, or the cache of the hub."""
    folder = Path(path)
    if not folder.is_dir():
        try:
            found = try_to_load_from_cache(path, name)
        except HFValidationError:  # a path, not a hub id
            family_at(path)  # which says so
            return None
        folder = Path(found).parent if isinstance(found, str) else folder
    return folder if (folder / name).is_file() else None


def read_sample(run: RunConfig, skeleton: Skeleton, missing: list[str], name: str | None = None) -> SampleFacts:
    """The training sample with this id, or the first one, decoded; a synthetic one if it cannot be read."""
    # 1. a sample of the training data
    sample = _chosen_sample(run, name, missing)
    if sample is not None and not sample.has_stream:
        return _read(run, skeleton, sample, None, None)
    if sample is not None:
        try:
            return _read_file(run, skeleton, sample)
        except MediaError as error:
            which = f"media of sample {name}" if name else "the first sample's media"
            of_train = error.reason == "missing" and (name is None or not isinstance(run.data.validation, str))
            where = f"; {looked_in(run.data, sample)}" if of_train else ""
            missing.append(f"{which} ({error}{where}); `omnimem check` lists all unreadable files")
    # 2. a synthetic sample
    tracks = run.stream.source().tracks
    frames, audio = _synthetic(skeleton.shapes.geometry.mel.rate)
    source = LiveSource(frames, audio, options=run.stream.source(), geometry=skeleton.shapes.geometry)
    return _read(run, skeleton, SYNTHETIC, tracks, source)


def _chosen_sample(run: RunConfig, name: str | None, missing: list[str]) -> Sample | None:
    """The sample of this id, of training or validation, or the first one to train on with a stream.

    None if there are no training data yet.

    Raises ManifestError if no sample has the id.
    """
    # 1. the data
    if gone := missing_sources(run.data):
        folder = Path(gone[0] if run.data.sources else "data/recall/train.jsonl").parent
        cure = f"create it with `omnimem synthesize --out {folder}`, or from your files with `omnimem convert`"
        missing.append(f"training data ({', '.join(gone)}); {cure}")
        return None
    samples = training_samples(run)
    # 2. the sample
    if name is None:
        return next(sample for sample in samples if sample.has_stream)
    samples += validation_samples(run)
    found = next((sample for sample in samples if sample.id == name), None)
    if found is None:
        near = get_close_matches(name, [sample.id for sample in samples], n=1)
        cure = f"did you mean {near[0]}?" if near else f"the first one is {samples[0].id}"
        raise ManifestError([f"--sample {name}: no sample of {named(run.data.sources)} has this id; {cure}"])
    return found


def _read_file(run: RunConfig, skeleton: Skeleton, sample: Sample) -> SampleFacts:
    """The sample with its stream; raises MediaError if its files cannot be read, and as `_read`."""
    tracks = tracks_of(sample, run.stream.tracks)
    source = FileSource(
        sample.video or sample.audio or "",
        sample.audio,
        options=run.stream.source(tracks),
        geometry=skeleton.shapes.geometry,
        start=sample.start,
        end=sample.end,
    )
    return _read(run, skeleton, sample, tracks, source)


def check_lengths(run: RunConfig, skeleton: Skeleton, facts: SampleFacts, budgeted: RunFolder | None) -> None:
    """Raises CalibrationError if the budget must be measured and no stream to measure has enough chunks, as the run.

    Decodes the streams to measure until one is long enough.
    """
    skip, gone = run.calibration.skip_chunks, missing_sources(run.data)
    if gone or not run.memory.budget.needs_signals or known_budget(run, skeleton.shapes.text.layers, budgeted):
        return
    longest = measured = 0
    for sample in (sample for sample in training_samples(run) if sample.has_stream):
        try:
            same = sample.id == facts.sample.id
            longest = max(longest, len((facts if same else _read_file(run, skeleton, sample)).chunks))
        except MediaError:
            continue  # the run takes another one in its place
        measured += 1
        if longest > skip or measured == run.calibration.streams:
            break
    if longest <= skip and measured:
        raise too_short(longest, skip)


SYNTHETIC = Sample(
    id="synthetic",
    video=None,
    audio=None,
    messages=(
        Message(role="user", content="What is shown, and what is said meanwhile?"),
        Message(role="assistant", content="A red circle; the word river."),
    ),
)


def _synthetic(rate: int) -> tuple[Iterator[tuple[float, Tensor]], Iterator[Tensor]]:
    """A minute of noise: video of 360 lines, and audio."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    audio = torch.rand(rate, generator=generator) - 0.5
    return ((float(second), frame) for second in range(SECONDS)), (audio for _ in range(SECONDS))


def _read(
    run: RunConfig, skeleton: Skeleton, sample: Sample, tracks: Tracks | None, source: Source | None
) -> SampleFacts:
    """Decode the sample and cut it into chunks as a run does; encoder outputs are only counted.

    Raises ConfigError if `stream` does not fit the checkpoint's grids, LayoutError if a step of tuning may not.
    """
    # 1. decode
    backbone = skeleton.backbone
    try:
        require_supported(backbone, run.stream)
    except LayoutError as error:
        raise ConfigError([str(error)]) from error
    segments: list[Segment] = list(source or ())
    frame = next((segment.frames.shape[2:] for segment in segments if segment.frames is not None), (0, 0))
    # 2. cut into chunks
    encoded = list(_counted(segments, backbone, run.stream.fps))
    if source is not None:
        run.tuning.check_segments(encoded)
    cut = backbone.chunks(
        encoded,
        tracks=tracks,
        chunk_tokens=run.stream.chunk_tokens,
        inside=run.stream.cut == "tokens",
        cuts=[question.at - sample.start for question in sample.questions if question.at is not None],
        system=sample.system,
        prefix=sample.prefix,
        group=max(1, ceil(sum(each.grid[0] for each in encoded) / (run.stream.timestamps or 1 << 30))),
    )
    try:
        opening, *chunks = cut
    except ValueError as error:
        raise ConfigError([f"stream.chunk_tokens: {error}"]) from error
    # 3. count
    tokens = {kind: sum(int((chunk.modality == kind).sum()) for chunk in chunks) for kind in Modality}
    tokens[Modality.TEXT] += opening.count
    turns = [backbone.turn(Turn(text=q.text, answer=q.answer), tracks=tracks) for q in sample.questions]
    return SampleFacts(
        sample=sample,
        tracks=tracks,
        source=source,
        frame=(int(frame[0]), int(frame[1])),
        tokens=tokens,
        chunks=tuple(chunk.count for chunk in chunks),
        last_position=max(int(chunk.positions.max()) for chunk in chunks) if chunks else opening.count,
        learned=sum(label != IGNORED for _, _, labels in turns for label in labels),
    )


def _counted(segments: Iterable[Segment], backbone: Backbone, fps: float) -> Iterator[Encoded]:
    """Segments with the token counts of the encoders, and tokens of width 0."""
    cell, temporal, heard = backbone.geometry.cell, backbone.geometry.temporal_patch, 0
    for segment in segments:
        grid, before = (0, 0, 0), backbone.audio_tokens(heard)
        if segment.frames is not None:
            frames, _, height, width = segment.frames.shape
            grid = (ceil(frames / temporal), height // cell, width // cell)
        heard += 0 if segment.mel is None else segment.mel.shape[1]
        audio = backbone.audio_tokens(heard) - before
        yield Encoded(
            visual=None if segment.frames is None else torch.zeros(1, grid[0] * grid[1] * grid[2], 0),
            audio=torch.zeros(1, audio, 0) if audio else None,
            grid=grid,
            start=segment.start,
            seconds=segment.seconds,
            seconds_per_grid=temporal / fps,
        )


def describe_sample(
    skeleton: Skeleton, facts: SampleFacts, layout: Literal["original", "compact"], *, every: bool = False
) -> Iterator[str]:
    """Frames and audio of the sample, its tokens by modality, and its questions with time and label mask.

    The first SHOWN questions, or with `every` all of them.
    """
    source, sample, tokenizer = facts.source, facts.sample, skeleton.backbone.tokenizer
    (height, width), title = facts.frame, f"{sample.id} {sample.origin}".rstrip()
    if source is None:
        yield f"{title}: text alone"
    else:
        span = f", {sample.start:g} s to {'its end' if sample.end is None else f'{sample.end:g} s'} of the file"
        yield (
            f"{title}: {source.seconds:.1f} s, {counted(source.frames_seen, 'frame')} resized to {width} x {height}, "
            f"{source.audio_seconds_heard:.1f} s of audio{span if sample.start or sample.end else ''}"
        )
    counts = ", ".join(f"{count:,} {kind.name.lower()}" for kind, count in facts.tokens.items())
    yield (
        f"tokens of the stream: {counts}; longest of {counted(len(facts.chunks), 'chunk')}: "
        f"{max(facts.chunks, default=0):,}"
    )
    if skeleton.approximate:
        yield "approximate: the model's tokenizer is missing, text is tokenized by that of the tiny checkpoint"
    trained = skeleton.shapes.trained_positions
    if facts.last_position >= trained:
        moved = {"original": "", "compact": "; stream.positions = compact moves them below, but for full memory"}
        yield beyond(facts.last_position, trained) + moved[layout]
    first = skeleton.backbone.framed(sample.questions[0].text, system=sample.system, prefix=sample.prefix)
    yield f"prompt without the stream: {json.dumps(first, ensure_ascii=False)}"
    yield "after the stream, labels in [[ ]]:"
    shown = len(sample.questions) if every else SHOWN
    for question in sample.questions[:shown]:
        turn = Turn(text=question.text, answer=question.answer if question.loss else None)
        ids, _, labels = skeleton.backbone.turn(turn, tracks=facts.tracks)
        learned = [label for label in labels if label != IGNORED]
        asked = tokenizer.decode(ids[: len(ids) - len(learned)])
        answer = f"[[{tokenizer.decode(learned)}]]" if learned else "(no labels)"
        when = "after the end" if question.at is None else f"at {question.at:g} s"
        yield (
            f"  {when}: {json.dumps(asked, ensure_ascii=False)} {answer}  {len(learned)} of "
            f"{counted(len(ids), 'token')}"
        )
    if len(sample.questions) > shown:
        yield f"  and {counted(len(sample.questions) - shown, 'question')} more (--sample {sample.id} shows them)"


def describe_budget(run: RunConfig, shapes: Shapes, facts: SampleFacts) -> Iterator[str]:
    """Slots by layer and modality, and the share of the sample that they keep."""
    wanted, slots, layers = run.memory.budget, run.memory.slots_per_layer, shapes.text.layers
    if isinstance(wanted, AudioVisualBudget) and wanted.needs_signals:
        budget = SplitBudget(visual_audio_ratio=wanted.visual_audio_ratio).build(layers, slots)
        yield (
            f"measured on {counted(run.calibration.streams, 'training stream')} before the first step; "
            f"until then the same for every layer, 1 audio slot for {counted(wanted.visual_audio_ratio, 'visual one')}:"
        )
    else:
        budget = wanted.build(layers, slots)
    audio, visual = zip(*budget.slots, strict=True)
    share = "one pool" if not budget.split else f"{span(audio)} audio + {span(visual)} visual"
    yield (
        f"{counted(slots, 'slot')} per layer ({share}) x {counted(layers, 'layer')} = {counted(budget.total, 'entry')}"
    )
    media = facts.tokens[Modality.AUDIO] + facts.tokens[Modality.VISUAL]
    yield f"of the {media:,} audio and visual tokens of this sample {min(1, slots / max(1, media)):.1%} are kept"
    yield from unevicted("this sample", media, slots) if run.tuning.slots(slots) != (None,) else ()
    for what, drawn in (("slots per layer", run.tuning.budgets), ("chunk_tokens", run.tuning.chunk_tokens)):
        if drawn:
            listed = ", ".join(map(str, drawn)) if isinstance(drawn, tuple) else drawn
            yield f"{what} in training, one drawn per step: {listed}"
    if run.memory.selection_from == "base":
        yield f"chosen by the model without its adapter, which keeps {counted(budget.total, 'entry')} of its own"
    if (most := run.tuning.selection.most(slots)) > slots:
        yield f"soft selection holds up to {counted(most, 'entry')} per layer in training, evaluation holds {slots:,}"


def load_of(run: RunConfig, shapes: Shapes, facts: SampleFacts, backbone: Backbone | None = None) -> Load:
    """Load of a device if this sample is the longest one; `backbone` is the model with its adapter (`set_up`)."""
    before = () if backbone is None else backbone.unprojected
    saved = [] if backbone is None else [weight for copy in copies(backbone.model) for weight in copy.parameters()]
    dtype = getattr(torch, run.model.dtype)
    projected = {kind: count * (_TRACK[kind] in before) for kind, count in facts.tokens.items() if kind in _TRACK}
    policy, softened = run.memory.policy.build(None), run.tuning.selection.softening != "hard"
    measures = policy.measures
    media = facts.tokens[Modality.AUDIO] + facts.tokens[Modality.VISUAL]
    drawn, most = run.tuning.slots(run.memory.slots_per_layer), run.tuning.selection.most
    slots = max(media if slots is None else most(slots) for slots in drawn)
    limited = max((most(each) for each in drawn if each is not None), default=0)
    width = shapes.text.width if measures.feature is None else min(measures.feature, shapes.text.width)
    feature, base = width if policy.traits.needs_novelty else 0, run.memory.selection_from == "base"
    evicting = max((slots for slots in drawn if slots is not None), default=0) if base else 0
    batch = int(run.train.get("per_device_train_batch_size", 8))
    return Load(
        dtype=dtype,
        lora=run.tuning.lora,
        saved=sum(weight.numel() for weight in saved),
        unprojected=encoded_bytes(shapes, projected, dtype, before),
        projected=encoded_bytes(shapes, projected, dtype),
        quantized=run.model.quantization is not None,
        feature=0 if base else feature,
        selector_entries=evicting * shapes.text.layers,
        selector_feature=feature,
        sketch=_bits(run, measures) if width < shapes.text.width else None,
        places=3 if policy.traits.needs_place else 0,
        covered=_compared(policy, shapes, width) if softened else 0,
        gated=softened,
        weighed=run.tuning.selection.gradient == "both",
        per_head=policy.traits.per_head,
        entries=slots * shapes.text.layers,
        limited=min(limited, slots) * shapes.text.layers if None in drawn and slots == media else None,
        chunk_tokens=run.tuning.chunks(run.stream.chunk_tokens)[1],
        chunks=len(facts.chunks),
        text_tokens=facts.tokens[Modality.TEXT],
        question_tokens=facts.learned,
        moments=len(facts.sample.moments),
        frame=facts.frame,
        frames_per_segment=shapes.geometry.segment(run.stream.fps)[1],
        half=bool(run.train.get("bf16") or run.train.get("fp16")),
        stage=stage_of(run.train),
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
        batch=batch,
        recompute=run.tuning.recompute,
        gradient=run.tuning.gradient,
        horizon=run.tuning.horizon,
        stop_layer=stop_layer_of(run.tuning, shapes.text.layers) if run.tuning.gradient in HALF_WAY else 0,
        offload=run.tuning.offload,
        teacher_tokens=media
        if any(loss.needs_teacher and loss.applies_to(media) for loss in run.tuning.loss.losses)
        else 0,
    )


def _bits(run: RunConfig, measures: Measures) -> Bits | None:
    """Bits per number of a sketch in training; one whose score has gradient is carried in 16."""
    return (16 if run.tuning.selection.softening != "hard" else measures.sketch) if measures.sketch else None


def _compared(policy: Policy, shapes: Shapes, feature: int) -> int:
    """Width of the vectors that `Covered` compares; 0 for other scores."""
    widths = {None: 0, "inputs": feature, "sketch": feature, "values": shapes.text.kv_heads * shapes.text.dim}
    return widths[policy.traits.compared]


def _deepspeed(run: RunConfig) -> str:
    """The DeepSpeed settings on one line."""
    given = run.train.get("deepspeed")
    if given is None:
        return "none: training on one device"
    return json.dumps(
        given if isinstance(given, dict) else read_stored(Path(given), dict[str, Any], "see configs/deepspeed")
    )


def _section(title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if lines:
        print(f"--- {title}", *lines, "", sep="\n")
