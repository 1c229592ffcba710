"""Benchmarks: one file each; samples, answer extraction, accuracy."""

from omnimem.benchmarks.base import Benchmark
from omnimem.benchmarks.recall import RecallOptions

BenchmarkOptions = RecallOptions

__all__ = ["Benchmark", "BenchmarkOptions", "RecallOptions"]
