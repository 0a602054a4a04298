"""C2b: parameters after ten steps do not know how many ranks, or which ZeRO stage, made them.

The reference is plain torch in one process. Three units per step on two ranks leave one of them with
an empty micro-step; the parts are of different size. Batch norm goes with SGD: it makes the gradient of the
bias before it analytically zero, and Adam turns the rounding of that into steps of the learning rate.
"""

from __future__ import annotations

import pytest
import torch

from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.trainer import Trainer
from gkd_dist.world import World
from tests.distributed.groups import run_group
from tests.distributed.worker import config
from tests.training import make_task, small_world

pytestmark = pytest.mark.timeout(240)
TOLERANCE = 1e-5


def reference(storage, optimizer: str, norm: str) -> dict[str, torch.Tensor]:
    """The same ten steps without DeepSpeed and without ranks."""
    train = config(0, optimizer, 1)
    task = make_task(storage, f"reference-{optimizer}-{norm}", train, norm=norm)
    trainer = Trainer(task, World(), torch_factory(train, World()))
    trainer.run()
    assert trainer.state.global_step == 10
    return trainer.engine.model_state()


@pytest.mark.parametrize(
    ("world_size", "stages", "optimizer", "norm"),
    [
        (2, "0,1,2,3", "sgd", "layer"),
        (2, "1", "adamw", "layer"),
        pytest.param(1, "0,1,2,3", "adamw", "layer", marks=pytest.mark.slow),
        pytest.param(2, "0,1,2,3", "adamw", "layer", marks=pytest.mark.slow),
        pytest.param(3, "0,1,2,3", "sgd", "batch", marks=pytest.mark.slow),
        pytest.param(4, "0,1,2,3", "adamw", "layer", marks=pytest.mark.slow),  # fewer units than ranks
    ],
)
def test_parameters_agree(tmp_path, world_size, stages, optimizer, norm):
    storage = small_world(tmp_path)
    expected = reference(storage, optimizer, norm)
    run_group(world_size, "worker.py", str(tmp_path), stages, optimizer, norm)
    for stage in stages.split(","):
        found = torch.load(tmp_path / f"w{world_size}-z{stage}-{optimizer}-{norm}.pt", weights_only=True)
        for name, value in expected.items():
            error, size = float((found[name] - value).norm()), float(value.norm())
            assert error <= max(TOLERANCE * size, 1e-7), f"stage {stage}, {name}: {error:.2e} of {size:.2e}"
