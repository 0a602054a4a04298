"""Published graphs, read from a copy that ``GKD_DATA`` names; PyG writes its processed files into it.

Expected there: ``Planetoid/Cora/raw``, ``Planetoid/CiteSeer/raw``, ``Amazon/Computers/raw``,
``Coauthor/CS/raw`` as PyG downloads them, and ``ppi14/graph.npz``. A data set that is not there is skipped.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from gkd_dist.config import GraphConfig
from gkd_dist.data.sources import default_data_root, load_graph
from gkd_dist.errors import GraphError
from gkd_dist.graph import Graph

pytestmark = pytest.mark.skipif(not os.environ.get("GKD_DATA"), reason="GKD_DATA names no folder of data sets")

PER_CLASS = {"kind": "per_class", "train": 20, "val": 30}


def pyg(name: str, /, **args: Any) -> dict[str, Any]:
    return {"kind": "pyg", "name": name, "args": args}


def load(folder: str, source: dict[str, Any], seed: int = 0, **options: Any) -> Graph:
    if not (default_data_root() / folder).exists():
        pytest.skip(f"{folder} is not in GKD_DATA")
    return load_graph(GraphConfig.model_validate({"source": source, **options}), seed)


def counts(graph: Graph) -> tuple[int, ...]:
    """Nodes, edges, features, classes, and nodes of each split."""
    splits = (int(mask.sum()) for mask in (graph.train_mask, graph.val_mask, graph.test_mask))
    return (graph.num_nodes, graph.num_edges, graph.num_features, graph.num_classes, *splits)


@pytest.mark.parametrize(
    ("folder", "source", "split", "expected"),
    [
        ("Planetoid/Cora", pyg("Planetoid", name="Cora"), None, (2_708, 10_556, 1_433, 7, 140, 500, 1_000)),
        ("Planetoid/CiteSeer", pyg("Planetoid", name="CiteSeer"), None, (3_327, 9_104, 3_703, 6, 120, 500, 1_000)),
        ("Amazon/Computers", pyg("Amazon", name="Computers"), PER_CLASS, (13_752, 491_722, 767, 10, 200, 300, 13_252)),
        ("Coauthor/CS", pyg("Coauthor", name="CS"), PER_CLASS, (18_333, 163_788, 6_805, 15, 300, 450, 17_583)),
    ],
)
def test_published_counts(folder: str, source: dict[str, Any], split: Any, expected: tuple[int, ...]) -> None:
    graph = load(folder, source, split=split)
    assert counts(graph) == expected
    assert graph.task == "multiclass"


def test_multilabel_arrays() -> None:
    graph = load("ppi14", {"kind": "arrays", "path": str(default_data_root() / "ppi14" / "graph.npz")})
    assert counts(graph) == (3_480, 106_754, 50, 121, 2_088, 696, 696)
    assert (graph.task, graph.y.dtype) == ("multilabel", torch.float32)


def test_normalised_features_of_a_graph_with_empty_rows() -> None:
    """CiteSeer has 15 test nodes without a single word."""
    graph = load("Planetoid/CiteSeer", pyg("Planetoid", name="CiteSeer"), normalize_features=True)
    sums = graph.x.sum(1)
    assert int((sums == 0).sum()) == 15
    torch.testing.assert_close(sums[sums > 0], torch.ones(3_327 - 15))


def test_random_splits_of_pyg_follow_the_seed() -> None:
    source = pyg("Planetoid", name="Cora", split="random")
    one, same, other = (load("Planetoid/Cora", source, seed).train_mask for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_split_replaces_the_published_one() -> None:
    graph = load("Planetoid/Cora", pyg("Planetoid", name="Cora"), split=PER_CLASS)
    assert counts(graph)[4:] == (140, 210, 2_358)


def test_a_graph_without_splits_names_the_next_action() -> None:
    with pytest.raises(GraphError, match=r"Amazon Computers: the data set has no train_mask .*; set graph\.split"):
        load("Amazon/Computers", pyg("Amazon", name="Computers"))
