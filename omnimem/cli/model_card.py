"""README.md of an exported model: description, memory, usage, results, origin."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NotRequired

import yaml
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from omnimem.comparison.formatting import count, percent, points, shown, size, span
from omnimem.config.exported import FILE, Exported
from omnimem.errors import counted
from omnimem.run import RunFolder, read_json

CARD = "README.md"
TASK = "video-text-to-text"  # as the hub calls it
TUNED, UNTUNED = "tuned", "training_free"
PACKAGES = ("torch", "transformers", "peft")
AGAIN = "evaluate and compare the run again, or remove the file for a card without results"


class Digests(TypedDict, total=False):
    """The provenance of an evaluation."""

    sha256: dict[str, str | None]


class TunedSummary(TypedDict, total=False):
    """eval/tuned/summary.json, as far as it is read here."""

    provenance: Digests


class ComparedArm(TypedDict):
    """An arm of compare/summary.json."""

    strict: FiniteFloat
    strict_interval: Annotated[list[FiniteFloat | None], Field(min_length=2, max_length=2)]
    peak_entries: FiniteFloat | None
    answer_entries: FiniteFloat | None
    bytes: FiniteFloat | None


class ComparedPair(TypedDict):
    """A difference of two arms."""

    a: str
    b: str
    diff: FiniteFloat | None
    low: FiniteFloat | None
    high: FiniteFloat | None
    verdict: str


class ComparedGroup(TypedDict):
    """A benchmark of compare/summary.json."""

    n: int
    clusters: int
    chance: FiniteFloat | None
    arms: dict[str, ComparedArm]
    pairs: list[ComparedPair]


class Pooled(TypedDict):
    """All benchmarks pooled."""

    pairs: list[ComparedPair]


class Compared(TypedDict):
    """compare/summary.json, as far as it is read here."""

    benchmarks: dict[str, ComparedGroup]
    pooled: NotRequired[Pooled | None]
    different: list[str]


def card(exported: Exported, name: str, run: RunFolder) -> str:
    """The whole file, with YAML front matter of the Hugging Face hub.

    Results are those of the run's comparison, if these weights were compared.
    """
    tuned, results = results_of(run, exported)
    front = yaml.safe_dump(_front(exported, name, results, tuned), sort_keys=False, allow_unicode=True, width=100)
    parts = (_intro(exported, name), _memory(exported), _use(exported), _results(results, tuned), _origin(exported))
    return f"---\n{front}---\n\n" + "\n\n".join("\n".join(part) for part in parts) + "\n"


def results_of(run: RunFolder, exported: Exported) -> tuple[str, dict[str, Any]]:
    """(arm of these weights, the run's compare/summary.json); the latter empty if no such arm was compared."""
    summary = run.comparison / "summary.json"
    for path in sorted(run.evaluation(TUNED).parent.glob(f"{TUNED}*/summary.json")) if summary.is_file() else ():
        arm = path.parent.name
        if arm.partition("@")[0] != TUNED:
            continue
        evaluated = read_json(path, TunedSummary, AGAIN).get("provenance", {}).get("sha256", {}).get("adapter")
        compared = read_json(summary, Compared, AGAIN)
        known = any(arm in group["arms"] for group in compared["benchmarks"].values())
        if evaluated == exported.origin.adapter_sha256 and known:
            return arm, compared
    return TUNED, {}


def _front(exported: Exported, name: str, results: Mapping[str, Any], tuned: str) -> dict[str, Any]:
    origin, merged = exported.origin, exported.origin.kind == "merged"
    hub = not Path(origin.base).is_absolute()  # a local path is of no use elsewhere
    return {
        **({"base_model": origin.base, "base_model_relation": "finetune" if merged else "adapter"} if hub else {}),
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": TASK,
        "tags": ["omnimem", "audio-visual", "streaming", "kv-cache-compression", *([] if merged else ["lora"])],
        **({"model-index": [{"name": name, "results": list(_index(results, tuned))}]} if results else {}),
    }


def _index(results: Mapping[str, Any], tuned: str) -> Iterator[dict[str, Any]]:
    """Strict accuracies of the arm of these weights."""
    for label, group in results["benchmarks"].items():
        if tuned in group["arms"]:
            value = round(100 * group["arms"][tuned]["strict"], 2)
            yield {
                "task": {"type": TASK},
                "dataset": {"name": label, "type": label},
                "metrics": [{"type": "accuracy", "name": "strict accuracy, missing answers wrong", "value": value}],
            }


def _intro(exported: Exported, name: str) -> Iterator[str]:
    origin = exported.origin
    what = "the merged weights" if origin.kind == "merged" else "the LoRA adapter"
    yield f"# {name}\n"
    yield (
        f"{_named(origin.base)}, fine-tuned with OmniMem to answer questions about audio-visual streams of any length "
        f"from a key-value memory of fixed size. This folder holds {what}, and in `{FILE}` the settings of the memory. "
        "Without OmniMem the model loads as usual and keeps the whole cache."
    )


def _memory(exported: Exported) -> Iterator[str]:
    memory, budget, stream = exported.memory, exported.budget, exported.stream
    yield "## Memory\n\n| | |\n|---|---|"
    given = {name: value for name, value in asdict(memory.policy).items() if name != "name" and value is not None}
    yield f"| policy | `{memory.policy.name}`" + "".join(f", {name} {value}" for name, value in given.items()) + " |"
    if memory.selection_from == "base":
        yield "| selection | by the base without the adapter: it reads every chunk first, into its own memory |"
    yield f"| slots per layer | {memory.slots_per_layer:,}, {budget.total:,} over {counted(budget.layers, 'layer')} |"
    if budget.split:
        audio, visual = ([layer[place] for layer in budget.slots] for place in (0, 1))
        share = percent(sum(audio) / budget.total)
        yield f"| by layer | audio {span(audio)}, visual {span(visual)}; {share} % for audio |"
    else:
        yield f"| by layer | {span([sum(layer) for layer in budget.slots])}, shared by audio and visual tokens |"
    yield f"| stream | {stream.fps:g} frames/s of at most {stream.max_pixels:,} pixels, tracks: {stream.tracks} |"
    yield f"| chunk | at most {counted(stream.chunk_tokens, 'token')}; positions: {stream.positions} |"


_USE = """\
## How to use

`DIR` is this folder, `FILE` a video.{note}

```
omnimem ask {options} --video FILE "What happened?"
```

```python
{path}from omnimem import Exported, Feeder, attach, {load}load_backbone

exported = Exported.read(DIR)
backbone = load_backbone(exported.model)
{adapter}feeder = Feeder(backbone, exported.stream)
with attach(backbone.text_model) as attached:
    stream = feeder.stream(attached, exported.policy)
    for chunk in feeder.watch(FILE):
        stream.feed(chunk)
    print(feeder.answers(stream, ["What happened?"]))
```"""


def _use(exported: Exported) -> Iterator[str]:
    merged, base = exported.origin.kind == "merged", exported.origin.base
    local = Path(base).is_absolute() and not merged
    yield _USE.format(
        note=f"\n`{_named(base)}` stands for the folder of the base; its sha256 is below." if local else "",
        options="--model DIR" if merged else f"--model {_named(base)} --adapter DIR",
        path="" if merged else "from pathlib import Path\n\n",
        load="" if merged else "load_adapter, ",
        adapter="" if merged else "load_adapter(backbone.model, Path(DIR))\n",
    )


def _results(results: Mapping[str, Any], tuned: str) -> Iterator[str]:
    yield "## Results\n"
    if not results:
        yield "These weights were not evaluated in the run that made them."
        return
    yield "Strict accuracy in % (a missing answer is wrong), with 95 % intervals clustered by video."
    for label, group in results["benchmarks"].items():
        yield ""
        asked = f"{counted(group['n'], 'question')} about {counted(group['clusters'], 'video')}"
        yield f"**{label}**: {asked}, chance {percent(group['chance'])} %\n"
        yield "| | accuracy | peak entries per layer | at answer | text | memory |\n|---|---|---|---|---|---|"
        for arm, entry in group["arms"].items():
            low, high = entry["strict_interval"]
            spread = f"{percent(entry['strict'])} [{percent(low)}, {percent(high)}]"
            numbers = [count(entry.get(name)) for name in ("peak_entries", "answer_entries", "text_entries")]
            held = " | ".join([*numbers, size(entry["bytes"])])
            yield f"| {shown(arm)} | {spread} | {held} |"
    yield ""
    yield from _gains(results, tuned)


def _gains(results: Mapping[str, Any], tuned: str) -> Iterator[str]:
    """Gains by tuning, in sentences."""
    groups = dict(results["benchmarks"])
    if len(groups) > 1:
        groups["all benchmarks pooled"] = results["pooled"]
    for label, group in groups.items():
        for pair in group["pairs"]:
            if (pair["a"], pair["b"]) == (tuned, UNTUNED):
                found = f"{points(pair['diff'])} points [{points(pair['low'])}, {points(pair['high'])}]"
                yield f"- tuned against untouched on {label}: {found}: {pair['verdict']}"
    if results["different"]:
        yield f"- **Not comparable**, compared nevertheless: {'; '.join(results['different'])}"


def _origin(exported: Exported) -> Iterator[str]:
    origin = exported.origin
    run, packages = origin.run, origin.run.get("packages", {})
    commit = (run.get("git") or {}).get("commit")
    best = run.get("best_checkpoint")
    best = best if best and best["step"] == origin.step else None
    rows = {
        "base": f"`{_named(origin.base)}`" + (f" at `{origin.base_revision}`" if origin.base_revision else ""),
        "sha256 of the base": f"`{origin.base_sha256}`",
        "sha256 of the adapter": f"`{origin.adapter_sha256}`",
        "optimizer steps": f"{origin.step:,}",
        **({"validation": f"{best['metric']} {best['value']:.4g}, the best of the run"} if best else {}),
        "started": run.get("started"),
        "seed": run.get("seed"),
        "sha256 of the training data": f"`{digest}`" if (digest := run.get("sha256", {}).get("data")) else None,
        "commit of OmniMem": f"`{commit}`" if commit else None,
        "packages": ", ".join(f"{name} {packages[name]}" for name in PACKAGES if name in packages) or None,
    }
    yield "## Where it comes from\n\n| | |\n|---|---|"
    yield from (f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    yield ""
    yield (
        "The export was loaded again and compared with the run's own weights on a synthetic stream: "
        f"`{json.dumps(dict(exported.verified))}`. The base's own licence applies to its weights."
    )


def _named(base: str) -> str:
    """A hub id, or the name of a folder without its path on this machine."""
    return Path(base).name if Path(base).is_absolute() else base
