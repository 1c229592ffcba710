"""What would end a run after its data were read is found before."""

import pytest

from omnimem.backbones import ModelOptions
from omnimem.commands.finetune import check_model_and_trackers
from omnimem.config import RunConfig
from omnimem.errors import UserError
from omnimem.shipped import shipped


@pytest.mark.parametrize(
    ("model", "train", "what"),
    [
        ("/no/such", {}, "model.path: /no/such cannot be loaded"),
        ("@empty", {}, "cannot be loaded"),
        ("models/tiny", {"report_to": "wandb"}, "train.report_to: wandb is not installed"),
        ("models/tiny", {"report_to": ["tensorboard", "mlflow"]}, "train.report_to: mlflow is not installed"),
    ],
)
def test_a_missing_model_or_tracker_is_found_before_the_data(model, train, what, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("omnimem.training.arguments.installed", lambda name: False)
    path = str(tmp_path) if model == "@empty" else model
    with pytest.raises(UserError, match=what):
        check_model_and_trackers(RunConfig(name="a", model=ModelOptions(path=path), train=train))


def test_a_whole_run_passes() -> None:
    check_model_and_trackers(RunConfig(name="a", model=ModelOptions(path=shipped("models/tiny"))))
