"""Rules of `gkd_dist.config`: bounds, rules across sections, and what follows from a config."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar

import pytest
from pydantic import TypeAdapter, ValidationError

from gkd_dist.config import AllOr, Config, LspLoss, ModelConfig, PositiveFloat, Schedule, Sigma, resolve_layer
from gkd_dist.config_file import dump_config, parse_config


def minimal(**changes: Any) -> dict[str, Any]:
    """The shortest mapping that is a Config, with top-level ``changes``."""
    return {
        "run": "runs/a",
        "graph": {"source": {"kind": "synthetic"}},
        "teacher": {"model": {"kind": "gat", "layers": 3, "heads": 4}},
        "student": {"model": {"kind": "gcn", "layers": 2}},
        "losses": [{"kind": "label"}],
        **changes,
    }


def config(**changes: Any) -> Config:
    return Config.model_validate(minimal(**changes))


class TestValues:
    def test_minimal_config_takes_the_documented_defaults(self):
        made = config()
        assert made.seed == 0
        assert made.partition.num_parts == 4
        assert made.infer.dtype == "fp16"
        assert made.distill.num_workers == 2
        assert made.teacher.train.parts_per_unit == "all"
        assert made.distill.parts_per_unit == 1

    def test_sections_are_immutable(self):
        with pytest.raises(ValidationError, match="frozen"):
            config().distill.lr = 1.0  # type: ignore[misc]

    @pytest.mark.parametrize("value", [True, False])
    @pytest.mark.parametrize("kind", [AllOr, PositiveFloat, Sigma])
    def test_true_and_false_are_not_numbers(self, kind: Any, value: bool):
        with pytest.raises(ValidationError):
            TypeAdapter(kind).validate_python(value)

    @pytest.mark.parametrize("value", [float("inf"), float("nan"), 0, -1])
    def test_a_learning_rate_is_finite_and_positive(self, value: float):
        with pytest.raises(ValidationError):
            config(distill={"lr": value})

    @pytest.mark.parametrize(("value", "expected"), [("all", "all"), (3, 3), ("3", 3)])
    def test_units_per_step_is_a_number_or_all(self, value: object, expected: object):
        assert config(distill={"units_per_step": value}).distill.units_per_step == expected


class TestModel:
    @pytest.mark.parametrize("kind", ["gcn", "mlp", "my_package.models:Net"])
    def test_built_in_or_user_class(self, kind: str):
        assert ModelConfig(kind=kind).kind == kind

    @pytest.mark.parametrize("kind", ["gnc", "module:", ":Net", "my package:Net", ""])
    def test_anything_else_is_refused(self, kind: str):
        with pytest.raises(ValidationError, match="module:attr"):
            ModelConfig(kind=kind)

    def test_only_gat_has_heads(self):
        with pytest.raises(ValidationError, match="only gat has heads"):
            ModelConfig(kind="gcn", heads=2)

    def test_args_belong_to_user_classes(self):
        assert ModelConfig(kind="m:Net", args={"depth": 3}).args == {"depth": 3}
        with pytest.raises(ValidationError, match="args is for module:attr models"):
            ModelConfig(kind="gcn", args={"depth": 3})


class TestLayers:
    @pytest.mark.parametrize(("layer", "num_layers", "expected"), [(1, 3, 1), (3, 3, 3), (-1, 3, 3), (-2, 2, 1)])
    def test_negative_numbers_count_from_the_end(self, layer: int, num_layers: int, expected: int):
        assert resolve_layer(layer, num_layers) == expected

    @pytest.mark.parametrize("layer", [0, 4, -4])
    def test_a_layer_that_is_not_there(self, layer: int):
        with pytest.raises(ValueError, match=f"layer {layer} does not exist in a model of 3 layers"):
            resolve_layer(layer, 3)

    def test_both_sides_of_lsp_are_checked(self):
        with pytest.raises(ValidationError, match=r"losses.0.teacher_layer: layer 4 does not exist"):
            config(losses=[{"kind": "lsp", "teacher_layer": 4}])
        with pytest.raises(ValidationError, match=r"losses.0.student_layer: layer 3 does not exist"):
            config(losses=[{"kind": "lsp", "student_layer": 3}])


class TestWhatFollows:
    def test_knowledge_layers_merge_terms_by_teacher_layer(self):
        terms = [
            {"kind": "label"},
            {"kind": "lsp", "teacher_layer": -2, "kernel": "rbf"},
            {"kind": "lsp", "teacher_layer": 2, "kernel": "cosine"},
            {"kind": "lsp", "teacher_layer": 1, "kernel": "laplacian"},
        ]
        assert config(losses=terms).knowledge_layers() == {2: {"sqeuclidean", "cosine"}, 1: {"manhattan"}}

    def test_without_lsp_no_scores_are_needed(self):
        assert config().knowledge_layers() == {}

    @pytest.mark.parametrize(
        ("student", "checkpoint", "lsp_layer", "expected"),
        [
            ({"kind": "gcn", "layers": 2}, "file:///t", None, 2),  # depth of the student
            ({"kind": "gcn", "layers": 2}, "file:///t", -1, 3),  # one more hop than the layer of the edge term
            ({"kind": "gcn", "layers": 2}, "file:///t", 1, 2),
            ({"kind": "mlp", "layers": 2}, "file:///t", None, 1),  # at least one, for the edges
            ({"kind": "mlp", "layers": 2}, "file:///t", -1, 1),
            ({"kind": "gcn", "layers": 2}, None, None, 3),  # the teacher is trained here too and has 3 layers
        ],
    )
    def test_halo_hops_auto_is_what_exactness_needs(
        self, student: dict[str, Any], checkpoint: str | None, lsp_layer: int | None, expected: int
    ):
        losses: list[dict[str, Any]] = [{"kind": "label"}]
        if lsp_layer is not None:
            losses.append({"kind": "lsp", "student_layer": lsp_layer})
        teacher = {"model": {"kind": "gat", "layers": 3}, "checkpoint": checkpoint}
        made = config(student={"model": student}, teacher=teacher, losses=losses)
        assert made.halo_hops() == expected
        assert config(partition={"halo_hops": 5}).halo_hops() == 5

    def test_schedule_is_off_outside_and_rises_over_the_warm_up(self):
        schedule = Schedule(start=2, stop=6, warmup=3)
        assert [schedule.factor(epoch) for epoch in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 0]

    def test_metric_of_each_kernel_family(self):
        metrics = {
            kernel: LspLoss(kind="lsp", kernel=kernel).metric for kernel in ("rbf", "laplacian", "poly", "cosine")
        }
        assert metrics == {"rbf": "sqeuclidean", "laplacian": "manhattan", "poly": "dot", "cosine": "cosine"}


class TestAcrossSections:
    def test_inline_is_one_process(self):
        with pytest.raises(ValidationError, match=r"got distill.num_workers 2"):
            config(distill={"launcher": "inline"})
        assert config(distill={"launcher": "inline", "num_workers": 1}).distill.num_workers == 1

    def test_a_memory_run_is_one_process(self):
        with pytest.raises(ValidationError, match="memory: run lives in one process"):
            config(run="memory://a")
        one = {"launcher": "inline", "num_workers": 1}
        for other in ({"stores": {"graph": "memory://g"}}, {"stores": {"knowledge": "Memory://k"}}):
            with pytest.raises(ValidationError, match=r"a memory: (graph|knowledge) store \(stores\..*one process"):
                config(**other)
            assert config(**other, infer={"num_actors": 0}, distill=one).stores != config().stores
        assert config(run="memory://a", infer={"num_actors": 0}, distill=one).run == "memory://a"

    @pytest.mark.parametrize(
        ("value", "instead"),
        [
            ({"train_batch_size": 4}, "distill.units_per_step"),
            ({"bf16": {"enabled": True}}, "distill.precision"),
            ({"zero_optimization": {"stage": 2}}, "distill.zero_stage"),
        ],
    )
    def test_deepspeed_keys_that_are_derived_name_the_key_to_set(self, value: dict[str, Any], instead: str):
        with pytest.raises(ValidationError, match=instead):
            config(distill={"deepspeed": value})
        assert config(distill={"deepspeed": {"zero_optimization": {"reduce_bucket_size": 10}}})

    def test_fractions_leave_something_to_test(self):
        with pytest.raises(ValidationError, match=r"train \+ val must be < 1 \(got 1\)"):
            config(graph={"source": {"kind": "synthetic"}, "split": {"kind": "random", "train": 0.5, "val": 0.5}})


def test_the_configuration_is_read_without_torch():
    code = "import sys, gkd_dist.config_file; print(sorted({'torch', 'ray', 'deepspeed'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


class TestFeatures:
    GRAPH: ClassVar = {"source": {"kind": "synthetic"}, "features": {"text": "text.npy", "image": "image.npy"}}

    @pytest.mark.parametrize("side", ["teacher", "student"])
    def test_a_model_reads_features_that_the_graph_names(self, side: str):
        model = {**minimal()[side], "features": "text"}
        assert getattr(config(graph=self.GRAPH, **{side: model}), side).features == "text"

    @pytest.mark.parametrize("side", ["teacher", "student"])
    def test_unknown_features_are_named_with_what_is_near(self, side: str):
        model = {**minimal()[side], "features": "test"}
        with pytest.raises(
            ValidationError, match=rf"{side}\.features: graph\.features has no 'test' \(it has image, te"
        ):
            config(graph=self.GRAPH, **{side: model})
        with pytest.raises(ValidationError, match="did you mean 'text'"):
            config(graph=self.GRAPH, **{side: model})

    def test_a_name_is_part_of_a_key(self):
        with pytest.raises(ValidationError, match=r"names are letters, digits, - and _ \(got 'a\.b'\)"):
            config(graph={"source": {"kind": "synthetic"}, "features": {"a.b": "text.npy"}})


class TestTeachers:
    TWO: ClassVar = [
        {"name": name, "model": {"kind": "gat", "layers": layers}} for name, layers in (("a", 2), ("b", 3))
    ]

    def made(self, **changes: Any) -> Config:
        given = minimal(teachers=self.TWO, **changes)
        del given["teacher"]
        return Config.model_validate(given)

    def test_a_configuration_with_several_is_written_and_read_back(self):
        made = self.made()
        text = dump_config(made)
        assert parse_config(text) == made
        assert parse_config(text, overrides=["teachers.0.seed=3"]).all_teachers()[0].seed == 3

    def test_only_one_way_of_giving_them(self):
        with pytest.raises(ValidationError, match="give either teacher, or two or more under teachers"):
            Config.model_validate(minimal(teachers=self.TWO))

    def test_each_loss_has_its_readers(self):
        kd = [{"kind": "label"}, {"kind": "kd"}, {"kind": "kd", "teacher": "b"}]
        made = self.made(losses=kd)
        assert [[one.name for one in made.readers_of(loss)] for loss in made.losses] == [[], ["a", "b"], ["b"]]

    def test_layers_resolve_by_the_depth_of_each(self):
        made = self.made(losses=[{"kind": "lsp", "teacher_layer": -2}])
        views = {one.name: made.view_of(one) for one in made.all_teachers()}
        assert {name: list(view.knowledge_layers()) for name, view in views.items()} == {"a": [1], "b": [2]}
        assert {view.halo_hops() for view in views.values()} == {made.halo_hops()} == {3}

    @pytest.mark.parametrize("name", ["teacher", "ensemble", "distilled", "alone"])
    def test_names_of_other_rows_are_taken(self, name: str):
        teachers = [{**self.TWO[0], "name": name}, self.TWO[1]]
        with pytest.raises(ValidationError, match=rf"teachers\.0\.name: '{name}' is what results call something else"):
            Config.model_validate(minimal(teachers=teachers, teacher=teachers[0]))
