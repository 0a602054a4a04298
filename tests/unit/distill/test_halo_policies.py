"""C2a with stored hops: with as many as ``auto`` says, loss and gradients of every term are those of the whole graph.

The whole graph here is made of its edges, and the teacher is run on it: nothing that was cut or stored takes part.
Parts are uneven, one has no label and one no edges; units are single parts, merged pairs, and all parts merged.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gkd_dist.config import Config, KdLoss, LabelLoss, Loss, LspLoss
from gkd_dist.distill.task import TrainTask, teacher_wants
from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.losses import edge_scores
from gkd_dist.models.io import read_model
from gkd_dist.models.layered import forward_layers
from gkd_dist.storage import Storage
from gkd_dist.stream.order import plan_units
from gkd_dist.stream.units import UnitLoader, part_costs
from gkd_dist.world import World
from tests.distributed.cases import uneven_graph, uneven_world
from tests.distributed.exchanged import one_step
from tests.training import make_task

LAYERS = 2
SPARSE = 2  # neighbours of a node, so that a few hops are not the whole graph


def lsp(layer: int, **options: object) -> LspLoss:
    values = {"kind": "lsp", "outer_softmax": False, "sigma": 1.0, "teacher_sigma": 1.0, "student_layer": layer}
    return LspLoss.model_validate(values | options)


TERMS: dict[str, tuple[Loss, ...]] = {
    "label": (LabelLoss(kind="label"),),
    "kd": (KdLoss(kind="kd"),),
    "kd-unlabelled": (KdLoss(kind="kd", nodes="unlabelled", temperature=2.0),),
    "lsp-hidden": (lsp(1),),
    "lsp-last": (lsp(-1),),
    "lsp-edges": (lsp(1, reduction="edges", direction="teacher||student", kernel="cosine", outer_softmax=True),),
    "all": (LabelLoss(kind="label"), KdLoss(kind="kd", weight=0.5), lsp(-1, weight=0.3)),
}


def auto(losses: tuple[Loss, ...], **distill: object) -> int:
    """What ``halo_hops: auto`` stands for."""
    model = {"kind": "gcn", "layers": LAYERS}
    values = {
        "run": "r",
        "graph": {"source": {"kind": "synthetic"}},
        "teacher": {"model": {"kind": "sage", "layers": 2}, "checkpoint": "t"},
        "student": {"model": model},
        "losses": [loss.model_dump() for loss in losses],
        "distill": distill,
    }
    return Config.model_validate(values).halo_hops()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Storage]:
    """By hops of halo."""
    return {h: uneven_world(tmp_path_factory.mktemp(f"hops-{h}"), h, SPARSE) for h in (1, 2, 3)}


def task_on(storage: Storage, losses: tuple[Loss, ...], kind: str) -> TrainTask:
    heads = {"heads": 2} if kind == "gat" else {}
    task = make_task(storage, "halo", kind=kind, layers=LAYERS, dropout=0.3, input_dropout=0.2, **heads)
    return replace(task, losses=losses)


def whole_batch(storage: Storage) -> Batch:
    """The graph in its own order, with what its teacher says about it."""
    graph, _ = uneven_graph(SPARSE)
    local = LocalGraph.from_edge_index(graph.edge_index, graph.num_nodes)
    local.num_owned = graph.num_nodes
    model = read_model(storage.child("teacher"))[0].eval()
    with torch.no_grad():
        logits, layers = forward_layers(model, graph.x, local, [1])
    scores = {(1, metric): edge_scores(layers[1], local.edge_index, metric) for metric in ("sqeuclidean", "cosine")}
    masks = (graph.train_mask, graph.val_mask, graph.test_mask)
    return Batch(0, local, graph.x, graph.y, *masks, torch.arange(graph.num_nodes), graph.num_nodes, logits, scores)


def in_units(task: TrainTask, parts_per_unit: int | str, hops: int | None = None) -> list[Batch]:
    units = plan_units(task.graph.num_parts, parts_per_unit, part_costs(task.graph.manifest))
    loader = UnitLoader(task.graph, task.knowledge, units, teacher_wants(task.losses, 2), hops)
    return [loader.load(unit) for unit in range(len(units))]


def error(task: TrainTask, batches: list[Batch], expected: Batch) -> float:
    """Largest relative difference of the terms' values and of any parameter's gradient, 0 where it is rounding."""
    (report, grads), (whole, exact) = one_step(task, batches, World()), one_step(task, [expected], World())
    pairs = [(grads[name], exact[name]) for name in exact] + [(report.means, whole.means)]
    errors = [(float((found - value).norm()), float(value.norm())) for found, value in pairs]
    return max(0.0 if difference <= 1e-7 else difference / size for difference, size in errors)


@pytest.mark.parametrize(
    "kind", ["gcn", "gat", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sage", "gin"))]
)
@pytest.mark.parametrize("term", TERMS)
def test_as_many_hops_as_auto_says_are_enough(stores, term, kind):
    losses = TERMS[term]
    storage = stores[auto(losses)]
    task = task_on(storage, losses, kind)
    for parts_per_unit in (1, 2, "all"):
        assert error(task, in_units(task, parts_per_unit), whole_batch(storage)) <= 1e-5, parts_per_unit


@pytest.mark.parametrize("term", ["label", "kd", "lsp-hidden", "lsp-last"])
def test_one_hop_less_is_not(stores, term):
    losses = TERMS[term]
    needed = auto(losses)
    storage = stores[needed - 1]
    task = task_on(storage, losses, "gcn")
    assert error(task, in_units(task, 1), whole_batch(storage)) > 1e-3
    assert error(task, in_units(task, "all"), whole_batch(storage)) <= 1e-5  # nothing is cut any more


def test_auto_by_hand():
    assert auto(TERMS["label"]) == auto(TERMS["kd"]) == LAYERS
    assert auto(TERMS["lsp-hidden"]) == 2
    assert auto(TERMS["lsp-last"]) == auto(TERMS["all"]) == LAYERS + 1
    assert {auto(losses, halo="exchange") for losses in TERMS.values()} == {1}
