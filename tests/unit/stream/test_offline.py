"""C3: what a student learns from stored scores is what it would learn from the teacher beside it.

The teacher runs over the whole graph in this process; the scores come through the real inference, the real
stores and the real loader, part by part, in every dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import pytest
import torch
from infer_worlds import World, make_graph
from torch import Tensor

from gkd_dist.config import InferConfig, Loss, LspLoss
from gkd_dist.graph import Batch
from gkd_dist.infer.packing import Packing
from gkd_dist.infer.plan import Wants as Stored
from gkd_dist.infer.run import infer_nodes
from gkd_dist.losses import lsp_loss
from gkd_dist.losses.bounds import lsp_bound
from gkd_dist.losses.kernels import Kernel
from gkd_dist.losses.objective import Objective
from gkd_dist.losses.scores import edge_scores
from gkd_dist.stream.knowledge import Wants
from gkd_dist.stream.units import UnitLoader

LAYERS, LAYER, WIDTH = 3, 2, 7
DTYPES = ("fp32", "fp16", "bf16", "uint8")
Direction = Literal["student||teacher", "teacher||student"]


def losses_of(direction: Direction) -> tuple[LspLoss, ...]:
    """One term per kernel whose metric differs, and per form of the softmax."""
    options: list[dict[str, Any]] = [
        {"kernel": "rbf", "sigma": 4.0, "outer_softmax": True},
        {"kernel": "rbf", "sigma": 4.0, "outer_softmax": False, "self_loops": True},
        {"kernel": "laplacian", "sigma": 3.0, "outer_softmax": False},
        {"kernel": "cosine"},
        {"kernel": "linear"},
    ]
    more = {"teacher_layer": LAYER, "student_layer": 1, "direction": direction}
    return tuple(LspLoss.model_validate({"kind": "lsp", **option, **more}) for option in options)


@dataclass(frozen=True)
class Taught:
    """A stored teacher, and what it computes at every node when it runs beside the student."""

    loader: UnitLoader
    bounds: list[dict[str, Any]]
    live: Tensor


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Taught]:
    found: dict[str, Taught] = {}
    for dtype in DTYPES:
        world = World(tmp_path_factory.mktemp(dtype), make_graph())
        graph, (model, module) = world.cut(3, halo_hops=2), world.model("sage", layers=LAYERS)
        settings = InferConfig.model_validate({"num_actors": 0, "dtype": "fp32", "scores_dtype": dtype})
        losses: tuple[Loss, ...] = (*losses_of("student||teacher"), *losses_of("teacher||student"))
        metrics = {"sqeuclidean", "manhattan", "cosine", "dot"}
        out = world.storage("knowledge")
        manifest = infer_nodes(
            model,
            graph,
            out,
            Stored(True, {LAYER: metrics}),
            settings,
            fingerprint="k" * 64,
            packing=Packing.of(settings, losses, LAYERS),
        )
        wants = Wants.of(scores={(LAYER, metric) for metric in metrics})
        loader = UnitLoader(graph, (out, manifest), [(0, 2), (1,)], wants)
        with torch.no_grad():
            outputs = module(world.graph.x, world.graph.edge_index, layers=(LAYER,))
        found[dtype] = Taught(loader, manifest.meta["bounds"], outputs[1][LAYER])
    return found


def offline(loss: LspLoss, batch: Batch, student: Tensor) -> Tensor:
    """The term as training computes it, from the scores of the batch."""
    objective = Objective((loss,), "multiclass", LAYERS, 2, {})
    total, count = objective.sums(batch, student, {1: student}, 0), objective.counts(batch)
    return (total / count)[0]


def online(loss: LspLoss, batch: Batch, student: Tensor, teacher: Tensor) -> Tensor:
    """The same with the teacher at hand: its outputs at the nodes of the batch, edges of owned nodes."""
    owned = batch.graph.edge_index[:, : batch.num_owned_edges]
    return lsp_loss(
        student,
        owned,
        teacher_z=teacher[batch.n_id],
        kernel=loss.kernel,
        sigma=cast(float, loss.sigma),
        direction=loss.direction,
        outer_softmax=loss.outer_softmax,
        self_loops=loss.self_loops,
    )


def widest_gap(kernel: Kernel, loss: LspLoss, batch: Batch, student: Tensor, teacher: Tensor) -> float:
    """Largest difference of two a_j − b_j over all neighbourhoods, found by looking at them."""
    owned = batch.graph.edge_index[:, : batch.num_owned_edges]
    sigma = cast(float, loss.sigma)
    a = kernel.logits(edge_scores(teacher[batch.n_id], owned, kernel.metric), sigma)
    b = kernel.logits(edge_scores(student, owned, kernel.metric), sigma)
    gaps = [(a - b)[owned[1] == node] for node in owned[1].unique()]
    return max(float(gap.max() - gap.min()) for gap in gaps)


@pytest.mark.parametrize("direction", ["student||teacher", "teacher||student"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_scores_teach_what_the_live_teacher_teaches(
    stored: dict[str, Taught], dtype: str, direction: Direction
) -> None:
    taught, largest = stored[dtype], 0.0
    bounds = [bound for bound in taught.bounds if bound["direction"] == direction]
    for unit in range(2):
        batch = taught.loader.load(unit)
        student = torch.randn(batch.n_id.numel(), WIDTH, generator=torch.Generator().manual_seed(unit))
        for loss, bound in zip(losses_of(direction), bounds, strict=True):
            found, expected = offline(loss, batch, student), online(loss, batch, student, taught.live)
            rounding = 1e-5 * max(1.0, float(expected))
            kernel = Kernel(loss.kernel, loss.outer_softmax, loss.c, loss.degree, loss.temperature)
            argument = bound["argument_bound"]
            allowed = lsp_bound(direction, argument, widest_gap(kernel, loss, batch, student, taught.live) + argument)
            assert bound["lsp_bound"] is None or allowed <= bound["lsp_bound"] + rounding
            error = abs(float(found - expected))
            assert error <= allowed + rounding, (loss.kernel, unit)
            largest = max(largest, error)
            assert expected > 1e-3, "a term without structure would prove nothing"
    assert (largest > 1e-5) == (dtype != "fp32"), "scores in few bits have to differ, and those in fp32 must not"
