"""Runs that are stopped, meet non-finite numbers, run out of disk space, or find damaged checkpoints."""

import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.finished_run import LORA, config_of
from support.ranks import Ended, command, start
from support.tiny_run import SCRIPT, Run, given, tune
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

import omnimem.commands.finetune
import omnimem.training.checkpoints
import omnimem.training.trainer
from omnimem.backbones import ModelOptions, load_backbone
from omnimem.checksums import damage
from omnimem.cli import preflight
from omnimem.cli.preflight import check_data, check_run
from omnimem.config import ConfigError, RunConfig
from omnimem.data import DataOptions, TooManyFailures, read_manifest
from omnimem.run import sha256
from omnimem.training import shutdown as stopping
from omnimem.training.nonfinite import NonFiniteGuard
from omnimem.training.shutdown import ShutdownSignal
from omnimem.tuning import AdapterError, StreamedModel, add_adapter

ZERO2 = "train.deepspeed=deepspeed/zero2.json"
STEPS = ("train.max_steps=6", "train.save_steps=100")


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def test_a_launcher_that_ended_before_a_rank_was_ready_counts_as_a_stop_signal(monkeypatch) -> None:
    """It may end between the look-up of its process and that of its command line."""
    process, sent = subprocess.Popen(["true"]), []
    process.wait()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(stopping, "_parent", lambda number: process.pid)
    monkeypatch.setattr(os, "kill", lambda number, asked: sent.append((number, asked)))
    stopping.follow_launcher()
    assert sent == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["term", "hup"])
def test_a_signal_stops_training_at_the_end_of_the_step(number, arguments) -> None:
    before = signal.getsignal(number), signal.getsignal(signal.SIGINT)
    control, interruption = TrainerControl(), ShutdownSignal()
    with interruption:
        interruption.on_step_end(arguments, TrainerState(), control)
        assert not control.should_training_stop
        for _ in range(2):
            os.kill(os.getpid(), number)
        interruption.on_step_end(arguments, TrainerState(), control)
    assert control.should_save
    assert control.should_training_stop
    assert interruption.agreed == number
    assert (signal.getsignal(number), signal.getsignal(signal.SIGINT)) == before


def test_a_hang_up_that_nohup_ignores_stays_ignored(arguments) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ShutdownSignal() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.asked == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_second_signal_ends_at_once(arguments) -> None:
    def interrupted() -> None:
        with ShutdownSignal() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.asked == signal.SIGINT
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL

    with pytest.raises(KeyboardInterrupt):  # the previous handler gets it
        interrupted()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_neither_weights_nor_optimizer(number, arguments) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    control, state = TrainerControl(), TrainerState()
    with NonFiniteGuard(2) as bad:
        bad.on_train_begin(arguments, state, control, model=model)

        def step(factor: float, sample: str) -> None:
            bad.begin([sample])
            loss = model(torch.ones(3)).square().sum() * factor
            bad.check(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            state.global_step += 1
            bad.on_step_end(arguments, state, control)

        step(1.0, "good")
        kept = _copy(model, optimizer)
        step(number, "spoiled")
        assert not control.should_training_stop
        assert all(torch.equal(a, b) for a, b in zip(kept, _copy(model, optimizer), strict=True))
        step(1.0, "good")
        assert not all(torch.equal(a, b) for a, b in zip(kept, _copy(model, optimizer), strict=True))
        assert [(each.step, each.samples) for each in bad.found] == [(2, ("spoiled",))]
        step(number, "spoiled")
        assert not bad.too_many  # one in a row
        step(number, "again")
        assert bad.too_many
        assert control.should_training_stop
    step_after = torch.optim.SGD(model.parameters(), lr=0.1)  # no hook is left behind
    model(torch.ones(3)).sum().backward()
    before = model.weight.detach().clone()
    step_after.step()
    assert not torch.equal(before, model.weight)


def _copy(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *states)]


@pytest.fixture(scope="module")
def tuned_model(folder: Path) -> StreamedModel:
    return add_adapter(load_backbone(ModelOptions(path=str(folder / "model"))).model, LORA)


def run_of(folder: Path, **tuning: Any) -> RunConfig:
    """A run over the six videos."""
    run = config_of(folder / "model")
    data = DataOptions(train=str(folder / "train.jsonl"), max_failures=0.2)
    return replace(run, data=data, tuning=replace(run.tuning, **tuning))


def test_the_preflight_counts_samples_and_names_those_that_cannot_be_read(folder) -> None:
    samples = read_manifest(folder / "broken.jsonl")
    line, longest = check_data(run_of(folder), samples)
    assert line.startswith("data: 6 samples opened, 40 s of streams with video and audio (5); 1 unreadable (first: ")
    assert longest.id != "broken"
    gone = [replace(sample, video=folder / "gone.mp4") for sample in samples[:2]]
    with pytest.raises(TooManyFailures, match="2 of 6 samples failed"):
        check_data(run_of(folder), [*gone, *samples[2:5], samples[0]])


def test_the_preflight_opens_part_of_a_large_data_set_and_checks_that_all_files_exist(folder, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "PROBED", 3)
    samples = read_manifest(folder / "train.jsonl")
    assert check_data(run_of(folder), samples)[0].startswith("data: 3 of 6 samples opened, 24 s")
    unopened = [*samples[:1], replace(samples[1], video=folder / "gone.mp4"), *samples[2:]]
    assert "; 1 missing (first: " in check_data(run_of(folder), unopened)[0]


def test_the_preflight_counts_targets_and_refuses_a_disk_that_is_too_small(folder, tuned_model, monkeypatch) -> None:
    adapter, disk = check_run(run_of(folder), tuned_model, folder, 3)
    assert adapter.startswith("adapter: 6 modules (q_proj 2, v_proj 2, down_proj 2), ")
    assert disk.startswith("disk: 4 x ")
    lora = replace(LORA, targets=(*LORA.targets, "k_proj"))
    with pytest.raises(AdapterError, match="k_proj match no module of this model; matched: q_proj, v_proj, down_proj"):
        list(check_run(run_of(folder, lora=lora), tuned_model, folder, 3))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"0\.0 MB are free; make room, or set train\.save_total_limit"):
        list(check_run(run_of(folder), tuned_model, folder, 3))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_preflight_does_not_change_the_run(folder) -> None:
    steps = ("train.max_steps=3",)
    checked, skipped = tune(folder, "checked", *steps), tune(folder, "skipped", *steps, "--skip-preflight")
    lines = [line for line in checked.ended.outputs[0].splitlines() if line.startswith("preflight: ")]
    assert [line.split()[1] for line in lines] == ["data:", "adapter:", "disk:", "step:"]
    assert "at full memory" in lines[-1]
    assert "preflight" not in skipped.ended.outputs[0]
    assert checked.lines == skipped.lines
    assert torch.equal(checked.adapter, skipped.adapter)


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Callable[..., Run]:
    """The unbroken run of six steps on so many ranks, by an engine: each is made once."""
    return cache(lambda ranks, *engine: tune(folder, f"whole-{ranks}{len(engine)}", *STEPS, *engine, ranks=ranks))


def stopped(folder: Path, name: str, number: signal.Signals, *arguments: str, ranks: int) -> Ended:
    """A run whose last rank gets a signal in its third step."""
    running = start(SCRIPT, given(folder, name, *STEPS, *arguments), folder, ranks=ranks)
    running.until("step 2 of 6")
    os.kill(running.processes[-1].pid or 0, number)
    for process in running.processes:
        process.join()
    codes = tuple(process.exitcode for process in running.processes)
    return Ended(codes=codes, outputs=tuple(log.read_text() for log in running.logs))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("number", "ranks", "engine"), [(signal.SIGINT, 0, ()), (signal.SIGTERM, 2, (ZERO2,))], ids=["int", "term"]
)
def test_a_stopped_run_ends_with_a_checkpoint_and_resumes_bit_for_bit(folder, unbroken, number, ranks, engine) -> None:
    name = f"stopped-{ranks}"
    ended = stopped(folder, name, number, *engine, ranks=ranks)
    assert set(ended.codes) == {128 + number}
    path = folder / "runs" / name
    (checkpoint,) = path.glob("checkpoint-*")
    assert damage(checkpoint) is None
    step = int(checkpoint.name.rpartition("-")[2])
    last = ended.outputs[0].splitlines()[-1]
    assert last == f"stopped after step {step}; continue from runs/{name}/{checkpoint.name} with --resume auto"
    assert not (path / "adapter").exists()
    resumed = tune(folder, name, *STEPS, *engine, "--resume", "auto", ranks=ranks)
    whole = unbroken(ranks, *engine)
    assert resumed.lines == whole.lines
    assert torch.equal(resumed.adapter, whole.adapter)


def stop_in_last_checkpoint() -> None:
    """SIGTERM to the last rank after its last step, in the process that calls this."""
    original = omnimem.training.checkpoints.write_portable

    def stopped(folder: Path, state: Any, layout: Any, step: int, schedule: Any) -> None:
        if step == 6 and os.environ.get("RANK", "0") == str(layout.ranks - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        original(folder, state, layout, step, schedule)

    omnimem.training.checkpoints.write_portable = stopped


def stop_at(method: str, before: bool) -> None:
    """SIGTERM before or after a method of the trainer, in the process that calls this."""
    trainer = omnimem.commands.finetune.StreamTrainer
    original = getattr(trainer, method)

    def stopped(self: Any, *rest: Any) -> None:
        if before:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *rest)
        if not before:
            os.kill(os.getpid(), signal.SIGTERM)

    setattr(trainer, method, stopped)


AFTER_AGREEMENT = partial(stop_at, "_stop_if_asked", before=False)
BEFORE_ADAPTER = partial(stop_at, "save_adapter", before=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("moment", "ranks", "code"),
    [
        (stop_in_last_checkpoint, 0, 143),
        (stop_in_last_checkpoint, 2, 143),
        (AFTER_AGREEMENT, 0, -15),
        (BEFORE_ADAPTER, 0, -15),
    ],
    ids=["checkpoint", "checkpoint-2", "agreement", "adapter"],
)
def test_a_stop_signal_after_the_last_step_leaves_the_adapter_to_write(
    folder, unbroken, moment, ranks, code, request
) -> None:
    name = request.node.callspec.id
    ended = start(SCRIPT, given(folder, name, *STEPS), folder, ranks=ranks, first=moment).end()
    assert set(ended.codes) == {code}, ended.outputs
    path = folder / "runs" / name
    assert not (path / "adapter").exists()
    assert damage(path / "checkpoint-6") is None
    resumed = tune(folder, name, *STEPS, "--resume", "auto", ranks=ranks)
    assert resumed.lines == unbroken(ranks).lines
    record = json.loads((path / "run.json").read_text())
    assert record["adapter"]["sha256"] == sha256(path / "adapter", suffixes=(".safetensors",))


@pytest.mark.slow
def test_a_run_without_checkpoints_writes_one_if_stopped_after_its_last_step(folder) -> None:
    arguments = given(folder, "kept-none", "train.max_steps=6", "train.save_strategy=no")
    ended = start(SCRIPT, arguments, folder, first=partial(stop_at, "_stop_if_asked", before=True)).end()
    assert ended.codes == (143,), ended.outputs
    assert [each.name for each in (folder / "runs" / "kept-none").glob("checkpoint-*")] == ["checkpoint-6"]
    last = ended.outputs[0].splitlines()[-1]
    assert last == "stopped after step 6; continue from runs/kept-none/checkpoint-6 with --resume auto"
    resumed = tune(folder, "kept-none", "train.max_steps=6", "--resume", "auto")
    assert torch.equal(resumed.adapter, tune(folder, "kept-none-whole", "train.max_steps=6").adapter)


class Poison(torch.autograd.Function):
    """Finite forward, non-finite gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def poison_video_2() -> None:
    """The gradient of video 2 is not finite, in the process that calls this."""
    original = omnimem.training.trainer.streamed_loss

    def poisoned(attached: Any, feeder: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        outcome = original(attached, feeder, batch, *rest, **options)
        if all(opened.sample.id != "film2" for opened in batch):
            return outcome
        return replace(outcome, loss=Poison.apply(outcome.loss))

    omnimem.training.trainer.streamed_loss = poisoned


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "engine"), [(0, ()), (2, (ZERO2,))], ids=["plain", "zero2 x 2"])
def test_a_sample_with_a_non_finite_gradient_is_named_and_its_step_skipped_on_every_rank(folder, ranks, engine) -> None:
    steps = ("train.max_steps=4", "train.save_steps=1")
    arguments = given(folder, name := f"poisoned-{ranks}", *steps, *engine)
    command(SCRIPT, arguments, folder, ranks=ranks, first=poison_video_2)
    path = folder / "runs" / name
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (bad,) = [line for line in lines if "film2" in line["samples"]]
    assert bad["left_out"] == ["film2"]
    assert bad["loss"] is None
    assert all(line["loss"] is not None and not line["left_out"] for line in lines if line is not bad)
    record = json.loads((path / "run.json").read_text())
    assert record["left_out_steps"] == [{"step": bad["step"], "samples": ["film2"]}]
    learned = [load_file(path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2, 3, 4)]
    for step in (2, 3, 4):
        same = all(torch.equal(learned[step - 1][key], learned[step - 2][key]) for key in learned[0])
        assert same == (step == bad["step"])
    if ranks:
        assert bad["step"] == 1  # nothing was learned yet: every B is zero
        assert not any(tensor.any() for key, tensor in learned[0].items() if "lora_B" in key)


@pytest.mark.slow
def test_too_many_non_finite_steps_end_the_run_with_1_and_name_the_samples(folder) -> None:
    arguments = given(folder, "diverged", "train.learning_rate=1e30", "train.max_bad_steps=2", "train.max_grad_norm=0")
    ended = start(SCRIPT, arguments, folder).end()
    assert ended.codes == (1,)
    last = ended.outputs[0].splitlines()[-1]
    assert last.startswith("2 steps in a row, the last of them ")
    assert "not finite, with film" in last
    assert "; lower train.learning_rate or check these samples; continue from runs/diverged/checkpoint-" in last
    assert "Traceback" not in ended.outputs[0]


def small_files() -> None:
    """Limit files to 20 kB, as on a full disk: the optimizer state is larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_full_disk_ends_the_run_with_1_and_keeps_the_last_checkpoint_complete(folder) -> None:
    tune(folder, "full", "train.max_steps=2", "train.save_steps=2")
    more = ("train.max_steps=4", "train.save_steps=2", "--resume", "auto")
    ended = start(SCRIPT, given(folder, "full", *more), folder, first=small_files).end()
    assert ended.codes == (1,)
    last = ended.outputs[0].splitlines()[-1]
    assert last.startswith("runs/full/checkpoint-4 could not be written (")
    assert "MB free); runs/full/checkpoint-2 is complete; free some space or repair the disk, then continue" in last
    assert "Traceback" not in ended.outputs[0]
    path = folder / "runs" / "full"
    assert [each.name for each in path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert damage(path / "checkpoint-2") is None
    finished = tune(folder, "full", *more)
    assert [line["step"] for line in finished.lines] == [1, 2, 3, 4]


@pytest.mark.slow
def test_metrics_that_cannot_be_written_end_the_run_with_1_and_one_line(folder) -> None:
    path = folder / "runs" / "unwritable"
    path.mkdir(parents=True)
    (path / "run.json").write_text("{}")
    (path / "metrics.jsonl").symlink_to("/dev/full")
    ended = start(SCRIPT, given(folder, "unwritable", *STEPS, "--resume", "auto"), folder).end()
    assert ended.codes == (1,)
    started = "runs/unwritable: no step was made in it; starting from the first step"
    said = [line for line in ended.outputs[0].splitlines() if not line.startswith(("preflight: ", "step "))]
    (line,) = [line for line in said if line != started]
    what = "No space left on device; free space"
    assert line.startswith(f"runs/unwritable/metrics.jsonl: {what}")
