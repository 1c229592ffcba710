"""DeepSpeed's private attributes, on a fake of its objects: what is read, and the error when it is not there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
    with pytest.raises(RunError, match=r"DeepSpeed 0\.19\.8: .* has no attribute parameter_offload; tested with 0\.1"):
        internals.remove_gathering_hooks(SimpleNamespace(optimizer=SimpleNamespace()))


@pytest.mark.parametrize("found", ["0.17.6", "0.20.0", "1.0"])
def test_another_version_is_refused_before_anything_is_read(found, monkeypatch) -> None:
    monkeypatch.setattr(internals, "_installed", lambda: found)
    with pytest.raises(RunError, match=rf"DeepSpeed {found}: .*not supported; tested with .*>=0\.18,<0\.20"):
        internals.full_shape(SimpleNamespace(ds_shape=(2, 3)))
