"""How long tasks take: where the time went, and which tasks take much longer than their like."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from gkd_dist.infer.plan import Task

STRAGGLES_AFTER = 3.0  # times the median of its layer
SHORTEST_STRAGGLE_S = 10.0


@dataclass
class TaskTimes:
    """Seconds of the tasks that are done, by layer."""

    _phases: dict[str, float] = field(default_factory=dict)
    _layers: dict[int, dict[int, float]] = field(default_factory=dict)

    def add(self, task: Task, seconds: Mapping[str, float]) -> None:
        """``seconds`` per phase (``read``, ``compute``, ``write``) of a finished task."""
        for phase, value in seconds.items():
            self._phases[phase] = self._phases.get(phase, 0.0) + value
        self._layers.setdefault(task.layer, {})[task.part] = sum(seconds.values())

    def limit_s(self, layer: int) -> float | None:
        """Seconds after which a task of ``layer`` is a straggler; None while too few are done to tell."""
        done = self._layers.get(layer, {})
        if len(done) < 3:
            return None
        return max(SHORTEST_STRAGGLE_S, STRAGGLES_AFTER * statistics.median(done.values()))

    def summary(self) -> list[str]:
        """Lines for the log: the phases, and the slowest part of each layer."""
        if not self._phases:
            return []
        phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in self._phases.items())
        lines = [f"tasks: {sum(map(len, self._layers.values()))}, {phases} in all workers together"]
        for layer, done in sorted(self._layers.items()):
            part, slowest = max(done.items(), key=lambda item: item[1])
            middle = statistics.median(done.values())
            if slowest > STRAGGLES_AFTER * middle and slowest > 1:
                lines.append(f"{Task(layer, part)} took {slowest:.1f} s, the median of its like is {middle:.1f} s")
        return lines
