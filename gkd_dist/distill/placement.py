"""Places student workers with Ray Train; with `infer`, the only door to Ray.

The workers share nothing with the driver but the stores: models, checkpoints and progress are
read from there. A worker group that loses a member is started again by Ray Train and goes on from
the last checkpoint. An error that a restart cannot mend (bad data, a loss that is not finite) is left
in the store and raised by the driver as what it was.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gkd_dist import errors
from gkd_dist.distill.job import TrainJob, run_job
from gkd_dist.distill.relay import WarningReader, warnings_to_store
from gkd_dist.distill.trainer import TrainTask, is_trained
from gkd_dist.distill.watch import PROGRESS, TrainProgress, report_to_store
from gkd_dist.errors import GkdError, InfrastructureError, ObjectNotFoundError, StorageError, StudentError
from gkd_dist.storage import Storage
from gkd_dist.world import World

log = logging.getLogger(__name__)
_FAILURE = "failure.json"
_POLL_S = 1.0


def train_on_ray(job: TrainJob, on_progress: Callable[[TrainProgress], None]) -> None:
    """Trains the job's models on ``num_workers`` Ray workers; Ray must be connected.

    Raises the worker's own error where a restart cannot mend it, `StudentError` where
    ``max_failures`` restarts were not enough.
    """
    folder = job.tasks[0].output
    _delete(folder, _FAILURE)
    scratch = tempfile.mkdtemp(prefix="gkd-ray-train-")
    try:
        with _following(job, on_progress):
            _interruptible(lambda: _fit(job, scratch))
    except GkdError:
        raise
    except Exception as error:
        raise _translate(error, job.config.max_failures) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _raise_failure(folder)
    missing = [task.name for task in job.tasks if not is_trained(task.output, task.fingerprint)]
    if missing:
        raise StudentError(f"training ended without a model for {', '.join(missing)}; run the same command again")


def _interruptible(work: Callable[[], None]) -> None:
    """Does ``work`` in a thread and waits for it, so that Ctrl-C stays a `KeyboardInterrupt` here.

    In the main thread Ray Train takes SIGINT for itself and ends the process without a word.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="gkd-ray-train", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _fit(job: TrainJob, scratch: str) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = job.config
    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    describe_run: Any = RunConfig  # its type stub is that of the earlier Ray Train
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources
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


def _worker_env(job: TrainJob) -> dict[str, str]:
    """Set before torch and DeepSpeed are imported in a worker."""
    env = {"OMP_NUM_THREADS": str(job.config.threads), "MKL_CBWR": "COMPATIBLE", "DS_BUILD_OPS": "0"}
    if not job.config.gpus_per_worker:
        env["DS_ACCELERATOR"] = "cpu"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name in os.environ:
            env[name] = os.environ[name]
    return env


def _worker(loop_config: dict[str, Any]) -> None:
    """Body of one worker: Ray Train has already formed the process group."""
    job: TrainJob = loop_config["job"]
    folder = job.tasks[0].output
    if folder.exists(_FAILURE):
        return  # a restart after an error that a restart cannot mend
    world = World.from_env(use_gpu=job.config.gpus_per_worker > 0)
    try:
        with warnings_to_store(folder, world.rank):
            run_job(job, world, lambda task: report_to_store(task.output))
    except InfrastructureError as error:
        if isinstance(error, errors.NonFiniteLossError):
            _leave_failure(folder, error)
        raise
    except GkdError as error:
        _leave_failure(folder, error)
        raise


def _leave_failure(folder: Storage, error: GkdError) -> None:
    folder.write_json(_FAILURE, {"kind": type(error).__name__, "message": str(error)})


def _raise_failure(folder: Storage) -> None:
    try:
        failure = folder.read_json(_FAILURE)
    except (ObjectNotFoundError, ValueError):
        return
    _delete(folder, _FAILURE)
    kind = getattr(errors, str(failure.get("kind")), StudentError)
    raise kind(str(failure.get("message")))


def _delete(folder: Storage, key: str) -> None:
    if folder.exists(key):
        folder.delete(key)


def _translate(error: Exception, max_failures: int) -> StudentError:
    """One sentence from Ray Train's report of what the workers died of."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [f"rank {rank}: {_last_line(cause)}" for rank, cause in sorted(failures.items())]
    what = "; ".join(causes) or _last_line(error)
    return StudentError(
        f"training gave up after {max_failures} restarts ({what}); mend the cause and run the same command again, "
        "it goes on from the last checkpoint"
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


@contextmanager
def _following(job: TrainJob, on_progress: Callable[[TrainProgress], None]) -> Iterator[None]:
    """Reads the workers' progress from the store while they train."""
    stop, warnings = threading.Event(), WarningReader(job.tasks[0].output, job.config.num_workers)

    def follow() -> None:
        while not stop.wait(_POLL_S):
            warnings.say()
            for task in job.tasks:
                progress = _read_progress(task)
                if progress is not None:
                    on_progress(progress)

    for task in job.tasks:
        _delete(task.output, PROGRESS)
    warnings.clear()
    thread = threading.Thread(target=follow, name="gkd-follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
        warnings.say()
        warnings.clear()
        for task in job.tasks:
            _delete(task.output, PROGRESS)


def _read_progress(task: TrainTask) -> TrainProgress | None:
    try:
        return TrainProgress(**task.output.read_json(PROGRESS))
    except (StorageError, ValueError, TypeError):
        return None
