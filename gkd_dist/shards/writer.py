"""Writes shards: content-addressed, so that no key ever gets different bytes."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gkd_dist.shards.codec import dtype_name, encode_with_spans
from gkd_dist.shards.manifest import ObjectEntry, TensorEntry
from gkd_dist.storage import Storage


def write_shard(
    storage: Storage,
    stem: str,
    tensors: Mapping[str, Tensor],
    counts: Mapping[str, int] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> ObjectEntry:
    """Stores ``tensors`` as ``<stem>-<first 8 digits of the sha256>.safetensors``.

    Returns the entry for the manifest. Writing the same tensors twice gives the same key and the
    same bytes, so a task may safely be repeated.
    """
    data, spans = encode_with_spans(tensors)
    view, digest = memoryview(data), hashlib.sha256(data).hexdigest()
    entries = tuple(
        TensorEntry(span.name, dtype_name(span.dtype), span.shape, span.start, span.stop,
                    zlib.crc32(view[span.start : span.stop]))
        for span in spans
    )  # fmt: skip
    key = f"{stem}-{digest[:8]}.safetensors"
    storage.write(key, data)
    return ObjectEntry(key, len(data), zlib.crc32(data), digest, entries, dict(counts or {}), dict(meta or {}))
