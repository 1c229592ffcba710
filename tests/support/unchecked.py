"""omnimem without the checks of annotations that the tests add: torch.compile cannot capture them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import pytest


def _plain(member: Any) -> Any:
    """A member of a class without its check."""
    if isinstance(member, property):
        return property(_plain(member.fget), _plain(member.fset), _plain(member.fdel))
    if isinstance(member, classmethod | staticmethod):
        return type(member)(_plain(member.__func__))
    checked = getattr(member, "__globals__", {}).get("__name__") == "jaxtyping._decorator"
    return member.__wrapped__ if checked else member


@contextmanager
def unchecked() -> Iterator[None]:
    """Members of classes are replaced; functions check nothing while jaxtyping is switched off."""
    loaded = [module for name, module in sys.modules.items() if name.startswith("omnimem.")]
    classes = {kind for module in loaded for kind in vars(module).values() if isinstance(kind, type)}
    ours = [kind for kind in classes if kind.__module__.startswith("omnimem.")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        for kind in ours:
            for name, member in list(vars(kind).items()):
                if isinstance(member, property) or _plain(member) is not member:
                    patch.setattr(kind, name, _plain(member))
        yield
