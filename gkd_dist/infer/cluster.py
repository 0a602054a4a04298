"""Starts a Ray on this machine or joins a running cluster, and ends only what it started."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from gkd_dist.config import RayConfig
from gkd_dist.errors import ConfigError, InfrastructureError

log = logging.getLogger(__name__)
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_END_S = 10.0  # patience with Ray's processes before they are ended by force
_ADDRESS = re.compile(r"(?:ray://)?(?P<host>\[[^\]]+\]|[^:/\[\]]+):(?P<port>\d+)")


@contextmanager
def start_ray(config: RayConfig, needed_cpus: float, needed_gpus: float) -> Iterator[None]:
    """Ray for the time of a ``with`` block.

    ``address: local`` starts one here with ``needed_cpus`` logical CPUs (or ``num_cpus``), unless
    RAY_ADDRESS names a cluster, as it does inside a Ray job; any other address joins that cluster.
    A Ray that this process has joined before is used and left alone. Raises `ConfigError` where
    this machine lacks what is needed, `InfrastructureError` where no cluster answers within
    ``timeout_s`` or none of that size comes up.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        _await_resources(config, "the running Ray", needed_cpus, needed_gpus)
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or config.address if config.address == "local" else config.address
    own_children = set(psutil.Process().children())
    daemons: list[psutil.Process] = []
    try:
        try:
            _start_or_join(config, address, needed_cpus, needed_gpus)
        finally:
            daemons = [process for process in psutil.Process().children() if process not in own_children]
        yield
    finally:
        _shutdown(daemons)


def _start_or_join(config: RayConfig, address: str, needed_cpus: float, needed_gpus: float) -> None:
    if address == "local":
        _start_local(config, needed_cpus)
        _check_gpus(needed_gpus)
    else:
        _join(config, address)
        _await_resources(config, f"the Ray cluster at {address}", needed_cpus, needed_gpus)


def _start_local(config: RayConfig, needed_cpus: float) -> None:
    import ray

    num_cpus = config.num_cpus or max(1, math.ceil(needed_cpus))
    if needed_cpus > num_cpus:
        raise ConfigError(
            f"the run needs {needed_cpus:g} CPUs at a time, ray.num_cpus is {num_cpus}; raise ray.num_cpus, or lower "
            "infer.num_actors, infer.cpus_per_actor, distill.num_workers or distill.cpus_per_worker"
        )
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=config.object_store_bytes,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises many kinds; all mean that it did not come up
        raise InfrastructureError(
            f"Ray did not start on this machine ({type(error).__name__}: {error}); free memory and disk space of the "
            "temporary folder, or set infer.num_actors=0 and distill.launcher=inline to run without Ray"
        ) from error


def _check_gpus(needed_gpus: float) -> None:
    import ray

    num_gpus = ray.cluster_resources().get("GPU", 0)
    if needed_gpus > num_gpus:
        raise ConfigError(
            f"the run needs {needed_gpus:g} GPUs at a time, this machine has {num_gpus:g}; lower infer.gpus_per_actor, "
            "infer.num_actors, distill.gpus_per_worker or distill.num_workers, or set ray.address to a larger cluster"
        )


def _join(config: RayConfig, address: str) -> None:
    import ray

    deadline = time.monotonic() + config.timeout_s
    match = _ADDRESS.fullmatch(address)
    if match:
        _await_listener(match["host"].strip("[]"), int(match["port"]), deadline, address)
        if not address.startswith("ray://"):
            _check_health(address, deadline)
    elif address != "auto" and not address.startswith("ray://"):
        raise ConfigError(f"ray.address must be local, auto or host:port (got {address!r}); correct it or RAY_ADDRESS")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ConnectionError, RuntimeError, AuthenticationError and more
        raise InfrastructureError(
            f"no Ray cluster could be joined at {address} ({type(error).__name__}: {_first_line(error)}); "
            "start one with `ray start --head`, correct ray.address or RAY_ADDRESS, or set ray.address=local"
        ) from error


def _await_listener(host: str, port: int, deadline: float, address: str) -> None:
    """Waits until something listens."""
    start = time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + 0.5 >= deadline:
                raise InfrastructureError(
                    f"nothing answers at {address} after {time.monotonic() - start:.0f} s ({error}); start the Ray "
                    "cluster, correct ray.address or RAY_ADDRESS, or set ray.address=local"
                ) from error
            time.sleep(0.5)


def _check_health(address: str, deadline: float) -> None:
    """Asks whether what listens is a Ray that works, in a process that can be ended.

    `ray.init` would go on trying for a quarter of an hour.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    allowed_s = max(1.0, deadline - time.monotonic())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=allowed_s, check=False)
        reason = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"no answer within {allowed_s:.0f} s"
    if reason:
        raise InfrastructureError(
            f"what listens at {address} is no working Ray cluster ({reason}); give the port of `ray start --head` "
            "(6379 unless chosen), restart the cluster, raise ray.timeout_s, or set ray.address=local"
        )


def _await_resources(config: RayConfig, what: str, needed_cpus: float, needed_gpus: float) -> None:
    """Waits until the nodes that have joined suffice."""
    import ray

    deadline = time.monotonic() + config.timeout_s
    while True:
        total = ray.cluster_resources()
        cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
        if cpus >= needed_cpus and gpus >= needed_gpus:
            return
        if time.monotonic() >= deadline:
            raise InfrastructureError(
                f"the run needs {needed_cpus:g} CPUs and {needed_gpus:g} GPUs at a time, "
                f"{what} has {cpus:g} and {gpus:g} "
                f"after {config.timeout_s:g} s; add nodes, raise ray.timeout_s, or lower num_actors and num_workers"
            )
        time.sleep(0.5)


def _shutdown(daemons: list[psutil.Process]) -> None:
    """Leaves Ray; waits for the processes of one that was started here and ends those that stay.

    ``daemons`` are the processes that it began with, the parents of its workers.
    """
    import ray

    started = set(daemons)
    for process in daemons:
        with contextlib.suppress(psutil.NoSuchProcess):
            started.update(process.children(recursive=True))
    ray.shutdown()
    alive = psutil.wait_procs(started, timeout=_END_S)[1]
    for process in alive:
        log.warning("process %d of Ray did not end by itself and is killed", process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_END_S)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]
