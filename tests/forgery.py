"""Documents that a wrong program would write: altered, with digests that fit."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def signed(body: dict[str, Any]) -> bytes:
    """JSON of a manifest with the right sha256: what a wrong program, not a flipped bit, would write."""
    body = {name: value for name, value in body.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}).encode()
