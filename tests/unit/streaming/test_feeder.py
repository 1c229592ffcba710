"""The feeder asks for what a sample needs: each argument that it gives to the source, the encoders and the chunks."""

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.thinkers import write_folder

from omnimem.backbones import ModelOptions, Turn, load_backbone
from omnimem.backbones.base import LayoutError
from omnimem.backbones.qwen2_5_omni import Qwen25Omni
from omnimem.data import Message, Sample
from omnimem.media import LiveSource
from omnimem.streaming import feeder as module
from omnimem.streaming.feeder import QUESTION_ROOM, Feeder, last_position
from omnimem.streaming.options import StreamOptions

OPTIONS = StreamOptions(fps=2.0, max_pixels=12544, min_pixels=6272, chunk_tokens=36, tracks="both")
VIDEO, SOUND = Path("a.mp4"), Path("b.wav")
SECONDS, RATE = 12, 16000


@pytest.fixture(scope="module")
def feeder(tmp_path_factory: pytest.TempPathFactory) -> Feeder:
    folder = write_folder(tmp_path_factory.mktemp("m") / "thinker", rates="tiny")
    return Feeder(load_backbone(ModelOptions(path=str(folder))), OPTIONS)


def sample(*times: float | None, system: str | None = None, **given: Any) -> Sample:
    """A question at each time."""
    before = (Message(role="system", content=system),) if system else ()
    messages = tuple(Message(role="user", content="what ?", at=time) for time in times)
    return Sample(**{"id": "x", "video": VIDEO, "audio": None, "messages": (*before, *messages), **given})


# --------------------------------------------------- what is decoded


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (sample(None), {"path": VIDEO, "audio_path": VIDEO, "start": 0.0, "end": None, "causal": False}),
        (sample(None, start=3.0, end=9.0), {"start": 3.0, "end": 9.0, "causal": False}),
        (sample(None, audio=SOUND), {"path": VIDEO, "audio_path": SOUND, "tracks": "both"}),
        (sample(None, video=None, audio=SOUND), {"path": SOUND, "audio_path": SOUND, "tracks": "audio"}),
        (sample(5.0), {"end": 6.0, "causal": True}),  # grids of 2 s: nothing after the question is read
        (sample(5.0, start=3.0), {"start": 3.0, "end": 7.0, "causal": True}),
        (sample(5.0, end=5.5), {"end": 5.5, "causal": True}),
        (sample(1.0, 5.0), {"end": 6.0, "causal": True}),
        (sample(5.0, None), {"end": None, "causal": True}),
    ],
)
def test_a_source_is_asked_for_what_the_sample_needs(asked, expected, feeder, monkeypatch) -> None:
    monkeypatch.setattr(module, "tracks_of", lambda sample, asked: asked if sample.video else "audio")  # no file exists
    source = feeder.source(asked)
    found = {name: getattr(source, name) for name in ("path", "audio_path", "start", "end", "causal")}
    found["tracks"] = source.options.tracks
    assert {name: found[name] for name in expected} == expected
    read = (source.options.fps, source.options.max_pixels, source.options.min_pixels)
    assert read == (OPTIONS.fps, OPTIONS.max_pixels, OPTIONS.min_pixels)
    assert source.geometry is feeder.backbone.geometry


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A hum, and the same with a bang in its last two seconds."""
    folder = tmp_path_factory.mktemp("sounds")
    hum = 3e-4 * np.random.default_rng(0).standard_normal(RATE * SECONDS)
    bang = hum.copy()
    bang[RATE * (SECONDS - 2) :] = 0.9 * np.sign(np.sin(np.arange(2 * RATE)))
    for name, samples in (("hum", hum), ("bang", bang)):
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((samples * 32767).astype("<i2").tobytes())
    return folder / "hum.wav", folder / "bang.wav"


@pytest.mark.parametrize(("times", "equal"), [((4.0, None), True), ((None,), False)])
def test_later_sound_does_not_change_tokens_before_a_question_on_the_way(times, equal, sounds, feeder) -> None:
    """Without such a question the mel is normalised by the whole clip, as in the stock feature extractor."""
    hum, bang = (feeder.open(sample(*times, video=None, audio=path)).segments[:4] for path in sounds)
    same = [torch.equal(a.audio, b.audio) for a, b in zip(hum, bang, strict=True) if a.audio is not None]
    assert len(same) == 4
    assert same == [equal] * 4


# ------------------------------------------ what the backbone is asked


@pytest.fixture
def calls(feeder: Feeder, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Arguments of the last call of each method of the backbone, by name."""
    found: dict[str, dict[str, Any]] = {}

    def recorded(name: str) -> Callable[..., Any]:
        own = getattr(Qwen25Omni, name)

        def call(*given: Any, **named: Any) -> Any:
            found[name] = named
            return own(feeder.backbone, *given, **named)

        return call

    for name in ("encode", "chunks", "turn"):
        monkeypatch.setattr(feeder.backbone, name, recorded(name), raising=False)
    return found


def test_chunks_of_samples_have_their_cuts_tracks_size_batch_and_system(sounds, feeder, calls) -> None:
    opened = feeder.open(sample(4.0, None, 2.0, video=None, audio=sounds[0], system="Listen."))
    assert calls["encode"] == {"fps": OPTIONS.fps}
    list(feeder.chunks([opened, opened]))
    expected = {"tracks": "audio", "chunk_tokens": OPTIONS.chunk_tokens, "batch": 2, "system": "Listen.", "group": 1}
    cuts = calls["chunks"].pop("cuts")
    assert {4.0, 2.0} <= set(cuts)
    assert calls["chunks"] == expected
    list(feeder.chunks([opened], chunk_tokens=20))
    assert calls["chunks"]["chunk_tokens"] == 20
    feeder.prompt([[Turn(text="what ?")]], opened.tracks)
    assert calls["turn"] == {"tracks": "audio"}


def test_an_outline_is_cut_as_the_stream_is(sounds, feeder, calls) -> None:
    feeder.outline(feeder.open(sample(None, video=None, audio=sounds[0], system="Listen.")))
    expected = {"tracks": "audio", "chunk_tokens": OPTIONS.chunk_tokens, "system": "Listen.", "group": 1}
    assert calls["chunks"] == expected


@pytest.mark.parametrize("live", [False, True])
def test_a_watched_stream_has_its_cuts_and_live_segments_do_not_wait_for_others(live, sounds, feeder, calls) -> None:
    options = OPTIONS.source("audio")
    if live:
        sound = iter([torch.zeros(RATE * 4)])
        source: Any = LiveSource(None, sound, options=options, geometry=feeder.backbone.geometry)
    else:
        source = module.FileSource(sounds[0], options=options, geometry=feeder.backbone.geometry)
    list(feeder.watch(source, cuts=[4.0]))
    assert calls["encode"] == {"fps": OPTIONS.fps, "per_pass": 1 if live else 32}
    assert calls["chunks"]["tracks"] == "audio"
    assert calls["chunks"]["chunk_tokens"] == OPTIONS.chunk_tokens
    assert 4.0 in calls["chunks"]["cuts"]


def test_a_watched_path_is_read_with_the_options_of_the_feeder(feeder, monkeypatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        feeder,
        "source",
        lambda sample: (
            asked.append(sample)
            or module.FileSource(sample.video, options=OPTIONS.source("audio"), geometry=feeder.backbone.geometry)
        ),
    )
    feeder.watch(VIDEO)
    assert [(sample.video, sample.audio, sample.start, sample.end, sample.messages) for sample in asked] == [
        (VIDEO, None, 0.0, None, ())
    ]


def test_compact_positions_leave_room_for_questions_or_are_refused() -> None:
    assert last_position("original", 512) is None
    assert last_position("compact", QUESTION_ROOM + 1) == 1
    with pytest.raises(LayoutError, match=r"leaves 1,024 positions to questions, .* on 1,024 in all; .* original"):
        last_position("compact", QUESTION_ROOM)
