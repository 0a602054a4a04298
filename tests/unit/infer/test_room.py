"""Who may hold memory at a time, and what a worker does when there is too little."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from infer_worlds import World

from gkd_dist.config import InferConfig
from gkd_dist.errors import TeacherError
from gkd_dist.infer import worker
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.room import Room, is_out_of_memory
from gkd_dist.infer.run import infer_nodes

MakeWorld = Callable[..., World]


def test_a_shrunk_room_has_one_place() -> None:
    room, entered = Room(), threading.Event()

    def enter() -> None:
        with room.place():
            entered.set()

    with room.place():
        with room.place():
            room.shrink()
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(5)
    thread.join()


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def out_of_memory_at(calls: set[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the computations number ``calls`` (from 1) run out of memory; returns the list of all."""
    count: list[int] = []
    compute = worker.layerwise.compute_layer

    def scarce(*args: object) -> object:
        count.append(len(count) + 1)
        if count[-1] in calls:
            torch.empty(1 << 50)
        return compute(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.layerwise, "compute_layer", scarce)
    return count


def test_a_task_without_memory_is_done_again_alone_and_the_user_is_told(
    make_world: MakeWorld, exact: InferConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world()
    graph, (storage, _) = world.cut(2), world.model("gcn")
    expected = infer_nodes(storage, graph, world.storage("a"), Wants(), exact, fingerprint="f" * 64)
    out_of_memory_at({2}, monkeypatch)
    found = infer_nodes(storage, graph, world.storage("b"), Wants(), exact, fingerprint="f" * 64)
    assert found == expected
    told = [record.message for record in caplog.records if "did not fit the memory" in record.message]
    assert len(told) == 1
    assert "lower infer.window or infer.tile_edges" in told[0]


def test_a_task_that_does_not_fit_even_alone_ends_the_run(
    make_world: MakeWorld, exact: InferConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    graph, (storage, _) = world.cut(2), world.model("gcn")
    calls = out_of_memory_at({2, 3}, monkeypatch)
    with pytest.raises(TeacherError, match=r"does not fit the memory of its device .*raise partition.num_parts"):
        infer_nodes(storage, graph, world.storage("k"), Wants(), exact, fingerprint="f" * 64)
    assert calls == [1, 2, 3]
