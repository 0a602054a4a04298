"""The structure of a sparse matrix plus its transpose, so that both are one product.

Shapes: ``n`` rows, ``m`` non-zeros of a matrix G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SymmetricPattern:
    """Structure of G + Gᵀ for a matrix G, with a diagonal in front of each row or without.

    CSR ``indptr`` [n + 1] and ``indices`` [M], int32 where that is enough. ``first`` [M] says which
    non-zero of G each entry takes, m for the diagonal. Where G has a symmetric pattern, as of an
    undirected graph whose rows are sorted, entries are shared and ``second`` [M] is what is added;
    otherwise each non-zero has two entries.
    """

    indptr: Tensor
    indices: Tensor
    first: Tensor
    second: Tensor | None

    @classmethod
    def of(
        cls,
        indptr: Tensor,
        indices: Tensor,
        t_indptr: Tensor,
        t_indices: Tensor,
        t_perm: Tensor,
        *,
        diagonal: bool = False,
    ) -> SymmetricPattern:
        """In linear time from the CSR forms of G and Gᵀ, named as in `gkd_dist.sparse.CsrPattern`."""
        n, m, device = indptr.numel() - 1, indices.numel(), indices.device
        fits = max(n, 2 * m + n) < 2**31
        dtype = torch.int32 if fits else torch.int64
        mirrored = torch.equal(indptr, t_indptr) and torch.equal(indices, t_indices)
        blocks = [(indptr, indices, torch.arange(m, device=device))]
        if not mirrored:
            blocks.append((t_indptr, t_indices, t_perm))
        if diagonal:
            nodes = torch.arange(n + 1, device=device)
            blocks.insert(0, (nodes, nodes[:-1], torch.full((n,), m, device=device)))
        second = None
        if mirrored:
            _, _, second = _side_by_side([*blocks[:-1], (t_indptr, t_indices, t_perm)], dtype)
        return cls(*_side_by_side(blocks, dtype), second)

    def spread(self, values: Tensor) -> Tensor:
        """Entries [M] of G + Gᵀ from G's ``values`` [m]; 0 on the diagonal."""
        padded = torch.cat([values, values.new_zeros(1)])
        entries = padded.index_select(0, self.first)
        return entries if self.second is None else entries.add_(padded.index_select(0, self.second))


def _side_by_side(blocks: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One CSR structure whose rows are those of ``blocks`` (indptr, indices, numbers) one after the other."""
    indptr = torch.stack([block[0] for block in blocks]).sum(0)
    indices, numbers = torch.empty(2, sum(block[1].numel() for block in blocks), dtype=dtype, device=indptr.device)
    start = indptr[:-1].clone()  # where the next block's part of each row begins
    for block_indptr, block_indices, block_numbers in blocks:
        place = torch.arange(block_indices.numel(), device=indptr.device)
        place += (start - block_indptr[:-1])[torch.repeat_interleave(block_indptr[1:] - block_indptr[:-1])]
        indices[place], numbers[place] = block_indices.to(dtype), block_numbers.to(dtype)
        start += block_indptr[1:] - block_indptr[:-1]
    return indptr.to(dtype), indices, numbers
