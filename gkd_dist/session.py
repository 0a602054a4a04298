"""What the stages of one command share: configuration, stores, progress, and one Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from gkd_dist import layout
from gkd_dist.config import Config, TeacherConfig
from gkd_dist.storage import Storage
from gkd_dist.telemetry import Progress

if TYPE_CHECKING:
    from gkd_dist.infer.actor import ActorPool


T = TypeVar("T")


def _nothing() -> None:
    """Without ownership there is nothing to check."""


@dataclass
class Session:
    """One command on one run. Ray and its actors are started when a stage first asks for them."""

    config: Config
    run: Storage
    progress: Progress
    check_ownership: Callable[[], None] = _nothing
    owner: str = ""  # token of this driver; empty: it owns nothing
    _exit: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _ray: bool = False
    _pool: ActorPool | None = None
    _known: dict[str, Any] = field(default_factory=dict)
    _whole: Session | None = None  # of the run, where this is the view of one of several teachers

    @classmethod
    def open(cls, config: Config, progress: Progress) -> Session:
        """A session on ``config.run``; nothing is touched yet."""
        return cls(config, Storage.open(config.run, config.storage), progress)

    @property
    def graph(self) -> Storage:
        """Where graph parts are."""
        url = self.config.stores.graph
        return self.run.child(layout.GRAPH) if url is None else Storage.open(url, self.config.storage)

    @property
    def knowledge(self) -> Storage:
        """Where the knowledge of all teachers is; one folder each."""
        url = self.config.stores.knowledge
        return self.run.child(layout.KNOWLEDGE) if url is None else Storage.open(url, self.config.storage)

    @property
    def teacher(self) -> Storage:
        """Folder of the teacher."""
        if self._whole is not None:
            return self.run.child(layout.one_teacher(self.config.teacher.name))
        return self.run.child(layout.TEACHER)

    def views(self) -> list[Session]:
        """The run as each of its teachers sees it; this session itself where there is one teacher."""
        if not self.config.teachers:
            return [self]
        return self.once("views", lambda: [self._view(teacher) for teacher in self.config.teachers])

    @property
    def is_whole(self) -> bool:
        """Whether this is the run itself and not the view of one of several teachers."""
        return self._whole is None

    @property
    def teacher_label(self) -> str:
        """What the teacher is called in curves and tables: its name where there are several."""
        return "teacher" if self.is_whole else self.config.teacher.name

    def _view(self, teacher: TeacherConfig) -> Session:
        return replace(self, config=self.config.view_of(teacher), _known={}, _whole=self)

    def student(self, name: str) -> Storage:
        """Folder of a student."""
        return self.run.child(layout.student(name))

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, read from the stores once between two stages."""
        if name not in self._known:
            self._known[name] = make()
        value: T = self._known[name]
        return value

    def forget(self) -> None:
        """After a stage has written: what was read may have changed."""
        self._known.clear()

    @property
    def allow_code(self) -> tuple[str, ...]:
        """User classes that this run's own configuration names, and no others."""
        models = [teacher.model for teacher in self.config.all_teachers()] + [self.config.student.model]
        kinds = dict.fromkeys(model.kind for model in models)
        return tuple(kind for kind in kinds if ":" in kind)

    def start_ray(self) -> None:
        """Connects to Ray once per session, with room for the largest stage."""
        if self._ray:
            return
        from gkd_dist.infer.cluster import start_ray

        cpus, gpus = needed_resources(self.config)
        with _keep_signals():
            self._exit.enter_context(start_ray(self.config.ray, cpus, gpus))
        self._ray = True

    def actors(self) -> ActorPool | None:
        """Inference actors, shared by all models of the session; None: work in this process."""
        if self._whole is not None:
            return self._whole.actors()
        if self.config.infer.num_actors == 0:
            return None
        self.start_ray()
        if self._pool is None:
            from gkd_dist.infer.actor import ActorPool

            self._pool = self._exit.enter_context(ActorPool(self.config.infer))
        return self._pool

    def make_room_for_workers(self) -> None:
        """Ends idle actors where students may need their processors; a local Ray has room for both."""
        if self._pool is not None and not (is_local(self.config) and self.config.ray.num_cpus is None):
            self._pool.close()
            self._pool = None

    def close(self) -> None:
        """Ends all that was started."""
        self._pool = None
        self._exit.close()


def is_local(config: Config) -> bool:
    """Whether this command starts a Ray of its own."""
    return config.ray.address == "local" and "RAY_ADDRESS" not in os.environ


def needed_resources(config: Config) -> tuple[float, float]:
    """(CPUs, GPUs) that the run takes at a time.

    The CPUs of a local Ray are a count, not hardware: there idle actors may stay while students
    train. A cluster is asked for what its largest stage takes. Of workers [min, max] there is room for all on a
    local Ray; a cluster is asked for the fewest.
    """
    infer, distill = config.infer, config.distill
    counted = is_local(config) and config.ray.num_cpus is None
    workers = (distill.max_workers if counted else distill.min_workers) if distill.launcher == "ray" else 0
    cpus = (infer.num_actors * infer.cpus_per_actor, workers * distill.cpus_per_worker)
    gpus = max(infer.num_actors * infer.gpus_per_actor, workers * distill.gpus_per_worker)
    return (sum(cpus) if counted else max(cpus)), gpus


@contextlib.contextmanager
def _keep_signals() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM by one that exits without cleaning up."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
