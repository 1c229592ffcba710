"""Differences in input or budget that make arms incomparable."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from omnimem.checksums import SHOWN
from omnimem.comparison.load import Answer, Arm, Sheet
from omnimem.errors import counted
from omnimem.run import RunFolder, sha256

SAME_ENTRIES = 0.001  # relative: entries are means over questions, stored with few digits
SAME_SECONDS = 0.01  # of audio, per question
SECONDS_DIGITS = 2


def differences(arms: Sequence[Arm]) -> list[str]:
    """Differences between the arms in input or budget, one line each; empty if they are comparable."""
    paired = [arm for arm in arms if arm.role != "probe"]
    first, *others = paired
    lines = [line for arm in others for line in _setting_differences(first, arm)]
    lines += [line for arm in others for line in _input_differences(first, arm)]
    lines += _weight_differences(paired)
    budgeted = [arm for arm in paired if arm.role == "budgeted"]
    return lines + [line for arm in budgeted[1:] for line in _budget_differences(budgeted[0], arm)]


def _setting_differences(first: Arm, arm: Arm) -> Iterator[str]:
    for key, what in (("generation", "answers were generated"), ("reading", "streams were read")):
        a, b = arm.provenance.get(key), first.provenance.get(key)
        if a is not None and b is not None and a != b:
            yield (
                f"{arm.label} and {first.label}: {what} with {json.dumps(a)} and {json.dumps(b)}; "
                "evaluate both with the same settings"
            )


def _weight_differences(arms: Sequence[Arm]) -> Iterator[str]:
    """Arms of one run that are of other weights, and adapters that have changed since the evaluation."""
    for number, arm in enumerate(arms):
        own = _weights(arm)
        for other in arms[:number]:
            known = _weights(other) if arm.folder.resolve().parent == other.folder.resolve().parent else {}
            if arm.name.partition("@")[2] != other.name.partition("@")[2]:  # tuned@checkpoint-80: of its own adapter
                known = {name: digest for name, digest in known.items() if name != "adapter"}
            for name in (name for name in own if known.get(name, own[name]) != own[name]):
                yield (
                    f"{arm.label} and {other.label}: answered by another {name} (sha256 {own[name][:SHOWN]} and "
                    f"{known[name][:SHOWN]}); evaluate both again"
                )
        run = RunFolder(path=arm.folder.resolve().parent.parent)
        if "adapter" in own and run.adapter_sha256 == own["adapter"] and run.adapter.is_dir():
            found = sha256(run.adapter, suffixes=(".safetensors",))
            if found != own["adapter"]:
                yield (
                    f"{arm.label}: answered by adapter {own['adapter'][:SHOWN]}, {run.adapter} is now {found[:SHOWN]}; "
                    "restore the adapter, or evaluate again"
                )


def _weights(arm: Arm) -> dict[str, str]:
    """Digests of the base and of the adapter that answered, where they are known."""
    digests = arm.provenance.get("sha256")
    known = digests if isinstance(digests, dict) else {}
    return {name: known[name] for name in ("base", "adapter") if isinstance(known.get(name), str)}


def _input_differences(first: Arm, arm: Arm) -> Iterator[str]:
    where = f"{arm.label} and {first.label}"
    for name in sorted(set(first.sheets) | set(arm.sheets)):
        if name not in first.sheets or name not in arm.sheets:
            lacking = arm if name in first.sheets else first
            yield f"{where}: {lacking.label} was not evaluated on {name}; evaluate it there too"
            continue
        yield from _sheet_differences(f"{where}: {name}", arm.sheets[name], first.sheets[name])


def _sheet_differences(where: str, a: Sheet, b: Sheet) -> Iterator[str]:
    # 1. each question
    again = "evaluate both on the same input"
    shared = sorted(set(a.answers) & set(b.answers))
    alone = sorted((set(a.answers) ^ set(b.answers)) - set(a.left_out) - set(b.left_out))
    if alone:
        yield (
            f"{where}: {counted(len(alone), 'question')} only one of them answered (first: {alone[0]}); "
            "finish or repeat the evaluation"
        )
    pairs = [(a.answers[key], b.answers[key]) for key in shared]
    for what, value in FIELDS.items():
        differing = [(one.id, value(one), value(two)) for one, two in pairs if value(one) != value(two)]
        if differing:
            key, one, two = differing[0]
            verb = "has" if len(differing) == 1 else "have"
            yield (
                f"{where}: {counted(len(differing), 'question')} {verb} {what} (first: {key}: {one} and {two}); {again}"
            )
    # 2. sums over all questions, unless one of the arms leaves some out
    if set(a.left_out) != set(b.left_out):
        return
    if _differ(a.frames, b.frames, 0.0):
        yield f"{where}: {a.frames:g} and {b.frames:g} frames were seen; {again}"
    if _differ(a.audio_seconds, b.audio_seconds, SAME_SECONDS * len(shared)):
        yield f"{where}: {a.audio_seconds:g} and {b.audio_seconds:g} seconds of audio were heard; {again}"


def _budget_differences(first: Arm, arm: Arm) -> Iterator[str]:
    """Compare means over questions, then each question: equal means can hide unequal budgets."""
    cure = "not the same budget; evaluate both with the same memory.slots_per_layer and budget"
    for name in sorted(set(first.sheets) & set(arm.sheets)):
        a, b = arm.sheets[name], first.sheets[name]
        means = (
            ("peak entries", a.peak_entries, b.peak_entries),
            ("entries at answer time", a.answer_entries, b.answer_entries),
        )
        unequal = [f"{what} are {one:g} and {two:g}" for what, one, two in means if _unequal(one, two)]
        unequal = unequal if set(a.left_out) == set(b.left_out) else []  # means over other questions
        lines = unequal[:1] or _entry_differences(a, b)
        yield from (f"{arm.label} and {first.label}: {name}: {line}, {cure}" for line in lines)


def _entry_differences(a: Sheet, b: Sheet) -> Iterator[str]:
    """The first question with unequal entries, for each measure."""
    for what, measure in (("peak entries", "peak_entries"), ("entries at answer time", "entries")):
        for key in sorted(set(a.answers) & set(b.answers)):
            one, two = getattr(a.answers[key], measure), getattr(b.answers[key], measure)
            if _unequal(one, two):
                yield f"{what} of {key} are {one:g} and {two:g}"
                break


def _unequal(a: float | None, b: float | None) -> bool:
    return _differ(a, b, SAME_ENTRIES * max(a or 0.0, b or 0.0))


def _differ(a: float | None, b: float | None, tolerance: float) -> bool:
    return a is not None and b is not None and abs(a - b) > tolerance


def _written(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}".rstrip("0").rstrip(".")


FIELDS: Mapping[str, Callable[[Answer], str]] = {
    "another prompt": lambda answer: answer.prompt_sha256[:12],
    "another right answer or video": lambda answer: f"{answer.answer!r} of {answer.video}",
    "another outcome of reading its stream": lambda answer: answer.failed or "read",
    "another number of frames": lambda answer: _written(answer.frames, 0),
    "other seconds of audio": lambda answer: _written(answer.audio_seconds, SECONDS_DIGITS),
    "another length of stream read before it": lambda answer: _written(answer.stream_seconds, SECONDS_DIGITS),
}
