"""Fixtures of tests that train."""

from pathlib import Path

import pytest
from support.tiny_run import write_videos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint, videos, manifests and configs, shared by all runs of a module."""
    return write_videos(tmp_path_factory.mktemp("runs"))
