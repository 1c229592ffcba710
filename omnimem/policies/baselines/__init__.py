"""Baselines: the methods that OmniMem is compared with, one per file."""
