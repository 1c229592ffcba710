"""The files of a checkpoint folder: an interrupted or damaged download is named before anything is loaded."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file
from typing_extensions import TypedDict

from omnimem.errors import UserError, counted, first_line, lacks_memory
from omnimem.limits import exceeds, read_within
from omnimem.textfile import StoredFileError, read_stored

AGAIN = "copy the file again from the model's page"
OBJECTS = (  # files that hold one JSON object
    "config.json",
    "generation_config.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
TEXTS = ("chat_template.jinja", "merges.txt")
INDEX = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")  # types of weights in files
COUNTS = ("position_ids", "num_batches_tracked")  # buffers of whole numbers beside the weights
HEAD, EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"
SIBLINGS = ("talker.", "code2wav.", "token2wav.")  # models beside a thinker, which are not loaded
SAMPLES, SAMPLE = 64, 4096  # places in a large tensor, and bytes of each, that its digest is made of
LAYERS = ("num_hidden_layers", "num_layers", "depth", "encoder_layers")  # counts in config.json


@final
class CheckpointError(UserError):
    """A folder that is not a checkpoint of this family, or lacks a file; the message says which and how to fix it."""


@final
class ShapesError(UserError):
    """A model configuration that cannot be read; the message names the file and how to fix it."""


class Index(TypedDict):
    """The file of each weight."""

    metadata: dict[str, Any]
    weight_map: dict[str, str]


@contextmanager
def checkpoint_errors(path: str) -> Iterator[None]:
    """Examine a local checkpoint folder, then turn errors of loading it into CheckpointError."""
    if Path(path).is_dir():
        require_whole(Path(path))
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises errors of every class for values that it does not expect
        if lacks_memory(error):
            raise
        first = first_line(error)
        raise CheckpointError(
            f"model.path: {path} cannot be loaded ({first}); give a local folder with config.json, weights and "
            "tokenizer, or a hub id that can be reached"
        ) from error


def require_whole(folder: Path) -> None:
    """Raises CheckpointError if a file of a checkpoint folder is cut, damaged, or missing although others name it.

    Of weight files only the headers are read, which give the size that a file must have.
    """
    try:
        for pattern in OBJECTS:
            for path in folder.glob(pattern):
                table = read_stored(path, dict[str, Any], AGAIN)
                if path.name == "config.json":
                    _check_layers(path, table)
        for path in (folder / name for name in TEXTS):
            if path.exists():
                _require_text(path)
        known = {path: _weights(path) for path in sorted(folder.glob("*.safetensors"))}
        if (folder / INDEX).exists():
            _require_shards(folder, known)
    except StoredFileError as error:
        raise CheckpointError(str(error)) from error


def folder_of(path: str) -> Path:
    """The folder of a checkpoint's files: a local one, or that of a hub id in the cache."""
    return Path(path) if Path(path).is_dir() else Path(str(cached_file(path, "config.json"))).parent


def weights_digest(path: str) -> str | None:
    """SHA-256 of the names, types and shapes of a checkpoint's weights, and of samples of each (ours).

    It does not depend on how the weights are spread over files. Tensors of up to 256 KiB are read whole, of larger
    ones 64 places of 4 KiB. None for a model that was not read from files. Raises CheckpointError if a file cannot be
    read.
    """
    if not path:
        return None
    folder = folder_of(path)
    shards = set(read_stored(folder / INDEX, Index, AGAIN)["weight_map"].values()) if (folder / INDEX).exists() else ()
    files = [folder / name for name in shards] or list(folder.glob("*.safetensors"))
    found: list[str] = []
    for file in files:
        try:
            with file.open("rb") as opened:
                found += _tensor_digests(opened)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: cannot be read ({first_line(error)}); {AGAIN}") from error
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


def _tensor_digests(file: BinaryIO) -> Iterator[str]:
    """Name, type, shape and digest of each tensor of an open safetensors file."""
    size = int.from_bytes(file.read(8), "little")
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"a header of {counted(size, 'byte')}")
    for name, entry in json.loads(file.read(size)).items():
        if name == "__metadata__":
            continue
        first, last = (8 + size + int(place) for place in entry["data_offsets"])
        content, whole = hashlib.sha256(), last - first <= SAMPLES * SAMPLE
        count = 1 if whole else SAMPLES
        for number in range(count):
            file.seek(first + number * (last - first - SAMPLE) // max(1, count - 1) if number else first)
            content.update(file.read(last - first if whole else SAMPLE))
        yield f"{name} {entry['dtype']} {entry['shape']} {content.hexdigest()}"


def require_size(path: str, weights: int) -> None:
    """Raises CheckpointError if a local folder has no weights, or fewer bytes of them than config.json describes."""
    folder, files = Path(path), list(Path(path).glob("*.safetensors"))
    if not folder.is_dir():
        return
    if not files:
        others = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(kind))
        what = f"only {', '.join(others[:3])}, which may hold code or another format" if others else "no weights"
        raise CheckpointError(
            f"{path}: has no .safetensors file ({what}); give a folder whose weights were saved by save_pretrained"
        )
    size = sum(file.stat().st_size for file in files)
    if weights > size:
        raise CheckpointError(
            f"{path}: config.json describes {counted(weights, 'weight')}, the weight files have "
            f"{counted(size, 'byte')}; copy all files of one model again"
        )


def require_one_head(path: str) -> None:
    """Raises CheckpointError if a local folder has a head that differs from the embeddings, which is to be the same.

    transformers would use both, against `tie_word_embeddings: true` of config.json.
    """
    found: dict[str, tuple[Path, str]] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            own = (key for key in opened.keys() if not key.startswith(SIBLINGS))  # noqa: SIM118 - no mapping
            found |= {end: (file, key) for key in own for end in (HEAD, EMBEDDINGS) if f".{key}".endswith(f".{end}")}
    if len(found) < 2:
        return
    tensors = []
    for file, key in (found[HEAD], found[EMBEDDINGS]):
        with safe_open(file, framework="pt") as opened:
            tensors.append(opened.get_tensor(key))
    head, embeddings = tensors
    if head.shape != embeddings.shape or not torch.equal(head.to(embeddings.dtype), embeddings):
        same = head.shape == embeddings.shape
        what = "other values" if same else f"shape {list(head.shape)}, not {list(embeddings.shape)}"
        raise CheckpointError(
            f"{found[HEAD][0]}: {found[HEAD][1]} has {what}, unlike {found[EMBEDDINGS][1]}, and tie_word_embeddings is "
            "true in config.json; set it to false if the model has a head of its own, or remove this weight"
        )


def require_weights(path: str, found: Mapping[str, Any]) -> None:
    """Raises CheckpointError if weights were not in the files, or have no place in the model.

    transformers fills the former with random numbers and ignores the latter. `found` is the loading info of
    `from_pretrained`.
    """
    mismatched = [key for key in found["mismatched_keys"] if not isinstance(key, str)]
    if mismatched:
        name, stored, expected = min(mismatched, key=lambda each: each[0])[:3]
        raise CheckpointError(
            f"{path}: {counted(len(mismatched), 'weight')} of other shapes than config.json describes (first: "
            f"{name[:80]}, {list(stored)} in the files, {list(expected)} in the model); copy all files of one model "
            "again"
        )
    extra = sorted(key for key in found["unexpected_keys"] if not key.startswith(SIBLINGS))
    if extra:
        raise CheckpointError(
            f"{path}: {counted(len(extra), 'weight')} without a place in a model of its config.json (first: "
            f"{extra[0][:80]}); copy config.json and all weight files of one model again"
        )
    lacking = sorted({*found["missing_keys"], *map(str, found["mismatched_keys"])})
    if lacking:
        raise CheckpointError(
            f"{path}: {counted(len(lacking), 'weight')} missing in its files, or of another shape (first: "
            f"{lacking[0][:80]}); copy all files of one model again"
        )


def require_finite(path: str, model: nn.Module) -> None:
    """Raises CheckpointError if a weight of the model is NaN or infinite, as in a file that was damaged or overflowed.

    A finite sum has finite terms, so that each weight is read once.
    """
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if weight.is_meta or not weight.is_floating_point() or bool(torch.isfinite(weight.sum())):
            continue
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{path}: {name[:80]} has values that are not finite; {AGAIN}")


def _check_layers(path: Path, table: dict[str, Any]) -> None:
    """Each layer is an object before any weight is read: a thousand million of them would take hours."""
    for key, value in table.items():
        if isinstance(value, dict):
            _check_layers(path, value)
        elif key in LAYERS and isinstance(value, int) and (what := exceeds("model_layers", value)):
            raise CheckpointError(f"{path} {key}: {what}")


def _require_text(path: Path) -> None:
    try:
        text = read_within(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {AGAIN}") from error
    if not text.strip() or "\0" in text:
        raise CheckpointError(f"{path}: {'holds zero bytes' if text.strip() else 'is empty'}; {AGAIN}")


def _weights(path: Path) -> set[str]:
    """The names of the weights in a file, which has the size that its header gives, and holds floating-point numbers.

    Whole numbers, or floats of 8 bits, are quantized weights, which would be read without their scales.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names):
                kind = str(file.get_slice(name).get_dtype())
                if kind not in FLOATS and not (name.endswith(COUNTS) or name.startswith(SIBLINGS)):
                    raise CheckpointError(
                        f"{path}: {name[:80]} is stored as {kind}, and only floating-point weights of 16 bits or more "
                        "are read; give the checkpoint that is not quantized"
                    )
            return names
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {AGAIN}") from error


def _require_shards(folder: Path, known: dict[Path, set[str]]) -> None:
    """Every weight of the index is in its file."""
    missing: dict[str, list[str]] = {}
    for weight, name in read_stored(folder / INDEX, Index, AGAIN)["weight_map"].items():
        if weight not in known.get(folder / name, ()):
            missing.setdefault(name, []).append(weight)
    for name, weights in missing.items():
        path = folder / name
        what = (
            f"lacks {counted(len(weights), 'weight')} of {INDEX}"
            if path in known
            else f"is missing, but {INDEX} names it"
        )
        raise CheckpointError(f"{path}: {what} (first: {weights[0][:80]}); {AGAIN}")
