"""`load_graph` from config to checked graph, for the sources that need nothing from outside."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gkd_dist.config import GraphConfig
from gkd_dist.data.arrays import save_arrays
from gkd_dist.data.sources import default_data_root, load_graph
from gkd_dist.errors import GraphError
from gkd_dist.graph import Graph


def config(source: dict[str, Any], **changes: Any) -> GraphConfig:
    return GraphConfig.model_validate({"source": source, **changes})


def synthetic(**changes: Any) -> dict[str, Any]:
    return {"kind": "synthetic", "num_nodes": 2_000, **changes}


def counts(graph: Graph) -> list[int]:
    return [int(mask.sum()) for mask in (graph.train_mask, graph.val_mask, graph.test_mask)]


def test_a_synthetic_graph_with_its_default_split() -> None:
    graph = load_graph(config(synthetic()), seed=0)
    assert (graph.num_nodes, graph.num_features, graph.num_classes, graph.task) == (2_000, 32, 10, "multiclass")
    assert counts(graph) == [500, 500, 1_000]


def test_a_synthetic_graph_with_another_split() -> None:
    graph = load_graph(config(synthetic(), split={"kind": "per_class", "train": 5, "val": 10}), seed=0)
    assert counts(graph) == [50, 100, 1_850]


def test_a_synthetic_graph_with_binary_labels() -> None:
    graph = load_graph(config(synthetic(multilabel=True)), seed=0)
    assert (graph.task, graph.num_classes, graph.y.shape) == ("multilabel", 10, (2_000, 10))
    assert counts(graph) == [1_200, 400, 400]


def test_the_seed_of_the_run_decides() -> None:
    one, same, other = (load_graph(config(synthetic()), seed) for seed in (3, 3, 4))
    for key in ("x", "edge_index", "train_mask"):
        assert torch.equal(getattr(one, key), getattr(same, key))
        assert not torch.equal(getattr(one, key), getattr(other, key))


def test_a_pyg_graph(tmp_path: Path) -> None:
    split = {"kind": "per_class", "train": 1, "val": 2}
    graph = load_graph(config({"kind": "pyg", "name": "KarateClub"}, split=split), 0, data_root=tmp_path)
    assert (graph.num_nodes, graph.num_edges, graph.num_classes) == (34, 156, 4)
    assert counts(graph) == [4, 8, 22]


def test_a_pyg_graph_without_all_masks_names_the_next_action(tmp_path: Path) -> None:
    with pytest.raises(
        GraphError, match=r"KarateClub: the data set has no val_mask and no test_mask; set graph\.split"
    ):
        load_graph(config({"kind": "pyg", "name": "KarateClub"}), 0, data_root=tmp_path)


def test_saved_arrays_come_back_equal(tmp_path: Path) -> None:
    graph = load_graph(config(synthetic(num_nodes=1_200)), seed=0)
    save_arrays(str(tmp_path / "g.npz"), graph)
    back = load_graph(config({"kind": "arrays", "path": str(tmp_path / "g.npz")}), seed=1)
    for key in ("x", "edge_index", "y", "train_mask", "val_mask", "test_mask"):
        assert torch.equal(getattr(back, key), getattr(graph, key)), key


def test_number_types_are_brought_into_form_and_options_apply(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(
        tmp_path / "g.npz",
        x=np.array([[1, 3], [0, 2], [5, 5], [1, 0]], dtype=np.uint8),
        edge_index=np.array([[0, 0, 1, 2], [1, 1, 2, 3]], dtype=np.int16),
        edge_weight=np.array([1.0, 1.0, 2.0, 3.0]),
        y=np.array([0, 1, 0, 1], dtype=np.uint16),
        train_mask=np.array([[1, 0], [0, 1], [0, 0], [0, 0]]),
        val_mask=np.array([[0, 0], [0, 0], [1, 1], [0, 0]]),
        test_mask=np.array([0, 0, 0, 1]),
    )
    options = {"normalize_features": True, "undirected": True, "split_index": 1}
    with caplog.at_level(logging.WARNING):
        graph = load_graph(config({"kind": "arrays", "path": str(tmp_path / "g.npz")}, **options), seed=0)
    assert caplog.messages == [
        "g: merged 1 duplicate edges and added up their weights; set graph.keep_multi=true to keep them"
    ]
    assert graph.edge_index.tolist() == [[0, 1, 2, 1, 2, 3], [1, 2, 3, 0, 1, 2]]
    assert graph.edge_weight is not None
    assert graph.edge_weight.tolist() == [2, 2, 3, 2, 2, 3]
    assert graph.x.tolist() == [[0.25, 0.75], [0, 1], [0.5, 0.5], [1, 0]]
    assert graph.train_mask.tolist() == [False, True, False, False]
    assert (graph.x.dtype, graph.edge_weight.dtype, graph.y.dtype) == (torch.float32, torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("mode", "shape", "expected"),
    [("auto", (2, 2), [[0, 1], [2, 3]] * 2), ("auto", (2,), [[0], [1]] * 2), ("drop", (2, 2), None)],
)
def test_edge_attributes_of_arrays(
    mode: str, shape: tuple[int, ...], expected: list[list[int]] | None, tmp_path: Path
) -> None:
    np.savez(
        tmp_path / "g.npz",
        x=np.eye(3),
        edge_index=np.array([[0, 1], [1, 2]]),
        edge_attr=np.arange(np.prod(shape)).reshape(shape),
        y=np.array([0, 1, 0]),
        **{f"{split}_mask": np.eye(3)[i] for i, split in enumerate(("train", "val", "test"))},
    )
    source = {"kind": "arrays", "path": str(tmp_path / "g.npz")}
    graph = load_graph(config(source, undirected=True, edge_attr=mode), seed=0)
    if expected is None:
        assert graph.edge_attr is None
        return
    assert graph.edge_attr is not None
    assert (graph.edge_attr.dtype, graph.edge_attr.tolist()) == (torch.float32, expected)


def test_a_setting_without_effect_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_graph(config(synthetic(), split={"kind": "random"}, split_index=2), seed=0)
    assert caplog.messages == ["graph.split_index 2 is not used: graph.split draws the splits"]


# --- the data root ---------------------------------------------------------------------------


def test_the_data_root_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GKD_DATA", str(tmp_path))
    assert default_data_root() == tmp_path


def test_the_data_root_is_in_the_cache_folder_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GKD_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_data_root() == tmp_path / "gkd_dist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_root() == tmp_path / ".cache" / "gkd_dist"


def test_a_generated_graph_needs_no_torch_geometric() -> None:
    program = (
        "import sys; from gkd_dist.config import GraphConfig; from gkd_dist.data.sources import load_graph\n"
        "load_graph(GraphConfig.model_validate({'source': {'kind': 'synthetic', 'num_nodes': 2000}}), 0)\n"
        "sys.exit('torch_geometric' in sys.modules or 'fsspec.spec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
