"""What happened in a run, in sentences: the head of its report."""

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

COMPARED_WITH = {
    "continued": "naive SFT continued",
    "ceiling": "the ceiling, SFT on the true answers,",
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

    # By agent, in the order of the rounds
    rows_of: dict[str, list[dict]] = {}
    for row in rows:
        rows_of.setdefault(row["agent"], []).append(row)

    # A student that was rolled back: what came later is not what the run ends with
    student = rows_of.get("student", [])
    if "kept" in rows_of:
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
    first = rows[0]
    last = rows[-1]

    # --- What changed; how sure that is, of the main measure alone, and of perplexity not at all:
    # it is a ratio of sums, which has no value for each prompt
    main = main_measure(rows)
    phrases = []
    for key, name in MEASURES.items():
        if key not in first:
            continue
        phrase = f"{name} {change(run, rows, key)}"
        if key == main and key != "perplexity" and len(rows) > 1:
            phrase += f" ({gain(run, first, last)})"
        phrases.append(phrase)
    *earlier, changes = phrases
    if earlier:
        changes = f"{', its '.join(earlier)} and its {changes}"

    # --- When; how many rows there are is told of own data, as the world's are in its settings
    rounds = f"{last['round']} of {run.config.macpo.rounds} rounds"
    when = f"After {rounds}"
    if not run.has_gold:
        count = last.get("pairs", last["prompts"])
        when = f"On {count} test rows, after {rounds}"
    return f"{when} the student's {changes}."


def gain(run: FinishedRun, first: dict, last: dict) -> str:
    """How much a row of the table is better than another one, with its interval, in words."""
    differences = values_by_prompt(run, last) - values_by_prompt(run, first)
    mean = differences.mean()
    low, high = mean_interval(differences, run.config.eval.bootstrap)
    text = f"{mean:+.3f}, 95% interval {low:+.3f} to {high:+.3f}"
    if low <= 0 <= high:
        text += ", which may be chance"
    return text


def change(run: FinishedRun, rows: Sequence[dict], key: str) -> str:
    """ "rose from 0.910 to 0.964": a measure from an agent's first row to its last."""
    before = rows[0][key]
    after = rows[-1][key]
    after_text = value_text(run, rows[-1], key)
    if len(rows) == 1:
        return f"is {after_text}"
    if f"{before:.3f}" == f"{after:.3f}":  # a change that no digit shows would read as an error
        return f"stayed at {after_text}"

    verb = "rose" if after > before else "fell"
    before_text = value_text(run, rows[0], key)
    return f"{verb} from {before_text} to {after_text}"


def value_text(run: FinishedRun, row: dict, key: str) -> str:
    """A measure as text; on own data with its interval."""
    if run.has_gold:
        return f"{row[key]:.3f}"
    return COLUMN_OF[key].format(row, with_range=True)  # of few rows, a number alone says little


def comparison_sentence(
    run: FinishedRun, rows_of: dict[str, list[dict]], student: Sequence[dict], measure: str
) -> str:
    """What the controls reach, and how much of the gap the student closed."""
    reached = []
    for agent, name in COMPARED_WITH.items():
        if agent in rows_of:
            value = value_text(run, rows_of[agent][0], measure)
            reached.append(f"{name} reaches {value}")
    if not reached:
        return "No control and no ceiling has been measured."
    sentence = f"For comparison, in {MEASURES[measure]} {' and '.join(reached)}"
    if student:
        sentence += recovered_phrase(student[-1])
    return f"{sentence}."


def recovered_phrase(row: dict) -> str:
    """How much of the gap the student of this row has closed; "" where there is no gap."""
    pgr = row.get("pgr")
    if pgr is None:
        return ""
    if pgr < 0:  # to have recovered -20% of a gap tells nobody anything
        return "; the student ends below the best teacher at the start"
    low, high = row["pgr_interval"]
    return (
        "; of the gap between the best teacher at the start and the ceiling the student "
        f"recovered {pgr:.0%} (95% interval {low:.0%} to {high:.0%})"
    )


def teachers_sentence(run: FinishedRun, rows_of: dict[str, list[dict]], measure: str) -> str:
    """How far every teacher came."""
    changes = []
    for agent, rows in rows_of.items():
        if agent.startswith("teacher"):
            changes.append(f"{agent_label(agent)} {change(run, rows, measure)}")
    if not changes:
        return "No teacher has been measured yet."
    return f"The {MEASURES[measure]} of {', of '.join(changes)}."
