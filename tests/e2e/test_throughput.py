"""benchmarks/throughput.py measures a step of every way, and counts operations as plain loops do."""

from pathlib import Path

import pytest
import torch

from benchmarks import throughput

GIVEN = {"layers": 1, "width": 128, "slots": 8, "chunk": 48, "side": 56, "shape": None, "device": "cpu", "steps": 1}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("throughput") / "v.mp4"
    throughput.write_video(path, 12, 56)
    return path


@pytest.mark.parametrize("way", throughput.WAYS)
def test_a_cell_has_the_parts_of_a_step(way, video) -> None:
    threads = torch.get_num_threads()
    found = throughput.cell({**GIVEN, "peak": 1.0, "frames": 12, "way": way, "video": str(video)})
    torch.set_num_threads(threads)
    assert set(found["seconds"]) == set(throughput.PARTS)
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["tokens"] == 6 * 4 + 12  # 2 x 2 tokens per frame pair, one audio token per second
    assert found["cached_tokens_per_second"] > found["tokens_per_second"] > 0
    assert len(throughput.row(found)) == 12


@pytest.mark.parametrize("slots", [None, 5])
def test_operations_are_those_of_plain_loops(slots) -> None:
    backbone = throughput.model_of(GIVEN)
    layer = backbone.text_model.layers[0]
    weights = sum(each.numel() for each in layer.parameters())
    expected = 0.0
    for token in range(23):
        begun = token // 8 * 8
        keys = min(begun, 23 if slots is None else slots) + (token - begun) + 0.5  # half of the own key: causal halves
        expected += 3 * 4 * 128 * keys
    assert throughput.operations(backbone, 23, 8, slots) == pytest.approx(expected + 4 * weights * 23)
