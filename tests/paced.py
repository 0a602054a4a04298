"""A run whose students train at the pace of their checkpoints, for tests that disturb them on the way.

As a program: ``python paced.py SECONDS ARGUMENTS...`` is ``gkd ARGUMENTS...`` with a store that takes SECONDS for the
data of each checkpoint, half before and half after they are there. With a checkpoint after each step the
workers make a step in that time, whatever the machine, and a checkpoint is always on its way.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from gkd_dist import cli
from gkd_dist.session import Session
from gkd_dist.storage import Storage

EACH_STEP = ("distill.checkpoint_every=1", "student.alone=false")


class PacedStorage(Storage):
    """A store that is slow for the data of checkpoints, wherever it is pickled to."""

    pace_s: float

    @classmethod
    def around(cls, storage: Storage, pace_s: float) -> PacedStorage:
        """``storage``, slower."""
        paced = cls(storage.protocol, storage.root, storage.config)
        paced.pace_s = pace_s
        return paced

    def __getstate__(self) -> Any:
        return super().__getstate__(), self.pace_s

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])
        self.pace_s = state[1]

    def write(self, key: str, data: Any) -> None:
        """Writes, with a pause before and after data of a checkpoint."""
        pause_s = self.pace_s / 2 if "/state-" in key else 0.0
        time.sleep(pause_s)
        super().write(key, data)
        time.sleep(pause_s)


def main() -> int:
    """The command."""
    from paced import PacedStorage as Portable  # not ``__main__``'s, which a worker does not have

    pace_s, student = float(sys.argv[1]), Session.student
    Session.student = lambda session, name: Portable.around(student(session, name), pace_s)  # type: ignore[method-assign]
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
