"""Texts of benchmarks/real_lm.py: prose of files that a Debian machine and the project's own wheels hold.

No text is part of the repository. `real_lm_texts.json` lists the files by source, with the sha256 of the prose that was
read from each; a file that is absent or has another digest is reported. Texts are split by file: development texts
choose, test texts are read once.
"""

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Literal, final

from omnimem.errors import UserError

LIST = Path(__file__).with_name("real_lm_texts.json")
Split = Literal["development", "test"]
PARAGRAPH = 60  # characters of the shortest paragraph that is prose
LETTERS = 0.93  # fraction of letters, spaces and simple punctuation in prose
LEAST = 6500  # characters of the shortest text: more than 1,152 tokens
DEVELOPMENT = 0.36  # fraction of the files of a source


class TextError(UserError):
    """Texts of the list that this machine lacks; the message says how to get them."""


def _docstrings(raw: str) -> str:
    """All docstrings of a Python file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(raw)) if isinstance(node, kinds))
    return "\n\n".join(cleandoc(text) for text in found if text)


def _topics(raw: str) -> str:
    """All strings of a Python file: the topics of pydoc."""
    strings = [node.value for node in ast.walk(ast.parse(raw)) if isinstance(node, ast.Constant)]
    return "\n\n".join(text for text in strings if isinstance(text, str) and len(text) > 500)


def _pod(raw: str) -> str:
    """Perl's documentation without commands, verbatim paragraphs and formatting codes."""
    parts = [part for part in re.split(r"\n\s*\n", raw) if not part.startswith(("=", " ", "\t"))]
    text = "\n\n".join(parts)
    for _ in range(3):
        text = re.sub(r"[BCFILS]<+ ?([^<>]*?) ?>+", r"\1", re.sub(r"[XZ]<[^<>]*>", "", text))
    return text


def _description(raw: str) -> str:
    """The long description of a package, without blocks of code."""
    return re.sub(r"```.*?```", "", raw.partition("\n\n")[2], flags=re.DOTALL)


def _fortunes(raw: str) -> str:
    return raw.replace("\n%\n", "\n\n")


@final
@dataclass(frozen=True)
class Source:
    """Files of one kind: below `root`, how to read their prose, how many are listed, and the licence."""

    root: str  # a path of sysconfig, or a folder
    pattern: str
    read: Callable[[str], str]
    count: int
    licence: str


SOURCES: Mapping[str, Source] = {
    "perl": Source("/usr/share", "perl/*.*.*/pod/*.pod", _pod, 30, "Artistic or GPL (Debian perl-doc)"),
    "wheels": Source("purelib", "*/**/*.py", _docstrings, 36, "of each package (constraints.txt)"),
    "stdlib": Source("stdlib", "*.py", _docstrings, 12, "PSF"),
    "pydoc": Source("stdlib", "pydoc_data/topics.py", _topics, 1, "PSF"),
    "descriptions": Source("purelib", "*.dist-info/METADATA", _description, 14, "of each package (constraints.txt)"),
    "licences": Source("/usr/share", "common-licenses/*", str, 8, "verbatim copies (Debian base-files)"),
    "fortunes": Source("/usr/share", "games/fortunes/*", _fortunes, 14, "Debian fortunes, BSD"),
}
WHEELS = ("scipy", "sympy", "networkx", "matplotlib", "pandas", "torch", "transformers", "numpy", "peft", "datasets")
SHARED = 0.1  # fraction of its runs of eight words that a text may share with another
PER_FOLDER = 2  # files of one folder of a wheel


@final
@dataclass(frozen=True)
class Text:
    """One text: its source, file and prose."""

    source: str
    file: str
    split: Split
    prose: str

    @property
    def digest(self) -> str:
        """sha256 of the prose."""
        return hashlib.sha256(self.prose.encode()).hexdigest()


@final
@dataclass(frozen=True)
class Listed:
    """A line of the list."""

    source: str
    file: str
    split: Split
    characters: int
    sha256: str


def prose(raw: str) -> str:
    """The paragraphs of running text: long enough, mostly letters; every one on one line."""
    found = []
    for part in re.split(r"\n\s*\n", raw):
        text = " ".join(part.split())
        plain = sum(letter.isalpha() or letter in " ,.'-;" for letter in text)
        if len(text) >= PARAGRAPH and plain >= LETTERS * len(text) and not text.startswith((">>>", "..", "http", "|")):
            found.append(text)
    return "\n".join(dict.fromkeys(found))


def roots(source: Source, folders: Sequence[Path]) -> Iterator[Path]:
    """Where the files of a source may lie; `folders` are unpacked Debian packages."""
    if not source.root.startswith("/"):
        yield Path(sysconfig.get_paths()[source.root])
        yield from (Path(entry) for entry in _linked()) if source.root == "purelib" else ()
        return
    yield Path(source.root)
    yield from (folder / source.root[1:] for folder in folders)


def _linked() -> Iterator[str]:
    """Folders that .pth files of the environment name."""
    for file in Path(sysconfig.get_paths()["purelib"]).glob("*.pth"):
        yield from (line for line in file.read_text().splitlines() if line.startswith("/"))


def read(source: Source, file: str, folders: Sequence[Path]) -> str | None:
    """The prose of a file; None if it is nowhere, or not text."""
    for root in roots(source, folders):
        path = root / file
        if path.is_file():
            try:
                return prose(source.read(path.read_text(encoding="utf-8")))
            except (UnicodeDecodeError, SyntaxError):
                return None
    return None


def texts(split: Split, folders: Sequence[Path] = (), *, partly: bool = False) -> list[Text]:
    """The listed texts of a split, in the order of the list.

    Raises TextError when texts are absent or differ from the list, unless `partly`: then they are left out.
    """
    listed = [Listed(**row) for row in json.loads(LIST.read_text())["texts"] if row["split"] == split]
    found, problems = [], []
    for row in listed:
        text = read(SOURCES[row.source], row.file, folders)
        if text is None:
            problems.append(f"{row.source}: {row.file} is absent")
        elif (made := Text(row.source, row.file, split, text)).digest != row.sha256:
            problems.append(f"{row.source}: {row.file} is another version")
        else:
            found.append(made)
    if problems and not partly:
        raise TextError(
            "\n".join(
                [
                    *problems,
                    f"{len(problems)} of {len(listed)} texts; install constraints.txt and the Debian packages perl-doc "
                    "and fortunes (or unpack them and give --texts DIR), or pass --partly to leave them out",
                ]
            )
        )
    return found


def write_list(folders: Sequence[Path], seed: int = 0) -> None:
    """Find texts, split them by file with a seeded hash, and write the list.

    A text that shares more than a tenth of its passages with one before it is left out, so that the two splits have
    nothing in common and texts are independent.
    """
    rows: list[Listed] = []
    seen: list[set[int]] = []
    for name, source in SOURCES.items():
        chosen: list[tuple[str, str]] = []
        for file, text in _candidates(name, source, folders, seed):
            passages = _passages(text)
            if all(len(passages & other) <= SHARED * len(passages) for other in seen):
                chosen.append((file, text))
                seen.append(passages)
            if len(chosen) == source.count:
                break
        limit = round(DEVELOPMENT * len(chosen))
        for number, (file, text) in enumerate(chosen):
            split: Split = "development" if number < limit else "test"
            rows.append(Listed(name, file, split, len(text), hashlib.sha256(text.encode()).hexdigest()))
    rows.sort(key=lambda row: _key(seed, row.file))
    LIST.write_text(json.dumps({"seed": seed, "texts": [asdict(row) for row in rows]}, indent=1) + "\n")


def _candidates(name: str, source: Source, folders: Sequence[Path], seed: int) -> Iterator[tuple[str, str]]:
    """Files of a source with enough prose, in an order of a seeded hash; few of one folder of a wheel."""
    counts: dict[str, int] = {}
    files = {str(path.relative_to(root)) for root in roots(source, folders) for path in root.glob(source.pattern)}
    for file in sorted(files, key=lambda each: _key(seed, each)):
        place = str(Path(file).parent) if name == "wheels" else file
        known = name != "wheels" or file.split("/")[0] in WHEELS
        if file.endswith(".u8") or "/tests/" in file or not known or counts.get(place, 0) >= PER_FOLDER:
            continue
        text = read(source, file, folders)
        if text is not None and len(text) >= LEAST:
            counts[place] = counts.get(place, 0) + 1
            yield file, text


def _passages(text: str) -> set[int]:
    """Hashes of all runs of eight words."""
    words = text.split()
    return {hash(tuple(words[first : first + 8])) for first in range(len(words) - 7)}


def _key(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
