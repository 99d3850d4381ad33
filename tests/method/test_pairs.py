"""Pairs: what is dropped and counted, how negatives are joined, and their weights."""

from collections import Counter
from dataclasses import replace

import pytest

from minmacpo import UserError
from minmacpo.data.records import Example, Message, Pair
from minmacpo.data.tokenizer import Tokens
from minmacpo.method.pairs import (
    NegativeLookup,
    PairDraft,
    drop_unusable,
    normalize_weights,
    to_pair,
    why_unusable,
)
from minmacpo.method.selection import Candidate, Selection
from minmacpo.pipeline.artifacts import ScoreColumn, TextColumn
from minmacpo.pipeline.stage import Stage
from minmacpo.runtime.files import write_rows

PROMPT = (Message("user", "q"),)


def draft(chosen: str, rejected: str, tokens: int = 4, **scores) -> PairDraft:
    row = Tokens([1] * tokens, [False] + [True] * (tokens - 1))
    return PairDraft(
        chosen=Candidate("teacher1", Example("p", PROMPT, chosen), **scores),
        rejected=Example("p", PROMPT, rejected),
        ref_rejected_logp=-2.0,
        chosen_row=row,
        rejected_row=row,
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "tokens", "reason"),
    [
        ("yes", "no", 4, None),
        ("", "no", 4, "all_empty"),
        ("yes", "", 4, "negative_empty"),
        ("", "", 4, "all_empty"),
        ("yes", "yes", 4, "negative_equal"),
        ("yes", "no", 9, "over_long"),
        ("yes", "yes", 9, "negative_equal"),
    ],
)
def test_a_pair_is_dropped_for_the_first_reason_that_holds(chosen, rejected, tokens, reason):
    assert why_unusable(draft(chosen, rejected, tokens), max_length=8) == reason


def test_what_is_dropped_is_counted():
    counts = Counter()

    usable = drop_unusable([draft("yes", "no"), draft("yes", "yes")], 8, counts)

    assert [one.chosen.response for one in usable] == ["yes"]
    assert counts == {"negative_equal": 1}


def lookup(folder, *ids: str) -> NegativeLookup:
    """The negatives to prompts of these ids, with log-probabilities -0, -1, -2 ..."""
    stage = Stage("negatives", folder, "f")
    write_rows(folder / "questions.jsonl", [Example(id, PROMPT, f"no {id}") for id in ids])
    rows = [{"logp": -float(number), "tokens": 1} for number in range(len(ids))]
    write_rows(folder / "scores.jsonl", rows)
    return NegativeLookup(TextColumn(stage, "questions.jsonl", "question"), ScoreColumn(stage))


def test_negatives_in_the_order_of_the_prompts_are_not_held(tmp_path):
    negatives = lookup(tmp_path, "a", "b", "c")

    for number, id in enumerate("abc"):
        answer, score = negatives.pop(id)
        assert (answer.response, score.logp) == (f"no {id}", -number)
        assert not negatives.passed


def test_negatives_in_another_order_are_found_and_a_missing_one_is_none(tmp_path):
    negatives = lookup(tmp_path, "a", "b", "c")

    assert negatives.pop("c")[0].response == "no c"
    assert negatives.pop("lost") is None
    assert negatives.pop("a")[0].response == "no a"
    assert negatives.pop("a") is None  # each of them once


def test_a_pair_s_weight_is_how_likely_the_peers_find_it():
    scored = draft("yes", "no", agreement=0.0)

    assert to_pair(scored, Selection(pair_weighting="agreement")).weight == 1.0
    assert to_pair(scored, Selection()).weight is None


def test_weights_have_a_mean_of_one_and_keep_their_order():
    pairs = [Pair(str(i), (), "a", "b", weight=weight) for i, weight in enumerate((0.1, 0.4, 0.7))]

    assert [pair.weight for pair in normalize_weights(pairs)] == pytest.approx([0.25, 1.0, 1.75])
    with pytest.raises(UserError, match="leaves every pair without a weight"):
        normalize_weights([replace(pair, weight=0.0) for pair in pairs])


def test_pairs_without_weights_stay_without():
    assert normalize_weights([]) == []
    assert normalize_weights([Pair("x", (), "a", "b")])[0].weight is None
