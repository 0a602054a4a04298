"""PyG's ``BasicGNN`` family (GCN, GraphSAGE, GAT, GIN, PNA, EdgeCNN) by the layer protocol.

`BasicGnnLayers` is a view: the module stays as PyG made it, with PyG's parameter names.

Shapes: ``n`` local nodes, ``d_l`` width of layer l, ``c`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch_geometric.nn.models.basic_gnn import BasicGNN

from gkd_dist.graph import LocalGraph
from gkd_dist.models.pyg_convs import apply_conv, why_not_local


class BasicGnnLayers:
    """The layers of a `BasicGNN`: ``z_l`` is the output of conv l after its norm.

    Without jumping knowledge the last layer is the logits. With it, ``readout`` joins the
    activations of all layers (``last``: of the last one) and applies the final linear map.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.num_layers: int = model.num_layers
        every = tuple(range(1, self.num_layers + 1))
        self.readout_layers = every if hasattr(model, "jk") else every[-1:]
        self._activated: dict[int, tuple[Tensor, Tensor]] = {}

    def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
        """``z_l`` [n, d_l] from the activations ``h`` [n, d_(l-1)] below it."""
        model = self.model
        z = apply_conv(model.convs[layer - 1], h, graph, model.supports_edge_weight, model.supports_edge_attr)
        if layer == self.num_layers and model.jk_mode is None:
            return z
        if model.act is not None and model.act_first:
            z = model.act(z)
        out: Tensor = model.norms[layer - 1](z)
        return out

    def activate(self, layer: int, z: Tensor) -> Tensor:
        """``h_l`` from ``z_l``; where the activation came before the norm, only dropout is left."""
        if layer == 0:
            return z
        known = self._activated.get(layer)
        if known is not None and known[0] is z:
            return known[1]
        model = self.model
        h: Tensor = model.dropout(z if model.act is None or model.act_first else model.act(z))
        if model.training:  # the readout has to see the units that dropout kept for the next layer
            self._activated[layer] = (z, h)
        return h

    def readout(self, outputs: Mapping[int, Tensor]) -> Tensor:
        """Logits [n, c] from the outputs ``z_l`` of `readout_layers`."""
        model = self.model
        if model.jk_mode is None:
            return outputs[self.num_layers]
        hidden = [self.activate(layer, outputs[layer]) for layer in self.readout_layers]
        logits: Tensor = model.lin(model.jk(hidden) if hasattr(model, "jk") else hidden[-1])
        return logits


def is_basic_gnn(model: nn.Module) -> bool:
    """True for PyG's `BasicGNN` family and what users derive from it."""
    return isinstance(model, BasicGNN)


def why_not_basic(model: Any) -> str:
    """Why a `BasicGNN` cannot go layer by layer; empty where it can."""
    if type(model).forward is not BasicGNN.forward:
        return f"{type(model).__name__} has a forward of its own"
    for position, conv in enumerate(model.convs):
        reason = why_not_local(conv)
        if reason:
            return f"convs.{position}: {reason}"
    return ""
