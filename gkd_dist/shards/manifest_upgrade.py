"""Manifests of earlier schema versions, read as today's.

A reader of version v reads 1 to v: step by step, in memory, after the digest was checked against
what is stored. Nothing is rewritten in place; a store gets today's version when its stage writes it
again. A new version adds one function here, and one stored example to the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SCHEMA_VERSION = 2
Body = dict[str, Any]

# names of the fields of each version that was ever written
FIELDS = {
    1: ("schema_version", "kind", "fingerprint", "inputs", "meta", "num_parts", "parts", "sha256"),
    2: (
        "schema_version",
        "kind",
        "format_version",
        "fingerprint",
        "inputs",
        "meta",
        "num_parts",
        "pages",
        "parts",
        "sha256",
    ),
}


def upgrade(body: Body) -> Body:
    """``body``, whose fields are those of its version, as one of `SCHEMA_VERSION`."""
    steps = _steps()
    for version in range(body["schema_version"], SCHEMA_VERSION):
        body = steps[version](body)
    return body


def _steps() -> dict[int, Callable[[Body], Body]]:
    """The function that makes version v + 1 of version v, by v."""
    return {1: _from_1}


def _from_1(body: Body) -> Body:
    """Version 1 had all parts in one object, and only stores of format 1."""
    return {**body, "schema_version": 2, "format_version": 1, "pages": []}
