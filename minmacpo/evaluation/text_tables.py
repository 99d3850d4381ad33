"""A run's tables as text: which columns they have, what these mean, and how numbers are written."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from minmacpo.evaluation.finished_run import agent_label
from minmacpo.runtime.progress import aligned

TERMINAL_WIDTH = 100
MAX_LABEL = 36  # characters of a row's name
NOTHING = "–"  # what stands where there is no number


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of results."""

    key: str  # of a row in table.json
    heading: str
    digits: int
    meaning: str  # as the report's legend says it
    interval: str = ""  # how its 95 % interval is written: "range", "half" of its width, or not

    def format(self, row: dict, with_range: bool = False) -> str:
        """The value in a row of the table as text.

        Args:
            with_range: write the interval as a range, whatever the column's own way is.
        """
        value = row.get(self.key)
        if value is None:
            return NOTHING
        text = f"{value:.{self.digits}f}"
        bounds = row.get(f"{self.key}_interval")
        if bounds is None:
            return text
        low, high = bounds
        if self.interval == "range" or with_range:
            return f"{text} [{low:.{self.digits}f}, {high:.{self.digits}f}]"
        if self.interval == "half":
            return f"{text} ±{(high - low) / 2:.2f}"
        return text


# fmt: off
COLUMNS = (
    Column("gold", "gold", 3, "gold reward, 0.6 right + 0.2 polite + 0.2 well formed, which the"
           " built-in world alone knows", "range"),
    Column("right", "right", 3, "share of answers that are right", "half"),
    Column("polite", "polite", 3, "share that are polite", "half"),
    Column("well_formed", "formed", 3, "share that are well formed", "half"),
    Column("prompts", "n", 0, "number of test prompts"),
    Column("pairs", "pairs", 0, "number of test prompts with a worse answer, which pref.acc is of"),
    Column("pgr", "PGR", 2, "performance gap recovered: how much of the gap between the best"
           " teacher at round 0 and the ceiling was closed (in gold reward, on own data in"
           " pref.acc)"),
    Column("perplexity", "ppl", 3, "perplexity per token of the true answers; lower is better"),
    Column("perplexity_char", "ppl/char", 3, "the same per character, which is comparable between"
           " models of different tokenizers"),
    Column("accuracy", "pref.acc", 3, "preference accuracy: share of test pairs whose better"
           " answer gained more log-probability over the base than the worse one"),
    Column("length", "chars", 1, "mean length of the answers in characters"),
    Column("hit_length", "cut", 3, "share that reached the limit of their length"),
    Column("refusals", "refusals", 3, "share that decline to answer"),
    Column("distinct2", "distinct-2", 3, "different pairs of words as a share of all"),
    Column("self_bleu", "self-BLEU", 3, "how alike the answers are: each one's BLEU against the"
           " others; higher is less various"),
)
# fmt: on

# What the terminal shows of them, the most important first, as far as it fits
TERMINAL_COLUMNS = ("gold", "right", "pairs", "accuracy", "perplexity", "pgr", "length", "prompts")

SIGNS = {
    "surprise": "nats per token of the chosen answers when a round began to train on them",
    "entropy": "nats per token of the agent's own answers",
    "kl": "nats per answer above its bare base",
    "same": "share of prompts answered as in the round before",
    "similarity": "of the words of chosen and rejected answers",
    "loops": "share of answers that repeat themselves",
}


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of text; the first column names the rows."""

    head: list[str]
    rows: list[list[str]]


def shown_columns(table: dict) -> list[Column]:
    """The columns that some row of a run's table has a value for."""
    columns = []
    for column in COLUMNS:
        # The number of prompts matters where there are few; the world's is in its settings
        if table["world"] and column.key in ("prompts", "pairs"):
            continue
        if any(column.key in row for row in table["rows"]):
            columns.append(column)
    return columns


def results_table(table: dict, columns: Sequence[Column]) -> TextTable:
    """Every agent at every round; if the test prompts come from several files, each one below."""
    with_range = not table["world"]
    rows = []
    for row in table["rows"]:
        rows.append([row["label"], *(column.format(row, with_range) for column in columns)])
        if len(row["files"]) > 1:
            for file, part in row["files"].items():
                rows.append([f"  {file}", *(column.format(part, with_range) for column in columns)])
    head = [f"{table['run']} ({table['method']})"]
    return TextTable(head + [column.heading for column in columns], rows)


def filter_table(table: dict) -> TextTable:
    """By round: of each source, how often it was chosen, and how often it was right then."""
    sources = {source for row in table["filter"] for source in row["sources"]}
    names = sorted(sources, key=lambda name: (len(name), name))
    rows = []
    for row in table["filter"]:
        cells = [str(row["round"])]
        for name in names:
            source = row["sources"].get(name, {"won": 0, "right": None})
            cells.append(f"{source['won']:.0%}{right_note(source['right'])}")
        cells.append(f"100%{right_note(row['right'])}")
        cells.append(percent(row.get("offered")))
        rows.append(cells)
    head = ["chosen in round", *(agent_label(name) for name in names), "all", "any right"]
    return TextTable(head, rows)


def right_note(right: float | None) -> str:
    """ " (78% right)", or nothing on own data."""
    return "" if right is None else f" ({right:.0%} right)"


def percent(fraction: float | None) -> str:
    """A fraction as "78%", or a dash."""
    return NOTHING if fraction is None else f"{fraction:.0%}"


def negatives_table(table: dict) -> TextTable:
    """By agent: how wrong its negatives are, and how many equal their positive."""
    rows = []
    for row in table["negatives"]:
        equal = ", ".join(f"{fraction:.1%}" for fraction in row["equal"])
        rows.append([agent_label(row["agent"]), percent(row["wrong"]), equal])
    return TextTable(["negatives of", "wrong", "equal to their positive, by round"], rows)


def monitor_table(table: dict) -> TextTable:
    """The monitor's signs and alarms, by agent and round."""
    rows = []
    for row in table["monitor"]:
        cells = [f"{agent_label(row['agent'])}, round {row['round']}"]
        for sign in SIGNS:
            value = row.get(sign)
            cells.append(NOTHING if value is None else f"{value:.3f}")
        cells.append(", ".join(row["alarms"]))
        rows.append(cells)
    return TextTable(["monitor", *SIGNS, "alarms"], rows)


def format_table(table: dict) -> str:
    """The tables for a terminal, at most 100 columns wide; a line says what they leave out."""
    results = results_table(table, shown_columns(table))
    filtered = filter_table(table)
    heading = {column.key: column.heading for column in COLUMNS}
    important = [heading[key] for key in TERMINAL_COLUMNS]
    important_sources = ["all", "any right", *filtered.head[1:-2]]

    parts = []
    left_out = []
    for text_table, order in (
        (results, important),
        (filtered, important_sources),
        (negatives_table(table), None),
        (monitor_table(table), None),
    ):
        if text_table.rows:
            narrow = fit_width(text_table, order or text_table.head[1:])
            parts.append(aligned(narrow.head, narrow.rows))
            left_out += [name for name in text_table.head[1:] if name not in narrow.head]

    lines = ["\n\n".join(parts)]
    if left_out:
        lines.append("\n" + left_out_note(left_out))
    lines += [f"WARNING: {warning}" for warning in table["warnings"]]
    return "\n".join(lines)


def fit_width(table: TextTable, order: Sequence[str]) -> TextTable:
    """The table with as many columns as fit a terminal.

    Args:
        order: headings that may be shown, the most important first; the first column always is.
    """
    columns = list(zip(table.head, *table.rows, strict=True))
    labels = [clip_label(label) for label in columns[0]]
    width = max(len(label) for label in labels)
    shown = set()
    for heading in order:
        if heading not in table.head:
            continue
        cells = columns[table.head.index(heading)]
        column_width = 2 + max(len(cell) for cell in cells)  # `aligned` puts two spaces before it
        if width + column_width <= TERMINAL_WIDTH:
            width += column_width
            shown.add(heading)
    narrow = [labels]
    for column in columns[1:]:
        if column[0] in shown:
            narrow.append(column)
    head, *rows = (list(cells) for cells in zip(*narrow, strict=True))
    return TextTable(head, rows)


def left_out_note(headings: Sequence[str]) -> str:
    """A sentence about columns that a terminal has no room for."""
    return textwrap.fill(f"The report has also: {', '.join(headings)}.", TERMINAL_WIDTH)


def clip_label(label: str) -> str:
    """A name of a row that leaves room for its numbers."""
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"


def bracketed(values: Sequence[float], number_format: str = ".3f") -> str:
    """ "0.512 [0.498, 0.526]" for (mean, low, high); a dash for nothing."""
    if not values:
        return NOTHING
    mean, low, high = (format(value, number_format) for value in values)
    return f"{mean} [{low}, {high}]"
