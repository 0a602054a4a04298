"""The configurations that `docs/teachers.md` shows are ones that can be read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from gkd_dist.config import Config

PAGE = (Path(__file__).parents[2] / "docs/teachers.md").read_text()
REST = {
    "run": "run",
    "graph": {"source": {"kind": "synthetic"}},
    "student": {"model": {"kind": "gcn"}},
    "losses": [{"kind": "label"}],
}


def test_every_configuration_is_valid() -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]
    one, several, seeds, features, attributes = (Config.model_validate(_completed(block)) for block in blocks)
    assert [teacher.name for teacher in one.all_teachers()] == ["wide"]
    assert [teacher.name for teacher in several.all_teachers()] == ["wide", "deep"]
    found = [(loss.kind, getattr(loss, "teacher", None), loss.weight) for loss in several.student_losses()]
    assert found == [
        ("label", None, 1.0),
        ("kd", None, 1.0),
        ("lsp", "wide", 0.5),
        ("lsp", "deep", 0.5),
        ("kd", "wide", 0.5),
    ]
    assert [teacher.seed for teacher in seeds.all_teachers()] == [1, 2]
    assert features.teacher.features == "text"
    assert attributes.graph.edge_attr == "keep"


def _completed(block: dict[str, Any]) -> dict[str, Any]:
    given = REST | block
    return given if {"teacher", "teachers"} & given.keys() else given | {"teacher": {"model": {"kind": "gcn"}}}
