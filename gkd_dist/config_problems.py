"""What pydantic found wrong with a config, as one line per place in the user's own terms.

The place is the file and line, or the override, that wrote the value; the expectation comes from
the annotation of the field, so that all members of a union are named and pydantic's tags are not.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from gkd_dist import config_tree as tree
from gkd_dist.config import Config
from gkd_dist.config.base import ErrorAt
from gkd_dist.config_fields import child_of, kinds_of, places_of, type_at


def explain(error: ValidationError, root: tree.Node) -> list[str]:
    """One line per place that is wrong, in the order of the sections."""
    data = root.plain()
    problems: dict[tree.Path, Mapping[str, Any]] = {}
    for problem in error.errors(include_url=False):
        path = _path(problem, data)
        if problem["type"] == "too_short" and problem["input"]:
            continue  # pydantic counts only valid items; the invalid ones have their own lines
        # A union reports each member; our own sentences say more than the member that failed last.
        if path not in problems or problem["type"] == "value_error":
            problems[path] = problem
    return [_line(path, problem, data, root) for path, problem in problems.items()]


def _path(problem: Mapping[str, Any], data: Any) -> tree.Path:
    """Location without the tags that pydantic adds for members of unions."""
    path: list[str | int] = []
    last = len(problem["loc"]) - 1
    for position, step in enumerate(problem["loc"]):
        is_missing_key = problem["type"] == "missing" and position == last
        if isinstance(data, dict) and (step in data or is_missing_key):
            path.append(step)
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int):
            path.append(step)
            data = child_of(data, step)
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append("kind")
    if problem["type"] == "value_error" and isinstance(problem["ctx"]["error"], ErrorAt):
        path += problem["ctx"]["error"].below
    return tuple(path)


def _line(path: tree.Path, problem: Mapping[str, Any], data: Any, root: tree.Node) -> str:
    sentence = _sentence(path, problem, data)
    if not path:  # a rule about several sections; its sentence begins with the key that it is about
        named = sentence.split(maxsplit=1)[0].rstrip(":")
        steps = tuple(int(step) if step.isdecimal() else step for step in named.split("."))
        return f"{root.origin_at(steps).text}: {sentence}"
    origin = root.origin_at(path)
    if origin.override == path:
        return f"{origin.text}: {sentence}"
    return f"{origin.text}: {tree.dotted(path)}: {sentence}"


def _sentence(path: tree.Path, problem: Mapping[str, Any], data: Any) -> str:
    kind, found = problem["type"], problem["input"]
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "extra_forbidden":
        return _unknown_key(path, data)
    if kind.startswith("union_tag"):
        return _wrong_kind(path, data)
    known = type_at(Config, path, data)
    expected = known.describe() if known is not None else problem["msg"].lower()
    if kind == "missing":
        return f"missing; expected {expected}"
    if kind == "too_short":
        return f"expected at least {problem['ctx']['min_length']} item, got {show(found)}"
    hint = _did_you_mean(found, expected.replace(",", " ").split()) if kind == "literal_error" else ""
    return f"expected {expected}, got {show(found)}{hint}"


def _unknown_key(path: tree.Path, data: Any) -> str:
    *parent, key = path
    around = data
    for step in parent:
        around = child_of(around, step)
    kind = around.get("kind") if isinstance(around, dict) else None
    known = type_at(Config, parent, data)
    section = known.section(kind) if known is not None else None
    assert section is not None, path
    of_kind = f" of kind {kind}" if kinds_of(section) else ""
    names = list(section.model_fields)
    hint = _did_you_mean(key, names)
    places = places_of(Config, str(key))
    if not hint:
        elsewhere = places and not of_kind
        hint = f"; did you mean {' or '.join(places[:3])}?" if elsewhere else f"; known keys are {', '.join(names)}"
    return f"unknown key{of_kind}{hint}"


def _wrong_kind(path: tree.Path, data: Any) -> str:
    known = type_at(Config, path[:-1], data)
    assert known is not None, path
    kinds = [kind for section in known.sections() for kind in kinds_of(section)]
    for step in path[:-1]:
        data = child_of(data, step)
    expected = f"expected one of {', '.join(kinds)}"
    if "kind" not in data:
        return f"missing; {expected}"
    return f"{expected}, got {show(data['kind'])}{_did_you_mean(data['kind'], kinds)}"


def _did_you_mean(found: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(found, known, n=1, cutoff=0.6) if isinstance(found, str) else []
    return f"; did you mean {close[0]}?" if close else ""


def show(value: Any) -> str:
    """``value`` as it would be written in a file, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
