"""What the sections of a config know: which section or field is at a path, in words.

Walks the annotations of pydantic models, never their values beyond the ``kind`` that selects a
member of a union.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Section = type[BaseModel]


@dataclass(frozen=True)
class FieldType:
    """An annotation with the constraints that were written around it."""

    annotation: Any
    metadata: tuple[Any, ...] = ()

    def members(self) -> list[FieldType]:
        """Alternatives of a union (None among them), or the type itself."""
        if get_origin(self.annotation) is Annotated:
            inner, *extra = get_args(self.annotation)
            return FieldType(inner, (*self.metadata, *_constraints(extra))).members()
        if get_origin(self.annotation) in (Union, types.UnionType):
            return [member for part in get_args(self.annotation) for member in FieldType(part).members()]
        return [self]

    def sections(self) -> list[Section]:
        """The sections among the members."""
        annotations = [member.annotation for member in self.members()]
        return [one for one in annotations if isinstance(one, type) and issubclass(one, BaseModel)]

    def section(self, kind: object = None) -> Section | None:
        """The section that is meant: the only one, or the one whose ``kind`` it is; None where it is open."""
        sections = self.sections()
        if len(sections) == 1:
            return sections[0]
        open_ended = None
        for section in sections:
            kinds = kinds_of(section)
            if kind in kinds:
                return section
            if not kinds and isinstance(kind, str):  # `kind: str`, e.g. module:attr
                open_ended = section
        return open_ended

    def below(self, key: str | int, kind: object = None) -> FieldType | None:
        """Type of what ``key`` holds; None where there is no such key. ``kind`` is that of this value."""
        section = self.section(kind)
        if section is not None:
            field = section.model_fields.get(str(key))
            return None if field is None else FieldType(field.annotation, tuple(field.metadata))
        for member in self.members():
            arguments = get_args(member.annotation)
            if get_origin(member.annotation) in (list, tuple) and isinstance(key, int):
                return FieldType(arguments[0])
            if get_origin(member.annotation) is dict:
                return FieldType(arguments[1])
        return None

    def describe(self) -> str:
        """In words: ``an integer > 0 or all``."""
        words = [_describe(member) for member in self.members()]
        unique = list(dict.fromkeys(words))
        return " or ".join(sorted(unique, key=lambda word: word == "null"))


def kinds_of(section: Section) -> tuple[str, ...]:
    """The values of ``kind`` that select ``section`` in a union."""
    field = section.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return ()
    return get_args(field.annotation)


def type_at(root: Section, path: Sequence[str | int], data: Any) -> FieldType | None:
    """Type of the field at ``path``; ``data`` are the plain values, whose kinds choose the way."""
    current: FieldType | None = FieldType(root)
    for key in path:
        assert current is not None
        current = current.below(key, data.get("kind") if isinstance(data, dict) else None)
        if current is None:
            return None
        data = child_of(data, key)
    return current


def child_of(data: Any, key: str | int) -> Any:
    """``data[key]``, None where there is none."""
    if isinstance(data, dict):
        return data.get(key)
    if isinstance(data, list) and isinstance(key, int) and key < len(data):
        return data[key]
    return None


def places_of(root: Section, key: str) -> list[str]:
    """Dotted paths of all fields that are called ``key``; items of a list are ``*``."""
    return [path for path in _paths(FieldType(root), "") if path.rpartition(".")[2] == key]


def _paths(current: FieldType, prefix: str) -> Iterator[str]:
    seen = set()
    for section in current.sections():
        for name, field in section.model_fields.items():
            if name not in seen:
                seen.add(name)
                yield prefix + name
                yield from _paths(FieldType(field.annotation), f"{prefix}{name}.")
    for member in current.members():
        if get_origin(member.annotation) in (list, tuple):
            yield from _paths(FieldType(get_args(member.annotation)[0]), f"{prefix}*.")


# --- words -----------------------------------------------------------------------------------

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null", Any: "a value"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _describe(member: FieldType) -> str:
    annotation = member.annotation
    if get_origin(annotation) is Literal:
        values = [str(value) for value in get_args(annotation)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if get_origin(annotation) in (list, tuple):
        return "a list"
    if get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "a mapping"
    bounds = [
        f"{sign} {getattr(bound, name):g}"
        for name, sign in _SIGNS.items()
        for bound in member.metadata
        if getattr(bound, name, None) is not None
    ]
    pattern = next((bound.pattern for bound in member.metadata if getattr(bound, "pattern", None)), None)
    word = _WORDS.get(annotation, str(annotation))
    return " ".join([word, " and ".join(bounds)]).strip() + (f" that matches {pattern}" if pattern else "")


def _constraints(extra: Sequence[Any]) -> list[Any]:
    return [bound for one in extra for bound in (one.metadata if isinstance(one, FieldInfo) else [one])]
