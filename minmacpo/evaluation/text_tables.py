"""The table of a run as text: which columns it has, and how it and large numbers are written for a terminal."""

from collections.abc import Sequence

from minmacpo.evaluation.html import words
from minmacpo.runtime.progress import aligned

COLUMNS = {  # of the printed table: key, heading, how it is written
    "gold": ("gold", "{gold:.3f} [{gold_interval[0]:.3f}, {gold_interval[1]:.3f}]"),
    "right": ("right", "{right:.3f} ±{right_half:.2f}"),
    "polite": ("polite", "{polite:.3f} ±{polite_half:.2f}"),
    "well_formed": ("formed", "{well_formed:.3f} ±{well_formed_half:.2f}"),
    "pgr": ("PGR", "{pgr:.2f}"),
    "perplexity": ("ppl", "{perplexity:.3f}"),
    "perplexity_char": ("ppl/char", "{perplexity_char:.3f}"),
    "accuracy": ("pref.acc", "{accuracy:.3f}"),
    "length": ("chars", "{length:.1f}"),
    "hit_length": ("cut", "{hit_length:.3f}"),
    "refusals": ("refusals", "{refusals:.3f}"),
    "distinct2": ("distinct-2", "{distinct2:.3f}"),
    "self_bleu": ("self-BLEU", "{self_bleu:.3f}"),
}


SIGNS = ("surprise", "entropy", "kl", "same", "similarity", "loops")  # of the monitor, in tables


def tables(table: dict) -> list[tuple[list[str], list[list[str]]]]:
    """(head, rows) of text: every agent at every round, with several files each of them below; whose answers
    the student chose, and how often they were right; how wrong the cached negatives are."""
    keys = [key for key in COLUMNS if any(key in row for row in table["rows"])]
    results, filtered, negatives = [], [], []
    for row in table["rows"]:
        parts = (
            {f"  {file}": part for file, part in row["files"].items()}
            if len(row["files"]) > 1
            else {}
        )
        for name, part in ({row["label"]: row} | parts).items():
            half = {
                f"{key}_half": (part[f"{key}_interval"][1] - part[f"{key}_interval"][0]) / 2
                for key in keys
                if f"{key}_interval" in part
            }
            cells = [
                "–" if part.get(key) is None else COLUMNS[key][1].format(**part, **half)
                for key in keys
            ]
            results.append([name, *cells])
    names = sorted(
        {name for row in table["filter"] for name in row["sources"]},
        key=lambda name: (len(name), name),
    )
    for row in table["filter"]:
        sources = row["sources"] | {"all": {"won": 1, "right": row["right"]}}
        shares = [sources.get(name, {"won": 0, "right": None}) for name in (*names, "all")]
        right = [
            "" if share["right"] is None else f" ({share['right']:.0%} right)" for share in shares
        ]
        cells = [f"{share['won']:.0%}{text}" for share, text in zip(shares, right, strict=True)]
        best = "–" if row.get("offered") is None else f"{row['offered']:.0%}"
        filtered.append([str(row["round"]), *cells, best])
    for row in table["negatives"]:
        wrong = "–" if row["wrong"] is None else f"{row['wrong']:.0%}"
        negatives.append(
            [words(row["agent"]), wrong, ", ".join(f"{share:.1%}" for share in row["equal"])]
        )
    watched = [
        [
            f"{words(row['agent'])}, round {row['round']}",
            *("–" if row.get(sign) is None else f"{row[sign]:.3f}" for sign in SIGNS),
            ", ".join(row["alarms"]),
        ]
        for row in table["monitor"]
    ]
    return [
        ([f"{table['run']} ({table['method']})", *(COLUMNS[key][0] for key in keys)], results),
        (["chosen in round", *map(words, names), "all", "any right"], filtered),
        (["negatives of", "wrong", "equal to their positive, by round"], negatives),
        (["monitor", *SIGNS, "alarms"], watched),
    ]


def format_table(table: dict) -> str:
    """The tables for a terminal."""
    parts = [aligned(head, rows) for head, rows in tables(table) if rows]
    return "\n".join(
        ["\n\n".join(parts), *(f"WARNING: {warning}" for warning in table["warnings"])]
    )


def bracketed(values: Sequence[float], form: str = ".3f") -> str:
    """[mean, low, high] as text, a dash of nothing."""
    return "{:{f}} [{:{f}}, {:{f}}]".format(*values, f=form) if values else "–"
