"""The table of policies: paired, at equal entries only; needles are at the places of the world."""

from typing import Any

import pytest
import torch

from benchmarks import policy_table
from benchmarks.policies import needles
from benchmarks.studies import STUDIES
from omnimem.budget import Readings, Signals, SplitBudget
from omnimem.comparison import ComparisonError
from omnimem.policies import PolicyOptions
from omnimem.recall.worlds import WorldOptions, draw_world


def lines(right: list[list[bool]], entries: float = 18.0) -> tuple[dict[str, Any], ...]:
    """Answers by stream."""
    return tuple(
        {
            "id": f"s{stream}#{number}",
            "stream": f"s{stream}",
            "kind": ("visual", "auditory")[number % 2],
            "correct": correct,
            "peak_entries": 5 * entries,
            "entries": entries,
            "bytes": 1000 * (stream + 1),
        }
        for stream, row in enumerate(right)
        for number, correct in enumerate(row)
    )


def sheet(arm: str, right: list[list[bool]], **facts: Any) -> Any:
    given = {"model": "tiny", "root": "data/recall", "slots": 18, "fewer": False, **facts}
    return policy_table.Sheet(arm=arm, lines=lines(right, given.pop("entries", 18.0)), **given)


def test_rows_pool_all_settings_and_are_paired_by_question() -> None:
    ours, theirs = [[True, True], [True, False]], [[True, False], [False, False]]
    sheets = [
        sheet(arm, right, model=model)
        for model in ("tiny", "second")
        for arm, right in (("omnimem", ours), ("snapkv", theirs))
    ]
    first, second = policy_table.table(sheets, "omnimem")
    assert (first["arm"], first["accuracy"], first["n"]) == ("omnimem", 0.75, 8)
    assert second["accuracy"] == 0.25
    assert second["difference"] == -0.5
    assert -1 <= second["low"] <= -0.5 <= second["high"] < 1  # two streams say little
    assert second["streams"] == 2  # a world under another base is the same stream
    assert "difference" not in first
    assert first["kinds"] == {"auditory": 0.5, "visual": 1.0}
    assert first["bytes"] == 1500
    assert [row["accuracy"] for row in second["settings"]] == [0.25, 0.25]


@pytest.mark.parametrize(("entries", "fewer"), [(17.0, False), (19.0, True)])
def test_arms_of_other_entries_are_refused_unless_fewer_are_allowed(entries, fewer) -> None:
    ours, allowed = sheet("omnimem", [[True]]), sheet("snapkv", [[True]], entries=17.0, fewer=True)
    assert len(policy_table.table([ours, allowed], "omnimem")) == 2
    sheets = [ours, sheet("snapkv", [[True]], entries=entries, fewer=fewer)]
    with pytest.raises(ComparisonError, match=r"snapkv and omnimem at 18 slots.*not the same budget"):
        policy_table.table(sheets, "omnimem")


def test_every_policy_is_tried_and_every_study_fills_the_same_slots() -> None:
    assert {type(trial.policy) for trial in STUDIES["policies"].values()} == set(PolicyOptions.__args__)
    even = Readings(whole=(0.5, 0.6), audio=(0.4, 0.5), visual=(0.6, 0.7))
    signals = Signals(entropy=even, similarity=even, streams=1, chunks=1)
    for study in STUDIES.values():
        for trial in study.values():
            budget = trial.allocate(SplitBudget(visual_audio_ratio=2.0), 2, 18, signals)
            assert budget.total == 36
            assert trial.policy.build(budget).budget.total == 36


def test_needles_are_one_copy_of_every_fact_asked_about() -> None:
    world = draw_world(7, 64, WorldOptions())
    found = list(needles({"seed": 7, "seconds": 64}, WorldOptions()))
    asked = {question.key for question in world.questions}
    events = [event for event in world.events if event.shape in asked]
    audio, visual = ([needle for needle in found if len(needle) == size] for size in (1, 3))
    assert len(visual) == len(events) > 2
    assert {int(at) for (at,) in audio} >= {event.utterance.at for event in events if event.utterance}
    assert len(audio) == len({at for (at,) in audio})
    for event, (at, y, x) in zip(events, visual, strict=True):
        shown = {(second // 2, cell) for second, cell in zip(event.span, event.cells, strict=True)}
        assert (int(at) // 2, int(y * 4) * 4 + int(x * 4)) in shown
    assert torch.tensor([at for (at,) in audio]).max() < 64
