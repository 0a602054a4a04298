"""Raw scores of edges: how far apart, or how alike, the embeddings at their two ends are.

No tensor of size [m, d] is built or kept. Forward gathers the ends of a cache-sized chunk of edges at
a time; backward needs the scores' gradient g alone, since

    ∂/∂Z Σ_ij g_ij ‖z_i − z_j‖² = 2 (D − G − Gᵀ) Z        G: matrix of g, D: its row plus column sums
    ∂/∂Z Σ_ij g_ij  z_i · z_j   =       (G + Gᵀ) Z

are sparse products. Squared distances are sums of squared differences, never ‖a‖² + ‖b‖² − 2ab, which
cancels for near neighbours. Low-precision embeddings are computed on in fp32, fp64 stays fp64.

Shapes: ``n`` nodes, ``m`` edges of a pattern (row i = target, column j = source), ``d`` channels.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_dist.errors import ConfigError, GraphError
from gkd_dist.losses.neighbours import Neighbours
from gkd_dist.losses.precision import at_least_fp32
from gkd_dist.sparse import CsrPattern, chunks, sddmm, segment_sum, symmetric_product

Metric = Literal["sqeuclidean", "manhattan", "cosine", "dot"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_GPU_CHUNK_VALUES = 1 << 24  # 64 MiB of fp32: enough work to hide a kernel launch
_SHORTEST_ROW = 1e-12  # a shorter row has no direction: its cosine is 0, without a gradient


def edge_scores(z: Tensor, edge_index: Tensor | Neighbours, metric: Metric = "sqeuclidean") -> Tensor:
    """Score of every edge, differentiable in ``z`` without an [E, d] tensor.

    ``z`` [n, d]; ``edge_index`` int64 [2, E], row 0 source and row 1 target, in any order; returns
    [E], fp32 or fp64, in the order of ``edge_index``. A `Neighbours` in its place saves the sorting
    where the same edges are used again; the scores then follow the order of its pattern.

    Raises `ConfigError` for an unknown metric and `GraphError` for edges that ``z`` has no rows for.
    """
    if isinstance(edge_index, Neighbours):
        return pattern_scores(z, edge_index.pattern, metric, rows=edge_index.rows)
    edges = Neighbours.of_edges(edge_index, z.size(0), self_loops=True)
    scores = pattern_scores(z, edges.pattern, metric, rows=edges.rows)
    position = torch.empty_like(edges.picked)
    position[edges.picked] = torch.arange(position.numel(), device=position.device)
    return scores[position]


def pattern_scores(z: Tensor, pattern: CsrPattern, metric: Metric, *, rows: Tensor | None = None) -> Tensor:
    """`edge_scores` on a CSR pattern, without a sort: ``z`` [n, d] to [m] in the pattern's order.

    ``rows`` int64 [m] is ``pattern.rows()`` where the caller has it at hand.
    """
    if z.dim() != 2 or not z.is_floating_point():
        raise GraphError(f"embeddings must be floating point of shape [n, d] (got {z.dtype} {list(z.shape)})")
    if z.size(0) != pattern.num_rows:
        raise GraphError(f"the edges are of {pattern.num_rows} nodes, but the embeddings have {z.size(0)} rows")
    rows = pattern.rows() if rows is None else rows
    with torch.autocast(z.device.type, enabled=False):
        if metric == "sqeuclidean":
            return _apply(_SquaredDistance, z, pattern, rows)
        if metric == "manhattan":
            return _apply(_ManhattanDistance, z, pattern, rows)
        if metric == "dot":
            return _apply(_Dot, z, pattern, rows)
        if metric == "cosine":
            return _apply(_Dot, _directions(z), pattern, rows)
    raise ConfigError(f"metric {metric!r} is unknown; use one of {', '.join(METRICS)}")


def _apply(function: type[torch.autograd.Function], z: Tensor, pattern: CsrPattern, rows: Tensor) -> Tensor:
    scores: Tensor = function.apply(z.contiguous(), pattern, rows)
    return scores


def _directions(z: Tensor) -> Tensor:
    """Rows scaled to length 1; rows of length 0 stay 0 and get no gradient."""
    z = at_least_fp32(z)
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    has_direction = length > _SHORTEST_ROW
    return torch.where(has_direction, z / torch.where(has_direction, length, 1.0), 0.0)


def _chunks(pattern: CsrPattern, z: Tensor) -> list[tuple[int, int]]:
    if z.is_cuda:
        return chunks(pattern.nnz, z.size(1), _GPU_CHUNK_VALUES)
    return chunks(pattern.nnz, z.size(1))


def _difference(z: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    return at_least_fp32(z.index_select(0, rows)).sub_(at_least_fp32(z.index_select(0, cols)))


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, pattern: CsrPattern, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.pattern = pattern
        ctx.save_for_backward(z)
        scores = torch.empty(pattern.nnz, dtype=at_least_fp32(z[:0]).dtype, device=z.device)
        for start, stop in _chunks(pattern, z):
            gap = _difference(z, rows[start:stop], pattern.indices[start:stop])
            torch.sum(gap.square_(), 1, out=scores[start:stop])
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (z,) = ctx.saved_tensors
        pattern: CsrPattern = ctx.pattern
        if pattern.nnz == 0:
            return torch.zeros_like(z), None, None
        grad = grad.contiguous() * 2
        # Only differences matter: without their common offset the two halves of the Laplacian
        # cancel less.
        centred = at_least_fp32(z)
        centred = centred - centred.mean(0)
        degree = segment_sum(grad, pattern.indptr) + segment_sum(grad[pattern.t_perm], pattern.t_indptr)
        out = symmetric_product(pattern, grad, centred).neg_()
        return out.addcmul_(degree.unsqueeze(1), centred).to(z.dtype), None, None


class _ManhattanDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, pattern: CsrPattern, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.pattern = pattern
        ctx.save_for_backward(z, rows)
        scores = torch.empty(pattern.nnz, dtype=at_least_fp32(z[:0]).dtype, device=z.device)
        for start, stop in _chunks(pattern, z):
            gap = _difference(z, rows[start:stop], pattern.indices[start:stop])
            torch.sum(gap.abs_(), 1, out=scores[start:stop])
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        z, rows = ctx.saved_tensors
        cols = ctx.pattern.indices
        out = torch.zeros_like(z, dtype=grad.dtype)
        for start, stop in _chunks(ctx.pattern, z):
            here, there = rows[start:stop], cols[start:stop]
            pull = _difference(z, here, there).sign_().mul_(grad[start:stop].unsqueeze(1))
            out.index_add_(0, here, pull).index_add_(0, there, pull, alpha=-1)
        return out.to(z.dtype), None, None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, pattern: CsrPattern, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.pattern = pattern
        ctx.save_for_backward(z)
        return at_least_fp32(sddmm(pattern, z, z))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (z,) = ctx.saved_tensors
        return symmetric_product(ctx.pattern, grad.contiguous(), at_least_fp32(z)).to(z.dtype), None, None
