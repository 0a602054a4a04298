"""Models as a stack of layers, so that inference can go layer by layer and losses can name one.

Layer ``l`` (from 1) is the output ``z_l`` of convolution ``l`` after its norm, before activation and
dropout. The protocol is three members: ``num_layers``, ``forward_layer`` and ``activate``; then the
last layer is the logits. Two more, ``readout_layers`` and ``readout``, say otherwise: logits from the
outputs of several layers, row by row. Any module that has these members is treated like the built-in
ones, and `as_layers` gives the same five for PyG's ``BasicGNN`` family.

Shapes: ``n`` local nodes, ``d_l`` width of layer l, ``c`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd_dist.config import ModelConfig
from gkd_dist.errors import ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.basic_gnn import BasicGnnLayers, is_basic_gnn, why_not_basic
from gkd_dist.models.convs import GAT, Dense, build_conv
from gkd_dist.models.embedding import build_embedding
from gkd_dist.models.norm import OwnedBatchNorm
from gkd_dist.models.passes import run_stack
from gkd_dist.noise import NodeNoise

_PROTOCOL = ("num_layers", "forward_layer", "activate")
_READOUT = ("readout_layers", "readout")


class Layers(Protocol):
    """A model as a stack of layers; `as_layers` makes one of any model that has them."""

    @property
    def num_layers(self) -> int:
        """Number of convolutions."""

    @property
    def readout_layers(self) -> tuple[int, ...]:
        """Layers (from 1) whose outputs `readout` reads, ascending."""

    def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
        """``z_l`` [n, d_l] from the activations ``h`` [n, d_(l-1)] below it; exact for rows with all in-edges."""

    def activate(self, layer: int, z: Tensor) -> Tensor:
        """``h_l`` from ``z_l``, row by row; layer 0 is the input."""

    def readout(self, outputs: Mapping[int, Tensor]) -> Tensor:
        """Logits [n, c] from the outputs ``z_l`` of `readout_layers` on the same rows, row by row."""


class _LastLayerIsLogits:
    """A model that follows the protocol without a readout."""

    def __init__(self, model: Any) -> None:
        self.num_layers: int = model.num_layers
        self.readout_layers = (self.num_layers,)
        self.forward_layer, self.activate = model.forward_layer, model.activate

    def readout(self, outputs: Mapping[int, Tensor]) -> Tensor:
        return outputs[self.num_layers]


def as_layers(model: nn.Module) -> Layers | None:
    """``model`` as layers; None where it can only run as a whole (`why_not_layered` says why).

    Raises `ModelError` for a readout that is not complete.
    """
    if not _lacks(model, _PROTOCOL):
        return _with_readout(model)
    if is_basic_gnn(model) and not why_not_basic(model):
        return BasicGnnLayers(model)
    return None


def why_not_layered(model: nn.Module) -> str:
    """Why `as_layers` gives None for ``model``; empty where it does not."""
    lacks = _lacks(model, _PROTOCOL)
    if not lacks:
        return ""
    if is_basic_gnn(model):
        return why_not_basic(model)
    names = " and ".join([", ".join(lacks[:-1]), lacks[-1]] if len(lacks) > 1 else lacks)
    return f"{type(model).__name__} does not follow the layer protocol, it lacks {names}"


def is_layered(model: nn.Module) -> bool:
    """True where ``model`` can go layer by layer."""
    return not why_not_layered(model)


def _lacks(model: nn.Module, names: Sequence[str]) -> list[str]:
    return [name for name in names if not hasattr(model, name)]


def _with_readout(model: Any) -> Layers:
    lacks = _lacks(model, _READOUT)
    if len(lacks) == len(_READOUT):
        return cast(Layers, _LastLayerIsLogits(model))
    if lacks:
        raise ModelError(f"{type(model).__name__} has half a readout; give it {lacks[0]} as well, or neither")
    read = tuple(model.readout_layers)
    if not read or min(read) < 1 or max(read) > model.num_layers:
        raise ModelError(
            f"readout_layers of {type(model).__name__} is {read}, but the model has layers 1 to {model.num_layers}; "
            "name layers that exist"
        )
    return cast(Layers, model)


def forward_layers(
    model: nn.Module, x: Tensor, graph: LocalGraph, layers: Sequence[int] = (), recompute: bool = False
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits [n, c] of a layered model and the outputs ``z_l`` [n, d_l] of ``layers`` (from 1); see `passes.run_stack`.

    `ModelError` for a layer that the model does not have.
    """
    stack = as_layers(model)
    if stack is None:
        raise ModelError(f"{why_not_layered(model)}; run it as a whole, or give it the members of the layer protocol")
    absent = sorted(layer for layer in layers if not 1 <= layer <= stack.num_layers)
    if absent:
        raise ModelError(f"the model has layers 1 to {stack.num_layers} (got {absent[0]}); ask for one of those")
    return run_stack(model, stack, x, graph, layers, recompute)


def as_local_graph(edges: LocalGraph | Tensor, num_nodes: int, edge_weight: Tensor | None = None) -> LocalGraph:
    """``edges`` itself, or the whole graph under an ``edge_index`` [2, m]."""
    if isinstance(edges, LocalGraph):
        return edges
    return LocalGraph.from_edge_index(edges, num_nodes, edge_weight)


def with_forward(model: nn.Module) -> nn.Module:
    """``model``, which can be called as ``model(x, edge_index)`` from now on where it has layers and no ``forward``."""
    if type(model).forward is nn.Module.forward and is_layered(model):

        def forward(x: Tensor, edges: LocalGraph | Tensor, edge_weight: Tensor | None = None) -> Tensor:
            return forward_layers(model, x, as_local_graph(edges, x.size(0), edge_weight))[0]

        model.forward = forward
    return model


class LayeredModel(nn.Module):
    """GCN, GraphSAGE, GAT, GIN or MLP of any depth."""

    rows_alone = True  # `forward_layer` can leave out nodes that have no row in the graph
    takes_noise = True  # `activate` takes the noise of the graph

    def __init__(self, config: ModelConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.num_layers = config.layers
        self.act, self.dropout, self.input_dropout = config.act, config.dropout, config.input_dropout
        self.by_node = config.dropout_mask == "node"
        hidden = config.hidden * config.heads
        self.embedding = build_embedding(config)
        if self.embedding is not None:
            in_channels = int(config.node_embedding or 0) + (0 if self.embedding.replace else in_channels)
        widths = [in_channels, *[hidden] * (config.layers - 1), out_channels]
        self.convs, self.norms, self.skips = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer, (d_in, d_out) in enumerate(pairwise(widths), start=1):
            last = layer == config.layers
            heads = 1 if last else config.heads
            conv = build_conv(config.kind, d_in, d_out // heads, heads, config.dropout)
            if isinstance(conv, GAT) and self.by_node:
                conv.noise_layer = layer
            self.convs.append(conv)
            self.norms.append(_norm("none" if last else config.norm, d_out))
            self.skips.append(nn.Linear(d_in, d_out, bias=False) if config.residual and not last else nn.Identity())
        self.residual = config.residual

    def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
        """``z_l`` [n, d_l] from the activations ``h`` [n, d_(l-1)] below it."""
        if layer == 1 and self.embedding is not None:
            h = self.embedding(h, graph)
        z = self.convs[layer - 1](h, graph)
        if self.residual and layer < self.num_layers:
            z = z + self.skips[layer - 1](h[: z.size(0)])
        norm = self.norms[layer - 1]
        out: Tensor = norm(z, graph) if isinstance(norm, OwnedBatchNorm) else norm(z)
        return out

    def activate(self, layer: int, z: Tensor, noise: NodeNoise | None = None) -> Tensor:
        """``h_l`` from ``z_l``: activation and dropout; for layer 0 dropout on the input alone."""
        h = z if layer == 0 else getattr(torch.nn.functional, self.act)(z)
        rate = self.input_dropout if layer == 0 else self.dropout
        if not self.training or rate == 0:
            return h
        return noise.drop(h, rate, layer) if noise is not None and self.by_node else F.dropout(h, rate)

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
    def readout_layers(self) -> tuple[int, ...]:
        """The last layer alone: it is the logits."""
        return (self.num_layers,)

    def readout(self, outputs: Mapping[int, Tensor]) -> Tensor:
        """Logits [n, c]."""
        return outputs[self.num_layers]

    @property
    def num_nodes(self) -> int | None:
        """Nodes that have a learned vector; None where there are none of these."""
        return None if self.embedding is None else self.embedding.num_nodes

    @property
    def uses_graph(self) -> bool:
        """False for an MLP."""
        return not isinstance(self.convs[0], Dense)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(width)
    return OwnedBatchNorm(width) if kind == "batch" else nn.Identity()
