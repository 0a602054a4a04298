"""Tensors as bytes: the safetensors format, deterministic and without code.

An object is 8 bytes with the little-endian length of the header, a JSON header padded with spaces
to a multiple of 8, and the tensors one after the other. Here they are ordered by (element size,
largest first; name), so every tensor is aligned to its elements and equal tensors give equal bytes.

The header is parsed here instead of by the library because that wants ``bytes`` and copies every
tensor; `decode` of a bytearray makes tensors that are views of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gkd_dist.errors import ShardError

_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in _CODES}
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}
_LARGEST_HEADER = 100_000_000  # the bound of the safetensors library
_LARGEST_SIZE = (1 << 63) - 1
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor lies in an object: bytes ``[start, stop)`` counted from the object's first byte."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in a manifest, e.g. ``float32``; ShardError if a shard cannot hold it."""
    if dtype not in _NAMES:
        raise ShardError(f"a shard cannot hold {dtype}; convert the tensor to one of {', '.join(_BY_NAME)}")
    return _NAMES[dtype]


def dtype_from_name(name: object) -> torch.dtype | None:
    """The dtype of a name, or None if a shard has no such dtype."""
    return _BY_NAME.get(name) if isinstance(name, str) else None


def num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * math.prod(shape)


# --- writing ---------------------------------------------------------------------------------


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """One safetensors object; the same tensors always give the same bytes.

    ShardError for a dtype that a shard cannot hold.
    """
    return b"".join(encode_pieces(tensors, metadata)[0])


def encode_pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[list[bytes | memoryview], tuple[Span, ...]]:
    """The bytes of `encode` as a header and one piece per tensor, without a copy of contiguous ones.

    Also where each tensor lies in the whole, in stored order.
    """
    if _METADATA in tensors:
        raise ShardError(f"a tensor cannot be called {_METADATA}, which safetensors reserves; use another name")
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES or tensor.layout != torch.strided:
            raise ShardError(
                f"a shard cannot hold tensor {name!r} ({tensor.dtype}, {tensor.layout}); "
                f"convert it to a dense tensor of {', '.join(_BY_NAME)}"
            )
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offsets = [0]
    for name in names:
        tensor = tensors[name]
        offsets.append(offsets[-1] + num_bytes(tensor.dtype, tensor.shape))
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offsets[-2], offsets[-1]],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    pieces = [len(text).to_bytes(8, "little") + text, *(_raw(tensors[name]) for name in names)]
    spans = tuple(
        Span(name, tensors[name].dtype, tuple(tensors[name].shape), base + start, base + stop)
        for name, start, stop in zip(names, offsets, offsets[1:], strict=False)
    )
    return pieces, spans


def _raw(tensor: Tensor) -> memoryview | bytes:
    """Bytes of a tensor, without a copy where it is contiguous on the CPU."""
    if tensor.numel() == 0:
        return b""
    flat = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


# --- reading ---------------------------------------------------------------------------------


def decode(data: bytes | bytearray | memoryview) -> dict[str, Tensor]:
    """Tensors of an object; ShardError on anything malformed.

    Tensors of a bytearray (or of a writable view) share its memory; read-only data is copied once.
    """
    buffer = memoryview(data)
    if buffer.readonly:
        buffer = memoryview(bytearray(buffer))
    return {span.name: take(buffer, span) for span in read_spans(buffer)}


def read_spans(data: bytes | bytearray | memoryview) -> tuple[Span, ...]:
    """Where each tensor lies, from the header; ShardError unless header and length fit together."""
    view = memoryview(data)
    if len(view) < 8:
        raise ShardError(f"not a safetensors object: {len(view)} bytes, expected at least 8; write it again")
    length = int.from_bytes(view[:8], "little")
    if length > min(_LARGEST_HEADER, len(view) - 8):
        raise ShardError(
            f"not a safetensors object: a header of {length} bytes in an object of {len(view)}; write it again"
        )
    base = 8 + length
    spans = [_span(name, fields, base) for name, fields in _header(bytes(view[8:base])) if name != _METADATA]
    spans.sort(key=lambda span: (span.start, span.stop))
    expected = base
    for span in spans:
        if span.start != expected:
            raise _malformed(f"tensor {span.name!r} begins at byte {span.start}, expected {expected}")
        expected = span.stop
    if expected != len(view):
        raise _malformed(f"the tensors end at byte {expected}, the object at {len(view)}")
    return tuple(spans)


def take(buffer: memoryview, span: Span, origin: int = 0) -> Tensor:
    """The tensor of ``span`` as a view of writable ``buffer``, whose first byte is byte ``origin`` of the object."""
    try:
        if span.start == span.stop:
            return torch.empty(span.shape, dtype=span.dtype)  # frombuffer refuses empty ranges
        offset, count = span.start - origin, (span.stop - span.start) // span.dtype.itemsize
        if offset % span.dtype.itemsize:  # another writer's object: elements of a view must be aligned
            part = buffer[offset : span.stop - origin]
            buffer, offset = memoryview(bytearray(part)), 0
        flat = torch.frombuffer(buffer, dtype=torch.uint8 if span.dtype == torch.bool else span.dtype,
                                count=count, offset=offset)  # fmt: skip
        if span.dtype == torch.bool:
            if int(flat.max()) > 1:
                raise _malformed(f"tensor {span.name!r} is bool and holds a byte that is neither 0 nor 1")
            flat = flat.view(torch.bool)
        return flat.reshape(span.shape)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise _malformed(f"tensor {span.name!r} of shape {list(span.shape)}: {error}") from error


def _header(text: bytes) -> list[tuple[str, Any]]:
    """Pairs of the header's JSON object, in order; duplicates are an error."""
    try:
        pairs = json.loads(text, object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"its header is not JSON ({error})") from error
    if not isinstance(pairs, dict):
        raise _malformed("its header is not a JSON object")
    return list(pairs.items())


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _span(name: str, fields: Any, base: int) -> Span:
    """Checked header entry of one tensor."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(f"tensor {name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = _DTYPES.get(str(fields["dtype"])), fields["shape"], fields["data_offsets"]
    if dtype is None:
        raise _malformed(f"tensor {name!r} has dtype {fields['dtype']!r}, expected one of {', '.join(_DTYPES)}")
    if not is_sizes(shape):
        raise _malformed(f"tensor {name!r} has shape {shape!r}")
    if not is_sizes(offsets) or len(offsets) != 2:
        raise _malformed(f"tensor {name!r} has data_offsets {offsets!r}")
    start, stop = offsets
    expected = num_bytes(dtype, shape)
    if stop - start != expected:
        raise _malformed(f"tensor {name!r} of shape {shape} has {stop - start} bytes, expected {expected}")
    return Span(name, dtype, tuple(shape), base + start, base + stop)


def is_sizes(value: Any) -> bool:
    """Whether ``value`` is a list of integers that can be sizes or offsets."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _LARGEST_SIZE for n in value)


def _malformed(what: str) -> ShardError:
    return ShardError(f"malformed safetensors object: {what}; write it again")
