"""What can be known of devices, launchers and user code before a process or a GPU is taken."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gkd_dist.config import BUILT_IN_MODELS, Config, FitnetLoss, resolve_layer
from gkd_dist.errors import ConfigError
from gkd_dist.session import is_local

if TYPE_CHECKING:
    from gkd_dist.models.probe import ModelCheck


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
            f"process; use launch/{distill.launcher}.sh, or set distill.launcher=ray"
        )


def check_devices(config: Config) -> None:
    """`ConfigError` for what the device or DeepSpeed cannot do, or more GPUs than a local Ray can have."""
    if config.distill.precision == "fp16" or config.distill.deepspeed:
        from gkd_dist.distill.engine import check_options, check_precision

        check_precision(config.distill)
        check_options(config.distill)
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


def check_student(config: Config, meta: Mapping[str, Any]) -> ModelCheck:
    """How the student will run, tried on a tiny graph; raises before any work what training would refuse after it.

    ``meta`` is that of the graph manifest. `ModelError` or `StudentError` for a model that cannot be trained on parts,
    `ConfigError` for a projection that does not fit.
    """
    import torch

    from gkd_dist.models import trainable
    from gkd_dist.models.build import build_model, resolve_model
    from gkd_dist.models.probe import check_model, layer_widths
    from gkd_dist.stream.units import empty_batch

    student = config.student
    width = int(meta["num_features"] if student.features is None else meta["features"][student.features])
    classes = int(meta["num_classes"])
    weighted, attributes = bool(meta.get("has_edge_weight", False)), int(meta.get("num_edge_features", 0))
    with torch.random.fork_rng(devices=[]):
        model = build_model(resolve_model(student.model, meta), width, classes)
    trainable.refuse_untrainable(model)
    if config.distill.halo == "exchange":
        trainable.require_layers(model)
    found = check_model(model.eval(), width, weighted, attributes)
    trainable.refuse_layers_that_are_not_there(model, config.losses)
    trainable.sampler_for(model, config.distill.fan_out)
    empty = empty_batch(width, classes, meta["task"], weighted=weighted, num_edge_features=attributes)
    trainable.check_empty(model, empty, 0)
    _check_projections(config, meta, layer_widths(model.eval(), width, weighted, attributes))
    return found


def _check_projections(config: Config, meta: Mapping[str, Any], student_widths: Mapping[int, int]) -> None:
    """`ConfigError` where a loss compares layers of different widths without a projection."""
    from gkd_dist.distill.heads import plan_heads
    from gkd_dist.losses.bounds import named_losses
    from gkd_dist.plan import layer_width

    losses, views = config.student_losses(), {t.name: config.view_of(t) for t in config.all_teachers()}
    widths = {}
    for name, loss in named_losses(losses):
        if isinstance(loss, FitnetLoss):
            view = views[loss.teacher or config.teacher.name]
            layer = resolve_layer(loss.teacher_layer, view.teacher.model.layers)
            widths[name] = layer_width(view, layer, meta)
    plan_heads(losses, config.student.model.layers, student_widths, widths)


def describe_student(config: Config, meta: Mapping[str, Any] | None) -> str:
    """One line for people: what the student is and how it runs; ``meta`` None: the graph has no store yet."""
    model = config.student.model
    what = f"student: {model.kind}, {model.layers} layer{'s' if model.layers > 1 else ''}"
    if model.kind in BUILT_IN_MODELS:
        return f"{what}; runs layer by layer"
    if meta is None:
        return f"{what}; how it runs is known after partition"
    return f"{what}; {check_student(config, meta).sentence(int(meta['halo_hops']))}"
