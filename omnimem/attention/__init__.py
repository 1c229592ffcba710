"""Attention output and attention mass per key: `reference` is slow and obvious, `blocked` runs on any device."""
