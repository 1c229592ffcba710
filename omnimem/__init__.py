"""OmniMem: key-value memory of fixed size for audio-visual LLMs on streams.

`import omnimem` imports nothing else; each name below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimem.backbones import ModelOptions, load_backbone
    from omnimem.budget import Budget
    from omnimem.config.exported import Exported
    from omnimem.config.policy import policy
    from omnimem.policies import PerturbationOptions
    from omnimem.streaming.attach import attach
    from omnimem.streaming.feeder import Feeder
    from omnimem.streaming.options import StreamOptions
    from omnimem.streaming.stream import Stream
    from omnimem.tuning import load_adapter

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Exported",
    "Feeder",
    "ModelOptions",
    "PerturbationOptions",
    "Stream",
    "StreamOptions",
    "__version__",
    "attach",
    "load_adapter",
    "load_backbone",
    "policy",
]

_MODULES = {
    "Budget": "budget",
    "Exported": "config.exported",
    "Feeder": "streaming.feeder",
    "ModelOptions": "backbones",
    "PerturbationOptions": "policies",
    "Stream": "streaming.stream",
    "StreamOptions": "streaming.options",
    "attach": "streaming.attach",
    "load_adapter": "tuning",
    "load_backbone": "backbones",
    "policy": "config.policy",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"omnimem.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
