"""Line and bar charts as SVG text, without a plotting library.

Colours and fonts come from the style sheet of the page: a chart only names the classes ``s0`` to
``s5``. All texts are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 38
_MAX_BUCKETS = 200  # a line has at most two points in each


@dataclass(frozen=True)
class Series:
    """One line, or one layer of stacked bars; ``style`` is the number of its colour."""

    label: str
    style: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` to ``high`` onto positions from ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """Position of ``value``."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values on the axis."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.75)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], at most seven; with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [power for power in powers if low <= 10.0**power <= high]
    factors = (1, 2, 5) if len(inside) <= 2 else (1,)
    every = math.ceil(len(inside) / 7) or 1
    values = [factor * 10.0**power for power in (powers if every == 1 else inside[::every]) for factor in factors]
    return [value for value in values if low <= value <= high]


def short(value: float) -> str:
    """Number of an axis: ``1.5k``, ``20M``, ``0.05``, ``1e-5``."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{suffix}"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def thin(points: Sequence[Point], buckets: int = _MAX_BUCKETS) -> list[Point]:
    """At most two points per bucket of neighbouring points, the lowest and the highest, so that no peak is lost."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[Point] = []
    for bucket in range(buckets):
        some = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        extremes = {min(some, key=lambda point: point[1]), max(some, key=lambda point: point[1])}
        kept.extend(sorted(extremes))
    return kept


def line_chart(series: Sequence[Series], x_label: str, log: bool | None = None) -> str:
    """Lines over a common pair of axes; points that are not finite are left out.

    ``log`` is whether the vertical axis is logarithmic; None: where values are positive and span
    more than a factor of 50. Without a point the result is "".
    """
    lines = [(one, [(float(x), float(y)) for x, y in one.points if math.isfinite(y)]) for one in series]
    lines = [(one, points) for one, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    if log is None:
        log = min(ys) > 0 and max(ys) / min(ys) > 50
    x_axis = Axis(*_room(min(xs), max(xs), 0.0), _LEFT, WIDTH - _RIGHT)
    y_axis = Axis(*_log_room(min(ys), max(ys)) if log else _room(min(ys), max(ys), 0.05), HEIGHT - _BOTTOM, _TOP, log)
    body = [_grid(y_axis), _x_ticks(x_axis, x_label)]
    for one, points in lines:
        body.append(_line(one, [(x_axis.at(x), y_axis.at(y)) for x, y in thin(points)]))
    description = f"{', '.join(one.label for one, _ in lines)} by {x_label}"
    return _svg(body, description)


def bar_chart(names: Sequence[str], layers: Sequence[Series], x_label: str) -> str:
    """Bars, one per name, each a stack of ``layers``, whose points are (index of the name, height)."""
    totals = [0.0] * len(names)
    for layer in layers:
        for index, height in layer.points:
            totals[int(index)] += height
    if not names or max(totals) <= 0:
        return ""
    y_axis = Axis(0.0, max(totals) * 1.05, HEIGHT - _BOTTOM, _TOP)
    slot = (WIDTH - _LEFT - _RIGHT) / len(names)
    width = min(slot * 0.78, 44)
    body, floors = [_grid(y_axis)], [0.0] * len(names)
    for layer in layers:
        for position, height in layer.points:
            index = int(position)
            top, bottom = y_axis.at(floors[index] + height), y_axis.at(floors[index])
            floors[index] += height
            x = _LEFT + slot * (index + 0.5) - width / 2
            hint = f"{x_label} {names[index]}: {height:,.6g} {layer.label}".strip()
            body.append(
                f'<rect class="b s{layer.style}" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{max(0.0, bottom - top):.1f}"><title>{escape(hint)}</title></rect>'
            )
    every = math.ceil((max(map(len, names)) * 6.5 + 8) / slot)
    for index in range(0, len(names), every):
        body.append(_text(_LEFT + slot * (index + 0.5), HEIGHT - _BOTTOM + 15, names[index], "middle"))
    body.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 5, x_label, "middle"))
    return _svg(body, f"{', '.join(layer.label for layer in layers)} by {x_label}")


# --- pieces ----------------------------------------------------------------------------------


def _room(low: float, high: float, share: float) -> tuple[float, float]:
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low - (high - low) * share, high + (high - low) * share


def _log_room(low: float, high: float) -> tuple[float, float]:
    return (low / 1.15, high * 1.15) if low < high else (low / 2, high * 2)


def _grid(axis: Axis) -> str:
    parts = []
    for value in axis.ticks():
        y = axis.at(value)
        parts.append(f'<line class="grid-line" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 7, y + 4, short(value), "end"))
    base = HEIGHT - _BOTTOM
    return "".join([*parts, f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'])


def _x_ticks(axis: Axis, label: str) -> str:
    y = HEIGHT - _BOTTOM + 15
    parts = [_text(axis.at(value), y, short(value), "middle") for value in axis.ticks() if value == int(value)]
    return "".join([*parts, _text((axis.start + axis.stop) / 2, HEIGHT - 5, label, "middle")])


def _line(series: Series, points: Sequence[Point]) -> str:
    title = f"<title>{escape(series.label)}</title>"
    if len(points) == 1:
        ((x, y),) = points
        return f'<circle class="p s{series.style}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="l s{series.style}" points="{path}">{title}</polyline>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(body: Sequence[str], description: str) -> str:
    label = escape(description, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'
