"""A digest inside a JSON document, for small documents that are not named in a manifest.

``seal`` is the sha256 of the same document without this field, as ``json.dumps(document,
sort_keys=True)`` writes it: a flipped byte cannot pass for another value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "seal"


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with its seal."""
    # read back, as a reader will see it: keys are text, tuples are lists
    plain = json.loads(json.dumps(dict(document), allow_nan=False))
    return {**plain, SEAL: _digest(plain)}


def is_sealed(document: Mapping[str, Any]) -> bool:
    """Whether ``document`` is what was sealed."""
    return document.get(SEAL) == _digest({name: value for name, value in document.items() if name != SEAL})


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
