"""How knowledge is stored: from float32 tensors of one part to those of its object.

Pure: tensors to tensors. What may not be stored so coarsely is refused here, before it is written.

Shapes: ``o`` owned nodes; ``m`` in-edges of owned nodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gkd_dist.config import InferConfig, KdLoss, Loss
from gkd_dist.losses.bounds import ScoreError, ScoreReader, require_fine, score_readers
from gkd_dist.shards.quantise import UINT8, pack_float, pack_rows
from gkd_dist.topk import top_k

SCORES = "scores."
OFFSET, SCALE = ".offset", ".scale"
LOGITS, TOP, INDEX, TAIL = "logits", "logits.topk", "logits.index", "logits.tail"


@dataclass(frozen=True)
class Packing:
    """Dtypes of a knowledge store, and the terms that will read its scores; small and picklable."""

    dtype: str = "fp16"
    scores_dtype: str = "fp16"
    topk: int | None = None
    temperatures: tuple[float, ...] = ()
    max_kl: float | None = None
    readers: tuple[ScoreReader, ...] = ()

    @classmethod
    def of(cls, settings: InferConfig, losses: Sequence[Loss] = (), teacher_layers: int = 0) -> Packing:
        """As configured; ``losses`` are those of the student, for the bounds of what they read."""
        return cls(
            settings.dtype,
            settings.scores_dtype or settings.dtype,
            None if settings.logits == "all" else settings.logits,
            tuple(sorted({loss.temperature for loss in losses if isinstance(loss, KdLoss)})),
            settings.max_kl,
            score_readers(losses, teacher_layers),
        )

    def topk_of(self, num_classes: int) -> int | None:
        """How many logits are kept of a node; None: all."""
        return self.topk if self.topk is not None and self.topk < num_classes else None


def pack_knowledge(
    tensors: Mapping[str, Tensor], indptr: Tensor, packing: Packing, where: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is stored of finite float32 ``tensors``, and the ``meta`` of the part's entry.

    ``indptr`` int64 [o + 1] bounds the in-edges of each owned node; ``where`` names the part in errors.
    Raises `DataError` where scores are too coarse for ``infer.max_kl``, as far as widths are known.
    """
    stored: dict[str, Tensor] = {}
    floats: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith(SCORES):
            found, floats[name] = _pack_scores(name, tensor, indptr, packing.scores_dtype)
            stored |= found
        elif name == LOGITS and packing.topk_of(tensor.size(1)) is not None:
            brief = top_k(tensor, int(packing.topk or 0), packing.temperatures)
            stored[INDEX] = brief.index
            for part, values in ((TOP, brief.values), (TAIL, brief.tail)):
                if values.size(1):
                    stored[part], floats[part] = pack_float(values, packing.dtype)
        else:
            stored[name], floats[name] = pack_float(tensor, packing.dtype)
    require_fine(packing.readers, part_errors(floats), {}, packing.max_kl, packing.scores_dtype, where)
    return stored, {"floats": floats}


def _pack_scores(name: str, scores: Tensor, indptr: Tensor, dtype: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if dtype == UINT8:
        codes, offset, scale, info = pack_rows(scores, indptr)
        stored = {name: codes, name + OFFSET: offset, name + SCALE: scale}
    else:
        values, info = pack_float(scores, dtype)
        stored = {name: values}
    low, high = (float(scores.min()), float(scores.max())) if scores.numel() else (0.0, 0.0)
    return stored, {**info, "low": low, "high": high}


def score_of(name: str) -> tuple[int, str]:
    """(layer, metric) of a stored score tensor."""
    layer, metric = name.removeprefix(SCORES).split(".")
    return int(layer), metric


def score_error(info: Mapping[str, Any]) -> ScoreError:
    """What a part's ``meta`` says of a score tensor; the range is that of all numbers where it is not said."""
    return ScoreError(info["bound"], info.get("low", -math.inf), info.get("high", math.inf))


def part_errors(floats: Mapping[str, Mapping[str, Any]]) -> dict[tuple[int, str], ScoreError]:
    """Errors of the scores of a part, from its ``meta["floats"]``."""
    return {score_of(name): score_error(info) for name, info in floats.items() if name.startswith(SCORES)}


def worst(errors: Sequence[ScoreError]) -> ScoreError:
    """Of all parts: the largest error and the whole range."""
    if not errors:
        return ScoreError(0.0, 0.0, 0.0)
    return ScoreError(max(e.error for e in errors), min(e.low for e in errors), max(e.high for e in errors))
