"""The expected size of the encoder cache of a run, for its dry run."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from omnimem.backbones.projectors import Track
from omnimem.backbones.shapes import Shapes
from omnimem.config import RunConfig
from omnimem.data import Sample
from omnimem.errors import counted
from omnimem.footprint import gibibytes
from omnimem.rows import judge
from omnimem.streaming.encoder_cache import RESERVE
from omnimem.tokens import Modality

PROBED = 64  # files whose length is read


def describe_cache(
    run: RunConfig,
    shapes: Shapes,
    tokens: dict[Modality, int],
    seconds: float,
    samples: Sequence[Sample],
    unprojected: Sequence[Track] = (),
) -> Iterator[str]:
    """The size of all entries, estimated from one sample of `tokens` in `seconds`; nothing without `data.cache`.

    width x (audio + visual x (1 + deepstack levels)) x bytes of model.dtype per second of stream, times the mean length
    of those of PROBED samples that can be read, times the number of streams. Without samples, the size per hour alone.
    Tracks whose projector is trained (`unprojected`) have the width of its input.
    """
    cache = run.data.cached
    if cache is None or seconds <= 0:
        return
    # 1. bytes per second of stream
    rate = encoded_bytes(shapes, tokens, getattr(torch, run.model.dtype), unprojected) / seconds
    yield f"~ {gibibytes(round(3600 * rate))} per hour of stream, in {cache.folder}"
    # 2. all streams
    streams = {(each.video, each.audio, each.start, each.end, each.times): each for each in samples if each.has_stream}
    if not streams:
        return
    every = list(streams.values())
    probed = (_seconds(each, run) for each in every[:: -(-len(every) // PROBED)])
    lengths = [seconds for seconds in probed if seconds > 0]
    if not lengths:
        yield f"the size of {counted(len(every), 'stream')} is unknown: no file tells its length"
        return
    total = round(rate * sum(lengths) / len(lengths) * len(every))
    limit = "no limit" if cache.size_gb is None else f"limit {cache.size_gb:g} GB"
    yield (
        f"~ {gibibytes(total)} for {counted(len(every), 'stream')} of {sum(lengths) / len(lengths):,.1f} s on "
        f"average; {limit}"
    )
    # 3. where it does not fit
    if cache.size_gb is not None and total > cache.size_gb * 1e9:
        yield "more than the limit: entries are removed before they are read again; raise data.cache.size_gb"
    place = next(
        path for path in (Path(cache.folder).absolute(), *Path(cache.folder).absolute().parents) if path.exists()
    )
    if total > (free := shutil.disk_usage(place).free - RESERVE):
        yield f"more than the {gibibytes(max(0, free))} that entries may take of this disk; set data.cache.folder"


def encoded_bytes(
    shapes: Shapes, tokens: dict[Modality, int], dtype: torch.dtype, unprojected: Sequence[Track] = ()
) -> int:
    """Bytes of encoded tokens; an input of a projector has the width of the encoder, of vision times a token's patches.

    Of the audio branch of video-SALMONN 2+, whose projector reads the Q-Former, this is an approximation.
    """
    visual = audio = shapes.text.width
    if "visual" in unprojected:
        visual = shapes.vision.width * shapes.geometry.merge**2
    if "audio" in unprojected and shapes.audio is not None:
        audio = shapes.audio.width
    values = tokens[Modality.AUDIO] * audio + tokens[Modality.VISUAL] * (1 + shapes.vision.levels) * visual
    return values * dtype.itemsize


def _seconds(sample: Sample, run: RunConfig) -> float:
    """Length of the stream of a sample, from the headers of its files; 0 if it cannot be read, or is not known."""
    whole = judge(sample, run.stream.tracks).seconds
    return max(0.0, (whole if sample.end is None else min(whole, sample.end)) - sample.start)
