"""Shared by the scripts: the gradient modes, wrapped tasks, arms measured in separate processes."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import nn

from omnimem.backbones import load_backbone
from omnimem.cli.build import budget_of, feeder_of, policies_of
from omnimem.commands.synthesize import Stream, make
from omnimem.config import RunConfig, load
from omnimem.data import Sample
from omnimem.evaluation import Arm, Evaluation
from omnimem.evaluation.cost import PeakMemory
from omnimem.recall.worlds import World
from omnimem.run import RunFolder, read_json
from omnimem.selection import SelectionOptions
from omnimem.streaming.attach import attach
from omnimem.tasks import RecallOptions
from omnimem.tasks.base import Defect, Gap, Verdict
from omnimem.training.arguments import train_section
from omnimem.tuning import TuningOptions

ONE_STREAM = (  # settings for one stream: no cache, and a budget that needs no calibration
    "train={}",
    "data.cache=false",
    "memory.budget={name: split, visual_audio_ratio: 2}",
    "evaluate.batch_size=1",
    "evaluate.decoders=0",
)


def load_config(name: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run, its training section included."""
    return load(name, overrides, train=train_section())


def gradient_modes(softened: SelectionOptions, hard: SelectionOptions) -> dict[str, TuningOptions]:
    """Every gradient mode; the released code and the paper have hard selection only."""
    return {
        "full": TuningOptions(selection=softened),
        "full, no recomputation": TuningOptions(recompute="none", selection=softened),
        "full, by layer": TuningOptions(recompute="layer", selection=softened),
        "full, offload": TuningOptions(offload=True, selection=softened),
        "full, offload, by layer": TuningOptions(offload=True, recompute="layer", selection=softened),
        "full, horizon 1": TuningOptions(horizon=1, selection=softened),
        "full, horizon 2": TuningOptions(horizon=2, selection=softened),
        "states": TuningOptions(gradient="states", selection=softened),
        "released": TuningOptions(gradient="released", selection=hard),
        "paper": TuningOptions(gradient="paper", selection=hard),
    }


def train_adapter_only(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Let LoRA weights alone require a gradient; their names and parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


class WrappedTask:
    """The recall task, with methods that subclasses replace."""

    def __init__(self, inner: RecallOptions) -> None:
        self.inner = inner
        self.label, self.rules, self.annotations = inner.label, inner.rules, inner.annotations

    def gaps(self) -> list[Gap]:
        return self.inner.gaps()

    def samples(self) -> list[Sample]:
        return self.inner.samples()

    def defects(self) -> list[Defect]:
        return self.inner.defects()

    def judge(self, question: Any, prediction: str) -> Verdict:
        return self.inner.judge(question, prediction)


def recall_stream(out: Path, world: World, minutes: int) -> Stream:
    """The stream of a world; its video is rendered into `out` unless it is there."""
    stream = Stream(id=f"world-{world.seed}-{minutes}-minutes", world=world)
    (out / stream.video).parent.mkdir(parents=True, exist_ok=True)
    if not (out / stream.video).is_file():
        make(out, stream)
    return stream


def write_manifest(path: Path, line: dict[str, Any]) -> None:
    """A manifest of one stream."""
    path.write_text(json.dumps(line) + "\n")


@final
@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An arm evaluated in this process."""

    entry: dict[str, Any]  # of the benchmark in summary.json
    lines: list[dict[str, Any]]  # one per question
    loaded: int | None  # bytes of memory in use before the first stream
    began: float  # CPU seconds of the process before the first stream


def evaluate_arm(run: RunConfig, task: Any, folder: Path, slots: int | None) -> Evaluated:
    """Answer all questions of a task with a number of slots per layer; None: full memory."""
    shutil.rmtree(folder, ignore_errors=True)  # answers of an earlier run do not count
    backbone = load_backbone(run.model)
    feeder = feeder_of(run, backbone)
    with attach(backbone.text_model) as attached:
        policies = policies_of(run, budget_of(run, attached, feeder, RunFolder(path=folder)))
        arm = Arm(name=folder.name, policy=policies(slots))
        loaded, began = PeakMemory().bytes, time.process_time()
        entry = Evaluation(attached=attached, feeder=feeder, options=run.evaluate).run(arm, task, folder)
    lines = [json.loads(line) for line in (folder / f"{task.label}.jsonl").read_text().splitlines()]
    return Evaluated(entry=entry, lines=lines, loaded=loaded, began=began)


def measure_arm(script: str, arguments: Sequence[str], out: Path, arm: str) -> Any:
    """Run a script again as `--measure ARM`, in a process of its own; the contents of out/<arm>.json."""
    command = [sys.executable, str(Path(script).resolve()), *arguments, "--measure", arm]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        sys.exit(code)
    return read_json(out / f"{arm}.json")
