"""Streaming: chunks pass through the model and its memory; questions are answered on a fork."""
