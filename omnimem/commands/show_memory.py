"""Write an HTML page of the tokens that each layer holds during a stream, for two policies side by side.

omnimem show-memory --config tiny.yaml --video FILE --policies distinct snapkv --out memory.html
omnimem show-memory --config tiny.yaml --manifest data/recall/test.jsonl [--id ID] --policies ... --out ...

A policy is a name (with its defaults; with the settings of the config if it is that of the config) or settings such as
'{name: lava, preset: shared_split}'. KEY=VALUE applies to both sides, --left and --right to one of them: memory.* and
stream.positions may differ. --adapter applies to both sides, or to the one of --tuned left|right. A manifest also gives
the times of the answers to its questions. Budgets are read from the run folder, else measured.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omnimem.backbones import load_backbone
from omnimem.budget import Budget
from omnimem.cli.arms import adapter_as
from omnimem.cli.build import budget_settings, new_budget, policies_of
from omnimem.cli.parser import Parser
from omnimem.cli.tuned_model import load_tuned
from omnimem.comparison.formatting import size
from omnimem.config import ConfigError, RunConfig, load
from omnimem.data import ManifestError, Sample, read_manifest
from omnimem.errors import counted
from omnimem.inspection import Holding, Side, StreamSnapshot, follow, read, render
from omnimem.run import RunFolder, write_text
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import Feeder
from omnimem.training.arguments import train_section

SIDES = ("left", "right")


def main(arguments: Sequence[str]) -> None:
    """Stream the sample under both policies, write the page, print the entries at the end."""
    # 1. settings, sample, budgets
    given = _parser().parse(arguments)
    runs = runs_of(given)
    sample = sample_of(given, allow_absolute=runs[0].data.allow_absolute_paths)
    backbone = load_backbone(runs[0].model)
    feeders = [Feeder(backbone, run.stream) for run in runs]
    with attach(backbone.text_model) as attached:
        budgets = budgets_of(runs, attached, feeders[0])
    adapted = None if given.adapter is None else load_tuned(backbone.model, given.adapter)
    reading = read(feeders[0], sample)  # with the adapter, which may have projectors of its own
    # 2. stream under each policy
    sides: list[Side] = []
    for name, run, feeder, budget in zip(SIDES, runs, feeders, budgets, strict=True):
        policy = policies_of(run, budget)(run.memory.slots_per_layer)
        tuned = adapted is not None and given.tuned in (None, name)
        with adapter_as(adapted, tuned), attach(backbone.text_model) as attached:
            holding = follow(feeder, attached, policy, reading.opened)
        facts = facts_of(run, sample, given.adapter if tuned else None)
        sides.append(Side(label=name, facts=facts, holding=holding, budget=policy.budget))
    # 3. write the page
    left, right = labelled(sides)
    write_text(given.out, render(reading, (left, right)))
    for side in (left, right):
        print(summary(side, reading))
    print(shared_tokens(left, right, reading))
    print(f"wrote {given.out} ({size(given.out.stat().st_size)})")


# --- settings


def runs_of(given: Namespace) -> tuple[RunConfig, RunConfig]:
    """The settings of both sides.

    Raises ConfigError if they are the same or differ in settings that must be shared, if --out is a folder, and if
    --tuned or --id lacks the argument that it refers to.
    """
    # 1. arguments
    if given.tuned is not None and given.adapter is None:
        raise ConfigError([f"--tuned {given.tuned}: there is no adapter; give --adapter DIR, or remove --tuned"])
    if given.id is not None and given.manifest is None:
        raise ConfigError([f"--id {given.id}: is the id of a stream in a manifest; replace --video by --manifest FILE"])
    if given.out.is_dir():
        raise ConfigError([f"--out: {given.out} is a folder; name a file in it, such as {given.out / 'memory.html'}"])
    # 2. settings of each side
    section = train_section()
    own = load(given.config, given.overrides, train=section)
    policies = given.policies or (None, None)
    left, right = (
        load(given.config, [*given.overrides, *_policy(policy, own), *settings], train=section)
        for policy, settings in zip(policies, (given.left, given.right), strict=True)
    )
    # 3. differences
    shared = replace(right.stream, positions=left.stream.positions)
    if left != replace(right, memory=left.memory, stream=shared):
        raise ConfigError(["--left and --right: only memory.* and stream.positions may differ; set others for both"])
    same = left == right if given.adapter else _chosen_alike(left) == _chosen_alike(right)
    if same and (given.adapter is None or given.tuned is None):
        raise ConfigError(
            ["both sides are the same; give two policies, --left or --right KEY=VALUE, or --adapter with --tuned right"]
        )
    return left, right


def _chosen_alike(run: RunConfig) -> RunConfig:
    """The run as it is without an adapter: the model that chooses is the one that answers."""
    return replace(run, memory=replace(run.memory, selection_from="tuned"))


def _policy(policy: str | None, own: RunConfig) -> list[str]:
    """The override for a policy of the command line."""
    if policy is None or policy == own.memory.policy.name:
        return []
    return [f"memory.policy={policy}" if policy.startswith("{") else f"memory.policy={{name: {policy}}}"]


def sample_of(given: Namespace, *, allow_absolute: bool) -> Sample:
    """The file, or one stream of the manifest. Raises ManifestError if there is no such stream."""
    if given.video is not None:
        return Sample(id=given.video.name, video=given.video, audio=None, messages=())
    samples = read_manifest(given.manifest, allow_absolute=allow_absolute)
    found = next((sample for sample in samples if given.id in (None, sample.id)), None)
    if found is None:
        raise ManifestError([f"{given.manifest}: no stream has the id {given.id!r}; the first is {samples[0].id!r}"])
    return found


def budgets_of(runs: Sequence[RunConfig], attached: StreamedAttention, feeder: Feeder) -> list[Budget]:
    """The budget of each side, measured only once if their settings are the same."""
    left = budget_of(runs[0], attached, feeder)
    same = budget_settings(runs[0]) == budget_settings(runs[1])
    return [left, left if same else budget_of(runs[1], attached, feeder)]


def budget_of(run: RunConfig, attached: StreamedAttention, feeder: Feeder) -> Budget:
    """The budget of the run folder if it was made for these settings, else a measured or built one; it is not saved.

    Raises BudgetError or ManifestError if it must be measured and there are no training streams.
    """
    file = RunFolder(path=Path("runs") / run.name).budget
    if file.is_file():
        budget = Budget.read(file)
        if budget.provenance.get("settings") == budget_settings(run):
            return budget
    return new_budget(run, attached, feeder)


# --- text


def facts_of(run: RunConfig, sample: Sample, adapter: Path | None) -> dict[str, str]:
    """The settings of a side, as the page shows them."""
    stream, memory = run.stream, run.memory
    return {
        "policy": _settings(memory.policy),
        "slots per layer": f"{memory.slots_per_layer:,}",
        "budget": _settings(memory.budget),
        "positions": stream.positions,
        "adapter": "none" if adapter is None else str(adapter),
        "selection from": memory.selection_from,
        "model": run.model.path,
        "stream": f"frames per second {stream.fps:g}, tokens per chunk {stream.chunk_tokens:,}, tracks {stream.tracks}",
        "file": str(sample.video or sample.audio),
    }


def _settings(options: Any) -> str:
    """The name and the other settings."""
    given = {key: value for key, value in asdict(options).items() if value is not None and key != "name"}
    return ", ".join([options.name, *(f"{key} {str(value).lower()}" for key, value in given.items())])


def labelled(sides: Sequence[Side]) -> list[Side]:
    """The sides, labelled by the policy and by the other settings in which they differ."""
    names = [side.facts["policy"].partition(",")[0] for side in sides]
    whole = names[0] == names[1] and sides[0].facts["policy"] != sides[1].facts["policy"]
    differing = [key for key in sides[0].facts if sides[0].facts[key] != sides[1].facts[key] and key != "policy"]
    labels = [
        ", ".join([side.facts["policy"] if whole else name, *(_labels(side.facts)[key] for key in differing)])
        for name, side in zip(names, sides, strict=True)
    ]
    return [replace(side, label=label) for label, side in zip(labels, sides, strict=True)]


def _labels(facts: Mapping[str, str]) -> dict[str, str]:
    return {
        "slots per layer": f"{facts['slots per layer']} slots",
        "adapter": "untouched" if facts["adapter"] == "none" else "tuned",
        "positions": f"{facts['positions']} positions",
        "selection from": f"selected by {facts['selection from']}",
        "budget": f"budget {facts['budget']}",
    }


def summary(side: Side, reading: StreamSnapshot) -> str:
    """The entries of a side at the end of the stream."""
    holding: Holding = side.holding
    entries = sum(count for layer in holding.counts[-1] for kind, count in layer.items() if kind)
    layers, _, tokens = holding.last.shape
    line = (
        f"{side.label}: {counted(round(entries / layers, 1), 'entry')} per layer after {reading.seconds:.4g} s, of "
        f"{counted(tokens, 'token')} in {counted(len(holding.ends), 'chunk')}"
    )
    if not reading.needles:
        return line
    shares = holding.layer_shares(reading.needles)
    there = sum(share > 0 for share in shares)
    spread = f"each in {sum(shares) / len(shares):.1%} of the layers on average"
    return f"{line}; needles: {there} of {len(shares)} held in some layer, {spread}"


def shared_tokens(left: Side, right: Side, reading: StreamSnapshot) -> str:
    """How many of the kept audio and visual tokens both sides hold at the end: drift, where one of them is tuned."""
    if left.holding.last.shape[1] != right.holding.last.shape[1]:
        return "held by both: not compared, as heads keep tokens of their own on one side"
    shares = left.holding.in_common(right.holding, reading.media)
    mean = sum(shares) / len(shares)
    return f"held by both: {mean:.1%} of the tokens of a layer (layers: {min(shares):.1%} to {max(shares):.1%})"


# --- command line


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_config()
    stream = parser.add_mutually_exclusive_group(required=True)
    stream.add_argument("--video", type=Path, metavar="FILE", help="a file")
    stream.add_argument("--manifest", type=Path, metavar="FILE", help="a manifest with the file and its questions")
    parser.add_argument("--id", help="id of a stream in the manifest (the first)")
    parser.add_argument("--policies", nargs=2, metavar="POLICY", help="left and right: names, or {name: ..., ...}")
    for side in SIDES:
        what = f"setting of the {side} side alone"
        parser.add_argument(f"--{side}", action="append", default=[], metavar="KEY=VALUE", help=what)
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a tuned adapter")
    parser.add_argument("--tuned", choices=SIDES, help="the side with the adapter (both)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the page")
    return parser
