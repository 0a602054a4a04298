"""Batch normalisation whose statistics do not depend on how many processes share the work.

In training the statistics are those of a unit's owned rows, or of all rows of the graph where its parts stay on
their ranks; running statistics are not touched by
``forward``, because the number of forwards differs between world sizes. They collect in ``pending``
(sum, sum of squares and count, float64 [2 * d + 1]) and are merged by count once per optimizer step, by
`merge_running_statistics`.

`OwnedBatchNorm` is the norm of the built-in models. `own_batch_norms` puts `OwnedBatchNorm1d` in the place of
every ``torch.nn.BatchNorm1d`` of any other model, PyG's ``BatchNorm`` included; names and state stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric import nn as pyg

from gkd_dist.errors import ModelError
from gkd_dist.graph import HaloRows, LocalGraph


class _Collecting(nn.Module):
    """Statistics that wait for the end of the optimizer step."""

    running_mean: Tensor | None
    running_var: Tensor | None
    pending: Tensor | None

    def _moments(self, owned: Tensor, graph: LocalGraph | None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of ``owned`` [k, d], or of those of all ranks; what was seen is collected."""
        if graph is None or not graph.recomputing:
            self._collect(owned.detach())
        return moments(owned, None if graph is None else graph.halo)

    def _collect(self, owned: Tensor) -> None:
        values = owned.double()
        count = values.new_tensor([values.size(0)])
        total = torch.cat([values.sum(0), values.square().sum(0), count])
        self.pending = total if self.pending is None else self.pending + total

    def take_pending(self) -> Tensor:
        """What was collected since the last call, float64 [2 * d + 1]; zeros where nothing was."""
        pending, mean = self.pending, self.running_mean
        self.pending = None
        assert mean is not None
        return (
            torch.zeros(2 * mean.numel() + 1, dtype=torch.float64, device=mean.device) if pending is None else pending
        )

    def _factor(self) -> float:
        """How far the running statistics move."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, total: Tensor) -> None:
        """Moves the running statistics towards those of ``total`` (summed over all ranks)."""
        assert self.running_mean is not None
        assert self.running_var is not None
        width, count = self.running_mean.numel(), float(total[-1])
        if count == 0:
            return
        mean = total[:width] / count
        var = (total[width:-1] / count - mean.square()).clamp_min(0) * (count / max(count - 1, 1))
        factor = self._factor()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(var.to(self.running_var.dtype), factor)


class OwnedBatchNorm(_Collecting):
    """Batch normalisation over the owned rows of a unit."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.pending = None

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, d] to [n, d]."""
        count = graph.num_nodes if graph.num_owned is None else graph.num_owned
        if self.training and (count > 0 or graph.halo is not None):
            mean, var = self._moments(x[:count].float(), graph)
        else:
            mean, var = self.running_mean, self.running_var
        scale = (var + self.eps).rsqrt().to(x.dtype) * self.weight
        return (x - mean.to(x.dtype)) * scale + self.bias

    def _factor(self) -> float:
        return self.momentum


class OwnedBatchNorm1d(nn.BatchNorm1d, _Collecting):
    """``torch.nn.BatchNorm1d`` over the owned rows of a unit, with the same parameters and buffers.

    Rows are nodes or, within a convolution over edges, edges: those of owned nodes come first in both
    cases. `tell_norms` says how many there are before each run of the model.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm1d, path: str, on_edges: bool) -> OwnedBatchNorm1d:
        """Shares parameters and buffers with ``norm``, which is found at ``path`` of its model."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
        new._parameters, new._buffers, new.training = norm._parameters, norm._buffers, norm.training
        new.path, new.on_edges, new.pending, new.graph = path, on_edges, None, None
        return new

    path: str
    on_edges: bool
    graph: LocalGraph | None

    def forward(self, x: Tensor) -> Tensor:
        """[n, d] to [n, d], or [m, d] to [m, d] on edges."""
        if not self.training:
            out: Tensor = super().forward(x)
            return out
        count, graph = self._num_owned_rows(x.size(0)), self.graph
        if count == 0 and (graph is None or graph.halo is None):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        mean, var = self._moments(x[:count].float(), graph)
        out = (x - mean.to(x.dtype)) * (var + self.eps).rsqrt().to(x.dtype)
        return out if self.weight is None else out * self.weight + self.bias

    def _num_owned_rows(self, num_rows: int) -> int:
        graph = self.graph
        if graph is None or graph.num_owned is None:
            return num_rows
        if not self.on_edges and num_rows in (graph.num_nodes, graph.num_rows):
            return graph.num_owned
        if num_rows == graph.num_edges:
            return int(graph.pattern.indptr[graph.num_owned])
        raise ModelError(
            f"{self.path} (BatchNorm1d) got {num_rows} rows in a unit of {graph.num_nodes} nodes and {graph.num_edges} "
            "edges, so that it is not known which of them are owned; normalise rows of nodes, or use torch.nn.LayerNorm"
        )

    def _factor(self) -> float:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


def moments(rows: Tensor, halo: HaloRows | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [d] of ``rows`` [k, d], or of those of all ranks."""
    if halo is None:
        return rows.mean(0), rows.var(0, unbiased=False)
    values = rows.double()  # sums of squares cancel in fp32
    count = values.new_tensor([values.size(0)])
    total = halo.total(torch.cat([values.sum(0), values.square().sum(0), count]))
    first, second = (total[:-1] / total[-1].clamp_min(1)).chunk(2)
    return first.float(), (second - first.square()).clamp_min(0).float()


def is_replaceable(path: str, module: nn.Module) -> bool:
    """Whether `own_batch_norms` replaces ``module``, found at ``path``; a subclass may do anything, and a root has no
    place to be put into."""
    return bool(path) and type(module) is nn.BatchNorm1d and module.running_mean is not None


def own_batch_norms(model: nn.Module) -> None:
    """Puts an `OwnedBatchNorm1d` in the place of every ``torch.nn.BatchNorm1d`` of ``model`` that keeps statistics."""
    replaced: dict[int, nn.Module] = {}
    edgewise = {id(inner) for conv in model.modules() if isinstance(conv, pyg.EdgeConv) for inner in conv.modules()}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not is_replaceable(path, module):
            continue
        new = replaced.setdefault(id(module), OwnedBatchNorm1d.of(module, path, id(module) in edgewise))
        parent, _, name = path.rpartition(".")
        _set(model.get_submodule(parent), name, new)


def _set(parent: Any, name: str, module: nn.Module) -> None:
    parent._modules[name] = module


def tell_norms(model: nn.Module, graph: LocalGraph) -> None:
    """Tells the `OwnedBatchNorm1d` of ``model`` which graph its rows are of; to be called before each run."""
    for module in model.modules():
        if isinstance(module, OwnedBatchNorm1d):
            module.graph = graph


def collecting_norms(model: nn.Module) -> list[_Collecting]:
    """The norms whose statistics wait for the end of a step, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, OwnedBatchNorm | OwnedBatchNorm1d)]
