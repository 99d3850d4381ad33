"""Scores against log-softmax over full logits: sums, order, budgets."""

import math
import random

import pytest
import torch
from conftest import logits_of, ragged, random_model

from minmacpo.core.checkpoint import load_model
from minmacpo.core.scoring import perplexity, score, win_or_tie
from minmacpo.data.tokenizer import Tokens, load_tokenizer


def rows_of(seed: int, count: int, vocab: int = 61) -> list[Tokens]:
    """Ragged rows, each with an answer somewhere behind its first token."""
    rng = random.Random(seed)
    rows = []
    for ids in ragged(seed, count, vocab, 3, 40):
        start = rng.randrange(1, len(ids))
        end = rng.randrange(start + 1, len(ids) + 1)
        rows.append(Tokens(ids, [start <= i < end for i in range(len(ids))]))
    return rows


def test_a_tie_counts_half():
    assert (
        win_or_tie([0.5, 0.0, -2.0, 1e-12]).tolist() == [1, 0.5, 0, 1] and win_or_tie([]).size == 0
    )


def by_hand(model, row: Tokens) -> float:
    """The sum that the score must be, from the logits of this row alone."""
    logps = logits_of(model, torch.tensor([row.ids]))[0].double().log_softmax(-1)
    return sum(logps[i - 1, row.ids[i]].item() for i in range(1, len(row.ids)) if row.mask[i])


def test_scores_equal_full_logits_in_the_rows_order(seed):
    model, rows = random_model(seed), rows_of(seed, 30)
    wanted = [by_hand(model, row) for row in rows]
    assert len({round(value, 2) for value in wanted}) > 20
    assert score(model, rows, 200) == pytest.approx(wanted, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("budget", [1, 40, 123, 10**6])
def test_the_budget_changes_nothing(budget, seed):
    model, rows = random_model(seed), rows_of(seed, 25)
    alone = [score(model, [row], 10**6)[0] for row in rows]
    assert score(model, rows, budget) == pytest.approx(alone, rel=1e-5, abs=1e-4)


def test_the_budget_is_kept_and_progress_counts_rows(seed):
    rows, sizes, steps = rows_of(seed, 25), [], []
    model = random_model(seed)
    inner = model.forward
    model.forward = lambda tokens: sizes.append(tokens.numel()) or inner(tokens)
    score(
        model, rows, 100, type("Progress", (), {"step": lambda self, count: steps.append(count)})()
    )
    assert max(sizes) <= 100 and sum(steps) == 25 and len(steps) == len(sizes) < 25


def test_stories_scores_equal_transformers(stories, seed):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories).eval()
    tokenizer, rows = load_tokenizer(stories), []
    for text in (
        "Once upon a time, there was a dog.",
        "The sun was red",
        "Tim and Sue ran to the big park and",
    ):
        ids = [1, *tokenizer.encode(text, start=True), 2]
        rows.append(Tokens(ids, [False, *[True] * (len(ids) - 1)]))
    wanted = []
    for row in rows:
        ids = torch.tensor([row.ids])
        wanted.append(-theirs(ids, labels=ids).loss.item() * (len(row.ids) - 1))
    assert score(load_model(stories), rows, 10**4) == pytest.approx(wanted, rel=1e-5)


def test_scoring_keeps_no_gradient_and_can_be_trained_after(seed):
    model, rows = random_model(seed), rows_of(seed, 3)
    score(model, rows, 100)
    assert all(p.grad is None for p in model.parameters())
    model(torch.tensor([rows[0].ids])).sum().backward()


def test_perplexity_by_hand():
    assert perplexity(-12 * math.log(7), 12) == pytest.approx(7)
    assert perplexity(0.0, 5) == 1
    assert perplexity(-1e6, 3) < 1.1e30, "it must stay a number in JSON"


def test_nothing_to_score():
    assert score(random_model(0), [], 100) == []
