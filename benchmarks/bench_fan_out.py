"""A training step on one unit with its halo: all neighbours, only the rows that are reached, and sampled neighbours.

The graph has communities of fixed size and some edges between them, one unit is an eighth of it with as many hops of
halo as the student is deep. A step is forward, cross-entropy on owned nodes and backward; sampling is part of it.

    python benchmarks/bench_fan_out.py [--nodes 200000] [--degree 20] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from environment import describe

from gkd_dist.config import ModelConfig
from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.models.layered import LayeredModel
from gkd_dist.models.tiny import TinyGraph
from gkd_dist.noise import NodeNoise
from gkd_dist.sampling import ALL, Sampler, sample_layers

_COMMUNITY, _ACROSS, _UNITS = 1000, 0.1, 8  # nodes of a community, share of edges between them, units of the graph


def median_s(work: Callable[[], object], repeats: int) -> float:
    """Median of ``repeats`` runs after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def unit_of(num_nodes: int, degree: int, width: int, hops: int) -> tuple[torch.Tensor, LocalGraph]:
    """Features and graph of the first unit."""
    random = torch.Generator().manual_seed(0)
    target = torch.randint(num_nodes, (num_nodes * degree,), generator=random)
    near = target - target % _COMMUNITY + torch.randint(_COMMUNITY, target.shape, generator=random)
    far = torch.randint(num_nodes, target.shape, generator=random)
    source = torch.where(torch.rand(target.shape, generator=random) < _ACROSS, far, near.clamp_max(num_nodes - 1))
    whole = LocalGraph.from_edge_index(torch.stack([source, target]), num_nodes)
    owned = torch.arange(num_nodes // _UNITS)
    part, _ = TinyGraph(torch.randn(num_nodes, width, generator=random), whole).part(owned, hops)
    graph = replace(part.graph, num_owned=owned.numel())
    return part.x, graph.with_noise(NodeNoise(graph.global_ids(), 0))


def step(model: LayeredModel, x: torch.Tensor, graph: LocalGraph, y: torch.Tensor, fan_out: list[int] | None) -> None:
    """Forward and backward."""
    if fan_out is not None:
        empty = graph.in_degree.new_empty(0)
        batch = Batch(0, graph, x, y, empty, empty, empty, graph.global_ids(), y.numel())
        graph = Sampler(tuple(fan_out), True).sample(batch, {}, draws=False).graph
    logits = model(x, graph)
    assert isinstance(logits, torch.Tensor)
    F.cross_entropy(logits[: y.numel()], y).backward()


def main() -> None:
    """Prints seconds per step and ratios, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=200_000)
    parser.add_argument("--degree", type=int, default=20)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["gcn", "sage", "gat"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x, graph = unit_of(args.nodes, args.degree, args.channels, args.layers)
    y = torch.randint(10, (int(graph.num_owned or 0),))
    choices = {"all": None, "reached": [ALL] * args.layers, "10": [10] * args.layers, "5": [5] * args.layers}
    results: dict[str, dict[str, float]] = {}
    for name, fan_out in choices.items():
        if fan_out is not None:
            layers = sample_layers(graph, fan_out, 0, rows_alone=True)
            results[name] = {
                "sample_s": median_s(lambda f=fan_out: sample_layers(graph, f, 0, rows_alone=True), args.repeats),
                "num_edges": float(sum(inner.num_edges for inner in layers.graphs)),
                "num_input_rows": float(layers.sizes[0]),
            }
        else:
            edges = float(args.layers * graph.num_edges)
            results[name] = {"sample_s": 0.0, "num_edges": edges, "num_input_rows": float(graph.num_nodes)}
    for kind in args.kinds:
        model = LayeredModel(ModelConfig(kind=kind, hidden=args.channels, layers=args.layers), args.channels, 10)
        for name, fan_out in choices.items():
            results[name][f"{kind}_s"] = median_s(lambda m=model, f=fan_out: step(m, x, graph, y, f), args.repeats)
    for name, found in results.items():
        ratios = ", ".join(f"{kind} {results['all'][f'{kind}_s'] / found[f'{kind}_s']:.2f}x" for kind in args.kinds)
        print(
            f"{name:8s} {ratios}; of it sampling {found['sample_s']:.3f} s; {found['num_edges']:,.0f} edges", flush=True
        )
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    unit = {"num_nodes": graph.num_nodes, "num_owned": graph.num_owned, "num_edges": graph.num_edges}
    document = {"benchmark": "fan_out", "settings": settings, "unit": unit, "results": results, **describe()}
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
