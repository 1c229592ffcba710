"""Settings of every test process, and the fixture that runs over the families of text models."""

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels as plain Python; chosen when Triton is imported

import pytest
import torch
from support.models import FAMILIES

torch.set_num_threads(1)
# What the shell that started the tests ignores (Ctrl-C in the background, a hang-up under nohup) no child could heed.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the four families in turn."""
    return request.param


RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMNIMEM_LIMITS")


@pytest.fixture(autouse=True)
def without_ranks() -> Iterator[None]:
    """A command in the test process makes it a rank, or raises limits; later tests must not inherit that."""
    before = {name: os.environ.get(name) for name in RANKS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
