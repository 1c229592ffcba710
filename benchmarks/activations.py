"""Memory of fine-tuning by the number of chunks, for each way to carry the gradient: a random text model on the CPU.

python benchmarks/activations.py [--chunks 4 8 16 32 64] [--slots 32] [--chunk-tokens 64] [--width 128] [--layers 4]

Counts every tensor that is alive, at every operation of the forward and the backward pass of one stream; the peak above
what was alive before (the model) is what a device needs. Off-loaded memories wait outside torch and are counted apart.
Writes activations.json into --out (runs/activations) and prints a table.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final
from unittest.mock import patch
from weakref import finalize

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdRef
from transformers import PreTrainedModel, Qwen2_5OmniTextConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

from omnimem.budget import SplitBudget
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.run import write_json
from omnimem.selection import SelectionOptions, TemperatureOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.prompt_pass import Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk
from omnimem.tuning import TuningOptions, answer_losses, gradient_of, policy_in_training

QUESTION = 16  # tokens
SOFT = SelectionOptions(temperature=TemperatureOptions(schedule="constant", start=0.5))
HARD = SelectionOptions(softening="hard")


@final
@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to carry the gradient."""

    name: str
    tuning: TuningOptions


WAYS = (
    Way(name="no recomputation", tuning=TuningOptions(recompute="none", selection=SOFT)),
    Way(name="full", tuning=TuningOptions(selection=SOFT)),
    Way(name="full, by layer", tuning=TuningOptions(recompute="layer", selection=SOFT)),
    Way(name="full, offload", tuning=TuningOptions(offload=True, selection=SOFT)),
    Way(name="full, offload, by layer", tuning=TuningOptions(offload=True, recompute="layer", selection=SOFT)),
    Way(name="full, horizon 1", tuning=TuningOptions(horizon=1, selection=SOFT)),
    Way(name="full, horizon 2", tuning=TuningOptions(horizon=2, selection=SOFT)),
    Way(name="states", tuning=TuningOptions(gradient="states", selection=SOFT)),
    Way(name="released", tuning=TuningOptions(gradient="released", selection=HARD)),
    Way(name="paper", tuning=TuningOptions(gradient="paper", selection=HARD)),
)


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """What one way needs for one length of stream; bytes."""

    way: str
    chunks: int
    peak: int  # alive on the device at once, above what was alive before
    host: int  # most that waited on the host at once
    left: int  # still alive when all is over: what every step would leak
    memory: int  # keys, values and side state after an eviction, once
    seconds: float


# -------------------------------------------------------------------------------------------------------- counting


@final
class Alive(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._known: set[WeakIdRef] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {WeakIdRef(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), before)
        return result

    def _count(self, storage: torch.UntypedStorage, before: set[WeakIdRef]) -> None:
        """A storage that was no argument is new; it is counted until it dies."""
        key, size = WeakIdRef(storage), storage.nbytes()
        if key in before or key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        finalize(storage, self._forget, key, size)

    def _forget(self, key: WeakIdRef, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


@final
class Host(torch.autograd.graph.saved_tensors_hooks):
    """`save_on_cpu` where the device is the CPU itself: what waits lies in NumPy's memory, out of sight of `Alive`."""

    bytes, peak = 0, 0

    def __init__(self, pin_memory: bool = False) -> None:
        super().__init__(self._pack, torch.from_numpy)

    @classmethod
    def _pack(cls, tensor: Tensor) -> np.ndarray:
        array = tensor.detach().numpy().copy()
        cls.bytes += array.nbytes
        cls.peak = max(cls.peak, cls.bytes)
        finalize(array, cls._release, array.nbytes)
        return array

    @classmethod
    def _release(cls, size: int) -> None:
        cls.bytes -= size


@contextmanager
def counting() -> Iterator[Alive]:
    """Both counts, from zero."""
    Host.bytes = Host.peak = 0
    with patch.object(torch.autograd.graph, "save_on_cpu", Host), Alive() as alive:
        yield alive


# ------------------------------------------------------------------------------------------------------ one stream


def text_model(width: int, layers: int) -> PreTrainedModel:
    """Random weights with LoRA of r = 8 on the attention, which alone learns."""
    torch.manual_seed(0)
    config = Qwen2_5OmniTextConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 128),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        pad_token_id=None,
    )
    model = Qwen2_5OmniThinkerTextModel._from_config(config).eval().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
        parameter.requires_grad_("lora_" in name)
    return model


def chunks_of(count: int, tokens: int, width: int) -> Iterator[Chunk]:
    """Random chunks, one audio token to five visual ones, drawn as they are asked for, as a decoder would."""
    kinds = torch.tensor([2, 2, 2, 2, 2, 1] * tokens, dtype=torch.int8)[:tokens]
    for number in range(count):
        places = torch.arange(number * tokens, (number + 1) * tokens).expand(1, 3, tokens)
        yield Chunk(embeddings=torch.randn(1, tokens, width), positions=places, modality=kinds[None])


def backward(model: PreTrainedModel, policy: Policy, way: Way, chunks: Iterator[Chunk]) -> int:
    """Forward and backward of one stream with a question at its end; the bytes of its memory."""
    ids = torch.arange(QUESTION)[None]
    labels = ids.roll(-1)
    prompt = Prompt(ids=ids, segments=torch.zeros_like(ids), offsets=ids)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = model.get_input_embeddings().weight
    tuning = way.tuning
    with attach(model, recompute_layers=tuning.recompute == "layer") as attached:
        carry = gradient_of(tuning, attached.shape.layers)
        stream = Stream(attached, policy_in_training(tuning, policy), softness=tuning.selection.at(0.0), carry=carry)
        for chunk in chunks:
            stream.feed(chunk)
        read, size = stream.reader(prompt), stream.memory.bytes
        loss = stream.read(lambda kept: answer_losses((read(kept).hidden @ weights.T)[0], labels[0]))
        del stream
        torch.autograd.grad(loss.mean(), learning)
    return size


def measure(model: PreTrainedModel, policy: Policy, way: Way, count: int, tokens: int) -> Row:
    """One way at one length."""
    torch.manual_seed(1)
    started = time.perf_counter()
    with counting() as alive:
        memory = backward(model, policy, way, chunks_of(count, tokens, model.config.hidden_size))
    return Row(
        way=way.name,
        chunks=count,
        peak=alive.peak,
        host=Host.peak,
        left=alive.bytes + Host.bytes,
        memory=memory,
        seconds=round(time.perf_counter() - started, 2),
    )


# ---------------------------------------------------------------------------------------------------------- report


def table(rows: Sequence[Row]) -> str:
    """Peaks in MB by way and number of chunks; what waits on the host after a plus."""
    counts = sorted({row.chunks for row in rows})
    lines = ["| peak MB (+ on the host) | " + " | ".join(f"{count} chunks" for count in counts) + " | growth a chunk |"]
    lines.append("|---" * (len(counts) + 2) + "|")
    for name in dict.fromkeys(row.way for row in rows):
        found = sorted((row for row in rows if row.way == name), key=lambda row: row.chunks)
        cells = [f"{row.peak / 1e6:.2f}" + (f" + {row.host / 1e6:.2f}" if row.host else "") for row in found]
        steps = found[-1].chunks - found[0].chunks
        growth = f"{(found[-1].peak - found[0].peak) / steps / 1e6:.3f}" if steps else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {growth} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every way at every length, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--chunk-tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=32, help="per layer")
    parser.add_argument("--width", type=int, default=128, help="of the residual stream; heads are 32 wide")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/activations"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = text_model(given.width, given.layers)
    policy = PerturbationOptions().build(SplitBudget(visual_audio_ratio=5.0).build(given.layers, given.slots))
    measure(model, policy, WAYS[0], 1, given.chunk_tokens)  # what the first pass alone makes is left out
    rows = [measure(model, policy, way, count, given.chunk_tokens) for way in WAYS for count in given.chunks]
    settings = {name: value for name, value in vars(given).items() if name != "out"}
    write_json(given.out / "activations.json", {"settings": settings, "rows": [asdict(row) for row in rows]})
    print(json.dumps(settings))
    print(f"one memory: {rows[0].memory / 1e6:.3f} MB; left alive: {max(row.left for row in rows)} bytes")
    print(table(rows))


if __name__ == "__main__":
    main()
