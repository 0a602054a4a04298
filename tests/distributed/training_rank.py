"""One rank of a group that trains a small student: ``python training_rank.py STORE NAME STAGE [HOW STEP [RANK]]``.

At step STEP, before its first collective, rank RANK (all: every one) is struck: HOW is a signal (``kill``, ``stop``,
``term``) or ``sleep=SECONDS``. Ends as ``gkd`` does: one sentence and its exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from gkd_dist.config import DistillConfig
from gkd_dist.distill import trainer
from gkd_dist.distill.job import TrainJob, run_in_group
from gkd_dist.errors import GkdError
from gkd_dist.storage import Storage
from gkd_dist.world import World
from tests.training import make_task

PEER_TIMEOUT_S = 8.0


def config(stage: int, num_workers: int) -> DistillConfig:
    """Three steps per epoch on five parts; the weights of the last epoch are the ones that count."""
    return DistillConfig(
        epochs=6,
        eval_every=6,
        patience=0,
        units_per_step=2,
        lr=1e-3,
        optimizer="adamw",
        weight_decay=1e-2,
        grad_clip=0.5,
        zero_stage=stage,
        num_workers=num_workers,
        checkpoint_every=4,
        collective_timeout_s=60,
        peer_timeout_s=PEER_TIMEOUT_S,
    )


def strike_at(how: str, step: int, rank: str) -> None:
    """Wraps the step of this process."""
    real = trainer.train_step

    def struck(*args: Any, **kwargs: Any) -> Any:
        world: World = args[3]
        if kwargs["step"] == step and rank in ("all", str(world.rank)):
            print(f"struck at {time.time():.2f}", flush=True)
            if how.startswith("sleep="):
                time.sleep(float(how.partition("=")[2]))
            else:
                os.kill(os.getpid(), getattr(signal, f"SIG{how.upper()}"))
        return real(*args, **kwargs)

    trainer.train_step = struck  # type: ignore[assignment]


def run_to_the_end(job: TrainJob, world: World) -> int:
    """Trains; 0 when the model is written."""
    try:
        run_in_group(job, world, lambda task: lambda progress: None)
    except GkdError as error:
        print(f"gkd: error: {error}", flush=True)
        os._exit(error.exit_code)
    print("trained", flush=True)
    return 0


def main() -> int:
    """Trains with what the command line says."""
    store, name, stage, *strike = sys.argv[1:]
    if strike:
        strike_at(strike[0], int(strike[1]), strike[2] if len(strike) > 2 else "all")
    world, storage = World.from_env(), Storage.open(store)
    train = config(int(stage), world.world_size)
    return run_to_the_end(TrainJob(storage, (make_task(storage, name, train),), train), world)


if __name__ == "__main__":
    sys.exit(main())
