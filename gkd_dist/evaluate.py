"""How good stored predictions are: exact metrics from integer counts, streamed over the parts.

Shapes: ``o`` owned nodes of a part; ``c`` classes, or labels of a multi-label task.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gkd_dist.config import LspLoss, resolve_layer
from gkd_dist.errors import ManifestError
from gkd_dist.graph import SPLITS
from gkd_dist.losses.kernels import Kernel
from gkd_dist.losses.lsp import lsp_sum
from gkd_dist.losses.neighbours import Neighbours
from gkd_dist.metrics import METRIC_NAMES, NUM_COUNTS, metric_of, predicted_labels, split_counts
from gkd_dist.partition.store import GraphStore, local_graph
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.stream.ensemble import Ensemble
from gkd_dist.stream.knowledge import KnowledgeStore, Wants, score_name
from gkd_dist.topk import TopK

Stored = tuple[Storage, Manifest]  # what `infer_nodes` wrote, and where
_LOGITS = Wants(logits=True)
_STRUCTURE = ("n_id", "y", "in_degree", "has_self_loop", "indptr", "indices", "t_indptr", "t_perm")


def evaluate_logits(
    graph: GraphStore, predictions: Stored | Ensemble, teacher: Stored | Ensemble | None = None
) -> dict[str, Any]:
    """Metrics of stored logits on every split, over the labelled nodes of all parts.

    Returns ``metric`` (``accuracy``, or ``micro_f1`` for multi-label tasks), its value per split
    (``train``, ``val``, ``test``; None for a split without labelled nodes), ``num_train``, ... the
    nodes counted, and with a ``teacher`` the ``agreement`` over all nodes: the fraction of equal
    classes, or of equal labels. Of an `Ensemble` the mean logits count. Raises `ManifestError` for
    predictions about another graph.
    """
    task = str(graph.manifest.meta["task"])
    stores = [_open(stored) for stored in (predictions, teacher) if stored is not None]
    for store in stores:
        store.check(graph.manifest, _LOGITS)
    counts = torch.zeros(len(SPLITS), NUM_COUNTS, dtype=torch.int64)
    equal = compared = 0
    for part in range(graph.num_parts):
        targets = graph.part(part, ["y", *(f"{split}_mask" for split in SPLITS)])
        labels = [_labels(store, part, targets["y"], task) for store in stores]
        counts += torch.stack([split_counts(labels[0], targets["y"], targets[f"{split}_mask"]) for split in SPLITS])
        if teacher is not None:
            equal, compared = equal + int((labels[0] == labels[1]).sum()), compared + labels[0].numel()
    found: dict[str, Any] = {"metric": METRIC_NAMES[task]}
    for split, row in zip(SPLITS, counts, strict=True):
        found[split], found[f"num_{split}"] = metric_of(row), int(row[0])
    if teacher is not None:
        found["agreement"] = equal / max(1, compared)
    return found


def _open(stored: Stored | Ensemble) -> KnowledgeStore | Ensemble:
    return stored if isinstance(stored, Ensemble) else KnowledgeStore(*stored)


def _labels(store: KnowledgeStore | Ensemble, part: int, y: Tensor, task: str) -> Tensor:
    """What is predicted for the owned nodes; the first of the largest logits is the class."""
    logits = store.part(part, {}, _LOGITS).logits
    scores = logits.values if isinstance(logits, TopK) else logits
    if scores is None or scores.size(0) != y.size(0):
        found = 0 if scores is None else scores.size(0)
        raise ManifestError(
            f"part {part} in {store.url} has logits of {found} nodes, the graph has {y.size(0)}; "
            "run the inference again"
        )
    return logits.index[:, 0].long() if isinstance(logits, TopK) else predicted_labels(scores, task)


def lsp_divergence(
    graph: GraphStore, student: Stored, teacher: Stored, term: LspLoss, *, student_sigma: float | None = None
) -> float:
    """Mean divergence of a model's local structures from the teacher's, over nodes with neighbours.

    Both stores hold scores (or embeddings) of the layers that ``term`` names. ``student_sigma`` is
    the width that training settled on; None: from ``term``, where "median" takes the median of
    the stored scores. 0 for a graph without edges. Raises `ManifestError` for missing scores.
    """
    kernel = Kernel(term.kernel, term.outer_softmax, term.c, term.degree, term.temperature)
    sides = [
        _Side(student, term.student_layer, term.sigma if student_sigma is None else student_sigma, kernel),
        _Side(teacher, term.teacher_layer, term.sigma if term.teacher_sigma is None else term.teacher_sigma, kernel),
    ]
    for side in sides:
        side.store.check(graph.manifest, side.wants)
    total, num_nodes = 0.0, 0
    for part in range(graph.num_parts):
        counts, tensors = graph.manifest.parts[part].counts, graph.part(part, _STRUCTURE)
        num_owned = counts["num_owned"]
        local = local_graph(tensors, num_owned + counts["num_halo_1"], num_owned)
        neighbours = Neighbours.of_graph(local, num_owned, self_loops=term.self_loops)
        if neighbours.num_nodes:
            of_student, of_teacher = (side.softmax_arguments(part, tensors, neighbours) for side in sides)
            total += float(lsp_sum(of_student, of_teacher, neighbours, term.direction))
            num_nodes += neighbours.num_nodes
    return total / max(1, num_nodes)


class _Side:
    """Student or teacher: where its scores are and how wide its kernel is."""

    def __init__(self, stored: Stored, layer: int, sigma: float | str, kernel: Kernel) -> None:
        self.store, self.kernel = KnowledgeStore(*stored), kernel
        meta = self.store.manifest.meta
        self.score = (resolve_layer(layer, int(meta["num_layers"])), kernel.metric)
        self.wants = Wants.of(scores=[self.score])
        self.sigma = self._median_width(meta) if isinstance(sigma, str) else sigma

    def softmax_arguments(self, part: int, tensors: dict[str, Tensor], neighbours: Neighbours) -> Tensor:
        """What the softmax over in-neighbours is taken of, float64 [m]."""
        scores = self.store.part(part, tensors, self.wants).scores
        return self.kernel.logits(scores[self.score][neighbours.picked].double(), self.sigma)

    def _median_width(self, meta: dict[str, Any]) -> float:
        name = score_name(*self.score).removeprefix("scores.")
        median = meta.get("scores", {}).get(name, {}).get("median")
        if median is None:
            raise ManifestError(
                f"{self.store.storage.url} has no median of {name}, which sigma: median needs; "
                "run the inference with these scores, or give sigma a number"
            )
        return self.kernel.sigma_from_median(float(median))
