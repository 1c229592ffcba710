"""torch.compile captures the pass over a chunk whole and once: attention, measuring, scoring, selection, the copy."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.models import one_layer
from support.streams import POLICIES, policy_of
from support.unchecked import unchecked
from torch import Tensor
from torch._dynamo import reset
from torch._subclasses.fake_tensor import FakeTensorMode

from omnimem.attention import blocked
from omnimem.policies.base import Policy
from omnimem.scoring import covered
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, ChunkFacts

# torch's own: where it captures a torch.autograd.Function, it makes an object of that class
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

LENGTH, GROUP, SLOTS = 24, 12, 20  # tokens of a chunk, of a group of frames, and audio and visual slots
CASES = [(name, split) for split in (False, True) for name in POLICIES]
CAPTURED = [(name, False) for name in POLICIES[:5]] + [("omnimem", True)]
Layout = list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def policy(name: str, split: bool) -> Policy:
    return policy_of(name, ((6, SLOTS - 6),), split=split)


def chunks(count: int, *, text: int = 0) -> Iterator[Chunk]:
    """Chunks of one size, their facts known; each group begins with `text` tokens of text."""
    draw, kinds = torch.Generator().manual_seed(1), torch.tensor(([2] * 9 + [1] * 3) * (LENGTH // GROUP))
    kinds[torch.arange(LENGTH) % GROUP < text] = 0
    modality = kinds.to(torch.int8)[None]
    for number in range(count):
        arrival = torch.arange(LENGTH) + number * LENGTH
        place = torch.full((1, 4, LENGTH), -1, dtype=torch.int32)
        place[:, 3] = arrival // GROUP
        positions = arrival.expand(1, 3, LENGTH)
        facts = ChunkFacts.of(positions, modality, place)
        embeddings = torch.randn(1, LENGTH, 64, generator=draw)
        yield Chunk(embeddings=embeddings, positions=positions, modality=modality, place=place, facts=facts)


def layout(tensors: Sequence[Tensor]) -> Layout:
    return [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors]


def memories(name: str, split: bool, *, text: int = 0) -> list[tuple[Layout, Any]]:
    """Layout and counts of the memory after each of six chunks."""
    seen = []
    with attach(one_layer()) as attached, torch.no_grad():
        stream = Stream(attached, policy(name, split))
        for chunk in chunks(6, text=text):
            stream.feed(chunk)
            seen.append((layout(stream.memory.tensors()), stream.memory.layers[0].counts))
    return seen


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are compared as on a device that is not asked how many; on a CPU their number depends on scores."""
    monkeypatch.setattr(covered, "COUNTED", ())


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing was captured before, and nothing that cannot be captured is in the way."""
    reset()
    with unchecked():
        yield
    reset()


@pytest.mark.parametrize(("name", "split"), CASES)
def test_every_tensor_of_a_full_memory_has_one_layout(name: str, split: bool) -> None:
    """Shapes, strides and types, where chunks hold no text: a captured graph can be replayed."""
    seen = memories(name, split)
    assert seen[0][0][0][0] == (1, 2, SLOTS, 16), "full after the first chunk"
    assert all(each == seen[1] for each in seen[1:])


@pytest.mark.parametrize(("name", "split"), [(name, split) for name in ("paper", "omnimem") for split in (False, True)])
def test_text_alone_changes_the_layout(name: str, split: bool) -> None:
    """By all text of a chunk (`markers: keep`), or by what of it stays with its group: only the device knows that."""
    text = [counts.text for _, counts in memories(name, split, text=1)]
    without = memories(name, split)[-1][0]
    for (found, _), more in zip(memories(name, split, text=1), text, strict=True):
        sizes = [tuple(size + more * (size == SLOTS) for size in shape) for shape, _, _ in without]
        assert [shape for shape, _, _ in found] == sizes
    if name == "paper":
        assert text == [2, 4, 6, 8, 10, 12]
    else:
        assert max(text) < 12


@pytest.mark.skipif(
    TORCH < (2, 13), reason="torch 2.9 fails on objects that a captured pass leaves behind; 2.13 does not"
)
@pytest.mark.parametrize(("name", "split"), CAPTURED)
def test_the_pass_is_captured_whole_and_once(name: str, split: bool, as_on_a_gpu: None, fresh: None) -> None:
    """With the same memory to the bit; a graph break is an error, and later chunks are no further captures."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, fed = one_layer(), list(chunks(5))
    with attach(model) as attached, torch.no_grad():
        plain, captured = (Stream(attached, policy(name, split)) for _ in range(2))
        for chunk in fed:
            plain.feed(chunk)
        for chunk in fed[:2]:
            captured.feed(chunk)
        model.compile(backend=backend, fullgraph=True, dynamic=False)
        for chunk in fed[2:]:
            captured.feed(chunk)
    assert len(graphs) == 1
    assert all(map(torch.equal, captured.memory.tensors(), plain.memory.tensors()))


def test_the_kernels_of_the_mass_are_one_operator(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a graph that is captured on a GPU, which only its shapes stand in for."""
    monkeypatch.setattr(blocked, "TRITON", True)
    monkeypatch.setattr(blocked, "fused_mass", lambda: lambda queries, keys, **rest: keys[:, 0, :, 0] * rest["scale"])
    queries, keys = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 9, 16)
    assert torch.equal(blocked.captured_mass(queries, keys, 0.5, None, 5, 1), keys[:, 0, :, 0] * 0.5)
    names: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with FakeTensorMode(), torch.no_grad():
        there = (torch.empty(part.shape, device="cuda") for part in (queries, keys))
        captured = torch.compile(blocked.mass, backend=backend, fullgraph=True)(*there, scale=0.1)
    assert (captured.shape, captured.device.type, captured.dtype) == ((1, 9), "cuda", torch.float32)
    assert names == ["omnimem.mass.default"]
