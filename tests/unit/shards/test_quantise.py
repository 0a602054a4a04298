"""Packed floats and bytes: hand-computed scales, measured bounds, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.errors import ShardError
from gkd_dist.shards.quantise import DTYPES, pack_float, pack_rows, unpack_float, unpack_rows

F32_MAX = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("largest", "dtype", "scale"),
    [
        (65504.0, "fp16", 1.0),
        (65505.0, "fp16", 2.0),
        (131008.0, "fp16", 2.0),
        (1.0, "fp16", 2.0**-15),  # 1 / 2**-15 = 32768, 1 / 2**-16 = 65536 is too large
        (0.0, "fp16", 1.0),
        (1e30, "bf16", 1.0),
        (F32_MAX, "bf16", 2.0),
        (1e30, "fp32", 1.0),
    ],
)
def test_the_scale_is_the_power_of_two_that_fits(largest: float, dtype: str, scale: float) -> None:
    packed, info = pack_float(torch.tensor([0.0, -largest]), dtype)
    assert info["scale"] == scale
    assert packed.dtype == DTYPES[dtype]


def test_fp16_rounds_to_ten_bits_and_says_how_far() -> None:
    values = torch.tensor([70000.0, 70001.0, 3.0])
    packed, info = pack_float(values, "fp16")
    # 70000 / 2 = 35000 lies between multiples of 32: 34976 and 35008
    assert packed.tolist() == [35008.0, 35008.0, 1.5]
    assert unpack_float(packed, info).tolist() == [70016.0, 70016.0, 3.0]
    assert info == {"scale": 2.0, "bound": 16.0}


def test_fp32_is_exact_and_not_copied_on_the_way_back() -> None:
    values = torch.randn(100)
    packed, info = pack_float(values, "fp32")
    assert info == {"scale": 1.0, "bound": 0.0}
    assert unpack_float(packed, info).data_ptr() == packed.data_ptr()
    assert torch.equal(packed, values)


def test_small_values_keep_their_digits_in_fp16() -> None:
    values = torch.rand(1000) * 1e-7  # far below the smallest normal float16, 6.1e-5
    packed, info = pack_float(values, "fp16")
    error = (unpack_float(packed, info) - values).abs().max().item()
    assert error <= 1e-7 * 2**-11
    assert math.isclose(info["bound"], error, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_are_kept_and_not_counted(dtype: str) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    packed, info = pack_float(values, dtype)
    back = unpack_float(packed, info)
    assert back.isnan().tolist() == [True, False, False, False]
    assert back[1:].tolist() == [math.inf, -math.inf, 1.0]
    assert info["bound"] == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (2, 3)], ids=str)
def test_any_shape(dtype: str, shape: tuple[int, ...]) -> None:
    packed, info = pack_float(torch.ones(shape), dtype)
    assert torch.equal(unpack_float(packed, info), torch.ones(shape))


def test_strided_and_double_input() -> None:
    values = torch.randn(50, 40, dtype=torch.float64).t()
    packed, info = pack_float(values, "bf16")
    error = (unpack_float(packed, info).double() - values).abs().max().item()
    assert info["bound"] == error
    with pytest.raises(ShardError, match="too large for float32"):
        pack_float(torch.tensor([1e300], dtype=torch.float64), "fp16")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    st.sampled_from(sorted(DTYPES)),
)
def test_finite_values_stay_finite_and_within_the_bound(values: list[float], dtype: str) -> None:
    exact = torch.tensor(values, dtype=torch.float32)
    packed, info = pack_float(exact, dtype)
    back = unpack_float(packed, info)
    assert packed.isfinite().all()
    assert back.isfinite().all()
    assert math.frexp(info["scale"])[0] == 0.5
    assert (back.double() - exact.double()).abs().max().item() <= info["bound"]
    digits = {"fp32": 24, "fp16": 11, "bf16": 8}[dtype]
    # half a unit in the last place of the largest value, a whole one where rounding up would
    # overflow; values below the smallest normal float32 may be lost
    assert info["bound"] <= max(abs(v) for v in values) * 2.0 ** (1 - digits) + 2.0**-126


def test_wrong_input_is_named() -> None:
    with pytest.raises(ShardError, match="packed as fp32, fp16, bf16"):
        pack_float(torch.ones(1), "fp8")
    with pytest.raises(ShardError, match="only floats"):
        pack_float(torch.ones(1, dtype=torch.int32), "fp16")
    for scale in (0.0, -2.0, 3.0, math.inf, math.nan, "2", None):
        with pytest.raises(ShardError, match="expected a power of two"):
            unpack_float(torch.ones(1), {"scale": scale})


# --- one byte per value --------------------------------------------------------------------------


def rows(*values: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(values float32 [m], row starts) of lists per row."""
    starts = torch.tensor([0, *(len(row) for row in values)]).cumsum(0)
    return torch.tensor([value for row in values for value in row], dtype=torch.float32), starts


def test_a_row_in_bytes_by_hand() -> None:
    exact, starts = rows([], [10.0, 265.0, 137.4], [7.25], [-3.0, -3.0], [])
    codes, offset, scale, info = pack_rows(exact, starts)
    assert codes.tolist() == [0, 255, 127, 0, 0, 0]
    assert offset.tolist() == [0.0, 10.0, 7.25, -3.0, 0.0]
    assert scale.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    back = unpack_rows(codes, offset, scale, starts)
    assert back.tolist() == [10.0, 265.0, 137.0, 7.25, -3.0, -3.0]
    assert info == {"affine": True, "bound": pytest.approx(0.4, abs=1e-5)}


@settings(max_examples=500, deadline=None)
@given(st.binary(min_size=4, max_size=96), st.lists(st.integers(0, 6), max_size=6), st.booleans())
def test_bytes_stay_finite_and_within_the_bound_at_any_range(data: bytes, counts: list[int], close: bool) -> None:
    """Any bit patterns: ranges from subnormal ones to twice the largest float32."""
    exact = torch.frombuffer(bytearray(data[: len(data) // 4 * 4]), dtype=torch.float32).nan_to_num(1.0, 2.0, 3.0)
    exact = 1 + exact.sign() * 2**-20 if close else exact
    bounds = torch.tensor([0, *counts, exact.numel()]).cumsum(0).clamp_max(exact.numel())
    codes, offset, scale, info = pack_rows(exact, bounds)
    back = unpack_rows(codes, offset, scale, bounds)
    assert back.isfinite().all()
    assert scale.isfinite().all()
    error = (back.double() - exact.double()).abs()
    assert float(error.max()) == info["bound"]
    again = pack_rows(exact.clone(), bounds)
    assert all(torch.equal(a, b) for a, b in zip((codes, offset, scale), again[:3], strict=True))
    lengths = bounds.diff().tolist()
    for row, found, off in zip(exact.split(lengths), back.split(lengths), error.split(lengths), strict=True):
        if row.numel() and bool((row == row[0]).all()):
            assert torch.equal(found, row)
        elif row.numel():  # half a step, and the rounding of the result
            step = float(row.double().max() - row.double().min()) / 255
            assert float(off.max()) <= step * (0.5 + 2**-20) + float(row.abs().max()) * 2**-23 + 2**-149


@pytest.mark.parametrize(
    "row",
    [
        [-F32_MAX, F32_MAX, 0.0],
        [-F32_MAX / 41, F32_MAX],
        [0.0, 2.0**-149, 2.0**-148],
        [1.0, 1.0 + 2.0**-23],
        [2.0**-126, 2.0**-149],
        [-0.0, 0.0],
    ],
    ids=[
        "twice the largest",
        "code 255 beyond the largest",
        "subnormal",
        "neighbouring floats",
        "into subnormal",
        "two zeros",
    ],
)
def test_extreme_rows_in_bytes(row: list[float]) -> None:
    exact, starts = rows(row)
    codes, offset, scale, info = pack_rows(exact, starts)
    back = unpack_rows(codes, offset, scale, starts)
    assert back.isfinite().all()
    assert info["bound"] <= (max(row) - min(row)) / 255 + 2**-149
    assert back.max() <= F32_MAX


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bytes_hold_finite_values_alone(bad: float) -> None:
    with pytest.raises(ShardError, match="finite float32"):
        pack_rows(*rows([1.0, bad]))
    with pytest.raises(ShardError, match="float64"):
        pack_rows(torch.ones(1, dtype=torch.float64), torch.tensor([0, 1]))


def test_bytes_of_another_graph_are_refused() -> None:
    codes, offset, scale, _ = pack_rows(*rows([1.0, 2.0], [3.0]))
    for starts in ([0, 2, 4], [0, 3], [0, 1, 2, 3]):
        with pytest.raises(ShardError, match="expected those of"):
            unpack_rows(codes, offset, scale, torch.tensor(starts))
