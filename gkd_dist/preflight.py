"""What can be known of devices, launchers and user code before a process or a GPU is taken."""

from __future__ import annotations

import os

from gkd_dist.config import Config
from gkd_dist.errors import ConfigError
from gkd_dist.session import is_local


def check_code(config: Config) -> None:
    """`ConfigError` where a ``module:attr`` model cannot be imported here; workers on other machines need it too."""
    for kind in (*(teacher.model.kind for teacher in config.all_teachers()), config.student.model.kind):
        if ":" in kind:
            from gkd_dist.models.build import import_model

            import_model(kind)


def check_launcher(config: Config) -> None:
    """`ConfigError` where the run counts on a launcher that has not started this process."""
    distill = config.distill
    if distill.launcher not in ("torchrun", "deepspeed"):
        return
    world_size = os.environ.get("WORLD_SIZE")
    if world_size is None or "RANK" not in os.environ:
        raise ConfigError(
            f"distill.launcher is {distill.launcher}, but RANK and WORLD_SIZE are not set: it has not started this "
            "process; use launch/torchrun.sh, or set distill.launcher=ray"
        )


def check_devices(config: Config) -> None:
    """`ConfigError` for a precision that the device lacks, or more GPUs than a local Ray can have."""
    if config.distill.precision == "fp16":
        from gkd_dist.distill.engine import check_precision

        check_precision(config.distill)
    _check_local_gpus(config)


def _check_local_gpus(config: Config) -> None:
    infer, distill = config.infer, config.distill
    wanted = max(infer.num_actors * infer.gpus_per_actor, distill.min_workers * distill.gpus_per_worker)
    if not wanted or not is_local(config):
        return  # a cluster is asked when it answers
    import torch

    present = torch.cuda.device_count()
    if wanted > present:
        raise ConfigError(
            f"the run asks for {wanted:g} GPUs at a time (infer.gpus_per_actor, distill.gpus_per_worker), here are "
            f"{present}; lower them, or set ray.address to a cluster that has them"
        )
