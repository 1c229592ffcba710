"""Projectors trained beside the adapter: their gradient, who uses which copy, saving, and the encoder cache."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.episodes import mean_answer_loss
from support.families import NAMES, noise, written_once
from support.gradients import HELD, assert_same_gradient, episode_from, loss_of, policy_at
from torch import Tensor

from omnimem.backbones import Backbone, Encoded, ModelOptions, collate, load_backbone
from omnimem.budget import SplitBudget
from omnimem.data import Message, Sample
from omnimem.media import Segment
from omnimem.memory import Held
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.selection import SelectionOptions
from omnimem.streaming.adapter import without_adapter
from omnimem.streaming.attach import attach
from omnimem.streaming.chunk_pass import DirectStep, MemoryStep
from omnimem.streaming.encoder_cache import EncoderCache, MediaStats, TrackSegment, fingerprint
from omnimem.streaming.feeder import EncodedSample, Feeder, feed_until_due
from omnimem.streaming.options import StreamOptions
from omnimem.training.gradient_sync import whole_gradient
from omnimem.tuning import (
    AdapterError,
    FullGradient,
    FullMemoryKL,
    HorizonGradient,
    LoraOptions,
    ReleasedGradient,
    StreamedModel,
    TuningOptions,
    add_adapter,
    load_adapter,
    start_adapter,
    streamed_loss,
    trainable,
)
from omnimem.tuning.lora import name_as_released
from omnimem.tuning.saved_modules import chosen, projectors_of

DENSE = [name for name in NAMES if "moe" not in name]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of a family, written once."""
    return written_once(tmp_path_factory.mktemp("families"))


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> Backbone:
    backbone = load_backbone(ModelOptions(path=str(path)), "cpu")
    if dtype == torch.float64 and hasattr(backbone.model, "set_experts_implementation"):
        backbone.model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    cast(Any, backbone.model).to(dtype)
    return backbone


def feeder_of(backbone: Backbone) -> Feeder:
    """Chunks of at most one segment, with the text of its timestamp."""
    most = max(each.count for each in backbone.encode(segments(backbone), fps=1.0))
    return Feeder(backbone, StreamOptions(chunk_tokens=most + 16 * backbone.stamped, tracks=backbone.senses[0]))


def lora_of(backbone: Backbone, **settings: Any) -> LoraOptions:
    """All projectors of the model."""
    names = tuple(projectors_of(backbone.model))
    return LoraOptions(**{"r": 2, "alpha": 4.0, "dropout": 0.0, "modules_to_save": names, **settings})


def tuned(path: Path, dtype: torch.dtype = torch.float32, *, moved: float = 0.0) -> tuple[Backbone, StreamedModel]:
    """A model with an adapter and copies of its projectors, moved by so much noise."""
    backbone = loaded(path, dtype)
    model = add_adapter(backbone.model, lora_of(backbone))
    cast(Any, backbone.model).to(dtype)
    shift(model, moved)
    return backbone, model


@torch.no_grad()
def shift(model: StreamedModel, by: float, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights(model):
        weight += by * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


def weights(model: Any) -> list[Tensor]:
    """Those of the projectors, of an adapted model of the adapter's copies, in one order."""
    base = model.get_base_model() if isinstance(model, StreamedModel) else model
    modules = [base.get_submodule(path) for paths in projectors_of(base).values() for path in paths]
    return [weight for module in modules for weight in getattr(module, "modules_to_save", module).parameters()]


def segments(backbone: Backbone, seconds: float | None = None, tracks: str | None = None) -> list[Segment]:
    wanted = seconds or 2 * backbone.geometry.segment(1.0)[0]
    return list(noise(backbone, wanted, tracks=tracks or backbone.senses[0]))


def opened(backbone: Backbone, at: float | None = None, tracks: Any = None) -> EncodedSample:
    """A stream of noise with a question during it, if `at` is given, and after its end."""
    messages = []
    for time, answer in ((at, "red"), (None, "dark blue")) if at is not None else ((None, "dark blue"),):
        messages.append(Message(role="user", content="what ?", at=time))
        messages.append(Message(role="assistant", content=answer))
    sample = Sample(id="1", video=Path("x.mp4"), audio=None, messages=tuple(messages))
    encoded = list(backbone.encode(segments(backbone, tracks=tracks), fps=1.0))
    tracks = tracks or backbone.senses[0]
    return EncodedSample(sample=sample, segments=encoded, tracks=tracks, heard=MediaStats(frames=1, audio_seconds=1.0))


def bounded(backbone: Backbone, slots: int = 6) -> Policy:
    layers = backbone.text_model.config.num_hidden_layers
    return PerturbationOptions().build(SplitBudget(visual_audio_ratio=2.0).build(layers, slots))


def learned(
    backbone: Backbone,
    model: StreamedModel | None,
    policy: Policy,
    carry: MemoryStep,
    *,
    by_layer: bool = False,
    at: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers in the model's own precision, and its gradient of the projectors of `model`."""
    feeder, batch, losses = feeder_of(backbone), [opened(backbone, at)], []
    with attach(backbone.text_model, recompute_layers=by_layer) as attached:
        stream = feeder.stream(attached, policy, carry=carry)
        for due in feed_until_due(stream, feeder.chunks(batch), batch[0].moments):
            prompt = feeder.prompt([batch[0].turns(due.moments)], batch[0].tracks)
            assert prompt.labels is not None
            losses.append(due.stream.read(loss_of(due.stream.reader(prompt), backbone.head, prompt.labels)).sum())
        loss = torch.stack(losses).mean()
        return loss.detach(), torch.zeros(0) if model is None else gradient_of(loss, model)


def gradient_of(loss: Tensor, model: Any) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights(model))])


# --------------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize(
    ("name", "slots"), [*((name, 6) for name in DENSE), ("qwen2_5_omni", None), ("qwen3_vl", None)]
)
def test_gradient_of_projectors_equals_differences_of_a_model_without_the_setting(name, slots, folder) -> None:
    """The other model has the moved weights in its own projectors, and encodes as ever."""
    backbone, model = tuned(folder(name), torch.float64)
    policy = bounded(backbone, slots) if slots else replace(bounded(backbone), budget=None)
    _, slope = learned(backbone, model, policy, FullGradient())
    direction, found = slope / slope.norm(), []
    for step in (1e-3, -1e-3):
        other, place = loaded(folder(name), torch.float64), 0
        with torch.no_grad():
            for weight in weights(other.model):
                weight += step * direction[place : place + weight.numel()].view_as(weight)
                place += weight.numel()
            found.append(float(learned(other, None, policy, DirectStep())[0]))
        assert place == slope.numel()
    assert float(slope.norm()) == pytest.approx((found[0] - found[1]) / 2e-3, rel=1e-3)  # norms are float32
    assert float(slope.norm()) > 0.1


@pytest.mark.parametrize("way", HELD)
@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_vl"])
def test_recomputed_gradient_equals_that_of_the_unbroken_graph(name, way, folder) -> None:
    """Also of a question during the stream; Qwen3-VL has projectors of deepstack features."""
    carry, by_layer = HELD[way]
    found = []
    for step, layers in ((carry, by_layer), (DirectStep(), False)):
        backbone, model = tuned(folder(name), torch.float64, moved=0.05)
        found.append(learned(backbone, model, bounded(backbone), step, by_layer=layers, at=1.0))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_with_full_memory_it_is_ordinary_fine_tuning(folder) -> None:
    """Loss and gradient of transformers' own forward pass over the whole prompt, its projectors in the graph."""
    backbone, model = tuned(folder("qwen2_5_omni"), torch.float64, moved=0.05)
    feeder, batch = feeder_of(backbone), [opened(backbone)]
    with attach(backbone.text_model) as attached:
        outcome = streamed_loss(attached, feeder, batch, policy_at(None), softness=None, carry=FullGradient())
        got = gradient_of(outcome.loss, model)
        episode = episode_from(attached, feeder, batch)
    embeddings, parts = episode.embeddings(attached).detach(), []
    stock: Any = backbone.model
    for segment in segments(backbone):
        assert segment.frames is not None
        assert segment.mel is not None
        patches, grid = backbone.geometry.patches(segment.frames)
        parts.append(stock.get_video_features(patches.double(), torch.tensor([grid])).pooler_output[0])
        mask = torch.ones(1, segment.mel.shape[1], dtype=torch.long)
        parts.append(stock.get_audio_features(segment.mel[None].double(), mask).last_hidden_state)
    media = torch.cat([chunk.modality[0] for chunk in episode.chunks]).nonzero()[:, 0]
    embeddings = embeddings.index_copy(1, media, torch.cat(parts)[None])
    positions = episode.positions.transpose(0, 1)
    hidden = backbone.text_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
    labels = episode.asked[0][1].labels
    assert labels is not None
    plain = mean_answer_loss(backbone.head(hidden[:, -labels.shape[1] :]), labels)
    assert_same_gradient(got, gradient_of(plain, model), 1e-6)


@pytest.mark.parametrize("mode", ["states", "released"])
def test_a_gradient_that_reaches_no_embedding_is_refused_by_name(mode) -> None:
    lora = LoraOptions(modules_to_save=("visual_projector",))
    with pytest.raises(ValueError, match=rf"lora\.modules_to_save learns nothing with gradient: {mode}") as error:
        TuningOptions(gradient=mode, lora=lora, selection=SelectionOptions(softening="hard"))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "levels"), [("qwen2_5_omni", 0), ("qwen3_vl", 2)])
def test_horizon_and_paper_learn_from_the_chunks_that_they_name(name, levels, folder) -> None:
    """`paper`: the last chunk alone; a horizon of 1 too, and one as long as the stream is the whole gradient."""
    backbone, model = tuned(folder(name), torch.float64, moved=0.05)
    found, last = {}, opened(backbone).segments[-1]
    ways = {
        "all": FullGradient(),
        "horizon all": HorizonGradient(chunks=9),
        "horizon 1": HorizonGradient(chunks=1),
        "paper": ReleasedGradient(stop_layer=max(1, levels), whole_last_chunk=True),
    }
    projected = backbone.projected
    for way, carry in ways.items():
        for alone in (False, True):
            with pytest.MonkeyPatch.context() as patched:
                if alone:  # the gradient of every other segment is cut

                    def cut(encoded: Encoded, *, original: bool = False) -> Encoded:
                        with nullcontext() if encoded.start == last.start else torch.no_grad():
                            return projected(encoded, original=original)

                    patched.setattr(backbone, "projected", cut)
                _, found[way, alone] = learned(backbone, model, bounded(backbone), carry)
    assert_same_gradient(found["horizon all", False], found["all", False], 1e-9)
    for way in ("horizon 1", "paper"):
        assert float(found[way, False].norm()) > 1e-6
        assert torch.equal(found[way, False], found[way, True])
    assert not torch.allclose(found["all", False], found["all", True])


def test_projectors_of_a_track_that_no_stream_of_a_rank_has_get_zeros(folder) -> None:
    backbone, model = tuned(folder("qwen2_5_omni"))
    feeder, batch, learning = feeder_of(backbone), [opened(backbone, tracks="video")], trainable(model)
    with attach(backbone.text_model) as attached:
        outcome = streamed_loss(attached, feeder, batch, policy_at(6), softness=None, carry=FullGradient())
        whole_gradient(outcome.loss, learning).backward()
    norms = {name: float(weight.grad.norm()) for name, weight in model.named_parameters() if weight.grad is not None}
    assert len(norms) == len(learning)
    assert {norm for name, norm in norms.items() if "audio_tower" in name} == {0.0}
    assert all(norm > 0 for name, norm in norms.items() if "merger" in name and name.endswith("weight"))


def test_the_loss_falls_with_projectors_alone(folder) -> None:
    backbone, model = tuned(folder("qwen2_5_omni"))
    learning = torch.optim.AdamW(weights(model), lr=1e-2)
    feeder, batch, losses = feeder_of(backbone), [opened(backbone)], []
    with attach(backbone.text_model) as attached:
        for _ in range(12):
            outcome = streamed_loss(attached, feeder, batch, policy_at(6), softness=None, carry=FullGradient())
            learning.zero_grad()
            outcome.loss.backward()
            learning.step()
            losses.append(float(outcome.loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", DENSE)
def test_a_batch_of_streams_learns_as_its_streams_alone(name, folder) -> None:
    """Tokens and gradient, of the adapter's projectors and of the base's."""
    backbone, model = tuned(folder(name), torch.float64, moved=0.05)
    seconds = 2 * backbone.geometry.segment(1.0)[0]
    made = [noise(backbone, seconds, tracks=backbone.senses[0], seed=seed) for seed in (0, 7)]
    streams = [list(backbone.encode(each, fps=1.0)) for each in made]
    for original in (False, True):
        whole = [tokens_of(backbone.projected(one, original=original)) for one in collate(streams)]
        alone = [[tokens_of(backbone.projected(one, original=original)) for one in stream] for stream in streams]
        for tokens, *parts in zip(whole, *alone, strict=True):
            for batch, *rows in zip(tokens, *parts, strict=True):
                torch.testing.assert_close(batch, torch.cat(rows), rtol=1e-9, atol=1e-9)
    feeder, batch, policy = (
        feeder_of(backbone),
        [replace(opened(backbone), segments=each) for each in streams],
        bounded(backbone),
    )
    with attach(backbone.text_model) as attached:
        found = []
        for group in (batch, batch[:1], batch[1:]):
            outcome = streamed_loss(attached, feeder, group, policy, softness=None, carry=FullGradient())
            found.append(gradient_of(outcome.loss, model))
    assert_same_gradient(found[0], (found[1] + found[2]) / 2, 1e-6)


# ------------------------------------------------------------------------------------------------ whose projectors


def tokens_of(encoded: Encoded) -> list[Tensor]:
    return [part for part in (encoded.visual, encoded.audio, *encoded.deepstack) if part is not None]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_with_the_adapter_off_the_tokens_are_the_base_models_to_the_bit(name, folder) -> None:
    """Of a segment in a pass of its own: in another pass a product of matrices may round otherwise."""
    base = loaded(folder(name))
    given = segments(base)
    expected = [tokens_of(one) for one in base.encode(given, fps=1.0, per_pass=1)]
    backbone, model = tuned(folder(name), moved=0.05)
    assert backbone.unprojected == tuple(backbone.projectors)
    encoded = list(backbone.encode(given, fps=1.0, per_pass=1))
    with model.disable_adapter():
        off = [tokens_of(backbone.projected(one)) for one in encoded]
    original = [tokens_of(backbone.projected(one, original=True)) for one in encoded]
    with without_adapter(backbone.text_model):  # as the drift of selection is measured
        assert all(same(ones, tokens_of(backbone.projected(one))) for ones, one in zip(off, encoded, strict=True))
    on = [tokens_of(backbone.projected(one)) for one in encoded]
    for ones, others, rest, tokens in zip(expected, off, original, on, strict=True):
        assert same(ones, others)
        assert same(ones, rest)
        assert all(token.requires_grad and not torch.allclose(a, token) for a, token in zip(ones, tokens, strict=True))
        assert not any(token.requires_grad for token in others + rest)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_vl"])
def test_the_base_selects_by_its_own_projectors(name, folder) -> None:
    """`selection_from: base` keeps what a model without adapter keeps, though the tuned projectors are far away."""
    held: list[tuple[Held, ...]] = []
    for backbone, source in (
        (loaded(folder(name)), "tuned"),
        (tuned(folder(name), moved=0.5)[0], "base"),
        (tuned(folder(name), moved=0.5)[0], "tuned"),
    ):
        feeder = feeder_of(backbone)
        with attach(backbone.text_model) as attached, torch.no_grad():
            stream = feeder.stream(attached, replace(bounded(backbone), selection_from=source))
            for chunk in feeder.chunks([opened(backbone)]):
                stream.feed(chunk)
            held.append(stream.memory.held())
    assert held[0] == held[1] != held[2]


def test_the_teacher_hears_and_sees_by_the_original_projectors(folder) -> None:
    """At full memory its divergence is 0 before a step, and afterwards its own answers are what they were."""
    backbone, model = tuned(folder("qwen2_5_omni"))
    feeder, batch, kl = feeder_of(backbone), [opened(backbone)], (FullMemoryKL(),)
    found, settings = [], {"softness": None, "carry": FullGradient(), "losses": kl, "model": model}
    with attach(backbone.text_model) as attached:
        for by in (0.0, 0.1, -0.1):
            shift(model, by)
            found.append(float(streamed_loss(attached, feeder, batch, policy_at(None), **settings).loss.detach()))
    assert abs(found[0]) < 1e-6
    assert found[1] > 1e-3
    assert abs(found[2]) < 1e-5
    assert all(weight.requires_grad for weight in weights(model))


def test_segments_of_the_base_model_are_not_read_by_tuned_projectors(folder) -> None:
    backbone = loaded(folder("qwen2_5_omni"))
    before = opened(backbone)
    add_adapter(backbone.model, lora_of(backbone))
    with pytest.raises(ValueError, match="made by the base model's projector, before an adapter"):
        list(feeder_of(backbone).chunks([before]))


# ------------------------------------------------------------------------------------------------------ names, saving


@pytest.mark.parametrize("name", NAMES)
def test_names_of_projectors_resolve_or_are_refused_with_those_of_the_model(name, folder) -> None:
    backbone = loaded(folder(name))
    known = projectors_of(backbone.model)
    for short, paths in known.items():
        for given in (short, paths[0], ".".join(paths[0].split(".")[-2:])):
            assert chosen(backbone.model, (given,)) == (paths if given == short else paths[:1])
    for given in ("lm_head", "visual", "audio_tower", "visual_projecto", *{"audio_projector"} - known.keys()):
        with pytest.raises(
            AdapterError, match=rf"modules_to_save: '{given}' is not a projector; this model has"
        ) as error:
            add_adapter(backbone.model, lora_of(backbone, modules_to_save=(given,)))
        assert len(str(error.value).splitlines()) == 1
        assert "visual_projector (" in str(error.value)


@pytest.mark.parametrize("names", ["own", "released"])
@pytest.mark.parametrize("name", DENSE)
def test_an_adapter_with_projectors_is_the_same_after_loading_and_starting(name, names, folder, tmp_path) -> None:
    backbone, model = tuned(folder(name), moved=0.05)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.2)
    model.save_pretrained(str(tmp_path))
    if names == "released":
        name_as_released(tmp_path, backbone.model)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
        own = [path for paths in projectors_of(backbone.model).values() for path in paths]
        thinker = name in ("qwen2_5_omni", "qwen3_omni")
        assert thinker == (set(saved) != set(own)) or name in ("qwen2_5_vl", "video_salmonn2_plus_qwen2_5")
    encoded = list(backbone.encode(segments(backbone), fps=1.0))
    expected = [tokens_of(backbone.projected(one)) for one in encoded]
    lora = lora_of(backbone)
    for load in (load_adapter, lambda model, place: start_adapter(model, lora, place)):
        other = loaded(folder(name))
        again = load(other.model, tmp_path)
        got = [tokens_of(other.projected(one)) for one in other.encode(segments(other), fps=1.0)]
        assert all(same(ones, others) for ones, others in zip(expected, got, strict=True))
    assert len(trainable(again)) == len(trainable(model))
    without = replace(lora, modules_to_save=())
    with pytest.raises(AdapterError, match=r"lora\.modules_to_save is \[\], but the adapter in .* has .*merger"):
        start_adapter(loaded(folder(name)).model, without, tmp_path)


def test_copies_are_float32_beside_a_base_of_16_bits(folder) -> None:
    backbone, model = tuned(folder("qwen3_vl"), torch.bfloat16)
    assert {weight.dtype for weight in weights(model)} == {torch.bfloat16}  # as an engine in bfloat16 has them
    backbone = load_backbone(ModelOptions(path=str(folder("qwen3_vl")), dtype="bfloat16"), "cpu")
    model = add_adapter(backbone.model, lora_of(backbone))
    assert {weight.dtype for weight in weights(model)} == {torch.float32}
    (first, *_) = backbone.encode(segments(backbone), fps=1.0)
    assert {part.dtype for part in tokens_of(first) + tokens_of(backbone.projected(first))} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------ encoder cache


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_vl"])
def test_the_cache_holds_what_precedes_projectors_and_serves_all_of_their_weights(name, folder, tmp_path) -> None:
    base, (backbone, model) = loaded(folder(name)), tuned(folder(name))
    before = fingerprint(backbone)
    shift(model, 0.1)
    assert fingerprint(backbone) == before != fingerprint(base)
    cache = EncoderCache.of(backbone, tmp_path)
    assert cache is not None
    every = backbone.encode(segments(backbone), fps=1.0)
    stored = [TrackSegment(track="visual", encoded=one, media=MediaStats()) for one in every]
    cache.store(tmp_path / "a.safetensors", stored)
    read = cache.load(tmp_path / "a.safetensors", torch.device("cpu"), "visual")
    assert read is not None
    shift(model, 0.1, seed=6)
    for one, other in zip(stored, read, strict=True):
        assert other.encoded.before == backbone.unprojected
        assert same(*(tokens_of(backbone.projected(each.encoded)) for each in (one, other)))
    with torch.no_grad():
        next(base.encoder_weights()).add_(1.0)
        next(backbone.encoder_weights()).add_(1.0)
    assert fingerprint(backbone) != before
