"""Read finished runs: python eval.py RUN, or python eval.py compare RUN RUN...; --json for machines.

RUN is a folder such as runs/world. `table RUN` (or just RUN) prints the run's table from the disk.
`compare` sets the last round of several runs side by side; runs of one method that differ in their
seed are averaged, and every method's difference to the first one's is given with a 95 % interval
over seeds and prompts (paired; only of the seeds that both have).
"""

import json
import re
import sys

import numpy as np

from minmacpo import UserError


def method_of(name: str) -> str:
    """The run's name without its seed."""
    return re.sub(r"-seed=\d+", "", name)


def compare(paths: list[str]) -> list[dict]:
    """One row per method: mean over seeds of its last student's and teachers' gold, and the difference."""
    from minmacpo.evaluate import gold_by_prompt, paired_interval, pairs_of, read_run

    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    asked: dict[int, tuple[str, ...]] = {}  # test prompts by seed
    for folder, config in map(read_run, paths):
        last, settings, seed, method = config.macpo.rounds, config.macpo, config.run.seed, method_of(folder.name)
        if config.data.path:
            raise UserError(f"{folder}: has no gold reward to compare; see its table")
        if seed in found.get(method, ()):
            raise UserError(f"{folder}: a run of {method} with seed {seed} is there already; give each once")
        prompts = tuple(pairs_of(folder, "test"))
        if asked.setdefault(seed, prompts) != prompts:
            raise UserError(f"{folder}: its test prompts are not those of the other runs with seed {seed}")
        names = [f"teacher{k + 1}" for k in range(settings.teachers)]
        taught = last if settings.update_teachers else 0
        student = gold_by_prompt(config, folder, "student", last)["gold"]
        teachers = np.mean([gold_by_prompt(config, folder, name, taught)["gold"] for name in names], 0)
        found.setdefault(method, {})[seed] = (student, teachers)
    first = next(iter(found.values()))
    rows = []
    for name, seeds in found.items():
        row = {"method": name, "seeds": sorted(seeds)}
        for side, index in (("student", 0), ("teachers", 1)):
            row[side] = float(np.mean([values[index].mean() for values in seeds.values()]))
            pairs = [values[index] - first[seed][index] for seed, values in seeds.items() if seed in first]
            if pairs and seeds is not first:
                row[f"{side}_difference"] = float(np.mean([p.mean() for p in pairs]))
                row[f"{side}_interval"] = paired_interval(pairs)
        rows.append(row)
    return rows


def format_comparison(rows: list[dict]) -> str:
    """`compare` as a table for a terminal."""
    width = max(len(row["method"]) for row in rows)
    lines = [f"{'last round':{width}}  seeds  student  difference to the first      teachers  difference"]
    for row in rows:
        cells = [f"{row['method']:{width}}  {len(row['seeds']):5}"]
        for side in ("student", "teachers"):
            cells.append(f"{row[side]:7.3f}")
            low_high = "[{:+.3f}, {:+.3f}]".format(*row[f"{side}_interval"]) if f"{side}_interval" in row else ""
            cells.append(f"{row[f'{side}_difference']:+.3f} {low_high:20}" if low_high else " " * 27)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure what the command line asks for; returns the exit code."""
    as_json = "--json" in argv
    words = [word for word in argv if word != "--json"]
    if not words or "--help" in words or "-h" in words:
        print(__doc__)
        return 0 if words else 2
    odd = next((word for word in words if word.startswith("-")), None)
    if odd:
        raise UserError(f"{odd}: unknown word; see eval.py --help")
    from minmacpo.evaluate import format_table, make_table

    if words[0] == "compare":
        if len(words) < 3:
            raise UserError("compare needs at least two runs")
        rows = compare(words[1:])
        print(json.dumps(rows, indent=1) if as_json else format_comparison(rows))
        return 0
    runs = words[1:] if words[0] == "table" else words
    if len(runs) != 1:
        raise UserError("expected one run; eval.py compare RUN RUN... takes several")
    table = make_table(runs[0])
    if not table["rows"]:
        raise UserError(f"{runs[0]}: no agent has been measured yet")
    print(json.dumps(table, indent=1) if as_json else format_table(table))
    return 0


if __name__ == "__main__":
    from minmacpo.program import call

    sys.exit(call(main))
