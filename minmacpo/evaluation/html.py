"""How a report looks: elements, tables and line charts as text; page.html is its frame, page.css its style.

Whatever is put into an element is escaped there (`tag`). The charts are SVG without scripts, legible in light
and dark and to the colour-blind. A chart's lines are {agent: [(x, y) or (x, y, low, high)]}.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from string import Template

from minmacpo.runtime.progress import escape_control_chars

DOT = "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0"


SHAPES = (DOT, "M-4,-4h8v8h-8z", "M0,-5L5,4H-5z", "M0,-5.5L5.5,0L0,5.5L-5.5,0z")


NUMBERED = re.compile(r"(teacher|weak)(\d+)")  # agents and bases of which there are several


STRONG = ("student", "strong", "ceiling", "continued")


COLOURS = (
    "student",
    "teacher1",
    "teacher2",
    "teacher0",
    "ceiling",
    "continued",
)  # classes of page.css


class Html(str):
    """Text that is HTML already."""


def escape(value: object) -> str:
    """Anything as HTML; what no page may hold, or would turn the text around it, stands there as its escape."""
    return value if isinstance(value, Html) else html.escape(escape_control_chars(str(value)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; children that are not Html are escaped. `class_` is class, None leaves an attribute out."""
    given = {
        key: f"{v:.1f}" if isinstance(v, float) else v
        for key, v in attributes.items()
        if v is not None
    }
    words = (
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in given.items()
    )
    return Html(f"<{name}{''.join(words)}>{''.join(map(escape, children))}</{name}>")


def grid(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "figures") -> Html:
    """A table in a container that scrolls by itself; nothing if it has no rows."""
    body = [tag("tr", *(tag("td", value) for value in row)) for row in rows]
    top = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head)))
    table = tag("table", top, tag("tbody", *body), class_=kind)
    return tag("div", table, class_="scroll", tabindex=0) if body else Html()


def document(template: str, **parts: Iterable[object]) -> str:
    """The whole page as a file, its parts put where the template (page.html, experiment.html, comparison.html) names them."""
    frame, style = (
        Path(__file__).with_name(name).read_text("utf-8") for name in (template, "page.css")
    )
    filled = {name: "".join(map(escape, children)) for name, children in parts.items()}
    return Template(frame).substitute(filled, style=style)


def clip(text: str, most: int = 700) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text):,} characters)"


def words(agent: str) -> str:
    """ "teacher 1" for "teacher1"; any other name as it is."""
    return " ".join(found.groups()) if (found := NUMBERED.fullmatch(agent)) else agent


def look(name: str, number: int) -> tuple[str, str]:
    """(class, marker) of a chart's line: an agent has its own (teachers share three), the line of that number of anything
    else (runs side by side) the colour of its turn; colour and marker together differ for 24."""
    if teacher := NUMBERED.fullmatch(name):
        turn = int(teacher[2]) % 3
        return f"teacher{turn}", SHAPES[turn or 3]
    if name in STRONG:
        return name.replace("strong", "student"), DOT
    return COLOURS[number % len(COLOURS)], SHAPES[(number + number // len(COLOURS)) % len(SHAPES)]


def ticks(low: float, high: float, most: int) -> dict[float, str]:
    """Round numbers from below `low` to above `high`, about `most` of them, and how they are written."""
    span = high - low or abs(low) or 1
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return {step * i: f"{step * i:,.{decimals}f}" for i in range(first, max(last, first + 1) + 1)}


def apart(wanted: dict[str, float], low: float, high: float, gap: float = 15) -> dict[str, float]:
    """Places near the wanted ones, in order, that are `gap` from each other as far as the room allows."""
    names = sorted(wanted, key=wanted.get)
    down = accumulate(
        (wanted[name] for name in names), lambda last, y: max(y, last + gap), initial=low - gap
    )
    up = accumulate([*down][:0:-1], lambda last, y: min(y, last - gap), initial=high + gap)
    return dict(zip(reversed(names), [*up][1:], strict=True))


def path(points: Iterable[Sequence[float]], kind: str) -> Html:
    """The line through points."""
    return tag("path", d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y, *_ in points), class_=kind)


def chart(
    lines: dict[str, list], unit: str, size: tuple[int, int, int], kind: str | None = None
) -> Html:
    """An SVG of width, height, and room for names; the names of a `kind` tell the last number too."""
    width, height, room = size
    values = [y for points in lines.values() for point in points for y in point[1:]]
    end = max(1.0, *(point[0] for points in lines.values() for point in points))
    xs, ys = ticks(0, end, min(math.floor(end), room // 16)), ticks(min(values), max(values), 5)
    left, right, bottom = 14 + 7 * max(map(len, ys.values())), width - room, height - 40

    def place(x: float, *heights: float) -> list[float]:
        up = (bottom - (y - min(ys)) / (max(ys) - min(ys)) * (bottom - 10) for y in heights)
        return [left + 20 + x / end * (right - left - 40), *up]

    parts = [tag("text", unit, x=(left + right) / 2, y=height - 6, text_anchor="middle")]
    for value, name in ys.items():
        y = place(0, value)[1]
        parts.append(path([(left, y), (right, y)], "axis"))
        parts.append(tag("text", name, x=left - 8, y=y + 4, text_anchor="end"))
    shown = [(place(value)[0], name) for value, name in xs.items() if value <= end]
    parts += [tag("text", name, x=x, y=bottom + 19, text_anchor="middle") for x, name in shown]
    heights = apart({agent: place(*points[-1])[1] for agent, points in lines.items()}, 12, bottom)
    for agent in sorted(lines, key="student".__eq__):  # the student on top
        name = words(agent) + (f" {lines[agent][-1][1]:.3f}" if kind else "")
        spots = [place(*point) for point in lines[agent]]
        parts.append(
            draw(
                agent,
                lines[agent],
                spots,
                name,
                (right + 8, heights[agent]),
                look(agent, [*lines].index(agent)),
            )
        )
    said = "; ".join(
        f"{words(agent)} {p[0][1]:.4g} to {p[-1][1]:.4g}" for agent, p in lines.items()
    )
    return tag(
        "svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=said, class_=kind
    )


def draw(
    agent: str,
    points: list,
    spots: list,
    name: str,
    name_at: tuple[float, float],
    how: tuple[str, str],
) -> Html:
    """One line through `spots` with its band, markers (so that colour is never alone) and name; hovering tells the numbers
    of `points`. `how`: see `look`."""
    (kind, mark), level, parts = how, agent in ("continued", "ceiling"), []
    if len(spots[0]) > 2 and not level:
        high = [(x, top) for x, _, _, top in spots]
        parts.append(path(high + [(x, low) for x, _, low, _ in reversed(spots)], "band"))
    parts += [
        path(spots, "curve"),
        path([spots[-1], (name_at[0] - 28, spots[-1][1]), (name_at[0] - 3, name_at[1])], "thread"),
    ]  # level within the plot
    for (x, y, *_), (_, value, *bar) in zip(spots, points, strict=True):
        if len(points) == 1 or (len(points) < 15 and not level):
            told = f"{words(agent)}: {value:.4g}" + (
                " (95%: {:.3f} to {:.3f})".format(*bar) if bar else ""
            )
            parts.append(
                tag(
                    "path",
                    tag("title", told),
                    d=mark,
                    transform=f"translate({x:.1f},{y:.1f})",
                    class_="dot",
                )
            )
    parts.append(tag("text", name, x=name_at[0], y=name_at[1] + 4, class_="name"))
    return tag("g", *parts, class_=kind)


def figure(
    title: str, note: str, lines: dict[str, list], unit: str = "round", main: bool = False
) -> Html:
    """A chart under its title, the main one for wide and for narrow windows; nothing if it has no lines."""
    lines = {agent: points for agent, points in lines.items() if points}
    names = min(400, 24 + 7 * max((len(words(agent)) + 6 for agent in lines), default=0))
    sizes = (
        {"wide": (1070, 440, max(150, names)), "narrow": (400, 350, 122)}
        if main
        else {None: (400, 250, 92)}
    )
    charts = (chart(lines, unit, size, kind) for kind, size in sizes.items() if lines)
    return (
        tag("figure", tag("figcaption", tag("b", title), " ", note), *charts) if lines else Html()
    )


def forest(title: str, rows: dict[str, Sequence[float]]) -> Html:
    """[mean, low, high] by name, one under the other on one scale with a line at zero."""
    width, step, left = 1070, 26, 14 + 8 * max(map(len, rows))
    marks = ticks(
        min(0.0, *(low for _, low, _ in rows.values())), max(0.0, *(r[2] for r in rows.values())), 8
    )
    bottom = step * len(rows) + 10

    def place(value: float) -> float:
        return left + (value - min(marks)) / (max(marks) - min(marks)) * (width - left - 70)

    parts = []
    for value, name in marks.items():
        parts.append(
            path(
                [(place(value), 4), (place(value), bottom)],
                "axis" if abs(value) > 1e-9 else "thread",
            )
        )
        parts.append(tag("text", name, x=place(value), y=bottom + 19, text_anchor="middle"))
    for number, (name, (mean, low, high)) in enumerate(rows.items()):
        y = step * number + 18
        told = tag("title", f"{name}: {mean:+.3f} (95%: {low:+.3f} to {high:+.3f})")
        spot = tag("path", told, d=DOT, transform=f"translate({place(mean):.1f},{y})", class_="dot")
        parts.append(
            tag(
                "g",
                path([(place(low), y), (place(high), y)], "curve"),
                spot,
                tag("text", f"{mean:+.3f}", x=place(high) + 8, y=y + 4, class_="name"),
                class_="student",
            )
        )
        parts.append(tag("text", name, x=left - 14, y=y + 4, text_anchor="end"))
    said = "; ".join(f"{name} {mean:+.3f}" for name, (mean, *_) in rows.items())
    drawn = tag("svg", *parts, viewBox=f"0 0 {width} {bottom + 26}", role="img", aria_label=said)
    return tag("figure", tag("figcaption", tag("b", title)), drawn)
