"""``gkd predict``: a model of a run over every node of its graph, or of another one."""

from __future__ import annotations

from typing import Any

from gkd_dist import stages
from gkd_dist.config import Config
from gkd_dist.driver import driving
from gkd_dist.errors import ConfigError
from gkd_dist.partition.store import GraphStore
from gkd_dist.session import Session
from gkd_dist.storage import Storage


def predict_run(
    session: Session, model: str, out: str, file_format: str, embeddings: bool, other: Config | None
) -> dict[str, Any]:
    """Writes the predictions to ``out``; ``other`` names the graph where it is not the run's own."""
    from gkd_dist.predict import predict

    folders = {view.teacher_label: view.teacher for view in session.views()}
    folders |= {name: session.student(name) for name in ("distilled", "alone")}
    if model not in folders:
        raise ConfigError(f"--model must be one of {', '.join(folders)} (got {model!r}); correct it")
    graph = stages.open_graph(session) if other is None else _other_graph(session, other)
    target = Storage.open(out, session.config.storage)
    target.check_writable()
    with stages.task_progress(session, f"predict {model}") as progress:
        manifest = predict(
            folders[model].url,
            graph,
            target,
            "parquet" if file_format == "parquet" else "safetensors",
            embeddings,
            settings=session.config.infer,
            pool=session.actors(),
            allow_code=session.allow_code,
            storage=session.config.storage,
            progress=progress,
        )
    return {
        "url": target.url,
        "model": model,
        "num_nodes": sum(part.counts["num_owned"] for part in manifest.parts),
        "files": [part.key for part in manifest.parts],
    }


def _other_graph(session: Session, other: Config) -> GraphStore:
    """The graph store of another configuration, built where that one keeps it if need be."""
    theirs = Session.open(other, session.progress)
    if not stages.partition_done(theirs):
        with driving(other) as owned:
            stages.partition(owned)
    return stages.open_graph(theirs)
