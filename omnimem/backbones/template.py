"""Renders a chat template in a child process with limits: a template is a program of the checkpoint's author."""

import gc
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from omnimem.backbones.files import CheckpointError
from omnimem.limits import exceeds, limit

SAMPLE = "\x00"  # placeholder of the question while the template is rendered
MEMORY = 1 << 30  # bytes that rendering may take in addition
CHILDREN = 5  # processes that are tried
PAUSE, IDLE = 0.5, 4  # seconds between two looks at a child; after so many more without work it waits for a lock


class TemplateFailure(ValueError):
    """A template that cannot be rendered, or not within the limits."""


def around_video(tokenizer: PreTrainedTokenizerBase, system: str | None, *, video: str, family: str) -> tuple[str, str]:
    """The chat template's text before the video, and after it with `SAMPLE` in place of the question.

    `video` is what the template of the family puts in its place. Raises CheckpointError when there is no template, or
    it does not render a video.
    """
    return _around(tokenizer, repr(tokenizer.chat_template), system, video, family)


@lru_cache(maxsize=64)
def _around(
    tokenizer: PreTrainedTokenizerBase, template: str, system: str | None, video: str, family: str
) -> tuple[str, str]:
    """`around_video`, once for each template and system prompt."""
    content = [{"type": "video", "video": "stream"}, {"type": "text", "text": SAMPLE}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    if tokenizer.chat_template is None:
        raise CheckpointError(
            "the checkpoint has no chat template; copy chat_template.json or chat_template.jinja from the model's hub "
            "page into its folder"
        )
    try:
        text = render_bounded(
            lambda: str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        )
    except TemplateFailure as error:
        raise CheckpointError(
            f"the chat template cannot be rendered ({' '.join(str(error).split())}); use {family}'s own template"
        ) from error
    opening, found, closing = text.partition(video)
    if not found or SAMPLE not in closing:
        raise CheckpointError(f"the chat template does not render a video as {video}; use {family}'s own template")
    return opening, closing


def render_bounded(render: Callable[[], str]) -> str:
    """The text of `render()`, computed in a forked child; raises TemplateFailure.

    The child may take 1 GiB of memory and `template_seconds`, the text have `template_characters`. A child inherits the
    locks that other threads hold, and waits for ever where it needs one of them: it is then replaced by another one.
    """
    for _ in range(CHILDREN):
        if (data := _from_child(render)) is not None:
            break
    else:
        raise TemplateFailure(f"{CHILDREN} forked processes waited for locks of other threads; start those later")
    most = limit("template_characters")
    status, text = data[:1], data[1:].decode("utf-8", "surrogatepass" if len(data) <= _bytes(most) else "replace")
    if what := exceeds("template_characters", len(text)):
        raise TemplateFailure(f"its text has {what}")
    if status != b"1":
        raise TemplateFailure(text or "its process ended without an answer")
    return text


def _bytes(characters: int) -> int:
    """The largest answer with so many characters."""
    return 4 * characters + 1000


def _from_child(render: Callable[[], str]) -> bytes | None:
    """The answer of a forked child, its beginning if it is too long; None: the child waits for a lock."""
    # 1. fork
    (end, start), parent = os.pipe(), os.getpid()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)  # child: no threads
        collects = gc.isenabled()
        gc.disable()  # in the child, an unreferenced decoder would wait for its threads, which are not there
        try:
            child = os.fork()
        except OSError as error:
            raise MemoryError(f"no process can be started to render the chat template: {error.strerror}") from error
        finally:
            if collects and os.getpid() == parent:
                gc.enable()
    if child == 0:
        os.close(end)
        _answer(render, start)
    os.close(start)
    # 2. read its answer
    until, data, seen = time.monotonic() + limit("template_seconds"), b"", list[str]()
    try:
        while len(data) <= _bytes(limit("template_characters")):
            left = until - time.monotonic()
            if select.select([end], [], [], min(PAUSE, max(0.0, left)))[0]:
                part = os.read(end, 1 << 20)
                if not part:
                    return data
                data += part
                continue
            if left <= 0:
                raise TemplateFailure(f"takes longer than template_seconds = {limit('template_seconds')}")
            seen = [*seen[-IDLE:], _sleeping(child)]
            if len(seen) > IDLE and seen[0] and len(set(seen)) == 1:
                return None
        return data
    finally:
        os.close(end)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _sleeping(process: int) -> str:
    """The CPU time of a process that waits for something, in ticks; empty where it runs, or nothing is known of it."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
        return f"{fields[10]} {fields[11]}" if state == "S" else ""
    return ""


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
