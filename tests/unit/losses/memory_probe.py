"""Run in a process of its own: largest memory of a forward and backward pass above its inputs, as a share of [E, d]."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import torch

from gkd_dist.losses import Neighbours, edge_scores
from gkd_dist.losses.scores import METRICS

NODES, EDGES, WIDTH = 10_000, 200_000, 256


def status_bytes(key: str) -> int:
    """A kB field of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def run(z: torch.Tensor, edges: Neighbours, metric: str, gather: bool) -> None:
    z = z.detach().requires_grad_()
    gathered = lambda: (z[edges.rows] - z[edges.pattern.indices]).square().sum(1)  # noqa: E731
    scores = gathered() if gather else edge_scores(z, edges, metric)  # type: ignore[arg-type]
    scores.sum().backward()


def share(metric: str, gather: bool = False) -> float:
    """Peak above what was there before, by E · d · 4 bytes."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(NODES, WIDTH, generator=generator)
    edge_index = torch.randint(0, NODES, (2, EDGES), generator=generator)
    edges, few = Neighbours.of_edges(edge_index, NODES), Neighbours.of_edges(edge_index[:, :200] % 64, 64)
    run(z[:64], few, metric, gather)  # so that libraries have their buffers
    del edge_index
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the last one left does not serve this one
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status_bytes("VmRSS")
    run(z, edges, metric, gather)
    return (status_bytes("VmHWM") - before) / (EDGES * WIDTH * 4)


if __name__ == "__main__":
    report = {metric: share(metric) for metric in METRICS}
    json.dump(report | {"gather": share("sqeuclidean", gather=True)}, sys.stdout)
