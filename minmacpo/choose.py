"""Which of the offered answers an agent learns from (R2): candidates with their votes, winners, weights of pairs."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from minmacpo.config import Config
from minmacpo.data import Example, Pair
from minmacpo.files import read_rows
from minmacpo.run import Stage
from minmacpo.workshop import Texts


@dataclass(frozen=True, slots=True)
class Candidates:
    """Answers of one agent, the same number to every prompt, in the prompts' order. `votes`: per criterion,
    weighted stages of scores of these answers; a vote is the weighted sum of their log-probabilities per token."""

    who: str
    texts: Texts
    votes: dict[str, list[tuple[float, Stage]]] = field(default_factory=dict)

    def values(self) -> dict[str, list[float]]:
        """{criterion: [its value of every answer]}, higher is better; -inf for a text too long to be scored."""
        found = {}
        for name, stages in self.votes.items():
            columns = [(weight, read_rows(stage.path / "scores.jsonl")) for weight, stage in stages]
            found[name] = [
                -math.inf if None in [row["logp"] for row in rows]
                else sum(w * row["logp"] / row["tokens"] for (w, _), row in zip(columns, rows, strict=True))
                for rows in zip(*(column for _, column in columns), strict=True)
            ]  # fmt: skip
        return found


Choice = tuple[str, Example, dict[str, float]]  # who said it, the answer, its value by criterion


def offered(candidates: Sequence[Candidates]) -> list[list[Choice]]:
    """All candidates of every prompt, in order."""
    prompts: dict[str, list[Choice]] = {}
    for source in candidates:
        values = source.values()
        for index, text in enumerate(source.texts.read()):
            value = {name: column[index] for name, column in values.items()}
            prompts.setdefault(text.id, []).append((source.who, text, value))
    return list(prompts.values())


def select(config: Config, prompts: list[list[Choice]], own: tuple[str, float], key: tuple) -> list[list[Choice]]:
    """Per prompt the winner (eq. 7: the least perplexing), a random one, or all. Several criteria: the smallest
    sum of ranks; ties: the first. `own`: an agent, and the share of prompts where only its answers count. An
    empty answer wins only where all are empty."""
    settings, winners = config.macpo, []
    for offers in prompts:
        dice = random.Random(repr((config.run.seed, *key, offers[0][1].id)))
        if 0 < own[1] < 1:
            mine = dice.random() < own[1]
            offers = [choice for choice in offers if (choice[0] == own[0]) == mine]
        able = [choice for choice in offers if choice[1].response] or offers[:1]
        names = [name for name in settings.select if name in able[0][2]]
        if settings.select == ("all",):
            winners.append(able)
        elif not names:  # a random pick, or only one source
            winners.append([dice.choice(able)])
        else:
            winners.append([min(able, key=lambda mine: sum(
                other[2][name] > mine[2][name] for other in able for name in names))])  # fmt: skip
    return winners


def keep_familiar(winners: list[list[Choice]], share: float) -> list[list[Choice]]:
    """`winners` of the share of prompts whose (first) winner is the least perplexing; the others have none."""
    if share == 1:
        return winners
    order = sorted(range(len(winners)), key=lambda i: -winners[i][0][2]["perplexity"])
    kept = set(order[: max(1, round(share * len(order)))])
    return [choices if i in kept else [] for i, choices in enumerate(winners)]


def weighted(made: list[Pair]) -> list[Pair]:
    """The pairs with their weights, if they have any, scaled to a mean of 1."""
    if not made or made[0].weight is None:
        return made
    mean = sum(pair.weight for pair in made) / len(made)
    return [replace(pair, weight=pair.weight / mean) for pair in made]
