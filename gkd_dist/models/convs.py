"""PyG convolutions on a `LocalGraph`: their parameters and semantics, our aggregation.

Each class inherits the PyG convolution of the same name, so weights move between both with
``load_state_dict``; only ``forward`` is replaced by sparse products, which need neither a gather
of size [m, d] nor a scatter, and which use the degrees of the whole graph. Each ``forward`` reads
the options of the PyG class and nothing else of its own, so that it also runs a plain PyG
convolution: ``GCN.forward(conv, x, graph)``.

Rows whose in-edges are all in the graph are exact; what the others get means nothing. On a graph with
fewer rows than nodes an output has a row for each row of the graph. Products are taken in the cheaper
order, but in PyG's own where somebody listens to what is in between by a forward hook.

Shapes: ``n`` local nodes, ``m`` edges, ``h`` heads, ``a`` edge attributes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv
from torch_geometric.nn.aggr import MeanAggregation
from torch_geometric.utils.loop import compute_loop_attr

from gkd_dist.graph import LocalGraph, WeightedPattern
from gkd_dist.sparse import CsrPattern, indptr_from_counts, segment_log_softmax, spmm


class GCN(GCNConv):
    """Graph convolution (Kipf and Welling, ICLR 2017)."""

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, d_in] to [n, d_out]; the product runs on the narrower side."""
        matrix = gcn_matrix(graph, self.normalize, self.add_self_loops, 2.0 if self.improved else 1.0)
        narrow_first = self.in_channels > self.out_channels or bool(self.lin._forward_hooks)
        out = matrix.matmul(self.lin(x)) if narrow_first else self.lin(matrix.matmul(x))
        return out if self.bias is None else out + self.bias


def gcn_matrix(graph: LocalGraph, normalize: bool, add_self_loops: bool, loop_weight: float) -> WeightedPattern:
    """The matrix of a graph convolution with the options of PyG's class.

    ``loop_weight`` is that of the self-loops that are added; those of the graph keep theirs. Like
    PyG's own code, a graph without weights gets self-loops of weight 1 whatever ``loop_weight`` says.
    """
    loop_weight = 1.0 if graph.edge_weight is None else loop_weight
    if normalize and add_self_loops and loop_weight == 1.0:
        return graph.gcn_matrix()

    def build() -> WeightedPattern:
        weight = graph.edge_weight
        values = torch.ones(graph.num_edges, device=graph.in_degree.device) if weight is None else weight
        values = graph.for_all(values)
        if not normalize:
            return WeightedPattern(graph.pattern, values)
        added = loop_weight * (~graph.has_self_loop).float() if add_self_loops else torch.zeros_like(graph.in_degree)
        degree = graph.in_degree + added
        scale = torch.where(degree > 0, degree.clamp_min(1e-38).rsqrt(), torch.zeros_like(degree))
        values = values * scale[graph.pattern.rows()] * scale[graph.pattern.indices]
        return WeightedPattern(graph.pattern, values, (added * scale * scale)[: graph.num_rows])

    return graph.derived(f"gcn-{normalize}-{add_self_loops}-{loop_weight}", build)


class SAGE(SAGEConv):
    """GraphSAGE with mean or sum aggregation (Hamilton et al., NeurIPS 2017)."""

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, d_in] to [n, d_out]; the aggregation is linear, so it runs on the narrower side."""
        source = self.lin(x).relu() if self.project else x
        matrix = graph.mean_matrix() if isinstance(self.aggr_module, MeanAggregation) else graph.sum_matrix()
        if self.lin_l.in_channels > self.lin_l.out_channels and not self.lin_l._forward_hooks:
            out = matrix.matmul(F.linear(source, self.lin_l.weight))
            out = out if self.lin_l.bias is None else out + self.lin_l.bias
        else:
            out = self.lin_l(matrix.matmul(source))
        out = out + self.lin_r(x[: out.size(0)]) if self.root_weight else out
        return F.normalize(out, p=2.0, dim=-1) if self.normalize else out


class GAT(GATConv):
    """Graph attention (Velickovic et al., ICLR 2018)."""

    noise_layer: int | None = None  # where dropout of attention goes by nodes: which layer of its model this is

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, d_in] to [n, h * d], or [n, d] where heads are averaged."""
        hidden = self.lin(x)
        heads = hidden.view(x.size(0), self.heads, self.out_channels)
        pattern, on_edges = _attention_edges(self, graph)
        rows = pattern.rows()
        logits = (heads * self.att_src).sum(-1).index_select(0, pattern.indices)
        logits = logits + (heads * self.att_dst).sum(-1).index_select(0, rows)
        logits = F.leaky_relu(logits if on_edges is None else logits + on_edges, self.negative_slope)
        attention = segment_log_softmax(logits, pattern.indptr, rows).exp()
        attention = _drop_attention(self, attention, graph, pattern, rows)
        parts = [spmm(pattern, attention[:, k], heads[:, k]) for k in range(self.heads)]
        out = torch.cat(parts, dim=1) if self.concat else torch.stack(parts).mean(0)
        out = out.to(hidden.dtype) if self.res is None else out.to(hidden.dtype) + self.res(x[: out.size(0)])
        return out if self.bias is None else out + self.bias


def _attention_edges(conv: Any, graph: LocalGraph) -> tuple[CsrPattern, Tensor | None]:
    """Edges that attention runs over, and what their attributes add to its logits, [m, h] or None."""
    attr = graph.edge_attr
    if conv.lin_edge is None or attr is None:
        return graph.loop_pattern() if conv.add_self_loops else graph.pattern, None
    pattern, attr = looped(graph, attr, conv.fill_value) if conv.add_self_loops else (graph.pattern, attr)
    weight = conv.lin_edge.weight.view(conv.heads, conv.out_channels, -1)
    per_head = (weight * conv.att_edge.view(conv.heads, conv.out_channels, 1)).sum(1)
    return pattern, F.linear(attr.to(per_head.dtype), per_head)


def looped(graph: LocalGraph, attr: Tensor, fill_value: float | Tensor | str) -> tuple[CsrPattern, Tensor]:
    """Edges with exactly one self-loop at every node, and their attributes from those of the graph, ``attr`` [m, a].

    The attribute of a self-loop is ``fill_value``, or that reduction (``mean``, ``max``, ...) over
    the in-edges of the node that are no self-loops.
    """

    def build() -> tuple[CsrPattern, Tensor, Tensor]:
        rows, columns = graph.pattern.rows(), graph.pattern.indices
        nodes = torch.arange(graph.num_nodes, device=rows.device)
        keep = rows != columns
        rows, columns = torch.cat([rows[keep], nodes]), torch.cat([columns[keep], nodes])
        order = torch.argsort(rows * max(1, graph.num_nodes) + columns, stable=True)
        counts = torch.bincount(rows, minlength=graph.num_nodes)
        return CsrPattern.from_csr(indptr_from_counts(counts), columns[order]), keep, order

    pattern, keep, order = graph.derived("looped", build)
    kept = attr[keep]
    on_loops = compute_loop_attr(graph.edge_index[:, keep], kept, graph.num_nodes, False, fill_value)
    return pattern, torch.cat([kept, on_loops])[order]


def _drop_attention(conv: Any, attention: Tensor, graph: LocalGraph, pattern: CsrPattern, rows: Tensor) -> Tensor:
    """Dropout of attention [m, h]: by the ends of each edge where the model has said which layer ``conv`` is."""
    layer = getattr(conv, "noise_layer", None)
    if graph.noise is None or layer is None or not conv.training:
        return F.dropout(attention, conv.dropout, conv.training)
    return graph.noise.drop_edges(attention, conv.dropout, layer, pattern.indices, rows)


class GIN(GINConv):
    """Graph isomorphism network (Xu et al., ICLR 2019)."""

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, d_in] to [n, d_out]."""
        neighbours = graph.sum_matrix().matmul(x)
        out: Tensor = self.nn(neighbours + (1 + self.eps) * x[: neighbours.size(0)])
        return out


class Dense(nn.Linear):
    """A layer that does not look at the graph (MLP)."""

    def forward(self, x: Tensor, graph: LocalGraph | None = None) -> Tensor:
        """[n, d_in] to [n, d_out]."""
        return super().forward(x if graph is None else x[: graph.num_rows])


def build_conv(kind: str, d_in: int, d_out: int, heads: int, dropout: float) -> nn.Module:
    """Convolution ``kind`` from ``d_in`` to ``heads * d_out`` channels."""
    options: dict[str, Any] = {"gcn": {}, "sage": {}, "gat": {"heads": heads, "dropout": dropout}}.get(kind, {})
    if kind == "gin":
        return GIN(nn.Sequential(nn.Linear(d_in, d_out), nn.ReLU(), nn.Linear(d_out, d_out)), train_eps=True)
    convs: dict[str, type[nn.Module]] = {"gcn": GCN, "sage": SAGE, "gat": GAT, "mlp": Dense}
    return convs[kind](d_in, d_out, **options)
