"""Floats in fewer bytes, with a measured bound.

``pack_float``: value = scale * q with a power of two as scale, one per tensor. ``pack_rows``: value =
offset + scale * q in one byte, offset and scale of each row of a CSR matrix.

A power of two changes no significant digit. It maps the largest finite value into the range of the
stored dtype (squared distances of wide features exceed 65,504, the largest float16), and for
float16 to the top of it, where the fewest small values fall below its normal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gkd_dist.errors import ShardError
from gkd_dist.sparse import row_index, segment_max

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UINT8 = "uint8"
_LARGEST_CODE = 255
_SMALLEST_EXPONENT = -100  # keeps the scale and its inverse normal float32 numbers
_CHUNK = 1 << 20


def pack_float(tensor: Tensor, dtype: str) -> tuple[Tensor, dict[str, Any]]:
    """``tensor`` (any float dtype and shape) in ``dtype``: ``fp32``, ``fp16`` or ``bf16``.

    Returns the packed tensor and ``{"scale": s, "bound": e}``: after `unpack_float` no finite value
    is off by more than ``e``. Finite values stay finite; NaN and infinities are kept.

    ShardError for a dtype that is none of these and for float64 values beyond float32.
    """
    target = _dtype(dtype)
    if not tensor.is_floating_point():
        raise ShardError(f"only floats are packed (got {tensor.dtype}); store integers as they are")
    values = tensor.detach().float().contiguous()
    if tensor.dtype == torch.float64 and not torch.equal(values.isfinite(), tensor.isfinite()):
        raise ShardError("a float64 value is too large for float32; scale the values down before storing them")
    scale = _scale(values, target)
    packed = torch.empty_like(values, dtype=target)
    bound = 0.0
    source, out, exact = values.reshape(-1), packed.reshape(-1), tensor.detach().reshape(-1)
    for start in range(0, source.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part], unpacked = _round(source[part], target, scale)
        bound = max(bound, _error(exact[part], unpacked))
    return packed, {"scale": scale, "bound": bound}


def unpack_float(tensor: Tensor, info: Mapping[str, Any]) -> Tensor:
    """Float32 values of a packed tensor; ``info`` is what `pack_float` returned."""
    scale = info.get("scale")
    if not isinstance(scale, (int, float)) or not scale > 0 or math.frexp(scale)[0] != 0.5:
        raise ShardError(f"packed floats have scale {scale!r}, expected a power of two; write the shard again")
    values = tensor.float()
    return values if scale == 1 else values * scale


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ShardError(f"floats are packed as {', '.join(DTYPES)} (got {name!r}); choose one of these")
    return DTYPES[name]


def _scale(values: Tensor, target: torch.dtype) -> float:
    """The power of two that brings the largest finite value into the range of ``target``."""
    if target == torch.float32 or values.numel() == 0:
        return 1.0
    largest = max(_largest(part) for part in values.reshape(-1).split(_CHUNK))
    limit = torch.finfo(target).max
    if largest == 0 or (target == torch.bfloat16 and largest <= limit):
        return 1.0  # bfloat16 has the exponents of float32
    fraction, exponent = math.frexp(largest / limit)  # largest / limit = fraction * 2**exponent, fraction in [0.5, 1)
    if fraction == 0.5:
        exponent -= 1
    return 2.0 ** max(exponent, _SMALLEST_EXPONENT)


def _largest(values: Tensor) -> float:
    """Largest finite magnitude; of non-empty ``values``."""
    low, high = torch.aminmax(values)
    if bool(torch.isfinite(low) & torch.isfinite(high)):  # NaN comes through
        return max(-float(low), float(high))
    return float(torch.where(values.isfinite(), values.abs(), values.new_zeros(())).max())


def _round(values: Tensor, target: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    """Nearest stored values, one step towards zero where the nearest would unpack to infinity; and unpacked again."""
    packed = (values / scale).to(target)
    unpacked = packed.float() * scale
    if math.isfinite(float(unpacked.sum())):  # finite only where every value is
        return packed, unpacked
    overflow = values.isfinite() & unpacked.isinf()
    if bool(overflow.any()):
        # sign and magnitude: the pattern minus one is the neighbour towards zero
        pattern = packed.view(torch.int16)
        pattern[overflow] -= 1
    return packed, packed.float() * scale


def _error(values: Tensor, unpacked: Tensor) -> float:
    """Largest absolute error over the finite values.

    The difference of a float32 and its rounding to fewer digits is a float32 itself; where neither is that, it is
    taken in float64.
    """
    error = values - unpacked if values.dtype == torch.float32 else values.double() - unpacked.double()
    largest = float(error.abs_().max())
    if math.isfinite(largest):
        return largest
    return float(torch.where(values.isfinite(), error, error.new_zeros(())).max())


# --- one byte per value, affine per row --------------------------------------------------------


def pack_rows(values: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """``values`` float32 [m] of the rows that ``indptr`` int64 [o + 1] bounds, as one byte each.

    Returns codes uint8 [m], offset float32 [o], scale float32 [o] and ``{"affine": True, "bound": e}``:
    after `unpack_rows` no value is off by more than ``e``. A row of one value, or of equal ones, is
    exact; no other value is off by more than half a scale and the rounding of a float32.

    ShardError for another dtype, and for values that are not finite.
    """
    if values.dtype != torch.float32 or not bool(values.isfinite().all()):
        raise ShardError(f"bytes are made of finite float32 values (got {values.dtype}); check what is packed")
    offset, scale = -segment_max(-values, indptr), _row_scale(values, indptr)
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    rows, bound = row_index(indptr), 0.0
    for start in range(0, values.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        low, step = offset[rows[part]], scale[rows[part]]
        steps = (values[part].double() - low.double()) / torch.where(step > 0, step, 1.0).double()
        codes[part] = steps.round_().clamp_(0, _LARGEST_CODE).to(torch.uint8)
        bound = max(bound, _error(values[part].double(), _affine(codes[part], low, step)))
    return codes, offset, scale, {"affine": True, "bound": bound}


def unpack_rows(codes: Tensor, offset: Tensor, scale: Tensor, indptr: Tensor) -> Tensor:
    """Float32 [m] of what `pack_rows` returned; ShardError where the tensors do not fit together."""
    num_rows = offset.numel()
    if scale.numel() != num_rows or indptr.numel() != num_rows + 1 or int(indptr[-1]) != codes.numel():
        raise ShardError(
            f"{codes.numel()} bytes with {num_rows} offsets and {scale.numel()} scales, expected those of "
            f"{indptr.numel() - 1} rows with {int(indptr[-1])} values; write the shard again"
        )
    rows, values = row_index(indptr), torch.empty(codes.numel())
    for start in range(0, codes.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        values[part] = _affine(codes[part], offset[rows[part]], scale[rows[part]])
    return values


def _row_scale(values: Tensor, indptr: Tensor) -> Tensor:
    """255th of each row's range, rounded up, so that the largest code reaches the largest value."""
    # in float64: the range of float32 values may be twice the largest of them, or below the smallest
    span = segment_max(values, indptr).double() + segment_max(-values, indptr).double()
    scale = (span / _LARGEST_CODE).float()
    short = scale.double() * _LARGEST_CODE < span
    return torch.where(short, torch.nextafter(scale, torch.full_like(scale, math.inf)), scale)


def _affine(codes: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """Values of codes; rounding never leaves the finite numbers."""
    largest = torch.finfo(torch.float32).max
    return (offset.double() + codes.double() * scale.double()).clamp_(-largest, largest).float()
