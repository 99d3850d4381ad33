"""Which of the offered answers an agent learns from (R2): candidates with their votes, winners, weights of pairs."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, repeat

import numpy as np

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.data.records import Example, Pair
from minmacpo.pipeline.model_pool import TextColumn
from minmacpo.pipeline.run import Stage
from minmacpo.runtime.files import iter_rows


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """Answers of one agent, the same number to every prompt, in the prompts' order. `votes`: per criterion,
    weighted stages of scores of these answers; a vote is the weighted sum of their log-probabilities per token."""

    who: str
    texts: TextColumn
    votes: dict[str, list[tuple[float, Stage]]] = field(default_factory=dict)

    def values(self) -> Iterator[dict[str, float]]:
        """{criterion: its value} of every answer, higher is better; -inf for a text too long to be scored."""
        columns = [
            (name, weight, iter_rows(stage.path / "scores.jsonl"))
            for name, votes in self.votes.items()
            for weight, stage in votes
        ]
        for rows in (
            zip(*(column for *_, column in columns), strict=True) if columns else repeat(())
        ):
            found: dict[str, float] = {}
            for (name, weight, _), row in zip(columns, rows, strict=True):
                found[name] = found.get(name, 0) + (
                    -math.inf if row["logp"] is None else weight * row["logp"] / row["tokens"]
                )
            lost = {
                name for (name, *_), row in zip(columns, rows, strict=True) if row["logp"] is None
            }
            yield {name: -math.inf if name in lost else value for name, value in found.items()}

    def by_prompt(self) -> Iterator[list["Choice"]]:
        """The answers to each prompt."""
        choices = (
            (self.who, text, value)
            for text, value in zip(self.texts.read(), self.values(), strict=bool(self.votes))
        )
        return (list(group) for _, group in groupby(choices, key=lambda choice: choice[1].id))


Choice = tuple[str, Example, dict[str, float]]  # who said it, the answer, its value by criterion


def offered(candidates: Sequence[CandidateSet]) -> Iterator[list[Choice]]:
    """All candidates of every prompt, in order, no two prompts at a time in memory."""
    for groups in zip(*(source.by_prompt() for source in candidates), strict=True):
        assert len({group[0][1].id for group in groups}) == 1, "candidates of different prompts"
        yield [choice for group in groups for choice in group]


def select(
    config: Config, prompts: Iterable[list[Choice]], own: tuple[str, float], key: tuple
) -> Iterator[list[Choice]]:
    """Per prompt the winner (eq. 7: the least perplexing), a random one, or all. Several criteria: the smallest
    sum of ranks; ties: the first. `own`: an agent, and the share of prompts where only its answers count. An
    empty answer wins only where all are empty."""
    settings = config.macpo
    for offers in prompts:
        dice = random.Random(repr((config.run.seed, *key, offers[0][1].id)))
        if 0 < own[1] < 1:
            mine = dice.random() < own[1]
            offers = [choice for choice in offers if (choice[0] == own[0]) == mine]
        able = [choice for choice in offers if choice[1].response] or offers[:1]
        names = [name for name in settings.select if name in able[0][2]]
        if settings.select == ("all",):
            yield able
        elif not names:  # a random pick, or only one source
            yield [dice.choice(able)]
        else:
            yield [
                min(
                    able,
                    key=lambda mine, able=able, names=names: sum(
                        other[2][name] > mine[2][name] for other in able for name in names
                    ),
                )
            ]


def keep_familiar(winners: Iterable[list[Choice]], share: float) -> np.ndarray:
    """[prompts] bool: the share of them whose (first) winner is the least perplexing."""
    order = np.argsort(
        -np.fromiter((choices[0][2]["perplexity"] for choices in winners), float), kind="stable"
    )
    kept = np.zeros(len(order), bool)
    kept[order[: max(1, round(share * len(order)))]] = True
    return kept


def weighted(made: Sequence[Pair]) -> Iterable[Pair]:
    """The pairs with their weights, if they have any, scaled to a mean of 1; UserError where none has one above 0."""
    if not made or made[0].weight is None:
        return made
    if not (mean := sum(pair.weight for pair in made) / len(made)):
        raise UserError(
            "macpo.pair_weighting = agreement leaves every pair without a weight, since no peer has room for the answers; take macpo.pair_weighting=none"
        )
    return (replace(pair, weight=pair.weight / mean) for pair in made)
