"""Fixtures of the inference tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from infer_worlds import World, make_graph

from gkd_dist.config import InferConfig


@pytest.fixture
def make_world(tmp_path: Path) -> Callable[..., World]:
    """Makes a `World` around a random graph."""
    return lambda **options: World(tmp_path, make_graph(**options))


@pytest.fixture
def exact() -> InferConfig:
    """Settings that store what was computed, bit for bit, in this process."""
    return InferConfig(num_actors=0, dtype="fp32", threads=1)
