"""Memory of fine-tuning by the number of chunks, for every gradient mode: a random text model on the CPU.

python benchmarks/activations.py [--chunks 4 8 16 32 64] [--out DIR]

Counts every tensor that is alive, at every operation of the forward and the backward pass of one stream. The peak above
the memory in use before (the model) is the memory that a device needs. Off-loaded memories are outside torch and
counted separately. Writes activations.json into --out (runs/activations) and prints a table.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final
from unittest.mock import patch
from weakref import finalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdRef
from transformers import PreTrainedModel, Qwen2_5OmniTextConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

from benchmarks.common import gradient_modes, train_adapter_only
from benchmarks.tables import markdown
from omnimem.budget import SplitBudget
from omnimem.cli.parser import Parser, run_command
from omnimem.policies import PerturbationOptions, PolicyOptions
from omnimem.policies.base import Policy
from omnimem.run import write_json
from omnimem.selection import SelectionOptions, TemperatureOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.prompt_pass import Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk
from omnimem.tuning import TuningOptions, answer_losses, gradient_of, policy_in_training

LAYERS, WIDTH, SLOTS, CHUNK_TOKENS, QUESTION_TOKENS = 4, 128, 32, 64, 16
SOFT = SelectionOptions(temperature=TemperatureOptions(schedule="constant", start=0.5))
HARD = SelectionOptions(softening="hard")


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes that one mode needs for one number of chunks."""

    way: str
    chunks: int
    peak: int  # alive on the device at once, above the bytes alive before
    host: int  # most that waited on the host at once
    left: int  # alive after the step: a leak
    memory: int  # keys, values and side state after an eviction
    seconds: float


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


def text_model() -> PreTrainedModel:
    """Random weights with LoRA of r = 8 on the attention; only LoRA is trained."""
    torch.manual_seed(0)
    config = Qwen2_5OmniTextConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 32,
        num_key_value_heads=max(1, WIDTH // 128),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        pad_token_id=None,
    )
    model = Qwen2_5OmniThinkerTextModel._from_config(config).eval().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), model)
    for name, parameter in train_adapter_only(model):
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def policy_of(options: PolicyOptions) -> Policy:
    """A policy at the slots of the random model, visual to audio as 5 to 1."""
    return options.build(SplitBudget(visual_audio_ratio=5.0).build(LAYERS, SLOTS))


def random_chunks(count: int) -> Iterator[Chunk]:
    """Random chunks, one audio token to five visual ones, drawn on demand as by a decoder."""
    kinds = torch.tensor([2, 2, 2, 2, 2, 1] * CHUNK_TOKENS, dtype=torch.int8)[:CHUNK_TOKENS]
    for number in range(count):
        places = torch.arange(number * CHUNK_TOKENS, (number + 1) * CHUNK_TOKENS).expand(1, 3, CHUNK_TOKENS)
        yield Chunk(embeddings=torch.randn(1, CHUNK_TOKENS, WIDTH), positions=places, modality=kinds[None])


def backward(model: PreTrainedModel, policy: Policy, tuning: TuningOptions, count: int) -> int:
    """Forward and backward of one stream with a question at its end; the bytes of its memory."""
    torch.manual_seed(1)
    ids = torch.arange(QUESTION_TOKENS)[None]
    labels = ids.roll(-1)
    prompt = Prompt(ids=ids, segments=torch.zeros_like(ids), offsets=ids)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = model.get_input_embeddings().weight
    with attach(model, recompute_layers=tuning.recompute == "layer") as attached:
        carry = gradient_of(tuning, attached.shape.layers)
        stream = Stream(attached, policy_in_training(tuning, policy), softness=tuning.selection.at(0.0), carry=carry)
        for chunk in random_chunks(count):
            stream.feed(chunk)
        read, size = stream.reader(prompt), stream.memory.bytes
        loss = stream.read(lambda kept: answer_losses((read(kept).hidden @ weights.T)[0], labels[0]))
        del stream
        torch.autograd.grad(loss.mean(), learning)
    return size


def measure(model: PreTrainedModel, policy: Policy, name: str, tuning: TuningOptions, count: int) -> Row:
    """One mode at one number of chunks."""
    started = time.perf_counter()
    with counting() as alive:
        memory = backward(model, policy, tuning, count)
    return Row(
        way=name,
        chunks=count,
        peak=alive.peak,
        host=Host.peak,
        left=alive.bytes + Host.bytes,
        memory=memory,
        seconds=round(time.perf_counter() - started, 2),
    )


def measure_all(modes: Mapping[str, TuningOptions], options: PolicyOptions, chunks: Sequence[int]) -> list[Row]:
    """Every mode at every number of chunks."""
    model, policy = text_model(), policy_of(options)
    backward(model, policy, next(iter(modes.values())), 1)  # allocations of the first pass only are not counted
    return [measure(model, policy, name, tuning, count) for name, tuning in modes.items() for count in chunks]


def table(rows: Sequence[Row]) -> str:
    """Peaks in MB by mode and number of chunks, with the bytes on the host after a plus."""
    counts = sorted({row.chunks for row in rows})
    lines = []
    for name in dict.fromkeys(row.way for row in rows):
        found = sorted((row for row in rows if row.way == name), key=lambda row: row.chunks)
        cells = [f"{row.peak / 1e6:.2f}" + (f" + {row.host / 1e6:.2f}" if row.host else "") for row in found]
        steps = found[-1].chunks - found[0].chunks
        lines.append([name, *cells, f"{(found[-1].peak - found[0].peak) / steps / 1e6:.3f}" if steps else ""])
    return markdown(["peak MB (+ on the host)", *(f"{n} chunks" for n in counts), "growth per chunk"], lines)


def main(arguments: Sequence[str]) -> None:
    """Measure, write JSON, print the table."""
    parser = Parser(__doc__)
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path, default=Path("runs/activations"))
    given = parser.parse(arguments)
    torch.set_num_threads(1)
    rows = measure_all(gradient_modes(SOFT, HARD), PerturbationOptions(), given.chunks)
    settings = {"chunks": given.chunks, "chunk_tokens": CHUNK_TOKENS, "slots": SLOTS, "width": WIDTH, "layers": LAYERS}
    write_json(given.out / "activations.json", {"settings": settings, "rows": [asdict(row) for row in rows]})
    print(json.dumps(settings))
    print(f"one memory: {rows[0].memory / 1e6:.3f} MB; left alive: {max(row.left for row in rows)} bytes")
    print(table(rows))


if __name__ == "__main__":
    run_command(main)
