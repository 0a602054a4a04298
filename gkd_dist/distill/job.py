"""What one process does for a list of models to train, whoever launched it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from gkd_dist.config import DistillConfig, TrainConfig
from gkd_dist.distill.beacon import Beacon
from gkd_dist.distill.engine import DeepSpeedEngine, import_deepspeed
from gkd_dist.distill.task import TrainTask, is_trained
from gkd_dist.distill.torch_engine import TorchEngine
from gkd_dist.distill.trainer import TrainEngine, Trainer, prepare_process
from gkd_dist.distill.watch import Report, RunWatcher
from gkd_dist.distill.wishes import Wishes, on_sigterm
from gkd_dist.owner import check_owner
from gkd_dist.storage import Storage
from gkd_dist.world import World


@dataclass(frozen=True)
class TrainJob:
    """Models that one worker group trains one after the other; travels to the workers."""

    run: Storage
    tasks: tuple[TrainTask, ...]
    config: DistillConfig
    owner: str = ""  # token of the driver, empty: nobody owns the run

    def check_owner(self) -> None:
        """`OwnershipError` where another driver has the run by now."""
        if self.owner:
            check_owner(self.run, self.owner)


def run_job(
    job: TrainJob, world: World, report_for: Callable[[TrainTask], Report], wishes: Wishes | None = None
) -> None:
    """Trains what is not trained yet, with DeepSpeed, on this rank of a connected world.

    Raises `TerminatedError` where ``wishes`` of any rank ask for the end.
    """
    prepare_process(job.config.threads)
    wishes = wishes or Wishes()
    # Rank 0 decides what is left: others might already see a model that it has just published.
    done = torch.tensor([is_trained(task.output, task.fingerprint) for task in job.tasks], dtype=torch.uint8)
    for task, finished in zip(job.tasks, world.broadcast(done).tolist(), strict=True):
        if not finished:
            make = _deepspeed_factory(job.config, world)
            train_one(job.run, task, world, make, report_for(task), wishes, job.check_owner)


def _deepspeed_factory(config: DistillConfig, world: World) -> Callable[[nn.Module, int], TrainEngine]:
    return lambda model, steps: DeepSpeedEngine(model, config, world, steps)


def torch_factory(config: TrainConfig, world: World) -> Callable[[nn.Module, int], TrainEngine]:
    """Engines without DeepSpeed, for a world of one."""
    return lambda model, steps: TorchEngine(model, config, world.device)


def train_one(
    run: Storage,
    task: TrainTask,
    world: World,
    make_engine: Callable[[nn.Module, int], TrainEngine],
    report: Report,
    wishes: Wishes | None = None,
    owns_run: Callable[[], None] | None = None,
) -> None:
    """Trains one model to its end; rank 0 writes metrics and the model, as long as ``owns_run`` does not raise."""
    trainer = Trainer(task, world, make_engine, wishes=wishes, owns_run=owns_run)
    watcher = None
    if world.is_main:
        watcher = RunWatcher(run, task.name, task.train.epochs, trainer.resumed_from, report)
        trainer.watcher = watcher
    try:
        summary = trainer.run()
        if watcher is not None:
            watcher.summary(vars(summary))
    finally:
        if watcher is not None:
            watcher.close()


def train_inline(
    run: Storage, task: TrainTask, report: Report, device: str = "cpu", owns_run: Callable[[], None] | None = None
) -> None:
    """Trains one model in this process with plain torch. SIGTERM: `TerminatedError` after a last checkpoint."""
    world, wishes = World(device=torch.device(device)), Wishes()
    with _borrowed_process(task.train.threads), on_sigterm(wishes.ask_to_stop):
        train_one(run, task, world, torch_factory(task.train, world), report, wishes, owns_run)


def run_inline(job: TrainJob, report_for: Callable[[TrainTask], Report], device: str = "cpu") -> None:
    """Runs a job in this process, DeepSpeed in a world of one.

    The group of one stays open: DeepSpeed keeps what it knows of groups for the life of a process.
    SIGTERM: `TerminatedError` after a last checkpoint.
    """
    world, wishes = World(device=torch.device(device)), Wishes()
    world.connect(job.config.collective_timeout_s)
    with _borrowed_process(job.config.threads), on_sigterm(wishes.ask_to_stop):
        run_job(job, world, report_for, wishes)


def watched(job: TrainJob, world: World, give_up: Callable[[str], None] | None = None) -> Beacon:
    """Signs of life between the ranks, once the imports are done that keep all threads of a process waiting."""
    import_deepspeed(world.device)
    return Beacon(world, job.config.peer_timeout_s, give_up)


def run_in_group(job: TrainJob, world: World, report_for: Callable[[TrainTask], Report]) -> None:
    """Runs a job as one rank of a group that torchrun or the deepspeed launcher started.

    SIGTERM to any rank: `TerminatedError` on all of them after a last checkpoint.
    """
    wishes = Wishes()
    with on_sigterm(wishes.ask_to_stop):
        world.connect(job.config.collective_timeout_s)
        try:
            with watched(job, world):
                run_job(job, world, report_for, wishes)
        finally:
            world.disconnect()


@contextlib.contextmanager
def _borrowed_process(threads: int) -> Iterator[None]:
    """Threads and determinism of training for a while, in a process that goes on with other work."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    prepare_process(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
