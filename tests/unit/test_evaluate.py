"""Metrics by hand on four nodes, and against torchmetrics on random ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import accuracy, f1_score

from gkd_dist import layout
from gkd_dist.config import LspLoss, PartitionConfig
from gkd_dist.errors import ManifestError
from gkd_dist.evaluate import Stored, evaluate_logits, lsp_divergence
from gkd_dist.graph import Graph
from gkd_dist.losses import edge_scores, lsp_loss
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.quantise import pack_float
from gkd_dist.shards.writer import write_shard
from gkd_dist.storage import Storage

TRAIN = torch.tensor([True, True, True, False])


def cut(path: Path, y: Tensor, train: Tensor, num_parts: int = 2, edge_index: Tensor | None = None) -> GraphStore:
    """A graph store with these labels; nodes outside ``train`` are the test split."""
    edges = torch.empty(2, 0, dtype=torch.int64) if edge_index is None else edge_index
    graph = Graph(
        x=torch.ones(y.size(0), 1),
        edge_index=edges,
        y=y,
        train_mask=train,
        val_mask=torch.zeros_like(train),
        test_mask=~train,
        num_classes=3,
        task="multiclass" if y.dim() == 1 else "multilabel",
    )
    storage, config = Storage.open(str(path)), PartitionConfig(method="random", num_parts=num_parts)
    build_graph_store(graph, storage, config, halo_hops=1, seed=0, fingerprint="graph-fp")
    return GraphStore.open(storage)


def store_logits(graph: GraphStore, path: Path, logits: Tensor, fingerprint: str = "graph-fp") -> Stored:
    """``logits`` [N, c] as a knowledge store."""
    return _store(graph, path, lambda n_id, part: {"logits": logits[n_id[: part["num_owned"]]]}, fingerprint)


def store_scores(graph: GraphStore, path: Path, z: Tensor, metric: str, num_layers: int = 2) -> Stored:
    """Raw scores of layer 1 with embeddings ``z`` [N, d] as a knowledge store."""

    def scores(n_id: Tensor, part: dict[str, int]) -> dict[str, Tensor]:
        tensors = graph.part(part["index"], ["indptr", "indices"])
        rows = torch.repeat_interleave(tensors["indptr"].diff())[: part["num_owned_edges"]]
        local = torch.stack([tensors["indices"][: part["num_owned_edges"]].long(), rows])
        return {f"scores.1.{metric}": edge_scores(z[n_id], local, metric)}  # type: ignore[arg-type]

    return _store(graph, path, scores, "graph-fp", num_layers)


def _store(graph: GraphStore, path: Path, tensors_of, fingerprint: str, num_layers: int = 2) -> Stored:  # type: ignore[no-untyped-def]
    storage, entries = Storage.open(str(path)), []
    for index, entry in enumerate(graph.manifest.parts):
        tensors = tensors_of(graph.part(index, ["n_id"])["n_id"], {**entry.counts, "index": index})
        packed = {name: pack_float(tensor, "fp32") for name, tensor in tensors.items()}
        infos = {"floats": {name: info for name, (_, info) in packed.items()}}
        values = {name: tensor for name, (tensor, _) in packed.items()}
        entries.append(write_shard(storage, layout.part(index), values, {}, infos))
    meta = {"num_layers": num_layers, "scores": {}}
    manifest = Manifest("knowledge", "k", {"graph": fingerprint}, meta, tuple(entries))
    manifest.save(storage)
    return storage, manifest


def one_hot(*classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()


def test_accuracy_by_hand(tmp_path: Path) -> None:
    graph = cut(tmp_path / "graph", torch.tensor([0, 1, -1, 2]), TRAIN)
    predictions = store_logits(graph, tmp_path / "student", one_hot(0, 2, 1, 2))
    teacher = store_logits(graph, tmp_path / "teacher", one_hot(0, 2, 0, 0))
    assert evaluate_logits(graph, predictions, teacher) == {
        "metric": "accuracy",
        "train": 0.5,  # of nodes 0 and 1; node 2 has no label
        "val": None,
        "test": 1.0,
        "num_train": 2,
        "num_val": 0,
        "num_test": 1,
        "agreement": 0.5,
    }


def test_micro_f1_by_hand(tmp_path: Path) -> None:
    y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [torch.nan] * 3, [1.0, 1.0, 1.0]])
    graph = cut(tmp_path / "graph", y, TRAIN)
    logits = torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [0.0, -1.0, -1.0]])
    teacher = store_logits(graph, tmp_path / "teacher", -logits)
    found = evaluate_logits(graph, store_logits(graph, tmp_path / "student", logits), teacher)
    assert found["metric"] == "micro_f1"
    assert found["train"] == 2 * 1 / (2 + 2)  # one hit, two predicted, two there
    assert found["test"] == 0.0  # a logit of 0 predicts nothing
    assert found["num_train"] == 2
    assert found["agreement"] == pytest.approx(1 / 12)  # only the 0 is on the same side for both


@pytest.mark.parametrize("multilabel", [False, True])
def test_equals_torchmetrics(tmp_path: Path, multilabel: bool) -> None:
    random = torch.Generator().manual_seed(0)
    logits, train = torch.randn(50, 3, generator=random), torch.rand(50, generator=random) < 0.6
    if multilabel:
        y = torch.randint(2, (50, 3), generator=random).float()
        expected = f1_score(logits[train].sigmoid(), y[train].long(), "multilabel", num_labels=3, average="micro")
    else:
        y = torch.randint(3, (50,), generator=random)
        expected = accuracy(logits[train], y[train], "multiclass", num_classes=3)
    graph = cut(tmp_path / "graph", y, train, num_parts=3)
    found = evaluate_logits(graph, store_logits(graph, tmp_path / "k", logits))
    assert found["train"] == pytest.approx(float(expected))
    assert "agreement" not in found


def test_predictions_about_another_graph_are_refused(tmp_path: Path) -> None:
    graph = cut(tmp_path / "graph", torch.tensor([0, 1, 1, 2]), TRAIN)
    stored = store_logits(graph, tmp_path / "k", one_hot(0, 1, 2, 0), fingerprint="of another one")
    with pytest.raises(ManifestError, match="made from graph of anoth"):
        evaluate_logits(graph, stored)


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_lsp_divergence_is_the_loss_on_the_whole_graph(tmp_path: Path, kernel: str, num_parts: int) -> None:
    random = torch.Generator().manual_seed(0)
    keys = torch.randperm(20 * 20, generator=random)[:90]
    edges = torch.stack([keys % 20, keys // 20])
    graph = cut(
        tmp_path / "graph", torch.zeros(20, dtype=torch.int64), torch.ones(20, dtype=torch.bool), num_parts, edges
    )
    z_s, z_t = torch.randn(20, 3, generator=random), torch.randn(20, 5, generator=random)
    term = LspLoss(kind="lsp", kernel=kernel, sigma=2.0, teacher_sigma=3.0)  # type: ignore[arg-type]
    student = store_scores(graph, tmp_path / "s", z_s, term.metric)
    teacher = store_scores(graph, tmp_path / "t", z_t, term.metric)
    expected = lsp_loss(z_s, edges, teacher_z=z_t, kernel=term.kernel, sigma=2.0, teacher_sigma=3.0)
    assert lsp_divergence(graph, student, teacher, term) == pytest.approx(float(expected), rel=1e-4)
    assert lsp_divergence(graph, student, student, term, student_sigma=3.0) == pytest.approx(0.0, abs=1e-9)


def test_lsp_divergence_without_edges_is_zero(tmp_path: Path) -> None:
    graph = cut(tmp_path / "graph", torch.tensor([0, 1, 1, 2]), TRAIN)
    stored = store_scores(graph, tmp_path / "k", torch.ones(4, 2), "sqeuclidean")
    assert lsp_divergence(graph, stored, stored, LspLoss(kind="lsp")) == 0.0


def test_a_median_that_is_not_stored_is_named(tmp_path: Path) -> None:
    graph = cut(tmp_path / "graph", torch.tensor([0, 1, 1, 2]), TRAIN)
    stored = store_scores(graph, tmp_path / "k", torch.ones(4, 2), "sqeuclidean")
    with pytest.raises(ManifestError, match=r"no median of 1.sqeuclidean"):
        lsp_divergence(graph, stored, stored, LspLoss(kind="lsp", sigma="median"))
