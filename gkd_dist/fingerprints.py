"""Fingerprints of the stages: what a result depends on, and nothing else.

A fingerprint covers the stage's part of the configuration, the fingerprints of its inputs and a
format version. What only changes speed or place (workers, threads, budgets, launchers) is left
out, so that a run may go on elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gkd_dist.config import Config, DistillConfig, InferConfig, LabelLoss, Loss, ModelConfig, TrainConfig
from gkd_dist.config_file import config_fingerprint

FORMAT = {"graph": 1, "teacher": 1, "knowledge": 1, "student": 2, "evaluation": 1}
_UNSET = object()
_LATER: dict[str, Any] = {
    "edge_attr": "auto",
    "features": {},
}  # settings of ``graph`` added after format 1, with their defaults
_LATER_OF_MODELS = {
    "dropout_mask": "node",
    "node_embedding": None,
    "node_embedding_mode": "concat",
    "num_nodes": None,
}
_TRAINING = (
    "epochs",
    "lr",
    "weight_decay",
    "optimizer",
    "momentum",
    "grad_clip",
    "lr_schedule",
    "patience",
    "eval_every",
    "units_per_step",
    "parts_per_unit",
    "shuffle",
)


def graph_fingerprint(config: Config) -> str:
    """Of the graph store; ``halo_hops: auto`` and the number it stands for are the same."""
    partition = config.partition.model_dump(mode="json", exclude={"halo_hops"})
    return _of("graph", _graph(config), partition, config.halo_hops(), config.seed)


def _graph(config: Config) -> dict[str, Any]:
    """The section without settings that came later and are at their default: stores of before stay."""
    section = config.graph.model_dump(mode="json")
    return {key: value for key, value in section.items() if _LATER.get(key, _UNSET) != value}


def trained_teacher_fingerprint(config: Config) -> str:
    """Of a teacher that is trained here."""
    teacher = config.teacher
    seed = config.seed if teacher.seed is None else teacher.seed
    made_of = (teacher.model, training(teacher.train), graph_fingerprint(config), seed)
    return _of("teacher", *made_of, *_if_set(teacher.features))


def given_teacher_fingerprint(config: Config, weights_sha256: str) -> str:
    """Of a teacher that comes from a checkpoint."""
    made_of = (config.teacher.model, weights_sha256, graph_fingerprint(config))
    return _of("teacher", *made_of, *_if_set(config.teacher.features))


def knowledge_fingerprint(config: Config, teacher: str, weights_sha256: str, wants: Any) -> str:
    """Of the knowledge of one teacher about one graph: its weights, what is stored, and how."""
    dtype, scores_dtype = config.infer.dtype, config.infer.scores_dtype or config.infer.dtype
    dtypes = dtype if scores_dtype == dtype else f"{dtype}, scores {scores_dtype}"
    return _of("knowledge", graph_fingerprint(config), teacher, weights_sha256, wants, dtypes)


def inference_details(settings: InferConfig) -> dict[str, Any]:
    """What else changes the bytes of knowledge; empty for the defaults, whose fingerprint stays as it was."""
    taps = {"taps": sorted(settings.taps)} if settings.taps else {}
    is_default = settings.tile_edges == InferConfig().tile_edges
    return taps if is_default else taps | {"tile_edges": settings.tile_edges}


def student_fingerprint(config: Config, knowledge: str | None) -> str:
    """Of a student; ``knowledge`` None is the one that trains alone."""
    losses = config.losses if knowledge is not None else tuple(x for x in config.losses if isinstance(x, LabelLoss))
    plain = [loss.model_dump(mode="json", exclude=_unnamed(loss)) for loss in losses]
    return _of(
        "student",
        config.student.model,
        plain,
        training(config.distill),
        config.distill.precision,
        config.distill.deepspeed,
        graph_fingerprint(config),
        knowledge,
        config.seed,
        *_if_set(config.student.features),
        *_if_exchanged(config.distill),
        *_if_sampled(config.distill),
    )


def _if_exchanged(distill: DistillConfig) -> tuple[dict[str, str], ...]:
    """Nothing for stored hops, so that results of before stay."""
    return () if distill.halo == "hops" else ({"halo": distill.halo},)


def _if_sampled(distill: DistillConfig) -> tuple[dict[str, list[int]], ...]:
    """Nothing where layers look at all neighbours."""
    return () if distill.fan_out is None else ({"fan_out": list(distill.fan_out)},)


def _unnamed(loss: Loss) -> set[str]:
    """A loss that names no teacher, or takes all neighbours, is what it was before there was a choice."""
    return {name for name in ("teacher", "fan_out") if getattr(loss, name, None) is None}


def of_several(fingerprints: Mapping[str, str]) -> str:
    """Of what several teachers have, by name."""
    return _of("teacher", "several", dict(fingerprints))


def _if_set(features: str | None) -> tuple[dict[str, str], ...]:
    """The named features of a model; nothing for ``x``, so that results of before stay."""
    return () if features is None else ({"features": features},)


def evaluation_fingerprint(models: dict[str, str], knowledge: str) -> str:
    """Of ``metrics.json``; ``models`` are fingerprints by name."""
    return _of("evaluation", models, knowledge)


def training(config: TrainConfig) -> dict[str, Any]:
    """The fields of a training section that change its result."""
    return config.model_dump(mode="json", include=set(_TRAINING))


def _of(kind: str, *values: Any) -> str:
    plain = [_dumped(value) if hasattr(value, "model_dump") else _plain(value) for value in values]
    return config_fingerprint([kind, FORMAT[kind], plain])


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_dumped(item) if hasattr(item, "model_dump") else item for item in value]
    return value


def _dumped(section: Any) -> dict[str, Any]:
    """A model without the settings that came later and are at their default: results of before stay."""
    plain: dict[str, Any] = section.model_dump(mode="json")
    if isinstance(section, ModelConfig):
        return {key: value for key, value in plain.items() if _LATER_OF_MODELS.get(key, _UNSET) != value}
    return plain
