"""PyG's own convolutions on a `LocalGraph`, exact for rows whose in-edges are all there.

A convolution is *local* where the new row of a node depends on the in-edges of that node, on the
rows at both of their ends, and on nothing else but degrees, which a `LocalGraph` knows for the whole
graph. Local ones run in one of two ways: by the sparse products of `gkd_dist.models.convs` with the
module's own parameters, or by PyG's own ``forward`` on the local ``edge_index``.

Shapes: ``n`` local nodes, ``m`` edges.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn.aggr import MeanAggregation, SumAggregation

from gkd_dist.errors import ModelError
from gkd_dist.graph import LocalGraph
from gkd_dist.models.convs import GAT, GCN, GIN, SAGE, Dense

_OURS = (GCN, SAGE, GAT, GIN, Dense)
# Their ``forward`` reads in-edges and the rows at both ends; a degree is that of the target alone.
_LOCAL = (
    *(pyg.SAGEConv, pyg.GATConv, pyg.GATv2Conv, pyg.GINConv, pyg.GINEConv, pyg.PNAConv, pyg.EdgeConv),
    *(pyg.TransformerConv, pyg.GraphConv, pyg.GeneralConv, pyg.ResGatedGraphConv, pyg.CGConv, pyg.LEConv),
    *(pyg.NNConv, pyg.FeaStConv, pyg.MFConv, pyg.GENConv, pyg.ClusterGCNConv, pyg.FiLMConv),
)


def why_not_local(conv: nn.Module) -> str:
    """Why ``conv`` cannot run on a part with one hop of halo, as what it is; empty where it can."""
    if isinstance(conv, _OURS):
        return ""
    name = type(conv).__name__
    if getattr(conv, "flow", "source_to_target") != "source_to_target":
        return f"{name} with flow={conv.flow!r}, which reads out-edges"
    if type(conv) is pyg.GCNConv:
        is_sum = type(conv.aggr_module) is SumAggregation
        return "" if is_sum else f"GCNConv with aggr={conv.aggr!r}, which is not a sum"
    if type(conv) in _LOCAL:
        return ""
    if not isinstance(conv, pyg.MessagePassing):
        return f"{name}, which is not a convolution of PyG"
    return f"{name}, which may need more than the in-edges of a node (degrees of its neighbours, further hops)"


def sparse_forward(conv: nn.Module) -> Callable[..., Tensor] | None:
    """The ``forward`` of ours that does what ``conv`` does without a gather of size [m, d]; None: there is none."""
    aggregation = type(getattr(conv, "aggr_module", None))
    if type(conv) is pyg.GCNConv and aggregation is SumAggregation:
        return GCN.forward
    if type(conv) is pyg.SAGEConv and aggregation in (MeanAggregation, SumAggregation):
        return SAGE.forward
    if type(conv) is pyg.GATConv and aggregation is SumAggregation and conv.lin is not None:
        return GAT.forward
    if type(conv) is pyg.GINConv and aggregation is SumAggregation:
        return GIN.forward
    return None


def apply_conv(conv: nn.Module, x: Tensor, graph: LocalGraph, reads_weight: bool, reads_attr: bool) -> Tensor:
    """``conv`` on a local graph, [n, d_in] to [n, d_out].

    ``reads_weight`` and ``reads_attr``: whether the model hands edge weights and attributes to its
    convolutions. Hooks of ``conv`` run. Raises `ModelError` where edges lack what ``conv`` reads.
    """
    if isinstance(conv, _OURS):
        return conv(x, graph)
    check_edges(conv, graph, reads_weight, reads_attr)
    forward = sparse_forward(conv)
    if forward is not None:
        return call_with(conv, forward, x, graph)
    inputs: dict[str, Tensor | None] = {"edge_weight": graph.edge_weight} if reads_weight else {}
    if reads_attr:
        inputs["edge_attr"] = graph.edge_attr if takes_attributes(conv) else None
    return conv(x, graph.edge_index, **inputs)


def call_with(module: nn.Module, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """``module(*args)`` with ``forward`` in place of its own: hooks run, and the module stays as it was."""
    module.__dict__["forward"] = partial(forward, module)
    try:
        return module(*args)
    finally:
        del module.__dict__["forward"]


def takes_attributes(conv: Any) -> bool:
    """Whether ``conv`` was built to read edge attributes."""
    return not hasattr(conv, "edge_dim") or conv.edge_dim is not None


def check_edges(conv: Any, graph: LocalGraph, reads_weight: bool, reads_attr: bool) -> None:
    """Raises `ModelError` where the edges are not those that ``conv`` was built for."""
    name, width = type(conv).__name__, getattr(conv, "edge_dim", None)
    if type(conv) is pyg.GCNConv and not reads_weight and graph.edge_weight is not None:
        raise ModelError(
            f"{name} of a model without edge weights normalises by unweighted degrees, but the graph has weighted "
            "ones; set supports_edge_weight = True in the model's class, or prepare the graph without weights"
        )
    if width is not None and reads_attr:
        found = 0 if graph.edge_attr is None else graph.edge_attr.size(1)
        if found != width:
            raise ModelError(
                f"{name} reads {width} attributes per edge, the graph has {found}; set edge_dim to {found or 'null'}, "
                "or use a graph with the attributes that the model was trained on"
            )
