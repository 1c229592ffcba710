"""`selection_from: base`: a tuned stream keeps what the untuned model keeps, and learns as with those sets given."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from support.episodes import KeptByChunk, OneShot, one_shot_loss
from support.gradients import WAYS, adapted, assert_same_gradient, episode_of, gradient, head_of, streamed_loss_of
from support.models import assert_equal_logits, row_of, text_model
from support.policy_streams import OPTIONS, SPLIT, cut, opened, whole_stream
from support.streams import LENGTHS, policy_of
from torch import Tensor
from transformers import PreTrainedModel

from omnimem.policies import PolicyOptions
from omnimem.policies.base import Policy, PolicyError, StreamOutline, Traits
from omnimem.policies.baselines.hermes import HermesOptions
from omnimem.policies.baselines.streammem import StreamMemOptions
from omnimem.selection import Softness
from omnimem.streaming.adapter import adapter_layers, without_adapter
from omnimem.streaming.attach import attach
from omnimem.streaming.chunk_pass import DirectStep
from omnimem.streaming.prompt_pass import Prompt
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk, Tokens
from omnimem.tuning import FullGradient, HorizonGradient, StatesGradient
from omnimem.view import LayerView

TRIED: dict[str, PolicyOptions] = {
    **OPTIONS,
    "streammem_filtered": StreamMemOptions(prototypes=False),
    "hermes_unmerged": HermesOptions(summary=False),
    "hermes_unmerged_reindexed": HermesOptions(summary=False, reindex=True),
}
MERGING = sorted(name for name, options in TRIED.items() if options.build(SPLIT).traits.merges)
NAMES = sorted(TRIED.keys() - MERGING)
CONTENT_BLIND = ("random", "recency", "uniform", "recursive", "input", "recent", "streaming", "oracle")
Sets = list[list[list[list[int]]]]  # [layer][stream][head] arrival numbers


def policy_from(name: str, selection_from: Any = "base", batch: int = 1) -> Policy:
    """The policy at SPLIT, which knows the stream where it asks for that."""
    whole = whole_stream(batch)
    policy = (
        TRIED[name]
        .build(SPLIT)
        .with_oracle([StreamOutline(modality=whole.modality[0], place=whole.places[0], needles=(40, 12, 70))] * batch)
    )
    return replace(policy, selection_from=selection_from)


def tuned_model(scale: float = 1.0) -> PreTrainedModel:
    model = adapted("qwen2_5_omni", torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(scale)
    return model


def numbers(layer: Tokens) -> list[list[list[int]]]:
    """[stream][head] arrival numbers that a layer keeps."""
    owner = layer.owner[:, 0] if layer.owner.shape[1] else torch.zeros_like(layer.modality)
    rows = zip(layer.order.tolist(), layer.modality.tolist(), owner.tolist(), strict=True)
    return [
        [[k for k, kind, head in zip(*row, strict=True) if kind >= 0 and head == h] for h in range(layer.heads)]
        for row in rows
    ]


def sets(stream: Stream) -> Sets:
    return [numbers(layer) for layer in stream.memory.layers]


@torch.no_grad()
def recorded(model: PreTrainedModel, policy: Policy, chunks: Sequence[Chunk], **settings: Any) -> list[Sets]:
    """What a model keeps after every chunk."""
    with attach(model) as attached:
        stream, found = opened(attached, policy, len(chunks[0].modality), **settings), []
        for chunk in chunks:
            stream.feed(chunk)
            found.append(sets(stream))
    return found


def prompt_of(batch: int = 1) -> Prompt:
    ids, segments = (torch.tensor([row]).expand(batch, -1) for row in ([5, 6, 7, 8, 9], [0, 0, 0, 1, 1]))
    return Prompt(ids=ids, segments=segments, offsets=torch.tensor([[0, 1, 2, 0, 1]]).expand(batch, -1))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Noted(Policy):
    """Reference: keeps the given arrival numbers of every row, by plain loops; rows are streams or their heads."""

    sets: list[Sets]  # after each chunk
    like: Traits
    chunk: list[int]  # the number of the chunk that is read

    @property
    def traits(self) -> Traits:
        return self.like

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        rows = [head for stream in self.sets[self.chunk[0]][layer] for head in stream]
        if len(rows) < len(view.order):  # the first chunk of heads that keep their own
            rows = [row for row in rows for _ in range(len(view.order) // len(rows))]
        most = max(map(len, rows))
        index = torch.zeros(len(rows), most, dtype=torch.long)
        present = torch.zeros(len(rows), most, dtype=torch.bool)
        for number, wanted in enumerate(rows):
            there = {
                int(order): place
                for place, (order, kind) in enumerate(zip(view.order[number], view.modality[number], strict=True))
                if int(kind) >= 0
            }
            index[number, : len(wanted)] = torch.tensor([there[order] for order in wanted], dtype=torch.long)
            present[number, : len(wanted)] = True
        kept = view.pool.gather(index)
        return kept if bool(present.all()) else kept.masked(present)


def noted(policy: Policy, found: list[Sets]) -> Policy:
    like = Traits(per_head=policy.traits.per_head, ragged=policy.traits.ragged, reindex=policy.traits.reindex)
    return Noted(name="noted", budget=policy.budget, sets=found, like=like, chunk=[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_keeps_what_the_untuned_model_keeps_and_answers_as_with_those_sets_given(name) -> None:
    chunks, base = cut(whole_stream()), text_model("qwen2_5_omni")
    expected = recorded(base, policy_from(name, "tuned"), chunks)
    changed = []
    for scale in (0.3, 1.0):
        model = tuned_model(scale)
        with attach(model) as attached, torch.no_grad():
            stream = opened(attached, policy_from(name))
            for chunk, kept in zip(chunks, expected, strict=True):
                stream.feed(chunk)
                assert sets(stream) == kept
                assert stream.memory.entries <= SPLIT.total
            policy = policy_from(name)
            reference = noted(policy, expected)
            given = Stream(attached, reference)
            object.__setattr__(reference, "prefilter", policy.prefilter)
            for number, chunk in enumerate(chunks):
                reference.chunk[0] = number
                given.feed(chunk)
            torch.testing.assert_close(
                stream.ask(prompt_of()).hidden, given.ask(prompt_of()).hidden, rtol=0, atol=1e-5
            )  # of one pass or two
        changed.append(recorded(model, policy_from(name, "tuned"), chunks) != expected)
    assert name.startswith(CONTENT_BLIND) or any(changed)  # the tuned model by itself would keep others


@pytest.mark.parametrize("name", NAMES)
def test_with_an_adapter_of_zeros_both_settings_agree_to_the_bit(name) -> None:
    chunks = cut(whole_stream())
    with attach(tuned_model(0.0)) as attached, torch.no_grad():
        streams = [opened(attached, policy_from(name, where)) for where in ("tuned", "base")]
        assert [stream.selector is None for stream in streams] == [True, False]
        for chunk in chunks:
            for stream in streams:
                stream.feed(chunk)
            assert sets(streams[0]) == sets(streams[1])
        tuned, base = (stream.ask(prompt_of()) for stream in streams)
        traits = streams[0].policy.traits
        if any(probe.full_pass for probe in traits.probes):  # read with the chunk in one pass: rounding of other shapes
            assert_equal_logits(base.hidden, tuned.hidden)
            return
        assert torch.equal(tuned.hidden, base.hidden)
        if not traits.ragged:
            for mine, theirs in zip(*(stream.memory.layers for stream in streams), strict=True):
                for field in ("keys", "values", "positions", "modality", "order", "owner"):
                    assert torch.equal(getattr(mine, field), getattr(theirs, field))


@pytest.mark.parametrize("name", MERGING)
def test_policies_that_merge_tokens_are_refused_by_name(name) -> None:
    with attach(tuned_model()) as attached, pytest.raises(PolicyError, match=TRIED[name].name):
        opened(attached, policy_from(name))


@pytest.mark.parametrize("name", ["omnimem", "h2o", "lava", "streammem_filtered"])
def test_streams_of_a_batch_keep_what_they_keep_alone(name) -> None:
    whole = whole_stream(batch=2)
    chunks, policy = cut(whole), policy_from(name, batch=2)
    together = recorded(tuned_model(), policy, chunks)[-1]
    assert together == recorded(text_model("qwen2_5_omni"), replace(policy, selection_from="tuned"), chunks)[-1]
    for row in range(2):
        alone = recorded(tuned_model(), policy, [row_of(chunk, row) for chunk in chunks])[-1]
        assert [layer[0] for layer in alone] == [layer[row] for layer in together]


@pytest.mark.parametrize(
    ("name", "last"),
    [("omnimem", 24), ("streaming_llm", 40), ("infinipot_v_reindexed", 40), ("hermes_unmerged_reindexed", 40)],
)
def test_positions_move_up_as_in_the_untuned_model(name, last) -> None:
    chunks, found = cut(whole_stream()), []
    for model, where in ((text_model("qwen2_5_omni"), "tuned"), (tuned_model(), "base")):
        with attach(model) as attached, torch.no_grad():
            stream = opened(attached, policy_from(name, where), last_position=last)
            for chunk in chunks:
                stream.feed(chunk)
            found.append((stream.moved, sets(stream), [layer.positions.tolist() for layer in stream.memory.layers]))
    assert found[0] == found[1]
    assert found[0][0] != 0


def test_forks_are_independent_and_questions_change_nothing() -> None:
    chunks = cut(whole_stream())
    expected = recorded(text_model("qwen2_5_omni"), policy_from("omnimem", "tuned"), chunks)
    with attach(tuned_model()) as attached, torch.no_grad():
        stream = opened(attached, policy_from("omnimem"))
        for number, chunk in enumerate(chunks):
            twin = stream.fork()
            for later in reversed(chunks[number:]):
                twin.feed(later)
            stream.ask(prompt_of())
            stream.feed(chunk)
            assert sets(stream) == expected[number]


def test_the_memory_of_the_selector_counts_and_the_answering_one_carries_no_features() -> None:
    chunks, found = cut(whole_stream()), {}
    with attach(tuned_model()) as attached, torch.no_grad():
        for where in ("tuned", "base"):
            stream = opened(attached, policy_from("omnimem", where))
            for chunk in chunks:
                stream.feed(chunk)
            found[where] = stream
    tuned, base = found["tuned"].usage, found["base"].usage
    assert (tuned.selector_entries, tuned.selector_bytes) == (0, 0)
    assert base.selector_entries == base.kept_entries == tuned.kept_entries == SPLIT.total
    assert base.peak_entries == tuned.peak_entries
    features = sum(layer.feature.numel() * 4 for layer in found["tuned"].memory.layers)
    assert features > 0
    assert base.selector_bytes == tuned.bytes
    assert base.bytes == 2 * tuned.bytes - features


def test_without_an_adapter_or_a_budget_there_is_no_second_pass() -> None:
    policy, model = policy_from("omnimem"), tuned_model()
    with attach(text_model("qwen2_5_omni")) as attached:
        assert opened(attached, policy).selector is None
    with attach(model) as attached:
        assert opened(attached, policy).selector is not None
        assert opened(attached, policy.with_budget(None)).selector is None
        with without_adapter(model):
            assert opened(attached, policy).selector is None


def test_the_adapter_is_off_inside_the_block_alone_and_what_learns_is_what_learned_before() -> None:
    model = adapted("qwen2_5_omni", dropout=0.5)
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    state, layers = torch.get_rng_state(), len(adapter_layers(model))
    with without_adapter(model):
        assert not adapter_layers(model)
        model(inputs_embeds=torch.zeros(1, 3, 64, dtype=torch.float64))
    assert torch.equal(state, torch.get_rng_state())  # no dropout
    assert len(adapter_layers(model)) == layers > 0
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_an_adapter_that_is_merged_or_switched_on_later_is_refused() -> None:
    model, chunk = tuned_model(), cut(whole_stream())[0]
    with attach(model) as attached:
        with without_adapter(model):
            early = opened(attached, policy_from("omnimem"))
            early.feed(chunk)  # both settings are the same here
        with pytest.raises(ValueError, match="switched on after the stream was opened"):
            early.feed(chunk)
        adapter_layers(model)[0].merge()
        with pytest.raises(ValueError, match="merged into the weights"):
            opened(attached, policy_from("omnimem"))
        opened(attached, policy_from("omnimem", "tuned")).feed(chunk)


def test_softened_selection_is_refused_with_the_cure() -> None:
    with attach(tuned_model()) as attached, pytest.raises(ValueError, match="softening to hard"):
        opened(attached, policy_from("omnimem"), softness=Softness(temperature=0.5))


# --- gradient


def base_policy(name: str = "omnimem") -> Policy:
    return replace(policy_of(name), selection_from="base")


@pytest.mark.parametrize("name", ["omnimem", "distinct", "paper"])
def test_gradient_equals_one_shot_with_the_sets_of_the_untuned_model(family, name) -> None:
    model, episode, noting = adapted(family), episode_of(family), KeptByChunk(FullGradient())
    untuned = KeptByChunk(DirectStep())
    with attach(model) as attached:
        loss = streamed_loss_of(attached, episode, base_policy(name), noting)
        got = gradient(loss, model)
        with torch.no_grad(), without_adapter(model):
            streamed_loss_of(attached, episode, policy_of(name), untuned)
        expected = gradient(one_shot_loss(attached, head_of(model), episode, OneShot(episode, untuned.kept)), model)
        own = gradient(streamed_loss_of(attached, episode, policy_of(name), FullGradient()), model)
    assert len(noting.kept[-1]) == 4
    assert max(tokens.shape[1] for tokens in noting.kept[-1]) < sum(LENGTHS)
    assert all(torch.equal(*pair) for pair in zip(noting.kept[-1], untuned.kept[-1], strict=True))
    assert_same_gradient(got, expected, 1e-12)
    assert float((got - own).norm() / own.norm()) > 1e-3  # its own selection would give another one


@pytest.mark.parametrize("by_layer", [False, True], ids=["", "by_layer"])
@pytest.mark.parametrize("carry", WAYS.values(), ids=WAYS)
def test_recomputed_gradient_equals_the_stored_one_bit_for_bit_with_dropout(carry, by_layer) -> None:
    model, episode = adapted("qwen2_5_omni", torch.float32, dropout=0.3), episode_of("qwen2_5_omni", torch.float32)
    found: list[tuple[Tensor, Tensor]] = []
    for way, layers in ((carry, by_layer), (DirectStep(), False)):
        with attach(model, recompute_layers=layers) as attached:
            torch.manual_seed(5)
            loss = streamed_loss_of(attached, episode, base_policy(), way)
            torch.manual_seed(6)
            found.append((loss.detach(), gradient(loss, model)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("carry", [HorizonGradient(chunks=2), StatesGradient()], ids=["horizon", "states"])
def test_other_gradient_modes_learn_as_with_those_sets_given(carry) -> None:
    """The reference streams the sets that the untuned model kept, noted before, under the same gradient mode."""
    model, episode = adapted("qwen2_5_omni"), episode_of("qwen2_5_omni")
    with attach(model) as attached:
        got = gradient(streamed_loss_of(attached, episode, base_policy(), carry), model)
        with without_adapter(model):
            untuned = recorded(model, policy_of("omnimem"), episode.chunks)
        given = noted(policy_of("omnimem"), untuned)
        expected = gradient(streamed_loss_of(attached, episode, given, _Counted(carry, given)), model)
    assert torch.equal(got, expected)


class _Counted:
    """A gradient mode that tells the reference which chunk is read, also when one is read again."""

    def __init__(self, inner: Any, policy: Any) -> None:
        self.inner, self.policy, self.read_so_far = inner, policy, 0

    def __call__(self, step: Any, memory: Any, embeddings: Tensor) -> tuple[Any, "_Counted"]:
        number = self.read_so_far
        fixed = replace(step.config, policy=replace(self.policy, chunk=[number]))
        after, self.inner = self.inner(replace(step, config=fixed), memory, embeddings)
        self.read_so_far += 1
        return after, self

    def read(self, loss: Any, memory: Any) -> Tensor:
        return self.inner.read(loss, memory)
