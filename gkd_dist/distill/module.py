"""The module that engines wrap: one call signature for every kind of student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.models.build import run_model
from gkd_dist.models.norm import OwnedBatchNorm
from gkd_dist.world import World


class StudentModule(nn.Module):
    """A model whose forward takes a local graph and returns logits and layer outputs as a tuple."""

    def __init__(self, model: nn.Module, recompute: bool = False) -> None:
        super().__init__()
        self.model, self.recompute = model, recompute

    def forward(self, x: Tensor, graph: LocalGraph, layers: Sequence[int] = ()) -> tuple[Tensor, ...]:
        """(logits [n, c], one output [n, d_l] per layer asked for)."""
        logits, kept = run_model(self.model, x, graph, layers, self.recompute)
        return (logits, *(kept[layer] for layer in layers))


def call_module(
    module: nn.Module, batch: Batch, layers: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, dict[int, Tensor]]:
    """Runs a (wrapped) `StudentModule` on a batch; results come back in fp32."""
    out = module(batch.x.to(dtype), batch.graph, tuple(layers))
    return out[0].float(), {layer: z.float() for layer, z in zip(layers, out[1:], strict=True)}


def merge_running_statistics(module: nn.Module, world: World) -> None:
    """Merges what batch norms saw in this step over all ranks, weighted by rows."""
    norms = [m for m in module.modules() if isinstance(m, OwnedBatchNorm)]
    if not norms:
        return
    pending = [norm.take_pending() for norm in norms]
    merged = world.sum(torch.cat(pending))
    for norm, total in zip(norms, merged.split([p.numel() for p in pending]), strict=True):
        norm.merge(total)
