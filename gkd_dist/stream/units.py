"""Reads a unit, i.e. one part or several merged ones, as a `Batch`.

Nodes of a batch are ordered by (hop, owner, ``n_id``): owned nodes first, halo after them. In-edges
of owned nodes come first and ascend by the source's global id within a row, however the parts were
merged. With as many hops of halo as the student is deep, its outputs at owned nodes are those on
the whole graph.

Shapes: ``n`` nodes, ``m`` edges of a batch; ``f`` features of a node, ``a`` of an edge; ``c`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gkd_dist.errors import GraphError, ManifestError
from gkd_dist.graph import SPLITS, Batch, LocalGraph, Task
from gkd_dist.partition.store import GraphStore, feature_tensors, features, local_graph
from gkd_dist.shards.buffers import BufferPool
from gkd_dist.shards.manifest import Manifest
from gkd_dist.sparse import CsrPattern
from gkd_dist.storage import Storage
from gkd_dist.stream.ensemble import Ensemble, Taught
from gkd_dist.stream.knowledge import NOTHING, EmbeddingKey, KnowledgeStore, Wants
from gkd_dist.stream.merge import LocalPart, merge_edges, merge_nodes
from gkd_dist.topk import concatenate

EMPTY_UNIT = -1  # `Batch.unit` of an empty batch
_IN_PLACE_BYTES = 4 << 20  # features from here on are a request of their own, straight into the batch
_NUM_BUFFERS = 2  # kept for the next reads: as many as threads that read ahead
_NOT_READ = ("send_part", "send_ptr", "send_rows")  # for inference, and for ranks that exchange halo rows
_OWNED = ("y", *(f"{split}_mask" for split in SPLITS))


def part_costs(graph: Manifest) -> list[float]:
    """What training on each part costs, up to a factor: its nodes and edges with halo."""
    keys = ("num_owned", "num_halo", "num_edges")
    return [float(sum(entry.counts[key] for key in keys)) for entry in graph.parts]


class UnitLoader:
    """Makes batches out of a graph store and, optionally, a teacher's knowledge.

    ``units`` are the parts of each unit. ``hops`` is how much of the stored halo is used (None:
    all of it); fewer hops than the student is deep make its outputs approximate. ``features`` are the
    named features that become ``x`` of a batch (None: the graph's own). Holds no open files, and no
    state but memory to read into: it can be pickled and used from several threads.
    """

    def __init__(
        self,
        graph: GraphStore,
        knowledge: tuple[Storage, Manifest] | Ensemble | None,
        units: Sequence[tuple[int, ...]],
        wants: Wants = NOTHING,
        hops: int | None = None,
        features: str | None = None,
    ) -> None:
        self.graph, self.features = graph, features
        self._pool = BufferPool(_NUM_BUFFERS)
        self.num_features = graph.num_features_of(features)
        self.units = [tuple(sorted(unit)) for unit in units]
        self.wants = wants
        self.hops = _check_hops(graph.manifest, hops)
        self.knowledge: KnowledgeStore | Ensemble | None = None
        if knowledge is not None and wants:
            self.knowledge = knowledge if isinstance(knowledge, Ensemble) else KnowledgeStore(*knowledge)
        absent = sorted({part for unit in self.units for part in unit} - set(range(graph.num_parts)))
        if absent:
            raise GraphError(
                f"units name part {absent[0]} of a graph store that has {graph.num_parts} parts; plan them again"
            )
        if self.knowledge is not None:
            self.knowledge.check(graph.manifest, wants)
        elif wants:
            raise ManifestError("the losses need a teacher's knowledge, but there is none; run `gkd infer` first")

    @property
    def costs(self) -> tuple[float, ...]:
        """Cost of each unit, for `order.deal`."""
        costs = part_costs(self.graph.manifest)
        return tuple(sum(costs[part] for part in unit) for unit in self.units)

    def load(self, unit: int | None) -> Batch:
        """The batch of ``unit``; the empty batch for None.

        Raises ShardError where a stored object is damaged and StorageError where it is unreachable.
        """
        if unit is None:
            return self.empty()
        in_place = self._is_in_place(unit)
        parts = [self._part(part, in_place) for part in self.units[unit]]
        x = self.graph.inputs(parts[0].index, self.features) if in_place else None
        graph, n_id, x = self._nodes_and_edges(parts, x)
        taught = self._teacher(parts)
        return Batch(
            unit,
            graph,
            x,
            **{name: torch.cat([part.tensors[name] for part in parts]) for name in _OWNED},
            n_id=n_id,
            num_owned=sum(part.num_owned for part in parts),
            teacher_logits=taught.logits,
            teacher_scores=taught.scores,
            logits_of=taught.logits_of,
            teacher_embeddings=taught.embeddings,
        )

    def empty(self) -> Batch:
        """The batch of a micro-step without a unit."""
        meta = self.graph.manifest.meta
        weighted = bool(meta.get("has_edge_weight", False))
        attributes = self.graph.num_edge_features
        classes = int(meta["num_classes"])
        widths = self.embedding_widths()
        return empty_batch(self.num_features, classes, meta["task"], self.wants, weighted, attributes, widths)

    def embedding_widths(self) -> dict[EmbeddingKey, int]:
        """Channels of each teacher layer that is wanted as it is."""
        if self.knowledge is None:
            return {}
        if isinstance(self.knowledge, Ensemble):
            return {key: self.knowledge.embedding_width(key) for key in self.wants.sorted_embeddings()}
        return {key: self.knowledge.embedding_width(key[0]) for key in self.wants.sorted_embeddings()}

    def size_of(self, unit: int | None) -> int:
        """Bytes of the batch of ``unit``, known before it is read; an upper bound where parts are merged."""
        if unit is None:
            return 0
        meta = self.graph.manifest.meta
        classes = int(meta["num_classes"])
        label_bytes = 8 if meta["task"] == "multiclass" else 4 * classes
        per_node = 4 * self.num_features + 8 + 16 + 4 + 1  # x, n_id, both indptr, degree, loop
        per_edge = 3 * 8 + 4 * bool(meta.get("has_edge_weight", False)) + 4 * self.graph.num_edge_features
        per_owned = label_bytes + len(SPLITS) + self._logit_bytes(classes) + 4 * sum(self.embedding_widths().values())
        total = 16
        for part in self.units[unit]:
            entry = self.graph.manifest.parts[part]
            counts = entry.counts
            total += per_node * entry.meta["hop_ptr"][self.hops] + per_edge * counts["num_edges"]
            total += per_owned * counts["num_owned"] + 4 * len(self.wants.scores) * counts["num_owned_edges"]
        return total

    def extra_of(self, unit: int | None) -> int:
        """Bytes that `load` takes beside the batch for a while: objects as stored, and what decoding them takes."""
        if unit is None:
            return 0
        graph, in_place, total = self.graph.manifest, self._is_in_place(unit), 0
        for part in self.units[unit]:
            entry = graph.parts[part]
            skipped = set(_NOT_READ) | (set(feature_tensors(self.features)) if in_place else set())
            total += sum(tensor.stop - tensor.start for tensor in entry.tensors if tensor.name not in skipped)
            total += 8 * entry.counts["num_edges"] * (1 if len(self.units[unit]) == 1 else 6)  # rows; merging: orders
            if self.knowledge is not None:
                total += self.knowledge.num_bytes(part, self.wants)
        return total

    def name_of(self, unit: int | None) -> str:
        """What a unit is called in messages: its number, and the objects that it is read from."""
        if unit is None:
            return "an empty unit"
        keys = [self.graph.storage.describe(self.graph.manifest.parts[part].key) for part in self.units[unit]]
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        return f"unit {unit} ({', '.join(keys[:3])}{more})"

    def _logit_bytes(self, classes: int) -> int:
        """Of the teacher's logits, per owned node."""
        if self.knowledge is None:
            return 0
        if isinstance(self.knowledge, Ensemble):
            return 4 * classes * (self.wants.logits + len(self.wants.logits_of))
        if not self.wants.logits:
            return 0
        topk = self.knowledge.manifest.meta.get("topk")
        return 4 * classes if topk is None else 8 * topk["k"] + 4 * len(topk["temperatures"])

    def _part(self, index: int, in_place: bool) -> LocalPart:
        hop_ptr = tuple(self.graph.manifest.parts[index].meta["hop_ptr"])
        without = (*_NOT_READ, *(feature_tensors(self.features) if in_place else ()))
        return LocalPart(
            index, self.graph.part_with(index, self.features, without, self._pool), hop_ptr[: self.hops + 1]
        )

    def _is_in_place(self, unit: int) -> bool:
        """Whether ``x`` of a unit is read straight into the batch: all features of a single part, and many of them."""
        if len(self.units[unit]) > 1:
            return False
        (part,) = self.units[unit]
        entry, dense = self.graph.manifest.parts[part], self.graph.has_dense(part, self.features)
        num_nodes, used = entry.counts["num_owned"] + entry.counts["num_halo"], entry.meta["hop_ptr"][self.hops]
        return dense and used == num_nodes and 4 * num_nodes * self.num_features >= _IN_PLACE_BYTES

    def _nodes_and_edges(self, parts: list[LocalPart], x: Tensor | None) -> tuple[LocalGraph, Tensor, Tensor]:
        """Graph, ``n_id`` and ``x``; a single part is used as it is stored, with its transpose."""
        if len(parts) > 1:
            nodes = merge_nodes(parts)
            graph = merge_edges(parts, nodes)
            return graph, graph.global_ids(), nodes.take(self._x(part) for part in parts)
        part = parts[0]
        stored = local_graph(part.tensors, part.num_nodes, part.num_rows)
        # copies: views would keep the whole shard in memory for as long as the batch lives
        graph = LocalGraph(
            replace(stored.pattern, t_indptr=stored.pattern.t_indptr.clone()),
            stored.in_degree.clone(),
            stored.has_self_loop.clone(),
            None if stored.edge_weight is None else stored.edge_weight.clone(),
            part.num_owned,
            None if stored.edge_attr is None else stored.edge_attr.clone(),
            part.tensors["n_id"][: part.num_nodes].clone(),
        )
        return graph, graph.global_ids(), self._x(part) if x is None else x

    def _teacher(self, parts: list[LocalPart]) -> Taught:
        """Logits and scores of the owned nodes and their in-edges, part after part."""
        if self.knowledge is None:
            return Taught(None, {}, {}, {})
        known = [self._taught(part) for part in parts]
        logits = concatenate([one.logits for one in known if one.logits is not None]) if self.wants.logits else None
        scores = {key: torch.cat([one.scores[key] for one in known]) for key in self.wants.sorted_scores()}
        logits_of = {name: concatenate([one.logits_of[name] for one in known]) for name in self.wants.logits_of}
        kept = {key: torch.cat([one.embeddings[key] for one in known]) for key in self.wants.sorted_embeddings()}
        return Taught(logits, scores, logits_of, kept)

    def _taught(self, part: LocalPart) -> Taught:
        if isinstance(self.knowledge, Ensemble):
            return self.knowledge.part(part.index, part.tensors, self.wants)
        assert self.knowledge is not None
        logits, scores, embeddings = self.knowledge.part(part.index, part.tensors, self.wants)
        return Taught(logits, scores, {}, embeddings)

    def _x(self, part: LocalPart) -> Tensor:
        """Features of the nodes in use, float32 [num_nodes, f]."""
        owned, halo = (features(part.tensors, name, self.num_features) for name in feature_tensors(self.features))
        return torch.cat([owned, halo[: part.num_nodes - part.num_owned]])


def _check_hops(graph: Manifest, hops: int | None) -> int:
    stored = int(graph.meta["halo_hops"])
    if hops is not None and not 1 <= hops <= stored:
        raise GraphError(
            f"the graph store has {stored} hops of halo (got hops={hops}); "
            f"set partition.halo_hops={max(1, hops)} and run `gkd partition` again"
        )
    return stored if hops is None else hops


def empty_batch(
    num_features: int,
    num_classes: int,
    task: Task,
    wants: Wants = NOTHING,
    weighted: bool = False,
    num_edge_features: int = 0,
    embedding_widths: Mapping[EmbeddingKey, int] | None = None,
) -> Batch:
    """A batch without nodes, with every tensor that a real one has.

    Every layer runs on it, so that a rank without a unit takes part in each collective operation.
    """
    none = torch.empty(0)
    mask = none.bool()
    pattern = CsrPattern.from_csr(torch.zeros(1, dtype=torch.int64), none.long())
    return Batch(
        EMPTY_UNIT,
        LocalGraph(
            pattern,
            none,
            mask,
            none if weighted else None,
            0,
            torch.empty(0, num_edge_features) if num_edge_features else None,
            none.long(),
        ),
        torch.empty(0, num_features),
        y=none.long() if task == "multiclass" else torch.empty(0, num_classes),
        train_mask=mask,
        val_mask=mask,
        test_mask=mask,
        n_id=none.long(),
        num_owned=0,
        teacher_logits=torch.empty(0, num_classes) if wants.logits else None,
        teacher_scores={key: none for key in wants.sorted_scores()},
        logits_of={name: torch.empty(0, num_classes) for name in wants.logits_of},
        teacher_embeddings={key: torch.empty(0, width) for key, width in (embedding_widths or {}).items()},
    )
