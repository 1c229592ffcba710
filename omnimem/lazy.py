"""What is computed once: a property per object, a result per computation that may run again."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar, final

T = TypeVar("T")


@final
class Once:
    """Results of a computation that runs again on equal inputs: the second time they are found.

    The n-th result of a name in one run is the n-th of that name in every other. For results without gradient alone: a
    recomputation in backward must find the graph of the first run.
    """

    def __init__(self) -> None:
        self._found: dict[Any, Any] = {}
        self._asked: Counter[str] = Counter()

    def __call__(self, name: str, compute: Callable[[], T]) -> T:
        """The result of `compute`, which is called if no run has asked so often for this name."""
        key = name, self._asked[name]
        self._asked[name] += 1
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]

    def of(self, part: int) -> "Once":
        """The results of a part of the computation, for one run of it."""
        run = Once()
        run._found = self._found.setdefault(part, {})
        return run


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
