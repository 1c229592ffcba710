"""Attention output and mass per key: `reference` is a slow oracle, `blocked` runs on any device, `fused` on GPUs."""
