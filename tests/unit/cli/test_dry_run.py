"""--dry-run: what it says is what a run would do, without weights, data, network or GPU."""

import json
import socket
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from support import families, thinkers

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.backbones.assembled import FAMILY
from omnimem.calibration import CalibrationError
from omnimem.cli import dry_run as preview
from omnimem.cli.build import refuse_unpadded
from omnimem.cli.cache_size import describe_cache
from omnimem.cli.dry_run import load_of, read_sample, skeleton_of
from omnimem.commands.finetune import describe_training, dry_run, unmeasurable
from omnimem.config import ConfigError, RunConfig, load
from omnimem.config.exported import policies_of
from omnimem.data import ManifestError
from omnimem.errors import UserError
from omnimem.footprint import footprint
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import WorldOptions, draw_world
from omnimem.run import RunFolder, Start
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.stream import Stream
from omnimem.tokens import Modality
from omnimem.training.arguments import train_section, training_arguments
from omnimem.tuning import LoraOptions, add_adapter

QUESTIONS = [
    {"role": "user", "content": "What colour is it?", "at": 5.0},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "What was said?"},
    {"role": "assistant", "content": "river", "loss": False},
]

ASKED = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thinkers.write_folder(tmp_path_factory.mktemp("model") / "thinker", rates="tiny")


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, an empty cache of the hub, and a network that must not be touched."""

    def refuse(*args: Any) -> NoReturn:
        raise AssertionError("a dry run opened a connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(preview, "TINY", checkpoint)


def shown(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    preview.preview(load("budget8k.yaml", overrides, train=train_section()))
    return capsys.readouterr().out


def recorded(folder: Path, checkpoint: Path, *overrides: str) -> RunConfig:
    """A run on one real mp4 with two questions."""
    folder.mkdir()
    write_mp4(draw_world(3, 12, WorldOptions()), folder / "a.mp4")
    line = {"id": "a", "video": "a.mp4", "audio": None, "messages": QUESTIONS}
    (folder / "train.jsonl").write_text(json.dumps(line) + "\n")
    given = [f"model={{path: {checkpoint}}}", f"data.train={folder}/train.jsonl", "stream.chunk_tokens=40"]
    return load("budget8k.yaml", [*given, "calibration.skip_chunks=0", *overrides], train=train_section())


def test_the_shipped_config_is_previewed_in_an_empty_folder_with_everything_missing_listed(capsys) -> None:
    said = shown(capsys)
    for title in ("settings", "DeepSpeed", "sample", "budget", "memory of a device", "missing"):
        assert f"--- {title}\n" in said
    missing = [line for line in said.splitlines() if line.startswith("missing: ")]
    assert [line.split(" ")[1] for line in missing] == ["weights", "training", *["benchmark"] * 3]
    assert "missing: benchmark lvbench (data/LVBench/video_info.meta.jsonl); get it with `hf download" in said
    assert all("; " in line for line in missing)
    assert "approximate" in said
    assert "[[A red circle; the word river.<|im_end|>]]" in said
    assert "8,192 slots per layer (1,365 audio + 6,827 visual) x 28 layers = 229,376 entries" in said


def test_tokens_chunks_and_labels_equal_those_of_a_real_run(tmp_path, checkpoint) -> None:
    run = recorded(tmp_path / "data", checkpoint)
    missing: list[str] = []
    skeleton = skeleton_of(run, missing)
    assert skeleton is not None
    reading = read_sample(run, skeleton, missing)
    assert (missing, skeleton.approximate, reading.sample.id) == ([], False, "a")
    backbone = load_backbone(run.model)
    feeder = Feeder(backbone, run.stream)
    chunks = list(feeder.chunks([feeder.open(reading.sample)]))
    with attach(backbone.text_model) as attached:
        stream = Stream(attached, run.memory.policy.build(None))
        for chunk in chunks:
            stream.feed(chunk)
    assert tuple(reading.tokens[kind] for kind in Modality) == stream.usage.tokens_in
    assert reading.chunks == tuple(chunk.count for chunk in chunks[1:])
    assert len(reading.chunks) > 2
    assert reading.last_position == stream.next_position - 1
    far = replace(reading, last_position=10**9)
    for positions in ("original", "compact"):
        (line,) = (line for line in preview.describe_sample(skeleton, far, positions) if "trained on" in line)
        assert ("compact" in line) == (positions == "compact")


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ("false", None),
        ("true", "limit 100 GB"),
        ("{size_gb: 1e-6}", "more than the limit"),
        ("{size_gb: null}", "no limit"),
    ],
)
def test_the_expected_size_of_the_encoder_cache_is_that_of_its_files(
    cache, expected, tmp_path, checkpoint, capsys
) -> None:
    run = recorded(tmp_path / "data", checkpoint, f"data.cache={cache}")
    preview.preview(run)
    said = capsys.readouterr().out
    assert ("encoder cache" in said) == (expected is not None)
    if expected is None:
        return
    assert expected in said
    skeleton = skeleton_of(run, [])
    facts = read_sample(run, skeleton, [])
    lines = describe_cache(run, skeleton.shapes, facts.tokens, facts.source.seconds, [facts.sample])
    (size,) = (line.partition(" for 1 stream")[0] for line in lines if "stream of" in line)
    # a file that is missing has no length, and changes no mean
    gone = replace(facts.sample, video=tmp_path / "gone.mp4", audio=None)
    ends = []
    for samples in ([facts.sample], [facts.sample, gone], [gone]):
        shown = describe_cache(run, skeleton.shapes, facts.tokens, facts.source.seconds, samples)
        ends.append(next(line for line in shown if " of 12" in line or "unknown" in line))
    assert ends[0].partition("stream of")[2] == ends[1].partition("streams of")[2]
    assert ends[2] == "the size of 1 stream is unknown: no file tells its length"
    feeder = Feeder(load_backbone(run.model), run.stream, tmp_path / "cache")
    feeder.open(replace(facts.sample, messages=facts.sample.messages[2:]))  # without the rest before a question
    sizes = [file.stat().st_size for file in (tmp_path / "cache").iterdir()]
    assert len(sizes) == 2
    number, unit = size.removeprefix("~ ").split()
    assert unit == "KiB"
    assert 0.7 * sum(sizes) < float(number) * 1024 < sum(sizes)


def test_an_unreadable_first_sample_is_listed_and_replaced_by_a_synthetic_one(tmp_path, checkpoint, capsys) -> None:
    run = recorded(tmp_path / "data", checkpoint, "stream.chunk_tokens=400")
    (tmp_path / "data" / "a.mp4").write_bytes(b"no film")
    preview.preview(run)
    said = capsys.readouterr().out
    assert "synthetic: 64.0 s" in said
    assert any(line.startswith("missing: the first sample's media (") for line in said.splitlines())


def test_the_memory_table_has_the_bytes_of_the_memory_that_chooses(tmp_path, checkpoint, capsys) -> None:
    """As a stream with an adapter reports them, once its budget is full."""
    budget = ("memory.slots_per_layer=9", "memory.budget={name: split, visual_audio_ratio: 2}")
    base = ("memory.selection_from=base", "tuning.selection.softening=hard", "tuning.budgets=[self, full]")
    run = recorded(tmp_path / "data", checkpoint, *budget, *base)
    run = replace(run, model=replace(run.model, dtype="float32"))
    skeleton = skeleton_of(run, [])
    assert skeleton is not None
    facts = read_sample(run, skeleton, [])
    rows = {row.what: row.bytes for row in footprint(skeleton.shapes, load_of(run, skeleton.shapes, facts))}
    backbone = load_backbone(run.model)
    add_adapter(backbone.model, LoraOptions(r=2, alpha=4.0))
    feeder = Feeder(backbone, run.stream)
    policy = policies_of(run.memory, run.memory.budget.build(2, 9))(9)
    with attach(backbone.text_model) as attached, torch.no_grad():
        stream = feeder.stream(attached, policy)
        for chunk in feeder.chunks([feeder.open(facts.sample)]):
            stream.feed(chunk)
    batch = load_of(run, skeleton.shapes, facts).batch
    assert rows["selector's memory"] == batch * stream.usage.selector_bytes > 0
    preview.preview(run)
    assert "chosen by the model without its adapter, which keeps 18 entries of its own\n" in capsys.readouterr().out


def test_the_memory_table_knows_ranges_and_the_teacher(tmp_path, checkpoint, capsys) -> None:
    """The largest chunk and budget of any step; the teacher's full memory, where the sample is not too long for it."""
    ranges = ("tuning.budgets={low: 4, high: 9}", "tuning.chunk_tokens={low: 20, high: 70}")
    for limit, taught in ((10_000, True), (10, False)):
        loss = f"tuning.loss.full_memory_kl={{max_tokens: {limit}}}"
        run = recorded(tmp_path / f"{limit}", checkpoint, *ranges, loss)
        skeleton = skeleton_of(run, [])
        assert skeleton is not None
        reading = read_sample(run, skeleton, [])
        media = reading.tokens[Modality.AUDIO] + reading.tokens[Modality.VISUAL]
        load = load_of(run, skeleton.shapes, reading)
        assert (load.entries, load.chunk_tokens, load.teacher_tokens) == (2 * 9, 70, media if taught else 0)
        rows = {row.what: row.bytes for row in footprint(skeleton.shapes, load)}
        pair, _ = skeleton.shapes.entry(0, load.dtype)
        expected = load.batch * 2 * (media + reading.tokens[Modality.TEXT]) * pair
        assert rows.get("teacher's full memory") == (expected if taught else None)
    preview.preview(run)
    said = capsys.readouterr().out
    assert "slots per layer in training, one drawn per step: 4 to 9\n" in said
    assert "chunk_tokens in training, one drawn per step: 20 to 70\n" in said


@pytest.mark.parametrize(("kept", "lacking"), [("", "no tokenizer"), ("tokenizer*", "no processor")])
@pytest.mark.parametrize("named", [False, True])
def test_a_release_whose_processor_is_elsewhere_is_refused_without_it(named, kept, lacking, tmp_path) -> None:
    families.write(tmp_path / "weights", "video_salmonn2_plus", processor=tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        if not (kept and file.match(kept)):
            file.unlink()
        elif not named:
            file.rename(tmp_path / "weights" / file.name)
    model = ModelOptions(path=str(tmp_path / "weights"), processor=str(tmp_path / "base") if named else None)
    with pytest.raises(ConfigError, match=rf"model\.processor: .* has {lacking}.*; give the folder with tokenizer"):
        skeleton_of(RunConfig(name="a", model=model), [])


@pytest.mark.parametrize("name", ["qwen2_5_vl_7b", "video_salmonn2_plus_7b", "video_salmonn2_plus_8b", "qwen3_vl_8b"])
def test_shipped_configs_are_planned_from_the_configuration_alone(name) -> None:
    missing: list[str] = []
    run = load(f"{name}.yaml")
    skeleton = skeleton_of(run, missing)
    assert skeleton is not None
    apart = ["tokenizer and processors"] if run.model.processor else []
    assert [line.partition(" of ")[0] for line in missing] == ["weights", *apart]
    stream = Feeder(skeleton.backbone, run.stream)
    assert stream.backbone.geometry.segment(run.stream.fps)[0] in (2.0, 30.0)
    assert 7e9 < skeleton.shapes.parameters < 10e9


def test_a_budget_that_no_process_can_measure_is_a_line_that_a_dry_run_shows(tmp_path) -> None:
    start = Start(folder=RunFolder(path=tmp_path / "runs" / "x"))
    for overrides, count in (([], 1), (["memory.budget={name: shared}"], 0), (["train.deepspeed=null"], 0)):
        lines = unmeasurable(load("qwen3_omni_30b.yaml", overrides), start)
        assert len(lines) == count
        assert all("under ZeRO-3" in line and "omnimem calibrate" in line for line in lines)


def test_an_assembled_base_is_named_as_one_whose_shapes_are_not_known(tmp_path, capsys) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": FAMILY}))
    assert "a dry run does not know those of an assembled base" in shown(capsys, f"model.path={tmp_path / 'base'}")


def planned(folder: Path, *overrides: str, taken: int | None = 40, start: Start | None = None) -> str:
    """The lines about the training of a run."""
    run = load("tiny.yaml", ["train.deepspeed=null", *overrides], train=train_section())
    start = start or Start(folder=RunFolder(path=folder / "runs" / "x"))
    return "\n".join(describe_training(training_arguments(run.train, start.folder), start, taken))


@pytest.mark.parametrize(
    ("overrides", "taken", "expected"),
    [
        ((), 40, "after steps 80, 160 (the newest 2 are kept), the first one in "),
        ((), None, "steps: 0 of 160 done, 16 samples each; learning rate 0.002, cosine after 10 steps of warm-up"),
        (("train.max_steps=-1", "train.num_train_epochs=2"), 40, "steps: 0 of 6 done, 16 samples each, 40 samples per"),
        (("train.max_steps=-1",), None, "steps: unknown until the training data are there"),
        (("train.save_strategy=epoch", "train.max_steps=7"), 40, "after steps 3, 6, 7 ("),
        (("train.save_strategy=no",), 40, "after steps 160 ("),
        (("train.save_steps=0.25", "train.save_total_limit=null"), 40, "after steps 40, 80, 120, 160 (all are kept)"),
        (("train.save_steps=10",), 40, "after steps 10, 20, 30, ..., 150, 160 ("),
        (("train.optim=sgd",), 40, "optimizer: torch.optim.sgd.SGD, {'lr': 0.002}"),
        (("train.optim=adafactor",), 40, "Adafactor"),
        (("train.warmup_steps=0.1",), 40, "cosine after 16 steps of warm-up"),
    ],
)
def test_the_plan_of_the_training_is_that_of_the_trainer(overrides, taken, expected, tmp_path) -> None:
    assert expected in planned(tmp_path, *overrides, taken=taken)


def test_the_plan_of_a_resumed_run_begins_at_its_checkpoint(tmp_path) -> None:
    folder = RunFolder(path=tmp_path / "x")
    said = planned(tmp_path, start=Start(folder=folder, checkpoint=folder.checkpoint(80), resumed=True))
    assert "steps: 80 of 160 done" in said
    assert f"checkpoints: continue from {folder.checkpoint(80)}; after steps 160 (" in said


def test_any_sample_is_shown_with_the_time_of_every_question(tmp_path, checkpoint, capsys) -> None:
    run = recorded(tmp_path / "data", checkpoint)
    cut = {"id": "b", "video": "a.mp4", "start": 2, "end": 9, "messages": QUESTIONS * 2}
    more = [cut, {"id": "t", "messages": ASKED}]
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in more))
    preview.preview(run, "b")
    said = capsys.readouterr().out
    assert "\nb data/train.jsonl:2".replace("data", f"{tmp_path}/data") in said
    assert ", 2 s to 9 s of the file" in said
    asked = said.split("labels in [[ ]]:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split(":")[0] for line in asked] == ["  at 5 s", "  after the end"] * 2
    preview.preview(run, "t")
    said = capsys.readouterr().out
    assert f"t {tmp_path}/data/train.jsonl:3: text alone" in said
    assert "--- memory of a device" not in said
    with pytest.raises(ManifestError, match=r"--sample c: no sample of .* has this id"):
        preview.preview(run, "c")


def test_a_sample_of_the_validation_is_shown(tmp_path, checkpoint, capsys) -> None:
    run = recorded(tmp_path / "data", checkpoint, f"data.validation={tmp_path}/held.jsonl")
    held = {"id": "held", "video": "data/a.mp4", "messages": QUESTIONS}
    (tmp_path / "held.jsonl").write_text(json.dumps(held) + "\n")
    preview.preview(run, "held")
    assert f"held {tmp_path}/held.jsonl:1: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (("calibration.skip_chunks=2",), False),
        (("calibration.skip_chunks=3",), True),
        (("calibration.skip_chunks=3", "stream.chunk_tokens=20"), False),
        (("calibration.skip_chunks=3", "memory.budget={name: split, visual_audio_ratio: 2}"), False),  # not measured
    ],
)
def test_streams_too_short_for_the_calibration_are_refused_as_in_the_run(
    settings, refused, tmp_path, checkpoint
) -> None:
    run = recorded(tmp_path / "data", checkpoint, *settings)
    expected = pytest.raises(CalibrationError, match=r"the longest has 3 chunks") if refused else nullcontext()
    with expected:
        preview.preview(run)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.report_to=wandb", "report_to"),
        ("train.optim=adamw_bnb_8bit", "bitsandbytes"),
        ("train.warmup_steps=160", "learning rate would be 0"),
        ("train.lr_scheduler_kwargs={wrong: 1}", "train: "),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse_in_its_setup(setting, expected, tmp_path, checkpoint) -> None:
    run = recorded(tmp_path / "data", checkpoint, "train.max_steps=1", "train.deepspeed=null", setting)
    with pytest.raises(UserError, match=expected):
        dry_run(run, Start(folder=RunFolder(path=tmp_path / "x")), None)
    assert not (tmp_path / "x").exists()


BATCH = "train.per_device_train_batch_size=2"
HALF_WAY = "tuning.selection.softening=hard tuning.gradient"


@pytest.mark.parametrize(
    ("setting", "refused"),
    [
        (f"{BATCH} {HALF_WAY}=released", "train.per_device_train_batch_size = 2"),
        (f"{BATCH} {HALF_WAY}=paper", "train.per_device_train_batch_size = 2"),
        ("memory.policy={name:distinct,per_head:true}", "memory.policy.per_head"),
        (BATCH, None),
        (f"{BATCH} tuning.gradient=states evaluate.batch_size=4", None),
        (f"data.validation=0.1 train.per_device_eval_batch_size=2 {HALF_WAY}=released", None),
        (f"{BATCH} {HALF_WAY}=released memory.policy.markers=keep", None),
        (f"{BATCH} {HALF_WAY}=released stream.tracks=audio", None),
        (f"{BATCH} {HALF_WAY}=released model={{path:Qwen/Qwen2.5-Omni-7B}} stream.timestamps=null", None),
    ],
)
def test_text_of_streams_that_cannot_be_padded_is_refused_by_the_setting_that_asks_for_it(setting, refused) -> None:
    overrides = [each.replace(":", ": ") for each in setting.split(" ")]
    run = load("video_salmonn2_plus_8b.yaml", overrides, train=train_section())
    skeleton = skeleton_of(run, [])
    assert skeleton is not None
    with nullcontext() if refused is None else pytest.raises(UserError, match=rf"^{refused}.*markers: keep"):
        refuse_unpadded(run, skeleton.backbone)
