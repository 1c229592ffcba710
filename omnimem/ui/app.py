"""The HTTP side of the page: who may ask, what is read, and the state that the page polls."""

import ipaddress
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, final
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, responses
from fastapi.concurrency import run_in_threadpool

from omnimem.cli.asking import POLICIES, Loaded, live_source
from omnimem.comparison.template import page_template
from omnimem.data import Sample
from omnimem.errors import UserError, counted, first_line
from omnimem.limits import exceeds
from omnimem.media import FileSource, MediaError, Source
from omnimem.rows import judge, tracks_of
from omnimem.ui import LOCAL
from omnimem.ui.files import FileError, Library, Uploads
from omnimem.ui.session import Busy, Choice, Feed, Session, said

TEMPLATE = Path(__file__).with_name("page.html")
HEADER = "x-omnimem"  # of every request that changes something: pages of other sites cannot send it
BODY = 300_000  # bytes of a JSON body
CAMERA = 16_000_000  # bytes of one part of a camera
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@final
class Stage:
    """The model, the files, and the one stream that is read."""

    def __init__(self, model: Loaded, library: Library, uploads: Uploads) -> None:
        self.model, self.library, self.uploads = model, library, uploads
        self.session: Session | None = None
        self.count = 0  # of streams so far
        self._changing, self._receiving = threading.Lock(), threading.Lock()

    def start(self, wanted: dict[str, Any]) -> Session:
        """Begin to read what the page chose; a stream that is complete is dropped. Raises UserError."""
        with self._changing:
            if self.session is not None and self.session.reading:
                raise Busy("a stream is being read; end it first")
            choice = self._choice(wanted)
            if self.session is not None:
                self.session.stop()
            self.count += 1
            self.session = Session(choice, self.count)
            self.session.start()
            return self.session

    def end(self) -> None:
        """The stream ends here."""
        if self.session is not None:
            self.session.finish()

    def close(self) -> None:
        """End the stream, remove uploads."""
        if self.session is not None:
            self.session.stop()
        self.uploads.close()

    async def receive(self, name: str, size: int | None, parts: Any) -> None:
        """Write an upload, one at a time."""
        if not self._receiving.acquire(blocking=False):
            raise Busy("another upload is being received; wait for its end")
        try:
            await self.uploads.receive(name, size, parts)
        finally:
            self._receiving.release()

    def _choice(self, wanted: dict[str, Any]) -> Choice:
        # 1. the memory
        slots, policy = wanted.get("slots"), wanted.get("policy")
        if not (slots is None or (isinstance(slots, int) and not isinstance(slots, bool) and 0 <= slots <= 10**7)):
            raise UserError("slots: expected a whole number, or 0 to keep everything")
        if not (policy is None or policy in POLICIES):
            raise UserError(f"policy: expected one of {', '.join(POLICIES)}")
        model = self.model.with_memory(slots, policy)
        kept = "everything is kept" if model.slots is None else f"{counted(model.slots, 'slot')} per layer"
        settings = f"{model.policy.name}, {kept}" if model.slots is not None else kept
        # 2. the stream
        feeder, feed = model.feeder, None
        if wanted.get("camera") is True:
            feed = Feed()
            opened: Callable[[], Source] = Camera(feed, model).source
            return Choice(title="camera", kind="camera", model=model, open=opened, settings=settings, feed=feed)
        if wanted.get("upload") is True:
            if self.uploads.latest is None:
                raise FileError("nothing was uploaded; choose a file")
            kind, (title, path) = "upload", self.uploads.latest
            self.uploads.used = path
        else:
            if not isinstance(wanted.get("file"), str):
                raise FileError("choose a file, an upload or a camera")
            kind, title, path = "file", wanted["file"], self.library.file(wanted["file"])
        sample = Sample(id=title, video=path, audio=None, messages=())
        try:
            options = feeder.options.source(tracks_of(sample, feeder.options.tracks))
        except MediaError as error:
            raise FileError(said(error, title)) from error
        source = FileSource(path, options=options, geometry=feeder.backbone.geometry)
        return Choice(
            title=title,
            kind=kind,
            model=model,
            open=lambda: source,
            settings=settings,
            seconds=judge(sample, feeder.options.tracks).seconds,
            paced=wanted.get("paced") is True,
        )


@final
class Camera:
    """The live stream of a feed, whose tracks are known once its header has arrived."""

    def __init__(self, feed: Feed, model: Loaded) -> None:
        self.feed, self.model = feed, model

    def source(self) -> Source:
        """Waits for the header. Raises MediaError."""
        return live_source(self.feed, self.model.feeder, "camera")[0]


def make_app(stage: Stage, *, host: str) -> Any:
    """The application; requests must name `host` or a local address. It holds no state but `stage`."""
    app = FastAPI(title="OmniMem", docs_url=None, redoc_url=None, openapi_url=None)
    page = page_template(TEMPLATE).render(
        policies=POLICIES,
        policy=stage.model.policy.name,
        slots=stage.model.slots,
        shared=stage.library.root is not None,
        model=stage.model.given.model,
    )

    @app.middleware("http")
    async def guarded(request: Request, call_next: Any) -> Any:
        # 1. who asks: a name that resolves to this machine, or a page of another site, may not
        answer = None
        if not _known(request.headers.get("host", ""), host):
            answer = _problem(f"this server is {host}; open its own address", 421)
        elif request.method not in ("GET", "HEAD") and HEADER not in request.headers:
            answer = _problem(f"the header {HEADER} is missing", 403)
        # 2. the answer
        answer = answer or await call_next(request)
        answer.headers.update(HEADERS)
        return answer

    @app.exception_handler(UserError)
    def refused(_request: Request, error: UserError) -> Any:
        return _problem(str(error).splitlines()[0], 409 if isinstance(error, Busy) else 400)

    @app.get("/")
    def index() -> Any:
        return responses.HTMLResponse(page)

    _add_actions(app, stage)
    _add_views(app, stage)
    return app


def _add_actions(app: FastAPI, stage: Stage) -> None:
    """What the page asks to be done."""

    @app.put("/api/upload")
    async def upload(request: Request, name: str) -> Any:
        length = request.headers.get("content-length", "")
        await stage.receive(name, int(length) if length.isdigit() else None, request.stream())
        return {"name": Path(name).name}

    @app.post("/api/start")
    async def start(request: Request) -> Any:
        wanted = await _json(request)
        session = await run_in_threadpool(stage.start, wanted)
        return {"title": session.choice.title}

    @app.post("/api/end")
    def end() -> Any:
        stage.end()
        return {}

    @app.post("/api/camera")
    async def camera(request: Request) -> Any:
        feed = stage.session.choice.feed if stage.session else None
        if feed is None:
            raise Busy("no camera was started")
        feed.put(await _body(request, CAMERA))
        return {}

    @app.post("/api/ask")
    async def ask(request: Request) -> Any:
        text = (await _json(request)).get("question")
        if not isinstance(text, str) or not text.strip():
            raise UserError("type a question")
        if what := exceeds("text_characters", len(text)):
            raise UserError(f"the question: {what}")
        if stage.session is None:
            raise Busy("no stream was chosen; start one")
        stage.session.ask(text.strip())
        return {}


def _add_views(app: FastAPI, stage: Stage) -> None:
    """What the page shows."""

    @app.get("/api/files")
    def files(path: str = "") -> Any:
        return stage.library.listing(path)

    @app.get("/api/state")
    def state(version: int = -1, session: int = 0) -> Any:
        now = stage.session
        if now is None:
            return {"version": 0, "session": 0, "phase": "none"}
        if session == now.number and version == now.version:
            return responses.Response(status_code=204)
        return {**now.state(), "session": now.number}

    @app.get("/api/picture/{time}")
    def picture(time: int) -> Any:
        return _image(stage.session.picture(time) if stage.session else None)

    @app.get("/api/now")
    def now() -> Any:
        return _image(stage.session.now if stage.session else None)


def _known(given: str, host: str) -> bool:
    """Whether a request may name this server so: as it was started, as local, or beyond loopback by any address."""
    try:
        name = urlsplit(f"//{given}").hostname or ""
        if name in (*LOCAL, host):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return host not in LOCAL


def _problem(what: str, code: int) -> Any:
    return responses.JSONResponse({"error": what}, status_code=code)


def _image(content: bytes | None) -> Any:
    if not content:
        return responses.Response(status_code=404)
    return responses.Response(content, media_type="image/jpeg")


async def _body(request: Any, most: int) -> bytes:
    """The body of a request. Raises UserError above `most` bytes."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise UserError(f"the request has more than {counted(most, 'byte')}")
    return bytes(content)


async def _json(request: Any) -> dict[str, Any]:
    content = await _body(request, BODY)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request is not JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise UserError("the request is not a JSON object")
    return found
