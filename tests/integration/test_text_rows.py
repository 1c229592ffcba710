"""Rows that are text alone train in every gradient mode, beside streams, and are no part of what is measured."""

import math
from pathlib import Path

import pytest
import torch
from support.thinkers import write_folder

from omnimem import Budget, Feeder, ModelOptions, StreamOptions, attach, load_backbone, policy
from omnimem.cli.data_report import inspect_sample
from omnimem.data import Message, Sample
from omnimem.rows import judge
from omnimem.selection import SelectionOptions
from omnimem.tuning import LoraOptions, TuningOptions, add_adapter, gradient_of, streamed_loss, trainable
from omnimem.tuning.losses import FullMemoryKL, LossOptions

ROW = Sample(
    id="text",
    video=None,
    audio=None,
    messages=(Message(role="user", content="what ?"), Message(role="assistant", content="that")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    write_folder(place, rates="tiny")
    return place


@pytest.mark.parametrize("gradient", ["full", "states", "released", "paper"])
@pytest.mark.parametrize("distilled", [False, True])
def test_a_row_of_text_has_a_loss_and_a_gradient_in_every_mode(gradient, distilled, folder) -> None:
    backbone = load_backbone(ModelOptions(path=str(folder)))
    model = add_adapter(backbone.model, LoraOptions(r=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj")))
    losses = LossOptions(full_memory_kl=FullMemoryKL()) if distilled else LossOptions()
    options = TuningOptions(gradient=gradient, selection=SelectionOptions(softening="hard"), loss=losses)
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=36))
    with attach(backbone.text_model) as attached:
        outcome = streamed_loss(
            attached,
            feeder,
            [feeder.unseen(ROW)],
            policy("omnimem", Budget.shared(attached.shape.layers, slots_per_layer=8)),
            softness=None,
            carry=gradient_of(options, attached.shape.layers),
            losses=options.loss.losses,
            model=model,
        )
        found = torch.autograd.grad(outcome.loss, trainable(model), allow_unused=True)
    assert math.isfinite(float(outcome.loss.detach()))
    assert sum(float(each.abs().sum()) for each in found if each is not None) > 0
    assert outcome.kept["audio"] == outcome.kept["visual"] == 0


def test_a_row_of_text_has_no_file_to_judge() -> None:
    assert (judge(ROW, "require_both").problems, inspect_sample(ROW).notes) == ((), ())
