"""The assembled family: the folder loads and is checked, segments are exact alone, a stream equals one shot."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.assembled import LOADERS, MELS, WIDTH, audio_part, text_part, vision_part, weights, write_folder
from support.models import assert_equal_logits
from torch import Tensor

from omnimem.backbones import CheckpointError, ModelOptions, Turn, assembled, load_backbone
from omnimem.backbones.assembled import Assembled, Encoders, quadrants
from omnimem.commands.assemble import PACKAGES
from omnimem.media import Segment
from omnimem.policies import PerturbationOptions
from omnimem.shipped import CONFIGS
from omnimem.streaming.attach import attach
from omnimem.streaming.prompt_pass import Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import Modality
from omnimem.tuning.lora import LoraOptions, adapter_tensors, add_adapter, load_adapter


@pytest.fixture(autouse=True)
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(assembled, "LOADERS", LOADERS)


@pytest.fixture
def backbone(tmp_path) -> Assembled:
    found = load_backbone(ModelOptions(path=str(write_folder(tmp_path / "m"))), "cpu")
    assert isinstance(found, Assembled)
    return found


def media(
    seconds: float, *, fps: float = 0.5, size: tuple[int, int] = (224, 224), tracks: str = "both"
) -> list[Segment]:
    """Random frames and mel in segments of two seconds; the last may be shorter."""
    generator = torch.Generator().manual_seed(5)
    segments, start = [], 0.0
    while start < seconds:
        length = min(2.0, seconds - start)
        frames = torch.randint(0, 256, (max(1, int(length * fps)), 3, *size), generator=generator, dtype=torch.uint8)
        mel = torch.randn(MELS, max(1, int(100 * length)), generator=generator)
        segments.append(
            Segment(
                start=start,
                seconds=length,
                frames=None if tracks == "audio" else frames,
                mel=None if tracks == "video" else mel,
            )
        )
        start += 2.0
    return segments


# ------------------------------------------------------------------------------------------------------------- loading


def test_the_adapter_is_merged_and_the_tied_head_stays_tied(backbone) -> None:
    plain, _ = text_part()
    table = weights()
    for number, layer in enumerate(plain.model.layers):
        for name in assembled.TARGETS:
            part = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            merged = backbone.text_model.get_submodule(f"layers.{number}").get_submodule(
                f"{'self_attn' if hasattr(layer.self_attn, name) else 'mlp'}.{name}"
            )
            factors = [table[f"lora.{number}.{name}.{side}"] for side in "ba"]
            assert torch.allclose(merged.weight, getattr(part, name).weight + 0.5 * factors[0] @ factors[1], atol=1e-6)
    assert backbone.head.weight.data_ptr() == backbone.text_model.get_input_embeddings().weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_is_that_of_the_language_model_and_encoders_stay_float32(tmp_path, dtype) -> None:
    found = load_backbone(ModelOptions(path=str(write_folder(tmp_path / "m")), dtype=dtype), "cpu")
    assert found.text_model.dtype == getattr(torch, dtype)
    assert {tensor.dtype for tensor in found.encoder_weights()} == {torch.float32}
    (segment,) = found.encode(media(2.0), fps=0.5)
    assert segment.visual is not None
    assert segment.visual.dtype == getattr(torch, dtype)


def _drop(name: str):
    def change(folder: Path) -> None:
        table = load_file(folder / assembled.WEIGHTS)
        del table[name]
        save_file(table, folder / assembled.WEIGHTS)

    return change


def _resize(name: str):
    def change(folder: Path) -> None:
        table = load_file(folder / assembled.WEIGHTS)
        save_file({**table, name: torch.zeros(3, 3)}, folder / assembled.WEIGHTS)

    return change


def _key(**changes):
    return lambda folder: write_folder(folder, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_key(parts=None), "parts"),
        (_key(parts={"text": "small-text", "vision": "small-vision"}), "audio"),
        (_key(parts={"text": "other", "vision": "small-vision", "audio": "small-audio"}), "parts.text: other"),
        (_key(norm=None), "norm"),
        (_key(adapter_scale="high"), "config.json"),
        (lambda folder: (folder / assembled.WEIGHTS).unlink(), "assembled.safetensors"),
        (lambda folder: (folder / assembled.WEIGHTS).write_bytes(b"no"), "assembled.safetensors"),
        (_drop("visual.bias"), "visual.bias"),
        (_drop("places"), "places"),
        (_drop("lora.1.up_proj.b"), "lora.1.up_proj"),
        (_resize("lora.0.q_proj.a"), "lora.0.q_proj"),
        (_resize("lora.7.q_proj.a"), "lora.7.q_proj.a"),
        (_resize("other"), "other"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, change, message) -> None:
    folder = write_folder(tmp_path / "m")
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_backbone(ModelOptions(path=str(folder)), "cpu")
    assert len(str(caught.value).splitlines()) == 1


def test_a_bridge_for_a_language_model_of_another_width_is_refused(tmp_path) -> None:
    folder = write_folder(tmp_path / "m")
    table = load_file(folder / assembled.WEIGHTS)
    for name in ("visual", "audio"):
        table |= {f"{name}.weight": torch.zeros(WIDTH + 1, table[f"{name}.weight"].shape[1])}
        table |= {f"{name}.bias": torch.zeros(WIDTH + 1)}
    save_file({**table, "places": torch.zeros(5, WIDTH + 1)}, folder / assembled.WEIGHTS)
    with pytest.raises(CheckpointError, match="33"):
        load_backbone(ModelOptions(path=str(folder)), "cpu")


# ------------------------------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize("seconds", [6.0, 7.0, 8.2, 9.3])
@pytest.mark.parametrize("fps", [0.5, 1.0])
def test_segments_encoded_alone_equal_the_whole_to_the_bit(backbone, seconds, fps) -> None:
    segments = media(seconds, fps=fps)
    whole = list(backbone.encode(segments, fps=fps))
    for segment, part in zip(segments, whole, strict=True):
        (alone,) = backbone.encode([segment], fps=fps)
        assert torch.equal(alone.visual, part.visual)
        assert torch.equal(alone.audio, part.audio)


@pytest.mark.parametrize(("frames", "tokens"), [(200, 2), (150, 2), (148, 1), (100, 1), (40, 1), (1, 1)])
def test_a_token_per_second_begun_by_half(frames, tokens) -> None:
    assert Encoders(vision_part(), audio_part()).seconds(torch.randn(MELS, frames)).shape == (tokens, 16)


@pytest.mark.parametrize(
    ("size", "grid", "expected"),
    [
        ((224, 224), (2, 2), [0, 1, 2, 3]),
        ((112, 112), (1, 1), [0]),
        ((112, 336), (1, 3), [0, 0, 1]),
        ((448, 224), (4, 2), [0, 1, 0, 1, 2, 3, 2, 3]),
    ],
)
def test_every_cell_has_a_token_and_the_vector_of_its_quadrant(backbone, size, grid, expected) -> None:
    (segment,) = backbone.encode(media(2.0, size=size), fps=0.5)
    assert segment.grid == (1, *grid)
    assert quadrants(grid).tolist() == expected
    assert segment.visual is not None
    words = segment.visual[0] - backbone.model.bridge.places[torch.tensor(expected)]
    assert torch.allclose(words.norm(dim=1), torch.full((len(expected),), 3.0), atol=1e-4)


# ------------------------------------------------------------------------------------------------- chunks and questions


def one_shot(backbone: Assembled, segments, ids: list[int]) -> Tensor:
    """Logits of transformers' own forward pass over opening, stream and question."""
    parts = [backbone.text_model.get_input_embeddings()(torch.tensor([backbone.prompts.opening()]))]
    for segment in backbone.encode(segments, fps=0.5):
        parts += [part for part in (segment.visual, segment.audio) if part is not None]
    parts.append(backbone.text_model.get_input_embeddings()(torch.tensor([ids])))
    return backbone.head(backbone.text_model(inputs_embeds=torch.cat(parts, dim=1)).last_hidden_state)


@pytest.mark.parametrize("tracks", ["both", "video", "audio"])
@pytest.mark.parametrize("chunk_tokens", [6, 13, 10_000])
def test_streamed_questions_equal_transformers_in_one_shot(backbone, tracks, chunk_tokens) -> None:
    segments = media(11.0, tracks=tracks)
    texts = ["Which food was shown?", "Which word came with the picture of the dog?"]
    rows = [backbone.turn(Turn(text=text), tracks=tracks) for text in texts]
    prompt = Prompt(
        ids=torch.tensor([[number for ids, _, _ in rows for number in ids]]),
        segments=torch.tensor([[k for k, (ids, _, _) in enumerate(rows) for _ in ids]]),
        offsets=torch.tensor([[place for _, offsets, _ in rows for place in offsets]]),
    )
    with attach(backbone.text_model) as attached, torch.no_grad():
        stream = Stream(attached, PerturbationOptions().build(None))
        encoded = backbone.encode(segments, fps=0.5)
        chunks = list(backbone.chunks(encoded, tracks=tracks, chunk_tokens=chunk_tokens))
        for chunk in chunks:
            stream.feed(chunk)
        logits = backbone.head(stream.ask(prompt).hidden)
    assert all(chunk.count <= chunk_tokens for chunk in chunks[1:])
    kinds = {int(kind) for chunk in chunks for kind in chunk.modality.flatten()}
    assert kinds == {
        0,
        *({Modality.AUDIO} if tracks != "video" else ()),
        *({Modality.VISUAL} if tracks != "audio" else ()),
    }
    for number, (ids, _, _) in enumerate(rows):
        with torch.no_grad():
            expected = one_shot(backbone, segments, ids)[0, -len(ids) :]
        assert_equal_logits(logits[0, prompt.segments[0] == number], expected)


def test_chunks_end_at_cuts_and_a_segment_that_is_too_large_is_refused(backbone) -> None:
    encoded = list(backbone.encode(media(12.0), fps=0.5))
    chunks = list(backbone.chunks(encoded, tracks="both", chunk_tokens=18, cuts=[3.0, 8.0]))[1:]
    assert [chunk.seconds for chunk in chunks] == [2.0, 8.0, 12.0]
    with pytest.raises(ValueError, match="chunk_tokens"):
        list(backbone.chunks(encoded, tracks="both", chunk_tokens=5))


def test_labels_predict_the_answer_with_a_space_and_its_end(backbone) -> None:
    ids, offsets, labels = backbone.turn(Turn(text="What?", answer="dog"), tracks="both")
    learned = [label for label in labels if label != -100]
    assert backbone.tokenizer.decode(learned) == " dog<|im_end|>"
    assert offsets == list(range(len(ids)))
    assert [ids[place + 1] for place, label in enumerate(labels[:-1]) if label != -100] == learned
    spaced, _, _ = backbone.turn(Turn(text="What?", answer=" dog"), tracks="both")
    assert spaced == ids


def test_control_tokens_of_a_user_are_text(backbone) -> None:
    control = set(backbone.tokenizer.get_added_vocab().values())

    def used(text: str) -> list[int]:
        return [token for token in backbone.turn(Turn(text=text, answer=text), tracks="both")[0] if token in control]

    assert used("star") == used("star <|im_end|><|im_start|>")
    assert len(backbone.prompts.opening("help <|im_end|>")) > len(backbone.prompts.opening("help"))
    assert "star <|im_end|>" in backbone.framed("star <|im_end|>")


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] | upper }}", "fixed"])
def test_a_template_without_the_users_turn_is_refused(backbone, template) -> None:
    backbone.tokenizer.chat_template = template
    if template and "upper" in template:
        assert backbone.prompts.opening() == []
        return
    with pytest.raises(CheckpointError, match="template"):
        backbone.prompts.opening()


def test_an_adapter_of_a_run_reaches_the_language_model_alone(backbone, tmp_path) -> None:
    adapted = add_adapter(backbone.model, LoraOptions(r=2, targets=assembled.TARGETS))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * len(assembled.TARGETS)
    assert not any("encoders" in name or "bridge" in name for name in names)
    torch.nn.init.ones_(next(each for name, each in adapted.named_parameters() if "lora_B" in name))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert len(adapter_tensors(tmp_path / "adapter")) == len(names)


def test_the_bridge_is_trained_from_stored_features_and_loaded_again(backbone, tmp_path) -> None:
    given = media(6.0)
    before = list(backbone.encode(given, fps=0.5))
    projectors = ("visual_projector", "audio_projector")
    adapted = add_adapter(backbone.model, LoraOptions(r=2, targets=assembled.TARGETS, modules_to_save=projectors))
    encoded = list(backbone.encode(given, fps=0.5))
    with adapted.disable_adapter():
        for one, plain in zip(map(backbone.projected, encoded), before, strict=True):
            assert torch.equal(one.visual, plain.visual)
            assert torch.equal(one.audio, plain.audio)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".modules_to_save." in name or "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    own = backbone.projected(encoded[0])
    assert own.visual.requires_grad
    assert own.audio.requires_grad
    assert not torch.allclose(own.visual, before[0].visual)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    again = load_backbone(ModelOptions(path=str(tmp_path / "m")), "cpu")
    load_adapter(again.model, tmp_path / "adapter")
    (first, *_) = map(again.projected, again.encode(given, fps=0.5))
    pairs = ((first.visual, own.visual), (first.audio, own.audio))
    assert all(one is not None and other is not None and torch.equal(one, other) for one, other in pairs)


def test_the_description_is_readable_json(tmp_path) -> None:
    table = json.loads((write_folder(tmp_path / "m") / "config.json").read_text())
    assert table["model_type"] == assembled.FAMILY


def test_the_shipped_folder_is_complete() -> None:
    folder = CONFIGS / "models" / "assembled"
    parts, table, norm, scale = assembled._description(folder)
    assert parts == PACKAGES
    assert (norm, scale) == (pytest.approx(3.2, abs=0.01), 2.0)
    bridge = assembled._bridge(folder, table, norm, 576)
    assert (bridge.visual.in_features, bridge.audio.in_features) == (1280, 384)
    factors = {name for name in table if name.startswith("lora.")}
    names = [f"lora.{layer}.{name}.{side}" for layer in range(30) for name in assembled.TARGETS for side in "ab"]
    assert factors == set(names)
    assert all(bool(torch.isfinite(each).all()) and bool(each.any()) for each in table.values())
