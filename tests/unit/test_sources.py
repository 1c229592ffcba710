"""Training rows from files, folders and data sets; several sources, each with a name and a weight."""

import datetime
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from omnimem.cli.preflight import check_data
from omnimem.data import DataOptions, DataSource, ManifestError, Sample, TooManyFailures
from omnimem.sources import digest, looked_in, read_source, remarks_on, training_samples

TURNS = [
    {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "on 2020-01-02 ?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "that"}]},
]
ROWS = [{"id": "a", "messages": TURNS}, {"id": "b", "messages": TURNS}, {"id": "c", "messages": TURNS}]
LINE = {"id": "a", "video": "a.mp4", "messages": [{"role": "user", "content": "what ?"}]}


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress bars; caches below the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def made(kind: str, folder: Path) -> DataSource:
    """The three rows as a source of this kind, with media relative to `folder`."""
    place = folder / kind
    if kind == "json":
        return DataSource(path=str(write(folder / "rows.json", *ROWS)))
    if kind == "json_folder":
        write(place / "train.jsonl", *ROWS)
        return DataSource(path=str(place), media=str(folder))
    if kind == "rows":
        return DataSource(path=str(write(folder / "rows.jsonl", *ROWS)), format="rows")
    data = datasets.Dataset.from_list(ROWS)
    if kind == "saved":
        data.save_to_disk(place)
    elif kind == "saved_splits":
        datasets.DatasetDict({"train": data}).save_to_disk(place)
    else:
        data.to_parquet(place / "train.parquet")
    path = place / "train.parquet" if kind == "file" else place
    return DataSource(path=str(path), media=str(folder), streaming=kind == "streamed")


KINDS = ["json", "json_folder", "rows", "saved", "saved_splits", "parquet", "file", "streamed"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_are_the_same_samples_from_every_source(kind, tmp_path) -> None:
    found = read_source(made(kind, tmp_path), allow_absolute=False)
    expected = read_source(made("json", tmp_path), allow_absolute=False)
    assert [sample.id for sample in found] == ["a", "b", "c"]
    assert found[0].questions[0].text == "on 2020-01-02 ?"
    assert digest(found) == digest(expected)


def test_types_are_never_guessed(tmp_path) -> None:
    """Arrow's JSON reader turns dates into time stamps and large numbers into floats; rows of JSON files stay."""
    facts = {"date": "2020-01-02T00:00:00", "big": 12345678901234567890123}
    write(tmp_path / "set" / "train.jsonl", {**LINE, **facts}, {**LINE, "id": "b"})
    first, second = read_source(DataSource(path=str(tmp_path / "set")), allow_absolute=False)
    assert (first.meta, second.meta) == (facts, {})
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("id,query\n007,2020-01-02\n")
    with pytest.raises(ManifestError, match="a data set of the kind csv, whose types are guessed; give parquet"):
        read_source(DataSource(path=str(tmp_path / "table")), allow_absolute=False)


def test_media_that_a_data_set_holds_become_files(tmp_path) -> None:
    kinds = datasets.Features({"query": datasets.Value("string"), "videos": datasets.List(datasets.Video())})
    held = {"bytes": b"a video", "path": "a.mp4"}
    data = datasets.Dataset.from_dict({"query": ["<video>what ?"] * 2, "videos": [[held], [held]]}, features=kinds)
    data.save_to_disk(tmp_path / "set")
    first, second = read_source(DataSource(path=str(tmp_path / "set")), allow_absolute=False)
    assert first.video is not None
    assert (first.video.read_bytes(), first.video.suffix, first.video) == (b"a video", ".mp4", second.video)
    assert first.id == "set-000001"


def test_a_column_that_is_no_json_is_named(tmp_path) -> None:
    data = datasets.Dataset.from_list([{"query": "what ?", "video": "a.mp4", "made": datetime.date(2020, 1, 2)}])
    data.save_to_disk(tmp_path / "set")
    with pytest.raises(ManifestError, match=r"row 1 meta: .*date.*; store the column as text"):
        read_source(DataSource(path=str(tmp_path / "set")), allow_absolute=False)


def cached(folder: Path, builder: str, config: str) -> None:
    """A data set of the hub as `datasets` stores it, for a machine that cannot reach the hub."""
    place = folder / "owner___name" / config / "0.0.0" / ("a" * 40)
    place.mkdir(parents=True)
    data = datasets.Dataset.from_list(ROWS)
    with datasets.arrow_writer.ArrowWriter(path=str(place / "name-test.arrow"), features=data.features) as writer:
        for row in ROWS:
            writer.write(row)
        count, size = writer.finalize()
    splits = datasets.SplitDict(dataset_name="name")
    splits.add(datasets.SplitInfo(name="test", num_bytes=size, num_examples=count))
    names = {"builder_name": builder, "dataset_name": "name", "config_name": config, "version": "0.0.0"}
    datasets.DatasetInfo(features=data.features, splits=splits, **names).write_to_directory(str(place))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id_is_read_from_the_cache_with_its_subset_and_split(streaming, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    cached(tmp_path / "hf", "parquet", "long")
    source = DataSource(path="owner/name", subset="long", split="test", rows=2, streaming=streaming)
    assert [sample.id for sample in read_source(source, allow_absolute=False)] == ["a", "b"]
    with pytest.raises(ManifestError, match=r"owner/name\[train\]: cannot be read as a data set"):
        read_source(replace(source, split="train"), allow_absolute=False)


def test_a_cached_data_set_whose_types_were_guessed_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    cached(tmp_path / "hf", "json", "default")
    with pytest.raises(ManifestError, match="of the kind json, whose types are guessed; give the folder of `hf down"):
        read_source(DataSource(path="owner/name", split="test"), allow_absolute=False)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"path": "owner/gone"}, r"owner/gone\[train\]: cannot be read as a data set"),
        ({"path": "gone.json"}, "gone.json: no such file; give a manifest"),
        ({"path": "a/gone.parquet"}, "a/gone.parquet: no such file"),
        ({"path": "saved", "split": "tset"}, "saved split: 'tset' is unknown; known: train"),
        ({"path": "json", "split": "tset"}, "json split: 'tset' is unknown; known: train"),
        ({"path": "parquet", "split": "tset"}, r"parquet\[tset\]: cannot be read as a data set"),
        ({"path": "bare"}, "bare.train.: cannot be read as a data set"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(source, expected, tmp_path) -> None:
    (tmp_path / "bare").mkdir()
    write(tmp_path / "json" / "train.jsonl", *ROWS)
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    with pytest.raises(ManifestError, match=expected) as caught:
        read_source(DataSource(**source), allow_absolute=False)
    assert len(str(caught.value).splitlines()) == 1


def options(folder: Path, *more: Any) -> DataOptions:
    write(folder / "one.jsonl", LINE, {**LINE, "id": "b"})
    write(folder / "two.json", *ROWS)
    return DataOptions(train=(str(folder / "one.jsonl"), DataSource(path=str(folder / "two.json"), weight=0.5), *more))


def test_samples_of_several_sources_have_their_name(tmp_path) -> None:
    given = options(tmp_path)
    found = training_samples(given)
    assert [sample.id for sample in found] == ["one/a", "one/b", "two/a", "two/b", "two/c"]
    assert [sample.source for sample in found] == ["one", "one", "two", "two", "two"]
    assert given.weights == {"one": 1.0, "two": 0.5}


def test_one_source_keeps_the_ids_of_its_rows(tmp_path) -> None:
    write(tmp_path / "one.jsonl", LINE)
    for train in (str(tmp_path / "one.jsonl"), (DataSource(path=str(tmp_path / "one.jsonl"), weight=2.0),)):
        given = DataOptions(train=train)
        assert [(sample.id, sample.source) for sample in training_samples(given)] == [("a", "")]
    assert given.weights == {"": 2.0}


def test_problems_of_all_sources_are_named_at_once(tmp_path) -> None:
    bad = write(tmp_path / "bad.jsonl", {**LINE, "video": 3})
    with pytest.raises(ManifestError) as caught:
        training_samples(options(tmp_path, str(bad), "gone.jsonl"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [str(bad), "gone.jsonl"]


def test_a_run_of_text_alone_is_refused(tmp_path) -> None:
    write(tmp_path / "text.jsonl", {**LINE, "video": None})
    with pytest.raises(ManifestError, match="every row is text alone"):
        training_samples(DataOptions(train=str(tmp_path / "text.jsonl")))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train": ()}, "the list of sources is empty"),
        ({"train": ("a/x.jsonl", "b/x.jsonl")}, "two sources are called 'x'"),
    ],
)
def test_sources_that_cannot_be_told_apart_are_refused(given, expected) -> None:
    with pytest.raises(ValueError, match=expected):
        DataOptions(**given)


@pytest.mark.parametrize(
    "wrong", [{"weight": 0.0}, {"weight": -1.0}, {"weight": float("nan")}, {"rows": 0}, {"name": ""}]
)
def test_a_wrong_setting_of_a_source_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DataSource(path="a.jsonl", **wrong)


def test_media_outside_of_the_folder_of_a_source_are_refused_with_the_cure(tmp_path) -> None:
    source = DataSource(path=str(write(tmp_path / "rows" / "a.json", {**LINE, "video": "../a.mp4"})))
    with pytest.raises(ManifestError, match=r"media: FOLDER}\], or set data.allow_absolute_paths: true"):
        read_source(source, allow_absolute=False)
    found: Sample = read_source(source, allow_absolute=True)[0]
    assert found.video is not None
    assert found.video.resolve() == tmp_path / "a.mp4"


def test_remarks_on_rows_are_counted_with_one_of_them(tmp_path) -> None:
    file = write(tmp_path / "rows.json", *({**row, "language": "de"} for row in ROWS[:2]), ROWS[2])
    remarks = [line for line in remarks_on(training_samples(DataOptions(train=str(file)))) if "language" in line]
    assert remarks == [f"2 rows (such as {file}:item 1): key language is kept under meta only"]
    write(tmp_path / "one.jsonl", LINE)
    assert remarks_on(training_samples(DataOptions(train=str(tmp_path / "one.jsonl")))) == []


@pytest.mark.parametrize(
    ("ignored", "kind"),
    [
        ({"media": "clips"}, {"path": "a.jsonl"}),
        ({"media": "clips"}, {"path": "a.json", "format": "manifest"}),
        ({"split": "test"}, {"path": "a.jsonl"}),
        ({"subset": "short"}, {"path": "a.json"}),
        ({"streaming": True}, {"path": "a.jsonl", "format": "rows"}),
    ],
)
def test_a_setting_that_a_source_would_ignore_is_refused(ignored, kind) -> None:
    DataSource(**kind)
    with pytest.raises(ValueError, match=f"{next(iter(ignored))} .*remove it"):
        DataSource(**kind, **ignored)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"path": "m.jsonl"}, r"looked for below \., the folder of m\.jsonl"),
        ({"path": "rows.json"}, r"looked for below \.; `media` of rows in data\.train names another folder"),
        ({"path": "rows.json", "media": "clips", "name": "b"}, r"looked for below clips; `media` of b in .* says so"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_a_missing_file_is_named_with_the_source_that_it_is_of(source, expected, several, tmp_path) -> None:
    there = {"path": str(write(tmp_path / "there.json", {**ROWS[0], "id": "t"})), "media": "clips"}
    write(tmp_path / "m.jsonl", LINE)
    write(tmp_path / "rows.json", ROWS[0])
    given = (*([DataSource(**there)] if several else []), DataSource(**source))
    data = DataOptions(train=given)
    samples = training_samples(data)
    assert re.fullmatch(expected, looked_in(data, samples[-1]))
    # the preflight says it too
    run: Any = SimpleNamespace(data=data, stream=SimpleNamespace(tracks="both"))
    with pytest.raises(TooManyFailures, match=f"missing; .*{expected}"):
        check_data(run, [samples[-1]])
