"""What the recipe needs of a tiny base: its model and tokenizer, the layout of a stream, and its towers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from omnimem.checksums import share
from omnimem.media import Geometry
from omnimem.recall.worlds import CELLS, COLOURS, KINDS, SHAPES, TEMPLATES, VOICES, WORDS

SYSTEM = "You are a helpful assistant."
MEL_MEAN = 0.98  # of babble, after the scaling of the feature extractor
EMBEDDING_SCALE = 0.7  # per dimension; a symbol is the sum of two embeddings, so about 1
Name = Literal["shape", "colour"]
NAMES: dict[Name, tuple[str, ...]] = {"shape": SHAPES, "colour": COLOURS}


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """Token ids, 3-axis positions, and the columns of media tokens of a stream of some length."""

    ids: Tensor  # tokens
    positions: Tensor  # axes tokens
    visual: Tensor  # grids cells: columns of the visual tokens
    audio: Tensor  # seconds: columns of the audio tokens
    next_position: int


def layout_of(ids: Tensor, positions: Tensor, placeholders: tuple[int, int]) -> Layout:
    """The layout of token ids (tokens) and positions (axes tokens)."""
    visual, audio = ((ids == token).nonzero()[:, 0] for token in placeholders)
    return Layout(
        ids=ids, positions=positions, visual=visual.view(-1, CELLS), audio=audio, next_position=int(positions.max()) + 1
    )


class TinyBase(ABC):
    """A tiny model in training; `cls(seed)` is an untrained one."""

    levels: ClassVar[tuple[tuple[Name, ...], ...]]  # what each level of visual features names; the first are the tokens
    before_question: ClassVar[str] = ""  # text of the prompt between the end of the stream and the question
    geometry: Geometry
    card: ClassVar[str]  # README.md of the checkpoint

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    @abstractmethod
    def create(cls, seed: int) -> "TinyBase":
        """An untrained base."""

    @property
    def parts(self) -> Any:
        """The model as Any: its parts have no type annotations."""
        return self.model

    @property
    def text(self) -> nn.Module:
        """The decoder."""
        return self.parts.model.language_model

    @property
    @abstractmethod
    def towers(self) -> tuple[nn.Module, nn.Module]:
        """The vision and the audio encoder."""

    @property
    @abstractmethod
    def placeholders(self) -> tuple[int, int]:
        """Ids of the visual and the audio token."""

    @property
    def table(self) -> nn.Parameter:
        """The embeddings of text (tokens width)."""
        return self.text.get_parameter("embed_tokens.weight")

    def id(self, token: str) -> int:
        """The id of one token of the vocabulary."""
        return token_id(self.tokenizer, token)

    @abstractmethod
    def layout(self, seconds: int) -> Layout:
        """The layout of a stream of an even number of seconds."""

    @abstractmethod
    def look(self, frames: Sequence[Tensor]) -> Tensor:
        """Visual features (levels streams grids cells width) of streams [seconds 3 height width]."""

    @abstractmethod
    def listen(self, mels: Sequence[Tensor]) -> Tensor:
        """Audio features (streams seconds width) of streams [mels mel_frames]."""

    def save(self, folder: Path) -> None:
        """Save weights, configuration, tokenizer, template and preprocessor for `from_pretrained`."""
        folder.mkdir(parents=True, exist_ok=True)
        stop, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self.model.generation_config = GenerationConfig(eos_token_id=[stop, pad], pad_token_id=pad, do_sample=False)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.save_preprocessor(folder)
        share(folder)

    @abstractmethod
    def save_preprocessor(self, folder: Path) -> None:
        """Write preprocessor_config.json."""

    def write_card(self, folder: Path, *, seed: int, accuracies: dict[int, dict[str, dict[str, float]]]) -> None:
        """Write README.md with the measured accuracies, {seconds: {"direct" or "mp4": {kind: accuracy}}}."""
        rows = [
            f"| {seconds} s | {way} | " + " | ".join(f"{100 * found[kind]:.1f} %" for kind in KINDS) + " |"
            for seconds, ways in accuracies.items()
            for way, found in ways.items()
        ]
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        card = self.card.format(weights=weights, seed=seed, rows="\n".join(rows))
        (folder / "README.md").write_text(card, encoding="utf-8")


def tokenizer_of(special: Mapping[str, str], template: str, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of the task, with and without leading space, and bytes for all other text.

    With `ignore_merges` a word in the vocabulary is one token; all other text is split into bytes.
    """
    # 1. vocabulary
    prose = " ".join(TEMPLATES.values()).replace("{key}", "") + " system user assistant yes no and or in at of video"
    known = [*SHAPES, *COLOURS, *VOICES, *WORDS, *prose.split(), *SYSTEM.removesuffix(".").split(), ".", *words]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spellings = [spelling for word in known for spelling in (word, "Ġ" + word)]
    vocabulary = list(dict.fromkeys([*alphabet, *spellings]))
    model = BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    # 2. tokenizer
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special["im_end"],
        pad_token=special["endoftext"],
        extra_special_tokens={name: token for name, token in special.items() if name.endswith("_token")},
        chat_template=template,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def scale_weights(model: PreTrainedModel) -> None:
    """Weights of variance 1 / fan-in, and embeddings; the default 0.02 is too small for such a narrow model."""
    branches = 2 * model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv3d):
            fan_in = module.weight[0].numel()
            damp = branches if name.endswith(("o_proj", "down_proj")) and "language_model" in name else 1
            nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in * damp))
    nn.init.normal_(model.get_parameter("model.language_model.embed_tokens.weight"), std=EMBEDDING_SCALE)


@torch.no_grad()
def rescale_convolutions(tower: nn.Module) -> None:
    """Centre and amplify the first convolutions of an audio tower.

    A word changes a few of 256 mel bins of mean 1 by 0.4, while the position table of the tower has amplitude 1.
    Without this change the tower recognized 22 % of the words after 300 steps, with it all of them.
    """
    first, second = (tower.get_parameter(f"conv{i}.weight") for i in (1, 2))
    first.mul_(8)
    tower.get_parameter("conv1.bias").copy_(-MEL_MEAN * first.sum((1, 2)))
    second.mul_(2)
