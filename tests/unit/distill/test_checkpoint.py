"""Checkpoints: committed last, damaged ones passed over, the last ones kept."""

import pytest
import torch

from gkd_dist.distill.checkpoint import TrainState, committed_steps, load_checkpoint, save_checkpoint
from gkd_dist.errors import OwnershipError
from gkd_dist.storage import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage.open(str(tmp_path))


def state(step: int) -> TrainState:
    tensors = {"w": torch.full((2,), float(step))}
    return TrainState((step, 0), step, 0.5, 1, 2, {"lsp": 3.0}, False, tensors, tensors, {"w/exp_avg": tensors["w"]})


def test_what_was_saved_comes_back(storage):
    save_checkpoint(storage, state(4), "f", keep=2)
    found = load_checkpoint(storage, "f")
    assert found is not None
    assert (found.position, found.global_step, found.best_metric, found.bad_evals) == ((4, 0), 4, 0.5, 2)
    assert found.sigmas == {"lsp": 3.0}
    assert torch.equal(found.model["w"], torch.full((2,), 4.0))
    assert torch.equal(found.optimizer["w/exp_avg"], torch.full((2,), 4.0))


def test_the_last_ones_are_kept(storage):
    for step in (1, 2, 3):
        save_checkpoint(storage, state(step), "f", keep=2)
    assert committed_steps(storage) == [2, 3]
    assert not storage.exists("checkpoints/step-00000001/COMMIT.json")


def test_a_writer_that_is_replaced_between_list_and_deletion_deletes_nothing(storage):
    for step in (1, 2):
        save_checkpoint(storage, state(step), "f", keep=2)
    asked = []

    def replaced_after_the_list() -> None:
        asked.append(committed_steps(storage))
        if asked[-1] == [3]:
            raise OwnershipError("another one writes")

    with pytest.raises(OwnershipError):
        save_checkpoint(storage, state(3), "f", keep=1, may_commit=replaced_after_the_list)
    assert storage.exists("checkpoints/step-00000002/COMMIT.json")


def test_what_another_writer_has_listed_since_is_not_deleted(storage):
    for step in (1, 2):
        save_checkpoint(storage, state(step), "f", keep=2)

    def another_one_writes() -> None:
        if committed_steps(storage) == [3]:
            storage.write_json("checkpoints/latest.json", [2])

    save_checkpoint(storage, state(3), "f", keep=1, may_commit=another_one_writes)
    found = load_checkpoint(storage, "f")
    assert found is not None
    assert found.global_step == 2
    assert not storage.exists("checkpoints/step-00000001/COMMIT.json")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no commit"])
def test_a_damaged_checkpoint_is_passed_over(storage, damage):
    for step in (1, 2):
        save_checkpoint(storage, state(step), "f", keep=2)
    key = next(key for key in storage.list("checkpoints/step-00000002") if key.endswith(".safetensors"))
    data = bytearray(storage.read(key))
    if damage == "no commit":
        storage.delete("checkpoints/step-00000002/COMMIT.json")
    elif damage == "truncated":
        storage.write(key, bytes(data[:-1]))
    else:
        data[-1] ^= 1
        storage.write(key, bytes(data))
    found = load_checkpoint(storage, "f")
    assert found is not None
    assert found.global_step == 1


def test_a_checkpoint_of_another_configuration_does_not_count(storage):
    save_checkpoint(storage, state(1), "f", keep=2)
    assert load_checkpoint(storage, "other") is None


def test_nothing_there(storage):
    assert load_checkpoint(storage, "f") is None
