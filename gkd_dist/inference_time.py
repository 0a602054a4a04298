"""How long a model takes for a pass over the graph, measured alike for teacher and students."""

from __future__ import annotations

import time

import torch
from torch import nn

from gkd_dist.models.build import run_model
from gkd_dist.partition.store import GraphStore
from gkd_dist.stream.units import UnitLoader

_SAMPLED_PARTS = 4


@torch.no_grad()
def inference_seconds(model: nn.Module, graph: GraphStore, features: str | None = None) -> float:
    """Seconds of one forward over every part with its halo, reading not counted.

    ``features`` are the named features that the model reads, None: ``x``. At most four parts are
    timed, the second of two passes each, and scaled to all nodes. Runs in this process with torch's
    current number of threads.
    """
    model.eval()
    loader = UnitLoader(graph, None, [(part,) for part in range(graph.num_parts)], features=features)
    sampled = range(0, graph.num_parts, max(1, -(-graph.num_parts // _SAMPLED_PARTS)))
    seconds, nodes = 0.0, 0
    for part in sampled:
        batch = loader.load(part)
        run_model(model, batch.x, batch.graph)  # warm caches; sparse matrices are built once
        started = time.perf_counter()
        run_model(model, batch.x, batch.graph)
        seconds += time.perf_counter() - started
        nodes += batch.num_owned
    total = int(graph.manifest.meta["num_nodes"])
    return seconds * total / max(1, nodes)
