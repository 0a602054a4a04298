"""Stored scores of every kind against dense references, and the loss from them against a live teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from infer_worlds import NUM_CLASSES, World
from torch import Tensor

from gkd_dist import layout
from gkd_dist.config import InferConfig, KdLoss, Loss, LspLoss
from gkd_dist.errors import DataError, ManifestError
from gkd_dist.evaluate import evaluate_logits
from gkd_dist.infer.knowledge import refuse_coarse
from gkd_dist.infer.packing import Packing
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.losses import Neighbours, Objective, kd_loss, lsp_loss
from gkd_dist.losses.bounds import lsp_bound
from gkd_dist.losses.scores import METRICS
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.stream.knowledge import KnowledgeStore
from gkd_dist.stream.knowledge import Wants as Read
from gkd_dist.stream.units import UnitLoader
from gkd_dist.topk import TopK, top_k

MakeWorld = Callable[..., World]
FINGERPRINT = "f" * 64
SCORE_DTYPES = ["fp32", "fp16", "bf16", "uint8"]
DEPTH = 3


def settings_of(scores_dtype: str, **options: Any) -> InferConfig:
    return InferConfig.model_validate({"num_actors": 0, "dtype": "fp32", "scores_dtype": scores_dtype, **options})


def embeddings(world: World, model: Any, layer: int) -> Tensor:
    """Output of a layer on the whole graph, float64."""
    with torch.no_grad():
        _, layers = model(world.graph.x, world.graph.edge_index, world.graph.edge_weight, layers=(layer,))
    found: Tensor = layers[layer].double()
    return found


def reference(z: Tensor, source: Tensor, target: Tensor, metric: str) -> Tensor:
    """Scores by their definition, on [m, d] tensors."""
    a, b = z[target], z[source]
    if metric == "sqeuclidean":
        return (a - b).square().sum(1)
    if metric == "manhattan":
        return (a - b).abs().sum(1)
    return (a * b).sum(1) if metric == "dot" else torch.cosine_similarity(a, b, dim=1)


def owned_edges(graph: GraphStore, part: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(tensors of the part, global source, global target) of the in-edges of owned nodes, in stored order."""
    tensors, counts = graph.part(part), graph.manifest.parts[part].counts
    lengths = tensors["indptr"][: counts["num_owned"] + 1].diff()
    target = torch.repeat_interleave(lengths)
    n_id = tensors["n_id"]
    return tensors, n_id[tensors["indices"][: counts["num_owned_edges"]].long()], n_id[target]


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin", "mlp"])
def test_all_metrics_of_several_layers_equal_dense_references(make_world: MakeWorld, kind: str, dtype: str) -> None:
    world = make_world()
    graph, out = world.cut(2), world.storage("k")
    storage, model = world.model(kind, heads=2 if kind == "gat" else 1)
    wants = Wants(scores={1: METRICS, DEPTH: METRICS})
    manifest = infer_nodes(storage, graph, out, wants, settings_of(dtype), fingerprint=FINGERPRINT)
    assert manifest.meta["scores_dtype"] == dtype
    for layer in (1, DEPTH):
        z = embeddings(world, model, layer)
        for part, entry in enumerate(manifest.parts):
            tensors, source, target = owned_edges(graph, part)
            scores = (
                KnowledgeStore(out, manifest).part(part, tensors, Read.of(scores=[(layer, m) for m in METRICS])).scores
            )
            for metric in METRICS:
                exact, found = reference(z, source, target, metric), scores[layer, metric].double()
                info, whole = entry.meta["floats"][f"scores.{layer}.{metric}"], manifest.meta["scores"]
                assert found.isfinite().all()
                assert (found - exact).abs().max() <= info["bound"] + 1e-4 * max(1.0, float(exact.abs().max()))
                assert info["bound"] <= whole[f"{layer}.{metric}"]["bound"]
                assert (info["bound"] == 0) == (dtype == "fp32")


TERMS = (
    LspLoss(kind="lsp", sigma=1.5, outer_softmax=True, direction="student||teacher"),
    LspLoss(kind="lsp", sigma=1.5, outer_softmax=True, direction="teacher||student"),
    LspLoss(kind="lsp", sigma="median", outer_softmax=False, direction="student||teacher"),
    LspLoss(kind="lsp", sigma="median", outer_softmax=False, direction="teacher||student"),
    LspLoss(kind="lsp", kernel="laplacian", sigma=2.0, outer_softmax=False),
    LspLoss(kind="lsp", kernel="euclidean", outer_softmax=True, temperature=4.0),
    LspLoss(kind="lsp", kernel="cosine", temperature=0.5, direction="teacher||student"),
    LspLoss(kind="lsp", kernel="linear", reduction="edges"),
    LspLoss(kind="lsp", kernel="poly", c=1.0, temperature=8.0, self_loops=True),
)
LAYER = 2  # that all terms read: -2 of three


def stored_run(world: World, settings: InferConfig, num_parts: int = 2) -> tuple[GraphStore, Any, Manifest, Any]:
    graph, out = world.cut(num_parts), world.storage(f"k-{settings.scores_dtype}")
    storage, model = world.model("sage")
    wants = Wants(scores={LAYER: {term.metric for term in TERMS}})
    packing = Packing.of(settings, TERMS, DEPTH)
    manifest = infer_nodes(storage, graph, out, wants, settings, fingerprint=FINGERPRINT, packing=packing)
    return graph, out, manifest, model


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
def test_the_loss_from_stored_scores_is_that_of_a_live_teacher(make_world: MakeWorld, dtype: str) -> None:
    """On a unit merged of two parts, so that the order of edges counts too."""
    world = make_world()
    graph, out, manifest, model = stored_run(world, settings_of(dtype))
    medians = {(LAYER, key.split(".")[1]): value["median"] for key, value in manifest.meta["scores"].items()}
    objective = Objective(TERMS, "multiclass", DEPTH, DEPTH, medians)
    loader = UnitLoader(graph, (out, manifest), [(0, 1)], Read.of(scores=[(LAYER, term.metric) for term in TERMS]))
    batch = loader.load(0)
    z_student = torch.randn(batch.x.size(0), 4, generator=torch.Generator().manual_seed(3))
    z_teacher = embeddings(world, model, LAYER)[batch.n_id].float()
    objective.student_sigma = dict.fromkeys(objective.names, 1.5)
    counts = objective.counts(batch).float()
    offline = objective.sums(batch, torch.zeros(batch.x.size(0), 3), {LAYER: z_student}) / counts
    edge_index = torch.stack([batch.graph.pattern.indices, batch.graph.pattern.rows()])
    for term, value, bounds in zip(TERMS, offline.tolist(), manifest_bounds(manifest, objective.names), strict=True):
        options = term.model_dump(include={"kernel", "direction", "reduction", "outer_softmax", "self_loops", "c"})
        options |= {"temperature": term.temperature, "degree": term.degree, "sigma": 1.5}
        teacher_sigma = bounds["sigma"] or 1.5
        live = lsp_loss(z_student, edge_index, teacher_z=z_teacher, teacher_sigma=teacher_sigma, **options)
        allowed = bounds["lsp_bound"]
        if allowed is None:  # it depends on the student: here we can look at it
            gap = widest_gap(term, z_teacher, z_student, edge_index, teacher_sigma)
            allowed = lsp_bound(term.direction, bounds["argument_bound"], gap)
        assert abs(value - float(live)) <= allowed + 2e-5 * (1 + abs(float(live)))
        assert (allowed == 0) == (dtype == "fp32")


def manifest_bounds(manifest: Manifest, names: list[str]) -> list[Mapping[str, Any]]:
    """Bounds of the terms, in their order."""
    found = {bounds["loss"]: bounds for bounds in manifest.meta["bounds"]}
    return [found[name] for name in names]


def widest_gap(term: LspLoss, teacher: Tensor, student: Tensor, edge_index: Tensor, teacher_sigma: float) -> float:
    """Upper bound of the differences of the arguments a_j − b_j in any neighbourhood."""
    assert (term.kernel, term.outer_softmax) == ("rbf", False)
    sides = ((teacher, teacher_sigma), (student, 1.5))
    a, b = (reference(z.double(), *edge_index, "sqeuclidean") / (-2 * sigma) for z, sigma in sides)
    return float((a - b).max() - (a - b).min())


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
def test_any_sampled_neighbourhood_has_the_softmax_of_the_embeddings(make_world: MakeWorld, dtype: str) -> None:
    """No fan-out was known when the scores were stored."""
    world = make_world(num_edges=600)
    graph, out, manifest, model = stored_run(world, settings_of(dtype))
    z, random = embeddings(world, model, LAYER), torch.Generator().manual_seed(7)
    kernel, sigma = "rbf", 1.5
    kl = next(b["kl_bound"] for b in manifest.meta["bounds"] if b["sigma"] == sigma and b["kernel"] == kernel)
    objective = Objective(TERMS[:1], "multiclass", DEPTH, DEPTH, {})
    form = objective._terms[0].kernel  # type: ignore[attr-defined]
    for part in range(graph.num_parts):
        tensors, source, target = owned_edges(graph, part)
        scores = KnowledgeStore(out, manifest).part(part, tensors, Read.of(scores=[(LAYER, "sqeuclidean")])).scores
        arguments = form.logits(scores[LAYER, "sqeuclidean"].double(), sigma)
        for fan_out in (1, 2, 5):
            for node in target.unique().tolist():
                edges = torch.nonzero(target == node).flatten()
                sampled = edges[torch.randperm(edges.numel(), generator=random)[:fan_out]]
                found = torch.log_softmax(arguments[sampled], 0)
                exact = reference(z, source[sampled], target[sampled], "sqeuclidean")
                expected = torch.log_softmax(form.logits(exact, sigma), 0)
                assert float((expected.exp() * (expected - found)).sum()) <= kl + 1e-10
                if dtype == "fp32":
                    assert float((found - expected).abs().max()) <= 1e-5


# --- the largest logits ----------------------------------------------------------------------

KD = tuple(KdLoss(kind="kd", temperature=temperature) for temperature in (1.0, 3.0))


def infer_top(world: World, k: int, losses: Sequence[Loss] = KD) -> tuple[GraphStore, Any, Manifest, Tensor]:
    """(graph, store, manifest, logits of the whole graph)."""
    settings, graph, out = settings_of("fp32", logits=k), world.cut(2), world.storage(f"top-{k}")
    storage, model = world.model("gcn")
    packing = Packing.of(settings, losses, DEPTH)
    manifest = infer_nodes(storage, graph, out, Wants(), settings, fingerprint=FINGERPRINT, packing=packing)
    with torch.no_grad():
        logits = model(world.graph.x, world.graph.edge_index)
    return graph, out, manifest, logits


def test_the_loss_of_stored_top_logits_is_that_of_a_live_teacher(make_world: MakeWorld) -> None:
    graph, out, manifest, logits = infer_top(make_world(), 2)
    assert manifest.meta["topk"] == {"k": 2, "temperatures": [1.0, 3.0]}
    assert {tensor.name for tensor in manifest.parts[0].tensors} == {"logits.topk", "logits.index", "logits.tail"}
    loader = UnitLoader(graph, (out, manifest), [(0, 1)], Read.of(True, temperatures=[1.0, 3.0]))
    batch = loader.load(0)
    student = torch.randn(batch.x.size(0), NUM_CLASSES, generator=torch.Generator().manual_seed(2))
    objective = Objective(KD, "multiclass", DEPTH, DEPTH, {})
    values = objective.sums(batch, student, {}) / objective.counts(batch).float()
    for value, loss in zip(values.tolist(), KD, strict=True):
        live = top_k(logits[batch.n_id[: batch.num_owned]], 2, [loss.temperature])
        expected = kd_loss(student[: batch.num_owned], live, temperature=loss.temperature)
        assert value == pytest.approx(float(expected), rel=1e-4)
    assert loader.size_of(0) > 0
    assert objective.sums(loader.empty(), torch.zeros(0, NUM_CLASSES), {}).tolist() == [0.0, 0.0]


def test_top_logits_are_enough_for_accuracy_and_agreement(make_world: MakeWorld, exact: InferConfig) -> None:
    world = make_world()
    graph, out, manifest, _ = infer_top(world, 1)
    everything = world.storage("all")
    whole = infer_nodes(world.model("gcn")[0], graph, everything, Wants(), exact, fingerprint=FINGERPRINT)
    brief, full = (out, manifest), (everything, whole)
    assert evaluate_logits(graph, brief, full) == evaluate_logits(graph, full, full)
    assert evaluate_logits(graph, full, brief)["agreement"] == 1.0


def test_as_many_as_there_are_classes_are_all(make_world: MakeWorld) -> None:
    _, _, manifest, _ = infer_top(make_world(), NUM_CLASSES)
    assert manifest.meta["topk"] is None
    assert [tensor.name for tensor in manifest.parts[0].tensors] == ["logits"]


def test_a_temperature_that_was_not_stored_names_the_stage(make_world: MakeWorld) -> None:
    graph, out, manifest, _ = infer_top(make_world(), 2, KD[:1])
    with pytest.raises(ManifestError, match=r"tails at temperatures \[1\.0\], a kd loss asks for 3; run `gkd infer`"):
        UnitLoader(graph, (out, manifest), [(0,)], Read.of(True, temperatures=[1.0, 3.0]))


def test_without_a_kd_loss_there_is_no_tail(make_world: MakeWorld) -> None:
    graph, out, manifest, logits = infer_top(make_world(), 2, ())
    assert {tensor.name for tensor in manifest.parts[0].tensors} == {"logits.topk", "logits.index"}
    found = KnowledgeStore(out, manifest).part(0, {}, Read.of(True)).logits
    assert isinstance(found, TopK)
    owned = graph.part(0, ["n_id"])["n_id"][: found.num_nodes]
    assert torch.equal(found.index[:, 0].long(), logits[owned].argmax(1))


# --- widths without stored scores ------------------------------------------------------------


def test_embeddings_have_the_medians_of_the_scores_that_are_read_off_them(make_world: MakeWorld) -> None:
    world, settings = make_world(), settings_of("fp32")
    term = LspLoss(kind="lsp", sigma="median", outer_softmax=False)
    stored = run_terms(world, settings, term)
    out, packing = world.storage("as-embeddings"), Packing.of(settings, [term], DEPTH)
    wants = Wants(embeddings={LAYER})
    manifest = infer_nodes(
        world.model("sage")[0], world.cut(3), out, wants, settings, fingerprint=FINGERPRINT, packing=packing
    )
    median = stored.meta["scores"]["2.sqeuclidean"]["median"]
    assert manifest.meta["scores"] == {"2.sqeuclidean": {"median": median}}
    assert {tensor.name for tensor in manifest.parts[0].tensors} == {"logits", "embeddings.2"}
    refuse_coarse(manifest.meta, manifest.parts, Packing.of(settings_of("fp32", max_kl=0), [term], DEPTH))


# --- too coarse ------------------------------------------------------------------------------


def run_terms(
    world: World, settings: InferConfig, *terms: LspLoss, seen: list[tuple[int, int]] | None = None
) -> Manifest:
    """Inference with the scores that ``terms`` read; ``seen`` gets what is reported on the way."""
    storage, _ = world.model("sage")
    wants = Wants(scores={LAYER: {term.metric for term in terms}})
    out = world.storage(f"k-{settings.scores_dtype}")
    return infer_nodes(
        storage,
        world.cut(3),
        out,
        wants,
        settings,
        fingerprint=f"{settings.scores_dtype:f<8}" + "0" * 56,
        packing=Packing.of(settings, terms, DEPTH),
        progress=lambda done, total: None if seen is None else seen.append((done, total)),
    )


def test_a_known_width_refuses_at_the_first_part(make_world: MakeWorld) -> None:
    world, term = make_world(), LspLoss(kind="lsp", sigma=0.01, outer_softmax=False)
    seen: list[tuple[int, int]] = []
    with pytest.raises(DataError, match=r"sqeuclidean of part \d as uint8 .* set infer\.scores_dtype=fp16"):
        run_terms(world, settings_of("uint8", max_kl=0.01), term, seen=seen)
    done, total = seen[-1]
    assert done <= total - 3  # no knowledge of any part was committed
    assert not world.storage("k-uint8").exists(layout.MANIFEST)
    # finer ones are not refused, and what they could do is in the manifest
    manifest = run_terms(world, settings_of("fp32", max_kl=0.01), term)
    assert manifest.meta["bounds"][0]["kl_bound"] == 0


def test_a_median_width_refuses_before_anything_is_published_and_goes_on_with_a_larger_bound(
    make_world: MakeWorld,
) -> None:
    world, term = make_world(), LspLoss(kind="lsp", sigma="median", outer_softmax=False)
    with pytest.raises(DataError, match=r"of part \d as uint8 .*infer\.max_kl 1e-09"):
        run_terms(world, settings_of("uint8", max_kl=1e-9), term)
    assert not world.storage("k-uint8").exists(layout.MANIFEST)
    seen: list[tuple[int, int]] = []
    manifest = run_terms(world, settings_of("uint8", max_kl=1.0), term, seen=seen)
    assert seen == [(9, 9)]  # nothing was computed again
    bounds = manifest.meta["bounds"][0]
    assert bounds["sigma"] == manifest.meta["scores"]["2.sqeuclidean"]["median"] / 2
    assert 1e-9 < bounds["kl_bound"] <= 1.0


def test_a_narrower_width_is_checked_against_what_is_stored(make_world: MakeWorld) -> None:
    world, settings = make_world(), settings_of("uint8", max_kl=0.01)
    wide, narrow = (LspLoss(kind="lsp", sigma=sigma, outer_softmax=False) for sigma in (50.0, 0.01))
    manifest = run_terms(world, settings, wide)
    refuse_coarse(manifest.meta, manifest.parts, Packing.of(settings, [wide], DEPTH))
    with pytest.raises(DataError, match=r"loss lsp .* infer\.max_kl"):
        refuse_coarse(manifest.meta, manifest.parts, Packing.of(settings, [narrow], DEPTH))


def test_a_graph_without_edges_has_no_bounds(make_world: MakeWorld) -> None:
    world = make_world(num_edges=0)
    manifest = run_terms(world, settings_of("uint8", max_kl=0.0), LspLoss(kind="lsp", sigma="median"))
    assert manifest.meta["scores"]["2.sqeuclidean"] == {"median": None, "bound": 0.0, "low": 0.0, "high": 0.0}
    assert manifest.meta["bounds"][0]["kl_bound"] is None


def test_neighbours_are_those_of_the_graph(make_world: MakeWorld) -> None:
    """The helper of this file finds the edges that the loss sees."""
    world = make_world()
    graph = world.cut(2)
    num_edges = sum(owned_edges(graph, part)[1].numel() for part in range(2))
    assert num_edges == Neighbours.of_edges(world.graph.edge_index, 60, self_loops=True).num_edges
