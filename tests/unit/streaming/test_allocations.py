"""Memory while a chunk is read: old and new tokens never exist together, and what was read stays what it was."""

from bisect import bisect
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.models import cut, text_model, whole_stream
from torch.profiler import ProfilerActivity, profile, record_function

from omnimem.budget import Budget
from omnimem.memory import Memory
from omnimem.policies import ControlOptions, PerturbationOptions
from omnimem.policies.baselines.hermes import HermesOptions
from omnimem.policies.baselines.lava import LavaOptions
from omnimem.policies.baselines.streaming_llm import StreamingLLMOptions
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk

SLOTS, LENGTH = 2000, 20
CHUNKS = cut(whole_stream(SLOTS + 10 * LENGTH), [SLOTS] + [LENGTH] * 10)


@pytest.fixture
def attached() -> Iterator[StreamedAttention]:
    with attach(text_model("qwen2_5_omni")) as found, torch.no_grad():
        yield found


def peaks(stream: Stream, chunks: list[Chunk]) -> list[int]:
    """Most bytes that reading each chunk allocates beyond those that are there before it, of a stream from its start.

    All chunks are profiled together: what was allocated before is not seen when it is freed.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        for chunk in chunks:
            with record_function("chunk"):
                stream.feed(chunk)
    assert found.profiler is not None
    events = sorted(found.profiler.kineto_results.events(), key=lambda each: each.start_ns())
    starts = [each.start_ns() for each in events if each.name() == "chunk"]
    held, before, most = 0, [0] * len(starts), [0] * len(starts)
    for event in (each for each in events if each.name() == "[memory]"):
        if (number := bisect(starts, event.start_ns()) - 1) < 0:
            continue
        before[number] = before[number] or held
        held += event.nbytes()
        most[number] = max(most[number], held - before[number])
    return most


def test_a_layer_drops_what_it_held_before_it_keeps_anew(attached) -> None:
    """One layer's [memory ; chunk] beyond the memory, not two, and a chunk."""
    stream = Stream(attached, ControlOptions(name="random").build(Budget.shared(4, SLOTS)))
    most = peaks(stream, CHUNKS[:4])[-1]
    assert stream.memory.bytes / 4 < most < 1.5 * stream.memory.bytes / 4


def test_full_memory_grows_in_place(attached) -> None:
    """Storage that has room takes the chunk alone; where it must grow, one layer at a time is copied."""
    stream = Stream(attached, ControlOptions(name="random").build(None))
    most = peaks(stream, CHUNKS[:3])
    layer = stream.memory.bytes / 4
    assert most[0] > 4 * layer
    assert max(most[1:]) < 0.5 * layer
    storage = [tokens.keys.data_ptr() for tokens in stream.memory.layers]
    stream.feed(CHUNKS[3])
    assert [tokens.keys.data_ptr() for tokens in stream.memory.layers] == storage


@pytest.mark.parametrize("budget", [None, Budget.shared(4, 200)])
def test_what_a_reader_holds_never_changes(attached, budget) -> None:
    """Earlier memories, a fork that reads on, and the stream itself, which afterwards equals one that had no fork."""
    policy = PerturbationOptions(name="paper").build(budget)
    stream, alone = Stream(attached, policy), Stream(attached, policy)
    chunks = cut(whole_stream(280), [240] + [10] * 4)
    for chunk in chunks[:2]:
        stream.feed(chunk)
    seen = stream.memory
    kept = [tensor.clone() for tensor in seen.tensors()]
    fork = stream.fork()
    fork.feed(chunks[4])
    of_fork = [tensor.clone() for tensor in fork.memory.tensors()]
    for chunk in chunks[2:4]:
        stream.feed(chunk)
    for chunk in chunks[:4]:
        alone.feed(chunk)
    assert same(seen, kept)
    assert same(fork.memory, of_fork)
    assert same(stream.memory, alone.memory.tensors())


def same(memory: Memory, tensors: object) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(memory.tensors(), tensors, strict=True))  # type: ignore[call-overload]


def test_tokens_that_were_changed_are_not_appended_to_their_old_storage(attached) -> None:
    """After compaction the keys are others: the storage of the old ones does not follow."""
    stream = Stream(attached, ControlOptions(name="random").build(None))
    stream.feed(CHUNKS[1])
    (tokens, *_) = stream.memory.layers
    moved = tokens.map(lambda tensor, axis: tensor.clone())
    moved = replace(moved, keys=moved.keys + 1, room=tokens.room)
    later = tokens.since(LENGTH - 1)
    longer = moved.extended(later)
    assert torch.equal(longer.keys, torch.cat([moved.keys, later.keys], dim=2))
    assert tokens.extended(later).room is tokens.room


# at most so many layers' memory is copied beyond what is held; before, of 4 layers: 8.2, 6.6, 3.7 and 3.7
ONE_BY_ONE = {
    "layers decide together, by head": (LavaOptions(), 4.0),
    "layers decide together": (HermesOptions(), 4.5),  # which merges too
    "contiguous times": (StreamingLLMOptions(), 3.0),
    "positions: compact": (ControlOptions(name="random"), 3.0),
}


@pytest.mark.parametrize("case", ONE_BY_ONE)
def test_layers_that_move_or_decide_together_drop_what_they_held_one_by_one(attached, case) -> None:
    options, layers = ONE_BY_ONE[case]
    policy = options.build(Budget.shared(4, SLOTS // 2))
    probes = [torch.tensor([7, 8]) for _ in policy.traits.probes]
    last = 1010 if case == "positions: compact" else None  # the third chunk passes it
    stream = Stream(attached, policy, probes=probes, last_position=last)
    most = peaks(stream, CHUNKS[:4])[1:]
    assert last is None or stream.moved
    assert max(most) < layers * stream.memory.bytes / 4
