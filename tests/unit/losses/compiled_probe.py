"""Run in a process of its own: compiled scores of many sizes, and how often the compiler worked for them."""

from __future__ import annotations

import itertools
import json
import sys
import threading

import torch
from torch._dynamo.utils import counters

from gkd_dist.losses import edge_scores
from gkd_dist.losses.scores import METRICS


def case(num_nodes: int, num_edges: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_nodes + 100 * num_edges + 10_000 * width)
    z = torch.randn(num_nodes, width, generator=generator, dtype=torch.float64).to(dtype)
    return z, torch.randint(0, max(1, num_nodes), (2, num_edges if num_nodes else 0), generator=generator)


def gap(z: torch.Tensor, edges: torch.Tensor, metric: str) -> float:
    """Largest difference between compiled and other scores and gradients."""
    results = []
    for compiled in (True, False):
        leaf = z.clone().requires_grad_()
        scores = edge_scores(leaf, edges, metric, compiled=compiled)  # type: ignore[arg-type]
        weight = torch.linspace(-1, 2, scores.numel(), dtype=scores.dtype)
        (grad,) = torch.autograd.grad((scores * weight).sum(), leaf)
        results.append(torch.cat([scores.detach().flatten(), grad.flatten().to(scores.dtype)]))
    return float((results[0] - results[1]).abs().max()) if results[0].numel() else 0.0


def main() -> None:
    report = {"gap": 0.0, "gradcheck": True}

    def work() -> None:
        sizes = list(itertools.product((0, 1, 2, 7, 120), (0, 1, 2, 11, 500), (1, 2, 33)))
        for metric in METRICS:
            for size in sizes:
                report["gap"] = max(report["gap"], gap(*case(*size, torch.float32), metric))
        for metric in METRICS:
            z, edges = case(6, 14, 3, torch.float64)
            check = lambda z: edge_scores(z, edges, metric, compiled=True)  # noqa: B023, E731
            report["gradcheck"] &= torch.autograd.gradcheck(check, (z.requires_grad_(),))

    # What may be switched on around a loss, and a thread that is not the main one, as under Ray.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    report["compilations"] = counters["stats"]["unique_graphs"]
    z, edges = case(50, 300, 8, torch.float32)
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        first = edge_scores(z, edges, compiled=True)
    torch.set_num_threads(3)
    second = edge_scores(z, edges, compiled=True)
    with torch.autocast("cpu", torch.bfloat16):
        third = edge_scores(z, edges, compiled=True)
    report["repeatable"] = torch.equal(first, second) and torch.equal(first, third)
    report["compilations_in_the_end"] = counters["stats"]["unique_graphs"]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
