"""The page's server: who may ask, one stream at a time, answers equal to those of `omnimem ask`, cameras, uploads."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from fastapi.testclient import TestClient
from support.thinkers import write_folder

import omnimem.extras
from omnimem.cli.asking import Question, loaded, source_of
from omnimem.cli.parser import run_command
from omnimem.commands import demo_ui
from omnimem.config import ConfigError
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.ui.app import HEADER, Stage, make_app
from omnimem.ui.files import Library, Uploads
from omnimem.ui.session import BUFFERED, WAITING, Busy, Feed

QUESTION, SECONDS, HOST = "what colour was the star ?", 16, "http://127.0.0.1:7860"
MEMORY = ["--slots", "12", "--chunk-tokens", "36", "--max-pixels", "12544", "--max-new-tokens", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random thinker, a shared folder with a video and a file that is none, and the video as a live container."""
    place = tmp_path_factory.mktemp("ui")
    write_folder(place / "model", rates="tiny")
    (place / "root" / "talks").mkdir(parents=True)
    write_mp4(draw_world(3, SECONDS), place / "root" / "talks" / "a.mp4")
    (place / "root" / "broken.mp4").write_bytes(b"no video")
    with av.open(str(place / "root" / "talks" / "a.mp4")) as source, av.open(str(place / "a.mkv"), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
    return place


@pytest.fixture(scope="module")
def stage(folder: Path) -> Iterator[Stage]:
    with loaded(demo_ui._parser().parse(["--model", str(folder / "model"), *MEMORY])) as model:
        stage = Stage(model, Library(folder / "root"), Uploads())
        yield stage
        stage.close()


@pytest.fixture
def client(stage: Stage) -> Iterator[TestClient]:
    with TestClient(make_app(stage, host="127.0.0.1"), base_url=HOST, headers={HEADER: "1"}) as client:
        yield client
        if stage.session is not None:
            stage.session.stop()
        stage.session = None


def until(client: TestClient, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    limit = time.monotonic() + 30
    while not wanted(state := client.get("/api/state").json()):
        assert time.monotonic() < limit, state
        time.sleep(0.02)
    return state


def test_a_file_is_read_and_asked_as_by_the_command(client, stage, folder) -> None:
    assert client.get("/api/state").json() == {"version": 0, "session": 0, "phase": "none"}
    started = client.post("/api/start", json={"file": "talks/a.mp4", "slots": 9})
    assert started.json() == {"title": "talks/a.mp4"}
    until(client, lambda state: state["phase"] == "complete")
    assert client.post("/api/ask", json={"question": f" {QUESTION} "}).json() == {}
    state = until(client, lambda state: bool(state["replies"]))
    # 1. the answer and its memory are those of `omnimem ask`
    model = stage.model.with_memory(9, None)
    source = source_of(str(folder / "root" / "talks" / "a.mp4"), model.feeder, [])
    (reply,) = model.asking.replies(model.stream(), source, [Question(text=QUESTION)])
    (shown,) = state["replies"]
    assert (shown["question"], shown["answer"], shown["at"]) == (QUESTION, reply.answers[0], SECONDS)
    assert shown["cost"][:2] == reply.cost[:2]
    assert sum(state["kept"].values()) == 9
    assert state["arrived"] == {"audio": 16, "visual": 128}
    assert state["settings"] == "omnimem, 9 slots per layer"
    # 2. the timeline holds every token once, the pictures are there
    assert [sum(row[column] for row in state["bins"]) for column in (1, 2)] == [16, 128]
    assert sum(row[3] + row[4] for row in state["bins"]) == pytest.approx(9, abs=0.1)
    assert state["pictures"] == [2000 * number for number in range(8)]
    assert client.get("/api/picture/2000").content[:2] == client.get("/api/now").content[:2] == b"\xff\xd8"
    assert client.get("/api/picture/1").status_code == 404
    # 3. nothing is sent twice
    known = {"version": state["version"], "session": state["session"]}
    assert client.get("/api/state", params=known).status_code == 204


def test_a_camera_is_read_while_it_sends_and_no_other_stream_then(client, folder) -> None:
    assert client.post("/api/camera", content=b"1").json() == {"error": "no camera was started"}
    client.post("/api/start", json={"camera": True})
    second = client.post("/api/start", json={"file": "talks/a.mp4"})
    assert (second.status_code, second.json()) == (409, {"error": "a stream is being read; end it first"})
    content = (folder / "a.mkv").read_bytes()
    for first in range(0, len(content), 20_000):
        assert client.post("/api/camera", content=content[first : first + 20_000]).status_code == 200
    until(client, lambda state: state["seconds"] >= 8)
    client.post("/api/ask", json={"question": QUESTION})
    state = until(client, lambda state: bool(state["replies"]))
    assert state["phase"] == "reading"
    assert state["replies"][0]["at"] >= 8
    client.post("/api/end")
    assert until(client, lambda state: state["phase"] == "complete")["seconds"] == SECONDS
    refused = client.post("/api/camera", content=b"more")
    assert refused.json() == {"error": "the camera has ended; start it again"}
    client.post("/api/ask", json={"question": QUESTION})
    assert len(until(client, lambda state: len(state["replies"]) == 2)["replies"]) == 2


@pytest.mark.parametrize("cut", [0.6, 0.0], ids=["breaks off", "sends nothing"])
def test_a_camera_that_breaks_off_is_asked_about_what_it_sent(client, folder, cut) -> None:
    content = (folder / "a.mkv").read_bytes()
    client.post("/api/start", json={"camera": True})
    if cut:
        client.post("/api/camera", content=content[: int(cut * len(content))])
    client.post("/api/end")
    state = until(client, lambda state: state["phase"] in ("complete", "failed"))
    assert state["phase"] == ("complete" if cut else "failed")
    asked = client.post("/api/ask", json={"question": QUESTION})
    assert asked.status_code == (200 if cut else 409)
    if not cut:
        assert state["error"].startswith("camera: ")


def test_a_stream_as_fast_as_it_plays_can_be_ended_and_asked(client) -> None:
    client.post("/api/start", json={"file": "talks/a.mp4", "paced": True})
    time.sleep(0.3)
    state = until(client, lambda state: state["phase"] in ("opening", "reading"))
    assert state["seconds"] < SECONDS
    client.post("/api/end")
    assert until(client, lambda state: state["phase"] == "complete")["seconds"] < SECONDS
    assert client.post("/api/start", json={"file": "talks/a.mp4"}).status_code == 200


def test_an_upload_is_read_and_named_as_it_was(client, folder) -> None:
    assert "nothing was uploaded" in client.post("/api/start", json={"upload": True}).json()["error"]
    for name, content in (("b.mp4", (folder / "root/talks/a.mp4").read_bytes()), ("c.mp4", b"no video")):
        client.put("/api/upload", params={"name": name}, content=content)
        started = client.post("/api/start", json={"upload": True})
        if name == "b.mp4":
            assert started.json() == {"title": "b.mp4"}
            until(client, lambda state: state["phase"] == "complete")
        else:
            assert started.status_code == 400
            assert started.json()["error"].startswith("c.mp4: cannot be read")
            assert "omnimem-ui-" not in started.text


REFUSED = {
    "a path that leads out": ("/api/start", {"file": "../a.mkv"}, 400, "not below the shared folder"),
    "no media": ("/api/start", {"file": "broken.mp4"}, 400, "broken.mp4: cannot be read"),
    "no choice": ("/api/start", {}, 400, "choose a file"),
    "a policy that is none": ("/api/start", {"file": "talks/a.mp4", "policy": "oracle"}, 400, "policy: expected"),
    "slots below 0": ("/api/start", {"file": "talks/a.mp4", "slots": -1}, 400, "slots: expected"),
    "slots that are no number": ("/api/start", {"file": "talks/a.mp4", "slots": True}, 400, "slots: expected"),
    "no JSON object": ("/api/start", [], 400, "not a JSON object"),
    "no question": ("/api/ask", {"question": " "}, 400, "type a question"),
    "no text": ("/api/ask", {"question": 5}, 400, "type a question"),
    "a long question": ("/api/ask", {"question": "w" * 70_000}, 400, "text_characters"),
    "a huge request": ("/api/ask", {"question": "w" * 400_000}, 400, "more than 300,000 bytes"),
    "no stream": ("/api/ask", {"question": "?"}, 409, "no stream was chosen"),
}


@pytest.mark.parametrize(("path", "content", "code", "what"), REFUSED.values(), ids=REFUSED)
def test_a_request_is_refused_in_one_line(client, path, content, code, what) -> None:
    answer = client.post(path, json=content)
    assert answer.status_code == code
    assert what in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_pages_of_other_sites_can_neither_read_nor_change_anything(stage, client) -> None:
    for host in ("evil.example", "192.168.1.5:7860", "localhost.evil.example", "", "[::1", "a@evil.example"):
        assert client.get("/api/files", headers={"host": host}).status_code == 421
    for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
        assert client.get("/api/files", headers={"host": host}).status_code == 200
    bare = TestClient(make_app(stage, host="127.0.0.1"), base_url=HOST)
    assert {bare.request(method, "/api/end").status_code for method in ("POST", "PUT", "OPTIONS")} == {403}
    for answer in (client.get("/"), client.get("/api/state"), client.get("/missing")):
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers
    opened = TestClient(make_app(stage, host="0.0.0.0"), base_url="http://192.168.1.5")
    assert opened.get("/api/files").status_code == 200
    assert opened.get("/api/files", headers={"host": "evil.example"}).status_code == 421


def test_the_page_needs_no_other_server(client) -> None:
    page = client.get("/").text
    assert "<option selected>omnimem</option>" in page
    assert 'value="12"' in page
    assert "oracle" not in page
    assert all(mark not in page for mark in ("http://", "https://", "//cdn", "@import"))


def test_a_feed_gives_what_has_arrived_and_is_bounded() -> None:
    feed = Feed()
    feed.put(b"abc")
    feed.put(b"de")
    assert [feed.read(2), feed.read(2), feed.read(10)] == [b"ab", b"c", b"de"]
    feed.put(bytes(BUFFERED))
    with pytest.raises(Busy, match="reads more slowly than the camera records"):
        feed.put(b"1")
    feed.end()
    assert len(feed.read()) == BUFFERED
    assert feed.read() == b""


def test_questions_that_wait_are_bounded(client) -> None:
    client.post("/api/start", json={"camera": True})
    codes = [client.post("/api/ask", json={"question": str(number)}).status_code for number in range(WAITING + 1)]
    assert codes == [200] * WAITING + [409]
    assert client.get("/api/state").json()["waiting"] == [str(number) for number in range(WAITING)]
    client.post("/api/end")


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra_the_command_names_it(missing, monkeypatch, capsys) -> None:
    monkeypatch.setattr(omnimem.extras, "find_spec", lambda name: None if name == missing else name)
    monkeypatch.setattr("sys.argv", ["omnimem demo-ui", "--model", "models/tiny"])
    with pytest.raises(SystemExit) as leaving:
        run_command(demo_ui.main)
    assert leaving.value.code == 2
    assert capsys.readouterr().err == f"{missing} is not installed; pip install 'omnimem[ui]'\n"


def test_a_port_in_use_is_one_line_and_other_hosts_are_a_warning(capsys) -> None:
    with demo_ui.listening("127.0.0.1", 0) as place:
        with pytest.raises(ConfigError, match="give another --port"):
            demo_ui.listening("127.0.0.1", place.getsockname()[1])
        assert capsys.readouterr().err == ""
    with demo_ui.listening("0.0.0.0", 0):
        assert "everybody who reaches this machine" in capsys.readouterr().err
