"""Read finished runs, measure models on files, and have answers judged. --json prints for machines.

python eval.py RUN                      the table of a run, such as runs/world; also: table RUN
python eval.py compare RUN RUN...       last rounds side by side: runs that differ in their seed
                                        alone are averaged; differences to the first have 95 %
                                        intervals over their seeds and prompts; --page=FILE.html
                                        writes it as a page with the student's curves
python eval.py export RUN STAGE FILE    pairs (round1/pairs_student) or answers (round0/weak_labels)
                                        of a run as an array of instruction, input, output, as
                                        MACPO's authors released theirs
python eval.py ppl PATH FILE            how likely a base or adapter finds the answers of a data
                                        file (ppl --help)
python eval.py accuracy PATH FILE       how often it prefers the better one of two answers
                                        (accuracy --help)
python eval.py judge A B --out=FOLDER   a pairwise judge: a URL, a local model, or people
                                        (judge --help)
python eval.py reward RUN               a reward model's scores, and how far it can be trusted
                                        (reward --help)

What needs torch is imported where it is used, so that help and a typo are answered at once.
"""

import json
import sys
from collections.abc import Callable

from minmacpo import UserError
from minmacpo.runtime.progress import escape_control_chars, run_main

AFTER_STOP = (
    "this program only reads runs, and writes what is asked for whole or not at all; verdicts of "
    "a judge are kept."
)


def main(argv: list[str]) -> int:
    """Measure what the command line asks for and print it; returns the exit code."""
    words = [word for word in argv if word != "--json"]
    command = words[0] if words else ""
    if command in ("compare", "judge", "reward", "ppl", "accuracy"):
        result, to_text = measure(command, words[1:])  # they have a --help of their own
    elif not words:
        print(__doc__)
        return 2
    elif "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    else:
        result, to_text = read(words)

    if result is None:  # the command has said all itself
        return 0
    if "--json" in argv:
        print(json.dumps(result, indent=1))
    else:
        print(escape_control_chars(to_text(result)))
    return 0


def measure(command: str, words: list[str]) -> tuple[object, Callable]:
    """The result of a command that measures something, and the function that shows it."""
    if command == "compare":
        from minmacpo.evaluation.compare import format_comparison, run_compare

        return run_compare(words), format_comparison
    if command == "judge":
        from minmacpo.evaluation.judge import format_judgement, run_judge

        return run_judge(words), format_judgement
    if command == "reward":
        from minmacpo.evaluation.reward_model import format_rewards, run_reward

        return run_reward(words), format_rewards

    from minmacpo.evaluation.likelihood import format_likelihood, run_likelihood

    return run_likelihood(command, words), format_likelihood


def read(words: list[str]) -> tuple[object, Callable]:
    """The result of a command that only reads a run, and the function that shows it."""
    for word in words:
        if word.startswith("-"):
            raise UserError(f"{word}: unknown word, or no value; see eval.py --help")
    if words[0] == "export":
        if len(words) != 4:
            raise UserError("expected export RUN STAGE FILE")
        from minmacpo.evaluation.finished_run import export

        return export(*words[1:]), str

    runs = words[1:] if words[0] == "table" else words
    if len(runs) != 1:
        raise UserError("expected one run; eval.py compare RUN RUN... takes several")
    return read_table(runs[0])


def read_table(path: str) -> tuple[dict, Callable]:
    """The table of a run, made anew from its files; a run that has not ended is warned of."""
    from minmacpo.evaluation.finished_run import read_run
    from minmacpo.evaluation.table import make_table
    from minmacpo.evaluation.text_tables import format_table
    from minmacpo.pipeline.run import FINISHED

    run = read_run(path)
    table = make_table(run)
    if not table["rows"]:
        raise UserError(f"{path}: no agent has been measured yet")
    if not (run.folder / FINISHED).is_file():
        name = escape_control_chars(path)
        print(
            f"WARNING: {name} has not ended: this is what has been measured so far", file=sys.stderr
        )
    return table, format_table


if __name__ == "__main__":
    sys.exit(run_main(main, AFTER_STOP))
