"""Open a local web page: choose a file or a camera, watch what the memory keeps of it, ask at any time.

omnimem demo-ui --model DIR [--adapter DIR] [--root DIR] [--port N]

The page is at http://127.0.0.1:7860 and reads one stream at a time: a file below --root, an upload, or the camera of
the browser. Needs the extra `ui` (pip install 'omnimem[ui]'). Model, adapter and memory are those of `omnimem ask`.
"""

import socket
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from omnimem.cli.asking import add_model, loaded
from omnimem.cli.parser import Parser
from omnimem.config import ConfigError
from omnimem.extras import optional, require
from omnimem.ui import LOCAL
from omnimem.ui.files import Library, Uploads

uvicorn, app = optional("uvicorn"), optional("omnimem.ui.app")


def main(arguments: Sequence[str]) -> None:
    """Load the model, serve the page until Ctrl-C."""
    # 1. what can fail before the model is loaded
    given = _parser().parse(arguments)
    require("fastapi", "uvicorn")
    library = Library(given.root)
    place = listening(given.host, given.port)
    # 2. serve
    with loaded(given) as model, place:
        stage = app.Stage(model, library, Uploads())
        config = uvicorn.Config(app.make_app(stage, host=given.host), log_level="warning", access_log=False)
        host, port = place.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends)", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[place])
        finally:
            stage.close()


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; warns if other machines reach it. Raises ConfigError if it cannot."""
    try:
        place = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            [f"--host {host} --port {port}: {error.strerror}; give another --port (0: any free one)"]
        ) from error
    if host not in LOCAL:
        what = "everybody who reaches this machine can read the files below --root and use the model"
        print(f"warning: --host {host}: {what}", file=sys.stderr, flush=True)
    return place


def _parser() -> Parser:
    parser = Parser(__doc__)
    add_model(parser)
    parser.add_argument("--root", type=Path, metavar="DIR", help="the page may read media files below it (none)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=_port, default=7860, metavar="N", help="(7860)")
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)
