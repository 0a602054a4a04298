"""The prefetcher delivers in order, within its budget, and cleans up whatever happens."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.errors import ShardError, StudentError
from gkd_dist.graph import Batch, LocalGraph
from gkd_dist.stream import ahead
from gkd_dist.stream.order import Position, StreamPlan
from gkd_dist.stream.pinned import pinned
from gkd_dist.stream.prefetch import Prefetcher
from gkd_dist.stream.resident import held_bytes

SIZE = 100  # bytes of every unit in these tests


def batch_of(unit: int) -> Batch:
    """One node without edges; the unit is recognised by its number."""
    mask = torch.ones(1, dtype=torch.bool)
    graph = LocalGraph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), 1)
    return Batch(
        unit, graph, torch.full((1, 1), float(unit)), torch.zeros(1), mask, mask, mask, torch.tensor([unit]), 1
    )


class Loader:
    """Counts loads, and how many are held but not yet delivered."""

    def __init__(self, delay_s: float = 0.0, fail_at: int | None = None) -> None:
        self.delay_s, self.fail_at = delay_s, fail_at
        self.loads: list[int] = []
        self.lock = threading.Lock()

    def __call__(self, unit: int) -> Batch:
        with self.lock:
            self.loads.append(unit)
        if unit == self.fail_at:
            raise ShardError(f"part-{unit:05d} is damaged")
        time.sleep(self.delay_s)
        return batch_of(unit)


def places(units: list[int]) -> list[tuple[Position, int]]:
    return [(Position(0, step), unit) for step, unit in enumerate(units)]


def stream(load: Loader, units: list[int], budget: int = 3 * SIZE, resident: int = 0) -> Prefetcher[int]:
    return Prefetcher(load, places(units), budget, resident, lambda unit: SIZE)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Every test here must leave as many prefetch threads as it found: none."""
    yield
    deadline = time.monotonic() + 5
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetch_threads()


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gkd-prefetch")]


# --- order -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=20), st.integers(0, 5), st.integers(0, 3), st.integers(1, 3))
def test_everything_comes_once_and_in_order(units: list[int], budget: int, resident: int, num_threads: int) -> None:
    order = places(units)
    with Prefetcher(
        Loader(), order, budget * SIZE, resident * SIZE, lambda unit: SIZE, num_threads=num_threads
    ) as batches:
        assert [(position, batch.unit) for position, batch in batches] == order


def test_a_rank_reads_its_plan() -> None:
    plan = StreamPlan(seed=1, num_units=5, units_per_step=2)
    order = list(plan.walk(Position(), 2, rank=1, world_size=2))
    load = lambda unit: batch_of(-1 if unit is None else unit)  # noqa: E731
    with Prefetcher(load, order, SIZE, 9 * SIZE, lambda unit: 0 if unit is None else SIZE) as batches:
        read = [(position, batch.unit) for position, batch in batches]
    assert read == [(position, -1 if unit is None else unit) for position, unit in order]


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "ahead"), [(3 * SIZE, 3), (SIZE // 2, 1), (0, 1)])
def test_reads_ahead_within_the_budget_but_at_least_one(budget: int, ahead: int) -> None:
    load = Loader()
    with stream(load, list(range(9)), budget) as batches:
        for taken in range(4):
            wait_until(lambda taken=taken: len(load.loads) == taken + ahead)
            time.sleep(0.02)
            assert len(load.loads) == taken + ahead
            next(batches)


def test_what_loading_takes_is_part_of_the_budget() -> None:
    """Room for three batches, but not for a second load beside the first: loads take turns."""
    running, most, lock = 0, 0, threading.Lock()

    def load(unit: int) -> Batch:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return batch_of(unit)

    for extra, expected in ((0, 2), (SIZE + 1, 1)):
        most = 0
        with Prefetcher(
            load, places([0, 1, 2, 3]), 3 * SIZE, 0, lambda unit: SIZE, extra_of=lambda unit, extra=extra: extra
        ) as batches:
            assert [batch.unit for _, batch in batches] == [0, 1, 2, 3]
        assert most == expected


def test_a_load_that_is_done_makes_room_again() -> None:
    load = Loader()
    with Prefetcher(load, places([0, 1, 2, 3]), 4 * SIZE, 0, lambda unit: SIZE, extra_of=lambda unit: SIZE) as batches:
        wait_until(lambda: len(load.loads) == 3)  # the third once both others are loaded
        assert [batch.unit for _, batch in batches] == [0, 1, 2, 3]


def test_what_is_derived_from_a_batch_counts() -> None:
    """A matrix that a model makes of a resident batch is as real as the batch: one of both has to go."""
    load = Loader()
    with Prefetcher(load, places([0, 1, 0, 1]), 0, 2 * SIZE, lambda unit: SIZE, num_threads=1) as batches:
        for _ in range(2):
            batch = next(batches)[1]
        batch.graph.derived("large", lambda: torch.zeros(SIZE))
        batches.settle()
        assert [batch.unit for _, batch in batches] == [0, 1]
    assert load.loads == [0, 1, 1], "the one that grew is larger than all that may be kept"


def test_bytes_are_counted_once_and_with_what_was_derived() -> None:
    batch = batch_of(0)
    before = held_bytes(batch)
    shared = batch.graph.in_degree
    batch.graph.derived("view", lambda: {"all": shared[:1], "again": (shared, [shared])})
    assert held_bytes(batch) == before
    batch.graph.derived("new", lambda: (torch.zeros(100), torch.zeros(5, dtype=torch.float64)))
    assert held_bytes(batch) == before + 440


def test_a_small_graph_is_decoded_once() -> None:
    load = Loader()
    with stream(load, [0, 1, 2] * 5, resident=3 * SIZE) as batches:
        first = [batch for _, batch in batches]
    assert sorted(load.loads) == [0, 1, 2]
    assert all(batch is first[index % 3] for index, batch in enumerate(first))
    assert (batches.stats.num_loads, batches.stats.num_hits, batches.stats.loaded_bytes) == (3, 12, 3 * SIZE)


def test_the_least_recently_used_goes_first() -> None:
    load = Loader()
    with Prefetcher(load, places([0, 1, 0, 2, 0, 1]), 0, 2 * SIZE, lambda unit: SIZE, num_threads=1) as batches:
        assert [batch.unit for _, batch in batches] == [0, 1, 0, 2, 0, 1]
    assert load.loads == [0, 1, 2, 1]


def test_a_unit_on_its_way_is_not_loaded_twice() -> None:
    load = Loader(delay_s=0.05)
    with stream(load, [7, 7, 7]) as batches:
        assert [batch.unit for _, batch in batches] == [7, 7, 7]
    assert load.loads == [7]


# --- waiting ---------------------------------------------------------------------------------


def test_waiting_for_data_is_measured() -> None:
    with stream(Loader(delay_s=0.1), [0]) as batches:
        next(batches)
        assert 0.05 < batches.wait_s < 2
    with stream(Loader(), [0, 1]) as batches:
        time.sleep(0.2)  # the consumer computes; the data is there when it asks
        next(batches)
        assert batches.wait_s < 0.1


def test_a_load_that_stalls_ends_with_a_sentence() -> None:
    release = threading.Event()

    def load(unit: int) -> Batch:
        if unit == 1:
            release.wait(20)
        return batch_of(unit)

    batches = Prefetcher(
        load, places([0, 1]), 0, 0, lambda unit: SIZE, timeout_s=0.2, who="rank 3 of 4",
        name_of=lambda unit: f"unit {unit} (s3://b/part-00001)",
    )  # fmt: skip
    with batches:
        next(batches)
        started = time.monotonic()
        with pytest.raises(
            StudentError,
            match=r"rank 3 of 4: unit 1 \(s3://b/part-00001\) of epoch 0, step 1 was not read within 0.2 s; check .*",
        ):
            next(batches)
        with pytest.raises(RuntimeError, match="stream is closed"):
            next(batches)
    assert time.monotonic() - started < 5, "nobody waits for the thread that hangs"
    release.set()


def test_the_batches_of_a_step_share_one_time_out() -> None:
    """Each comes in time by itself, all of them together do not: peers wait for the whole step."""

    def stream_of(delay_s: float) -> Prefetcher[int]:
        load = Loader(delay_s=delay_s)
        return Prefetcher(load, places([0, 1, 2]), 0, 0, lambda unit: SIZE, num_threads=1, timeout_s=1.0)

    with stream_of(0.6) as one_by_one:
        assert len(list(one_by_one)) == 3
    with stream_of(0.6) as batches, pytest.raises(StudentError, match=r"step 1 was not read within 1 s of its step;"):
        batches.take(3)
    with stream_of(0.0) as batches:
        assert len(batches.take(2)) == 2


def test_an_error_does_not_wait_for_a_load_that_hangs() -> None:
    release, started = threading.Event(), time.monotonic()

    def load(unit: int) -> Batch:
        if unit == 1:
            release.wait(30)
        return batch_of(unit)

    def diverge() -> None:
        with Prefetcher(load, places([0, 1]), 1 << 20, 0, lambda unit: SIZE) as batches:
            next(batches)
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        diverge()
    assert time.monotonic() - started < 10
    release.set()


def test_a_long_wait_is_said_while_it_lasts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ahead, "_SAY_S", 0.05)
    with Prefetcher(
        Loader(delay_s=0.3), places([0]), 0, 0, lambda unit: SIZE, timeout_s=20, who="rank 1 of 2"
    ) as batches:
        next(batches)
    assert "rank 1 of 2: 0 of epoch 0, step 0 has taken 0 s so far" in caplog.text


# --- faults ----------------------------------------------------------------------------------


def test_an_error_surfaces_at_its_place() -> None:
    with stream(Loader(fail_at=2), [0, 1, 2, 3]) as batches:
        assert [next(batches)[1].unit, next(batches)[1].unit] == [0, 1]
        with pytest.raises(ShardError, match="part-00002 is damaged"):
            next(batches)
        with pytest.raises(RuntimeError, match="stream is closed"):
            next(batches)


def test_an_error_of_the_order_surfaces_at_its_place() -> None:
    def order() -> Iterator[tuple[Position, int]]:
        yield Position(0, 0), 0
        raise ZeroDivisionError("no order")

    with Prefetcher(Loader(), order(), SIZE, 0, lambda unit: SIZE) as batches:
        assert next(batches)[1].unit == 0
        with pytest.raises(ZeroDivisionError, match="no order"):
            next(batches)


def test_a_stray_stop_iteration_does_not_look_like_the_end() -> None:
    def load(unit: int) -> Batch:
        raise StopIteration

    with (
        Prefetcher(load, places([0]), SIZE, 0, lambda unit: SIZE) as batches,
        pytest.raises(RuntimeError, match="StopIteration while loading"),
    ):
        next(batches)


def test_stopping_early_leaves_no_thread() -> None:
    with stream(Loader(), list(range(100))) as batches:
        next(batches)
    assert not prefetch_threads()


def test_an_exception_in_the_consumer_leaves_no_thread() -> None:
    def diverge() -> None:
        with stream(Loader(delay_s=0.02), list(range(100))) as batches:
            next(batches)
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        diverge()
    assert not prefetch_threads()


def test_an_abandoned_stream_ends_its_threads() -> None:
    batches = stream(Loader(), list(range(100)))
    next(batches)
    del batches
    gc.collect()
    wait_until(lambda: not prefetch_threads())


def test_closing_twice_is_fine() -> None:
    batches = stream(Loader(), [0, 1])
    batches.close()
    batches.close()
    with pytest.raises(RuntimeError, match="stream is closed"):
        next(batches)


def test_a_closed_stream_does_not_look_finished_to_a_waiting_consumer() -> None:
    release = threading.Event()

    def load(unit: int) -> Batch:
        release.wait(10)
        return batch_of(unit)

    batches = Prefetcher(load, places([0, 1]), 0, 0, lambda unit: SIZE)
    closer = threading.Timer(0.05, lambda: (release.set(), batches.close()))
    closer.start()
    with pytest.raises(RuntimeError, match="stream is closed"):
        list(batches)
    closer.join()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA device")
def test_batches_arrive_on_the_device_from_pinned_memory() -> None:
    batch = replace(batch_of(3), teacher_scores={(1, "dot"): torch.ones(2)})
    assert pinned(batch).x.is_pinned()
    assert pinned(batch).teacher_scores[1, "dot"].is_pinned()
    assert pinned(batch).graph.pattern.indptr.is_pinned()
    with Prefetcher(Loader(), places([3, 4]), SIZE, SIZE, lambda unit: SIZE, device="cuda") as batches:
        read = [batch for _, batch in batches]
    assert [batch.x.device.type for batch in read] == ["cuda", "cuda"]
    assert [batch.x.item() for batch in read] == [3.0, 4.0]


def wait_until(condition, timeout_s: float = 5.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)
