"""Log-log charts as SVG text, with nothing but the standard library: lines or labelled points, decades as ticks, a legend."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

# Told apart without colour vision (Okabe and Ito); black is for what is to be looked at first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
FIRST = "#000000"
SHAPES = ("circle", "square", "diamond", "triangle")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 860, 460, 74, 40, 56, 270


@dataclass
class Series:
    """Points of one name, joined by a line unless `joined` is off."""

    name: str
    points: list[tuple[float, float]]
    first: bool = False


@dataclass
class Chart:
    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    joined: bool = True
    # Ticks of the x axis, among its points; by the range if none are given.
    x_ticks: list[float] = field(default_factory=list)


def number(value: float) -> str:
    """Short text of a positive number: 8192, 0.01, 1e-5."""
    if value >= 1:
        return f"{value:g}" if value < 1e6 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def decades(low: float, high: float) -> list[float]:
    """Powers of ten within the range and one beyond either end."""
    return [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


class Axis:
    """Maps positive numbers to pixels by their logarithm, with some room at either end."""

    def __init__(self, values: Iterable[float], start: float, end: float) -> None:
        values = list(values)
        self.low, self.high = math.log10(min(values) / 1.3), math.log10(max(values) * 1.3)
        self.start, self.end = start, end

    def ticks(self) -> list[float]:
        """Powers of ten within the range; with 2 and 5 times them if they are few."""
        low, high = 10**self.low, 10**self.high
        tens = decades(low, high)
        inside = [tick for tick in tens if low <= tick <= high]
        if len(inside) < 3:
            inside = [step * ten for ten in tens for step in (1, 2, 5) if low <= step * ten <= high]
        return inside

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def marker(shape: str, x: float, y: float, colour: str) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'


def text(x: float, y: float, content: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(content)}</text>'


def draw(chart: Chart) -> str:
    """The chart as a document; ValueError if there is nothing to draw or a number that has no logarithm."""
    points = [point for series in chart.series for point in series.points]
    if not points:
        raise ValueError(f"chart {chart.title!r} has no points")
    for point in points:
        if not all(math.isfinite(value) and value > 0 for value in point):
            raise ValueError(f"chart {chart.title!r}: {point} is not a pair of positive numbers")
    right, bottom = WIDTH - LEGEND, HEIGHT - BOTTOM
    x_axis = Axis([x for x, _ in points], LEFT, right)
    y_axis = Axis([y for _, y in points], bottom, TOP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text((LEFT + right) / 2, 22, chart.title, extra=' font-size="15"'),
    ]
    grid = 'stroke="#dddddd" stroke-width="1"'
    for tick in y_axis.ticks():
        y = y_axis(tick)
        out.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" {grid}/>')
        out.append(text(LEFT - 8, y + 4, number(tick), "end"))
    for tick in chart.x_ticks or x_axis.ticks():
        x = x_axis(tick)
        out.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" {grid}/>')
        out.append(text(x, bottom + 18, number(tick)))
    out.append(f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}" fill="none" stroke="#888888"/>')
    out.append(text((LEFT + right) / 2, HEIGHT - 14, chart.x_label))
    middle = (TOP + bottom) / 2
    out.append(text(18, middle, chart.y_label, extra=f' transform="rotate(-90 18 {middle:.1f})"'))
    other = 0
    for k, series in enumerate(chart.series):
        colour = FIRST if series.first else COLOURS[other % len(COLOURS)]
        shape = SHAPES[(other // len(COLOURS)) % len(SHAPES)]
        other += not series.first
        places = [(x_axis(x), y_axis(y)) for x, y in sorted(series.points)]
        if chart.joined and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            width = 3 if series.first else 1.5
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        out += [marker(shape, x, y, colour) for x, y in places]
        y = TOP + 8 + 17 * k
        out.append(marker(shape, right + 18, y, colour))
        out.append(text(right + 30, y + 4, series.name, "start", ' font-weight="bold"' if series.first else ""))
    return "\n".join([*out, "</svg>", ""])
