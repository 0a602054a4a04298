"""What will be stored and how large it is, by hand and against stores that were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from infer_worlds import NUM_CLASSES, World, make_graph

from gkd_dist.config import Config
from gkd_dist.config_file import parse_config
from gkd_dist.errors import ConfigError
from gkd_dist.infer.packing import Packing
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.plan import crossover_degree, format_knowledge, knowledge_json, knowledge_kinds, plan_knowledge

YAML = """
run: /data/run
graph: {source: {kind: synthetic, num_nodes: 100}}
partition: {num_parts: 3}
teacher: {model: {kind: gcn, hidden: 5, layers: 3}}
infer: {num_actors: 0}
student: {model: {kind: gcn, hidden: 4, layers: 2}}
losses:
  - {kind: label}
  - {kind: kd, temperature: 2}
  - {kind: kd, temperature: 4}
  - {kind: lsp, teacher_layer: 1, student_layer: 1}
  - {kind: lsp, teacher_layer: 2, kernel: cosine, student_layer: 1}
"""
META = {"num_nodes": 1000, "num_edges": 14_000, "halo_factor": 1.0, "num_classes": 40}


def config(*overrides: str) -> Config:
    return parse_config(YAML, overrides=overrides)


def sizes(*overrides: str, **meta: Any) -> dict[str, tuple[str, tuple[int, ...], int]]:
    kinds = knowledge_kinds(config(*overrides), META | meta)
    return {kind.name: (kind.dtype, kind.shape, kind.num_bytes) for kind in kinds}


def test_scores_by_hand() -> None:
    assert sizes("infer.scores=scores") == {
        "logits": ("fp16", (1000, 40), 80_000),
        "scores.1.sqeuclidean": ("fp16", (14_000,), 28_000),
        "scores.2.cosine": ("fp16", (14_000,), 28_000),
    }


def test_bytes_have_an_offset_and_a_scale_per_node() -> None:
    found = sizes("infer.scores=scores", "infer.scores_dtype=uint8", "infer.dtype=fp32")
    assert found["scores.1.sqeuclidean"] == ("uint8", (14_000,), 14_000 + 8 * 1000)
    assert found["logits"] == ("fp32", (1000, 40), 160_000)


def test_embeddings_by_hand() -> None:
    found = sizes("infer.scores=embeddings")
    assert found["embeddings.1"] == ("fp16", (2000, 5), 20_000)


def hinted(*overrides: str) -> Config:
    return parse_config(YAML + "  - {kind: fitnet, teacher_layer: 1, student_layer: 1}\n", overrides=overrides)


def test_a_hint_stores_embeddings_from_which_scores_follow() -> None:
    def names(*overrides: str) -> set[str]:
        return {kind.name for kind in knowledge_kinds(hinted(*overrides), META)} - {"logits"}

    found = {kind.name: kind for kind in knowledge_kinds(hinted(), META)}
    assert (found["embeddings.1"].shape, found["embeddings.1"].num_bytes) == ((2000, 5), 20_000)
    assert names() == {"embeddings.1", "embeddings.2"}
    assert names("infer.scores=scores") == {"embeddings.1", "scores.1.sqeuclidean", "scores.2.cosine"}
    assert names("infer.max_kl=1", "infer.dtype=fp32") >= {"embeddings.1", "scores.1.sqeuclidean"}
    text = format_knowledge(hinted(), META)
    assert (
        "layer 1: embeddings of width 5 stored for a fitnet loss, which reads them as they are (20,000 bytes)" in text
    )
    assert text.count("layer 1: ") == 1


def test_the_largest_logits_by_hand() -> None:
    found = sizes("infer.logits=3")
    assert found["logits.topk"] == ("fp16", (1000, 3), 6000)
    assert found["logits.index"] == ("int16", (1000, 3), 6000)
    assert found["logits.tail"] == ("fp16", (1000, 2), 4000)
    assert sizes("infer.logits=3", num_classes=40_000)["logits.index"][0] == "int32"
    assert set(sizes("infer.logits=40")) & {"logits", "logits.topk"} == {"logits"}


@pytest.mark.parametrize(
    ("degree", "dtype", "expected"),
    [
        (9.9, "fp16", "scores"),  # 2 d bytes against 2 * 5 * (1 + 1)
        (10.1, "fp16", "embeddings"),
        (11.9, "uint8", "scores"),  # d + 8 against 20
        (12.1, "uint8", "embeddings"),
        (4.9, "fp32", "scores"),  # 4 d against 20: embeddings stay in fp16
        (5.1, "fp32", "embeddings"),
    ],
)
def test_auto_takes_the_smaller_as_stored(degree: float, dtype: str, expected: str) -> None:
    meta = META | {"num_edges": int(degree * 1000)}
    settings = config(f"infer.scores_dtype={dtype}")
    scores, embeddings = plan_knowledge(settings, meta)
    assert (sorted(scores), sorted(embeddings)) == (([1, 2], []) if expected == "scores" else ([], [1, 2]))
    crossover = crossover_degree(settings, meta, 1, 1)
    assert (degree < crossover) == (expected == "scores")
    assert f"smaller above {crossover:.1f}" in format_knowledge(settings, meta)


@pytest.mark.parametrize(
    ("model", "width"),
    [
        ("{kind: 'user_models:Layered', layers: 2, args: {width: 7}}", 7),
        ("{kind: 'torch_geometric.nn:GraphSAGE', layers: 3, hidden: 9}", 9),
        ("{kind: gat, layers: 3, hidden: 4, heads: 2}", 8),
    ],
)
def test_widths_of_any_teacher(model: str, width: int) -> None:
    found = sizes("infer.scores=embeddings", f"teacher.model={model}", "losses.4.teacher_layer=1", num_features=6)
    assert found["embeddings.1"] == ("fp16", (2000, width), 2 * 2000 * width)


def test_a_bound_that_embeddings_cannot_keep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"infer\.max_kl is kept by stored scores, but layer 1 .* fp16; set"):
        plan_knowledge(config("infer.max_kl=0.1", "infer.scores=embeddings"), META)
    plan_knowledge(config("infer.max_kl=0.1", "infer.scores=embeddings", "infer.dtype=fp32"), META)
    plan_knowledge(config("infer.max_kl=0.1", "infer.scores=scores"), META)


def test_before_partition_nothing_is_known() -> None:
    assert "known after partition" in format_knowledge(config(), None)
    assert knowledge_json(config(), None) is None


@pytest.mark.parametrize(
    "overrides", [(), ("infer.scores_dtype=uint8", "infer.logits=2"), ("infer.scores=embeddings",)]
)
def test_sizes_are_those_of_a_store_that_is_written(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    world, settings = World(tmp_path, make_graph()), config(*overrides)
    graph, out = world.cut(3), world.storage("k")
    scores, embeddings = plan_knowledge(settings, graph.manifest.meta)
    packing = Packing.of(settings.infer, settings.losses, 3)
    manifest = infer_nodes(
        world.model("gcn")[0],
        graph,
        out,
        Wants(True, scores, embeddings),
        settings.infer,
        fingerprint="f" * 64,
        packing=packing,
    )
    written: dict[str, int] = {}
    for entry in manifest.parts:
        for tensor in entry.tensors:
            kind = tensor.name.removesuffix(".offset").removesuffix(".scale")
            written[kind] = written.get(kind, 0) + tensor.stop - tensor.start
    assert {kind.name: kind.num_bytes for kind in knowledge_kinds(settings, graph.manifest.meta)} == written
    found = knowledge_json(settings, graph.manifest.meta)
    assert found is not None
    assert found["num_bytes"] == sum(written.values())
    assert f"{sum(written.values()):,} bytes" in format_knowledge(settings, graph.manifest.meta)
    assert graph.manifest.meta["num_classes"] == NUM_CLASSES
