"""Attention output and mass per key: `reference` is slow and obvious, `blocked` runs anywhere, `fused` on GPUs."""
