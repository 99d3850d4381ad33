"""What stages log of their rows, and how they drop rows with counted reasons."""

from collections.abc import Callable, Sequence

from minmacpo.data.tokenizer import Tokens, show_mask
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.run import StageContext


def show_first(work: StageContext, loaded: LoadedModel, what: str, rows: Sequence[Tokens]) -> None:
    """Log the first of `rows` with its mask: at most 200 characters before its answer, and 200 of that."""
    text = show_mask(loaded.tokenizer, rows[0]) if rows else "none"
    work.log(f"first {what}: {text[max(0, text.find('⟦') - 200) :][:400]}")


def sift(found: list[tuple], problems: dict[str, Callable]) -> tuple[list[tuple], dict[str, int]]:
    """(all that has none of the problems, how much was dropped for which)."""
    reasons = [
        next((name for name, holds in problems.items() if holds(*each)), None) for each in found
    ]
    kept = [each for each, reason in zip(found, reasons, strict=True) if reason is None]
    return kept, {name: reasons.count(name) for name in problems}


def warn_of(work: StageContext, dropped: dict[str, int], kept: int) -> None:
    """Log a warning where more than a tenth of a stage's rows was dropped."""
    if (gone := sum(dropped.values())) > 0.1 * (gone + kept):
        words = ", ".join(f"{name} {count}" for name, count in dropped.items() if count)
        work.log(f"WARNING: {gone} of {gone + kept} rows were dropped ({words})")
