"""Configurations loaded from text, and the problems that loading reports."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from omnimem.config import ConfigError, RunConfig, load
from omnimem.training.arguments import train_section

TRAIN = train_section()
SMALL = """\
name: small
model: {path: Qwen/Qwen2.5-Omni-7B}
memory:
  policy: {name: recency}
  slots_per_layer: 64
  budget: {name: shared}
train: {learning_rate: 1e-5}
"""


def problems(tmp_path: Path, text: str = SMALL, overrides: Sequence[str] = ()) -> list[str]:
    """The lines that `load` complains with, the path of the file cut off."""
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file, overrides, train=TRAIN)
    return [line.replace(f"{file}", "my.yaml") for line in error.value.problems]


def loaded(tmp_path: Path, *overrides: str, text: str = SMALL) -> RunConfig:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    return load(file, overrides, train=TRAIN)


def written_out(run: RunConfig) -> RunConfig:
    """The run with the values of its policy's preset written out."""
    return replace(run, memory=run.memory.written_out())
