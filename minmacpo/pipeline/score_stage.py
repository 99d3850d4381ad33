"""The stage that scores given answers under a policy: how likely each of them is."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest

from minmacpo.core.batching import scoring_tokens
from minmacpo.core.scoring import perplexity, score
from minmacpo.data.records import Example, Sample
from minmacpo.pipeline.artifacts import Policy, Score, TextColumn
from minmacpo.pipeline.model_pool import LoadedModel, Session
from minmacpo.pipeline.stage import Stage, StageContext
from minmacpo.pipeline.stage_log import log_first_row
from minmacpo.runtime.files import batched, write_rows

SCORING_CHUNK = 2048  # texts of a source that are tokenized at a time, so that memory stays flat

Text = Example | Sample


def score_texts(
    session: Session, name: str, policy: Policy, texts: Mapping[str, TextColumn]
) -> Stage:
    """The stage with a file of scores for each of several columns of texts.

    The columns answer the same prompts and are scored side by side, so that a prompt which several
    answers share is computed once. A text longer than the context is counted; it has no score.

    Args:
        texts: the columns by the name of their file: {"teacher1": ...} makes teacher1.jsonl.
    """
    models = session.models

    def write_scores(context: StageContext) -> dict:
        loaded = models.get_policy(policy)
        columns = {file: column.read() for file, column in texts.items()}
        log_first_text(context, loaded, columns)
        budget = scoring_tokens(models.config.run.max_tokens_per_batch, models.device)
        scores = score_columns(context, loaded, columns, budget)
        if not context.dist.is_main:
            return {}

        for file, column in columns.items():
            write_rows(context.folder / f"{file}.jsonl", score_rows(column, scores[file]))
        counts = count_scores(scores.values())
        if counts["over_long"]:
            context.log(
                f"WARNING: {counts['over_long']} of {counts['texts']} texts are longer than the "
                f"context of {policy.base.name}"
            )
        return counts

    settings = models.settings(policy.base)
    settings["texts"] = {file: column.location for file, column in texts.items()}
    inputs = [policy.base.stage]
    if policy.adapter is not None:
        inputs.append(policy.adapter)
    inputs += [column.stage for column in texts.values()]
    return session.run.stage(
        name=name, kind="score/2", settings=settings, inputs=inputs, compute=write_scores
    )


def log_first_text(
    context: StageContext, loaded: LoadedModel, columns: Mapping[str, Sequence[Text]]
) -> None:
    """Log how the first text of the first column is read."""
    first_column = next(iter(columns.values()))
    row = None
    if first_column:
        first = first_column[0]
        row = loaded.render(first.prompt, first.response)
    log_first_row(context, loaded, "row", row)


def score_columns(
    context: StageContext,
    loaded: LoadedModel,
    columns: Mapping[str, Sequence[Text]],
    budget: int,
) -> dict[str, list[Score]]:
    """The scores of every column's texts, in their order; the same on all ranks.

    Args:
        budget: tokens of a forward pass, padding included.
    """
    scores: dict[str, list[Score]] = {file: [] for file in columns}
    total = sum(len(column) for column in columns.values())
    chunks = [batched(column, SCORING_CHUNK) for column in columns.values()]
    with context.progress(total, "text") as progress:
        for parts in zip_longest(*chunks, fillvalue=()):
            # --- The next texts of every column, side by side so that they share prompts
            rows = []  # of all columns
            owners = []  # for each row, the column's list of scores
            for file, part in zip(columns, parts, strict=True):
                for text in part:
                    rows.append(loaded.render(text.prompt, text.response))
                    owners.append(scores[file])

            # --- Score those that the model can read whole
            fitting = [row for row in rows if len(row.ids) <= loaded.context]
            logps = iter(
                score(
                    loaded.model,
                    fitting,
                    budget,
                    progress,
                    dist=context.dist,
                    log=context.log,
                    log_detail=context.log_detail,
                    packed=True,
                )
            )

            # --- Every score back to its column
            for row, owner in zip(rows, owners, strict=True):
                logp = next(logps) if len(row.ids) <= loaded.context else None
                owner.append(Score(logp=logp, tokens=sum(row.mask)))
    return scores


def score_rows(texts: Sequence[Text], scores: Sequence[Score]) -> Iterator[dict]:
    """The rows of a file of scores, one by one.

    A text without a score gets the highest perplexity there is, so that it is never preferred.
    """
    for text, entry in zip(texts, scores, strict=True):
        logp = -math.inf if entry.logp is None else entry.logp
        yield {
            "id": text.id,
            "logp": entry.logp,
            "tokens": entry.tokens,
            "perplexity": perplexity(logp, entry.tokens),
            "characters": len(text.response),
        }


def count_scores(columns: Iterable[Sequence[Score]]) -> dict[str, int]:
    """What stage.json says of the scores: texts, tokens that were scored, texts without a score."""
    counts = {"texts": 0, "tokens": 0, "over_long": 0}
    for scores in columns:
        for entry in scores:
            counts["texts"] += 1
            if entry.logp is None:
                counts["over_long"] += 1
            else:
                counts["tokens"] += entry.tokens
    return counts
