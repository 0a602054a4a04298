"""The student on its own: a folder that rebuilds it, and a card that says what it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gkd_dist.config import BUILT_IN_MODELS, Config, ModelConfig
from gkd_dist.models.io import read_model, save_model
from gkd_dist.storage import Storage


def export_student(student: Storage, out: Storage, fingerprint: str, allow_code: Collection[str] = ()) -> None:
    """Reads the student, so that a damaged one is never exported, and writes it to ``out``."""
    model, spec = read_model(student, allow_code)
    save_model(out, model, spec, fingerprint)


def model_card(config: Config, graph: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Markdown: what the model is, how it was made, how good it is, how to use it."""
    model, features = config.student.model, config.student.features
    kinds = [teacher.model.kind for teacher in config.all_teachers()]
    teachers = f"a {kinds[0]} teacher" if len(kinds) == 1 else f"{len(kinds)} teachers ({', '.join(kinds)})"
    norm = f"norm {model.norm}, " if model.kind in BUILT_IN_MODELS else ""
    width = graph["num_features"] if features is None else graph["features"][features]
    return "\n".join(
        [
            f"# {model.kind} student, distilled on {graph['name']}",
            "",
            f"{model.layers} layers, {model.hidden} hidden units, {norm}distilled from {teachers} with gkd_dist.",
            "",
            *_only_this_graph(model, graph),
            "## Results",
            "",
            *_results(metrics),
            "",
            "Exact layer-wise inference over the whole graph; agreement is with the teacher's predictions.",
            "",
            "## Data",
            "",
            f"{graph['num_nodes']:,} nodes, {graph['num_edges']:,} directed edges, {width:,} features"
            f"{'' if features is None else f' ({features})'}, {graph['num_classes']} classes ({graph['task']}).",
            "",
            "## Training",
            "",
            *(f"- {_loss_line(loss)}" for loss in config.losses),
            f"- {config.distill.optimizer}, learning rate {config.distill.lr:g}, "
            f"at most {config.distill.epochs} epochs, seed {config.seed}",
            "",
            "## Use",
            "",
            "```python",
            "import gkd_dist",
            "",
            f'model = gkd_dist.load_model("URL of this folder"{code_argument(model.kind)})',
            f"logits = model(x, edge_index)  # x [n, {width}]{'' if features is None else f' of {features}'}, "
            "edge_index [2, m]",
            "```",
            "",
        ]
    )


def _only_this_graph(model: ModelConfig, graph: dict[str, Any]) -> list[str]:
    if model.node_embedding is None:
        return []
    text = f"It has a learned vector of {model.node_embedding} numbers for each of the {graph['num_nodes']:,} nodes of"
    return [f"{text} that graph, so it is of no use on another one.", ""]


def code_argument(kind: str) -> str:
    """What a call that loads a model of this kind has to say beside the URL: a class that is imported is named."""
    return "" if kind in BUILT_IN_MODELS else f", allow_code=[{kind!r}]"


def _loss_line(loss: Any) -> str:
    options = loss.model_dump(mode="json", exclude_defaults=True, exclude={"kind", "weight"})
    text = ", ".join(f"{key} {value}" for key, value in options.items())
    return f"loss {loss.kind}, weight {loss.weight:g}" + (f" ({text})" if text else "")


def _results(metrics: dict[str, Any]) -> list[str]:
    rows = [
        "| model | metric | train | val | test | parameters | agreement |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, values in metrics.get("models", {}).items():
        splits = [_percent(values["accuracy"].get(split)) for split in ("train", "val", "test")]
        rows.append(
            f"| {name} | {values['metric']} | {' | '.join(splits)} | {values['num_params']:,} | "
            f"{_percent(values.get('agreement'))} |"
        )
    return rows if len(rows) > 2 else ["Not evaluated."]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
