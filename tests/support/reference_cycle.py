"""Rivals that look at all layers, or make new tokens, once more with plain loops; see tests/reference_policies.py."""

import math

from support import reference_policies as loops
from support.reference import AUDIO, TEXT, VISUAL, best, softmax


def stretched(values, places):
    """Linear interpolation, ends to ends."""
    if len(values) == places:
        return list(values)
    found = []
    for n in range(places):
        at = n * (len(values) - 1) / max(1, places - 1)
        low = min(int(at), len(values) - 2)
        found.append(values[low] + (at - low) * (values[low + 1] - values[low]))
    return found


def scaled(values):
    low, high = min(values), max(values)
    return [(value - low) / max(high - low, 1e-9) for value in values]


def hermes_scores(row, band, depth, attention, decay=(20.0, 8.0), recency=(0.75, 0.15)):
    """Of the audio and visual tokens, in order; `attention` are theirs."""
    count = len(row.of(AUDIO, VISUAL))
    k = decay[0] + depth * (decay[1] - decay[0])
    recent = [math.exp(-k * (count - 1 - i) / (count - 1)) for i in range(count)]
    if band == 0:
        return recent
    if band == 2:
        return attention
    weight = recency[0] + depth * (recency[1] - recency[0])
    return [(1 - weight) * a + weight * r for a, r in zip(scaled(attention), scaled(recent), strict=True)]


def hermes_smoothed(scores, bands, weights=(0.1, 0.3, 0.4), recursive=False):
    """[layer][place] from the top down, with the raw or the smoothed scores of the layer above."""
    result = [list(row) for row in scores]
    for layer in range(len(scores) - 2, -1, -1):
        above = stretched((result if recursive else scores)[layer + 1], len(scores[layer]))
        weight = weights[bands[layer]]
        result[layer] = [(1 - weight) * a + weight * b for a, b in zip(scores[layer], above, strict=True)]
    return result


def probe_attention(row, queries, own, causal=True):
    """Mean over query heads and probe tokens of what they pay to each place; own keys [head][token][dim] take part."""
    total = [0.0] * row.count
    for head, asked in enumerate(queries):
        keys = row.keys[head // (len(queries) // len(row.keys))]
        mine = own[head // (len(queries) // len(own))]
        for number, query in enumerate(asked):
            seen = mine[: number + 1] if causal else mine
            weights = softmax([row.scale * loops.dot(query, key) for key in keys + seen])
            for k in range(row.count):
                total[k] += weights[k] / len(queries) / len(asked)
    return total


def lava_scores(row, window, kernel, slots):
    """Of one head: its pairs before the window."""
    places = row.of(AUDIO, VISUAL)
    past = places[: max(0, len(places) - slots)]
    longest = max(math.fsum(abs(x) for x in value) for value in row.values[0])
    heads = [loops.smooth_along([sums[k] for k in past], kernel, "max") for sums in loops.window_attention(row, window)]
    scores = [0.0] * row.count
    for n, k in enumerate(past):
        scores[k] = max(head[n] for head in heads) * longest / window
    return scores, past


def entropy(values):
    total = math.fsum(values)
    shares = [value / total for value in values if value > 0]
    return -math.fsum(share * math.log(share) for share in shares)


def highest_by_head(scores, pasts, count):
    """How many of the `count` highest pairs of a layer each head has."""
    pairs = sorted(((score[k], h, k) for h, (score, past) in enumerate(zip(scores, pasts, strict=True)) for k in past))
    chosen = [h for _, h, _ in pairs[len(pairs) - count :]]
    return [chosen.count(h) for h in range(len(scores))]


def streammem_importance(row, queries):
    """Mean over query heads and probe tokens of the softmax over audio and visual keys alone."""
    places, total = row.of(AUDIO, VISUAL), [0.0] * row.count
    for head, asked in enumerate(queries if places else ()):
        for query in asked:
            for k, weight in loops.attention_row(row, head, query, places).items():
                total[k] += weight / len(queries) / len(asked)
    return total


def streammem_kept(row, importance, slots, frames):
    """Places that stay of one pool beside the text, and how many prototypes are made of the latest frames."""
    places = row.of(AUDIO, VISUAL)
    made = min(frames, slots // 2) if len(places) > slots else 0
    return sorted(row.of(TEXT) + best(importance, places, min(len(places), slots) - made)), made
