"""Local structure preserving loss (Yang et al., CVPR 2020).

For a node i with in-neighbours j, ``p_ij = softmax_j K(z_i, z_j)`` describes where i stands among its
neighbours. The loss compares the student's p with the teacher's by a KL divergence per node. Both are
distributions over the same neighbours, so that widths may differ and no projection is needed.

A node without neighbours has no structure and is not counted; a node with one neighbour contributes 0
and is counted.

Shapes: ``n`` nodes, ``m`` edges of a pattern, ``E`` edges as given.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gkd_dist.errors import ConfigError, GraphError
from gkd_dist.losses.kernels import Kernel, KernelName
from gkd_dist.losses.median import median_of_histogram, score_histogram
from gkd_dist.losses.neighbours import Neighbours
from gkd_dist.losses.scores import pattern_scores
from gkd_dist.sparse import segment_log_softmax

Direction = Literal["student||teacher", "teacher||student"]
Reduction = Literal["nodes", "edges"]


def lsp_sum(student: Tensor, teacher: Tensor, neighbours: Neighbours, direction: Direction) -> Tensor:
    """Sum over all nodes of the KL divergence between two local structures, a scalar.

    ``student`` and ``teacher`` [m] are arguments of the softmax; gradients reach the student alone.
    """
    indptr, rows = neighbours.pattern.indptr, neighbours.rows
    log_s = segment_log_softmax(student, indptr, rows)
    log_t = segment_log_softmax(teacher.detach(), indptr, rows)
    if direction == "student||teacher":
        return (log_s.exp() * (log_s - log_t)).sum()
    return (log_t.exp() * (log_t - log_s)).sum()


def lsp_loss(
    student_z: Tensor,
    edge_index: Tensor | Neighbours,
    *,
    teacher_z: Tensor | None = None,
    teacher_scores: Tensor | None = None,
    kernel: KernelName = "rbf",
    sigma: float | Literal["median"] = 100.0,
    teacher_sigma: float | Literal["median"] | None = None,
    direction: Direction = "student||teacher",
    reduction: Reduction = "nodes",
    outer_softmax: bool = True,
    self_loops: bool = False,
    c: float = 0.0,
    degree: int = 2,
    temperature: float = 1.0,
    compiled: bool = False,
) -> Tensor:
    """Mean divergence of the student's local structures from the teacher's, a scalar.

    Args:
        student_z: [n, d], where the gradient goes.
        edge_index: int64 [2, E] in any order, row 0 source and row 1 target; or `Neighbours` made of
            it once, which then decide about self-loops.
        teacher_z: [n, d'] of any width, or instead
        teacher_scores: [E] raw scores of the kernel's metric in the order of ``edge_index``.
        kernel: rbf, euclidean, laplacian, linear, poly or cosine; formulas in `gkd_dist.losses.kernels`.
        sigma: width of the kernel, or "median": from the median score of the edges, per side.
        teacher_sigma: width on the teacher's side; None: ``sigma``.
        direction: the paper's KL(student || teacher) or the KL(teacher || student) of public codes.
        reduction: mean over nodes with neighbours, or over edges (smaller by the average degree).
        outer_softmax: the paper's softmax of kernel values; False: the plain softmax of −distance.
        self_loops: whether a node counts among its own neighbours.
        c: of the polynomial kernel.
        degree: of the polynomial kernel.
        temperature: divides the argument of the softmax.
        compiled: scores by `torch.compile`: seconds the first time, faster from then on, other last bits.

    Raises `ConfigError` for wrong options and `GraphError` for tensors that do not fit together.
    """
    form = Kernel(kernel, outer_softmax, c, degree, temperature)
    _check(direction, reduction, teacher_z, teacher_scores)
    edges = edge_index
    if not isinstance(edges, Neighbours):
        edges = Neighbours.of_edges(edges, student_z.size(0), self_loops=self_loops)
    student = pattern_scores(student_z, edges.pattern, form.metric, rows=edges.rows, compiled=compiled)
    with torch.no_grad():
        if teacher_scores is None:
            assert teacher_z is not None
            teacher = pattern_scores(teacher_z, edges.pattern, form.metric, rows=edges.rows, compiled=compiled)
        else:
            given = edge_index.size(1) if isinstance(edge_index, Tensor) else None
            teacher = _picked(teacher_scores, edges, given)
    sigma_s = _width(form, sigma, student, edges)
    sigma_t = _width(form, sigma if teacher_sigma is None else teacher_sigma, teacher, edges)
    total = lsp_sum(form.logits(student, sigma_s), form.logits(teacher, sigma_t), edges, direction)
    return total / max(1, edges.num_nodes if reduction == "nodes" else edges.num_edges)


def neighbour_histogram(scores: Tensor, neighbours: Neighbours) -> Tensor:
    """`score_histogram` of the edges that are no self-loops: ``scores`` [m] to int64 [65536]."""
    return score_histogram(scores[neighbours.rows != neighbours.pattern.indices])


def _width(kernel: Kernel, sigma: float | str, scores: Tensor, neighbours: Neighbours) -> float:
    kernel.check_sigma(sigma)
    if not isinstance(sigma, str):
        return sigma
    if neighbours.num_edges == 0:
        return 1.0  # no edge asks for it
    return kernel.sigma_from_median(median_of_histogram(neighbour_histogram(scores, neighbours)))


def _picked(scores: Tensor, neighbours: Neighbours, num_edges: int | None) -> Tensor:
    short = neighbours.num_edges > 0 and int(neighbours.picked.max()) >= scores.numel()
    if scores.dim() != 1 or short or (num_edges is not None and scores.numel() != num_edges):
        raise GraphError(
            f"teacher_scores must have one score per edge of edge_index (got {list(scores.shape)} "
            f"for {neighbours.num_edges if num_edges is None else num_edges} edges)"
        )
    return scores.index_select(0, neighbours.picked)


def _check(direction: str, reduction: str, teacher_z: Tensor | None, teacher_scores: Tensor | None) -> None:
    if direction not in ("student||teacher", "teacher||student"):
        raise ConfigError(f"direction must be student||teacher or teacher||student (got {direction!r})")
    if reduction not in ("nodes", "edges"):
        raise ConfigError(f"reduction must be nodes or edges (got {reduction!r})")
    if (teacher_z is None) == (teacher_scores is None):
        given = "neither" if teacher_z is None else "both"
        raise ConfigError(f"lsp_loss needs teacher_z or teacher_scores (got {given}); give exactly one")
