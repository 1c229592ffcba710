"""The loop over chunks asks the device nothing: no number is read from a tensor, no shape depends on values."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import text_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from omnimem.budget import Budget
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions
from omnimem.scoring import covered
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, ChunkFacts, Counts

aten = torch.ops.aten
KERNELS = {  # operations whose result the host must have, or whose shape depends on values
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.equal.default,
}
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}  # of which no operation is dispatched on a CPU
BUDGETS = {"split": Budget(slots=((6, 14),) * 4), "pool": Budget.shared(4, 20)}
POLICIES = {
    "random": ControlOptions(name="random"),
    "paper": PerturbationOptions(name="paper"),
    "released": PerturbationOptions(name="released"),
    "omnimem": PerturbationOptions(),
    "omnimem, every fourth query": PerturbationOptions(query_stride=4),
    "distinct": DistinctOptions(),
}


class Kernels(TorchDispatchMode):
    """Notes the operations that would wait for a GPU."""

    def __init__(self, asked: list[str]) -> None:
        super().__init__()
        self.asked = asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = args[1] if func in (aten.index.Tensor, aten.index_put_.default) else ()
        if func in KERNELS or any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Notes the transfers of whole tensors to the host."""

    def __init__(self, asked: list[str]) -> None:
        super().__init__()
        self.asked = asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            self.asked.append(func.__name__)
        return func(*args, **(kwargs or {}))


def chunks(count: int, length: int = 24) -> list[Chunk]:
    """Groups of a timestamp, eight visual tokens and three of audio; two groups per chunk, their facts known."""
    draw, found = torch.Generator().manual_seed(1), []
    kinds = torch.tensor(([0] + [2] * 8 + [1] * 3) * (length // 12), dtype=torch.int8)[None]
    for number in range(count):
        place = torch.full((1, 4, length), -1, dtype=torch.int32)
        place[:, 3] = torch.arange(length) // 12 + number * length // 12
        positions = (torch.arange(length) + number * length).expand(1, 3, length)
        found.append(
            Chunk(
                embeddings=torch.randn(1, length, 64, generator=draw),
                positions=positions,
                modality=kinds,
                place=place,
                facts=ChunkFacts.of(positions, kinds, place),
            )
        )
    return found


def waits(policy: Any, fed: list[Chunk], family: str = "qwen2_5_omni") -> tuple[list[list[str]], Stream]:
    """What every chunk asks of the device, and the stream afterwards."""
    found = []
    with attach(text_model(family)) as attached, torch.no_grad():
        stream = Stream(attached, policy)
        for chunk in fed:
            asked: list[str] = []
            with Methods(asked), Kernels(asked):
                stream.feed(chunk)
            found.append(asked)
    return found, stream


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(covered, "COUNTED", ())


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_chunk_is_read_without_waiting_for_the_device(name, budget) -> None:
    """But for one transfer after all layers, where only the device knows how much text has left with its group."""
    policy = POLICIES[name].build(BUDGETS[budget])
    asked, stream = waits(policy, chunks(5))
    assert asked == [[] if policy.markers == "keep" else ["tolist"]] * 5
    found, again = waits(policy, [replace(chunk, facts=None) for chunk in chunks(5)])
    assert all("tolist" in each for each in found), "the device is asked where the facts of a chunk are not known"
    for ours, theirs in zip(stream.memory.layers, again.memory.layers, strict=True):
        assert torch.equal(ours.order, theirs.order)
        asked_of_device = Counts.of(ours.modality, ours.place)
        assert ours.counts in (asked_of_device, asked_of_device._replace(audio=None))


@pytest.mark.parametrize("family", ["llama", "qwen3_vl", "qwen2_5_vl", "qwen3_omni"])
def test_no_text_model_waits_for_the_device(family) -> None:
    asked, _ = waits(POLICIES["paper"].build(BUDGETS["split"]), chunks(2), family)
    assert asked == [[], []]


def test_the_modes_notice_what_waits() -> None:
    asked: list[str] = []
    values = torch.arange(3)
    with Methods(asked), Kernels(asked):
        int(values[0]), bool(values[0] > 1), values[values > 1], values.nonzero(), values.tolist()
        values.repeat_interleave(values)
    assert len(asked) == 6
