"""Who may write checkpoints, and a thread that writes them while training goes on.

One process at a time writes checkpoints: the one whose training began last. It puts a token of its
own into ``checkpoints/writer.json`` before it reads what to go on from, and looks for it before each
commit. A process that was replaced and does not know it, on a host that was cut off or after it
was stopped for a while, finds another token and ends.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from gkd_dist import layout
from gkd_dist.distill.checkpoint import TrainState, delete_uncommitted, save_checkpoint
from gkd_dist.errors import JsonError, ObjectNotFoundError, OwnershipError
from gkd_dist.models.io import ModelSpec, save_model
from gkd_dist.storage import Storage

log = logging.getLogger(__name__)
WRITER = f"{layout.CHECKPOINTS}/writer.json"
_PATIENCE_S = 10.0  # with an upload, when training has failed


class Claim:
    """The right to write a model's checkpoints. Taking it takes it from whoever had it."""

    def __init__(self, storage: Storage, owns_run: Callable[[], None] | None = None) -> None:
        self._storage, self._owns_run = storage, owns_run
        self._token = secrets.token_hex(16)

    def take(self) -> None:
        """Becomes the writer; `OwnershipError` where the run has another driver by now."""
        if self._owns_run is not None:
            self._owns_run()
        mine = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        self._storage.write_json(WRITER, mine)

    def check(self) -> None:
        """`OwnershipError` unless this is still the writer, for the driver that still owns the run."""
        if self._owns_run is not None:
            self._owns_run()
        try:
            found = self._storage.read_json(WRITER)
        except (ObjectNotFoundError, JsonError):
            found = None
        if not isinstance(found, dict) or found.get("token") != self._token:
            other = f"process {found.get('pid')} on {found.get('host')}" if isinstance(found, dict) else "nobody"
            raise OwnershipError(
                f"process {os.getpid()} on {socket.gethostname()} no longer writes the checkpoints of "
                f"{self._storage.url}, {other} does; nothing more is written here, let the other one finish"
            )


def circumstances(num_ranks: int) -> dict[str, str | int]:
    """What the last bits of a run depend on, beside its configuration."""
    return {"ranks": num_ranks, "threads": torch.get_num_threads(), "processor": _processor()}


def say_changes(before: dict[str, str | int], now: dict[str, str | int]) -> None:
    """Says, where a run goes on under other circumstances, that it is the same up to rounding only."""
    changed = [f"{name} {before[name]} to {now[name]}" for name in now if name in before and before[name] != now[name]]
    if changed:
        log.warning("goes on with %s: the result is the same up to rounding, not bit for bit", ", ".join(changed))


def _processor() -> str:
    """Model of the processor; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


class CheckpointSaver:
    """Writes snapshots in the background, one after the other, every one of them.

    One snapshot is on its way at most: `save` waits until the one before is committed. So a store that
    is slower than training slows it down instead of filling the memory, and a run that is killed
    loses at most the steps since the last but one snapshot. What goes wrong is raised by the next
    `save`, `wait` or `check`.
    """

    def __init__(self, storage: Storage, fingerprint: str, keep: int, claim: Claim) -> None:
        self._storage, self._fingerprint, self._keep, self._claim = storage, fingerprint, keep, claim
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.wait_s = 0.0  # that the loop has waited for the store

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(_PATIENCE_S)  # what it writes is whole whatever has happened to the loop

    @property
    def failed(self) -> bool:
        """Whether a snapshot could not be written."""
        return self._error is not None

    def tidy(self) -> None:
        """Removes what killed writers have left."""
        self._claim.check()
        orphans = delete_uncommitted(self._storage)
        if orphans:
            log.info("removed %d unfinished checkpoints from %s", len(orphans), self._storage.url)

    def save(self, snapshot: TrainState) -> None:
        """Begins to write a snapshot, whose tensors nobody changes from now on."""
        self._begin(lambda: save_checkpoint(self._storage, snapshot, self._fingerprint, self._keep, self._claim.check))

    def publish(self, model: nn.Module, spec: ModelSpec) -> None:
        """Begins to write the model that training ends with, unless another process trains it by now."""

        def work() -> None:
            self._claim.check()
            save_model(self._storage, model, spec, self._fingerprint)

        self._begin(work)

    def _begin(self, work: Callable[[], None]) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(work,), name="gkd-checkpoint", daemon=True)
        self._thread.start()

    def is_busy(self, patience_s: float | None = None) -> bool:
        """Whether something is still on its way after ``patience_s`` at most; None: after it is committed."""
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.join(patience_s)
            self._thread = self._thread if self._thread.is_alive() else None
        self.wait_s += time.perf_counter() - started
        return self._thread is not None

    def wait(self) -> None:
        """Until all that was saved is committed."""
        self.is_busy()
        self.check()

    def check(self) -> None:
        """Raises what has kept a snapshot from being written."""
        if self._error is not None:
            raise self._error

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
