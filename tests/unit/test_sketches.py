"""Sketches of layer inputs: bytes, codes, copies, and how well cosines are kept."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from omnimem import sketches
from omnimem.policies.base import sketch
from omnimem.policies.perturbation import SKETCH
from omnimem.scoring import covered
from omnimem.scoring.covered import uncovered, uncovered_values
from omnimem.sketches import (
    OFFSETS,
    ROUNDING,
    SIZES,
    STEP,
    References,
    encoded,
    enlarged,
    packed,
    rough,
    stored,
    unpacked,
    unrounded,
    vectors,
)
from omnimem.tokens import Counts
from omnimem.view import FLOOR

DRAW = 5


def streams(count: int, width: int, *, common: float = 2.0) -> Tensor:
    """Layer inputs that share a component, as those of a text model do."""
    draw = torch.Generator().manual_seed(DRAW)
    events = torch.randn(count // 4, width, generator=draw).repeat(4, 1)
    return common * torch.randn(width, generator=draw) + events + 0.7 * torch.randn(count, width, generator=draw)


@pytest.mark.parametrize("shape", [(2, 9), (2, 1), (1, 1), (1, 0), (0, 3), (1,)], ids=str)
@pytest.mark.parametrize(("bits", "feature"), [(4, 1), (4, 2), (4, 7), (4, 192), (2, 4), (2, 32), (2, 256), (4, 0)])
def test_codes_survive_packing(bits, feature, shape) -> None:
    """Also of one token and of none, whose strides are arbitrary, and at any place in memory."""
    draw = torch.Generator().manual_seed(DRAW)
    numbers = torch.randint(int(bits == 4), 1 << bits, (*shape, feature), generator=draw).to(torch.uint8)
    held = packed(numbers, bits)
    if bits == 2:
        held = torch.cat([held, torch.full_like(numbers[..., :1], SIZES)], dim=-1)
    assert (held.shape[-1], held.dtype) == stored(feature, bits, learns=False)
    assert held.shape[-1] == (feature * bits + 7) // 8 + (bits == 2)
    expected = numbers.float() - OFFSETS[bits]
    for placed in (held, F.pad(held.flatten(), (3, 0))[3:].view_as(held)):
        found = vectors(placed, bits)
        assert torch.equal(found[..., :feature], expected if bits == 4 else 2 * SIZES * expected)
        assert not found[..., feature:].any()


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_training_compares_the_numbers_of_evaluation(bits) -> None:
    unit = F.normalize(streams(64, 96)[None], dim=-1)
    plain = encoded(unit * torch.linspace(0.01, 1, 64)[:, None], bits, learns=False)
    learning = encoded(unit.requires_grad_() * torch.linspace(0.01, 1, 64)[:, None], bits, learns=True)
    assert learning.requires_grad
    assert (learning.shape[-1], learning.dtype) == stored(96, bits, learns=True)
    codes = bits if bits < 16 else None
    assert torch.equal(vectors(learning, codes).float(), vectors(plain, codes).float())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_a_score_that_learns_has_the_value_of_evaluation(bits, product, batch) -> None:
    """To the bit in 2 bits; else up to rounding, which may make another one the nearest of nearly equal tokens."""
    kinds, scores = torch.tensor([[1, 2] * 200] * batch, dtype=torch.int8), torch.linspace(1, 0.1, 400).tile(batch, 1)
    unit = F.normalize(streams(400 * batch, 96).view(batch, 400, 96), dim=-1)
    vector = References().beyond(0, unit, kinds) if bits == 2 else unit
    how: dict[str, Any] = {"product": product, "codes": bits if bits < 16 else None}
    trained = uncovered(encoded(vector.clone().requires_grad_(), bits, learns=True), kinds, scores, **how)
    found = uncovered_values(encoded(vector.clone(), bits, learns=False), kinds, scores, **how)
    assert trained.requires_grad
    if bits == 2:
        assert torch.equal(trained, found)
    assert int(((trained - found).abs() > 1e-5).sum()) <= 2 * batch


@pytest.mark.parametrize("codes", [None, 2, 4])
def test_a_short_difference_from_the_mean_has_no_gradient(codes) -> None:
    """In the scale of the codes: those of 2 bits are longer than what they stand for."""
    scale = enlarged(96) if codes == 2 else 1.0
    apart = F.normalize(streams(8, 96), dim=-1)[None] * scale * torch.tensor([0.04, 0.06]).repeat(4)[:, None]
    covered._directions(apart.requires_grad_(), codes)[..., 0].sum().backward()
    assert apart.grad is not None
    assert apart.grad.abs().sum(dim=-1).gt(0).tolist() == [[False, True] * 4]


def test_the_cosine_of_numbers_follows_from_that_of_their_codes() -> None:
    """In the mean over pairs of normally distributed numbers, whose correlation is known."""
    draw = torch.Generator().manual_seed(DRAW)
    one, other = torch.randn(2, 1 << 20, generator=draw, dtype=torch.float64)
    for cosine in (-0.9, -0.3, 0.0, 0.2, 0.5, 0.8, 0.95, 1.0):
        pair = (one, cosine * one + (1 - cosine**2) ** 0.5 * other)
        a, b = ((each / STEP + 2).clamp(0, 3).floor() - 1.5 for each in pair)
        found = 1 - unrounded(1 - (a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
        assert float(found) == pytest.approx(cosine, abs=0.01), cosine


@pytest.mark.parametrize("measure", [uncovered, uncovered_values])
def test_copies_have_cosine_1_and_the_two_computations_agree(measure) -> None:
    """Beside float64 and the formula: dot / sqrt((|u|^2 - r) (|v|^2 - r)) of centred codes of length 1."""
    unit = F.normalize(streams(60, 96), dim=-1)
    unit[40:] = unit[:20]
    held = encoded(unit[None], 4, learns=False)
    scores, kinds = torch.linspace(1, 0.1, 60)[None], torch.full((1, 60), 2, dtype=torch.int8)
    found = measure(held, kinds, scores, codes=4)[0]
    assert float(found[40:].max()) == pytest.approx(FLOOR)
    rows = F.normalize(vectors(held[0], 4).double(), dim=-1)
    rows = rows - rows.mean(0)
    lengths = rows.norm(dim=-1)
    rows = rows / torch.maximum(lengths**2 - ROUNDING, lengths**2 / 4).sqrt()[:, None]
    later = torch.ones(60, 60, dtype=torch.bool).triu()
    best = (rows @ rows.T).masked_fill(later, -1.0).amax(dim=1)
    torch.testing.assert_close(found.double(), (1 - best).clamp_min(FLOOR), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("measure", [uncovered, uncovered_values])
def test_codes_of_2_bits_are_compared_as_the_formula_says(measure) -> None:
    """Beside float64: the centred codes as they are, and 1 - c of what they stand for; copies have 1 - c = 0."""
    vector = streams(60, 96)[None]
    vector[:, 40:] = vector[:, :20]
    scores, kinds = torch.linspace(1, 0.1, 60)[None], torch.tensor([[1, 2] * 30], dtype=torch.int8)
    held = encoded(References().beyond(0, vector, kinds), 2, learns=False)
    found = measure(held, kinds, scores, codes=2)[0]
    assert float(found[40:].max()) == pytest.approx(FLOOR)
    for kind in (1, 2):
        rows = vectors(held[0, kinds[0] == kind], 2).double()
        rows = F.normalize(rows - rows.mean(0), dim=-1)
        best = (rows @ rows.T).masked_fill(torch.ones(30, 30, dtype=torch.bool).triu(), -1.0).amax(dim=1)
        expected = unrounded(1 - best).clamp_min(FLOOR)
        torch.testing.assert_close(found[kinds[0] == kind].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [Counts(0, 60, None, 0), Counts(0, 60, 30, 0)])
@pytest.mark.parametrize("product", [None, torch.bfloat16])
@pytest.mark.parametrize("codes", [2, 4])
def test_both_modalities_at_once_are_compared_as_one_after_the_other(codes, product, counts, monkeypatch) -> None:
    """As on a device that is not asked how many there are of each."""
    kinds, scores = torch.tensor([[1, 2] * 30], dtype=torch.int8), torch.linspace(1, 0.1, 60)[None]
    held = encoded(References().beyond(0, streams(60, 96)[None], kinds), codes, learns=False)
    asked = uncovered_values(held, kinds, scores, product=product, codes=codes)
    monkeypatch.setattr(covered, "COUNTED", ())
    found = uncovered_values(held, kinds, scores, counts, product=product, codes=codes)
    torch.testing.assert_close(found, asked, rtol=1e-5, atol=1e-5 if product is None else 0.01)


def test_the_smallest_sketch_is_as_near_to_the_exact_cosine_as_the_largest() -> None:
    states, errors, sizes = streams(200, 1024), {}, {}
    scores, kinds = torch.linspace(1, 0.1, 200)[None], torch.full((1, 200), 2, dtype=torch.int8)
    exact = uncovered_values(states[None], kinds, scores)
    for bits, feature in SKETCH.items():
        vector = states[None] @ sketch(1024, feature)
        if bits == 2:
            vector = References().beyond(0, vector, kinds)
        held = encoded(vector, bits, learns=False)
        sizes[bits] = held[0, 0].nbytes
        found = uncovered_values(held, kinds, scores, codes=bits if bits < 16 else None)
        errors[bits] = float((found - exact).square().mean())
    assert sizes == {2: 65, 4: 96, 16: 256}
    assert max(errors[2], errors[4]) < errors[16], errors


def test_a_reference_is_that_of_the_first_tokens_of_its_modality() -> None:
    """Each stream of a batch has its own, later tokens leave it, text has none, and a fork goes its own way."""
    vector = streams(48, 16).view(2, 24, 16)
    kinds = torch.tensor([[0, 2, 2, 2, 1, 2] * 4, [2, 2, 0, 2, 2, 2] * 4], dtype=torch.int8)
    references, alone = References(), [References(), References()]
    first = [references.beyond(0, vector[:, :12], kinds[:, :12])]
    twin = references.fork()
    for row, each in enumerate(alone):
        single = each.beyond(0, vector[row : row + 1, :12], kinds[row : row + 1, :12])
        torch.testing.assert_close(single[0], first[0][row])
    unit = F.normalize(vector[0, :12], dim=-1)
    for kind in (1, 2):
        mean = unit[kinds[0, :12] == kind].mean(dim=0)
        expected = F.normalize(vector[0], dim=-1) - mean
        again = references.beyond(0, vector[:, 12:], kinds[:, 12:])[0]
        torch.testing.assert_close(again[kinds[0, 12:] == kind], expected[12:][kinds[0, 12:] == kind])
    assert torch.equal(references.beyond(0, vector[:, :12], kinds[:, :12]), first[0])  # read again
    text = kinds[0, :12] == 0
    assert torch.equal(first[0][0, text], unit[text])
    # the second stream has no audio yet
    sound = torch.ones(2, 3, dtype=torch.int8)
    ours, theirs = (each.beyond(0, vector[:, 20:23] * sign, sound) for each, sign in ((references, 1), (twin, -1)))
    torch.testing.assert_close(ours[1], -theirs[1])
    assert references.bytes == 2 * 16 * 4


@pytest.mark.parametrize("order", [(1, 2, 1), (2, 1, 2), (1, 2, 2, 1), (0, 1, 0, 1), (2, 0, 2, 1, 2)])
def test_a_reference_stays_whichever_modalities_come_between(order) -> None:
    """Chunks of one modality each: the first of each sets its reference, here of different directions each time."""
    references, seen = References(), {}
    for number, kind in enumerate(order):
        unit = F.normalize(streams(8, 16)[None].roll(number, dims=-1), dim=-1)
        apart = references.beyond(0, unit, torch.full((1, 8), kind, dtype=torch.int8))
        mean = seen.setdefault(kind, unit.mean(dim=1, keepdim=True))
        torch.testing.assert_close(apart, unit - mean if kind else unit)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_silence_has_a_sketch_without_direction(bits, learns) -> None:
    held = vectors(encoded(torch.zeros(1, 3, 8), bits, learns=learns), bits if bits < 16 else None)
    assert not held.float().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [None, False, 2, 4, 16])
def test_only_codes_of_2_bits_in_float32_are_rough(bits, dtype, monkeypatch) -> None:
    """Of a model in float64 nothing is; others have no faster precision."""
    monkeypatch.setattr(sketches, "_multiplies_bfloat16", lambda: True)
    assert rough(bits, dtype, torch.device("cpu")) == (bits == 2 and dtype == torch.float32)
    monkeypatch.setattr(sketches, "_multiplies_bfloat16", lambda: False)
    assert not rough(bits, dtype, torch.device("cpu"))


@pytest.mark.parametrize("first", [0, 1, 7, 30])
def test_the_largest_before_is_found_by_bit_patterns(first) -> None:
    """Rows of positive, of negative and of both numbers, with zeros of both signs, and of none before."""
    draw = torch.Generator().manual_seed(DRAW)
    rows = torch.randn(40, first + 40, generator=draw).to(torch.bfloat16)
    rows[:10], rows[20:30] = rows[:10].abs(), -rows[20:30].abs()
    rows[5:25, ::7], rows[::4, 3], rows[24, 9], rows[31] = -100, -0.0, 0.0, -0.0
    later = torch.arange(first + 40) >= first + torch.arange(40)[:, None]
    expected = rows.masked_fill(later, float("-inf")).amax(dim=-1)
    covered._before_bits.cache_clear()
    with torch.inference_mode(), torch.device("meta"):  # the mask that is held for all calls is usable in all
        assert torch.equal(covered._largest_before(rows.clone(), first), expected)
    assert torch.equal(covered._largest_before(rows, first), expected)


@pytest.mark.parametrize("size", [1, 7, 8, 24, 64])
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_unpacked_as_they_were_packed(bits, size) -> None:
    """Widths of whole words and others, all bits set, and rows that are not contiguous."""
    draw = torch.Generator().manual_seed(DRAW)
    codes = torch.randint(0, 1 << bits, (2, 5, size * 8 // bits), generator=draw, dtype=torch.uint8)
    codes[0, 0] = (1 << bits) - 1
    held = torch.cat([packed(codes, bits), torch.full((2, 5, 1), 255, dtype=torch.uint8)], dim=-1)
    assert torch.equal(unpacked(held[..., :-1], bits), codes)


def test_what_resembles_a_still_opening_later_is_still_a_copy_of_it() -> None:
    """Their differences from the reference are noise, of unlike directions, but short."""
    draw = torch.Generator().manual_seed(DRAW)
    still, events = torch.randn(512, generator=draw), torch.randn(40, 512, generator=draw)
    opening, later = (still + 0.01 * torch.randn(20, 512, generator=draw) for _ in range(2))
    references, kinds = References(), torch.full((1, 80), 2, dtype=torch.int8)
    matrix, parts = sketch(512, 256), (opening, torch.cat([events, later]))
    held = [
        encoded(references.beyond(0, part[None] @ matrix, kinds[:, : len(part)]), 2, learns=False) for part in parts
    ]
    scores = torch.linspace(1, 0.1, 80)[None]
    found = uncovered_values(torch.cat(held, dim=1), kinds, scores, codes=2)[0]
    assert float(found[1:20].max()) < 0.1
    assert float(found[60:].max()) < 0.1
    assert float(found[20:60].min()) > 0.5


def test_gradient_passes_rounding_to_2_bits_as_if_there_were_none() -> None:
    """Of tokens with a near copy, beside that of the differences themselves, which differs by rounding alone."""
    draw = torch.Generator().manual_seed(DRAW)
    events = torch.randn(1, 60, 256, generator=draw)
    states = torch.cat([events, events + 0.5 * torch.randn(1, 60, 256, generator=draw)], dim=1)
    scores, kinds, slopes = torch.linspace(1, 0.1, 120)[None], torch.full((1, 120), 2, dtype=torch.int8), []
    for rounded in (True, False):
        read = states.clone().requires_grad_()
        apart = References().beyond(0, read, kinds)
        held = encoded(apart, 2, learns=True) if rounded else apart * enlarged(256)
        uncovered(held, kinds, scores, product=torch.float32, codes=2).sum().backward()
        assert read.grad is not None
        slopes.append(read.grad[0, 60:])
    alike = torch.cosine_similarity(*slopes, dim=-1)
    assert float(alike.median()) > 0.6, alike


def test_codes_made_in_bfloat16_are_those_of_float32_but_for_a_hundredth() -> None:
    """As on a CPU with instructions for it, of inputs that are mostly alike."""
    states, kinds = streams(200, 1024, common=4.0)[None], torch.full((1, 200), 2, dtype=torch.int8)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        vector = (states.to(dtype) @ sketch(1024, 256).to(dtype)).float()
        found.append(vectors(encoded(References().beyond(0, vector, kinds), 2, learns=False), 2))
    assert float((found[0].sign() != found[1].sign()).float().mean()) < 0.01
    assert float((found[0] != found[1]).float().mean()) < 0.1


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_serves_codes_of_2_bits_beside_float32_alone(fast, monkeypatch) -> None:
    monkeypatch.setattr(sketches, "_multiplies_bfloat16", lambda: fast)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert sketches.rough(2, torch.float32, cpu) == fast
    others = [(4, torch.float32, cpu), (2, torch.float64, cpu), (2, torch.float32, gpu), (None, torch.float32, cpu)]
    assert not any(sketches.rough(bits, dtype, device) for bits, dtype, device in others)
