"""Which units are read in which step: pure functions of (seed, epoch), never of ranks or of time.

The order of a run is fixed before anybody knows how many ranks there will be::

    parts --plan_units--> units --epoch_steps(seed, epoch)--> steps --deal(rank, world_size)--> micro-steps

A **unit** is the part or parts merged into one training subgraph; a **step** is the list of units
behind one optimizer step; a **micro-step** is one forward and backward pass of one rank. Only
`deal` sees the world size, and the union of what it deals to all ranks is exactly the step. A run
that is resumed at another world size therefore reads the same units in the same steps.

Shuffling sorts hashes instead of calling a random generator, so that the order depends neither on
the version of a library nor on how often anything was drawn before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gkd_dist.errors import ConfigError

AllOr = int | Literal["all"]
_BALANCE = 1.1  # how much heavier than the mean a unit may get for the sake of neighbouring parts


@dataclass(frozen=True, order=True)
class Position:
    """Place in the stream: ``step`` (from 0) within ``epoch`` (from 0).

    It travels with every batch, so that a checkpoint holds the place of what was trained on and not
    of what had been read ahead.
    """

    epoch: int = 0
    step: int = 0

    def next(self, steps_per_epoch: int) -> Position:
        """The position one optimizer step later."""
        last = self.step + 1 >= steps_per_epoch
        return Position(self.epoch + 1, 0) if last else Position(self.epoch, self.step + 1)

    def to_dict(self) -> dict[str, int]:
        """Plain numbers for a checkpoint."""
        return {"epoch": self.epoch, "step": self.step}

    @classmethod
    def from_dict(cls, value: Mapping[str, int]) -> Position:
        """The position that `to_dict` wrote."""
        return cls(int(value["epoch"]), int(value["step"]))


def hash_of(*numbers: int) -> int:
    """63-bit hash of integers, the same on every machine and in every version.

    Seeds what happens at one place of the run, e.g. dropout by ``hash_of(seed, step, unit)``.
    """
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


# --- parts to units --------------------------------------------------------------------------


def plan_units(
    num_parts: int,
    parts_per_unit: AllOr = 1,
    costs: Sequence[float] | None = None,
    borders: Mapping[tuple[int, int], float] | None = None,
) -> list[tuple[int, ...]]:
    """Groups parts into ceil(num_parts / parts_per_unit) units of at most ``parts_per_unit`` parts.

    Heavy parts are placed first (``costs``, e.g. nodes + edges; equal where None). Each goes to the
    unit that it shares most edges with (``borders[a, b]``, either order) among those that stay
    within 1.1 times the mean cost, and to the lightest unit where none does. Parts ascend within a
    unit, units ascend by their first part.
    """
    _check_positive("num_parts", num_parts)
    size = num_parts if parts_per_unit == "all" else parts_per_unit
    _check_positive("parts_per_unit", size)
    weights = _weights(costs, num_parts)
    num_units = -(-num_parts // size)
    limit = _BALANCE * sum(weights) / num_units
    units: list[list[int]] = [[] for _ in range(num_units)]
    loads = [0.0] * num_units
    neighbours = _neighbours(borders or {})
    for part in sorted(range(num_parts), key=lambda part: (-weights[part], part)):
        chosen = _choose_unit(units, loads, limit, size, weights[part], neighbours.get(part, {}))
        units[chosen].append(part)
        loads[chosen] += weights[part]
    return sorted(tuple(sorted(unit)) for unit in units)


def _neighbours(borders: Mapping[tuple[int, int], float]) -> dict[int, dict[int, float]]:
    """Shared edges by part and bordering part, both directions added."""
    shared: dict[int, dict[int, float]] = {}
    for (a, b), edges in borders.items():
        for one, other in ((a, b), (b, a)):
            row = shared.setdefault(one, {})
            row[other] = row.get(other, 0.0) + edges
    return shared


def _choose_unit(
    units: list[list[int]],
    loads: list[float],
    limit: float,
    size: int,
    weight: float,
    shared: Mapping[int, float],
) -> int:
    """Index of the unit that takes the next part; see `plan_units`."""
    free = [unit for unit, parts in enumerate(units) if len(parts) < size]
    if shared:
        border = {unit: sum(shared.get(part, 0.0) for part in units[unit]) for unit in free}
        fitting = [unit for unit in free if border[unit] > 0 and loads[unit] + weight <= limit]
        if fitting:
            return min(fitting, key=lambda unit: (-border[unit], loads[unit], unit))
    return min(free, key=lambda unit: (loads[unit], unit))


# --- units to steps --------------------------------------------------------------------------


def resolve_units_per_step(units_per_step: AllOr, num_units: int) -> int:
    """Units of a full step; ``all`` and whatever exceeds ``num_units`` mean every unit."""
    _check_positive("num_units", num_units)
    if units_per_step == "all":
        return num_units
    _check_positive("units_per_step", units_per_step)
    return min(units_per_step, num_units)


def epoch_steps(seed: int, epoch: int, num_units: int, units_per_step: AllOr, shuffle: bool = True) -> list[list[int]]:
    """Units of each optimizer step of ``epoch``: every unit exactly once, the last step may be short."""
    size = resolve_units_per_step(units_per_step, num_units)
    order = list(range(num_units))
    if shuffle:
        order.sort(key=lambda unit: (hash_of(seed, epoch, unit), unit))
    return [order[start : start + size] for start in range(0, num_units, size)]


# --- steps to micro-steps --------------------------------------------------------------------


def deal(
    step_units: Sequence[int],
    units_per_step: int,
    rank: int,
    world_size: int,
    costs: Sequence[float] | None = None,
) -> list[int | None]:
    """Units of ``rank`` in one step, None for a micro-step with an empty batch.

    The list has ceil(units_per_step / world_size) entries on every rank and in every step, also in
    a short one, so that no rank ever waits for a micro-step that another does not take. Heavy units
    (``costs`` by unit; equal where None) are dealt first, each to the rank with the least so far;
    the k-th micro-steps of all ranks are thereby of similar size as well.
    """
    _check_positive("world_size", world_size)
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in 0..{world_size - 1} (got {rank})")
    if len(step_units) > units_per_step:
        raise ConfigError(f"a step has at most {units_per_step} units (got {len(step_units)}); raise units_per_step")
    slots = micro_steps(units_per_step, world_size)
    hands: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    cost = [1.0 if costs is None else float(costs[unit]) for unit in step_units]
    for index in sorted(range(len(step_units)), key=lambda index: (-cost[index], index)):
        free = (hand for hand in range(world_size) if len(hands[hand]) < slots)
        chosen = min(free, key=lambda hand: (loads[hand], len(hands[hand]), hand))
        hands[chosen].append(step_units[index])
        loads[chosen] += cost[index]
    mine: list[int | None] = list(hands[rank])
    return mine + [None] * (slots - len(mine))


def micro_steps(units_per_step: int, world_size: int) -> int:
    """Micro-steps that every rank takes per optimizer step: ceil(units_per_step / world_size)."""
    return -(-units_per_step // world_size)


# --- the whole run ---------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamPlan:
    """The order of a run as a value: what every rank can work out for itself, without a message."""

    seed: int
    num_units: int
    units_per_step: AllOr = "all"
    shuffle: bool = True
    costs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        resolve_units_per_step(self.units_per_step, self.num_units)
        _weights(self.costs, self.num_units)

    @property
    def full_step(self) -> int:
        """Units of a full step."""
        return resolve_units_per_step(self.units_per_step, self.num_units)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.num_units // self.full_step)

    def global_step(self, position: Position) -> int:
        """Optimizer steps before ``position`` since the start of the run."""
        return position.epoch * self.steps_per_epoch + position.step

    def position(self, global_step: int) -> Position:
        """The position after ``global_step`` optimizer steps."""
        return Position(*divmod(global_step, self.steps_per_epoch))

    def steps(self, epoch: int) -> list[list[int]]:
        """Units of each step of ``epoch``."""
        return epoch_steps(self.seed, epoch, self.num_units, self.units_per_step, self.shuffle)

    def walk(
        self, start: Position, epochs: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Position, int | None]]:
        """Micro-steps of ``rank`` from ``start`` to the end of epoch ``epochs - 1``, in order."""
        for epoch in range(start.epoch, epochs):
            steps = self.steps(epoch)
            for step in range(start.step if epoch == start.epoch else 0, len(steps)):
                for unit in deal(steps[step], self.full_step, rank, world_size, self.costs):
                    yield Position(epoch, step), unit


# --- checks ----------------------------------------------------------------------------------


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1 (got {value})")


def _weights(costs: Sequence[float] | None, count: int) -> list[float]:
    if costs is None:
        return [1.0] * count
    if len(costs) != count or any(not 0 <= cost < float("inf") for cost in costs):
        raise ConfigError(f"costs must be {count} finite numbers >= 0 (got {len(costs)}: {list(costs)[:5]} ...)")
    return [float(cost) for cost in costs]
