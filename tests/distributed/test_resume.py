"""C5: killed in the middle of an epoch, a group goes on: with the same bits at its size, within C2b at any other."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch

from gkd_dist.distill.checkpoint import committed_steps, load_checkpoint
from gkd_dist.models.io import read_model, read_model_document
from gkd_dist.storage import Storage
from tests.distributed.groups import run_group, start_group, stop_group
from tests.training import small_world

pytestmark = pytest.mark.timeout(240)
TOLERANCE = 1e-5
STUDENT = "students/distilled"


def train(folder: Path, world_size: int, stage: int) -> dict[str, torch.Tensor]:
    run_group(world_size, "training_rank.py", str(folder), "distilled", str(stage))
    return read_model(Storage.open(str(folder / STUDENT)))[0].state_dict()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    small_world(folder, num_parts=5)
    return folder


@pytest.fixture(scope="module")
def calm(world, tmp_path_factory):
    """Two ranks, ZeRO 1, undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    shutil.copytree(world, folder, dirs_exist_ok=True)
    return train(folder, 2, 1)


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):
    """The same, all ranks of it killed at the eleventh step."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(world, folder, dirs_exist_ok=True)
    ranks = start_group(2, "training_rank.py", str(folder), "distilled", "1", "kill", "10")
    try:
        assert [rank.wait(120) for rank in ranks] == [-signal.SIGKILL] * 2, [rank.communicate()[0] for rank in ranks]
    finally:
        stop_group(ranks)
    student = Storage.open(str(folder / STUDENT))
    assert not student.exists("model.json")
    kept = load_checkpoint(student, "f-distilled")
    assert kept is not None
    assert kept.position in {(1, 1), (2, 2)}  # inside an epoch; the last one may still have been on its way
    return folder


@pytest.mark.parametrize(
    ("world_size", "stage"),
    [
        (2, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(3, 2), (1, 0), (1, 3), (2, 0), (2, 3), (3, 1), (3, 3)]
        ),
    ],
)
def test_it_goes_on(killed, calm, tmp_path, world_size, stage):
    folder = tmp_path / "again"
    shutil.copytree(killed, folder)
    student = Storage.open(str(folder / STUDENT))
    last = committed_steps(student)[-1]
    found = train(folder, world_size, stage)
    assert read_model_document(student)["meta"]["summary"]["resumed_from_step"] == last
    for name, value in calm.items():
        if (world_size, stage) == (2, 1):
            assert torch.equal(found[name], value), name
        error, size = float((found[name] - value).norm()), float(value.norm())
        assert error <= max(TOLERANCE * size, 1e-7), f"{name}: {error:.2e} of {size:.2e}"


def test_sigterm_to_one_rank_stops_all_after_the_same_step(world, calm, tmp_path):
    """Rank 1 is told in the sixth; rank 0, which writes, learns of it from the counts of the seventh. None is lost."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    ranks = start_group(2, "training_rank.py", str(tmp_path), "distilled", "1", "term", "5", "1")
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        stop_group(ranks)
    assert [rank.returncode for rank in ranks] == [143, 143], outputs
    for output in outputs:
        assert "training of distilled was asked to stop (SIGTERM) and did so after step 7, which is kept" in output
    student = Storage.open(str(tmp_path / STUDENT))
    assert committed_steps(student) == [4, 7]
    found = train(tmp_path, 2, 1)
    assert read_model_document(student)["meta"]["summary"]["resumed_from_step"] == 7
    assert all(torch.equal(found[name], value) for name, value in calm.items())


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["0,1", "2,3"])
def test_bf16_goes_on_to_the_same_bits(world, tmp_path, stages):
    """Checkpoints hold the fp32 masters, and they come back as they were: not made anew from rounded weights."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    run_group(2, "stopped_and_resumed.py", str(tmp_path), stages, "adamw", "bf16")


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["frozen", "sgd"])
def test_parameters_without_moments_go_on_to_the_same_bits(world, tmp_path, what, precision):
    """Frozen layers have neither moments nor masters, and plain SGD keeps no moments of any parameter."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    run_group(2, "stopped_and_resumed.py", str(tmp_path), "0,1,2,3", what, precision)
