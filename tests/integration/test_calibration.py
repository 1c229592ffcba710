"""Calibration against plain loops over what each layer saw, its limits, and its figures."""

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.models import cut, merged, text_model, whole_stream
from support.thinkers import write_folder

from omnimem.budget import Budget, BudgetError, Signals, SplitBudget
from omnimem.calibration import CalibrationError, CalibrationOptions, calibrate, normalised_entropy
from omnimem.cli.build import budget_of
from omnimem.commands.calibrate import main
from omnimem.config import load
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.run import RunFolder
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, Modality
from omnimem.view import LayerView

LENGTHS = [16, 16, 16, 16, 16, 16]
KINDS = {"all": (1, 2), "audio": (1,), "visual": (2,)}


def small_policy(**options: Any) -> Policy:
    return PerturbationOptions(**options).build(SplitBudget(visual_audio_ratio=2.0).build(4, 12))


def measure(streams: list[list[Chunk]], skip: int, streams_wanted: int = 8, **policy: Any) -> Signals:
    with attach(text_model("qwen2_5_omni")) as attached:
        options = CalibrationOptions(streams=streams_wanted, skip_chunks=skip)
        return calibrate(attached, small_policy(**policy), streams, options)


def seen_by_loops(streams: list[list[Chunk]], skip: int) -> dict[tuple[str, str], list[float]]:
    """Mean entropy and similarity by layer and kind, from the views, token by token."""
    readings: dict[tuple[str, str, int], list[float]] = {}
    for chunks in streams:
        views: dict[int, list[LayerView]] = {layer: [] for layer in range(4)}
        with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
            stream = Stream(
                attached, small_policy(), recorder=lambda layer, view, views=views: views[layer].append(view)
            )
            for chunk in chunks:
                stream.feed(chunk)
        for layer, name in ((layer, name) for layer in range(4) for name in KINDS):
            for view in views[layer][skip:]:
                mass, states = view.mass[0].tolist(), view.pool.feature[0].double()
                places = [k for k in range(view.pool.count) if int(view.modality[0, k]) in KINDS[name]]
                whole = sum(mass[k] for k in places)
                entropy = -sum(mass[k] / whole * math.log(mass[k] / whole) for k in places) / math.log(len(places))
                alike = 0.0
                for k in places:
                    beside = [j for j in (k - 1, k + 1) if 0 <= j < view.pool.count]
                    alike += sum(
                        float(states[k] @ states[j] / states[k].norm() / states[j].norm()) for j in beside
                    ) / len(beside)
                readings.setdefault(("entropy", name, layer), []).append(entropy)
                readings.setdefault(("similarity", name, layer), []).append(alike / len(places))
    return {
        (what, name): [sum(readings[what, name, layer]) / len(readings[what, name, layer]) for layer in range(4)]
        for what in ("entropy", "similarity")
        for name in KINDS
    }


def test_signals_equal_plain_loops_over_what_the_layers_saw() -> None:
    streams = [cut(whole_stream(seed=seed), LENGTHS) for seed in (1, 2)]
    signals = measure(streams, skip=2)
    expected = seen_by_loops(streams, skip=2)
    for what, readings in (("entropy", signals.entropy), ("similarity", signals.similarity)):
        for name, row in (("all", readings.whole), ("audio", readings.audio), ("visual", readings.visual)):
            assert row == pytest.approx(expected[what, name], abs=1e-5)
    assert (signals.streams, signals.chunks) == (2, 8)


def test_under_a_narrow_sketch_the_similarity_is_that_of_the_layer_inputs() -> None:
    streams = [cut(whole_stream(seed=1), LENGTHS)]
    assert measure(streams, skip=2, feature=4) == measure(streams, skip=2, compared="inputs")


def test_signals_are_measured_from_all_queries() -> None:
    """The entropy of an estimate of attention is no estimate of its entropy."""
    streams = [cut(whole_stream(seed=1), LENGTHS)]
    assert measure(streams, skip=2, query_stride=4) == measure(streams, skip=2)


def test_entropy_is_one_when_attention_is_even_and_zero_when_it_falls_on_one_token() -> None:
    member = torch.tensor([[True, True, False, True, True]])
    even = normalised_entropy(torch.tensor([[0.2, 0.2, 9.0, 0.2, 0.2]]), member)
    single = normalised_entropy(torch.tensor([[0.0, 3.0, 9.0, 0.0, 0.0]]), member)
    assert even.tolist() == pytest.approx([1.0])
    assert single.tolist() == [0.0]


def test_a_batch_of_streams_counts_each_of_them() -> None:
    single = [cut(whole_stream(seed=seed), LENGTHS) for seed in (1, 2)]
    together = merged([whole_stream(seed=seed) for seed in (1, 2)])
    batched, alone = measure([cut(together, LENGTHS)], skip=2), measure(single, skip=2)
    assert (batched.streams, batched.chunks) == (alone.streams, alone.chunks) == (2, 8)
    assert batched.entropy.audio == pytest.approx(alone.entropy.audio, abs=1e-5)
    assert batched.similarity.visual == pytest.approx(alone.similarity.visual, abs=1e-5)


def test_short_streams_add_nothing() -> None:
    long, short = cut(whole_stream(seed=1), LENGTHS), cut(whole_stream(count=32, seed=2), [16, 16])
    assert measure([long, short], skip=2) == measure([long], skip=2)


@pytest.mark.parametrize(("missing", "name"), [(Modality.AUDIO, "audio"), (Modality.VISUAL, "visual")])
def test_a_missing_modality_is_named_with_its_cure(missing, name) -> None:
    whole = whole_stream()
    other = Modality.VISUAL if missing is Modality.AUDIO else Modality.AUDIO
    modality = torch.where(whole.modality == missing, torch.tensor(int(other), dtype=torch.int8), whole.modality)
    deaf = Chunk(embeddings=whole.embeddings, positions=whole.positions, modality=modality)
    with pytest.raises(CalibrationError, match=rf"no {name} tokens.*both tracks.*name: shared"):
        measure([cut(deaf, LENGTHS)], skip=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random thinker, two streams of 12 s and a config: 18 tokens a grid, chunks of 4 s."""
    folder = tmp_path_factory.mktemp("run")
    write_folder(folder / "model", rates="tiny")
    lines = []
    for seed in (1, 2):
        write_mp4(draw_world(seed, 12), folder / f"{seed}.mp4")
        messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
        lines.append(json.dumps({"id": f"s{seed}", "video": f"{seed}.mp4", "messages": messages}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "a.yaml").write_text(
        "name: a\n"
        f"model: {{path: {folder / 'model'}}}\n"
        "stream: {chunk_tokens: 36}\n"
        "memory: {slots_per_layer: 9, budget: {name: audio_visual, visual_audio_ratio: 2, layer_temperature: 1}}\n"
        "calibration: {streams: 2, skip_chunks: 1}\n"
        f"data: {{train: {folder / 'train.jsonl'}}}\n"
    )
    return folder


def test_the_command_writes_budget_and_figures(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--config", str(folder / "a.yaml")])
    budget = Budget.read(tmp_path / "runs" / "a" / "budget.json")
    assert budget.total == 2 * 9
    assert budget.signals is not None
    assert (budget.signals.streams, budget.signals.chunks) == (2, 4)  # 12 s are 3 chunks, the first is skipped
    assert budget.provenance["streams"] == ["s1", "s2"]
    names = {path.name for path in (tmp_path / "runs" / "a").iterdir()}
    assert names == {"budget.json", "budget.svg", "signals.svg"}
    assert "18 slots in 2 layers" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["{name: keydiff}", "{name: snapkv}", "{name: distinct, per_head: true}"])
def test_policies_that_keep_no_pool_of_a_layer_are_measured_under_ours(policy, folder, tmp_path) -> None:
    """Heads of their own, or attention of probes: the signals are those of the default policy, and it says so."""
    for name, chosen in (("theirs", policy), ("ours", "{name: omnimem}")):
        main(["--config", str(folder / "a.yaml"), f"memory.policy={chosen}", "--out", str(tmp_path / f"{name}.json")])
    theirs, ours = (Budget.read(tmp_path / f"{name}.json") for name in ("theirs", "ours"))
    assert (theirs.signals, theirs.slots) == (ours.signals, ours.slots)
    assert theirs.provenance["policy"] == "omnimem"


def test_a_file_measured_for_another_run_is_refused_not_used(folder, tmp_path) -> None:
    """Read where it lies in the run's folder: nothing is measured, so neither model nor streams are needed."""
    here, nothing = RunFolder(path=tmp_path), cast(Any, None)
    main(["--config", str(folder / "a.yaml"), "--out", str(here.budget)])
    same = load(folder / "a.yaml", [])
    assert budget_of(same, nothing, nothing, here) == Budget.read(here.budget)
    for override, message in (
        ("memory.policy={name: distinct}", "was measured under policy omnimem, the run has distinct; delete the file"),
        ("stream.fps=2.0", "was measured with stream.fps = 1.0, the run has 2.0; delete the file"),
        ("stream.max_pixels=6272", "was measured with stream.max_pixels = .*, the run has 6272"),
        ("stream.chunk_tokens=40", "was measured with stream.chunk_tokens = .*, the run has 40"),
        ("stream.tracks=audio", "was measured with stream.tracks = both, the run has audio"),
        ("stream.positions=compact", "was measured with stream.positions = original, the run has compact"),
        ("memory.slots_per_layer=10", "was made for 9 slots a layer, the run asks for 10 slots a layer; delete"),
    ):
        with pytest.raises(BudgetError, match=message):
            budget_of(load(folder / "a.yaml", [override]), nothing, nothing, here)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibration.skip_chunks=3", "skip_chunks: 3 .the longest has 3 chunks.; set calibration.skip_chunks below 3"),
        ("memory.budget={name: shared}", "name: shared} has nothing to calibrate"),
        ("stream.tracks=video", "no audio tokens to measure"),
        ("data.train=null", "data.train names no manifest"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused_with_their_cure(folder, tmp_path, override, message) -> None:
    with pytest.raises((BudgetError, CalibrationError), match=message):
        main(["--config", str(folder / "a.yaml"), override, "--out", str(tmp_path / "budget.json")])
    assert not (tmp_path / "budget.json").exists()
