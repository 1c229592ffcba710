"""Random text models and random streams: the real classes at two sizes, no checkpoint, no network."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5OmniTextConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

from omnimem.streaming.prompt_pass import Prompt
from omnimem.tokens import Chunk, ChunkFacts, Modality, place_of

SHAPES_7B = Path(__file__).resolve().parents[2] / "configs" / "models" / "Qwen2.5-Omni-7B.json"
OPENING = 3  # tokens of text before the stream
IGNORED = -100


@final
@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a text model, its memory and its stream."""

    text: Mapping[str, Any]
    memory: int  # slots per layer
    chunks: tuple[int, int]  # lengths at which a step is measured
    grid: tuple[int, int]  # rows and columns of visual tokens in a segment of the stream
    audio: int  # audio tokens in a segment
    question: int  # tokens
    answers: int  # tokens written
    rank: int  # of LoRA
    square: int  # side of the square matrices of the ceiling
    hour: int  # tokens of an hour of video

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.text["num_hidden_layers"])


def large(layers: int) -> Sizes:
    """Qwen2.5-Omni-7B with fewer layers; 2 s of video at 1 fps and 420 x 420 pixels per segment; the release's LoRA."""
    shape = json.loads(SHAPES_7B.read_text())["thinker_config"]["text_config"]
    text = {**shape, "num_hidden_layers": layers, "pad_token_id": None}
    del text["model_type"]
    sizes = {"memory": 8192, "chunks": (2048, 16384), "grid": (15, 15), "audio": 50, "question": 64, "answers": 16}
    return Sizes(text=text, rank=128, square=8192, hour=486_000, **sizes)


def small() -> Sizes:
    """The same on a CPU within seconds."""
    sizes = {"memory": 48, "chunks": (32, 96), "grid": (3, 3), "audio": 2, "question": 6, "answers": 3}
    return Sizes(text=toy_text(64, [2, 3, 3]), rank=4, square=128, hour=1000, **sizes)


def toy_text(width: int, sections: Sequence[int]) -> dict[str, Any]:
    """Four layers, four heads, two of them key-value heads."""
    return {
        **{"vocab_size": 300, "hidden_size": width, "intermediate_size": 3 * width // 2, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768, "pad_token_id": None},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)},
    }


def random_model(text: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A text model with random weights, drawn on the device; the rotary frequencies stay in float32."""
    torch.manual_seed(0)
    with device:
        model = Qwen2_5OmniThinkerTextModel._from_config(Qwen2_5OmniTextConfig(**text), dtype=dtype)
    return model.eval().requires_grad_(False)


def toy_pair(width: int, sections: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[PreTrainedModel]:
    """The same weights, representable in `dtype`, in float32 on the CPU and in `dtype` on the device."""
    text = toy_text(width, sections)
    exact = random_model(text, dtype=torch.float32, device=torch.device("cpu"))
    for parameter in exact.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.2 / width**0.5)  # far from the near-linear regime of 0.02
        parameter.data = parameter.data.to(dtype).float()
    other = random_model(text, dtype=dtype, device=device)
    other.load_state_dict(exact.state_dict())
    return [exact, other]


def segment(sizes: Sizes, first: int, count: int, *, dtype: torch.dtype, device: torch.device, batch: int = 1) -> Chunk:
    """Tokens `first` to `first + count` of a stream: some text, then grids of visual tokens, each with its audio."""
    # 1. places and modalities, with what the loop must know of them on the host
    rows, columns = sizes.grid
    length, seconds = rows * columns + sizes.audio, max(sizes.audio, rows, columns)
    number = torch.arange(first, first + count) - OPENING
    place, start = number % length, number.div(length, rounding_mode="floor") * seconds + OPENING
    seen = place < rows * columns
    time = start + torch.where(seen, 0, place - rows * columns)
    row, column = place // columns, place % columns
    visual = torch.stack([time, start + row, start + column])
    positions = torch.where(number < 0, number + OPENING, torch.where(seen, visual, time)).expand(batch, 3, count)
    kinds = torch.where(number < 0, int(Modality.TEXT), torch.where(seen, int(Modality.VISUAL), int(Modality.AUDIO)))
    modality = kinds.to(torch.int8).expand(batch, count)
    facts = ChunkFacts.of(positions, modality, place_of(positions))
    # 2. embeddings, drawn on the device
    generator = torch.Generator(device).manual_seed(first)
    width = sizes.text["hidden_size"]
    embeddings = torch.randn(batch, count, width, generator=generator, device=device)
    return Chunk(
        embeddings=embeddings.to(dtype), positions=positions.to(device), modality=modality.to(device), facts=facts
    )


def moved(chunk: Chunk, dtype: torch.dtype, device: torch.device) -> Chunk:
    """The chunk on another device or in another precision."""
    return replace(
        chunk,
        embeddings=chunk.embeddings.to(device=device, dtype=dtype),
        positions=chunk.positions.to(device),
        modality=chunk.modality.to(device),
    )


def questions(number: int, length: int, vocabulary: int, device: torch.device) -> Prompt:
    """Packed questions of one stream; the second half of each is its answer."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(5, vocabulary, (1, number * length), generator=generator).to(device)
    place = torch.arange(number * length, device=device)[None]
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    answered = (place % length >= length // 2) & (place % length < length - 1)
    return Prompt(
        ids=ids,
        segments=place // length,
        offsets=place % length,
        labels=torch.where(answered, following, torch.full_like(ids, IGNORED)),
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|, in float64 on the CPU."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
