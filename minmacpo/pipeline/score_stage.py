"""The stage that scores given answers under a model."""

import math
import struct
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import IO

from minmacpo.core.scoring import perplexity, score
from minmacpo.pipeline.base_models import Base
from minmacpo.pipeline.model_pool import Session, TextColumn
from minmacpo.pipeline.run import Stage, StageContext
from minmacpo.pipeline.stage_log import show_first
from minmacpo.runtime.files import batched, with_path, write_rows

WINDOW = (
    2048  # texts that are rendered and scored at a time: memory does not grow with their number
)


UNSCORED = math.inf  # a log-probability that no text has


FOUND = struct.Struct(
    "dq"
)  # of a text its log-probability (UNSCORED: longer than the context), and its tokens


def scored_together(
    session: Session,
    work: StageContext,
    base: Base,
    adapter: Stage | None,
    group: Sequence[TextColumn],
) -> dict[tuple, IO]:
    """What was found of all texts of the group, by TextColumn.key, each a FOUND in a nameless file ({} for all ranks but the main
    one); WINDOW of each in one pass, so that answers to one prompt share it; kept for the group's next stage."""
    key = (base.stage.fingerprint, adapter and adapter.fingerprint, *(texts.key for texts in group))
    if session.scored[0] != key:
        session.scored = None, {}
        loaded, given = session.use(base, adapter), [texts.read() for texts in group]
        context = loaded.model.config.max_position_embeddings
        found = {
            texts.key: tempfile.TemporaryFile(dir=work.folder.parent)
            for texts in group
            if work.dist.is_main
        }
        with work.progress(sum(map(len, given)), "text") as progress:
            for run in zip_longest(*(batched(texts, WINDOW) for texts in given), fillvalue=()):
                rows = [
                    [session.render(loaded, text.prompt, text.response) for text in part]
                    for part in run
                ]
                short = [row for part in rows for row in part if len(row.ids) <= context]
                logps = iter(
                    score(
                        loaded.model,
                        short,
                        session.score_tokens,
                        progress,
                        work.dist,
                        work.log,
                        packed=True,
                    )
                )
                for file, part in zip(found.values(), rows, strict=work.dist.is_main):
                    with with_path(work.folder.parent):
                        file.write(
                            b"".join(
                                FOUND.pack(
                                    next(logps) if len(row.ids) <= context else UNSCORED,
                                    sum(row.mask),
                                )
                                for row in part
                            )
                        )
        session.scored = key, found
    return session.scored[1]


def score_rows(texts: Sequence, file: IO, counts: dict[str, int]) -> Iterator[dict]:
    """The rows of scores.jsonl from what `scored_together` found; counts them."""
    file.seek(0)
    found = (
        each
        for run in iter(lambda: file.read(FOUND.size * WINDOW), b"")
        for each in FOUND.iter_unpack(run)
    )
    for text, (logp, tokens) in zip(texts, found, strict=True):
        known = logp != UNSCORED
        counts["texts"] += 1
        counts["tokens"] += tokens * known
        counts["over_long"] += not known
        yield {
            "id": text.id,
            "logp": logp if known else None,
            "tokens": tokens,
            "perplexity": perplexity(logp if known else -math.inf, tokens),
            "characters": len(text.response),
        }


def score_texts(
    session: Session,
    name: str,
    base: Base,
    adapter: Stage | None,
    texts: TextColumn,
    among: Sequence[TextColumn] = (),
) -> Stage:
    """Log-probability and perplexity of given texts, end token included, as scores.jsonl (2.4). A text longer
    than the model's context is counted; it has no log-probability, and the highest perplexity there is. `among`: these and
    others for the same prompts, which are scored together."""
    group = [*among] or [texts]

    def write_scores(work: StageContext) -> dict:
        """One row per text, in their order."""
        found = scored_together(session, work, base, adapter, group)
        loaded, given, counts = (
            session.use(base, adapter),
            texts.read(),
            {"texts": 0, "tokens": 0, "over_long": 0},
        )
        show_first(
            work,
            loaded,
            "row",
            [session.render(loaded, text.prompt, text.response) for text in islice(given, 1)],
        )
        if not work.dist.is_main:
            return {}
        write_rows(work.folder / "scores.jsonl", score_rows(given, found[texts.key], counts))
        if long := counts["over_long"]:
            work.log(
                f"WARNING: {long} of {counts['texts']} texts are longer than the context of {base.name}"
            )
        return counts

    inputs = [base.stage, adapter, texts.stage, *(other.stage for other in group if other != texts)]
    return session.stage(
        name, "score/1", texts.settings | session.quantised(base), inputs, write_scores
    )
