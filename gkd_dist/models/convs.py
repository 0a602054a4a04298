"""PyG convolutions on a `LocalGraph`: their parameters and semantics, our aggregation.

Each class inherits the PyG convolution of the same name, so weights move between both with
``load_state_dict``; only ``forward`` is replaced by sparse products, which need neither a gather
of size [m, d] nor a scatter, and which use the degrees of the whole graph.

Shapes: ``n`` local nodes, ``m`` edges, ``h`` heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

from gkd_dist.graph import LocalGraph
from gkd_dist.sparse import segment_log_softmax, spmm


class GCN(GCNConv):
    """Graph convolution (Kipf and Welling, ICLR 2017)."""

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, d_in] to [n, d_out]; the product runs on the narrower side."""
        matrix = graph.gcn_matrix()
        narrow_first = self.in_channels > self.out_channels
        out = matrix.matmul(self.lin(x)) if narrow_first else self.lin(matrix.matmul(x))
        return out if self.bias is None else out + self.bias


class SAGE(SAGEConv):
    """GraphSAGE with mean aggregation (Hamilton et al., NeurIPS 2017)."""

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, d_in] to [n, d_out]; the mean is linear, so it runs on the narrower side."""
        matrix = graph.mean_matrix()
        if self.lin_l.in_channels > self.lin_l.out_channels:
            neighbours = matrix.matmul(F.linear(x, self.lin_l.weight))
            neighbours = neighbours if self.lin_l.bias is None else neighbours + self.lin_l.bias
        else:
            neighbours = self.lin_l(matrix.matmul(x))
        return neighbours + self.lin_r(x)


class GAT(GATConv):
    """Graph attention (Velickovic et al., ICLR 2018), self-loops included, heads concatenated."""

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, d_in] to [n, h * d]."""
        pattern = graph.loop_pattern()
        hidden = self.lin(x)
        heads = hidden.view(x.size(0), self.heads, self.out_channels)
        rows = pattern.rows()
        logits = (heads * self.att_src).sum(-1).index_select(0, pattern.indices)
        logits = logits + (heads * self.att_dst).sum(-1).index_select(0, rows)
        logits = F.leaky_relu(logits, self.negative_slope)
        attention = segment_log_softmax(logits, pattern.indptr, rows).exp()
        attention = F.dropout(attention, self.dropout, self.training)
        parts = [spmm(pattern, attention[:, k], heads[:, k]) for k in range(self.heads)]
        out = torch.cat(parts, dim=1).to(hidden.dtype)
        return out if self.bias is None else out + self.bias


class GIN(GINConv):
    """Graph isomorphism network (Xu et al., ICLR 2019)."""

    def forward(self, x: Tensor, graph: LocalGraph) -> Tensor:
        """[n, d_in] to [n, d_out]."""
        out: Tensor = self.nn(graph.sum_matrix().matmul(x) + (1 + self.eps) * x)
        return out


class Dense(nn.Linear):
    """A layer that does not look at the graph (MLP)."""

    def forward(self, x: Tensor, graph: LocalGraph | None = None) -> Tensor:
        """[n, d_in] to [n, d_out]."""
        return super().forward(x)


def build_conv(kind: str, d_in: int, d_out: int, heads: int, dropout: float) -> nn.Module:
    """Convolution ``kind`` from ``d_in`` to ``heads * d_out`` channels."""
    options: dict[str, Any] = {"gcn": {}, "sage": {}, "gat": {"heads": heads, "dropout": dropout}}.get(kind, {})
    if kind == "gin":
        return GIN(nn.Sequential(nn.Linear(d_in, d_out), nn.ReLU(), nn.Linear(d_out, d_out)), train_eps=True)
    convs: dict[str, type[nn.Module]] = {"gcn": GCN, "sage": SAGE, "gat": GAT, "mlp": Dense}
    return convs[kind](d_in, d_out, **options)
