"""The task graph by hand on three parts in a row, then its invariants on random cuts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.errors import ModelError
from gkd_dist.infer.plan import KNOWLEDGE, Schedule, Task, TaskGraph, Wants

ROW = ((1,), (0, 2), (1,))  # parts 0 - 1 - 2


def test_tasks_read_their_own_part_and_its_borders_only() -> None:
    graph = TaskGraph(3, ROW, Wants(logits=True))
    assert graph.needs(Task(1, 0)) == []
    assert graph.needs(Task(2, 0)) == [Task(1, 0), Task(1, 1)]
    assert graph.needs(Task(2, 1)) == [Task(1, 1), Task(1, 0), Task(1, 2)]
    assert graph.needs(Task(KNOWLEDGE, 1)) == [Task(2, 1), Task(2, 0), Task(2, 2)]


def test_a_last_layer_that_only_its_own_knowledge_reads_has_no_task() -> None:
    assert TaskGraph(2, ROW, Wants(logits=True)).tasks()[3:] == [Task(KNOWLEDGE, part) for part in range(3)]
    kept = TaskGraph(2, ROW, Wants(logits=True, scores={2: {"dot"}}))
    assert kept.tasks()[3:6] == [Task(2, part) for part in range(3)]
    assert kept.needs(Task(KNOWLEDGE, 0)) == [Task(2, 0), Task(2, 1)]


def test_what_logits_and_taps_are_made_of_is_read_of_the_own_part_alone() -> None:
    graph = TaskGraph(3, ROW, Wants(), own_layers={1, 2, 3})
    assert graph.needs(Task(KNOWLEDGE, 0)) == [Task(2, 0), Task(2, 1), Task(1, 0)]
    assert graph.readers(Task(1, 0)) == [Task(2, 0), Task(2, 1), Task(KNOWLEDGE, 0)]


def test_scores_need_the_layer_on_bordering_parts() -> None:
    graph = TaskGraph(2, ROW, Wants(logits=True, scores={1: {"dot"}}))
    assert graph.needs(Task(KNOWLEDGE, 0)) == [Task(1, 0), Task(1, 1)]


def test_halo_copies_are_made_only_where_they_are_read() -> None:
    assert not TaskGraph(2, ROW, Wants()).sends(2)
    assert TaskGraph(2, ROW, Wants()).sends(1)
    assert TaskGraph(2, ROW, Wants(embeddings={2})).sends(2)


def test_taps_say_how_deep_to_go() -> None:
    wants = Wants(logits=False, taps={"convs.1"})
    assert wants.depth(4, {2}) == 2
    assert wants.depth(4, {KNOWLEDGE}) == 4


def test_nothing_deeper_than_wanted_is_computed() -> None:
    assert Wants(logits=False, scores={1: {"dot"}}).depth(4) == 1
    assert Wants(logits=True, scores={1: {"dot"}}).depth(4) == 4


@pytest.mark.parametrize("wants", [Wants(embeddings={3}), Wants(scores={0: {"dot"}}), Wants(logits=False)])
def test_impossible_wants_are_refused(wants: Wants) -> None:
    with pytest.raises(ModelError):
        wants.depth(2)


def test_a_part_goes_on_without_waiting_for_parts_it_does_not_border() -> None:
    schedule = Schedule(TaskGraph(3, ROW, Wants()))
    assert schedule.take(2) == [Task(1, 0), Task(1, 1)]
    schedule.finish(Task(1, 0))
    assert schedule.take(1) == [Task(1, 2)]
    schedule.finish(Task(1, 1))  # layer 1 of part 2 is still running, part 0 does not care
    assert schedule.take(9) == [Task(2, 0)]


def test_outputs_are_released_when_the_last_reader_is_done() -> None:
    schedule = Schedule(TaskGraph(2, ROW, Wants()))
    for task in schedule.take(3):
        assert schedule.finish(task) == []
    schedule.take(3)
    assert schedule.finish(Task(KNOWLEDGE, 0)) == []
    assert schedule.finish(Task(KNOWLEDGE, 1)) == [Task(1, 0)]
    assert schedule.finish(Task(KNOWLEDGE, 2)) == [Task(1, 2), Task(1, 1)]


def test_models_that_are_not_layered_have_knowledge_tasks_alone() -> None:
    graph = TaskGraph(0, [()] * 3, Wants())
    assert graph.tasks() == [Task(KNOWLEDGE, part) for part in range(3)]
    assert all(graph.needs(task) == graph.readers(task) == [] for task in graph.tasks())


@st.composite
def task_graphs(draw: st.DrawFn) -> TaskGraph:
    num_parts, depth = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    borders = [sorted(draw(st.sets(st.sampled_from(range(num_parts)))) - {part}) for part in range(num_parts)]
    layers = draw(st.sets(st.integers(1, depth), max_size=2))
    own = draw(st.none() | st.sets(st.integers(1, depth), max_size=2))
    return TaskGraph(depth, borders, Wants(True, {layer: {"dot"} for layer in layers}), own)


@given(task_graphs(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_any_schedule_meets_every_need_once_and_releases_every_layer_output(graph: TaskGraph, random) -> None:  # type: ignore[no-untyped-def]
    assert all(
        (need in graph.needs(task)) == (task in graph.readers(need)) for task in graph.tasks() for need in graph.tasks()
    )
    before = {task for task in graph.tasks() if task.layer == 1 and random.random() < 0.5}
    schedule = Schedule(graph, before)
    done, running, released = set(before), [], []
    while not schedule.finished:
        running += schedule.take(random.randint(1, 3))
        task = running.pop(random.randrange(len(running)))
        assert task not in done
        assert set(graph.needs(task)) <= done
        assert not set(graph.needs(task)) & set(released)
        done.add(task)
        released += schedule.finish(task)
    assert done == set(graph.tasks())
    assert sorted(released) == sorted(task for task in graph.tasks() if task.layer != KNOWLEDGE)
    assert schedule.num_done == schedule.num_tasks
