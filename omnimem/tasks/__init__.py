"""Benchmarks, one file each: samples, prompts, answer extraction (omnimem/tasks/rules.py), accuracy."""

from typing import Annotated

from pydantic import Field

from omnimem.tasks.annotations import Defect
from omnimem.tasks.base import AnnotatedBenchmark, Benchmark, Gap, Published
from omnimem.tasks.lvbench import LVBenchOptions
from omnimem.tasks.lvomnibench import LVOmniBenchOptions
from omnimem.tasks.own import OwnOptions
from omnimem.tasks.recall import RecallOptions
from omnimem.tasks.rules import Verdict
from omnimem.tasks.streamingbench import StreamingBenchOptions
from omnimem.tasks.video_mme import VideoMMEOptions

BenchmarkOptions = Annotated[
    RecallOptions | VideoMMEOptions | LVBenchOptions | LVOmniBenchOptions | StreamingBenchOptions | OwnOptions,
    Field(discriminator="name"),
]

__all__ = [
    "AnnotatedBenchmark",
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
