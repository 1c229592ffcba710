"""The inspector: its log equals the memory, its tokens are placed as in the layout, its page holds both."""

import base64
import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
import torch
from support.finished_run import LORA, write_adapter
from support.html import Page
from support.thinkers import write_folder

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.budget import Budget
from omnimem.cli.parser import run_command
from omnimem.commands import show_memory
from omnimem.commands.synthesize import Stream as Recipe
from omnimem.commands.synthesize import manifest_line
from omnimem.data import ManifestError, Sample, read_manifest
from omnimem.inspection import Holding, Side, StreamSnapshot, follow, read, render
from omnimem.inspection.retention import NEVER, UNREAD
from omnimem.inspection.snapshot import check_needles
from omnimem.media import read_audio
from omnimem.policies import PerturbationOptions, PolicyOptions
from omnimem.policies.baselines.hermes import HermesOptions
from omnimem.policies.baselines.infinipot_v import InfiniPotVOptions
from omnimem.policies.baselines.input_uniform import InputUniformOptions
from omnimem.policies.baselines.lava import LavaOptions
from omnimem.policies.baselines.oracle import OracleOptions
from omnimem.policies.baselines.snapkv import SnapKVOptions
from omnimem.policies.baselines.streammem import StreamMemOptions
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import World, draw_world
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.tokens import Modality, Tokens

SECONDS = 16
BUDGET = Budget(slots=((4, 7), (3, 10)))
NEEDLES = [[3.0], [9.5], [4.0, 0.3, 0.8], [12.0, 0.9, 0.1]]
POLICIES: dict[str, PolicyOptions] = {
    "omnimem": PerturbationOptions(),
    "snapkv": SnapKVOptions(),
    "lava": LavaOptions(),
    "hermes": HermesOptions(),
    "hermes_reindexed": HermesOptions(reindex=True),
    "infinipot_v_reindexed": InfiniPotVOptions(reindex=True, keys="unrotated"),
    "streammem": StreamMemOptions(threshold=0.5),
    "streammem_prototypes": StreamMemOptions(frame_filter=False),
    "streammem_heads": StreamMemOptions(frame_filter=False, per_head=True),
    "input_uniform": InputUniformOptions(),
    "oracle": OracleOptions(),
}


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """A random thinker, and one stream of the recall task."""

    folder: Path
    world: World
    feeder: Feeder
    sample: Sample
    reading: StreamSnapshot


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("inspected")
    world = draw_world(1, SECONDS)
    write_mp4(world, folder / "one.mp4")
    line = {**manifest_line(Recipe(id="one", world=world)), "video": "one.mp4"}
    line["meta"] |= {"needles": NEEDLES}
    (folder / "test.jsonl").write_text(f"{json.dumps(line)}\n")
    (sample,) = read_manifest(folder / "test.jsonl")
    backbone = load_backbone(ModelOptions(path=str(write_folder(folder / "model", rates="tiny"))))
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=40))
    return Bench(folder=folder, world=world, feeder=feeder, sample=sample, reading=read(feeder, sample))


def followed(bench: Bench, name: str) -> Holding:
    with attach(bench.feeder.backbone.text_model) as attached:
        return follow(bench.feeder, attached, POLICIES[name].build(BUDGET), bench.reading.opened)


def memories(bench: Bench, attached: StreamedAttention, name: str) -> list[list[Tokens]]:
    """The tokens of each layer after every chunk of a stream without recorder."""
    policy = bench.feeder.with_oracle(POLICIES[name].build(BUDGET), [bench.reading.opened])
    stream, found = bench.feeder.stream(attached, policy), []
    with torch.no_grad():
        for chunk in bench.feeder.chunks([bench.reading.opened]):
            stream.feed(chunk)
            found.append(list(stream.memory.layers))
    return found


def by_head(tokens: Tokens, heads: int) -> list[list[int]]:
    """Places of the entries of each head, without empty ones."""
    owner = tokens.owner[0, 0] if tokens.owner.shape[1] else torch.zeros_like(tokens.modality[0])
    there = tokens.modality[0] >= 0
    return [((owner == head) & there).nonzero()[:, 0].tolist() for head in range(heads)]


@pytest.mark.parametrize("name", POLICIES)
def test_held_tokens_are_the_arrival_numbers_in_the_memory_and_count_as_it_counts(bench, name) -> None:
    holding = followed(bench, name)
    with attach(bench.feeder.backbone.text_model) as attached:
        found = memories(bench, attached, name)
    heads = holding.last.shape[1]
    assert len(found) == len(holding.ends)
    for chunk, layers in enumerate(found):
        held = holding.held(chunk)
        for layer, tokens in enumerate(layers):
            for head, places in enumerate(by_head(tokens, heads)):
                alive = [one for one in holding.merged if one.first <= chunk <= one.last]
                merged = [one.order for one in alive if (one.layer, one.head) == (layer, head)]
                book = Counter(np.flatnonzero(held[layer, head]).tolist()) + Counter(merged)
                assert book == Counter(tokens.order[0][places].tolist())
    assert bool(holding.merged) == (name.startswith(("hermes", "streammem")))
    kinds = np.zeros(bench.reading.tokens, np.int64)
    for grid in bench.reading.grids:
        kinds[grid.tokens] = Modality.VISUAL
    kinds[bench.reading.sounds.tokens] = Modality.AUDIO
    for chunk, layers in enumerate(holding.counts):
        held = holding.held(chunk)
        for layer, counts in enumerate(layers):
            for kind in Modality:
                merged = [one for one in holding.merged if one.layer == layer and one.modality == kind]
                alive = sum(one.first <= chunk <= one.last for one in merged)
                assert counts[kind] == pytest.approx((held[layer][:, kinds == kind].sum() + alive) / heads)


def test_prefiltered_tokens_are_unread_and_others_have_a_last_chunk(bench) -> None:
    uniform, plain = followed(bench, "input_uniform"), followed(bench, "omnimem")
    policy = bench.feeder.with_oracle(POLICIES["input_uniform"].build(BUDGET), [bench.reading.opened])
    text = bench.reading.tokens - len(bench.reading.sounds.tokens) - sum(len(g.tokens) for g in bench.reading.grids)
    read_tokens = {*range(text), *getattr(policy, "chosen")}  # noqa: B009 - a field of that policy alone
    assert set(np.flatnonzero(uniform.last[0, 0] != UNREAD).tolist()) == read_tokens
    assert (plain.last >= NEVER).all()
    assert (plain.last == NEVER).any()
    assert ((plain.last == NEVER) | (plain.last >= plain.arrival)).all()


def test_every_token_of_the_stream_is_shown_once_where_its_place_says(bench) -> None:
    outline, reading = bench.feeder.outline(bench.reading.opened), bench.reading
    shown = np.concatenate([*(grid.tokens for grid in reading.grids), reading.sounds.tokens])
    assert sorted(shown.tolist()) == torch.nonzero(outline.modality > 0)[:, 0].tolist()
    for grid in reading.grids:
        rows, columns = np.divmod(np.arange(grid.rows * grid.columns), grid.columns)
        places = outline.place[:, grid.tokens]
        assert (places[0] == int(grid.start) // 2).all()  # a grid holds two seconds
        assert places[1].tolist() == rows.tolist()
        assert places[2].tolist() == columns.tolist()
    assert outline.place[0, reading.sounds.tokens].tolist() == (reading.sounds.starts // 2).tolist()
    assert reading.sounds.ends[:-1].tolist() == reading.sounds.starts[1:].tolist()
    assert (reading.grids[0].start, reading.grids[-1].end) == (0.0, SECONDS)
    assert float(reading.sounds.ends[-1]) == pytest.approx(SECONDS)


def test_the_waveform_is_the_largest_amplitude_of_each_bin(bench) -> None:
    sounds, rate = bench.reading.sounds, bench.feeder.backbone.geometry.mel.rate
    samples = read_audio(bench.folder / "one.mp4", rate=rate).abs()
    wide = round(sounds.bin_seconds * rate)
    loudest = [float(samples[first : first + wide].max()) for first in range(0, len(sounds.peaks) * wide, wide)]
    assert sounds.peaks.tolist() == pytest.approx([255 * peak / max(loudest) for peak in loudest], abs=0.51)
    assert len(sounds.peaks) * sounds.bin_seconds == pytest.approx(SECONDS, abs=sounds.bin_seconds)


def page_of(reading: StreamSnapshot, holdings: Sequence[Holding]) -> dict[str, Any]:
    return Page(whole_page(reading, holdings)).data


def whole_page(reading: StreamSnapshot, holdings: Sequence[Holding]) -> str:
    left, right = (
        Side(label=label, facts={"policy": label, "file": "<one>"}, holding=holding, budget=BUDGET)
        for label, holding in zip(("a", "b & c"), holdings, strict=True)
    )
    return render(reading, (left, right))


def unpacked(data: dict[str, Any], key: str, kind: str) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(data[key])), kind)


def test_the_page_holds_the_snapshot_and_the_holdings(bench) -> None:
    reading, holdings = bench.reading, [followed(bench, "streammem_heads"), followed(bench, "omnimem")]
    data = page_of(reading, holdings)
    for side, holding in zip(data["sides"], holdings, strict=True):
        assert side["heads"] == holding.last.shape[1]
        assert np.array_equal(unpacked(side, "last", "<i2").reshape(holding.last.shape), holding.last)
        assert side["merged"] == [[o.layer, o.head, o.order, o.modality, o.first, o.last] for o in holding.merged]
        assert side["counts"] == [[[layer[kind] for kind in Modality] for layer in row] for row in holding.counts]
        assert side["slots"] == [list(slots) for slots in BUDGET.slots]
    assert (data["ends"], data["came"]) == (list(holdings[0].ends), holdings[0].came.tolist())
    assert unpacked(data, "cells", "<i4").tolist() == [token for grid in reading.grids for token in grid.tokens]
    assert unpacked(data["sounds"], "tokens", "<i4").tolist() == reading.sounds.tokens.tolist()
    assert unpacked(data["sounds"], "starts", "<f4").tolist() == reading.sounds.starts.tolist()
    assert unpacked(data["sounds"], "ends", "<f4").tolist() == reading.sounds.ends.tolist()
    assert unpacked(data["sounds"], "peaks", "u1").tolist() == reading.sounds.peaks.tolist()
    images = [image for grid in reading.grids for image in grid.thumbnails]
    assert [base64.b64decode(text) for text in data["thumbnails"]] == images
    assert data["needles"] == list(reading.needles)
    asked = {(question.text, question.answer): span for question, span in _evidence(bench.sample)}
    assert {(m["question"], m["answer"]): [m["start"], m["end"]] for m in data["marks"]} == asked
    assert [mark["start"] for mark in data["marks"]] == sorted(mark["start"] for mark in data["marks"])


def _evidence(sample: Sample) -> Sequence[tuple[Any, list[int]]]:
    assert len(sample.questions) > 1
    return list(zip(sample.questions, sample.meta["evidence"], strict=True))


def test_the_page_is_self_contained(bench) -> None:
    text = whole_page(bench.reading, [followed(bench, "omnimem"), followed(bench, "snapkv")])
    page = Page(text)
    assert page.open == []
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:") in (
        page.attributes
    )
    assert [value for name, value in page.attributes if name in ("href", "src", "srcset", "action")] == ["#main"]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert "b &amp; c" in text
    assert "&lt;one&gt;" in text


CONFIG = """\
name: x
model: {path: model}
stream: {chunk_tokens: 40, max_pixels: 12544}
memory: {policy: {name: omnimem, sharpness: 0.5}, slots_per_layer: 8, budget: {name: split, visual_audio_ratio: 2}}
"""


@pytest.fixture
def place(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Path:
    (bench.folder / "x.yaml").write_text(CONFIG)
    monkeypatch.chdir(bench.folder)
    return bench.folder


def shown(place: Path, *arguments: str) -> dict[str, Any]:
    show_memory.main(["--config", "x.yaml", *arguments, "--out", "out/page.html"])
    return Page((place / "out/page.html").read_text()).data


@pytest.mark.parametrize("name", ["omnimem", "lava"])
def test_shares_of_layers_and_tokens_in_common_are_counted_as_defined(bench, name) -> None:
    ours, theirs = followed(bench, name), followed(bench, "streammem_heads" if name == "lava" else "snapkv")
    if ours.last.shape != theirs.last.shape:
        theirs = followed(bench, "omnimem")
    media, last = bench.reading.media, len(ours.ends) - 1
    kept = [
        [{(head, k) for head, row in enumerate(layer) for k in media if row[k]} for layer in one.held(last)]
        for one in (ours, theirs)
    ]
    assert ours.in_common(ours, media) == [1.0, 1.0]
    assert ours.in_common(theirs, media) == pytest.approx(
        [len(a & b) / max(len(a), len(b)) for a, b in zip(*kept, strict=True)]
    )
    rows = ours.last.shape[0] * ours.last.shape[1]
    expected = [sum((head, k) in layer for layer in kept[0] for head in range(9)) / rows for k in bench.reading.needles]
    assert ours.layer_shares(bench.reading.needles) == pytest.approx(expected)


def test_unequal_heads_are_not_compared(bench) -> None:
    with pytest.raises(ValueError, match="heads keep tokens of their own"):
        followed(bench, "omnimem").in_common(followed(bench, "lava"), bench.reading.media)


def test_two_policies_of_a_file_are_shown_side_by_side(place, capsys) -> None:
    data = shown(place, "--video", "one.mp4", "--policies", "omnimem", "{name: snapkv, preset: shared_split}")
    assert [side["label"] for side in data["sides"]] == ["omnimem", "snapkv"]
    assert data["marks"] == []
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("omnimem: 8 entries per layer after 16 s, of ")
    assert out[-1].startswith("wrote out/page.html (")
    assert not (place / "runs").exists()


def test_sides_may_differ_in_slots_and_a_manifest_says_when_answers_were_shown(place, capsys) -> None:
    data = shown(place, "--manifest", "test.jsonl", "--id", "one", "--right", "memory.slots_per_layer=12")
    assert [side["label"] for side in data["sides"]] == ["omnimem, 8 slots", "omnimem, 12 slots"]
    held = [sum(sum(layer[1:]) for layer in side["counts"][-1]) for side in data["sides"]]
    assert held == [2 * 8, 2 * 12]
    assert len(data["marks"]) > 1
    lines = capsys.readouterr().out.splitlines()
    needles = r"; needles: \d of 4 held in some layer, each in \d+\.\d% of the layers"
    assert all(re.search(needles, line) for line in lines[:2])
    assert re.fullmatch(r"held by both: \S+% of the tokens of a layer \(layers: \S+% to \S+%\)", lines[2])


def test_a_side_with_an_adapter_sees_by_its_projectors_and_the_other_by_those_of_the_base(place) -> None:
    projectors = replace(LORA, modules_to_save=("visual_projector", "audio_projector"))
    write_adapter(place / "model", place / "adapter", lora=projectors)
    video = ("--video", "one.mp4")
    sides = shown(place, *video, "--adapter", "adapter", "--tuned", "right")["sides"]
    base = shown(place, *video, "--policies", "omnimem", "snapkv")["sides"][0]
    assert sides[0]["last"] == base["last"] != sides[1]["last"]


VIDEO, HARD = ("--video", "one.mp4"), "tuning.selection.softening=hard"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (VIDEO, "both sides are the same; give two policies, "),
        ((*VIDEO, HARD, "--right", "memory.selection_from=base"), "both sides are the same; give two policies, "),
        ((*VIDEO, "--policies", "omnimem", "snapkw"), "name: 'snapkw' is unknown; did you mean 'snapkv'?"),
        ((*VIDEO, "--right", "stream.fps=2"), "only memory.* and stream.positions may differ"),
        ((*VIDEO, "--right", "memory.slots_per_layer=1"), "memory.slots_per_layer: 1 is too small"),
        ((*VIDEO, "--policies", "omnimem", "snapkv", "--tuned", "left"), "--tuned left: there is no adapter"),
        ((*VIDEO, "--policies", "omnimem", "oracle"), "policy oracle must know which tokens hold the answers"),
        ((*VIDEO, "--policies", "omnimem", "snapkv", "--adapter", "none"), "none: adapter_config.json is missing"),
        (("--manifest", "test.jsonl", "--id", "two"), "test.jsonl: no stream has the id 'two'; the first is 'one'"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(place, arguments, said, capsys, monkeypatch) -> None:
    extra = ("--right", "memory.slots_per_layer=12") if "--id" in arguments else ()
    command = ["show_memory.py", "--config", "x.yaml", *arguments, *extra, "--out", "refused/page.html"]
    monkeypatch.setattr("sys.argv", command)
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        run_command(show_memory.main)
    err = [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert leaving.value.code == 2
    assert len(err) == 1
    assert said in err[0]
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"evidence": [[1, 2]]}, "test.jsonl:1 meta.evidence: expected [start, end] in seconds for each of "),
        ({"needles": [[1, 0.5, 1.0]]}, "got [1, 0.5, 1.0]"),
        ({"needles": [["1"]]}, "got ['1']"),
    ],
)
def test_invalid_marks_are_refused(bench, meta, said) -> None:
    with pytest.raises(ManifestError) as refused:
        read(bench.feeder, replace(bench.sample, meta=meta))
    assert said in str(refused.value)
    check_needles(replace(bench.sample, meta={"needles": NEEDLES}))
