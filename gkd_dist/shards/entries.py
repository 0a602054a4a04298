"""What a manifest says about one stored object."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gkd_dist import layout
from gkd_dist.errors import ManifestError

_STAGES = {"graph": "partition", "knowledge": "infer", "predictions": "predict"}
_PART_KEY = re.compile(r"part-(\d{5,})-[0-9a-f]{8}\.(?:safetensors|parquet)")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor inside an object: bytes ``[start, stop)`` of it, with their crc32."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    crc32: int


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """A stored object: its key, size and digests, its tensors in stored order, counts and remarks.

    ``counts`` are sizes that planning needs without reading the object (``num_owned``, …); ``meta``
    holds JSON values, ``meta["floats"]`` how packed floats are unpacked.
    """

    key: str
    num_bytes: int
    crc32: int
    sha256: str
    tensors: tuple[TensorEntry, ...]
    counts: dict[str, int] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> TensorEntry | None:
        """Entry of a tensor, or None."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def check_complete(parts: Sequence[ObjectEntry], num_parts: int, where: str, kind: str) -> None:
    """ManifestError unless ``parts`` are 0 to ``num_parts`` - 1, in order, naming those that are missing.

    ``where`` is the URL of the store.
    """
    found = [_part_number(part.key) for part in parts]
    missing = sorted(set(range(num_parts)) - set(found))
    if missing and None not in found:
        names = ", ".join(layout.part(number) for number in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ManifestError(
            f"the {kind} store at {where} lacks {names}{more} of {num_parts} parts; {rerun(kind)} again"
        )
    if found != list(range(num_parts)):
        keys = ", ".join(part.key for part in parts[:3])
        raise ManifestError(
            f"the {kind} store at {where} lists {len(parts)} objects ({keys}, …), expected its {num_parts} parts "
            f"in order; {rerun(kind)} again"
        )


def _part_number(key: str) -> int | None:
    match = _PART_KEY.fullmatch(key)
    return int(match.group(1)) if match else None


def rerun(kind: str) -> str:
    """The action that makes a store of ``kind`` anew."""
    stage = _STAGES.get(kind)
    return f"run `gkd {stage}`" if stage else f"run the stage that writes {kind}"
