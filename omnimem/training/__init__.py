"""The training loop: one trainer, and the objects it owns for batches, checkpoints, metrics and interruptions."""
