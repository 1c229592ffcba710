"""The training loop and what keeps it alive: checkpoints, ranks, non-finite steps, signals."""
