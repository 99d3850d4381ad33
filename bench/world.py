"""The measured tables, RESULTS.md: python -m bench.world [--seeds=0,1,2,3,4] [--long=0,1] [--hh=RUN] [--root=runs].

Runs train.py for every seed and variant (finished stages are shared, finished runs are not redone; about
9 CPU-minutes a seed), then writes the page from the runs on disk; --page only writes, --no_page only runs. --hh is a
finished run of `python train.py @hh --data.path=FOLDER` to be shown beside them.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from minmacpo.evaluate import Past, format_table, gold_by_prompt, make_table, paired_interval, read_run

VARIANTS = {
    "MACPO": [],
    "−MP (self-generated positives)": ["--macpo.mutual=false"],
    "−HN (SFT term only)": ["--macpo.hard_negatives=false"],
    "−IW (teachers frozen)": ["--macpo.update_teachers=false"],
    "random pick, no filter": ["--macpo.select=random"],
    "confident loss (Burns et al.)": ["--method=confident"],
    "SPIN (Chen et al.)": ["--method=spin"],
    "DPO on the true pairs": ["--method=dpo-truth"],
}
LONG = ["--macpo.rounds=10"]
Runs = dict[int, Past]


def run_path(root: Path, seed: int, flags: list[str]) -> Path:
    """Where `train.py` puts this run."""
    from minmacpo.commandline import parse

    return root / parse([*flags, f"--run.seed={seed}"]).config.run.name


def train(root: Path, seed: int, flags: list[str]) -> None:
    """One run of train.py, its output kept beside the runs."""
    log = root / f"seed{seed}.log"
    command = [sys.executable, "train.py", f"--run.root={root}", f"--run.seed={seed}", *flags]
    with log.open("a") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT)
    print(f"seed {seed} {' '.join(flags) or 'MACPO'}: exit {done.returncode}", flush=True)


def finished(root: Path, seeds: list[int], flags: list[str]) -> Runs:
    """The finished runs of one variant by seed."""
    paths = {seed: run_path(root, seed, flags) for seed in seeds}
    return {seed: read_run(path) for seed, path in paths.items() if (path / "eval/table.json").is_file()}


def values(runs: Runs, agent: str, t: int | None = None) -> dict[int, np.ndarray]:
    """Gold reward by prompt, per seed; "teachers" is their mean; at round t, or the last one measured before."""
    out = {}
    for seed, run in runs.items():
        rounds = range(run.config.macpo.rounds + 1)[: None if t is None else t + 1]
        names = [f"teacher{k + 1}" for k in range(run.config.macpo.teachers)] if agent == "teachers" else [agent]
        when = [max(t for t in rounds if f"eval/round{t}_{name}_samples" in run.notes) for name in names]
        out[seed] = np.mean([gold_by_prompt(run, *known)["gold"] for known in zip(names, when, strict=True)], 0)
    return out


def difference(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> str:
    """Mean of a - b over the seeds that both have, with its interval over seeds and prompts."""
    both = [a[seed] - b[seed] for seed in a if seed in b]
    if not both:
        return "–"
    low, high = paired_interval(both)
    return f"{np.mean([d.mean() for d in both]):+.3f} [{low:+.3f}, {high:+.3f}]"


def mean(found: dict[int, np.ndarray]) -> str:
    return f"{np.mean([v.mean() for v in found.values()]):.3f}" if found else "–"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def seeds_table(runs: Runs) -> str:
    """One row per seed: student by round, controls, PGR, teachers."""
    rows = []
    for seed, run in sorted(runs.items()):
        one, last = {seed: run}, run.config.macpo.rounds
        table = make_table(run)
        rounds = [mean(values(one, "student", t)) for t in range(last + 1)]
        pgr = next(r["pgr"] for r in table["rows"] if (r["agent"], r["round"]) == ("student", last))
        wrong = ", ".join(f"{row['wrong']:.0%}" for row in table["negatives"])
        rows.append(
            [str(seed), *rounds, mean(values(one, "continued")), mean(values(one, "ceiling")),
             "–" if pgr is None else f"{pgr:.2f}",
             f"{mean(values(one, 'teachers', 0))} → {mean(values(one, 'teachers'))}", wrong]
        )  # fmt: skip
    head = ["seed", "student r0 (naive SFT)", "r1", "r2", "r3", "naive continued", "ceiling", "PGR r3",
            "teachers' mean r0 → r3", "negatives that are wrong (student, teachers)"]  # fmt: skip
    return markdown(head, rows)


def differences_table(runs: Runs) -> str:
    """MACPO's student against the controls, its teachers against themselves."""
    last = values(runs, "student")
    rows = [
        ["student r3 − naive SFT (its r0)", difference(last, values(runs, "student", 0))],
        ["student r3 − naive SFT continued", difference(last, values(runs, "continued"))],
        ["student r3 − ceiling", difference(last, values(runs, "ceiling"))],
        ["teachers' mean r3 − r0", difference(values(runs, "teachers"), values(runs, "teachers", 0))],
    ]
    return markdown(["gold reward", "mean difference [95 % interval]"], rows)


def variants_table(root: Path, seeds: list[int]) -> str:
    """Every variant against MACPO, student and teachers."""
    rows, full = [], finished(root, seeds, [])
    for name, flags in VARIANTS.items():
        runs = finished(root, seeds, flags)
        cells = [name, str(len(runs))]
        for agent in ("student", "teachers"):
            found = values(runs, agent)
            cells += [mean(found), difference(values(full, agent), found) if flags else ""]
            cells += [" ".join(f"{found[seed].mean():.3f}" for seed in sorted(found))] if agent == "student" else []
        rows.append(cells)
    head = ["variant", "seeds", "student r3", "MACPO − variant", "by seed", "teachers r3", "MACPO − variant"]
    return markdown(head, rows)


def long_table(root: Path, seeds: list[int]) -> str:
    """Ten rounds: the student by round, and what is left of its best."""
    rows = []
    for seed, run in finished(root, seeds, LONG).items():
        one = {seed: run}
        curve = [values(one, "student", t)[seed].mean() for t in range(run.config.macpo.rounds + 1)]
        teachers = [values(one, "teachers", t)[seed].mean() for t in (0, 3, run.config.macpo.rounds)]
        rows.append([str(seed), " ".join(f"{v:.3f}" for v in curve), f"{curve[-1] / max(curve):.1%}",
                     " / ".join(f"{v:.3f}" for v in teachers)])  # fmt: skip
    return markdown(["seed", "student r0 … r10", "r10 / best", "teachers r0 / r3 / r10"], rows)


def cost_table(run: Past) -> str:
    """CPU seconds by kind of stage of one run that was computed from nothing."""
    stages = [row for row in make_table(run)["cost"] if not row["linked_from"]]
    kinds = sorted({row["kind"] for row in stages}, key=lambda k: -sum(r["cpu_seconds"] for r in stages if r["kind"] == k))
    rows = []
    for kind in kinds:
        mine = [row for row in stages if row["kind"] == kind]
        rows.append([kind.partition("/")[0], str(len(mine)), f"{sum(r['cpu_seconds'] for r in mine):.1f}",
                     f"{sum(r['tokens'] or 0 for r in mine):,}"])  # fmt: skip
    total = f"{sum(row['cpu_seconds'] for row in stages):.0f}"
    rows.append(["**all**", str(len(stages)), f"**{total}**", f"peak {max(r['peak_mb'] for r in stages)} MB"])
    return markdown(["kind of stage", "stages", "CPU seconds", "tokens"], rows)


def hh_section(run: Past) -> str:
    """A run on HH-RLHF files: what the reader counted, the table, the cost."""
    counts = run.notes["data/slices"]["counts"]
    made = {name.removeprefix("data/corpus_"): notes["counts"] for name, notes in run.notes.items() if "/corpus_" in name}
    texts = {name: made[name]["documents"] for name in sorted(made)}
    repeated = {"repeated prompts left out": counts["repeated prompts left out"]}
    parts = counts["rows"] | counts["slices"] | repeated | {"d0, documents": texts}
    counts = [[name, ", ".join(f"{reason} {n}" for reason, n in found.items())] for name, found in parts.items()]
    return "\n".join([
        "## HH-RLHF: both official test files as one mixture\n",
        "`python train.py @hh --data.path=FOLDER`; tiny bases made from a part of the same files, so this shows the code "
        "on real dialogues, not what MACPO does to a 7B model. Learning rates were not tuned.\n",
        markdown(["file or slice", "rows"], counts), f"```\n{format_table(make_table(run))}\n```\n", cost_table(run),
    ])  # fmt: skip


def page(root: Path, seeds: list[int], long_seeds: list[int]) -> str:
    """RESULTS.md."""
    full = finished(root, seeds, [])
    parts = [
        "# Results\n",
        f"Written by `python -m bench.world` from {len(full)} seeds of the built-in world (`python train.py`, "
        "`@world`). Gold reward in [0, 1] on 320 held-out prompts, two sampled answers each. Intervals are 95 % "
        "bootstraps of the paired difference over seeds, then prompts. Seeds 0 and 1 were used to choose settings; "
        "the others were run once, afterwards.\n",
        "## Student and teachers, by seed\n", seeds_table(full), differences_table(full),
        "## Ablations and other methods\n\nThe other methods start from the same naive student and take as many passes over the same prompts; their teachers stay as they are.\n", variants_table(root, seeds),
        "## Ten rounds\n", long_table(root, long_seeds),
        "## What the default run costs (seed 0)\n", cost_table(full[min(full)]),
    ]  # fmt: skip
    return "\n".join(parts)


def main(argv: list[str]) -> None:
    options = dict(word.lstrip("-").partition("=")[::2] for word in argv)
    if odd := options.keys() - {"seeds", "long", "hh", "root", "page", "no_page"}:
        raise SystemExit(f"--{odd.pop()}: unknown; see the first lines of bench/world.py")
    seeds = [int(s) for s in options.get("seeds", "0,1,2,3,4").split(",")]
    long_seeds = [int(s) for s in options.get("long", "0,1").split(",") if s]
    root = Path(options.get("root", "runs"))
    root.mkdir(parents=True, exist_ok=True)
    if "page" not in options:
        for seed in seeds:
            for flags in VARIANTS.values():
                train(root, seed, flags)
            if seed in long_seeds:
                train(root, seed, LONG)
    if "no_page" not in options:
        text = page(root, seeds, long_seeds) + ("\n" + hh_section(read_run(options["hh"])) if "hh" in options else "")
        Path("RESULTS.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
