"""What driver and workers on Ray tell each other, through the store: one small object for each matter.

Each driver has names of its own, so that what workers of a driver say that has lost the run reaches
nobody else::

    failure-<owner8>.json   of a worker: an error that a restart cannot mend
    trouble-<owner8>.json   of a worker: why it ends its own process, and with it, the group
    alive-<owner8>.json     of rank 0: that it works, and where it is
    stop-<owner8>.json      of the driver: keep a checkpoint and end
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress

from gkd_dist import errors
from gkd_dist.errors import GkdError, ObjectNotFoundError, StorageError, StudentError
from gkd_dist.storage import Storage

log = logging.getLogger(__name__)


class Notes:
    """The notes of one driver and its workers in ``folder``."""

    def __init__(self, folder: Storage, owner: str) -> None:
        self._folder, self._of = folder, owner[:8] or "any"

    def clear(self, *matters: str) -> None:
        """Forgets notes; all of them where none is named."""
        for matter in matters or ("failure", "trouble", "alive", "stop"):
            self._folder.delete(self._key(matter))

    def _key(self, matter: str) -> str:
        return f"{matter}-{self._of}.json"

    # --- of workers --------------------------------------------------------------------------

    def leave_failure(self, error: GkdError, details: str = "") -> None:
        """An error for the driver to raise; ``details`` show there with ``--debug``. Best effort."""
        note = {"kind": type(error).__name__, "message": str(error), "details": details}
        with suppress(StorageError):
            self._folder.write_json(self._key("failure"), note)

    def has_failed(self) -> bool:
        """Whether a worker has left one."""
        return self._folder.exists(self._key("failure"))

    def leave_trouble(self, sentence: str) -> None:
        """Best effort: who says it is about to end."""
        with suppress(StorageError):
            self._folder.write_json(self._key("trouble"), {"message": sentence})

    def say_alive(self, count: int, place: str) -> None:
        """Best effort: the next one comes soon."""
        with suppress(StorageError):
            self._folder.write_json(self._key("alive"), {"count": count, "place": place})

    def is_asked_to_stop(self) -> bool:
        """Whether the driver wants the end; asked again soon where the store does not answer."""
        with suppress(StorageError):
            return self._folder.exists(self._key("stop"))
        return False

    # --- of the driver -----------------------------------------------------------------------

    def ask_to_stop(self) -> bool:
        """Whether the request is there."""
        try:
            self._folder.write_json(self._key("stop"), {"at": time.time()})
        except StorageError as error:
            log.warning("cannot ask the workers to stop: %s", error)
            return False
        return True

    def raise_failure(self) -> None:
        """The error that a worker has left, as what it was."""
        try:
            failure = self._folder.read_json(self._key("failure"))
        except (ObjectNotFoundError, ValueError):
            return
        with suppress(StorageError):
            self.clear("failure")
        error = getattr(errors, str(failure.get("kind")), StudentError)(str(failure.get("message")))
        if failure.get("details"):
            error.add_note(str(failure["details"]))
        raise error

    def tell_trouble(self) -> None:
        """Says why a group is started again."""
        with suppress(StorageError, ValueError):
            trouble = self._folder.read_json(self._key("trouble"))
            self.clear("trouble")
            log.warning("%s; the worker group is started again", trouble.get("message"))

    def sign(self) -> str:
        """The last sign of life of rank 0; empty before the first."""
        with suppress(StorageError, ValueError):
            return str(self._folder.read_json(self._key("alive")))
        return ""


class Patience:
    """Says when the workers have been silent for long, and again after as long; never ends anything."""

    def __init__(self, every_s: float, now: float) -> None:
        self._every_s, self._heard_at, self._said_at, self._last = every_s, now, now, ""

    def look(self, sign: str, now: float, missing: str) -> str | None:
        """A sentence that is due now, ``missing`` in it; ``sign`` is what was heard last."""
        if sign != self._last:
            self._last, self._heard_at, self._said_at = sign, now, now
        if now - self._said_at < self._every_s:
            return None
        self._said_at = now
        return f"nothing heard of the workers for {now - self._heard_at:.0f} s: Ray waits for {missing}, or starts them"
