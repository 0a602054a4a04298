"""Projection heads: where one is needed, trained and resumed with the student, and no part of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gkd_dist.config import Config, FitnetLoss, LabelLoss
from gkd_dist.distill.heads import HeadSpec, plan_heads, with_heads
from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.module import StudentModule
from gkd_dist.distill.step import seeded, train_step
from gkd_dist.distill.task import TrainTask, build_objective, teacher_wants
from gkd_dist.distill.torch_engine import TorchEngine
from gkd_dist.distill.trainer import Trainer
from gkd_dist.errors import ConfigError, StudentError
from gkd_dist.models.build import build_model
from gkd_dist.models.io import load_model, read_model, read_model_document
from gkd_dist.stream.units import UnitLoader
from gkd_dist.world import World
from tests.training import LOSSES, make_task, small_world

HINT = FitnetLoss(kind="fitnet", teacher_layer=1, student_layer=1)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"), embeddings=(1,))


def task_of(storage, name: str, *losses, **model) -> TrainTask:
    return replace(make_task(storage, name, **model), losses=(*LOSSES, *(losses or (HINT,))))


class StopAtError(Exception):
    """Stands for a process that is killed."""


def trained(task: TrainTask, stop_after: int | None = None) -> Trainer:
    trainer = Trainer(task, World(), torch_factory(task.train, World()))
    save = trainer._save

    def stop() -> None:
        save()
        if trainer.state.global_step == stop_after:
            raise StopAtError

    trainer._save = stop
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    ("projection", "widths", "expected"),
    [("auto", (6, 8), True), ("auto", (8, 8), False), ("linear", (8, 8), True), ("none", (8, 8), False)],
)
def test_where_there_is_one(projection: str, widths: tuple[int, int], expected: bool) -> None:
    loss = HINT.model_copy(update={"projection": projection})
    (head,) = plan_heads((LabelLoss(kind="label"), loss), 2, {1: widths[0], 2: 3}, {"fitnet": widths[1]})
    assert (head.name, head.layer, head.projects) == ("fitnet", 1, expected)
    assert head.num_params == (widths[1] * (widths[0] + 1) if expected else 0)
    assert head.num_params == sum(p.numel() for p in head.build(0).parameters())


def test_other_widths_without_a_projection_are_refused() -> None:
    loss = HINT.model_copy(update={"projection": "none"})
    with pytest.raises(ConfigError, match=r"layer 1 of the student is 6 wide and layer 1 of the teacher 8; set proj"):
        plan_heads((loss,), 2, {1: 6, 2: 3}, {"fitnet": 8})


def test_weights_depend_on_seed_and_name_alone() -> None:
    spec = HeadSpec("fitnet", 1, 4, 5, True)
    first = spec.build(7)
    torch.rand(3)
    assert torch.equal(first.weight, spec.build(7).weight)
    assert not torch.equal(first.weight, spec.build(8).weight)
    assert not torch.equal(first.weight, replace(spec, name="fitnet_1").build(7).weight)


def test_a_model_with_that_parameter_is_refused() -> None:
    model = nn.Module()
    model.heads = nn.ModuleDict({"fitnet": nn.Linear(2, 2)})
    with pytest.raises(StudentError, match="rename the model's heads"):
        StudentModule(model, {"fitnet": nn.Linear(2, 2)}, {"fitnet": 1})


def test_the_head_is_trained_and_the_student_starts_as_it_would_without(storage) -> None:
    task = task_of(storage, "trained")
    start = Trainer(task, World(), torch_factory(task.train, World())).engine
    alone = Trainer(make_task(storage, "without"), World(), torch_factory(task.train, World())).engine
    assert all(torch.equal(start.model_state()[name], value) for name, value in alone.model_state().items())
    trainer = trained(task)
    before, after = start.head_state(), trainer.engine.head_state()
    assert set(after) == {"fitnet.weight", "fitnet.bias"}
    assert all((before[name] - after[name]).abs().max() > 1e-4 for name in before)


def test_it_is_no_part_of_what_is_stored_but_counted_apart(storage) -> None:
    task = task_of(storage, "stored")
    trained(task)
    document = read_model_document(task.output)
    model, _ = read_model(task.output)
    assert set(load_model(task.output.url).state_dict()) == set(build_model(task.model, 5, 3).state_dict())
    assert document["num_params"] == sum(p.numel() for p in model.parameters())
    assert document["meta"]["summary"]["extra"]["num_head_params"] == 8 * (6 + 1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_killed_run_goes_on_with_the_same_head(storage, optimizer: str) -> None:
    task = task_of(storage, f"whole-{optimizer}")
    task = replace(task, train=task.train.model_copy(update={"optimizer": optimizer}))
    whole = trained(task)
    broken = replace(task, output=storage.child(f"students/broken-{optimizer}"))
    with pytest.raises(StopAtError):
        trained(broken, stop_after=3)
    resumed = trained(broken)
    assert resumed.resumed_from == 3
    for state in ("model_state", "head_state", "optimizer_state"):
        first, second = getattr(whole.engine, state)(), getattr(resumed.engine, state)()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), state
    assert any(key.startswith("heads.fitnet.weight/") for key in resumed.engine.optimizer_state())


def gradients(task: TrainTask, units: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    with seeded(torch.device("cpu"), 7):
        model = build_model(task.model, 5, 3).train()
    student = with_heads(model, (HeadSpec("fitnet", 1, 6, 8, True),), 0)
    engine = TorchEngine(student, task.train, torch.device("cpu"))
    grads: dict[str, torch.Tensor] = {}
    engine.step = lambda: grads.update({name: p.grad.clone() for name, p in student.named_trained()})
    loader = UnitLoader(task.graph, task.knowledge, units, teacher_wants(task.losses, 2))
    batches = [loader.load(index) for index in range(len(units))]
    train_step(engine, build_objective(task), batches, World(), seed=0, epoch=0, step=0)
    return grads


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_do_not_know_how_the_graph_was_cut(storage, normalize: bool) -> None:
    """C2a, the head's own gradients included."""
    task = task_of(storage, "cut", HINT.model_copy(update={"normalize": normalize}), dropout=0.0)
    whole = gradients(task, [(0, 1, 2)])
    assert "heads.fitnet.weight" in whole
    for units in ([(0,), (1,), (2,)], [(0, 2), (1,)]):
        parts = gradients(task, units)
        for name, expected in whole.items():
            assert (parts[name] - expected).norm() <= max(1e-5 * expected.norm(), 1e-7), name


def test_several_teachers_share_the_weight_and_have_a_head_each() -> None:
    teachers = [{"name": name, "model": {"kind": "gcn", "layers": layers}} for name, layers in (("a", 2), ("b", 3))]
    config = Config.model_validate(
        {
            "run": "/data/run",
            "graph": {"source": {"kind": "synthetic"}},
            "teachers": teachers,
            "student": {"model": {"kind": "gcn"}},
            "losses": [{"kind": "label"}, {"kind": "fitnet", "weight": 3.0}],
        }
    )
    losses = config.student_losses()
    assert [(loss.teacher, loss.weight) for loss in losses if isinstance(loss, FitnetLoss)] == [("a", 1.5), ("b", 1.5)]
    assert teacher_wants(losses, {"a": 2, "b": 3}).embeddings == {(1, "a"), (2, "b")}
    heads = plan_heads(losses, 2, {1: 6, 2: 3}, {"fitnet": 8, "fitnet_1": 6})
    assert [(head.name, head.projects) for head in heads] == [("fitnet", True), ("fitnet_1", False)]
