"""Neighbour sampling inside a unit: which in-edges each layer of a training step looks at.

Nothing is drawn. Every in-edge has a hash of (key of the step, layer, target, source) by global ids, and a node keeps
its k in-edges with the smallest hashes: a uniform sample without replacement that is the same in every copy of a
node, however the graph was cut and whoever does the work. A smaller k gives a subset of what a larger one gives.

Going down from the nodes whose outputs are wanted, a layer needs the rows at both ends of the edges that were kept
above it, and nothing else is computed.

Shapes: ``n`` nodes of the unit; ``t`` targets, ``e`` in-edges of theirs; ``n_l`` rows of layer l.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.noise import NodeNoise, signed, splitmix64, splitmix64_
from gkd_dist.sparse import CsrPattern, indptr_from_counts, row_index

ALL = -1  # in place of a number of neighbours, as in PyG
_PLACE = 1 << 32  # beyond the places of dropout


@dataclass(frozen=True)
class LayerGraphs:
    """What each layer of one forward pass computes, of a unit of n nodes.

    ``nodes`` int64 [n_0] are the local numbers of the rows of the input, ordered so that the first ``sizes[l]`` of
    them are the rows of layer l, owned nodes first. ``graphs[l - 1]`` has the in-edges that layer l reads: sources
    among the rows of layer l - 1, targets among those of layer l.
    """

    nodes: Tensor
    sizes: tuple[int, ...]
    graphs: tuple[LocalGraph, ...]

    def with_noise(self, key: int) -> LayerGraphs:
        """The same for one forward pass, whose random numbers are those of the nodes under ``key``."""
        noise = NodeNoise(self.graphs[0].global_ids(), key)
        return replace(self, graphs=tuple(graph.with_noise(noise) for graph in self.graphs))

    def spread(self, rows: Tensor, layer: int, num_nodes: int) -> Tensor:
        """Rows [n_l, d] of ``layer`` where they belong among all nodes of the unit, [n, d]; zeros elsewhere."""
        out = rows.new_zeros(num_nodes, rows.size(1))
        return out.index_copy(0, self.nodes[: self.sizes[layer]], rows)


def edge_hashes(
    key: int, layer: int, ids: Tensor, target: Tensor, source: Tensor, copy: Tensor | None = None
) -> Tensor:
    """Hash of each edge from the global ids of its ends, int64 [e].

    ``ids`` [n] of the local nodes that ``target`` and ``source`` [e] name; ``copy`` [e] numbers parallel edges from 0.
    """
    of_nodes = splitmix64_(ids.bitwise_xor(signed(splitmix64(splitmix64(key) + _PLACE + layer))))
    hashes = splitmix64_(of_nodes[target].bitwise_xor_(ids[source]))
    # The first of parallel edges has the hash of a single one: nothing depends on what else a part holds.
    return hashes if copy is None else torch.where(copy > 0, splitmix64_(hashes ^ copy), hashes)


def keep_smallest(counts: Tensor, hashes: Tensor, k: int) -> Tensor:
    """Which of the edges of each target are its ``k`` smallest: ``counts`` [t], ``hashes`` [e] to bool [e]."""
    indptr = indptr_from_counts(counts)
    rows = row_index(indptr)
    order = _order((rows << 32) | ((hashes >> 32) & 0xFFFFFFFF))
    kept = torch.empty_like(rows, dtype=torch.bool)
    kept[order] = torch.arange(rows.numel(), device=rows.device) - indptr[rows] < k
    return kept


def _order(keys: Tensor) -> Tensor:
    """Places of ``keys`` by value, equal ones in their order; numpy's merge sort gains from keys that are in groups."""
    if keys.is_cuda:
        return torch.argsort(keys, stable=True)
    return torch.from_numpy(np.argsort(keys.numpy(), kind="stable"))


def copies(rows: Tensor, source: Tensor) -> Tensor | None:
    """Number of each edge among those with the same ends, which lie side by side; None where none are parallel."""
    same = torch.zeros_like(rows, dtype=torch.bool)
    same[1:] = (rows[1:] == rows[:-1]) & (source[1:] == source[:-1])
    if not bool(same.any()):
        return None
    place = torch.arange(rows.numel(), device=rows.device)
    return place - torch.cummax(torch.where(same, torch.zeros_like(place), place), 0).values


def sample_in_edges(graph: LocalGraph, targets: Tensor, k: int, key: int, layer: int) -> tuple[Tensor, Tensor]:
    """The in-edges that each of ``targets`` [t] keeps of all it has in ``graph``.

    Returns their positions among the edges of the graph, target after target and each ascending, and how many each
    target keeps [t].
    """
    starts, counts = graph.pattern.indptr[targets], graph.pattern.indptr[targets + 1] - graph.pattern.indptr[targets]
    indptr = indptr_from_counts(counts)
    positions = torch.arange(int(indptr[-1]), device=targets.device) + torch.repeat_interleave(
        starts - indptr[:-1], counts
    )
    if k == ALL or not counts.numel() or int(counts.max()) <= k:
        return positions, counts
    target, source = torch.repeat_interleave(targets, counts), graph.pattern.indices[positions]
    parallel = copies(target, source) if _has_parallel_edges(graph) else None
    hashes = edge_hashes(key, layer, graph.global_ids(), target, source, parallel)
    return positions[keep_smallest(counts, hashes, k)], counts.clamp_max(k)


def _has_parallel_edges(graph: LocalGraph) -> bool:
    return graph.derived("parallel", lambda: copies(graph.pattern.rows(), graph.pattern.indices) is not None)


def sample_layers(
    graph: LocalGraph,
    fan_out: Sequence[int],
    key: int,
    wanted: Mapping[int, Tensor] | None = None,
    *,
    rows_alone: bool = False,
) -> LayerGraphs:
    """What the layers of a model compute for the owned nodes of ``graph``, with at most ``fan_out`` neighbours each.

    ``fan_out[0]`` is of the first hop from the owned nodes, that is of the last layer, as in PyG; -1: all.
    ``wanted[l]`` int64 are further nodes whose output of layer l is needed. ``rows_alone``: the model computes rows
    for targets alone; otherwise graphs have an empty row for every other node.
    """
    num_layers, wanted = len(fan_out), wanted or {}
    owned = torch.arange(graph.num_nodes if graph.num_owned is None else graph.num_owned, device=graph.in_degree.device)
    reached = _Reached(graph.num_nodes, owned)
    reached.add(wanted.get(num_layers))
    sizes, edges = [reached.count], list[tuple[Tensor, Tensor]]()
    for layer in range(num_layers, 0, -1):
        targets = reached.nodes[: sizes[-1]]
        edges.append(sample_in_edges(graph, targets, fan_out[num_layers - layer], key, layer))
        reached.add(torch.cat([graph.pattern.indices[edges[-1][0]], wanted.get(layer - 1, owned[:0])]))
        sizes.append(reached.count)
    sizes.reverse()
    nodes, place = reached.nodes, reached.places()
    graphs = tuple(
        _layer_graph(graph, nodes[: sizes[layer]], place, positions, counts, rows_alone)
        for layer, (positions, counts) in enumerate(reversed(edges))
    )
    return LayerGraphs(nodes, tuple(sizes), graphs)


def _layer_graph(
    graph: LocalGraph, nodes: Tensor, place: Tensor, positions: Tensor, counts: Tensor, rows_alone: bool
) -> LocalGraph:
    """In-edges at ``positions``, ``counts`` of each of the first of ``nodes``, between ``nodes``."""
    targets, share = nodes[: counts.numel()], None
    whole = graph.pattern.indptr[targets + 1] - graph.pattern.indptr[targets]
    if positions.numel() < int(whole.sum()):
        share = (whole / counts.clamp_min(1)).float().repeat_interleave(counts)
    lengths = counts if rows_alone else torch.cat([counts, counts.new_zeros(nodes.numel() - counts.numel())])
    pattern = CsrPattern.from_csr(indptr_from_counts(lengths), place[graph.pattern.indices[positions]], nodes.numel())
    return LocalGraph(
        pattern,
        graph.in_degree[nodes],
        graph.has_self_loop[nodes],
        None if graph.edge_weight is None else graph.edge_weight[positions],
        graph.num_owned,
        None if graph.edge_attr is None else graph.edge_attr[positions],
        graph.global_ids()[nodes],
        edge_share=share,
    )


class _Reached:
    """Nodes in the order in which they were needed; those needed at once ascend."""

    def __init__(self, num_nodes: int, first: Tensor) -> None:
        self._in = torch.zeros(num_nodes, dtype=torch.bool, device=first.device)
        self._in[first] = True
        self.nodes = first

    @property
    def count(self) -> int:
        return self.nodes.numel()

    def add(self, nodes: Tensor | None) -> None:
        if nodes is None:
            return
        new = torch.zeros_like(self._in)
        new[nodes] = True
        new &= ~self._in
        self._in |= new
        self.nodes = torch.cat([self.nodes, torch.nonzero(new).flatten()])

    def places(self) -> Tensor:
        """Where each node is in `nodes`, int64 [n]; 0 where it is not."""
        place = torch.zeros(self._in.numel(), dtype=torch.int64, device=self.nodes.device)
        place[self.nodes] = torch.arange(self.count, device=self.nodes.device)
        return place


@dataclass(frozen=True)
class Sampler:
    """Samples batches of a training step for a model with as many layers as there are fan-outs."""

    fan_out: tuple[int, ...]
    rows_alone: bool

    def sample(self, batch: Batch, wanted: Mapping[int, Tensor], *, draws: bool = True) -> Batch:
        """``batch`` with the layers that its forward pass computes; it has the noise of the step already.

        ``draws``: ``wanted`` differs from step to step. Where nothing does, the layers are found once and kept.
        """
        graph, noise = batch.graph, batch.graph.noise
        if batch.num_owned == 0:
            return batch  # every layer runs on nothing
        assert noise is not None, "sampling belongs to a step"

        def find() -> LayerGraphs:
            return sample_layers(graph, self.fan_out, noise.key, wanted, rows_alone=self.rows_alone)

        fixed = not draws and all(k == ALL for k in self.fan_out)
        layers = graph.derived(f"reached {sorted(wanted)} {self.rows_alone}", find) if fixed else find()
        return batch.with_layers(layers.with_noise(noise.key))
