"""Read finished runs, measure models on files, and have answers judged. --json prints for machines.

python eval.py RUN                      the table of a run, such as runs/world; also: eval.py table RUN
python eval.py compare RUN RUN...       last rounds side by side: runs that differ in their seed alone are averaged;
                                        differences to the first have 95 % intervals over their seeds and prompts;
                                        --page=FILE.html writes it as a page with the student's curves
python eval.py export RUN STAGE FILE    pairs (round1/pairs_student) or answers (round0/weak_labels) of a run as an
                                        array of instruction, input, output, as MACPO's authors released theirs
python eval.py ppl PATH FILE            how likely a base or adapter finds the answers of a data file (ppl --help)
python eval.py accuracy PATH FILE       how often it prefers the better one of two answers (accuracy --help)
python eval.py judge A B --out=FOLDER   a pairwise judge: a URL, a local model, or people (judge --help)
python eval.py reward RUN               a reward model's scores, and how far it can be trusted (reward --help)
"""

import json
import sys

from minmacpo import UserError
from minmacpo.runtime.progress import escape_control_chars, run_main


def main(argv: list[str]) -> int:
    """Measure what the command line asks for; returns the exit code."""
    words = [word for word in argv if word != "--json"]
    if words and words[0] in ("compare", "judge", "reward", "ppl", "accuracy"):
        found, show = measure(words[0], words[1:])
    elif not words or "--help" in words or "-h" in words:
        print(__doc__)
        return 0 if words else 2
    else:
        found, show = read(words)
    if found is not None:
        print(
            json.dumps(found, indent=1) if "--json" in argv else escape_control_chars(show(found))
        )
    return 0


def measure(command: str, words: list[str]):
    """(what was found, how it is shown) of the commands with words of their own."""
    if command == "compare":
        from minmacpo.evaluation.compare import format_comparison, run_compare

        return run_compare(words), format_comparison
    if command == "judge":
        from minmacpo.evaluation.judge import format_judgement, run_judge

        return run_judge(words), format_judgement
    if command in ("ppl", "accuracy"):
        from minmacpo.evaluation.likelihood import format_likelihood, run_likelihood

        return run_likelihood(command, words), format_likelihood
    from minmacpo.evaluation.reward_model import format_rewards, run_reward

    return run_reward(words), format_rewards


def read(words: list[str]):
    """(what was found, how it is shown) of the commands that only read."""
    from minmacpo.evaluation.finished_run import export, read_run
    from minmacpo.evaluation.table import make_table
    from minmacpo.evaluation.text_tables import format_table
    from minmacpo.pipeline.run import FINISHED

    if odd := [word for word in words if word.startswith("-")]:
        raise UserError(f"{odd[0]}: unknown word, or no value; see eval.py --help")
    if words[0] == "export":
        if len(words) != 4:
            raise UserError("expected export RUN STAGE FILE")
        return export(*words[1:]), str
    runs = words[1:] if words[0] == "table" else words
    if len(runs) != 1:
        raise UserError("expected one run; eval.py compare RUN RUN... takes several")
    found = make_table(run := read_run(runs[0]))
    if not found["rows"]:
        raise UserError(f"{runs[0]}: no agent has been measured yet")
    if not (run.folder / FINISHED).is_file():
        print(
            f"WARNING: {escape_control_chars(runs[0])} has not ended: this is what has been measured so far",
            file=sys.stderr,
        )
    return found, format_table


if __name__ == "__main__":
    sys.exit(
        run_main(
            main,
            "this program only reads runs, and writes what is asked for whole or not at all; verdicts of a judge are kept.",
        )
    )
