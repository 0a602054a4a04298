"""The graph, a local piece of it, and one training batch: fields, shapes and their invariants.

Shapes: ``N`` nodes and ``E`` edges of the whole graph; ``n`` nodes and ``m`` edges of a local graph;
``f`` features of a node, ``a`` of an edge; ``c`` classes (or binary labels). Row 0 of ``edge_index``
is the source, row 1 the target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from gkd_dist.noise import NodeNoise
from gkd_dist.sparse import CsrPattern, indptr_from_counts, spmm
from gkd_dist.topk import TopK

if TYPE_CHECKING:
    from gkd_dist.sampling import LayerGraphs

Task = Literal["multiclass", "multilabel"]
SPLITS = ("train", "val", "test")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Graph:
    """A whole graph in memory, as data sources deliver it.

    ``x`` float32 [N, f]; ``edge_index`` int64 [2, E]; ``y`` int64 [N] with -1 for unlabelled
    nodes (multiclass) or float32 [N, c] with NaN rows for unlabelled nodes (multilabel); masks
    bool [N]; ``edge_weight`` float32 [E] or None; ``edge_attr`` float32 [E, a] or None;
    ``features`` float32 [N, f_name] by name, which models may read in place of ``x``.
    """

    x: Tensor
    edge_index: Tensor
    y: Tensor
    train_mask: Tensor
    val_mask: Tensor
    test_mask: Tensor
    num_classes: int
    task: Task = "multiclass"
    edge_weight: Tensor | None = None
    name: str = "graph"
    edge_attr: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.x.size(0)

    @property
    def num_edges(self) -> int:
        """E, directed edges."""
        return self.edge_index.size(1)

    @property
    def num_features(self) -> int:
        """f."""
        return self.x.size(1)

    @property
    def num_edge_features(self) -> int:
        """a, 0 without attributes."""
        return 0 if self.edge_attr is None else self.edge_attr.size(1)


@dataclass(frozen=True)
class WeightedPattern:
    """A fixed sparse matrix: structure and values [m], and a diagonal [n] or None added to it."""

    pattern: CsrPattern
    values: Tensor
    diagonal: Tensor | None = None

    def matmul(self, x: Tensor) -> Tensor:
        """(matrix + diagonal) times ``x`` [n, d]: a row per row of the matrix; differentiable in ``x``."""
        out = spmm(self.pattern, self.values, x)
        if self.diagonal is None:
            return out
        return torch.addcmul(out, self.diagonal.unsqueeze(1).to(x.dtype), x[: out.size(0)])


class HaloRows(Protocol):
    """Where the rows of halo nodes come from in a graph whose parts stay on their ranks. Both are collective."""

    def fill(self, owned: Tensor) -> Tensor:
        """Rows of all nodes [n, d] from those of the owned ones [num_owned, d]; differentiable."""

    def total(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all ranks; differentiable."""


@dataclass
class LocalGraph:
    """In-edges of a set of nodes as CSR by target, with what exact convolutions need.

    ``pattern`` holds n nodes and m edges, edges of a target sorted by source. ``in_degree``
    float32 [n] is the (weighted, where there are weights) in-degree in the *whole* graph, which
    the local edges of a halo node do not show. ``has_self_loop`` bool [n]; ``edge_weight``
    float32 [m] or None. ``num_owned``: how many of the first nodes statistics are taken over, None
    for all. ``edge_attr`` float32 [m, a] or None. ``n_id`` int64 [n] are the nodes' numbers in the whole
    graph, None where this is the whole graph in its own order (`global_ids`). ``noise`` holds the random numbers
    of a forward pass in training (None: those of torch's generators). ``halo`` brings the rows of halo nodes
    from the ranks that own them (None: they are computed here). ``recomputing`` is true while a backward pass
    computes a layer again. Where edges were sampled, ``edge_share`` float32 [m] is how many in-edges of the target
    each of them stands for (None: each for itself), and ``layers`` are the graphs that layers run on in place of
    this one.

    In inference the pattern may have rows for the first nodes alone, those whose output is wanted
    (``num_rows`` < ``num_nodes``); convolutions then give a row for each of those.
    """

    pattern: CsrPattern
    in_degree: Tensor
    has_self_loop: Tensor
    edge_weight: Tensor | None = None
    num_owned: int | None = None
    edge_attr: Tensor | None = None
    n_id: Tensor | None = None
    noise: NodeNoise | None = None
    halo: HaloRows | None = None
    recomputing: bool = False
    edge_share: Tensor | None = None
    layers: LayerGraphs | None = None
    _cache: dict[str, object] = field(default_factory=dict, init=False, repr=False, compare=False)
    _drawn: dict[str, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Tensor,
        num_nodes: int,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> LocalGraph:
        """A whole graph; ``edge_index`` int64 [2, m] in any order, weights [m] and attributes [m, a] in the same."""
        order = torch.argsort(edge_index[1] * num_nodes + edge_index[0], stable=True)
        source, target = edge_index[0][order], edge_index[1][order]
        weight = None if edge_weight is None else edge_weight[order].float()
        counts = torch.bincount(target, minlength=num_nodes)
        degree = counts.float()
        if weight is not None:
            degree = torch.zeros(num_nodes, device=weight.device).index_add_(0, target, weight)
        loops = torch.zeros(num_nodes, dtype=torch.bool, device=source.device)
        loops[target[source == target]] = True
        attr = None if edge_attr is None else edge_attr[order].float()
        return cls(CsrPattern.from_csr(indptr_from_counts(counts), source), degree, loops, weight, edge_attr=attr)

    def global_ids(self) -> Tensor:
        """Number of each node in the whole graph, int64 [n]."""
        if self.n_id is not None:
            return self.n_id
        return torch.arange(self.num_nodes, device=self.in_degree.device)

    @property
    def num_nodes(self) -> int:
        """n."""
        return self.in_degree.numel()

    @property
    def num_rows(self) -> int:
        """How many of the first nodes have an output."""
        return self.pattern.num_rows

    @property
    def num_edges(self) -> int:
        """m."""
        return self.pattern.nnz

    @property
    def edge_index(self) -> Tensor:
        """Edges as int64 [2, m], sorted by (target, source)."""
        return torch.stack([self.pattern.indices, self.pattern.rows()])

    def _values(self) -> Tensor:
        if self.edge_weight is not None:
            return self.edge_weight
        return torch.ones(self.num_edges, device=self.in_degree.device)

    def sum_matrix(self) -> WeightedPattern:
        """Sum over in-neighbours (GIN; edge weights not used)."""
        ones = lambda: torch.ones(self.num_edges, device=self.in_degree.device)  # noqa: E731
        return self._once("sum", lambda: WeightedPattern(self.pattern, self.for_all(ones())))

    def for_all(self, values: Tensor) -> Tensor:
        """``values`` [m] of a sum over in-edges, scaled so that sampled edges stand for all in expectation."""
        return values if self.edge_share is None else values * self.edge_share

    def mean_matrix(self) -> WeightedPattern:
        """Mean over in-neighbours, zero where there are none (GraphSAGE; edge weights not used)."""

        def build() -> WeightedPattern:
            counts = (self.pattern.indptr[1:] - self.pattern.indptr[:-1]).clamp_min(1).float()
            return WeightedPattern(self.pattern, counts.reciprocal()[self.pattern.rows()])

        return self._once("mean", build)

    def gcn_matrix(self) -> WeightedPattern:
        """Symmetrically normalised adjacency with self-loops (Kipf and Welling 2017).

        Existing self-loops keep their weight, others get weight 1; degrees are those of the
        whole graph.
        """

        def build() -> WeightedPattern:
            missing = (~self.has_self_loop).float()
            degree = self.in_degree + missing
            scale = torch.where(degree > 0, degree.clamp_min(1e-38).rsqrt(), torch.zeros_like(degree))
            values = self.for_all(self._values()) * scale[self.pattern.rows()] * scale[self.pattern.indices]
            return WeightedPattern(self.pattern, values, (missing * scale * scale)[: self.num_rows])

        return self._once("gcn", build)

    def loop_pattern(self) -> CsrPattern:
        """Structure with exactly one self-loop at every row (GAT)."""

        def build() -> CsrPattern:
            rows, cols = self.pattern.rows(), self.pattern.indices
            keep = rows != cols
            nodes = torch.arange(self.num_rows, device=rows.device)
            rows, cols = torch.cat([rows[keep], nodes]), torch.cat([cols[keep], nodes])
            order = torch.argsort(rows * max(1, self.num_nodes) + cols)
            counts = torch.bincount(rows, minlength=self.num_rows)
            if self.pattern.t_indptr.numel() == 0:
                return CsrPattern.forward_only(indptr_from_counts(counts), cols[order])
            return CsrPattern.from_csr(indptr_from_counts(counts), cols[order], self.num_nodes)

        return self._once("loops", build)

    def with_noise(self, noise: NodeNoise) -> LocalGraph:
        """The same graph, sharing all it holds, for one forward pass with the random numbers of ``noise``."""
        graph = copy.copy(self)
        graph.noise, graph._drawn = noise, {}
        return graph

    def drawn(self, name: str, build: Callable[[], _T]) -> _T:
        """What ``build`` makes of this graph and of its noise: made once per forward pass."""
        if name not in self._drawn:
            self._drawn[name] = build()
        return self._drawn[name]  # type: ignore[return-value]

    def owned_rows(self) -> LocalGraph:
        """The same graph with rows for the owned nodes alone; the halo nodes must have no in-edges here.

        Convolutions that go by `num_rows` then compute nothing for halo nodes, forward or backward.
        """

        def build() -> LocalGraph:
            assert self.num_owned is not None, "all nodes are owned"
            full = self.pattern
            pattern = CsrPattern(
                full.indptr[: self.num_owned + 1], full.indices, full.t_indptr, full.t_indices, full.t_perm
            )
            return LocalGraph(
                pattern, self.in_degree, self.has_self_loop, self.edge_weight, self.num_owned, self.edge_attr, self.n_id
            )

        rows: LocalGraph = copy.copy(self._once("owned rows", build))
        rows.noise, rows.halo = self.noise, self.halo
        return rows

    def derived(self, name: str, build: Callable[[], _T]) -> _T:
        """What ``build`` makes of this graph: made once, kept with it under ``name``."""
        value: _T = self._once(name, build)
        return value

    def _once(self, name: str, build):  # type: ignore[no-untyped-def]
        if name not in self._cache:
            self._cache[name] = build()
        return self._cache[name]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LocalGraph:
        """The same graph on ``device``."""
        if self.in_degree.device == torch.device(device):
            return self
        return LocalGraph(
            self.pattern.to(device, non_blocking),
            self.in_degree.to(device, non_blocking=non_blocking),
            self.has_self_loop.to(device, non_blocking=non_blocking),
            None if self.edge_weight is None else self.edge_weight.to(device, non_blocking=non_blocking),
            self.num_owned,
            None if self.edge_attr is None else self.edge_attr.to(device, non_blocking=non_blocking),
            None if self.n_id is None else self.n_id.to(device, non_blocking=non_blocking),
            halo=self.halo,
        )


@dataclass(frozen=True)
class Batch:
    """One unit: a training subgraph with what the teacher knows about it.

    Owned nodes come first. ``graph`` has n nodes; all in-edges of owned nodes are its first
    ``num_owned_edges`` edges. ``x`` [n, f]; ``y`` and the masks cover the owned nodes only.
    ``teacher_logits`` float32 [num_owned, c], or the largest of them; ``teacher_scores[(layer, metric)]`` float32
    [num_owned_edges], raw scores of the owned in-edges in the order of ``graph``. Of several teachers
    ``teacher_logits`` is the mean, ``logits_of`` has those of single ones by name, and the keys of the
    scores end with the name. ``teacher_embeddings[(layer, name)]`` float32 [num_owned, d] are outputs of
    teacher layers, with None for the name of a single teacher.
    An empty batch (``num_owned == 0``, no nodes) is what a rank without work runs.
    """

    unit: int
    graph: LocalGraph
    x: Tensor
    y: Tensor
    train_mask: Tensor
    val_mask: Tensor
    test_mask: Tensor
    n_id: Tensor
    num_owned: int
    teacher_logits: Tensor | TopK | None = None
    teacher_scores: Mapping[tuple[int, str] | tuple[int, str, str], Tensor] = field(default_factory=dict)
    logits_of: Mapping[str, Tensor | TopK] = field(default_factory=dict)
    teacher_embeddings: Mapping[tuple[int, str | None], Tensor] = field(default_factory=dict)

    @property
    def num_owned_edges(self) -> int:
        """Number of in-edges of owned nodes."""
        return int(self.graph.pattern.indptr[self.num_owned])

    def mask(self, split: str) -> Tensor:
        """Mask of ``train``, ``val`` or ``test`` over the owned nodes."""
        return {"train": self.train_mask, "val": self.val_mask, "test": self.test_mask}[split]

    def with_noise(self, key: int) -> Batch:
        """The same batch for one forward pass, whose random numbers are those of its nodes under ``key``."""
        return replace(self, graph=self.graph.with_noise(NodeNoise(self.n_id, key)))

    def with_layers(self, layers: LayerGraphs) -> Batch:
        """The same batch for one forward pass, whose layers run on ``layers``."""
        graph = copy.copy(self.graph)
        graph.layers = layers
        return replace(self, graph=graph)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``."""
        move = lambda t: t.to(device, non_blocking=non_blocking)  # noqa: E731
        return replace(
            self,
            graph=self.graph.to(device, non_blocking),
            x=move(self.x),
            y=move(self.y),
            train_mask=move(self.train_mask),
            val_mask=move(self.val_mask),
            test_mask=move(self.test_mask),
            n_id=move(self.n_id),
            teacher_logits=None
            if self.teacher_logits is None
            else self.teacher_logits.to(device, non_blocking=non_blocking),
            teacher_scores={key: move(value) for key, value in self.teacher_scores.items()},
            logits_of={name: logits.to(device, non_blocking=non_blocking) for name, logits in self.logits_of.items()},
            teacher_embeddings={key: move(value) for key, value in self.teacher_embeddings.items()},
        )
