"""Reads shards: nothing is returned before its crc32 was checked against the manifest.

What does not fit the manifest is read once more before it becomes an error: bytes are lost and
flipped on their way, too. A whole object is one buffer that all its tensors share: keep what is
needed, or clone it. Named tensors are fetched by byte range; ranges that touch or nearly touch become
one request.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gkd_dist.errors import ObjectNotFoundError, ShardError
from gkd_dist.shards.buffers import BufferPool
from gkd_dist.shards.codec import Span, dtype_from_name, dtype_name, read_spans, take
from gkd_dist.shards.manifest import ObjectEntry, TensorEntry
from gkd_dist.storage import Storage

_log = logging.getLogger(__name__)
_LARGEST_GAP = 64 << 10  # bytes worth reading and dropping instead of asking a store once more
_ACTION = "run `gkd verify` to see what else is damaged, then the stage that writes it again"


def read_shard(
    storage: Storage, entry: ObjectEntry, names: Sequence[str] | None = None, pool: BufferPool | None = None
) -> dict[str, Tensor]:
    """All tensors of an object, or only ``names``, on the CPU; their memory is from ``pool``, where there is one.

    The whole object is checked by its crc32, named tensors each by their own. ShardError, with the
    key, for an object that is missing, truncated or altered, and for a name that it does not have.
    """
    if names is None:
        return _read_whole(storage, entry, pool)
    tensors: dict[str, Tensor] = {}
    for group in merge_ranges(_pick(storage, entry, names)):
        tensors.update(_read_group(storage, entry, group, pool))
    return {name: tensors[name] for name in names}


def read_rows(storage: Storage, entry: ObjectEntry, names: Sequence[str], out: Tensor) -> None:
    """Reads tensors of an object one below the other into ``out``, contiguous [rows, …]: no second copy is made.

    Each is checked by its crc32; those that follow each other in the object are one request.
    ShardError as in `read_shard`, and where the tensors do not fill ``out`` exactly.
    """
    tensors = _pick(storage, entry, names)
    rows = [tensor.shape[0] if tensor.shape else -1 for tensor in tensors]
    expected = [(dtype_name(out.dtype), (count, *out.shape[1:])) for count in rows]
    if sum(rows) != out.size(0) or [(tensor.dtype, tensor.shape) for tensor in tensors] != expected:
        found = ", ".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
        raise ShardError(
            f"{storage.describe(entry.key)} has {found}, expected {out.dtype} {list(out.shape)} in all; {_ACTION}"
        )
    view, done = out.view(-1).view(torch.uint8).numpy().data, 0
    while tensors:
        group = [tensors.pop(0)]
        while tensors and tensors[0].start == group[-1].stop:
            group.append(tensors.pop(0))
        stop = done + group[-1].stop - group[0].start
        _fill_group(storage, entry, group, view[done:stop])
        done = stop


def merge_ranges(entries: Sequence[TensorEntry], largest_gap: int = _LARGEST_GAP) -> list[list[TensorEntry]]:
    """Groups of tensors, by offset, that one request reads: gaps inside are at most ``largest_gap`` bytes."""
    groups: list[list[TensorEntry]] = []
    for entry in sorted(entries, key=lambda e: (e.start, e.stop)):
        if groups and entry.start - groups[-1][-1].stop <= largest_gap:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def read_object(storage: Storage, entry: ObjectEntry, pool: BufferPool | None = None) -> memoryview:
    """Bytes of an object, writable, with size and crc32 as in the manifest; else ShardError."""
    buffer = _room(entry.num_bytes + 1, pool)  # one more, to notice a longer object without asking its size
    view = buffer[: entry.num_bytes]

    def read() -> None:
        _check_size(storage, entry, _fill(storage, entry, buffer, 0), longer_is_wrong=True)
        _check_crc(storage, entry, "", zlib.crc32(view), entry.crc32)

    _read_twice(storage, entry, read)
    return view


def _read_whole(storage: Storage, entry: ObjectEntry, pool: BufferPool | None) -> dict[str, Tensor]:
    view = read_object(storage, entry, pool)
    try:
        spans = read_spans(view)
        if spans != tuple(_span(tensor) for tensor in entry.tensors):
            raise ShardError(f"it holds {[s.name for s in spans]}, the manifest describes other tensors; {_ACTION}")
        return {span.name: take(view, span) for span in spans}
    except ShardError as error:
        raise ShardError(f"{storage.describe(entry.key)}: {error}") from error


def _read_group(
    storage: Storage, entry: ObjectEntry, group: list[TensorEntry], pool: BufferPool | None
) -> dict[str, Tensor]:
    origin, stop = group[0].start, max(tensor.stop for tensor in group)
    view = _room(stop - origin, pool)
    _fill_group(storage, entry, group, view)
    return {tensor.name: take(view, _span(tensor), origin) for tensor in group}


def _fill_group(storage: Storage, entry: ObjectEntry, group: list[TensorEntry], view: memoryview) -> None:
    """Fills ``view`` from the first byte of ``group`` on, and checks each tensor of it."""
    origin, stop = group[0].start, group[0].start + len(view)

    def read() -> None:
        _check_size(storage, entry, origin + _fill(storage, entry, view, origin), needed=stop)
        for tensor in group:
            crc = zlib.crc32(view[tensor.start - origin : tensor.stop - origin])
            _check_crc(storage, entry, f"tensor {tensor.name} of ", crc, tensor.crc32)

    _read_twice(storage, entry, read)


def _room(num_bytes: int, pool: BufferPool | None) -> memoryview:
    """Writable memory that nothing was written to: filling a bytearray with zeros takes as long as reading it."""
    if pool is not None:
        return pool.room(num_bytes)
    return torch.empty(num_bytes, dtype=torch.uint8).numpy().data


class _Damaged(Exception):
    """What was read is not what the manifest describes."""


def _read_twice(storage: Storage, entry: ObjectEntry, read: Callable[[], None]) -> None:
    """``read``, and once more where it raises `_Damaged`; ShardError where it does again."""
    try:
        read()
    except _Damaged as error:
        _log.warning("%s: reading it once more", error)
        storage.doubt(entry.key)
    else:
        return
    try:
        read()
    except _Damaged as error:
        raise ShardError(f"{error}, in two reads; {_ACTION}") from error


def _fill(storage: Storage, entry: ObjectEntry, buffer: memoryview, start: int) -> int:
    try:
        return storage.read_into(entry.key, buffer, start)
    except ObjectNotFoundError as error:
        raise ShardError(f"{storage.describe(entry.key)} is missing, the manifest names it; {_ACTION}") from error


def _check_size(
    storage: Storage, entry: ObjectEntry, got: int, needed: int | None = None, longer_is_wrong: bool = False
) -> None:
    expected = entry.num_bytes if needed is None else needed
    if got < expected:
        raise _Damaged(f"{storage.describe(entry.key)} is truncated: got {got} bytes, expected {entry.num_bytes}")
    if longer_is_wrong and got > expected:
        raise _Damaged(f"{storage.describe(entry.key)} was altered: longer than the expected {entry.num_bytes} bytes")


def _check_crc(storage: Storage, entry: ObjectEntry, what: str, got: int, expected: int) -> None:
    if got != expected:
        raise _Damaged(f"{what}{storage.describe(entry.key)} was altered: got crc32 {got:08x}, expected {expected:08x}")


def _pick(storage: Storage, entry: ObjectEntry, names: Sequence[str]) -> list[TensorEntry]:
    known = {tensor.name: tensor for tensor in entry.tensors}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ShardError(
            f"{storage.describe(entry.key)} has no tensor {', '.join(unknown)}; it has {', '.join(known)}: "
            "run the stage that writes it with the losses that read it"
        )
    return [known[name] for name in dict.fromkeys(names)]


def _span(entry: TensorEntry) -> Span:
    dtype = dtype_from_name(entry.dtype)
    if dtype is None:
        raise ShardError(f"tensor {entry.name} has dtype {entry.dtype}, which a shard cannot hold; upgrade gkd_dist")
    return Span(entry.name, dtype, entry.shape, entry.start, entry.stop)
