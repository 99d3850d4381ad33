"""Which answers an agent learns from (R2): one function per rule, found by its name.

To add a rule, write a function and put it into RULES; the command line then knows it once its name
stands in config/schema.py: `python train.py --macpo.select=shortest`.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat

from minmacpo.data.records import Example, Sample
from minmacpo.pipeline.artifacts import ScoreColumn, TextColumn


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer that was offered for a prompt, with the scores that a rule may look at.

    A score that no stage has computed is None; one of an answer that is longer than the scorer's
    context is minus infinity.
    """

    source: str  # the agent that gave it
    answer: Example | Sample
    mean_logp: float | None = None  # per token, under the learner; perplexity is exp(-mean_logp)
    likelihood_ratio: float | None = None  # per token: its source's positive over negative adapter
    agreement: float | None = None  # mean log-probability per token under the other teachers

    @property
    def prompt_id(self) -> str:
        return self.answer.id

    @property
    def response(self) -> str:
        return self.answer.response


# --- Rules: each gets the answers to one prompt and returns those that are learned from


def least_perplexing(candidates: Sequence[Candidate], rng: random.Random) -> list[Candidate]:
    """The answer that surprises the learner least (paper, eq. 7); the first of equals."""
    return [max(candidates, key=lambda candidate: candidate.mean_logp)]


def highest_likelihood_ratio(
    candidates: Sequence[Candidate], rng: random.Random
) -> list[Candidate]:
    """The answer that its source's positive adapter prefers most to its negative one."""
    return [max(candidates, key=lambda candidate: candidate.likelihood_ratio)]


def most_agreed(candidates: Sequence[Candidate], rng: random.Random) -> list[Candidate]:
    """The answer that the other teachers find likeliest."""
    return [max(candidates, key=lambda candidate: candidate.agreement)]


def any_one(candidates: Sequence[Candidate], rng: random.Random) -> list[Candidate]:
    """An answer drawn at random: the control without a filter."""
    return [rng.choice(candidates)]


def shortest(candidates: Sequence[Candidate], rng: random.Random) -> list[Candidate]:
    """The answer of the fewest characters; the first of equals."""
    return [min(candidates, key=lambda candidate: len(candidate.response))]


def every_one(candidates: Sequence[Candidate], rng: random.Random) -> list[Candidate]:
    """All answers, each of which makes a pair."""
    return list(candidates)


Rule = Callable[[Sequence[Candidate], random.Random], list[Candidate]]

RULES: dict[str, Rule] = {
    "perplexity": least_perplexing,
    "random": any_one,
    "all": every_one,
    "shortest": shortest,
    "likelihood-ratio": highest_likelihood_ratio,
    "agreement": most_agreed,
}

# The rules that compare a score, by the score's name in Candidate. Stages compute it where the rule
# is set; several of these rules together take the candidate with the smallest sum of ranks.
SCORES = {
    "perplexity": "mean_logp",
    "likelihood-ratio": "likelihood_ratio",
    "agreement": "agreement",
}


def choose(
    candidates: Sequence[Candidate], rules: Sequence[str], rng: random.Random
) -> list[Candidate]:
    """What is learned from of the answers to one prompt; an empty one only where all are empty."""
    answered = [candidate for candidate in candidates if candidate.response]
    if not answered:  # the pair will be dropped and counted
        return [candidates[0]]
    if len(answered) == 1:  # then no stage may have computed a score
        return answered
    if len(rules) == 1:
        return RULES[rules[0]](answered, rng)
    return [best_by_ranks(answered, rules)]


def best_by_ranks(candidates: Sequence[Candidate], rules: Sequence[str]) -> Candidate:
    """The candidate with the smallest sum of its ranks by several scores; the first of equals."""
    rank_sums = [0] * len(candidates)
    for rule in rules:
        scores = [getattr(candidate, SCORES[rule]) for candidate in candidates]
        if None in scores:  # a score that only the student's candidates have
            continue
        for index, score in enumerate(scores):
            rank = sum(other > score for other in scores)  # 0: no other has a higher score
            rank_sums[index] += rank
    return candidates[rank_sums.index(min(rank_sums))]


# --- Reading candidates from the stages that sampled and scored them


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """The answers of one source, equally many to every prompt, and the files with their scores.

    Attributes:
        learner_scores: under the agent that chooses (eq. 6).
        positive_scores: under the source's positive adapter.
        negative_scores: under the source's negative adapter.
        peer_scores: under each of the other teachers.
    """

    source: str
    answers: TextColumn
    learner_scores: ScoreColumn | None = None
    positive_scores: ScoreColumn | None = None
    negative_scores: ScoreColumn | None = None
    peer_scores: tuple[ScoreColumn, ...] = ()

    def read(self) -> Iterator[Candidate]:
        """The candidates in the prompts' order, read one by one."""
        positive = mean_logps(self.positive_scores)
        negative = mean_logps(self.negative_scores)
        columns = zip(
            self.answers.read(),
            mean_logps(self.learner_scores),
            map(likelihood_ratio, positive, negative),
            agreements(self.peer_scores),
            strict=False,  # a score that was not computed is None for ever
        )
        for answer, mean_logp, ratio, agreement in columns:
            yield Candidate(self.source, answer, mean_logp, ratio, agreement)

    @property
    def score_names(self) -> list[list[str]]:
        """What the fingerprint of the pairs says of the scores: for whom, and in which file."""
        names = []
        for name in ("learner_scores", "positive_scores", "negative_scores"):
            column = getattr(self, name)
            if column is not None:
                names.append([name, column.file])
        names += [["peer_scores", column.file] for column in self.peer_scores]
        return names

    @property
    def score_columns(self) -> list[ScoreColumn]:
        """All files of scores that there are."""
        columns = [self.learner_scores, self.positive_scores, self.negative_scores]
        return [column for column in (*columns, *self.peer_scores) if column is not None]


def mean_logps(scores: ScoreColumn | None) -> Iterator[float | None]:
    """Log-probability per token of every text; None for ever where no stage has scored them."""
    if scores is None:
        yield from repeat(None)
        return
    for score in scores.read():
        if score.logp is None:
            yield -math.inf
        else:
            yield score.logp / score.tokens


def likelihood_ratio(positive: float | None, negative: float | None) -> float | None:
    """The difference of two log-probabilities per token."""
    if positive is None or negative is None:
        return None
    if -math.inf in (positive, negative):
        return -math.inf
    return positive - negative


def agreements(peer_scores: Sequence[ScoreColumn]) -> Iterator[float | None]:
    """Mean over the peers of the log-probability per token; None for ever without peers."""
    if not peer_scores:
        yield from repeat(None)
        return
    weight = 1 / len(peer_scores)
    for scores in zip(*(column.read() for column in peer_scores), strict=True):
        if any(score.logp is None for score in scores):
            yield -math.inf
        else:
            yield sum(weight * score.logp / score.tokens for score in scores)


def candidates_by_prompt(sources: Sequence[CandidateSet]) -> Iterator[list[Candidate]]:
    """All candidates for every prompt, in the order of the sources; no two prompts in memory."""
    grouped = [
        groupby(source.read(), key=lambda candidate: candidate.prompt_id) for source in sources
    ]
    for groups in zip(*grouped, strict=True):
        prompt_ids = {prompt_id for prompt_id, _ in groups}
        assert len(prompt_ids) == 1, "candidates of different prompts"
        candidates: list[Candidate] = []
        for _, group in groups:
            candidates += group
        yield candidates


# --- Selecting for all prompts


@dataclass(frozen=True, slots=True)
class Selection:
    """How an agent chooses among candidates; all of it is in the fingerprint of its pairs.

    Attributes:
        rules: names in RULES; several: the smallest sum of ranks.
        keep_fraction: of the prompts, those whose chosen answer is the least perplexing.
        pair_weighting: "agreement" weighs a pair by how likely the other teachers find it.
        self_agent: the learner itself, where its own answers are among the candidates.
        self_fraction: of the prompts, on which only its own answers count.
    """

    rules: tuple[str, ...] = ("perplexity",)
    keep_fraction: float = 1.0
    pair_weighting: str = "none"
    self_agent: str = ""
    self_fraction: float = 0.0


def select(
    sources: Sequence[CandidateSet], selection: Selection, seed: int, seed_key: tuple
) -> Iterator[list[Candidate]]:
    """The chosen candidates for every prompt: one, or several under the rule "all".

    Args:
        seed: the run's; with `seed_key` and the prompt's id it decides what is drawn at random.
    """
    for candidates in candidates_by_prompt(sources):
        prompt_id = candidates[0].prompt_id
        rng = random.Random(repr((seed, *seed_key, prompt_id)))
        # One draw for every prompt, so that adding a source changes no other prompt's choice
        if 0 < selection.self_fraction < 1:
            own_turn = rng.random() < selection.self_fraction
            competing = []
            for candidate in candidates:
                is_own = candidate.source == selection.self_agent
                if is_own == own_turn:
                    competing.append(candidate)
            candidates = competing
        yield choose(candidates, selection.rules, rng)


def lowest_perplexity_mask(chosen: Iterable[list[Candidate]], fraction: float) -> list[bool]:
    """Which prompts are kept: the fraction with the least perplexing (first) chosen answer.

    Returns:
        a truth value for every prompt; at least one is true.
    """
    mean_logps_of_prompts = [winners[0].mean_logp for winners in chosen]
    prompts = range(len(mean_logps_of_prompts))
    least_perplexing_first = sorted(prompts, key=mean_logps_of_prompts.__getitem__, reverse=True)
    count = max(1, round(fraction * len(prompts)))
    kept = set(least_perplexing_first[:count])
    return [prompt in kept for prompt in prompts]
