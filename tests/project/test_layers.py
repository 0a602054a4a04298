"""The picture of the package is still true: imports point down, heavy dependencies have one door."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LINT = Path(sys.executable).with_name("lint-imports")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the package ``folder/gkd_dist`` against the contracts in ``folder/pyproject.toml``."""
    return subprocess.run([LINT, "--no-cache", "--no-logo"], cwd=folder, capture_output=True, text=True, timeout=110)


def test_the_contracts_hold(root: Path) -> None:
    result = lint(root)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("errors.py", "import gkd_dist.graph", "imports only point down BROKEN"),
        ("stream/order.py", "import gkd_dist.infer.plan", "imports only point down BROKEN"),
        ("losses/lsp.py", "import ray", "Ray only in infer and distill.placement BROKEN"),
        ("world.py", "import deepspeed", "DeepSpeed only in distill.engine BROKEN"),
        ("graph.py", "import fsspec", "fsspec and its drivers only behind storage BROKEN"),
        ("layout.py", "import torch", "import in milliseconds BROKEN"),
    ],
)
def test_a_wrong_import_breaks_a_contract(root: Path, tmp_path: Path, module: str, line: str, broken: str) -> None:
    shutil.copytree(root / "gkd_dist", tmp_path / "gkd_dist")
    shutil.copy(root / "pyproject.toml", tmp_path)
    with (tmp_path / "gkd_dist" / module).open("a") as file:
        file.write(f"\n{line}\n")

    result = lint(tmp_path)

    assert result.returncode == 1
    assert broken in result.stdout


def uses_of_torch_distributed(source: str) -> Iterator[int]:
    """Lines that import ``torch.distributed`` or reach it as an attribute of ``torch``."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names) if any(name.name.startswith("torch.distributed") for name in names):
                yield node.lineno
            case ast.ImportFrom(module=str(module)) if module.startswith("torch.distributed"):
                yield node.lineno
            case ast.ImportFrom(module="torch", names=names) if any(name.name == "distributed" for name in names):
                yield node.lineno
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield node.lineno


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "torch.distributed.barrier()",
    ],
)
def test_every_way_to_torch_distributed_is_seen(source: str) -> None:
    assert list(uses_of_torch_distributed(source)) == [1]


def test_torch_distributed_only_in_world(root: Path) -> None:
    # import-linter knows outside packages by their first name only, hence by hand.
    package = root / "gkd_dist"
    found = {
        f"{path.relative_to(package)}:{line}"
        for path in package.rglob("*.py")
        if path != package / "world.py"
        for line in uses_of_torch_distributed(path.read_text())
    }
    assert found == set()


HEAVY = ["torch", "torch_geometric", "ray", "deepspeed", "fsspec", "numpy"]


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["gkd_dist", "gkd_dist.errors", "gkd_dist.config", "gkd_dist.config_file", "gkd_dist.layout"], HEAVY),
        (["gkd_dist.losses"], ["ray", "deepspeed", "torch_geometric", "s3fs"]),
        (["gkd_dist.cli"], HEAVY),
    ],
)
def test_what_an_import_brings_along(modules: list[str], absent: list[str]) -> None:
    program = f"import sys, {', '.join(modules)}; print(*({set(absent)!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
