"""Line charts and forest plots as SVG, without scripts.

They are legible in light and dark and to the colour-blind.
A chart's lines are {name: points}; a point is a `Point`, with an interval or without one.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from minmacpo.evaluation.finished_run import NUMBERED_AGENT, agent_label
from minmacpo.evaluation.html import Html, tag

# Markers as SVG paths around the origin
DOT = "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0"
SQUARE = "M-4,-4h8v8h-8z"
TRIANGLE = "M0,-5L5,4H-5z"
DIAMOND = "M0,-5.5L5.5,0L0,5.5L-5.5,0z"
MARKERS = (DOT, SQUARE, TRIANGLE, DIAMOND)
TEACHER_MARKERS = (DIAMOND, SQUARE, TRIANGLE)  # the dot is the student's

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
        turn = int(teacher[2]) % len(TEACHER_MARKERS)
        return Look(f"teacher{turn}", TEACHER_MARKERS[turn])
    if name in ON_STRONG_BASE:
        colour = name.replace("strong", "student")
        return Look(colour, DOT)

    # When all colours are used up, they begin again with the markers moved on by one
    times_through, colour_index = divmod(number, len(COLOURS))
    marker_index = (number + times_through) % len(MARKERS)
    return Look(COLOURS[colour_index], MARKERS[marker_index])


def ticks(low: float, high: float, most: int) -> dict[float, str]:
    """Round numbers from below `low` to above `high`, about `most` of them, and their texts."""
    # The smallest step of 1, 2, 5 or 10 times a power of ten that needs no more than `most`
    span = high - low or abs(low) or 1  # equal bounds span as much as they are high
    power = 10.0 ** math.floor(math.log10(span / most))
    step = 10 * power
    for factor in (1, 2, 5):
        if span / (power * factor) <= most:
            step = power * factor
            break

    # 1e-9: a bound that is a round number stays one, whatever floats make of it
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))

    texts = {}
    for i in range(first, last + 1):
        value = step * i
        texts[value] = f"{value:,.{decimals}f}"
    return texts


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
    """The line through points in SVG's words: move to the first one, draw to each of the others."""
    corners = [f"{x:.1f},{y:.1f}" for x, y in points]
    return "M" + "L".join(corners)


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
    data = "".join(path_data(segment) for segment in segments)
    return tag("path", d=data, class_="curve")


def drawing(
    parts: Sequence[Html], width: float, height: float, words: str, kind: str | None = None
) -> Html:
    """An SVG of these parts.

    Args:
        words: what it shows, for those who do not see it.
        kind: its class in page.css.
    """
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=words,
        class_=kind,
    )


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
            end = max(end, point.x)
            values.append(point.y)
            if point.interval is not None:
                values += point.interval
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

    # Where each line ends and how it looks, by its place among all of them
    last_heights = {}
    looks = {}
    for number, (name, points) in enumerate(lines.items()):
        last_heights[name] = plot.y(points[-1].y)
        looks[name] = look(name, number)
    name_heights = spread(last_heights, 12, plot.bottom)

    # What is drawn last lies on top: that is the student
    parts = axes(plot, size, unit, x_ticks, y_ticks)
    for name in sorted(lines, key=lambda name: name == "student"):
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
                look=looks[name],
            )
        )
    return drawing(parts, size.width, size.height, words=spoken(lines), kind=size.kind)


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
    end = spots[-1]
    level_end = (name_x - 28, end[1])
    name_start = (name_x - 3, label_height)
    parts.append(polyline([end, level_end, name_start], "thread"))

    # Markers, where they would not run into each other
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
        # A window that is wide has room for long names, up to a point
        longest = max(len(agent_label(name)) for name in lines) + len(" 0.000")
        label_width = min(400, max(WIDE.label_width, 24 + 7 * longest))
        sizes = [replace(WIDE, label_width=label_width), NARROW]
    caption = tag("figcaption", tag("b", title), " ", note)
    charts = [chart(lines, unit, size) for size in sizes]
    return tag("figure", caption, *charts)


# ---- forest plots -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ForestScale:
    """Where numbers lie in a forest plot, from left to right."""

    left: float
    right: float
    low: float  # the number at the left
    high: float

    def x(self, value: float) -> float:
        """Pixels from the left."""
        fraction = (value - self.low) / (self.high - self.low)
        return self.left + fraction * (self.right - self.left)


def forest(title: str, rows: dict[str, Sequence[float]]) -> Html:
    """Means with their intervals, one under the other on one scale, with a line at zero.

    Args:
        rows: (mean, low, high) by name.
    """
    # The scale holds every interval, and zero
    lowest = 0.0
    highest = 0.0
    for _, low, high in rows.values():
        lowest = min(lowest, low)
        highest = max(highest, high)
    x_ticks = ticks(lowest, highest, 8)
    width = 1070
    scale = ForestScale(
        left=14 + 8 * max(len(name) for name in rows),
        right=width - 70,  # the last mean is written beyond it
        low=min(x_ticks),
        high=max(x_ticks),
    )

    # Upright lines, the one at zero darker than the others
    row_height = 26
    bottom = row_height * len(rows) + 10
    parts = []
    for value, text in x_ticks.items():
        x = scale.x(value)
        is_zero = abs(value) <= 1e-9
        parts.append(polyline([(x, 4), (x, bottom)], "thread" if is_zero else "axis"))
        parts.append(tag("text", text, x=x, y=bottom + 19, text_anchor="middle"))

    # A bar for every interval, beside its name
    means = []
    for number, (name, row) in enumerate(rows.items()):
        y = row_height * number + 18
        parts.append(forest_bar(name, row, scale, y))
        parts.append(tag("text", name, x=scale.left - 14, y=y + 4, text_anchor="end"))
        means.append(f"{name} {row[0]:+.3f}")
    caption = tag("figcaption", tag("b", title))
    return tag("figure", caption, drawing(parts, width, bottom + 26, words="; ".join(means)))


def forest_bar(name: str, row: Sequence[float], scale: ForestScale, y: float) -> Html:
    """An interval as a bar, with a dot at its mean and the mean in figures behind it.

    Args:
        row: (mean, low, high).
        y: its height in pixels from the top.
    """
    mean, low, high = row
    bar = polyline([(scale.x(low), y), (scale.x(high), y)], "curve")
    title = tag("title", f"{name}: {mean:+.3f} (95%: {low:+.3f} to {high:+.3f})")
    position = f"translate({scale.x(mean):.1f},{y})"
    dot = tag("path", title, d=DOT, transform=position, class_="dot")
    number = tag("text", f"{mean:+.3f}", x=scale.x(high) + 8, y=y + 4, class_="name")
    return tag("g", bar, dot, number, class_="student")
