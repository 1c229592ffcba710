"""The core's maths once more, with plain loops in float64, written from the formulas; every fast path is compared.

Numbers are python floats in lists; a token is its place in a list. Equations are the paper's, "method" sections those
of the notes on paper and release. One stream, one layer: batches and layers are the caller's loops.
"""

import math
from dataclasses import dataclass, field
from operator import mul

TEXT, AUDIO, VISUAL = 0, 1, 2
FLOOR = 1e-6  # below it, novelty and importance count as equal (exact duplicates)

PRESETS = {
    "paper": {
        "heads": "probabilities",
        "carry": "sum",
        "when": "pool",
        "ends": "present",
        "power": 1.0,
        "lend": True,
        "coverage": 0,
    },
    "released": {
        "heads": "logits",
        "carry": "halve",
        "when": "pool",
        "ends": "one",
        "power": 0.5,
        "lend": False,
        "coverage": 0,
    },
    "omnimem": {
        "heads": "probabilities",
        "carry": "sum",
        "when": "arrival",
        "ends": "present",
        "power": 1.0,
        "lend": True,
        "coverage": 0.5,
        "above": 0.5,
    },
}


def dot(u, v):
    return sum(map(mul, u, v))


def softmax(logits):
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def visible(queries, keys, query_segments=None, key_segments=None):
    """[query][key]: queries stand at the end of the keys; a packed query sees its own segment and the memory (-2)."""
    table = []
    for q in range(queries):
        row = []
        for k in range(keys):
            past = k <= keys - queries + q
            mine = query_segments is None or key_segments[k] == -2 or key_segments[k] == query_segments[q]
            row.append(past and mine)
        table.append(row)
    return table


def attention(queries, keys, values, scale, seen, gate=None):
    """Output [head][query][dim] and weights [head][query][key] of softmax(scale q k + gate) over the keys seen."""
    group = len(queries) // len(keys)
    outputs, weights = [], []
    for h, rows in enumerate(queries):
        outputs.append([])
        weights.append([])
        for q, query in enumerate(rows):
            places = [k for k in range(len(keys[0])) if seen[q][k]]
            logits = [scale * dot(query, keys[h // group][k]) + (gate[k] if gate else 0.0) for k in places]
            row = [0.0] * len(keys[0])
            for k, weight in zip(places, softmax(logits), strict=True):
                row[k] = weight
            weights[-1].append(row)
            dim = len(values[0][0])
            outputs[-1].append([math.fsum(row[k] * values[h // group][k][d] for k in places) for d in range(dim)])
    return outputs, weights


def mass(queries, keys, scale, heads, gate=None, asked=None):
    """a_k = sum over the queries (or those `asked`) of A_qk (eq. 8): A the mean over heads of softmaxes, or one softmax
    of the logits' mean over heads (docs/paper.md, "Scores")."""
    count, total, group = len(queries[0]), len(keys[0]), len(queries) // len(keys)
    received = [0.0] * total
    for q in range(count) if asked is None else asked:
        places = range(total - count + q + 1)
        rows = [
            [scale * dot(queries[h][q], keys[h // group][k]) + (gate[k] if gate else 0.0) for k in places]
            for h in range(len(queries))
        ]
        if heads == "logits":
            rows = [[math.fsum(row[k] for row in rows) / len(rows) for k in places]]
        for row in rows:
            for k, weight in zip(places, softmax(row), strict=True):
                received[k] += weight / len(rows)
    return received


def cosine(u, v):
    length = math.sqrt(dot(u, u)) * math.sqrt(dot(v, v))
    return dot(u, v) / length if length > 0 else 0.0


def similarity(features, modality, of, ends):
    """s_k: mean cosine to the tokens before and after (eq. 9); a missing one counts as 1 or not at all
    (docs/paper.md, "Neighbours and edges").
    """
    result = []
    for k in range(len(features)):
        alike = [j for j in range(len(features)) if of == "sequence" or modality[j] == modality[k]]
        place = alike.index(k)
        cosines = []
        for other in (place - 1, place + 1):
            if 0 <= other < len(alike):
                cosines.append(cosine(features[k], features[alike[other]]))
            elif ends == "one":
                cosines.append(1.0)
        result.append(sum(cosines) / len(cosines) if cosines else 0.0)
    return result


def psi(importance, novelty, sharpness, power):
    """psi = a^lambda (1 - s)^gamma (eq. 10; gamma 1/2 in the release)."""
    return max(importance, FLOOR) ** sharpness * max(novelty, FLOOR) ** power


def uncovered(features, modality, scores, centred):
    """1 - largest cosine to a token of its modality that scores higher, or equally and came later; 2 without one."""
    count, found = len(scores), [1.0] * len(scores)
    for kind in (1, 2):
        members = [k for k in range(count) if modality[k] == kind]
        units = {k: [x / math.sqrt(dot(features[k], features[k])) for x in features[k]] for k in members}
        if centred:
            mean = [sum(column) / len(members) for column in zip(*units.values(), strict=True)]
            units = {k: [x - m for x, m in zip(unit, mean, strict=True)] for k, unit in units.items()}
        for k in members:
            better = [j for j in members if (scores[j], j) > (scores[k], k)]
            found[k] = max(FLOOR, 1 - max((cosine(units[k], units[j]) for j in better), default=-1.0))
    return found


def best(scores, members, count):
    """The `count` members with the highest scores; of equal ones the latest."""
    ranked = sorted(members, key=lambda k: (scores[k], k), reverse=True)
    return ranked[:count]


def shares(audio, visual, audio_slots, visual_slots, lend):
    """How many of each stay: its slots, and with `lend` what the other one cannot fill."""
    keep_audio, keep_visual = min(audio, audio_slots), min(visual, visual_slots)
    while lend and keep_audio + keep_visual < audio_slots + visual_slots:
        if keep_audio < audio:
            keep_audio += 1
        elif keep_visual < visual:
            keep_visual += 1
        else:
            break
    return keep_audio, keep_visual


def select(scores, modality, audio_slots, visual_slots, split=True, lend=True):
    """Places that stay, in order: all text, and the highest scores of each modality, or of both together."""
    of = {kind: [k for k in range(len(scores)) if modality[k] == kind] for kind in (TEXT, AUDIO, VISUAL)}
    if split:
        audio, visual = shares(len(of[AUDIO]), len(of[VISUAL]), audio_slots, visual_slots, lend)
        chosen = best(scores, of[AUDIO], audio) + best(scores, of[VISUAL], visual)
    else:
        chosen = best(scores, sorted(of[AUDIO] + of[VISUAL]), audio_slots + visual_slots)
    return sorted(of[TEXT] + chosen)


def gate_slopes(scores, kept, temperature, step=1e-6):
    """d gate_k / d score_k of the straight-through gate of the kept places, by finite differences.

    gate = log(1 + g - g0), g = sigmoid((score - tau) / (T deviation)); tau (midway between the last kept and the first
    dropped score), the deviation of all that compete and g0 (g itself, so that the gate is 0) are held fixed.
    """
    mean = math.fsum(scores) / len(scores)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    dropped = [scores[k] for k in range(len(scores)) if k not in kept]
    threshold = (min(scores[k] for k in kept) + max(dropped)) / 2

    def g(score):
        return 1 / (1 + math.exp(-(score - threshold) / deviation / temperature))

    slopes = []
    for k in kept:
        gates = [math.log(1 + g(scores[k] + side * step * deviation) - g(scores[k])) for side in (1, -1)]
        slopes.append((gates[0] - gates[1]) / (2 * step * deviation))
    return slopes


@dataclass
class Layer:
    """What one layer remembers of one stream, token by token in order of arrival, under a preset."""

    preset: str
    audio_slots: int
    visual_slots: int
    split: bool = True
    sharpness: float = 0.02
    of: str = "sequence"
    arrived: int = 0
    order: list = field(default_factory=list)
    keys: list = field(default_factory=list)  # [kv head][token][dim]
    features: list = field(default_factory=list)
    modality: list = field(default_factory=list)
    importance: list = field(default_factory=list)
    novelty: list = field(default_factory=list)
    gates: list = field(default_factory=list)  # 0 where selection is hard

    def read(self, queries, keys, features, modality, scale):
        """Append a chunk, judge the pool, evict, in one layer (docs/paper.md, "Eviction cycle")."""
        rule = PRESETS[self.preset]
        old, new = len(self.order), len(modality)
        self.order = self.order + [self.arrived + k for k in range(new)]
        self.arrived += new
        before = self.keys or [[] for _ in keys]
        self.keys = [past + fresh for past, fresh in zip(before, keys, strict=True)]
        self.features = self.features + features
        self.modality = self.modality + modality

        self.gates = self.gates + [0.0] * new
        received = mass(queries, self.keys, scale, rule["heads"], self.gates)
        part = 0.5 if rule["carry"] == "halve" else 1.0
        self.importance = [part * (self.importance[k] + received[k]) for k in range(old)] + received[old:]

        if rule["when"] == "pool":
            self.novelty = [1 - s for s in similarity(self.features, self.modality, self.of, rule["ends"])]
        else:
            self.novelty = self.novelty + [1 - s for s in similarity(features, modality, self.of, rule["ends"])]

        scores = [psi(a, n, self.sharpness, rule["power"]) for a, n in zip(self.importance, self.novelty, strict=True)]
        if rule["coverage"]:
            alone = uncovered(self.features, self.modality, scores, centred=True)
            parts = [min(1.0, part / (1 - rule["above"])) for part in alone]
            scores = [score * part ** rule["coverage"] for score, part in zip(scores, parts, strict=True)]
        kept = self.chosen(scores, rule["lend"])
        self.keys = [[head[k] for k in kept] for head in self.keys]
        for name in ("order", "features", "modality", "importance", "novelty", "gates"):
            rows = getattr(self, name)
            setattr(self, name, [rows[k] for k in kept])

    def chosen(self, scores, lend):
        return select(scores, self.modality, self.audio_slots, self.visual_slots, self.split, lend)


# ------------------------------------------------------------------------------------- softened selection, soft form


def surplus(kept, temperature):
    """Near-threshold tokens that stay beside `kept`: twice as many from T = 0.2 on, below in proportion to T."""
    return math.floor(2 * kept * min(1.0, temperature / 0.2))


def soft_gates(scores, ranked, kept, temperature):
    """log sigmoid((z - tau) / T) of the ranked places: z standardised over all of them, tau between the last that hard
    selection keeps and the first that it drops; a tie counts as 1e-4 deviations, and no gate is below -50."""
    mean = math.fsum(scores[k] for k in ranked) / len(ranked)
    deviation = max(math.sqrt(math.fsum((scores[k] - mean) ** 2 for k in ranked) / len(ranked)), 1e-6)
    tau = (scores[ranked[kept - 1]] + scores[ranked[kept]]) / 2
    gates = []
    for place, k in enumerate(ranked):
        distance = (scores[k] - tau) / deviation + (1e-4 if place < kept else -1e-4)
        x = distance / temperature
        gates.append(max(-50.0, min(x, 0.0) - math.log1p(math.exp(-abs(x)))))
    return gates


def soft_select(scores, modality, audio_slots, visual_slots, temperature, carried, split=True, lend=True):
    """{place: gate} of what stays: text, and of each group what hard selection keeps and those next to it."""
    of = {kind: [k for k in range(len(scores)) if modality[k] == kind] for kind in (TEXT, AUDIO, VISUAL)}
    if split:
        counts = shares(len(of[AUDIO]), len(of[VISUAL]), audio_slots, visual_slots, lend)
        groups = list(zip((of[AUDIO], of[VISUAL]), counts, strict=True))
    else:
        both = sorted(of[AUDIO] + of[VISUAL])
        groups = [(both, min(len(both), audio_slots + visual_slots))]
    stay = {k: carried[k] for k in of[TEXT]}
    for members, kept in groups:
        ranked = best(scores, members, len(members))
        if kept in (0, len(members)):
            stay.update({k: carried[k] for k in ranked[:kept]})
            continue
        gates = soft_gates(scores, ranked, kept, temperature)
        count = kept + surplus(kept, temperature)
        stay.update(dict(list(zip(ranked, gates, strict=True))[:count]))
    return dict(sorted(stay.items()))


@dataclass
class SoftLayer(Layer):
    """A layer whose selection is softened: gates are recomputed at every eviction of a group."""

    temperature: float = 1.0

    def chosen(self, scores, lend):
        gates = soft_select(
            *(scores, self.modality, self.audio_slots, self.visual_slots, self.temperature, self.gates),
            split=self.split,
            lend=lend,
        )
        for k, gate in gates.items():
            self.gates[k] = gate
        return list(gates)
