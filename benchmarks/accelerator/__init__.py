"""What benchmarks/gpu.py checks and measures on a device.

`omnimem` imports packages that a machine set up for kernels may lack. Nothing is decoded and no configuration is read
here, so where one of `UNUSED` is missing, an empty stand-in takes its place.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, final

UNUSED = ("av", "pydantic", "pydantic_core")


class _Unused(Exception):
    """What a name of an absent module stands for: a class, also in annotations, without instances in this process."""

    def __class_getitem__(cls, item: object) -> type["_Unused"]:
        return cls


class _Absent(ModuleType):
    """A module in which every public name is an `_Unused`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Unused,), {})


@final
class _StandIns(MetaPathFinder, Loader):
    """Finds the modules of `UNUSED` packages, after all other finders have found none."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in UNUSED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to execute."""


if not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
    sys.meta_path.append(_StandIns())
