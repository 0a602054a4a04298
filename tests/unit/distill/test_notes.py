"""What driver and workers tell each other reaches the other side as what it was, and nobody else."""

from __future__ import annotations

import pytest

from gkd_dist.distill.notes import Notes, Patience
from gkd_dist.errors import NonFiniteLossError, ShardError, StudentError
from gkd_dist.storage import Storage


@pytest.fixture
def folder(tmp_path):
    return Storage.open(str(tmp_path))


@pytest.mark.parametrize("error", [ShardError("a byte; do this"), NonFiniteLossError("nan; do that")])
def test_an_error_is_raised_as_what_it_was_and_once(folder, error):
    driver, worker = Notes(folder, "0123456789"), Notes(folder, "0123456789")
    driver.raise_failure()
    worker.leave_failure(error)
    assert worker.has_failed()
    with pytest.raises(type(error), match=str(error)):
        driver.raise_failure()
    driver.raise_failure()
    assert not worker.has_failed()


def test_an_error_of_another_kind_is_one_of_the_students(folder):
    folder.write_json("failure-any.json", {"kind": "Nonsense", "message": "what"})
    with pytest.raises(StudentError, match="what"):
        Notes(folder, "").raise_failure()


def test_workers_of_a_driver_that_has_lost_the_run_reach_only_that_one(folder):
    old, new = Notes(folder, "a" * 32), Notes(folder, "b" * 32)
    old.leave_failure(ShardError("old"))
    assert old.ask_to_stop()
    new.raise_failure()
    assert not new.is_asked_to_stop()
    assert old.is_asked_to_stop()
    old.clear()
    assert folder.list() == []


def test_trouble_is_told_once(folder, caplog):
    notes = Notes(folder, "a")
    notes.leave_trouble("rank 0 gives up rank 1")
    notes.tell_trouble()
    notes.tell_trouble()
    assert caplog.messages == ["rank 0 gives up rank 1; the worker group is started again"]


def test_long_silence_is_said_again_and_again_and_ends_with_a_sign(folder):
    notes, patience = Notes(folder, "a"), Patience(60.0, 0.0)
    assert patience.look(notes.sign(), 59.0, "room") is None
    assert "for 60 s: Ray waits for room" in str(patience.look(notes.sign(), 60.0, "room"))
    assert patience.look(notes.sign(), 100.0, "room") is None
    assert "for 121 s" in str(patience.look(notes.sign(), 121.0, "room"))
    notes.say_alive(1, "step 3")
    assert patience.look(notes.sign(), 125.0, "room") is None
    assert patience.look(notes.sign(), 184.0, "room") is None
    assert "for 61 s" in str(patience.look(notes.sign(), 186.0, "room"))
