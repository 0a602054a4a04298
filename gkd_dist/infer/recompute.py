"""Some parts of a knowledge store again, from the stored graph and the teacher alone.

A part's knowledge depends on the layers of the parts around it, one ring further for each layer
below; those are computed too, and nothing else is. They go to a scratch store, whatever layer
outputs there may be, so that nothing that is checked takes part in the check.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from gkd_dist.config import InferConfig
from gkd_dist.infer.commits import Commits
from gkd_dist.infer.local import LocalExecutor
from gkd_dist.infer.packing import Packing
from gkd_dist.infer.plan import KNOWLEDGE, Task, TaskGraph, Wants
from gkd_dist.infer.run import drive_tasks, prepare
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.entries import ObjectEntry
from gkd_dist.storage import Storage

_SCRATCH = "0" * 64  # a fingerprint that no run has


class Closure(TaskGraph):
    """The tasks of ``plan`` that the knowledge of ``parts`` follows from."""

    def __init__(self, plan: TaskGraph, parts: Iterable[int]) -> None:
        self.__dict__.update(plan.__dict__)
        self._wanted: set[Task] = set()
        todo = [Task(KNOWLEDGE, part) for part in parts]
        while todo:
            task = todo.pop()
            if task not in self._wanted:
                self._wanted.add(task)
                todo += plan.needs(task)

    def tasks(self) -> list[Task]:
        """As in the whole plan, layers first."""
        return [task for task in super().tasks() if task in self._wanted]

    def readers(self, task: Task) -> list[Task]:
        """Those among these tasks."""
        return [reader for reader in super().readers(task) if reader in self._wanted]


def recompute_parts(
    model: Storage,
    graph: GraphStore,
    scratch: Storage,
    wants: Wants,
    settings: InferConfig,
    packing: Packing,
    parts: list[int],
    *,
    max_tasks: int,
    allow_code: Collection[str] = (),
    announce: Callable[[list[int], int, int], None] = lambda parts, tasks, total: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, ObjectEntry]:
    """Entries of new objects in ``scratch`` by part, computed in this process.

    Parts at the end of ``parts`` are left out where they would take more than ``max_tasks`` tasks;
    the first one is always computed. ``announce(parts, tasks, total)`` is told what is done, in
    how many tasks, and how many a whole inference has. Errors as in `infer_nodes`.
    """
    plan, job, _, _ = prepare(model, graph, scratch, wants, settings, packing, _SCRATCH, tuple(allow_code))
    closure = Closure(plan, parts)
    while len(parts) > 1 and len(closure.tasks()) > max_tasks:
        parts = parts[:-1]
        closure = Closure(plan, parts)
    announce(parts, len(closure.tasks()), len(plan.tasks()))
    run = drive_tasks(closure, job, LocalExecutor(), Commits(job.tmp, _SCRATCH), progress)
    return {part: run.entry(Task(KNOWLEDGE, part)) for part in parts}
