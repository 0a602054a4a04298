"""Training with parts that stay on their ranks, in a world of one: the whole graph, with nothing to exchange."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gkd_dist.config import DistillConfig
from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.resident import WholeGraphPlan
from gkd_dist.distill.task import TrainTask
from gkd_dist.distill.trainer import Trainer
from gkd_dist.errors import ModelError
from gkd_dist.models.io import read_model
from gkd_dist.storage import Storage
from gkd_dist.stream.order import Position
from gkd_dist.world import World
from tests.training import LOSSES, make_task, small_world


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return small_world(tmp_path_factory.mktemp("world"), halo_hops=1)


class StopError(Exception):
    """Stands for a process that is killed."""


def train(task: TrainTask, stop_after: int | None = None) -> dict[str, Tensor]:
    trainer = Trainer(task, World(), torch_factory(task.train, World()))
    save = trainer._save

    def stop() -> None:
        save()
        if trainer.state.global_step == stop_after:
            raise StopError

    trainer._save = stop  # type: ignore[method-assign]
    trainer.run()
    return read_model(task.output)[0].state_dict()


def options(**more: object) -> DistillConfig:
    values = {"epochs": 6, "checkpoint_every": 1, "num_workers": 1, "launcher": "inline", "halo": "exchange", **more}
    return DistillConfig.model_validate(values)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("checkpoint_layers", [False, True])
def test_one_rank_trains_on_the_whole_graph(storage, norm, checkpoint_layers):
    """The same weights as one unit of all parts, whose store would need more hops if it were cut.

    With SGD: the gradient of a bias before a batch norm is nothing but rounding, which Adam makes steps of.
    """
    name = f"{norm}-{checkpoint_layers}"
    mine = options(optimizer="sgd", checkpoint_layers=checkpoint_layers)
    found = train(make_task(storage, f"x-{name}", mine, norm=norm, layers=3))
    merged = options(optimizer="sgd", halo="hops", parts_per_unit="all", units_per_step="all")
    expected = train(make_task(storage, f"whole-{name}", merged, norm=norm, layers=3))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_killed_run_ends_with_the_same_bits(storage, stop_after):
    """Widths from the student's own medians are measured before the first step, and kept."""
    losses = (*LOSSES[:2], LOSSES[2].model_copy(update={"sigma": "median"}))
    whole = train(replace(make_task(storage, "calm", options()), losses=losses))
    broken = replace(make_task(storage, f"broken-{stop_after}", options()), losses=losses)
    with pytest.raises(StopError):
        train(broken, stop_after)
    again = train(broken)
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_the_share_is_read_once(storage, monkeypatch):
    task = make_task(storage, "once", options())
    trainer = Trainer(task, World(), torch_factory(task.train, World()))
    loads: list[int | None] = []
    load = trainer.loader.load
    monkeypatch.setattr(trainer.loader, "load", lambda unit: loads.append(unit) or load(unit))
    trainer.run()
    assert loads == [0]
    assert trainer.state.global_step == 6


def test_a_step_is_an_epoch_whatever_the_number_of_ranks():
    plan = WholeGraphPlan(3)
    assert list(plan.walk(Position(2, 0), 4, 1, 3)) == [(Position(2, 0), 1), (Position(3, 0), 1)]
    assert (plan.full_step, plan.steps_per_epoch) == (3, 1)


def test_a_student_without_layers_is_refused_with_the_way_out(storage):
    task = make_task(storage, "plain", options(), kind="tests.user_models:Plain", dropout=0.0, layers=1)
    task = replace(task, losses=LOSSES[:2])
    with pytest.raises(ModelError, match=r"works between layers, but Plain .* set distill\.halo=hops"):
        Trainer(task, World(), torch_factory(task.train, World()))
