"""Which part owns which node: pure functions from edges to ``assign`` int64 [N]."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from gkd_dist.errors import GraphError


def assign_parts(method: str, edge_index: Tensor, num_nodes: int, num_parts: int, seed: int) -> Tensor:
    """Owner part of every node, int64 [N]; every part owns at least one node.

    ``method`` is ``metis`` (fewest cut edges, balanced nodes), ``random`` or ``components``
    (connected components kept whole, for many small graphs). Raises `GraphError` where there
    are more parts than nodes or components.
    """
    if num_parts > num_nodes:
        raise GraphError(
            f"the graph has {num_nodes:,} nodes, fewer than partition.num_parts {num_parts:,}; "
            "lower partition.num_parts"
        )
    if num_parts == 1:
        return torch.zeros(num_nodes, dtype=torch.int64)
    if method == "random":
        return _random(num_nodes, num_parts, seed)
    if method == "components":
        return _components(edge_index, num_nodes, num_parts)
    return _fill_empty_parts(_metis(edge_index, num_nodes, num_parts, seed), num_parts)


def _random(num_nodes: int, num_parts: int, seed: int) -> Tensor:
    order = torch.randperm(num_nodes, generator=torch.Generator().manual_seed(seed))
    assign = torch.empty(num_nodes, dtype=torch.int64)
    assign[order] = torch.arange(num_nodes) * num_parts // num_nodes
    return assign


def _components(edge_index: Tensor, num_nodes: int, num_parts: int) -> Tensor:
    """Largest component first into the part that is smallest so far."""
    source, target = edge_index.numpy()
    matrix = csr_matrix((np.ones(source.size, dtype=np.int8), (target, source)), shape=(num_nodes, num_nodes))
    count, label = connected_components(matrix, directed=False)
    if count < num_parts:
        raise GraphError(
            f"the graph has {count:,} connected components, fewer than partition.num_parts {num_parts:,}; "
            "lower partition.num_parts or set partition.method=metis"
        )
    sizes = np.bincount(label, minlength=count)
    load, part_of = np.zeros(num_parts, dtype=np.int64), np.empty(count, dtype=np.int64)
    for component in np.argsort(-sizes, kind="stable"):
        part = int(load.argmin())
        part_of[component] = part
        load[part] += sizes[component]
    return torch.from_numpy(part_of[label])


def _metis(edge_index: Tensor, num_nodes: int, num_parts: int, seed: int) -> Tensor:
    """METIS on the undirected simple graph under ``edge_index``."""
    import pymetis

    source, target = edge_index
    keep = source != target
    both = torch.cat([source[keep] * num_nodes + target[keep], target[keep] * num_nodes + source[keep]])
    keys = torch.unique(both)
    counts = torch.bincount(keys // num_nodes, minlength=num_nodes)
    starts = torch.zeros(num_nodes + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=starts[1:])
    adjacency = pymetis.CSRAdjacency(starts.numpy(), (keys % num_nodes).numpy())
    options = pymetis.Options(seed=seed)
    membership = pymetis.part_graph(num_parts, adjacency=adjacency, options=options)[1]
    return torch.as_tensor(np.asarray(membership), dtype=torch.int64)


def _fill_empty_parts(assign: Tensor, num_parts: int) -> Tensor:
    """METIS may leave parts empty on tiny graphs: each takes a node of the largest part."""
    sizes = torch.bincount(assign, minlength=num_parts)
    for part in torch.nonzero(sizes == 0).flatten().tolist():
        donor = int(sizes.argmax())
        node = int(torch.nonzero(assign == donor)[-1])
        assign[node] = part
        sizes[donor] -= 1
        sizes[part] += 1
    return assign
