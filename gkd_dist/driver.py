"""Opens a run for one command: checks the stores, takes ownership, saves the configuration."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from gkd_dist import layout
from gkd_dist.config import Config
from gkd_dist.config_file import dump_config, parse_config
from gkd_dist.errors import ConfigError, ObjectNotFoundError
from gkd_dist.flow import Decision, decide
from gkd_dist.owner import Ownership
from gkd_dist.session import Session
from gkd_dist.storage import Storage
from gkd_dist.telemetry import Progress


def is_follower(config: Config, stage: str) -> bool:
    """Whether this process is a rank above 0 of a launcher's group: it works but drives nothing."""
    launched = config.distill.launcher in ("torchrun", "deepspeed")
    return stage == "distill" and launched and os.environ.get("RANK", "0") != "0"


@contextmanager
def driving(
    config: Config, *, take_over: bool = False, follow: bool = False, save_config: bool = True
) -> Iterator[Session]:
    """A session that owns the run for the time of a ``with`` block.

    The stores are written to once before anything is started. ``follow`` neither owns nor writes;
    without ``save_config`` the run keeps the configuration that it was last driven with.
    """
    with ExitStack() as stack:
        session = Session.open(config, Progress())
        stack.callback(session.close)
        if not follow:
            for storage in (session.run, session.graph, session.knowledge):
                storage.check_writable()
            owner = stack.enter_context(Ownership(session.run, take_over))
            session.check_ownership, session.owner = owner.check, owner.token
            if save_config:
                session.run.write(layout.CONFIG, dump_config(config).encode())
        yield session


def plan_run(config: Config, redo: Collection[str]) -> list[Decision]:
    """What a run would do now; nothing is started or written."""
    session = Session.open(config, Progress())
    try:
        return decide(session, redo)
    finally:
        session.close()


def graph_meta(config: Config) -> dict[str, Any] | None:
    """Counts of the graph store; None where there is none of this configuration yet."""
    from gkd_dist import stages

    session = Session.open(config, Progress())
    try:
        return stages.open_graph(session).manifest.meta if stages.partition_done(session) else None
    finally:
        session.close()


def config_of(run: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run was last driven with, from its URL."""
    storage = Storage.open(run)
    try:
        text = storage.read(layout.CONFIG).decode()
    except ObjectNotFoundError as error:
        raise ConfigError(
            f"{run} is neither a configuration file nor a run ({layout.CONFIG} is missing there); correct the path"
        ) from error
    return parse_config(text, f"{storage.url}/{layout.CONFIG}", [*overrides, f"run={run}"])
