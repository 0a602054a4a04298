"""What ends training on Ray reaches the driver as what it was: after no restart where none helps."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from gkd_dist.config import DistillConfig
from gkd_dist.distill import placement
from gkd_dist.distill.job import TrainJob
from gkd_dist.distill.notes import Notes
from gkd_dist.distill.placement import leave_for_good, train_on_ray
from gkd_dist.errors import GkdError, NonFiniteLossError, ShardError, StorageError, StudentError
from gkd_dist.storage import Storage
from gkd_dist.world import World
from tests.training import make_task, small_world


@pytest.fixture
def notes(tmp_path):
    return Notes(Storage.open(str(tmp_path)), "a")


@pytest.mark.parametrize(
    "error",
    [
        StudentError("waited in vain"),
        StorageError("no answer"),
        ConnectionResetError("reset"),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"),
        torch.distributed.DistNetworkError("the store is gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_restart_is_tried_where_it_may_help(notes, error):
    leave_for_good(notes, World(), error)
    assert not notes.has_failed()


@pytest.mark.parametrize("error", [ShardError("a byte; do this"), NonFiniteLossError("nan; do that")])
def test_errors_of_data_are_left(notes, error):
    leave_for_good(notes, World(), error)
    with pytest.raises(type(error), match=str(error)):
        notes.raise_failure()


@pytest.mark.parametrize("error", [TypeError("a list\nis no number"), RuntimeError("shapes (3x4) and (5x6)")])
def test_an_error_of_the_program_is_left_with_its_last_line_and_its_traceback(notes, error):
    world = World(1, 2)
    world.place.doing = "training distilled"
    try:
        raise error
    except Exception as raised:
        leave_for_good(notes, world, raised)
    with pytest.raises(GkdError) as found:
        notes.raise_failure()
    assert found.value.exit_code == 1
    line = str(error).splitlines()[-1]
    assert "rank 1 of 2 (training distilled) met an error of the program" in str(found.value)
    assert f"{type(error).__name__}: {line}; mend it" in str(found.value)
    assert "test_placement.py" in found.value.__notes__[0]


def test_restarts_are_said_where_there_were_any():
    class WorkerGroupError(Exception):
        def __init__(self) -> None:
            self.worker_failures = {1: RuntimeError("killed")}

    assert "gave up after 3 restarts (rank 1: killed)" in str(placement._translate(WorkerGroupError(), 3))
    assert "gave up after 1 restart (" in str(placement._translate(WorkerGroupError(), 1))
    assert "gave up (rank 1: killed)" in str(placement._translate(WorkerGroupError(), 0))
    assert "gave up (no room)" in str(placement._translate(RuntimeError("no room"), 3))  # never began


class Closing(Storage):
    """A store that takes nothing away once it is closed."""

    closed = threading.Event()

    def delete(self, key: str) -> None:
        """Not any more."""
        if self.closed.is_set():
            raise StorageError("no answer")
        super().delete(key)

    def exists(self, key: str) -> bool:
        """Nobody knows."""
        if self.closed.is_set():
            raise StorageError("no answer")
        return super().exists(key)

    def delete_tree(self, prefix: str) -> None:
        """Not any more."""
        if self.closed.is_set():
            raise StorageError("no answer")
        super().delete_tree(prefix)


@pytest.mark.parametrize(
    ("raised", "left", "found"),
    [
        (RuntimeError("no room"), None, r"training gave up \(no room\)"),
        (StudentError("no worker; start one"), None, "no worker; start one"),
        (RuntimeError("a worker has died"), ShardError("a byte; do this"), "a byte; do this"),
    ],
    ids=["of Ray", "ours", "of a worker that was not started again"],
)
def test_a_store_that_fails_in_the_end_does_not_hide_how_training_ended(tmp_path, monkeypatch, raised, left, found):
    storage = small_world(tmp_path)
    task = make_task(storage, train=DistillConfig(num_workers=2))
    output = Closing(task.output.protocol, task.output.root, task.output.config)
    output.closed = threading.Event()
    object.__setattr__(task, "output", output)
    job = TrainJob(storage, (task,), DistillConfig(num_workers=2))

    def fit(job: TrainJob, scratch: str) -> None:
        if left is not None:
            Notes(output, job.owner).leave_failure(left)
        output.closed.set()
        raise raised

    monkeypatch.setattr(placement, "_fit", fit)
    told: list[Any] = []
    with pytest.raises(GkdError, match=found):
        train_on_ray(job, told.append)
