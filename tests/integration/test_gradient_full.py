"""Gradient through evictions: streamed and recomputed, it equals one plain pass with masks by layer."""

import gc
import weakref
from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from support.episodes import (
    CutOff,
    Episode,
    KeptByChunk,
    OneShot,
    ScoresByChunk,
    Softened,
    mean_answer_loss,
    one_shot_loss,
)
from support.gradients import (
    WAYS,
    adapted,
    assert_same_gradient,
    episode_from,
    episode_of,
    gradient,
    head_of,
    labelled_prompt,
    opened,
    policy_at,
    streamed_loss_of,
)
from support.streams import LENGTHS, policy_of
from support.thinkers import write_folder
from torch import Tensor, nn
from torch.nn import functional as F

from omnimem.attention import blocked
from omnimem.attention.blocked import attend
from omnimem.backbones import ModelOptions
from omnimem.backbones.qwen2_5_omni import Qwen25Omni
from omnimem.memory import Memory
from omnimem.scoring import covered
from omnimem.selection import LayerSlots, Softness, select
from omnimem.streaming.attach import StreamedAttention, attach
from omnimem.streaming.chunk_pass import DirectStep, MemoryStep
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk
from omnimem.tuning import FullGradient, LoraOptions, add_adapter, streamed_loss, trainable


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_streamed_gradient_equals_one_shot_with_masks_by_layer(family, dtype, relative) -> None:
    model, episode = adapted(family, dtype), episode_of(family, dtype)
    noting = KeptByChunk(FullGradient())
    with attach(model) as attached:
        loss = streamed_loss_of(attached, episode, policy_of("omnimem"), noting)
        got = gradient(loss, model)
        plain = one_shot_loss(attached, head_of(model), episode, OneShot(episode, noting.kept))
        expected = gradient(plain, model)
        cut_off = gradient(streamed_loss_of(attached, episode, policy_of("omnimem"), CutOff()), model)
    counts = [tokens.shape[1] for tokens in noting.kept[-1]]
    assert len(set(counts)) == 4  # layers remember unequal numbers, and all have evicted
    assert max(counts) < sum(LENGTHS)
    torch.testing.assert_close(loss, plain, rtol=relative, atol=0)
    assert_same_gradient(got, expected, relative)
    assert float(F.cosine_similarity(got, cut_off, dim=0)) < 0.9  # a graph that is cut would be noticed


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("preset", ["distinct", "omnimem", "paper", "released"])
def test_straight_through_gradient_equals_one_shot_with_gates(preset, temperature) -> None:
    """Gates written out from their definition, over every eviction that a token survives; `none` is hard selection."""
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni", batch=2)
    policy = policy_of(preset)
    noting, scores = KeptByChunk(FullGradient()), ScoresByChunk(inner=policy.scorer)
    with attach(model) as attached:
        softness, noted = Softness(temperature=temperature), replace(policy, scorer=scores)
        loss = streamed_loss_of(attached, episode, noted, noting, softness)
        got = gradient(loss, model)
        power = 0.5 if preset == "released" else 1.0
        softened = Softened(policy=policy, scores=scores.seen, temperature=temperature, novelty_power=power)
        step = OneShot(episode, noting.kept, softened)
        expected = gradient(one_shot_loss(attached, head_of(model), episode, step), model)
        hard = streamed_loss_of(attached, episode, policy, FullGradient())
        assert_same_gradient(got, expected, 1e-9)
        torch.testing.assert_close(loss, hard, rtol=1e-12, atol=0)
        still = Softness(temperature=temperature, gradient="none")
        none = gradient(streamed_loss_of(attached, episode, policy, FullGradient(), still), model)
        of_hard = gradient(hard, model)
        assert_same_gradient(none, of_hard, 1e-12)
        assert float((got - of_hard).norm() / got.norm()) > 1e-3  # the scores do receive gradient
    assert any(not torch.equal(*tokens) for tokens in noting.kept[-1])  # each stream keeps its own


@pytest.mark.slow
@pytest.mark.parametrize("softness", [None, Softness(temperature=0.3)], ids=["hard", "softened"])
@pytest.mark.parametrize("by_layer", [False, True], ids=["", "by_layer"])
@pytest.mark.parametrize("carry", WAYS.values(), ids=WAYS)
def test_recomputed_gradient_equals_the_stored_one_bit_for_bit_with_dropout(carry, by_layer, softness) -> None:
    model, episode = adapted("qwen2_5_omni", torch.float32, dropout=0.3), episode_of("qwen2_5_omni", torch.float32)
    found = []
    for way, layers in ((carry, by_layer), (DirectStep(), False)):
        with attach(model, recompute_layers=layers) as attached:
            torch.manual_seed(5)
            loss = streamed_loss_of(attached, episode, policy_of("omnimem"), way, softness)
            torch.manual_seed(6)  # what happens to the generator before backward does not matter
            found.append((loss.detach(), gradient(loss, model)))
            torch.manual_seed(7)
            other = streamed_loss_of(attached, episode, policy_of("omnimem"), way, softness)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], other)  # dropout was active


@pytest.mark.parametrize(("by_layer", "offload"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("gradient", ["hard", "none", "redundancy", "both"])
def test_a_recomputed_chunk_measures_what_has_no_gradient_once(gradient, by_layer, offload, monkeypatch) -> None:
    """Attention mass and nearest tokens; mass that learns is measured again, as its graph is needed.

    With offload all is, as nothing but the last chunk may stay on the device.
    """
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni")
    softness = None if gradient == "hard" else Softness(temperature=0.3, gradient=gradient)
    calls: Counter[str] = Counter()

    def counting(module: ModuleType, name: str) -> None:
        plain = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    counting(blocked, "mass")
    found_by = {"hard": "uncovered_contested", "none": "uncovered_values"}
    counting(covered, found_by.get(gradient, "nearest_before"))
    with attach(model, recompute_layers=by_layer) as attached:
        loss = streamed_loss_of(attached, episode, policy_of("omnimem"), FullGradient(offload=offload), softness)
        read = calls.copy()
        loss.backward()
    assert len(read) == 2
    assert min(read.values()) >= attached.shape.layers
    learns = {"mass"} if gradient == "both" else set()
    assert {name for name in calls if calls[name] > read[name]} == (set(calls) if offload else learns)


@pytest.mark.parametrize("gradient_of", ["hard", "none", "redundancy"])
def test_a_score_with_two_coverages_finds_the_results_of_each_again(gradient_of) -> None:
    model, episode = adapted("qwen2_5_omni", torch.float32), episode_of("qwen2_5_omni", torch.float32)
    softness = None if gradient_of == "hard" else Softness(temperature=0.3, gradient=gradient_of)
    policy = policy_of("omnimem")
    assert isinstance(policy.scorer, covered.Covered)
    outer = replace(policy.scorer, inner=policy.scorer, compared="values", above=0.0)
    with attach(model) as attached:
        again, kept = (
            gradient(streamed_loss_of(attached, episode, replace(policy, scorer=outer), way, softness), model)
            for way in (FullGradient(), FullGradient(recompute=False))
        )
    assert torch.equal(again, kept)


def test_gradient_passes_through_positions_that_move_up() -> None:
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni")
    found = []
    for way, last in ((FullGradient(), 40), (DirectStep(), 40), (DirectStep(), 1000)):
        with attach(model) as attached:
            loss = streamed_loss_of(
                attached, episode, policy_of("omnimem"), way, Softness(temperature=0.3), last_position=last
            )
            found.append(gradient(loss, model))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[1], found[2], rtol=1e-3)  # they did move


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves outside of recomputed chunks, every storage once, weights left out."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.storages: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()} if model is not None else set()

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor  # which keeps the storage alive, so that no address comes twice

        super().__init__(pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


def long_episode(count: int) -> Episode:
    """So many chunks of 24 tokens of their own storages, of which the first alone holds text; questions after each."""
    generator = torch.Generator().manual_seed(4)
    chunks = []
    for number in range(count):
        kinds = torch.tensor([0] * 4 + [2, 2, 2, 1] * 5 if number == 0 else [2, 2, 2, 1] * 6, dtype=torch.int8)
        places = torch.arange(24 * number, 24 * number + 24).expand(1, 3, 24).contiguous()
        embeddings = torch.randn(1, 24, 64, generator=generator)
        chunks.append(Chunk(embeddings=embeddings, positions=places, modality=kinds[None]))
    return Episode(chunks=chunks, asked=[(number, labelled_prompt(number)) for number in range(1, count + 1)])


SLOTS = ((4, 8), (2, 20), (6, 6), (1, 10))


def saved_after(attached: StreamedAttention, count: int, carry: MemoryStep) -> tuple[int, int]:
    """(bytes saved when the loss is known, bytes of one memory after an eviction)."""
    episode, policy = long_episode(count), policy_of("omnimem", SLOTS)
    stream = Stream(attached, policy, carry=carry)
    for chunk in episode.chunks[:2]:
        stream.feed(chunk)
    saved = Saved(attached.text_model)
    with saved:
        loss = streamed_loss_of(attached, episode, policy, carry, softness=Softness(temperature=0.5))
    assert loss.requires_grad
    return saved.bytes, stream.memory.bytes


@pytest.mark.slow
def test_saved_activations_grow_with_the_number_of_chunks_by_the_memories_alone() -> None:
    with attach(adapted("qwen2_5_omni", torch.float32)) as attached:
        full = {count: saved_after(attached, count, FullGradient()) for count in (4, 8, 16)}
        stored = {count: saved_after(attached, count, DirectStep()) for count in (4, 8, 16)}
    memory = full[4][1]
    # keys and values; feature; positions, order and group; importance, novelty and gate; modality
    entry = 2 * 2 * 16 * 4 + 64 * 4 + 5 * 4 + 3 * 4 + 1
    assert memory == sum(audio + visual + 4 for audio, visual in SLOTS) * entry
    embeddings = 24 * 64 * 4
    for few, many in ((4, 8), (8, 16)):
        grown = full[many][0] - full[few][0]
        assert grown == (many - few) * (memory + embeddings)
        assert stored[many][0] - stored[few][0] > 10 * grown


def test_offloading_moves_the_memories_and_nothing_else(monkeypatch) -> None:
    """Every tensor of every memory and the chunk's embeddings go to the host: none escapes in a container."""
    moved = Saved()  # every storage once: a question after a chunk and the next chunk share their memory
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda pin_memory: moved)
    episode, policy = long_episode(6), policy_of("omnimem", SLOTS)
    noting = KeptByChunk(FullGradient(offload=True))
    with attach(adapted("qwen2_5_omni", torch.float32)) as attached:
        stream = Stream(attached, policy, carry=FullGradient())
        for chunk in episode.chunks:
            stream.feed(chunk)
        streamed_loss_of(attached, episode, policy, noting, softness=Softness(temperature=0.5))
    assert len(noting.bytes) == 6
    assert moved.bytes == sum(noting.bytes) + stream.memory.bytes


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize(
    "room", [LayerSlots(audio=2, visual=5), LayerSlots(audio=0, visual=7, split=False)], ids=["split", "shared"]
)
def test_straight_through_is_hard_in_value_and_the_sigmoid_in_slope(room, temperature) -> None:
    """Through attention, in float64: autograd, the formula and differences of the soft surrogate agree."""
    generator = torch.Generator().manual_seed(11)
    modality = torch.tensor([[0, 2, 2, 1, 2, 1, 2, 2, 1, 2, 2, 1, 2]], dtype=torch.int8)
    count = modality.shape[1]
    scores = torch.rand(1, count, dtype=torch.float64, generator=generator).requires_grad_()
    queries, keys, values = torch.randn(3, 1, 2, count, 8, dtype=torch.float64, generator=generator)
    weights = torch.randn(1, 2, count, 8, dtype=torch.float64, generator=generator)

    def loss_of(index: Tensor, gate: Tensor) -> Tensor:
        wanted = index[:, None, :, None].expand(-1, 2, -1, 8)
        return (attend(queries[:, :, -1:], keys.gather(2, wanted), values.gather(2, wanted), scale=0.3, gate=gate)
                * weights[:, :, -1:]).sum()  # fmt: skip

    hard, soft = select(scores, modality, room), select(scores, modality, room, Softness(temperature=temperature))
    assert soft.gate is not None
    assert torch.equal(soft.index, hard.index)
    assert not soft.gate.any()
    loss = loss_of(soft.index, soft.gate)
    assert torch.equal(loss, loss_of(hard.index, torch.zeros_like(soft.gate)))
    (got,) = torch.autograd.grad(loss, scores)

    fixed = scores.detach()[0]
    stays = torch.zeros(count, dtype=torch.bool).index_fill(0, soft.index[0], True)
    groups = [(modality[0] == kind) for kind in (1, 2)] if room.split else [modality[0] != 0]

    def sigmoid(score: Tensor) -> Tensor:
        """g of every token, with threshold and deviation as they are at the true scores; 0 where nothing competes."""
        found = torch.zeros_like(score)
        for member in groups:
            tau = (fixed[member & stays].min() + fixed[member & ~stays].max()) / 2
            found[member] = torch.sigmoid((score[member] - tau) / fixed[member].std(unbiased=False) / temperature)
        return found

    def surrogate(score: Tensor) -> Tensor:
        return loss_of(soft.index, torch.log(1 + sigmoid(score) - sigmoid(fixed))[soft.index])

    step = 1e-6
    unit = torch.eye(count, dtype=torch.float64) * step
    differences = torch.stack([(surrogate(fixed + e) - surrogate(fixed - e)) / (2 * step) for e in unit])
    torch.testing.assert_close(got[0], differences, rtol=1e-6, atol=1e-9)

    gate = soft.gate.detach().requires_grad_()
    (of_gate,) = torch.autograd.grad(loss_of(soft.index, gate), gate)
    g = sigmoid(fixed)
    slope = torch.zeros(count, dtype=torch.float64)
    for member in groups:
        slope[member] = (g * (1 - g))[member] / fixed[member].std(unbiased=False) / temperature
    analytic = torch.zeros(count, dtype=torch.float64).index_copy(0, soft.index[0], of_gate[0]) * slope
    torch.testing.assert_close(got[0], analytic, rtol=1e-12, atol=0)
    competing = stays & (modality[0] != 0)
    assert bool((got[0][competing] != 0).all())
    assert not got[0][~competing].any()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Qwen25Omni:
    """A random thinker in float64 whose text model has a trained-looking adapter."""
    folder = write_folder(tmp_path_factory.mktemp("thinker"), rates="tiny")
    loaded = Qwen25Omni.load(ModelOptions(path=str(folder)))
    options = LoraOptions(r=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj", "up_proj"))
    adapted = add_adapter(loaded.model, options)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    loaded.model.double()
    return loaded


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_the_trainers_loss_and_gradient_equal_one_shot(backbone, temperature) -> None:
    """Questions at 7 s, twice at 9 s and at the end; two streams with answers of unequal length."""
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=12))
    times = (7.0, 9.0, 9.0, None)
    batch = [opened(1, times, ["red", "blue", "green", "red"]), opened(2, times, ["dark red", "red", "blue", "a b c"])]
    policy, learning = policy_at(6), trainable(backbone.model)
    noting, scores = KeptByChunk(FullGradient()), ScoresByChunk(inner=policy.scorer)
    softness = None if temperature is None else Softness(temperature=temperature)
    with attach(backbone.text_model) as attached:
        noted = replace(policy, scorer=scores)
        outcome = streamed_loss(attached, feeder, batch, noted, softness=softness, carry=noting)
        got = gradient(outcome.loss, backbone.model)
        episode = episode_from(attached, feeder, batch)
        softened = temperature and Softened(policy=policy, scores=scores.seen, temperature=temperature)
        plain = one_shot_loss(attached, backbone.head, episode, OneShot(episode, noting.kept, softened))
        expected = gradient(plain, backbone.model)
    assert len(episode.chunks) == 6  # opening, 4, 2, 2, 4, 4 s: cut where questions are asked
    assert [seen for seen, _ in episode.asked] == [3, 4, 6]
    assert len(learning) == 12
    torch.testing.assert_close(outcome.loss, plain.float(), rtol=1e-6, atol=0)  # the loss is float32 by design
    assert_same_gradient(got, expected, 1e-6)


def test_a_step_with_full_memory_is_ordinary_fine_tuning(backbone) -> None:
    """Loss and gradient of transformers' own forward pass over the whole prompt, with its own attention."""
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=12))
    batch = [opened(1, [None], ["dark red"])]
    with attach(backbone.text_model) as attached:
        outcome = streamed_loss(attached, feeder, batch, policy_at(None), softness=None, carry=FullGradient())
        got = gradient(outcome.loss, backbone.model)
        episode = episode_from(attached, feeder, batch)
        embeddings = episode.embeddings(attached)
    hidden = backbone.text_model(
        inputs_embeds=embeddings, position_ids=episode.positions.transpose(0, 1), use_cache=False
    ).last_hidden_state
    labels = episode.asked[0][1].labels
    plain = mean_answer_loss(backbone.head(hidden[:, -labels.shape[1] :]), labels)
    torch.testing.assert_close(outcome.loss, plain.float(), rtol=1e-6, atol=0)
    assert_same_gradient(got, gradient(plain, backbone.model), 1e-6)


def test_a_stream_without_an_answer_to_learn_is_refused(backbone) -> None:
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=12))
    silent = opened(2, [None], ["red"])
    question, answer = silent.sample.messages
    silent = replace(silent, sample=replace(silent.sample, messages=(question, replace(answer, loss=False))))
    batch = [opened(1, [None], ["red"]), silent]
    with attach(backbone.text_model) as attached, pytest.raises(ValueError, match=r"^2: no answer to train on"):
        streamed_loss(attached, feeder, batch, policy_at(6), softness=None, carry=FullGradient())


@pytest.mark.parametrize("offload", [False, True])
def test_full_memory_holds_every_chunk_once_with_the_same_gradient(family, offload) -> None:
    """Blocks in place of memories that grow: equal to the bit, and no memory of an earlier chunk stays in the graph."""
    model, episode = adapted(family, torch.float64), episode_of(family, torch.float64)
    policy = policy_of("omnimem").with_budget(None)
    with attach(model) as attached:
        plain = streamed_loss_of(attached, episode, policy, FullGradient(recompute=False))
        expected = gradient(plain, model)
        loss = streamed_loss_of(attached, episode, policy, FullGradient(offload=offload))
        assert torch.equal(loss, plain)
        assert_same_gradient(gradient(loss, model), expected, 1e-12)
        earlier: list[weakref.ref[Tensor]] = []
        stream = Stream(attached, policy, carry=FullGradient())
        for chunk in episode.chunks:
            stream.feed(chunk)
            earlier.append(weakref.ref(stream.memory.layers[0].keys))
        gc.collect()
        assert [reference() is not None for reference in earlier] == [False] * (len(earlier) - 1) + [True]


def test_a_step_leaves_nothing_behind(backbone, monkeypatch) -> None:
    """A step that waits in the graph and holds what the graph produced is never freed: 60 MB a step were once lost."""
    made: list[weakref.ref[Memory]] = []
    feeder, start = Feeder(backbone, StreamOptions(chunk_tokens=12)), Feeder.stream
    streams: list[Stream] = []

    def noted(*args: object, **kwargs: object) -> Stream:
        streams.append(start(*args, **kwargs))  # pyright: ignore[reportArgumentType]
        return streams[-1]

    monkeypatch.setattr(Feeder, "stream", noted)
    with attach(backbone.text_model) as attached:
        batch, carry = [opened(1, (None,), ["red"])], FullGradient()
        outcome = streamed_loss(attached, feeder, batch, policy_at(6), softness=Softness(temperature=0.3), carry=carry)
        made.append(weakref.ref(streams[0].memory))
        outcome.loss.backward()
        del outcome
        streams.clear()
        gc.collect()
    assert made[0]() is None
