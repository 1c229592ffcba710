"""A path that names no file here is repaired in the message, wherever a media file or a manifest is missing."""

import json
import os
import unicodedata
from pathlib import Path

import pytest

from omnimem.absent import as_url, why_absent
from omnimem.data import ManifestError, read_manifest
from omnimem.media import MediaError, probe
from omnimem.sources import read_rows

E_NFC, E_NFD = (unicodedata.normalize(form, "é.mp4") for form in ("NFC", "NFD"))
PATHS = {  # the path that is given, and what is said; Clips/Café/Talk 1.MP4 and é.mp4 (NFC) exist
    "case of the file": ("Clips/talk 1.mp4", "there is Clips/Talk 1.MP4, which differs in upper and lower case"),
    "case of a folder": ("clips/Talk 1.MP4", "there is Clips/Talk 1.MP4, which differs in upper and lower case"),
    "Unicode form": (E_NFD, r"there is '\xe9.mp4', which differs in Unicode form"),
    "spaces": (" Clips/Talk 1.MP4 ", "there is Clips/Talk 1.MP4, which differs in spaces around it"),
    "percent": ("Clips/Talk%201.MP4", "there is Clips/Talk 1.MP4, which differs in spelling"),
    "backslash": ("Clips\\Talk 1.MP4", "write / in place of \\ between folders: Clips/Talk 1.MP4"),
    "backslash, no such file": ("D:\\v.mp4", "write / in place of \\ between folders"),
    "home": ("~/v.mp4", "~ is not expanded here; write the whole path: "),
    "no such user": ("~nobody-here/v.mp4", "~nobody-here is not expanded here; write the whole path"),
    "variable": ("$HOME/v.mp4", "$HOME is not expanded here; write the whole path: "),
    "URL": ("https://a.org/v.mp4", "is a URL, and only files are read; download it"),
    "S3": ("s3://bucket/v.mp4", "is a URL, and only files are read; download it"),
    "file URL": ("file:///data/v%201.mp4", "is a URL; give the path alone: /data/v 1.mp4"),
    "another name": ("Clips/other.mp4", "check the path"),
    "no folder": ("gone/v.mp4", "check the path"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for place in ("Clips/Talk 1.MP4", E_NFC, "home/v.mp4"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", PATHS)
def test_a_missing_path_is_repaired_for_media_manifests_and_rows(case: str) -> None:
    given, words = PATHS[case]
    assert words in why_absent(given, "check the path")
    with pytest.raises(MediaError) as raised:
        probe(given)
    assert words in str(raised.value)
    assert str(raised.value).startswith(given if given.isprintable() else "")
    for read in (read_manifest, read_rows):
        with pytest.raises(ManifestError) as caught:
            read(Path(given))
        assert words in str(caught.value) or words == "check the path"


@pytest.mark.parametrize("case", [case for case in PATHS if "URL" not in case and case != "S3"])
def test_so_is_a_path_below_the_folder_of_a_manifest(here: Path, case: str) -> None:
    given, words = PATHS[case]
    words = words.removeprefix("there is ").partition("Clips/")[2] or words
    assert words.removeprefix("there is '") in why_absent(here / given, "check the path")


@pytest.mark.parametrize("key", ["video", "audio"])
def test_a_url_in_a_row_is_named_as_it_was_written(here: Path, key: str) -> None:
    row = {"id": "a", key: "https://a.org/v.mp4", "messages": [{"role": "user", "content": "?"}]}
    (here / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ManifestError, match=rf"a.jsonl:1 {key}: https://a.org/v.mp4 is a URL, and only files are read"):
        read_manifest(here / "a.jsonl")


@pytest.mark.parametrize("path", ["a.mp4", "C:/v.mp4", "a:b/c.mp4", "/data/x://y", "odd:/v.mp4"])
def test_a_path_is_no_url(here: Path, path: str) -> None:
    os.makedirs(here / "odd:", exist_ok=True)
    assert as_url(path) is None
