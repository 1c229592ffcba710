"""Sections of a record that crash, hang or spoil their process; imports little, as every process starts with it."""

import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from benchmarks.accelerator.processes import Remote, serve


def serve_faults(deadline: float, events: Connection, names: Sequence[str]) -> None:
    """Sections by what they do; every one notes a check first."""
    results, spoiled = Remote(events), []

    def work(name: str) -> None:
        results.check(name, "float32", 0.0, 0.0)
        if name == "raises":
            raise RuntimeError("no kernel image is available\nsecond line")
        if name == "crashes":
            os._exit(11)
        if name == "hangs":
            time.sleep(60)
        if name == "spoils":
            spoiled.append(name)
        if name == "sound" and spoiled:
            raise RuntimeError("an illegal memory access was encountered")

    works = {name: (lambda name=name: work(name)) for name in names}
    serve(events, works, deadline, lambda: not spoiled)


def begins_nothing(events: Connection, names: Sequence[str]) -> None:
    """As an import that fails."""
    raise SystemExit(3)
