"""Writes small CTranslate2 files of a Whisper encoder by hand, as the format's description says."""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

CODES = {np.dtype("<f4"): 0, np.dtype("i1"): 1, np.dtype("<f2"): 4}


def text(words: str) -> bytes:
    raw = words.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def variable(name: str, values: np.ndarray) -> bytes:
    raw = np.ascontiguousarray(values).tobytes()
    shape = struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
    return text(name) + shape + struct.pack("<BI", CODES[values.dtype], len(raw)) + raw


def write(path: Path, variables: Mapping[str, np.ndarray], *, version: int = 6, spec: str = "WhisperSpec") -> Path:
    body = b"".join(variable(name, values) for name, values in variables.items())
    path.write_bytes(struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(variables)) + body)
    return path


def small_encoder() -> WhisperEncoder:
    """Width 64 (one head), two layers, 8 mel bins, windows of up to 40 mel frames."""
    return WhisperEncoder(
        WhisperConfig(
            d_model=64,
            num_mel_bins=8,
            encoder_layers=2,
            encoder_attention_heads=1,
            encoder_ffn_dim=96,
            max_source_positions=20,
        )
    ).eval()


def stored(encoder: WhisperEncoder) -> dict[str, np.ndarray]:
    """The variables that CTranslate2 would store, as float32."""
    return {name: values.detach().numpy().astype("<f4") for name, values in _stored(encoder)}


def _stored(encoder: WhisperEncoder) -> Iterator[tuple[str, Tensor]]:
    for number in (1, 2):
        conv = getattr(encoder, f"conv{number}")
        yield f"encoder/conv{number}/weight", conv.weight
        yield f"encoder/conv{number}/bias", conv.bias
    yield "encoder/position_encodings/encodings", encoder.embed_positions.weight
    yield "decoder/embeddings/weight", encoder.conv1.weight  # is not read
    norms = [("layer_norm", encoder.layer_norm)]
    for number, layer in enumerate(encoder.layers):
        there = f"layer_{number}"
        norms += [(f"{there}/self_attention/layer_norm", layer.self_attn_layer_norm)]
        norms += [(f"{there}/ffn/layer_norm", layer.final_layer_norm)]
        q, k, v = (getattr(layer.self_attn, f"{name}_proj") for name in "qkv")
        yield f"encoder/{there}/self_attention/linear_0/weight", _cat(q.weight, k.weight, v.weight)
        yield f"encoder/{there}/self_attention/linear_0/bias", _cat(q.bias, 0 * q.bias, v.bias)
        for name, linear in (
            ("self_attention/linear_1", layer.self_attn.out_proj),
            ("ffn/linear_0", layer.fc1),
            ("ffn/linear_1", layer.fc2),
        ):
            yield f"encoder/{there}/{name}/weight", linear.weight
            yield f"encoder/{there}/{name}/bias", linear.bias
    for name, norm in norms:
        yield f"encoder/{name}/gamma", norm.weight
        yield f"encoder/{name}/beta", norm.bias


def _cat(*parts: Tensor) -> Tensor:
    return parts[0].new_tensor(np.concatenate([part.detach().numpy() for part in parts]))
