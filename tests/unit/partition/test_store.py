"""Reading parts: features in both forms, prefixes of a part, and stores of something else."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from graphs import path
from infer_worlds import make_graph
from torch import Tensor

from gkd_dist.config import PartitionConfig
from gkd_dist.errors import GraphError, ManifestError
from gkd_dist.graph import Graph
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore, feature_tensors, features, local_graph, sparse_features
from gkd_dist.sparse import CsrPattern
from gkd_dist.storage import Storage


def store_of(graph: Graph, name: str, halo_hops: int = 1) -> GraphStore:
    storage = Storage.open(f"memory://store-{name}")
    config = PartitionConfig(method="random", num_parts=2)
    build_graph_store(graph, storage, config, halo_hops=halo_hops, seed=0, fingerprint="a" * 64)
    return GraphStore.open(storage)


def mostly_zeros(num_nodes: int) -> Tensor:
    """Bag of words with one word in twenty, and a node without any."""
    draw = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(num_nodes, 40, generator=draw) < 0.05, torch.randn(num_nodes, 40, generator=draw), 0.0)
    x[3] = 0
    return x


# --- features --------------------------------------------------------------------------------


def test_sparse_form_by_hand() -> None:
    found = sparse_features("x", torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 3.0]]))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "x.indptr": [0, 1, 1, 3],
        "x.indices": [1, 0, 2],
        "x.values": [2.0, -1.0, 3.0],
    }


@pytest.mark.parametrize("shape", [(0, 4), (3, 4), (3, 0)])
def test_features_without_a_value(shape: tuple[int, int]) -> None:
    assert features(sparse_features("x", torch.zeros(shape)), "x", shape[1]).shape == shape


def test_sparse_and_dense_features_read_the_same() -> None:
    x = mostly_zeros(6)
    sparse = store_of(path(x=x), "sparse")
    dense = store_of(path(x=x + 1), "dense")
    assert (sparse.manifest.meta["sparse_features"], dense.manifest.meta["sparse_features"]) == (True, False)
    for index in range(2):
        few, many = sparse.part(index), dense.part(index)
        assert "x" not in few
        assert torch.equal(few["n_id"], many["n_id"])
        for name in ("x", "x_halo"):
            torch.testing.assert_close(features(few, name, 40) + 1, features(many, name, 40))
        assert torch.equal(features(few, "x", 40), x[few["n_id"][: few["y"].numel()]])


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_inputs_are_the_features_of_owned_and_halo_nodes(form: str) -> None:
    graph = make_graph()
    graph = replace(graph, x=mostly_zeros(graph.num_nodes)) if form == "sparse" else graph
    store = store_of(graph, f"inputs-{form}", halo_hops=2)
    for part in range(store.num_parts):
        tensors = store.part(part)
        assert ("x" in tensors) == (form == "dense")
        assert torch.equal(store.inputs(part), graph.x[tensors["n_id"]])


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_named_tensors_are_read_alone(form: str) -> None:
    store = store_of(path(x=mostly_zeros(6) + (form == "dense")), f"named-{form}")
    found = store.part(0, ["n_id", "x"])
    assert set(found) == ({"n_id", "x"} if form == "dense" else {"n_id", "x.indptr", "x.indices", "x.values"})
    assert torch.equal(features(found, "x", 40), features(store.part(0), "x", 40))


NAMED = {"wide": torch.arange(42.0).reshape(6, 7), "words": mostly_zeros(6)}


def test_named_features_lie_beside_x() -> None:
    store = store_of(path(features=NAMED), "features")
    assert store.manifest.meta["features"] == {"wide": 7, "words": 40}
    assert [store.num_features_of(name) for name in (None, "wide", "words")] == [3, 7, 40]
    for index in range(2):
        part = store.part(index)
        assert "features.words" not in part, "mostly zeros"
        for name, expected in NAMED.items():
            owned, halo = (features(part, tensor, store.num_features_of(name)) for tensor in feature_tensors(name))
            assert torch.equal(torch.cat([owned, halo]), expected[part["n_id"]])
            assert torch.equal(store.inputs(index, name), expected[part["n_id"]])


@pytest.mark.parametrize("name", [None, "wide", "words"])
def test_features_that_are_not_asked_for_are_not_read(name: str | None) -> None:
    store = store_of(path(features=NAMED), f"part-with-{name}")
    found, everything = store.part_with(0, name), store.part(0)
    read = {"": {"x", "x_halo"}, "wide": {"features.wide", "features_halo.wide"}}.get(name or "")
    assert {key for key in found if key.startswith(("x", "features"))} == (
        read or {f"{tensor}.{end}" for tensor in feature_tensors("words") for end in ("indptr", "indices", "values")}
    )
    others = {key for key in everything if not key.startswith(("x", "features"))}
    assert others == {key for key in found if not key.startswith(("x", "features"))}
    assert set(store.part(0, ["n_id", *feature_tensors(name)])) == {"n_id", *(set(found) - others)}


def test_features_that_are_not_there() -> None:
    store = store_of(path(features=NAMED), "absent")
    with pytest.raises(
        GraphError, match=r"no features 'wode' \(it has wide, words\), did you mean 'wide'\?; name them"
    ):
        store.num_features_of("wode")
    with pytest.raises(GraphError, match=r"no features 'a' \(it has x alone\); name them in graph.features and run"):
        store_of(path(), "absent-alone").num_features_of("a")


# --- prefixes --------------------------------------------------------------------------------


def test_prefix_of_a_part_is_the_part_with_less_halo() -> None:
    graph = make_graph(weighted=True)
    wide, narrow = store_of(graph, "wide", halo_hops=3), store_of(graph, "narrow", halo_hops=1)
    for index in range(2):
        counts = wide.manifest.parts[index].counts
        num_nodes = counts["num_owned"] + counts["num_halo_1"]
        found = local_graph(wide.part(index), num_nodes, counts["num_owned"])
        expected = local_graph(narrow.part(index))
        for name in ("indptr", "indices", "t_indptr", "t_indices", "t_perm"):
            assert torch.equal(getattr(found.pattern, name), getattr(expected.pattern, name)), name
        assert torch.equal(found.in_degree, expected.in_degree)
        assert torch.equal(found.has_self_loop, expected.has_self_loop)
        assert found.edge_weight is not None
        assert torch.equal(found.edge_weight, expected.edge_weight)


def test_rows_beyond_the_prefix_are_empty() -> None:
    store = store_of(make_graph(), "rows", halo_hops=2)
    part = store.part(0)
    local = local_graph(part, num_rows=5)
    assert local.num_nodes == part["n_id"].numel()
    assert local.pattern.indptr[5:].unique().tolist() == [int(part["indptr"][5])]
    computed = CsrPattern.from_csr(local.pattern.indptr, local.pattern.indices)
    assert torch.equal(local.pattern.t_perm, computed.t_perm)


# --- the right store -------------------------------------------------------------------------


def test_no_store_names_the_stage_that_writes_one() -> None:
    with pytest.raises(ManifestError, match=r"no graph store at memory://nothing-here; run `gkd partition` first"):
        GraphStore.open(Storage.open("memory://nothing-here"))


def test_another_fingerprint_names_the_stage_that_writes_it() -> None:
    store = store_of(path(), "fingerprint")
    assert GraphStore.open(store.storage, "a" * 64).manifest == store.manifest
    with pytest.raises(ManifestError, match=r"fingerprint aaaaaaaa, expected bbbbbbbb.*run `gkd partition` again"):
        GraphStore.open(store.storage, "b" * 64)


def test_a_store_travels_between_processes() -> None:
    store = store_of(path(), "pickled")
    copy: GraphStore = pickle.loads(pickle.dumps(store))
    assert copy.manifest == store.manifest
    assert torch.equal(copy.part(0)["n_id"], store.part(0)["n_id"])
