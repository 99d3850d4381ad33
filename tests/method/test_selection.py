"""Which answers an agent learns from: one test per rule, and how candidates are read and chosen."""

import math
import random
from typing import get_args, get_type_hints

import pytest

from minmacpo.config.schema import Config, Macpo, Run
from minmacpo.data.records import Example, Message, Sample
from minmacpo.method.baselines import METHODS
from minmacpo.method.negatives import NEGATIVES
from minmacpo.method.selection import (
    RULES,
    SCORES,
    Candidate,
    CandidateSet,
    Selection,
    any_one,
    choose,
    every_one,
    highest_likelihood_ratio,
    least_perplexing,
    lowest_perplexity_mask,
    most_agreed,
    select,
    shortest,
)
from minmacpo.pipeline.artifacts import ScoreColumn, TextColumn
from minmacpo.pipeline.stage import Stage
from minmacpo.runtime.files import write_rows

RNG = random.Random(0)


def candidate(source: str, response: str, **scores) -> Candidate:
    return Candidate(source, Example("p1", (Message("user", "q"),), response), **scores)


def sources_of(chosen) -> list[str]:
    return [one.source for one in chosen]


# --- Rules


def test_the_least_perplexing_answer_wins():
    # perplexities exp(0.5) = 1.65, exp(0.2) = 1.22 and exp(1.0) = 2.72
    offered = [
        candidate("teacher1", "no", mean_logp=-0.5),
        candidate("teacher2", "yes", mean_logp=-0.2),
        candidate("teacher3", "maybe", mean_logp=-1.0),
    ]

    assert sources_of(least_perplexing(offered, RNG)) == ["teacher2"]


def test_the_first_of_equals_wins():
    offered = [
        candidate("teacher1", "yes", mean_logp=-0.2),
        candidate("teacher2", "yes", mean_logp=-0.2),
    ]

    assert sources_of(least_perplexing(offered, RNG)) == ["teacher1"]


def test_the_highest_likelihood_ratio_wins():
    offered = [
        candidate("teacher1", "no", likelihood_ratio=-1.0),
        candidate("teacher2", "yes", likelihood_ratio=0.5),
    ]

    assert sources_of(highest_likelihood_ratio(offered, RNG)) == ["teacher2"]


def test_the_answer_wins_on_which_the_others_agree_most():
    offered = [
        candidate("teacher1", "no", agreement=-0.1),
        candidate("teacher2", "yes", agreement=-0.5),
    ]

    assert sources_of(most_agreed(offered, RNG)) == ["teacher1"]


def test_the_shortest_answer_wins():
    offered = [candidate("teacher1", "a long answer"), candidate("teacher2", "short")]

    assert sources_of(shortest(offered, RNG)) == ["teacher2"]


def test_all_answers_win():
    offered = [candidate("teacher1", "no"), candidate("teacher2", "yes")]

    assert every_one(offered, RNG) == offered


def test_a_random_pick_is_even():
    offered = [candidate("teacher1", "no"), candidate("teacher2", "yes")]
    rng = random.Random(0)

    picks = [any_one(offered, rng)[0].source for _ in range(300)]

    assert 110 < picks.count("teacher1") < 190


def test_every_rule_picks_of_what_was_offered():
    scores = {name: -0.5 for name in SCORES.values()}
    offered = [candidate("teacher1", "no", **scores), candidate("teacher2", "yes", **scores)]

    for name, rule in RULES.items():
        assert set(sources_of(rule(offered, RNG))) <= {"teacher1", "teacher2"}, name


# --- Choosing among the answers to one prompt


def test_an_empty_answer_wins_only_where_all_are_empty():
    empty = candidate("teacher1", "", mean_logp=-0.1)
    answer = candidate("teacher2", "yes", mean_logp=-9.0)

    assert choose([empty, answer], ["perplexity"], RNG) == [answer]
    assert choose([empty, empty], ["perplexity"], RNG) == [empty]
    assert choose([empty, empty], ["all"], RNG) == [empty]


def test_several_rules_win_by_the_sum_of_their_ranks():
    # by perplexity a, b, c; by agreement b, c, a; sums a 0 + 2, b 1 + 0, c 2 + 1
    a = candidate("a", "x", mean_logp=-1.0, agreement=-9.0)
    b = candidate("b", "y", mean_logp=-2.0, agreement=-1.5)
    c = candidate("c", "z", mean_logp=-3.0, agreement=-4.0)

    assert choose([a, b, c], ["perplexity", "agreement"], RNG) == [b]
    assert choose([a, b, c], ["perplexity"], RNG) == [a]


def test_equal_sums_of_ranks_go_to_the_first():
    # by perplexity a, c, b; by agreement c, a, b
    a = candidate("a", "x", mean_logp=-1.0, agreement=-3.0)
    b = candidate("b", "y", mean_logp=-4.0, agreement=-9.0)
    c = candidate("c", "z", mean_logp=-3.0, agreement=-1.0)

    assert choose([a, b, c], ["perplexity", "agreement"], RNG) == [a]


# --- Reading candidates and selecting for all prompts


def score_column(folder, name: str, mean_logps) -> ScoreColumn:
    """Scores of texts of two tokens, by their log-probability per token; None: too long."""
    rows = [{"logp": value and 2 * value, "tokens": 2} for value in mean_logps]
    write_rows(folder / f"{name}.jsonl", rows)
    return ScoreColumn(Stage("scores", folder, "f"), f"{name}.jsonl")


def candidate_set(folder, source: str, answers: str, **scores) -> CandidateSet:
    """Answers of one letter each (a blank is empty), to as many prompts."""
    samples = []
    for number, text in enumerate(answers):
        prompt = (Message("user", "q"),)
        samples.append(
            Sample(str(number), prompt, text.strip(), "stop", (3,), -1.0, 1.0, source, seed=0)
        )
    write_rows(folder / f"{source}.jsonl", samples)
    return CandidateSet(source, TextColumn(Stage(source, folder, "f"), f"{source}.jsonl"), **scores)


def test_the_filter_reads_perplexities_by_prompt(tmp_path):
    one = score_column(tmp_path, "1", [-2, -2, -3, -1, -5])
    two = score_column(tmp_path, "2", [-2, -2, -4, -1, -9])
    three = score_column(tmp_path, "3", [-1, -2, -3, -1, -2])
    sources = [
        candidate_set(tmp_path, "a", "aa  a", learner_scores=one),
        candidate_set(tmp_path, "b", "bbb b", learner_scores=two),
        candidate_set(tmp_path, "c", "ccc  ", learner_scores=three),
    ]

    chosen = [sources_of(winners) for winners in select(sources, Selection(), 0, ())]

    assert chosen == [["c"], ["a"], ["c"], ["a"], ["a"]]


def test_a_likelihood_ratio_is_of_log_probabilities_per_token(tmp_path):
    source = candidate_set(
        tmp_path,
        "a",
        "aaa",
        positive_scores=score_column(tmp_path, "good", [-1, -2, None]),
        negative_scores=score_column(tmp_path, "bad", [-5, -2, -1]),
    )

    ratios = [one.likelihood_ratio for one in source.read()]

    assert ratios == [4.0, 0.0, -math.inf]  # a text too long to be scored never wins


def test_agreement_is_the_mean_over_the_peers(tmp_path):
    peers = (score_column(tmp_path, "1", [-1, -3]), score_column(tmp_path, "2", [-2, None]))
    source = candidate_set(tmp_path, "a", "aa", peer_scores=peers)

    assert [one.agreement for one in source.read()] == [-1.5, -math.inf]


def test_a_random_pick_depends_on_the_seed_key_and_the_prompt(tmp_path):
    sources = [candidate_set(tmp_path, "a", "a" * 300), candidate_set(tmp_path, "b", "b" * 300)]
    selection = Selection(rules=("random",))

    def picks(seed_key):
        return [winners[0].source for winners in select(sources, selection, 0, seed_key)]

    assert picks(("pairs", 1)) == picks(("pairs", 1)) != picks(("pairs", 2))
    assert 110 < picks(("pairs", 1)).count("a") < 190


def test_on_a_fraction_of_the_prompts_only_one_s_own_answers_count(tmp_path):
    sources = [
        candidate_set(
            tmp_path, "a", "a" * 400, learner_scores=score_column(tmp_path, "1", [-1] * 400)
        ),
        candidate_set(
            tmp_path, "me", "m" * 400, learner_scores=score_column(tmp_path, "2", [-9] * 400)
        ),
    ]
    selection = Selection(self_agent="me", self_fraction=0.25)

    chosen = [winners[0].source for winners in select(sources, selection, 0, ("k",))]

    assert 60 < chosen.count("me") < 140
    assert chosen != [winners[0].source for winners in select(sources, selection, 0, ("other",))]


@pytest.mark.parametrize(
    ("fraction", "kept"), [(1.0, [0, 1, 2, 3, 4]), (0.6, [0, 2, 4]), (0.2, [4]), (0.01, [4])]
)
def test_the_least_perplexing_fraction_is_kept(fraction, kept):
    chosen = [[candidate("a", "x", mean_logp=value)] for value in (-2, -5, -1.5, -4, -1)]

    mask = lowest_perplexity_mask(iter(chosen), fraction)  # read once, as it comes

    assert [prompt for prompt, is_kept in enumerate(mask) if is_kept] == kept


# --- The command line knows what there is


def test_the_settings_list_what_the_dictionaries_hold():
    select_type = get_type_hints(Macpo)["select"]  # tuple[Literal[...], ...]
    names, _ = get_args(select_type)

    assert set(get_args(names)) == RULES.keys()
    assert set(get_args(get_type_hints(Macpo)["negatives"])) == NEGATIVES.keys()
    assert set(get_args(get_type_hints(Run)["method"])) == METHODS.keys()
    assert Config().macpo.select == Selection().rules
