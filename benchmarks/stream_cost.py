"""Seconds and bytes per chunk of policies side by side: one text model of random weights, one run, chunks in turn.

python benchmarks/stream_cost.py [--policy NAME]... [--chunk N]... [--slots N] [--chunks N] [--layers N] [--width N]
                                 [--device cpu|cuda] [--dtype float32|bfloat16] [--out FILE]

The first policy is the floor: `random` evicts without measuring anything. Every chunk is read by all policies in turn,
so that the ratios hold when the machine's speed drifts; seconds are CPU seconds of this thread on a CPU, wall seconds
on a GPU, medians over the chunks after the memory is full. The slope is that of the seconds over the chunk number in
% of the median per 100 chunks, with a 95 % interval by Theil and Sen's pairs: 0 for a memory of fixed size. Width 512
has 8 heads and 2 key-value heads of 64; other widths alike. Bytes are those between two chunks.

Alternatives, named as policies:

full       everything is kept, in place
stock      transformers' own attention over a cache of as many keys as there are slots: what reading alone costs
one_shot   transformers' own forward pass over the whole stream at once, its seconds divided by the chunks
release    the release's scheme, from its description (benchmarks/release_scheme.py); it keeps what `released` keeps
"""

import json
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import DynamicCache, Qwen2_5OmniTextConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

from benchmarks.release_scheme import ReleaseScheme
from benchmarks.tables import markdown
from omnimem.budget import Budget
from omnimem.cli.parser import Parser, run_command
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.policies.baselines.h2o import H2OOptions
from omnimem.policies.baselines.k_center import KCenterOptions
from omnimem.policies.baselines.keydiff import KeyDiffOptions
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk

POLICIES: dict[str, Any] = {
    "random": ControlOptions(name="random"),
    "paper": PerturbationOptions(name="paper"),
    "released": PerturbationOptions(name="released"),
    "omnimem": PerturbationOptions(),
    "distinct": DistinctOptions(),
    "h2o": H2OOptions(),
    "keydiff": KeyDiffOptions(),
    "k_center": KCenterOptions(),
}
DEFAULT = (
    "random",
    "paper",
    "released",
    "omnimem",
    "omnimem/inputs",
    "distinct",
    "full",
    "stock",
    "one_shot",
    "release",
)
ALTERNATIVES = ("full", "stock", "one_shot", "release")
SETTINGS: dict[str, dict[str, Any]] = {
    "inputs": {"compared": "inputs"},
    "16-bit": {"sketch_bits": 16},
    "stride-4": {"query_stride": 4},
}
HEADS, KV_HEADS = 8, 2
WARM = 2  # chunks after the memory is full that are not counted


def built(name: str, layers: int, slots: int) -> Policy:
    """A policy by name; NAME/N: feature: N; NAME/inputs: layer inputs are compared; NAME/16-bit: so is the sketch.

    NAME/stride-4: attention of every fourth query. `full` keeps everything.
    """
    if name == "full":
        return PerturbationOptions().build(None)
    base, _, feature = name.partition("/")
    settings: dict[str, Any] = SETTINGS.get(feature) or {"feature": int(feature or 0)}
    options = PerturbationOptions(name=base, **settings) if feature else POLICIES[base]  # type: ignore[arg-type]
    return options.build(Budget.shared(layers, slots))


class StockCache:
    """Stock attention: every chunk sees `slots` keys of a cache, which is cut back to them after it."""

    def __init__(self, model: Any, slots: int) -> None:
        self.model, self.slots, self.cache = model, slots, DynamicCache()
        shape = (1, KV_HEADS, slots, model.config.hidden_size // HEADS)
        for layer in range(len(model.layers)):
            keys, values = torch.randn(2, *shape, device=model.device, dtype=model.dtype)
            self.cache.update(keys, values, layer)

    @property
    def bytes(self) -> int:
        """Of the keys and values."""
        return sum(part.numel() * part.element_size() for layer in self.cache.layers for part in _pair(layer))

    def feed(self, chunk: Chunk) -> None:
        """Read a chunk."""
        self.model(
            inputs_embeds=chunk.embeddings, position_ids=chunk.positions.transpose(0, 1), past_key_values=self.cache
        )
        for layer in self.cache.layers:
            layer.keys, layer.values = (part[:, :, : self.slots] for part in _pair(layer))


class OneShot:
    """The stock forward pass over the whole stream, once its last chunk is there."""

    def __init__(self, model: Any) -> None:
        self.model, self.chunks, self.bytes = model, [], 0

    def feed(self, chunk: Chunk) -> None:
        """Wait for the end."""
        self.chunks.append(chunk)

    def read(self) -> None:
        """The pass."""
        embeddings = torch.cat([chunk.embeddings for chunk in self.chunks], dim=1)
        positions = torch.cat([chunk.positions for chunk in self.chunks], dim=2)
        cache = DynamicCache()
        self.model(inputs_embeds=embeddings, position_ids=positions.transpose(0, 1), past_key_values=cache)
        self.bytes = sum(part.numel() * part.element_size() for layer in cache.layers for part in _pair(layer))


def _pair(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.keys, layer.values


class Attached:
    """A stream of ours."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.feed = stream, stream.feed

    @property
    def bytes(self) -> int:
        """Of keys, values and side state."""
        return self.stream.memory.bytes


def arm_of(name: str, attached: StreamedAttention, stock: Any, slots: int) -> Any:
    """What reads the chunks under a name."""
    layers = len(stock.layers)
    if name == "stock":
        return StockCache(stock, slots)
    if name == "one_shot":
        return OneShot(stock)
    if name == "release":
        return ReleaseScheme(stock, replace(Budget.shared(layers, slots), lend=False))
    return Attached(Stream(attached, built(name, layers, slots)))


def model_of(layers: int, width: int, device: str, dtype: str) -> Qwen2_5OmniThinkerTextModel:
    """A random text model in the sizes of the run."""
    torch.manual_seed(0)
    config = Qwen2_5OmniTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1 << 22,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": _sections(width // HEADS)},
    )
    model: Any = Qwen2_5OmniThinkerTextModel._from_config(config, dtype=getattr(torch, dtype))
    return model.to(device).eval().requires_grad_(False)


def _sections(dim: int) -> list[int]:
    """Rotary pairs of time, rows and columns."""
    side = dim * 3 // 16
    return [dim // 2 - 2 * side, side, side]


def chunk_of(length: int, first: int, width: int, device: str, dtype: torch.dtype) -> Chunk:
    """A random chunk: three visual tokens, then one of audio."""
    kinds = torch.tensor([2, 2, 2, 1], dtype=torch.int8).repeat(-(-length // 4))[:length]
    return Chunk(
        embeddings=torch.randn(1, length, width, device=device, dtype=dtype),
        positions=(torch.arange(length, device=device) + first).expand(1, 3, length),
        modality=kinds.to(device)[None],
    )


def measure(names: Sequence[str], length: int, chunks: int, slots: int, model: Any) -> dict[str, dict[str, float]]:
    """Per policy: seconds per chunk, ratio to the first, bytes held, slope."""
    width = model.config.hidden_size
    device, dtype = str(model.device), model.dtype
    full = -(-slots // length) + WARM
    spent: dict[str, list[float]] = {name: [] for name in names}
    stock = deepcopy(model)
    with attach(model) as attached, torch.no_grad():
        arms = {name: arm_of(name, attached, stock, slots) for name in names}
        for number in range(full + chunks):
            chunk = chunk_of(length, number * length, width, device, dtype)
            for name, arm in arms.items():
                began = _clock(device)
                arm.feed(chunk)
                spent[name].append(_clock(device) - began)
        if (one_shot := arms.get("one_shot")) is not None:
            began = _clock(device)
            one_shot.read()
            spent["one_shot"] = [(_clock(device) - began) / (full + chunks)] * (full + chunks)
        held = {name: arm.bytes for name, arm in arms.items()}
    floor = median(spent[names[0]][full:])
    found = {}
    for name in names:
        seconds = spent[name][full:]
        low, middle, high = slope(seconds)
        found[name] = {
            "seconds": median(seconds),
            "ratio": median(seconds) / floor,
            "bytes": held[name],
            "slope": middle,
            "slope_low": low,
            "slope_high": high,
        }
    return found


def _clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


def slope(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Theil and Sen's slope in % of the median per 100 chunks: (low, estimate, high), 95 % by Kendall's variance."""
    count = len(seconds)
    pairs = sorted((seconds[j] - seconds[i]) / (j - i) for i in range(count) for j in range(i + 1, count))
    if not pairs:
        return 0.0, 0.0, 0.0
    spread = 1.96 * (count * (count - 1) * (2 * count + 5) / 18) ** 0.5
    low = pairs[max(0, int((len(pairs) - spread) / 2))]
    high = pairs[min(len(pairs) - 1, int((len(pairs) + spread) / 2) + 1)]
    scale = 1e4 / median(seconds)
    return low * scale, median(pairs) * scale, high * scale


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every chunk length and print one table."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--policy",
        action="append",
        help="may be repeated; NAME/N: N features; NAME/inputs; NAME/16-bit; NAME/stride-4 (all)",
    )
    parser.add_argument("--chunk", type=int, action="append", help="tokens per chunk; may be repeated (1024, 256)")
    parser.add_argument("--slots", type=int, default=1024, help="slots per layer, one pool (%(default)s)")
    parser.add_argument("--chunks", type=int, default=20, help="chunks counted (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args(argv)
    names, lengths = args.policy or list(DEFAULT), args.chunk or [1024, 256]
    for name in names:
        if name.partition("/")[0] not in (*POLICIES, *ALTERNATIVES):
            parser.error(f"--policy {name}: unknown; known: {', '.join([*POLICIES, *ALTERNATIVES])}")
    model = model_of(args.layers, args.width, args.device, args.dtype)
    result = {length: measure(names, length, args.chunks, args.slots, model) for length in lengths}
    rows = [
        [str(length), name, f"{found['seconds'] * 1e3:.1f}", f"{found['ratio']:.2f}", f"{found['bytes'] / 2**20:.1f}",
         f"{found['slope']:+.1f} [{found['slope_low']:+.1f}, {found['slope_high']:+.1f}]"]
        for length, arms in result.items()
        for name, found in arms.items()
    ]  # fmt: skip
    print(markdown(("chunk", "policy", "ms per chunk", "ratio", "MiB held", "slope, % per 100 chunks"), rows))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
