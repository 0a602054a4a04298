"""Training with sampled neighbours: the same samples however the graph is cut, resumed alike, evaluated on all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gkd_dist.config import DistillConfig, KdLoss, LabelLoss, LspLoss
from gkd_dist.config_file import parse_config
from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.step import seeded, train_step
from gkd_dist.distill.task import TrainTask, build_objective, teacher_wants
from gkd_dist.distill.torch_engine import TorchEngine
from gkd_dist.distill.trainer import Trainer
from gkd_dist.errors import ConfigError, ModelError
from gkd_dist.fingerprints import student_fingerprint
from gkd_dist.graph import Batch
from gkd_dist.models.build import build_model
from gkd_dist.models.trainable import sampler_for
from gkd_dist.sampling import ALL, Sampler
from gkd_dist.stream.units import UnitLoader
from gkd_dist.world import World
from tests.training import make_task, small_world
from tests.user_models import Plain

LSP = LspLoss(kind="lsp", weight=0.3, outer_softmax=False, sigma=1.0, teacher_sigma="median")


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


def task_of(storage, name: str, fan_out: tuple[int, ...] | None, lsp: int | None = None, **model) -> TrainTask:
    train = DistillConfig(
        epochs=4, units_per_step=2, checkpoint_every=1, num_workers=1, launcher="inline", fan_out=fan_out
    )
    losses = (LabelLoss(kind="label"), KdLoss(kind="kd"), LSP.model_copy(update={"fan_out": lsp}))
    return replace(make_task(storage, name, train, **model), losses=losses)


class Spy(TorchEngine):
    """Keeps gradients in place of a step, and the batches that it was given."""

    def forward(self, batch: Batch, outputs):
        self.batches = [*getattr(self, "batches", []), batch]
        return super().forward(batch, outputs)

    def step(self) -> None:
        self.grads = {name: p.grad.clone() for name, p in self.module.named_trained()}


def one_step(task: TrainTask, units: list[tuple[int, ...]], step: int = 0) -> tuple[Spy, object]:
    with seeded(torch.device("cpu"), 7):
        model = build_model(task.model, 5, 3).train()
    engine = Spy(model, task.train, torch.device("cpu"))
    loader = UnitLoader(task.graph, task.knowledge, units, teacher_wants(task.losses, 2))
    batches = [loader.load(index) for index in range(len(units))]
    sampler = sampler_for(model, task.train.fan_out)
    report = train_step(engine, build_objective(task), batches, World(), seed=0, epoch=0, step=step, sampler=sampler)
    return engine, report


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin"])
@pytest.mark.parametrize("lsp", [None, 2])
def test_gradients_do_not_know_how_the_graph_was_cut(storage, kind: str, lsp: int | None) -> None:
    """C2a with samples of the layers and of the loss, and with dropout by nodes."""
    task = task_of(storage, "cut", (3, 2), lsp, kind=kind, dropout=0.3)
    whole, expected = one_step(task, [(0, 1, 2)])
    full, _ = one_step(task_of(storage, "cut", None, kind=kind, dropout=0.3), [(0, 1, 2)])
    assert any((whole.grads[name] - full.grads[name]).norm() > 0.01 * full.grads[name].norm() for name in full.grads)
    for units in ([(0,), (1,), (2,)], [(0, 2), (1,)]):
        parts, report = one_step(task, units)
        torch.testing.assert_close(report.sums, expected.sums, rtol=1e-5, atol=1e-5)
        for name, value in whole.grads.items():
            assert (parts.grads[name] - value).norm() <= max(1e-5 * value.norm(), 1e-7), name


def test_all_neighbours_by_number_are_all_neighbours(storage) -> None:
    full, expected = one_step(task_of(storage, "full", None, dropout=0.0), [(0, 1), (2,)])
    for fan_out, lsp in (((ALL, ALL), None), ((99, 99), 99)):
        found, report = one_step(task_of(storage, "full", fan_out, lsp, dropout=0.0), [(0, 1), (2,)])
        torch.testing.assert_close(report.sums, expected.sums)
        for name, value in full.grads.items():
            assert (found.grads[name] - value).norm() <= max(1e-5 * value.norm(), 1e-7), name


def test_fewer_nodes_are_computed_and_others_in_every_step(storage) -> None:
    task = task_of(storage, "few", (1, 1), 1)
    (first,), (second,) = (one_step(task, [(0,)], step)[0].batches for step in (0, 1))
    layers, others = first.graph.layers, second.graph.layers
    assert layers.sizes[2] == first.num_owned
    assert layers.sizes[0] < first.graph.num_nodes
    assert all(graph.num_edges <= size for graph, size in zip(layers.graphs, layers.sizes[1:], strict=True))
    assert not torch.equal(layers.nodes, others.nodes)
    full = one_step(task_of(storage, "few", (1, 1), None), [(0,)])[0].batches[0].graph.layers
    assert full.sizes[1] > layers.sizes[1], "a loss that reads all neighbours needs their rows"


def test_with_all_neighbours_the_layers_are_found_once(storage) -> None:
    task = task_of(storage, "kept", (ALL, ALL), dropout=0.3)
    loader = UnitLoader(task.graph, task.knowledge, [(0,)], teacher_wants(task.losses, 2))
    batch, sampler, seen = loader.load(0), Sampler((ALL, ALL), True), []
    for key, draws in ((1, False), (2, False), (2, True)):
        noisy = batch.with_noise(key)
        seen.append(sampler.sample(noisy, build_objective(task).nodes(noisy), draws=draws).graph.layers)
    assert seen[0].nodes is seen[1].nodes
    assert seen[2].nodes is not seen[1].nodes
    assert [layers.graphs[0].noise.key for layers in seen] == [1, 2, 2]
    assert build_objective(task).draws is False
    assert build_objective(task_of(storage, "kept", None, 3)).draws is True


def trained(task: TrainTask) -> Trainer:
    trainer = Trainer(task, World(), torch_factory(task.train, World()))
    trainer.run()
    return trainer


def test_validation_looks_at_all_neighbours(storage) -> None:
    task = task_of(storage, "validated", (1, 1))
    trainer = Trainer(task, World(), torch_factory(task.train, World()))
    forward, seen = trainer.engine.forward, []

    def spy(batch, outputs):
        if batch.num_owned:
            seen.append((trainer.engine.module.training, batch.graph.layers is not None))
        return forward(batch, outputs)

    trainer.engine.forward = spy
    trainer.run()
    assert set(seen) == {(True, True), (False, False)}


def test_a_killed_run_ends_with_the_same_bits(storage) -> None:
    class StopAtError(Exception):
        pass

    whole = trained(task_of(storage, "whole", (2, 2), 2))
    task = replace(task_of(storage, "broken", (2, 2), 2), fingerprint="f-broken")
    broken = Trainer(task, World(), torch_factory(task.train, World()))
    save = broken._save

    def stop() -> None:
        save()
        if broken.state.global_step == 3:
            raise StopAtError

    broken._save = stop
    with pytest.raises(StopAtError):
        broken.run()
    resumed = trained(task)
    assert resumed.resumed_from == 3
    first, second = whole.engine.model_state(), resumed.engine.model_state()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- configuration ---------------------------------------------------------------------------

YAML = """
run: /data/run
graph: {source: {kind: synthetic, num_nodes: 100}}
teacher: {model: {kind: gcn}}
student: {model: {kind: gcn, layers: 2}}
losses: [{kind: label}, {kind: lsp}]
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.fan_out=[5]"], "has 1 numbers for a student of 2 layers; give one for each layer, from the last"),
        (["distill.fan_out=[5, 0]"], "fan_out"),
        (["distill.fan_out=[5, -2]"], "fan_out"),
        (["distill.fan_out=[5, 5]", "student.model.kind=mlp"], "not for an mlp; set it to null"),
        (["losses.1.fan_out=0"], "fan_out"),
    ],
)
def test_wrong_numbers_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(YAML, overrides=overrides)


def test_a_model_that_runs_as_a_whole_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Plain has no layers .*or set distill.fan_out=null"):
        sampler_for(Plain(5, 3), (3, 2))
    assert sampler_for(Plain(5, 3), None) is None


def test_results_of_before_stay_and_others_are_others() -> None:
    plain = student_fingerprint(parse_config(YAML), "k")
    assert plain == student_fingerprint(parse_config(YAML, overrides=["distill.fan_out=null"]), "k")
    others = [["distill.fan_out=[5, 5]"], ["distill.fan_out=[5, -1]"], ["losses.1.fan_out=5"]]
    found = {student_fingerprint(parse_config(YAML, overrides=given), "k") for given in others}
    assert len(found | {plain}) == 4
