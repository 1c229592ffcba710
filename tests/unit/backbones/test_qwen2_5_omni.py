"""Qwen2.5-Omni: checkpoints load in the hub's layout, positions are transformers' own, files stream as in one shot."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import assert_equal_logits
from support.thinkers import write_folder
from torch import Tensor

from omnimem.backbones import ModelOptions, Turn, collate
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.qwen2_5_omni import Qwen2_5OmniAudioEncoder, Qwen25Omni, audio_tokens
from omnimem.errors import UserError
from omnimem.media import Segment, patchify
from omnimem.policies import PerturbationOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.prompt_pass import Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, Modality


def load(folder: Path) -> Qwen25Omni:
    return Qwen25Omni.load(ModelOptions(path=str(folder)))


def media(
    backbone: Qwen25Omni,
    seconds: float,
    *,
    fps: float = 1.0,
    size: int = 56,
    tracks: str = "both",
    audio: float | None = None,
) -> list[Segment]:
    """Random frames and mel of a stream that ends at any second or fraction of one; its audio may end elsewhere."""
    generator = torch.Generator().manual_seed(3)
    geometry = backbone.geometry
    length, frames_each, mel_each = geometry.segment(fps)
    frames = torch.randint(0, 256, (int(seconds * fps), 3, size, size), generator=generator, dtype=torch.uint8)
    audio = seconds if audio is None else audio
    mel = torch.randn(geometry.mel.mels, int(audio * geometry.mel.rate / geometry.mel.hop), generator=generator)
    segments, number = [], 0
    whole = {"video": seconds, "audio": audio, "both": max(seconds, audio)}[tracks]
    while number * length < whole:
        part = frames[number * frames_each : (number + 1) * frames_each]
        sound = mel[:, number * mel_each : (number + 1) * mel_each]
        shown = part if len(part) and tracks != "audio" else None
        heard = sound if sound.shape[1] and tracks != "video" else None
        start = number * length
        segments.append(Segment(start=start, seconds=min(length, whole - start), frames=shown, mel=heard))
        number += 1
    return segments


def stream_ids(backbone: Qwen25Omni, chunks: Iterable[Tensor], tracks: str) -> Tensor:
    """The id sequence transformers would see: placeholders where audio and visual tokens stand."""
    config = backbone.model.config
    placeholder = {int(Modality.AUDIO): config.audio_token_id, int(Modality.VISUAL): config.video_token_id}
    ids = []
    for number, modality in enumerate(chunks):
        if number == 0:
            begin = ["<|vision_bos|>"] * (tracks != "audio") + ["<|audio_bos|>"] * (tracks != "video")
            text = backbone.tokenizer(backbone._opening, add_special_tokens=False)["input_ids"]
            ids += [*text, *(backbone.tokenizer.convert_tokens_to_ids(name) for name in begin)]
        else:
            ids += [placeholder[int(kind)] for kind in modality[0]]
    return torch.tensor([ids])


@pytest.fixture(scope="module")
def thinkers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Qwen25Omni]:
    folder = tmp_path_factory.mktemp("thinkers")
    return {rates: load(write_folder(folder / rates, rates=rates)) for rates in ("real", "tiny")}


@pytest.mark.parametrize("tied", [True, False], ids=["3B-like", "7B-like"])
def test_a_checkpoint_in_the_hub_layout_loads_bit_for_bit(tmp_path, tied) -> None:
    plain = load(write_folder(tmp_path / "plain", tied=tied))
    hub = load(write_folder(tmp_path / "hub", tied=tied, hub=True))
    assert not (tmp_path / "hub" / "model.safetensors").exists()
    expected, got = plain.model.state_dict(), hub.model.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    same = hub.head.weight.data_ptr() == hub.text_model.get_input_embeddings().weight.data_ptr()
    assert same == tied
    assert load_file(next((tmp_path / "hub").glob("*.safetensors"))).keys()


def test_a_folder_without_preprocessor_is_refused_by_name(tmp_path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        load(folder)


def test_control_tokens_of_a_user_are_text_and_half_a_character_is_refused(tmp_path) -> None:
    backbone = load(write_folder(tmp_path / "m"))
    signs = "".join(token for token in backbone.tokenizer.get_added_vocab())
    control = set(backbone.tokenizer.get_added_vocab().values())
    used = [[], []]
    for found, text in zip(used, ("star", f"star {signs}<{signs}"), strict=True):
        ids, _, labels = backbone.turn(Turn(text=text, answer=text), tracks="both")
        found.append([token for token in ids if token in control])
        assert [label for label in labels if label in control] == [*backbone.stop]
        (opening,) = backbone.chunks([], tracks="both", chunk_tokens=9, system=text)
        weight = backbone.text_model.get_input_embeddings().weight
        matches = [(opening.embeddings[0] == weight[token]).all(-1) for token in control]
        found.append(torch.stack(matches).sum(dim=1).tolist())
        assert text in backbone.framed(text, system=text)
    assert used[0] == used[1]
    for turn in (Turn(text="what \ud83d ?"), Turn(text="what ?", answer="\udc80")):
        with pytest.raises(UserError, match="half of a character"):
            backbone.turn(turn, tracks="both")


def rope_index(backbone: Qwen25Omni, chunks: Sequence[Chunk], segments: Sequence[Segment], fps: float) -> Tensor:
    """Positions of get_rope_index for the opening, these segments as a whole file, and a question after them."""
    (tracks,) = {chunk.tracks for chunk in chunks[:1]}
    ids, _, _ = backbone.turn(Turn(text="what colour was the star ?"), tracks=tracks)
    whole = torch.cat([stream_ids(backbone, [c.modality for c in chunks], str(tracks)), torch.tensor([ids])], dim=1)
    grids = [backbone.geometry.patches(s.frames)[1] for s in segments if s.frames is not None]
    mel = sum(s.mel.shape[1] for s in segments if s.mel is not None)
    expected, _ = backbone.model.get_rope_index(
        whole,
        video_grid_thw=torch.tensor([[sum(grid[0] for grid in grids), *grids[0][1:]]]) if grids else None,
        attention_mask=torch.ones_like(whole),
        use_audio_in_video=tracks == "both",
        audio_seqlens=torch.tensor([mel]) if mel else None,
        second_per_grids=torch.tensor([2.0 / fps]),
    )
    return expected[:, 0].long()


# seconds of video and of audio, frames per second
SHAPES = [(8, 8, 1), (7, 7, 1), (6, 6, 2), (9.3, 9.3, 1)]  # equally long
SHAPES += [(6, 5, 2), (6, 4, 1), (7, 4.5, 2), (6, 2.3, 1), (5, 1.2, 1), (7, 1.9, 4), (8, 0.9, 7.5)]  # video longer
SHAPES += [(6, 7, 2), (4, 6.3, 1), (3, 6, 2), (1, 9.9, 1), (4, 8.1, 7.5), (8, 9, 12.5)]  # audio longer
SPARSE = [(8, 8, 0.5), (12, 5, 0.5), (4, 9, 0.5), (16, 16, 0.25)]
ALONE = [(8, 8, 1), (9.3, 9.3, 1), (8, 8, 0.5), (7, 4.5, 7.5)]


@pytest.mark.parametrize(("rates", "size"), [("real", 56), ("tiny", 56), ("tiny", 140)])  # 140: more rows than a block
@pytest.mark.parametrize(
    ("tracks", "shape"),
    [("both", shape) for shape in SHAPES + SPARSE]
    + [(alone, shape) for alone in ("video", "audio") for shape in ALONE],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_positions_are_those_of_get_rope_index_after_every_segment(thinkers, rates, size, tracks, shape) -> None:
    (video, audio, fps), backbone = map(float, shape), thinkers[rates]
    segments = media(backbone, video, fps=fps, tracks=tracks, size=size, audio=audio)
    encoded = list(backbone.encode(segments, fps=fps))
    opening, *rest = backbone.chunks(encoded, tracks=tracks, chunk_tokens=10_000, cuts=[s.start for s in segments])
    for seen in range(1, len(rest) + 1):
        chunks, last = [opening, *rest[:seen]], rest[seen - 1]
        known = [segment for segment in segments if segment.start < last.seconds]
        expected = rope_index(backbone, chunks, known, fps)
        ours = torch.cat([chunk.positions[0] for chunk in chunks], dim=1)
        count, after = ours.shape[1], int(ours.max()) + 1 if last.next_position is None else last.next_position
        assert torch.equal(expected[:, count : count + 1], torch.tensor([[after]] * 3))
        if shape in SPARSE:  # the same positions in the order of time
            ours, expected = (sorted(each[:, :count].T.tolist()) for each in (ours, expected))
            assert ours == expected
        else:
            assert torch.equal(ours, expected[:, :count])


def test_sparse_frames_stay_in_the_order_of_time(tmp_path) -> None:
    backbone = load(write_folder(tmp_path / "m", rates="tiny"))
    encoded = list(backbone.encode(media(backbone, 12.0, fps=0.5), fps=0.5))
    chunks = list(backbone.chunks(encoded, tracks="both", chunk_tokens=1000))[1:]
    time, kind = chunks[0].positions[0, 0], chunks[0].modality[0]
    assert time.diff().min() >= -2  # within a stretch of 2 positions, all video precedes its audio
    assert time[kind == Modality.VISUAL].unique().tolist() == [t + int(time[0]) for t in (0, 4, 8)]
    assert (time[kind == Modality.AUDIO] - time[0]).tolist() == list(range(12))


@pytest.mark.parametrize("seconds", [6.0, 7.0, 9.3])
def test_segments_encoded_alone_equal_the_whole(tmp_path, seconds) -> None:
    backbone = load(write_folder(tmp_path / "m"))
    segments = media(backbone, seconds)
    whole, alone = list(backbone.encode(segments, fps=1.0)), list(backbone.encode(segments, fps=1.0, per_pass=1))
    for a, b in zip(whole, alone, strict=True):
        for x, y in ((a.visual, b.visual), (a.audio, b.audio)):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                assert_equal_logits(x, y)


@pytest.mark.parametrize(
    ("chunk_tokens", "seconds", "audio"),
    [(60, 8.0, 8.0), (120, 8.0, 8.0), (10_000, 8.0, 8.0), (120, 8.0, 6.4), (60, 8.0, 3.0), (60, 6.0, 8.7)],
)
def test_streamed_questions_equal_transformers_in_one_shot(thinkers, chunk_tokens, seconds, audio) -> None:
    backbone = thinkers["real"]
    segments = media(backbone, seconds, audio=audio)
    encoded = list(backbone.encode(segments, fps=1.0))
    chunks = list(backbone.chunks(encoded, tracks="both", chunk_tokens=chunk_tokens))
    texts = ["what colour was the star ?", "what word did the robin say to the moon ?"]
    rows = [backbone.turn(Turn(text=text), tracks="both") for text in texts]
    prompt = Prompt(
        ids=torch.tensor([[number for ids, _, _ in rows for number in ids]]),
        segments=torch.tensor([[k for k, (ids, _, _) in enumerate(rows) for _ in ids]]),
        offsets=torch.tensor([[place for _, offsets, _ in rows for place in offsets]]),
    )
    with attach(backbone.text_model) as attached, torch.no_grad():
        stream = Stream(attached, PerturbationOptions().build(None))
        for chunk in chunks:
            stream.feed(chunk)
        logits = backbone.head(stream.ask(prompt).hidden)
    media_ids = stream_ids(backbone, [c.modality for c in chunks], "both")
    pixels = torch.cat([s.frames for s in segments if s.frames is not None])
    mel = torch.cat([s.mel for s in segments if s.mel is not None], dim=1)
    for number, (ids, _, _) in enumerate(rows):
        with torch.no_grad():
            expected = transformers_logits(backbone, torch.cat([media_ids, torch.tensor([ids])], dim=1), pixels, mel)
        assert_equal_logits(logits[0, prompt.segments[0] == number], expected[0, -len(ids) :])


def transformers_logits(backbone: Qwen25Omni, ids: Tensor, frames: Tensor, mel: Tensor) -> Tensor:
    """The stock model's own forward pass on pixels, mel and ids."""
    geometry = backbone.geometry
    shape = {name: getattr(geometry, name) for name in ("patch", "merge", "temporal_patch", "mean", "std")}
    rows, grid = patchify(frames, **shape)
    return backbone.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=rows,
        video_grid_thw=torch.tensor([grid]),
        input_features=mel[None],
        feature_attention_mask=torch.ones(1, mel.shape[1], dtype=torch.long),
        use_audio_in_video=True,
        video_second_per_grid=torch.tensor([2.0]),
        use_cache=False,
    ).logits


def test_chunks_hold_at_most_chunk_tokens_and_end_at_cuts(tmp_path) -> None:
    backbone = load(write_folder(tmp_path / "m", rates="tiny"))
    encoded = list(backbone.encode(media(backbone, 12.0), fps=1.0))
    chunks = list(backbone.chunks(encoded, tracks="both", chunk_tokens=14, cuts=[3.0, 8.0]))[1:]
    assert all(chunk.count <= 14 for chunk in chunks)
    assert chunks[0].seconds == 2.0  # what a question at 3 s may see is over by then
    assert 8.0 in [chunk.seconds for chunk in chunks]
    assert all(a.seconds < b.seconds for a, b in pairwise(chunks))
    with pytest.raises(ValueError, match="chunk_tokens"):
        list(backbone.chunks(encoded, tracks="both", chunk_tokens=5))


def test_streams_of_another_layout_do_not_share_a_batch(tmp_path) -> None:
    backbone = load(write_folder(tmp_path / "m", rates="tiny"))
    long, short = (list(backbone.encode(media(backbone, seconds), fps=1.0)) for seconds in (6.0, 4.0))
    assert [s.visual.shape[0] for s in collate([long, long]) if s.visual is not None] == [2, 2, 2]
    with pytest.raises(ValueError, match="layout"):
        list(collate([long, short]))


def test_audio_token_count_is_the_towers_own(tmp_path) -> None:
    model = load(write_folder(tmp_path / "m")).model
    (tower,) = (module for module in model.modules() if isinstance(module, Qwen2_5OmniAudioEncoder))
    for frames in [*range(1, 30), 199, 200, 201, 203, 999]:
        _, expected = tower._get_feat_extract_output_lengths(torch.tensor(frames))
        assert audio_tokens(frames) == max(0, int(expected))
