"""The drift of selection: its definition by plain loops, when it is measured, and what it leaves alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.gradients import opened, policy_at
from support.thinkers import write_folder
from torch import nn

from omnimem.backbones import ModelOptions
from omnimem.backbones.qwen2_5_omni import Qwen25Omni
from omnimem.data import Sample
from omnimem.media import MediaError
from omnimem.memory import in_common
from omnimem.policies.base import Policy, ScoredPolicy
from omnimem.streaming.attach import attach
from omnimem.streaming.feeder import EncodedSample, Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.tuning import LoraOptions, SelectionOverlap, StreamedModel, add_adapter
from omnimem.tuning.overlap import is_due

LORA = LoraOptions(r=4, alpha=8.0, dropout=0.5, targets=("q_proj", "k_proj", "v_proj", "up_proj"))


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Qwen25Omni, StreamedModel]:
    backbone = Qwen25Omni.load(ModelOptions(path=str(write_folder(tmp_path, rates="tiny"))))
    model = add_adapter(backbone.model, LORA)
    backbone.model.double()
    return backbone, model


def trained(model: StreamedModel) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)


def readable(feeder: Feeder, *encoded: EncodedSample) -> Feeder:
    """The feeder with encoded samples in place of files; others cannot be read."""
    known = {each.sample.id: each for each in encoded}

    def find(sample: Sample) -> EncodedSample:
        if sample.id not in known:
            raise MediaError(Path("x.mp4"), "empty", "holds nothing")
        return known[sample.id]

    feeder.open = find  # pyright: ignore[reportAttributeAccessIssue]
    return feeder


def kept_orders(backbone: Qwen25Omni, policy: Policy, sample: EncodedSample) -> list[list[int]]:
    """Arrival numbers of the audio and visual tokens at the end, by layer."""
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=12))
    with attach(backbone.text_model) as attached, torch.no_grad():
        stream = feeder.stream(attached, policy)
        for chunk in feeder.chunks([sample]):
            stream.feed(chunk)
    return [
        [k for k, kind in zip(layer.order[0].tolist(), layer.modality[0].tolist(), strict=True) if kind > 0]
        for layer in stream.memory.layers
    ]


@pytest.mark.parametrize("selection_from", ["tuned", "base"])
def test_it_is_the_share_of_kept_tokens_that_the_untuned_model_keeps_too(adapted, selection_from) -> None:
    backbone, model = adapted
    sample = opened(1, [None], ["red"], seconds=32)
    feeder = readable(Feeder(backbone, StreamOptions(chunk_tokens=12)), sample)
    samples = [replace(sample.sample, id="unreadable"), sample.sample]
    policy = replace(policy_at(6), selection_from=selection_from)
    with attach(backbone.text_model) as attached:
        overlap = SelectionOverlap(attached, feeder, policy, samples, every=1)
        model.train()
        learning = [parameter.requires_grad for parameter in model.parameters()]
        state = torch.get_rng_state()
        model.eval()
        assert set(overlap().values()) == {1.0}  # B is 0
        trained(model)
        found = overlap()
    assert torch.equal(state, torch.get_rng_state())
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    tuned = kept_orders(backbone, policy_at(6), sample)
    with model.disable_adapter():
        base = kept_orders(backbone, policy_at(6), sample)
    shares = [sum(k in theirs for k in mine) / 6 for mine, theirs in zip(tuned, base, strict=True)]
    assert found == {
        "selection_overlap/mean": sum(shares) / 2,
        **{f"selection_overlap/layer_{layer}": share for layer, share in enumerate(shares)},
    }
    assert min(shares) < 1
    assert overlap.latest == shares


@pytest.mark.parametrize("per_head", [False, True])
def test_needles_are_counted_by_the_share_of_layers_that_hold_them(adapted, per_head) -> None:
    backbone, model = adapted
    trained(model)
    model.eval()
    sample = opened(1, [None], ["red"], seconds=32)
    named = {"needles": [[float(at)] if at % 3 else [float(at), 0.2, 0.7] for at in range(1, 32, 2)]}
    sample = replace(sample, sample=replace(sample.sample, meta=named))
    feeder, policy = readable(Feeder(backbone, StreamOptions(chunk_tokens=12)), sample), policy_at(24)
    assert isinstance(policy, ScoredPolicy)
    policy = replace(policy, per_head=per_head)
    with attach(backbone.text_model) as attached:
        found = SelectionOverlap(attached, feeder, policy, [sample.sample], every=1)()
    needles = feeder.outline(sample).needles
    assert len(set(needles)) == 16
    heads = 2 if per_head else 1  # a layer lists a token once for each head that holds it
    tuned = kept_orders(backbone, policy, sample)
    with model.disable_adapter():
        base = kept_orders(backbone, policy, sample)
    for name, kept in (("tuned", tuned), ("untuned", base)):
        count = sum(layer.count(needle) for layer in kept for needle in needles)
        assert found[f"needle_layers/{name}"] == pytest.approx(count / (2 * heads * 16))
    assert 0 < found["needle_layers/tuned"] < 1


def test_without_a_readable_sample_nothing_is_measured(adapted) -> None:
    backbone, _ = adapted
    feeder = readable(Feeder(backbone, StreamOptions(chunk_tokens=12)))
    sample = opened(1, [None], ["red"]).sample
    with attach(backbone.text_model) as attached:
        assert SelectionOverlap(attached, feeder, policy_at(6), [sample], every=1)() == {}


def test_layers_that_keep_unequal_numbers_are_compared_with_the_larger_and_empty_ones_agree() -> None:
    ours = (frozenset({(0, 1), (0, 2), (1, 2)}), frozenset(), frozenset())
    theirs = (frozenset({(0, 2), (1, 1), (1, 2), (1, 3)}), frozenset(), frozenset({(0, 5)}))
    assert in_common(ours, theirs) == [0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    ("every", "logs", "measured"),
    [
        (4, range(1, 11), [4, 8, 10]),
        (4, range(3, 13, 3), [6, 9, 12]),  # at the first log from each multiple on, and at the end
        (50, range(1, 11), [10]),
        (0, range(1, 11), []),
    ],
)
def test_it_is_due_at_the_first_log_from_each_multiple_on_and_at_the_end(every, logs, measured) -> None:
    pairs = zip(logs, [0, *logs], strict=False)
    assert [step for step, last in pairs if is_due(every, step, logs[-1], last)] == measured
