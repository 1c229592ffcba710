"""Differences in input or budget that make arms incomparable."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from omnimem.comparison.formatting import many
from omnimem.comparison.load import Answer, Arm, Sheet

SAME_ENTRIES = 0.001  # relative: entries are means over questions, stored with few digits
SAME_SECONDS = 0.01  # of audio, per question
SECONDS_DIGITS = 2


def differences(arms: Sequence[Arm]) -> list[str]:
    """Differences between the arms in input or budget, one line each; empty if they are comparable."""
    paired = [arm for arm in arms if arm.role != "probe"]
    first, *others = paired
    lines = [line for arm in others for line in _setting_differences(first, arm)]
    lines += [line for arm in others for line in _input_differences(first, arm)]
    rivals = [arm for arm in paired if arm.role == "budgeted"]
    return lines + [line for arm in rivals[1:] for line in _budget_differences(rivals[0], arm)]


def _setting_differences(first: Arm, arm: Arm) -> Iterator[str]:
    for key, what in (("generation", "answers were generated"), ("reading", "streams were read")):
        a, b = arm.provenance.get(key), first.provenance.get(key)
        if a is not None and b is not None and a != b:
            yield (
                f"{arm.label} and {first.label}: {what} with {json.dumps(a)} and {json.dumps(b)}; "
                "evaluate both with the same settings"
            )


def _input_differences(first: Arm, arm: Arm) -> Iterator[str]:
    where = f"{arm.label} and {first.label}"
    for name in sorted(set(first.sheets) | set(arm.sheets)):
        if name not in first.sheets or name not in arm.sheets:
            lacking = arm if name in first.sheets else first
            yield f"{where}: {lacking.label} was not evaluated on {name}; evaluate it there too"
            continue
        yield from _sheet_differences(f"{where}: {name}", arm.sheets[name], first.sheets[name])


def _sheet_differences(where: str, a: Sheet, b: Sheet) -> Iterator[str]:
    again = "evaluate both on the same input"
    shared = sorted(set(a.answers) & set(b.answers))
    alone = sorted(set(a.answers) ^ set(b.answers))
    if alone:
        yield (
            f"{where}: {many(len(alone), 'question')} only one of them answered (first: {alone[0]}); "
            "finish or repeat the evaluation"
        )
    pairs = [(a.answers[key], b.answers[key]) for key in shared]
    for what, said in FIELDS.items():
        differing = [(one, two) for one, two in pairs if said(one) != said(two)]
        if differing:
            one, two = differing[0]
            verb = "has" if len(differing) == 1 else "have"
            yield (
                f"{where}: {many(len(differing), 'question')} {verb} {what} "
                f"(first: {one.id}: {said(one)} and {said(two)}); {again}"
            )
    if _differ(a.frames, b.frames, 0.0):
        yield f"{where}: {a.frames:g} and {b.frames:g} frames were seen; {again}"
    if _differ(a.audio_seconds, b.audio_seconds, SAME_SECONDS * len(shared)):
        yield f"{where}: {a.audio_seconds:g} and {b.audio_seconds:g} seconds of audio were heard; {again}"


def _budget_differences(first: Arm, arm: Arm) -> Iterator[str]:
    """Compare means over questions, then each question: equal means can hide unequal budgets."""
    cure = "evaluate both with the same memory.slots_per_layer and budget"
    for name in sorted(set(first.sheets) & set(arm.sheets)):
        a, b = arm.sheets[name], first.sheets[name]
        where = f"{arm.label} and {first.label}: {name}"
        for what, one, two in (
            ("peak entries", a.peak_entries, b.peak_entries),
            ("entries at answer time", a.answer_entries, b.answer_entries),
        ):
            if one is not None and two is not None and _differ(one, two, SAME_ENTRIES * max(one, two)):
                yield f"{where}: {what} are {one:g} and {two:g}, not the same budget; {cure}"
                break
        else:
            yield from (f"{where}: {line}, not the same budget; {cure}" for line in _entry_differences(a, b))


def _entry_differences(a: Sheet, b: Sheet) -> Iterator[str]:
    pairs = [(a.answers[key], b.answers[key]) for key in sorted(set(a.answers) & set(b.answers))]
    for what, entries in (
        ("peak entries", [(one.peak_entries, two.peak_entries) for one, two in pairs]),
        ("entries at answer time", [(one.entries, two.entries) for one, two in pairs]),
    ):
        differing = [
            f"{what} of {pair[0].id} are {one:g} and {two:g}"
            for pair, (one, two) in zip(pairs, entries, strict=True)
            if one is not None and two is not None and _differ(one, two, SAME_ENTRIES * max(one, two))
        ]
        yield from differing[:1]


def _differ(a: float | None, b: float | None, tolerance: float) -> bool:
    return a is not None and b is not None and abs(a - b) > tolerance


def _said(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}".rstrip("0").rstrip(".")


FIELDS: Mapping[str, Callable[[Answer], str]] = {
    "another prompt": lambda answer: answer.prompt_sha256[:12],
    "another right answer or video": lambda answer: f"{answer.answer!r} of {answer.video}",
    "another outcome of reading its stream": lambda answer: answer.failed or "read",
    "another number of frames": lambda answer: _said(answer.frames, 0),
    "other seconds of audio": lambda answer: _said(answer.audio_seconds, SECONDS_DIGITS),
    "another length of stream read before it": lambda answer: _said(answer.stream_seconds, SECONDS_DIGITS),
}
