"""Attention in blocks against plain loops in float64, against autograd of a plain softmax, and against theory."""

import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import reference
from support.fake_gpu import FakeGPU
from torch import Tensor

from omnimem.attention import blocked
from omnimem.attention import reference as slow
from omnimem.attention.blocked import MEMORY, Every, Segments, attend, attend_measured, mass

GROUPS = [(4, 4), (4, 2), (4, 1)]
SIZES = [(1, 1), (1, 9), (5, 5), (7, 20), (16, 23)]  # queries, keys
SCALE = 0.4
FIRST = [0, 1, 3, 3, 2, 3, 1, 2]  # of every fourth query, by chunk and layer


def drawn(heads: int, kv_heads: int, count: int, total: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and a gate of two streams; logits of standard deviation about 2."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, heads, count, 6, generator=generator) * 2
    keys, values = torch.randn(2, 2, kv_heads, total, 6, generator=generator).unbind()
    return queries, keys, values, torch.randn(2, total, generator=generator)


def plainly(queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor | None) -> Tensor:
    """Output by the loops of tests/reference.py."""
    seen = reference.visible(queries.shape[2], keys.shape[2])
    outputs = [
        reference.attention(*(t[b].tolist() for t in (queries, keys, values)), SCALE, seen, g)[0]
        for b, g in enumerate([None] * len(keys) if gate is None else gate.tolist())
    ]
    return torch.tensor(outputs, dtype=torch.float64)


def softmax_attention(queries: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Output and probabilities by one softmax over a full matrix."""
    group = queries.shape[1] // keys.shape[1]
    wide_keys, wide_values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    logits = SCALE * queries @ wide_keys.transpose(-1, -2) + gate[:, None, None, :]
    seen = torch.tensor(reference.visible(queries.shape[2], keys.shape[2]))
    weights = logits.masked_fill(~seen, -math.inf).softmax(dim=-1)
    return weights @ wide_values, weights


def asking(queries: Tensor, every: Every) -> Tensor:
    """The places of the measured queries, as a mask."""
    return torch.arange(queries.shape[2]) % every.stride == every.first


@pytest.fixture(params=[7, 1024], ids=["blocks of 7", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks whose borders fall inside the queries, and one block for all."""
    monkeypatch.setattr(blocked, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("gated", [False, True])
def test_output_equals_plain_loops(block, heads, kv_heads, gated) -> None:
    for count, total in SIZES:
        queries, keys, values, drawn_gate = drawn(heads, kv_heads, count, total)
        gate = drawn_gate if gated else None
        got = attend(queries, keys, values, scale=SCALE, gate=gate)
        torch.testing.assert_close(got.double(), plainly(queries, keys, values, gate), rtol=0, atol=2e-6)


@pytest.mark.parametrize("heads", ["probabilities", "logits"])
@pytest.mark.parametrize(("query_heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("gated", [False, True])
def test_mass_equals_plain_loops(block, heads, query_heads, kv_heads, gated) -> None:
    for count, total in SIZES:
        queries, keys, _, drawn_gate = drawn(query_heads, kv_heads, count, total)
        gate = drawn_gate if gated else None
        got = mass(queries, keys, scale=SCALE, gate=gate, heads=heads)
        rows = [
            reference.mass(queries[b].tolist(), keys[b].tolist(), SCALE, heads, gate[b].tolist() if gated else None)
            for b in range(2)
        ]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), torch.tensor(rows, dtype=torch.float64), rtol=1e-5, atol=2e-6)


@pytest.fixture(params=[0, 1 << 18], ids=["heads alone", "all heads"])
def cached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A cache that holds the probabilities of one key-value head, and one that holds those of all."""
    monkeypatch.setattr(blocked, "CACHED", request.param)
    return request.param


@pytest.mark.parametrize("heads", ["probabilities", "logits"])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("gated", [False, True])
def test_the_mass_of_every_sth_query_equals_plain_loops(cached, monkeypatch, heads, group, gated) -> None:
    """Any number of query heads per key-value head, strides that do not divide the queries, borders of blocks."""
    monkeypatch.setattr(blocked, "ROWS", 6 * group)
    for count, total in ((5, 5), (13, 21)):
        queries, keys, values, drawn_gate = drawn(2 * group, 2, count, total)
        gate = drawn_gate if gated else None
        of_query = torch.tensor(
            [
                [reference.mass(queries[b].tolist(), keys[b].tolist(), SCALE, heads, bias, [q]) for q in range(count)]
                for b, bias in enumerate([None, None] if gate is None else gate.tolist())
            ],
            dtype=torch.float64,
        )
        for stride, first in [(1, 0), (2, 0), (2, 1), (3, 2), (5, 0), (5, 4)]:
            every = Every(stride, first)
            expected = stride * of_query[:, asking(queries, every)].sum(dim=1)
            found = [mass(queries, keys, scale=SCALE, gate=gate, heads=heads, every=every)]
            if heads == "probabilities":
                with torch.no_grad():
                    both = attend_measured(queries, keys, values, scale=SCALE, gate=gate, every=every)
                assert both is not None
                found.append(both[1])
            for received in found:
                torch.testing.assert_close(received.double(), expected, rtol=1e-5, atol=2e-6)
            # of each measured query, one in all: the mean over heads is not off by the group
            count_of = float(asking(queries, every).sum() * stride)
            assert found[0].sum(dim=1).tolist() == pytest.approx([count_of] * 2, rel=1e-5)


@pytest.mark.parametrize("heads", ["probabilities", "logits"])
@pytest.mark.parametrize("stride", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [16, 13])
def test_the_mean_over_all_first_queries_is_the_whole_mass(cached, heads, stride, count) -> None:
    """So the estimate is unbiased, since all of them are equally likely; also where s does not divide the queries."""
    queries, keys, values, gate = (tensor.double() for tensor in drawn(4, 2, count, 23))
    every = [Every(stride, first) for first in range(stride)]
    whole = mass(queries, keys, scale=SCALE, gate=gate, heads=heads)
    found = [[mass(queries, keys, scale=SCALE, gate=gate, heads=heads, every=each) for each in every]]
    if heads == "probabilities":
        with torch.no_grad():
            found.append([attend_measured(queries, keys, values, scale=SCALE, gate=gate, every=e)[1] for e in every])
    for estimates in found:
        mean = torch.stack(estimates).mean(dim=0)
        torch.testing.assert_close(mean, whole, rtol=1e-13, atol=1e-13)
        assert float((estimates[0] - whole).abs().max()) > 0.01


@pytest.mark.parametrize("heads", ["probabilities", "logits"])
def test_the_gradient_of_the_mass_of_some_queries_equals_that_of_a_plain_softmax(cached, block, heads) -> None:
    inputs, weight = drawn(4, 2, 13, 23), torch.randn(2, 23, generator=torch.Generator().manual_seed(3))
    inputs = [
        inputs[0],
        inputs[1].transpose(1, 2).contiguous().transpose(1, 2),
        *inputs[2:],
    ]  # as a projection gives keys
    queries, keys, _, gate = (tensor.double().requires_grad_() for tensor in inputs)
    every = Every(3, 1)
    wide = keys.repeat_interleave(2, dim=1)
    logits = SCALE * queries @ wide.mT + gate[:, None, None, :]
    if heads == "logits":
        logits = logits.mean(dim=1, keepdim=True)
    hidden = ~torch.tensor(reference.visible(13, 23))
    weights = logits.masked_fill(hidden, -math.inf).softmax(dim=-1)
    plain = 3 * weights[:, :, asking(queries, every)].mean(dim=1).sum(dim=1)
    found = mass(queries, keys, scale=SCALE, gate=gate, heads=heads, every=every)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)
    of_plain, of_found = (torch.autograd.grad((each * weight).sum(), (queries, keys, gate)) for each in (plain, found))
    for mine, theirs in zip(of_found, of_plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_first_query_is_drawn_by_chunk_and_layer_alone_and_all_are_equally_likely() -> None:
    # the same in every process and version: what an evaluation or a resumed training measures does not change
    assert [Every.drawn(4, 100, fed, layer).first for fed in (0, 1024) for layer in range(4)] == FIRST
    for stride in (2, 3, 4, 8):
        drawn_firsts = [Every.drawn(stride, 1024, 1024 * chunk, layer) for chunk in range(100) for layer in range(28)]
        assert {each.stride for each in drawn_firsts} == {stride}
        counts = torch.tensor([each.first for each in drawn_firsts]).bincount(minlength=stride)
        expected = 2800 / stride
        assert float(((counts - expected) ** 2 / expected).sum()) < 3 * stride + 12  # chi squared


@pytest.mark.parametrize(("stride", "queries", "apart"), [(1, 9, 1), (4, 9, 4), (4, 4, 4), (4, 3, 3), (100, 1, 1)])
def test_at_least_one_query_is_always_measured(stride, queries, apart) -> None:
    found = {Every.drawn(stride, queries, fed, 0) for fed in range(200)}
    assert found == {Every(apart, first) for first in range(apart)}


@pytest.mark.parametrize("every", [Every(), Every(4, 1)])
@pytest.mark.parametrize("heads", ["probabilities", "logits"])
def test_the_mass_of_bfloat16_inputs_is_that_of_their_values(heads, every) -> None:
    queries, keys, _, gate = drawn(4, 2, 16, 23)
    half = queries.to(torch.bfloat16), keys.to(torch.bfloat16)
    found = mass(*half, scale=SCALE, gate=gate, heads=heads, every=every)
    assert found.dtype == torch.float32
    assert torch.equal(found, mass(half[0].float(), half[1].float(), scale=SCALE, gate=gate, heads=heads, every=every))


@pytest.mark.parametrize(("query_heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [3, 128])
def test_one_pass_gives_the_output_and_the_mass_of_two(cached, monkeypatch, rows, query_heads, kv_heads, gated) -> None:
    monkeypatch.setattr(blocked, "ROWS", rows)
    for count, total in (*SIZES, (70, 150)):
        queries, keys, values, drawn_gate = drawn(query_heads, kv_heads, count, total)
        gate = drawn_gate if gated else None
        with torch.no_grad():
            both = attend_measured(queries, keys, values, scale=SCALE, gate=gate)
            assert both is not None
            torch.testing.assert_close(
                both[0], attend(queries, keys, values, scale=SCALE, gate=gate), rtol=0, atol=2e-6
            )
            assert torch.equal(both[1], mass(queries, keys, scale=SCALE, gate=gate))
        assert attend_measured(queries, keys, values, scale=SCALE, gate=gate) is None  # gradients: two passes


def test_the_package_s_own_reference_equals_the_plain_loops() -> None:
    queries, keys, values, gate = drawn(4, 2, 7, 20)
    seen = torch.tensor(reference.visible(7, 20)).expand(2, 7, 20)
    output, weights = slow.attend(queries, keys, values, scale=SCALE, visible=seen, gate=gate)
    torch.testing.assert_close(output, plainly(queries, keys, values, gate), rtol=0, atol=1e-12)
    rows = [
        reference.mass(queries[b].tolist(), keys[b].tolist(), SCALE, "probabilities", gate[b].tolist())
        for b in range(2)
    ]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(slow.mass_of_probabilities(weights), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", ["probabilities", "logits"])
def test_mass_sums_to_the_number_of_queries(block, heads) -> None:
    for count, total in (*SIZES, (300, 700)):
        queries, keys, _, gate = drawn(4, 2, count, total)
        received = mass(queries, keys, scale=SCALE, gate=gate, heads=heads).double().sum(dim=1)
        torch.testing.assert_close(received, torch.full((2,), float(count), dtype=torch.float64), rtol=1e-6, atol=0)


def test_averaging_logits_and_averaging_probabilities_are_different_measures() -> None:
    queries, keys, _, _ = drawn(4, 2, 16, 23)
    exact, released = (mass(queries, keys, scale=SCALE, heads=heads) for heads in ("probabilities", "logits"))
    assert float((exact - released).abs().max()) > 0.1
    alone, again = (mass(queries[:, :1], keys[:, :1], scale=SCALE, heads=h) for h in ("probabilities", "logits"))
    torch.testing.assert_close(alone, again)  # with one head they are the same


def test_gradients_of_everything_equal_autograd_of_a_plain_softmax(block) -> None:
    inputs = drawn(4, 2, 16, 23)
    cotangent = torch.randn(2, 4, 16, 6, generator=torch.Generator().manual_seed(3))

    def gradients(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        return list(torch.autograd.grad((function(*leaves) * cotangent.to(dtype)).sum(), leaves))

    got = gradients(lambda q, k, v, g: attend(q, k, v, scale=SCALE, gate=g), torch.float32)
    expected = gradients(lambda q, k, v, g: softmax_attention(q, k, v, g)[0], torch.float64)
    for name, mine, theirs in zip(("queries", "keys", "values", "gate"), got, expected, strict=True):
        assert float(theirs.abs().max()) > 0.1, name
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_the_gradient_of_mass_equals_autograd_of_a_plain_softmax(block) -> None:
    queries, keys, values, gate = drawn(4, 2, 16, 23)
    weight = torch.randn(2, 23, generator=torch.Generator().manual_seed(3))

    def gradients(masses, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (queries, keys, gate)]
        return list(torch.autograd.grad((masses(*leaves) * weight.to(dtype)).sum(), leaves))

    got = gradients(lambda q, k, g: mass(q, k, scale=SCALE, gate=g), torch.float32)
    expected = gradients(
        lambda q, k, g: slow.mass_of_probabilities(softmax_attention(q, k, values.double(), g)[1]), torch.float64
    )
    for name, mine, theirs in zip(("queries", "keys", "gate"), got, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_a_gate_of_log_two_counts_a_key_twice(block) -> None:
    queries, keys, values, _ = drawn(4, 2, 7, 20)
    gate = torch.zeros(2, 20)
    gate[:, 4] = math.log(2)
    twice = [torch.cat([t[:, :, :5], t[:, :, 4:]], dim=2) for t in (keys, values)]
    got = attend(queries, keys, values, scale=SCALE, gate=gate)
    torch.testing.assert_close(got, attend(queries, *twice, scale=SCALE), rtol=0, atol=2e-6)


def test_what_a_later_key_holds_never_reaches_an_earlier_query(block) -> None:
    queries, keys, values, gate = drawn(4, 2, 16, 23)
    louder = [t.clone() for t in (keys, values, gate)]
    louder[0][:, :, -3:] += 50
    louder[1][:, :, -3:] += 50
    louder[2][:, -3:] += 50
    before = attend(queries, keys, values, scale=SCALE, gate=gate)
    after = attend(queries, louder[0], louder[1], scale=SCALE, gate=louder[2])
    assert torch.equal(before[:, :, :-3], after[:, :, :-3])
    assert not torch.equal(before[:, :, -3:], after[:, :, -3:])


def test_packed_questions_equal_each_one_alone(block) -> None:
    """Nine memory keys, then three questions of 4, 1 and 6 tokens; the second stream has two and five paddings."""
    lengths = [[4, 1, 6], [4, 2]]
    queries, keys, values, gate = drawn(4, 2, 11, 20)
    numbers = [[n for n, length in enumerate(row) for _ in range(length)] for row in lengths]
    asked = torch.tensor([row + [-1] * (11 - len(row)) for row in numbers])
    segments = Segments(queries=asked, keys=torch.cat([torch.full((2, 9), MEMORY), asked], dim=1))
    packed = attend(queries, keys, values, scale=SCALE, gate=gate, segments=segments)
    assert bool(packed.isfinite().all())
    for stream, row in enumerate(lengths):
        seen = reference.visible(11, 20, asked[stream].tolist(), segments.keys[stream].tolist())
        inputs = [t[stream].tolist() for t in (queries, keys, values)]
        loops, _ = reference.attention(*inputs, SCALE, seen, gate[stream].tolist())
        torch.testing.assert_close(packed[stream].double(), torch.tensor(loops, dtype=torch.float64), rtol=0, atol=2e-6)
        for number in range(len(row)):
            own = (asked[stream] == number).nonzero()[:, 0]
            of_keys = torch.cat([torch.arange(9), 9 + own])
            q, k, v, g = (t[stream : stream + 1] for t in (queries, keys, values, gate))
            alone = attend(q[:, :, own], k[:, :, of_keys], v[:, :, of_keys], scale=SCALE, gate=g[:, of_keys])
            torch.testing.assert_close(packed[stream : stream + 1, :, own], alone, rtol=0, atol=2e-6)


def test_a_question_s_continuation_sees_the_memory_and_its_own_past_only() -> None:
    """Three memory keys, two questions of two tokens read before, now one more token of each, in the other order."""
    queries, keys, values, _ = drawn(4, 2, 2, 9)
    asked = torch.tensor([[1, 0]]).expand(2, 2)
    earlier = torch.tensor([[0, 0, 1, 1]]).expand(2, 4)
    segments = Segments(queries=asked, keys=torch.cat([torch.full((2, 3), MEMORY), earlier, asked], dim=1))
    packed = attend(queries, keys, values, scale=SCALE, segments=segments)
    for query, of_keys in ((0, [0, 1, 2, 5, 6, 7]), (1, [0, 1, 2, 3, 4, 8])):
        alone = attend(queries[:, :, [query]], keys[:, :, of_keys], values[:, :, of_keys], scale=SCALE)
        torch.testing.assert_close(packed[:, :, [query]], alone, rtol=0, atol=2e-6)


def test_bfloat16_inputs_give_bfloat16_outputs(block) -> None:
    queries, keys, values, gate = (t.to(torch.bfloat16) for t in drawn(4, 2, 16, 23))
    output = attend(queries, keys, values, scale=SCALE, gate=gate.float())
    exact = [t.float() for t in (queries, keys, values)]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), plainly(*exact, gate.float()), rtol=0.03, atol=0.03)


def test_dropping_a_key_moves_the_output_by_its_odds_times_its_distance() -> None:
    """Theory (docs/paper.md, "Scores"): without key k and renormalised, |o' - o| = a / (1 - a) |v - o|."""
    queries, keys, values, gate = drawn(2, 1, 3, 8)
    seen = torch.ones(2, 3, 8, dtype=torch.bool)
    output, weights = slow.attend(queries, keys, values, scale=SCALE, visible=seen, gate=gate)
    for key in range(8):
        without = seen.clone()
        without[:, :, key] = False
        moved, _ = slow.attend(queries, keys, values, scale=SCALE, visible=without, gate=gate)
        share = weights[..., key]
        distance = (values[:, :, None, key].double() - output).norm(dim=-1)
        torch.testing.assert_close((moved - output).norm(dim=-1), share / (1 - share) * distance, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def fused() -> ModuleType:
    """The kernels, where Triton can be had; read past the hook that checks shapes, whose decorators are no kernels."""
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    spec = spec_from_file_location("kernels", Path(blocked.__file__).with_name("fused.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("count", "total"), [(1, 1), (1, 40), (37, 37), (33, 90), (70, 71)])
@pytest.mark.parametrize("gated", [False, True])
def test_the_kernels_mass_is_that_of_the_blocks(fused, count, total, gated) -> None:
    """Sizes below, at and beyond the borders of the kernels' blocks of queries (32) and keys (32)."""
    queries, keys, _, gate = drawn(4, 2, count, total)
    found = fused.mass(queries, keys, scale=SCALE, gate=gate if gated else None)
    expected = mass(queries.double(), keys.double(), scale=SCALE, gate=gate if gated else None)
    torch.testing.assert_close(found, expected.float(), rtol=2e-6, atol=2e-6)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("count", "total", "every"), [(70, 71, Every(2, 1)), (70, 160, Every(4, 3)), (9, 70, Every(8, 0))]
)
def test_the_kernels_read_every_sth_query_alone(fused, monkeypatch, group, count, total, every) -> None:
    """Through `mass`, as on a GPU: the kernels are given these queries, and sum the heads of a group themselves."""
    queries, keys, _, gate = drawn(2 * group, 2, count, total)
    given = []

    def kernels(asking: Tensor, keys: Tensor, **settings: Any) -> Tensor:
        given.append(asking.shape[2])
        return fused.mass(asking, keys, **settings)

    monkeypatch.setattr(blocked, "fused_mass", lambda: kernels)
    expected = mass(queries.double(), keys.double(), scale=SCALE, gate=gate, every=every)
    assert given == []  # not in float64
    with FakeGPU():
        on_gpu = [tensor.to("cuda") for tensor in (queries, keys, gate)]
        found = mass(on_gpu[0], on_gpu[1], scale=SCALE, gate=on_gpu[2], every=every)
    assert given == [int(asking(queries, every).sum())]
    torch.testing.assert_close(found.cpu(), expected.float(), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("every", [Every(), Every(4, 3)])
@pytest.mark.parametrize("gated", [False, True])
def test_on_a_gpu_the_mass_follows_from_the_log_sums_of_the_attention_kernel(fused, monkeypatch, every, gated) -> None:
    queries, keys, values, drawn_gate = drawn(4, 2, 37, 70)
    gate, first = drawn_gate if gated else None, []

    def flash(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        hidden = ~torch.tensor(reference.visible(37, 70))
        logits = (scale * queries @ keys.repeat_interleave(2, dim=1).mT).masked_fill(
            hidden.to(queries.device), -math.inf
        )
        return logits.softmax(dim=-1) @ values.repeat_interleave(2, dim=1), logits.logsumexp(dim=-1)

    monkeypatch.setattr(blocked, "fused_mass", lambda: fused.mass)
    monkeypatch.setattr(blocked, "_flash_supports", lambda *_: True)
    monkeypatch.setattr(blocked, "_flash", flash)
    monkeypatch.setattr(fused, "_log_sums", first)  # which nobody computes again
    with FakeGPU(), torch.no_grad():
        inputs = [None if tensor is None else tensor.to("cuda") for tensor in (queries, keys, values, gate)]
        both = attend_measured(*inputs[:3], scale=SCALE, gate=inputs[3], every=every)
    assert both is not None
    torch.testing.assert_close(both[0].cpu(), attend(queries, keys, values, scale=SCALE, gate=gate), rtol=0, atol=2e-6)
    expected = mass(queries.double(), keys.double(), scale=SCALE, gate=gate, every=every)
    torch.testing.assert_close(both[1].cpu(), expected.float(), rtol=4e-6, atol=4e-6)


def test_the_flash_kernel_gives_a_log_sum_per_query() -> None:
    """Its shapes, as torch describes them without a GPU."""
    queries, keys = (torch.empty(2, heads, 5, 64, dtype=torch.bfloat16, device="meta") for heads in (8, 2))
    output, sums = blocked._flash(queries, keys, keys, SCALE)
    assert (output.shape, sums.shape, sums.dtype) == (queries.shape, (2, 8, 5), torch.float32)


def test_the_kernels_take_heads_of_any_width_and_half_precision(fused) -> None:
    queries, keys = (torch.randn(1, heads, 40, 24, generator=torch.Generator().manual_seed(1)) for heads in (2, 1))
    found = fused.mass(queries.half(), keys.half(), scale=SCALE)
    torch.testing.assert_close(found, mass(queries.half(), keys.half(), scale=SCALE), rtol=2e-6, atol=2e-6)
