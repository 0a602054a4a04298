"""Versions stand in one place, fit together and cover everything that is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("s3", "dev")  # what `make install` installs
PINNED_BY = {"pydantic-core": "pydantic"}  # parts of a declared distribution that it pins exactly


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, object]:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def requirements(project: dict) -> list[Requirement]:
    """What the package and all its extras ask for."""
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for lines in lists for line in lines]


def test_the_lock_holds_exact_versions_and_nothing_of_one_machine(root: Path) -> None:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert wrong == []  # no URL, no path, no +cpu
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert names == sorted(set(names))


def test_every_range_admits_its_pin(project: dict, pins: dict[str, str]) -> None:
    wrong = {
        str(requirement)
        for requirement in requirements(project)
        if not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"))
    }
    assert wrong == set()


def test_every_range_has_a_floor(project: dict) -> None:
    assert [str(need) for need in requirements(project) if ">=" not in str(need.specifier)] == []


def needs(name: str, extras: set[str]) -> list[Requirement]:
    """What the installed distribution ``name`` with ``extras`` asks for on this machine."""
    lines = metadata.requires(name) or []
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [
        requirement
        for requirement in map(Requirement, lines)
        if requirement.marker is None or any(requirement.marker.evaluate(env) for env in environments)
    ]


def test_pins_cover_and_satisfy_all_that_is_installed(pins: dict[str, str]) -> None:
    todo: list[tuple[str, frozenset[str]]] = [("gkd-dist", frozenset(EXTRAS))]
    seen = set(todo)
    wrong = set()
    while todo:
        name, extras = todo.pop()
        for need in needs(name, set(extras)):
            child = (canonicalize_name(need.name), frozenset(need.extras))
            if child[0] == "gkd-dist":
                continue
            if not need.specifier.contains(pins.get(child[0], "0"), prereleases=True):
                wrong.add(f"{name} needs {need}, pinned is {pins.get(child[0], 'nothing')}")
            if child not in seen and child[0] in pins:
                seen.add(child)
                todo.append(child)
    assert wrong == set()
    assert len(seen) > 100  # the walk did go through the tree


def imported(path: Path) -> set[str]:
    """First names of the modules that ``path`` imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_what_the_package_imports_is_declared(root: Path, project: dict) -> None:
    outside = {
        module
        for path in (root / "gkd_dist").rglob("*.py")
        for module in imported(path) - set(sys.stdlib_module_names) - {"gkd_dist"}
    }
    providers = metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in requirements(project)}
    declared |= {part for part, whole in PINNED_BY.items() if whole in declared}
    undeclared = {
        module for module in outside if not declared & {canonicalize_name(d) for d in providers.get(module, [module])}
    }
    assert undeclared == set()
