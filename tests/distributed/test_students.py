"""C2b for students of every kind: parameters, buffers and projection heads do not know who did the work.

The reference is plain torch in one process. Batch norm statistics and dropout are those of a unit, so they are the
same whoever runs it; running statistics are merged by count once per step.
"""

from __future__ import annotations

import pytest
import torch

from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.trainer import Trainer
from gkd_dist.models.io import read_model
from gkd_dist.world import World
from tests.distributed.groups import run_group
from tests.distributed.student_worker import CASES, state_of, task_of
from tests.training import small_world

pytestmark = pytest.mark.timeout(400)
TOLERANCE = 1e-5


def reference(storage, case: str) -> dict[str, torch.Tensor]:
    """The same ten steps without DeepSpeed and without ranks."""
    task = task_of(storage, case, f"{case}-reference", 0, 1)
    trainer = Trainer(task, World(), torch_factory(task.train, World()))
    trainer.run()
    assert trainer.state.global_step == 10
    return state_of(trainer)


@pytest.mark.parametrize(
    ("world_size", "jobs"),
    [
        (2, "fitnet:13 pyg:02 pna:3 edgecnn:1 whole:2 layered:3 sampled:2"),
        pytest.param(1, "fitnet:0123 pyg:0123 pna:13 sampled:13", marks=pytest.mark.slow),
        pytest.param(
            2, "fitnet:02 pyg:13 pna:012 edgecnn:023 whole:013 layered:012 sampled:013", marks=pytest.mark.slow
        ),
        pytest.param(
            3, "fitnet:0123 pyg:0123 pna:13 edgecnn:2 whole:23 layered:1 sampled:0123", marks=pytest.mark.slow
        ),
    ],
)
def test_parameters_agree(tmp_path, world_size, jobs):
    storage = small_world(tmp_path, embeddings=(1,))
    run_group(world_size, "student_worker.py", str(tmp_path), *jobs.split(), timeout_s=350)
    for job in jobs.split():
        case, _, stages = job.partition(":")
        expected = reference(storage, case)
        assert ("heads.fitnet.weight" in expected) == (case in ("fitnet", "sampled"))
        for stage in stages:
            name = f"{case}-w{world_size}-z{stage}"
            found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                error, size = float((found[key] - value).float().norm()), float(value.float().norm())
                assert error <= max(TOLERANCE * size, 1e-7), f"{name}, {key}: {error:.2e} of {size:.2e}"
            kind = CASES[case][0].kind
            model, _ = read_model(storage.child(f"students/{name}"), allow_code=[kind])
            assert {key for key in expected if not key.startswith("heads.fitnet")} == set(model.state_dict())
