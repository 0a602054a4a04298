"""The last stages: exact evaluation, export, report. Same protocol as `stages`."""

from __future__ import annotations

import logging
from typing import Any

from gkd_dist import fingerprints as fp
from gkd_dist import layout, stages
from gkd_dist.config import LspLoss, resolve_layer
from gkd_dist.errors import ObjectNotFoundError
from gkd_dist.evaluate import evaluate_logits, lsp_divergence
from gkd_dist.models.io import read_model, read_model_document
from gkd_dist.session import Session
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.stream.ensemble import Ensemble

log = logging.getLogger(__name__)
Stored = tuple[Storage, Manifest]
EXPORT = "export"
CARD = "README.md"
PREDICTIONS = "predictions"

# --- evaluate --------------------------------------------------------------------------------


def evaluate_fingerprint(session: Session) -> str:
    """Of ``metrics.json``; needs the students."""
    return fp.evaluation_fingerprint(_identities(session), stages.infer_fingerprint(session))


def _identities(session: Session) -> dict[str, str]:
    """Fingerprint and weights of each student: trained again elsewhere it may differ in the last bits."""
    return {
        name: f"{fingerprint}-{read_model_document(session.student(name))['weights']['sha256']}"
        for name, fingerprint in stages.student_fingerprints(session).items()
    }


def evaluate_done(session: Session) -> bool:
    """Whether ``metrics.json`` is about today's models."""
    return bool(_metrics(session).get("fingerprint") == evaluate_fingerprint(session))


def evaluate_discard(session: Session) -> None:
    """Takes the metrics away, and the students' predictions."""
    session.run.delete(layout.METRICS)
    for name in ("distilled", "alone"):
        session.student(name).delete_tree(PREDICTIONS)


def _metrics(session: Session) -> dict[str, Any]:
    return _document(session, layout.METRICS)


def _document(session: Session, key: str) -> dict[str, Any]:
    """A JSON object of the run; empty where it is missing or damaged."""
    try:
        document = session.run.read_json(key)
    except (ObjectNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def evaluate(session: Session) -> None:
    """Exact layer-wise inference of every student; metrics of all models into ``metrics.json``."""
    knowledge = stages.open_knowledge(session)
    models = _measure_teachers(session, knowledge)
    for name, identity in _identities(session).items():
        predictions = _predict(session, name, identity)
        models[name] = _measure(session, session.student(name), predictions, knowledge, is_student=True)
    session.check_ownership()
    session.run.write_json(
        layout.METRICS,
        {
            "fingerprint": evaluate_fingerprint(session),
            "seed": session.config.seed,
            "models": models,
            "stages": _stage_facts(session, models),
            "versions": versions(),
        },
    )


def _measure_teachers(session: Session, knowledge: Stored | Ensemble) -> dict[str, Any]:
    """A row for the teacher; of several one for each, and one for the mean of their logits where there is one."""
    if not isinstance(knowledge, Ensemble):
        return {"teacher": _measure(session, session.teacher, knowledge, None)}
    rows = {
        view.teacher_label: _measure(session, view.teacher, knowledge.stores[view.teacher_label], knowledge)
        for view in session.views()
    }
    if not knowledge.has_mean:
        log.warning(
            "infer.logits stores the largest logits of each teacher, which have no mean: there is no row for the "
            "ensemble and no agreement with it; infer.logits=all gives them"
        )
        return rows
    values = evaluate_logits(stages.open_graph(session), knowledge)
    together = {
        "metric": values["metric"],
        "accuracy": {split: values[split] for split in ("train", "val", "test")},
        "num_params": sum(row["num_params"] for row in rows.values()),
        "inference_s": sum(row["inference_s"] for row in rows.values()),
        "agreement": None,
        "lsp_kl": None,
    }
    return {**rows, "ensemble": together}


def _first_lsp(session: Session) -> LspLoss | None:
    return next((loss for loss in session.config.losses if isinstance(loss, LspLoss)), None)


def _predict(session: Session, name: str, identity: str) -> tuple[Storage, Manifest]:
    """Logits of a student at full precision, and the scores that its LSP value is computed from."""
    from gkd_dist.infer.plan import Wants
    from gkd_dist.infer.run import infer_nodes

    term = _first_lsp(session)
    layers = session.config.student.model.layers
    scores = {} if term is None else {resolve_layer(term.student_layer, layers): {term.metric}}
    out = session.student(name).child(PREDICTIONS)
    with stages.task_progress(session, f"evaluate {name}") as progress:
        manifest = infer_nodes(
            session.student(name),
            stages.open_graph(session),
            out,
            Wants(True, scores),
            session.config.infer.exact(),
            fingerprint=fp.evaluation_fingerprint({name: identity}, repr(scores)),
            pool=session.actors(),
            allow_code=session.allow_code,
            progress=progress,
            ownership_check=session.check_ownership,
        )
    return out, manifest


def _measure(
    session: Session,
    folder: Storage,
    predictions: Stored,
    teacher: Stored | Ensemble | None,
    is_student: bool = False,
) -> dict[str, Any]:
    """One row of the table; ``teacher`` is what it is compared with: all together where there are several."""
    from gkd_dist.inference_time import inference_seconds

    graph = stages.open_graph(session)
    compared = None if isinstance(teacher, Ensemble) and not teacher.has_mean else teacher
    values = evaluate_logits(graph, predictions, compared)
    model, spec = read_model(folder, session.allow_code)
    term = _first_lsp(session)
    return {
        "metric": values["metric"],
        "accuracy": {split: values[split] for split in ("train", "val", "test")},
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "inference_s": inference_seconds(model, graph, spec.features),
        "agreement": values.get("agreement"),
        "lsp_kl": _divergence(session, folder, predictions, teacher, term) if term and teacher and is_student else None,
    }


def _divergence(
    session: Session,
    folder: Storage,
    predictions: Stored,
    teacher: Stored | Ensemble,
    term: LspLoss,
) -> float:
    """LSP divergence by the first LSP term, with the width that training settled on where there is one.

    From several teachers it is the mean over those that the term reads.
    """
    summary = read_model_document(folder).get("meta", {}).get("summary", {})
    sigma = summary.get("extra", {}).get("sigmas", {}).get("lsp")
    graph = stages.open_graph(session)
    if not isinstance(teacher, Ensemble):
        return lsp_divergence(graph, predictions, teacher, term, student_sigma=sigma)
    read = [stored for name, stored in teacher.stores.items() if term.teacher in (None, name)]
    found = [lsp_divergence(graph, predictions, stored, term, student_sigma=sigma) for stored in read]
    return sum(found) / len(found)


def _stage_facts(session: Session, models: dict[str, Any]) -> dict[str, Any]:
    """Wall time and memory of every stage, and what training said of itself."""
    from gkd_dist.flow import stage_records

    facts: dict[str, Any] = {
        name: {key: record[key] for key in ("wall_s", "peak_rss_bytes") if key in record}
        for name, record in stage_records(session).items()
    }
    folders = {"teach" + ("" if v.is_whole else f" {v.teacher_label}"): v.teacher for v in session.views()}
    folders |= {f"distill {name}": session.student(name) for name in models if name in ("distilled", "alone")}
    for name, folder in folders.items():
        summary = read_model_document(folder).get("meta", {}).get("summary")
        if summary:
            keys = ("epochs_run", "best_epoch", "best_val", "wall_s", "wait_s", "peak_rss_bytes")
            facts[name] = {key: summary[key] for key in keys}
    return facts


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("gkd_dist", "torch", "torch-geometric", "ray", "deepspeed", "fsspec", "safetensors", "pymetis"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# --- export ----------------------------------------------------------------------------------


def export_fingerprint(session: Session) -> str:
    """Of the exported student; needs the students."""
    return fp.evaluation_fingerprint({"distilled": _identities(session)["distilled"]}, EXPORT)


def export_done(session: Session) -> bool:
    """Whether the export is of today's student and has its card."""
    folder = session.run.child(EXPORT)
    return stages.model_fingerprint(folder) == export_fingerprint(session) and folder.exists(CARD)


def export_discard(session: Session) -> None:
    """Takes the exported student away."""
    session.run.child(EXPORT).delete(layout.MODEL_JSON)


def export(session: Session) -> None:
    """Copies the distilled student out of the run and describes it in a model card."""
    from gkd_dist.export import export_student, model_card

    folder = session.run.child(EXPORT)
    session.check_ownership()
    graph = stages.open_graph(session).manifest.meta
    folder.write(CARD, model_card(session.config, graph, _metrics(session)).encode())
    export_student(session.student("distilled"), folder, export_fingerprint(session), session.allow_code)


# --- report ----------------------------------------------------------------------------------


def report_fingerprint(session: Session) -> str:
    """Of ``report.html``."""
    return evaluate_fingerprint(session)


def report_done(session: Session) -> bool:
    """Whether the report is there and about today's metrics."""
    record = _document(session, layout.stage_record("report"))
    return record.get("fingerprint") == report_fingerprint(session) and session.run.exists(layout.REPORT)


def report_discard(session: Session) -> None:
    """Takes the report away."""
    session.run.delete(layout.REPORT)


def report(session: Session) -> None:
    """Writes ``report.html``."""
    from gkd_dist.config_file import dump_config
    from gkd_dist.report import build_report
    from gkd_dist.tensorboard import read_curves

    manifest = stages.open_graph(session).manifest
    partition = {"meta": manifest.meta, "parts": [part.counts for part in manifest.parts]}
    names = (*(view.teacher_label for view in session.views()), *stages.student_fingerprints(session))
    curves = {name: read_curves(session.run.child(f"{layout.TENSORBOARD}/{name}")) for name in names}
    html = build_report(_metrics(session), curves, partition, dump_config(session.config))
    session.check_ownership()
    session.run.write(layout.REPORT, html.encode())
