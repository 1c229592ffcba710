"""The tiny checkpoint that is shipped: its configuration, towers and training batches."""
