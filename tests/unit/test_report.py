"""The table for the terminal and the self-contained HTML file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from gkd_dist.report import build_report, format_table, headline, ordered_models
from gkd_dist.storage import Storage
from gkd_dist.tensorboard import MetricsWriter, read_curves


def model(test: float | None = 0.8, params: int = 1000, seconds: float = 0.5, **changes: Any) -> dict[str, Any]:
    return {
        "metric": "accuracy",
        "accuracy": {"train": 0.95, "val": 0.85, "test": test},
        "num_params": params,
        "inference_s": seconds,
        "agreement": None,
        "lsp_kl": None,
        **changes,
    }


METRICS: dict[str, Any] = {
    "models": {
        "distilled": model(0.88, 1250, 0.03125, agreement=0.9312, lsp_kl=0.01234),
        "teacher": model(0.9, 1_250_000, 0.5),
        "alone": model(0.86, 1250, 0.03, agreement=0.9, lsp_kl=0.05),
    },
    "stages": {
        "teach": {"wall_s": 71.0, "peak_rss_bytes": 900 << 20, "epochs_run": 120, "best_epoch": 70},
        "infer": {"wall_s": 8.25, "peak_rss_bytes": 400 << 20},
    },
    "seed": 3,
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
}
CURVES = {
    "teacher": {"accuracy/val": [(1, 0.5), (2, 0.9)]},
    "distilled": {
        "accuracy/val": [(1, 0.4), (2, 0.88)],
        "loss/label": [(1, 2.0), (2, 1.0)],
        "loss/lsp": [(1, 0.1), (2, 0.05)],
        "loss/total": [(1, 3.0), (2, 1.5)],
        "lsp/kl": [(1, 0.3), (2, 0.01)],
        "lr": [(1, 0.01), (2, 0.01)],
    },
    "alone": {"accuracy/val": [(1, 0.3), (2, 0.86)], "lsp/kl": [(1, 0.4), (2, 0.05)]},
}
PARTITION: dict[str, Any] = {
    "meta": {
        "name": "Computers", "num_nodes": 13_752, "num_edges": 491_722, "edge_cut": 98_344,
        "balance": 1.034, "halo_factor": 2.345, "halo_hops": 2,
    },
    "parts": [
        {"num_owned": 800 + i, "num_halo": 100, "num_owned_edges": 3000, "num_edges": 4000} for i in range(3)
    ],
}  # fmt: skip


class Page(HTMLParser):
    """What a reader sees, and whether tags are closed in order."""

    VOID = ("meta", "line", "circle", "rect", "polyline")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and data.strip():
            self.words.append(data.strip())

    def count(self, tag: str, css: str | None = None) -> int:
        return sum(name == tag and (css is None or attrs.get("class") == css) for name, attrs in self.tags)


def report(**changes: Any) -> Page:
    inputs = {"metrics": METRICS, "curves": CURVES, "partition": PARTITION, "config_yaml": "run: a\n", **changes}
    return Page(build_report(**inputs))


class TestTable:
    def test_models_stand_in_the_order_of_the_story(self):
        assert format_table(METRICS) == dedent("""\
            model              train accuracy  val accuracy  test accuracy  parameters  inference  agreement  LSP KL
            -----------------  --------------  ------------  -------------  ----------  ---------  ---------  ------
            teacher                    0.9500        0.8500         0.9000   1,250,000     500 ms          -       -
            student alone              0.9500        0.8500         0.8600       1,250      30 ms     0.9000    0.05
            student distilled          0.9500        0.8500         0.8800       1,250    31.2 ms     0.9312  0.0123""")

    def test_other_models_follow_and_micro_f1_is_named(self):
        models = {"b": model(metric="micro_f1"), "a": model(metric="micro_f1", seconds=90.0)}
        header, _, *rows = format_table({"models": models}).splitlines()
        assert "test micro-F1" in header
        assert [row.split()[0] for row in rows] == ["a", "b"]
        assert "1 min 30 s" in rows[0]

    def test_what_was_not_measured_is_a_dash(self):
        empty = {"accuracy": {"train": 0.5, "val": None}}
        assert format_table({"models": {"teacher": empty}}).splitlines()[-1].split() == ["teacher", "0.5000", *"------"]


class TestHeadline:
    def test_everything_known(self):
        assert headline(METRICS) == (
            "The distilled student reaches a test accuracy of 0.8800, +2.00 points against the same student without a "
            "teacher. It keeps 97.8% of its teacher's accuracy with 0.10% of the parameters in 6.2% of the time."
        )

    def test_a_worse_student_is_not_hidden(self):
        assert ", -6.00 points" in headline({"models": {"distilled": model(0.80), "alone": model(0.86)}})

    @pytest.mark.parametrize("models", [{}, {"teacher": model()}, {"distilled": model(test=None)}])
    def test_too_little_to_say(self, models: dict[str, Any]):
        assert headline({"models": models}) == ""


class TestPage:
    def test_it_needs_nothing_beside_itself(self):
        html = build_report(METRICS, CURVES, PARTITION, "run: a\n")
        assert not re.search(r"https?:|//|src=|href=|url\(|@import|<script|<link|<iframe", html)
        tags = {tag for tag, _ in report().tags}
        assert not tags & {"script", "link", "img", "iframe", "object", "a", "form"}

    def test_sections_and_charts(self):
        page = report()
        headings = ["Result", "Learning curves", "Local structure", "Partition", "Stages", "Configuration", "Versions"]
        assert [word for word in page.words if word in headings] == headings
        # validation, label loss, terms, learning rate; divergence while training and at the end; nodes, edges
        assert page.count("svg") == 8
        assert page.count("figure") == 8

    def test_numbers_of_the_table_and_the_stages(self):
        words = report().words
        for expected in ("1,250,000", "31.2 ms", "0.9312", "0.0123", "1 min 11 s", "900 MiB", "120", "8.2 s"):
            assert expected in words

    def test_numbers_of_the_partition(self):
        page = report()
        for expected in ("13,752", "98,344 (20.0%)", "1.03", "2.35"):
            assert expected in page.words
        assert "part 2: 802 owned nodes" in page.words
        assert "part 2: 1,000 in-edges of halo nodes" in page.words
        assert page.count("rect", "b s2") == 3 + 3 + 1  # owned nodes, owned edges, and the distilled student

    def test_many_parts_are_sampled_from_the_largest_to_the_smallest(self):
        parts = [{"num_owned": 1 + i, "num_halo": 1, "num_owned_edges": 1, "num_edges": 2} for i in range(1000)]
        page = report(partition={"meta": {}, "parts": parts})
        assert "64 of 1,000 parts, evenly spaced by their number of owned nodes." in page.words
        owned = [word for word in page.words if re.fullmatch(r"part \d+: [\d,]+ owned nodes", word)]
        assert len(owned) == 64
        assert (owned[0], owned[-1]) == ("part 999: 1,000 owned nodes", "part 0: 1 owned nodes")

    def test_a_model_has_one_colour_everywhere(self):
        page = report()
        assert page.count("polyline", "l s0") == 2  # teacher: validation; the total of the terms
        assert page.count("polyline", "l s1") == 3  # alone: validation, divergence; and the second term

    def test_half_a_run_has_no_empty_boxes(self):
        page = report(metrics={}, curves={}, partition={}, config_yaml="")
        assert page.count("section") == 0
        assert page.count("svg") == 0
        assert "Distillation on graph" in page.words

    def test_every_text_is_escaped(self):
        bad = "</title></style><script>alert('x')</script>&\""
        points = [(1, 0.5), (2, 0.6)]
        page = report(
            metrics={
                "models": {bad: model(metric="accuracy")},
                "stages": {bad: {"wall_s": 1.0}},
                "seed": bad,
                "versions": {bad: bad},
            },
            curves={bad: {"accuracy/val": points, bad: points}, "distilled": {f"loss/{bad}": points}},
            partition={"meta": {"name": bad}, "parts": PARTITION["parts"]},
            config_yaml=f"run: {bad}\n",
        )  # fmt: skip
        assert page.count("script") == 0
        assert sum(bad in word for word in page.words) >= 9

    def test_the_configuration_is_shown_as_it_is(self):
        assert "run: a\n  # <b>\n  lr: 1" in report(config_yaml="run: a\n  # <b>\n  lr: 1\n").words

    def test_values_that_are_not_finite_do_not_break_a_chart(self):
        nan = float("nan")
        assert report(curves={"distilled": {"loss/label": [(1, nan), (2, 1.0), (3, 2.0)]}}).count("polyline") == 2


def test_curves_of_a_run_reach_its_report(tmp_path: Path):
    store = Storage.open(str(tmp_path))
    for name in ("teacher", "distilled"):
        with MetricsWriter(store, f"tensorboard/{name}") as writer:
            for step in range(1, 6):
                writer.scalar("accuracy/val", step / 10, step)
    curves = {name: read_curves(store.child(f"tensorboard/{name}")) for name in ("teacher", "distilled", "alone")}
    page = report(curves=curves)
    lines = [attrs["points"] for tag, attrs in page.tags if tag == "polyline"]
    assert [len((points or "").split()) for points in lines] == [5, 5]


def test_several_teachers_come_first_then_their_ensemble() -> None:
    row = {"metric": "accuracy", "accuracy": {"test": 0.8}}
    models = {name: row for name in ("zeta", "distilled", "ensemble", "alpha", "alone")}
    assert [name for name, _ in ordered_models(models)] == ["alpha", "zeta", "ensemble", "alone", "distilled"]
    assert "It keeps 100.0% of the ensemble's accuracy" in headline({"models": models})
