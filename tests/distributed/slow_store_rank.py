"""One rank of a group whose store is slower than its bounds: ``python slow_store_rank.py STORE NAME term|fail``.

The store takes `PACE_S` for the data of each checkpoint, and there is one after each step. From the first step on a
collective may take `COLLECTIVE_S`, and a rank be silent for `SILENT_S`, both shorter. ``term``: rank 1 gets SIGTERM at
step 1; ``fail``: the store refuses the data in the end. Ends as ``gkd`` does: one sentence and its exit code.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from gkd_dist.distill import trainer
from gkd_dist.distill.job import TrainJob
from gkd_dist.errors import StorageError
from gkd_dist.storage import Storage
from gkd_dist.world import World
from tests.distributed.training_rank import config, run_to_the_end, strike_at
from tests.paced import PacedStorage
from tests.training import make_task

PACE_S, COLLECTIVE_S, SILENT_S = 8.0, 5.0, 5.0


class Refusing(PacedStorage):
    """Takes as long, and then refuses."""

    def write(self, key: str, data: Any) -> None:
        """Not the data of a checkpoint."""
        if "/state-" in key:
            time.sleep(self.pace_s)
            raise StorageError(f"cannot write {self.describe(key)}: no space; make room")
        super().write(key, data)


def shorten_waits() -> None:
    """From the first step on: the start of the ranks takes longer on a busy machine."""
    real = trainer.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == 0:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=COLLECTIVE_S))
        return real(*args, **kwargs)

    trainer.train_step = step  # type: ignore[assignment]


def main() -> int:
    """Trains with what the command line says."""
    store, name, how = sys.argv[1:]
    world, storage = World.from_env(), Storage.open(store)
    shorten_waits()
    if how == "term":
        strike_at("term", 1, "1")
    train = config(1, world.world_size).model_copy(update={"checkpoint_every": 1, "peer_timeout_s": SILENT_S})
    task = make_task(storage, name, train)
    object.__setattr__(task, "output", (Refusing if how == "fail" else PacedStorage).around(task.output, PACE_S))
    return run_to_the_end(TrainJob(storage, (task,), train), world)


if __name__ == "__main__":
    sys.exit(main())
