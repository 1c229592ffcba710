"""Tuning on a pretrained language model (benchmarks/real_lm.py): under a budget, or with full memory (the control).

    python benchmarks/tune_real_lm.py train --arm aware --steps 150 --rate 3e-4    # continues; --until N: to step N
    python benchmarks/tune_real_lm.py evaluate --run free --run aware-0.0003-0 --split test      # continues
    python benchmarks/tune_real_lm.py table --split test --pool-seeds              # test-table.json; also printed

A step is one stream of 512 tokens in chunks of 128 with six facts and a passage that is given again; `aware` draws 128
slots (two of three steps) or full memory, `control` full memory. `aware_base` trains with `selection_from: base`,
`aware_kl` adds `full_memory_kl`, `aware_vo` and `control_vo` adapt values and outputs only, `aware_prose` and
`control_prose` also learn the prose that follows the stream. All arms see the same streams in the same order, from 28
development texts; ten others choose, the test texts are read once. Wordings, names and values of development and test
are not those of training. Every run is asked with `selection_from: tuned` and `base`.
"""

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.needles import AGAIN, GIVEN, HELD, LETTERS, needles
from benchmarks.real_lm import Bed, bed_of, kept, read_rows
from benchmarks.real_lm_table import markdown, tables
from benchmarks.real_texts import Text, texts
from omnimem.backbones.base import Turn
from omnimem.budget import Budget
from omnimem.cli.parser import Parser, run_command
from omnimem.memory import in_common
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.pretrained import smollm2
from omnimem.run import write_json
from omnimem.streaming.text_feeder import TextQuestion, TextSample
from omnimem.tuning import (
    FullMemoryKL,
    LoraOptions,
    LossOptions,
    Plan,
    TuningOptions,
    add_adapter,
    load_adapter,
    streamed_loss,
    trainable,
)
from omnimem.tuning.gradient.build import gradient_of

TOKENS, CHUNK, FACTS = 512, 128, 6
SLOTS = (128, 64, TOKENS)  # of an evaluation; TOKENS: nothing is evicted
TRAINED = 28  # development texts to train on; the others choose
LEARNED = 8  # tokens of the passage that are learned
PROSE = 32  # tokens after the stream that the arms `_prose` learn
WARM_UP, FALLING = 5, 1 / 3  # steps of warm-up; fraction of the steps in which the rate falls to 0
SAVED = 10  # steps between two checkpoints
LORA = LoraOptions(r=16, alpha=32.0, dropout=0.0, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
AWARE = TuningOptions(lora=LORA, recompute="none", budgets=("self", "self", "full"))
CONTROL = replace(AWARE, budgets=("full",))
VO = replace(LORA, targets=("v_proj", "o_proj"))
ARMS = {
    "aware": AWARE,
    "control": CONTROL,
    "aware_base": AWARE,  # the model without its adapter chooses in training, too
    "aware_kl": replace(AWARE, loss=LossOptions(full_memory_kl=FullMemoryKL())),
    "aware_vo": replace(AWARE, lora=VO),
    "control_vo": replace(CONTROL, lora=VO),
    "aware_prose": AWARE,
    "control_prose": CONTROL,
}


def policy_of(layers: int, slots: int | None, selection: Any = "tuned") -> Policy:
    """`omnimem` in one pool of equal layers."""
    budget = None if slots in (None, TOKENS) else Budget.shared(layers, slots)
    return replace(PerturbationOptions().build(budget), selection_from=selection)


def stream_of(tokenizer: Any, members: Sequence[Text], seed: int, step: int, *, prose_after: bool) -> TextSample:
    """The training stream of a step: facts in a part of a text, all asked at the end, and a passage given again.

    `prose_after`: the next PROSE tokens of the text are learned, too; the draws are the same without.
    """
    # 1. facts in prose
    draw = random.Random(f"tune {seed} {step}")
    text = draw.choice(members)
    latest = len(text.prose) - LETTERS * (TOKENS + HELD)
    starts = [0, *(place + 1 for place, sign in enumerate(text.prose[:latest]) if sign == "\n")]
    prose = text.prose[draw.choice(starts) :]
    episode = needles(tokenizer, prose, "tuning", TOKENS, f"{seed} {step}", FACTS)
    turns = [Turn(ids=each.ids, answer=tokenizer.decode([each.candidates[0]])) for each in episode.questions]
    # 2. the passage; its tokens are again the same from text
    for _ in range(20):
        first = draw.randrange(TOKENS - GIVEN - AGAIN)
        given, again = episode.ids[first:][:GIVEN], episode.ids[first + GIVEN :][:LEARNED]
        if _stable(tokenizer, again):
            turns.append(Turn(ids=given, answer=tokenizer.decode(again)))
            break
    # 3. the prose after the stream, from the first place where its tokens are again the same from text
    after = (n for n in range(1, HELD - PROSE) if prose_after and _stable(tokenizer, episode.held[n:][:PROSE]))
    for begin in list(after)[:1]:
        turns.append(Turn(ids=episode.held[:begin], answer=tokenizer.decode(episode.held[begin:][:PROSE])))
    asked = tuple(TextQuestion(turn=turn) for turn in turns)
    return replace(episode.sample(), id=text.file, questions=asked)


def _stable(tokenizer: Any, ids: tuple[int, ...]) -> bool:
    return tuple(tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)) == ids


def rate_at(step: int, steps: int, peak: float) -> float:
    """Warm-up, constant, and a linear fall to 0."""
    return peak * min(1.0, (step + 1) / WARM_UP) * min(1.0, (steps - step) / (FALLING * steps))


def train(given: Any) -> None:
    """Train an arm up to a step; continues from its last checkpoint."""
    # 1. model, adapter, optimizer, and where they were
    folder = Path(given.out) / f"{given.arm}-{given.rate:g}-{given.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    options, state = ARMS[given.arm], folder / "state.pt"
    model, tokenizer = smollm2.load("bfloat16")
    torch.manual_seed(given.seed)
    adapted = add_adapter(model, options.lora)
    parameters = trainable(adapted)
    optimizer = torch.optim.AdamW(parameters, lr=given.rate, weight_decay=0.0)
    first = 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        first = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
    # 2. steps
    plan = Plan(options=options, slots_per_layer=SLOTS[0], chunk_tokens=CHUNK, seed=given.seed)
    members = texts("development", given.texts)[:TRAINED]
    with bed_of(model, tokenizer, chunk_tokens=CHUNK) as bed, (folder / "log.jsonl").open("a") as log:
        layers, feeder = bed.attached.shape.layers, bed.feeders[True]
        for step in range(first, min(given.until or given.steps, given.steps)):
            prose_after, slots = given.arm.endswith("_prose"), plan(step, given.steps).slots
            sample = stream_of(tokenizer, members, given.seed, step, prose_after=prose_after)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, given.steps, given.rate)
            outcome = streamed_loss(
                bed.attached,
                feeder,
                [sample],
                policy_of(layers, slots, "base" if given.arm == "aware_base" and slots else "tuned"),
                softness=None,
                carry=gradient_of(options, layers),
                losses=options.loss.losses,
                model=adapted,
            )
            outcome.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row = {"step": step, "slots": slots, "loss": float(outcome.loss.detach()), "norm": float(norm)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
            # 3. checkpoint
            if (step + 1) % SAVED == 0 or step + 1 == given.steps:
                adapted.save_pretrained(str(folder / "adapter"))
                content = {"step": step + 1, "optimizer": optimizer.state_dict(), "parameters": parameters}
                torch.save(content, state.with_suffix(".new"))
                state.with_suffix(".new").replace(state)


@torch.no_grad()
def evaluate(given: Any) -> None:
    """One line per run, text, slots and selection; what is there is not made again."""
    chosen = texts("development", given.texts)[TRAINED:] if given.split == "development" else texts("test", given.texts)
    path = Path(given.out) / f"{given.split}.jsonl"
    done = {(row["arm"], row["text"], row["slots"]) for row in (read_rows(path) if path.is_file() else ())}
    for name in given.run:
        model, tokenizer = smollm2.load("bfloat16")
        folder = Path(given.out) / name
        steps = 0
        if name != "free":
            load_adapter(model, folder / "adapter")
            steps = torch.load(folder / "state.pt", weights_only=True)["step"]
        label = name if name == "free" else f"{name}@{steps}"
        with bed_of(model, tokenizer, chunk_tokens=CHUNK) as bed, path.open("a") as file:
            for number, text in enumerate(chosen[: given.most]):
                for slots in given.slots or SLOTS:
                    if (label, text.digest[:16], slots) in done:
                        continue
                    rows = list(evaluated(bed, text, given.split, slots, tuned=name != "free"))
                    for selection, row in rows:
                        arm = label if selection == "tuned" else f"{label}, base selection"
                        facts = {"arm": arm, "text": text.digest[:16], "slots": slots, "cell": f"tuning-{TOKENS}"}
                        file.write(json.dumps({**facts, "file": text.file, "source": text.source, **row}) + "\n")
                    file.flush()
                print(f"{label}: {number + 1} of {len(chosen)} texts", flush=True)


def evaluated(bed: Bed, text: Text, split: str, slots: int, *, tuned: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The answers of one stream by selection; with an adapter and a budget also with the untuned model's selection.

    The overlap is that of the tokens which the tuned and the untuned model keep: mean over layers of |T & U| / max.
    """
    episode = needles(bed.tokenizer, text.prose, f"tuning_{split}", TOKENS, f"tune {text.file}", FACTS)
    held: dict[str, Any] = {}
    for selection in ("base", "tuned") if tuned and slots < TOKENS else ("tuned",):
        started = time.process_time()
        stream = bed.read(episode, policy_of(bed.attached.shape.layers, slots, selection))
        row = bed.answers(episode, stream) | {"cpu": round(time.process_time() - started, 2)}
        held[selection] = stream.memory.held()
        if "base" in held:
            row["overlap"] = fmean(in_common(held[selection], held["base"]))
        yield selection, row | kept(stream, episode, protected=True)


def table(given: Any) -> None:
    """The table against every arm that is named, or against `free`."""
    rows = list(read_rows(Path(given.out) / f"{given.split}.jsonl"))
    if given.pool_seeds:
        rows = pooled(rows)
    found, lines = {}, []
    for reference in given.reference or ["free"]:
        found[reference] = tables(rows, reference)
        lines += markdown(found[reference], reference)
    write_json(Path(given.out) / f"{given.split}-table.json", found)
    print("\n".join(lines))


def pooled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm, text and slots: the answers of all seeds one after another, means of the other numbers.

    `free` has no seed: its answers are repeated, so that they are paired with those of every seed. Arms with fewer
    seeds than others, and texts that not all seeds were asked about, are left out.
    """
    groups: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        name, _, rest = row["arm"].partition("@")
        stem, _, seed = name.rpartition("-")
        arm = f"{stem}@{rest}" if stem else name
        groups.setdefault((arm, row["text"], row["slots"]), {})[seed if stem else ""] = row
    seeds = max(len(group) for group in groups.values())
    found = []
    for (arm, _, _), group in groups.items():
        mine = list(group.values()) if arm != "free" else list(group.values()) * seeds
        if len(mine) == seeds:
            numbers = [name for name, value in mine[0].items() if type(value) is float]
            means = {name: fmean(row[name] for row in mine) for name in numbers}
            questions = [answer for row in mine for answer in row["questions"]]
            found.append({**mine[0], "arm": arm, **means, "questions": questions})
    return found


def main(arguments: Sequence[str]) -> None:
    """Train, evaluate, or print the table."""
    given = _parser().parse(arguments)
    {"train": train, "evaluate": evaluate, "table": table}[given.action](given)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("action", choices=("train", "evaluate", "table"))
    parser.add_argument("--arm", choices=list(ARMS), default="aware", help="to train (%(default)s)")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate, times alpha / r = 2 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of adapter, streams and budgets (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of the schedule (%(default)s)")
    parser.add_argument("--until", type=int, help="stop after this step (the last)")
    parser.add_argument("--run", action="append", default=[], metavar="NAME", help="a run folder, or free: no adapter")
    parser.add_argument("--split", choices=("development", "test"), default="development", help="(%(default)s)")
    parser.add_argument("--most", type=int, help="texts of an evaluation (all)")
    parser.add_argument("--slots", type=int, action="append", help=f"of an evaluation; may be repeated {SLOTS}")
    parser.add_argument("--pool-seeds", action="store_true", help="one line of the table per arm, over its seeds")
    parser.add_argument("--reference", action="append", metavar="ARM", help="of the table; may be repeated (free)")
    parser.add_argument("--texts", type=Path, action="append", default=[], metavar="DIR", help="unpacked packages")
    parser.add_argument("--out", default="runs/tune_real_lm", metavar="DIR", help="(%(default)s)")
    return parser


if __name__ == "__main__":
    run_command(main)
