"""Benchmarks: one file each; samples, prompts, answer extraction, accuracy."""

from omnimem.benchmarks.base import Benchmark, Defect, Gap, Verdict
from omnimem.benchmarks.recall import RecallOptions

BenchmarkOptions = RecallOptions

__all__ = ["Benchmark", "BenchmarkOptions", "Defect", "Gap", "RecallOptions", "Verdict"]
