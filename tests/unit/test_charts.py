"""Positions, ticks and shapes of SVG charts, checked by hand and by an XML parser."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd_dist.charts import Axis, Series, bar_chart, line_chart, linear_ticks, log_ticks, short, thin


def shapes(svg: str, tag: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter() if element.tag == tag]


def coordinates(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


class TestAxes:
    def test_values_lie_where_they_should(self):
        axis = Axis(0.0, 10.0, 100.0, 0.0)
        assert [axis.at(value) for value in (0, 2.5, 10)] == [100.0, 75.0, 0.0]
        log = Axis(0.1, 1000.0, 0.0, 400.0, log=True)
        assert [log.at(value) for value in (0.1, 1, 1000)] == pytest.approx([0.0, 100.0, 400.0])

    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
            (0.13, 0.97, [0.2, 0.4, 0.6, 0.8]),
            (-3.0, 7.0, [-2, 0, 2, 4, 6]),
            (1.0, 400.0, [100, 200, 300, 400]),
            (0.0, 50_000.0, [0, 10_000, 20_000, 30_000, 40_000, 50_000]),
        ],
    )
    def test_linear_ticks_are_round(self, low: float, high: float, expected: list[float]):
        assert linear_ticks(low, high) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (0.04, 9.0, [0.05, 0.1, 0.2, 0.5, 1, 2, 5]),
            (0.005, 2000.0, [0.01, 0.1, 1, 10, 100, 1000]),
            (2.0, 8.0, [2, 5]),
            (1e-6, 1e6, [1e-6, 1e-4, 1e-2, 1, 100, 1e4, 1e6]),
        ],
    )
    def test_log_ticks_are_powers_of_ten_or_between(self, low: float, high: float, expected: list[float]):
        assert log_ticks(low, high) == pytest.approx(expected)

    @given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
    def test_there_are_always_a_few_ticks_inside(self, low: float, span: float):
        ticks = linear_ticks(low, low + span)
        assert 2 <= len(ticks) <= 8
        assert all(low - span * 1e-6 <= tick <= low + span * 1.000001 for tick in ticks)

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0, "0"), (0.8982, "0.8982"), (1500, "1.5k"), (2e7, "20M"), (-3e9, "-3G"), (1e-5, "1e-5"), (250, "250")],
    )
    def test_short_numbers(self, value: float, text: str):
        assert short(value) == text


class TestLines:
    def test_a_line_joins_its_points_from_corner_to_corner(self):
        svg = line_chart([Series("a", 2, [(0, 0.0), (5, 5.0), (10, 10.0)])], "step")
        (line,) = shapes(svg, "polyline")
        (x0, y0), (x1, y1), (x2, y2) = coordinates(line)
        assert (x0, x2) == (48.0, 508.0)  # the frame
        assert x1 == pytest.approx((x0 + x2) / 2)
        assert y1 == pytest.approx((y0 + y2) / 2)
        assert y0 > y1 > y2  # upwards
        assert line.attrib["class"] == "l s2"

    def test_a_wide_span_of_positive_values_is_logarithmic(self):
        points = [(0, 1.0), (1, 10.0), (2, 100.0)]
        (line,) = shapes(line_chart([Series("a", 0, points)], "step"), "polyline")
        ys = [y for _, y in coordinates(line)]
        assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
        (line,) = shapes(line_chart([Series("a", 0, points)], "step", log=False), "polyline")
        ys = [y for _, y in coordinates(line)]
        assert (ys[1] - ys[2]) / (ys[0] - ys[1]) == pytest.approx(10, rel=0.02)

    def test_a_single_point_is_a_dot(self):
        (dot,) = shapes(line_chart([Series("a", 1, [(3, 0.5)])], "step"), "circle")
        assert float(dot.attrib["cx"]) == pytest.approx((48 + 508) / 2)

    def test_points_that_are_not_finite_are_left_out(self):
        points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
        (line,) = shapes(line_chart([Series("a", 0, points)], "step"), "polyline")
        assert len(coordinates(line)) == 2

    @pytest.mark.parametrize("series", [[], [Series("a", 0, [])], [Series("a", 0, [(1, math.nan)])]])
    def test_nothing_to_draw(self, series: list[Series]):
        assert line_chart(series, "step") == ""

    def test_texts_are_escaped(self):
        svg = line_chart([Series("<&\"'>", 0, [(0, 0.0), (1, 1.0)])], '<&"step')
        assert [title.text for title in shapes(svg, "title")] == ["<&\"'>"]
        assert ElementTree.fromstring(svg).attrib["aria-label"] == '<&"\'> by <&"step'

    @given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e9, 1e9)), max_size=20))
    def test_every_line_stays_in_the_frame(self, points: list[tuple[int, float]]):
        svg = line_chart([Series("a", 0, points)], "step")
        for line in shapes(svg, "polyline") if svg else []:
            assert all(47.9 <= x <= 508.1 and 9.9 <= y <= 192.1 for x, y in coordinates(line))


class TestThin:
    def test_few_points_are_kept(self):
        points = [(i, float(i)) for i in range(10)]
        assert thin(points, buckets=5) == points

    def test_no_peak_is_lost_and_order_is_kept(self):
        points = [(i, 0.0) for i in range(1000)]
        points[137], points[842] = (137, 5.0), (842, -5.0)
        kept = thin(points, buckets=10)
        assert {(137, 5.0), (842, -5.0)} <= set(kept)
        assert len(kept) <= 20
        assert kept == sorted(kept)


class TestBars:
    def test_layers_are_stacked(self):
        layers = [Series("owned", 2, [(0, 30), (1, 60)]), Series("halo", 3, [(0, 10), (1, 20)])]
        bars = shapes(bar_chart(["0", "1"], layers, "part"), "rect")
        assert [bar[0].text for bar in bars] == [
            "part 0: 30 owned",
            "part 1: 60 owned",
            "part 0: 10 halo",
            "part 1: 20 halo",
        ]
        top, height = ([float(bar.attrib[name]) for bar in bars] for name in ("y", "height"))
        assert height == pytest.approx([height[2] * 3, height[2] * 6, height[2], height[2] * 2], abs=0.2)
        assert top[2] + height[2] == pytest.approx(top[0], abs=0.11)  # halo stands on owned
        assert top[0] + height[0] == pytest.approx(192)  # which stands on the axis

    def test_names_thin_out_when_there_is_no_room(self):
        names = [f"{index:04d}" for index in range(64)]
        svg = bar_chart(names, [Series("n", 0, [(i, 1) for i in range(64)])], "part")
        labels = [text for text in shapes(svg, "text") if text.text in names]
        xs = [float(text.attrib["x"]) for text in labels]
        assert 5 <= len(labels) <= 16
        assert min(b - a for a, b in itertools.pairwise(xs)) > 4 * 6.5

    @pytest.mark.parametrize(("names", "points"), [([], []), (["0"], [(0, 0)])])
    def test_nothing_to_draw(self, names: list[str], points: list[tuple[float, float]]):
        assert bar_chart(names, [Series("n", 0, points)], "part") == ""
