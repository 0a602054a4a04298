"""Models as a stack of layers, so that inference can go layer by layer and losses can name one.

Layer ``l`` (from 1) is the output ``z_l`` of convolution ``l`` after its norm, before activation and
dropout; the last one is the logits. The protocol is three members: ``num_layers``,
``forward_layer`` and ``activate``. Any module that has them is treated like the built-in ones.

Shapes: ``n`` local nodes, ``d_l`` width of layer l, ``c`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd_dist.config import ModelConfig
from gkd_dist.errors import ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.convs import Dense, build_conv
from gkd_dist.models.norm import OwnedBatchNorm


def is_layered(model: nn.Module) -> bool:
    """True where ``model`` follows the layer protocol."""
    return all(hasattr(model, name) for name in ("num_layers", "forward_layer", "activate"))


def forward_layers(
    model: Any, x: Tensor, graph: LocalGraph, layers: Sequence[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [n, c] of a layered model and the outputs ``z_l`` [n, d_l] of ``layers`` (from 1).

    `ModelError` for a layer that the model does not have.
    """
    absent = sorted(layer for layer in layers if not 1 <= layer <= model.num_layers)
    if absent:
        raise ModelError(f"the model has layers 1 to {model.num_layers} (got {absent[0]}); ask for one of those")
    kept: dict[int, Tensor] = {}
    h = model.activate(0, x)
    for layer in range(1, model.num_layers + 1):
        z = model.forward_layer(layer, h, graph)
        if layer in layers:
            kept[layer] = z
        if layer < model.num_layers:
            h = model.activate(layer, z)
    return z, kept


def as_local_graph(edges: LocalGraph | Tensor, num_nodes: int, edge_weight: Tensor | None = None) -> LocalGraph:
    """``edges`` itself, or the whole graph under an ``edge_index`` [2, m]."""
    if isinstance(edges, LocalGraph):
        return edges
    return LocalGraph.from_edge_index(edges, num_nodes, edge_weight)


class LayeredModel(nn.Module):
    """GCN, GraphSAGE, GAT, GIN or MLP of any depth."""

    def __init__(self, config: ModelConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.num_layers = config.layers
        self.act, self.dropout, self.input_dropout = config.act, config.dropout, config.input_dropout
        hidden = config.hidden * config.heads
        widths = [in_channels, *[hidden] * (config.layers - 1), out_channels]
        self.convs, self.norms, self.skips = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer, (d_in, d_out) in enumerate(pairwise(widths), start=1):
            last = layer == config.layers
            heads = 1 if last else config.heads
            self.convs.append(build_conv(config.kind, d_in, d_out // heads, heads, config.dropout))
            self.norms.append(_norm("none" if last else config.norm, d_out))
            self.skips.append(nn.Linear(d_in, d_out, bias=False) if config.residual and not last else nn.Identity())
        self.residual = config.residual

    def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
        """``z_l`` [n, d_l] from the activations ``h`` [n, d_(l-1)] below it."""
        z = self.convs[layer - 1](h, graph)
        if self.residual and layer < self.num_layers:
            z = z + self.skips[layer - 1](h)
        norm = self.norms[layer - 1]
        out: Tensor = norm(z, graph) if isinstance(norm, OwnedBatchNorm) else norm(z)
        return out

    def activate(self, layer: int, z: Tensor) -> Tensor:
        """``h_l`` from ``z_l``: activation and dropout; for layer 0 dropout on the input alone."""
        if layer == 0:
            return F.dropout(z, self.input_dropout, self.training)
        return F.dropout(getattr(torch.nn.functional, self.act)(z), self.dropout, self.training)

    def forward(
        self,
        x: Tensor,
        edges: LocalGraph | Tensor,
        edge_weight: Tensor | None = None,
        *,
        layers: Sequence[int] = (),
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Logits [n, c]; with ``layers`` also a dict of their outputs.

        ``edges`` is an ``edge_index`` int64 [2, m] of a whole graph, or a `LocalGraph`.
        """
        graph = as_local_graph(edges, x.size(0), edge_weight)
        logits, kept = forward_layers(self, x, graph, layers)
        return (logits, kept) if layers else logits

    @property
    def uses_graph(self) -> bool:
        """False for an MLP."""
        return not isinstance(self.convs[0], Dense)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(width)
    return OwnedBatchNorm(width) if kind == "batch" else nn.Identity()
