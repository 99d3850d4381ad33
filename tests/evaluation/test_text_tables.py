"""A run's tables as text: they fit a terminal, say what they leave out, and how sure they are."""

import json

from minmacpo.evaluation.text_tables import (
    COLUMNS,
    TERMINAL_WIDTH,
    TextTable,
    fit_width,
    format_table,
    results_table,
    shown_columns,
)

ROW = {  # of a run on own data, with the intervals of six test pairs
    "label": "student, round 2",
    "agent": "student",
    "round": 2,
    "files": {},
    "prompts": 6,
    "pairs": 6,
    "accuracy": 1.0,
    "accuracy_interval": [0.6097, 1.0],
    "perplexity": 12.3456,
    "perplexity_interval": [11.5, 13.25],
    "pgr": 0.5,
    "pgr_interval": [0.125, 0.875],
}


def table_of(run) -> dict:
    return json.loads((run / "eval/table.json").read_text())


def own_data_table(row: dict) -> dict:
    sections = {"filter": [], "negatives": [], "monitor": [], "warnings": []}
    return sections | {"run": "mine", "method": "macpo", "world": False, "rows": [row]}


def test_the_tables_of_a_run_fit_a_terminal(stub):
    text = format_table(table_of(stub))

    assert max(len(line) for line in text.splitlines()) <= TERMINAL_WIDTH == 100


def test_many_teachers_with_long_names_fit_too(stub):
    table = table_of(stub)
    table["run"] = "a-run-with-a-name-that-tells-every-setting-that-is-not-as-usual" * 2
    chosen = {f"teacher{k}": {"won": 0.125, "right": 0.5} for k in range(1, 9)}
    table["filter"] = [{"round": 1, "sources": chosen, "right": 0.5, "offered": 0.75}]

    text = format_table(table)

    assert max(len(line) for line in text.splitlines()) <= TERMINAL_WIDTH
    assert "any right" in text and "teacher 8" in text.split("The report has also:")[1]


def test_what_the_terminal_leaves_out_is_said_in_one_line(stub):
    lines = format_table(table_of(stub)).splitlines()

    (note,) = [line for line in lines if line.startswith("The report has also:")]
    assert "self-BLEU" in note and "gold" not in note


def test_columns_are_left_out_from_the_least_important_on():
    table = TextTable(["name", "wide", "small"], [["x", "w" * 90, "1"]])

    assert fit_width(table, ["wide", "small"]).head == ["name", "wide"]
    assert fit_width(table, ["small", "wide"]).head == ["name", "small"]


def test_own_data_shows_how_many_rows_and_an_interval_for_every_measure():
    table = own_data_table(ROW)
    text = results_table(table, shown_columns(table))
    cells = dict(zip(text.head, text.rows[0], strict=True))

    assert cells["pairs"] == "6"
    assert cells["pref.acc"] == "1.000 [0.610, 1.000]"
    assert cells["ppl"] == "12.346 [11.500, 13.250]"
    assert cells["PGR"] == "0.50 [0.12, 0.88]"


def test_every_column_has_a_meaning_and_a_heading_of_its_own():
    headings = [column.heading for column in COLUMNS]

    assert len(headings) == len(set(headings))
    assert all(len(column.meaning) > 10 for column in COLUMNS)
