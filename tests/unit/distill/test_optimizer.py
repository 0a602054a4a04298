"""Learning-rate factors by hand."""

import pytest
import torch

from gkd_dist.config import LrSchedule, TrainConfig
from gkd_dist.distill.optimizer import build_optimizer, lr_factor, set_lr


def test_warm_up_rises_in_equal_steps_to_one():
    schedule = LrSchedule(warmup=3)
    assert [lr_factor(schedule, step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_middle_of_the_run(kind, middle):
    assert lr_factor(LrSchedule(kind=kind), 5, 10) == pytest.approx(middle)


def test_final_factor_is_reached_and_kept():
    schedule = LrSchedule(kind="cosine", final=0.1)
    assert lr_factor(schedule, 10, 10) == pytest.approx(0.1)
    assert lr_factor(schedule, 99, 10) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_the_named_optimizer(name, kind):
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], TrainConfig(optimizer=name, lr=0.3))
    assert type(optimizer) is kind
    set_lr(optimizer, 0.7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7]
