"""The comparison: statistics against scipy and theory, refusals, the summary, and the page that shows it."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.comparison_runs import KINDS, SKILL, change, write_arm, write_lines, write_run, write_trace
from support.html import Page
from support.paths import ROOT

from omnimem.cli.parser import run_command
from omnimem.commands import compare as command
from omnimem.comparison import ComparisonError, compare, figures, statistics
from omnimem.comparison.differences import differences
from omnimem.comparison.formatting import unread
from omnimem.comparison.load import _kinds, read
from omnimem.comparison.report_accuracy import by_axis
from omnimem.comparison.summary import write_csv

AXES = {*KINDS, "place: early", "place: late", "duration: up to 2 min", "duration: 2 to 10 min"}


def problems(*folders: Path, out: Path) -> str:
    with pytest.raises(ComparisonError) as caught:
        compare(folders, out, draws=200)
    return str(caught.value)


def test_without_clusters_the_interval_is_the_percentile_bootstrap_of_scipy() -> None:
    difference = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 400, p=[0.1, 0.7, 0.2])
    names = [str(place) for place in range(400)]
    resampling, rng = statistics.resample(names, draws=10_000, seed=1), np.random.default_rng(2)
    ours = statistics.ratio(resampling, names, difference, np.ones(400), lowest=-1.0)
    theirs = stats.bootstrap((difference,), np.mean, n_resamples=10_000, method="percentile", random_state=rng)
    assert ours.value == pytest.approx(difference.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.004)
    assert ours.error == pytest.approx(theirs.standard_error, rel=0.03)


def test_copies_of_a_question_within_a_video_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], 60)
    names = [str(place) for place in range(60)]
    resampling = statistics.resample(names, draws=4000, seed=0)
    once = statistics.ratio(resampling, names, values, np.ones(60), lowest=-1.0)
    ten = statistics.ratio(resampling, names * 10, np.tile(values, 10), np.ones(600), lowest=-1.0)
    assert (ten.low, ten.high) == pytest.approx((once.low, once.high))


@pytest.mark.parametrize("videos", [12, 64])
def test_the_interval_covers_the_true_difference_in_95_of_100_cases_of_clustered_data(videos) -> None:
    generator, sets, most = np.random.default_rng(4), 2000, 12
    shape = (videos, sets, most)
    asked = np.arange(most) < generator.integers(4, most + 1, (videos, sets, 1))
    ability = generator.standard_normal((videos, sets, 1))  # of a video, shared by both arms
    liking = 0.7 * generator.standard_normal((videos, sets, 1))  # of a video for arm a
    hardness = generator.standard_normal(shape)
    a = asked & (ability + liking + hardness + 0.7 * generator.standard_normal(shape) > -0.8)
    b = asked & (ability + hardness + 0.7 * generator.standard_normal(shape) > -0.5)
    truth = stats.norm.cdf(0.8 / math.sqrt(2.98)) - stats.norm.cdf(0.5 / math.sqrt(2.49))
    numerator, denominator = (a.astype(float) - b).sum(2), asked.sum(2).astype(float)
    weights = statistics.resample([str(video) for video in range(videos)], draws=1000, seed=5).weights
    low, high = statistics.interval(statistics.ratio_draws(weights, numerator, denominator), videos)
    covered = float(((low <= truth) & (truth <= high)).mean())
    assert 0.93 <= covered <= 0.97
    unclustered = 1.96 * np.sqrt(((a ^ b).sum((0, 2)) / denominator.sum(0)) / denominator.sum(0))
    centre = numerator.sum(0) / denominator.sum(0)
    assert float((abs(centre - truth) <= unclustered).mean()) < 0.93  # what forgetting the videos would claim


def test_the_p_value_is_where_the_interval_touches_zero() -> None:
    draws = np.random.default_rng(6).normal(1.0, 0.5, 100_000)
    p = statistics.p_value(draws, 30)
    low, _ = statistics.interval(draws[:, None], 30, confidence=1 - p)
    assert low[0] == pytest.approx(0.0, abs=0.01)


RECORDED = json.loads((ROOT / "tests" / "recorded" / "statistics.json").read_text())


def test_mcnemar_and_holm_equal_those_of_statsmodels() -> None:
    for only_a, only_b, expected in RECORDED["mcnemar"]:
        a = np.array([True] * only_a + [False] * only_b + [True] * 9)
        b = np.array([False] * only_a + [True] * only_b + [True] * 9)
        assert statistics.mcnemar_exact(a, b) == pytest.approx(expected, rel=1e-9)
    for raw, expected in RECORDED["holm"]:
        assert statistics.holm(np.array(raw)) == pytest.approx(expected, rel=1e-9)


def clustered(seed: int, videos: int, most: int) -> tuple[list[str], list[float]]:
    """The draws of tests/recorded/statistics.py."""
    generator = np.random.default_rng(seed)
    names: list[str] = []
    values: list[float] = []
    for video in range(videos):
        lean = 0.1 * generator.standard_normal()
        for _ in range(int(generator.integers(1, most + 1))):
            names.append(f"v{video}")
            values.append(float(np.sign(round(generator.uniform(-0.6, 0.65) + lean))))
    return names, values


def test_the_standard_error_is_the_cluster_robust_one_of_statsmodels() -> None:
    for seed, videos, most, expected in RECORDED["clustered"]:
        names, values = clustered(seed, videos, most)
        resampling = statistics.resample(names, draws=10_000, seed=9)
        ours = statistics.ratio(resampling, names, np.array(values), np.ones(len(values)), lowest=-1.0)
        assert ours.value == pytest.approx(expected["mean"])
        assert ours.error == pytest.approx(expected["error"], rel=0.03)  # 10,000 draws: 0.7 % of noise


def test_the_interval_of_several_benchmarks_pooled_covers_the_truth_too() -> None:
    """Videos with 3 questions beside videos with 15, as Video-MME and LVBench have them; other effects in each."""
    generator, sets = np.random.default_rng(11), 2000
    videos, each, effects = (100, 35), (3, 15), (0.10, 0.02)
    numerators, denominators = [], []
    for count, questions, effect in zip(videos, each, effects, strict=True):
        lean = 0.12 * generator.standard_normal((count, sets, 1))
        uniform = generator.random((count, sets, questions))
        up, down = np.clip(0.15 + effect / 2 + lean, 0, 1), np.clip(0.15 - effect / 2 - lean, 0, 1)
        numerators.append(((uniform < up).astype(float) - (uniform > 1 - down)).sum(2))
        denominators.append(np.full((count, sets), float(questions)))
    numerator, denominator = np.concatenate(numerators), np.concatenate(denominators)
    truth = float(numerator.sum() / denominator.sum())  # of 2,000 sets: 45 times closer than one set is
    weights = statistics.resample([str(video) for video in range(sum(videos))], draws=1000, seed=12).weights
    low, high = statistics.interval(statistics.ratio_draws(weights, numerator, denominator), sum(videos))
    assert 0.93 <= float(((low <= truth) & (truth <= high)).mean()) <= 0.97


def test_a_difference_of_the_minimum_detectable_size_is_found_in_80_of_100_cases() -> None:
    error, clusters = 0.02, 40
    true = statistics.minimum_detectable(error, clusters)
    generator = np.random.default_rng(7)
    found = generator.normal(true, error, 50_000)
    errors = error * np.sqrt(generator.chisquare(clusters - 1, 50_000) / (clusters - 1))
    assert float((found > stats.t.ppf(0.975, clusters - 1) * errors).mean()) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("low", "high", "p_holm", "said"),
    [
        (0.01, 0.05, 0.01, "gain"),
        (-0.05, -0.01, 0.01, "loss"),
        (-0.01, 0.05, 0.2, "not resolved"),
        (0.01, 0.05, 0.09, "not resolved"),  # lost to Holm
        (math.nan, math.nan, math.nan, "not resolved"),  # one video says nothing
    ],
)
def test_the_verdict_needs_an_interval_off_zero_that_survives_holm(low, high, p_holm, said) -> None:
    assert statistics.verdict(low, high, p_holm) == said


def test_answers_that_are_all_right_still_have_an_interval() -> None:
    names = [str(place // 5) for place in range(100)]
    resampling = statistics.resample(names, draws=500, seed=0)
    perfect = statistics.ratio(resampling, names, np.ones(100), np.ones(100), lowest=0.0)
    exact = stats.binomtest(20, 20).proportion_ci(0.95).low  # Clopper-Pearson over the 20 videos
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low == pytest.approx(exact)


def test_the_summary_holds_all_accuracies_and_differences(tmp_path) -> None:
    run = write_run(tmp_path / "demo")
    summary = compare([run], tmp_path / "out", draws=500)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    recall = summary["benchmarks"]["recall"]
    assert (recall["n"], recall["clusters"]) == (54, 6)
    assert list(recall["arms"]) == ["full_memory", "tuned_full_memory", "training_free", "tuned", "recency"]
    assert list(recall["probes"]) == ["blind", "vision_only", "audio_only"]
    for entry in [*recall["arms"].values(), *recall["probes"].values()]:
        assert entry.keys() >= {"official", "strict", "no_answer", "peak_entries", "answer_entries", "bytes", "kinds"}
        assert set(entry["kinds"]) == AXES
        assert entry["strict_interval"][0] <= entry["strict"] <= entry["strict_interval"][1]
    named = [(pair["a"], pair["b"]) for pair in recall["pairs"]]
    assert named[0] == ("tuned", "training_free")
    assert len(named) == 10
    assert named[-1] == ("tuned_full_memory", "full_memory")
    assert not {"blind", "vision_only", "audio_only"} & {name for pair in named for name in pair}
    first = recall["pairs"][0]
    assert first.keys() >= {"a", "b", "diff", "low", "high", "p_mcnemar", "verdict"}
    assert set(first["kinds"]) == AXES
    strict = recall["arms"]
    assert first["diff"] == pytest.approx(strict["tuned"]["strict"] - strict["training_free"]["strict"], abs=2e-6)
    assert first["n"] * first["diff"] == pytest.approx(first["a_only"] - first["b_only"], abs=1e-3)
    pooled = summary["pooled"]["pairs"][0]
    assert (pooled["diff"], pooled["low"], pooled["high"]) == (first["diff"], first["low"], first["high"])


def test_two_runs_give_their_arms_the_name_of_the_run(tmp_path) -> None:
    runs = [write_run(tmp_path / name, ("tuned", "full_memory")) for name in ("first", "second")]
    recall = compare(runs, tmp_path / "out", draws=200)["benchmarks"]["recall"]
    assert set(recall["arms"]) == {"first/tuned", "second/tuned", "first/full_memory", "second/full_memory"}
    same = next(pair for pair in recall["pairs"] if {pair["a"], pair["b"]} == {"first/tuned", "second/tuned"})
    assert (same["diff"], same["p_mcnemar"], same["verdict"]) == (0.0, 1.0, "not resolved")


def test_several_benchmarks_are_pooled_and_adjusted_by_holm(tmp_path) -> None:
    run = tmp_path / "run"
    for arm in ("tuned", "training_free"):
        write_arm(run, arm, videos=30, benchmark="one")
        write_arm(run, arm, videos=12, benchmark="two")
    summary = compare([run], tmp_path / "out", draws=1000)
    one, two = (summary["benchmarks"][name]["pairs"][0] for name in ("one", "two"))
    assert summary["pooled"]["n"] == one["n"] + two["n"]
    total = one["diff"] * one["n"] + two["diff"] * two["n"]
    assert summary["pooled"]["pairs"][0]["diff"] == pytest.approx(total / summary["pooled"]["n"], abs=1e-5)
    assert min(one["p_holm"], two["p_holm"]) == pytest.approx(2 * min(one["p"], two["p"]), abs=2e-6)


def test_the_same_command_writes_the_same_bytes(tmp_path) -> None:
    run = write_run(tmp_path / "demo", ("tuned", "training_free"))
    for out in ("one", "two"):
        compare([run], tmp_path / out, draws=300)
    for name in ("summary.json", "arms.csv", "pairs.csv", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_csv_files_hold_the_numbers_of_the_summary(tmp_path) -> None:
    summary = compare([write_run(tmp_path / "demo")], tmp_path, draws=300)
    with (tmp_path / "pairs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = summary["benchmarks"]["recall"]["pairs"]
    assert len(rows) == len(pairs) * (1 + len(AXES))
    assert [float(row["diff"]) for row in rows if row["kind"] == "all"] == [pair["diff"] for pair in pairs]
    with (tmp_path / "arms.csv").open(newline="") as file:
        arms = list(csv.DictReader(file))
    assert len(arms) == len(SKILL) * (1 + len(AXES))
    assert float(arms[0]["strict_low"]) == summary["benchmarks"]["recall"]["arms"]["full_memory"]["strict_interval"][0]


def test_chance_is_one_over_the_different_right_answers_of_a_kind(tmp_path) -> None:
    folder = write_arm(tmp_path / "run", "tuned", videos=40, per_kind=4)
    recall = compare([folder], tmp_path / "out", draws=200)["benchmarks"]["recall"]
    assert {kind: recall["kinds"][kind]["chance"] for kind in KINDS} == {kind: 1 / n for kind, n in KINDS.items()}
    assert recall["chance"] == pytest.approx((1 / 8 + 1 / 16 + 1 / 16) / 3, abs=1e-6)


def test_official_accuracy_has_the_denominator_of_the_benchmarks_rules(tmp_path) -> None:
    folder = write_arm(tmp_path / "run", "tuned", videos=2, per_kind=1)
    path = folder / "recall.jsonl"
    for place in range(6):  # a rule set that counts an answer that cannot be read, but not a stream that was not read
        fields = {"parsed": place < 4, "correct": place < 2, "counted": place < 5, "bare": place < 3}
        change(path, place, **fields, **({"failed": "missing"} if place == 5 else {}))
    entry = compare([folder], tmp_path / "out", draws=200)["benchmarks"]["recall"]["arms"]["tuned"]
    numbers = (entry["official"], entry["strict"], entry["no_answer"], entry["format"], entry["failed"])
    assert numbers == pytest.approx((2 / 5, 2 / 6, 2 / 6, 3 / 6, 1), abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt_sha256": "c" * 64}, ("another prompt", "cccccccccccc")),
        ({"frames": 63}, ("frames", "63 and 64")),
        ({"audio_seconds": 60.0}, ("seconds of audio", "60 and 64")),
        ({"stream_seconds": 60.0}, ("length of stream", "60 and 64")),
        ({"failed": "truncated"}, ("outcome", "truncated and read")),
        ({"answer": "other"}, ("another right answer",)),
        ({"id": "new"}, ("2 questions",)),
    ],
)
def test_arms_with_different_input_are_refused(tmp_path, fields, said) -> None:
    run = write_run(tmp_path / "run", ("tuned", "training_free"))
    change(run / "eval" / "tuned" / "recall.jsonl", 0, **fields)
    refused = problems(run, out=tmp_path / "out")
    assert all(part in refused for part in said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "values", "said"),
    [
        ('"commit": "0123abc"', ('"reading": {"fps": 1.0}', '"reading": {"fps": 2.0}'), '{"fps": 1.0}'),
        ('"max_new_tokens": 16', ('"max_new_tokens": 4', '"max_new_tokens": 16'), '"max_new_tokens": 4'),
        ('"frames": 384', ('"frames": 192', '"frames": 384'), "192 and 384 frames"),
    ],
)
def test_arms_of_different_settings_are_refused(tmp_path, text, values, said) -> None:
    run = write_run(tmp_path / "run", arms := ("tuned", "training_free"))
    for arm, value in zip(arms, values, strict=True):
        path = run / "eval" / arm / "summary.json"
        path.write_text(path.read_text().replace(text, value))
    assert said in problems(run, out=tmp_path / "out")


def test_unequal_budgets_of_one_question_are_refused_though_their_means_are_equal(tmp_path) -> None:
    run = write_run(tmp_path / "run", ("tuned", "training_free"))
    change(run / "eval" / "tuned" / "recall.jsonl", 1, entries=97.0)
    change(run / "eval" / "tuned" / "recall.jsonl", 2, entries=95.0)
    said = problems(run, out=tmp_path / "out")
    assert "entries at answer time of test-00000/01 are 97 and 96, not the same budget" in said


def test_a_difference_is_over_the_questions_that_both_arms_were_asked(tmp_path) -> None:
    run = write_run(tmp_path / "run", ("tuned", "training_free"))
    for arm, place in (("tuned", 3), ("training_free", 7)):
        path = run / "eval" / arm / "recall.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:place] + lines[place + 1 :]))
    recall = compare([run], tmp_path / "out", draws=200, allow_different=True)["benchmarks"]["recall"]
    assert (recall["n"], recall["pairs"][0]["n"]) == (54, 52)


def test_questions_beyond_the_trained_positions_are_counted_and_noted(tmp_path) -> None:
    run = write_run(tmp_path / "demo")
    for place in (0, 3):
        change(run / "eval" / "tuned" / "recall.jsonl", place, beyond_trained=40_000)
    summary = compare([run], tmp_path / "out", draws=100)
    assert summary["benchmarks"]["recall"]["beyond_trained"] == {"tuned": 2}
    (note,) = (note for note in summary["notes"] if "trained on" in note)
    assert note.startswith("recall: ")
    assert "2 questions beyond" in note


def test_a_trace_that_contradicts_itself_is_refused(tmp_path) -> None:
    run = write_run(tmp_path / "run", ("tuned",))
    path = run / "eval" / "tuned" / "trace.json"
    trace = json.loads(path.read_text())
    path.write_text(json.dumps(trace | {"chunk_ends": trace["chunk_ends"][1:]}))
    assert "kept.audio: does not hold 32 bins per layer after each of 7 chunks" in problems(run, out=tmp_path / "out")


def test_unequal_budgets_are_refused_but_full_memory_is_the_reference(tmp_path) -> None:
    run = write_run(tmp_path / "run", ("tuned", "training_free", "full_memory"))
    compare([run], tmp_path / "out", draws=200)
    path = run / "eval" / "training_free" / "summary.json"
    path.write_text(path.read_text().replace('"answer_entries": 96.0', '"answer_entries": 104.0'))
    said = problems(run, out=tmp_path / "out")
    assert "entries at answer time are 96 and 104" in said or "entries at answer time are 104 and 96" in said
    assert "full_memory" not in said


def test_every_unreadable_folder_is_named_with_its_cure(tmp_path) -> None:
    run = write_run(tmp_path / "run", ("tuned", "training_free", "recency"))
    (run / "eval" / "tuned" / "summary.json").unlink()
    (run / "eval" / "training_free" / "recall.jsonl").write_text('{"id": 1}\n')
    with (run / "eval" / "recency" / "recall.jsonl").open("a") as file:
        file.write('{"id": "half')
    (tmp_path / "empty").mkdir()
    said = problems(run, tmp_path / "empty", tmp_path / "nowhere", out=tmp_path / "out").splitlines()
    assert len(said) == 5
    assert any("tuned: no summary.json; finish its evaluation" in line for line in said)
    assert any("recall.jsonl:1 video, prompt_sha256" in line for line in said)
    assert any("recall.jsonl:55: not JSON" in line for line in said)
    assert any("empty: no evaluation in it" in line for line in said)
    assert any("nowhere: not a folder" in line for line in said)
    assert "only probes" in problems(write_run(tmp_path / "probes", ("blind",)), out=tmp_path / "out")


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Exit code of the command."""
    monkeypatch.setattr("sys.argv", ["compare.py", *arguments, "--draws", "200"])
    with pytest.raises(SystemExit) as leaving:
        run_command(command.main)
    return leaving.value.code


def test_the_command_exits_with_2_and_one_line_per_problem(tmp_path, capsys, monkeypatch) -> None:
    folder = write_run(tmp_path / "run", ("tuned", "training_free"))
    arguments = [str(folder), "--out", str(tmp_path / "out")]
    assert run(arguments, monkeypatch) == 0
    assert "tuned - training free: " in capsys.readouterr().out
    change(folder / "eval" / "tuned" / "recall.jsonl", 0, frames=1)
    assert run(arguments, monkeypatch) == 2
    said = capsys.readouterr().err.splitlines()
    assert "another number of frames" in said[0]
    assert "--allow-different" in said[-1]
    assert run([*arguments, "--allow-different"], monkeypatch) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("not comparable: ")
    assert "another number of frames" in printed.err
    tuned = next(line for line in printed.out.splitlines() if line.startswith("  tuned  "))
    assert tuned.count(",") == 2, "an interval and the two places; the page has the other axes"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    compare([write_run(folder / "demo")], folder, draws=300)
    return (folder / "report.html").read_text()


def test_the_page_is_well_formed_and_needs_no_network(page) -> None:
    seen = Page(page)
    assert seen.open == []
    assert len(seen.ids) == len(set(seen.ids))
    assert not {name for name, _ in seen.attributes} & {"src", "onclick", "onload", "onerror"}
    assert all(value.startswith("#") for name, value in seen.attributes if name == "href")
    assert {value[1:] for name, value in seen.attributes if name == "href"} <= set(seen.ids)
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_predictions_cannot_break_out_of_the_page(tmp_path) -> None:
    run = write_run(tmp_path / "run", ("tuned", "training_free"))
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    for arm in ("tuned", "training_free"):
        change(run / "eval" / arm / "recall.jsonl", 0, prediction=evil, question=evil, kind=evil, video=evil)
    compare([run], tmp_path, draws=200)
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<img" not in page
    data = page.split('id="data">')[1].split("</script>")[0]
    assert any(evil in row["p"] for row in json.loads(data)["rows"])


def test_a_run_without_budget_trace_or_metrics_still_gives_a_page(tmp_path) -> None:
    summary = compare([write_arm(tmp_path / "run", "tuned")], tmp_path, draws=200)
    assert summary["benchmarks"]["recall"]["pairs"] == []
    ids = Page((tmp_path / "report.html").read_text()).ids
    assert "accuracy" in ids
    assert not {"kept", "training", "differences", "probes"} & set(ids)


def test_an_hour_long_trace_is_drawn_with_few_rectangles(tmp_path) -> None:
    folder = write_arm(tmp_path / "run", "tuned")
    write_trace(folder, seconds=3600, layers=2)
    trace = json.loads((folder / "trace.json").read_text())
    kept = figures.Kept.read(trace, "visual")
    assert max(kept.arrived.size, kept.chunk_ends.size) <= figures.MOST_CELLS
    assert kept.chunk_ends[-1] == 3600
    assert kept.arrived.sum() == sum(trace["arrived"]["visual"])
    assert len(figures.kept_over_time(kept, "visual", label="kept")) < 200_000


def test_cells_that_a_spreadsheet_would_compute_are_text(tmp_path) -> None:
    texts = ("=1+1", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "\n=1")
    write_csv(tmp_path / "x.csv", [{"a": text, "b": -1.5, "c": "plain - text"} for text in texts])
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["a"] for row in rows] == [f"'{text}" for text in texts]
    assert {(row["b"], row["c"]) for row in rows} == {("-1.5", "plain - text")}


def rewrite(run: Path, arm: str, **fields: Any) -> None:
    """Overwrite fields of every answer of an arm."""
    path = run / "eval" / arm / "recall.jsonl"
    write_lines(path, [json.loads(line) | fields for line in path.read_text().splitlines()])


def test_arms_that_answer_alike_have_no_variance_to_judge_by(tmp_path) -> None:
    run = write_run(tmp_path / "run", ("tuned", "training_free"))
    for arm in ("tuned", "training_free"):
        rewrite(run, arm, correct=True, parsed=True)
    summary = compare([run], tmp_path, draws=200)
    (pair,) = summary["benchmarks"]["recall"]["pairs"]
    assert (pair["diff"], pair["minimum_detectable"], pair["verdict"]) == (0.0, None, "not resolved")
    page = (tmp_path / "report.html").read_text()
    assert "without variance between videos nothing is known of smaller differences" in page
    assert "points would show" not in page


@pytest.mark.parametrize(("parsed", "said"), [(False, "no answer could be read"), (True, "")])
def test_answers_that_cannot_be_read_are_named_in_the_verdict_and_in_the_terminal(
    parsed, said, tmp_path, monkeypatch, capsys
) -> None:
    folder = write_run(tmp_path / "run", ("tuned", "training_free"))
    rewrite(folder, "tuned", correct=parsed, parsed=parsed, counted=parsed, prediction="word")
    rewrite(folder, "training_free", parsed=True, counted=True)
    assert run([str(folder), "--out", str(tmp_path / "out")], monkeypatch) == 0
    page, printed = (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().out
    words = re.findall(r'<span class="verdict.*?</li>', page, re.DOTALL)
    assert any("tuned: no answer could be read" in line for line in words) is bool(said)
    assert any(line.split() == ["tuned", *said.split()] for line in printed.splitlines()) is bool(said)


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.0, ""), (0.25, "no answer could be read in 25.0 % of its predictions"), (1.0, "no answer could be read")],
)
def test_the_share_of_answers_that_cannot_be_read_is_named(share, said) -> None:
    assert unread({"no_answer": share}) == said


@pytest.mark.parametrize(
    ("categories", "kind", "expected"),
    [
        ({"kind": ["colour"]}, "", {"kind": ["colour"]}),
        ({"kind": ["colour"]}, "colour", {"kind": ["colour"]}),
        ({"kind": ["time: early"], "place": ["left"]}, "", {"kind": ["time: early"], "place": ["left"]}),
        ({}, ["a", "b"], {"kind": ["a", "b"]}),
    ],
)
def test_an_axis_called_kind_is_kept_like_any_other(categories, kind, expected) -> None:
    found = _kinds({"kind": kind, "categories": categories})
    assert {view["axis"]: [one["label"] for one in view["kinds"]] for view in by_axis(found)} == expected


def test_sections_without_content_have_no_heading(tmp_path) -> None:
    folder = write_run(tmp_path / "run", ("tuned", "training_free", "blind", "full_memory"))
    for arm in ("tuned", "training_free", "blind", "full_memory"):
        rewrite(folder, arm, kind="", categories={}, stream_seconds=64.0)
    write_lines(folder / "metrics.jsonl", [{"step": 1, "slots": 96.0}])
    compare([folder], tmp_path, draws=200)
    page = (tmp_path / "report.html").read_text()
    ids = Page(page).ids
    assert not {"kinds", "durations", "training"} & set(ids)
    assert "By kind of question" not in page
    assert "probes" in ids
    assert "all questions" in page
    headings = re.findall(r"<h([234])[ >](.*?)(?=<h([234])[ >]|</main>)", page, re.DOTALL)
    for level, content, following in headings:  # a heading has content, or smaller headings
        assert (following and following > level) or re.search(r"<(ol|table|figure|ul|form)", content), content[:80]


def test_the_standard_error_of_few_clusters_is_not_the_smaller_one_of_the_draws() -> None:
    values = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    names = [str(place) for place in range(len(values))]
    found = statistics.ratio(
        statistics.resample(names, draws=20_000, seed=0), names, values, np.ones(len(values)), lowest=0.0
    )
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), rel=0.02)


@pytest.mark.parametrize("same_run", [True, False])
def test_only_arms_of_one_run_must_have_one_base_and_one_adapter(tmp_path, same_run) -> None:
    """Two runs are compared because their adapters differ."""
    runs = [tmp_path / "a", tmp_path / ("a" if same_run else "b")]
    folders = [write_arm(run, arm) for run, arm in zip(runs, ("tuned", "tuned_full_memory"), strict=True)]
    for number, folder in enumerate(folders):
        summary = json.loads((folder / "summary.json").read_text())
        summary["provenance"]["sha256"] = {"base": "b" * 64, "adapter": f"{number}" * 64}
        (folder / "summary.json").write_text(json.dumps(summary))
    lines = differences(read([runs[0]] if same_run else runs)[0])
    assert any("answered by another adapter" in line for line in lines) is same_run


def test_a_step_with_a_validation_keeps_the_loss_of_its_other_line(tmp_path) -> None:
    write_arm(tmp_path / "x", "tuned")
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "validation": {"loss": 4.0}}]
    write_lines(tmp_path / "x" / "metrics.jsonl", [*lines, {"step": 1, "loss": 2.5}])
    (run,) = read([tmp_path / "x"])[1]
    assert run.metrics == ({"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0, "validation": {"loss": 4.0}})
