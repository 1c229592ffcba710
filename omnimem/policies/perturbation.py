"""OmniMem's policy: ours, as printed in the paper, and as released."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, final

from omnimem.attention.blocked import HeadMean
from omnimem.budget import Budget
from omnimem.policies.base import Markers, ScoredPolicy
from omnimem.scoring import Compared, Covered, Perturbation
from omnimem.sketches import Bits
from omnimem.view import Measures

SKETCH: dict[Bits, int] = {2: 256, 4: 192, 16: 128}  # width of a sketch of layer inputs, by its bits per number

PAPER: dict[str, Any] = {
    "sharpness": 0.02,
    "novelty_power": 1.0,
    "heads": "probabilities",
    "carry": "sum",
    "neighbours": "pool",
    "of": "sequence",
    "ends": "present",
    "feature": None,
    "coverage": 0.0,
    "coverage_above": 0.5,
    "centred": True,
    "compared": "inputs",
    "sketch_bits": 2,
    "query_stride": 1,
    "markers": "keep",
}
RELEASED: dict[str, Any] = {**PAPER, "novelty_power": 0.5, "heads": "logits", "carry": "halve", "ends": "one"}
OURS: dict[str, Any] = {
    **PAPER,
    "neighbours": "arrival",
    "coverage": 0.5,
    "compared": "sketch",
    "markers": "with_group",
}
PRESETS: dict[str, dict[str, Any]] = {"omnimem": OURS, "paper": PAPER, "released": RELEASED}


@final
@dataclass(frozen=True, kw_only=True)
class PerturbationOptions:
    """`name` chooses a preset; every other field replaces the preset's value.

    paper     eqs. 8-10 as printed: softmax per head, masses summed over chunks, (1 - s) to the power 1
    released  as in the authors' code: one softmax of head-averaged logits, halving across chunks, sqrt(1 - s), cosine 1
              for a missing neighbour, no lending (docs/paper.md, "Differences between paper and release")
    omnimem   ours: the printed score with redundancy measured once, at arrival, so that copies of one event do not
              become neighbours in the pool and are evicted together; copies of a better token are discounted
              (`coverage`: the power beta of 1 - c; `coverage_above`: from which c on; `centred`: scoring/covered.py),
              so that one copy is kept, not three; a group's timestamp stays while one of its tokens does (`markers:
              with_group`)
    """

    name: Literal["omnimem", "paper", "released"] = "omnimem"
    sharpness: float | None = None  # lambda, the power of the attention mass
    novelty_power: float | None = None  # gamma, the power of 1 - s
    heads: HeadMean | None = None  # attention of heads: mean of softmaxes, or softmax of mean logits
    carry: Literal["sum", "halve"] | None = None  # masses of earlier chunks
    # of which redundancy is the mean cosine: in the pool, or at arrival
    neighbours: Literal["pool", "arrival"] | None = None
    of: Literal["sequence", "modality"] | None = None  # whether neighbours are of any modality or the same
    ends: Literal["present", "one"] | None = None  # a missing neighbour: left out, or counted with cosine 1
    # width of a projection of the layer input that is carried: of the sketch (null: 256; of 4 bits 192, of 16 128), or
    # of what redundancy reads (null: all)
    feature: int | None = None
    coverage: float | None = None  # beta, the power of 1 - c
    coverage_above: float | None = None  # t: tokens are discounted where c is above it; -1: all
    centred: bool | None = None  # c between vectors without the mean of their modality
    # vectors of the cosine c: the layer's input, as redundancy reads it; an orthonormal projection of it
    # (sketch_bits); or the values of all heads. But for inputs nothing else is carried, and redundancy at arrival reads
    # the exact input
    compared: Compared | None = None
    sketch_bits: Bits | None = None  # per number of the sketch
    # s: the attention mass is estimated from every s-th query of a chunk, without bias; 1: measured from all
    query_stride: int | None = None
    markers: Markers | None = None  # timestamps and other text of a stream: all stays, or that of kept groups

    def __post_init__(self) -> None:
        for name, least in (
            ("sharpness", 0),
            ("novelty_power", 0),
            ("coverage", 0),
            ("feature", 1),
            ("query_stride", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"policy.{name} = {value:g} must be at least {least}")
        if self.sharpness == 0 and (self.query_stride or 1) != 1:
            raise ValueError(
                f"policy.query_stride = {self.query_stride} has no effect with sharpness = 0, which measures no "
                "attention; leave out one of them"
            )
        if self.compared == "sketch" and (self.neighbours or PRESETS[self.name]["neighbours"]) == "pool":
            raise ValueError(
                "policy.compared = sketch needs neighbours = arrival: redundancy in the pool reads the layer inputs; "
                "set neighbours to arrival, or compared to inputs"
            )
        chosen = self._chosen()
        if chosen["compared"] == "sketch" and chosen["sketch_bits"] == 2 and (chosen["feature"] or 0) % 4:
            raise ValueError(
                f"policy.feature = {chosen['feature']} must be a multiple of 4, as a byte holds 4 numbers of a sketch "
                "of 2 bits; or set sketch_bits to 4"
            )
        if chosen["compared"] == "sketch" and chosen["sketch_bits"] == 2 and not chosen["centred"]:
            raise ValueError(
                "policy.centred = false compares directions, and a sketch of 2 bits holds differences from a mean "
                "direction; set sketch_bits to 4, or leave centred out"
            )
        if self.coverage_above is not None and not -1 <= self.coverage_above < 1:
            raise ValueError(f"policy.coverage_above = {self.coverage_above:g} must be a cosine from -1 to below 1")

    def _chosen(self) -> dict[str, Any]:
        given = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        preset = dict(PRESETS[self.name])
        if given.get("neighbours", preset["neighbours"]) == "pool":  # which reads the layer inputs of all tokens
            preset["compared"] = "inputs"
        if given.get("compared", preset["compared"]) == "sketch" and given.get("feature") is None:
            preset["feature"] = SKETCH[given.get("sketch_bits", preset["sketch_bits"])]
        return {**preset, **given}

    def written_out(self) -> "PerturbationOptions":
        """The same options with all values of the preset written out, independent of later changes of the preset."""
        return replace(self, **self._chosen())

    def build(self, budget: Budget | None) -> ScoredPolicy:
        """The policy at a budget; None: full memory."""
        if budget is not None and self.name == "released":
            budget = replace(budget, lend=False)
        chosen = self._chosen()
        measured = {field.name: chosen[field.name] for field in fields(Measures) if field.name in chosen}
        if chosen["neighbours"] == "arrival" and chosen["compared"] != "inputs":  # only coverage needs what is carried
            sketched = chosen["compared"] == "sketch" and chosen["coverage"]
            bits, width = (chosen["sketch_bits"], chosen["feature"]) if sketched else (16, 0)  # codes need a length
            measured |= {"sketch": bits, "feature": width}
        scorer = Perturbation(sharpness=chosen["sharpness"], novelty_power=chosen["novelty_power"])
        return ScoredPolicy(
            name=self.name,
            scorer=_covered(scorer, chosen) if chosen["coverage"] else scorer,
            budget=budget,
            measures=Measures(**measured),
            markers=chosen["markers"],
        )


def _covered(scorer: Perturbation, chosen: dict[str, Any]) -> Covered:
    names = {"power": "coverage", "above": "coverage_above", "centred": "centred", "compared": "compared"}
    return Covered(inner=scorer, **{field: chosen[name] for field, name in names.items()})
