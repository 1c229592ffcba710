"""Adapters: which modules the targets match."""

import re

import pytest

from omnimem.tuning import LoraOptions

PATTERN = LoraOptions(targets=("q_proj", "o_proj", "up_proj")).config().target_modules


@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "language_model.", "model.language_model.", "thinker.model.", "thinker.model.language_model."],
)
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_projections_of_the_text_model_match_at_any_depth(prefix, name) -> None:
    assert re.fullmatch(str(PATTERN), f"{prefix}layers.11.{name}")


@pytest.mark.parametrize(
    "name",
    [
        "audio_tower.layers.0.self_attn.q_proj",
        "model.audio_tower.layers.0.self_attn.q_proj",
        "encoder.layers.0.self_attn.q_proj",
        "audio_model.layers.0.self_attn.q_proj",
        "vision_model.encoder.layers.0.self_attn.q_proj",
        "model.visual.layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
        "layers.0.cross_attn.q_proj",
        "lm_head.q_proj",
    ],
)
def test_encoders_and_other_modules_do_not_match(name) -> None:
    assert not re.fullmatch(str(PATTERN), name)
