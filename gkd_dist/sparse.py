"""Sparse products with exact, deterministic gradients: the arithmetic under models and losses.

A `CsrPattern` is the fixed structure of a sparse matrix together with its transpose, so that a
backward pass is another sparse product and never a scatter. Nothing of size [m, d] is built.

Shapes: ``n`` rows, ``m`` non-zeros, ``d`` columns of the dense factor, ``h`` heads.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gkd_dist.symmetric import SymmetricPattern

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
_CHUNK_VALUES = 1 << 18  # values per chunk of gathered rows: fits a core's cache


@dataclass(frozen=True)
class CsrPattern:
    """Structure of a sparse matrix and of its transpose.

    ``indptr`` int64 [n + 1] and ``indices`` int64 [m] are the CSR form (row = target, column =
    source). ``t_indptr`` and ``t_indices`` are the CSR form of the transpose and ``t_perm`` int64
    [m] says which non-zero of the matrix is the k-th of the transpose. There may be fewer rows than
    columns; of a pattern made for `forward_only`, the transpose is missing.
    """

    indptr: Tensor
    indices: Tensor
    t_indptr: Tensor
    t_indices: Tensor
    t_perm: Tensor

    @classmethod
    def from_csr(cls, indptr: Tensor, indices: Tensor, num_columns: int | None = None) -> CsrPattern:
        """Adds the transpose to a CSR structure, square unless told otherwise; its rows are ordered by target."""
        rows = row_index(indptr)
        t_indices_order = torch.argsort(indices, stable=True)
        counts = torch.bincount(indices, minlength=indptr.numel() - 1 if num_columns is None else num_columns)
        return cls(indptr, indices, indptr_from_counts(counts), rows[t_indices_order], t_indices_order)

    @classmethod
    def forward_only(cls, indptr: Tensor, indices: Tensor) -> CsrPattern:
        """A CSR structure without its transpose: no sort, and no backward pass."""
        none = indices.new_empty(0)
        return cls(indptr, indices, none, none, none)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.indptr.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return self.indices.numel()

    def rows(self) -> Tensor:
        """Row of every non-zero, int64 [m]."""
        return row_index(self.indptr)

    @cached_property
    def symmetric(self) -> SymmetricPattern:
        """Structure of matrix plus transpose; made once and kept with this one."""
        return SymmetricPattern.of(*self._arrays)

    @cached_property
    def laplacian(self) -> SymmetricPattern:
        """The same with a diagonal; made once and kept with this one."""
        return SymmetricPattern.of(*self._arrays, diagonal=True)

    def select(self, keep: Tensor) -> CsrPattern:
        """Structure of the non-zeros where ``keep`` (bool [m]) is true, in linear time."""
        kept_before = torch.zeros(self.nnz + 1, dtype=torch.int64, device=keep.device)
        torch.cumsum(keep, 0, out=kept_before[1:])
        t_keep = keep[self.t_perm]
        t_kept_before = torch.zeros_like(kept_before)
        torch.cumsum(t_keep, 0, out=t_kept_before[1:])
        return CsrPattern(
            kept_before[self.indptr],
            self.indices[keep],
            t_kept_before[self.t_indptr],
            self.t_indices[t_keep],
            kept_before[self.t_perm[t_keep]],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CsrPattern:
        """The same structure on ``device``."""
        return CsrPattern(*(array.to(device, non_blocking=non_blocking) for array in self._arrays))

    @property
    def _arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.indptr, self.indices, self.t_indptr, self.t_indices, self.t_perm


def indptr_from_counts(counts: Tensor) -> Tensor:
    """Row starts from row lengths: int64 [n] to int64 [n + 1]."""
    indptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=indptr[1:])
    return indptr


def row_index(indptr: Tensor) -> Tensor:
    """Row of every non-zero, int64 [m]."""
    return torch.repeat_interleave(indptr[1:] - indptr[:-1])


def _product(indptr: Tensor, indices: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    if dense.numel() == 0 or indices.numel() == 0:
        return dense.new_zeros(indptr.numel() - 1, dense.size(1))
    compute = dense if dense.dtype in (torch.float32, torch.float64) else dense.float()
    values = values.to(compute.dtype)
    if compute.dtype == torch.float32 and not compute.is_cuda:
        return _weighted_bags(indptr, indices, values, compute).to(dense.dtype)
    size = (indptr.numel() - 1, dense.size(0))
    matrix = torch.sparse_csr_tensor(indptr, indices, values, size=size, check_invariants=False)
    return torch.sparse.mm(matrix, compute).to(dense.dtype)


def _weighted_bags(indptr: Tensor, indices: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """A CSR product as weighted bags of rows, in fp32.

    The kernel behind embedding bags fetches rows ahead of their use, which the sparse product does not: with rows
    of 128 values from beyond the cache it takes a quarter of the time and less. Each row of the result is summed by
    one thread in the order of its non-zeros.
    """
    # Without a gradient of its own the bag keeps nothing for a backward pass.
    values, dense = values.detach(), dense.detach()
    return torch.embedding_bag(dense, indices, indptr, False, 0, False, values, True)[0]


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pattern: CsrPattern, values: Tensor, dense: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.pattern = pattern
        ctx.save_for_backward(values, dense if values.requires_grad else dense.new_empty(0))
        return _product(pattern.indptr, pattern.indices, values, dense)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        values, dense = ctx.saved_tensors
        pattern = ctx.pattern
        grad = grad.contiguous()
        grad_values = grad_dense = None
        if ctx.needs_input_grad[1]:
            grad_values = sddmm(pattern, grad, dense).to(values.dtype)
        if ctx.needs_input_grad[2]:
            grad_dense = _product(pattern.t_indptr, pattern.t_indices, values.index_select(0, pattern.t_perm), grad)
        return None, grad_values, grad_dense


def spmm(pattern: CsrPattern, values: Tensor, dense: Tensor) -> Tensor:
    """Sparse times dense, differentiable in both factors.

    ``values`` [m], ``dense`` [n, d]; returns [n, d]. Low-precision factors are summed in fp32.
    """
    result: Tensor = _Spmm.apply(pattern, values, dense.contiguous())
    return result


def symmetric_product(pattern: CsrPattern, values: Tensor, dense: Tensor) -> Tensor:
    """``(G + Gᵀ) dense`` for the matrix G of ``values`` [m]; not differentiable by itself.

    ``dense`` [n, d], fp32 or fp64; returns [n, d].
    """
    both = pattern.symmetric
    return _product(both.indptr, both.indices, both.spread(values), dense)


def laplacian_product(pattern: CsrPattern, values: Tensor, dense: Tensor) -> Tensor:
    """``(D − G − Gᵀ) dense`` for the matrix G of ``values`` [m]; not differentiable by itself.

    D is the diagonal of G's row sums plus its column sums. ``dense`` [n, d], fp32 or fp64; returns [n, d].
    """
    both = pattern.laplacian
    spread = both.spread(values).neg_()
    spread[both.indptr[:-1].long()] = -segment_sum(spread, both.indptr.long())
    return _product(both.indptr, both.indices, spread, dense)


def sddmm(pattern: CsrPattern, left: Tensor, right: Tensor) -> Tensor:
    """Dot product of ``left[row]`` and ``right[column]`` for every non-zero.

    ``left`` and ``right`` [n, d]; returns [m]. Not differentiable by itself.
    """
    if pattern.nnz == 0 or left.size(1) == 0:
        return left.new_zeros(pattern.nnz)
    # The library refuses more non-zeros than a matrix has places, as multi-edges of a tiny graph are.
    if left.dtype in (torch.float32, torch.float64) and pattern.nnz <= left.size(0) * right.size(0):
        zeros = torch.sparse_csr_tensor(
            pattern.indptr,
            pattern.indices,
            left.new_zeros(pattern.nnz),
            size=(left.size(0), right.size(0)),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(zeros, left, right.t(), beta=0.0).values()
    dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
    rows, out = pattern.rows(), torch.empty(pattern.nnz, dtype=dtype, device=left.device)
    for start, stop in chunks(pattern.nnz, left.size(1)):
        products = left[rows[start:stop]].to(dtype) * right[pattern.indices[start:stop]].to(dtype)
        out[start:stop] = products.sum(1)
    return out


def chunks(count: int, width: int, num_values: int = _CHUNK_VALUES) -> list[tuple[int, int]]:
    """Ranges over ``count`` rows of ``width`` values, each small enough for a core's cache.

    ``num_values`` is the size of a chunk; a GPU wants larger ones than a core's cache holds.
    """
    size = max(1, num_values // max(1, width))
    return [(start, min(count, start + size)) for start in range(0, count, size)]


def segment_sum(values: Tensor, indptr: Tensor) -> Tensor:
    """Sum of each segment: [m] or [m, h] to [n] or [n, h]; differentiable and deterministic."""
    if values.size(0) == 0:
        return values.new_zeros(indptr.numel() - 1, *values.shape[1:])
    return torch.segment_reduce(values, "sum", offsets=indptr, axis=0, initial=0, unsafe=True)


def segment_max(values: Tensor, indptr: Tensor) -> Tensor:
    """Largest value of each segment, 0 where a segment is empty; no gradient: [m(, h)] to [n(, h)]."""
    if values.size(0) == 0:
        return values.new_zeros(indptr.numel() - 1, *values.shape[1:])
    largest = torch.segment_reduce(values.detach(), "max", offsets=indptr, axis=0, unsafe=True)
    return torch.where(torch.isfinite(largest), largest, torch.zeros_like(largest))


class _SegmentLogSoftmax(torch.autograd.Function):
    """Log-softmax within each segment; saves only its output, like the dense one."""

    @staticmethod
    def forward(ctx, values: Tensor, indptr: Tensor, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        # index_select: the same as indexing, several times faster.
        shifted = values - segment_max(values, indptr).index_select(0, rows)
        log_sum = segment_sum(shifted.exp(), indptr).clamp_min(torch.finfo(values.dtype).tiny).log()
        out = shifted - log_sum.index_select(0, rows)
        ctx.save_for_backward(out, indptr, rows)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        out, indptr, rows = ctx.saved_tensors
        return grad - out.exp() * segment_sum(grad.contiguous(), indptr).index_select(0, rows), None, None


def segment_log_softmax(values: Tensor, indptr: Tensor, rows: Tensor | None = None) -> Tensor:
    """Log-softmax within each segment: [m] or [m, h]; at least fp32, stable for any finite input."""
    compute = values if values.dtype == torch.float64 else values.float()
    rows = row_index(indptr) if rows is None else rows
    result: Tensor = _SegmentLogSoftmax.apply(compute, indptr, rows)
    return result
