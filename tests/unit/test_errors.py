"""Messages are one line per problem, whatever the names in them hold."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
from support.paths import ROOT

from omnimem.errors import ProblemList, UserError, counted, lacks_memory, printable
from omnimem.media import MediaError


@pytest.mark.parametrize("name", ["a\nb.mp4", "a\rb", "a\x1b[2Jb", "a\u2028b", "a\u202eb", "a\x00b", "a\ud800b"])
@pytest.mark.parametrize(
    "error",
    [
        lambda name: MediaError(Path(name), "missing", f"{name} is not a file; check the path"),
        lambda name: ProblemList([f"{name}: wrong; repair it"]),
        lambda name: UserError(f"{name.replace(chr(10), ' ')}: wrong; repair it"),
    ],
)
def test_a_name_cannot_break_the_line_or_steer_the_terminal(error, name) -> None:
    text = str(error(name))
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert text.encode()


def test_what_can_be_shown_stays() -> None:
    assert printable("ä 漢 \\x1b 'x'") == "ä 漢 \\x1b 'x'"
    assert str(ProblemList(["a", "b"])) == "a\nb"
    assert str(UserError("a\nb")) == "a\nb"


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        *(
            (text, True)
            for text in (
                *("HIP out of memory. Tried", "MPS backend out of memory", "Triton Error [CUDA]: out of memory"),
                *("CUDA error 2: cudaErrorMemoryAllocation", "hipErrorOutOfMemory", "std::bad_alloc"),
                *("CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
                *("Unable to allocate 2.00 GiB for an array with shape (9,)", "could not allocate 8 bytes"),
                *("unable to mmap 8 bytes from file: Cannot allocate memory (12)", "Memory allocation failed"),
            )
        ),
        *((text, False) for text in ("shapes differ", "the memory holds 3 tokens", "No space left on device")),
    ],
)
def test_exhausted_memory_is_known_by_its_words(text, lacks) -> None:
    assert lacks_memory(RuntimeError(text)) is lacks
    assert not lacks_memory(UserError(text))


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [
        (0, "row", "0 rows"),
        (1, "row", "1 row"),
        (1000, "damaged line", "1,000 damaged lines"),
        (1, "entry", "1 entry"),
        (2, "entry", "2 entries"),
        (2, "frequency", "2 frequencies"),
        (2, "key", "2 keys"),
        (2, "patch", "2 patches"),
        (1.0, "frame", "1 frame"),
        (2.5, "frame", "2.5 frames"),
    ],
)
def test_a_number_agrees_with_its_noun(count, noun, said) -> None:
    assert counted(count, noun) == said


# values that are words, or part of a digest that must stay
WORDS = {"name", "origin", "stream.fps", "len(sample.video.files)"}
WORDS |= {f"facts[{name!r}]" for name in ("slots per layer", "positions")}


def test_no_text_of_the_package_writes_a_plural_after_a_number() -> None:
    """`counted` does; a noun that it is given anywhere may follow a value nowhere else."""
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "omnimem").rglob("*.py")}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    calls = [
        node
        for _, node in nodes
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "counted" and node.args
    ]
    nouns = {counted(2, node.args[1].value).split()[-1] for node in calls if isinstance(node.args[1], ast.Constant)}
    assert {"rows", "steps", "entries", "patches"} < nouns
    found = [
        f"{path.relative_to(ROOT)}:{value.lineno} {ast.unparse(value.value)}{after.value[:30]}"
        for path, node in nodes
        if isinstance(node, ast.JoinedStr)
        for value, after in pairwise(node.values)
        if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant)
        if (words := re.match(r" (?:(?!that|and|has|merges)[a-z-]+ )?([a-z]+)\b", after.value)) and words[1] in nouns
        if ast.unparse(value.value) not in WORDS
    ]
    assert not found, found
