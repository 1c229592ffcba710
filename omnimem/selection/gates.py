"""Gates of softened selection: additive attention biases that pass gradient to the scores."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from omnimem.selection.layer_slots import Group

TIE = 1e-4  # standard deviations by which a kept token counts as better than an evicted one of equal score
FAINTEST = -50.0  # lower bound of gates: the weight of a key is 0 there, and float16 would overflow below


def straight_through(
    scores: Float[Tensor, "batch tokens"], group: Group, ranked: Int[Tensor, "batch ranked"], temperature: float
) -> Float[Tensor, "batch kept"]:
    """log(1 + g - stop(g)) of the kept tokens, g = sigmoid((z - tau) / T): 0 in value, with the slope of g (ours).

    z is the score standardised within the group, tau the midpoint between the last kept and the first evicted;
    both are constants.
    """
    threshold, deviation = _scale(scores.detach(), group, ranked)
    kept = scores.gather(1, ranked[:, : group.kept])
    gate = torch.sigmoid((kept - threshold) / deviation / temperature)
    return torch.log1p(gate - gate.detach())


def soft(
    scores: Float[Tensor, "batch tokens"], group: Group, ranked: Int[Tensor, "batch ranked"], temperature: float
) -> Float[Tensor, "batch ranked"]:
    """log sigmoid((z - tau) / T) of the ranked tokens, in value and gradient.

    Mean, deviation and tau are functions of the scores and have gradient too, so that a common shift of all scores
    moves no gate. A tie counts as a distance of TIE, so that gates tend to 0 or minus infinity for any tau.
    """
    threshold, deviation = _scale(scores, group, ranked)
    places = torch.arange(ranked.shape[1], device=scores.device)
    side = torch.where(places < group.kept, TIE, -TIE)
    distance = (scores.gather(1, ranked) - threshold) / deviation + side
    return F.logsigmoid(distance / temperature).clamp_min(FAINTEST)


def _scale(scores: Tensor, group: Group, ranked: Tensor) -> tuple[Tensor, Tensor]:
    """Threshold and standard deviation of the scores of a contested group, [batch, 1] each."""
    weight = group.member.to(scores.dtype)
    mean = (scores * weight).sum(dim=1, keepdim=True) / group.size
    variance = ((scores - mean) ** 2 * weight).sum(dim=1, keepdim=True) / group.size
    border = scores.gather(1, ranked[:, group.kept - 1 : group.kept + 1])
    return border.mean(dim=1, keepdim=True), variance.clamp_min(1e-12).sqrt()
