"""The stages as data, and what `gkd run` does with them: skip, do, redo, go on.

A finished stage is skipped, a changed one is done again, a half-finished one goes on where it
stopped (each stage knows how). Nothing here imports torch, Ray or DeepSpeed: names are resolved when
a stage runs.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from gkd_dist import layout
from gkd_dist.errors import DataError, ManifestError, ModelError, NewerSchemaError, ObjectNotFoundError
from gkd_dist.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One verb: what it reads and writes (for people), and where its functions are.

    ``module`` holds ``<name>``, ``<name>_done``, ``<name>_fingerprint`` and ``<name>_discard``, each of a
    `Session`.
    """

    name: str
    reads: str
    writes: str
    module: str

    def _function(self, suffix: str) -> Callable[[Session], Any]:
        function: Callable[[Session], Any] = getattr(importlib.import_module(self.module), self.name + suffix)
        return function

    def run(self, session: Session) -> None:
        """Does the work."""
        self._function("")(session)

    def is_done(self, session: Session) -> bool:
        """Whether its result is there and of today's configuration."""
        return bool(self._function("_done")(session))

    def fingerprint(self, session: Session) -> str:
        """What its result depends on."""
        return str(self._function("_fingerprint")(session))

    def discard(self, session: Session) -> None:
        """Forgets its result and what a half-finished one left, so that it starts from the beginning."""
        self._function("_discard")(session)
        session.forget()


STAGES = (
    Stage("partition", "data set", "graph/", "gkd_dist.stages"),
    Stage("teach", "graph/, checkpoint", "teacher/", "gkd_dist.stages"),
    Stage("infer", "graph/, teacher/", "knowledge/", "gkd_dist.stages"),
    Stage("distill", "graph/, knowledge/", "students/", "gkd_dist.stages"),
    Stage("evaluate", "graph/, knowledge/, students/", "metrics.json", "gkd_dist.results"),
    Stage("export", "students/", "export/", "gkd_dist.results"),
    Stage("report", "metrics.json, tensorboard/", "report.html", "gkd_dist.results"),
)
NAMES = tuple(stage.name for stage in STAGES)


def stage(name: str) -> Stage:
    """The stage of that name."""
    return STAGES[NAMES.index(name)]


@dataclass(frozen=True)
class Decision:
    """What would happen to a stage, and why."""

    stage: str
    action: str  # skip | run | wait
    reason: str


def decide(session: Session, redo: Collection[str] = ()) -> list[Decision]:
    """What `run_flow` would do now. Reads manifests, starts nothing, writes nothing."""
    decisions: list[Decision] = []
    for one in STAGES:
        waiting = next((d.stage for d in decisions if d.action != "skip"), None)
        if waiting is not None:
            decisions.append(Decision(one.name, "run", f"after {waiting}, unless that gives the same result again"))
        elif one.name in redo:
            decisions.append(Decision(one.name, "run", "asked for with --redo"))
        elif one.is_done(session):
            decisions.append(Decision(one.name, "skip", f"{one.writes} is finished and of this configuration"))
        else:
            decisions.append(
                Decision(one.name, "run", f"{one.writes} is missing, unfinished or of another configuration")
            )
    return decisions


def run_flow(session: Session, redo: Collection[str] = ()) -> list[Decision]:
    """Runs every stage that is not finished; returns what was done.

    What is to be done again is discarded before anything else. So a run that is interrupted goes on
    without ``redo``.
    """
    for one in reversed(STAGES):  # a stage is found by what it reads
        if one.name in redo:
            one.discard(session)
    done: list[Decision] = []
    for one in STAGES:
        if one.is_done(session):
            log.info("%s: finished before, skipped", one.name)
            done.append(Decision(one.name, "skip", "finished before"))
            continue
        run_stage(session, one)
        done.append(Decision(one.name, "run", ""))
    return done


def run_stage(session: Session, one: Stage) -> None:
    """Runs one stage and leaves a record of what it took."""
    from gkd_dist.telemetry import peak_rss_bytes

    log.info("%s: started", one.name)
    started = time.perf_counter()
    one.run(session)
    session.forget()
    wall_s = time.perf_counter() - started
    session.check_ownership()
    session.run.write_json(
        layout.stage_record(one.name),
        {
            "stage": one.name,
            "fingerprint": one.fingerprint(session),
            "wall_s": wall_s,
            "peak_rss_bytes": peak_rss_bytes(),
            "finished_at": time.time(),
        },
    )
    log.info("%s: finished in %.1f s", one.name, wall_s)


def require_before(session: Session, name: str) -> None:
    """`DataError` naming the first unfinished stage that ``name`` builds on."""
    for earlier in STAGES[: NAMES.index(name)]:
        if earlier.name == "export":
            continue  # nothing reads it
        try:
            finished = earlier.is_done(session)
        except NewerSchemaError:
            raise
        except (ManifestError, ModelError, ObjectNotFoundError):
            finished = False
        if not finished:
            raise DataError(
                f"stage {name} reads what {earlier.name} writes ({earlier.writes}), which is not finished for this "
                f"configuration in {session.run.url}; run `gkd {earlier.name}` first, or `gkd run`"
            )


def stage_records(session: Session) -> dict[str, dict[str, Any]]:
    """What each finished stage left about itself, by name."""
    records = {}
    for name in NAMES:
        try:
            record = session.run.read_json(layout.stage_record(name))
        except (ObjectNotFoundError, ValueError):
            continue
        if isinstance(record, dict):
            records[name] = record
    return records
