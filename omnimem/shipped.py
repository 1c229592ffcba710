"""Files that are distributed with the package: configs, shapes of known models, the tiny checkpoint."""

from pathlib import Path

_INSTALLED = Path(__file__).resolve().with_name("configs")
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "configs"  # the latter in a checkout


def shipped(path: str) -> str:
    """`path` below `CONFIGS` if it exists there and not in the working folder, else `path` itself, such as a hub id."""
    return str(CONFIGS / path) if not Path(path).exists() and (CONFIGS / path).exists() else path
