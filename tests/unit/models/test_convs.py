"""Our aggregation against PyG's own forward with the same weights."""

import pytest
import torch
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

from gkd_dist.graph import LocalGraph
from gkd_dist.models.convs import GAT, GCN, GIN, SAGE


def edges_with_loop_and_isolated_node() -> torch.Tensor:
    # node 4 has no edges, node 0 a self-loop, node 3 no in-edges
    return torch.tensor([[0, 1, 2, 0, 3, 3], [0, 0, 1, 2, 2, 1]])


def both(
    ours: torch.nn.Module, theirs: torch.nn.Module, *, weighted: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    edge_index = edges_with_loop_and_isolated_node()
    weight = torch.rand(edge_index.size(1)) + 0.5 if weighted else None
    x = torch.randn(5, ours.in_channels if hasattr(ours, "in_channels") else 6)
    theirs.load_state_dict(ours.state_dict())
    graph = LocalGraph.from_edge_index(edge_index, 5, weight)
    expected = theirs(x, edge_index, weight) if weighted else theirs(x, edge_index)
    return ours.eval()(x, graph), expected


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 3), (3, 6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_gcn_equals_pyg(d_in, d_out, weighted):
    torch.testing.assert_close(*both(GCN(d_in, d_out), GCNConv(d_in, d_out), weighted=weighted))


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 3), (3, 6)])
def test_sage_equals_pyg(d_in, d_out):
    torch.testing.assert_close(*both(SAGE(d_in, d_out), SAGEConv(d_in, d_out)))


@pytest.mark.parametrize("heads", [1, 3])
def test_gat_equals_pyg(heads):
    torch.testing.assert_close(*both(GAT(6, 4, heads=heads), GATConv(6, 4, heads=heads)))


def test_gin_equals_pyg():
    make = lambda: torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))  # noqa: E731
    torch.testing.assert_close(*both(GIN(make(), train_eps=True), GINConv(make(), train_eps=True)))


@pytest.mark.parametrize("kind", [GCN, SAGE, GAT])
def test_a_graph_without_nodes_gives_no_rows_and_gradients_of_zero(kind):
    conv = kind(4, 3)
    graph = LocalGraph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), 0)
    out = conv(torch.empty(0, 4), graph)
    assert out.shape == (0, 3)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in conv.parameters())
