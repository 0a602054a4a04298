"""Compiled scores: one compilation for all sizes, the same values and gradients, and machines without a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gkd_dist.losses.fused import compiler_problem, fused_scores

ROOT = Path(__file__).parents[3]


def run_python(*arguments: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env, timeout=280).stdout


@pytest.mark.timeout(300)
def test_one_compilation_serves_all_sizes_and_gives_the_same_numbers() -> None:
    report = json.loads(run_python(str(Path(__file__).with_name("compiled_probe.py"))))
    # Three loops (cosine is dot of directions) in fp32, and again in fp64 for the gradients' check.
    assert report["compilations"] == 6
    assert report["gap"] < 1e-4
    assert report["gradcheck"]
    assert report["repeatable"]


def test_without_a_compiler_the_reason_is_told(tmp_path: Path) -> None:
    script = "from gkd_dist.losses.fused import compiler_problem; print(compiler_problem())"
    # No g++ on the path, and nothing that was compiled before.
    told = run_python("-c", script, PATH=str(tmp_path), CXX="g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert "compiler" in told.lower()


def test_with_a_compiler_there_is_no_problem() -> None:
    assert compiler_problem() is None


@pytest.mark.parametrize("wrong", [-1, 4])
def test_ends_that_do_not_exist_are_found_before_the_loop(wrong: int) -> None:
    good, bad = torch.tensor([0, 1, 3]), torch.tensor([0, wrong, 2])
    for rows, cols in ((good, bad), (bad, good)):
        with pytest.raises(IndexError, match=f"row {wrong} of 4"):
            fused_scores(torch.zeros(4, 3), rows, cols, "dot")


def test_sizes_that_a_compiler_would_take_for_constants_stay_out() -> None:
    for num_nodes, num_edges, width in ((1, 5, 3), (5, 1, 3), (5, 5, 1), (0, 0, 3)):
        ends = torch.zeros(num_edges, dtype=torch.int64)
        assert fused_scores(torch.zeros(num_nodes, width), ends, ends, "dot") is None
