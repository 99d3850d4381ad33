"""The last rounds of several finished runs side by side, with intervals of the paired differences."""

import re

import numpy as np

from minmacpo import UserError
from minmacpo.evaluate import (
    Past,
    gold_by_prompt,
    last_student,
    measured,
    paired_interval,
    read_run,
)
from minmacpo.files import read_json
from minmacpo.run import FINISHED
from minmacpo.tables import aligned

SIDES = ("student", "teachers")


def last_gold(run: Past) -> dict[str, np.ndarray]:
    """Gold reward of the test prompts [n]: of the student that the run ends with, and the teachers' mean at last."""
    last = [last_student(run), *((name, measured(run, name)[-1]) for name in run.teachers)]
    student, *teachers = (gold_by_prompt(run, *agent)["gold"] for agent in last)
    return {"student": student, "teachers": np.mean(teachers, 0)}


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
    lines = []
    for row in rows:
        cells = [row["method"], str(len(row["seeds"]))]
        for side in SIDES:
            found = [row[f"{side}_difference"], *row[f"{side}_interval"]] if f"{side}_interval" in row else []
            apart = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found) if found else "no seed in common" * (row is not rows[0])
            cells += [f"{row[side]:.3f}", apart]
        lines.append(cells)
    return aligned(["last round", "seeds", "student", "difference to the first", "teachers", "difference (seeds in common)"], lines)
