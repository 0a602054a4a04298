"""Dropout that every copy of a node agrees on: masks are a hash of (key, layer, node, channel).

A node that is a halo node elsewhere is computed several times, and a generator that is drawn from would
drop other channels in each copy. Here nothing is drawn: a mask is a function of counters, so that the
loss does not know how the graph was cut, and a step that is repeated drops the same channels.

Each 64-bit hash gives the masks of four channels, 16 bits each, so a rate is a multiple of 1/65536;
what is kept is scaled by the exact inverse of that rate. The hash is that of splitmix64 (Steele et al.,
OOPSLA 2014): of the node with the key, and of that with the number of the channel group.

Shapes: ``n`` rows, ``d`` channels; ``m`` edges, ``h`` heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_dist.sparse import chunks

_LANES = 4  # masks per hash
_LEVELS = 1 << 16  # of a rate
_CHUNK = 1 << 15  # hashes that stay in a core's cache
_GPU_CHUNK = 1 << 24
_WORD = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def splitmix64(word: int) -> int:
    """Hash of one 64-bit word."""
    word = (word + _GOLDEN) & _WORD
    word = ((word ^ (word >> 30)) * _FIRST) & _WORD
    word = ((word ^ (word >> 27)) * _SECOND) & _WORD
    return word ^ (word >> 31)


def splitmix64_(words: Tensor) -> Tensor:
    """`splitmix64` of every element of an int64 tensor, in place."""
    words.add_(signed(_GOLDEN))
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(signed(factor))
    return words.bitwise_xor_((words >> 31).bitwise_and_((1 << 33) - 1))


@dataclass(frozen=True)
class NodeNoise:
    """The random numbers of one forward pass over nodes: ``n_id`` int64 [n] are global ids, ``key`` is of the pass."""

    n_id: Tensor
    key: int

    def drop(self, h: Tensor, rate: float, layer: int) -> Tensor:
        """Dropout of the first rows, ``h`` [n, d]: channels of each node by its id and ``layer`` (0: the input)."""
        return _drop(h, self._hashes(self.n_id[: h.size(0)], 2 * layer), rate)

    def drop_edges(self, values: Tensor, rate: float, layer: int, source: Tensor, target: Tensor) -> Tensor:
        """Dropout of ``values`` [m, h]: heads of each edge by the ids of its ends and ``layer``.

        ``source`` and ``target`` int64 [m] are local numbers. Parallel edges get one mask.
        """
        ends = self._hashes(self.n_id, 2 * layer + 1)
        # The shift keeps (a, b) and (b, a) apart.
        edges = (ends[source] << 1).bitwise_xor_(ends[target])
        return _drop(values, splitmix64_(edges), rate)

    def _hashes(self, ids: Tensor, place: int) -> Tensor:
        return splitmix64_(ids.bitwise_xor(signed(splitmix64(splitmix64(self.key) + place))))


def _drop(values: Tensor, rows: Tensor, rate: float) -> Tensor:
    dropped = round(rate * _LEVELS)
    if dropped == 0:
        return values
    if dropped == _LEVELS:
        return values * 0
    out: Tensor = _Drop.apply(values, rows, dropped)
    return out


class _Drop(torch.autograd.Function):
    """``values * mask * scale``, by cache-sized chunks; keeps a byte per value for the backward pass."""

    @staticmethod
    def forward(ctx, values: Tensor, rows: Tensor, dropped: int) -> Tensor:  # type: ignore[no-untyped-def]
        count, width = values.shape
        groups = -(-width // _LANES)
        columns = splitmix64_(torch.arange(groups, device=values.device))
        kept = torch.empty(count, width, dtype=torch.bool, device=values.device)
        for start, stop in _chunks(values, groups):
            words = splitmix64_(rows[start:stop, None] ^ columns)
            torch.ge(words.view(torch.int16)[:, :width], dropped - _LEVELS // 2, out=kept[start:stop])
        ctx.scale = _LEVELS / (_LEVELS - dropped)
        ctx.save_for_backward(kept)
        return _masked(values, kept, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (kept,) = ctx.saved_tensors
        return _masked(grad, kept, ctx.scale), None, None


def _masked(values: Tensor, kept: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    for start, stop in _chunks(values, -(-values.size(1) // _LANES)):
        torch.mul(values[start:stop], kept[start:stop], out=out[start:stop]).mul_(scale)
    return out


def _chunks(values: Tensor, groups: int) -> list[tuple[int, int]]:
    return chunks(values.size(0), groups, _GPU_CHUNK if values.is_cuda else _CHUNK)
