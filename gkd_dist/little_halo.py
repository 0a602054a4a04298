"""What a student sees wrongly where fewer hops of halo are stored than exactness needs.

A unit is exact where it has every in-edge. Its outermost nodes have none, so that layer 1 is wrong there,
layer 2 at their neighbours as well, and so on inwards::

    hop           0 (owned)      1           2 = stored
    layer 1       exact          exact       wrong
    layer 2       exact          wrong       wrong
    layer 3       wrong at the border

What is counted: owned nodes whose output is wrong, and per LSP term the share of the teacher's local structure
that lies on edges with a wrong end. Some units are read, one at a time.

Shapes: ``n`` nodes, ``m`` edges of a unit; ``o`` owned nodes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_dist.config import Config, LspLoss, resolve_layer
from gkd_dist.graph import LocalGraph
from gkd_dist.inspect_measures import Structure, structure_terms, structures_of
from gkd_dist.losses.bounds import named_losses
from gkd_dist.losses.neighbours import Neighbours
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.sparse import segment_max
from gkd_dist.storage import Storage
from gkd_dist.stream.knowledge import KnowledgeStore, Wants
from gkd_dist.stream.merge import LocalPart, merge_edges, merge_nodes
from gkd_dist.stream.order import plan_units
from gkd_dist.stream.units import part_costs

_MAX_UNITS = 8  # enough for a share of a percent, and seconds
_STRUCTURE = ("n_id", "halo_owner", "indptr", "indices", "in_degree", "has_self_loop", "y")

Known = tuple[Config, Storage, Manifest]  # a teacher's view of the run, and its knowledge


def what_is_approximate(config: Config, graph: GraphStore, known: Sequence[Known]) -> str:
    """One line for people; empty where training is exact."""
    stored, needed = int(graph.manifest.meta["halo_hops"]), config.required_halo_hops()
    units = plan_units(graph.num_parts, config.distill.parts_per_unit, part_costs(graph.manifest))
    if stored >= needed or len(units) == 1 or config.distill.halo == "exchange":
        return ""
    chosen = sorted(random.Random(0).sample(units, min(_MAX_UNITS, len(units))))
    nodes, terms = _measure(config, graph, known, chosen)
    where = "" if len(chosen) == len(units) else f", measured in {len(chosen)} of {len(units)} units"
    losses = "".join(
        f"; loss {name}: {share:.1%} of the teacher's local structure meets such outputs" for name, share in terms
    )
    return (
        f"partition.halo_hops is {stored}, exact training needs {needed}: outputs of {nodes:.1%} of the nodes are "
        f"approximate{losses}{where}; set partition.halo_hops=auto or distill.halo=exchange for exact training"
    )


def wrong_nodes(graph: LocalGraph, num_rows: int, layers: int) -> list[Tensor]:
    """Nodes whose output of layer 0 (the input) to ``layers`` is not that of the whole graph: bool [n] each.

    The first ``num_rows`` nodes have all their in-edges.
    """
    wrong = torch.zeros(graph.num_nodes, dtype=torch.bool)
    cut = (torch.arange(graph.num_nodes) >= num_rows) & (graph.in_degree > 0)
    found = [wrong]
    for _ in range(layers):
        reads_wrong = segment_max(wrong[graph.pattern.indices].float(), graph.pattern.indptr) > 0
        wrong = wrong | cut | reads_wrong
        found.append(wrong)
    return found


def _measure(
    config: Config, graph: GraphStore, known: Sequence[Known], units: Sequence[tuple[int, ...]]
) -> tuple[float, list[tuple[str, float]]]:
    """Share of owned nodes with a wrong output; per LSP term its name and the share of structure with a wrong end."""
    layers = config.student.model.layers if config.student.model.kind != "mlp" else 0
    parts = sorted(part for unit in units for part in unit)
    teachers = [_Teacher(*one, graph, parts) for one in known]
    num_wrong = num_owned = 0
    for unit in units:
        local, num_rows = _unit(graph, unit)
        wrong, owned = wrong_nodes(local, num_rows, layers), int(local.num_owned or 0)
        num_wrong, num_owned = num_wrong + int(wrong[-1][:owned].sum()), num_owned + owned
        for teacher in teachers:
            teacher.add(graph, unit, local, wrong)
    return num_wrong / max(1, num_owned), [share for teacher in teachers for share in teacher.shares(len(known) > 1)]


def _unit(graph: GraphStore, unit: Sequence[int]) -> tuple[LocalGraph, int]:
    """Merged parts, and how many of their nodes have all in-edges."""
    parts = []
    for index in unit:
        hop_ptr = tuple(graph.manifest.parts[index].meta["hop_ptr"])
        parts.append(LocalPart(index, graph.part(index, _STRUCTURE), hop_ptr))
    nodes = merge_nodes(parts)
    return merge_edges(parts, nodes), nodes.num_rows


class _Teacher:
    """Structures of the LSP terms that read one teacher, by the layer of the student that they compare."""

    def __init__(
        self, config: Config, storage: Storage, manifest: Manifest, graph: GraphStore, parts: Sequence[int]
    ) -> None:
        self.name, self.knowledge = config.teacher.name, KnowledgeStore(storage, manifest)
        depth, mlp = config.student.model.layers, config.student.model.kind == "mlp"
        layer_of = {
            name: 0 if mlp else resolve_layer(loss.student_layer, depth)
            for name, loss in named_losses(config.losses)
            if isinstance(loss, LspLoss)
        }
        readers = [reader for reader in structure_terms(manifest, config) if reader.name in layer_of]
        self.layers = [layer_of[reader.name] for reader in readers]
        self.structures: list[Structure] = structures_of(graph, self.knowledge, readers, parts) if readers else []

    def add(self, graph: GraphStore, unit: Sequence[int], local: LocalGraph, wrong: Sequence[Tensor]) -> None:
        """Adds the owned nodes of a unit."""
        if not self.structures:
            return
        scores, owned = self._scores(graph, unit), int(local.num_owned or 0)
        neighbours = Neighbours.of_graph(local, owned)
        sources, targets = neighbours.pattern.indices, neighbours.rows
        for structure, layer in zip(self.structures, self.layers, strict=True):
            lost = wrong[layer][sources] | wrong[layer][targets]
            structure.add(scores[structure.reader.score][neighbours.picked], neighbours, owned, lost)

    def _scores(self, graph: GraphStore, unit: Sequence[int]) -> dict[tuple[int, str], Tensor]:
        wants = Wants.of(scores=[structure.reader.score for structure in self.structures])
        found = [self.knowledge.part(part, graph.part(part, _STRUCTURE), wants)[1] for part in unit]
        return {s.reader.score: torch.cat([one[s.reader.score] for one in found]) for s in self.structures}

    def shares(self, several: bool) -> list[tuple[str, float]]:
        """Name and share of each term; where there are ``several`` teachers, with that of the teacher."""
        of = f" (teacher {self.name})" if several else ""
        return [(f"{s.reader.name}{of}", s.lost / s.num_nodes) for s in self.structures if s.num_nodes]
