"""Where the checkout is, and what its lock pins."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def pins(root: Path) -> dict[str, str]:
    """Version of each distribution in ``constraints.txt``, by its normalised name."""
    lines = (root / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-").replace(".", "-"): version for name, version in pairs}
