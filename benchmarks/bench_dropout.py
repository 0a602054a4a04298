"""Dropout by node against torch's dropout: forward and backward, and a whole training step of a GCN.

python benchmarks/bench_dropout.py [--nodes 100000] [--channels 128] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from environment import describe

from gkd_dist.config import ModelConfig
from gkd_dist.graph import LocalGraph
from gkd_dist.models.layered import LayeredModel
from gkd_dist.noise import NodeNoise


def median_ms(work: Callable[[], object], repeats: int = 7) -> float:
    """Median of ``repeats`` runs after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def main() -> None:
    """Prints both sides of both ratios and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--degree", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    n, d = args.nodes, args.channels
    h, grad, noise = torch.randn(n, d, requires_grad=True), torch.randn(n, d), NodeNoise(torch.randperm(n), 1)
    result = {
        "torch_dropout_ms": median_ms(lambda: F.dropout(h, 0.5).backward(grad)),
        "node_dropout_ms": median_ms(lambda: noise.drop(h, 0.5, 1).backward(grad)),
    }
    graph = LocalGraph.from_edge_index(torch.randint(0, n, (2, n * args.degree)), n)
    x, y = torch.randn(n, d), torch.randint(0, 10, (n,))
    for mask, seen in (("unit", graph), ("node", graph.with_noise(noise))):
        config = ModelConfig(kind="gcn", hidden=d, layers=3, dropout=0.5, dropout_mask=mask)
        model = LayeredModel(config, d, 10).train()
        result[f"step_{mask}_ms"] = median_ms(
            lambda model=model, seen=seen: F.cross_entropy(model(x, seen), y).backward(), 3
        )
    result["dropout_speedup"] = result["torch_dropout_ms"] / result["node_dropout_ms"]
    result["step_ratio"] = result["step_node_ms"] / result["step_unit_ms"]
    document = {"benchmark": "dropout", "settings": vars(args) | {"out": None}, "results": result, **describe()}
    print(json.dumps(document["results"], indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
