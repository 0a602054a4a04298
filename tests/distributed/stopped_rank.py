"""One rank of a group whose rank 1 is late or never comes: ``python stopped_rank.py late|stopped|asleep|type``.

``asleep`` is late by more than the silence after which a rank counts as dead; with ``type`` both come, with numbers
that the backend cannot add.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from gkd_dist.distill.beacon import Beacon
from gkd_dist.errors import StudentError
from gkd_dist.world import World


def main() -> None:
    """Rank 0 prints what it got, and after how long."""
    world = World.from_env()
    world.connect(timeout_s=20 if sys.argv[1] == "asleep" else 4)
    with Beacon(world, timeout_s=3 if sys.argv[1] == "asleep" else 20):
        world.barrier()
        started = time.monotonic()
        world.place.doing, world.place.step = "counting", 7
        if world.rank == 1:
            if sys.argv[1] == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0 if sys.argv[1] == "type" else 5 if sys.argv[1] == "asleep" else 2)
        try:
            print(
                f"sum {float(world.sum(torch.ones(1, dtype=torch.int16 if sys.argv[1] == 'type' else None)))}", end=" "
            )
        except StudentError as error:
            print(f"error {error}", end=" ")
        except RuntimeError as error:
            print(f"other error {error}", end=" ")
        print(f"after {time.monotonic() - started:.1f} s", flush=True)
    os._exit(0)  # the group is broken: its destructor would wait for the stopped rank


if __name__ == "__main__":
    main()
