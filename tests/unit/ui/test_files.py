"""Files that the page may read: no path leads out of the shared folder, and uploads are bounded."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from omnimem.limits import RAISED
from omnimem.ui.files import FileError, Library, Uploads


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """A folder with two videos; beside it a file, to which a link leads."""
    root = tmp_path / "root"
    (root / "talks").mkdir(parents=True)
    (root / "a.mp4").write_bytes(b"a")
    (root / "talks" / "B.MKV").write_bytes(b"bb")
    (root / "notes.txt").write_text("no video")
    (root / ".hidden.mp4").write_bytes(b"h")
    (tmp_path / "secret.mp4").write_bytes(b"s")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "up").symlink_to(tmp_path)
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "c.mp4").write_bytes(b"c")
    return Library(root)


def test_a_folder_lists_what_can_be_read(library) -> None:
    found = library.listing("")
    assert (found["root"], found["folders"]) == ("root", ["talks"])
    assert found["files"] == [{"name": "a.mp4", "bytes": 1}]
    assert library.listing("talks")["files"] == [{"name": "B.MKV", "bytes": 2}]
    assert library.file("talks/B.MKV").read_bytes() == b"bb"
    assert Library(None).listing("")["root"] is None


@pytest.mark.parametrize(
    "path",
    [
        "../secret.mp4",
        "talks/../../secret.mp4",
        "/etc/passwd",
        "../root2/c.mp4",
        "link.mp4",
        "up/secret.mp4",
        "loop.mp4",
        "a.mp4\0.txt",
        "a" * 5000,
        "missing.mp4",
        "notes.txt",
        "talks",
        "",
    ],
)
def test_nothing_else_is_given_out(library, path) -> None:
    with pytest.raises(FileError):
        library.file(path)


@pytest.mark.parametrize("path", ["..", "up", "/", "a.mp4", "missing"])
def test_no_other_folder_is_listed(library, path) -> None:
    with pytest.raises(FileError):
        library.listing(path)


def test_a_missing_folder_is_refused(tmp_path) -> None:
    with pytest.raises(FileError, match="is not a folder"):
        Library(tmp_path / "missing")
    with pytest.raises(FileError, match="no folder is shared"):
        Library(None).file("a.mp4")


async def parts(*content: bytes) -> AsyncIterator[bytes]:
    for part in content:
        yield part


async def broken_off(error: type[BaseException]) -> AsyncIterator[bytes]:
    yield b"1"
    raise error


def test_an_upload_replaces_the_one_before_but_for_the_one_in_use() -> None:
    uploads = Uploads()
    folder = uploads._folder
    for name, used in (("one.mp4", False), ("two.mp4", True), ("three.mp4", False)):
        asyncio.run(uploads.receive(f"/some/where/{name}", None, parts(b"1", b"2")))
        assert uploads.latest is not None
        assert uploads.latest[0] == name
        assert uploads.latest[1].read_bytes() == b"12"
        uploads.used = uploads.latest[1] if used else uploads.used
    assert [path.name for path in sorted(folder.iterdir())] == ["2.mp4", "3.mp4"]
    uploads.close()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "size", "content", "what"),
    [
        ("a.exe", None, parts(b"1"), "not a media file"),
        ("a.mp4", None, parts(), "is empty"),
        ("a.mp4", 11, parts(b"1"), "more than upload_bytes = 10"),
        ("a.mp4", 1, parts(b"123456", b"123456"), "more than upload_bytes = 10"),
        ("a.mp4", None, broken_off(ConnectionResetError), "^$"),
        ("a.mp4", None, broken_off(asyncio.CancelledError), "^$"),
    ],
    ids=["kind", "empty", "announced", "sent", "broken off", "cancelled"],
)
def test_a_refused_upload_leaves_nothing(monkeypatch, name, size, content, what) -> None:
    monkeypatch.setenv(RAISED, "upload_bytes=10")
    uploads = Uploads()
    with pytest.raises((FileError, ConnectionResetError, asyncio.CancelledError), match=what):
        asyncio.run(uploads.receive(name, size, content))
    assert list(uploads._folder.iterdir()) == []
    assert uploads.latest is None
    uploads.close()
