"""One self-contained page about a run, report.html: sentences, curves, tables, samples, costs.

All is read from finished stages on the disk, so the page can be written at any time. Whatever is put
into an element is escaped there (`tag`). How an answer is judged is known to evaluate.py alone.
"""

import functools
import html
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from minmacpo import evaluate
from minmacpo.config import Config, flatten, toml_value
from minmacpo.data import Pair, Sample
from minmacpo.evaluate import COLUMNS, notes_of
from minmacpo.files import read_json, read_records, read_rows, write_atomic

PROMPTS = 6  # shown with their answers
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1e22;--soft:#5f666f;--rule:#e3e6ea;--student:#1d5fc9;
--first:#b5470a;--second:#741a5c;--third:#08804d;--warn:#9a3b00}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e9ec;--soft:#9aa3ad;--rule:#2b3137;
--student:#58b1f6;--first:#eb9448;--second:#f263a6;--third:#b4eed8;--warn:#ffb27a}}
*{box-sizing:border-box;margin:0} body{background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:auto;padding:56px 24px 96px}
h1{font-size:32px;line-height:1.2;letter-spacing:-.015em} h2{font-size:21px;letter-spacing:-.01em}
h1,h2,h3{font-weight:650} h3{font-size:15px} section{margin-top:88px}
.lead{max-width:40em;margin-top:32px;font-size:19px;line-height:1.6}
.note,figcaption,small,dd+dd,th,pre,summary{color:var(--soft);font-size:14px} .note{max-width:48em;margin:6px 0 24px}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:24px 32px;margin-top:44px;
border-top:1px solid var(--rule);padding-top:24px} dt{font-size:14px;font-weight:600}
.numbers dt+dd{font-size:38px;font-weight:600;line-height:1.3;letter-spacing:-.02em}
.warning{border-left:3px solid var(--warn);padding-left:14px;margin-top:24px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:40px 32px}
.grid+.grid{margin-top:48px} figcaption b,pre b{color:var(--ink)}
svg{display:block;width:100%;height:auto;overflow:visible;margin-top:10px} .narrow{display:none}
svg *{fill:none;stroke:currentColor} text,text *{font-size:12.5px;fill:var(--soft);stroke:none}
.name{fill:currentColor;font-weight:600} .axis{stroke:var(--rule)} .thread{opacity:.45}
.curve{stroke-width:1.75;stroke-linejoin:round} .student .curve{stroke-width:3} .level .curve{stroke-dasharray:6 5}
.band{fill:currentColor;stroke:none;opacity:.14} .dot{fill:currentColor;stroke:var(--paper)}
.student{color:var(--student)} .teacher1{color:var(--first)} .teacher2{color:var(--second)}
.teacher0{color:var(--third)} .ceiling{color:var(--ink)} .continued{color:var(--soft)}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-size:14px;width:100%}
th,td{padding:6px 16px 6px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
.figures :is(th,td)+:is(th,td){text-align:right;white-space:nowrap;padding:6px 0 6px 16px}
.figures td:first-child{white-space:nowrap} .figures,.numbers{font-variant-numeric:tabular-nums}
.text{white-space:pre-wrap;unicode-bidi:isolate} .samples{min-width:700px;table-layout:fixed;margin-top:12px}
.samples th:first-child{width:80px} .samples small{display:block} article{padding-top:36px}
pre{font:13px/1.6 ui-monospace,Consolas,monospace;white-space:pre-wrap} summary{cursor:pointer;margin:24px 0 12px}
@media(max-width:700px){main{padding-top:32px} section{margin-top:64px} .wide{display:none} .narrow{display:block}}
"""


class Html(str):
    """Text that is HTML already."""


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; children that are not Html are escaped. `class_` is class, None leaves an attribute out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    words = (f' {k}="{escape(f"{v:.1f}" if isinstance(v, float) else v)}"' for k, v in given.items())
    return Html(f"<{name}{''.join(words)}>{''.join(map(escape, children))}</{name}>")


def escape(value: object) -> str:
    """Anything as HTML; characters that no page may hold become U+FFFD."""
    bad = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]"
    return value if isinstance(value, Html) else html.escape(re.sub(bad, "\ufffd", str(value)))


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


def words(agent: str) -> str:
    """"teacher 1" for "teacher1"."""
    return re.sub(r"(\d+)$", r" \1", agent)


def look(agent: str) -> str:
    """The class that colours an agent or its base: three hues serve any number of teachers."""
    number = re.search(r"\d+$", agent)
    return f"teacher{int(number[0]) % 3}" if number else agent.replace("strong", "student")


# ---- charts ---------------------------------------------------------------------------------

DOT = "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0"
MARKS = {  # shift, so that whiskers stand side by side; and shape, so that colour is never alone
    "student": (0, DOT), "teacher1": (-7, "M-4,-4h8v8h-8z"), "teacher2": (-14, "M0,-5L5,4H-5z"),
    "teacher0": (7, "M0,-5.5L5.5,0L0,5.5L-5.5,0z"), "continued": (14, DOT), "ceiling": (14, DOT),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart: points (x, y) or (x, y, low, high); a level goes from side to side."""

    agent: str
    points: list[tuple[float, ...]]
    level: bool = False


def ticks(low: float, high: float, most: int) -> tuple[list[float], list[str]]:
    """Round numbers from below `low` to above `high`, about `most` of them, and how they are written."""
    span = high - low or abs(low) or 1
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= most)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    values = [step * i for i in range(first, last + 1)]
    return values, [f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" for value in values]


def apart(wanted: list[float], low: float, high: float, gap: float = 15) -> list[float]:
    """Places near the wanted ones that are `gap` from each other, as far as the room allows."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    places = list(wanted)
    for i in order:
        places[i] = low = max(places[i], low)
        low += gap
    for i in reversed(order):
        places[i] = high = min(places[i], high)
        high -= gap
    return places


def path(points: Iterable[tuple[float, float]], **attributes: str) -> Html:
    """The line through points."""
    return tag("path", d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points), **attributes)


def chart(lines: list[Line], unit: str, width: int, height: int, room: int, kind: str | None = None) -> Html:
    """An SVG with `room` for names at the right; those of a chart of a `kind` tell the last number too."""
    values = [y for line in lines for point in line.points for y in point[1:]]
    ys, names = ticks(min(values), max(values), 5)
    end = max(1.0, *(point[0] for line in lines for point in line.points))
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
    heights = apart([place(*line.points[-1][:2])[1] for line in lines], 12, bottom)
    for line, y in sorted(zip(lines, heights, strict=True), key=lambda pair: pair[0].agent == "student"):
        parts.append(draw(line, place, unit, (right + 8, y), kind is not None))
    said = (f"{words(line.agent)} {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label="; ".join(said), class_=kind)


def draw(line: Line, place: Callable, unit: str, name_at: tuple[float, float], number: bool) -> Html:
    """One line with its intervals, markers and name; hovering tells the numbers."""
    agent, (shift, shape) = words(line.agent), MARKS.get(look(line.agent), (0, DOT))
    points = [(place(*point[:2]), point) for point in line.points]
    points = [((x + shift if len(point) > 2 else x, y), point) for (x, y), point in points]
    bars = [[(spot[0], place(0, y)[1]) for y in point[2:]] for spot, point in points if len(point) > 2]
    parts = [tag("title", agent)]
    if look(line.agent) == "student" and bars:
        parts.append(path([low for low, _ in bars] + [high for _, high in reversed(bars)], class_="band"))
    parts += [path(bar, class_="thread") for bar in bars[-1 if line.level else 0 :]]
    parts.append(path([spot for spot, _ in points], class_="curve"))
    for (x, y), point in points if len(points) < 14 and not line.level else ():
        told = f"{agent}, {unit} {point[0]:.3g}: {point[1]:.4g}"
        told += " (95 %: {:.3f} to {:.3f})".format(*point[2:]) if len(point) > 2 else ""
        parts.append(tag("path", tag("title", told), d=shape, transform=f"translate({x:.1f},{y:.1f})", class_="dot"))
    parts.append(path([points[-1][0], (name_at[0] - 3, name_at[1])], class_="thread"))
    name = f"{agent} {line.points[-1][1]:.3f}" if number else agent
    parts.append(tag("text", name, x=name_at[0], y=name_at[1] + 4, class_="name"))
    return tag("g", *parts, class_=look(line.agent) + " level" * line.level)


def figure(title: str, note: str, lines: list[Line], unit: str = "round", main: bool = False) -> Html:
    """A chart under its title, the main one for wide and for narrow windows; nothing if it has no lines."""
    lines = [line for line in lines if line.points]
    if not lines:
        return Html("")
    sizes = [(1030, 440, 150, "wide"), (400, 350, 122, "narrow")] if main else [(400, 250, 92, None)]
    caption = tag("figcaption", tag("b", title), " ", note)
    return tag("figure", caption, *(chart(lines, unit, *size) for size in sizes))


def round_lines(table: dict, key: str) -> list[Line]:
    """A column of the table over the rounds; the controls, measured at the end only, are levels."""
    lines: dict[str, Line] = {}
    for row in table["rows"]:
        level = row["agent"] in ("continued", "ceiling")
        line = lines.setdefault(row["agent"], Line(row["agent"], [], level))
        point = (row.get(key, math.nan), *row.get(f"{key}_interval", ()))
        if math.isfinite(point[0]):
            line.points.extend((t, *point) for t in ([0, row["round"]] if level else [row["round"]]))
    return list(lines.values())


@functools.lru_cache(maxsize=1024)
def metrics_of(folder: Path, fingerprint: str) -> list[dict]:
    """About 100 lines of a training stage's metrics.jsonl, the last one among them."""
    rows = list(read_rows(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").is_file() else []
    return rows[:: -max(1, len(rows) // 100)][::-1]


def stage_line(folder: Path, agent: str, stages: Sequence[str], key: str, unit: str) -> Line:
    """A metric over "epoch" or "step" of one stage, or over the "round" that each stage is."""
    points = []
    for t, notes in enumerate(notes_of(folder / name) for name in stages):
        rows = metrics_of(folder / stages[t], notes["fingerprint"]) if notes else []
        for row in rows:
            x = t + row["step"] / rows[-1]["step"] if unit == "round" else row[unit]
            points += [(x, row[key])] if math.isfinite(row.get(key, math.nan)) else []
    return Line(agent, points)


def training_figures(config: Config, folder: Path) -> list[Html]:
    """Losses, margins and accuracies of every training stage."""
    agents = ["student", *(f"teacher{k + 1}" for k in range(config.macpo.teachers))]
    updates = {agent: [f"round{t + 1}/{agent}_pos" for t in range(config.macpo.rounds)] for agent in agents}
    first = {agent: [f"round0/{agent}_pos"] for agent in agents}
    first |= {agent: [f"controls/{agent}"] for agent in ("continued", "ceiling")}
    bases = {base: [f"bases/{base}"] for base in ("strong", *(f"weak{k + 1}" for k in range(config.macpo.teachers)))}
    shown = [
        ("Loss in the rounds", "DPO + γ SFT", "loss", "round", updates),
        ("Reward margin", "chosen − rejected, β · nats", "rewards/margins", "round", updates),
        ("Pairs ranked rightly", "share with margin above 0", "rewards/accuracies", "round", updates),
        ("SFT loss", "nats per token, with the controls", "loss", "epoch", first),
        ("SFT loss of the negative agents", "nats per token", "loss", "epoch",
         {agent: [f"round0/{agent}_neg"] for agent in agents}),
        ("Pre-training loss", "nats per token", "loss", "step", bases),
    ]  # fmt: skip
    return [
        figure(title, note, [stage_line(folder, agent, stages, key, unit) for agent, stages in who.items()], unit)
        for title, note, key, unit, who in shown
    ]


# ---- the story ------------------------------------------------------------------------------


def measures(table: dict) -> list[tuple[str, str]]:
    """Key and name of what the story is told in: gold reward, or what real data allows."""
    real = [("accuracy", "preference accuracy"), ("perplexity", "perplexity of the true answers")]
    return [("gold", "gold reward")] if table["world"] else real


def moved(old: float, new: float) -> str:
    """"rose from 0.910 to 0.964"."""
    went = "rose" if new > old else "fell"
    return f"stayed at {new:.3f}" if f"{old:.3f}" == f"{new:.3f}" else f"{went} from {old:.3f} to {new:.3f}"


def mean(rows: Iterable[dict], key: str) -> float:
    """The mean of a column."""
    values = [row[key] for row in rows]
    return sum(values) / len(values)


def student_sentence(table: dict, rows: list[dict], gain: Sequence[float] | None, prompts: int) -> str:
    """How far the student came."""
    if not rows:
        return "The student has not been measured yet."
    t = rows[-1]["round"]
    if not t:
        stands = " and ".join(f"a {name} of {rows[0][key]:.3f}" for key, name in measures(table))
        return f"Before the first round, after naive SFT, the student has {stands} on {prompts} unseen prompts."
    went = " and its ".join(f"{name} {moved(rows[0][key], rows[-1][key])}" for key, name in measures(table))
    text = f"In {t} of {table['rounds']} rounds the student's {went} on {prompts} unseen prompts"
    if not gain:
        return f"{text}."
    doubt = ", so chance alone may explain it" if gain[1] <= 0 <= gain[2] else ""
    return f"{text}; the change is {gain[0]:+.3f} (95 % interval {gain[1]:+.3f} to {gain[2]:+.3f}){doubt}."


def control_sentence(table: dict, by: dict[str, list[dict]]) -> str:
    """What the same base reached by other means."""
    names = {"continued": "naive SFT continued for as many steps", "ceiling": "training on the true answers, the ceiling,"}
    parts = [
        f"{name} reached " + " and ".join(f"{word} {by[agent][0][key]:.3f}" for key, word in measures(table))
        for agent, name in names.items() if agent in by
    ]
    if not parts:
        return "There is no control and no ceiling to compare with."
