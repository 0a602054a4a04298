"""Seconds of tasks: sums per phase, and what stands out."""

from __future__ import annotations

from gkd_dist.infer.plan import Task
from gkd_dist.infer.times import TaskTimes


def test_phases_are_added_up_and_the_slowest_of_a_layer_named() -> None:
    times = TaskTimes()
    for part, compute in enumerate([1.0, 1.0, 6.0]):
        times.add(Task(1, part), {"read": 0.5, "compute": compute, "write": 0.5})
    assert times.summary() == [
        "tasks: 3, read 1.5 s, compute 8.0 s, write 1.5 s in all workers together",
        "layer 1 of part 2 took 7.0 s, the median of its like is 2.0 s",
    ]
    assert TaskTimes().summary() == []


def test_a_straggler_is_told_by_the_median_of_its_layer() -> None:
    times = TaskTimes()
    for part in range(2):
        times.add(Task(2, part), {"compute": 8.0})
    assert times.limit_s(2) is None
    times.add(Task(2, 2), {"compute": 8.0})
    assert times.limit_s(2) == 24.0
    assert times.limit_s(1) is None
    for part in range(3):
        times.add(Task(1, part), {"compute": 0.1})
    assert times.limit_s(1) == 10.0
