"""A graph cut, written and read back: counts by hand, tensors against the whole graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from graphs import graph_of, in_edges, path, three_islands
from infer_worlds import make_graph
from torch import Tensor

from gkd_dist.config import PartitionConfig
from gkd_dist.errors import ManifestError, OwnershipError
from gkd_dist.graph import SPLITS, Graph
from gkd_dist.partition.build import build_graph_store, is_undirected
from gkd_dist.partition.store import GraphStore, features, local_graph
from gkd_dist.sparse import CsrPattern
from gkd_dist.storage import Storage

Cut = Callable[..., GraphStore]


@pytest.fixture
def cut(request: pytest.FixtureRequest) -> Cut:
    """Cuts a graph into a store in memory and opens it."""

    def run(graph: Graph, num_parts: int = 2, method: str = "metis", halo_hops: int = 1) -> GraphStore:
        storage = Storage.open(f"memory://{request.node.name.replace('[', '-').replace(']', '')}")
        config = PartitionConfig.model_validate({"method": method, "num_parts": num_parts})
        build_graph_store(graph, storage, config, halo_hops=halo_hops, seed=0, fingerprint="f" * 64)
        return GraphStore.open(storage, "f" * 64)

    return run


def owned(store: GraphStore, part: int) -> Tensor:
    return store.part(part, ["n_id"])["n_id"][: store.manifest.parts[part].counts["num_owned"]]


# --- counts by hand --------------------------------------------------------------------------


def test_counts_of_the_path_cut_in_the_middle(cut: Cut) -> None:
    store = cut(path(), halo_hops=2)
    for part in store.manifest.parts:
        assert part.counts == {
            "num_owned": 3,
            "num_halo": 2,
            "num_halo_1": 1,
            "num_rows": 4,
            "num_edges": 7,  # 1 + 2 + 2 of the owned nodes, 2 of the inner halo node
            "num_owned_edges": 5,
            "num_lsp_nodes": 3,
            "num_train": 1,
            "num_val": 1,
            "num_test": 1,
        }
        assert part.meta == {"hop_ptr": [3, 4, 5]}


def test_manifest_of_the_path_cut_in_the_middle(cut: Cut) -> None:
    store = cut(path(), halo_hops=2)
    meta = store.manifest.meta
    assert store.num_parts == 2
    assert store.num_features == 3
    assert meta["edge_cut"] == 2  # 2 -> 3 and 3 -> 2
    assert meta["cut_fraction"] == 0.2
    assert meta["balance"] == 1.0
    assert meta["halo_factor"] == pytest.approx(2 / 6)  # of the first hop, however many are stored
    assert meta["in_degree_histogram"] == {"1": 2, "2": 4}
    assert meta["undirected"] is True
    assert meta["has_edge_weight"] is False
    assert meta["sparse_features"] is False
    expected = {"name": "drawing", "num_nodes": 6, "num_edges": 10, "num_features": 3, "num_classes": 2}
    expected |= {"task": "multiclass", "num_parts": 2, "halo_hops": 2, "method": "metis"}
    assert {key: meta[key] for key in expected} == expected


def test_components_have_no_halo_and_a_self_loop_is_no_neighbour(cut: Cut) -> None:
    store = cut(three_islands(), method="components")
    first, second = (part.counts for part in store.manifest.parts)
    assert (first["num_owned"], second["num_owned"]) == (3, 3)
    assert (first["num_halo"], second["num_halo"]) == (0, 0)
    assert (first["num_owned_edges"], second["num_owned_edges"]) == (4, 3)
    assert (first["num_lsp_nodes"], second["num_lsp_nodes"]) == (3, 2)
    assert store.manifest.meta["edge_cut"] == 0
    assert store.manifest.meta["halo_factor"] == 0


def test_balance_is_the_largest_part_over_the_mean(cut: Cut) -> None:
    store = cut(path(), num_parts=4, method="random")
    assert store.manifest.meta["balance"] == 2 / 1.5


def test_a_graph_without_edges(cut: Cut) -> None:
    store = cut(graph_of(torch.empty(2, 0, dtype=torch.int64), 6), method="random")
    assert store.manifest.meta["cut_fraction"] == 0
    assert all(part.counts["num_edges"] == part.counts["num_lsp_nodes"] == 0 for part in store.manifest.parts)
    assert local_graph(store.part(0)).num_edges == 0


@pytest.mark.parametrize(
    ("edges", "expected"),
    [([[0, 1], [1, 0]], True), ([[0, 1, 2], [1, 0, 2]], True), ([[0, 1], [1, 2]], False), ([[], []], True)],
)
def test_is_undirected(edges: list[list[int]], expected: bool) -> None:
    assert is_undirected(torch.tensor(edges, dtype=torch.int64), 3) is expected


# --- round trip ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["metis", "random"])
@pytest.mark.parametrize("halo_hops", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_parts_are_the_graph(cut: Cut, method: str, halo_hops: int, weighted: bool) -> None:
    graph = make_graph(weighted=weighted)
    whole = in_edges(graph)
    store = cut(graph, 3, method, halo_hops)
    for index, entry in enumerate(store.manifest.parts):
        part, counts = store.part(index), entry.counts
        n_id, ids = part["n_id"], owned(store, index)
        assert torch.equal(part["in_degree"], whole.in_degree[n_id])  # of halo nodes too
        assert torch.equal(part["has_self_loop"], whole.has_self_loop[n_id])
        assert torch.equal(part["y"], graph.y[ids])
        for split in SPLITS:
            assert torch.equal(part[f"{split}_mask"], getattr(graph, f"{split}_mask")[ids])
        assert torch.equal(features(part, "x", 6), graph.x[ids])
        assert torch.equal(features(part, "x_halo", 6), graph.x[n_id[counts["num_owned"] :]])
        local = local_graph(part)
        found = n_id[local.edge_index]
        assert local.num_nodes == n_id.numel()
        assert local.num_edges == counts["num_edges"]
        assert int(local.pattern.indptr[counts["num_owned"]]) == counts["num_owned_edges"]
        if graph.edge_weight is None:
            assert local.edge_weight is None
        else:
            weight_of = dict(zip(map(tuple, graph.edge_index.t().tolist()), graph.edge_weight.tolist(), strict=True))
            assert local.edge_weight is not None
            assert [weight_of[s, t] for s, t in found.t().tolist()] == local.edge_weight.tolist()


@pytest.mark.parametrize("halo_hops", [1, 2])
def test_edge_attributes_follow_their_edges(cut: Cut, halo_hops: int) -> None:
    graph = make_graph()
    store = cut(replace(graph, edge_attr=graph.edge_index.t().float()), 3, "random", halo_hops)
    assert store.num_edge_features == store.manifest.meta["num_edge_features"] == 2
    for index, entry in enumerate(store.manifest.parts):
        part = store.part(index)
        for local in (local_graph(part), local_graph(part, num_rows=entry.counts["num_owned"])):
            assert local.edge_attr is not None
            assert torch.equal(local.edge_attr, part["n_id"][local.edge_index].t().float())


def test_a_graph_without_attributes_stores_none(cut: Cut) -> None:
    store = cut(path())
    assert store.num_edge_features == store.manifest.meta["num_edge_features"] == 0
    assert "edge_attr" not in store.part(0)
    earlier = replace(store.manifest, meta={k: v for k, v in store.manifest.meta.items() if k != "num_edge_features"})
    assert replace(store, manifest=earlier).num_edge_features == 0


def test_every_node_and_every_edge_is_owned_once(cut: Cut) -> None:
    graph = make_graph()
    store = cut(graph, 4, "random")
    ids = torch.cat([owned(store, part) for part in range(4)])
    assert ids.sort().values.tolist() == list(range(graph.num_nodes))
    assert sum(part.counts["num_owned_edges"] for part in store.manifest.parts) == graph.num_edges


def test_halo_nodes_keep_their_whole_degree(cut: Cut) -> None:
    store = cut(path())
    for part in (store.part(0), store.part(1)):
        assert part["n_id"][3].item() in (2, 3)
        assert part["in_degree"][3].item() == 2  # though none of its in-edges is here
        assert local_graph(part).pattern.indptr.diff()[3].item() == 0


@pytest.mark.parametrize("halo_hops", [1, 2])
def test_the_stored_transpose_is_the_computed_one(cut: Cut, halo_hops: int) -> None:
    store = cut(make_graph(), 3, "random", halo_hops)
    for index in range(3):
        stored = local_graph(store.part(index)).pattern
        computed = CsrPattern.from_csr(stored.indptr, stored.indices)
        for name in ("t_indptr", "t_indices", "t_perm"):
            assert torch.equal(getattr(stored, name), getattr(computed, name)), name


def test_send_plan_and_owners_are_stored(cut: Cut) -> None:
    store = cut(path())
    parts = [store.part(index) for index in range(2)]
    for me, other in ((0, 1), (1, 0)):
        assert parts[me]["halo_owner"].tolist() == [other]
        assert parts[me]["send_part"].tolist() == [other]
        assert parts[me]["send_ptr"].tolist() == [0, 1]
        sent = parts[me]["n_id"][parts[me]["send_rows"].long()]
        assert torch.equal(sent, parts[other]["n_id"][3:])


def test_multilabel_targets_are_kept(cut: Cut) -> None:
    y = torch.tensor([[1.0, 0.0], [torch.nan] * 2, [0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [torch.nan] * 2])
    store = cut(path(y=y, task="multilabel"))
    assert store.manifest.meta["task"] == "multilabel"
    for index in range(2):
        torch.testing.assert_close(store.part(index)["y"], y[owned(store, index)], equal_nan=True)


# --- the act of writing ----------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(cut: Cut) -> None:
    graph = make_graph()
    assert cut(graph, 3).manifest == cut(graph, 3).manifest


def test_nothing_is_published_by_a_driver_that_lost_its_run() -> None:
    storage, done = Storage.open("memory://lost-run"), []

    def lost() -> None:
        raise OwnershipError("another driver has taken over")

    with pytest.raises(OwnershipError):
        build_graph_store(
            path(), storage, PartitionConfig(num_parts=2), halo_hops=1, seed=0, fingerprint="f",
            advance=done.append, before_commit=lost,
        )  # fmt: skip
    assert done == [1, 1]
    with pytest.raises(ManifestError, match="run `gkd partition` first"):
        GraphStore.open(storage)


def test_metadata_of_the_cut_depends_on_the_cut(cut: Cut) -> None:
    graph = make_graph()
    hashes = {
        cut(graph, parts, method).manifest.meta["n_id_hash"] for parts in (2, 3) for method in ("metis", "random")
    }
    assert len(hashes) == 4
    assert cut(replace(graph, x=graph.x + 1), 2).manifest.meta["n_id_hash"] in hashes  # not on the features
