"""Audio-visual budget allocation once more, in plain loops: float64 for shares, fractions where slots are exact."""

import math
from fractions import Fraction


def fractions_of(signals, ratio, temperature, form):
    """[audio, visual] of each layer, parts of the whole memory; released and printed form
    (docs/paper.md, "Budget allocation").
    """
    capacity, rows = [], []
    for layer in range(signals.layers):
        h, h_a, h_v = (row[layer] for row in (signals.entropy.whole, signals.entropy.audio, signals.entropy.visual))
        s, s_a, s_v = (
            row[layer] for row in (signals.similarity.whole, signals.similarity.audio, signals.similarity.visual)
        )
        if form == "printed":
            c, c_a, c_v = h * (1 - s), h_a * (1 - s_a), h_v * (1 - s_v)
        else:
            c = h * math.sqrt(((1 - s_v) + (1 - s_a)) / 2)
            c_a, c_v = h_a * math.sqrt(1 - s_a), h_v * math.sqrt(1 - s_v)
        capacity.append(c)
        rows.append((c_a / (ratio * c_v + c_a), ratio * c_v / (ratio * c_v + c_a)))
    total = sum(math.exp(c / temperature) for c in capacity)
    return [
        [math.exp(c / temperature) / total * w_a, math.exp(c / temperature) / total * w_v]
        for c, (w_a, w_v) in zip(capacity, rows, strict=True)
    ]


def truncated(fractions, slots_per_layer, ratio, low, high):
    """The release's rounding: clip, int(), nothing put back."""
    table = []
    for audio, visual in fractions:
        pool = slots_per_layer * len(fractions)
        bounded_v = min(max(visual * pool, low * slots_per_layer), high * slots_per_layer)
        bounded_a = min(max(audio * pool, low * slots_per_layer / ratio), high * slots_per_layer / ratio)
        table.append([int(bounded_a), int(bounded_v)])
    return table


def apportion(weights, total, low, high):
    """Pin whatever leaves its bounds (the side that leaves them further, first) until nothing does; then largest
    remainder, one slot at a time."""
    weights = [Fraction(weight) for weight in weights]
    parts = [Fraction(0)] * len(weights)
    for i, weight in enumerate(weights):
        if weight == 0:
            parts[i] = Fraction(low[i])
    if sum(high[i] if weights[i] else low[i] for i in range(len(weights))) < total:  # only zero weights have room left
        parts = [Fraction(high[i]) if weights[i] else Fraction(low[i]) for i in range(len(weights))]
        weights = [Fraction(0) if weight else Fraction(1) for weight in weights]
    free = [i for i, weight in enumerate(weights) if weight]
    while free:
        scale = (total - sum(parts[i] for i in range(len(parts)) if i not in free)) / sum(weights[i] for i in free)
        below = [i for i in free if weights[i] * scale < low[i]]
        above = [i for i in free if weights[i] * scale > high[i]]
        if not below and not above:
            for i in free:
                parts[i] = weights[i] * scale
            break
        missing = sum(low[i] - weights[i] * scale for i in below)
        excess = sum(weights[i] * scale - high[i] for i in above)
        for i in below if missing >= excess else above:
            parts[i] = Fraction(low[i] if missing >= excess else high[i])
            free.remove(i)
    counts = [int(part) for part in parts]
    while sum(counts) < total:
        best = max(range(len(parts)), key=lambda i: (parts[i] - counts[i], parts[i], -i))
        counts[best] += 1
    return counts
