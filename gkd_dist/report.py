"""The result of a run as one table for the terminal and one HTML file for everyone else.

The file needs nothing beside itself: styles are inline, charts are SVG, there is no script. Every
text that comes from the run is escaped.

Legend of what is read:

- ``metrics``: content of ``metrics.json``: ``models`` (one row each), ``stages``, ``seed``, ``versions``
- ``curves``: model -> name of a scalar (see `tensorboard.MetricsWriter`) -> [(step, value)]
- ``partition``: ``meta`` and ``parts`` (counts of each part) of the graph's manifest
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gkd_dist import report_page as page
from gkd_dist.charts import Series, bar_chart, line_chart
from gkd_dist.report_page import Cell
from gkd_dist.telemetry import duration

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]

LABELS = {"teacher": "teacher", "alone": "student alone", "distilled": "student distilled"}
_SPLITS = ("train", "val", "test")
_METRICS = {"accuracy": "accuracy", "micro_f1": "micro-F1"}
_MAX_BARS = 64

# --- the table -------------------------------------------------------------------------------


def format_table(metrics: Mapping[str, Any]) -> str:
    """The models as aligned text, one row each, the teacher first."""
    header, rows = table_rows(metrics)
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def table_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of models, as text."""
    models = ordered_models(metrics.get("models", {}))
    name = metric_name(metrics)
    header = ["model", *(f"{split} {name}" for split in _SPLITS), "parameters", "inference", "agreement", "LSP KL"]
    rows = [
        [
            LABELS.get(model, model),
            *(_score(row.get("accuracy", {}).get(split)) for split in _SPLITS),
            _whole(row.get("num_params")),
            _seconds(row.get("inference_s")),
            _score(row.get("agreement")),
            _small(row.get("lsp_kl")),
        ]
        for model, row in models
    ]
    return header, rows


def metric_name(metrics: Mapping[str, Any]) -> str:
    """``accuracy`` or ``micro-F1``; ``score`` where models differ."""
    kinds = {row.get("metric", "accuracy") for row in metrics.get("models", {}).values()}
    return _METRICS.get(kinds.pop(), "score") if len(kinds) == 1 else "score"


def ordered_models(models: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Several teachers and their mean by name, or the teacher; student alone, student distilled."""
    named = sorted(set(models) - {*LABELS, "ensemble"})
    names = [*named, *(name for name in ("ensemble", *LABELS) if name in models)]
    return [(name, models[name]) for name in names]


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.3g} ms" if value < 1 else duration(value)


# --- the page --------------------------------------------------------------------------------


def build_report(metrics: Mapping[str, Any], curves: Curves, partition: Mapping[str, Any], config_yaml: str) -> str:
    """The HTML file."""
    meta = partition.get("meta", {})
    title = str(meta.get("name") or "graph")
    sections = [
        page.section("Result", _result(metrics)),
        page.section("Learning curves", _learning(curves, metric_name(metrics))),
        page.section("Local structure", _structure(metrics, curves)),
        page.section("Partition", _partition(meta, partition.get("parts", []))),
        page.section("Stages", _stages(metrics.get("stages", {}))),
        page.section("Configuration", page.folded_text("resolved, all defaults written out", config_yaml)),
        page.section("Versions", _versions(metrics)),
    ]
    return page.document(f"Distillation on {title}", headline(metrics), [one for one in sections if one])


def headline(metrics: Mapping[str, Any]) -> str:
    """What the run achieved, in one or two sentences; "" where there is too little to say."""
    models = dict(ordered_models(metrics.get("models", {})))
    student, alone = (models.get(name) for name in ("distilled", "alone"))
    teacher = models.get("teacher") or models.get("ensemble")
    whose = "the ensemble's" if "ensemble" in models else "its teacher's"
    score = _test(student)
    if score is None or student is None:
        return ""
    name = metric_name(metrics)
    text = f"The distilled student reaches a test {name} of {score:.4f}"
    if (without := _test(alone)) is not None:
        text += f", {(score - without) * 100:+.2f} points against the same student without a teacher"
    text += "."
    above = _test(teacher)
    if teacher is not None and above:
        text += f" It keeps {score / above:.1%} of {whose} {name}"
        if teacher.get("num_params") and student.get("num_params"):
            text += f" with {student['num_params'] / teacher['num_params']:.2%} of the parameters"
        if teacher.get("inference_s") and student.get("inference_s"):
            text += f" in {student['inference_s'] / teacher['inference_s']:.1%} of the time"
        text += "."
    return text


def _test(row: Mapping[str, Any] | None) -> float | None:
    return None if row is None else row.get("accuracy", {}).get("test")


def _result(metrics: Mapping[str, Any]) -> str:
    header, rows = table_rows(metrics)
    if not rows:
        return ""
    names = [name for name, _ in ordered_models(metrics["models"])]
    cells = [[Cell(row[0], style=style_of(name)), *map(Cell, row[1:])] for name, row in zip(names, rows, strict=True)]
    note = (
        "Inference is one exact pass over the whole graph. Agreement is the share of nodes for which a model and the "
        "teacher (of several: the mean of their logits) give the same answer. LSP KL is the divergence of the local "
        "structure from the teacher's (of several: the mean of the divergences)."
    )
    return page.table(header, cells, strong=LABELS["distilled"]) + page.note(note)


def style_of(model: str) -> int:
    """Number of the colour of a model, the same in every chart."""
    return [*LABELS].index(model) if model in LABELS else 3


def _learning(curves: Curves, metric: str) -> str:
    names = {name for scalars in curves.values() for name in scalars}
    others = sorted(names - {"accuracy/val", "accuracy/train", "loss/label"})
    more = [_by_model(name, name, curves) for name in others if not name.startswith(("loss/", "lsp/"))]
    terms = _terms(curves.get("distilled", {}))
    figures = [
        _by_model(f"Validation {metric}", "accuracy/val", curves),
        _by_model(f"Training {metric}", "accuracy/train", curves),
        _by_model("Label loss", "loss/label", curves),
        page.figure("Loss terms of the distilled student", terms, line_chart(terms, "step")),
    ]
    return page.grid(figures) + page.folded("more curves", page.grid(more))


def _terms(scalars: Mapping[str, Sequence[tuple[int, float]]]) -> list[Series]:
    """The terms of the objective as lines, the total first and in grey."""
    names = sorted((name for name in scalars if name.startswith("loss/")), key=lambda name: name != "loss/total")
    colours = {name: (2, 1, 4, 5, 3)[place % 5] for place, name in enumerate(sorted(set(names) - {"loss/total"}))}
    return [Series(name.removeprefix("loss/"), colours.get(name, 0), scalars[name]) for name in names]


def _by_model(title: str, scalar: str, curves: Curves) -> str:
    series = [
        Series(LABELS.get(model, model), style_of(model), scalars[scalar])
        for model, scalars in ordered_models(curves)
        if scalars.get(scalar)
    ]
    spans_decades = scalar == "lr" or scalar.startswith(("loss/", "lsp/"))
    return page.figure(title, series, line_chart(series, "step", log=None if spans_decades else False))


def _structure(metrics: Mapping[str, Any], curves: Curves) -> str:
    values = {name: row.get("lsp_kl") for name, row in ordered_models(metrics.get("models", {}))}
    rows = [(name, value) for name, value in values.items() if value is not None]
    bars = [Series(LABELS.get(name, name), style_of(name), [(i, value)]) for i, (name, value) in enumerate(rows)]
    names = [LABELS.get(name, name) for name, _ in rows]
    final = page.figure("Divergence from the teacher at the end", [], bar_chart(names, bars, ""))
    return page.grid([_by_model("Divergence from the teacher while training", "lsp/kl", curves), final])


# --- partition, stages, versions -------------------------------------------------------------


def _partition(meta: Mapping[str, Any], parts: Sequence[Mapping[str, int]]) -> str:
    if not parts:
        return ""
    facts = [
        ("nodes", _whole(meta.get("num_nodes"))),
        ("edges", _whole(meta.get("num_edges"))),
        ("parts", f"{len(parts):,}"),
        ("halo hops", _whole(meta.get("halo_hops"))),
        ("edges cut", _cut(meta)),
        ("balance (largest / mean)", _ratio(meta.get("balance"))),
        ("halo factor", _ratio(meta.get("halo_factor"))),
    ]
    chosen = _some_parts(parts)
    names = [str(index) for index in chosen]
    nodes = [_layer("owned nodes", 2, parts, chosen, "num_owned"), _layer("halo nodes", 3, parts, chosen, "num_halo")]
    owned = _layer("in-edges of owned nodes", 2, parts, chosen, "num_owned_edges")
    halo = [
        (place, parts[index].get("num_edges", 0) - parts[index].get("num_owned_edges", 0))
        for place, index in enumerate(chosen)
    ]
    edges = [owned, Series("in-edges of halo nodes", 3, halo)]
    figures = [
        page.figure("Nodes of each part", nodes, bar_chart(names, nodes, "part")),
        page.figure("Edges of each part", edges, bar_chart(names, edges, "part")),
    ]
    few = f"{len(chosen)} of {len(parts):,} parts, evenly spaced by their number of owned nodes."
    return page.facts(facts) + page.grid(figures) + (page.note(few) if len(chosen) < len(parts) else "")


def _some_parts(parts: Sequence[Mapping[str, int]]) -> list[int]:
    """Numbers of the parts that get a bar: all, or a sample from the largest to the smallest."""
    if len(parts) <= _MAX_BARS:
        return list(range(len(parts)))
    by_size = sorted(range(len(parts)), key=lambda index: (-parts[index].get("num_owned", 0), index))
    return [by_size[place * (len(parts) - 1) // (_MAX_BARS - 1)] for place in range(_MAX_BARS)]


def _layer(label: str, style: int, parts: Sequence[Mapping[str, int]], chosen: Sequence[int], count: str) -> Series:
    return Series(label, style, [(place, parts[index].get(count, 0)) for place, index in enumerate(chosen)])


def _cut(meta: Mapping[str, Any]) -> str:
    cut, total = meta.get("edge_cut"), meta.get("num_edges")
    return "-" if cut is None else f"{cut:,}" + (f" ({cut / total:.1%})" if total else "")


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["stage", "wall time", "waited for data", "peak memory", "epochs run", "best epoch"]
    rows = [
        [
            Cell(name),
            Cell("-" if row.get("wall_s") is None else duration(row["wall_s"])),
            Cell("-" if row.get("wait_s") is None else f"{row['wait_s'] / max(row['wall_s'], 1e-9):.1%}"),
            Cell("-" if row.get("peak_rss_bytes") is None else f"{row['peak_rss_bytes'] / 2**20:,.0f} MiB"),
            Cell(_whole(row.get("epochs_run"))),
            Cell(_whole(row.get("best_epoch"))),
        ]
        for name, row in stages.items()
    ]
    return page.table(header, rows) if rows else ""


def _versions(metrics: Mapping[str, Any]) -> str:
    facts = {"seed": metrics.get("seed"), **metrics.get("versions", {})}
    return page.pairs((key, str(value)) for key, value in facts.items() if value is not None)
