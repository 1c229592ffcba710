"""Properties that are computed once per object, results that a second run finds."""

from dataclasses import dataclass, field, replace

import pytest

from omnimem.lazy import Once, lazy_property


@dataclass(frozen=True)
class Square:
    side: int
    asked: list[int] = field(default_factory=list)

    @lazy_property
    def area(self) -> int:
        """side^2"""
        self.asked.append(self.side)
        return self.side**2


def test_a_property_is_computed_once_and_again_for_a_copy() -> None:
    square = Square(3)
    assert [square.area, square.area, replace(square, side=4).area, square.area] == [9, 9, 16, 9]
    assert square.asked == [3, 4]
    with pytest.raises(AttributeError, match="area"):
        Square.area  # noqa: B018


def test_a_second_run_finds_each_result_of_a_name_where_the_first_one_had_it() -> None:
    """Also one that asks for less, as a recomputation that ends early."""
    once, computed = Once(), []

    def run(part: int, values: str) -> list[str]:
        results = once.of(part)
        return [results("mass", lambda value=value: computed.append(value) or value) for value in values]

    assert [run(0, "ab"), run(1, "c"), run(0, "xy"), run(1, "x"), run(0, "x"), run(0, "xyz")] == [
        ["a", "b"], ["c"], ["a", "b"], ["c"], ["a"], ["a", "b", "z"]
    ]  # fmt: skip
    assert computed == ["a", "b", "c", "z"]
