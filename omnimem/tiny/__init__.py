"""The bundled tiny checkpoint: its configuration, towers and training batches."""
