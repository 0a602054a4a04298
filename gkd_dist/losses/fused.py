"""Scores of edges as one loop that the compiler made: nothing of size [m, d] even in pieces.

`torch.compile` turns "gather both ends, compare, sum over channels" into one loop over edges. It is
compiled once per metric and dtype for all sizes: sizes 0 and 1 and sizes that happen to be equal,
which a compiler takes for constants, never reach it while it is traced, and 0 and 1 never at all.

The result differs from that of `gkd_dist.losses.scores` without compiler in the last bits, so whether
to use it is decided once per run, by `compiler_problem` and the caller, and then passed along.

Shapes: ``n`` nodes, ``m`` edges, ``d`` channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gkd_dist.losses.precision import at_least_fp32

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]  # z [n, d], rows [m], columns [m] to [m]


def _ends(z: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    return at_least_fp32(z.index_select(0, rows)), at_least_fp32(z.index_select(0, cols))


def _sqeuclidean(z: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    here, there = _ends(z, rows, cols)
    return (here - there).square().sum(1)


def _manhattan(z: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    here, there = _ends(z, rows, cols)
    return (here - there).abs().sum(1)


def _dot(z: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    here, there = _ends(z, rows, cols)
    return (here * there).sum(1)


_FORMULAS: dict[str, Scores] = {"sqeuclidean": _sqeuclidean, "manhattan": _manhattan, "dot": _dot}


@functools.cache
def _compiled(form: str, dtype: torch.dtype, device: str) -> Scores:
    """The compiled loop, traced on an example whose sizes all differ from each other."""
    # Checks of every index inside the loop keep a processor from reading ahead: twice the time. `fused_scores`
    # looks at all of them once. On a GPU they stay: they cost nothing there, and looking first would wait for it.
    options: dict[str, Any] | None = {"assert_indirect_indexing": False} if device == "cpu" else None
    loop: Scores = torch.compile(_FORMULAS[form], dynamic=True, fullgraph=True, options=options)
    rows = torch.arange(11, device=device) % 7
    with torch.no_grad():
        loop(torch.zeros(7, 5, dtype=dtype, device=device), rows, rows.flip(0))
    return loop


def fused_scores(z: Tensor, rows: Tensor, cols: Tensor, form: str) -> Tensor | None:
    """Scores [m] of ``z`` [n, d] between ``rows`` and ``cols`` int64 [m]; None for sizes not worth compiling for.

    ``form`` is sqeuclidean, manhattan or dot. Not differentiable by itself. Raises IndexError for an end that
    ``z`` has no row for.
    """
    if min(z.size(0), z.size(1), rows.numel()) < 2:
        return None
    if not z.is_cuda:
        _check_range(rows, z.size(0))
        _check_range(cols, z.size(0))
    loop = _compiled(form, z.dtype, z.device.type)
    with torch.no_grad():
        return loop(z.detach(), rows, cols)


def _check_range(index: Tensor, num_rows: int) -> None:
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= num_rows:
        raise IndexError(f"an edge names row {low if low < 0 else high} of {num_rows}")


def compiler_problem(device: torch.device | str = "cpu") -> str | None:
    """Why scores cannot be compiled on this machine, in one line; None where they can.

    Compiles one of the loops to find out, which takes seconds the first time on a machine.
    """
    try:
        _compiled("sqeuclidean", torch.float32, torch.device(device).type)
    except Exception as error:  # whatever a compiler, its driver or a missing one may raise
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {first}"[:200]
    return None
