"""Training throughput: tokens and samples per second, MFU, peak memory and where a step's time goes.

python benchmarks/throughput.py [--frames N]... [--layers N] [--width N] [--slots N] [--chunk N] [--side PIXELS]
                                [--shape NAME] [--device cpu|cuda] [--steps N] [--peak TFLOPS] [--large] [--out FILE]

One stream per step, of N frames at one per second with audio, made here; a Qwen2.5-Omni thinker of random weights: that
of the tiny checkpoint with a text model of --layers and --width (MLP 3 x width), or with --shape a whole one of
configs/models (Qwen2.5-Omni-7B: 28 layers). LoRA on all projections, AdamW. Three ways: `evicting`, at --slots per
layer under the default policy, selection softened as halfway in a run; `full`, the same stream with full memory;
`one shot`, all tokens in one forward pass of transformers without our loop. A cell runs in a process of its own; with
more than LARGE tokens, full and one shot need --large.

The four parts of a step run one after the other, so that their shares are seen: decoding (with resizing and mel),
towers (with patches), text model (forward, recomputation, backward), optimiser. Medians of --steps steps after one that
does not count; on a CPU, CPU seconds of one thread, which depend little on what else runs there. A run overlaps
decoding with the rest, and with data.cache has neither of the first two: `cached` is the rate of the last two alone.
MFU counts the text model, without recomputation: 4 P per token (a forward, and the backward through frozen weights) and
12 x heads x dim per layer and pair of query and key, over the time of the whole step and the peak, which is that of a
matrix product measured here, or --peak. Peak memory is that of the device, on a CPU of the process, weights included.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from benchmarks.tables import markdown
from omnimem.backbones.load import family_of, read_tables
from omnimem.backbones.qwen2_5_omni import Qwen25Omni
from omnimem.budget import SplitBudget
from omnimem.cli.parser import Parser, run_command
from omnimem.config import CONFIGS
from omnimem.data import Message, Sample
from omnimem.media import FileSource, Segment, SourceOptions
from omnimem.policies import PerturbationOptions
from omnimem.rows import tracks_of
from omnimem.run import write_json
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import EncodedSample, Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.prompt_pass import IGNORED
from omnimem.training.logging import peak_bytes
from omnimem.tuning import LoraOptions, TuningOptions, add_adapter, gradient_of, streamed_loss, trainable

WAYS = ("evicting", "full", "one shot")
PARTS = ("decode", "towers", "text model", "optimiser")
LARGE = 6000  # tokens
DIM, RATE = 64, 16000


def model_of(given: Mapping[str, Any]) -> Qwen25Omni:
    """The thinker of random weights on its device."""
    # 1. its configuration
    place = CONFIGS / "models" / (f"{given['shape']}.json" if given["shape"] else "tiny")
    table, preprocessor = read_tables(place)
    table = table.get("thinker_config", table)
    width = given["width"]
    if not given["shape"]:
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": given["layers"]}
        heads = {"num_attention_heads": width // DIM, "num_key_value_heads": max(1, width // DIM // 4)}
        rope = {**table["text_config"]["rope_parameters"], "mrope_section": [8, 12, 12]}
        kinds = ["full_attention"] * given["layers"]
        table["text_config"] |= sizes | heads | {"rope_parameters": rope, "layer_types": kinds}
        table["vision_config"]["out_hidden_size"] = table["audio_config"]["output_dim"] = width
    # 2. weights
    tokenizer = AutoTokenizer.from_pretrained(str(CONFIGS / "models" / "tiny"), local_files_only=True)
    skeleton = family_of(table, place).skeleton(table, preprocessor, tokenizer, None)
    torch.manual_seed(0)
    kind, before = torch.bfloat16 if given["device"] == "cuda" else torch.float32, torch.get_default_dtype()
    torch.set_default_dtype(kind)
    with torch.device(given["device"]):
        model = Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniThinkerConfig.from_dict(dict(table)))
    torch.set_default_dtype(before)
    return Qwen25Omni(model, tokenizer, skeleton.geometry)


def write_video(path: Path, frames: int, side: int) -> None:
    """A moving pattern at one frame per second, and noise as audio."""
    generator = np.random.default_rng(0)
    pattern = generator.integers(0, 255, (side + 64, side + 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("mpeg4", rate=1), out.add_stream("aac", rate=RATE, layout="mono")
        video.width = video.height = side
        video.pix_fmt = "yuv420p"
        for number in range(frames):
            at = number % 64
            shown = np.ascontiguousarray(pattern[at : at + side, at : at + side])
            out.mux(video.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
            noise = (generator.random((1, RATE)) - 0.5).astype(np.float32)
            heard = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            heard.sample_rate, heard.pts = RATE, number * RATE
            out.mux(audio.encode(heard))
        out.mux(video.encode(None))
        out.mux(audio.encode(None))


@final
@dataclass(frozen=True)
class Held:
    """The decoded segments of a file, in memory."""

    source: FileSource
    segments: list[Segment]

    @property
    def options(self) -> SourceOptions:
        """Of the file as it was decoded."""
        return self.source.options

    @property
    def unchanged(self) -> bool:
        """Whether the file is still the one that was decoded."""
        return self.source.unchanged

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model with adapter and optimiser, the stream, and one way to train on it."""

    given: Mapping[str, Any]
    backbone: Qwen25Omni
    feeder: Feeder
    sample: Sample
    attached: Any
    optimiser: torch.optim.Optimizer

    def step(self) -> tuple[dict[str, float], int]:
        """Seconds of each part of a step, and audio and visual tokens."""
        seconds: dict[str, float] = {}
        model = self.backbone.model
        source = self.feeder.source(self.sample)
        held = Held(source, self._timed(seconds, "decode", lambda: list(source)))
        parts = self._timed(seconds, "towers", lambda: list(self.feeder.read(self.sample, held)))
        tracks = tracks_of(self.sample, self.feeder.options.tracks)
        whole = [part.encoded for part in parts]
        encoded = EncodedSample(sample=self.sample, segments=whole, tracks=tracks, heard=parts[-1].heard)
        loss = self._one_shot if self.given["way"] == "one shot" else self._streamed
        self._timed(seconds, "text model", lambda: loss(encoded).backward())
        self._timed(seconds, "optimiser", self._update)
        assert not any(weight.grad is not None for weight in model.parameters())
        return seconds, encoded.tokens

    def _update(self) -> None:
        self.optimiser.step()
        self.optimiser.zero_grad()

    def _streamed(self, encoded: EncodedSample) -> torch.Tensor:
        layers, slots = self.attached.shape.layers, self.given["slots"]
        budget = SplitBudget().build(layers, slots) if self.given["way"] == "evicting" else None
        policy, tuning = PerturbationOptions().build(budget), TuningOptions()
        softness, carry = tuning.selection.at(0.5), gradient_of(tuning, layers)
        return streamed_loss(self.attached, self.feeder, [encoded], policy, softness=softness, carry=carry).loss

    def _one_shot(self, encoded: EncodedSample) -> torch.Tensor:
        """Opening, stream and question in one forward pass of the text model."""
        chunks = list(self.feeder.chunks([encoded]))
        prompt = self.feeder.prompt([encoded.turns([None])], encoded.tracks)
        first = max(int(chunk.positions.max()) for chunk in chunks) + 1
        asked = (prompt.offsets + first).expand(3, 1, -1).transpose(0, 1)
        positions = torch.cat([*(chunk.positions for chunk in chunks), asked], dim=2).transpose(0, 1)
        words = self.backbone.text_model.get_input_embeddings()(prompt.ids)
        inputs = torch.cat([*(chunk.embeddings for chunk in chunks), words], dim=1)
        output = self.backbone.text_model(inputs_embeds=inputs, position_ids=positions, use_cache=False)
        assert prompt.labels is not None
        learned = prompt.labels[0] != IGNORED
        states = output.last_hidden_state[0, -prompt.ids.shape[1] :][learned]
        return torch.nn.functional.cross_entropy(self.backbone.head(states).float(), prompt.labels[0][learned])

    def _timed(self, seconds: dict[str, float], name: str, run: Callable[[], Any]) -> Any:
        began = now(self.given["device"])
        found = run()
        seconds[name] = now(self.given["device"]) - began
        return found


def now(device: str) -> float:
    """Seconds: of this process on a CPU, which other processes do not change, else of the wall clock."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def operations(backbone: Qwen25Omni, tokens: int, chunk: int, slots: int | None) -> float:
    """Floating-point operations of the text model for one stream: forward, and backward through frozen weights."""
    text: Any = backbone.text_model.config
    weights = sum(each.numel() for name, each in backbone.text_model.layers.named_parameters() if "lora_" not in name)
    dim = text.hidden_size // text.num_attention_heads
    pairs = 0.0
    for begin in range(0, tokens, chunk):
        size = min(chunk, tokens - begin)
        pairs += size * (min(begin, slots or begin) + size / 2)
    return 4.0 * weights * tokens + 12.0 * text.num_attention_heads * dim * text.num_hidden_layers * pairs


def matmul_rate(device: str) -> float:
    """Operations per second of a square matrix product in the precision of the model."""
    size, kind = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(6):
        began = now(device)
        left @ right
        times.append(now(device) - began)
    return 2 * size**3 / min(times)


def cell(given: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one way of training on one stream, in this process."""
    # 1. model, stream, optimiser
    if given["device"] == "cpu":
        torch.set_num_threads(1)
    rate = given["peak"] * 1e12 if given["peak"] else matmul_rate(given["device"])
    backbone = model_of(given)
    model = add_adapter(backbone.model, LoraOptions(r=16, alpha=32.0, dropout=0.0, targets="all"))
    model.train()
    chunk = given["chunk"]
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=chunk, max_pixels=given["side"] ** 2))
    asked = (Message(role="user", content="what is shown ?"), Message(role="assistant", content="a red circle"))
    sample = Sample(id="v", video=Path(given["video"]), audio=None, messages=asked)
    optimiser = torch.optim.AdamW(trainable(model), lr=1e-4)
    # 2. steps
    stock = given["way"] == "one shot"
    with nullcontext() if stock else attach(backbone.text_model) as attached:
        kind: dict[str, Any] = {"backbone": backbone, "feeder": feeder, "sample": sample, "optimiser": optimiser}
        bench = Bench(given=given, attached=attached, **kind)
        taken = [bench.step() for _ in range(1 + given["steps"])][1:]
    # 3. figures
    parts = {name: median(seconds[name] for seconds, _ in taken) for name in PARTS}
    tokens, total = taken[0][1], sum(parts.values())
    size = tokens if given["way"] == "one shot" else chunk
    work = operations(backbone, tokens, size, given["slots"] if given["way"] == "evicting" else None)
    peak = torch.cuda.max_memory_allocated() if given["device"] == "cuda" else peak_bytes()
    return {
        **{name: given[name] for name in ("frames", "way")},
        "tokens": tokens,
        "tokens_per_second": tokens / total,
        "cached_tokens_per_second": tokens / (parts["text model"] + parts["optimiser"]),
        "samples_per_second": 1 / total,
        "peak_bytes": peak,
        "mfu": work / total / rate,
        "peak_flops": rate,
        "seconds": parts,
    }


def row(found: Mapping[str, Any]) -> list[str]:
    """A cell as a line of the table."""
    seconds = found["seconds"]
    shares = [f"{seconds[name] / sum(seconds.values()):.0%}" for name in PARTS]
    return [
        f"{found['frames']:,}",
        found["way"],
        f"{found['tokens']:,}",
        f"{found['tokens_per_second']:,.0f}",
        f"{found['cached_tokens_per_second']:,.0f}",
        f"{found['samples_per_second']:.3g}",
        f"{found['peak_bytes'] / (1 << 30):.2f}",
        f"{found['mfu']:.1%}",
        *shares,
    ]


def main(arguments: Sequence[str]) -> None:
    """Measure every cell in a process of its own, and print the table."""
    given = _parser().parse(arguments)
    if given.cell:
        print(json.dumps(cell(json.loads(given.cell))))
        return
    settings = {name: getattr(given, name) for name in SETTINGS}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for frames in given.frames or [64, 512, 2048]:
            video = Path(folder) / f"{frames}.mp4"
            write_video(video, frames, given.side)
            for way in WAYS:
                if found and way != "evicting" and not given.large and found[-1]["tokens"] > LARGE:
                    found.append({**found[-1], "way": way, "skipped": True})
                    continue
                asked = json.dumps({**settings, "frames": frames, "way": way, "video": str(video)})
                command = [sys.executable, __file__, "--cell", asked]
                ended = subprocess.run(command, capture_output=True, text=True, check=False)
                if ended.returncode:
                    reason = (ended.stderr.strip().splitlines() or ["killed"])[-1]
                    print(f"{frames} frames, {way}: {reason[:200]}", file=sys.stderr, flush=True)
                    continue
                found.append(json.loads(ended.stdout.splitlines()[-1]))
                print(" | ".join(row(found[-1])), file=sys.stderr, flush=True)
    found = [each for each in found if not each.get("skipped")]
    titles = ["frames", "way", "tokens", "tokens/s", "cached", "samples/s", "peak GiB", "MFU", *PARTS]
    print(markdown(titles, map(row, found)))
    if given.out:
        write_json(Path(given.out), {"settings": settings, "cells": found, "torch": torch.__version__})


SETTINGS = ("layers", "width", "slots", "chunk", "side", "shape", "device", "steps", "peak")


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--frames", type=int, action="append", help="of a stream; repeatable (64, 512 and 2,048)")
    parser.add_argument("--layers", type=int, default=4, help="of the text model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the text model (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=256, help="per layer (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens per chunk (default: %(default)s)")
    parser.add_argument("--side", type=int, default=112, help="of a square frame in pixels (default: %(default)s)")
    parser.add_argument("--shape", help="a checkpoint of configs/models in place of --layers and --width")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a cell (default: %(default)s)")
    parser.add_argument("--peak", type=float, help="peak of the device in TFLOP/s (default: a measured matrix product)")
    parser.add_argument("--large", action="store_true", help=f"also full and one shot above {LARGE} tokens")
    parser.add_argument("--out", help="a JSON file of all figures")
    parser.add_argument("--cell", help="one cell, as JSON; used by this script itself")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
