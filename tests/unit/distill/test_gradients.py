"""Norms of the terms' gradients: by hand, whatever the batches, and a term that does nothing is named."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from gkd_dist.config import DistillConfig, LabelLoss, LspLoss
from gkd_dist.distill.gradients import gradient_squares, measures_gradients
from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.step import train_step
from gkd_dist.distill.task import build_objective, teacher_wants
from gkd_dist.distill.torch_engine import TorchEngine
from gkd_dist.distill.trainer import Trainer
from gkd_dist.models.build import build_model
from gkd_dist.stream.units import UnitLoader
from gkd_dist.world import World
from tests.training import make_task, small_world


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


def test_squares_of_the_label_term_by_hand(storage):
    """Cross-entropy at logits 0 of 3 classes: the gradient of a labelled node is 1/3 off its class and −2/3 on it."""
    task = make_task(storage, "by-hand")
    batch = UnitLoader(task.graph, task.knowledge, [(0,)], teacher_wants(task.losses, 2)).load(0)
    objective = build_objective(replace(task, losses=(LabelLoss(kind="label"), LspLoss(kind="lsp", weight=0.0))))
    nodes = batch.graph.num_nodes
    z = torch.zeros(nodes, 6, requires_grad=True)
    logits = torch.zeros(nodes, 3, requires_grad=True) + 0 * z.sum()
    squares = gradient_squares(objective, batch, logits, {1: z}, 0)
    labelled = int(batch.train_mask.sum())
    assert labelled > 0
    assert squares.tolist() == [pytest.approx(labelled * 6 / 9), 0.0]
    assert z.grad is None


def test_epochs_that_are_looked_at():
    assert [epoch for epoch in range(20) if measures_gradients(epoch, 0)] == [0, 1, 2, 4, 8, 16]
    assert not measures_gradients(0, 1)


def norms_and_weights(task, units, measure):
    """Norms of one step over ``units``, each a batch, and the weights after it."""
    wants = teacher_wants(task.losses, task.teacher_layers)
    loader = UnitLoader(task.graph, task.knowledge, units, wants)
    torch.manual_seed(0)
    engine = TorchEngine(build_model(task.model, loader.num_features, 3), task.train, torch.device("cpu"))
    objective = build_objective(task)
    batches = [loader.load(index) for index in range(len(units))]
    report = train_step(engine, objective, batches, World(), seed=0, epoch=0, step=0, measure_gradients=measure)
    return report.grad_norms(objective.names), engine.model_state()


def test_they_change_nothing_and_add_up_over_units(storage):
    task = make_task(storage, "norms", dropout=0.0)
    measured, weights = norms_and_weights(task, [(0,), (1,), (2,)], True)
    unmeasured, expected = norms_and_weights(task, [(0,), (1,), (2,)], False)
    assert unmeasured == {}
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    # One unit of all parts: terms of nodes give the same. In those of edges halo nodes meet their owners,
    # whose gradients add up before they are squared.
    whole, _ = norms_and_weights(task, [(0, 1, 2)], True)
    assert list(whole) == ["label", "kd", "lsp"]
    assert measured["label"] == pytest.approx(whole["label"], rel=1e-5)
    assert measured["kd"] == pytest.approx(whole["kd"], rel=1e-5)
    assert measured["lsp"] == pytest.approx(whole["lsp"], rel=0.5)


class Tags:
    """Keeps what would go to TensorBoard."""

    def __init__(self):
        self.norms = {}

    def step(self, step, report, names, extra):
        norms = {key: value for key, value in extra.items() if key.startswith("grad_norm/")}
        if norms:
            self.norms[step] = norms

    def evaluation(self, step, epoch, metrics, state):
        pass


@pytest.mark.parametrize(("sigma", "inert"), [(1.0, False), (1.0e4, True)])
def test_an_inert_term_is_named_once_in_training(storage, caplog, sigma, inert):
    train = DistillConfig(epochs=5, units_per_step=2, num_workers=1, launcher="inline", patience=0, log_every=100)
    task = make_task(storage, f"sigma-{sigma}", train, dropout=0.0)
    task = replace(task, losses=(LabelLoss(kind="label"), LspLoss(kind="lsp", sigma=sigma)))
    watcher = Tags()
    with caplog.at_level(logging.WARNING, logger="gkd_dist.distill.trainer"):
        Trainer(task, World(), torch_factory(train, World()), watcher).run()
    warnings = [record.getMessage() for record in caplog.records if "is inert" in record.getMessage()]
    assert len(warnings) == inert
    assert not inert or "loss lsp is inert: its gradient norm" in warnings[0]
    assert list(watcher.norms) == [1, 3, 5, 9]  # two steps an epoch: the first of epochs 0, 1, 2 and 4
    assert all(norms.keys() == {"grad_norm/label", "grad_norm/lsp"} for norms in watcher.norms.values())
    assert (watcher.norms[1]["grad_norm/lsp"] < 1e-6 * watcher.norms[1]["grad_norm/label"]) == inert
