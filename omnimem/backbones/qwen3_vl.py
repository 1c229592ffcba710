"""Qwen3-VL, dense and with experts: frames alone, each frame grid after its time as text.

Stream: for each grid `<12.5 seconds><|vision_start|>[visual tokens]<|vision_end|>`, the time being the mean of those of
its first and last frame. With `stream.timestamps`, several grids share the time of the first one, as in the release of
video-SALMONN 2+ (`total_timestamps`). The last `<|vision_end|>` stands before the question, where the stream ends.

Positions: text counts tokens. A group of n grids that starts at p has t = p + grid, h = p + row, w = p + column; the
next token is at p + max(n, rows, columns).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from omnimem.backbones.base import Backbone, Encoded, Layout, ModelOptions, Part, Tracks, Turn, labelled, raster
from omnimem.backbones.family import Family, Table, on_meta, weights_of
from omnimem.backbones.files import checkpoint_errors
from omnimem.backbones.prompt_text import CUT, PromptText
from omnimem.backbones.settings import chat_template, flattened, load_model, preprocessor_settings, read_json
from omnimem.backbones.shapes import AudioShape, Shapes, TextShape, VisionShape
from omnimem.backbones.template import SAMPLE, around_video
from omnimem.backbones.vision import look
from omnimem.media import Geometry, LogMel, Segment
from omnimem.tokens import Modality

START, END = "<|vision_start|>", "<|vision_end|>"
VIDEO = f"{START}<|video_pad|>{END}"
TEMPLATE = (  # ours, for a dry run without the model's tokenizer
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'video' %}" + VIDEO + "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSED = ("image_mean", "image_std")
HALVES = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}  # of every published checkpoint
SEGMENT_SECONDS = 2.0  # of a stream without audio
TOGETHER = 64.0  # seconds of video in one pass of the encoder
Classes = tuple[Any, Any]  # of the configuration and of the model
STOCK: dict[str, Classes] = {
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
}


class Qwen3VL(Backbone):
    """A loaded model of this family; `model` is the unmodified transformers class."""

    senses = ("video",)
    compacts = False  # rows and columns move with the time, so kept tokens cannot move up in time alone
    stamped = True
    classes: dict[str, Classes] = STOCK
    preprocessed: tuple[str, ...] = PREPROCESSED  # settings that are read from the preprocessor's files
    defaults: dict[str, Any] = HALVES
    markers: tuple[str, ...] = (START, END, "<|video_pad|>")

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        geometry: Geometry,
        *,
        folder: Path | None = None,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.geometry, self.folder = model.eval(), tokenizer, geometry, folder
        self.text = PromptText(tokenizer)
        self._opening, self._closing = self.rendered(system)

    @classmethod
    def load(cls, options: ModelOptions) -> "Qwen3VL":
        """Load a checkpoint; tokenizer and processor may be in a folder of their own.

        Raises CheckpointError when a file or a weight is missing, or a weight is left over.
        """
        beside, folder = options.processor or options.path, Path(options.path)
        with checkpoint_errors(options.path):
            tokenizer = AutoTokenizer.from_pretrained(beside, trust_remote_code=False)
            if (template := chat_template(beside)) is not None:
                tokenizer.chat_template = template
            config_class, model_class = cls.classes[(read_json(options.path, "config.json") or {})["model_type"]]
            config = config_class.from_pretrained(options.path)
            geometry = cls.geometry_of(config, preprocessor_settings(beside, cls.preprocessed))
            model = load_model(options, model_class, config, exact=True)
            return cls(model, tokenizer, geometry, folder=folder if folder.is_dir() else None, system=options.system)

    @classmethod
    def geometry_of(cls, config: Any, table: Table) -> Geometry:
        """Patch settings; without audio a segment is a fixed time."""
        vision = config.vision_config
        return Geometry(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
            mean=tuple(table["image_mean"]),
            std=tuple(table["image_std"]),
            mel=LogMel(),
            segment_seconds=SEGMENT_SECONDS,
        )

    def rendered(self, system: str | None) -> tuple[str, str]:
        """The chat template before the stream, and after it with `SAMPLE` in place of the question."""
        text = None if system is None else self.text.plain(system)
        return around_video(self.tokenizer, text, video=VIDEO, family="Qwen3-VL")

    @property
    def _parts(self) -> Any:
        """The model as Any: its parts have no type annotations."""
        return self.model

    @property
    def text_model(self) -> PreTrainedModel:
        return self._parts.model.language_model

    @property
    def head(self) -> nn.Module:
        return self._parts.lm_head

    def encoder_weights(self) -> Iterator[Tensor]:
        """Weights of the vision encoder."""
        yield from self._parts.model.visual.state_dict().values()

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(self.text.ids("<|im_end|>"))

    @property
    def trained_positions(self) -> int:
        return self.text_model.config.max_position_embeddings

    def audio_tokens(self, mel_frames: int) -> int:
        return 0

    def listen(self, block: Sequence[Segment]) -> list[Tensor | None]:
        """Audio tokens [1, tokens, width] of each segment."""
        return [None] * len(block)

    @torch.no_grad()
    def encode(self, segments: Iterable[Segment], *, fps: float, per_pass: int = 32) -> Iterator[Encoded]:
        """Encode segments, up to `per_pass` of them and about a minute of video in one pass.

        The vision encoder attends within a frame grid, so a segment does not depend on its neighbours.
        """
        rest, temporal = iter(segments), self.geometry.temporal_patch
        together = max(1, min(per_pass, int(TOGETHER / self.geometry.segment(fps)[0])))
        while block := list(islice(rest, together)):
            seen = look(self._parts, self.geometry, block, self.device)
            for segment, shown, audio in zip(block, seen, self.listen(block), strict=True):
                yield Encoded(
                    visual=shown.tokens,
                    audio=audio,
                    grid=shown.grid,
                    start=segment.start,
                    seconds=segment.seconds,
                    seconds_per_grid=temporal / fps,
                    at=segment.at,
                    deepstack=shown.deepstack,
                    repeated=0 if segment.frames is None else -segment.frames.shape[0] % temporal,
                )

    def layout(self, *, tracks: Tracks | None, batch: int, system: str | None, group: int) -> Layout:
        text = self._opening if system is None else self.rendered(system)[0]
        return StampedLayout(
            lambda words: self.embed(self.text.ids(words)).expand(batch, -1, -1),
            text,
            group=group,
            audio_per_second=self.audio_tokens_per_second,
            temporal_patch=self.geometry.temporal_patch,
        )

    @property
    def audio_tokens_per_second(self) -> float:
        """Audio tokens that follow each second of frames."""
        return 0.0

    def framed(self, question: str, *, system: str | None = None) -> str:
        """The opening, then the user's turn with the question."""
        opening = self._opening if system is None else self.rendered(system)[0]
        return opening.replace(CUT, "") + self._closing.replace(CUT, "").replace(SAMPLE, question)

    def probe(self, text: str | None) -> list[int]:
        """Ids of the text as it is; None: of the end of the user's turn and the start of the assistant's."""
        return self.text.ids(self._closing.partition(SAMPLE)[2] if text is None else text)

    def end_of(self, tracks: Tracks | None) -> str:
        """The tokens between the stream and the question."""
        return "" if tracks in (None, "audio") else END

    def turn(self, turn: Turn, *, tracks: Tracks | None) -> tuple[list[int], list[int], list[int]]:
        """(ids, offsets, labels) of the end markers of the stream, the question and the answer.

        A label is at the token that predicts it; it is -100 elsewhere.
        """
        end = self.text.ids(self.end_of(tracks))
        asked = self.text.ids(self._closing.replace(SAMPLE, self.text.plain(turn.text)) if turn.ids is None else "")
        answer = [] if turn.answer is None else [*self.text.ids(self.text.plain(turn.answer)), self.stop[0]]
        given = self.text.ids(self.text.plain(turn.given))
        ids, labels = labelled([*end, *asked, *(turn.ids or ()), *given], answer)
        return ids, list(range(len(ids))), labels


@final
@dataclass(frozen=True, kw_only=True)
class Grid:
    """A frame grid, and the audio tokens that follow it."""

    number: int
    time: float  # seconds, as its timestamp says
    size: tuple[int, int]  # rows and columns
    visual: Float[Tensor, "batch visual_tokens width"]
    deepstack: tuple[Float[Tensor, "batch visual_tokens width"], ...]
    audio: Float[Tensor, "batch audio_tokens width"] | None


@final
class StampedLayout(Layout):
    """Groups of frame grids, each after its time as text, with the audio of their time at the group's end.

    Grid i of the stream takes the audio tokens floor(r s i) to floor(r s (i + 1)), at r tokens per second and s seconds
    per grid; the last grid of the video takes all that follow (release). Without audio left a grid has none.
    """

    def __init__(
        self,
        embed: Callable[[str], Float[Tensor, "batch tokens width"]],
        opening: str,
        *,
        group: int,
        audio_per_second: float,
        temporal_patch: int,
    ) -> None:
        self.embed, self._opening = embed, embed(opening)
        self.group, self.rate, self.temporal_patch = group, audio_per_second, temporal_patch
        self._position = self._opening.shape[1]
        self._grids = self._groups = 0  # begun so far
        self._held: tuple[Grid, ...] = ()  # of a group that is not complete

    def opening(self) -> Part:
        return _text(self._opening, 0, -1)

    def push(self, segment: Encoded) -> list[Part]:
        # 1. audio without frames: it follows the latest group
        if segment.visual is None:
            return self._append(segment.audio)
        # 2. complete groups; the last grid of a video that ends within the segment takes the rest of the audio
        parts = []
        for grid in self._cut(segment):
            self._held = (*self._held, grid)
            if len(self._held) == self.group:
                parts.append(self._emitted())
        return parts

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def finish(self) -> list[Part]:
        return [self._emitted()] if self._held else []

    def _append(self, audio: Tensor | None) -> list[Part]:
        """Audio after the frames have ended, or of a stream without frames."""
        if audio is None:
            return []
        if self._held:
            last = self._held[-1]
            joined = audio if last.audio is None else torch.cat([last.audio, audio], dim=1)
            self._held = (*self._held[:-1], replace(last, audio=joined))
            return []
        return [self._sound(audio, self._grids - 1)]

    def _cut(self, segment: Encoded) -> Iterator[Grid]:
        """The grids of a segment, each with its audio."""
        assert segment.visual is not None, "a segment with frames"
        count, rows, columns = segment.grid
        first, spacing = self._grids, segment.seconds_per_grid
        ends = [self._heard(first + n + 1, spacing) - self._heard(first, spacing) for n in range(count)]
        if segment.audio is not None:
            ends[-1] = segment.audio.shape[1]
        cells, frame = rows * columns, spacing / self.temporal_patch
        for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            repeated = segment.repeated if n + 1 == count else 0
            span, audio = slice(n * cells, (n + 1) * cells), segment.audio
            heard = None if audio is None or start >= min(end, audio.shape[1]) else audio[:, start:end]
            yield Grid(
                number=first + n,
                time=segment.start + n * spacing + (self.temporal_patch - 1 - repeated) * frame / 2,
                size=(rows, columns),
                visual=segment.visual[:, span],
                deepstack=tuple(level[:, span] for level in segment.deepstack),
                audio=heard,
            )
        self._grids = first + count

    def _heard(self, grids: int, spacing: float) -> int:
        """Audio tokens that belong to the first grids of the stream."""
        return int(self.rate * spacing * grids + 1e-6)

    def _emitted(self) -> Part:
        """The held grids as a group: [vision_end of the group before] time, vision_start, frames, audio."""
        held, self._held = self._held, ()
        # 1. the text before it
        parts = [] if not self._groups else [self._words(END, self._groups - 1)]
        parts.append(self._words(f"<{held[0].time:.1f} seconds>{START}", self._groups))
        # 2. the frames
        number, (rows, columns) = self._groups, held[0].size
        place = raster((len(held), rows, columns))
        visual = Part(
            embeddings=torch.cat([grid.visual for grid in held], dim=1),
            positions=place + self._position,
            modality=torch.full((place.shape[1],), int(Modality.VISUAL), dtype=torch.int8),
            place=torch.stack([place[0] + held[0].number, place[1], place[2], torch.full_like(place[0], number)]).int(),
            deepstack=tuple(torch.cat(level, dim=1) for level in zip(*(grid.deepstack for grid in held), strict=True)),
        )
        parts.append(visual)
        self._position += max(len(held), rows, columns)
        self._groups += 1
        # 3. the audio of all its grids
        parts += [self._sound(grid.audio, grid.number) for grid in held if grid.audio is not None]
        return _joined(parts)

    def _words(self, text: str, group: int) -> Part:
        part = _text(self.embed(text), self._position, group)
        self._position += part.count
        return part

    def _sound(self, audio: Float[Tensor, "batch tokens width"], frame: int) -> Part:
        part = _text(audio, self._position, self._groups - 1)
        self._position += part.count
        place = part.place.clone()
        place[0] = frame
        return replace(part, modality=torch.full_like(part.modality, int(Modality.AUDIO)), place=place)


def _text(embeddings: Float[Tensor, "batch tokens width"], first: int, group: int) -> Part:
    """Tokens at consecutive positions from `first` on."""
    count = embeddings.shape[1]
    place = torch.full((4, count), -1, dtype=torch.int32)
    place[3] = group
    return Part(
        embeddings=embeddings,
        positions=torch.arange(first, first + count).expand(3, -1),
        modality=torch.zeros(count, dtype=torch.int8),
        place=place,
    )


def _joined(parts: Sequence[Part]) -> Part:
    """One part of several, at most one of them with deepstack features."""
    return Part(
        embeddings=torch.cat([part.embeddings for part in parts], dim=1),
        positions=torch.cat([part.positions for part in parts], dim=1),
        modality=torch.cat([part.modality for part in parts]),
        place=torch.cat([part.place for part in parts], dim=1),
        deepstack=next((part.deepstack for part in parts if part.deepstack), ()),
    )


def text_shape(text: Table) -> TextShape:
    """Sizes of a Qwen3 decoder from its text_config."""
    experts = "num_experts" in text
    inner = text["num_experts_per_tok"] * text["moe_intermediate_size"] if experts else text["intermediate_size"]
    return TextShape(
        layers=text["num_hidden_layers"],
        width=text["hidden_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        inner=inner,
        vocabulary=text["vocab_size"],
        experts=experts,
    )


class Qwen3VLFamily(Family):
    """Qwen3-VL 2B to 32B, and its variants with experts."""

    name = "Qwen3-VL"
    sizes = "2B to 32B and with experts, frames alone (qwen3_vl_8b.yaml)"
    trees = ("model.language_model",)
    backbone: type[Qwen3VL] = Qwen3VL

    def claims(self, config: Table) -> bool:
        return config.get("model_type") in STOCK and "audio_config" not in config

    def load(self, options: ModelOptions) -> Backbone:
        return self.backbone.load(options)

    def shapes(self, config: Table, preprocessor: Table) -> Shapes:
        config = config.get("thinker_config", config)
        text, vision = config["text_config"], config["vision_config"]
        parsed, model_class = self._parsed(config)
        return Shapes(
            text=text_shape(text),
            vision=VisionShape(
                width=vision["hidden_size"],
                inner=vision["intermediate_size"],
                channels=vision.get("in_channels", 3),
                patch=vision["patch_size"],
                temporal_patch=vision["temporal_patch_size"],
                levels=len(parsed.vision_config.deepstack_visual_indexes),
            ),
            audio=self.audio_shape(parsed),
            geometry=self.backbone.geometry_of(parsed, self.backbone.defaults | flattened(preprocessor)),
            parameters=weights_of(on_meta(model_class, parsed)),
            trained_positions=text["max_position_embeddings"],
            pass_seconds=TOGETHER,
        )

    def audio_shape(self, config: Any) -> AudioShape | None:
        """Sizes of the audio encoder; None: there is none."""
        return None

    def skeleton(
        self, config: Table, preprocessor: Table, tokenizer: PreTrainedTokenizerBase, system: str | None
    ) -> Backbone:
        if START not in tokenizer.get_vocab():  # of another model: text is counted approximately, markers exactly
            tokenizer.add_special_tokens({"additional_special_tokens": list(self.backbone.markers)})
            tokenizer.chat_template = TEMPLATE
        parsed, model_class = self._parsed(config)
        geometry = self.backbone.geometry_of(parsed, self.backbone.defaults | flattened(preprocessor))
        return self.backbone(on_meta(model_class, parsed), tokenizer, geometry, system=system)

    def _parsed(self, config: Table) -> tuple[Any, Any]:
        """The configuration in its class, and the class of the model."""
        config = config.get("thinker_config", config)
        config_class, model_class = self.backbone.classes[config["model_type"]]
        return config_class.from_dict(dict(config)), model_class
