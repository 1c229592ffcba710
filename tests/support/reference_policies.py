"""The baselines once more, with plain loops in float64, written from their descriptions; every fast path is compared.

A row is what one layer of one stream holds, or one key-value head of it: tokens in order, each a place in lists.
Scores are lists, one number a place; who stays are lists of places, ascending.
"""

import math
from dataclasses import dataclass, replace

from support.reference import AUDIO, FLOOR, TEXT, VISUAL, best, cosine, dot, shares, softmax, uncovered


@dataclass
class Row:
    """The pool of one row: memory, then the chunk."""

    keys: list  # [head][token][dim]
    values: list
    queries: list  # [query head][query][dim], of the chunk
    kinds: list
    order: list
    positions: list  # [token] (time, row, column)
    importance: list
    scale: float
    extent: tuple = ()  # first row, first column, rows and columns of the frames held

    @property
    def count(self):
        return len(self.kinds)

    @property
    def old(self):
        return self.count - len(self.queries[0])

    def of(self, *kinds):
        return [k for k in range(self.count) if self.kinds[k] in kinds]

    def group(self):
        """Query heads a key head."""
        return len(self.queries) // len(self.keys)


@dataclass
class Slots:
    audio: int
    visual: int
    split: bool = True
    lend: bool = True


def contests(row, slots):
    """The groups that compete: (places, how many stay)."""
    if not slots.split:
        places = row.of(AUDIO, VISUAL)
        return [(places, min(len(places), slots.audio + slots.visual))]
    audio, visual = row.of(AUDIO), row.of(VISUAL)
    kept = shares(len(audio), len(visual), slots.audio, slots.visual, slots.lend)
    return [(audio, kept[0]), (visual, kept[1])]


def keep(row, scores, slots):
    chosen = [k for places, count in contests(row, slots) for k in best(scores, places, count)]
    return sorted(row.of(TEXT) + chosen)


def only(row, places):
    """The row with these tokens alone, without queries."""
    pick = lambda values: [values[k] for k in places]  # noqa: E731
    return replace(
        row,
        keys=[pick(head) for head in row.keys],
        values=[pick(head) for head in row.values],
        queries=[[] for _ in row.queries],
        kinds=pick(row.kinds),
        order=pick(row.order),
        positions=pick(row.positions),
        importance=pick(row.importance),
    )


def norm(vector):
    return math.sqrt(dot(vector, vector))


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def attention_row(row, head, query, seen):
    """Softmax of one query of one query head over the places seen: {place: weight}."""
    keys = row.keys[head // row.group()]
    logits = [row.scale * dot(query, keys[k]) for k in seen]
    return dict(zip(seen, softmax(logits), strict=True))


def causal(row, place):
    """Places that the chunk's query number `place` sees."""
    return list(range(row.old + place + 1))


# ---- plain rankings


def value_norm(row, slots, depth):
    return [mean(norm(head[k]) for head in row.values) for k in range(row.count)]


def key_difference(row, slots, depth):
    scores = [0.0] * row.count
    for head in row.keys:
        unit = [[x / norm(key) for x in key] for key in head]
        anchor = [mean(column) for column in zip(*unit, strict=True)]
        for k in range(row.count):
            scores[k] -= cosine(unit[k], anchor) / len(row.keys)
    return scores


def distinct(row, slots, depth, power=0.5, centred=True):
    scores = [max(FLOOR, 1 + score) for score in key_difference(row, slots, depth)]
    held = [[x for head in row.values for x in head[k]] for k in range(row.count)]
    alone = uncovered(held, row.kinds, scores, centred)
    return [score * part**power for score, part in zip(scores, alone, strict=True)]


def farthest_first(row, slots, depth):
    points = [
        [x for part in (row.keys, row.values) for head in part for x in (y / norm(head[k]) for y in head[k])]
        for k in range(row.count)
    ]
    scores = [0.0] * row.count
    for members, kept in contests(row, slots):
        chosen = []
        while len(chosen) < kept:
            far = {
                k: min(
                    (sum((x - y) ** 2 for x, y in zip(points[k], points[j], strict=True)) for j in chosen), default=0
                )
                for k in members
                if k not in chosen
            }
            chosen.append(max(far, key=lambda k: (far[k], k)))
        for place, k in enumerate(chosen):
            scores[k] = float(kept - place)
    return scores


def raised(row, scores, inside):
    top = max(scores) + 1
    return [top if k in inside else scores[k] for k in range(row.count)]


def received(row):
    """Attention mass of this chunk, added to what was carried."""
    total = list(row.importance)
    for head, queries in enumerate(row.queries):
        for place, query in enumerate(queries):
            for k, weight in attention_row(row, head, query, causal(row, place)).items():
                total[k] += weight / len(row.queries)
    return total


def heavy_hitters(row, slots, depth, recent_share=0.5, per_observer=False):
    scores = [max(mass, 1e-6) for mass in received(row)]
    if per_observer:
        scores = [score / (max(row.order) + 1 - row.order[k]) for k, score in enumerate(scores)]
    recent = set()
    for places, count in contests(row, slots):
        recent |= set(places[len(places) - round(recent_share * count) :])
    return raised(row, scores, recent)


def window_queries(row, window):
    """Places in the chunk of the last audio-visual queries; of text where there is nothing else."""
    fresh = list(range(len(row.queries[0])))
    seen = [place for place in fresh if row.kinds[row.old + place] != TEXT]
    return (seen or fresh)[-window:]


def smooth_along(values, kernel, pooling):
    """Windows of `kernel` neighbours with zeros beyond the ends."""
    half, result = kernel // 2, []
    for k in range(len(values)):
        around = [values[j] if 0 <= j < len(values) else 0.0 for j in range(k - half, k + half + 1)]
        result.append(math.fsum(around) / kernel if pooling == "mean" else max(around))
    return result


def window_attention(row, window):
    """[query head][token]: what the window's queries pay to each token, summed."""
    table = []
    for head, queries in enumerate(row.queries):
        sums = [0.0] * row.count
        for place in window_queries(row, window):
            for k, weight in attention_row(row, head, queries[place], causal(row, place)).items():
                sums[k] += weight
        table.append(sums)
    return table


def window_inside(row, slots, window):
    latest = set(row.of(AUDIO, VISUAL)[-window:])
    inside = set()
    for places, count in contests(row, slots):
        mine = [k for k in places if k in latest]
        inside |= set(mine[max(0, len(mine) - count // 2) :])
    return inside


def snapkv(row, slots, depth, window=32, kernel=7, pooling="mean"):
    table = window_attention(row, window)
    sums = [mean(head[k] for head in table) for k in range(row.count)]
    inside = window_inside(row, slots, window)
    scores = [0.0] * row.count
    for places, _ in contests(row, slots):
        outside = [k for k in places if k not in inside]
        for k, value in zip(outside, smooth_along([sums[k] for k in outside], kernel, pooling), strict=True):
            scores[k] = value
    return raised(row, scores, inside)


def sinks_and_window(row, slots, depth, sinks=4):
    first = set()
    for places, count in contests(row, slots):
        first |= set(places[: min(sinks, count // 2)])
    return raised(row, [float(number) for number in row.order], first)


def every_nth(row, slots, depth):
    scores = [0.0] * row.count
    for places, count in contests(row, slots):
        for i in range(count):
            scores[places[math.floor(i * len(places) / count)]] = 1.0
    return scores


def pyramid(layers, total, window, beta, arrived):
    """Real-valued past slots of each layer, and the window; rounding is the caller's."""
    window = min(window, total // layers // 2)
    base = (total - layers * window) / layers
    least, most = base / beta, 2 * base - base / beta
    if most >= arrived - window:
        most = arrived - window
        least = 2 * base - most
    if arrived < 2 * base:
        least = most = base
    return [most - (most - least) * layer / (layers - 1) for layer in range(layers)], window


# ---- InfiniPot-V


def slot_places(row):
    """{place: (frame from the latest, cell)} of visual tokens, frames of p cut from the end; and rows, columns."""
    _, _, rows, columns = row.extent
    size = rows * columns
    table = {}
    for back, k in enumerate(reversed(row.of(VISUAL))):
        table[k] = back // size, size - 1 - back % size
    return table, rows, columns


def true_places(row):
    top, left, rows, columns = row.extent
    times = sorted({row.positions[k][0] for k in row.of(VISUAL)}, reverse=True)
    table = {}
    for k in row.of(VISUAL):
        time, h, w = row.positions[k]
        table[k] = times.index(time), (h - top) * columns + w - left
    return table, rows, columns


def value_pooled(row, places, rows, columns, smoothing, depth):
    norms = value_norm(row, None, depth)
    quarter = min(3, int(4 * depth))
    if smoothing == "none" or quarter == 3:
        return norms
    kernel = (7, 5, 3)[quarter]
    visual = sorted(places)
    result = list(norms)
    if smoothing == "release" and quarter == 2:
        for n, k in enumerate(visual):
            result[k] = mean(norms[j] for j in visual[max(0, n - 1) : n + 2])
        return result
    frames = max(frame for frame, _ in places.values()) + 1
    sizes = (kernel if smoothing == "release" and quarter == 0 else 1, kernel, kernel)
    reach = [
        max(w for w in range(1, wanted + 1, 2) if w <= size) // 2
        for wanted, size in zip(sizes, (frames, rows, columns), strict=True)
    ]

    def box(k):
        frame, cell = places[k]
        return frame, cell // columns, cell % columns

    for k in visual:
        near = [j for j in visual if all(abs(a - b) <= r for a, b, r in zip(box(j), box(k), reach, strict=True))]
        result[k] = mean(norms[j] for j in near)
    return result


def infinipot_v(row, slots, depth, alpha=0.5, recent_share=0.125, grid="true", smoothing="paper", keys=None):
    """`keys` are those on which frames are compared, if not the stored ones."""
    keys = keys or row.keys
    places, rows, columns = (slot_places if grid == "slot" else true_places)(row)
    frames = max(frame for frame, _ in places.values()) + 1
    recent_frames = max(1, round(recent_share * frames))
    recent = {k for k, (frame, _) in places.items() if frame < recent_frames}
    audio = row.of(AUDIO)
    if audio:
        recent |= set(audio[len(audio) - max(1, round(recent_share * len(audio))) :])

    def cell(k):
        return places[k][1] if k in places else "sound"

    tar = [0.0] * row.count
    for k in row.of(AUDIO, VISUAL):
        same = [j for j in recent if cell(j) == cell(k)]
        if same:
            tar[k] = -mean(cosine(head[k], head[j]) for head in keys for j in same)
    scores = value_pooled(row, places, rows, columns, smoothing, depth)
    first = set()
    for members, count in contests(row, slots):
        mine = [k for k in members if k in recent]
        past = [k for k in members if k not in recent]
        first |= set(mine) | set(best(tar, past, max(0, round(alpha * count) - len(mine))))
    return raised(row, scores, first)
