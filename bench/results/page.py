"""RESULTS.md, and README's table, from assets/results.

    python -m bench.results [--collect=runs] [--hh=RUN]

--collect takes results.json of every finished experiment (`python train.py @experiment-NAME`) of a
run root, and what its default run cost, into assets/results; --hh does so with a finished `@hh`
run, and `python -m bench.results.real --collect` with the benchmark on real files. findings.toml
there is written by hand: what each experiment says, and which claims of the paper hold in this
world.
"""

import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.markdown import formatted, markdown_table, named_values, round_names
from bench.results import real_page
from bench.results.store import PLACE, read_result
from minmacpo import UserError
from minmacpo.evaluation.experiment_results import HEAD, result_cells
from minmacpo.evaluation.finished_run import read_run
from minmacpo.evaluation.table import make_table
from minmacpo.evaluation.text_tables import format_table
from minmacpo.runtime.files import read_json, write_atomic, write_json

# Around README's table
MARKS = ("<!-- made by python -m bench.results -->", "<!-- as far as here -->")
ORDER = (
    "main", "ablations", "rounds", "selection", "self", "negatives", "loss", "lengths",
    "conditions", "teachers", "domains", "sizes", "noise",
)  # fmt: skip
COST_KEYS = ("kind", "cpu_seconds", "tokens", "peak_mb")
INTRO = """# Results

Every number on this page comes from the built-in world (`@world`, gold reward in [0, 1] on 320
held-out prompts, two sampled answers each), but for the sections on files at its end. `python
train.py @experiment-NAME` runs an experiment and writes its table; `python -m bench.results
--collect=runs` makes this page. Brackets are 95 % bootstraps of the paired difference over seeds,
then prompts; with two seeds they say little about other seeds, with one nothing. Seeds 0 and 1 were
used to choose settings and the monitor's thresholds; seeds 2 to 4 were run once, afterwards.
"Collapsed" counts seeds whose last student is below 97 % of its best round; "alarm in" is the first
round in which the monitor, which sees no gold label, warned of the student. CPU seconds and tokens
are those of all stages of one run, shared ones included.
"""


def page() -> str:
    """RESULTS.md."""
    written = tomllib.loads((PLACE / "findings.toml").read_text("utf-8"))
    findings = written["findings"]
    claims = []
    for claim in written["claims"]:
        claims.append([claim["says"], claim["verdict"], claim["why"]])
    parts = [INTRO, "## What the paper says, and what holds here\n"]
    parts.append(markdown_table(["claim", "in this world", "why"], claims))

    experiments = []
    for name in ORDER:
        result = read_result(name)
        if result:
            experiments.append(result)
            parts.append(experiment_section(result, findings.get(result["name"], "")))

    mechanism = read_result("mechanism")
    if mechanism:
        parts.append(mechanism_section(mechanism, findings.get("mechanism", "")))
    parts.append(monitor_section(experiments))
    parts.append(findings.get("monitor", "") + "\n")

    cost = read_result("cost")
    if cost:
        parts.append("## What the default run costs (seed 0)\n\n" + cost_table(cost["stages"]))
    hh = PLACE / "hh.md"
    if hh.is_file():
        parts.append(hh.read_text("utf-8"))
    real = read_result("real")
    if real:
        parts.append(real_page.section(real, findings.get("real", "")))
    return "\n".join(parts)


# ---- experiments ----------------------------------------------------------------------------


def experiment_section(result: dict, finding: str) -> str:
    """Question, table, student by round where there are many, and what was found."""
    variants = result["variants"]
    name = result["name"]
    seeds = ",".join(map(str, result["seeds"]))
    command = f"`python train.py @experiment-{name} --seeds={seeds}`"
    parts = [f"## {name}\n", f"*{result['question']}* {command}\n", f"{cost_of(variants)}\n"]
    if any(row.get("group") for row in variants):
        return "\n".join([*parts, *crossed_tables(name, variants), finding + "\n"])

    parts += [markdown_table(HEAD, map(result_cells, variants)), finding + "\n"]
    longest = max(len(row["by_round"]) for row in variants)
    rounds = ["student", *round_names(longest)]
    parts.append(curves_table(rounds, variants, "by_round"))
    if len(result["seeds"]) > 2:
        labels = ["last round"]
        for seed in result["seeds"]:
            labels.append(f"seed {seed}")
        parts.append(curves_table(labels, variants, "by_seed"))
    return "\n".join(parts)


def curves_table(head: list[str], variants: list[dict], measure: str) -> str:
    """A list of numbers of every variant."""
    rows = []
    for row in variants:
        rows.append([row["name"], *formatted(row[measure], ".3f")])
    return markdown_table(head, rows)


def cost_of(variants: list[dict]) -> str:
    """How many runs an experiment has and what they took.

    A stage that several runs share is counted once where that is known.
    """
    shared_are_known = all("spent" in row for row in variants)
    measure = "spent" if shared_are_known else "cpu_seconds"
    how = "stages that runs share counted in each"
    if shared_are_known:
        how = "beside stages that other runs had made"

    runs = 0
    seconds = 0.0
    for row in variants:
        count = len(row["seeds"])
        runs += count
        seconds += row[measure] * count
    seeds = ", ".join(map(str, variants[0]["seeds"]))
    return f"Seeds {seeds}; {runs} runs, {seconds:,.0f} CPU seconds ({how})."


@dataclass(frozen=True, slots=True)
class Figure:
    """A table of an experiment with groups: its title, and the text of a cell ("": nothing)."""

    title: str
    text: Callable[[dict], str]


def interval(values: list[float]) -> str:
    """A difference with its interval, nothing where there is nothing to tell."""
    if not any(values):
        return ""
    return difference_text(values)


def difference_text(values: list[float]) -> str:
    """A difference with its interval."""
    difference, low, high = values
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def kept_text(row: dict) -> str:
    """The student that rolling back keeps, where an alarm was raised."""
    if not any(row["alarms"]):
        return ""
    return f"{row['kept']:.3f}"


def pgr_text(row: dict) -> str:
    """The performance gap recovered, where it is known."""
    if row["pgr"] is None:
        return ""
    return f"{row['pgr']:.2f}"


def right_text(row: dict) -> str:
    """How often the chosen answer is right, and how often any answer was."""
    if row["offered"] is None:
        return ""
    return f"{row['right']:.0%} / {row['offered']:.0%}"


def different_text(row: dict) -> str:
    """How many of the answers to a prompt differ, where there are several."""
    if row["different"] is None:
        return ""
    return f"{row['different']:.0%}"


FIGURES = {
    "student": Figure("student, last round", lambda row: f"{row['student']:.3f}"),
    "difference": Figure("first variant − it [95 %]", lambda row: interval(row["difference"])),
    "gain": Figure("gain over naive SFT [95 %]", lambda row: interval(row["gain"])),
    "kept": Figure("student that macpo.stop = rollback keeps", kept_text),
    "teachers": Figure("teachers, last round", lambda row: f"{row['teachers']:.3f}"),
    "pgr": Figure("PGR", pgr_text),
    "right": Figure("chosen right / any right", right_text),
    "different": Figure("different answers to a prompt, share", different_text),
    "lengths": Figure(
        "characters of an answer, last round (round 0)",
        lambda row: "{1:.0f} ({0:.0f})".format(*row["lengths"]),
    ),
    "cost": Figure(
        "CPU seconds of a run, shared stages included", lambda row: f"{row['cpu_seconds']:.0f}"
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


def crossed_tables(name: str, rows: list[dict]) -> list[str]:
    """Variants against groups, a table for each figure of the experiment."""
    row_at = {}
    groups = {}  # used as an ordered set, like the next
    variants = {}
    for row in rows:
        row_at[row["group"], row["name"]] = row
        groups[row["group"]] = None
        variants[row["name"]] = None

    tables = []
    for label in SHOWN.get(name, FIGURES):
        figure = FIGURES[label]
        lines = []
        for variant in variants:
            texts = [figure.text(row_at[group, variant]) for group in groups]
            if any(texts):
                lines.append([variant, *texts])
        tables.append(markdown_table([figure.title, *groups], lines))
    return tables


# ---- the monitor, the mechanism, the cost ---------------------------------------------------


def monitor_section(experiments: list[dict]) -> str:
    """Alarms against collapses, over all variants and seeds; seeds 0 and 1 apart."""
    head = [
        "runs",
        "collapsed, alarm",
        "not collapsed, alarm (false alarm, or never rose)",
        "collapsed, no alarm (miss)",
        "neither",
    ]
    counts = {"seeds 0 and 1": [0] * 4, "other seeds": [0] * 4}
    counted = set()
    for result in experiments:
        for row in result["variants"]:
            outcomes = zip(row["seeds"], row["alarms"], row["collapsed"], strict=True)
            for seed, alarm, has_collapsed in outcomes:
                run = (row["flags"], seed)
                if run in counted:
                    continue  # the same run in two experiments
                counted.add(run)
                column = 0
                if alarm is None:
                    column += 2
                if not has_collapsed:
                    column += 1
                label = "other seeds"
                if seed in (0, 1):
                    label = "seeds 0 and 1"
                counts[label][column] += 1

    rows = []
    for label, numbers in counts.items():
        rows.append([label, *map(str, numbers)])
    return "## The monitor\n\n" + markdown_table(head, rows)


def mechanism_section(result: dict, finding: str) -> str:
    """Whose answers are how familiar to whom, by round (mechanism.py)."""
    runs = ", ".join(result["runs"])
    parts = [
        "## The mechanism\n",
        "Median perplexity of an answer under a policy as it stands before the round, "
        f"mean of {runs} (`python -m bench.results.mechanism RUN RUN`).\n",
    ]
    for t, measured in result["rounds"].items():
        rows = []
        for label, perplexity_under in measured["perplexity"].items():
            policies = list(perplexity_under)
            rows.append([label, *formatted(perplexity_under.values(), ".3f")])
        head = [f"round {t}: answers"]
        for policy in policies:
            head.append(f"under {policy}")
        parts.append(markdown_table(head, rows))

        shares = named_values(measured["teachers right"], ".0%")
        parts.append(f"Prompts by how many teachers are right: {shares}.\n")
    return "\n".join([*parts, finding + "\n"])


def cost_table(stages: list[dict]) -> str:
    """CPU seconds by kind of stage of one run, the most expensive kind first."""
    seconds: dict[str, float] = {}
    tokens = Counter()
    counts = Counter()
    total = 0.0
    peak = 0
    for stage in stages:
        kind = stage["kind"].partition("/")[0]
        seconds[kind] = seconds.get(kind, 0.0) + stage["cpu_seconds"]
        tokens[kind] += stage["tokens"] or 0
        counts[kind] += 1
        total += stage["cpu_seconds"]
        peak = max(peak, stage["peak_mb"])

    rows = []
    for kind in sorted(seconds, key=seconds.get, reverse=True):
        rows.append([kind, str(counts[kind]), f"{seconds[kind]:.1f}", f"{tokens[kind]:,}"])
    rows.append(["**all**", str(len(stages)), f"**{total:.0f}**", f"peak {peak} MB"])
    return markdown_table(["kind of stage", "stages", "CPU seconds", "tokens"], rows)


def hh_section(counts_of: dict[str, dict], table: str, cost: list[dict]) -> str:
    """A run on HH-RLHF files: what the reader counted, the table, the cost.

    Args:
        counts_of: {file or split: {reason: rows}}.
    """
    rows = []
    for name, counts in counts_of.items():
        rows.append([name, named_values(counts)])
    return "\n".join(
        [
            "## HH-RLHF: both official test files as one mixture\n",
            "`python train.py @hh --data.path=FOLDER`; tiny bases made from a part of the same "
            "files, so this shows the code on real dialogues, not what MACPO does to a 7B model. "
            "Learning rates were not tuned.\n",
            markdown_table(["file or split", "rows"], rows),
            f"```\n{table}\n```\n",
            cost_table(cost),
        ]
    )


# ---- collecting -----------------------------------------------------------------------------


def collect_experiments(root: Path, place: Path = PLACE) -> None:
    """Take what the experiments of a run root found, if they were made as their presets say."""
    for file in sorted(root.glob("experiment-*/results.json")):
        result = read_json(file)
        name = result["name"]
        earlier = read_result(name, place)
        if result["shared"]:
            print(f"{file}: left out, it was made with {' '.join(result['shared'])}")
        elif earlier and not set(earlier["seeds"]) <= set(result["seeds"]):
            print(f"{file}: left out, it lacks seeds that {place / name}.json has")
        else:
            write_json(place / f"{name}.json", result)


def cost_rows(table: dict, linked: bool) -> list[dict]:
    """The cost of every stage of a table; `linked`: also of those taken from other runs."""
    rows = []
    for row in table["cost"]:
        if linked or not row["linked_from"]:
            rows.append({name: row[name] for name in COST_KEYS})
    return rows


def collect(root: Path) -> None:
    """Take all that a run root has for the page: experiments, and its default run's cost."""
    if not root.is_dir():
        raise UserError(f"--collect={root}: expected the folder that holds the runs")
    collect_experiments(root)
    if (root / "world").is_dir():
        table = make_table(read_run(root / "world"))
        write_json(PLACE / "cost.json", {"stages": cost_rows(table, linked=False)})


def collect_hh(folder: str) -> None:
    """Take the counts, the table and the cost of a run on HH-RLHF files, as hh.md."""
    run = read_run(folder)
    counts = run.metadata["data/slices"]["counts"]
    documents = {}
    for name, note in run.metadata.items():
        if "/corpus_" in name:
            documents[name.removeprefix("data/corpus_")] = note["counts"]["documents"]

    counts_of = counts["rows"] | counts["splits"]
    counts_of["repeated prompts left out"] = counts["repeated prompts left out"]
    counts_of["d0, documents"] = documents
    table = make_table(run)
    section = hh_section(counts_of, format_table(table), cost_rows(table, linked=True))
    commit = next(iter(run.metadata.values()))["commit"]
    write_atomic(PLACE / "hh.md", f"{section}\nMeasured at commit {commit}.\n")


# ---- README ---------------------------------------------------------------------------------


def readme_table() -> str:
    """The main table and the ablations as README shows them, between its two marks."""
    main_rows = read_result("main")["variants"]
    ablations = read_result("ablations")["variants"]
    first = main_rows[0]
    for row in main_rows:
        if row["flags"] == "--method=sft":
            naive = row

    start = f"({naive['teachers']:.3f} at round 0)"
    teachers = f"**{first['teachers']:.3f}** {start}"
    rows = [[f"**{first['name']}**", f"**{first['student']:.3f}**", "", teachers]]
    for row in [*main_rows[1:], *ablations[1:]]:
        teachers = ""
        if "--method" not in row["flags"]:
            teachers = f"{row['teachers']:.3f}"
        difference = difference_text(row["difference"])
        rows.append([row["name"], f"{row['student']:.3f}", difference, teachers])
    head = ["", "student after round 3", "MACPO − it", "teachers after round 3"]
    return markdown_table(head, rows)


def write_readme(file: Path) -> None:
    """Put the table between README's marks."""
    before, _, rest = file.read_text("utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    write_atomic(file, f"{before}{MARKS[0]}\n{readme_table()}{MARKS[1]}{after}")


def main(argv: list[str]) -> int:
    """Write RESULTS.md and README's table; returns the exit code."""
    options = {}
    for word in argv:
        name, _, value = word.lstrip("-").partition("=")
        if name not in ("collect", "hh"):
            raise UserError(f"--{name}: unknown; see the first lines of bench/results/page.py")
        options[name] = value
    if not (PLACE / "findings.toml").is_file():
        raise UserError(f"{PLACE}: is not here; start this from the project's folder")

    if "collect" in options:
        collect(Path(options["collect"] or "runs"))
    if "hh" in options:
        collect_hh(options["hh"])
    write_atomic(Path("RESULTS.md"), page())
    write_readme(Path("README.md"))
    return 0
