"""Sketches of layer inputs: bytes, codes, copies, and how well cosines are kept."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from omnimem.policies.base import sketch
from omnimem.policies.perturbation import SKETCH
from omnimem.scoring.covered import uncovered, uncovered_values
from omnimem.sketches import LEVELS, ROUNDING, encoded, packed, stored, vectors
from omnimem.view import FLOOR

DRAW = 5


def streams(count: int, width: int, *, common: float = 2.0) -> Tensor:
    """Layer inputs that share a component, as those of a text model do."""
    draw = torch.Generator().manual_seed(DRAW)
    events = torch.randn(count // 4, width, generator=draw).repeat(4, 1)
    return common * torch.randn(width, generator=draw) + events + 0.7 * torch.randn(count, width, generator=draw)


@pytest.mark.parametrize("feature", [1, 2, 7, 192])
def test_codes_survive_packing(feature) -> None:
    codes = torch.randint(-LEVELS, LEVELS + 1, (2, 9, feature), generator=torch.Generator().manual_seed(DRAW)).float()
    held = packed(codes)
    assert (held.shape[-1], held.dtype) == stored(feature, 4, learns=False) == ((feature + 1) // 2, torch.uint8)
    assert torch.equal(vectors(held)[..., :feature], codes)
    assert not vectors(held)[..., feature:].any()


@pytest.mark.parametrize("bits", [4, 16])
def test_training_compares_the_numbers_of_evaluation(bits) -> None:
    unit = F.normalize(streams(64, 96)[None], dim=-1)
    plain = encoded(unit, bits, learns=False)
    learning = encoded(unit.requires_grad_(), bits, learns=True)
    assert learning.requires_grad
    assert (learning.shape[-1], learning.dtype) == stored(96, bits, learns=True)
    assert torch.equal(vectors(learning).float(), vectors(plain).float())


@pytest.mark.parametrize("measure", [uncovered, uncovered_values])
def test_copies_have_cosine_1_and_the_two_computations_agree(measure) -> None:
    """Beside float64 and the formula: dot / sqrt((|u|^2 - r) (|v|^2 - r)) of centred codes of length 1."""
    unit = F.normalize(streams(60, 96), dim=-1)
    unit[40:] = unit[:20]
    held = vectors(encoded(unit[None], 4, learns=False))
    scores, kinds = torch.linspace(1, 0.1, 60)[None], torch.full((1, 60), 2, dtype=torch.int8)
    found = measure(held, kinds, scores, rounding=ROUNDING)[0]
    assert float(found[40:].max()) == pytest.approx(FLOOR)
    rows = F.normalize(held[0].double(), dim=-1)
    rows = rows - rows.mean(0)
    lengths = rows.norm(dim=-1)
    rows = rows / torch.maximum(lengths**2 - ROUNDING, lengths**2 / 4).sqrt()[:, None]
    later = torch.ones(60, 60, dtype=torch.bool).triu()
    best = (rows @ rows.T).masked_fill(later, -1.0).amax(dim=1)
    torch.testing.assert_close(found.double(), (1 - best).clamp_min(FLOOR), rtol=1e-4, atol=1e-5)


def test_a_sketch_of_4_bits_is_smaller_and_nearer_to_the_exact_cosine_than_one_of_16() -> None:
    states, errors, sizes = streams(200, 1024), {}, {}
    scores, kinds = torch.linspace(1, 0.1, 200)[None], torch.full((1, 200), 2, dtype=torch.int8)
    exact = uncovered_values(states[None], kinds, scores)
    for bits, feature in SKETCH.items():
        held = encoded(F.normalize(states[None] @ sketch(1024, feature), dim=-1), bits, learns=False)
        sizes[bits] = held[0, 0].nbytes
        found = uncovered_values(vectors(held), kinds, scores, rounding=ROUNDING if bits == 4 else 0.0)
        errors[bits] = float((found - exact).square().mean())
    assert sizes == {4: 96, 16: 256}
    assert errors[4] < errors[16], errors
