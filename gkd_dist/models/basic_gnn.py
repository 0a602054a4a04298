"""PyG's ``BasicGNN`` family (GCN, GraphSAGE, GAT, GIN, PNA, EdgeCNN) by the layer protocol.

`BasicGnnLayers` is a view: the module stays as PyG made it, with PyG's parameter names.

Shapes: ``n`` local nodes, ``d_l`` width of layer l, ``c`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn.models.basic_gnn import PNA, BasicGNN

from gkd_dist.config import ModelConfig
from gkd_dist.errors import ConfigError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.pyg_convs import apply_conv, takes_attributes, why_not_local

_AGGREGATORS = ("mean", "min", "max", "std")  # those of the paper and of PyG's examples
_SCALERS = ("identity", "amplification", "attenuation")


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
            z = _activated(model.act, z)
        out: Tensor = model.norms[layer - 1](z)
        return out

    def activate(self, layer: int, z: Tensor) -> Tensor:
        """``h_l`` from ``z_l``; where the activation came before the norm, only dropout is left."""
        if layer == 0:
            return z
        known = self._activated.get(layer)
        if known is not None and known[0].data_ptr() == z.data_ptr():  # the same rows, or the first of them
            return known[1][: z.size(0)]
        model = self.model
        h: Tensor = model.dropout(z if model.act is None or model.act_first else _activated(model.act, z))
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


def _activated(act: Any, z: Tensor) -> Tensor:
    """``act(z)``, which leaves ``z`` as it is also where PyG's module was told to work in place: it is read again."""
    out: Tensor = act(z.clone() if getattr(act, "inplace", False) else z)
    return out


def reads_attributes(model: Any) -> bool:
    """Whether the convolutions of a `BasicGNN` were built to read edge attributes."""
    return model.supports_edge_attr and any(takes_attributes(conv) for conv in model.convs)


def is_basic_gnn_class(factory: object) -> bool:
    """True for the classes of which `is_basic_gnn` is true."""
    return isinstance(factory, type) and issubclass(factory, BasicGNN)


def with_graph_args(factory: object, args: Mapping[str, Any], graph_meta: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` with those that come from the graph: ``deg`` of a `PNA`, its histogram of in-degrees."""
    if not isinstance(factory, type) or not issubclass(factory, PNA) or "deg" in args:
        return dict(args)
    return {**args, "deg": dict(graph_meta["in_degree_histogram"])}


def basic_gnn_args(factory: object, config: ModelConfig) -> dict[str, Any]:
    """Arguments of a `BasicGNN` class beside its input and output width.

    Raises `ConfigError` for a `PNA` without a usable histogram of in-degrees.
    """
    args = {"num_layers": config.layers, "hidden_channels": config.hidden, **config.args}
    if isinstance(factory, type) and issubclass(factory, PNA):
        args = {"aggregators": list(_AGGREGATORS), "scalers": list(_SCALERS), **args, "deg": _histogram(args)}
    return args


def _histogram(args: Mapping[str, Any]) -> Tensor:
    """Number of nodes per in-degree, int64 [largest degree + 1], from a list or from a mapping degree: count."""
    deg = args.get("deg")
    try:
        pairs = deg.items() if isinstance(deg, Mapping) else enumerate(deg)  # type: ignore[arg-type]
        counts = {int(degree): int(count) for degree, count in pairs}
        histogram = torch.zeros(max(counts) + 1, dtype=torch.int64)
        for degree, count in counts.items():
            histogram[degree] = count
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            "PNA needs deg, the number of nodes per in-degree as a list or as a mapping {degree: count} "
            f"(got {str(deg)[:60]}); give it under model.args, or leave it out to take that of the graph"
        ) from error
    return histogram


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
            return f"its convs.{position} is a {reason}"
    return ""
