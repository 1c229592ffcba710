"""Measurements of the project; every module is a script, run from anywhere as `python benchmarks/NAME.py`."""
