"""What a knowledge store is called inside, and what its manifest says of the whole graph.

A knowledge part lies beside the graph part of the same number and holds, each only if wanted::

    logits                     [o, c]    outputs of the last layer, or instead
    logits.topk, logits.index  [o, k]    the largest of them and their classes, and
    logits.tail                [o, t]    what the others weigh at each temperature
    scores.<layer>.<metric>    [m]       raw scores of the in-edges of owned nodes, in edge order
      … .offset, … .scale      [o]       beside them where they are uint8
    embeddings.<layer>         [n, d_l]  z_l of owned nodes and of their first halo hop
    taps.<path>                [o, d]    output of the module at a dotted path

Shapes: ``o`` owned nodes; ``n`` owned and first-hop halo nodes; ``m`` in-edges of owned nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gkd_dist.infer.packing import SCORES, Packing, part_errors, score_error, score_of, worst
from gkd_dist.infer.plan import Wants
from gkd_dist.losses import median
from gkd_dist.losses.bounds import describe, require_fine
from gkd_dist.models.io import ModelSpec
from gkd_dist.shards.manifest import ObjectEntry

KIND = "knowledge"
Histogram = dict[int, int]  # key of `losses.median` to count, only where the count is not 0


def score_name(layer: int, metric: str) -> str:
    """Name of a stored score tensor."""
    return f"{SCORES}{layer}.{metric}"


def embedding_name(layer: int) -> str:
    """Name of a stored embedding tensor."""
    return f"embeddings.{layer}"


def measured_scores(wants: Wants, packing: Packing) -> dict[int, set[str]]:
    """Metrics per layer whose median the manifest states: those stored, and those read off embeddings."""
    measured = {layer: set(metrics) for layer, metrics in wants.scores.items()}
    for reader in packing.readers:
        if reader.layer in wants.embeddings:
            measured.setdefault(reader.layer, set()).add(reader.kernel.metric)
    return measured


def score_histogram(scores: Tensor, self_loops: Tensor) -> Histogram:
    """Histogram of ``scores`` [m] without those of ``self_loops`` bool [m], small enough for a record."""
    counts = median.score_histogram(scores[~self_loops])
    keys = torch.nonzero(counts).flatten()
    return dict(zip(keys.tolist(), counts[keys].tolist(), strict=True))


def add_histogram(total: Histogram, part: Mapping[int, int]) -> None:
    """Adds ``part`` to ``total`` in place."""
    for key, count in part.items():
        total[key] = total.get(key, 0) + count


def median_score(histogram: Mapping[int, int]) -> float | None:
    """Lower median of the scores behind ``histogram``; None where there are none."""
    if not histogram:
        return None
    dense = torch.zeros(median.NUM_KEYS, dtype=torch.int64)
    dense[torch.tensor(list(histogram))] = torch.tensor(list(histogram.values()))
    return median.median_of_histogram(dense)


def knowledge_meta(
    wants: Wants,
    depth: int,
    spec: ModelSpec,
    packing: Packing,
    histograms: Mapping[str, Histogram],
    parts: Sequence[ObjectEntry],
) -> dict[str, Any]:
    """``meta`` of the manifest; ``depth`` 0 stands for k-hop mode, ``parts`` are the entries of all parts."""
    scores: dict[str, Any] = {}
    bounds: list[dict[str, Any]] = []
    for score in sorted(
        (layer, metric) for layer, metrics in measured_scores(wants, packing).items() for metric in metrics
    ):
        name = score_name(*score)
        median = median_score(histograms.get(name, {}))
        scores[name.removeprefix(SCORES)] = {"median": median}
        if score in wants.score_names():
            error = worst([score_error(part.meta["floats"][name]) for part in parts if part.counts["num_owned_edges"]])
            scores[name.removeprefix(SCORES)] |= {"bound": error.error, "low": error.low, "high": error.high}
            bounds += [describe(reader, error, median) for reader in packing.readers if reader.score == score]
    topk = packing.topk_of(spec.out_channels) if wants.logits else None
    return {
        "mode": "layerwise" if depth else "khop",
        "num_layers": spec.config.layers,
        "num_classes": spec.out_channels,
        "task": spec.task,
        "dtype": packing.dtype,
        "scores_dtype": packing.scores_dtype,
        "logits": wants.logits,
        "topk": None if topk is None else {"k": topk, "temperatures": list(packing.temperatures)},
        "scores": scores,
        "bounds": bounds,
        "embeddings": sorted(wants.embeddings),
        "taps": sorted(wants.taps),
    }


def refuse_coarse(meta: Mapping[str, Any], parts: Iterable[ObjectEntry], packing: Packing) -> None:
    """`DataError` naming the first part whose stored scores are too coarse for ``infer.max_kl``.

    ``meta`` of a manifest has the medians, which are known when all parts are.
    """
    if packing.max_kl is None:
        return
    medians = {score_of(name): value["median"] for name, value in meta["scores"].items()}
    for number, part in enumerate(parts):
        errors, where = part_errors(part.meta["floats"]), f"part {number}"
        require_fine(packing.readers, errors, medians, packing.max_kl, packing.scores_dtype, where)
