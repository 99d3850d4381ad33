"""How a report looks: elements, tables and line charts as text with one style sheet.

Whatever is put into an element is escaped there (`tag`). The charts are SVG without scripts, legible
in light and dark and to the colour-blind. Nothing here reads a file or knows what a run is.
"""

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence

LONG = 700  # characters of a text that are shown
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1e22;--soft:#5f666f;--rule:#e3e6ea;--student:#1d5fc9;
--first:#b5470a;--second:#741a5c;--third:#08804d;--warn:#9a3b00}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e9ec;--soft:#9aa3ad;--rule:#2b3137;
--student:#58b1f6;--first:#eb9448;--second:#f263a6;--third:#b4eed8;--warn:#ffb27a}}
*{box-sizing:border-box;margin:0} body{background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:auto;padding:56px 24px 96px} section{margin-top:88px}
h1,h2,h3{font-weight:650} h1{font-size:32px;line-height:1.2} h2{font-size:21px} h3{font-size:15px}
.lead{max-width:41em;margin-top:32px;font-size:19px} .lead p+p{margin-top:10px}
.note,figcaption,small,dd+dd,th,pre,summary{color:var(--soft);font-size:14px}
.note{max-width:48em;margin:6px 0 24px}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:24px 32px;margin-top:44px;
border-top:1px solid var(--rule);padding-top:24px} dt{font-size:14px;font-weight:600}
.numbers dt+dd{font-size:38px;font-weight:600;line-height:1.3;letter-spacing:-.02em}
.warning{border-left:3px solid var(--warn);padding-left:14px;margin-top:24px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:40px 32px}
figure+.grid{margin-top:48px} .grid figure{max-width:500px} figcaption b,pre b{color:var(--ink)}
svg{display:block;width:100%;height:auto;overflow:visible;margin-top:10px} .narrow{display:none}
svg *{fill:none;stroke:currentColor} text{font-size:12.5px}
svg text{fill:var(--soft);stroke:none} svg .name{fill:currentColor;font-weight:600}
.axis{stroke:var(--rule)} .thread{opacity:.45} .curve{stroke-width:1.75;stroke-linejoin:round}
.student .curve{stroke-width:3} .level .curve{stroke-dasharray:6 5}
.band{fill:currentColor;stroke:none;opacity:.14} .dot{fill:currentColor;stroke:var(--paper)}
.student{color:var(--student)} .teacher1{color:var(--first)} .teacher2{color:var(--second)}
.teacher0{color:var(--third)} .ceiling{color:var(--ink)} .continued{color:var(--soft)}
.scroll{overflow-x:auto} .scroll+.scroll{margin-top:40px}
table{border-collapse:collapse;font-size:14px;width:100%}
th,td{padding:6px 16px 6px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
.figures :is(th,td){white-space:nowrap} .figures,.numbers{font-variant-numeric:tabular-nums}
.figures :is(th,td)+:is(th,td){text-align:right;padding:6px 0 6px 14px}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate} article{margin-top:36px}
.samples{min-width:700px;table-layout:fixed;margin-top:12px} .samples th:first-child{width:80px}
.samples small{display:block} article .note{margin:4px 0 0} summary{cursor:pointer;margin:24px 0 12px}
pre{font:13px/1.6 ui-monospace,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:820px){.wide{display:none} .narrow{display:block;max-width:480px}}
@media(max-width:600px){main{padding-top:32px} section{margin-top:64px} .lead{font-size:17px}}
"""


class Html(str):
    """Text that is HTML already."""


def escape(value: object) -> str:
    """Anything as HTML; characters that no page may hold become U+FFFD."""
    bad = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]"
    return value if isinstance(value, Html) else html.escape(re.sub(bad, "\ufffd", str(value)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; children that are not Html are escaped. `class_` is class, None leaves an attribute out."""
    given = {key: f"{v:.1f}" if isinstance(v, float) else v for key, v in attributes.items() if v is not None}
    words = (f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in given.items())
    return Html(f"<{name}{''.join(words)}>{''.join(map(escape, children))}</{name}>")


def grid(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "figures") -> Html:
    """A table in a container that scrolls by itself; nothing if it has no rows."""
    body = [tag("tr", *(tag("td", value) for value in row)) for row in rows]
    top = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head)))
    table = tag("table", top, tag("tbody", *body), class_=kind)
    return tag("div", table, class_="scroll", tabindex=0) if body else Html("")


def section(title: str, note: str, *content: Html) -> Html:
    """A headed part of the page; nothing if there is nothing to show yet."""
    start = (tag("h2", title), tag("p", note, class_="note"))
    return tag("section", *start, *content) if any(content) else Html("")


def document(title: str, main: Html) -> str:
    """The whole page as a file."""
    size = '<meta name="viewport" content="width=device-width,initial-scale=1">'
    head = Html(f'<meta charset="utf-8">{size}{tag("title", title)}<style>{STYLE}</style>')
    return "<!doctype html>\n" + tag("html", tag("head", head), tag("body", main), lang="en") + "\n"


def clip(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= LONG else f"{text[:LONG]} … ({len(text):,} characters)"


def clock(seconds: float) -> str:
    """A duration in words."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{round(seconds) // 60} min {round(seconds) % 60} s"


def side_by_side(*parts: Html) -> Html:
    """Parts in as many columns as there is room for; nothing if all are empty."""
    return tag("div", *filter(None, parts), class_="grid") if any(parts) else Html("")


def words(agent: str) -> str:
    """"teacher 1" for "teacher1"."""
    return re.sub(r"(\d+)$", r" \1", agent)


def look(agent: str) -> str:
    """The class that colours an agent or its base: three hues serve any number of teachers."""
    number = re.search(r"\d+$", agent)
    return f"teacher{int(number[0]) % 3}" if number else agent.replace("strong", "student")


# ---- charts: {agent: [(x, y) or (x, y, low, high)]} ---------------------------------------------

DOT = "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0"
MARKS = {  # shift, so that whiskers stand side by side; and shape, so that colour is never alone
    "student": (0, DOT), "teacher1": (-6, "M-4,-4h8v8h-8z"), "teacher2": (6, "M0,-5L5,4H-5z"),
    "teacher0": (12, "M0,-5.5L5.5,0L0,5.5L-5.5,0z"), "continued": (18, DOT), "ceiling": (18, DOT),
}  # fmt: skip


def ticks(low: float, high: float, most: int) -> tuple[list[float], list[str]]:
    """Round numbers from below `low` to above `high`, about `most` of them, and how they are written."""
    span = high - low or abs(low) or 1
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    values = [step * i for i in range(first, max(last, first + 1) + 1)]
    return values, [f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" for value in values]


def apart(wanted: list[float], low: float, high: float, gap: float = 15) -> list[float]:
    """Places near the wanted ones that are `gap` from each other, as far as the room allows."""
    places, order = list(wanted), sorted(range(len(wanted)), key=wanted.__getitem__)
    for i in order:
        places[i] = max(places[i], low)
        low = places[i] + gap
    for i in reversed(order):
        places[i] = min(places[i], high)
        high = places[i] - gap
    return places


def path(points: Iterable[tuple[float, float]], **attributes: str) -> Html:
    """The line through points."""
    return tag("path", d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points), **attributes)


def chart(lines: dict[str, list], unit: str, size: tuple[int, int, int], kind: str | None = None) -> Html:
    """An SVG of width, height, and room for names; the names of a `kind` tell the last number too."""
    width, height, room = size
    values = [y for points in lines.values() for point in points for y in point[1:]]
    ys, names = ticks(min(values), max(values), 5)
    end = max(1.0, *(point[0] for points in lines.values() for point in points))
    left, right, bottom = 14 + 7 * max(map(len, names)), width - room, height - 40

    def place(x: float, y: float) -> tuple[float, float]:
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return left + 20 + x / end * (right - left - 40), bottom - up * (bottom - 10)

    parts = [tag("text", unit, x=(left + right) / 2, y=height - 2, text_anchor="middle")]
    for value, name in zip(ys, names, strict=True):
        y = place(0, value)[1]
        parts.append(path([(left, y), (right, y)], class_="axis"))
        parts.append(tag("text", name, x=left - 8, y=y + 4, text_anchor="end"))
    for value, name in zip(*ticks(0, end, min(math.floor(end), room // 16)), strict=True):
        if value <= end:
            parts.append(tag("text", name, x=place(value, 0)[0], y=bottom + 19, text_anchor="middle"))
    heights = apart([place(*points[-1][:2])[1] for points in lines.values()], 12, bottom)
    for agent, y in sorted(zip(lines, heights, strict=True), key=lambda pair: pair[0] == "student"):
        parts.append(draw(agent, lines[agent], place, unit, (right + 8, y), kind is not None))
    said = "; ".join(f"{words(agent)} {p[0][1]:.4g} to {p[-1][1]:.4g}" for agent, p in lines.items())
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=said, class_=kind)


def draw(agent: str, points: list, place: Callable, unit: str, name_at: tuple, number: bool) -> Html:
    """One line with its intervals, markers and name; hovering tells the numbers."""
    kind, level = look(agent), unit == "round" and agent in ("continued", "ceiling")
    shift, shape = MARKS.get(kind, MARKS["student"])
    spots = [(place(*point[:2])[0] + shift * (len(point) > 2), place(*point[:2])[1]) for point in points]
    bars = [[(x, place(0, y)[1]) for y in p[2:]] for (x, _), p in zip(spots, points, strict=True) if p[2:]]
    parts = [tag("title", words(agent))]
    if kind == "student" and bars:
        parts.append(path([low for low, _ in bars] + [high for _, high in reversed(bars)], class_="band"))
    parts += [path(bar, class_="thread") for bar in bars[-1 if level else 0 :]]
    parts.append(path(spots, class_="curve"))
    for (x, y), point in zip(spots, points, strict=True) if not level else ():
        if len(points) > 1 and not (unit == "round" and float(point[0]).is_integer()):
            continue  # a loss curve has its dots at the ends of rounds
        told = f"{words(agent)}, {unit} {point[0]:.3g}: {point[1]:.4g}"
        told += " (95%: {:.3f} to {:.3f})".format(*point[2:]) if point[2:] else ""
        spot = f"translate({x:.1f},{y:.1f})"
        parts.append(tag("path", tag("title", told), d=shape, transform=spot, class_="dot"))
    parts.append(path([spots[-1], (name_at[0] - 3, name_at[1])], class_="thread"))
    name = f"{words(agent)} {points[-1][1]:.3f}" if number else words(agent)
    parts.append(tag("text", name, x=name_at[0], y=name_at[1] + 4, class_="name"))
    return tag("g", *parts, class_=kind + " level" * level)


def figure(title: str, note: str, lines: dict[str, list], unit: str = "round", main: bool = False) -> Html:
    """A chart under its title, the main one for wide and for narrow windows; nothing if it has no lines."""
    lines = {agent: points for agent, points in lines.items() if points}
    if not lines:
        return Html("")
    sizes = {"wide": (1070, 440, 150), "narrow": (400, 350, 122)} if main else {None: (400, 250, 92)}
    caption = tag("figcaption", tag("b", title), " ", note)
    return tag("figure", caption, *(chart(lines, unit, size, kind) for kind, size in sizes.items()))
