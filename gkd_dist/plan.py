"""What a run will store of the teacher, decided from the configuration and the graph's counts."""

from __future__ import annotations

import logging
from typing import Any

from gkd_dist.config import Config

log = logging.getLogger(__name__)


def layer_width(config: Config, layer: int, num_classes: int) -> int:
    """Width of a teacher layer."""
    model = config.teacher.model
    return num_classes if layer == model.layers else model.hidden * model.heads


def plan_knowledge(config: Config, meta: dict[str, Any]) -> tuple[dict[int, set[str]], set[int]]:
    """(metrics per layer stored as scores, layers stored as embeddings)."""
    scores: dict[int, set[str]] = {}
    embeddings: set[int] = set()
    for layer, metrics in config.knowledge_layers().items():
        width = layer_width(config, layer, int(meta["num_classes"]))
        per_edge = len(metrics) * meta["num_edges"]
        per_node = width * meta["num_nodes"] * (1 + meta["halo_factor"])
        choice = config.infer.scores
        if choice == "auto":
            choice = "scores" if per_edge <= per_node else "embeddings"
        if choice == "scores":
            scores[layer] = set(metrics)
        else:
            embeddings.add(layer)
    return scores, embeddings


def say_knowledge(config: Config, meta: dict[str, Any]) -> None:
    """Tells what is stored of each layer, and from which average degree on the other form is smaller."""
    scores, _ = plan_knowledge(config, meta)
    for layer, metrics in sorted(config.knowledge_layers().items()):
        width = layer_width(config, layer, int(meta["num_classes"]))
        log.info(
            "layer %d: %s stored (average degree %.1f; embeddings of width %d are smaller above %.1f)",
            layer,
            "scores" if layer in scores else "embeddings",
            meta["num_edges"] / meta["num_nodes"],
            width,
            width * (1 + meta["halo_factor"]) / len(metrics),
        )
