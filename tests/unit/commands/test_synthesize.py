"""The recall task on disk: manifests, splits, and what happens when the command is given twice."""

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest
from support.commands import exit_code

from omnimem.commands.synthesize import SPLITS, Recipe, RecipeError, claim, main, manifest_line
from omnimem.recall.pictures import PictureOptions
from omnimem.recall.worlds import WorldOptions

SMALL = ["--seconds", "8", "--train", "3", "--calibration", "1", "--test", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthesize") / "recall"
    assert exit_code(main, ["--out", str(out), *SMALL]) == 0
    return out


def lines(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def test_each_split_has_its_streams_and_every_file_is_playable(recall) -> None:
    assert [len(lines(recall / f"{split}.jsonl")) for split in SPLITS] == [3, 1, 2]
    assert len(list((recall / "videos").iterdir())) == 6
    for line in lines(recall / "test.jsonl"):
        with av.open(str(recall / line["video"])) as container:
            assert container.duration == pytest.approx(8_000_000, abs=100_000)
            assert [stream.type for stream in container.streams] == ["video", "audio"]


def test_the_evidence_shows_or_says_what_is_asked() -> None:
    stream = Recipe(seconds=64, seed=1, options=WorldOptions()).stream("test", 0)
    evidence = manifest_line(stream)["meta"]["evidence"]
    for question, (start, end) in zip(stream.world.questions, evidence, strict=True):
        words = [spoken for spoken in stream.world.utterances if start <= spoken.at < end]
        symbols = [event for event in stream.world.events if (event.start, event.start + event.seconds) == (start, end)]
        match question.kind:
            case "auditory":
                assert [(spoken.voice, spoken.word) for spoken in words] == [(question.key, question.answer)]
            case "cross_modal":
                assert [event.shape for event in symbols] == [question.key]
                assert [spoken.word for spoken in words] == [question.answer]
            case "visual":
                assert [(event.shape, event.colour) for event in symbols] == [(question.key, question.answer)]


def test_a_recipe_of_pictures_has_its_own_record_and_media_by_split(tmp_path) -> None:
    recipe = Recipe(seconds=64, seed=1, options=PictureOptions())
    streams = {split: recipe.stream(split, 0) for split in SPLITS}
    assert [stream.world.media for stream in streams.values()] == ["adapter", "adapter", "test"]
    line = json.loads(json.dumps(manifest_line(streams["test"])))
    assert len(line["meta"]["evidence"]) == len(line["meta"]["kinds"]) == len(line["messages"]) // 2
    claim(tmp_path / "data", recipe)
    claim(tmp_path / "data", recipe)
    with pytest.raises(RecipeError, match="options"):
        claim(tmp_path / "data", Recipe(seconds=64, seed=1, options=WorldOptions()))


@pytest.mark.parametrize("seconds", ["4", "65"])
def test_a_length_that_pictures_cannot_fill_is_refused(tmp_path, seconds) -> None:
    assert exit_code(main, ["--world", "pictures", "--out", str(tmp_path / "data"), "--seconds", seconds]) == 2
    assert not (tmp_path / "data").exists()


def test_splits_and_seeds_share_no_world() -> None:
    recipes = [Recipe(seconds=8, seed=seed, options=WorldOptions()) for seed in (0, 1)]
    seeds = [recipe.stream(split, i).world.seed for recipe in recipes for split in SPLITS for i in range(50)]
    assert len(set(seeds)) == 300


def test_a_second_run_keeps_what_is_there_and_makes_what_is_missing(recall) -> None:
    videos = recall / "videos"
    kept, lost = videos / "train-00000.mp4", videos / "train-00001.mp4"
    before, again = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert exit_code(main, ["--out", str(recall), *SMALL]) == 0
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == again


def test_an_unfinished_file_is_never_taken_for_a_whole_one(tmp_path, monkeypatch) -> None:
    def stop_half_way(_world: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    arguments = ["--out", str(tmp_path), "--seconds", "4", "--train", "1", "--calibration", "0", "--test", "0"]
    with monkeypatch.context() as patch:
        patch.setattr("omnimem.recall.renderer.write_mp4", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert exit_code(main, arguments) == 0
    assert (tmp_path / "videos" / "train-00000.mp4").stat().st_size > 10_000


def test_the_processes_that_render_import_neither_torch_nor_transformers() -> None:
    """Each of them would spend seconds on it."""
    code = "import sys, omnimem.commands.synthesize; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_several_processes_write_the_same_files_as_one(recall, tmp_path) -> None:
    assert exit_code(main, ["--out", str(tmp_path), *SMALL, "--workers", "2", "--test", "0", "--calibration", "0"]) == 0
    for name in ("train-00000.mp4", "train-00002.mp4"):
        assert (tmp_path / "videos" / name).read_bytes() == (recall / "videos" / name).read_bytes()
    assert not (tmp_path / "test.jsonl").exists(), "it would replace the manifest of an earlier call"


def test_another_recipe_is_refused_with_every_difference_and_the_cure(recall, capsys) -> None:
    assert exit_code(main, ["--out", str(recall), *SMALL, "--seed", "3", "--seconds", "12"]) == 2
    problems = capsys.readouterr().err.splitlines()
    assert [problem.split(":")[0].split()[-1] for problem in problems] == ["seconds", "seed"]
    assert all("8 there, 12 now" in problem or "1 there, 3 now" in problem for problem in problems)
    assert all("choose another --out" in problem for problem in problems)


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_folder_without_a_readable_recipe_is_refused(tmp_path, content, capsys) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "train-00000.mp4").touch()
    if content is not None:
        (tmp_path / "recipe.json").write_text(content)
    assert exit_code(main, ["--out", str(tmp_path), *SMALL]) == 2
    assert "choose another --out, or delete" in capsys.readouterr().err
