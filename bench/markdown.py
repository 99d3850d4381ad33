"""Tables in markdown, for BENCHMARKS.md and RESULTS.md."""

from collections.abc import Iterable, Mapping, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, ended by a line break."""
    text = ""
    for cells in [head, ["---"] * len(head), *rows]:
        text += f"| {' | '.join(cells)} |\n"
    return text


def formatted(values: Iterable[float], digits: str) -> list[str]:
    """Every value with so many digits; `digits` as in format(): ".3f"."""
    return [format(value, digits) for value in values]


def round_names(count: int) -> list[str]:
    """The heads of so many columns, one for each round."""
    return [f"r{t}" for t in range(count)]


def named_values(values: Mapping, digits: str = "") -> str:
    """Values with their names, in one line."""
    return ", ".join(f"{name} {value:{digits}}" for name, value in values.items())
