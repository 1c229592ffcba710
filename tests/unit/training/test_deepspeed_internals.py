"""DeepSpeed's private attributes, on a fake of its objects: what is read, and the error when it is not there."""

import tomllib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.paths import ROOT

from omnimem.run import RunError
from omnimem.training import deepspeed_internals as internals


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "_installed", lambda: "0.19.8")


def test_each_function_reads_the_tensors_of_its_stage(monkeypatch) -> None:
    weight, store = torch.zeros(2, 3), torch.arange(8.0)
    half = SimpleNamespace(fp16_groups=[[weight]], fp32_groups=[[store]])
    assert list(internals.float32_copies(half)) == [(weight, store)]
    fragments = {
        "hp_fragment_address": SimpleNamespace(start=1, numel=4),
        "lp_fragment_address": SimpleNamespace(start=2),
    }
    mapped = SimpleNamespace(_hp_mapping=SimpleNamespace(param_group_index=0, **fragments))
    flat = SimpleNamespace(single_partition_of_fp32_groups=[store])
    assert internals.slice_of_group(flat, mapped) == (store, 1, 4, 2)
    assert internals.slice_of_group(flat, SimpleNamespace(_hp_mapping=None)) is None
    split = SimpleNamespace(
        get_param_id=lambda weight: 7, grad_position={7: (0, 3, 4)}, fp32_partitioned_groups_flat=[store]
    )
    for rank, expected in enumerate([(store, 3, 4, 0), (store, 3, 2, 4), None]):  # 6 elements on 3 ranks: 4, 2, padding
        monkeypatch.setattr(internals.distributed, "get_rank", lambda rank=rank: rank)
        assert internals.slice_of_weight(split, SimpleNamespace(ds_numel=6)) == expected


def test_weights_are_gathered_and_partitioned_together() -> None:
    calls: list[Any] = []
    first, second = (
        SimpleNamespace(all_gather=lambda **given: calls.append(given), partition=lambda **given: calls.append(given))
        for _ in range(2)
    )
    internals.gather([first, second])
    internals.release([first, second], changed=True)
    internals.gather([])
    together = {"param_list": [first, second]}
    assert calls == [together, {**together, "has_been_updated": True}]


def test_a_missing_attribute_names_the_versions() -> None:
    with pytest.raises(RunError, match=r"DeepSpeed 0\.19\.8: .* has no attribute parameter_offload; tested with 0\.19"):
        internals.remove_gathering_hooks(SimpleNamespace(optimizer=SimpleNamespace()))


@pytest.mark.parametrize("found", ["0.17.6", "0.18.0", "0.19.1", "0.19", "0.20.0", "1.0"])
def test_another_version_is_refused_before_anything_is_read(found, monkeypatch) -> None:
    monkeypatch.setattr(internals, "_installed", lambda: found)
    with pytest.raises(RunError, match=rf"DeepSpeed {found}: .*not supported; tested with .*>=0\.19\.2,<0\.20"):
        internals.full_shape(SimpleNamespace(ds_shape=(2, 3)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_buffer_that_an_engine_casts_is_named(half) -> None:
    """As DeepSpeed before 0.19.2 cast inv_freq; weights may be cast."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("inv_freq", torch.ones(2), persistent=False)
    model.register_buffer("count", torch.ones(2, dtype=torch.long))
    with internals.same_buffer_types(model):
        model.weight.data = model.weight.data.to(half)
    with pytest.raises(RunError, match=r"cast inv_freq from torch\.float32 to .*>=0\.19\.2,<0\.20"):  # noqa: SIM117
        with internals.same_buffer_types(model):
            model.to(half)


def test_the_range_of_versions_is_that_of_the_package() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra = table["project"]["optional-dependencies"]["train"]
    (found,) = (each.removeprefix("deepspeed") for each in extra if each.startswith("deepspeed"))
    assert found == internals._allowed()
