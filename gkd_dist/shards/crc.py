"""crc32 of two pieces in a row from the crc32 of each, so that no byte is summed twice.

Polynomials over GF(2) modulo that of crc32, as 32 bits with the constant term in the highest.
Appending ``n`` bytes multiplies what came before by x^(8 n).
"""

from __future__ import annotations

from functools import cache

_POLYNOMIAL = 0xEDB88320
_ONE, _X = 1 << 31, 1 << 30


def joined_crc32(first: int, second: int, num_bytes: int) -> int:
    """crc32 of a piece of crc32 ``first`` followed by one of ``num_bytes`` bytes and crc32 ``second``."""
    return _product(_shift(num_bytes), first) ^ second


def _product(a: int, b: int) -> int:
    result = 0
    while a:
        if a & _ONE:
            result ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return result


def _shift(num_bytes: int) -> int:
    """x^(8 num_bytes)."""
    result, power = _ONE, 3
    while num_bytes:
        if num_bytes & 1:
            result = _product(_squared(power), result)
        num_bytes, power = num_bytes >> 1, power + 1
    return result


@cache
def _squared(times: int) -> int:
    """x^(2^times)."""
    return _X if times == 0 else _product(_squared(times - 1), _squared(times - 1))
