"""Writes shards: content-addressed, so that no key ever gets different bytes."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gkd_dist.shards.codec import dtype_name, encode_pieces
from gkd_dist.shards.crc import joined_crc32
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
    same bytes, so a task may safely be repeated. Contiguous tensors are written from where they are.
    """
    pieces, spans = encode_pieces(tensors)
    digest, crc, num_bytes = hashlib.sha256(), 0, 0
    crcs = []
    for piece in pieces:
        digest.update(piece)
        crcs.append(zlib.crc32(piece))
        crc, num_bytes = joined_crc32(crc, crcs[-1], len(piece)), num_bytes + len(piece)
    entries = tuple(
        TensorEntry(span.name, dtype_name(span.dtype), span.shape, span.start, span.stop, tensor_crc)
        for span, tensor_crc in zip(spans, crcs[1:], strict=True)
    )
    key = f"{stem}-{digest.hexdigest()[:8]}.safetensors"
    storage.write(key, pieces)
    return ObjectEntry(key, num_bytes, crc, digest.hexdigest(), entries, dict(counts or {}), dict(meta or {}))
