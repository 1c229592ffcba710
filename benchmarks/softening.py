"""Tokens kept before and after tuning, on recall streams with decoys: needles by layer and modality.

python benchmarks/softening.py runs/A [runs/B ...] [--streams 64] [--split calibration] [--root DIR ...] [--out DIR]

For each run folder (config.yaml, budget.json, adapter/): every stream is read under the run's budget by the untouched
checkpoint and by the tuned one, selection hard as always in evaluation. The worlds define the meaning of each token:
one visual token per cell and 2 s, one audio token per second. Differences are paired by stream, with 95 % intervals
clustered by stream. The overlap is the share of a layer's kept tokens kept by both: 100 % if tuning changes no
selection. The last column is the share of layers that hold an item: a needle may be lost in many layers and still be
held in some layer. Each --root (data/recall; others by data_prep/synthesize.py with another --seed) adds --streams
streams. Writes softening.json into --out (runs/softening) and prints a table per run.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import load_config
from benchmarks.tables import markdown
from omnimem.backbones import load_backbone
from omnimem.budget import Budget
from omnimem.cli.build import feeder_of, policies_of
from omnimem.cli.parser import Parser, run_command
from omnimem.comparison.statistics import interval, resample
from omnimem.config import ConfigError, RunConfig
from omnimem.data import Sample
from omnimem.memory import Memory
from omnimem.policies.base import Policy
from omnimem.recall.worlds import GRID, TOKEN_SECONDS, World, WorldOptions, draw_world
from omnimem.run import RunFolder, write_json
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import EncodedSample, Feeder, batch_by_layout
from omnimem.tasks import RecallOptions
from omnimem.tokens import Modality
from omnimem.tuning import load_adapter

NEEDLES = ("symbol", "decoy", "word")  # symbols are asked about, decoys are not; one token of each may be enough
ROWS = ("symbols", "symbol tokens", "decoys", "words", "flicker tokens", "background tokens")  # of the printed table
ANY = "any layer"
EACH = "layers that hold one, %"
DRAWS = 2000


@final
@dataclass(frozen=True)
class Token:
    """The content of a token, and the number of its event or utterance."""

    modality: Modality
    kind: str
    needle: int | None = None


def tokens_of(world: World) -> list[Token]:
    """Every audio and visual token of a stream in order of arrival: 16 cells, then two seconds of audio, repeatedly."""
    found = []
    for first in range(0, world.seconds, TOKEN_SECONDS):
        span = range(first, min(first + TOKEN_SECONDS, world.seconds))
        found += [_visual(world, cell, span) for cell in range(GRID * GRID)]
        found += [_audio(world, second) for second in span]
    return found


def _visual(world: World, cell: int, span: range) -> Token:
    """A token of 2 s belongs to a symbol that it shows for at least one second."""
    for number, event in enumerate(world.events):
        if any(second in span and shown == cell for second, shown in zip(event.span, event.cells, strict=True)):
            return Token(Modality.VISUAL, "decoy" if event.utterance is None else "symbol", number)
    if cell == world.logo_cell:
        return Token(Modality.VISUAL, "logo")
    flickers = any(flicker.cell == cell and flicker.at in span for flicker in world.flickers)
    return Token(Modality.VISUAL, "flicker" if flickers else "background")


def _audio(world: World, second: int) -> Token:
    number = next((n for n, utterance in enumerate(world.utterances) if utterance.at == second), None)
    return Token(Modality.AUDIO, "babble" if number is None else "word", number)


def world_of(sample: Sample) -> World:
    """The world behind a stream of the recall task.

    Raises ConfigError when the stream was drawn by other rules than today's.
    """
    world = draw_world(int(sample.meta["seed"]), int(sample.meta["seconds"]), WorldOptions())
    if [question.text for question in sample.questions] != [question.text for question in world.questions]:
        raise ConfigError([f"{sample.origin}: drawn by other rules; make it again with data_prep/synthesize.py"])
    return world


Places = list[frozenset[int]]  # by layer: numbers of the kept audio and visual tokens of a stream


@torch.no_grad()
def places_of(
    attached: StreamedAttention, feeder: Feeder, policy: Policy, batch: Sequence[EncodedSample]
) -> list[Places]:
    """The tokens kept by each layer at the end of each stream of a batch."""
    stream = feeder.stream(attached, policy, batch=len(batch))
    for chunk in feeder.chunks(batch):
        stream.feed(chunk)
    opening = stream.usage.tokens_in[Modality.TEXT]
    return [
        [_held(stream.memory, layer, row, opening) for layer in range(attached.shape.layers)]
        for row in range(len(batch))
    ]


def _held(memory: Memory, layer: int, row: int, opening: int) -> frozenset[int]:
    """Numbers among the audio and visual tokens; all text is before them."""
    tokens = memory.layers[layer]
    return frozenset((tokens.order[row][tokens.modality[row] != Modality.TEXT] - opening).tolist())


def check_layout(attached: StreamedAttention, feeder: Feeder, opened: EncodedSample, tokens: Sequence[Token]) -> None:
    """Raises ConfigError if the checkpoint encodes a stream as other tokens than the worlds define."""
    kinds = torch.cat([chunk.modality[0] for chunk in feeder.chunks([opened])])
    media = kinds[kinds != Modality.TEXT].tolist()
    text_first = not bool((kinds[-len(media) :] == Modality.TEXT).any())
    if media != [token.modality for token in tokens] or not text_first:
        got, expected = f"{len(media)} audio and visual tokens", f"{len(tokens)} (one per cell and 2 s, one per second)"
        raise ConfigError(
            [f"{opened.sample.id}: read as {got}, expected {expected}; give runs of the tiny checkpoint at fps: 1"]
        )


def counts(places: frozenset[int], tokens: Sequence[Token]) -> Counter[str]:
    """Tokens of each kind, and needles with at least one token."""
    found = Counter(f"{tokens[place].kind} tokens" for place in places)
    for kind in NEEDLES:
        found[f"{kind}s"] = len({tokens[place].needle for place in places if tokens[place].kind == kind})
    return found


def overlap(before: frozenset[int], after: frozenset[int], tokens: Sequence[Token], modality: Modality) -> float:
    """Share of the tokens of a modality that both keep."""
    first, second = ({place for place in part if tokens[place].modality == modality} for part in (before, after))
    return len(first & second) / max(len(first), len(second), 1)


@final
@dataclass(frozen=True, kw_only=True)
class Cell:
    """Means per stream before and after tuning, and their difference."""

    before: float
    after: float
    diff: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.before:.1f} -> {self.after:.1f} ({self.diff:+.2f} [{self.low:+.2f}, {self.high:+.2f}])"


def paired(names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Cell:
    """The difference with its 95 % interval over resampled streams."""
    change = np.array(after, dtype=np.float64) - np.array(before, dtype=np.float64)
    drawn = resample(names, draws=DRAWS, seed=0)
    means = drawn.weights @ drawn.sums(names, change)[:, None] / len(names)
    low, high = interval(means, len(names)) if len(names) > 1 else (np.full(1, np.nan), np.full(1, np.nan))
    return Cell(
        before=float(np.mean(before)), after=float(np.mean(after)), diff=float(change.mean()),
        low=float(low[0]), high=float(high[0]),
    )  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class Read:
    """A stream, and the tokens kept of it before and after tuning."""

    name: str
    tokens: Sequence[Token]
    before: Places
    after: Places

    def pairs(self) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
        """Of each layer, and last of all layers together."""
        yield from zip(self.before, self.after, strict=True)
        yield frozenset().union(*self.before), frozenset().union(*self.after)


def read_all(folder: RunFolder, run: RunConfig, samples: Sequence[Sample], size: int) -> Iterator[Read]:
    """Every stream, by the untouched checkpoint and by the run's own."""
    backbone = load_backbone(run.model)
    adapted = load_adapter(backbone.model, folder.adapter)
    feeder = feeder_of(run, backbone)
    policy = policies_of(run, Budget.read(folder.budget))(run.memory.slots_per_layer)
    bar = tqdm(total=len(samples), desc=str(folder.path), unit="stream", disable=None)
    with attach(backbone.text_model) as attached, bar:
        for batch in batch_by_layout((feeder.open(sample) for sample in samples), size):
            tokens = [tokens_of(world_of(opened.sample)) for opened in batch]
            check_layout(attached, feeder, batch[0], tokens[0])
            arms = []
            for adapter in (adapted.disable_adapter(), nullcontext()):
                with adapter:
                    arms.append(places_of(attached, feeder, policy, batch))
            for opened, mine, before, after in zip(batch, tokens, *arms, strict=True):
                yield Read(name=opened.sample.origin, tokens=mine, before=before, after=after)
            bar.update(len(batch))


def summary(reads: Sequence[Read]) -> dict[str, Any]:
    """Means per stream by layer: all tokens, tokens kept before and after, and the overlap."""
    names = [read.name for read in reads]
    layers = [*map(str, range(len(reads[0].before))), ANY]
    kept = [[tuple(counts(part, read.tokens) for part in pair) for pair in read.pairs()] for read in reads]
    everything = [counts(frozenset(range(len(read.tokens))), read.tokens) for read in reads]
    rows: dict[str, dict[str, Any]] = {}
    for what in sorted({name for found in everything for name in found}):
        cells = {
            layer: paired(names, *([row[place][side][what] for row in kept] for side in (0, 1)))
            for place, layer in enumerate(layers)
        }
        there = float(np.mean([found[what] for found in everything]))
        rows[what] = {"there": there, "kept": {layer: asdict(cell) for layer, cell in cells.items()}}
    shares = {
        modality.name.lower(): {
            layer: float(np.mean([overlap(*list(read.pairs())[place], read.tokens, modality) for read in reads]))
            for place, layer in enumerate(layers)
        }
        for modality in (Modality.VISUAL, Modality.AUDIO)
    }
    return {"streams": len(reads), "rows": rows, "overlap": shares}


def in_layers(row: dict[str, Any]) -> str:
    """Before -> after: the share of layers that hold an item of a row, which `any layer` is blind to."""
    shares = [
        float(np.mean([cell[side] for layer, cell in row["kept"].items() if layer != ANY])) / max(row["there"], 1e-9)
        for side in ("before", "after")
    ]
    return " -> ".join(f"{100 * share:.1f}" for share in shares)


def table(found: dict[str, Any]) -> str:
    """Before -> after (difference, its interval) by layer."""
    layers = list(found["overlap"]["visual"])
    titles = [*(layer if layer == ANY else f"layer {layer}" for layer in layers), EACH]
    lines = []
    for what in ROWS:
        row = found["rows"][what]
        cells = [Cell(**row["kept"][layer]) for layer in layers]
        lines.append([f"{what} ({row['there']:.1f})", *map(str, cells), in_layers(row)])
    for modality, shares in found["overlap"].items():
        mean = np.mean([shares[layer] for layer in layers if layer != ANY])
        lines.append([f"same {modality} tokens", *(f"{shares[layer]:.0%}" for layer in layers), f"{mean:.0%}"])
    return markdown(["kept per stream (of)", *titles], lines)


def main(arguments: Sequence[str]) -> None:
    """Read the same streams with every run."""
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders that hold an adapter")
    parser.add_argument("--streams", type=int, default=64, help="per root (%(default)s)")
    parser.add_argument("--split", default="calibration", help="split of the recall task (%(default)s)")
    parser.add_argument("--root", action="append", help="folder of a recall task; may be repeated (data/recall)")
    parser.add_argument("--batch-size", type=int, default=16, help="streams that share a pass (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/softening"))
    given = parser.parse(arguments)
    roots = given.root or ["data/recall"]
    samples = [
        replace(sample, origin=f"{root}:{sample.id}")
        for root in roots
        for sample in RecallOptions(root=root, split=given.split).samples()[: given.streams]
    ]
    found = {}
    for path in given.runs:
        folder = RunFolder(path=path)
        run = load_config(folder.config, [])
        result = summary(list(read_all(folder, run, samples, given.batch_size)))
        selection = run.tuning.selection
        facts = {"model": run.model.path, "slots_per_layer": run.memory.slots_per_layer, "selection": asdict(selection)}
        found[str(path)] = {**facts, **result}
        print(f"\n{path}: {result['streams']} streams of {given.split}, {run.memory.slots_per_layer} slots per layer, "
              f"tuned with {selection.softening} selection, budgets {run.tuning.budgets}")  # fmt: skip
        print(table(result), flush=True)
    shown = {"split": given.split, "roots": roots, "streams": given.streams}
    write_json(given.out / "softening.json", {"settings": shown, "runs": found})
    print(f"\n{json.dumps(shown)} -> {given.out / 'softening.json'}")


if __name__ == "__main__":
    run_command(main)
