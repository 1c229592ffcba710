"""Benchmarks: one file each; samples, prompts, answer extraction, accuracy."""

from typing import Annotated

from pydantic import Field

from omnimem.benchmarks.base import Benchmark, Defect, Gap, Published, Verdict
from omnimem.benchmarks.lvbench import LVBenchOptions
from omnimem.benchmarks.lvomnibench import LVOmniBenchOptions
from omnimem.benchmarks.own import OwnOptions
from omnimem.benchmarks.recall import RecallOptions
from omnimem.benchmarks.streamingbench import StreamingBenchOptions
from omnimem.benchmarks.video_mme import VideoMMEOptions

BenchmarkOptions = Annotated[
    RecallOptions | VideoMMEOptions | LVBenchOptions | LVOmniBenchOptions | StreamingBenchOptions | OwnOptions,
    Field(discriminator="name"),
]

__all__ = [
    "Benchmark",
    "BenchmarkOptions",
    "Defect",
    "Gap",
    "LVBenchOptions",
    "LVOmniBenchOptions",
    "OwnOptions",
    "Published",
    "RecallOptions",
    "StreamingBenchOptions",
    "Verdict",
    "VideoMMEOptions",
]
