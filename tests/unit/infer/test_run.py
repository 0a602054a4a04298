"""Inference part by part against one forward over the whole graph, and its behaviour when interrupted."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from infer_worlds import NUM_FEATURES, PLAIN_KIND, World, assert_close, whole
from torch import Tensor, nn

from gkd_dist import layout
from gkd_dist.config import InferConfig, ModelConfig
from gkd_dist.errors import GraphError, ModelError, OwnershipError, ShardError
from gkd_dist.infer.knowledge import embedding_name, score_name
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.losses import edge_scores
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec, read_model, save_model
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.reader import read_shard
from gkd_dist.storage import Storage

MakeWorld = Callable[..., World]
FINGERPRINT = "f" * 64


def full_forward(model: nn.Module, world: World, layers: tuple[int, ...] = (1,)) -> tuple[Tensor, dict[int, Tensor]]:
    with torch.no_grad():
        return model(world.graph.x, world.graph.edge_index, world.graph.edge_weight, layers=layers)


@pytest.mark.parametrize("method", ["metis", "random"])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin", "mlp"])
def test_equals_a_forward_over_the_whole_graph(
    make_world: MakeWorld, exact: InferConfig, kind: str, num_parts: int, method: str
) -> None:
    world = make_world()
    graph = world.cut(num_parts, method)
    storage, model = world.model(kind, heads=2 if kind == "gat" else 1)
    out = world.storage("knowledge")
    wants = Wants(embeddings={2})
    manifest = infer_nodes(storage, graph, out, wants, exact, fingerprint=FINGERPRINT)
    logits, layers = full_forward(model, world, (2,))
    assert_close(whole(graph, out, manifest, "logits"), logits)
    assert_close(whole(graph, out, manifest, embedding_name(2)), layers[2])


@pytest.mark.parametrize(
    ("options", "model_options"),
    [
        ({"weighted": True}, {}),
        ({}, {"residual": True, "norm": "layer"}),
        ({}, {"layers": 1}),
        ({"num_edges": 0}, {}),
    ],
    ids=["weights", "residual", "one layer", "no edges"],
)
def test_exact_in_special_cases(
    make_world: MakeWorld, exact: InferConfig, options: dict[str, Any], model_options: dict[str, Any]
) -> None:
    world = make_world(**options)
    graph = world.cut(3, "random", halo_hops=2)
    storage, model = world.model("gcn", **model_options)
    manifest = infer_nodes(storage, graph, world.storage("k"), Wants(), exact, fingerprint=FINGERPRINT)
    assert_close(whole(graph, world.storage("k"), manifest, "logits"), full_forward(model, world)[0])


@pytest.mark.parametrize("kind", ["sage", PLAIN_KIND])
def test_a_model_reads_the_features_that_it_names(make_world: MakeWorld, exact: InferConfig, kind: str) -> None:
    world = make_world()
    wide = torch.randn(world.graph.num_nodes, 11)
    world.graph = replace(world.graph, features={"wide": wide})
    graph, config = world.cut(3, halo_hops=3), ModelConfig(kind=kind, hidden=5)
    model, storage = build_model(config, 11, 4).eval(), world.storage("wide-model")
    save_model(storage, model, ModelSpec(config, 11, 4, "multiclass", features="wide"), "model")
    assert read_model(storage, [PLAIN_KIND])[1].features == "wide"
    allow = (PLAIN_KIND,)
    manifest = infer_nodes(
        storage, graph, world.storage("k"), Wants(), exact, fingerprint=FINGERPRINT, allow_code=allow
    )
    with torch.no_grad():
        assert_close(whole(graph, world.storage("k"), manifest, "logits"), model(wide, world.graph.edge_index))


def test_features_that_a_graph_lacks(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    config, storage = ModelConfig(kind="gcn", hidden=5), world.storage("wide-model")
    spec = ModelSpec(config, NUM_FEATURES, 4, "multiclass", features="wide")
    save_model(storage, build_model(config, NUM_FEATURES, 4), spec, "model")
    with pytest.raises(GraphError, match="has no features 'wide'"):
        infer_nodes(storage, world.cut(2), world.storage("k"), Wants(), exact, fingerprint=FINGERPRINT)
    world.graph = replace(world.graph, features={"wide": torch.randn(world.graph.num_nodes, 11)})
    with pytest.raises(ModelError, match=r"reads 6 features per node, the graph at .* has 11 in 'wide'; use a graph"):
        infer_nodes(storage, world.cut(3), world.storage("k"), Wants(), exact, fingerprint=FINGERPRINT)


def test_scores_and_their_median_do_not_depend_on_the_cut(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    storage, model = world.model("sage")
    logits, layers = full_forward(model, world, (2,))
    source, target = world.graph.edge_index
    expected = {(3, "cosine"): edge_scores(logits, world.graph.edge_index, "cosine")}
    expected[2, "sqeuclidean"] = edge_scores(layers[2], world.graph.edge_index)
    for num_parts in (1, 3):
        graph, out = world.cut(num_parts), world.storage(f"knowledge-{num_parts}")
        wants = Wants(logits=False, scores={3: {"cosine"}, 2: {"sqeuclidean"}})
        manifest = infer_nodes(storage, graph, out, wants, exact, fingerprint=FINGERPRINT)
        for (layer, metric), scores in expected.items():
            lookup = {(int(s), int(t)): float(v) for s, t, v in zip(source, target, scores, strict=True)}
            for part, entry in enumerate(manifest.parts):
                tensors = graph.part(part, ["n_id", "indptr", "indices"])
                counts = graph.manifest.parts[part].counts
                found = read_shard(out, entry, [score_name(layer, metric)])[score_name(layer, metric)]
                rows = torch.repeat_interleave(tensors["indptr"].diff()[: counts["num_owned"]])
                pairs = zip(tensors["indices"].tolist(), rows.tolist(), found.tolist(), strict=False)
                for s, t, value in pairs:
                    key = int(tensors["n_id"][s]), int(tensors["n_id"][t])
                    assert value == pytest.approx(lookup[key], rel=1e-4, abs=1e-5)
            no_loop = scores[source != target].sort().values
            median = no_loop[(no_loop.numel() - 1) // 2].bfloat16()
            stored = manifest.meta["scores"][f"{layer}.{metric}"]["median"]
            assert stored == pytest.approx(float(median), rel=2**-8)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_low_precision_stays_within_its_stored_bound(make_world: MakeWorld, dtype: str) -> None:
    world = make_world()
    graph, out = world.cut(2), world.storage("k")
    storage, model = world.model("gin")
    settings = InferConfig(num_actors=0, dtype=dtype)  # type: ignore[arg-type]
    manifest = infer_nodes(storage, graph, out, Wants(), settings, fingerprint=FINGERPRINT)
    logits, _ = full_forward(model, world)
    bound = max(entry.meta["floats"]["logits"]["bound"] for entry in manifest.parts)
    assert 0 < bound < float(logits.abs().max()) * 2**-7
    assert float((whole(graph, out, manifest, "logits") - logits).abs().max()) <= bound + 1e-4


def test_manifest_says_what_it_is_about(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    graph, out = world.cut(2), world.storage("k")
    storage, _ = world.model("gcn")
    manifest = infer_nodes(storage, graph, out, Wants(scores={1: {"dot"}}), exact, fingerprint=FINGERPRINT)
    inputs = dict(manifest.inputs)
    assert inputs.pop("weights") == hashlib.sha256(storage.read(layout.MODEL_WEIGHTS)).hexdigest()
    kept = inputs.pop("config")
    assert inputs == {"graph": graph.manifest.fingerprint, "model": "model-gcn"}
    half = exact.model_copy(update={"dtype": "fp16"})
    other = infer_nodes(storage, graph, out, Wants(scores={1: {"dot"}}), half, fingerprint="e" * 64)
    assert other.inputs == {**manifest.inputs, "config": other.inputs["config"]}
    assert other.inputs["config"] != kept
    manifest = infer_nodes(storage, graph, out, Wants(scores={1: {"dot"}}), exact, fingerprint=FINGERPRINT)
    assert manifest.meta["mode"] == "layerwise"
    assert manifest.meta["num_layers"] == 3
    assert Manifest.load(out, "knowledge", FINGERPRINT) == manifest
    assert out.list() == sorted([layout.MANIFEST, *(entry.key for entry in manifest.parts)])


# --- models that are not layered -------------------------------------------------------------


def test_plain_models_run_on_their_halo_and_say_so(
    make_world: MakeWorld, exact: InferConfig, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world()
    graph, out = world.cut(3, halo_hops=2), world.storage("k")
    storage, model = world.model(PLAIN_KIND)
    with caplog.at_level(logging.INFO):
        manifest = infer_nodes(storage, graph, out, Wants(), exact, fingerprint=FINGERPRINT, allow_code=[PLAIN_KIND])
    assert manifest.meta["mode"] == "khop"
    assert "k-hop mode" in caplog.text
    assert "exact, it looks 2 hops far" in caplog.text
    with torch.no_grad():
        assert_close(whole(graph, out, manifest, "logits"), model(world.graph.x, world.graph.edge_index))


def test_plain_models_have_no_scores(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    storage, _ = world.model(PLAIN_KIND)
    wants = Wants(scores={1: {"dot"}})
    with pytest.raises(ModelError, match="no layers"):
        infer_nodes(
            storage, world.cut(2), world.storage("k"), wants, exact, fingerprint=FINGERPRINT, allow_code=[PLAIN_KIND]
        )


# --- wrong input -----------------------------------------------------------------------------


def test_a_model_of_other_features_is_refused(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    storage, _ = world.model("gcn")
    document = storage.read_json(layout.MODEL_JSON)
    graph = world.cut(2)
    graph.manifest.meta["num_features"] = NUM_FEATURES + 1
    assert document["in_channels"] == NUM_FEATURES
    with pytest.raises(ModelError, match=r"reads 6 features per node, the graph .* has 7"):
        infer_nodes(storage, graph, world.storage("k"), Wants(), exact, fingerprint=FINGERPRINT)


def test_weights_that_are_not_finite_are_never_stored(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    world.graph.x[7, 0] = torch.inf
    storage, _ = world.model("gcn")
    with pytest.raises(ModelError, match=r"layer 1 of part .* NaN or infinite"):
        infer_nodes(storage, world.cut(2), world.storage("k"), Wants(), exact, fingerprint=FINGERPRINT)


def test_the_threads_of_the_caller_are_given_back(make_world: MakeWorld) -> None:
    world = make_world()
    storage, _ = world.model("gcn")
    before = torch.get_num_threads()
    settings = InferConfig(num_actors=0, threads=before + 1)
    infer_nodes(storage, world.cut(2), world.storage("k"), Wants(), settings, fingerprint=FINGERPRINT)
    assert torch.get_num_threads() == before


# --- interruptions ---------------------------------------------------------------------------


class Killed(BaseException):
    """What a SIGKILL looks like from inside: no handler of ours may swallow it."""


class FlakyBackend:
    """A storage backend that dies at one of its writes, before or after it, and cannot list."""

    def __init__(self, backend: Any, die_at: int, after: bool = False) -> None:
        self._backend, self._die_at, self._after = backend, die_at, after
        self.num_writes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def write(self, path: str, data: bytes) -> None:
        self.num_writes += 1
        if self.num_writes == self._die_at and not self._after:
            raise Killed
        self._backend.write(path, data)
        if self.num_writes == self._die_at:
            raise Killed

    def list(self, root: str, leftovers: bool = False) -> list[str]:
        if f"{FINGERPRINT[:8]}" not in root:  # cleaning up its own folder is all that lists
            raise AssertionError("correctness must not depend on listing")
        return self._backend.list(root, leftovers)


def flaky(storage: Storage, die_at: int = 0, after: bool = False) -> tuple[Storage, FlakyBackend]:
    backend = FlakyBackend(storage._backend, die_at, after)
    return Storage(storage.protocol, storage.root, storage.config, backend), backend


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_write_it_goes_on_and_ends_with_the_same_bytes(
    make_world: MakeWorld, exact: InferConfig, after: bool
) -> None:
    world = make_world(num_nodes=20, num_edges=60)
    graph = world.cut(2)
    storage, _ = world.model("gcn", layers=2)
    wants = Wants(scores={1: {"sqeuclidean"}})

    def run(out: Storage) -> Manifest:
        return infer_nodes(storage, graph, out, wants, exact, fingerprint=FINGERPRINT)

    out, counter = flaky(world.storage("reference"))
    reference = run(out)
    num_writes = counter.num_writes
    assert num_writes == 1 + 2 * (2 + 2) + 1  # the marker; object and record of every task; the manifest
    for die_at in range(1, num_writes + 1):
        folder = world.storage(f"killed-{die_at}")
        with pytest.raises(Killed):
            run(flaky(folder, die_at, after)[0])
        out, counter = flaky(folder)
        assert run(out) == reference
        assert counter.num_writes <= num_writes - die_at + 2  # at most the task without a record is done again
        assert folder.list() == sorted([layout.MANIFEST, *(entry.key for entry in reference.parts)])


def test_a_finished_run_writes_nothing(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    graph, (out, counter) = world.cut(2), flaky(world.storage("k"))
    storage, _ = world.model("gcn")
    first = infer_nodes(storage, graph, out, Wants(), exact, fingerprint=FINGERPRINT)
    before = counter.num_writes
    assert infer_nodes(storage, graph, out, Wants(), exact, fingerprint=FINGERPRINT) == first
    assert counter.num_writes == before


def test_a_driver_that_lost_the_run_stops_before_its_next_commit(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    storage, _ = world.model("gcn")
    checks = iter(range(100))

    def owned() -> None:
        if next(checks) == 2:
            raise OwnershipError("another driver owns the run; stop it")

    seen: list[tuple[int, int]] = []
    with pytest.raises(OwnershipError):
        infer_nodes(
            storage,
            world.cut(2),
            world.storage("k"),
            Wants(),
            exact,
            fingerprint=FINGERPRINT,
            progress=lambda done, total: seen.append((done, total)),
            ownership_check=owned,
        )
    assert seen == [(0, 6), (1, 6), (2, 6)]
    assert not world.storage("k").exists(layout.MANIFEST)


def test_a_layer_output_that_was_altered_is_an_error_not_a_number(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    storage, _ = world.model("gcn")
    out = world.storage("k")

    def flip(done: int, total: int) -> None:
        for key in out.list(layout.layer_outputs(FINGERPRINT)) if done == 2 else []:
            if key.endswith(".safetensors"):
                data = bytearray(out.read(key))
                data[-1] ^= 1
                data[-4 * 5 * 4] ^= 1
                out.write(key, bytes(data))

    with pytest.raises(ShardError, match=r"layer-1/part-0000\d-[0-9a-f]{8}.safetensors was altered"):
        infer_nodes(storage, world.cut(2), out, Wants(), exact, fingerprint=FINGERPRINT, progress=flip)


def test_predictions_of_an_older_model_are_replaced(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    graph, out = world.cut(2), world.storage("k")
    infer_nodes(world.model("gcn")[0], graph, out, Wants(), exact, fingerprint="0" * 64)
    manifest = infer_nodes(world.model("gin")[0], graph, out, Wants(), exact, fingerprint=FINGERPRINT)
    assert Manifest.load(out, "knowledge").fingerprint == FINGERPRINT
    assert out.list() == sorted([layout.MANIFEST, *(entry.key for entry in manifest.parts)])


def test_objects_that_are_gone_are_made_again(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    graph, (storage, _), out = world.cut(3), world.model("gcn"), world.storage("k")
    wants = Wants(scores={1: {"sqeuclidean"}})
    expected = infer_nodes(storage, graph, world.storage("calm"), wants, exact, fingerprint=FINGERPRINT)

    def refused() -> None:
        if len([key for key in out.list() if key.startswith("part-")]) == 3:
            raise OwnershipError("another driver owns the run; stop it")

    with pytest.raises(OwnershipError):
        infer_nodes(storage, graph, out, wants, exact, fingerprint=FINGERPRINT, ownership_check=refused)
    for key in out.list():
        if key.startswith("part-00001") or ("layer-2/part-00000" in key and key.endswith(".safetensors")):
            out.delete(key)
    assert infer_nodes(storage, graph, out, wants, exact, fingerprint=FINGERPRINT) == expected
    assert out.list() == world.storage("calm").list()
