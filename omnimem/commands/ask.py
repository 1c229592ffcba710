"""Stream a file or a pipe and answer questions about it from a memory of fixed size.

omnimem ask --model DIR [--adapter DIR] --video FILE|- [--at SECONDS]... "QUESTION" ["QUESTION" ...]
omnimem ask --model DIR --video FILE|- --ask "5: What was said?" --ask "1:30: Who came in?"
omnimem ask --model DIR --video FILE|- --prompt

Questions are asked at the end of the stream, or all of them at each --at; those of --ask have times of their own. The
stream is read once. With --prompt questions are typed while it is read; with --video - on the terminal, as standard
input is the stream.

Settings of the memory are read from omnimem.json of the adapter or the model (written by `omnimem export`), those of a
checkpoint from the folder of its run; --slots, --policy and --selection-from replace them. Without any of these the
whole stream is kept.
"""

import sys
import threading
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import TextIO

from omnimem.cli.asking import PIPE, Conversation, Loaded, Question, Reply, add_model, loaded, source_of, video_of
from omnimem.cli.parser import Parser
from omnimem.config import ConfigError
from omnimem.media import FrameList

TERMINAL = "/dev/tty"


def main(arguments: Sequence[str]) -> None:
    """Read the stream, ask the questions, print answers and their cost."""
    # 1. read the questions
    parser = _parser()
    given = parser.parse(arguments)
    questions = questions_of(parser, given)
    typed = typed_questions(given.video) if given.prompt else None
    video = video_of(given)
    # 2. stream the file and answer
    with loaded(given) as model:
        if typed is not None:
            converse(model, video, typed)
            return
        times = sorted({question.at for question in questions if question.at is not None})
        source = source_of(video, model.feeder, times)
        for reply in model.asking.replies(model.stream(), source, questions):
            show(reply, alone=len(questions) == 1 and reply.at is None)


def questions_of(parser: Parser, given: Namespace) -> list[Question]:
    """All questions of the command line; an error of the parser where there is none, or one beside --prompt."""
    if given.prompt and (given.questions or given.ask or given.at):
        parser.error("--prompt: questions are typed; leave out QUESTION, --ask and --at")
    if given.at and not given.questions:
        parser.error("--at: is the time of a QUESTION, and there is none; --ask 'SECONDS: QUESTION' has its own")
    if not (given.prompt or given.questions or given.ask):
        parser.error("the following arguments are required: QUESTION, --ask or --prompt")
    return [*(Question(text=text, at=at) for at in given.at or [None] for text in given.questions), *given.ask]


def show(reply: Reply, *, alone: bool = False) -> None:
    """Print a reply at once."""
    print("\n".join(reply.lines(alone=alone)), flush=True)


def typed_questions(video: str) -> TextIO:
    """Where questions are typed: standard input, or the terminal if that is the stream.

    Raises ConfigError if there is none.
    """
    if video != PIPE and sys.stdin is not None:
        return sys.stdin
    try:
        return open(TERMINAL, encoding="utf-8", errors="replace")
    except OSError as error:
        what = "standard input is the stream, and there is no terminal to type questions on"
        raise ConfigError([f"--prompt: {what} ({error.strerror}); give --ask 'SECONDS: QUESTION' instead"]) from error


def converse(model: Loaded, video: str | FrameList, typed: TextIO) -> None:
    """Answer the typed questions, a line each, while the stream is read and after its end, until the last line."""
    source = source_of(video, model.feeder, ())
    conversation = Conversation(model.asking, model.stream(), lambda: model.feeder.watch(source, split=True))

    def read() -> None:
        for line in typed:
            if line.strip():
                conversation.ask(line.strip())
        if typed is not sys.stdin:
            typed.close()
        conversation.close()

    print("type a question at any time; Ctrl-D ends", file=sys.stderr, flush=True)
    threading.Thread(target=read, daemon=True).start()
    for event in conversation.events():
        if isinstance(event, Reply):
            show(event)


def _parser() -> Parser:
    parser = Parser(__doc__)
    add_model(parser)
    parser.add_argument("--video", required=True, metavar="FILE|-", help="a file, or - for a growing stream on stdin")
    parser.add_argument("--frame-rate", type=_rate, metavar="FPS", help="--video is a folder of images at this rate")
    parser.add_argument("--at", type=_time, action="append", default=[], metavar="SECONDS", help="repeatable (end)")
    what = "a question with a time of its own, in seconds, M:SS or H:MM:SS; repeatable"
    parser.add_argument("--ask", type=Question.timed, action="append", default=[], metavar="'5: QUESTION'", help=what)
    parser.add_argument("--prompt", action="store_true", help="type questions while the stream is read")
    parser.add_argument("questions", nargs="*", metavar="QUESTION")
    return parser


def _rate(text: str) -> float:
    try:
        return _time(text)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"{text!r} is not a number of frames per second above 0") from None


def _time(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a time in seconds after the start of the stream")
    return seconds
