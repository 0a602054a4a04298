"""What a store says about the teacher's local structures: their entropy, and how much of them the cut takes away.

Parts are read one at a time; what is kept of a part is a few counts. For a term with softmax
arguments a_ij, ``p_ij = softmax_j a_ij`` over the in-neighbours j of node i (self-loops left out):

- *lost mass* is the mean over nodes of the p_ij of neighbours that another part owns: the share of
  the teacher's local structure that a student without halo never sees;
- *entropy* of p_i, in nats, and divided by the log of the number of neighbours (1: uniform).

Shapes: ``o`` owned nodes; ``m`` in-edges of owned nodes that are no self-loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gkd_dist.config import Config
from gkd_dist.infer.layerwise import STRUCTURE
from gkd_dist.losses import median as medians
from gkd_dist.losses.bounds import ScoreReader, score_readers
from gkd_dist.losses.kernels import Kernel
from gkd_dist.losses.neighbours import Neighbours
from gkd_dist.partition.store import GraphStore, local_graph
from gkd_dist.shards.manifest import Manifest
from gkd_dist.sparse import segment_log_softmax, segment_sum
from gkd_dist.stream.knowledge import KnowledgeStore, Wants, embedding_name, score_name

BIN_NATS = 0.25
NUM_SHARE_BINS = 20
_DEFAULT_KERNELS = {
    "sqeuclidean": Kernel("rbf", outer_softmax=False),
    "manhattan": Kernel("laplacian", outer_softmax=False),
    "dot": Kernel("linear"),
    "cosine": Kernel("cosine"),
}


@dataclass
class Structure:
    """One term's local structures, summed over the parts that were read.

    ``entropy`` counts nodes by entropy in bins of `BIN_NATS`; ``share`` those with two neighbours or
    more by entropy / log(neighbours), in `NUM_SHARE_BINS` bins from 0 to 1.
    """

    reader: ScoreReader
    sigma: float | None
    num_nodes: int = 0
    num_edges: int = 0
    num_cut_edges: int = 0
    lost: float = 0.0
    entropy_sum: float = 0.0
    entropy: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    share: Tensor = field(default_factory=lambda: torch.zeros(NUM_SHARE_BINS, dtype=torch.int64))

    def add(self, scores: Tensor, neighbours: Neighbours, num_owned: int, cut: Tensor | None = None) -> None:
        """``scores`` [m] are raw scores of the edges of ``neighbours``, whose first ``num_owned`` nodes are owned.

        ``cut`` bool [m] says which edges are lost, None: those from nodes that are not owned.
        """
        arguments = self.reader.kernel.logits(scores, 1.0 if self.sigma is None else self.sigma)
        indptr = neighbours.pattern.indptr[: num_owned + 1]
        log_p = segment_log_softmax(arguments.double(), indptr, neighbours.rows)
        p, cut = log_p.exp(), neighbours.pattern.indices >= num_owned if cut is None else cut
        degree = indptr[1:] - indptr[:-1]
        entropy = segment_sum(-p * log_p, indptr)[degree > 0].clamp_min(0)
        degree = degree[degree > 0]
        self.num_nodes += degree.numel()
        self.num_edges += int(degree.sum())
        self.num_cut_edges += int(cut.sum())
        self.lost += float(p[cut].sum())
        self.entropy_sum += float(entropy.sum())
        self.entropy = _added(self.entropy, torch.bincount((entropy / BIN_NATS + 1e-9).long()))
        several = degree > 1
        share = entropy[several] / degree[several].double().log()
        bins = (share * NUM_SHARE_BINS).long().clamp_max(NUM_SHARE_BINS - 1)
        self.share = _added(self.share, torch.bincount(bins, minlength=NUM_SHARE_BINS))

    def to_json(self) -> dict[str, Any]:
        """Plain values; null where no node has a neighbour."""
        kernel, layer = self.reader.kernel, self.reader.layer
        return {
            "loss": self.reader.name,
            "score": f"{layer}.{kernel.metric}",
            "kernel": kernel.name,
            "outer_softmax": kernel.outer_softmax,
            "temperature": kernel.temperature,
            "sigma": self.sigma if kernel.uses_sigma else None,
            "num_nodes": self.num_nodes,
            "num_edges": self.num_edges,
            "num_cut_edges": self.num_cut_edges,
            "cut_fraction": self.num_cut_edges / self.num_edges if self.num_edges else None,
            "lost_mass": self.lost / self.num_nodes if self.num_nodes else None,
            "mean_entropy": self.entropy_sum / self.num_nodes if self.num_nodes else None,
            "entropy": {"bin_nats": BIN_NATS, "counts": self.entropy.tolist()},
            "entropy_share": {"bins": NUM_SHARE_BINS, "counts": self.share.tolist()},
        }


def _added(first: Tensor, second: Tensor) -> Tensor:
    length = max(first.numel(), second.numel())
    return torch.cat([first, first.new_zeros(length - first.numel())]) + torch.cat(
        [second, second.new_zeros(length - second.numel())]
    )


def structure_terms(manifest: Manifest, config: Config | None) -> list[ScoreReader]:
    """The terms to look at: those of the configuration, else those in the manifest, else one per stored score.

    Terms whose scores are not stored, neither themselves nor as embeddings, are left out.
    """
    meta = manifest.meta
    stored = {tensor.name for part in manifest.parts[:1] for tensor in part.tensors}
    if config is not None:
        readers = list(score_readers(config.losses, int(meta["num_layers"])))
    else:
        readers = [_of_manifest(bound) for bound in meta.get("bounds", [])]
    known = [r for r in readers if stored & {score_name(*r.score), embedding_name(r.layer)}]
    return known or [_default(layer, metric) for layer, metric in _stored_scores(stored)]


def _of_manifest(bound: Mapping[str, Any]) -> ScoreReader:
    kernel = Kernel(bound["kernel"], bound["outer_softmax"], temperature=bound["temperature"])
    layer = int(str(bound["score"]).partition(".")[0])
    sigma = "median" if bound["sigma"] is None else bound["sigma"]
    return ScoreReader(bound["loss"], layer, kernel, sigma, bound["direction"])


def _stored_scores(stored: Iterable[str]) -> list[tuple[int, str]]:
    found = {(int(n.split(".")[1]), n.split(".")[2]) for n in stored if n.startswith("scores.") and n.count(".") == 2}
    layers = {layer for layer, _ in found}
    embedded = {int(name.split(".")[1]) for name in stored if name.startswith("embeddings.")}
    return sorted(found | {(layer, "sqeuclidean") for layer in embedded - layers})


def _default(layer: int, metric: str) -> ScoreReader:
    kernel = _DEFAULT_KERNELS[metric]
    return ScoreReader("none", layer, kernel, "median" if kernel.uses_sigma else 1.0, "student||teacher")


def measure(
    graph: GraphStore,
    knowledge: KnowledgeStore,
    readers: Sequence[ScoreReader],
    parts: Sequence[int],
    advance: Callable[[], None] = lambda: None,
) -> list[Structure]:
    """Local structures of ``readers`` over ``parts``, which are read one at a time.

    A width from the median is that of the manifest, or else of these parts, which are then read twice.
    """
    knowledge.manifest.require_input("graph", graph.manifest.fingerprint, knowledge.storage.url)
    if not readers:
        return []
    structures = structures_of(graph, knowledge, readers, parts)
    for part in parts:
        neighbours, scores = _read(graph, knowledge, readers, part)
        num_owned = graph.manifest.parts[part].counts["num_owned"]
        for structure in structures:
            structure.add(scores[structure.reader.score][neighbours.picked], neighbours, num_owned)
        advance()
    return structures


def structures_of(
    graph: GraphStore, knowledge: KnowledgeStore, readers: Sequence[ScoreReader], parts: Sequence[int]
) -> list[Structure]:
    """Structures of ``readers`` with their widths, to which nothing is added yet."""
    widths = _widths(graph, knowledge, readers, parts)
    return [Structure(reader, sigma) for reader, sigma in zip(readers, widths, strict=True)]


def _widths(
    graph: GraphStore, knowledge: KnowledgeStore, readers: Sequence[ScoreReader], parts: Sequence[int]
) -> list[float | None]:
    known = {
        key: info["median"] for key, info in knowledge.manifest.meta.get("scores", {}).items() if info.get("median")
    }
    wanted = [r for r in readers if r.kernel.uses_sigma and isinstance(r.sigma, str) and _key(r) not in known]
    if wanted:
        known |= _medians(graph, knowledge, wanted, parts)
    return [reader.width(known.get(_key(reader))) if reader.kernel.uses_sigma else 1.0 for reader in readers]


def _key(reader: ScoreReader) -> str:
    return f"{reader.layer}.{reader.kernel.metric}"


def _medians(
    graph: GraphStore, knowledge: KnowledgeStore, readers: Sequence[ScoreReader], parts: Sequence[int]
) -> dict[str, float]:
    counts = {_key(reader): torch.zeros(medians.NUM_KEYS, dtype=torch.int64) for reader in readers}
    for part in parts:
        neighbours, scores = _read(graph, knowledge, readers, part)
        for reader in {_key(reader): reader for reader in readers}.values():
            counts[_key(reader)] += medians.score_histogram(scores[reader.score][neighbours.picked])
    found = {key: medians.median_of_histogram(histogram) for key, histogram in counts.items() if histogram.any()}
    return {key: value for key, value in found.items() if value > 0 and math.isfinite(value)}


def _read(
    graph: GraphStore, knowledge: KnowledgeStore, readers: Sequence[ScoreReader], part: int
) -> tuple[Neighbours, dict[tuple[int, str], Tensor]]:
    """In-edges of the owned nodes of a part, and the raw scores of all its owned in-edges."""
    tensors = graph.part(part, [*STRUCTURE, "y"])
    counts = graph.manifest.parts[part].counts
    wants = Wants.of(scores=[reader.score for reader in readers])
    found = knowledge.part(part, tensors, wants).scores
    scores = {reader.score: found[reader.score] for reader in readers}
    local = local_graph(tensors, counts["num_owned"] + counts["num_halo_1"], counts["num_owned"])
    return Neighbours.of_graph(local, counts["num_owned"]), scores
