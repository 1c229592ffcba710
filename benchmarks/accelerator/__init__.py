"""What benchmarks/gpu.py checks and measures on a device.

`omnimem.media` imports PyAV, which a machine set up for kernels may lack; nothing is decoded here, so where it is
missing an empty stand-in takes its place.
"""

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

DECODERS = (
    "av",
    *("av.audio", "av.audio.frame", "av.audio.resampler", "av.audio.stream"),
    *("av.container", "av.error", "av.stream", "av.video", "av.video.frame", "av.video.stream"),
)


class _Absent(ModuleType):
    """A module in which every public name is a class without instances in this process."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


if find_spec("av") is None:
    sys.modules.update({name: _Absent(name) for name in DECODERS})
