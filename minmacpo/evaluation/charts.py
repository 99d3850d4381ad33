"""Line charts and forest plots as SVG, without scripts.

They are legible in light and dark and to the colour-blind.
A chart's lines are {name: points}; a point is a `Point`, with an interval or without one.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minmacpo.evaluation.finished_run import NUMBERED_AGENT, agent_label
from minmacpo.evaluation.html import Html, tag

# Markers as SVG paths around the origin
DOT = "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0"
SQUARE = "M-4,-4h8v8h-8z"
TRIANGLE = "M0,-5L5,4H-5z"
DIAMOND = "M0,-5.5L5.5,0L0,5.5L-5.5,0z"
MARKERS = (DOT, SQUARE, TRIANGLE, DIAMOND)

ON_STRONG_BASE = ("student", "strong", "ceiling", "continued")

# Classes of page.css, in the order in which lines that are no agents get them
COLOURS = ("student", "teacher1", "teacher2", "teacher0", "ceiling", "continued")

MANY_POINTS = 15  # a line of so many points has no markers
TOP = 10  # of the plot, in pixels of the drawing
BESIDE_PLOT = 20  # between the axis and the first and the last point


class Point(NamedTuple):
    """A point of a line."""

    x: float
    y: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class ChartSize:
    """How large a chart is drawn."""

    width: int
    height: int
    label_width: int  # for the names at the right
    kind: str | None = None  # "wide" or "narrow": for which windows; None for all


WIDE = ChartSize(width=1070, height=440, label_width=150, kind="wide")
NARROW = ChartSize(width=400, height=350, label_width=122, kind="narrow")
SMALL = ChartSize(width=400, height=250, label_width=92)


@dataclass(frozen=True, slots=True)
class Plot:
    """The part of a chart between its axes, and where numbers lie in it."""

    left: float
    right: float
    bottom: float
    end: float  # the largest x
    low: float  # the smallest y on the axis
    high: float

    def x(self, value: float) -> float:
        """Pixels from the left."""
        first = self.left + BESIDE_PLOT
        return first + value / self.end * (self.right - self.left - 2 * BESIDE_PLOT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        fraction = (value - self.low) / (self.high - self.low)
        return self.bottom - fraction * (self.bottom - TOP)


@dataclass(frozen=True, slots=True)
class Look:
    """How a line is told from the others: by colour and by marker, never by colour alone."""

    colour: str  # a class of page.css
    marker: str  # an SVG path


def look(name: str, number: int) -> Look:
    """The look of a line.

    An agent has its own (teachers share three). The lines of anything else, such as runs side by
    side, get theirs in turn: colour and marker together differ for 24 lines.

    Args:
        number: how many lines come before it in the chart.
    """
    teacher = NUMBERED_AGENT.fullmatch(name)
    if teacher:
        turn = int(teacher[2]) % 3
        return Look(f"teacher{turn}", MARKERS[turn] if turn else DIAMOND)
    if name in ON_STRONG_BASE:
        return Look(name.replace("strong", "student"), DOT)
    marker = (number + number // len(COLOURS)) % len(MARKERS)
    return Look(COLOURS[number % len(COLOURS)], MARKERS[marker])


def ticks(low: float, high: float, most: int) -> dict[float, str]:
    """Round numbers from below `low` to above `high`, about `most` of them, and their texts."""
    span = high - low or abs(low) or 1
    power = 10.0 ** math.floor(math.log10(span / most))
    step = 10 * power
    for factor in (1, 2, 5):
        if span / (power * factor) <= most:
            step = power * factor
            break
    # 1e-9: a bound that is a round number stays one, whatever floats make of it
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return {step * i: f"{step * i:,.{decimals}f}" for i in range(first, last + 1)}


def spread(heights: dict[str, float], low: float, high: float, gap: float = 15) -> dict[str, float]:
    """Heights near the given ones, in their order, `gap` from each other if there is room."""
    names = sorted(heights, key=heights.get)
    placed = {}

    # From the top downwards each one keeps its distance ...
    last = low - gap
    for name in names:
        last = max(heights[name], last + gap)
        placed[name] = last

    # ... and from the bottom upwards all are moved back into the room there is
    last = high + gap
    for name in reversed(names):
        last = min(placed[name], last - gap)
        placed[name] = last
    return placed


def polyline(points: Sequence[tuple[float, float]], kind: str) -> Html:
    """The line through points in pixels."""
    return tag("path", d=path_data(points), class_=kind)


def path_data(points: Sequence[tuple[float, float]]) -> str:
    """The line through points in SVG's words."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def curve(points: Sequence[tuple[float, float]]) -> Html:
    """The line through points that follow each other from left to right.

    It is broken where the next point does not lie further right: there a new round begins, with
    another loss at the same epoch, and a vertical line would say that something happened.
    """
    segments = [[points[0]]]
    for previous, point in itertools.pairwise(points):
        if point[0] > previous[0]:
            segments[-1].append(point)
        else:
            segments.append([point])
    return tag("path", d="".join(path_data(segment) for segment in segments), class_="curve")


def chart(lines: dict[str, Sequence[Point]], unit: str, size: ChartSize) -> Html:
    """Lines over a common axis with their names at the right end.

    Args:
        unit: what the x axis counts.
    """
    # The range of both axes
    values = []
    end = 1.0
    for points in lines.values():
        for point in points:
            values += [point.y, *(point.interval or ())]
            end = max(end, point.x)
    x_ticks = ticks(0, end, min(math.floor(end), size.label_width // 16))
    y_ticks = ticks(min(values), max(values), 5)
    plot = Plot(
        left=14 + 7 * max(len(text) for text in y_ticks.values()),
        right=size.width - size.label_width,
        bottom=size.height - 40,
        end=end,
        low=min(y_ticks),
        high=max(y_ticks),
    )

    parts = axes(plot, size, unit, x_ticks, y_ticks)
    last_heights = {name: plot.y(points[-1].y) for name, points in lines.items()}
    name_heights = spread(last_heights, 12, plot.bottom)
    numbers = {name: number for number, name in enumerate(lines)}
    for name in sorted(lines, key=lambda name: name == "student"):  # the student is on top
        label = clip_name(agent_label(name), size)
        if size.kind:  # the main chart has room for the last number
            label += f" {lines[name][-1].y:.3f}"
        parts.append(
            draw_line(
                name=name,
                points=lines[name],
                plot=plot,
                label=label,
                label_height=name_heights[name],
                look=look(name, numbers[name]),
            )
        )
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {size.width} {size.height}",
        role="img",
        aria_label=spoken(lines),
        class_=size.kind,
    )


def clip_name(name: str, size: ChartSize) -> str:
    """A name that fits beside the plot, with the number that the main chart puts behind it."""
    most = (size.label_width - 8) // 7  # characters are about 7 pixels wide
    if size.kind:
        most -= len(" 0.000")
    return name if len(name) <= most else name[: most - 1] + "…"


def axes(
    plot: Plot,
    size: ChartSize,
    unit: str,
    x_ticks: dict[float, str],
    y_ticks: dict[float, str],
) -> list[Html]:
    """The grid's lines, the numbers at both axes, and the unit."""
    middle = (plot.left + plot.right) / 2
    parts = [tag("text", unit, x=middle, y=size.height - 6, text_anchor="middle")]
    for value, text in y_ticks.items():
        y = plot.y(value)
        parts.append(polyline([(plot.left, y), (plot.right, y)], "axis"))
        parts.append(tag("text", text, x=plot.left - 8, y=y + 4, text_anchor="end"))
    for value, text in x_ticks.items():
        if value <= plot.end:
            x = plot.x(value)
            parts.append(tag("text", text, x=x, y=plot.bottom + 19, text_anchor="middle"))
    return parts


def spoken(lines: dict[str, Sequence[Point]]) -> str:
    """A chart in words, for those who do not see it."""
    sentences = []
    for name, points in lines.items():
        sentences.append(f"{agent_label(name)} {points[0].y:.4g} to {points[-1].y:.4g}")
    return "; ".join(sentences)


def draw_line(
    name: str, points: Sequence[Point], plot: Plot, label: str, label_height: float, look: Look
) -> Html:
    """One line with its band, markers and name; hovering over a marker tells its number."""
    is_level = name in ("continued", "ceiling")  # measured once, drawn from side to side
    spots = [(plot.x(point.x), plot.y(point.y)) for point in points]
    parts = []

    # The band of the intervals
    if not is_level and all(point.interval for point in points):
        upper = [(plot.x(point.x), plot.y(point.interval[1])) for point in points]
        lower = [(plot.x(point.x), plot.y(point.interval[0])) for point in points]
        parts.append(polyline([*upper, *reversed(lower)], "band"))

    # The line, and a thread from its end to its name, level within the plot
    parts.append(curve(spots))
    name_x = plot.right + 8
    last_height = spots[-1][1]
    parts.append(
        polyline([spots[-1], (name_x - 28, last_height), (name_x - 3, label_height)], "thread")
    )

    if len(points) == 1 or (len(points) < MANY_POINTS and not is_level):
        for point, (x, y) in zip(points, spots, strict=True):
            title = tag("title", f"{agent_label(name)}: {point.y:.4g}{interval_note(point)}")
            position = f"translate({x:.1f},{y:.1f})"
            parts.append(tag("path", title, d=look.marker, transform=position, class_="dot"))
    parts.append(tag("text", label, x=name_x, y=label_height + 4, class_="name"))
    return tag("g", *parts, class_=look.colour)


def interval_note(point: Point) -> str:
    """The interval of a point in words, or nothing."""
    if point.interval is None:
        return ""
    low, high = point.interval
    return f" (95%: {low:.3f} to {high:.3f})"


def figure(
    title: str,
    note: str,
    lines: dict[str, Sequence[Point]],
    unit: str = "round",
    is_main: bool = False,
) -> Html:
    """A chart under its title; nothing if it has no points.

    Args:
        is_main: draw it twice, for wide and for narrow windows, of which one is shown.
    """
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return Html()
    sizes = [SMALL]
    if is_main:
        longest = max(len(agent_label(name)) for name in lines) + len(" 0.000")
        label_width = min(400, max(WIDE.label_width, 24 + 7 * longest))
        sizes = [ChartSize(WIDE.width, WIDE.height, label_width, WIDE.kind), NARROW]
    caption = tag("figcaption", tag("b", title), " ", note)
    return tag("figure", caption, *(chart(lines, unit, size) for size in sizes))


def forest(title: str, rows: dict[str, Sequence[float]]) -> Html:
    """Means with their intervals, one under the other on one scale, with a line at zero.

    Args:
        rows: (mean, low, high) by name.
    """
    width = 1070
    row_height = 26
    left = 14 + 8 * max(len(name) for name in rows)
    bottom = row_height * len(rows) + 10
    lowest = min(0.0, *(low for _, low, _ in rows.values()))
    highest = max(0.0, *(high for _, _, high in rows.values()))
    x_ticks = ticks(lowest, highest, 8)
    span = max(x_ticks) - min(x_ticks)

    def to_pixels(value: float) -> float:
        return left + (value - min(x_ticks)) / span * (width - left - 70)

    parts = []
    for value, text in x_ticks.items():
        x = to_pixels(value)
        kind = "axis" if abs(value) > 1e-9 else "thread"
        parts.append(polyline([(x, 4), (x, bottom)], kind))
        parts.append(tag("text", text, x=x, y=bottom + 19, text_anchor="middle"))
    for number, (name, (mean, low, high)) in enumerate(rows.items()):
        y = row_height * number + 18
        title_text = f"{name}: {mean:+.3f} (95%: {low:+.3f} to {high:+.3f})"
        position = f"translate({to_pixels(mean):.1f},{y})"
        dot = tag("path", tag("title", title_text), d=DOT, transform=position, class_="dot")
        bar = polyline([(to_pixels(low), y), (to_pixels(high), y)], "curve")
        number_text = tag("text", f"{mean:+.3f}", x=to_pixels(high) + 8, y=y + 4, class_="name")
        parts.append(tag("g", bar, dot, number_text, class_="student"))
        parts.append(tag("text", name, x=left - 14, y=y + 4, text_anchor="end"))
    words = "; ".join(f"{name} {mean:+.3f}" for name, (mean, _, _) in rows.items())
    view = f"0 0 {width} {bottom + 26}"
    drawing = tag("svg", *parts, viewBox=view, role="img", aria_label=words)
    return tag("figure", tag("figcaption", tag("b", title)), drawing)
