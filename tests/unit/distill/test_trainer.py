"""The loop in one process: resume is bit for bit, errors stop before the optimizer, units add up."""

from __future__ import annotations

import pytest
import torch

from gkd_dist.config import DistillConfig, TrainConfig
from gkd_dist.distill.checkpoint import committed_steps
from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.step import seeded, train_step
from gkd_dist.distill.task import TrainTask, build_objective, is_trained, teacher_wants
from gkd_dist.distill.torch_engine import TorchEngine
from gkd_dist.distill.trainer import Trainer
from gkd_dist.distill.wishes import Wishes
from gkd_dist.errors import NonFiniteLossError, StorageError, TerminatedError
from gkd_dist.models.build import build_model
from gkd_dist.models.io import read_model
from gkd_dist.storage import Storage
from gkd_dist.stream.units import UnitLoader
from gkd_dist.world import World
from tests.training import LOSSES, make_task, small_world


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


class StopAtError(Exception):
    """Stands for a process that is killed."""


def run(task: TrainTask, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    trainer = Trainer(task, World(), torch_factory(task.train, World()))
    if stop_after is not None:
        save = trainer._save

        def stop() -> None:
            save()
            if trainer.state.global_step == stop_after:
                raise StopAtError

        trainer._save = stop
    trainer.run()
    return read_model(task.output)[0].state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_killed_run_ends_with_the_same_bits(storage, stop_after, norm):
    whole = run(make_task(storage, f"whole-{norm}", norm=norm))
    broken = make_task(storage, f"broken-{norm}-{stop_after}", norm=norm)
    with pytest.raises(StopAtError):
        run(broken, stop_after)
    assert not is_trained(broken.output, broken.fingerprint)
    assert same(run(broken), whole)
    assert is_trained(broken.output, broken.fingerprint)


def test_training_lowers_the_loss_and_reports_it(storage):
    seen: list[tuple[int, float]] = []

    class Watcher:
        def step(self, step, report, names, extra):
            assert names == ["label", "kd", "lsp"]
            seen.append((step, report.total))

        def evaluation(self, step, epoch, metrics, state):
            assert set(metrics) == {"train", "val", "test"}

    task = make_task(storage, "watched", TrainConfig(epochs=30, lr=0.02), dropout=0.0)
    trainer = Trainer(task, World(), torch_factory(task.train, World()), Watcher())
    summary = trainer.run()
    assert [step for step, _ in seen] == list(range(1, 31))
    assert seen[-1][1] < 0.8 * seen[0][1]
    assert summary.epochs_run == 30


def test_early_stopping_keeps_the_best(storage):
    task = make_task(storage, "early", TrainConfig(epochs=50, lr=1e-9, patience=2), dropout=0.0)
    trainer = Trainer(task, World(), torch_factory(task.train, World()))
    summary = trainer.run()
    assert (summary.epochs_run, summary.best_epoch) == (3, 0)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(storage):
    task = make_task(storage, "nan")
    engine = TorchEngine(build_model(task.model, 5, 3), task.train, torch.device("cpu"))
    with torch.no_grad():
        next(iter(engine.module.parameters())).fill_(float("nan"))
    before = engine.model_state()
    batch = UnitLoader(task.graph, task.knowledge, [(0,)], teacher_wants(LOSSES, 2)).load(0)
    with pytest.raises(NonFiniteLossError, match="loss label, kd, lsp is not finite in epoch 0, step 0"):
        train_step(engine, build_objective(task), [batch], World(), seed=0, epoch=0, step=0)
    after = engine.model_state()
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)


def gradients(task: TrainTask, units: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Gradient of one step in float64-free fp32, without an update."""
    with seeded(torch.device("cpu"), 7):
        model = build_model(task.model, 5, 3).train()
    engine = TorchEngine(model, task.train, torch.device("cpu"))
    grads: dict[str, torch.Tensor] = {}

    def keep() -> None:
        grads.update({name: p.grad.clone() for name, p in engine.module.model.named_parameters()})

    engine.step = keep
    loader = UnitLoader(task.graph, task.knowledge, units, teacher_wants(LOSSES, 2))
    batches = [loader.load(index) for index in range(len(units))]
    train_step(engine, build_objective(task), batches, World(), seed=0, epoch=0, step=0)
    return grads


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin", "mlp"])
def test_gradients_do_not_know_how_the_graph_was_cut(storage, kind, dropout):
    """C2a: parts one by one, merged in pairs, and the whole graph as one unit, with dropout as well."""
    task = make_task(storage, kind=kind, dropout=dropout, input_dropout=dropout)
    whole = gradients(task, [(0, 1, 2)])
    for units in ([(0,), (1,), (2,)], [(0, 2), (1,)]):
        parts = gradients(task, units)
        for name, expected in whole.items():
            error = (parts[name] - expected).norm()
            assert error <= max(1e-5 * expected.norm(), 1e-7), name


def test_dropout_by_unit_is_noticed_by_that_check(storage):
    task = make_task(storage, kind="gcn", dropout=0.4, dropout_mask="unit")
    whole, parts = gradients(task, [(0, 1, 2)]), gradients(task, [(0,), (1,), (2,)])
    name = "convs.0.lin.weight"
    assert (parts[name] - whole[name]).norm() > 1e-2 * whole[name].norm()


def test_too_little_halo_is_noticed_by_that_check(tmp_path):
    storage = small_world(tmp_path, halo_hops=1)
    task = make_task(storage, kind="gcn", dropout=0.0)
    whole, parts = gradients(task, [(0, 1, 2)]), gradients(task, [(0,), (1,), (2,)])
    name = "convs.0.lin.weight"
    assert (parts[name] - whole[name]).norm() > 1e-3 * whole[name].norm()


def test_randomness_depends_on_its_counters_alone():
    def draw(*counters: int) -> torch.Tensor:
        with seeded(torch.device("cpu"), *counters):
            return torch.rand(3)

    first = draw(1, 2, 3)
    torch.rand(5)
    assert torch.equal(draw(1, 2, 3), first)
    assert not torch.equal(draw(1, 2, 4), first)


def test_one_that_is_asked_to_stop_keeps_its_last_step_and_goes_on_from_there(storage):
    whole = run(make_task(storage, "whole-stop"))
    train = DistillConfig(epochs=4, units_per_step=2, checkpoint_every=100, num_workers=1, launcher="inline")
    task, wishes = make_task(storage, "stopped", train), Wishes()

    class Watcher:
        def step(self, step, report, names, extra):
            if step == 3:
                wishes.ask_to_stop()  # is agreed on in step 4

        def evaluation(self, step, epoch, metrics, state): ...

    trainer = Trainer(task, World(), torch_factory(train, World()), Watcher(), wishes)
    with pytest.raises(TerminatedError, match=r"after step 4, which is kept; run the same command again"):
        trainer.run()
    assert not is_trained(task.output, task.fingerprint)
    again = Trainer(task, World(), torch_factory(train, World()))
    assert again.resumed_from == 4
    again.run()
    assert same(read_model(task.output)[0].state_dict(), whole)


def test_one_that_is_asked_to_save_goes_on(storage):
    train = DistillConfig(epochs=4, units_per_step=2, checkpoint_every=100, num_workers=1, launcher="inline")
    task, wishes = make_task(storage, "saved", train), Wishes()
    wishes.ask_to_save()
    Trainer(task, World(), torch_factory(train, World()), None, wishes).run()
    assert committed_steps(task.output) == [1]
    assert is_trained(task.output, task.fingerprint)


def test_a_checkpoint_that_cannot_be_written_ends_training(storage, monkeypatch):
    task, write = make_task(storage, "full"), Storage.write

    def full(self: Storage, key: str, data: object) -> None:
        if "step-00000002/state-" in key:
            raise StorageError(f"cannot write {self.describe(key)}: no space left; make room")
        write(self, key, data)

    monkeypatch.setattr(Storage, "write", full)
    with pytest.raises(StorageError, match=r"step-00000002/state-\w+\.safetensors: no space left"):
        run(task)
    assert committed_steps(task.output) == [1]
