"""The section of RESULTS.md on real dialogues."""

from bench.markdown import formatted, markdown_table, named_values, round_names
from bench.results.real_plan import PARTS
from bench.results.store import read_result
from minmacpo.evaluation.reward_model import is_informative
from minmacpo.evaluation.text_tables import bracketed

HEAD = (
    "student",
    "seeds",
    "perplexity of true answers, by seed",
    "its logarithm − naive SFT's [95 %]",
    "preference accuracy",
    "win rate over naive SFT, by the reward model",
    "the reward model's held-out accuracy",
    "the world: win rate by gold reward",
    "characters",
)


def section(results: dict, finding: str) -> str:
    """What happened on real files, beside what the world predicted.

    Args:
        results: the content of assets/results/real.json.
        finding: what the experiments say, written by hand.
    """
    parts = ["## Real files\n", introduction(results), finding]

    parts.append("First human turns are in one split each:\n")
    rows = []
    for source, counts in results["split"]["rows"].items():
        row = [source]
        for part in PARTS:
            row.append(str(counts[part]))
        rows.append(row)
    parts.append(markdown_table(["rows of", *PARTS], rows))

    if results["splits"]:
        parts.append(splits_table(results["splits"]))
    if results["bases"]:
        parts.append(bases_table(results["bases"]))
    for name, experiment in results["experiments"].items():
        parts.append(experiment_text(name, experiment))
    return "\n".join(parts)


def introduction(results: dict) -> str:
    """How the section was made."""
    full = ", --full" if results["full"] else ""
    seeds = ", ".join(results["bases"]) or "none"
    commits = ", ".join(results["commits"]) or "none"
    cost = sum(results["spent"].values())
    for bases in results["bases"].values():
        for base in bases.values():
            cost += base["cpu_seconds"]
    return (
        "`python -m bench.results.real --helpful=FILE --harmless=FILE --pku=FILE --alpaca=FILE` "
        f"(sizes: `minmacpo/config/presets/hh-real.toml{full}`; experiments: "
        "`bench/results/real.toml`), then `--collect` and `python -m bench.results`. "
        f"Seeds of which bases are finished: {seeds}; {cost:,.0f} CPU seconds. "
        "Brackets are 95 % bootstraps over seeds, then prompts. "
        f"Commits of the stages: {commits}.\n"
    )


def splits_table(splits_of_group: dict[str, dict]) -> str:
    """What became of the rows of every split, by group of runs."""
    rows = []
    for group, splits in splits_of_group.items():
        row = [group]
        for part in ("d1", "d2", "test"):
            row.append(named_values(splits[part]))
        rows.append(row)
    return markdown_table(["used by", "d1", "d2", "test"], rows)


def bases_table(bases_of_seed: dict[str, dict]) -> str:
    """Sizes and last losses of the bases."""
    rows = []
    for base, notes in next(iter(bases_of_seed.values())).items():
        counts = notes["counts"]
        losses = []
        for bases in bases_of_seed.values():
            losses.append(bases[base]["counts"]["loss"])
        rows.append(
            [
                base,
                f"{counts['parameters']:,}",
                f"{counts['rows']:,}",
                f"{counts['tokens']:,}",
                " / ".join(formatted(losses, ".2f")),
            ]
        )
    head = ["base", "parameters", "documents", "tokens trained on", "last loss, by seed"]
    return markdown_table(head, rows)


def experiment_text(name: str, experiment: dict) -> str:
    """Table and curves of one experiment, or why there is none."""
    head = f"### {name}\n\n*{experiment['question']}*\n"
    if not experiment["rows"]:
        reason = "no run was finished"
        if experiment["missing"]:
            reason = f"no file of {', '.join(experiment['missing'])} was given"
        return f"{head}\nNot measured: {reason}.\n"

    students = []
    finished = 0
    for row in experiment["rows"]:
        if "by_round" in row:
            students.append(row)
            finished += len(row["seeds"])
    progress = ""
    if finished < experiment["wanted"]:
        progress = f"{finished} of {experiment['wanted']} runs are finished.\n"
    table = [cells(experiment["world"], row) for row in experiment["rows"]]
    return "\n".join([head, progress, markdown_table(HEAD, table), curves_table(students)])


def curves_table(students: list[dict]) -> str:
    """Three measures of every student, by round."""
    longest = max(len(row["by_round"]["perplexity"]) for row in students)
    lines = []
    for row in students:
        label = f"{row['group']}: {row['name']}"
        curves = [
            ("perplexity", ".1f", row["by_round"]["perplexity"]),
            ("its teachers'", ".1f", row["teachers"]),
            ("distinct-2", ".2f", row["by_round"]["distinct2"]),
        ]
        for measure, digits, values in curves:
            line = [f"{label}, {measure}"]
            for value in values:
                text = ""
                if value is not None:
                    text = format(value, digits)
                line.append(text)
            empty = longest + 1 - len(line)
            lines.append(line + [""] * empty)
    return markdown_table(["by round", *round_names(longest)], lines)


def cells(world: dict, row: dict) -> list[str]:
    """A row of an experiment's table.

    Args:
        world: {variant: where the same comparison stands in assets/results}.
    """
    wins, trust = judged(row)
    nats = bracketed(row["nats"], "+.3f")
    if row["name"].startswith("naive SFT") and not any(row["nats"]):
        # It is compared with itself
        nats = ""
        wins = ""
    return [
        f"{row['group']}: {row['name']}",
        str(len(row["seeds"])),
        " / ".join(formatted(row["perplexity"], ".1f")),
        nats,
        bracketed(row["prefers"]),
        wins,
        trust,
        predicted(world, row),
        f"{row['length']:.0f}",
    ]


def judged(row: dict) -> tuple[str, str]:
    """(What the reward model says of a row, how far it can be trusted)."""
    wins = bracketed(row["wins"])
    trust = bracketed(row["trust"], ".2f")
    if not is_informative(row["trust"][1:]):
        return f"{wins}, not informative", f"{trust}: not informative"
    return wins, trust


def predicted(world: dict, row: dict) -> str:
    """What the gold-reward world has for the same comparison: the win rate over naive SFT."""
    if row["name"] not in world:
        return "–"
    file, group, name = world[row["name"]]
    result = read_result(file) or {"variants": []}
    for variant in result["variants"]:
        if (variant.get("group", ""), variant["name"]) == (group, name):
            return bracketed(variant["wins"])
    return "–"
