"""RESULTS.md, and README's table, from assets/results: python -m bench.results [--collect=runs] [--hh=RUN].

--collect takes results.json of every finished experiment (`python train.py @experiment-NAME`) of a run root, and what
its default run cost, into assets/results; --hh does so with a finished `@hh` run, and
`python -m bench.real --collect` with the benchmark on real files. findings.toml there is written by hand: what each
experiment says, and which claims of the paper hold in this world.
"""

import json
import sys
import tomllib
from pathlib import Path

from minmacpo import UserError
from minmacpo.evaluation.experiment_results import HEAD, result_cells
from minmacpo.evaluation.finished_run import read_run
from minmacpo.evaluation.table import make_table
from minmacpo.evaluation.text_tables import format_table
from minmacpo.runtime.files import write_atomic, write_json
from minmacpo.runtime.progress import run_main

PLACE = Path("assets/results")
MARKS = (
    "<!-- made by python -m bench.results -->",
    "<!-- as far as here -->",
)  # around README's table
ORDER = (
    "main",
    "ablations",
    "rounds",
    "selection",
    "self",
    "negatives",
    "loss",
    "lengths",
    "conditions",
    "teachers",
    "domains",
    "sizes",
    "noise",
)
INTRO = """# Results

Every number on this page comes from the built-in world (`@world`, gold reward in [0, 1] on 320 held-out prompts, two
sampled answers each), but for the sections on files at its end. `python train.py @experiment-NAME` runs an experiment
and writes its table; `python -m bench.results --collect=runs` makes this page. Brackets are 95 % bootstraps of the paired difference over
seeds, then prompts; with two seeds they say little about other seeds, with one nothing. Seeds 0 and 1 were used to choose settings and the
monitor's thresholds; seeds 2 to 4 were run once, afterwards. "Collapsed" counts seeds whose last student is below 97 %
of its best round; "alarm in" is the first round in which the monitor, which sees no gold label, warned of the student.
CPU seconds and tokens are those of all stages of one run, shared ones included.
"""


def markdown(head, rows) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def experiment_section(found: dict, finding: str) -> str:
    """Question, table, student by round where there are many, and what was found."""
    rows, seeds = found["variants"], ",".join(map(str, found["seeds"]))
    command = f"`python train.py @experiment-{found['name']} --seeds={seeds}`"
    head = [f"## {found['name']}\n", f"*{found['question']}* {command}\n", f"{cost_of(rows)}\n"]
    if any(row.get("group") for row in rows):
        return "\n".join([*head, *crossed(found["name"], rows), finding + "\n"])
    parts = [*head, markdown(HEAD, map(result_cells, rows)), finding + "\n"]
    longest = max(len(row["by_round"]) for row in rows)
    curve = [[row["name"], *(f"{v:.3f}" for v in row["by_round"])] for row in rows]
    parts.append(markdown(["student", *(f"r{t}" for t in range(longest))], curve))
    if len(found["seeds"]) > 2:
        seeds = [[row["name"], *(f"{v:.3f}" for v in row["by_seed"])] for row in rows]
        parts.append(markdown(["last round", *(f"seed {s}" for s in found["seeds"])], seeds))
    return "\n".join(parts)


def cost_of(rows: list[dict]) -> str:
    """How many runs an experiment has and what they took, a stage that several share counted once where that is known."""
    runs, known = sum(len(row["seeds"]) for row in rows), all("spent" in row for row in rows)
    seconds = sum(row["spent" if known else "cpu_seconds"] * len(row["seeds"]) for row in rows)
    how = (
        "beside stages that other runs had made"
        if known
        else "stages that runs share counted in each"
    )
    seeds = ", ".join(map(str, rows[0]["seeds"]))
    return f"Seeds {seeds}; {runs} runs, {seconds:,.0f} CPU seconds ({how})."


def plain(row: dict) -> str:
    """An interval, nothing where there is nothing to tell."""
    return "" if not any(row) else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row)


FIGURES = {  # of an experiment with groups: title and text of a cell, "" where it has nothing to say
    "student": ("student, last round", lambda row: f"{row['student']:.3f}"),
    "difference": ("first variant − it [95 %]", lambda row: plain(row["difference"])),
    "gain": ("gain over naive SFT [95 %]", lambda row: plain(row["gain"])),
    "kept": (
        "student that macpo.stop = rollback keeps",
        lambda row: f"{row['kept']:.3f}" if any(row["alarms"]) else "",
    ),
    "teachers": ("teachers, last round", lambda row: f"{row['teachers']:.3f}"),
    "pgr": ("PGR", lambda row: "" if row["pgr"] is None else f"{row['pgr']:.2f}"),
    "right": (
        "chosen right / any right",
        lambda row: "" if row["offered"] is None else f"{row['right']:.0%} / {row['offered']:.0%}",
    ),
    "different": (
        "different answers to a prompt, share",
        lambda row: "" if row["different"] is None else f"{row['different']:.0%}",
    ),
    "lengths": (
        "characters of an answer, last round (round 0)",
        lambda row: "{1:.0f} ({0:.0f})".format(*row["lengths"]),
    ),
    "cost": (
        "CPU seconds of a run, shared stages included",
        lambda row: f"{row['cpu_seconds']:.0f}",
    ),
}
SHOWN = {
    "conditions": ("student", "difference", "teachers", "right", "lengths"),
    "teachers": ("student", "difference", "gain", "teachers", "right", "different", "cost"),
    "domains": ("student", "difference", "pgr", "kept", "cost"),
    "sizes": ("student", "gain", "pgr", "teachers", "cost"),
    "noise": ("student", "difference", "teachers", "right", "kept"),
    "lengths": ("student", "teachers", "lengths"),
}


def crossed(name: str, rows: list[dict]) -> list[str]:
    """Variants against groups, a table for each figure of the experiment."""
    groups, variants = (list(dict.fromkeys(row[key] for row in rows)) for key in ("group", "name"))
    by, parts = {(row["group"], row["name"]): row for row in rows}, []
    for title, text in (FIGURES[key] for key in SHOWN.get(name, FIGURES)):
        table = [[variant, *(text(by[group, variant]) for group in groups)] for variant in variants]
        parts.append(markdown([title, *groups], [line for line in table if any(line[1:])]))
    return parts


def monitor_section(experiments: list[dict]) -> str:
    """Alarms against collapses, over all variants and seeds of every experiment; seeds 0 and 1 apart."""
    counts = {"seeds 0 and 1": [0] * 4, "other seeds": [0] * 4}
    known = set()
    for found in experiments:
        for row in found["variants"]:
            for seed, alarm, fell in zip(
                row["seeds"], row["alarms"], row["collapsed"], strict=True
            ):
                if (row["flags"], seed) not in known:
                    known.add((row["flags"], seed))
                    counts["seeds 0 and 1" if seed in (0, 1) else "other seeds"][
                        2 * (alarm is None) + (not fell)
                    ] += 1
    rows = [[name, *map(str, four)] for name, four in counts.items()]
    return "## The monitor\n\n" + markdown(
        [
            "runs",
            "collapsed, alarm",
            "not collapsed, alarm (false alarm, or never rose)",
            "collapsed, no alarm (miss)",
            "neither",
        ],
        rows,
    )


def mechanism_section(found: dict, finding: str) -> str:
    """Whose answers are how familiar to whom, by round (bench/mechanism.py)."""
    parts = [
        "## The mechanism\n",
        f"Median perplexity of an answer under a policy as it stands before the round, mean of {', '.join(found['runs'])}"
        " (`python -m bench.mechanism RUN RUN`).\n",
    ]
    for t, measured in found["rounds"].items():
        policies = list(next(iter(measured["perplexity"].values())))
        rows = [
            [label, *(f"{row[p]:.3f}" for p in policies)]
            for label, row in measured["perplexity"].items()
        ]
        parts.append(markdown([f"round {t}: answers", *(f"under {p}" for p in policies)], rows))
        parts.append(
            "Prompts by how many teachers are right: "
            + ", ".join(f"{k} {v:.0%}" for k, v in measured["teachers right"].items())
            + ".\n"
        )
    return "\n".join([*parts, finding + "\n"])


def cost_section(cost: list[dict]) -> str:
    """CPU seconds by kind of stage of one default run."""
    kinds = {}
    for row in cost:
        kinds.setdefault(row["kind"].partition("/")[0], []).append(row)
    rows = [
        [
            kind,
            str(len(mine)),
            f"{sum(r['cpu_seconds'] for r in mine):.1f}",
            f"{sum(r['tokens'] or 0 for r in mine):,}",
        ]
        for kind, mine in sorted(
            kinds.items(), key=lambda item: -sum(r["cpu_seconds"] for r in item[1])
        )
    ]
    total = f"**{sum(row['cpu_seconds'] for row in cost):.0f}**"
    rows.append(
        ["**all**", str(len(cost)), total, f"peak {max(row['peak_mb'] for row in cost)} MB"]
    )
    return "## What the default run costs (seed 0)\n\n" + markdown(
        ["kind of stage", "stages", "CPU seconds", "tokens"], rows
    )


def hh_section(found: dict) -> str:
    """A run on HH-RLHF files: what the reader counted, the table, the cost."""
    counts = [
        [name, ", ".join(f"{reason} {n}" for reason, n in reasons.items())]
        for name, reasons in found["counts"].items()
    ]
    return "\n".join(
        [
            "## HH-RLHF: both official test files as one mixture\n",
            "`python train.py @hh --data.path=FOLDER`; tiny bases made from a part of the same files, so this shows the code "
            "on real dialogues, not what MACPO does to a 7B model. Learning rates were not tuned.\n",
            markdown(["file or slice", "rows"], counts),
            f"```\n{found['table']}\n```\n",
            cost_section(found["cost"]).partition("\n\n")[2],
        ]
    )


def collect_experiments(root: Path) -> None:
    """Take what the experiments of a run root found, as far as they were made as their presets say."""
    for file in sorted(root.glob("experiment-*/results.json")):
        found = json.loads(file.read_text("utf-8"))
        known = read(found["name"])
        if found["shared"]:
            print(f"{file}: left out, it was made with {' '.join(found['shared'])}")
        elif known and not {*known["seeds"]} <= {*found["seeds"]}:
            print(f"{file}: left out, it lacks seeds that {PLACE / found['name']}.json has")
        else:
            write_json(PLACE / f"{found['name']}.json", found)


def collect(root: Path) -> None:
    """Take all that a run root has for the page: experiments, and the cost of its default run if it is there."""
    if not root.is_dir():
        raise UserError(f"--collect={root}: expected the folder that holds the runs")
    collect_experiments(root)
    if (root / "world").is_dir():
        keys = ("kind", "cpu_seconds", "tokens", "peak_mb")
        cost = [
            {k: row[k] for k in keys}
            for row in make_table(read_run(root / "world"))["cost"]
            if not row["linked_from"]
        ]
        write_json(PLACE / "cost.json", {"stages": cost})


def collect_hh(folder: str) -> None:
    """Take the counts, the table and the cost of a run on HH-RLHF files, as hh.md."""
    run = read_run(folder)
    counts = run.metadata["data/slices"]["counts"]
    made = {
        name.removeprefix("data/corpus_"): n["counts"]["documents"]
        for name, n in run.metadata.items()
        if "/corpus_" in name
    }
    parts = (
        counts["rows"]
        | counts["slices"]
        | {"repeated prompts left out": counts["repeated prompts left out"], "d0, documents": made}
    )
    table = make_table(run)
    cost = [
        {k: row[k] for k in ("kind", "cpu_seconds", "tokens", "peak_mb")} for row in table["cost"]
    ]
    commit = next(iter(run.metadata.values()))["commit"]
    section = hh_section({"counts": parts, "table": format_table(table), "cost": cost})
    write_atomic(PLACE / "hh.md", f"{section}\nMeasured at commit {commit}.\n")


def read(name: str) -> dict | None:
    """assets/results/NAME.json, if it is there."""
    file = PLACE / f"{name}.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def page() -> str:
    """RESULTS.md."""
    written = tomllib.loads((PLACE / "findings.toml").read_text("utf-8"))
    found = [result for name in ORDER if (result := read(name))]
    claims = [[claim["says"], claim["verdict"], claim["why"]] for claim in written["claims"]]
    parts = [
        INTRO,
        "## What the paper says, and what holds here\n",
        markdown(["claim", "in this world", "why"], claims),
    ]
    parts += [
        experiment_section(result, written["findings"].get(result["name"], "")) for result in found
    ]
    if mechanism := read("mechanism"):
        parts.append(mechanism_section(mechanism, written["findings"].get("mechanism", "")))
    parts += [monitor_section(found), written["findings"].get("monitor", "") + "\n"]
    parts += [cost_section(cost["stages"])] if (cost := read("cost")) else []
    parts += [hh.read_text("utf-8")] if (hh := PLACE / "hh.md").is_file() else []
    if real := read("real"):
        from bench.real_scores import section

        parts.append(section(real, written["findings"].get("real", "")))
    return "\n".join(parts)


def readme_table() -> str:
    """The main table and the ablations as README shows them, between its two marks."""
    main, ablations = read("main")["variants"], read("ablations")["variants"][1:]
    first, naive = main[0], next(row for row in main if row["flags"] == "--method=sft")
    rows = [
        [
            f"**{first['name']}**",
            f"**{first['student']:.3f}**",
            "",
            f"**{first['teachers']:.3f}** ({naive['teachers']:.3f} at round 0)",
        ]
    ]
    for row in [*main[1:], *ablations]:
        apart = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["difference"])
        rows.append(
            [
                row["name"],
                f"{row['student']:.3f}",
                apart,
                "" if "--method" in row["flags"] else f"{row['teachers']:.3f}",
            ]
        )
    return markdown(["", "student after round 3", "MACPO − it", "teachers after round 3"], rows)


def write_readme(file: Path) -> None:
    """Put the table between README's marks."""
    before, _, rest = file.read_text("utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    write_atomic(file, f"{before}{MARKS[0]}\n{readme_table()}{MARKS[1]}{after}")


def main(argv: list[str]) -> int:
    options = dict(word.lstrip("-").partition("=")[::2] for word in argv)
    if odd := options.keys() - {"collect", "hh"}:
        raise UserError(f"--{odd.pop()}: unknown; see the first lines of bench/results.py")
    if not (PLACE / "findings.toml").is_file():
        raise UserError(f"{PLACE}: is not here; start this from the project's folder")
    if "collect" in options:
        collect(Path(options["collect"] or "runs"))
    if "hh" in options:
        collect_hh(options["hh"])
    write_atomic(Path("RESULTS.md"), page())
    write_readme(Path("README.md"))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "what is not announced above is not done."))
