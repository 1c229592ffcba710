"""Qwen2.5-Omni thinker: layout, TMRoPE positions and rates as transformers computes them, all read from the checkpoint.

Prompt: {opening}<|vision_bos|><|audio_bos|>[video, audio]*<|audio_eos|><|vision_eos|>{question}, interleaved every
`seconds_per_chunk`; a stream with one track has only the markers of that track.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniThinkerTextModel,
    Qwen2_5OmniVisionEncoder,
)

from omnimem.backbones.base import Backbone, Encoded, Layout, ModelOptions, Part, Tracks, Turn, labelled, raster
from omnimem.backbones.family import Family, Table, on_meta, weights_of
from omnimem.backbones.files import CheckpointError, checkpoint_errors
from omnimem.backbones.prompt_text import CUT, PromptText
from omnimem.backbones.settings import chat_template, flattened, load_model, only, preprocessor_settings
from omnimem.backbones.shapes import AudioShape, Shapes, TextShape, VisionShape
from omnimem.backbones.template import SAMPLE, around_video
from omnimem.backbones.vision import look
from omnimem.media import Geometry, LogMel, Segment
from omnimem.tokens import Modality

VIDEO = "<|vision_bos|><|VIDEO|><|vision_eos|>"
# the tokens before and after the tracks of a stream
BEGIN = {"both": ("<|vision_bos|>", "<|audio_bos|>"), "video": ("<|vision_bos|>",), "audio": ("<|audio_bos|>",)}
END = {"both": ("<|audio_eos|>", "<|vision_eos|>"), "video": ("<|vision_eos|>",), "audio": ("<|audio_eos|>",)}
# settings that are read from the preprocessor files
PREPROCESSED = ("feature_size", "hop_length", "n_fft", "image_mean", "image_std")


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
            tokenizer = AutoTokenizer.from_pretrained(options.processor or options.path, trust_remote_code=False)
            if (template := chat_template(options.processor or options.path)) is not None:
                tokenizer.chat_template = template
            _template(tokenizer, options.system)  # in a child, which starts faster while no weights are loaded
            config = Qwen2_5OmniThinkerConfig.from_pretrained(options.path)
            model: Any = load_model(options, Qwen2_5OmniThinkerForConditionalGeneration, config)
            table = preprocessor_settings(options.processor or options.path, PREPROCESSED)
            geometry = _geometry(model.config, table, options.path)
            return cls(model, tokenizer, geometry, folder=folder if folder.is_dir() else None, system=options.system)

    @property
    def text_model(self) -> PreTrainedModel:
        return only(self.model, Qwen2_5OmniThinkerTextModel)

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
            yield from only(self.model, tower).state_dict().values()

    @property
    def stop(self) -> tuple[int, ...]:
        return (self._id("<|im_end|>"),)

    @property
    def trained_positions(self) -> int:
        return self.text_model.config.max_position_embeddings

    def audio_tokens(self, mel_frames: int) -> int:
        return audio_tokens(mel_frames)

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
            seen, audio = look(self._towers, self.geometry, block, self.device), self._encode_mel(block)
        return [
            Encoded(
                visual=shown.tokens,
                audio=mel_tokens,
                grid=shown.grid,
                start=segment.start,
                seconds=segment.seconds,
                seconds_per_grid=self.geometry.temporal_patch / fps,
                at=segment.at,
                deepstack=shown.deepstack,
            )
            for segment, shown, mel_tokens in zip(block, seen, audio, strict=True)
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

    def layout(self, *, tracks: Tracks | None, batch: int, system: str | None, group: int) -> Layout:
        text = self._opening if system is None else self._rendered(system)[0]
        opening = self._text.ids(text) + [self._id(token) for token in (BEGIN[tracks] if tracks else ())]
        count = len(opening) - (1 if tracks == "both" else 0)  # both begin markers have the same position
        return _Layout(
            self.embed(opening).expand(batch, -1, -1), rates=self.rates, base=count, interleaved=tracks == "both"
        )

    def _rendered(self, system: str | None) -> tuple[str, str]:
        """The template before and after the stream; its system text is a user's."""
        return _template(self.tokenizer, None if system is None else self._text.plain(system))

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
class _Layout(Layout):
    """Positions of the tokens of each segment; counts grids and audio tokens from the start of the stream."""

    def __init__(
        self, opening: Float[Tensor, "batch tokens width"], *, rates: Rates, base: int, interleaved: bool
    ) -> None:
        self._opening = opening
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

    def opening(self) -> Part:
        count = self._opening.shape[1]
        return Part(
            embeddings=self._opening,
            positions=torch.arange(count).clamp_max(self.base - 1).expand(3, -1),
            modality=torch.zeros(count, dtype=torch.int8),
            place=torch.full((4, count), -1, dtype=torch.int32),
        )

    def push(self, segment: Encoded) -> list[Part]:
        """A segment in order of time, interleaved as in the processor.

        With less than one frame grid per block (fps < temporal_patch / seconds_per_chunk) the processor pairs the
        n-th grid with the n-th block of audio, before the grid's time. A stream cannot do that, so it keeps the order
        of time (ours).
        """
        # 1. visual tokens: TMRoPE positions relative to the start of the stream, and places
        embeddings, positions, places, kinds = [], [], [], []
        if segment.visual is not None:
            place, (count, rows, columns) = raster(segment.grid, self.grids), segment.grid
            times = self.rates.of_grids(range(self.grids, self.grids + count), segment.seconds_per_grid)
            self._count_pieces(times.tolist(), rows, columns)
            self.grids += count
            embeddings.append(segment.visual)
            positions.append(torch.stack([times.repeat_interleave(rows * columns), *place[1:]]))
            places.append(place)
            kinds += [int(Modality.VISUAL)] * place.shape[1]
        # 2. audio tokens: at the latest frame that has begun
        if segment.audio is not None:
            times = torch.arange(segment.audio.shape[1]) + self.audio_tokens
            self.audio_tokens += segment.audio.shape[1]
            begun = self.rates.of_grids(range(self.grids), segment.seconds_per_grid)
            frames = torch.searchsorted(begun, times, right=True) - 1
            embeddings.append(segment.audio)
            positions.append(times.expand(3, -1))
            places.append(torch.stack([frames, *torch.full((2, len(times)), -1)]))
            kinds += [int(Modality.AUDIO)] * len(times)
        # 3. interleave by block
        position = torch.cat(positions, dim=1)
        order = (position[0] // self.rates.positions_per_chunk).argsort(stable=True)
        place = F.pad(torch.cat(places, dim=1), (0, 0, 0, 1), value=-1).to(torch.int32)
        part = Part(
            embeddings=torch.cat(embeddings, dim=1)[:, order.to(embeddings[0].device)],
            positions=(position + self.base)[:, order],
            modality=torch.tensor(kinds, dtype=torch.int8)[order],
            place=place[:, order],
            next_position=self.next_position,
        )
        return [part]

    def _count_pieces(self, times: Sequence[int], rows: int, columns: int) -> None:
        """Count the blocks that get_rope_index cuts visual tokens into: a token begins at most one.

        Where a grid takes longer than a block, its first tokens are pieces of their own.
        """
        for time in times:
            begun = time // self.rates.positions_per_chunk + 1
            self.visual_pieces += max(0, min(rows * columns, begun - self.visual_pieces))
            self.visual_last = max(time, rows - 1, columns - 1)


def _template(tokenizer: PreTrainedTokenizerBase, system: str | None) -> tuple[str, str]:
    """The chat template before and after the stream."""
    return around_video(tokenizer, system, video=VIDEO, family="Qwen2.5-Omni")


def audio_tokens(mel_frames: int) -> int:
    """Number of audio tokens for a number of mel frames: halved twice, rounded as in transformers."""
    return max(0, ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1) if mel_frames > 0 else 0


def _geometry(config: Qwen2_5OmniThinkerConfig, table: Table, path: str) -> Geometry:
    """Patch and mel settings of the preprocessor file, checked against the encoders' configuration."""
    thinker: Any = config
    vision, audio = thinker.vision_config, thinker.audio_config
    mel = LogMel(mels=table["feature_size"], hop=table["hop_length"], n_fft=table["n_fft"], rate=table["sampling_rate"])
    frames = thinker.seconds_per_chunk * mel.rate / mel.hop
    if mel.mels != audio.num_mel_bins or frames % (2 * audio.n_window):
        raise CheckpointError(
            f"{path}: {mel.mels} mel bins and {frames:g} mel frames per {thinker.seconds_per_chunk:g} s do not fit the "
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
        segment_seconds=float(thinker.seconds_per_chunk),
    )


@final
class Qwen25OmniFamily(Family):
    """Qwen2.5-Omni 3B and 7B: the thinker, with or without the talker beside it."""

    name = "Qwen2.5-Omni"
    sizes = "3B and 7B (budget8k.yaml), and the bundled models/tiny"
    trees = ("thinker.model", "model", "model.language_model", "thinker.model.language_model")

    def claims(self, config: Table) -> bool:
        return config.get("model_type") in ("qwen2_5_omni", "qwen2_5_omni_thinker")

    def load(self, options: ModelOptions) -> Backbone:
        return Qwen25Omni.load(options)

    def shapes(self, config: Table, preprocessor: Table) -> Shapes:
        thinker = self._thinker(config)
        text, vision, audio = thinker["text_config"], thinker["vision_config"], thinker["audio_config"]
        return Shapes(
            text=TextShape(
                layers=text["num_hidden_layers"],
                width=text["hidden_size"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
                inner=text["intermediate_size"],
                vocabulary=text["vocab_size"],
            ),
            vision=VisionShape(
                width=vision["hidden_size"],
                inner=vision["intermediate_size"],
                channels=vision["in_channels"],
                patch=vision["patch_size"],
                temporal_patch=vision["temporal_patch_size"],
            ),
            audio=AudioShape(width=audio["d_model"], inner=audio["encoder_ffn_dim"], mels=audio["num_mel_bins"]),
            geometry=_geometry(self._config(config), flattened(preprocessor), "config.json"),
            parameters=weights_of(on_meta(Qwen2_5OmniThinkerForConditionalGeneration, self._config(config))),
            trained_positions=text["max_position_embeddings"],
        )

    def skeleton(
        self, config: Table, preprocessor: Table, tokenizer: PreTrainedTokenizerBase, system: str | None
    ) -> Backbone:
        thinker = self._config(config)
        model = on_meta(Qwen2_5OmniThinkerForConditionalGeneration, thinker)
        geometry = _geometry(thinker, flattened(preprocessor), "config.json")
        return Qwen25Omni(model, tokenizer, geometry, system=system)

    def _thinker(self, config: Table) -> Table:
        return config.get("thinker_config", config)

    def _config(self, config: Table) -> Qwen2_5OmniThinkerConfig:
        return Qwen2_5OmniThinkerConfig.from_dict(dict(self._thinker(config)))
