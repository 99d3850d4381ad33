"""The stage that pairs the answers an agent chooses with its negatives."""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat

from minmacpo.core.scoring import score
from minmacpo.data.records import Pair
from minmacpo.data.tokenizer import Tokens
from minmacpo.method.selection import CandidateSet, Choice, keep_familiar, offered, select, weighted
from minmacpo.pipeline.base_models import Base
from minmacpo.pipeline.model_pool import LoadedModel, Session, TextColumn
from minmacpo.pipeline.run import Stage, StageContext
from minmacpo.pipeline.score_stage import WINDOW
from minmacpo.pipeline.stage_log import show_first, sift, warn_of
from minmacpo.runtime.files import JsonlView, batched, iter_rows, write_rows


def negative_finder(negatives: TextColumn, familiar: Stage) -> Callable[[str], tuple | None]:
    """A function that gives the negative answer to the prompt of an id with its scores, once; None if there is none. Where
    prompts come in the order of their negatives, it holds none of them."""
    passed, rest = {}, zip(negatives.read(), iter_rows(familiar.path / "scores.jsonl"), strict=True)

    def find(id: str) -> tuple | None:
        for bad, known in rest if id not in passed else ():
            passed[bad.id] = bad, known
            if bad.id == id:
                break
        return passed.pop(id, None)

    return find


def matched(
    session: Session,
    loaded: LoadedModel,
    winners: Iterable[tuple[list[Choice], bool]],
    find: Callable[[str], tuple | None],
    heard: bool,
    counts: Counter,
) -> Iterator[tuple[Pair, Tokens, Tokens]]:
    """(pair, its chosen and its rejected row) for the winners of every prompt that is kept and has a negative; counts the others.
    `heard`: see `pairs`."""
    for choices, kept in winners:
        negative = find(choices[0][1].id)
        counts["not_kept"] += not kept
        counts["no_negative"] += negative is None  # its question was too long (feedback.ask)
        for who, good, values in choices if kept and negative else ():
            bad, known = negative
            weighs = session.config.macpo.pair_weighting == "agreement" and "agreement" in values
            rows = [session.render(loaded, good.prompt, text.response) for text in (good, bad)]
            yield (
                Pair(
                    good.id,
                    good.prompt,
                    good.response,
                    bad.response,
                    who,
                    getattr(bad, "agent", "data"),
                    values["perplexity"] * sum(rows[0].mask) if heard else None,
                    known["logp"],
                    good.meta,
                    math.exp(values["agreement"]) if weighs else None,
                ),
                *rows,
            )


def pairs(
    session: Session,
    name: str,
    base: Base,
    candidates: Sequence[CandidateSet],
    negatives: TextColumn,
    reference: Stage | None,
    familiar: Stage,
    own: tuple[str, float],
    key: tuple,
    heard: bool = False,
) -> Stage:
    """pairs.jsonl: per prompt the selected candidate against the agent's own negative (R3, R5). `familiar` holds
    the negatives' logps under the reference; those of the chosen answers are computed here, unless the reference was
    who found their perplexity (`heard`). A pair that cannot be used is dropped and counted."""
    settings = session.config.macpo

    def write_pairs(work: StageContext) -> dict:
        """Choose, pair, drop what cannot be used, and store the reference logps, WINDOW pairs at a time."""
        loaded, counts = session.use(base, reference), Counter()
        kept = (
            keep_familiar(winners(), settings.keep_fraction)
            if settings.keep_fraction < 1
            else repeat(True)
        )
        found = matched(
            session,
            loaded,
            zip(winners(), kept, strict=False),
            negative_finder(negatives, familiar),
            heard,
            counts,
        )
        unusable = {
            "all_empty": lambda pair, *rows: not pair.chosen,
            "negative_empty": lambda pair, *rows: not pair.rejected,
            "negative_equal": lambda pair, *rows: pair.chosen == pair.rejected,
            "over_long": lambda pair, *rows: any(len(row.ids) > loaded.limit for row in rows),
        }

        def made() -> Iterator[Pair]:
            """The pairs with their logps."""
            for run in batched(found, WINDOW):
                run, dropped = sift(run, unusable)
                rows = [good for _, good, _ in run]
                if rows and not counts["pairs"]:
                    show_first(work, loaded, "chosen", rows)
                logps = (
                    score(
                        loaded.model,
                        rows,
                        session.score_tokens,
                        None,
                        work.dist,
                        work.log,
                        packed=True,
                    )
                    if not heard
                    else repeat(None)
                )
                counts.update(
                    dropped | {"pairs": len(run), "tokens": sum(sum(row.mask) for row in rows)}
                )
                if heard:  # else `score` has looked
                    work.run.signals.check()
                for (pair, *_), logp in zip(run, logps, strict=not heard):
                    counts[f"chosen_{pair.chosen_by}"] += 1
                    yield pair if heard else replace(pair, ref_chosen_logps=logp)

        if not work.dist.is_main:
            deque(() if heard else made(), 0)  # it takes part in the scoring
            return {}
        write_rows(file := work.folder / "pairs.jsonl", made())
        warn_of(work, {name: counts[name] for name in unusable}, counts["pairs"])
        if not counts["pairs"]:
            show_first(work, loaded, "chosen", [])
        if settings.pair_weighting == "agreement":
            write_rows(file, weighted(JsonlView(file, Pair)))
        names = [
            "pairs",
            *unusable,
            *(["not_kept"] if settings.keep_fraction < 1 else []),
            *(["no_negative"] if counts["no_negative"] else []),
        ]
        return {
            name: counts[name]
            for name in (*names, *(f"chosen_{c.who}" for c in candidates), "tokens")
        }

    def winners() -> Iterator[list[Choice]]:
        return select(session.config, offered(candidates), own, key)

    votes = [
        (weight, stage)
        for c in candidates
        for stages in c.votes.values()
        for weight, stage in stages
    ]
    recipe = {
        "names": [c.who for c in candidates],
        "votes": [[*c.votes] for c in candidates],
        "signs": [weight for weight, _ in votes],
        "own": own,
        "select": settings.select,
        "keep": settings.keep_fraction,
        "weights": settings.pair_weighting,
    } | ({"heard": True} if heard else {})
    inputs = [base.stage, *(c.texts.stage for c in candidates), *(stage for _, stage in votes)]
    inputs += [negatives.stage, familiar, reference]
    return session.stage(
        name,
        "pairs/3",
        recipe | negatives.settings | session.quantised(base),
        inputs,
        write_pairs,
        key,
    )
