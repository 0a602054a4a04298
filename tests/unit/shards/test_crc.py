"""crc32 of two pieces in a row against that of their bytes."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd_dist.shards.crc import joined_crc32


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_as_if_summed_in_one_go(first: bytes, second: bytes) -> None:
    assert joined_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@pytest.mark.parametrize("num_bytes", [1, 255, 65_537, (1 << 20) + 3])
def test_long_pieces(num_bytes: int) -> None:
    second = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
    assert joined_crc32(zlib.crc32(b"first"), zlib.crc32(second), len(second)) == zlib.crc32(b"first" + second)


def test_more_bytes_than_any_memory_holds_take_as_many_steps_as_their_number_has_bits() -> None:
    shifted = joined_crc32(1, 0, 1 << 60)
    assert joined_crc32(1, 0, 1 << 59) != shifted
    assert joined_crc32(joined_crc32(1, 0, 1 << 59), 0, 1 << 59) == shifted
