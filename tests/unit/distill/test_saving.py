"""Checkpoints in the background: all of them, one at a time, by one writer; errors reach the loop."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from gkd_dist.config import ModelConfig
from gkd_dist.distill.checkpoint import TrainState, committed_steps, load_checkpoint
from gkd_dist.distill.saving import WRITER, CheckpointSaver, Claim, circumstances, say_changes
from gkd_dist.errors import OwnershipError, StorageError
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec
from gkd_dist.storage import Storage


class Gate(Storage):
    """A store whose writes of data wait until they are let through; ``fails`` raises instead."""

    opened: threading.Event
    began: list[str]
    fails: bool

    @classmethod
    def at(cls, folder: Any) -> Gate:
        plain = Storage.open(str(folder))
        gate = cls(plain.protocol, plain.root, plain.config)
        gate.opened, gate.began, gate.fails = threading.Event(), [], False
        return gate

    def write(self, key: str, data: Any) -> None:
        if "/state-" in key:
            self.began.append(key)
            if self.fails:
                raise StorageError(f"cannot write {self.describe(key)}: no space; make room")
            assert self.opened.wait(20)
        super().write(key, data)


@pytest.fixture
def gate(tmp_path):
    return Gate.at(tmp_path)


def saver_of(storage: Storage, keep: int = 5) -> CheckpointSaver:
    claim = Claim(storage)
    claim.take()
    return CheckpointSaver(storage, "f", keep, claim)


def state(step: int) -> TrainState:
    return TrainState((step, 0), step, model={"w": torch.full((2,), float(step))}, best={"w": torch.zeros(2)})


def test_the_loop_goes_on_while_a_checkpoint_is_written(gate):
    saver = saver_of(gate)
    saver.save(state(1))  # returns although the store does not take it yet
    assert committed_steps(gate) == []
    gate.opened.set()
    saver.wait()
    assert committed_steps(gate) == [1]


def test_one_is_on_its_way_at_most_and_none_is_left_out(gate):
    saver = saver_of(gate)
    saver.save(state(1))
    second = threading.Thread(target=saver.save, args=(state(2),))
    second.start()
    second.join(0.3)
    assert second.is_alive()  # waits for the first
    assert len(gate.began) == 1
    gate.opened.set()
    second.join(20)
    saver.wait()
    assert committed_steps(gate) == [1, 2]
    assert saver.wait_s > 0.2


def test_an_error_of_the_store_reaches_the_loop_with_the_key(gate):
    gate.fails = True
    saver = saver_of(gate)
    saver.save(state(3))
    with pytest.raises(StorageError, match=r"checkpoints/step-00000003/state-\w{8}.safetensors: no space"):
        saver.wait()
    assert saver.failed
    with pytest.raises(StorageError):
        saver.save(state(4))
    assert committed_steps(gate) == []


def test_the_end_of_training_waits_for_the_last_one(gate):
    threading.Timer(0.3, gate.opened.set).start()
    with saver_of(gate) as saver:
        saver.save(state(1))
    assert committed_steps(gate) == [1]


def test_a_writer_that_was_replaced_commits_nothing(tmp_path):
    storage = Storage.open(str(tmp_path))
    old = saver_of(storage)
    old.save(state(1))
    old.wait()
    new = saver_of(storage)
    new.save(state(2))
    new.wait()
    before = {key: storage.read(key) for key in storage.list()}
    old.save(state(3))
    with pytest.raises(OwnershipError, match=r"no longer writes the checkpoints of .* let the other one finish"):
        old.wait()
    after = {key: storage.read(key) for key in storage.list()}
    assert {key: after[key] for key in before} == before
    assert [key.rpartition("-")[0] for key in after.keys() - before.keys()] == ["checkpoints/step-00000003/state"]
    late = saver_of(storage)
    model = ModelConfig(kind="gcn", hidden=2)
    new.publish(build_model(model, 2, 2), ModelSpec(model, 2, 2, "multiclass"))
    with pytest.raises(OwnershipError):
        new.wait()
    assert not storage.exists("model.json")
    late.publish(build_model(model, 2, 2), ModelSpec(model, 2, 2, "multiclass"))
    late.wait()
    assert storage.exists("model.json")


def test_a_writer_that_is_replaced_while_it_writes_does_not_commit(gate):
    old = saver_of(gate)
    old.save(state(1))
    new = saver_of(gate)
    gate.opened.set()
    with pytest.raises(OwnershipError):
        old.wait()
    assert load_checkpoint(gate, "f") is None
    new.tidy()
    assert gate.list("checkpoints") == [WRITER]  # nothing is left of the old one


def test_a_driver_that_lost_the_run_has_no_writers(tmp_path):
    storage = Storage.open(str(tmp_path))
    owned = [True]

    def owns_run() -> None:
        if not owned[0]:
            raise OwnershipError("another driver owns it; let it finish")

    claim = Claim(storage, owns_run)
    claim.take()
    claim.check()
    owned[0] = False
    with pytest.raises(OwnershipError, match="another driver"):
        claim.check()
    with pytest.raises(OwnershipError):
        claim.take()


@pytest.mark.parametrize("damage", [b"", b"[]", json.dumps({"token": 1}).encode(), None])
def test_a_damaged_claim_is_nobodys(tmp_path, damage):
    storage = Storage.open(str(tmp_path))
    claim = Claim(storage)
    claim.take()
    if damage is None:
        storage.delete(WRITER)
    else:
        storage.write(WRITER, damage)
    with pytest.raises(OwnershipError):
        claim.check()


def test_unfinished_checkpoints_are_removed_and_committed_ones_stay(tmp_path):
    storage = Storage.open(str(tmp_path))
    first = saver_of(storage)
    first.save(state(1))
    first.wait()
    storage.write("checkpoints/step-00000002/state-0123abcd.safetensors", b"x")
    (tmp_path / "checkpoints/step-00000001/.half.tmp").write_bytes(b"x")
    kept = storage.list("checkpoints/step-00000001")
    saver_of(storage).tidy()
    assert storage.list("checkpoints/step-00000002") == []
    assert storage.list("checkpoints/step-00000001") == kept
    found = load_checkpoint(storage, "f")
    assert found is not None
    assert found.global_step == 1


def test_the_best_weights_outlive_the_checkpoint_that_they_came_with(tmp_path):
    storage = Storage.open(str(tmp_path))
    saver = saver_of(storage, keep=1)
    best = {"w": torch.full((2,), 7.0)}
    for step in (1, 2, 3):
        saver.save(TrainState((step, 0), step, best_epoch=1, model={"w": torch.zeros(2)}, best=best))
    saver.wait()
    assert committed_steps(storage) == [3]
    found = load_checkpoint(storage, "f")
    assert found is not None
    assert torch.equal(found.best["w"], best["w"])


def test_other_circumstances_are_said_and_the_same_are_not(tmp_path, caplog):
    storage = Storage.open(str(tmp_path))
    saver = saver_of(storage)
    saver.save(replace(state(1), made_with={**circumstances(2), "threads": 7}))
    saver.wait()
    found = load_checkpoint(storage, "f")
    assert found is not None
    say_changes(found.made_with, {**circumstances(2), "threads": 7})
    say_changes({}, circumstances(2))  # of an earlier version
    assert caplog.messages == []
    say_changes(found.made_with, {**circumstances(3), "threads": 5})
    assert caplog.messages == [
        "goes on with ranks 2 to 3, threads 7 to 5: the result is the same up to rounding, not bit for bit"
    ]
