"""Properties that are computed once per object."""

from dataclasses import dataclass, field, replace

import pytest

from omnimem.lazy import lazy_property


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
