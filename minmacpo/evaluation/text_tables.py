"""A run's tables as text: which columns they have, what these mean, and how numbers are written."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minmacpo.evaluation.finished_run import agent_label, by_number
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
        number_format = f".{self.digits}f"
        text = format(value, number_format)
        bounds = row.get(f"{self.key}_interval")
        if bounds is None:
            return text
        low, high = bounds
        if self.interval == "range" or with_range:
            return bracketed([value, low, high], number_format)
        if self.interval == "half":
            half_width = (high - low) / 2
            return f"{text} ±{half_width:.2f}"
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

HEADINGS = {column.key: column.heading for column in COLUMNS}

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
    head = [f"{table['run']} ({table['method']})"]
    for column in columns:
        head.append(column.heading)

    # On own data there may be few test prompts, so that every interval is worth its room
    with_range = not table["world"]
    rows = []
    for row in table["rows"]:
        rows.append([row["label"], *result_cells(row, columns, with_range)])
        if len(row["files"]) > 1:
            for file, measures in row["files"].items():
                rows.append([f"  {file}", *result_cells(measures, columns, with_range)])
    return TextTable(head, rows)


def result_cells(row: dict, columns: Sequence[Column], with_range: bool) -> list[str]:
    """The values of a row in these columns as text."""
    return [column.format(row, with_range) for column in columns]


def filter_table(table: dict) -> TextTable:
    """By round: of each source, how often it was chosen, and how often it was right then."""
    # --- One column for each source that was chosen in some round
    sources = set()
    for row in table["filter"]:
        sources.update(row["sources"])
    names = sorted(sources, key=by_number)
    labels = [agent_label(name) for name in names]
    head = ["chosen in round", *labels, "all", "any right"]

    # --- One row for each round
    rows = []
    for row in table["filter"]:
        cells = [str(row["round"])]
        for name in names:
            source = row["sources"].get(name, {"won": 0, "right": None})
            cells.append(f"{source['won']:.0%}{right_note(source['right'])}")
        cells.append(f"100%{right_note(row['right'])}")
        cells.append(percent(row.get("offered")))
        rows.append(cells)
    return TextTable(head, rows)


def right_note(right: float | None) -> str:
    """ " (78% right)", or nothing on own data."""
    if right is None:
        return ""
    return f" ({right:.0%} right)"


def percent(fraction: float | None) -> str:
    """A fraction as "78%", or a dash."""
    if fraction is None:
        return NOTHING
    return f"{fraction:.0%}"


def three_decimals(values: Iterable[float]) -> list[str]:
    """Each value as "0.512"."""
    return [f"{value:.3f}" for value in values]


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
    negatives = negatives_table(table)
    monitored = monitor_table(table)

    # --- As many columns of each table as fit, the most important first
    important_results = [HEADINGS[key] for key in TERMINAL_COLUMNS]
    sources = filtered.head[1:-2]  # between the round and the two sums
    parts = []
    left_out = []
    for text_table, order in (
        (results, important_results),
        (filtered, ["all", "any right", *sources]),
        (negatives, negatives.head[1:]),
        (monitored, monitored.head[1:]),
    ):
        if text_table.rows:
            narrow = fit_width(text_table, order)
            parts.append(aligned(narrow.head, narrow.rows))
            left_out += missing_headings(text_table, narrow)

    # --- What is left out, and what is to be known of it all
    text = "\n\n".join(parts)
    if left_out:
        text += f"\n\n{left_out_note(left_out)}"
    for warning in table["warnings"]:
        text += f"\nWARNING: {warning}"
    return text


def fit_width(table: TextTable, order: Sequence[str]) -> TextTable:
    """The table with as many columns as fit a terminal.

    Args:
        order: headings that may be shown, the most important first; the first column always is.
    """
    columns = list(zip(table.head, *table.rows, strict=True))  # each with its heading
    labels = [clip_label(label) for label in columns[0]]

    # --- Take columns by importance; where one is too wide, a narrower one may still fit
    width = max(map(len, labels))
    shown = set()
    for heading in order:
        if heading not in table.head:
            continue
        cells = columns[table.head.index(heading)]
        column_width = 2 + max(map(len, cells))  # `aligned` puts two spaces before it
        if width + column_width <= TERMINAL_WIDTH:
            width += column_width
            shown.add(heading)

    # --- They stand in the table's own order
    narrow = [labels]
    for column in columns[1:]:
        if column[0] in shown:
            narrow.append(column)
    head, *rows = zip(*narrow, strict=True)
    return TextTable(list(head), [list(row) for row in rows])


def missing_headings(table: TextTable, narrow: TextTable) -> list[str]:
    """The headings of a table that are left out where it is made narrow."""
    return [heading for heading in table.head[1:] if heading not in narrow.head]


def left_out_note(headings: Sequence[str]) -> str:
    """A sentence about columns that a terminal has no room for."""
    return textwrap.fill(f"The report has also: {', '.join(headings)}.", TERMINAL_WIDTH)


def clip_label(label: str) -> str:
    """A name of a row that leaves room for its numbers."""
    if len(label) <= MAX_LABEL:
        return label
    return label[: MAX_LABEL - 1] + "…"


def bracketed(values: Sequence[float], number_format: str = ".3f") -> str:
    """ "0.512 [0.498, 0.526]" for (mean, low, high); a dash for nothing."""
    if not values:
        return NOTHING
    mean, low, high = (format(value, number_format) for value in values)
    return f"{mean} [{low}, {high}]"
