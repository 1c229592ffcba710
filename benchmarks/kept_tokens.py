"""Which tokens scores rank high and policies keep, on three unlike streams, training-free.

    python benchmarks/kept_tokens.py text [--texts DIR] [--streams 8]           # facts in prose, SmolLM2-135M
    python benchmarks/kept_tokens.py recall --root data/recall                   # the bundled tiny model
    python benchmarks/kept_tokens.py pictures --root data/pictures               # the assembled base

Two tables. Ranks: the mean rank of a kind of token among the tokens of its modality that arrived with the same chunk,
0 to 1 (0.5: no preference), by each part of the scores, with full memory; attention is also that of all chunks, of the
last one, and of the questions, which no policy sees, among all tokens of the modality. Kept: the share of a kind that a
policy holds at the end, mean over layers and heads, one pool of equal layers. Development texts and calibration streams
unless --split says otherwise. Writes kept_tokens_BED.json into --out.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, final

import torch
from torch import Tensor

from benchmarks.common import load_config
from benchmarks.needles import needles
from benchmarks.real_lm import ARMS, Bed, bed_of
from benchmarks.real_texts import texts
from benchmarks.softening import tokens_of, world_of
from benchmarks.studies import POLICIES
from benchmarks.tables import markdown
from omnimem.backbones import load_backbone
from omnimem.backbones.base import Turn
from omnimem.budget import SharedBudget
from omnimem.cli.build import feeder_of
from omnimem.cli.parser import Parser, run_command
from omnimem.commands.synthesize import MEDIA
from omnimem.data import Sample
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.pretrained import smollm2
from omnimem.recall.pictures import STEP, PictureWorld, draw_pictures
from omnimem.run import write_json
from omnimem.scoring import KeyDifference
from omnimem.scoring.covered import uncovered
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.stream import Stream
from omnimem.tasks import RecallOptions
from omnimem.tokens import Chunk, Modality
from omnimem.view import LayerView

Labels = Mapping[str, Sequence[bool]]  # kind of token: which of the stream's evictable tokens are of it
KEPT = ("omnimem", "psi", "paper", "distinct", "keydiff", "k_center", "value_norm", "h2o", "snapkv", "random")
TOKENS, SLOTS = {"text": 1024}, {"text": 256, "recall": 36, "pictures": 48}
FREQUENT = 8  # occurrences in a stream of a frequent token


@final
@dataclass(frozen=True, kw_only=True)
class Item:
    """A stream: chunks, what each of its evictable tokens is, and the ids of its questions."""

    chunks: Sequence[Chunk]
    labels: Labels
    questions: Sequence[Tensor]
    open: Any  # policy to empty stream


@final
@dataclass
class Observer:
    """A recorder that ranks the new tokens of every chunk by each part of the scores, and sums attention."""

    ranks: dict[str, dict[int, list[float]]] = field(default_factory=dict)  # score: token: rank per layer
    mass: dict[int, Tensor] = field(default_factory=dict)  # layer: attention of all chunks on each token
    latest: dict[int, Tensor] = field(default_factory=dict)  # layer: attention of the last chunk
    asking: dict[int, Tensor] | None = None  # layer: attention of questions; None while the stream is read

    def __call__(self, layer: int, view: LayerView) -> None:
        """A layer after a chunk, or after a question that was fed as text."""
        if self.asking is not None:
            kept = view.pool.count - view.new
            self.asking[layer] = self.asking.get(layer, torch.zeros(kept)) + view.mass[0, :kept]
            return
        before = self.mass.get(layer, view.mass.new_zeros(1, 0))
        self.latest[layer] = view.mass
        self.mass[layer] = view.mass + torch.nn.functional.pad(before, (0, view.pool.count - before.shape[1]))
        keys = KeyDifference()(view)
        values = view.pool.values.transpose(1, 2).flatten(2)
        scores = {
            "1 - s: unlike its neighbours": view.novelty,
            "1 - cos(key, mean key)": keys,
            "1 - c of values (distinct)": uncovered(values, view.modality, keys),
            "1 - c of inputs (omnimem)": uncovered(view.pool.feature, view.modality, view.novelty),
            "norm of values": view.pool.values.float().norm(dim=-1).mean(1),
            "attention of its own chunk": view.mass,
        }
        for name, score in scores.items():
            self.note(name, view, score, slice(view.pool.count - view.new, None))

    def note(self, name: str, view: Any, score: Tensor, part: slice) -> None:
        """Ranks of the evictable tokens of a part of the pool, by modality."""
        kinds, order, found = view.modality[0, part], view.order[0, part], score[0, part]
        for kind in (Modality.AUDIO, Modality.VISUAL):
            member = (kinds == kind).nonzero()[:, 0]
            if len(member) > 1:
                place = found[member].argsort().argsort().float() / (len(member) - 1)
                table = self.ranks.setdefault(name, {})
                for token, rank in zip(order[member].tolist(), place.tolist(), strict=True):
                    table.setdefault(token, []).append(rank)


def ranks_of(attached: StreamedAttention, item: Item) -> dict[str, dict[str, float]]:
    """Mean rank of each kind of token by each score."""
    # 1. read the stream, then every question on a fork
    observer = Observer()
    stream: Stream = item.open(PerturbationOptions(compared="inputs").build(None), recorder=observer)
    arrived: list[int] = []
    for number, chunk in enumerate(item.chunks):
        stream.feed(chunk)
        arrived += [number] * chunk.count
    observer.asking = {}
    for ids in item.questions:
        stream.fork().feed(as_text(attached, ids, stream.next_position))
    # 2. attention of all chunks among tokens of one chunk and among all, of the last chunk and of questions among all
    for layer, tokens in enumerate(stream.memory.layers):
        for number in range(len(item.chunks)):
            first, last = arrived.index(number), len(arrived) - arrived[::-1].index(number)
            observer.note("attention of all chunks", tokens, observer.mass[layer], slice(first, last))
        observer.note("attention of all chunks, among all tokens", tokens, observer.mass[layer], slice(None))
        observer.note("attention of the last chunk, among all tokens", tokens, observer.latest[layer], slice(None))
        observer.note("attention of the questions, among all tokens", tokens, observer.asking[layer][None], slice(None))
    # 3. means
    opening = stream.usage.tokens_in[Modality.TEXT]
    by_score = {name: {token - opening: fmean(each) for token, each in t.items()} for name, t in observer.ranks.items()}
    return {name: means(table, item.labels) for name, table in by_score.items()}


def as_text(attached: StreamedAttention, ids: Tensor, first: int) -> Chunk:
    """A question as a chunk of text."""
    places = torch.arange(first, first + len(ids)).expand(1, 3, -1)
    return Chunk(
        embeddings=attached.embed(ids[None]), positions=places, modality=torch.zeros(1, len(ids)).to(torch.int8)
    )


def kept_by(policy: Policy, item: Item) -> dict[str, float]:
    """The share of each kind of token that is held at the end of the stream."""
    stream: Stream = item.open(policy)
    for chunk in item.chunks:
        stream.feed(chunk)
    opening, count = stream.usage.tokens_in[Modality.TEXT], sum(stream.usage.tokens_in)
    held = torch.zeros(count)
    for layer in stream.memory.layers:
        held += torch.bincount(layer.order[0][layer.modality[0] > 0], minlength=count) / layer.heads
    held /= len(stream.memory.layers)
    return means(dict(enumerate(held[opening:].tolist())), item.labels)


def means(values: Mapping[int, float], labels: Labels) -> dict[str, float]:
    """Mean over the tokens of each kind."""
    found = {}
    for name, members in labels.items():
        there = [values[token] for token, member in enumerate(members) if member and token in values]
        if there:
            found[name] = fmean(there)
    return found


def text_items(bed: Bed, folders: Sequence[Path], split: Any, count: int) -> Iterator[Item]:
    """Ten facts in prose."""
    tokenizer, feeder = bed.tokenizer, bed.feeders[True]
    for text in texts(split, folders)[:count]:
        episode = needles(tokenizer, text.prose, split, TOKENS["text"], f"needles-1024 {text.file}")
        chunks = list(feeder.chunks([episode.sample()]))
        yield Item(
            chunks=chunks,
            labels=with_age(text_labels(tokenizer, episode), chunks),
            questions=[torch.tensor(question.ids) for question in episode.questions],
            open=lambda policy, **settings: feeder.stream(bed.attached, policy, **settings),
        )


def with_age(labels: dict[str, list[bool]], chunks: Sequence[Chunk]) -> dict[str, list[bool]]:
    """The kinds, and the tokens of the first and of the last chunk, whatever they are."""
    numbers = [n for n, chunk in enumerate(chunks) for kind in chunk.modality[0].tolist() if kind != Modality.TEXT]
    ends = {"first chunk": min(numbers), "last chunk": max(numbers)}
    return labels | {name: [number == end for number in numbers] for name, end in ends.items()}


def text_labels(tokenizer: Any, episode: Any) -> dict[str, list[bool]]:
    """Kinds of tokens of a text stream; those of prose overlap."""
    ids, values = episode.ids, {question.value for question in episode.questions}
    inside = {place for question in episode.questions for place in range(*question.fact)}
    pieces = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    counts, seen = Counter(ids), set()
    first = [not (i in seen or seen.add(i)) for i in ids]
    prose = [place not in inside for place in range(len(ids))]
    word = [any(letter.isalpha() for letter in piece) for piece in pieces]
    tests = {
        "first occurrence": first,
        "repeated": [not each for each in first],
        "once in the stream": [counts[i] == 1 for i in ids],
        f"{FREQUENT} times or more": [counts[i] >= FREQUENT for i in ids],
        "punctuation": [not each for each in word],
        "inside a word": [w and not piece.startswith("Ġ") for w, piece in zip(word, pieces, strict=True)],
    }
    return {
        "value of a fact": [place in values for place in range(len(ids))],
        "rest of a fact": [place in inside and place not in values for place in range(len(ids))],
        "prose": prose,
        **{f"prose: {name}": [a and b for a, b in zip(prose, test, strict=True)] for name, test in tests.items()},
    }


def media_items(run: Any, attached: StreamedAttention, backbone: Any, samples: Sequence[Sample], split: str) -> Any:
    """Streams of a recall task."""
    feeder = feeder_of(run, backbone)
    for sample in samples:
        opened = feeder.open(sample)
        asked = [feeder.prompt([[Turn(text=each.text)]], opened.tracks).ids[0] for each in sample.questions]
        chunks = list(feeder.chunks([opened]))
        yield Item(
            chunks=chunks,
            labels=with_age(media_labels(sample, split, pictures=run.name == "assembled"), chunks),
            questions=asked,
            open=lambda policy, **settings: feeder.stream(attached, policy, **settings),
        )


def media_labels(sample: Sample, split: str, *, pictures: bool) -> dict[str, list[bool]]:
    """Kinds of tokens of a rendered stream: four cells (or sixteen) of two seconds, then two seconds of audio."""
    if pictures:
        world = draw_pictures(int(sample.meta["seed"]), int(sample.meta["seconds"]), MEDIA[split])
        kinds = list(picture_kinds(world))
    else:
        kinds = [token.kind for token in tokens_of(world_of(sample))]
    return {name: [kind == name for kind in kinds] for name in dict.fromkeys(sorted(kinds))}


def picture_kinds(world: PictureWorld) -> Iterator[str]:
    """Each token of a stream of pictures and words."""
    for scene in world.scenes:
        said = {word.at for word in scene.words}
        for at in range(scene.start, scene.start + scene.seconds, STEP):
            yield from ("picture" if scene.picture and cell == scene.corner else "texture" for cell in range(4))
            yield from ("word" if second in said else "noise" for second in (at, at + 1))


def measure(attached: StreamedAttention, items: Iterator[Item], slots: int) -> dict[str, Any]:
    """Both tables, means over streams."""
    layers = attached.shape.layers
    policies = {arm: POLICIES[ARMS[arm]].policy.build(SharedBudget().build(layers, slots)) for arm in KEPT}
    ranks, kept, shares, streams = [], {arm: [] for arm in policies}, [], 0
    for item in items:
        ranks.append(ranks_of(attached, item))
        for arm, policy in policies.items():
            kept[arm].append(kept_by(policy, item))
        shares.append({name: fmean(map(float, members)) for name, members in item.labels.items()})
        streams += 1
        print(f"{streams} streams", flush=True)
    return {
        "streams": streams,
        "slots": slots,
        "tokens": joined(shares),
        "rank": {name: joined([each[name] for each in ranks]) for name in ranks[0]},
        "kept": {arm: joined(each) for arm, each in kept.items()},
    }


def joined(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each kind over the streams that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: fmean(row[name] for row in rows if name in row) for name in names}


def shown(found: Mapping[str, Any]) -> str:
    """The two tables as text, in %."""
    kinds = list(found["tokens"])
    rows = [["share of the tokens", *(f"{100 * found['tokens'][kind]:.0f}" for kind in kinds)]]
    for part, title in (("rank", ""), ("kept", "kept by ")):
        for name, row in found[part].items():
            rows.append([f"{title}{name}", *(f"{100 * row[kind]:.0f}" if kind in row else "" for kind in kinds)])
    return markdown([f"{found['streams']} streams, {found['slots']} slots", *kinds], rows)


@torch.no_grad()
def main(arguments: Sequence[str]) -> None:
    """Measure one bed."""
    given = _parser().parse(arguments)
    slots = given.slots or SLOTS[given.bed]
    if given.bed == "text":
        model, tokenizer = smollm2.load("bfloat16")
        with bed_of(model, tokenizer) as bed:
            found = measure(
                bed.attached, text_items(bed, given.texts, given.split or "development", given.streams), slots
            )
    else:
        run = load_config("tiny.yaml" if given.bed == "recall" else "assembled.yaml", ["data.cache=false"])
        split = given.split or "calibration"
        samples = RecallOptions(root=given.root, split=split).samples()[: given.streams]
        backbone = load_backbone(run.model)
        with attach(backbone.text_model) as attached:
            found = measure(attached, media_items(run, attached, backbone, samples, split), slots)
    write_json(given.out / f"kept_tokens_{given.bed}.json", found)
    print(shown(found))


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("bed", choices=list(SLOTS))
    parser.add_argument("--streams", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--slots", type=int, help=f"per layer {SLOTS}")
    parser.add_argument("--split", help="development or test of texts, a split of recall streams")
    parser.add_argument("--root", default="data/recall", metavar="DIR", help="of recall streams (%(default)s)")
    parser.add_argument("--texts", type=Path, action="append", default=[], metavar="DIR", help="unpacked packages")
    parser.add_argument("--out", type=Path, default=Path("runs/kept_tokens"), metavar="DIR", help="(%(default)s)")
    return parser


if __name__ == "__main__":
    run_command(main)
