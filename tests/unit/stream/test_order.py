"""The order of a run: pure, complete, the same for everybody, and dealt out evenly."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_dist.errors import ConfigError
from gkd_dist.stream.order import (
    Position,
    StreamPlan,
    deal,
    epoch_steps,
    hash_of,
    micro_steps,
    plan_units,
    resolve_units_per_step,
)

sizes = st.integers(1, 40)
epochs = st.integers(0, 5)
worlds = st.integers(1, 9)
bounded = settings(max_examples=60, deadline=None)


# --- units -----------------------------------------------------------------------------------


def test_one_part_per_unit_keeps_the_parts() -> None:
    assert plan_units(3) == [(0,), (1,), (2,)]


def test_all_parts_make_one_unit() -> None:
    assert plan_units(3, "all") == [(0, 1, 2)]


def test_heavy_and_light_parts_are_paired() -> None:
    assert plan_units(4, 2, costs=[10, 9, 2, 1]) == [(0, 3), (1, 2)]


def test_bordering_parts_stay_together() -> None:
    # a chain 0 - 3 - 1 - 2 of equal parts: the strong borders are (0, 3) and (1, 2)
    borders = {(0, 3): 9.0, (3, 1): 1.0, (2, 1): 9.0}
    assert plan_units(4, 2, borders=borders) == [(0, 3), (1, 2)]


def test_balance_wins_over_borders() -> None:
    assert plan_units(4, 2, costs=[5, 5, 1, 1], borders={(0, 1): 100.0, (2, 3): 100.0}) == [(0, 2), (1, 3)]


@bounded
@given(sizes, sizes, st.data())
def test_every_part_is_in_exactly_one_unit(num_parts: int, parts_per_unit: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.floats(0, 1e6), min_size=num_parts, max_size=num_parts))
    pairs = st.tuples(st.integers(0, num_parts - 1), st.integers(0, num_parts - 1))
    borders = data.draw(st.dictionaries(pairs, st.floats(0, 100), max_size=10))
    units = plan_units(num_parts, parts_per_unit, costs, borders)
    assert sorted(itertools.chain(*units)) == list(range(num_parts))
    assert len(units) == -(-num_parts // parts_per_unit)
    assert all(0 < len(unit) <= parts_per_unit for unit in units)
    assert units == plan_units(num_parts, parts_per_unit, costs, borders)


# --- steps -----------------------------------------------------------------------------------


def test_order_is_pinned() -> None:
    """Who breaks if this changes: every run resumed from a checkpoint of an earlier version.

    It would read some units of its epoch twice and others not at all, and no seed of a published
    result would reproduce it. Change the order only together with the checkpoint format version.
    """
    assert epoch_steps(seed=0, epoch=0, num_units=6, units_per_step=4) == [[5, 2, 3, 4], [1, 0]]
    assert epoch_steps(seed=0, epoch=1, num_units=6, units_per_step=4) == [[5, 3, 2, 4], [1, 0]]
    assert hash_of(0, 1, 2) == 4529435921577843265


def test_without_shuffle_units_come_in_order() -> None:
    assert epoch_steps(0, 7, 5, 2, shuffle=False) == [[0, 1], [2, 3], [4]]


def test_all_units_make_one_step() -> None:
    assert [sorted(step) for step in epoch_steps(3, 1, 5, "all")] == [[0, 1, 2, 3, 4]]
    assert resolve_units_per_step(99, 5) == 5


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_steps(seed, epoch, 20, "all")[0]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@bounded
@given(sizes, sizes, epochs, st.booleans())
def test_every_unit_exactly_once_per_epoch(num_units: int, units_per_step: int, epoch: int, shuffle: bool) -> None:
    steps = epoch_steps(11, epoch, num_units, units_per_step, shuffle)
    size = resolve_units_per_step(units_per_step, num_units)
    assert sorted(itertools.chain(*steps)) == list(range(num_units))
    assert all(len(step) == size for step in steps[:-1])
    assert 0 < len(steps[-1]) <= size


# --- dealing ---------------------------------------------------------------------------------


def test_equal_units_are_dealt_in_turn() -> None:
    assert [deal([4, 2, 7, 1, 0], 5, rank, 2) for rank in range(2)] == [[4, 7, 0], [2, 1, None]]


def test_fewer_units_than_ranks_leave_empty_micro_steps() -> None:
    assert [deal([3], 2, rank, 4) for rank in range(4)] == [[3], [None], [None], [None]]


def test_heavy_units_are_spread() -> None:
    costs = [1.0, 8.0, 1.0, 7.0]  # by unit
    assert [deal([0, 1, 2, 3], 4, rank, 2, costs) for rank in range(2)] == [[1, 2], [3, 0]]


@bounded
@given(sizes, sizes, worlds, epochs, st.data())
def test_the_ranks_together_do_the_step(
    num_units: int, units_per_step: int, world_size: int, epoch: int, data: st.DataObject
) -> None:
    costs = data.draw(st.none() | st.lists(st.floats(0, 9), min_size=num_units, max_size=num_units))
    size = resolve_units_per_step(units_per_step, num_units)
    for step in epoch_steps(5, epoch, num_units, units_per_step):
        hands = [deal(step, size, rank, world_size, costs) for rank in range(world_size)]
        assert {len(hand) for hand in hands} == {micro_steps(size, world_size)}
        dealt = [unit for unit in itertools.chain(*hands) if unit is not None]
        assert sorted(dealt) == sorted(step)
        assert all(None not in hand[: len(hand) - hand.count(None)] for hand in hands), "empty ones come last"


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank must be in 0..1 \(got 2\)"):
        deal([0], 1, 2, 2)


def test_a_step_longer_than_the_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 1 units"):
        deal([0, 1], 1, 0, 1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: plan_units(0), "num_parts must be at least 1"),
        (lambda: plan_units(2, 0), "parts_per_unit must be at least 1"),
        (lambda: plan_units(2, 1, costs=[1.0]), "costs must be 2 finite numbers"),
        (lambda: plan_units(1, 1, costs=[float("nan")]), "costs must be 1 finite numbers"),
        (lambda: epoch_steps(0, 0, 3, 0), "units_per_step must be at least 1"),
        (lambda: StreamPlan(0, 0), "num_units must be at least 1"),
    ],
)
def test_impossible_plans_are_refused(call, match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=match):
        call()


# --- the whole run ---------------------------------------------------------------------------


@bounded
@given(sizes, sizes, worlds, worlds, st.integers(0, 60))
def test_resuming_anywhere_at_another_world_size_reads_what_is_left(
    num_units: int, units_per_step: int, world_before: int, world_after: int, stop: int
) -> None:
    plan = StreamPlan(2, num_units, units_per_step)
    stop %= 2 * plan.steps_per_epoch + 1
    position = plan.position(stop)
    before = [item for rank in range(world_before) for item in plan.walk(Position(), 2, rank, world_before)]
    after = [item for rank in range(world_after) for item in plan.walk(position, 2, rank, world_after)]
    read = [(at, unit) for at, unit in before if at < position] + after
    expected = [
        (Position(epoch, step), unit)
        for epoch in range(2)
        for step, units in enumerate(plan.steps(epoch))
        for unit in units
    ]
    assert sorted(item for item in read if item[1] is not None) == sorted(expected)  # type: ignore[type-var]


def test_positions_count_steps_across_epochs() -> None:
    plan = StreamPlan(0, num_units=5, units_per_step=2)  # 3 steps per epoch
    position, seen = Position(), []
    for _ in range(4):
        seen.append((position.epoch, position.step))
        assert plan.position(plan.global_step(position)) == position
        position = position.next(plan.steps_per_epoch)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert Position.from_dict(position.to_dict()) == position
