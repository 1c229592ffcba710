"""Training rows from manifests, files of rows and data sets of `datasets`, alone or several with weights.

Rows of files are read as text, exactly as written; a data set has declared types, and one that would have to guess them
(JSON) is read from its files. Every sample has an id, so the order of an epoch never depends on how rows are read.
"""

import hashlib
import os.path
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from omnimem.absent import as_url, why_absent
from omnimem.aside import written_aside
from omnimem.data import DataOptions, DataSource, Sample, read_manifest
from omnimem.errors import counted, first_line
from omnimem.extras import optional
from omnimem.formats import Target, convert_row
from omnimem.media import FrameList
from omnimem.textfile import ManifestError, got, parse_json, read_objects, read_text

datasets = optional("datasets")

Rows = Iterable[tuple[str, dict[str, Any]]]  # each with its origin

MEDIA = Path(".cache/media")  # media that data sets hold as bytes
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TYPED = ("parquet", "arrow")  # builders whose files declare the types of their columns
NO_FILE = "give a manifest, a .json or .jsonl file, a folder of a data set, or a hub id (owner/name)"


def training_samples(options: DataOptions) -> list[Sample]:
    """The samples of all sources of `data.train`, in order; those of several are named `source/id`.

    Raises ManifestError with all problems of all sources.
    """
    # 1. read
    sources, problems, found = options.sources, [], []
    for source in sources:
        try:
            samples = read_source(source, allow_absolute=options.allow_absolute_paths)
        except ManifestError as error:
            problems += error.problems
            continue
        if len(sources) > 1:
            samples = [replace(each, id=f"{source.label}/{each.id}", source=source.label) for each in samples]
        found += samples
    # 2. a run needs streams, however many rows are text alone
    if not problems and not any(sample.has_stream for sample in found):
        names = ", ".join(source.path for source in sources)
        problems.append(f"{names}: every row is text alone; name a video or audio file in some of them")
    if problems:
        raise ManifestError(problems)
    return found


def read_source(source: DataSource, *, allow_absolute: bool) -> list[Sample]:
    """The samples of one source; raises ManifestError with all problems."""
    if source.is_manifest:
        samples = read_manifest(Path(source.path), allow_absolute=allow_absolute, text_only=True)
        return samples[: source.rows]
    base = source.base
    cure = "give data.train as [{path: ..., media: FOLDER}], or set data.allow_absolute_paths: true"
    target = Target(folder=base, media_root=base, allow_absolute=allow_absolute, cure=cure)
    samples, problems = [], []
    used: dict[str, str] = {}
    for number, (origin, row) in enumerate(islice(rows_of(source), source.rows), start=1):
        try:
            sample, _, remarks = convert_row(row, origin, f"{source.label}-{number:06d}", target)
        except ManifestError as error:
            problems += error.problems
            continue
        if used.setdefault(sample.id, origin) != origin:
            problems.append(f"{origin} id: {sample.id!r} is already used at {used[sample.id]}; rename one")
        samples.append(replace(sample, remarks=tuple(remarks)))
    if problems or not samples:
        raise ManifestError(problems or [f"{source.path}: holds no rows; export it again"])
    return samples


def looked_in(options: DataOptions, sample: Sample) -> str:
    """Where the media of a sample of `data.train` are looked for, and the setting that says so."""
    source = next(each for each in options.sources if sample.source in ("", each.label))
    if source.is_manifest:
        return f"looked for below {source.base}, the folder of {source.path}"
    setting = f"`media` of {source.label} in data.train"
    return f"looked for below {source.base}; {setting} {'says so' if source.media else 'names another folder'}"


def remarks_on(samples: Iterable[Sample]) -> list[str]:
    """What was remarked about the rows of samples, each with the number of rows and one of them."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for sample in samples:
        counts.update(sample.remarks)
        for remark in sample.remarks:
            first.setdefault(remark, sample.origin)
    return [f"{counted(count, 'row')} (such as {first[remark]}): {remark}" for remark, count in counts.items()]


def digest(samples: Iterable[Sample]) -> str:
    """sha256 of what the samples say: ids, files, times and messages."""
    whole = hashlib.sha256()
    for each in samples:
        video = repr(each.video) if isinstance(each.video, FrameList) else str(each.video)
        said = (each.id, video, str(each.audio), each.tracks, each.start, each.end, each.messages)
        said = (*said, each.prefix) if each.prefix else said
        whole.update(f"{said}\n".encode())
    return whole.hexdigest()


def rows_of(source: DataSource) -> Rows:
    """Each row as written, with its origin; raises ManifestError."""
    path = Path(source.path)
    if path.is_file() and path.suffix != ".parquet":
        return read_rows(path)
    if path.exists() or not is_file_name(source.path):
        return _data_set_rows(source)
    raise ManifestError([f"{source.path}: no such file; {why_absent(source.path, NO_FILE)}"])


def missing_sources(options: DataOptions) -> list[str]:
    """The files of `data.train` that do not exist; `data.train` itself if it is not set."""
    gone = [each.path for each in options.sources if is_file_name(each.path) and not Path(each.path).exists()]
    return gone if options.sources else ["data.train is not set"]


def is_file_name(path: str) -> bool:
    """Whether a source must be a file or folder here; other names may be hub ids."""
    return Path(path).suffix in (".json", ".jsonl", ".parquet") or not HUB_ID.fullmatch(path)


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each row of a .json or .jsonl file, with its origin `file:line` (`file:item n` in a JSON array).

    Raises ManifestError.
    """
    # 1. read the lines, or the items of an array
    if not os.path.isfile(path):
        raise ManifestError([f"{as_url(path) or path}: no such file; {why_absent(path, NO_FILE)}"])
    text = read_text(path)
    if text.lstrip().startswith("["):
        items = parse_json(text, str(path), "export it again")
        rows = [(f"{path}:item {number}", item) for number, item in enumerate(items, start=1)]
    else:
        rows = read_objects(path, "write one row per line, or the rows as a list in [ ]")
    # 2. check that they are rows
    problems = [f"{origin}: expected an object, got {got(row)}" for origin, row in rows if not isinstance(row, dict)]
    if problems or not rows:
        raise ManifestError(problems or [f"{path}: holds no rows; export it again"])
    return rows


# ------------------------------------------------------------------------------------------------ data sets of datasets


def _data_set_rows(source: DataSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a folder (of save_to_disk, or of files), of a .parquet file, or of a hub id."""
    path, where = Path(source.path), f"{source.path}[{source.split}]"
    with _explained(source):
        # 1. what save_to_disk has written
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(source.path)
            loaded = _split(source, loaded) if isinstance(loaded, dict) else loaded
        # 2. files of a folder or of the hub
        else:
            name, files = ("parquet", {"data_files": source.path}) if path.is_file() else (source.path, {})
            builder = datasets.load_dataset_builder(name, source.subset, **files)
            cached = builder.name == "cache"  # of the hub, which cannot be reached: what an earlier run has stored
            kind = builder.info.builder_name if cached else builder.name
            if kind == "json" and not cached:
                yield from _json_rows(source, builder)
                return
            if kind not in TYPED:
                what = f"is a data set of the kind {kind}, whose types are guessed"
                cure = "give the folder of `hf download`" if cached else "give parquet, arrow, or JSON lines"
                raise ManifestError([f"{source.path}: {what}; {cure}"])
            how = {**files, "split": source.split, "streaming": source.streaming}
            loaded = datasets.load_dataset(name, source.subset, **how)
        # 3. rows, with media as files
        plain = loaded.features and datasets.Features({key: _undecoded(kind) for key, kind in loaded.features.items()})
        if plain and plain != loaded.features:
            loaded = loaded.cast(plain)
        for number, row in enumerate(loaded, start=1):
            yield f"{where}:row {number}", {key: _with_files(value) for key, value in row.items()}


def _split(source: DataSource, loaded: Any) -> Any:
    if source.split not in loaded:
        known = ", ".join(map(str, loaded))
        raise ManifestError([f"{source.path} split: {source.split!r} is unknown; known: {known}"])
    return loaded[source.split]


def _json_rows(source: DataSource, builder: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of the JSON files of a data set, which Arrow would change on the way (dates, large numbers)."""
    files = _split(source, builder.config.data_files)
    for file in datasets.DownloadManager().download(list(map(str, files))):
        yield from read_rows(Path(file))


def _undecoded(kind: Any) -> Any:
    """A feature with its media as {"path", "bytes"}."""
    if isinstance(kind, dict):
        return {key: _undecoded(each) for key, each in kind.items()}
    if isinstance(kind, datasets.List | datasets.LargeList):
        return replace(kind, feature=_undecoded(kind.feature))
    return replace(kind, decode=False) if isinstance(kind, datasets.Audio | datasets.Video | datasets.Image) else kind


def _with_files(value: Any) -> Any:
    """A value with {"path", "bytes"} replaced by a path; bytes are written to `.cache/media` once, by their sha256."""
    if isinstance(value, dict):
        if value.keys() != {"path", "bytes"}:
            return {key: _with_files(each) for key, each in value.items()}
        path, content = value["path"], value["bytes"]
        if content is None:
            return path
        place = MEDIA / (hashlib.sha256(content).hexdigest() + Path(path or "").suffix)
        if not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(place) as partial:
                partial.write_bytes(content)
        return place
    return [_with_files(each) for each in value] if isinstance(value, list) else value


@contextmanager
def _explained(source: DataSource) -> Iterator[None]:
    """Turns errors of `datasets` into one line."""
    try:
        yield
    except (ManifestError, MemoryError):
        raise
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        what = "is a data set, and datasets is not installed; pip install 'omnimem[train]'"
        raise ManifestError([f"{source.path}: {what}"]) from error
    except Exception as error:  # datasets and its readers raise many kinds for a damaged or absent data set
        what = f"cannot be read as a data set ({type(error).__name__}: {first_line(error)[:200]})"
        cure = "check its name, split and subset; of a data set of the hub the folder of `hf download` will do too"
        raise ManifestError([f"{source.path}[{source.split}]: {what}; {cure}"]) from error


def named(sources: Sequence[DataSource]) -> str:
    """The sources for a message."""
    return ", ".join(source.path for source in sources)
