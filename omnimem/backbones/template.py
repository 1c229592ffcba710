"""Renders a chat template in a child process with limits: a template is a program of the checkpoint's author."""

import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from omnimem.limits import exceeds, limit

MEMORY = 1 << 30  # bytes that rendering may take in addition


class TemplateFailure(ValueError):
    """A template that cannot be rendered, or not within the limits."""


def render_bounded(render: Callable[[], str]) -> str:
    """The text of `render()`, computed in a forked child; raises TemplateFailure.

    The child may take 1 GiB of memory and `template_seconds`, the text have `template_characters`.
    """
    # 1. fork
    end, start = os.pipe()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)  # child: no threads
        try:
            child = os.fork()
        except OSError as error:
            raise MemoryError(f"no process can be started to render the chat template: {error.strerror}") from error
    if child == 0:
        os.close(end)
        _answer(render, start)
    os.close(start)
    # 2. read its answer
    most, until, data = 4 * limit("template_characters") + 1000, time.monotonic() + limit("template_seconds"), b""
    try:
        while len(data) <= most:
            ready, _, _ = select.select([end], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TemplateFailure(f"takes longer than template_seconds = {limit('template_seconds')}")
            part = os.read(end, 1 << 20)
            if not part:
                break
            data += part
    finally:
        os.close(end)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # 3. the text, or the error
    status, text = data[:1], data[1:].decode("utf-8", "surrogatepass" if len(data) <= most else "replace")
    if what := exceeds("template_characters", len(text)):
        raise TemplateFailure(f"its text has {what}")
    if status != b"1":
        raise TemplateFailure(text or "its process ended without an answer")
    return text


def _answer(render: Callable[[], str], start: int) -> None:
    """In the child: write 1 and the text, or 0 and the error, and end."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
        if pages:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, hard))
        answer = b"1" + str(render()).encode("utf-8", "surrogatepass")
    except MemoryError:
        answer = b"0needs more than 1 GiB of memory"
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent reports it
        answer = f"0{' '.join(str(error).split())[:200] or type(error).__name__}".encode("utf-8", "replace")
    try:
        while answer:
            answer = answer[os.write(start, answer) :]
    finally:
        os._exit(0)
