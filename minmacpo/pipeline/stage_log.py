"""What stages log of their rows: the first of them as tokens, and how many were dropped."""

from collections.abc import Mapping

from minmacpo.data.tokenizer import Tokens, show_mask
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.stage import StageContext


def log_first_row(
    context: StageContext, loaded: LoadedModel, label: str, row: Tokens | None
) -> None:
    """Log a row with its mask: at most 200 characters before its answer, and 200 of that."""
    if row is None:
        context.log_detail(f"first {label}: none")
        return
    text = show_mask(loaded.tokenizer, row)
    answer_start = text.find("⟦")  # what stands under the mask begins with this bracket
    start = max(0, answer_start - 200)
    shown = text[start : start + 400]
    context.log_detail(f"first {label}: {shown}")


def warn_dropped(context: StageContext, dropped: Mapping[str, int], remaining: int) -> None:
    """Log a warning where more than a tenth of a stage's rows was dropped.

    Args:
        dropped: how many, by reason.
    """
    total = sum(dropped.values())
    rows = total + remaining
    if total <= 0.1 * rows:
        return
    reasons = []
    for reason, count in dropped.items():
        if count > 0:
            reasons.append(f"{reason} {count}")
    context.log(f"WARNING: {total} of {rows} rows were dropped ({', '.join(reasons)})")
