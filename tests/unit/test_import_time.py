"""Importing a part of the package brings in no library that it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def libraries_of(module: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``import module``."""
    command = [sys.executable, "-c", PROGRAM, module]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout.split())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("gkd_dist", {"torch", "ray", "deepspeed", "pydantic", "fsspec"}),
        ("gkd_dist.config_file", {"torch", "ray", "deepspeed", "numpy", "fsspec"}),
        ("gkd_dist.flow", {"torch", "ray", "deepspeed", "torch_geometric"}),
        ("gkd_dist.cli", {"torch", "ray", "deepspeed", "torch_geometric"}),
        ("gkd_dist.losses", {"ray", "deepspeed", "torch_geometric", "fsspec"}),
        ("gkd_dist.infer.run", {"deepspeed"}),
    ],
)
def test_import_stays_light(module: str, absent: set[str]) -> None:
    found = libraries_of(module)
    assert "gkd_dist" in found
    assert found.isdisjoint(absent)
