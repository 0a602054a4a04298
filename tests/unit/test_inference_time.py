"""Timing of a model: which parts are run, and how seconds become those of the whole graph."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch
from infer_worlds import World, make_graph
from torch import Tensor, nn

from gkd_dist.inference_time import inference_seconds


class Watched(nn.Module):
    """Remembers how many nodes it was given, and whether it was in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, bool, bool]] = []

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """``x`` as it is."""
        self.calls.append((x.size(0), self.training, torch.is_grad_enabled()))
        return x


@pytest.mark.parametrize(("num_parts", "sampled"), [(1, 1), (4, 4), (5, 3), (10, 4)])
def test_at_most_four_parts_run_twice_each(
    tmp_path: Path, num_parts: int, sampled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # every timed pass takes one second
    graph, model = World(tmp_path, make_graph()).cut(num_parts, "random"), Watched().train()
    nodes = [part.counts["num_owned"] for part in graph.manifest.parts]
    chosen = list(range(0, num_parts, -(-num_parts // 4)))
    assert len(chosen) == sampled
    assert inference_seconds(model, graph) == pytest.approx(sampled * 60 / sum(nodes[part] for part in chosen))
    sizes = [graph.manifest.parts[part].meta["hop_ptr"][-1] for part in chosen for _ in range(2)]
    assert model.calls == [(size, False, False) for size in sizes]


def test_a_real_model_takes_time(tmp_path: Path) -> None:
    world = World(tmp_path, make_graph())
    assert 0 < inference_seconds(world.model("gcn")[1], world.cut(3)) < 60
