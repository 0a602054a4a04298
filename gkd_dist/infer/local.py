"""Runs tasks one after the other in this process: no Ray, no copies of the model."""

from __future__ import annotations

from collections import deque

from gkd_dist.infer.plan import Task
from gkd_dist.infer.worker import Request, Result, Worker


class LocalExecutor:
    """The in-process `Executor`, for ``infer.num_actors: 0``; may be used for several runs."""

    num_slots = 1

    def __init__(self) -> None:
        self._worker = Worker()
        self._queue: deque[Request] = deque()

    def submit(self, request: Request) -> None:
        """Queues a task; it runs in `wait`."""
        self._queue.append(request)

    def wait(self) -> list[tuple[Task, Result]]:
        """Runs the oldest task."""
        if not self._queue:
            return []
        request = self._queue.popleft()
        return [(request.task, self._worker.run(request))]

    def discard(self) -> None:
        """Forgets queued tasks."""
        self._queue.clear()
