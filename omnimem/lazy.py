"""What is computed once: a property per object, a result per computation that may run again."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, final

T = TypeVar("T")


@final
class Once:
    """Results by name, of a computation that runs again on equal inputs: the second time they are found.

    For results without gradient alone: a recomputation in backward must find the graph of the first run.
    """

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def __call__(self, name: str, compute: Callable[[], T]) -> T:
        """The result of `compute`, which is called the first time that this name is asked for."""
        if name not in self._found:
            self._found[name] = compute()
        return self._found[name]

    def of(self, part: int) -> "Once":
        """The results of a part of the computation."""
        return self(f"part {part}", Once)


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
