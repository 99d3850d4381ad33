"""Elements of a page as text: whatever is put into one is escaped there, unless it is `Html`.

The frames of the pages are page.html, experiment.html and comparison.html, their style is page.css.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from minmacpo.runtime.progress import escape_control_chars

FOLDER = Path(__file__).parent  # of the frames and the style


class Html(str):
    """Text that is HTML already."""


def escape(value: object) -> str:
    """Anything as HTML; characters that would turn the text around them are shown as escapes."""
    if isinstance(value, Html):
        return value
    return html.escape(escape_control_chars(str(value)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; children that are not Html are escaped.

    Args:
        attributes: `class_` is the attribute class, text_anchor is text-anchor; one that is None
            is left out; floats are written with one decimal.
    """
    opening = name
    for key, value in attributes.items():
        if value is None:
            continue
        # Python has no names with hyphens, and keeps the word class for itself
        attribute = key.rstrip("_").replace("_", "-")
        text = f"{value:.1f}" if isinstance(value, float) else escape(value)
        opening += f' {attribute}="{text}"'
    content = "".join(escape(child) for child in children)
    return Html(f"<{opening}>{content}</{name}>")


def grid(head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "figures") -> Html:
    """A table in a container that scrolls by itself and shows that it does; nothing without rows.

    Args:
        kind: the table's class in page.css, "figures" or "samples".
    """
    body = []
    for row in rows:
        cells = [tag("td", value) for value in row]
        body.append(tag("tr", *cells))
    if not body:
        return Html()
    headings = [tag("th", heading, scope="col") for heading in head]
    table = tag("table", tag("thead", tag("tr", *headings)), tag("tbody", *body), class_=kind)
    return tag("div", table, class_="scroll", tabindex=0)


def legend(meanings: dict[str, str]) -> Html:
    """What the columns of a table mean, each under its name."""
    entries = []
    for name, meaning in meanings.items():
        entries.append(tag("div", tag("dt", name), tag("dd", meaning)))
    return tag("dl", *entries, class_="legend") if entries else Html()


def document(template: str, **parts: Iterable[object]) -> str:
    """A whole page as the text of a file: a frame with its parts put where it names them."""
    frame = (FOLDER / template).read_text("utf-8")
    filled = {"style": read_style()}
    for name, children in parts.items():
        filled[name] = "".join(escape(child) for child in children)
    return Template(frame).substitute(filled)


def read_style() -> str:
    """The style of all pages and charts."""
    return (FOLDER / "page.css").read_text("utf-8")


def clip(text: str, most: int = 700) -> str:
    """The beginning of a long text, with its length."""
    if len(text) <= most:
        return text
    return f"{text[:most]} … ({len(text):,} characters)"
