"""How many kept tokens approximations have in common with what they approximate, per eviction, on three beds.

    python benchmarks/sketches.py text [--texts DIR]...             # facts in prose, SmolLM2-135M, development texts
    python benchmarks/sketches.py recall --root data/recall         # the bundled tiny model
    python benchmarks/sketches.py pictures --root data/pictures     # the assembled base

Sketches of the layer inputs and exact cosines: streams are read under `compared: inputs`; at every eviction each sketch
chooses from the same pool with the same scores. Of a model no wider than a sketch the input itself is compared.

With --strides POLICY, attention of every 2nd, 4th and 8th query and that of all: streams are read under the policy; at
every eviction each stride chooses from the same pool by the importance that it has summed over the stream.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from benchmarks.common import load_config
from benchmarks.kept_tokens import SLOTS, Item, media_items, text_items
from benchmarks.real_lm import bed_of
from omnimem.attention.blocked import Every
from omnimem.backbones import load_backbone
from omnimem.budget import SharedBudget
from omnimem.cli.parser import Parser, run_command
from omnimem.config.policy import policy_options
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy, sketch
from omnimem.pretrained import smollm2
from omnimem.run import write_json
from omnimem.scoring.covered import uncovered_values
from omnimem.selection import select
from omnimem.sketches import ROUNDING, Bits, encoded
from omnimem.streaming.attach import attach
from omnimem.tasks import RecallOptions
from omnimem.view import LayerView

SKETCHES: tuple[tuple[Bits, int], ...] = ((16, 64), (16, 128), (4, 128), (4, 160), (4, 192), (4, 224), (4, 256))
STRIDES = (2, 4, 8)


@final
@dataclass
class Strides:
    """A recorder that chooses with the attention of every s-th query at every eviction."""

    policy: Policy
    same: dict[str, int] = field(default_factory=dict)  # kept tokens in common
    kept: int = 0  # by the attention of all queries
    sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # stride, layer: importance by arrival number

    def __call__(self, layer: int, view: LayerView) -> None:
        """A layer before its eviction."""
        pool, slots = view.pool, self.policy.layer_slots(layer)
        assert slots is not None
        evicts = int((view.modality[0] > 0).sum()) > slots.audio + slots.visual

        def chosen(view: LayerView) -> set[tuple[int, int]]:
            tokens = self.policy.keep(layer, view)
            member = tokens.modality > 0
            return set(zip(member.nonzero()[:, 0].tolist(), tokens.order[member].tolist(), strict=True))

        exact = chosen(view) if evicts else set()
        self.kept += len(exact)
        first = int(pool.order[0, -view.new])
        for stride in STRIDES:
            sums = self.sums.get((stride, layer), pool.importance.new_zeros(len(pool.order), 0))
            sums = torch.nn.functional.pad(sums, (0, int(pool.order.max()) + 1 - sums.shape[1]))
            measured = replace(
                view,
                pool=replace(pool, importance=sums.gather(1, pool.order)),
                measured=None,
                every=Every.drawn(stride, view.new, first, layer),
            )
            self.sums[stride, layer] = sums.scatter(1, pool.order, measured.importance)
            self.same[f"every {stride}"] = self.same.get(f"every {stride}", 0) + len(
                exact & chosen(measured) if evicts else exact
            )


@final
@dataclass
class Comparison:
    """A recorder that chooses with every sketch at every eviction."""

    policy: Any
    same: dict[str, int] = field(default_factory=dict)  # kept tokens in common
    kept: int = 0  # of exact cosines

    def __call__(self, layer: int, view: LayerView) -> None:
        """A layer before its eviction."""
        pool, slots, scorer = view.pool, self.policy.layer_slots(layer), self.policy.scorer
        if int((view.modality > 0).sum()) <= slots.audio + slots.visual:
            return
        inner = scorer.inner(view)

        def chosen(feature: Tensor, rounding: float = 0.0) -> set[int]:
            alone = uncovered_values(feature, view.modality, inner, pool.counts, rounding=rounding)
            scores = inner * (alone / (1 - scorer.above)).clamp(max=1) ** scorer.power
            index = select(scores, view.modality, slots, counts=pool.counts).index[0]
            return set(index[view.modality[0, index] > 0].tolist())

        exact, width = chosen(pool.feature), pool.feature.shape[-1]
        self.kept += len(exact)
        for bits, feature in SKETCHES:
            name, found = f"{bits} bits x {feature}", exact
            if feature < width:
                held = encoded(pool.feature.float() @ sketch(width, feature), bits, learns=False)
                found = chosen(held, ROUNDING if bits == 4 else 0.0)
            self.same[name] = self.same.get(name, 0) + len(found & exact)


def measure(items: Iterable[Item], layers: int, slots: int, strides: str | None = None) -> dict[str, Any]:
    """Agreement in % by sketch, or by stride under a policy."""
    options = PerturbationOptions(compared="inputs") if strides is None else policy_options(strides)
    policy = options.build(SharedBudget().build(layers, slots))
    comparison, streams = (Comparison(policy) if strides is None else Strides(policy)), 0
    for item in items:
        if isinstance(comparison, Strides):
            comparison.sums.clear()
        stream = item.open(policy, recorder=comparison)
        for chunk in item.chunks:
            stream.feed(chunk)
        streams += 1
    agreement = {name: round(100 * same / comparison.kept, 2) for name, same in comparison.same.items()}
    return {"streams": streams, "slots": slots, "agreement": agreement}


@torch.no_grad()
def main(arguments: Sequence[str]) -> None:
    """Measure one bed."""
    given = _parser().parse(arguments)
    slots = given.slots or SLOTS[given.bed]
    if given.bed == "text":
        model, tokenizer = smollm2.load("bfloat16")
        with bed_of(model, tokenizer) as bed:
            items = text_items(bed, given.texts, "development", given.streams)
            found = measure(items, bed.attached.shape.layers, slots, given.strides)
    else:
        run = load_config("tiny.yaml" if given.bed == "recall" else "assembled.yaml", ["data.cache=false"])
        samples = RecallOptions(root=given.root, split=given.split).samples()[: given.streams]
        backbone = load_backbone(run.model)
        with attach(backbone.text_model) as attached:
            items = media_items(run, attached, backbone, samples, given.split)
            found = measure(items, attached.shape.layers, slots, given.strides)
    if given.out:
        write_json(given.out, found)
    print(found)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("bed", choices=list(SLOTS))
    parser.add_argument("--streams", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--slots", type=int, help=f"per layer {SLOTS}")
    parser.add_argument("--strides", metavar="POLICY", help="strides over the queries of this policy, no sketches")
    parser.add_argument("--split", default="calibration", help="of recall streams (%(default)s)")
    parser.add_argument("--root", default="data/recall", metavar="DIR", help="of recall streams (%(default)s)")
    parser.add_argument("--texts", type=Path, action="append", default=[], metavar="DIR", help="unpacked packages")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    return parser


if __name__ == "__main__":
    run_command(main)
