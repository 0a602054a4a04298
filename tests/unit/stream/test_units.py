"""Batches are exact pieces of the graph, and what the teacher knows lies beside them in order."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stream_stores import graph_store, knowledge_store, random_graph
from torch import Tensor

from gkd_dist.config import ModelConfig
from gkd_dist.errors import GraphError, ManifestError, ShardError
from gkd_dist.graph import SPLITS, Batch, Graph, LocalGraph
from gkd_dist.losses import edge_scores
from gkd_dist.models.build import build_model
from gkd_dist.partition.store import GraphStore
from gkd_dist.stream import units as units_module
from gkd_dist.stream.knowledge import Wants
from gkd_dist.stream.order import plan_units
from gkd_dist.stream.units import EMPTY_UNIT, UnitLoader, empty_batch, part_costs

METRICS = ("sqeuclidean", "dot")
GROUPINGS = [[(0,)], [(0, 1)], [(0,), (1,)], [(0, 1, 2)], [(0, 2), (1,)], [(0,), (1,), (2,), (3,)], [(0, 3), (1, 2)]]


def loader_of(graph: Graph, units: list[tuple[int, ...]], hops: int) -> UnitLoader:
    num_parts = 1 + max(part for unit in units for part in unit)
    return UnitLoader(graph_store(graph, num_parts, hops), None, units)


def propagate(x: Tensor, graph: LocalGraph, depth: int) -> Tensor:
    """A GCN without weights: what it gives at a node depends on exactly ``depth`` hops."""
    for _ in range(depth):
        x = torch.tanh(graph.gcn_matrix().matmul(x))
    return x


# --- exactness -------------------------------------------------------------------------------


@pytest.mark.parametrize("units", GROUPINGS, ids=str)
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_owned_outputs_are_those_of_the_whole_graph(units: list[tuple[int, ...]], hops: int) -> None:
    graph = random_graph(weighted=hops == 2)
    whole = LocalGraph.from_edge_index(graph.edge_index, graph.num_nodes, graph.edge_weight)
    expected = propagate(graph.x, whole, hops)
    loader = loader_of(graph, units, hops)
    seen: list[int] = []
    for unit in range(len(units)):
        batch = loader.load(unit)
        owned = batch.n_id[: batch.num_owned]
        found = propagate(batch.x, batch.graph, hops)[: batch.num_owned]
        torch.testing.assert_close(found, expected[owned], rtol=1e-5, atol=1e-6)
        seen += owned.tolist()
    assert sorted(seen) == list(range(graph.num_nodes)), "every node is owned by exactly one unit"


def test_one_hop_too_few_is_not_exact() -> None:
    """The test above can fail: with one hop less than the depth the outputs differ."""
    graph = random_graph()
    expected = propagate(graph.x, LocalGraph.from_edge_index(graph.edge_index, graph.num_nodes), 3)
    batch = loader_of(graph, [(0,), (1,)], 2).load(0)
    found = propagate(batch.x, batch.graph, 3)[: batch.num_owned]
    assert (found - expected[batch.n_id[: batch.num_owned]]).abs().max() > 1e-3


@pytest.mark.parametrize("units", [[(0,), (1,), (2,)], [(2, 0), (1,)]], ids=str)
@pytest.mark.parametrize("multilabel", [False, True])
def test_features_labels_and_masks_follow_the_nodes(units: list[tuple[int, ...]], multilabel: bool) -> None:
    graph = random_graph(multilabel=multilabel)
    loader = loader_of(graph, units, 2)
    for unit in range(len(units)):
        batch = loader.load(unit)
        owned = batch.n_id[: batch.num_owned]
        assert batch.unit == unit
        assert batch.graph.num_owned == batch.num_owned
        assert torch.equal(batch.graph.global_ids(), batch.n_id)
        assert torch.equal(batch.x, graph.x[batch.n_id])
        assert torch.equal(batch.y, graph.y[owned])
        for split in SPLITS:
            assert torch.equal(batch.mask(split), getattr(graph, f"{split}_mask")[owned])


@pytest.mark.parametrize("units", [[(0,), (1,), (2,)], [(2, 0), (1,)]], ids=str)
def test_named_features_take_the_place_of_x(units: list[tuple[int, ...]]) -> None:
    graph = random_graph()
    other = torch.randn(graph.num_nodes, 9)
    store = graph_store(replace(graph, features={"other": other, "unread": other + 1}), 3, 2)
    for features, expected in ((None, graph.x), ("other", other)):
        loader = UnitLoader(store, None, units, features=features)
        for unit in range(len(units)):
            batch = loader.load(unit)
            assert torch.equal(batch.x, expected[batch.n_id])
            assert loader.size_of(unit) >= sum(t.numel() * t.element_size() for t in tensors_of(batch))
        assert loader.load(None).x.shape == (0, expected.size(1))


@pytest.mark.parametrize("features", [None, "other"])
@pytest.mark.parametrize("hops", [1, 2])
def test_large_features_are_read_straight_into_the_batch(
    features: str | None, hops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are the same to the last bit, whether features came with the rest of the part or by themselves."""
    graph = random_graph()
    graph = replace(graph, features={"other": torch.randn(graph.num_nodes, 9)})
    loader = UnitLoader(graph_store(graph, 3, 2), None, [(0, 2), (1,)], hops=hops, features=features)
    before = [loader.load(unit) for unit in range(2)]
    extra = [loader.extra_of(unit) for unit in range(2)]
    monkeypatch.setattr(units_module, "_IN_PLACE_BYTES", 1)
    for unit in range(2):
        for found, expected in zip(tensors_of(loader.load(unit)), tensors_of(before[unit]), strict=True):
            assert torch.equal(found, expected)
    alone = hops == 2  # a unit of one part, all of whose halo is used
    assert [loader._is_in_place(unit) for unit in range(2)] == [False, alone]
    x_bytes = before[1].x.numel() * 4
    assert loader.extra_of(0) == extra[0]
    assert loader.extra_of(1) == extra[1] - (x_bytes if alone else 0)


def test_units_are_named_by_what_they_are_read_from() -> None:
    loader = loader_of(random_graph(), [(0, 1, 2, 3), (4,)], 1)
    keys = [entry.key for entry in loader.graph.manifest.parts]
    url = loader.graph.storage.url
    assert loader.name_of(1) == f"unit 1 ({url}/{keys[4]})"
    assert loader.name_of(0) == f"unit 0 ({', '.join(f'{url}/{key}' for key in keys[:3])} and 1 more)"


def test_sparse_features_become_dense() -> None:
    graph = random_graph()
    graph.x[torch.rand(graph.x.shape, generator=torch.Generator().manual_seed(1)) < 0.95] = 0.0
    loader = loader_of(graph, [(0, 1), (2,)], 1)
    assert loader.graph.manifest.meta["sparse_features"]
    for unit in range(2):
        batch = loader.load(unit)
        assert torch.equal(batch.x, graph.x[batch.n_id])


@pytest.mark.parametrize("unit", [(1,), (0, 2)], ids=str)
@pytest.mark.parametrize("hops", [1, 2])
def test_fewer_hops_than_stored_are_the_same_as_a_smaller_halo(unit: tuple[int, ...], hops: int) -> None:
    graph = random_graph(weighted=True)
    pruned = UnitLoader(graph_store(graph, 3, 3), None, [unit], hops=hops).load(0)
    small = UnitLoader(graph_store(graph, 3, hops), None, [unit]).load(0)
    for found, expected in zip(tensors_of(pruned), tensors_of(small), strict=True):
        assert torch.equal(found, expected)


def test_edges_of_a_row_do_not_depend_on_the_merge() -> None:
    graph = random_graph()
    alone = loader_of(graph, [(0,), (1,), (2,)], 1)
    merged = loader_of(graph, [(0, 1, 2)], 1).load(0)
    rows = {int(merged.n_id[row]): sources for row, sources in enumerate(sources_by_row(merged))}
    for unit in range(3):
        batch = alone.load(unit)
        for row in range(batch.num_owned):
            assert sources_by_row(batch)[row] == rows[int(batch.n_id[row])]
            assert sources_by_row(batch)[row] == sorted(sources_by_row(batch)[row])


def sources_by_row(batch: Batch) -> list[list[int]]:
    pattern = batch.graph.pattern
    return [block.tolist() for block in batch.n_id[pattern.indices].split(torch.diff(pattern.indptr).tolist())]


@pytest.mark.parametrize("units", GROUPINGS, ids=str)
@pytest.mark.parametrize("hops", [1, 2])
def test_edge_attributes_follow_their_edges(units: list[tuple[int, ...]], hops: int) -> None:
    store = graph_store(random_graph(attributed=True), 4, 2)
    loader = UnitLoader(store, None, units, hops=hops)
    for unit in range(len(units)):
        batch = loader.load(unit)
        assert batch.graph.edge_attr is not None
        assert torch.equal(batch.graph.edge_attr, batch.n_id[batch.graph.edge_index].t().float())


# --- memory ----------------------------------------------------------------------------------


def tensors_of(batch: Batch) -> list[Tensor]:
    pattern, graph = batch.graph.pattern, batch.graph
    tensors = [batch.x, batch.y, batch.train_mask, batch.val_mask, batch.test_mask, batch.n_id]
    tensors += [pattern.indptr, pattern.indices, pattern.t_indptr, pattern.t_indices, pattern.t_perm]
    tensors += [graph.in_degree, graph.has_self_loop, *batch.teacher_scores.values()]
    return tensors + [t for t in (graph.edge_weight, graph.edge_attr, batch.teacher_logits) if t is not None]


@pytest.mark.parametrize("as_scores", [False, True])
@pytest.mark.parametrize("unit", [(0,), (0, 1)], ids=str)
def test_a_batch_holds_its_own_bytes_and_no_more(unit: tuple[int, ...], as_scores: bool, tmp_path: Path) -> None:
    graph = random_graph(300, 2000, weighted=True, attributed=True)
    store = graph_store(graph, 2, 2)
    knowledge = knowledge_store(store, tmp_path, torch.randn(300, 3), {1: torch.randn(300, 4)}, METRICS, as_scores)
    loader = UnitLoader(store, knowledge, [unit], Wants.of(True, [(1, "dot")]))
    loader.load(0)  # whatever is made once is made now
    tracemalloc.start()
    batch = loader.load(0)
    gc.collect()
    shards = tracemalloc.get_traced_memory()[0]  # their buffers are Python's, unlike tensors made by torch
    tracemalloc.stop()
    assert shards < store.manifest.parts[0].num_bytes / 4, "a view keeps a shard alive"
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(batch))
    assert held == sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
    assert held <= loader.size_of(0)
    if len(unit) == 1:
        assert loader.size_of(0) <= held + 64
    assert loader.size_of(None) == 0


def test_costs_count_nodes_and_edges() -> None:
    loader = loader_of(random_graph(), [(0, 2), (1,)], 1)
    costs = part_costs(loader.graph.manifest)
    batch = loader.load(1)
    assert costs[1] == batch.graph.num_nodes + batch.graph.num_edges
    assert loader.costs == (costs[0] + costs[2], costs[1])


# --- knowledge -------------------------------------------------------------------------------


@pytest.mark.parametrize("as_scores", [False, True])
@pytest.mark.parametrize("units", [[(0,), (1,), (2,)], [(0, 2), (1,)], [(0, 1, 2)]], ids=str)
def test_knowledge_lies_beside_nodes_and_edges(units: list[tuple[int, ...]], as_scores: bool, tmp_path: Path) -> None:
    graph, store, logits, z = teacher()
    wants = Wants.of(True, [(2, metric) for metric in METRICS])
    knowledge = knowledge_store(store, tmp_path, logits, {2: z}, METRICS, as_scores)
    loader = UnitLoader(store, knowledge, units, wants)
    for unit in range(len(units)):
        batch = loader.load(unit)
        owned_edges = batch.n_id[batch.graph.edge_index[:, : batch.num_owned_edges]]
        assert batch.teacher_logits is not None
        assert torch.equal(batch.teacher_logits, logits[batch.n_id[: batch.num_owned]])
        assert sorted(batch.teacher_scores) == [(2, "dot"), (2, "sqeuclidean")]
        for metric in METRICS:
            assert torch.equal(batch.teacher_scores[2, metric], edge_scores(z, owned_edges, metric))
    assert graph.num_edges == sum(loader.load(unit).num_owned_edges for unit in range(len(units)))


def teacher() -> tuple[Graph, GraphStore, Tensor, Tensor]:
    graph = random_graph()
    draw = torch.Generator().manual_seed(5)
    logits, z = torch.randn(graph.num_nodes, 3, generator=draw), torch.randn(graph.num_nodes, 4, generator=draw)
    return graph, graph_store(graph, 3, 2), logits, z


def test_only_what_is_wanted_is_loaded(tmp_path: Path) -> None:
    _, store, logits, z = teacher()
    knowledge = knowledge_store(store, tmp_path, logits, {1: z}, METRICS, True)
    batch = UnitLoader(store, knowledge, [(0,)], Wants.of(scores=[(1, "dot")])).load(0)
    assert batch.teacher_logits is None
    assert list(batch.teacher_scores) == [(1, "dot")]
    assert not UnitLoader(store, knowledge, [(0,)]).load(0).teacher_scores


def test_a_stale_teacher_is_refused(tmp_path: Path) -> None:
    _, store, logits, z = teacher()
    knowledge = knowledge_store(store, tmp_path, logits, {1: z}, METRICS, True, graph_fingerprint="c" * 64)
    with pytest.raises(ManifestError, match=r"made from graph cccccccc, expected aaaaaaaa; run `gkd infer` again"):
        UnitLoader(store, knowledge, [(0,)], Wants.of(True))


@pytest.mark.parametrize(
    ("wants", "missing"),
    [
        (Wants.of(scores=[(1, "cosine")]), "neither scores.1.cosine nor embeddings.1"),
        (Wants.of(scores=[(7, "dot")]), "neither scores.7.dot nor embeddings.7"),
    ],
)
def test_missing_knowledge_is_named(wants: Wants, missing: str, tmp_path: Path) -> None:
    _, store, logits, z = teacher()
    knowledge = knowledge_store(store, tmp_path, logits, {1: z}, METRICS, True)
    with pytest.raises(ManifestError, match=rf"{missing} \(it has logits, scores.1.dot, .*run `gkd infer`"):
        UnitLoader(store, knowledge, [(0,)], wants)


def test_no_knowledge_where_losses_need_it_is_refused() -> None:
    with pytest.raises(ManifestError, match="there is none; run `gkd infer` first"):
        UnitLoader(graph_store(random_graph(), 2, 1), None, [(0,)], Wants.of(True))


def test_more_hops_than_stored_are_refused() -> None:
    with pytest.raises(GraphError, match=r"has 1 hops of halo \(got hops=2\); set partition.halo_hops=2"):
        UnitLoader(graph_store(random_graph(), 2, 1), None, [(0,)], hops=2)


def test_a_unit_of_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(GraphError, match="units name part 5 of a graph store that has 2 parts"):
        UnitLoader(graph_store(random_graph(), 2, 1), None, [(0, 5)])


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    store = graph_store(random_graph(), 2, 1, tmp_path)
    path = tmp_path / store.manifest.parts[1].key
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    loader = UnitLoader(store, None, [(0,), (0, 1)])
    loader.load(0)
    with pytest.raises(ShardError, match=path.name):
        loader.load(1)


def test_a_loader_survives_pickling(tmp_path: Path) -> None:
    store = graph_store(random_graph(), 3, 1, tmp_path)
    loader = UnitLoader(store, None, plan_units(3, 2, part_costs(store.manifest)))
    copy = pickle.loads(pickle.dumps(loader))
    for found, expected in zip(tensors_of(copy.load(0)), tensors_of(loader.load(0)), strict=True):
        assert torch.equal(found, expected)


# --- empty batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_empty_batch_has_every_tensor_of_a_real_one(multilabel: bool, weighted: bool, tmp_path: Path) -> None:
    graph = random_graph(weighted=weighted, multilabel=multilabel, attributed=weighted)
    store = graph_store(graph, 2, 1)
    knowledge = knowledge_store(store, tmp_path, torch.randn(30, 3), {1: torch.randn(30, 4)}, METRICS, True)
    loader = UnitLoader(store, knowledge, [(0,)], Wants.of(True, [(1, "dot")]))
    empty, real = loader.load(None), loader.load(0)
    assert (empty.unit, empty.num_owned, empty.num_owned_edges, empty.graph.num_nodes) == (EMPTY_UNIT, 0, 0, 0)
    assert empty.graph.num_owned == 0
    for found, expected in zip(tensors_of(empty), tensors_of(real), strict=True):
        assert found.dtype == expected.dtype
        assert found.shape[1:] == expected.shape[1:]


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin", "mlp"])
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_built_in_models_run_on_an_empty_batch(kind: str, norm: str) -> None:
    config = ModelConfig(kind=kind, hidden=4, layers=2, norm=norm, dropout=0.1, residual=True)  # type: ignore[arg-type]
    model, batch = build_model(config, 5, 3).train(), empty_batch(5, 3, "multiclass")
    logits = model(batch.x, batch.graph)
    assert logits.shape == (0, 3)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters()), "a zero gradient, not none"


@pytest.mark.parametrize("name", ["GCNConv", "SAGEConv", "GATConv", "GATv2Conv", "GraphConv", "TransformerConv"])
def test_pyg_convolutions_run_on_an_empty_batch(name: str) -> None:
    nn = pytest.importorskip("torch_geometric.nn", reason="PyG is not installed")
    conv, batch = getattr(nn, name)(5, 3), empty_batch(5, 3, "multiclass")
    out = conv(batch.x, batch.graph.edge_index)
    assert out.shape == (0, 3)
    out.sum().backward()
