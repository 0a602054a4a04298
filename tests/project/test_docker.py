"""The image takes its versions from the lock, and its files from the repository."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet


@pytest.fixture(scope="module")
def steps(root: Path) -> list[tuple[str, str]]:
    """Instructions of the Dockerfile as (keyword, rest), continued lines joined."""
    lines = [line for line in (root / "docker" / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(words[0], " ".join(words[1:])) for line in joined.splitlines() if (words := line.split())]


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "docker" / "compose.yaml").read_text())


def stages(steps: list[tuple[str, str]]) -> list[str]:
    return [rest.split()[-1] for keyword, rest in steps if keyword == "FROM"]


def test_no_python_package_has_a_version_here(root: Path, pins: dict[str, str]) -> None:
    versioned = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(?:===|==|~=|>=|<=|@)\s*v?\d")
    found = {
        name
        for file in (root / "docker").iterdir()
        for name in versioned.findall(file.read_text())
        if name.lower().replace("_", "-") in pins
    }
    assert found == set()


def test_every_installation_is_bound_by_the_lock(steps: list[tuple[str, str]]) -> None:
    installs = [
        command
        for keyword, rest in steps
        if keyword == "RUN"
        for command in rest.split("&&")
        if "pip install" in command
    ]
    assert len(installs) == 3
    assert all(
        "-c constraints.txt" in command or "--no-deps --no-build-isolation --no-index" in command
        for command in installs
    )


def test_the_base_has_a_python_that_the_package_accepts(root: Path, steps: list[tuple[str, str]]) -> None:
    base = next(rest.partition("=")[2] for keyword, rest in steps if keyword == "ARG" and rest.startswith("BASE="))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    version = re.fullmatch(r"python:(\d+\.\d+)-.*", base)
    assert version is not None
    assert SpecifierSet(project["requires-python"]).contains(version[1])


def test_arguments_are_declared_and_used(steps: list[tuple[str, str]], compose: dict[str, Any]) -> None:
    declared = {rest.partition("=")[0] for keyword, rest in steps if keyword == "ARG"}
    used = {name for keyword, rest in steps if keyword != "ENV" for name in re.findall(r"\$\{(\w+)\}", rest)}
    handed_over = {
        name for service in compose["services"].values() for name in service.get("build", {}).get("args", {})
    }
    assert declared == used
    assert handed_over <= declared


def test_what_is_copied_exists_and_reaches_the_builder(root: Path, steps: list[tuple[str, str]]) -> None:
    allowed = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source for keyword, rest in steps if keyword == "COPY" and "--from=" not in rest for source in rest.split()[:-1]
    ]
    assert sorted(copied) == sorted(allowed)
    assert [source for source in copied if not (root / source).exists()] == []


def test_only_named_extras_are_installed(root: Path, compose: dict[str, Any]) -> None:
    extras = set(tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    builds = [service["build"] for service in compose["services"].values() if "build" in service]
    assert builds
    assert all(set(build["args"]["EXTRAS"].split(",")) <= extras - {"dev"} for build in builds)


def test_compose_builds_stages_that_exist(root: Path, compose: dict[str, Any], steps: list[tuple[str, str]]) -> None:
    for service in compose["services"].values():
        if "build" in service:
            assert service["build"]["target"] in stages(steps)
            assert service["image"] == f"gkd_dist:{service['build']['target']}"
            assert (root / "docker" / service["build"]["context"]).resolve() == root
            assert (root / service["build"]["dockerfile"]).is_file()


def test_compose_has_what_a_distributed_run_needs(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"store", "head", "worker", "tensorboard"}
    assert compose["services"]["worker"]["deploy"]["replicas"] >= 2
    assert set(compose["volumes"]) == {
        volume.partition(":")[0] for service in compose["services"].values() for volume in service.get("volumes", [])
    }


def test_compose_holds_no_secret_and_opens_no_port_to_the_network(root: Path, compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for name, value in service.get("environment", {}).items():
            if re.search("TOKEN|SECRET|PASSWORD", name):
                assert value.startswith("${"), name
    ignored = (root / ".gitignore").read_text().splitlines()
    assert any(fnmatch.fnmatch("docker/.env", pattern) for pattern in ignored)
