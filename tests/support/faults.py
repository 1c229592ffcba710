"""Trials of faults of a training run at random times, each followed by `--resume auto`.

A trial passes when exit code 0 was returned only once the adapter was written and described in run.json, the adapter
equals the unbroken run's bit for bit, metrics.jsonl holds every step once with the same numbers and samples, and no
process is left behind; faults that no process dies of leave no traceback in the log. Processes are forked from one that
has the imports done, below a launcher that behaves as DeepSpeed's launch.py does.
"""

import ctypes
import importlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, final

from omnimem.run import RunFolder, read_json, sha256
from support.paths import ROOT
from support.ranks import free_port
from support.tiny_run import TIMED, given

STEPS = 8
LIMIT = 300.0  # seconds that a run may take on a busy machine
PATIENCE = 60.0  # seconds in which a rank must have ended once it was asked to
RESUMES = 3
FILES = 10  # of a checkpoint, about
LAST_MOMENTS = ("metrics.jsonl", f".partial/checkpoint-{STEPS}", f"checkpoint-{STEPS}", ".partial/adapter", "adapter")
FORK = multiprocessing.get_context("fork")
COMMANDS = ("finetune", "evaluate", "export", "calibrate")
SETTINGS = (f"train.max_steps={STEPS}", "train.save_steps=2", "train.save_total_limit=2")


@final
@dataclass(frozen=True, kw_only=True)
class Engine:
    ranks: int
    deepspeed: str | None = None

    @property
    def name(self) -> str:
        return f"{self.deepspeed or 'plain'} x {self.ranks}"

    @property
    def settings(self) -> list[str]:
        return [f"train.deepspeed=deepspeed/{self.deepspeed}.json"] if self.deepspeed else []


ENGINES = (
    Engine(ranks=1),
    Engine(ranks=2),
    Engine(ranks=2, deepspeed="zero0"),
    Engine(ranks=2, deepspeed="zero2"),
    Engine(ranks=2, deepspeed="zero3"),
)


@final
@dataclass(frozen=True, kw_only=True)
class Launched:
    process: ForkProcess
    ranks: tuple[int, ...]
    path: Path
    engine: Engine = ENGINES[0]

    @property
    def launcher(self) -> int:
        return self.process.pid or 0

    @property
    def steps(self) -> int:
        metrics = self.path / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def ended(self) -> int:
        """Wait for the launcher; its exit code, negative for a signal."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def orphans(self) -> list[int]:
        """Ranks that are still there when a launcher is gone and they had the time to finish their step."""
        limit = time.monotonic() + PATIENCE
        while any(map(lives, self.ranks)) and time.monotonic() < limit:
            time.sleep(0.05)
        return [rank for rank in self.ranks if lives(rank)]


@final
@dataclass(frozen=True, kw_only=True)
class Fault:
    name: str
    strikes: Callable[[Launched, random.Random], str]  # a description
    repair: Callable[[Launched], object] = lambda run: None  # before the run goes on
    tidy: bool = False  # whether every process ends by itself, without a traceback


def preload() -> None:
    """Import what every run imports; forked processes have it then."""
    os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    for module in ("deepspeed", *(f"omnimem.commands.{name}" for name in COMMANDS)):
        importlib.import_module(module)


def launch(home: Path, name: str, engine: Engine, *arguments: str) -> Launched:
    """`finetune.py --config NAME.yaml ARGUMENTS` on so many ranks."""
    return started(home, name, "finetune", given(home, name, *SETTINGS, *engine.settings, *arguments), engine)


def started(home: Path, name: str, script: str, arguments: Sequence[str], engine: Engine = ENGINES[0]) -> Launched:
    """A command of train/ on the ranks of an engine."""
    command = [f"{script}.py", *arguments]
    receive, send = FORK.Pipe(duplex=False)
    launcher = FORK.Process(target=_launcher, args=(home, name, command, engine.ranks, send))
    launcher.start()
    return Launched(process=launcher, ranks=tuple(receive.recv()), path=home / "runs" / name, engine=engine)


def _launcher(home: Path, name: str, command: list[str], count: int, send: Connection) -> None:
    """As launch.py: start the ranks, pass SIGTERM on, end all when one has failed."""
    os.setsid()
    os.chdir(home)
    log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    port = str(free_port())
    os.environ["OMNIMEM_LAUNCHER"] = str(os.getpid())  # as launch.sh does
    ranks = [FORK.Process(target=_rank, args=(command, rank, count, port)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    send.send([rank.pid for rank in ranks])
    signal.signal(signal.SIGTERM, lambda *_: [rank.terminate() for rank in ranks])
    sys.exit(outcome(ranks) % 256)


def outcome(ranks: Sequence[ForkProcess]) -> int:
    """Wait for all ranks and end the others once one has failed; its exit code, else 0.

    The sentinel of a process is closed before its exit code is known, so both are checked in a loop.
    """
    while (running := [rank for rank in ranks if rank.exitcode is None]) and not failure(ranks):
        wait([rank.sentinel for rank in running], timeout=PATIENCE)
    code = failure(ranks)
    for rank in running:
        rank.terminate()
    for rank in running:
        rank.join(PATIENCE)
        rank.kill()
        rank.join()
    return code


def failure(ranks: Sequence[ForkProcess]) -> int:
    return next((rank.exitcode for rank in ranks if rank.exitcode), 0)


def _rank(command: list[str], rank: int, count: int, port: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.time = Clock(Path("clock"), time.time)
    obey_modes()
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_SIZE": str(count)}
    os.environ.update({**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CROSS_RANK": "0"})
    sys.argv = command
    runpy.run_path(str(ROOT / "train" / command[0]), run_name="__main__")


@final
class Clock:
    """`time.time`, shifted by the seconds in a file while there is one."""

    def __init__(self, shift: Path, real: Callable[[], float]) -> None:
        self.shift, self.real = shift.resolve(), real

    def __call__(self) -> float:
        try:
            return self.real() + float(self.shift.read_text() or 0)
        except (FileNotFoundError, ValueError):
            return self.real()


def obey_modes() -> None:
    """Root too may only do what the modes of files allow in this process (Linux: no CAP_DAC_OVERRIDE)."""
    if sys.platform != "linux" or os.geteuid():
        return
    library, header = ctypes.CDLL(None), struct.pack("Ii", 0x20080522, 0)
    kept = ctypes.create_string_buffer(24)
    library.capget(header, kept)
    effective, *rest = struct.unpack("6I", kept.raw)
    library.capset(header, struct.pack("6I", effective & ~(1 << 1), *rest))


def lives(number: int) -> bool:
    """Whether a process is running (a zombie is not)."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_rank(run: Launched, draw: random.Random) -> str:
    """SIGKILL to one rank, at any time."""
    at = in_a_step(run, draw)
    rank = draw.randrange(len(run.ranks))
    strike(run.ranks[rank], signal.SIGKILL)
    return f"rank {rank} {at}"


def kill_launcher(run: Launched, draw: random.Random) -> str:
    """SIGKILL to the launcher; its ranks must end by themselves."""
    at = in_a_step(run, draw)
    strike(run.launcher, signal.SIGKILL)
    return at


def terminate(run: Launched, draw: random.Random) -> str:
    """SIGTERM to one rank, or to the launcher, which passes it on."""
    at = in_a_step(run, draw)
    return f"{strike_one(run, draw)} {at}"


def terminate_at_the_end(run: Launched, draw: random.Random) -> str:
    """SIGTERM to a rank or the launcher close to the end of the run."""
    moment = run.path / draw.choice(LAST_MOMENTS)
    waiting(run, lambda: run.steps >= STEPS - 1 and (moment.exists() or (run.path / moment.name).exists()))
    delay = draw.uniform(0.0, 0.03)
    time.sleep(delay)
    return f"{strike_one(run, draw)} {delay * 1e3:.0f} ms after {moment.relative_to(run.path)}"


def damage_checkpoint(run: Launched, draw: random.Random) -> str:
    """Kill all processes, then truncate a file of the newest checkpoint or flip one of its bits."""
    at = in_a_step(run, draw, first=3)
    kill_all(run)
    newest = max(run.path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    file = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < 0.5:
        what, content = "cut", content[:place]
    else:
        what = "bit"
        content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"{what} {file.relative_to(run.path)} {at}"


def kill_while_writing(run: Launched, draw: random.Random) -> str:
    """Kill all processes after a random number of files of a checkpoint were written."""
    wanted, files = draw.choice((2, 4, 6)), draw.randrange(FILES)
    partial = run.path / ".partial" / f"checkpoint-{wanted}"
    waiting(run, lambda: len(list(partial.glob("*"))) >= files or (run.path / partial.name).exists())
    time.sleep(draw.uniform(0.0, 0.01))
    kill_all(run)
    written = len(list(partial.glob("*")))
    return f"{partial.name}, " + (f"{written} files written" if partial.exists() else "already in place")


def jump(run: Launched, draw: random.Random) -> str:
    """The clock jumps forward and back by up to a year, and the checkpoints have times in any order."""
    shift, told = run.path.parents[1] / "clock", []
    for _ in range(3):
        at, seconds = in_a_step(run, draw, last=STEPS // 2), draw.choice((-1, 1)) * 10 ** draw.uniform(0, 7.5)
        shift.write_text(str(seconds))
        told.append(f"{seconds:+.0f} s {at}")
        for path in run.path.glob("checkpoint-*"):
            with suppress(FileNotFoundError):
                os.utime(path, (time.time() + draw.uniform(-1e7, 1e7),) * 2)
    return ", ".join(told)


def freeze(run: Launched, draw: random.Random) -> str:
    """SIGSTOP to a rank, the launcher or all, for up to two seconds."""
    everybody = (run.launcher, *run.ranks)
    chosen = draw.choice((*((one,) for one in everybody), everybody))
    at, seconds = in_a_step(run, draw), draw.uniform(0.2, 2.0)
    for number in chosen:
        strike(number, signal.SIGSTOP)
    time.sleep(seconds)
    for number in chosen:
        strike(number, signal.SIGCONT)
    return f"{len(chosen)} of {len(everybody)} processes for {seconds:.1f} s {at}"


def lock_folder(run: Launched, draw: random.Random) -> str:
    """The run folder becomes read-only; the run must end by a line, and continue once it may write."""
    at = in_a_step(run, draw)
    run.path.mkdir(parents=True, exist_ok=True)
    run.path.chmod(0o555)
    return at


def unlock_folder(run: Launched) -> None:
    run.path.chmod(0o755)


def start_again(run: Launched, draw: random.Random) -> str:
    """A second start of the same command, from the beginning or with --resume auto."""
    at, more = in_a_step(run, draw), draw.choice(((), ("--resume", "auto")))
    second = launch(run.path.parents[1], run.path.name, run.engine, *more)
    return f"{' '.join(more) or 'fresh'} {at}: {second.ended()}"


def damage_folder(run: Launched, draw: random.Random) -> str:
    """Kill all processes, then damage a file of the run folder that `--resume auto` can do without."""
    at = in_a_step(run, draw, first=3)
    kill_all(run)
    newest = max(run.path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    names = ("run.json", "metrics.jsonl", ".lock", f"{newest.name}/sealed.json", f"{newest.name}/portable.json")
    file = run.path / draw.choice((*names, f"{newest.name}/trainer_state.json"))
    how = draw.choice(("empty", "zeros", "cut", "list", "gone")) if file.name != "metrics.jsonl" else "tail"
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        kinds = {"empty": b"", "zeros": bytes(len(content)), "cut": content[: len(content) // 2], "list": b"[1]"}
        file.write_bytes({**kinds, "tail": content + draw.choice((b'{"step": 9', bytes(50), b"[]\n", b"\xff"))}[how])
    return f"{how} {file.relative_to(run.path)} {at}"


FAULTS = (
    Fault(name="kill -9 of a rank", strikes=kill_rank),
    Fault(name="kill -9 of the launcher", strikes=kill_launcher),
    Fault(name="SIGTERM", strikes=terminate),
    Fault(name="SIGTERM at the end", strikes=terminate_at_the_end),
    Fault(name="damaged checkpoint", strikes=damage_checkpoint),
    Fault(name="kill -9 while a checkpoint is written", strikes=kill_while_writing),
    Fault(name="clock jumps", strikes=jump, repair=lambda run: clear_clock(run.path.parents[1]), tidy=True),
    Fault(name="SIGSTOP", strikes=freeze, tidy=True),
    Fault(name="read-only folder", strikes=lock_folder, repair=unlock_folder, tidy=True),
    Fault(name="two starts", strikes=start_again, tidy=True),
    Fault(name="damaged folder", strikes=damage_folder),
)


def clear_clock(home: Path) -> None:
    (home / "clock").unlink(missing_ok=True)


def in_a_step(run: Launched, draw: random.Random, *, first: int = 0, last: int = STEPS) -> str:
    step = draw.randrange(first, last)
    waiting(run, lambda: run.steps >= step)
    delay = draw.uniform(0.0, 0.3)
    time.sleep(delay)
    return f"{delay * 1e3:.0f} ms after step {step}"


def waiting(run: Launched, until: Callable[[], bool]) -> None:
    """Poll until the condition holds or the run has ended."""
    limit = time.monotonic() + LIMIT
    while not until() and lives(run.ranks[0]) and time.monotonic() < limit:
        time.sleep(0.002)


def kill_all(run: Launched) -> None:
    """SIGKILL to every process, as in a power failure."""
    for number in (run.launcher, *run.ranks):
        strike(number, signal.SIGKILL)


def strike_one(run: Launched, draw: random.Random) -> str:
    """SIGTERM to the launcher or to one of the ranks; to which."""
    chosen = draw.choice((run.launcher, *run.ranks))
    strike(chosen, signal.SIGTERM)
    return "launcher" if chosen == run.launcher else f"rank {run.ranks.index(chosen)}"


def strike(number: int, kind: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(number, kind)


@final
@dataclass(frozen=True, kw_only=True)
class Result:
    """Adapter and metrics of a run, without timings."""

    adapter: bytes = b""  # none
    described: bool = False  # whether run.json knows these very weights
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def samples(self) -> list[list[str]]:
        return [line["samples"] for line in self.lines]

    @property
    def taken(self) -> Counter[str]:
        return Counter(sample for step in self.samples for sample in step)

    @classmethod
    def of(cls, path: Path) -> "Result":
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        kept = [{name: value for name, value in line.items() if name not in TIMED} for line in lines]
        adapter, record = RunFolder(path=path).adapter, RunFolder(path=path).record
        if not adapter.is_dir():
            return cls(lines=kept)
        return cls(
            adapter=(adapter / "adapter_model.safetensors").read_bytes(),
            described=read_json(record).get("adapter", {}).get("sha256") == sha256(adapter, suffixes=(".safetensors",)),
            lines=kept,
        )


def unbroken(home: Path, engine: Engine) -> Result:
    name = f"whole-{engine.name.replace(' ', '')}"
    shutil.rmtree(home / "runs" / name, ignore_errors=True)
    run = launch(home, name, engine)
    code = run.ended()
    if code != 0:
        raise RuntimeError(f"the unbroken run ended with {code}:\n{(home / f'{name}.log').read_text()}")
    return Result.of(run.path)


def trial(home: Path, number: int, fault: Fault, engine: Engine, whole: Result, draw: random.Random) -> dict[str, Any]:
    """Run, inject one fault, resume until finished; the row of the table."""
    name, started = f"trial-{number}", time.monotonic()
    shutil.rmtree(home / "runs" / name, ignore_errors=True)
    log = home / f"{name}.log"
    log.unlink(missing_ok=True)
    run = launch(home, name, engine)
    what = fault.strikes(run, draw)
    codes, orphans = [run.ended()], run.orphans()
    fault.repair(run)
    while codes[-1] != 0 and len(codes) <= RESUMES:
        run = launch(home, name, engine, "--resume", "auto")
        codes.append(run.ended())
        orphans += run.orphans()
    found = Result.of(run.path) if codes[-1] == 0 else Result()
    checks = {
        "finished": codes[-1] == 0,
        "described": found.described,
        "same weights": found.adapter == whole.adapter,
        "same samples": found.samples == whole.samples,
        "same numbers": found.lines == whole.lines,
        "no orphans": not orphans,
        "tidy": not fault.tidy or "Traceback" not in log.read_text(),
    }
    return {
        "number": number,
        "fault": fault.name,
        "engine": engine.name,
        "what": what,
        "codes": codes,
        "output": [line for line in log.read_text().splitlines() if line.startswith(("skipped", "stopped"))],
        "failed": [name for name, holds in checks.items() if not holds],
        "lost": (whole.taken - found.taken).total(),
        "repeated": (found.taken - whole.taken).total(),
        "orphans": len(orphans),
        "seconds": round(time.monotonic() - started, 1),
    }
