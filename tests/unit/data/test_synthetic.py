"""The generated graph has the structure that its config describes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gkd_dist.config import SyntheticSource
from gkd_dist.data.raw import RawGraph
from gkd_dist.data.synthetic import default_split, generate


def source(**changes: Any) -> SyntheticSource:
    return SyntheticSource(kind="synthetic", **{"num_nodes": 4_000, **changes})


def shares(raw: RawGraph) -> tuple[float, float]:
    """Shares of edges within a class and between partner classes."""
    first, second = raw.y[raw.edge_index[0]], raw.y[raw.edge_index[1]]
    return (first == second).float().mean().item(), (first == second ^ 1).float().mean().item()


def test_the_default_graph() -> None:
    raw = generate(SyntheticSource(kind="synthetic"), seed=0)
    assert list(raw.x.shape) == [20_000, 32]
    assert raw.edge_index.size(1) == pytest.approx(239_600, rel=0.001)
    assert torch.bincount(raw.y).tolist() == [2_000] * 10
    assert (raw.x.dtype, raw.edge_index.dtype, raw.y.dtype) == (torch.float32, torch.int64, torch.int64)


def test_edges_are_simple_and_go_both_ways() -> None:
    raw = generate(source(), seed=1)
    start, end = raw.edge_index
    assert (start != end).all()
    key = start * raw.num_nodes + end
    assert key.unique().numel() == key.numel()
    assert torch.equal(key.sort().values, (end * raw.num_nodes + start).sort().values)


@pytest.mark.parametrize(("homophily", "partner"), [(0.3, 0.3), (0.8, 0.0), (0.0, 0.6), (0.5, 0.5)])
def test_shares_of_edges_within_and_between_classes(homophily: float, partner: float) -> None:
    """A tenth of the edges to a random node meets each of the ten classes."""
    within, between = shares(generate(source(homophily=homophily, partner=partner), seed=0))
    rest = (1 - homophily - partner) / 10
    assert within == pytest.approx(homophily + rest, abs=0.015)
    assert between == pytest.approx(partner + rest, abs=0.015)


def test_the_last_of_an_odd_number_of_classes_is_its_own_partner() -> None:
    raw = generate(source(num_classes=3, homophily=0.0, partner=1.0), seed=0)
    first, second = raw.y[raw.edge_index[0]], raw.y[raw.edge_index[1]]
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == {(0, 1), (1, 0), (2, 2)}


def test_degrees_follow_the_factors() -> None:
    """Equal factors give Poisson degrees; Pareto factors spread them, up to the limit."""
    spread = {}
    for name, limit in (("equal", 1.0), ("pareto", 10.0)):
        raw = generate(source(max_degree_factor=limit), seed=0)
        degree = torch.bincount(raw.edge_index[1], minlength=raw.num_nodes).double()
        spread[name] = (degree.var() / degree.mean()).item()
    assert spread["equal"] == pytest.approx(1.0, abs=0.1)
    assert spread["pareto"] > 3


def test_features_are_centres_plus_noise() -> None:
    raw = generate(source(signal=3.0, noise=0.5), seed=0)
    centres = torch.stack([raw.x[raw.y == label].mean(0) for label in range(10)])
    torch.testing.assert_close(centres.norm(dim=1), torch.full((10,), 3.0), atol=0.15, rtol=0)
    assert (raw.x - centres[raw.y]).std().item() == pytest.approx(0.5, abs=0.01)


def test_without_noise_features_are_the_centres() -> None:
    raw = generate(source(noise=0.0), seed=0)
    assert raw.x.unique(dim=0).size(0) == 10


def test_binary_labels_show_in_the_features() -> None:
    raw = generate(source(multilabel=True, noise=0.0), seed=0)
    assert raw.y.dtype == torch.float32
    assert sorted(raw.y.sum(1).unique().tolist()) == [1.0, 2.0]
    assert raw.y.sum(1).mean().item() == pytest.approx(1.5, abs=0.05)
    expected = raw.y @ torch.linalg.lstsq(raw.y, raw.x).solution
    torch.testing.assert_close(raw.x, expected, atol=1e-4, rtol=0)


def test_the_seed_decides() -> None:
    one, same, other = generate(source(), 7), generate(source(seed=7), 8), generate(source(), 8)
    for key in ("x", "edge_index", "y"):
        assert torch.equal(getattr(one, key), getattr(same, key))
        assert not torch.equal(getattr(one, key), getattr(other, key))


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
    generate(source(num_nodes=100), 0)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr,index]


def test_default_splits() -> None:
    assert default_split(source()).model_dump() == {"kind": "per_class", "train": 50, "val": 50, "seed": None}
    assert default_split(source(multilabel=True)).kind == "random"
