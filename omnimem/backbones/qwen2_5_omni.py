"""Qwen2.5-Omni thinker: layout, TMRoPE positions and rates as transformers computes them, all read from the checkpoint.

Prompt: {opening}<|vision_bos|><|audio_bos|>[video, audio]*<|audio_eos|><|vision_eos|>{question}, interleaved every
`seconds_per_chunk`; a stream with one track has only the markers of that track.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.integrations import deepspeed
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniThinkerTextModel,
    Qwen2_5OmniVisionEncoder,
)
from transformers.utils import cached_file

from omnimem.backbones.base import Backbone, Encoded, ModelOptions, Tracks, Turn, grouped, labelled
from omnimem.backbones.files import AGAIN, CheckpointError, checkpoint_errors, require_size, require_weights
from omnimem.backbones.prompt_text import CUT, PromptText
from omnimem.backbones.template import TemplateFailure, render_bounded
from omnimem.media import Geometry, LogMel, Segment
from omnimem.textfile import StoredFileError, read_stored
from omnimem.tokens import Chunk, Modality

VIDEO = "<|vision_bos|><|VIDEO|><|vision_eos|>"
SAMPLE = "\x00"  # placeholder of the question while the template is rendered
# the tokens before and after the tracks of a stream
BEGIN = {"both": ("<|vision_bos|>", "<|audio_bos|>"), "video": ("<|vision_bos|>",), "audio": ("<|audio_bos|>",)}
END = {"both": ("<|audio_eos|>", "<|vision_eos|>"), "video": ("<|vision_eos|>",), "audio": ("<|audio_eos|>",)}
# files with settings of the feature extractor and video processor; a later one counts
PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
PREPROCESSED = ("feature_size", "hop_length", "n_fft", "image_mean", "image_std")  # what is read from them
Part = TypeVar("Part", bound=nn.Module)


@final
@dataclass(frozen=True, kw_only=True)
class Rates:
    """Conversion of seconds to positions, read from the checkpoint (25 per second in the released models)."""

    positions_per_second: float
    seconds_per_chunk: float

    @property
    def positions_per_chunk(self) -> int:
        """Positions of one interleaved block of video and its audio."""
        return int(self.positions_per_second * self.seconds_per_chunk)

    def of_grids(self, numbers: range, seconds_per_grid: float) -> Int[Tensor, " grids"]:
        """Positions of frame grids relative to the start of the stream, in the float32 arithmetic of get_rope_index."""
        spacing = torch.tensor(seconds_per_grid, dtype=torch.float32)
        return (torch.arange(numbers.start, numbers.stop) * spacing * self.positions_per_second).long()


@final
class Qwen25Omni(Backbone):
    """A loaded Qwen2.5-Omni thinker; `model` is the unmodified transformers class."""

    def __init__(
        self,
        model: Qwen2_5OmniThinkerForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        geometry: Geometry,
        *,
        folder: Path | None = None,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.geometry, self.folder = model.eval(), tokenizer, geometry, folder
        config: Any = model.config
        self.rates = Rates(
            positions_per_second=float(config.position_id_per_seconds),
            seconds_per_chunk=float(config.seconds_per_chunk),
        )
        self._text = PromptText(tokenizer)
        self._opening, self._closing = self._rendered(system)

    @classmethod
    def load(cls, options: ModelOptions) -> "Qwen25Omni":
        """Load a thinker from a hub id or a local folder; a talker and vocoder in it are ignored.

        The files that may hold a setting are listed in docs/adding_a_model.md. Weights are read from safetensors only,
        and no code of the checkpoint is run. Raises CheckpointError when a file is missing.
        """
        folder = Path(options.path)
        with checkpoint_errors(options.path):
            tokenizer = AutoTokenizer.from_pretrained(options.path, trust_remote_code=False)
            if (template := _chat_template(options.path)) is not None:
                tokenizer.chat_template = template
            _render_template(tokenizer, options.system)  # in a child, which starts faster while no weights are loaded
            require_size(options.path, _weight_count(options.path))
            load: Any = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained
            model, found = load(
                options.path,
                dtype=getattr(torch, options.dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            require_weights(options.path, found)
            geometry = _geometry(options.path, model)
            return cls(model, tokenizer, geometry, folder=folder if folder.is_dir() else None, system=options.system)

    @property
    def text_model(self) -> PreTrainedModel:
        return _part(self.model, Qwen2_5OmniThinkerTextModel)

    @property
    def _towers(self) -> Any:
        """The model as Any: its decorated methods have no type annotations."""
        return self.model

    @property
    def head(self) -> nn.Module:
        return self.model.lm_head

    def encoder_weights(self) -> Iterator[Tensor]:
        """Weights of the vision tower, then of the audio tower."""
        for tower in (Qwen2_5OmniVisionEncoder, Qwen2_5OmniAudioEncoder):
            yield from _part(self.model, tower).state_dict().values()

    @property
    def stop(self) -> tuple[int, ...]:
        return (self._id("<|im_end|>"),)

    @property
    def trained_positions(self) -> int:
        return self.text_model.config.max_position_embeddings

    def _id(self, token: str) -> int:
        return self.tokenizer.encode(token, add_special_tokens=False)[0]

    def encode(self, segments: Iterable[Segment], *, fps: float, per_pass: int = 32) -> Iterator[Encoded]:
        """Encode segments with the vision and audio towers, `per_pass` of them in one pass.

        The result of a segment does not depend on its neighbours: the vision tower attends within a frame grid and
        the audio tower within its block.
        """
        rest = iter(segments)
        while block := list(islice(rest, per_pass)):
            whole = iter(self._encoded([segment for segment in block if segment.at is None], fps))
            for segment in block:  # the audio of a rest ends within a block, so that nothing can follow it in a pass
                yield next(whole) if segment.at is None else self._encoded([segment], fps)[0]

    def _encoded(self, block: Sequence[Segment], fps: float) -> list[Encoded]:
        """Segments in one pass; all but the last fill whole audio blocks."""
        with torch.no_grad():
            visual, audio = self._encode_frames(block), self._encode_mel(block)
        return [
            Encoded(
                visual=frame_tokens,
                audio=mel_tokens,
                grid=grid,
                start=segment.start,
                seconds=segment.seconds,
                seconds_per_grid=self.geometry.temporal_patch / fps,
                at=segment.at,
            )
            for segment, (frame_tokens, grid), mel_tokens in zip(block, visual, audio, strict=True)
        ]

    def _encode_frames(self, block: Sequence[Segment]) -> list[tuple[Tensor | None, tuple[int, int, int]]]:
        """Visual tokens [1, tokens, width] and their grid for each segment."""
        # 1. cut the frames into patches
        geometry, towers = self.geometry, self._towers
        patched = [None if segment.frames is None else geometry.patches(segment.frames) for segment in block]
        present = [item for item in patched if item is not None]
        if not present:
            return [(None, (0, 0, 0))] * len(block)
        # 2. encode all segments in one pass
        rows = torch.cat([row for row, _ in present]).to(device=self.device, dtype=towers.dtype)
        grids = torch.tensor([grid for _, grid in present], device=self.device)
        outputs = iter(towers.get_video_features(rows, grids).pooler_output)
        # 3. split the tokens by segment
        merge = geometry.merge
        return [
            (None, (0, 0, 0))
            if item is None
            else (next(outputs)[None], (item[1][0], item[1][1] // merge, item[1][2] // merge))
            for item in patched
        ]

    def _encode_mel(self, block: Sequence[Segment]) -> list[Tensor | None]:
        """Audio tokens [1, tokens, width] for each segment; every mel but the last fills whole audio blocks."""
        # 1. encode all segments in one pass
        present = [segment.mel for segment in block if segment.mel is not None]
        if audio_tokens(sum(mel.shape[1] for mel in present)) == 0:
            return [None] * len(block)
        towers = self._towers
        mel = torch.cat(present, dim=1)[None].to(device=self.device, dtype=towers.dtype)
        mask = torch.ones(1, mel.shape[2], dtype=torch.long, device=self.device)
        tokens = towers.get_audio_features(mel, feature_attention_mask=mask).last_hidden_state
        # 2. split the tokens by segment
        found, mel_frames, first = [], 0, 0
        for segment in block:
            mel_frames += 0 if segment.mel is None else segment.mel.shape[1]
            last = audio_tokens(mel_frames)
            found.append(tokens[None, first:last] if segment.mel is not None and last > first else None)
            first = last
        return found

    def chunks(
        self,
        segments: Iterable[Encoded],
        *,
        tracks: Tracks | None,
        chunk_tokens: int,
        batch: int = 1,
        cuts: Sequence[float] = (),
        system: str | None = None,
    ) -> Iterator[Chunk]:
        """The opening as a chunk of text, then segments joined up to `chunk_tokens` tokens, never across a cut.

        Raises LayoutError when a single segment is larger than `chunk_tokens`.
        """
        # 1. the opening
        text = self._opening if system is None else self._rendered(system)[0]
        opening = self._text.ids(text) + [self._id(token) for token in (BEGIN[tracks] if tracks else ())]
        count = len(opening) - (1 if tracks == "both" else 0)  # both begin markers have the same position
        places = [*range(count), count - 1] if tracks == "both" else list(range(count))
        yield replace(self._text_chunk(opening, places, batch), tracks=tracks)
        # 2. the segments
        layout = _Layout(rates=self.rates, base=count, interleaved=tracks == "both")
        for group in grouped(segments, chunk_tokens=chunk_tokens, cuts=cuts):
            yield (layout if group[0].at is None else copy(layout)).chunk(group)  # a rest moves nothing on

    def _text_chunk(self, ids: list[int], places: list[int], batch: int) -> Chunk:
        device = self.device
        tokens = torch.tensor(ids, device=device)
        positions = torch.tensor(places, device=device).expand(batch, 3, -1)
        with torch.no_grad():
            embeddings = self.text_model.get_input_embeddings()(tokens).expand(batch, -1, -1)
        modality = torch.zeros(batch, len(ids), dtype=torch.int8, device=device)
        return Chunk(embeddings=embeddings, positions=positions, modality=modality)

    def _rendered(self, system: str | None) -> tuple[str, str]:
        """The template before and after the stream; its system text is a user's."""
        return _render_template(self.tokenizer, None if system is None else self._text.plain(system))

    def framed(self, question: str, *, system: str | None = None) -> str:
        """The opening, then the user's turn with the question."""
        opening = self._opening if system is None else self._rendered(system)[0]
        return opening.replace(CUT, "") + self._closing.replace(CUT, "").replace(SAMPLE, question)

    def probe(self, text: str | None) -> list[int]:
        """Ids of the text as it is; None: of the end of the user's turn and the start of the assistant's."""
        return self._text.ids(self._closing.partition(SAMPLE)[2] if text is None else text)

    def turn(self, turn: Turn, *, tracks: Tracks | None) -> tuple[list[int], list[int], list[int]]:
        """(ids, offsets, labels) of the tracks' end markers (both at one position), the question and the answer.

        A label is at the token that predicts it; it is -100 elsewhere.
        """
        end = [self._id(token) for token in (END[tracks] if tracks else ())]
        asked = self._text.ids(self._closing.replace(SAMPLE, self._text.plain(turn.text)) if turn.ids is None else "")
        answer = [] if turn.answer is None else [*self._text.ids(self._text.plain(turn.answer)), self.stop[0]]
        given = self._text.ids(self._text.plain(turn.given))
        ids, labels = labelled([*end, *asked, *(turn.ids or ()), *given], answer)
        shared = 1 if len(end) == 2 else 0
        offsets = [max(0, number - shared) for number in range(len(ids))]
        return ids, offsets, labels


@final
class _Layout:
    """Positions of the tokens of each segment; counts grids and audio tokens from the start of the stream."""

    def __init__(self, *, rates: Rates, base: int, interleaved: bool) -> None:
        self.rates, self.base, self.interleaved = rates, base, interleaved
        self.grids, self.audio_tokens = 0, 0
        self.visual_pieces, self.visual_last = 0, -1  # blocks of visual tokens, largest position of the last one

    @property
    def next_position(self) -> int | None:
        """Position of text that follows here, from 0 at the start of the prompt; None: after the largest.

        get_rope_index appends the n-th piece of video and then the n-th of audio, and continues text after the last
        piece. So text shares positions with frames that reach beyond the audio of their block.
        """
        if not self.interleaved:
            return None
        audio_pieces = ceil(self.audio_tokens / self.rates.positions_per_chunk)
        video_is_last = self.visual_pieces > audio_pieces
        return self.base + 1 + (self.visual_last if video_is_last else self.audio_tokens - 1)

    def chunk(self, segments: Sequence[Encoded]) -> Chunk:
        """Join the segments into one chunk."""
        parts = [self._place(segment) for segment in segments]
        last = segments[-1]
        batch = parts[0][0].shape[0]
        return Chunk(
            embeddings=torch.cat([embeddings for embeddings, _, _ in parts], dim=1),
            positions=torch.cat([positions for _, positions, _ in parts], dim=1).expand(batch, -1, -1),
            modality=torch.cat([modality for _, _, modality in parts]).expand(batch, -1),
            seconds=last.start + last.seconds,
            at=last.at,
            next_position=self.next_position,
        )

    def _place(self, segment: Encoded) -> tuple[Tensor, Int[Tensor, "axes tokens"], Tensor]:
        """Embeddings, positions and modality of a segment, in order of time, interleaved as in the processor.

        With less than one frame grid per block (fps < temporal_patch / seconds_per_chunk) the processor pairs the
        n-th grid with the n-th block of audio, before the grid's time. A stream cannot do that, so it keeps the order
        of time (ours).
        """
        # 1. visual tokens
        embeddings, positions, kinds, blocks = [], [], [], []
        if segment.visual is not None:
            places = self._visual(segment)
            embeddings.append(segment.visual)
            positions.append(places + self.base)
            kinds += [int(Modality.VISUAL)] * places.shape[1]
            blocks.append(places[0] // self.rates.positions_per_chunk)
        # 2. audio tokens
        if segment.audio is not None:
            times = torch.arange(segment.audio.shape[1]) + self.audio_tokens
            self.audio_tokens += segment.audio.shape[1]
            embeddings.append(segment.audio)
            positions.append(times.expand(3, -1) + self.base)
            kinds += [int(Modality.AUDIO)] * len(times)
            blocks.append(times // self.rates.positions_per_chunk)
        # 3. interleave by block
        device = embeddings[0].device
        order = torch.cat(blocks).argsort(stable=True).to(device)
        modality = torch.tensor(kinds, dtype=torch.int8, device=device)
        return (
            torch.cat(embeddings, dim=1)[:, order],
            torch.cat(positions, dim=1).to(device)[:, order],
            modality[order],
        )

    def _visual(self, segment: Encoded) -> Int[Tensor, "axes tokens"]:
        """Time, row and column of each visual token, relative to the start of the stream."""
        time, rows, columns = segment.grid
        numbers = range(self.grids, self.grids + time)
        self.grids += time
        times = self.rates.of_grids(numbers, segment.seconds_per_grid)
        self._count_pieces(times.tolist(), rows, columns)
        return torch.stack(
            [
                times.repeat_interleave(rows * columns),
                torch.arange(rows).repeat_interleave(columns).repeat(time),
                torch.arange(columns).repeat(rows * time),
            ]
        )

    def _count_pieces(self, times: Sequence[int], rows: int, columns: int) -> None:
        """Count the blocks that get_rope_index cuts visual tokens into: a token begins at most one.

        Where a grid takes longer than a block, its first tokens are pieces of their own.
        """
        for time in times:
            begun = time // self.rates.positions_per_chunk + 1
            self.visual_pieces += max(0, min(rows * columns, begun - self.visual_pieces))
            self.visual_last = max(time, rows - 1, columns - 1)


def audio_tokens(mel_frames: int) -> int:
    """Number of audio tokens for a number of mel frames: halved twice, rounded as in transformers."""
    return max(0, ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1) if mel_frames > 0 else 0


def _render_template(tokenizer: PreTrainedTokenizerBase, system: str | None) -> tuple[str, str]:
    """The chat template's text before the video, and after it with `SAMPLE` in place of the question.

    Raises CheckpointError when there is no template, or it does not render a video.
    """
    return _render(tokenizer, repr(tokenizer.chat_template), system)


@lru_cache(maxsize=64)
def _render(tokenizer: PreTrainedTokenizerBase, template: str, system: str | None) -> tuple[str, str]:
    """`_render_template`, once for each template and system prompt."""
    content = [{"type": "video", "video": "stream"}, {"type": "text", "text": SAMPLE}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    if tokenizer.chat_template is None:
        raise CheckpointError(
            "the checkpoint has no chat template; copy chat_template.json or chat_template.jinja from the model's hub "
            "page into its folder"
        )
    try:
        text = render_bounded(
            lambda: str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        )
    except TemplateFailure as error:
        raise CheckpointError(
            f"the chat template cannot be rendered ({' '.join(str(error).split())}); use Qwen2.5-Omni's own template"
        ) from error
    opening, found, closing = text.partition(VIDEO)
    if not found or SAMPLE not in closing:
        raise CheckpointError(f"the chat template does not render a video as {VIDEO}; use Qwen2.5-Omni's own template")
    return opening, closing


def _geometry(path: str, model: Qwen2_5OmniThinkerForConditionalGeneration) -> Geometry:
    """Patch and mel settings from the preprocessor file, checked against the encoders' configuration."""
    table = _preprocessor(path)
    config: Any = model.config
    vision, audio = config.vision_config, config.audio_config
    mel = LogMel(mels=table["feature_size"], hop=table["hop_length"], n_fft=table["n_fft"], rate=table["sampling_rate"])
    frames = config.seconds_per_chunk * mel.rate / mel.hop
    if mel.mels != audio.num_mel_bins or frames % (2 * audio.n_window):
        raise CheckpointError(
            f"{path}: {mel.mels} mel bins and {frames:g} mel frames per {config.seconds_per_chunk:g} s do not fit the "
            f"audio tower ({audio.num_mel_bins} bins, blocks of {2 * audio.n_window} frames); fix "
            "preprocessor_config.json"
        )
    return Geometry(
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        temporal_patch=vision.temporal_patch_size,
        mean=tuple(table["image_mean"]),
        std=tuple(table["image_std"]),
        mel=mel,
        segment_seconds=float(config.seconds_per_chunk),
    )


def _weight_count(path: str) -> int:
    """The number of weights that config.json describes."""
    with _without_zero3(), torch.device("meta"):
        config = Qwen2_5OmniThinkerConfig.from_pretrained(path)
        return sum(weight.numel() for weight in Qwen2_5OmniThinkerForConditionalGeneration(config).parameters())


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Inside, models are constructed as without DeepSpeed: ZeRO-3 would partition each part of them (transformers)."""
    active = deepspeed._hf_deepspeed_config_weak_ref  # pyright: ignore[reportPrivateUsage] - it has no reader
    settings = active and active()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if settings is not None:
            deepspeed.set_hf_deepspeed_config(settings)


def _preprocessor(path: str) -> dict[str, Any]:
    """Settings of the feature extractor and video processor, from the files that transformers 4 and 5 write.

    On the hub preprocessor_config.json holds all of them. save_pretrained of transformers 4 writes those of the video
    processor to video_preprocessor_config.json, transformers 5 writes all to processor_config.json.
    """
    table: dict[str, Any] = {"sampling_rate": 16000}
    for name in PREPROCESSORS:
        found = _read_json(path, name) or {}
        parts = [found.get(part) or {} for part in ("image_processor", "video_processor", "feature_extractor")]
        table |= {key: value for part in (found, *parts) for key, value in part.items()}
    missing = [name for name in PREPROCESSED if name not in table]
    if missing:
        raise CheckpointError(
            f"{path}: no {' or '.join(PREPROCESSORS)} has {', '.join(missing)}; copy preprocessor_config.json from the "
            "model's hub page"
        )
    return table


def _chat_template(path: str) -> str | None:
    """The template of the processor, which replaces the tokenizer's as in Qwen2_5OmniProcessor; None: no file."""
    if (found := _file(path, "chat_template.jinja")) is not None:
        return found.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        template = (_read_json(path, name) or {}).get("chat_template")
        if isinstance(template, str):
            return template
        if template is not None:
            raise CheckpointError(
                f"{path}: chat_template in {name} is not one text; copy {name} again from the model's hub page"
            )
    return None


def _read_json(path: str, name: str) -> dict[str, Any] | None:
    """The object in a file of the checkpoint; None without the file. Raises CheckpointError when it is damaged."""
    if (found := _file(path, name)) is None:
        return None
    try:
        return read_stored(found, dict[str, Any], AGAIN)
    except StoredFileError as error:
        raise CheckpointError(str(error)) from error


def _file(path: str, name: str) -> Path | None:
    """A file of a local folder or of a hub id."""
    found = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def _part(model: nn.Module, kind: type[Part]) -> Part:
    """The only submodule of a class, at any depth: transformers 5.21 nests the parts one level deeper."""
    (found,) = (module for module in model.modules() if isinstance(module, kind))
    return found
