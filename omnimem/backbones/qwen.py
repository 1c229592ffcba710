"""What the Qwen models and those built on them share: loading, encoding, prompts, sizes, and streams of one span.

A family's file gives its classes, its tokens around a stream, its layout, and how it hears.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice, pairwise
from math import inf
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from omnimem.backbones.base import Backbone, Encoded, Layout, ModelOptions, Part, Tracks, Turn, labelled, raster
from omnimem.backbones.family import Family, Table, on_meta, weights_of
from omnimem.backbones.files import CheckpointError, checkpoint_errors
from omnimem.backbones.projectors import TRACKS, Projector, Track, applied, in_use, left_out
from omnimem.backbones.prompt_text import CUT, PromptText
from omnimem.backbones.settings import (
    chat_template,
    flattened,
    load_model,
    only,
    path_of,
    preprocessor_settings,
    read_json,
)
from omnimem.backbones.shapes import AudioShape, Shapes, TextShape, VisionShape
from omnimem.backbones.template import SAMPLE, around_video
from omnimem.backbones.vision import look
from omnimem.errors import counted
from omnimem.media import Geometry, LogMel, Segment
from omnimem.tokens import Modality

START, END = "<|vision_start|>", "<|vision_end|>"
VIDEO = f"{START}<|video_pad|>{END}"
SEGMENT_SECONDS = 2.0  # of a stream without audio
TOGETHER = 64.0  # seconds of video in one pass of the encoder
HALVES = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}  # of every published Qwen3 checkpoint
NOTHING: Mapping[Tracks, str] = {}
Classes = tuple[Any, Any]  # of the configuration and of the model


class Qwen(Backbone):
    """A loaded model; `model` is the class of transformers, or that with an audio branch."""

    name: str  # of the family, in messages
    classes: Mapping[str, Classes]  # by model_type
    decoder: tuple[type[PreTrainedModel], ...]  # the text model is the only module of one of these
    towers: tuple[tuple[type[nn.Module], ...], ...]  # and the encoders those of these
    projecting: tuple[tuple[str, ...], ...] = (("merger",),)  # modules of each encoder that follow what it encodes
    stacked: str | None = None  # and the list of those that follow layers of the vision encoder (deepstack)
    preprocessed: tuple[str, ...] = ("image_mean", "image_std")  # settings that are read from the preprocessor's files
    defaults: Mapping[str, Any] = HALVES  # those of every published checkpoint, for a dry run without these files
    video: str = VIDEO  # what the chat template puts in place of a video
    begin: Mapping[Tracks, str] = NOTHING  # the tokens before the stream, by its tracks
    end: Mapping[Tracks, str] = NOTHING  # and after it
    paired: bool = False  # two tokens around both tracks are at one position

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

    # --------------------------------------------------------------------------------------------------------- loading

    @classmethod
    def load(cls, options: ModelOptions) -> "Qwen":
        """Load a checkpoint; tokenizer and processor may be in a folder of their own.

        The files that may hold a setting are listed in docs/adding_a_model.md. Weights are read from safetensors only,
        and no code of the checkpoint is run. Raises CheckpointError when a file or a weight is missing, or a weight is
        left over.
        """
        beside, folder = options.processor or options.path, Path(options.path)
        with checkpoint_errors(options.path):
            # 1. the template is rendered in a child, which starts faster while no weights are loaded
            tokenizer = AutoTokenizer.from_pretrained(beside, trust_remote_code=False)
            if (template := chat_template(beside)) is not None:
                tokenizer.chat_template = template
            cls.check_tokenizer(tokenizer, beside)
            cls.template(tokenizer, options.system)
            # 2. configuration and weights
            config_class, model_class = cls.classes[(read_json(options.path, "config.json") or {})["model_type"]]
            config = config_class.from_pretrained(options.path)
            geometry = cls.geometry_of(config, preprocessor_settings(beside, cls.preprocessed), options.path)
            rows = config.get_text_config().vocab_size
            if len(tokenizer) > rows:
                raise CheckpointError(
                    f"{beside}: the tokenizer has {counted(len(tokenizer), 'token')}, and the model "
                    f"{counted(rows, 'embedding')}; give the model's own tokenizer, in its folder or in model.processor"
                )
            model = load_model(options, model_class, config)
            return cls(model, tokenizer, geometry, folder=folder if folder.is_dir() else None, system=options.system)

    @classmethod
    def marks(cls) -> list[str]:
        """The special tokens that a stream of this family is written with."""
        text = "".join([cls.video, *cls.begin.values(), *cls.end.values()])
        return list(dict.fromkeys(text.replace("><", "> <").split()))

    @classmethod
    def check_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
        """Raises CheckpointError if a special token of the prompt is not one token, as without tokenizer files.

        transformers makes a tokenizer of config.json alone where these files are missing.
        """
        known = tokenizer.get_vocab()
        lacking = [mark for mark in (*cls.marks(), "<|im_start|>", "<|im_end|>") if mark not in known]
        if lacking:
            raise CheckpointError(
                f"{origin}: the tokenizer does not know {', '.join(lacking[:3])}; give the folder with the tokenizer "
                f"of {cls.name}, which a release may have apart, in model.processor"
            )

    @classmethod
    def geometry_of(cls, config: Any, table: Table, origin: str = "config.json") -> Geometry:
        """Patch settings, and how audio is cut; raises CheckpointError if the files contradict each other."""
        vision = config.vision_config
        try:
            check_config(config)
            mean, std = (_per_channel(table, name, least) for name, least in (("image_mean", -inf), ("image_std", 0.0)))
            hearing = cls.hearing(config, table)
        except CheckpointError as error:
            raise CheckpointError(f"{origin}: {error}") from error
        return Geometry(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
            mean=mean,
            std=std,
            **hearing,
        )

    @classmethod
    def hearing(cls, config: Any, table: Table) -> dict[str, Any]:
        """The fields of `Geometry` about audio; without an audio encoder a segment is a fixed time."""
        return {"mel": LogMel(), "segment_seconds": SEGMENT_SECONDS}

    @property
    def parts(self) -> Any:
        """The model as Any: its parts have no type annotations."""
        return self.model

    @property
    def text_model(self) -> PreTrainedModel:
        return only(self.model, self.decoder)

    @property
    def head(self) -> nn.Module:
        return self.parts.lm_head

    def encoder_weights(self) -> Iterator[Tensor]:
        """Weights of the vision encoder, then of the audio encoder; without projectors that are trained."""
        left = tuple(f"{path}." for track in self.unprojected for path in self.projectors[track].paths)
        for tower in self.towers:
            path = path_of(self.model, tower)
            named = self.model.get_submodule(path).state_dict(prefix=f"{path}.")
            yield from (weight for name, weight in named.items() if not name.startswith(left))

    @classmethod
    def projectors_of(cls, model: nn.Module) -> dict[Track, Projector]:
        """The projectors of a model of this family; one token of the vision encoder is made of a square of patches."""
        found: dict[Track, Projector] = {}
        for track, tower, names in zip(TRACKS, cls.towers, cls.projecting, strict=False):
            path = path_of(model, tower)
            module: Any = model.get_submodule(path)
            count = len(getattr(module, cls.stacked)) if track == "visual" and cls.stacked else 0
            found[track] = Projector(
                steps=tuple(f"{path}.{name}" for name in names),
                levels=tuple(f"{path}.{cls.stacked}.{level}" for level in range(count)),
                rows=module.spatial_merge_size**2 if track == "visual" else 1,
            )
        return found

    @cached_property
    def _projectors(self) -> Mapping[Track, Projector]:
        return self.projectors_of(self.model)

    @property
    def projectors(self) -> Mapping[Track, Projector]:
        return self._projectors

    def _through_projectors(self, encoded: Encoded, *, original: bool) -> Encoded:
        made: dict[str, Any] = {}
        for track in encoded.before:
            states: Tensor | None = getattr(encoded, track)
            if states is None:
                continue
            projector, dtype = self.projectors[track], self.text_model.dtype
            steps, *levels = (
                [in_use(self.model, path, original=original) for path in paths]
                for paths in (projector.steps, *((path,) for path in projector.levels))
            )
            made[track] = applied(steps, states, projector.rows).to(dtype)
            if levels:
                pairs = zip(levels, encoded.deepstack, strict=True)
                made["deepstack"] = tuple(applied(level, each, projector.rows).to(dtype) for level, each in pairs)
        return replace(encoded, **made, before=())

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(self.text.ids("<|im_end|>"))

    @property
    def trained_positions(self) -> int:
        return self.text_model.config.max_position_embeddings

    # -------------------------------------------------------------------------------------------------------- encoders

    def audio_tokens(self, mel_frames: int) -> int:
        return 0

    def listen(self, block: Sequence[Segment]) -> list[Tensor | None]:
        """Audio tokens [1, tokens, width] of each segment."""
        return [None] * len(block)

    def encode(self, segments: Iterable[Segment], *, fps: float, per_pass: int = 32) -> Iterator[Encoded]:
        """Encode segments, up to `per_pass` of them and about a minute of video in one pass.

        The vision encoder attends within a frame grid, so a segment does not depend on its neighbours.
        """
        rest, temporal, before = iter(segments), self.geometry.temporal_patch, self.unprojected
        together = max(1, min(per_pass, int(TOGETHER / self.geometry.segment(fps)[0])))
        while block := list(islice(rest, together)):
            with torch.no_grad(), left_out(self.model, [self.projectors[track] for track in before]):
                seen, heard = look(self.parts, self.geometry, block, self.device), self.listen(block)
            for segment, shown, audio in zip(block, seen, heard, strict=True):
                yield Encoded(
                    visual=shown.tokens,
                    audio=audio,
                    grid=shown.grid,
                    start=segment.start,
                    seconds=segment.seconds,
                    seconds_per_grid=temporal / fps,
                    at=segment.at,
                    deepstack=shown.deepstack,
                    repeated=-segment.frames.shape[0] % temporal if segment.frames is not None and self.stamped else 0,
                    before=before,
                )

    # --------------------------------------------------------------------------------------------------------- prompts

    @classmethod
    def template(cls, tokenizer: PreTrainedTokenizerBase, system: str | None) -> tuple[str, str]:
        """The chat template before the stream, and after it with `SAMPLE` in place of the question."""
        return around_video(tokenizer, system, video=cls.video, family=cls.name)

    def rendered(self, system: str | None) -> tuple[str, str]:
        """The template with a user's system text."""
        return self.template(self.tokenizer, None if system is None else self.text.plain(system))

    def layout(self, *, tracks: Tracks | None, batch: int, system: str | None, prefix: str, group: int) -> Layout:
        text = (self._opening if system is None else self.rendered(system)[0]) + self.text.plain(prefix)
        return self.laid_out(text + (self.begin.get(tracks, "") if tracks else ""), tracks, batch, group)

    @abstractmethod
    def laid_out(self, opening: str, tracks: Tracks | None, batch: int, group: int) -> Layout:
        """The layout of a stream after the text `opening`."""

    def embedded(self, text: str, batch: int) -> Float[Tensor, "batch tokens width"]:
        """Embeddings of a text, for every stream of a batch."""
        return self.embed(self.text.ids(text)).expand(batch, -1, -1)

    def framed(self, question: str, *, system: str | None = None, prefix: str = "") -> str:
        """The opening, then the user's turn with the question."""
        opening = self._opening if system is None else self.rendered(system)[0]
        return opening.replace(CUT, "") + prefix + self._closing.replace(CUT, "").replace(SAMPLE, question)

    def probe(self, text: str | None) -> list[int]:
        """Ids of the text as it is; None: of the end of the user's turn and the start of the assistant's."""
        return self.text.ids(self._closing.partition(SAMPLE)[2] if text is None else text)

    def turn(self, turn: Turn, *, tracks: Tracks | None) -> tuple[list[int], list[int], list[int]]:
        """(ids, offsets, labels) of the end markers of the stream, the question and the answer.

        A label is at the token that predicts it; it is -100 elsewhere.
        """
        end = self.text.ids(self.end.get(tracks, "") if tracks else "")
        asked = self.text.ids(self._closing.replace(SAMPLE, self.text.plain(turn.text)) if turn.ids is None else "")
        answer = [] if turn.answer is None else [*self.text.ids(self.text.plain(turn.answer)), self.stop[0]]
        given = self.text.ids(self.text.plain(turn.given))
        ids, labels = labelled([*end, *asked, *(turn.ids or ()), *given], answer)
        shared = 1 if self.paired and len(end) == 2 else 0
        return ids, [max(0, number - shared) for number in range(len(ids))], labels


# -------------------------------------------------------------------------------------------------------------- layouts


def text_part(embeddings: Float[Tensor, "batch tokens width"], first: int = 0, group: int = -1) -> Part:
    """Text at consecutive positions from `first` on."""
    count = embeddings.shape[1]
    place = torch.full((4, count), -1, dtype=torch.int32)
    place[3] = group
    return Part(
        embeddings=embeddings,
        positions=torch.arange(first, first + count).expand(3, -1),
        modality=torch.zeros(count, dtype=torch.int8),
        place=place,
    )


class SpanLayout(Layout):
    """Frames and audio in one span after the opening; positions count from its start, `base`.

    A grid is at its time in positions, its cells at their rows and columns; the k-th audio token is at time k and
    belongs to the latest grid that has begun. A subclass says what differs: the order, other axes of audio, and the
    position of text after the span.
    """

    divided: bool = True  # each grid is a part with the audio after it; False: a segment is one part

    def __init__(
        self,
        opening: Float[Tensor, "batch tokens width"],
        *,
        rate: float,
        tracks: Tracks | None,
        base: int | None = None,  # None: after the opening
    ) -> None:
        self._opening, self.base = opening, opening.shape[1] if base is None else base
        self.rate, self.tracks = rate, tracks  # positions per second
        self.grids = self.audio_tokens = 0  # so far

    def opening(self) -> Part:
        text = text_part(self._opening)
        return Part(**{**vars(text), "positions": text.positions.clamp_max(self.base - 1)})

    @property
    def next_position(self) -> int | None:
        """Position of text that follows here, from 0 at the start of the prompt; None: after the largest."""
        return None

    def times(self, numbers: range, seconds_per_grid: float) -> Int[Tensor, " grids"]:
        """Positions of frame grids relative to the start of the span, in the float32 arithmetic of get_rope_index."""
        spacing = torch.tensor(seconds_per_grid, dtype=torch.float32)
        return (torch.arange(numbers.start, numbers.stop) * spacing * self.rate).long()

    def heard(self, times: Int[Tensor, " tokens"]) -> Int[Tensor, "3 tokens"]:
        """Positions of audio tokens relative to the start of the span."""
        return times.expand(3, -1)

    def seen(self, times: Sequence[int], rows: int, columns: int) -> None:
        """Called with the grids of each segment."""

    def order(
        self, time: Int[Tensor, " tokens"], frame: Int[Tensor, " tokens"], audio: Tensor
    ) -> Int[Tensor, " tokens"]:
        """The key by which the tokens of a segment are sorted: each grid, then the audio up to the next one."""
        return 2 * frame + audio

    def push(self, segment: Encoded) -> list[Part]:
        # 1. frames, then audio: positions, and places
        embeddings, positions, places, kinds, first = [], [], [], [], self.grids
        if segment.visual is not None:
            place, (count, rows, columns) = raster(segment.grid, first), segment.grid
            times = self.times(range(first, first + count), segment.seconds_per_grid)
            self.grids = first + count
            self.seen(times.tolist(), rows, columns)
            embeddings.append(segment.visual)
            positions.append(torch.stack([times.repeat_interleave(rows * columns), *place[1:]]))
            places.append(place)
            kinds += [int(Modality.VISUAL)] * place.shape[1]
        if segment.audio is not None:
            times = torch.arange(segment.audio.shape[1]) + self.audio_tokens
            self.audio_tokens += segment.audio.shape[1]
            begun = self.times(range(self.grids), segment.seconds_per_grid)
            embeddings.append(segment.audio)
            positions.append(self.heard(times))
            frames = torch.searchsorted(begun, times, right=True) - 1
            places.append(torch.stack([frames, *torch.full((2, len(times)), -1)]))
            kinds += [int(Modality.AUDIO)] * len(times)
        # 2. in order
        position, modality = torch.cat(positions, dim=1), torch.tensor(kinds, dtype=torch.int8)
        place = torch.cat([torch.cat(places, dim=1), torch.full((1, len(kinds)), -1)]).int()
        order = self.order(position[0], place[0], modality == Modality.AUDIO).argsort(stable=True)
        whole = Part(
            embeddings=torch.cat(embeddings, dim=1)[:, order.to(embeddings[0].device)],
            positions=(position + self.base)[:, order],
            modality=modality[order],
            place=place[:, order],
            deepstack=segment.deepstack,
            next_position=self.next_position,
        )
        # 3. a part per grid with the audio after it
        cuts = [int((place[0] < number).sum()) for number in range(first + 1, self.grids)] if self.divided else []
        return [whole.between(*ends) for ends in pairwise(sorted({0, *cuts, len(order)}))]


# ------------------------------------------------------------------------------------------------------------- families


class QwenFamily(Family):
    """A family whose backbone is a `Qwen`."""

    backbone: type[Qwen]
    with_audio: bool | None = None  # whether config.json has an audio_config, where model_type does not tell

    def claims(self, config: Table) -> bool:
        known = config.get("model_type") in self.backbone.classes
        return known and self.with_audio in (None, "audio_config" in config)

    def load(self, options: ModelOptions) -> Backbone:
        return self.backbone.load(options)

    def shapes(self, config: Table, preprocessor: Table) -> Shapes:
        parsed, model_class, table = self._parsed(config)
        vision, hears = table["vision_config"], "audio" in self.backbone.senses
        if hears and "audio_config" not in table:
            raise KeyError("audio_config")  # which transformers would make up
        text = table.get("text_config", table)  # transformers 4.5x writes the fields of Qwen2.5-VL side by side
        return Shapes(
            text=_text_shape(text),
            vision=VisionShape(
                width=vision["hidden_size"],
                inner=vision["intermediate_size"],
                channels=vision.get("in_channels", 3),
                patch=vision["patch_size"],
                temporal_patch=vision["temporal_patch_size"],
                levels=len(getattr(parsed.vision_config, "deepstack_visual_indexes", ())),
            ),
            audio=_audio_shape(parsed.audio_config) if hears else None,
            geometry=self._geometry(parsed, preprocessor),
            parameters=weights_of(on_meta(model_class, parsed)),
            trained_positions=text["max_position_embeddings"],
            pass_seconds=TOGETHER,
        )

    def skeleton(
        self, config: Table, preprocessor: Table, tokenizer: PreTrainedTokenizerBase, system: str | None
    ) -> Backbone:
        kind, known = self.backbone, tokenizer.get_vocab()
        marks = [mark for mark in kind.marks() if mark not in known]
        if marks:  # of another model: text is counted approximately, markers exactly
            tokenizer.add_special_tokens({"additional_special_tokens": marks})
            tokenizer.chat_template = template_of(kind.video)
        parsed, model_class, _ = self._parsed(config)
        return kind(on_meta(model_class, parsed), tokenizer, self._geometry(parsed, preprocessor), system=system)

    def projectors(self, model: nn.Module) -> Mapping[Track, Projector]:
        return self.backbone.projectors_of(model)

    def _geometry(self, parsed: Any, preprocessor: Table) -> Geometry:
        return self.backbone.geometry_of(parsed, {**self.backbone.defaults, **flattened(preprocessor)})

    def _parsed(self, config: Table) -> tuple[Any, Any, Table]:
        """The configuration in its class, the class of the model, and the configuration's table."""
        table = config.get("thinker_config", config)
        config_class, model_class = self.backbone.classes[table["model_type"]]
        return config_class.from_dict(dict(table)), model_class, table


def _per_channel(table: Table, name: str, least: float) -> tuple[float, float, float]:
    """A setting of the normalisation of frames; raises CheckpointError unless it is three finite numbers."""
    found = table[name]
    listed = found if isinstance(found, list | tuple) else ()
    numbers = [each for each in listed if type(each) in (int, float) and least < each < inf]
    if not len(listed) == len(numbers) == 3:
        what = "three numbers" if least < 0 else "three numbers above 0"
        raise CheckpointError(f"{name} is {str(found)[:60]}, not {what}; copy preprocessor_config.json again")
    return numbers[0], numbers[1], numbers[2]


def check_config(config: Any) -> None:
    """Raises CheckpointError for settings that transformers reads without an error, and follows wrongly or never."""
    text, vision = config.get_text_config(), config.vision_config
    # 1. the axes of positions share the frequencies of a head
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sections = (getattr(text, "rope_parameters", None) or {}).get("mrope_section")
    if sections is not None and 2 * sum(sections) != dim:
        raise CheckpointError(
            f"mrope_section = {list(sections)} has {counted(sum(sections), 'frequency')}, and a head of {dim} has "
            f"{dim // 2}; copy config.json again from the model's page"
        )
    # 2. the blocks that give deepstack features
    levels = list(getattr(vision, "deepstack_visual_indexes", None) or ())
    if levels != sorted(set(levels)) or any(not 0 <= level < vision.depth for level in levels):
        raise CheckpointError(
            f"deepstack_visual_indexes = {levels} are not different blocks, in order, of the {vision.depth} of the "
            "vision encoder; copy config.json again from the model's page"
        )
    # 3. the windows of the vision encoder, in merged patches
    window = getattr(vision, "window_size", None)
    if window is not None and window < (cell := vision.patch_size * vision.spatial_merge_size):
        raise CheckpointError(
            f"window_size = {window} of the vision encoder holds no token of {cell} x {cell} pixels; copy config.json "
            "again from the model's page"
        )
    # 4. the experts that read a token
    experts, chosen = getattr(text, "num_experts", None), getattr(text, "num_experts_per_tok", None)
    if experts is not None and chosen is not None and not 1 <= chosen <= experts:
        raise CheckpointError(
            f"num_experts_per_tok = {chosen} is not between 1 and num_experts = {experts}; copy config.json again from "
            "the model's page"
        )


def template_of(video: str) -> str:
    """A chat template (ours), for a dry run without the model's tokenizer."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'video' %}" + video + "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _audio_shape(audio: Any) -> AudioShape:
    return AudioShape(width=audio.d_model, inner=audio.encoder_ffn_dim, mels=audio.num_mel_bins)


def _text_shape(text: Table) -> TextShape:
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
