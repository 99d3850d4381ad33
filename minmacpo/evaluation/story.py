"""What happened in a run, in sentences: the head of its report."""

import itertools
from collections.abc import Sequence

from minmacpo.evaluation.bootstrap import mean_interval
from minmacpo.evaluation.finished_run import FinishedRun, agent_label
from minmacpo.evaluation.table import too_few_to_tell, values_by_prompt
from minmacpo.evaluation.text_tables import COLUMNS

MEASURES = {  # what the sentences speak of
    "gold": "gold reward",
    "right": "right answers",
    "accuracy": "preference accuracy",
    "perplexity": "perplexity of true answers",
}

COLUMN_OF = {column.key: column for column in COLUMNS}


def tell_story(run: FinishedRun, rows: Sequence[dict]) -> list[str]:
    """What happened to the student, to what it is compared with, and to the teachers.

    Args:
        rows: those of the run's table.
    """
    few = too_few_to_tell(run, rows)
    if few is not None:
        return [
            f"The {few} test rows are too few to tell how far the student came, or what the "
            "teachers learned: every number below may be chance."
        ]
    rows_of = {}
    for agent, group in itertools.groupby(rows, lambda row: row["agent"]):
        rows_of[agent] = list(group)

    student = rows_of.get("student", [])
    if "kept" in rows_of:  # it was rolled back: what came later is not what the run ends with
        last_round = rows_of["kept"][0]["round"]
        student = [row for row in student if row["round"] <= last_round]
    measure = main_measure(rows)
    return [
        student_sentence(run, student),
        comparison_sentence(run, rows_of, student, measure),
        teachers_sentence(run, rows_of, measure),
    ]


def main_measure(rows: Sequence[dict]) -> str:
    """The measure by which agents are compared: the best that a run has."""
    for key in ("gold", "accuracy"):
        if rows and key in rows[0]:
            return key
    return "perplexity"


def student_sentence(run: FinishedRun, rows: Sequence[dict]) -> str:
    """How far the student came, with the interval of its gain."""
    if not rows:
        return "The student has not been measured yet."
    measure = main_measure(rows)
    phrases = []
    for key, name in MEASURES.items():
        if key in rows[0]:
            phrase = f"{name} {change(run, rows, key)}"
            if key == measure and key != "perplexity" and len(rows) > 1:
                phrase += f" ({gain(run, rows[0], rows[-1])})"
            phrases.append(phrase)
    said = phrases[-1]
    if len(phrases) > 1:
        said = f"{', its '.join(phrases[:-1])} and its {phrases[-1]}"
    when = f"After {rows[-1]['round']} of {run.config.macpo.rounds} rounds"
    if not run.has_gold:
        count = rows[-1].get("pairs", rows[-1]["prompts"])
        when = (
            f"On {count} test rows, after {rows[-1]['round']} of {run.config.macpo.rounds} rounds"
        )
    return f"{when} the student's {said}."


def gain(run: FinishedRun, first: dict, last: dict) -> str:
    """How much a row of the table is better than another one, with its interval, in words."""
    differences = values_by_prompt(run, last) - values_by_prompt(run, first)
    low, high = mean_interval(differences, run.config.eval.bootstrap)
    text = f"{differences.mean():+.3f}, 95% interval {low:+.3f} to {high:+.3f}"
    if low <= 0 <= high:
        text += ", which may be chance"
    return text


def change(run: FinishedRun, rows: Sequence[dict], key: str) -> str:
    """ "rose from 0.910 to 0.964": a measure from an agent's first row to its last."""
    if f"{rows[0][key]:.3f}" == f"{rows[-1][key]:.3f}":
        verb = "stayed at" if len(rows) > 1 else "is"
        return f"{verb} {value_text(run, rows[-1], key)}"
    verb = "rose" if rows[-1][key] > rows[0][key] else "fell"
    return f"{verb} from {value_text(run, rows[0], key)} to {value_text(run, rows[-1], key)}"


def value_text(run: FinishedRun, row: dict, key: str) -> str:
    """A measure as text; on own data with its interval."""
    if run.has_gold:
        return f"{row[key]:.3f}"
    return COLUMN_OF[key].format(row, with_range=True)


def comparison_sentence(
    run: FinishedRun, rows_of: dict[str, list[dict]], student: Sequence[dict], measure: str
) -> str:
    """What the controls reach, and how much of the gap the student closed."""
    names = {"continued": "naive SFT continued", "ceiling": "the ceiling, SFT on the true answers,"}
    reached = []
    for agent, name in names.items():
        if agent in rows_of:
            reached.append(f"{name} reaches {value_text(run, rows_of[agent][0], measure)}")
    if not reached:
        return "No control and no ceiling has been measured."
    sentence = f"For comparison, in {MEASURES[measure]} {' and '.join(reached)}"
    pgr = student[-1].get("pgr") if student else None
    if pgr is not None and pgr >= 0:
        low, high = student[-1]["pgr_interval"]
        sentence += (
            "; of the gap between the best teacher at the start and the ceiling the student "
            f"recovered {pgr:.0%} (95% interval {low:.0%} to {high:.0%})"
        )
    elif pgr is not None:
        sentence += "; the student ends below the best teacher at the start"
    return f"{sentence}."


def teachers_sentence(run: FinishedRun, rows_of: dict[str, list[dict]], measure: str) -> str:
    """How far every teacher came."""
    changes = []
    for agent, rows in rows_of.items():
        if agent.startswith("teacher"):
            changes.append(f"{agent_label(agent)} {change(run, rows, measure)}")
    if not changes:
        return "No teacher has been measured yet."
    return f"The {MEASURES[measure]} of {', of '.join(changes)}."
