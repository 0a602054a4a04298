"""A pool of Ray actors: where inference runs on many processes or machines.

The pool owns what happens when an actor is lost: it starts another one (``infer.max_restarts`` per
place) and gives the lost tasks to whichever actor is least busy (``infer.max_task_retries`` each).
Ray's own restarts stay off, because Ray gives a task back to the actor that it killed and fails
new ones while that actor restarts. `gkd_dist.infer.cluster.start_ray` must have run before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from gkd_dist.config import InferConfig
from gkd_dist.errors import InfrastructureError, TeacherError
from gkd_dist.infer.plan import Task
from gkd_dist.infer.times import STRAGGLES_AFTER, TaskTimes
from gkd_dist.infer.worker import Request, Result, Worker

log = logging.getLogger(__name__)
_WAIT_S = 5.0  # longest wait for a result before the driver looks around
_SILENT_S = 60.0  # an actor that does not answer for so long is replaced
_REPORT_S = 60.0  # between two remarks that nothing has come back


class TeacherActor(Worker):
    """A `Worker` in a process of its own."""

    def ping(self) -> int:
        """Process id; answers also while tasks are running."""
        return os.getpid()


@dataclass
class _Place:
    """One actor and its successors."""

    number: int
    actor: Any
    restarts: int = 0
    ping: Any = None
    pinged_at: float = 0.0
    pid: int | None = None  # None until the actor has answered once
    started: bool = False  # whether it has answered or given a result


@dataclass(frozen=True)
class _Flight:
    """A task on its way, and how often it was lost before."""

    request: Request
    place: _Place
    actor: Any
    lost: int = 0
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        process = "not started yet" if self.place.pid is None else f"process {self.place.pid}"
        return f"{self.request.task} on inference actor {self.place.number} ({process})"


class ActorPool:
    """``settings.num_actors`` actors, started at the first task and kept for many runs: an `Executor`."""

    def __init__(self, settings: InferConfig) -> None:
        self._settings = settings
        self._places: list[_Place] = []
        self._flights: dict[Any, _Flight] = {}
        self._window = settings.window
        self._times = TaskTimes()
        self._stragglers: set[Any] = set()
        self._last_news = time.monotonic()
        self._reported = self._looked = self._last_news

    def __enter__(self) -> ActorPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def num_slots(self) -> int:
        """Tasks that may be in flight: ``window`` per actor, fewer once Ray has ended one for its memory."""
        return self._settings.num_actors * self._window

    def pids(self) -> list[int]:
        """Process ids of the actors; waits until all have started."""
        self._start()
        found: list[int] = ray.get([place.actor.ping.remote() for place in self._places])
        for place, pid in zip(self._places, found, strict=True):
            place.pid, place.started = pid, True
        return found

    def submit(self, request: Request) -> None:
        """Gives a task to the least busy actor."""
        self._start()
        if not self._flights:
            self._last_news = self._reported = time.monotonic()
        self._dispatch(request, 0)

    def wait(self) -> list[tuple[Task, Result]]:
        """Results that have arrived within some seconds, perhaps none.

        Raises what a task raised, and `TeacherError` where actors are lost too often.
        """
        ready, _ = ray.wait(list(self._flights), num_returns=1, timeout=_WAIT_S)
        self._hear_pings()
        if not ready or time.monotonic() - self._looked > _WAIT_S:
            self._looked = time.monotonic()
            self._look_around()
        self._tell_stragglers()
        results = []
        for ref in ready:
            flight = self._flights.pop(ref)
            self._last_news = time.monotonic()
            try:
                result: Result = ray.get(ref)
                flight.place.started = flight.place.started or flight.place.actor is flight.actor
                self._times.add(flight.request.task, result.seconds)
                results.append((flight.request.task, result))
            except RayTaskError as error:
                if isinstance(error.cause, Exception):
                    raise error.cause from error
                raise
            except RayError as error:
                self._recover(flight, error)
        return results

    def discard(self) -> None:
        """Forgets tasks in flight; those that have started end unheard."""
        for ref in self._flights:
            with contextlib.suppress(RayError):
                ray.cancel(ref, force=False)
        self._flights.clear()
        self._times = TaskTimes()
        self._stragglers.clear()

    def close(self) -> None:
        """Ends the actors."""
        self.discard()
        for place in self._places:
            _kill(place.actor)
        self._places.clear()

    def _start(self) -> None:
        if not self._places:
            self._check_resources()
            self._places = [_Place(number, self._new_actor()) for number in range(self._settings.num_actors)]

    def _check_resources(self) -> None:
        """Ray would wait for ever for what no node has."""
        settings, nodes = self._settings, [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = dict(settings.resources)
        if settings.memory_per_actor is not None:
            wanted["memory"] = float(settings.memory_per_actor)
        for name, amount in wanted.items():
            largest = max((node.get(name, 0.0) for node in nodes), default=0.0)
            total = sum(node.get(name, 0.0) for node in nodes)
            if amount > largest or amount * settings.num_actors > total:
                setting = "infer.memory_per_actor" if name == "memory" else f"infer.resources.{name}"
                raise InfrastructureError(
                    f"{settings.num_actors} inference actors need {amount:g} of {name} each, the cluster has {total:g} "
                    f"in all and {largest:g} on one node; add nodes, or lower {setting} or infer.num_actors"
                )

    def _new_actor(self) -> Any:
        settings = self._settings
        actor_class: Any = ray.remote(TeacherActor)
        return actor_class.options(
            num_cpus=settings.cpus_per_actor,
            num_gpus=settings.gpus_per_actor,
            memory=settings.memory_per_actor,
            resources=dict(settings.resources) or None,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=settings.window + 1,  # one more answers pings
            scheduling_strategy="SPREAD",
        ).remote()

    def _dispatch(self, request: Request, lost: int, avoid: _Place | None = None) -> None:
        load = {id(place): 0 for place in self._places}
        started = [place for place in self._places if place.started]  # the cluster may have no room for a successor
        for flight in self._flights.values():
            load[id(flight.place)] = load.get(id(flight.place), 0) + 1
        place = min(started or self._places, key=lambda place: (load[id(place)], place is avoid, place.number))
        ref = place.actor.run.remote(request)
        self._flights[ref] = _Flight(request, place, place.actor, lost)

    def _recover(self, flight: _Flight, error: RayError) -> None:
        """Replaces the lost actor, unless that has happened, and sends its task elsewhere."""
        place, task, lost = flight.place, flight.request.task, flight.lost + 1
        reason = str(error).strip().splitlines()[0]
        if lost > self._settings.max_task_retries:
            raise TeacherError(
                f"{task} was lost {lost} times, last with inference actor {place.number} ({reason}); "
                "if the actor ran out of memory raise partition.num_parts or lower infer.window, "
                "else raise infer.max_task_retries"
            ) from error
        log.warning("inference actor %d was lost (%s); %s runs again", place.number, reason, task)
        if isinstance(error, OutOfMemoryError) and self._window > 1:
            self._window -= 1
            log.warning("its machine ran out of memory: %d tasks in flight per actor from now on", self._window)
        if place.actor is flight.actor:
            self._replace(place, error)
        self._dispatch(flight.request, lost, avoid=place)

    def _replace(self, place: _Place, error: RayError | None) -> None:
        _kill(place.actor)
        if place.restarts < self._settings.max_restarts:
            place.actor, place.restarts, place.pid, place.started = self._new_actor(), place.restarts + 1, None, False
            place.ping, place.pinged_at = place.actor.ping.remote(), time.monotonic()
            return
        self._places.remove(place)
        log.warning(
            "inference actor %d is given up after %d restarts (infer.max_restarts)", place.number, place.restarts
        )
        if not self._places:
            raise TeacherError(
                f"all {self._settings.num_actors} inference actors were lost, each after {self._settings.max_restarts} "
                "restarts; see the Ray logs for the reason, and run the same command again to go on"
            ) from error

    def _tell_stragglers(self) -> None:
        """Names, once, each task that takes much longer than its like."""
        now = time.monotonic()
        for ref, flight in self._flights.items():
            limit = self._times.limit_s(flight.request.task.layer)
            if limit is not None and now - flight.since > limit and ref not in self._stragglers:
                self._stragglers.add(ref)
                log.warning(
                    "straggler: %s runs for %.0f s, more than %.0f times the median of its like",
                    flight,
                    now - flight.since,
                    STRAGGLES_AFTER,
                )

    def _hear_pings(self) -> None:
        """Notes which actors have answered."""
        for place in self._places:
            if place.ping is not None and ray.wait([place.ping], timeout=0)[0]:
                with contextlib.suppress(RayError):  # its tasks will tell
                    place.pid, place.started = ray.get(place.ping), True
                place.ping = None

    def _look_around(self) -> None:
        """Replaces actors that have stopped answering, and says what is being waited for."""
        now = time.monotonic()
        for place in list(self._places):
            if place.ping is None:
                place.ping, place.pinged_at = place.actor.ping.remote(), now
            elif place.pid is not None and now - place.pinged_at > _SILENT_S:
                log.warning(
                    "inference actor %d (process %d) has not answered for %.0f s", place.number, place.pid, _SILENT_S
                )
                _kill(place.actor)  # its tasks fail, and are recovered like those of any lost actor
                place.ping, place.pid, place.started = None, None, False
        if now - max(self._last_news, self._reported) > _REPORT_S:
            self._reported = now
            oldest = min(self._flights.values(), key=lambda flight: flight.since)
            log.warning(
                "no result for %.0f s: waiting for %s on inference actor %d (%s), and %d other tasks",
                now - self._last_news,
                oldest.request.task,
                oldest.place.number,
                "not started yet: does the cluster have room?"
                if oldest.place.pid is None
                else f"process {oldest.place.pid}",
                len(self._flights) - 1,
            )


def _kill(actor: Any) -> None:
    with contextlib.suppress(RayError, ValueError):  # dead already
        ray.kill(actor, no_restart=True)
