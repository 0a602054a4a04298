"""Raw scores of edges: how far apart, or how alike, the embeddings at their two ends are.

No tensor of size [m, d] is built or kept. Forward is one compiled loop over edges (`compiled=True`), or
compares the ends of a cache-sized chunk of edges at a time; backward needs the scores' gradient g
alone, since

    ∂/∂Z Σ_ij g_ij ‖z_i − z_j‖² = 2 (D − G − Gᵀ) Z        G: matrix of g, D: its row plus column sums
    ∂/∂Z Σ_ij g_ij  z_i · z_j   =       (G + Gᵀ) Z

are one sparse product each. Squared distances are sums of squared differences, never ‖a‖² + ‖b‖² − 2ab, which
cancels for near neighbours. Low-precision embeddings are computed on in fp32, fp64 stays fp64.

Shapes: ``n`` nodes, ``m`` edges of a pattern (row i = target, column j = source), ``d`` channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gkd_dist.errors import ConfigError, GraphError
from gkd_dist.losses.fused import fused_scores
from gkd_dist.losses.neighbours import Neighbours
from gkd_dist.losses.precision import at_least_fp32
from gkd_dist.sparse import CsrPattern, chunks, laplacian_product, sddmm, symmetric_product

Metric = Literal["sqeuclidean", "manhattan", "cosine", "dot"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_GPU_CHUNK_VALUES = 1 << 24  # 64 MiB of fp32: enough work to hide a kernel launch
_OFFSET_SHARE = 0.9  # of the squared length of all rows, from which the mean row is taken off
_SHORTEST_ROW = 1e-12  # a shorter row has no direction: its cosine is 0, without a gradient


def edge_scores(
    z: Tensor, edge_index: Tensor | Neighbours, metric: Metric = "sqeuclidean", *, compiled: bool = False
) -> Tensor:
    """Score of every edge, differentiable in ``z`` without an [E, d] tensor.

    ``z`` [n, d]; ``edge_index`` int64 [2, E], row 0 source and row 1 target, in any order; returns
    [E], fp32 or fp64, in the order of ``edge_index``. A `Neighbours` in its place saves the sorting
    where the same edges are used again; the scores then follow the order of its pattern. ``compiled``
    uses `torch.compile`: seconds the first time, faster from then on, other last bits.

    Raises `ConfigError` for an unknown metric and `GraphError` for edges that ``z`` has no rows for.
    """
    if isinstance(edge_index, Neighbours):
        return pattern_scores(z, edge_index.pattern, metric, rows=edge_index.rows, compiled=compiled)
    edges = Neighbours.of_edges(edge_index, z.size(0), self_loops=True)
    scores = pattern_scores(z, edges.pattern, metric, rows=edges.rows, compiled=compiled)
    position = torch.empty_like(edges.picked)
    position[edges.picked] = torch.arange(position.numel(), device=position.device)
    return scores[position]


def pattern_scores(
    z: Tensor, pattern: CsrPattern, metric: Metric, *, rows: Tensor | None = None, compiled: bool = False
) -> Tensor:
    """`edge_scores` on a CSR pattern, without a sort: ``z`` [n, d] to [m] in the pattern's order.

    ``rows`` int64 [m] is ``pattern.rows()`` where the caller has it at hand.
    """
    if z.dim() != 2 or not z.is_floating_point():
        raise GraphError(f"embeddings must be floating point of shape [n, d] (got {z.dtype} {list(z.shape)})")
    if z.size(0) != pattern.num_rows:
        raise GraphError(f"the edges are of {pattern.num_rows} nodes, but the embeddings have {z.size(0)} rows")
    if metric not in METRICS:
        raise ConfigError(f"metric {metric!r} is unknown; use one of {', '.join(METRICS)}")
    rows = pattern.rows() if rows is None else rows
    with torch.autocast(z.device.type, enabled=False):
        if metric == "cosine":
            z, metric = cast(Tensor, _Directions.apply(at_least_fp32(z))), "dot"
        scores: Tensor = _FUNCTIONS[metric].apply(z.contiguous(), pattern, rows, compiled)
    return scores


class _Directions(torch.autograd.Function):
    """Rows scaled to length 1; rows of length 0 become 0 and get no gradient. Few [n, d] tensors on the way."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        has_direction = length > _SHORTEST_ROW
        # Divided, not multiplied by a reciprocal: a short row's reciprocal may overflow.
        out = z / torch.where(has_direction, length, 1.0)
        out.masked_fill_(~has_direction, 0.0)
        ctx.save_for_backward(out, torch.where(has_direction, length, float("inf")))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        out, length = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, out).unsqueeze(1)
        return torch.addcmul(grad, out, along, value=-1).div_(length)


def _compared(z: Tensor, rows: Tensor, cols: Tensor, form: str) -> Tensor:
    """Σ|gap| or Σ gap² of every edge, a chunk of edges at a time: [m]."""
    scores = torch.empty(rows.numel(), dtype=at_least_fp32(z[:0]).dtype, device=z.device)
    for start, stop, gap in _gaps(z, rows, cols):
        torch.sum(gap.square_() if form == "sqeuclidean" else gap.abs_(), 1, out=scores[start:stop])
    return scores


def _gaps(z: Tensor, rows: Tensor, cols: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, z[row] − z[column] of these edges), in the precision of scores."""
    if z.is_cuda or z.dtype == torch.float64:
        ranges = chunks(rows.numel(), z.size(1), *([_GPU_CHUNK_VALUES] if z.is_cuda else []))
        for start, stop in ranges:
            here, there = z.index_select(0, rows[start:stop]), z.index_select(0, cols[start:stop])
            yield start, stop, at_least_fp32(here).sub_(at_least_fp32(there))
        return
    # A bag of two rows with weights 1 and −1 is their exact difference, and its kernel reads ahead.
    z = z.detach().float()
    ranges = chunks(rows.numel(), z.size(1))
    longest = max((stop - start for start, stop in ranges), default=0)
    bags = torch.arange(0, 2 * longest + 1, 2)
    signs = torch.tensor([1.0, -1.0]).repeat(longest)
    for start, stop in ranges:
        ends, count = torch.stack([rows[start:stop], cols[start:stop]], 1).flatten(), stop - start
        weights = signs[: 2 * count]
        yield start, stop, torch.embedding_bag(z, ends, bags[: count + 1], False, 0, False, weights, True)[0]


def _centred(z: Tensor) -> Tensor:
    """``z`` [n, d] in the precision of scores, without an offset that would drown its differences.

    Only differences matter to a Laplacian, whose two halves cancel the less, the smaller the values.
    Where the mean row is small anyway the copy is saved.
    """
    z = at_least_fp32(z)
    mean = z.mean(0)
    if not z.is_cuda:
        offset, length = float(torch.linalg.vector_norm(mean)), float(torch.linalg.vector_norm(z))
        if offset * offset * z.size(0) <= _OFFSET_SHARE * length * length:
            return z
    return z - mean


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, pattern: CsrPattern, rows: Tensor, compiled: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.pattern = pattern
        ctx.save_for_backward(z)
        scores = fused_scores(z, rows, pattern.indices, "sqeuclidean") if compiled else None
        return _compared(z, rows, pattern.indices, "sqeuclidean") if scores is None else scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (z,) = ctx.saved_tensors
        if ctx.pattern.nnz == 0:
            return torch.zeros_like(z), None, None, None
        return laplacian_product(ctx.pattern, grad * 2, _centred(z)).to(z.dtype), None, None, None


class _ManhattanDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, pattern: CsrPattern, rows: Tensor, compiled: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.pattern = pattern
        ctx.save_for_backward(z, rows)
        scores = fused_scores(z, rows, pattern.indices, "manhattan") if compiled else None
        return _compared(z, rows, pattern.indices, "manhattan") if scores is None else scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        z, rows = ctx.saved_tensors
        out = torch.zeros_like(z, dtype=grad.dtype)
        for start, stop, gap in _gaps(z, rows, ctx.pattern.indices):
            pull = gap.sign_().mul_(grad[start:stop].unsqueeze(1))
            out.index_add_(0, rows[start:stop], pull).index_add_(0, ctx.pattern.indices[start:stop], pull, alpha=-1)
        return out.to(z.dtype), None, None, None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, pattern: CsrPattern, rows: Tensor, compiled: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.pattern = pattern
        ctx.save_for_backward(z)
        scores = fused_scores(z, rows, pattern.indices, "dot") if compiled else None
        return at_least_fp32(sddmm(pattern, z, z)) if scores is None else scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (z,) = ctx.saved_tensors
        out = symmetric_product(ctx.pattern, grad.contiguous(), at_least_fp32(z))
        return out.to(z.dtype), None, None, None


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    "sqeuclidean": _SquaredDistance,
    "manhattan": _ManhattanDistance,
    "dot": _Dot,
}
