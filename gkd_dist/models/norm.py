"""Batch normalisation whose statistics do not depend on how many processes share the work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gkd_dist.graph import HaloRows, LocalGraph


class OwnedBatchNorm(nn.Module):
    """Batch normalisation over the owned rows of a unit.

    In training the statistics are those of the unit's owned rows, or of all rows of the graph where its
    parts stay on their ranks; running statistics are not
    touched by ``forward``, because the number of forwards differs between world sizes. They
    collect in ``pending`` (sum, sum of squares and count, float64 [2 * d + 1]) and are merged by
    count once per optimizer step, by `merge_running_statistics`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.pending: Tensor | None = None

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, d] to [n, d]."""
        count = graph.num_nodes if graph.num_owned is None else graph.num_owned
        if self.training and (count > 0 or graph.halo is not None):
            owned = x[:count].float()
            mean, var = _moments(owned, graph.halo)
            if not graph.recomputing:
                self._collect(owned.detach())
        else:
            mean, var = self.running_mean, self.running_var
        scale = (var + self.eps).rsqrt().to(x.dtype) * self.weight
        return (x - mean.to(x.dtype)) * scale + self.bias

    def _collect(self, owned: Tensor) -> None:
        values = owned.double()
        count = values.new_tensor([values.size(0)])
        total = torch.cat([values.sum(0), values.square().sum(0), count])
        self.pending = total if self.pending is None else self.pending + total

    def take_pending(self) -> Tensor:
        """What was collected since the last call, float64 [2 * d + 1]; zeros where nothing was."""
        pending = self.pending
        self.pending = None
        width = self.weight.numel()
        return (
            torch.zeros(2 * width + 1, dtype=torch.float64, device=self.weight.device) if pending is None else pending
        )

    @torch.no_grad()
    def merge(self, total: Tensor) -> None:
        """Moves the running statistics towards those of ``total`` (summed over all ranks)."""
        width, count = self.running_mean.numel(), float(total[-1])
        if count == 0:
            return
        mean = total[:width] / count
        var = (total[width:-1] / count - mean.square()).clamp_min(0) * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)


def _moments(rows: Tensor, halo: HaloRows | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [d] of ``rows`` [k, d], or of those of all ranks."""
    if halo is None:
        return rows.mean(0), rows.var(0, unbiased=False)
    values = rows.double()  # sums of squares cancel in fp32
    count = values.new_tensor([values.size(0)])
    total = halo.total(torch.cat([values.sum(0), values.square().sum(0), count]))
    first, second = (total[:-1] / total[-1].clamp_min(1)).chunk(2)
    return first.float(), (second - first.square()).clamp_min(0).float()
