"""What makes a stage's result another one, and what does not."""

from __future__ import annotations

import pytest

from gkd_dist import fingerprints as fp
from gkd_dist.config import Config, TrainConfig
from gkd_dist.config_file import parse_config

YAML = """
run: /data/run
graph: {source: {kind: synthetic, num_nodes: 100}}
partition: {num_parts: 4}
teacher: {model: {kind: gat, hidden: 8, layers: 2, heads: 2}}
student: {model: {kind: gcn, hidden: 4, layers: 2}}
losses:
  - {kind: label}
  - {kind: kd}
  - {kind: lsp}
"""


def config(*overrides: str) -> Config:
    return parse_config(YAML, overrides=overrides)


def chain(settings: Config) -> dict[str, str]:
    """Fingerprints of all stages, each fed with those before it; weights depend on the fingerprint alone."""
    teacher = fp.trained_teacher_fingerprint(settings)
    knowledge = fp.knowledge_fingerprint(settings, teacher, f"weights of {teacher}", {"scores": {"1": ["dot"]}})
    students = {
        "distilled": fp.student_fingerprint(settings, knowledge),
        "alone": fp.student_fingerprint(settings, None),
    }
    return {
        "graph": fp.graph_fingerprint(settings),
        "teacher": teacher,
        "knowledge": knowledge,
        **students,
        "evaluation": fp.evaluation_fingerprint(students, knowledge),
    }


def changed(*overrides: str) -> set[str]:
    """Stages whose fingerprint the overrides change."""
    before, after = chain(config()), chain(config(*overrides))
    return {stage for stage in before if before[stage] != after[stage]}


ALL = {"graph", "teacher", "knowledge", "distilled", "alone", "evaluation"}
TAUGHT = {"teacher", "knowledge", "distilled", "evaluation"}
STUDENTS = {"distilled", "alone", "evaluation"}
DISTILLED = {"distilled", "evaluation"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", ALL),
        ("graph.source.num_nodes=101", ALL),
        ("graph.normalize_features=true", ALL),
        ("graph.edge_attr=keep", ALL),
        ("graph.features.more=/data/more.npy", ALL),
        ("partition.num_parts=5", ALL),
        ("partition.method=random", ALL),
        ("partition.seed=3", ALL),
        ("partition.halo_hops=3", ALL),
        ("student.model.layers=3", ALL),  # needs another halo
        ("teacher.model.hidden=9", TAUGHT),
        ("teacher.train.lr=0.5", TAUGHT),
        ("teacher.train.units_per_step=2", TAUGHT),
        ("teacher.seed=1", TAUGHT),
        ("infer.dtype=bf16", {"knowledge", "distilled", "evaluation"}),
        ("infer.scores_dtype=uint8", {"knowledge", "distilled", "evaluation"}),
        ("student.model.hidden=5", STUDENTS),
        ("student.model.dropout=0.1", STUDENTS),
        ("distill.lr=0.5", STUDENTS),
        ("distill.lr_schedule.kind=cosine", STUDENTS),
        ("distill.precision=bf16", STUDENTS),
        ("distill.units_per_step=1", STUDENTS),
        ("losses.0.weight=2", STUDENTS),
        ("losses.1.temperature=2", DISTILLED),
        ("losses.2.sigma=median", DISTILLED),
        ("losses.2.schedule.warmup=3", DISTILLED),
    ],
)  # fmt: skip
def test_what_a_setting_changes(override: str, expected: set[str]) -> None:
    assert changed(override) == expected


@pytest.mark.parametrize(
    "override",
    [
        "run=/elsewhere",
        "stores.graph=s3://bucket/graph",
        "storage.retries=9",
        "ray.address=auto",
        "infer.num_actors=7",
        "infer.window=5",
        "infer.threads=2",
        "infer.max_kl=0.5",  # refuses what is stored, and stores nothing else
        "student.alone=false",
        "distill.num_workers=8",
        "distill.zero_stage=3",
        "distill.launcher=torchrun",
        "distill.threads=2",
        "distill.prefetch_bytes=1000000",
        "distill.resident_bytes=0",
        "distill.cache.folder=/scratch",
        "distill.data_timeout_s=5",
        "distill.checkpoint_every=1",
        "distill.keep=5",
        "distill.log_every=10",
        "distill.max_failures=0",
        "teacher.train.threads=1",
        "teacher.train.log_every=3",
    ],
)
def test_speed_and_place_change_nothing(override: str) -> None:
    assert changed(override) == set()


@pytest.mark.parametrize(
    "override", ["partition.num_parts=4", "distill.lr=0.01", "partition.halo_hops=2", "teacher.seed=0"]
)
def test_a_default_written_out_changes_nothing(override: str) -> None:
    assert changed(override) == set()


def test_a_given_teacher_is_its_weights() -> None:
    first = fp.given_teacher_fingerprint(config(), "1" * 64)
    assert first != fp.given_teacher_fingerprint(config(), "2" * 64)
    assert first == fp.given_teacher_fingerprint(config("teacher.train.lr=0.5"), "1" * 64)
    assert first != fp.trained_teacher_fingerprint(config())


def test_knowledge_depends_on_what_is_stored() -> None:
    found = {
        fp.knowledge_fingerprint(config(), "t", "w", wants) for wants in ({}, {"embeddings": [1]}, {"embeddings": [2]})
    }
    assert len(found) == 3


def test_a_format_version_changes_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fp.graph_fingerprint(config())
    monkeypatch.setitem(fp.FORMAT, "graph", 2)
    assert fp.graph_fingerprint(config()) != before


def test_fingerprints_are_hex_digests_that_last() -> None:
    assert all(len(value) == 64 and int(value, 16) >= 0 for value in chain(config()).values())
    assert chain(config()) == chain(config())


def test_graph_stores_of_earlier_versions_stay() -> None:
    """Settings that came later count only where they differ from what was done before."""
    assert fp.graph_fingerprint(config()).startswith("29fed21d71d1ee40")


def test_the_features_that_a_model_reads_are_its_own_matter() -> None:
    more = "graph.features.more=/data/more.npy"
    before = chain(config(more))
    taught = chain(config(more, "teacher.features=more"))
    assert {stage for stage in before if before[stage] != taught[stage]} == TAUGHT
    learned = chain(config(more, "student.features=more"))
    assert {stage for stage in before if before[stage] != learned[stage]} == STUDENTS


def test_every_training_setting_is_on_one_side() -> None:
    """A new field of `TrainConfig` has to be sorted: does it change the result, or only speed and place?"""
    speed_and_place = {"threads", "prefetch_bytes", "resident_bytes", "checkpoint_every", "keep", "log_every"}
    speed_and_place |= {"checkpoint_layers"}
    speed_and_place |= {"cache", "data_timeout_s"}
    assert fp.training(TrainConfig()).keys() | speed_and_place == TrainConfig.model_fields.keys()
    assert fp.training(TrainConfig()).keys().isdisjoint(speed_and_place)


def test_models_of_earlier_versions_stay() -> None:
    """Dropout by node is the default now; what was trained before counts as trained."""
    sections = [
        config("student.model.dropout=0.5"),
        config("student.model.dropout=0.5", "student.model.dropout_mask=unit"),
    ]
    assert fp.student_fingerprint(sections[0], None) != fp.student_fingerprint(sections[1], None)
    assert "dropout_mask" not in fp._dumped(sections[0].student.model)
