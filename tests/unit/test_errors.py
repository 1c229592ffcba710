"""Messages are one line per problem, whatever the names in them hold."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("count", "said"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1000, "1,000 rows")])
def test_a_number_agrees_with_its_noun(count, said) -> None:
    assert counted(count, "row") == said
