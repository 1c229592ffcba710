"""Streaming under a budget: never exceeded, equal to one shot with masks, undisturbed by questions and batches."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from support import reference
from support.models import assert_equal_logits, cut, merged, row_of, text_model, whole_stream
from support.streams import LENGTHS, POLICIES, UNEQUAL, fed, levels_of, orders, policy_of, prompt_of
from torch import Tensor, nn

from omnimem.budget import Budget
from omnimem.policies import ControlOptions, PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, DeepStack, Modality
from omnimem.view import LayerView


class Masked:
    """A layer step over the whole sequence at once, by a full softmax: what was evicted is masked for later chunks."""

    def __init__(self, chunk_of: list[int], kept: list[list[set[int]]]) -> None:
        self.keys: dict[int, Tensor] = {}
        self.masks = [self._mask(chunk_of, after) for after in kept]

    @staticmethod
    def _mask(chunk_of: list[int], after: list[set[int]]) -> Tensor:
        count = len(chunk_of)
        mask = torch.full((count, count), float("-inf"))
        for q in range(count):
            for k in range(q + 1):
                if chunk_of[k] == chunk_of[q] or k in after[chunk_of[q] - 1]:
                    mask[q, k] = 0
        return mask

    def __call__(
        self, layer: int, states: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        self.keys[layer] = keys
        group = queries.shape[1] // keys.shape[1]
        wide = [t.repeat_interleave(group, dim=1) for t in (keys, values)]
        logits = queries @ wide[0].transpose(-1, -2) * scale + self.masks[layer]
        return logits.softmax(dim=-1) @ wide[1]


def joined(whole: Chunk, asked: Tensor, first: int) -> Chunk:
    """A stream followed by the embeddings of a question."""
    batch, count, _ = asked.shape
    places = torch.arange(first, first + count).expand(batch, 3, count)
    unseen = torch.zeros(batch, count, dtype=torch.bool)
    deepstack = whole.deepstack
    if deepstack is not None:
        deepstack = DeepStack(mask=torch.cat([deepstack.mask, unseen], dim=1), features=deepstack.features)
    return Chunk(
        embeddings=torch.cat([whole.embeddings, asked], dim=1),
        positions=torch.cat([whole.positions, places], dim=2),
        modality=torch.cat([whole.modality, unseen.to(torch.int8)], dim=1),
        deepstack=deepstack,
    )


def test_unequal_budgets_by_layer_equal_one_shot_with_masks_by_layer(family) -> None:
    model, whole = text_model(family), whole_stream(levels=levels_of(family))
    question = [5, 6, 7, 8]
    with attach(model) as attached, torch.no_grad():
        stream = Stream(attached, policy_of("omnimem"))
        kept: list[list[set[int]]] = [[] for _ in UNEQUAL]
        for chunk in cut(whole, LENGTHS):
            stream.feed(chunk)
            for layer, (row,) in enumerate(orders(stream)):
                kept[layer].append(set(row))
        hidden = stream.ask(prompt_of([[question]])).hidden
        everything = joined(whole, attached.embed(torch.tensor([question])), stream.next_position)
        chunk_of = [n for n, length in enumerate([*LENGTHS, 4]) for _ in range(length)]
        step = Masked(chunk_of, kept)
        expected = attached.run(step, everything.embeddings, everything.positions, everything.deepstack)
    assert len({len(after[-1]) for after in kept}) == 4  # the layers do remember unequal numbers
    assert_equal_logits(hidden, expected[:, -4:])
    for layer, tokens in enumerate(stream.memory.layers):
        assert_equal_logits(tokens.keys, step.keys[layer][:, :, tokens.order[0]])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("slots", "split"), [(UNEQUAL, True), (((0, 1), (0, 5), (0, 40), (0, 13)), False)])
def test_the_budget_is_filled_exactly_and_never_exceeded_in_any_layer_at_any_step(name, slots, split) -> None:
    policy = policy_of(name, slots, split=split)
    generator = torch.Generator().manual_seed(len(name))
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        for _ in range(2):
            cuts = torch.randperm(95, generator=generator)[:6].sort().values.tolist()
            lengths = [b - a for a, b in zip([-1, *cuts], [*cuts, 95], strict=True)]
            stream = Stream(attached, policy)
            held = [(0, 0)] * 4
            text = 0
            for chunk in cut(whole_stream(), lengths):
                stream.feed(chunk)
                arrived = [int((chunk.modality == kind).sum()) for kind in Modality]
                text += arrived[0]
                counts = [tuple(layer[kind] for kind in Modality) for layer in stream.memory.counts()]
                for layer, (audio_slots, visual_slots) in enumerate(slots):
                    audio, visual = held[layer][0] + arrived[1], held[layer][1] + arrived[2]
                    if split:
                        lend = name != "released"
                        expected = reference.shares(audio, visual, audio_slots, visual_slots, lend)
                        assert counts[layer] == (text, *expected)
                    assert sum(counts[layer][1:]) <= audio_slots + visual_slots
                    if not split:
                        assert sum(counts[layer][1:]) == min(audio + visual, visual_slots)
                held = [row[1:] for row in counts]
                for tokens in stream.memory.layers:
                    assert bool((tokens.order.diff(dim=1) > 0).all())


@pytest.mark.parametrize("preset", ["paper", "released", "omnimem"])
def test_every_layer_keeps_what_plain_loops_keep_of_what_entered_it(preset) -> None:
    """The recorder's view gives each chunk's states, queries and keys; the rest is tests/reference.py."""
    for family in ("qwen2_5_omni", "qwen3_vl"):
        whole = whole_stream(levels=levels_of(family))
        by_loops = [reference.Layer(preset, *slots) for slots in UNEQUAL]

        def record(layer: int, view: LayerView, by_loops: list[reference.Layer] = by_loops) -> None:
            fresh = slice(view.pool.count - view.new, None)
            keys, states = view.pool.keys[0, :, fresh], view.pool.feature[0, fresh]
            kinds = view.modality[0, fresh]
            by_loops[layer].read(*(part.tolist() for part in (view.queries[0], keys, states, kinds)), view.scale)

        with attach(text_model(family)) as attached, torch.no_grad():
            stream = Stream(attached, policy_of(preset), recorder=record)
            for chunk in cut(whole, LENGTHS):
                stream.feed(chunk)
                assert orders(stream) == [[layer.order] for layer in by_loops]


def test_redundancy_is_judged_on_the_layer_s_input_after_the_deepstack_addition() -> None:
    """Method 8.5: the features of layer 1 are the residual stream with level 0 of the deepstack features added."""
    model, whole = text_model("qwen3_vl"), whole_stream(levels=2)
    inputs: list[Tensor] = []
    handle = model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    plain = replace(whole, deepstack=None)
    with attach(model) as attached, torch.no_grad():
        features = [
            fed(attached, policy_of("paper", ((96, 96),) * 4), [c]).memory.layers[1].feature for c in (whole, plain)
        ]
    handle.remove()
    assert torch.equal(features[0], inputs[0])
    visual = whole.modality[0] == Modality.VISUAL
    torch.testing.assert_close(features[0][0, visual], features[1][0, visual] + whole.deepstack.features[0])


def test_a_fork_goes_its_own_way_and_leaves_the_original_alone() -> None:
    chunks = cut(whole_stream(), LENGTHS)
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = fed(attached, policy_of("omnimem"), chunks[:3])
        before = [tensor.clone() for tensor in stream.memory.tensors()]
        twin = stream.fork()
        for chunk in chunks[3:]:
            twin.feed(chunk)
        straight = fed(attached, policy_of("omnimem"), chunks)
    assert all(torch.equal(a, b) for a, b in zip(before, stream.memory.tensors(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(straight.memory.tensors(), twin.memory.tensors(), strict=True))
    assert (twin.fed, twin.next_position, twin.usage) == (straight.fed, straight.next_position, straight.usage)
    assert stream.fed == sum(LENGTHS[:3])


@pytest.mark.parametrize("budgeted", [False, True])
def test_each_layer_drops_its_old_memory_as_soon_as_it_has_read_it(budgeted) -> None:
    """Otherwise old and new memory exist together at the end of every chunk: twice the memory."""
    before: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def note(layer: int, view: LayerView) -> None:
        alive.extend(reference() is not None for reference in before[:layer])

    policy = policy_of("omnimem") if budgeted else PerturbationOptions().build(None)
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = Stream(attached, policy, recorder=note)
        for chunk in cut(whole_stream(), LENGTHS):
            stream.feed(chunk)
            before[:] = [weakref.ref(layer.keys) for layer in stream.memory.layers]
    assert alive
    assert not any(alive)


def test_packed_questions_equal_each_asked_alone(family) -> None:
    questions = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    with attach(text_model(family)) as attached, torch.no_grad():
        stream = fed(attached, policy_of("omnimem"), cut(whole_stream(levels=levels_of(family)), LENGTHS))
        packed = stream.ask(prompt_of([questions])).hidden
        alone = [stream.fork().ask(prompt_of([[question]])).hidden for question in questions]
    assert_equal_logits(packed, torch.cat(alone, dim=1))
    assert not torch.allclose(packed[:, 0], packed[:, 3])


def naive_answer(
    attached: StreamedAttention,
    policy: Policy,
    chunks: Sequence[Chunk],
    question: list[int],
    head: Callable[[Tensor], Tensor],
    limit: int,
) -> list[int]:
    """Greedy decoding that streams everything and reads the whole question again for every token; never stops."""
    written: list[int] = []
    for _ in range(limit):
        hidden = fed(attached, policy, chunks).ask(prompt_of([[[*question, *written]]])).hidden
        written.append(int(head(hidden[:, -1]).argmax()))
    return written


@pytest.mark.parametrize("batch", [1, 2])
def test_answers_equal_a_greedy_loop_that_reads_everything_again(batch) -> None:
    rows = [[[5, 6, 7], [8], [9, 10, 11, 12]], [[13, 14]]][:batch]
    model, limit = text_model("qwen2_5_omni"), 4
    head = nn.Linear(64, 40, bias=False).requires_grad_(False)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    chunks = cut(whole_stream(batch=batch), [40, 56])
    with attach(model) as attached, torch.no_grad():
        naive = [
            [naive_answer(attached, policy_of("omnimem"), [row_of(c, b) for c in chunks], q, head, limit) for q in row]
            for b, row in enumerate(rows)
        ]
        stream = fed(attached, policy_of("omnimem"), chunks)
        everything = [token for row in naive for answer in row for token in answer]
        for stop in ([39_999], [naive[0][0][2]], [naive[0][1][0]], everything):
            expected = [
                [answer[: next((n for n, token in enumerate(answer) if token in stop), limit)] for answer in row]
                for row in naive
            ]
            assert stream.answer(prompt_of(rows), head, stop=stop, max_new_tokens=limit) == expected
        shorter = [[answer[:2] for answer in row] for row in naive]
        assert stream.answer(prompt_of(rows), head, stop=[39_999], max_new_tokens=2) == shorter
    assert len({tuple(answer) for row in naive for answer in row}) > 1


def test_a_batch_of_three_equals_each_stream_alone(family) -> None:
    rows = [cut(whole_stream(seed=seed, levels=levels_of(family)), LENGTHS) for seed in (1, 2, 3)]
    questions = [[[5, 6], [7]], [[8]], [[9, 10, 11]]]
    with attach(text_model(family)) as attached, torch.no_grad():
        together = fed(attached, policy_of("omnimem"), [merged(chunks) for chunks in zip(*rows, strict=True)])
        answers = together.ask(prompt_of(questions)).hidden
        for number, chunks in enumerate(rows):
            alone = fed(attached, policy_of("omnimem"), chunks)
            assert orders(alone) == [[layer[number]] for layer in orders(together)]
            hidden = alone.ask(prompt_of([questions[number]])).hidden
            assert_equal_logits(answers[number : number + 1, : hidden.shape[1]], hidden)
    assert orders(together)[1][0] != orders(together)[1][1]


def test_usage_counts_entries_and_bytes_as_counted_by_hand() -> None:
    """Chunks of 20 and 31 of [0 0 0 2 2 2 2 1 0 2 2 2 2 1 0 ...]: 5 + 6 text, 3 + 5 audio, 12 + 20 visual tokens."""
    slots = ((1, 1), (3, 20), (9, 4), (2, 7))
    policy = PerturbationOptions(name="released").build(Budget(slots=slots))
    chunks = cut(whole_stream(), [20, 31, 45])
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = fed(attached, policy, chunks[:1])
        counts = [(1, 1), (3, 12), (3, 4), (2, 7)]
        assert [(layer[Modality.AUDIO], layer[Modality.VISUAL]) for layer in stream.memory.counts()] == counts
        assert stream.usage.tokens_in == (5, 3, 12)
        assert stream.usage.peak_entries == 4 * 15  # an empty memory and 15 tokens in each layer
        assert stream.usage.kept_entries == stream.memory.entries == 2 + 15 + 7 + 9
        # 2 heads of 16, keys and values; the layer's input of 64; 3 positions, arrival number,
        # group, importance, novelty and gate of 4; modality of 1; 5 text tokens a layer
        token = 2 * 2 * 16 * 4 + 64 * 4 + 8 * 4 + 1
        assert stream.usage.bytes == stream.memory.bytes == (33 + 4 * 5) * token
        stream.feed(chunks[1])
        assert stream.usage.tokens_in == (11, 8, 32)
        assert stream.usage.peak_entries == 33 + 4 * 25
        assert stream.usage.kept_entries == 2 + 23 + 12 + 9
        assert stream.usage.bytes == (46 + 4 * 11) * token
        assert stream.usage.chunks == 2
        assert stream.fed == 51


def smooth_stream() -> Chunk:
    """Embeddings of which some repeat the one before nearly and others hardly."""
    whole = whole_stream()
    generator = torch.Generator().manual_seed(2)
    embeddings = whole.embeddings.clone()
    for k in range(1, embeddings.shape[1]):
        alike = float(torch.rand((), generator=generator)) * 0.95 + 0.05
        embeddings[:, k] = alike * embeddings[:, k - 1] + (1 - alike**2) ** 0.5 * embeddings[:, k]
    return replace(whole, embeddings=embeddings)


@pytest.mark.parametrize(
    ("compared", "bits", "least"), [("inputs", 32, 0.7), ("sketch", 16, 0.85), ("sketch", 4, 0.8), ("sketch", 2, 0.7)]
)
def test_a_projected_feature_is_smaller_and_keeps_most_of_the_exact_selection(compared, bits, least) -> None:
    budget = Budget(slots=((4, 20),) * 4)
    chunks = cut(smooth_stream(), LENGTHS)
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        exact = fed(attached, PerturbationOptions().build(budget), chunks)
        options = PerturbationOptions(feature=32, compared=compared, sketch_bits=bits if bits < 32 else None)
        projected = fed(attached, options.build(budget), chunks)
        control = fed(attached, ControlOptions(name="random").build(budget), chunks)
    text = set((whole_stream().modality[0] == Modality.TEXT).nonzero()[:, 0].tolist())
    shares = []
    for other in (projected, control):
        same = [len((set(a[0]) & set(b[0])) - text) for a, b in zip(orders(exact), orders(other), strict=True)]
        shares.append(sum(same) / (4 * 24))
    assert control.memory.layers[0].feature.shape[-1] == 0
    count = sum(tokens.count for tokens in exact.memory.layers)
    length = bits == 2  # a byte
    assert exact.memory.bytes - projected.memory.bytes == ((64 * 32 - 32 * bits) // 8 - length) * count
    assert shares[0] > least > 0.5 > shares[1], shares


@pytest.mark.parametrize("wanted", [64, 100])
def test_a_feature_as_wide_as_the_state_is_the_exact_state(wanted) -> None:
    chunks = cut(whole_stream(), LENGTHS)
    budget = Budget(slots=UNEQUAL)
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        streams = [fed(attached, PerturbationOptions(feature=f).build(budget), chunks) for f in (None, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*(s.memory.tensors() for s in streams), strict=True))


def test_positions_go_on_after_the_stream_whatever_was_evicted() -> None:
    whole = whole_stream()
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = fed(attached, policy_of("recency", ((1, 1),) * 4), cut(whole, LENGTHS))
    assert stream.next_position == int(whole.positions.max()) + 1
    kept = stream.memory.layers[0]
    assert torch.equal(kept.positions[0], whole.positions[0][:, kept.order[0]])
