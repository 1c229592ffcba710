"""Fine-tuning with distillation by its entry point: ranks and accumulation agree, and a resumed run continues."""

import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_run import Run, tune

from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """One video is too long for a full memory of 80 tokens."""
    write_mp4(draw_world(0, 12), folder / "0.mp4")
    return folder


SGD = ("train.optim=sgd", "train.max_steps=6", "train.max_grad_norm=0")
DISTILLED = (
    "tuning.loss={answer: 0.5, full_memory_kl: {temperature: 2, max_tokens: 80}}",
    "tuning.budgets={low: 3, high: 12, full: 0.3}",
    "tuning.chunk_tokens=[36, 24]",
)


def curves(run: Run) -> set[str]:
    return {name for line in run.lines for name in line["loss_at"]}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_and_accumulation_mean_the_same_with_distillation(folder) -> None:
    """Budgets and chunk sizes are those of the step on every rank; plain SGD, so that a scale would show. In some
    steps one rank has a teacher and the other has none, which ZeRO-3 alone has to know: it gathers each layer."""
    settings = (*SGD, *DISTILLED, "train.deepspeed=deepspeed/zero3.json")
    two = tune(folder, "kl-ranks", *settings, ranks=2)
    accumulated = tune(folder, "kl-accumulated", *settings, "train.gradient_accumulation_steps=2")
    torch.testing.assert_close(two.losses, accumulated.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(two.adapter, accumulated.adapter, rtol=1e-5, atol=1e-7)
    for first, second in zip(two.lines, accumulated.lines, strict=True):
        for group in ("losses", "rows", "loss_at"):
            assert first[group] == pytest.approx(second[group], rel=1e-5)
        assert (first["slots"], first["chunk_tokens"]) == (second["slots"], second["chunk_tokens"])
    assert curves(two) <= {"3-5", "6-11", "12", "full"}
    assert {line["chunk_tokens"] for line in two.lines} == {36.0, 24.0}
    parts = [line["rows"]["full_memory_kl"] / line["rows"]["answer"] for line in two.lines]
    assert any(0 < part < 1 for part in parts)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_resumed_run_goes_on_with_the_same_budgets_chunks_losses_and_curves(folder) -> None:
    whole = tune(folder, "kl", *DISTILLED)
    kept = Run(path=whole.path.rename(folder / "runs" / "kl.whole"), ended=whole.ended)
    shutil.copytree(kept.path, whole.path)  # as a crash after step 5 leaves it
    shutil.rmtree(whole.path / "checkpoint-10")
    resumed = tune(folder, "kl", *DISTILLED, "--resume", "auto")
    assert "step 5 of 10" not in resumed.ended.outputs[0]
    assert resumed.lines == kept.lines
    assert torch.equal(resumed.adapter, kept.adapter)
    assert len(curves(kept)) >= 2
