"""What a run will store of the teacher, decided from the configuration and the graph's counts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gkd_dist.config import BUILT_IN_MODELS, Config, KdLoss
from gkd_dist.errors import ConfigError

log = logging.getLogger(__name__)
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "uint8": 1}
_PER_TARGET = 8  # offset and scale of each target node beside scores in bytes
_LARGEST_INT16 = (1 << 15) - 1


@dataclass(frozen=True)
class Kind:
    """One stored kind of knowledge over all parts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def layer_width(config: Config, layer: int, meta: Mapping[str, Any]) -> int:
    """Width of a teacher layer; user classes are built and tried on a tiny graph to see it."""
    model = config.teacher.model
    widths = {} if model.kind in BUILT_IN_MODELS else _user_widths(config, meta)
    return widths.get(layer, int(meta["num_classes"]) if layer == model.layers else model.hidden * model.heads)


def _user_widths(config: Config, meta: Mapping[str, Any]) -> dict[int, int]:
    from gkd_dist.models.probe import layer_widths

    return layer_widths(_tried_teacher(config, meta), *_tiny_like(config, meta))


def _tried_teacher(config: Config, meta: Mapping[str, Any]) -> Any:
    """The teacher as it is built, without its weights."""
    import torch

    from gkd_dist.models.build import build_model, resolve_model

    num_features, num_classes = _tiny_like(config, meta)[0], int(meta["num_classes"])
    with torch.random.fork_rng(devices=[]):
        return build_model(resolve_model(config.teacher.model, meta), num_features, num_classes).eval()


def _tiny_like(config: Config, meta: Mapping[str, Any]) -> tuple[int, bool, int]:
    """What a tiny graph to try the teacher on has: features, edge weights, edge attributes."""
    named = config.teacher.features
    num_features = int(meta["num_features"] if named is None else meta["features"][named])
    return num_features, bool(meta.get("has_edge_weight")), int(meta.get("num_edge_features", 0))


def scores_dtype(config: Config) -> str:
    """Dtype of stored scores."""
    return config.infer.scores_dtype or config.infer.dtype


def plan_knowledge(config: Config, meta: Mapping[str, Any]) -> tuple[dict[int, set[str]], set[int]]:
    """(metrics per layer stored as scores, layers stored as embeddings).

    ``meta`` is that of the graph manifest. Raises `ConfigError` where ``infer.max_kl`` would have to
    be kept by embeddings, whose scores nobody measures.
    """
    scores: dict[int, set[str]] = {}
    embeddings = config.embedding_layers()
    for layer, metrics in config.knowledge_layers().items():
        choice = config.infer.scores
        if choice == "auto" and layer in embeddings:
            choice = "embeddings" if config.infer.max_kl is None else "scores"  # they are there anyway
        elif choice == "auto":
            smaller = _score_bytes(config, meta) * len(metrics) <= _embedding_bytes(config, meta, layer)
            choice = "scores" if smaller else "embeddings"
        if choice == "scores":
            scores[layer] = set(metrics)
        elif config.infer.max_kl is not None and config.infer.dtype != "fp32":
            raise ConfigError(
                f"infer.max_kl is kept by stored scores, but layer {layer} is to be stored as embeddings in "
                f"{config.infer.dtype}; set infer.scores=scores, infer.dtype=fp32 or infer.max_kl=null"
            )
        else:
            embeddings.add(layer)
    return scores, embeddings


def _score_bytes(config: Config, meta: Mapping[str, Any]) -> int:
    """Of the scores of one layer and metric."""
    dtype = scores_dtype(config)
    return _BYTES[dtype] * int(meta["num_edges"]) + (_PER_TARGET * int(meta["num_nodes"]) if dtype == "uint8" else 0)


def _num_rows(meta: Mapping[str, Any]) -> int:
    """Owned and first-hop halo nodes of all parts."""
    return round(meta["num_nodes"] * (1 + meta["halo_factor"]))


def _embedding_bytes(config: Config, meta: Mapping[str, Any], layer: int) -> int:
    width = layer_width(config, layer, meta)
    return _BYTES[config.infer.dtype] * width * _num_rows(meta)


def crossover_degree(config: Config, meta: Mapping[str, Any], layer: int, num_metrics: int) -> float:
    """Average degree from which on the embeddings of ``layer`` are smaller than its scores."""
    beside = _PER_TARGET if scores_dtype(config) == "uint8" else 0
    per_node = _embedding_bytes(config, meta, layer) / max(1, meta["num_nodes"])
    return max(0.0, per_node / num_metrics - beside) / _BYTES[scores_dtype(config)]


def knowledge_kinds(config: Config, meta: Mapping[str, Any]) -> list[Kind]:
    """Everything that ``infer`` will store, with its size; headers of objects left out."""
    scores, embeddings = plan_knowledge(config, meta)
    kinds = list(_logit_kinds(config, meta))
    num_edges, dtype = int(meta["num_edges"]), scores_dtype(config)
    for layer, metrics in sorted(scores.items()):
        size = _score_bytes(config, meta)
        kinds += [Kind(f"scores.{layer}.{metric}", dtype, (num_edges,), size) for metric in sorted(metrics)]
    for layer in sorted(embeddings):
        shape = (_num_rows(meta), layer_width(config, layer, meta))
        kinds.append(Kind(f"embeddings.{layer}", config.infer.dtype, shape, _embedding_bytes(config, meta, layer)))
    return kinds + _tap_kinds(config, meta)


def _tap_kinds(config: Config, meta: Mapping[str, Any]) -> list[Kind]:
    if not config.infer.taps:
        return []
    from gkd_dist.infer.taps import tap_widths
    from gkd_dist.models.tiny import num_ids_of, random_graph

    teacher, num_nodes = _tried_teacher(config, meta), int(meta["num_nodes"])
    tiny = random_graph(*_tiny_like(config, meta), num_ids_of(teacher))
    widths = tap_widths(teacher, config.infer.taps, tiny.x, tiny.graph)
    size = _BYTES[config.infer.dtype] * num_nodes
    return [Kind(f"taps.{tap}", config.infer.dtype, (num_nodes, width), size * width) for tap, width in widths.items()]


def _logit_kinds(config: Config, meta: Mapping[str, Any]) -> Iterator[Kind]:
    num_nodes, classes, dtype = int(meta["num_nodes"]), int(meta["num_classes"]), config.infer.dtype
    size = _BYTES[dtype] * num_nodes
    if config.infer.logits == "all" or config.infer.logits >= classes:
        yield Kind("logits", dtype, (num_nodes, classes), size * classes)
        return
    k, temperatures = config.infer.logits, {loss.temperature for loss in config.losses if isinstance(loss, KdLoss)}
    yield Kind("logits.topk", dtype, (num_nodes, k), size * k)
    index_bytes = 2 if classes <= _LARGEST_INT16 else 4
    yield Kind("logits.index", f"int{8 * index_bytes}", (num_nodes, k), index_bytes * num_nodes * k)
    if temperatures:
        yield Kind("logits.tail", dtype, (num_nodes, len(temperatures)), size * len(temperatures))


def describe_layers(config: Config, meta: Mapping[str, Any]) -> list[str]:
    """What is stored of each layer, and from which average degree on the other form is smaller."""
    scores, _ = plan_knowledge(config, meta)
    hints = config.embedding_layers()
    lines = [
        f"layer {layer}: embeddings of width {layer_width(config, layer, meta)} stored for a fitnet loss, which reads "
        f"them as they are ({_embedding_bytes(config, meta, layer):,} bytes); scores follow from them where not stored"
        for layer in sorted(hints)
    ]
    return lines + [
        f"layer {layer}: {'scores' if layer in scores else 'embeddings'} stored (average degree "
        f"{meta['num_edges'] / max(1, meta['num_nodes']):.1f}; embeddings of width "
        f"{layer_width(config, layer, meta)} are smaller above "
        f"{crossover_degree(config, meta, layer, len(metrics)):.1f})"
        for layer, metrics in sorted(config.knowledge_layers().items())
        if layer in scores or layer not in hints
    ]


def say_knowledge(config: Config, meta: Mapping[str, Any]) -> None:
    """Tells what `describe_layers` says."""
    for line in describe_layers(config, meta):
        log.info("%s", line)


def format_knowledge(config: Config, meta: Mapping[str, Any] | None) -> str:
    """What ``infer`` will store, for people; ``meta`` None: the graph has no store yet."""
    if meta is None:
        return "knowledge: sizes are known after partition"
    return "\n".join(
        _format_one(config.view_of(teacher), meta, len(config.teachers)) for teacher in config.all_teachers()
    )


def _format_one(config: Config, meta: Mapping[str, Any], num_teachers: int) -> str:
    kinds = knowledge_kinds(config, meta)
    width = max(len(kind.name) for kind in kinds)
    lines = [
        f"  {kind.name:<{width}}  {kind.dtype:<5}  {' x '.join(f'{n:,}' for n in kind.shape):>20}  "
        f"{kind.num_bytes:>16,} bytes"
        for kind in kinds
    ]
    total, of = sum(kind.num_bytes for kind in kinds), f" of {config.teacher.name}" if num_teachers else ""
    return "\n".join([f"knowledge{of}: {total:,} bytes in all parts", *lines, *describe_layers(config, meta)])


def knowledge_json(config: Config, meta: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The same as JSON values; of several teachers by name, under ``teachers``."""
    if meta is None:
        return None
    if config.teachers:
        return {"teachers": {t.name: knowledge_json(config.view_of(t), meta) for t in config.teachers}}
    kinds = knowledge_kinds(config, meta)
    layers = {
        str(layer): {
            "metrics": sorted(metrics),
            "crossover_degree": crossover_degree(config, meta, layer, len(metrics)),
        }
        for layer, metrics in sorted(config.knowledge_layers().items())
    }
    return {
        "kinds": [vars(kind) for kind in kinds],
        "num_bytes": sum(kind.num_bytes for kind in kinds),
        "average_degree": meta["num_edges"] / max(1, meta["num_nodes"]),
        "layers": layers,
    }
