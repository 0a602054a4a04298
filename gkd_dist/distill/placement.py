"""Places student workers with Ray Train; with `infer`, the only door to Ray.

The workers share nothing with the driver but the stores: models, checkpoints and progress are
read from there. A worker group that loses a member is started again by Ray Train and goes on from
the last checkpoint. An error that a restart cannot mend (bad data, a loss that is not finite) is left
in the store and raised by the driver as what it was. A driver that gets SIGTERM leaves a request
there, which all ranks obey after the same step, and waits for the checkpoint that they keep.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gkd_dist.distill.beacon import end_process
from gkd_dist.distill.checkpoint import committed_steps
from gkd_dist.distill.job import TrainJob, run_job, watched
from gkd_dist.distill.notes import Notes, Patience
from gkd_dist.distill.relay import WarningReader, warnings_to_store
from gkd_dist.distill.task import TrainTask, is_trained
from gkd_dist.distill.watch import PROGRESS, TrainProgress, report_to_store
from gkd_dist.distill.wishes import Wishes, on_sigterm
from gkd_dist.errors import (
    GkdError,
    InfrastructureError,
    NonFiniteLossError,
    OwnershipError,
    StorageError,
    StudentError,
    TerminatedError,
)
from gkd_dist.world import World, is_of_peers

log = logging.getLogger(__name__)
_POLL_S = 1.0
_POLLS_PER_SIGN = 10
_SILENCE_S = 60.0


def train_on_ray(job: TrainJob, on_progress: Callable[[TrainProgress], None]) -> None:
    """Trains the job's models on ``num_workers`` Ray workers; Ray must be connected.

    Raises the worker's own error where a restart cannot mend it, `StudentError` where
    ``max_failures`` restarts were not enough, `TerminatedError` after SIGTERM.
    """
    notes, asked = _notes(job), threading.Event()
    notes.clear()
    _bound_waits(job)
    scratch = tempfile.mkdtemp(prefix="gkd-ray-train-")
    try:
        with on_sigterm(asked.set), _following(job, on_progress, asked):
            _interruptible(lambda: _fit(job, scratch), asked, job.config.stop_timeout_s)
    except GkdError:
        raise
    except Exception as error:
        notes.raise_failure()
        raise _translate(error, job.config.max_failures) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(StorageError):  # how training ended matters more
            notes.clear("stop", "trouble", "alive")
    notes.raise_failure()
    missing = [task.name for task in job.tasks if not is_trained(task.output, task.fingerprint)]
    if missing and asked.is_set():
        raise _terminated(job, missing[0])
    if missing:
        raise StudentError(f"training ended without a model for {', '.join(missing)}; run the same command again")


def _terminated(job: TrainJob, name: str) -> TerminatedError:
    kept = next((committed_steps(task.output) for task in job.tasks if task.name == name), [])
    where = f"after step {kept[-1]}, which is kept" if kept else "before its first checkpoint"
    return TerminatedError(
        f"training of {name} was asked to stop (SIGTERM) and did so {where}; run the same command again, it goes on "
        "from there"
    )


def _interruptible(work: Callable[[], None], asked: threading.Event, patience_s: float) -> None:
    """Does ``work`` in a thread and waits for it, so that Ctrl-C stays a `KeyboardInterrupt` here.

    In the main thread Ray Train takes SIGINT for itself and ends the process without a word. Once it
    was ``asked`` to end, work that does not within ``patience_s`` is left behind.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="gkd-ray-train", daemon=True)
    thread.start()
    deadline = math.inf
    while thread.is_alive():
        thread.join(0.2)
        if asked.is_set() and deadline == math.inf:
            deadline = time.monotonic() + patience_s
        if time.monotonic() > deadline:
            raise TerminatedError(
                f"the workers did not stop within {patience_s:g} s of SIGTERM (distill.stop_timeout_s) and are ended "
                "in the middle of their work; run the same command again, it goes on from the last checkpoint"
            )
    if raised:
        raise raised[0]


def _fit(job: TrainJob, scratch: str) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = job.config
    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    describe_run: Any = RunConfig  # the type stubs are those of the earlier Ray Train
    describe_scale: Any = ScalingConfig
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        scaling_config=describe_scale(
            num_workers=config.num_workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=config.resize_every_s,
        ),
        torch_config=TorchConfig(
            backend="nccl" if config.gpus_per_worker else "gloo", timeout_s=int(config.collective_timeout_s)
        ),
        run_config=describe_run(
            name="students",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": _worker_env(job)},
        ),
    )
    trainer.fit()


def _bound_waits(job: TrainJob) -> None:
    """Ray Train passes these on to its controller and workers; by default it waits 10 minutes, or for ever."""
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", f"{max(60.0, job.config.peer_timeout_s):g}")
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", f"{job.config.collective_timeout_s:g}")


def _worker_env(job: TrainJob) -> dict[str, str]:
    """Set before torch and DeepSpeed are imported in a worker."""
    env = {"OMP_NUM_THREADS": str(job.config.threads), "MKL_CBWR": "COMPATIBLE", "DS_BUILD_OPS": "0"}
    if not job.config.gpus_per_worker:
        env["DS_ACCELERATOR"] = "cpu"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name in os.environ:
            env[name] = os.environ[name]
    return env


def _notes(job: TrainJob) -> Notes:
    return Notes(job.tasks[0].output, job.owner)


def _worker(loop_config: dict[str, Any]) -> None:
    """Body of one worker: Ray Train has already formed the process group."""
    job: TrainJob = loop_config["job"]
    notes = _notes(job)
    if notes.has_failed():
        return  # a restart after an error that a restart cannot mend
    world, wishes = World.from_env(use_gpu=job.config.gpus_per_worker > 0), Wishes()

    def give_up(sentence: str) -> None:
        notes.leave_trouble(sentence)
        end_process(sentence)  # Ray Train starts the group again

    try:
        with (
            warnings_to_store(job.tasks[0].output, world.rank),
            watched(job, world, give_up),
            _listening(notes, world, wishes),
        ):
            run_job(job, world, lambda task: report_to_store(task.output), wishes)
    except TerminatedError as end:
        log.info("%s", end)  # the driver has asked for it and looks for what was kept
    except Exception as error:
        leave_for_good(notes, world, error)
        raise


def leave_for_good(notes: Notes, world: World, error: Exception) -> None:
    """Leaves an error that a restart cannot mend, so that the group is not trained again.

    A restart can mend what comes of machines, network and storage. An exception that is none of ours and
    is not about lost peers is one of the program, a user's model among it: it ends the run with exit
    code 1, as under every other launcher.
    """
    if isinstance(error, GkdError):
        if not isinstance(error, InfrastructureError) or isinstance(error, NonFiniteLossError | OwnershipError):
            notes.leave_failure(error)
        return
    of_machines = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("ray.")
    if is_of_peers(error) or of_machines:
        return
    where = str(world.place)
    said = GkdError(
        f"rank {world.rank} of {world.world_size}{f' ({where})' if where else ''} met an error of the program, which a "
        f"restart cannot mend: {type(error).__name__}: {_last_line(error)}; mend it and run the same command again, "
        "--debug shows the traceback"
    )
    notes.leave_failure(said, "".join(traceback.format_exception(error)))


@contextmanager
def _listening(notes: Notes, world: World, wishes: Wishes) -> Iterator[None]:
    """Passes on what is asked of this rank from outside: the notice that a node goes away, on each, and on rank 0 the
    driver's request to stop. Rank 0 also tells the driver that it lives."""
    ended = threading.Event()

    def listen() -> None:
        noticed, count = False, 0
        while not ended.wait(_POLL_S):
            if not noticed and _is_preempted():
                noticed = True
                log.warning("a node of this worker group is going away: keeping a checkpoint")
                wishes.ask_to_save()
            if world.is_main:
                if count % _POLLS_PER_SIGN == 0:
                    notes.say_alive(count, str(world.place))
                if not wishes.stop and notes.is_asked_to_stop():
                    wishes.ask_to_stop()
            count += 1

    thread = threading.Thread(target=listen, name="gkd-listen", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _is_preempted() -> bool:
    """Whether Ray has told this worker that a node of its group is being drained.

    ``ray.train.get_preemption_info()`` says the same after a barrier of all workers, which a step must
    not wait for: ours agree with the counts of their step.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    except (ImportError, AttributeError, RuntimeError):
        return False


def _translate(error: Exception, max_failures: int) -> StudentError:
    """One sentence from Ray Train's report of what the workers died of."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [f"rank {rank}: {_last_line(cause)}" for rank, cause in sorted(failures.items())]
    what = "; ".join(causes) or _last_line(error)
    # only the loss of a worker group is answered with a restart, see Ray Train's `FailurePolicy`
    after = f" after {max_failures} restart{'s' if max_failures > 1 else ''}" if failures and max_failures else ""
    return StudentError(
        f"training gave up{after} ({what}); mend the cause and run the same command again, "
        "it goes on from the last checkpoint"
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


@contextmanager
def _following(job: TrainJob, on_progress: Callable[[TrainProgress], None], asked: threading.Event) -> Iterator[None]:
    """Reads the workers' progress from the store while they train, and leaves the request to stop there."""
    stop, notes, warnings = threading.Event(), _notes(job), WarningReader(job.tasks[0].output, job.config.max_workers)
    patience = Patience(_SILENCE_S, time.monotonic())

    def follow() -> None:
        left = False
        while not stop.wait(_POLL_S):
            warnings.say()
            if asked.is_set() and not left:
                log.warning("SIGTERM: waiting up to %g s for a checkpoint of the workers", job.config.stop_timeout_s)
                left = notes.ask_to_stop()
            notes.tell_trouble()
            sentence = patience.look(notes.sign(), time.monotonic(), _wanted(job))
            if sentence is not None:
                log.warning("%s", sentence)
            for task in job.tasks:
                progress = _read_progress(task)
                if progress is not None:
                    on_progress(progress)

    for task in job.tasks:
        task.output.delete(PROGRESS)
    warnings.clear()
    thread = threading.Thread(target=follow, name="gkd-follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
        with suppress(StorageError):  # how training ended matters more
            warnings.say(everyone=True)
            warnings.clear()
            for task in job.tasks:
                task.output.delete(PROGRESS)


def _wanted(job: TrainJob) -> str:
    """What Ray may be waiting for."""
    config = job.config
    each = f"{config.cpus_per_worker:g} CPUs" + (
        f" and {config.gpus_per_worker} GPUs" if config.gpus_per_worker else ""
    )
    return f"room for {config.min_workers} workers with {each} each"


def _read_progress(task: TrainTask) -> TrainProgress | None:
    try:
        return TrainProgress(**task.output.read_json(PROGRESS))
    except (StorageError, ValueError, TypeError):
        return None
