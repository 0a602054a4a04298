"""Distributed knowledge distillation for graph neural networks.

The flow, and where to start reading::

    partition   data set          -> graph parts             partition/build.py
    teach       graph parts       -> teacher                 distill/trainer.py
    infer       teacher           -> knowledge shards        infer/run.py
    distill     graph, knowledge  -> students                distill/trainer.py, losses/lsp.py
    evaluate    students          -> metrics.json            evaluate.py
    export      student           -> model folder and card   export.py
    report      metrics, events   -> report.html             report.py

`flow.py` holds the stages as data, `config/` what a run can say, `layout.py` where everything is
stored. Importing this package imports none of torch, Ray or DeepSpeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gkd_dist.data.arrays import save_arrays
    from gkd_dist.models.io import load_model, load_student, load_teacher

__all__ = ["load_model", "load_student", "load_teacher", "save_arrays"]


def __getattr__(name: str) -> Any:
    if name in ("load_model", "load_student", "load_teacher"):
        from gkd_dist.models import io

        return getattr(io, name)
    if name == "save_arrays":
        from gkd_dist.data.arrays import save_arrays

        return save_arrays
    raise AttributeError(f"module 'gkd_dist' has no attribute {name!r}")
