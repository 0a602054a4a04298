"""Brings the warnings of training workers to the driver, through the store like all else.

Workers on Ray run where nobody reads their logs. What they warn of goes, as a list of lines, into one small
object per rank; the driver says each line once, however many ranks and restarts repeat it. Best effort: a
store that does not answer costs warnings, never the run.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from gkd_dist.errors import GkdError
from gkd_dist.storage import Storage

log = logging.getLogger(__name__)
FOLDER = "warnings"
_PACKAGE = "gkd_dist"
_MOST = 100  # lines of a rank
_PAUSE_S = 1.0
_LOOKS = 8  # ranks that the driver asks in a round


class _Collector(logging.Handler):
    """Keeps what is logged as a warning or worse; writes nothing itself, because the store logs, too."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.changed = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if len(self.lines) < _MOST and line not in self.lines:
            self.lines.append(line)
            self.changed.set()


@contextlib.contextmanager
def warnings_to_store(folder: Storage, rank: int) -> Iterator[None]:
    """Leaves the warnings of this process in ``folder`` while the ``with`` block runs."""
    collector, stop, key = _Collector(), threading.Event(), _key(rank)

    def write() -> None:
        if collector.changed.is_set():
            collector.changed.clear()
            with contextlib.suppress(GkdError):
                folder.write_json(key, list(collector.lines))

    def follow() -> None:
        while not stop.wait(_PAUSE_S):
            write()

    thread = threading.Thread(target=follow, name="gkd-warnings", daemon=True)
    logging.getLogger(_PACKAGE).addHandler(collector)
    thread.start()
    try:
        yield
    finally:
        logging.getLogger(_PACKAGE).removeHandler(collector)
        stop.set()
        thread.join(timeout=10)
        write()


class WarningReader:
    """The driver's end: says what the ranks of a run have left in ``folder``."""

    def __init__(self, folder: Storage, num_ranks: int) -> None:
        self._folder, self._num_ranks = folder, num_ranks
        self._said: set[str] = set()
        self._next = 0

    def clear(self) -> None:
        """Forgets what earlier runs left."""
        self._folder.delete_tree(FOLDER)

    def say(self, everyone: bool = False) -> None:
        """Logs what some ranks, or all, have left and was not said before.

        A look costs one request per rank: the ranks take turns, so that a large group does not keep the driver busy.
        """
        count = self._num_ranks if everyone else min(_LOOKS, self._num_ranks)
        ranks = [(self._next + index) % self._num_ranks for index in range(count)]
        self._next = (self._next + count) % self._num_ranks
        for rank in sorted(ranks):
            try:
                lines = self._folder.read_json(_key(rank))
            except GkdError:
                continue
            for line in lines if isinstance(lines, list) else ():
                if line not in self._said:
                    self._said.add(line)
                    log.warning("rank %d: %s", rank, line)


def _key(rank: int) -> str:
    return f"{FOLDER}/rank-{rank:05d}.json"
