"""Batching: an epoch that ends with an uneven step, on any number of ranks, accumulated or in a larger batch."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import omnimem.training.trainer
from omnimem.data import Sample
from omnimem.training.sampler import Batching, EpochSampler, Mixture, SampleDataset, collate, seed_of
from omnimem.training.trainer import StreamTrainer

SAMPLES = [Sample(id=str(number), video=Path(f"{number}.mp4"), audio=None, messages=()) for number in range(7)]
ALL = Mixture(samples=SAMPLES)
LOSS = {sample.id: 1.5 ** int(sample.id) for sample in SAMPLES}


def steps(ranks: int, micro_batch: int, accumulated: int) -> list[list[list[Sample]]]:
    """The samples of every micro-step of every rank, by step, over two epochs."""
    batching, found = Batching(samples=7, size=ranks * micro_batch * accumulated), []
    for epoch in range(2):
        indices = list(EpochSampler(ALL, batching, 3, lambda epoch=epoch: epoch, shuffled=True))
        batches = [indices[at : at + micro_batch] for at in range(0, len(indices), micro_batch)]
        micro_steps = [collate([SampleDataset(SAMPLES)[index] for index in batch])["samples"] for batch in batches]
        each = ranks * accumulated
        found += [micro_steps[at : at + each] for at in range(0, len(micro_steps), each)]
    return found


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "accumulated"), [(1, 4, 1), (4, 1, 1), (2, 1, 2), (2, 2, 1), (1, 3, 1)]
)
def test_every_sample_of_a_step_has_the_same_weight_even_in_a_partial_step(ranks, micro_batch, accumulated) -> None:
    batching = Batching(samples=7, size=ranks * micro_batch * accumulated)
    for step, micro_steps in enumerate(steps(ranks, micro_batch, accumulated)):
        weight = batching.sample_weight(step, micro_batch)
        means = [sum(LOSS[sample.id] for sample in samples) * weight for samples in micro_steps]
        taken = [LOSS[sample.id] for samples in micro_steps for sample in samples]
        assert len(taken) == batching.taken(step)
        assert sum(means) / len(means) == pytest.approx(sum(taken) / len(taken))


def test_an_uneven_last_step_is_padded_or_dropped_and_its_samples_weigh_more() -> None:
    batching = Batching(samples=7, size=4)
    assert (batching.steps, [batching.taken(step) for step in range(4)]) == (2, [4, 3, 4, 3])
    assert [batching.sample_weight(step, 2) for step in range(2)] == [1 / 2, pytest.approx(2 / 3)]
    assert list(EpochSampler(ALL, batching, 0, lambda: 0, shuffled=False)) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert SampleDataset(SAMPLES)[7] is None
    dropped = Batching(samples=7, size=4, drop_last=True)
    assert (dropped.steps, len(EpochSampler(ALL, dropped, 0, lambda: 0, shuffled=False))) == (1, 4)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return list(EpochSampler(ALL, Batching(samples=7, size=1), seed, lambda: epoch, shuffled=True))

    assert order(3, 0) == order(3, 0)
    assert len({tuple(order(seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4
    assert all(sorted(order(3, epoch)) == list(range(7)) for epoch in range(3))


def trainer_at(step: int) -> Any:
    """The parts of a trainer that the loss of a micro-step reads."""
    return SimpleNamespace(
        args=SimpleNamespace(seed=0, device="cpu", per_device_train_batch_size=2),
        state=SimpleNamespace(global_step=step),
        batching=Batching(samples=7, size=4),
        plan=SimpleNamespace(options=SimpleNamespace(loss=SimpleNamespace(losses=()))),
        policies=lambda slots: slots,
        metrics=SimpleNamespace(add=lambda step, outcome: None),
        **dict.fromkeys(("attached", "feeder", "backprop", "adapted")),
    )


@pytest.fixture
def passed(monkeypatch) -> list[dict[str, Any]]:
    """What the trainer passes to `streamed_loss`, with the seed at that moment."""
    calls: list[dict[str, Any]] = []

    def loss(_attached: Any, _feeder: Any, batch: Any, policy: Any, **settings: Any) -> Any:
        calls.append({"batch": batch, "policy": policy, "seed": torch.initial_seed(), **settings})
        return SimpleNamespace(loss=torch.tensor(3.0))

    monkeypatch.setattr(omnimem.training.trainer, "streamed_loss", loss)
    monkeypatch.setattr(omnimem.training.trainer, "batch_by_layout", lambda opened, size: [opened])
    monkeypatch.setattr(omnimem.training.trainer, "policy_in_training", lambda options, policy: policy)
    return calls


def test_the_trainer_weighs_the_samples_of_its_current_step(passed) -> None:
    """The second of two steps takes 3 samples on 4 positions; this rank's micro-batch of 2 has one of them."""
    encoded = [SimpleNamespace(sample=SAMPLES[0])]
    step: Any = SimpleNamespace(slots=8, softness=None, chunk_tokens=36)
    assert float(StreamTrainer._stream(trainer_at(1), cast(Any, encoded), step)) == pytest.approx(3 * 2 / 3)


def test_the_trainer_streams_with_budget_softness_and_chunks_of_its_step(passed) -> None:
    encoded = [SimpleNamespace(sample=SAMPLES[0])]
    for number, slots, softness, chunk in ((0, 8, None, 36), (1, None, "soft", 72), (1, 4, None, None)):
        step: Any = SimpleNamespace(slots=slots, softness=softness, chunk_tokens=chunk)
        StreamTrainer._stream(trainer_at(number), cast(Any, encoded), step)
        assert [passed[-1][key] for key in ("policy", "softness", "chunk_tokens")] == [slots, softness, chunk]
    seeds = [call["seed"] for call in passed]
    assert seeds[0] != seeds[1] == seeds[2]  # a draw depends on the step, and on nothing else of these


# ------------------------------------------------------------------------------------------------- sources with weights


def mixed(**weights: float) -> Mixture:
    """Seven samples of source a, five of b."""
    more = [replace(each, id=f"b{each.id}", source="b") for each in SAMPLES[:5]]
    return Mixture(samples=[*(replace(each, source="a") for each in SAMPLES), *more], weights=weights)


def epoch_of(mixture: Mixture, epoch: int, seed: int = 3) -> list[str]:
    """The ids of an epoch in order."""
    batching = Batching(samples=mixture.size, size=1)
    sampler = EpochSampler(mixture, batching, seed, lambda: epoch, shuffled=True)
    return [mixture.samples[index].id for index in sampler]


@pytest.mark.parametrize(("a", "b", "epochs"), [(1.0, 1.0, 1), (2.0, 0.4, 5), (0.5, 3.0, 7), (1.5, 0.2, 20)])
def test_every_sample_of_a_source_is_taken_as_often_as_its_weight_says(a, b, epochs) -> None:
    mixture = mixed(a=a, b=b)
    counts = Counter(id for epoch in range(epochs) for id in epoch_of(mixture, epoch))
    for source, count in (("a", 7), ("b", 5)):
        ids = [sample.id for sample in mixture.samples if sample.source == source]
        taken = [counts[id] for id in ids]
        assert sum(taken) == epochs * max(1, round(mixture.weights[source] * count))
        assert max(taken) - min(taken) <= 1


def test_a_mixture_without_weights_has_the_order_of_its_samples_alone() -> None:
    """So runs of one source are those of earlier versions to the bit."""
    expected = sorted(range(7), key=lambda index: seed_of(3, 1, SAMPLES[index].id))
    assert epoch_of(ALL, 1) == epoch_of(Mixture(samples=SAMPLES, weights={"": 1.0}), 1) == [str(n) for n in expected]


def test_an_epoch_depends_on_seed_epoch_and_ids_alone() -> None:
    mixture = mixed(a=0.5, b=2.0)
    turned = Mixture(samples=mixture.samples[::-1], weights=mixture.weights)
    assert epoch_of(mixture, 2) == epoch_of(turned, 2)
    assert len({tuple(epoch_of(mixture, epoch, seed)) for epoch in (0, 1) for seed in (3, 4)}) == 4
