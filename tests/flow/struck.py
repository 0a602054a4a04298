"""``gkd`` that is struck by a signal at one of its writes: python struck.py SIGNAL WHEN PATTERN NUMBER ARGUMENTS...

The signal comes ``before`` or ``after`` the write number NUMBER of a key that matches PATTERN, or
when ``half`` of it is written to its temporary file.
"""

from __future__ import annotations

import fnmatch
import os
import signal
import sys

from gkd_dist import cli
from gkd_dist.storage import Storage


def strike_at(name: str, when: str, pattern: str, number: int) -> None:
    """Wraps `Storage.write` of this process."""
    write, left = Storage.write, [number]

    def strike() -> None:
        os.kill(os.getpid(), signal.Signals[name])

    def strike_in_the_middle(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        strike()

    def watched(storage: Storage, key: str, data: bytes) -> None:
        left[0] -= fnmatch.fnmatch(f"{storage.url}/{key}", f"*/{pattern}")
        struck = left[0] == 0
        left[0] -= struck
        if struck and when == "before":
            strike()
        if struck and when == "half":
            os.fsync = strike_in_the_middle
        write(storage, key, data)
        if struck and when == "after":
            strike()

    Storage.write = watched  # type: ignore[assignment]


if __name__ == "__main__":
    strike_at(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
    sys.exit(cli.main(sys.argv[5:]))
