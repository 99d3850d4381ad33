"""Read finished runs: python eval.py RUN, or python eval.py compare RUN RUN...; --json for machines.

RUN is a folder such as runs/world. `compare` sets the last rounds of finished runs side by side: runs that differ
in their seed alone are averaged; differences to the first have 95 % intervals over their seeds and prompts.
"""

import itertools
import json
import re
import sys

import numpy as np

from minmacpo import UserError
from minmacpo.evaluate import Past, format_table, gold_by_prompt, make_table, paired_interval, read_run
from minmacpo.files import read_json
from minmacpo.progress import call
from minmacpo.run import FINISHED

SIDES = ("student", "teachers")


def last_gold(run: Past) -> dict[str, np.ndarray]:
    """Gold reward of the test prompts [n] at each one's last round: the student's, and the teachers' mean."""
    settings, gold = run.config.macpo, {}
    agents = ["student", *(f"teacher{k + 1}" for k in range(settings.teachers))]
    for agent, t in itertools.product(agents, range(settings.rounds + 1)):
        if f"eval/round{t}_{agent}_samples" in run.notes:
            gold[agent] = gold_by_prompt(run, agent, t)["gold"]
    return {"student": gold.pop("student"), "teachers": np.mean([*gold.values()], 0)}


def compare(paths: list[str]) -> list[dict]:
    """One row per method: mean over seeds of its last student's and teachers' gold, and the difference."""
    found, asked = {}, {}  # {method: {seed: gold}}, {seed: test prompts}
    for run in map(read_run, paths):
        folder, seed, method = run.folder, run.config.run.seed, re.sub(r"-seed=\d+", "", run.folder.name)
        if run.config.data.path:
            raise UserError(f"{folder}: has no gold reward to compare; see its table")
        if not (folder / FINISHED).is_file():
            raise UserError(f"{folder}: is not finished; go on with it first")
        if seed in found.setdefault(method, {}):
            raise UserError(f"{folder}: a run of {method} with seed {seed} is there already; give each once")
        prompts = tuple(read_json(run.stage("data/slices").path / "split.json")["test"])
        if asked.setdefault(seed, prompts) != prompts:
            raise UserError(f"{folder}: its test prompts are not those of the other runs with seed {seed}")
        found[method][seed] = last_gold(run)
    first, rows = next(iter(found.values())), []
    for name, seeds in found.items():
        row = {"method": name, "seeds": sorted(seeds)}
        for side in SIDES:
            row[side] = float(np.mean([gold[side].mean() for gold in seeds.values()]))
            pairs = [gold[side] - first[seed][side] for seed, gold in seeds.items() if seed in first]
            if pairs and seeds is not first:
                row[f"{side}_difference"] = float(np.mean([pair.mean() for pair in pairs]))
                row[f"{side}_interval"] = paired_interval(pairs)
        rows.append(row)
    return rows


def format_comparison(rows: list[dict]) -> str:
    """`compare` as a table for a terminal."""
    width = max(len(row["method"]) for row in rows)
    lines = [f"{'last round':{width}}  seeds  student  difference to the first      teachers  difference"]
    for row in rows:
        cells = [f"{row['method']:{width}}  {len(row['seeds']):5}"]
        for side in SIDES:
            found = [row[f"{side}_difference"], *row[f"{side}_interval"]] if f"{side}_interval" in row else []
            text = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found) if found else ""
            cells += [f"{row[side]:7.3f}", f"{text:27}"]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure what the command line asks for; returns the exit code."""
    words = [word for word in argv if word != "--json"]
    if not words or "--help" in words or "-h" in words:
        print(__doc__)
        return 0 if words else 2
    if odd := [word for word in words if word.startswith("-")]:
        raise UserError(f"{odd[0]}: unknown word; see eval.py --help")
    if words[0] == "compare":
        if len(words) < 3:
            raise UserError("compare needs at least two runs")
        found, show = compare(words[1:]), format_comparison
    else:
        runs = words[1:] if words[0] == "table" else words
        if len(runs) != 1:
            raise UserError("expected one run; eval.py compare RUN RUN... takes several")
        found, show = make_table(read_run(runs[0])), format_table
        if not found["rows"]:
            raise UserError(f"{runs[0]}: no agent has been measured yet")
    print(json.dumps(found, indent=1) if "--json" in argv else show(found))
    return 0


if __name__ == "__main__":
    sys.exit(call(main, "nothing was changed: this program only reads."))
