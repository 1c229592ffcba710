"""Sections in a process beside this one, which is replaced when one ends it, hangs or leaves the device unusable."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol, final

STARTING = 120.0  # seconds until a new process begins a section: imports and, on a GPU, a context
Serve = Callable[[Connection, Sequence[str]], None]  # runs sections by name; a function of a module, as it is pickled


class Results(Protocol):
    """What takes the results of sections."""

    def check(self, name: str, dtype: Any, found: float, bound: float | None) -> None: ...

    def measured(self, section: str, rows: Mapping[str, Mapping[str, Any]]) -> None: ...

    def ended(self, name: str, state: Mapping[str, Any]) -> None: ...


@final
class Remote:
    """`Results` of another process: every call becomes an event of the connection, at once."""

    def __init__(self, events: Connection) -> None:
        self._events = events

    def check(self, name: str, dtype: Any, found: float, bound: float | None) -> None:
        """Note a comparison."""
        self._events.send(("check", (name, dtype, found, bound)))

    def measured(self, section: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Note measurements, one row per arm."""
        self._events.send(("measured", (section, rows)))


def serve(
    events: Connection, works: Mapping[str, Callable[[], None]], deadline: float, usable: Callable[[], bool]
) -> None:
    """Run the sections in their order and tell of each; end after one that leaves the device not `usable`."""
    for name, work in works.items():
        events.send(("began", (name,)))
        state = outcome(work) if time.monotonic() < deadline else left_out()
        events.send(("ended", (name, state)))
        if not usable():
            return


def outcome(work: Callable[[], None]) -> dict[str, Any]:
    """State, seconds and, if it failed, error of a section."""
    started = time.monotonic()
    try:
        work()
    except Exception as error:  # noqa: BLE001 - whatever one section meets on a device never tried before, a missing kernel or a full memory, must cost no other section its result
        text = f"{type(error).__name__}: {error}"
        state: dict[str, Any] = {"state": "failed", "error": text, "trace": traceback.format_exc()}
    else:
        state = {"state": "done"}
    return {**state, "seconds": round(time.monotonic() - started, 2)}


def left_out() -> dict[str, Any]:
    """The state of a section for which no time was left."""
    return {"state": "left out", "error": "no time was left for it"}


def run(results: Results, target: Serve, limits: Mapping[str, float], deadline: float, last: float) -> None:
    """Have all sections of `limits` run, each for so many seconds at most, by processes that call `target`.

    No section is begun after `deadline`, none goes on after `last` (both of time.monotonic).
    """
    waiting = list(limits)
    while waiting and time.monotonic() < deadline:
        context = get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(theirs, tuple(waiting)), daemon=True)
        process.start()
        theirs.close()
        before = len(waiting)
        running, late = _follow(results, ours, waiting, limits, last)
        process.join(10.0 if late is None else 0.0)
        process.kill()
        process.join()
        if running is None and len(waiting) == before:
            running = waiting.pop(0)  # a process that begins nothing would be replaced for ever
        if running is not None:
            error = f"its process ended, exit code {process.exitcode}" if late is None else f"ended after {late:.0f} s"
            results.ended(running, {"state": "failed", "error": error})
    for name in waiting:
        results.ended(name, left_out())


def _follow(
    results: Results, events: Connection, waiting: list[str], limits: Mapping[str, float], last: float
) -> tuple[str | None, float | None]:
    """Pass events on until the process ends or is late: the section then running, and the seconds after which late."""
    running, began, allowed = None, time.monotonic(), STARTING
    try:
        while waiting or running:
            if not events.poll(max(0.0, min(began + allowed, last) - time.monotonic())):
                return running, time.monotonic() - began
            what, given = events.recv()
            if what == "began":
                running, began, allowed = given[0], time.monotonic(), limits[given[0]]
                waiting.remove(running)
                continue
            if what == "ended":
                running, began, allowed = None, time.monotonic(), STARTING
            getattr(results, what)(*given)
    except (EOFError, OSError):
        pass
    return running, None
