"""The commented tree in README.md is the tree of the repository.

The tree is the fenced block whose first line starts with ``gkd_dist/``. One entry per line: two
spaces per level, the name (folders end with ``/``), two or more spaces, a comment::

    gkd_dist/            what does one process do?
      cli.py             the verbs
      partition/         cuts the graph
    configs/             what is this run?

All folders at the top and all modules and folders directly in ``gkd_dist`` are in it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ENTRY = re.compile(r"(?P<indent> *)(?P<name>[^\s]+?)(?P<folder>/?)  +(?P<comment>\S.*)")


def tree_block(readme: str) -> list[str]:
    """Lines of the fenced block that starts with ``gkd_dist/``."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL):
        lines = [line.rstrip() for line in block.splitlines() if line.strip()]
        if lines and lines[0].startswith("gkd_dist/"):
            return lines
    raise AssertionError("README.md has no fenced block that starts with gkd_dist/")


def entries(lines: list[str]) -> dict[str, bool]:
    """Path of each entry, relative to the root, and whether it is a folder."""
    found: dict[str, bool] = {}
    above: list[str] = []
    for line in lines:
        match = ENTRY.fullmatch(line)
        assert match, f"not `name  comment`: {line!r}"
        depth, odd = divmod(len(match["indent"]), 2)
        assert not odd, f"two spaces per level: {line!r}"
        assert depth <= len(above), f"no folder above: {line!r}"
        above = [*above[:depth], match["name"]]
        found["/".join(above)] = bool(match["folder"])
    return found


def real_children(folder: Path, ignored: set[str]) -> dict[str, bool]:
    """Folders of ``folder``, and its modules where it is a package; name to whether it is a folder."""
    package = (folder / "__init__.py").is_file()
    return {
        path.name: path.is_dir()
        for path in folder.iterdir()
        if not path.name.startswith((".", "__"))
        and path.name not in ignored
        and not path.name.endswith(".egg-info")
        and (path.is_dir() or (package and path.suffix == ".py"))
    }


def test_the_format() -> None:
    lines = tree_block("text\n```\nmake\n```\n```\ngkd_dist/   a\n  b.py   c d\n  e/   f\n    g.py   h\ni/   j\n```\n")
    assert entries(lines) == {
        "gkd_dist": True,
        "gkd_dist/b.py": False,
        "gkd_dist/e": True,
        "gkd_dist/e/g.py": False,
        "i": True,
    }


@pytest.fixture(scope="module")
def tree(root: Path) -> dict[str, bool]:
    return entries(tree_block((root / "README.md").read_text()))


@pytest.fixture(scope="module")
def ignored(root: Path) -> set[str]:
    lines = (root / ".gitignore").read_text().splitlines()
    return {line.strip("/") for line in lines if line.endswith("/")}


def test_what_it_names_exists(root: Path, tree: dict[str, bool]) -> None:
    wrong = [
        path for path, folder in tree.items() if not ((root / path).is_dir() if folder else (root / path).is_file())
    ]
    assert wrong == []


def test_it_names_every_folder_at_the_top(root: Path, tree: dict[str, bool], ignored: set[str]) -> None:
    assert set(real_children(root, ignored)) <= set(tree)


def test_it_names_every_module_of_the_package(root: Path, tree: dict[str, bool], ignored: set[str]) -> None:
    expected = {f"gkd_dist/{name}": folder for name, folder in real_children(root / "gkd_dist", ignored).items()}
    named = {path: folder for path, folder in tree.items() if path.count("/") == 1 and path.startswith("gkd_dist/")}
    assert named == expected
