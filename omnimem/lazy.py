"""A property that is computed once per object."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, final

T = TypeVar("T")


@final
class lazy_property(Generic[T]):  # as `property`
    """`functools.cached_property` without its lock (Python 3.11), which torch.compile cannot capture.

    Of frozen objects too; a copy by `dataclasses.replace` computes it again.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        if instance is None:
            raise AttributeError(f"{self.name} is a property of objects, not of their class")
        value = self.compute(instance)
        instance.__dict__[self.name] = value  # found there from now on
        return value
