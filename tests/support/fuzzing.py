"""Hostile input to every reader of files: a command must end with exit code 0, 1 or 2, in time and within memory.

Each surface prepares valid input once, and draws hostile variants of it. Commands run in this process.
"""

import contextlib
import io
import json
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import av
import torch
import yaml
from hypothesis import strategies as st
from openpyxl import Workbook

from omnimem.backbones import Encoded, ModelOptions, Turn, load_backbone
from omnimem.budget import Budget
from omnimem.checksums import SEAL, origin_of, seal
from omnimem.cli.parser import run_command
from omnimem.cli.tuned_model import TunedModel, load_tuned
from omnimem.commands import check, compare, convert, score
from omnimem.config import dump, load
from omnimem.config.exported import Exported, Origin
from omnimem.media.decode import read_audio_blocks, read_frames
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.run import RunFolder, plan
from omnimem.streaming.encoder_cache import EncoderCache, MediaStats, TrackSegment
from omnimem.training.arguments import train_section
from support.comparison_runs import write_arm, write_trace
from support.finished_run import config_of, write_run
from support.mutation import as_json, damaged_bytes, damaged_weights, mutated, variant, variant_lines
from support.task_layouts import LMMS_LVBENCH, lvbench
from support.thinkers import write_folder

Draw = Any
Case = Callable[[], object]
HANG = 30.0  # seconds
MEMORY = 2.0  # times the peak of the clean run


@final
class Hang(BaseException):
    """A case took longer than HANG."""


@final
class WrongDuration(Exception):
    """A file was accepted, and read at another length than it has."""


@final
@dataclass
class Verdicts:
    """What happened in the cases so far."""

    cases: Counter[str] = field(default_factory=Counter)  # by surface
    refused: Counter[str] = field(default_factory=Counter)  # those that ended with exit code 1 or 2
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    memory: list[str] = field(default_factory=list)
    durations: list[str] = field(default_factory=list)
    clean: dict[str, int] = field(default_factory=dict)  # peak bytes of the clean run, by surface

    @property
    def failures(self) -> list[str]:
        """Everything that must not happen."""
        return [*self.tracebacks, *self.hangs, *self.memory, *self.durations]

    def run(self, surface: str, case: Case, what: str) -> None:
        """Run a case; the first of a surface is the clean one."""
        reset_peak()
        code, lines, error = _outcome(case)
        peak = peak_bytes()
        self.cases[surface] += 1
        self.refused[surface] += code in (1, 2)
        if isinstance(error, Hang):
            self.hangs.append(f"{surface}: {what}")
        elif isinstance(error, WrongDuration):
            self.durations.append(f"{surface}: {error}: {what}")
        elif error is not None or code not in (0, 1, 2) or (code == 2 and not any(lines)):
            last = traceback.format_exception(error)[-1].strip()[:300] if error else f"exit code {code}: {lines[:3]}"
            where = (
                [f"{each.filename}:{each.lineno}" for each in traceback.extract_tb(error.__traceback__)[-3:]]
                if error
                else []
            )
            self.tracebacks.append(f"{surface}: {last} at {' < '.join(reversed(where))}: {what}")
        most = self.clean.setdefault(surface, peak)
        if peak > MEMORY * most:
            self.memory.append(f"{surface}: {peak / 1e6:.0f} MB, clean {most / 1e6:.0f} MB: {what}")


def _outcome(case: Case) -> tuple[int, list[str], BaseException | None]:
    """Exit code, error lines, and an exception that is no exit."""
    errors = io.StringIO()
    former = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            run_command(lambda _: case() and None)
    except SystemExit as left:
        return int(left.code or 0), errors.getvalue().splitlines(), None
    except BaseException as error:  # noqa: BLE001 - any of them is what the harness looks for
        return -1, errors.getvalue().splitlines(), error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    return -1, [], None


def _hang(number: int, frame: object) -> None:
    raise Hang


def reset_peak() -> None:
    """Start a new peak of resident memory (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak of resident memory since `reset_peak`; 0 where it is not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


@final
@dataclass(frozen=True)
class Surface:
    """A reader: `draw` gives a hostile case, or the clean one for None."""

    name: str
    case: Callable[[Draw | None, Path, "Material"], Case]
    share: int = 4  # of the cases; 1: slow


@final
class Material:
    """Valid input, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_folder(folder / "model", rates="tiny")
        self.run = write_run(folder / "runs" / "x", self.model)
        self.run.metrics.write_text("".join(json.dumps({"step": n, "loss": 0.5}) + "\n" for n in range(1, 9)))
        for arm in ("tuned", "training_free"):
            write_arm(self.run.path, arm, videos=2, per_kind=1)
        write_trace(self.run.evaluation("tuned"))
        write_mp4(draw_world(3, 8), folder / "a.mp4")
        self.lvbench = lvbench(folder / "lvbench")
        self.backbone = load_backbone(ModelOptions(path=str(self.model)))
        self.entry = _entry(folder / "entry" / "x.safetensors")
        self.config = yaml.safe_load(dump(config_of(self.model)))
        self.budget = json.loads(self.run.budget.read_text())
        origin = Origin(
            **{"kind": "adapter", "base": "b", "base_revision": None, "base_sha256": "", "adapter_sha256": ""},
            step=1,
            run={},
        )
        run = config_of(self.model)
        exported = Exported(
            model=run.model,
            stream=run.stream,
            memory=run.memory,
            budget=Budget.read(self.run.budget),
            max_new_tokens=4,
            origin=origin,
        )
        exported.write(folder)
        self.exported = json.loads((folder / "omnimem.json").read_text())

    def linked(self, at: Path) -> Path:
        """A copy of the run folder."""
        shutil.rmtree(at, ignore_errors=True)
        shutil.copytree(self.run.path, at)
        return at


ROW = {
    "id": "s",
    "video": "a.mp4",
    "audio": None,
    "start": 0,
    "end": 8.0,
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "What is it ?", "at": 3.0},
        {"role": "assistant", "content": "red", "loss": True},
    ],
    "meta": {"kinds": ["visual"], "seconds": 8},
}
TURNS = {
    "messages": [{"role": "user", "content": "<video>What ?"}, {"role": "assistant", "content": "red", "loss": 1}],
    "videos": ["a.mp4"],
}
TABLE = [["video", "question", "answer", "prediction", "score"], ["1", "q", "A", "A.", 1], ["2", "q", "B", "", 0]]


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _config(draw: Draw | None, at: Path, made: Material) -> Case:
    value = made.config if draw is None else mutated(draw, made.config)
    text = yaml.safe_dump(json.loads(json.dumps(value)), allow_unicode=True).encode("utf-8", "surrogatepass")
    if draw is not None and not draw(st.integers(0, 3)):
        text = damaged_bytes(draw, text)
    path = put(at / "c.yaml", text)
    return lambda: dump(load(path, train=train_section()))


def _override(draw: Draw | None, at: Path, made: Material) -> Case:
    path = put(at / "c.yaml", yaml.safe_dump(made.config).encode())
    given = ["train.max_steps=2"]
    if draw is not None:
        names = (
            "name",
            "memory.slots_per_layer",
            "tuning.budgets",
            "tuning.budgets.0",
            "train.x",
            "evaluate",
            "a.²",
            "..",
            "",
        )
        values = st.one_of(
            st.text(max_size=30), st.sampled_from(("[[", "{a: {", "&a [*a]", "1e999", ".inf", "null", "9" * 400))
        )
        given = [f"{draw(st.sampled_from(names))}={draw(values)}"]
    return lambda: dump(load(path, given, train=train_section()))


def _manifest(draw: Draw | None, at: Path, made: Material) -> Case:
    rows = [ROW, {**ROW, "id": "t"}]
    path = put(made.folder / "m.jsonl", variant_lines(draw, rows) if draw else b"\n".join(map(as_json, rows)))
    return lambda: check.main([str(path), "--max-failures", "1"])


def _convert(draw: Draw | None, at: Path, made: Material) -> Case:
    rows = [TURNS, {**TURNS, "id": "2", "system": "s"}]
    path = put(made.folder / "c.jsonl", variant_lines(draw, rows) if draw else b"\n".join(map(as_json, rows)))
    (made.folder / "o.jsonl").unlink(missing_ok=True)
    return lambda: convert.main([str(path), "--out", str(made.folder / "o.jsonl"), "--max-failures", "1"])


def _question(draw: Draw | None, at: Path, made: Material) -> Case:
    text = (
        "What is it ?"
        if draw is None
        else draw(st.one_of(st.text(), st.sampled_from(("\ud800", "x" * 10**6, "<|VIDEO|>" * 999))))
    )
    return lambda: made.backbone.turn(Turn(text=text, answer=text), tracks="both")


def _predictions(draw: Draw | None, at: Path, made: Material) -> Case:
    kind = "jsonl" if draw is None else draw(st.sampled_from(("jsonl", "tsv", "xlsx")))
    if kind == "jsonl":
        rows = [json.loads(line) for line in LMMS_LVBENCH.read_text().splitlines()]
        path = put(at / "p.jsonl", variant_lines(draw, rows) if draw else LMMS_LVBENCH.read_bytes())
    else:
        rows = mutated(draw, TABLE)
        cells = [[str(cell)[:30_000] for cell in row] if isinstance(row, list) else [str(row)] for row in rows or [[]]]
        if kind == "tsv":
            data = "\n".join("\t".join(row) for row in cells).encode("utf-8", "replace")
        else:
            data = _workbook(cells)
        path = put(at / f"p.{kind}", damaged_bytes(draw, data) if draw(st.booleans()) else data)
    given = [str(path), "--benchmark", "lvbench", "--root", str(made.lvbench), "--out", str(at / "scored")]
    return lambda: score.main(given)


def _workbook(cells: list[list[str]]) -> bytes:
    book, data = Workbook(), io.BytesIO()
    for row in cells:
        book.worksheets[0].append(["".join(c for c in cell if c >= " " and c < "\ud800")[:300] for cell in row])
    book.save(data)
    return data.getvalue()


def _annotations(draw: Draw | None, at: Path, made: Material) -> Case:
    path = next(made.lvbench.glob("*.json*"))
    data = path.read_bytes()

    def checked() -> None:
        try:
            if draw is not None:
                path.write_bytes(changed)
            check.main(["--benchmark", "lvbench", "--root", str(made.lvbench), "--subset", "--max-failures", "1"])
        finally:
            path.write_bytes(data)

    changed = data
    if draw is not None:
        changed = variant_lines(draw, [json.loads(line) for line in data.splitlines() if line.strip()])
    return checked


def _budget(draw: Draw | None, at: Path, made: Material) -> Case:
    path = put(at / "budget.json", variant(draw, made.budget) if draw else as_json(made.budget))
    return lambda: Budget.read(path).json()


def _exported(draw: Draw | None, at: Path, made: Material) -> Case:
    put(at / "omnimem.json", variant(draw, made.exported) if draw else as_json(made.exported))

    def use() -> None:
        found = Exported.read(at)
        found.policies(None)
        assert found.policy

    return use


def _resumed(draw: Draw | None, at: Path, made: Material) -> Case:
    folder = made.linked(at / "runs" / "x")
    if draw is not None:
        name = draw(
            st.sampled_from(
                ("run.json", "metrics.jsonl", "checkpoint-4/sealed.json", "checkpoint-4/trainer_state.json")
            )
        )
        _spoil(draw, folder / name)

    def resume() -> None:
        plan("x", resume="auto", runs=folder.parent).open("name: x\n", {"seed": 1}, patience=0.0)

    return resume


COMPARED = (
    "eval/tuned/summary.json",
    "eval/tuned/recall.jsonl",
    "eval/tuned/trace.json",
    "budget.json",
    "metrics.jsonl",
)


def _compared(draw: Draw | None, at: Path, made: Material) -> Case:
    folder = made.linked(at / "runs" / "x")
    if draw is not None:
        _spoil(draw, folder / draw(st.sampled_from(COMPARED)))
    return lambda: compare.main([str(folder), "--out", str(at / "out"), "--draws", "100", "--allow-different"])


def _spoil(draw: Draw, path: Path) -> None:
    if path.suffix == ".safetensors":
        path.write_bytes(damaged_weights(draw, path.read_bytes()))
    elif path.suffix == ".yaml":
        path.write_bytes(yaml.safe_dump(mutated(draw, yaml.safe_load(path.read_text())), allow_unicode=False).encode())
    elif path.suffix == ".jsonl":
        path.write_bytes(variant_lines(draw, [json.loads(line) for line in path.read_text().splitlines()]))
    else:
        path.write_bytes(variant(draw, json.loads(path.read_text())))


def _adapter(draw: Draw | None, at: Path, made: Material) -> Case:
    """Settings, weights and seal of an adapter in its run, and run.json; sealed, sealed again or not sealed."""
    run = RunFolder(path=made.linked(at / "runs" / "x"))
    if draw is not None:
        name = draw(st.sampled_from(("adapter_config.json",) * 3 + ("adapter_model.safetensors", SEAL, "../run.json")))
        _spoil(draw, run.adapter / name)
        match draw(st.sampled_from(("as it is", "again", "none"))):
            case "again" if name != SEAL:
                seal(run.adapter, origin_of(run.adapter))
            case "none":
                (run.adapter / SEAL).unlink(missing_ok=True)
    return lambda: load_tuned(load_backbone(ModelOptions(path=str(made.model))).model, run.adapter)


EXPORTED = ("run.json", "config.yaml", "budget.json", "adapter/sealed.json", "checkpoint-4/sealed.json")


def _to_export(draw: Draw | None, at: Path, made: Material) -> Case:
    """What an export reads of a run before the weights."""
    folder, checkpoint = made.linked(at / "runs" / "x"), None
    if draw is not None:
        _spoil(draw, folder / draw(st.sampled_from(EXPORTED)))
        checkpoint = draw(st.sampled_from((None, 4)))
    return lambda: TunedModel.of(folder, checkpoint=checkpoint)


def _merged(draw: Draw | None, at: Path, made: Material) -> Case:
    """A merged folder: weights, omnimem.json and seal; sealed, sealed again or not sealed."""
    folder = at / "merged"
    shutil.copytree(made.model, folder)
    table = {**made.exported, "model": {**made.exported["model"], "path": "."}}
    put(folder / "omnimem.json", as_json({**table, "origin": {**table["origin"], "kind": "merged"}}))
    seal(folder)
    if draw is not None:
        name = draw(st.sampled_from(("omnimem.json", "model.safetensors", SEAL, "config.json")))
        _spoil(draw, folder / name)
        match draw(st.sampled_from(("as it is", "again", "none"))):
            case "again" if name != SEAL:
                seal(folder)
            case "none":
                (folder / SEAL).unlink(missing_ok=True)
    return lambda: load_backbone(Exported.read(folder).model)


MODEL = ("config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")


def _model(draw: Draw | None, at: Path, made: Material) -> Case:
    folder = at / "model"
    shutil.copytree(made.model, folder)
    if draw is not None and draw(st.integers(0, 4)):
        _spoil(draw, folder / draw(st.sampled_from([name for name in MODEL if (folder / name).exists()])))
    elif draw is not None:
        path = folder / draw(st.sampled_from(("model.safetensors", "chat_template.jinja")))
        if path.suffix == ".safetensors":
            _spoil(draw, path)
        else:
            path.write_bytes(damaged_bytes(draw, path.read_bytes()))
    return lambda: load_backbone(ModelOptions(path=str(folder)))


def _entry(path: Path) -> bytes:
    """The content of an entry of the encoder cache."""
    encoded = Encoded(
        visual=torch.ones(1, 4, 8), audio=None, grid=(1, 2, 2), start=0.0, seconds=2.0, seconds_per_grid=2.0
    )
    EncoderCache(path.parent, "x").store(path, [TrackSegment(track="visual", encoded=encoded, media=MediaStats())])
    return path.read_bytes()


def _cache(draw: Draw | None, at: Path, made: Material) -> Case:
    path = at / "x.safetensors"
    path.write_bytes(made.entry if draw is None else damaged_bytes(draw, made.entry))
    return lambda: list(EncoderCache(at, "x").load(path, made.backbone.device, "visual") or ())


def _media(draw: Draw | None, at: Path, made: Material) -> Case:
    kind = "mp4" if draw is None else draw(st.sampled_from(MEDIA))
    source = made.folder / f"media.{kind}"
    if not source.exists():
        _remux(made.folder / "a.mp4", source)
    path = put(at / f"a.{kind}", source.read_bytes() if draw is None else damaged_bytes(draw, source.read_bytes()))

    def read() -> None:
        frames = sum(1 for _ in read_frames(path, fps=FRAMES)) / FRAMES
        samples = sum(len(block) for block in read_audio_blocks(path)) / 16_000
        for kind, seconds in (("video", frames), ("audio", samples)):
            check_length(kind, seconds, decoded_seconds(path, kind))

    return read


def check_length(kind: str, seconds: float, expected: float) -> None:
    """Raises WrongDuration for seconds that were neither made nor are in the file that was damaged."""
    if abs(seconds - LENGTH) > TOLERANCE and abs(seconds - expected) > TOLERANCE:
        raise WrongDuration(f"{seconds:.2f} s of {kind}, made {LENGTH:g} s, decoded alone {expected:.2f} s")


LENGTH, FRAMES, TOLERANCE = 8.0, 4.0, 0.5  # seconds of the video that is made, frames per second read, seconds


def decoded_seconds(path: Path, kind: str) -> float:
    """From the beginning of the file to the end of the last frame of a track, by PyAV alone."""
    with av.open(str(path)) as container:
        reached = start = float(container.start_time or 0) / av.time_base
        for frame in container.decode(next(each for each in container.streams if each.type == kind)):
            lasts = frame.samples / frame.sample_rate if kind == "audio" else float(frame.duration * frame.time_base)
            reached = max(reached, (reached if frame.time is None else frame.time) + lasts)
    return reached - start


MEDIA = ("mp4", "mkv", "flv", "mov")


def _remux(source: Path, target: Path) -> None:
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        streams = {stream.index: write.add_stream_from_template(stream) for stream in read.streams}
        for packet in read.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                write.mux(packet)


SURFACES = (
    Surface("config", _config),
    Surface("overrides", _override),
    Surface("manifest", _manifest),
    Surface("conversations", _convert),
    Surface("questions", _question),
    Surface("predictions", _predictions),
    Surface("annotations", _annotations),
    Surface("budgets", _budget),
    Surface("exported folders", _exported),
    Surface("run folders", _resumed),
    Surface("results", _compared, share=2),
    Surface("adapters", _adapter, share=1),
    Surface("runs to export", _to_export, share=2),
    Surface("model folders", _model, share=1),
    Surface("merged folders", _merged, share=1),
    Surface("cache entries", _cache, share=2),
    Surface("media", _media, share=2),
)


def strategies(surface: Surface, folder: Path, made: Material) -> st.SearchStrategy[tuple[Case, str]]:
    """Hostile cases of a surface, each in a folder of its own, with a description."""

    @st.composite
    def drawn(draw: Draw) -> tuple[Case, str]:
        at = folder / surface.name.replace(" ", "-")
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir(parents=True)
        case = surface.case(draw, at, made)
        return case, _described(at)

    return drawn()


def clean(surface: Surface, folder: Path, made: Material) -> Case:
    """The case with valid input."""
    at = folder / f"{surface.name.replace(' ', '-')}-clean"
    at.mkdir(parents=True, exist_ok=True)
    return surface.case(None, at, made)


def _described(at: Path) -> str:
    """The newest small file of the case."""
    files = sorted((path for path in at.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    return f"{files[-1].name} = {files[-1].read_bytes()[:300]!r}" if files else "drawn text"
