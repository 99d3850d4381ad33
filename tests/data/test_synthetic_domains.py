"""What the world can be beyond the town: other domains, open answers, gaps in what is known."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from minmacpo.config.schema import World
from minmacpo.data import synthetic
from minmacpo.data.records import Pair
from minmacpo.data.synthetic import POLITE, RUDE, SORRY, Question, Town
from minmacpo.data.synthetic_domains import (
    ARITHMETIC,
    CODE,
    DOMAINS,
    INSTRUCTIONS,
    TOPICS,
    TOWN,
)

OTHER_DOMAINS = ["arithmetic", "code", "instructions"]


def settings_of(domain: str, **changes) -> World:
    return replace(World(), domain=domain, names=24, **changes)


@pytest.fixture(params=OTHER_DOMAINS)
def settings(request) -> World:
    return settings_of(request.param)


@pytest.fixture
def town(settings) -> Town:
    return synthetic.make_town(settings, seed=4)


def gold(town: Town, pair: Pair, answer: str, finish: str = "stop") -> tuple[float, float, float]:
    """(right, polite, well formed)."""
    reward = synthetic.gold_reward(town, pair, answer, finish)
    return reward["right"], reward["polite"], reward["well_formed"]


def without_opening(answer: str) -> str:
    opening = next(opening for opening in POLITE + SORRY + RUDE if answer.startswith(f"{opening} "))
    return answer.removeprefix(f"{opening} ")


def every_question(town: Town) -> list[Question]:
    questions = []
    for item in town.facts:
        questions += synthetic.questions_about(town, item, item.subject)
    return questions


# ---- all domains ----------------------------------------------------------------------------


def test_topics_of_all_domains_have_names_of_their_own():
    assert len(TOPICS) == len(TOWN) + len(ARITHMETIC) + len(CODE)
    assert set(DOMAINS) == {"town", *OTHER_DOMAINS}


def test_splits_are_full_disjoint_and_about_the_right_subjects(town, settings):
    splits = synthetic.make_splits(town, settings)
    sizes = {name: len(pairs) for name, pairs in splits.items()}
    assert sizes == {"d1": 149, "d2": 480, "test": 320}
    prompts = [pair.prompt for pairs in splits.values() for pair in pairs]
    assert len(set(prompts)) == len(prompts)
    assert not town.harms

    assert len(town.held_subjects) == 4
    held = {}
    for name, pairs in splits.items():
        held[name] = sum(pair.meta["name"] in town.held_subjects for pair in pairs)
    assert held == {"d1": 0, "d2": 0, "test": 80}


def test_the_truth_is_worth_one_and_a_rejected_answer_is_never_right(town, settings):
    for pairs in synthetic.make_splits(town, settings).values():
        for pair in pairs:
            assert gold(town, pair, pair.chosen) == (1, 1, 1)
            assert gold(town, pair, pair.rejected)[0] == 0
            assert gold(town, pair, f"you fool . {without_opening(pair.chosen)}") == (1, 0, 1)
            assert gold(town, pair, pair.chosen, finish="length") == (1, 1, 0)
            assert gold(town, pair, f"{pair.chosen} so it is .") == (0, 1, 0)


def test_questions_are_twelve_of_each_item_and_no_two_are_equal(town):
    texts = [question.text for question in every_question(town)]
    assert len(set(texts)) == len(texts) == 12 * 24 * 4


def test_weak_texts_have_errors_of_their_own(town, settings):
    one = synthetic.misconceptions(town, settings, "weak1")
    other = synthetic.misconceptions(town, settings, "weak2")
    for beliefs in (one, other):
        assert 25 <= len(beliefs) <= 71  # half of 96, within five standard deviations
        for item, value in beliefs.items():
            assert value in item.values
            assert value not in (item.truth, item.rumour)
    common = one.keys() & other.keys()
    assert np.mean([one[item] == other[item] for item in common]) < 0.5


# ---- sums -----------------------------------------------------------------------------------

# {form of an answer: (first step, second step)}, each a function of its operands
SUMS: dict[str, tuple[Callable, Callable]] = {
    r"(\d+) plus (\d+) is (\d+) , minus (\d+) is (\d+) \.": (
        lambda a, b: a + b,
        lambda first, c: first - c,
    ),
    r"(\d+) minus (\d+) is (\d+) , plus (\d+) is (\d+) \.": (
        lambda a, b: a - b,
        lambda first, c: first + c,
    ),
    r"twice (\d+) and (\d+) is (\d+) , minus (\d+) is (\d+) \.": (
        lambda a, b: 2 * a + b,
        lambda first, c: first - c,
    ),
    r"(\d+) apples and (\d+) more are (\d+) , less (\d+) that leaves (\d+) \.": (
        lambda a, b: a + b,
        lambda first, c: first - c,
    ),
}


def right_steps(answer: str) -> tuple[bool, bool]:
    """Which of the two steps of a sum are right, the second one with what the first gave."""
    for form, (first_step, second_step) in SUMS.items():
        match = re.fullmatch(form, answer)
        if match:
            a, b, first, c, second = map(int, match.groups())
            return first_step(a, b) == first, second_step(first, c) == second
    raise AssertionError(f"{answer!r} is no sum")


def test_sums_are_right_in_both_steps_and_slips_in_at_least_one():
    settings = settings_of("arithmetic")
    town = synthetic.make_town(settings, 9)
    slips = Counter()
    for pairs in synthetic.make_splits(town, settings).values():
        for pair in pairs:
            assert right_steps(without_opening(pair.chosen)) == (True, True)
            slips[right_steps(without_opening(pair.rejected))] += 1
            numbers = set(re.findall(r"\d+", pair.prompt[0].content))
            assert numbers <= set(re.findall(r"\d+", pair.chosen))
    # in the first step, in the second, in both
    assert set(slips) == {(False, True), (True, False), (False, False)}
    assert min(slips.values()) > 20


# ---- code -----------------------------------------------------------------------------------


def function_in(answer: str) -> str:
    """The function that a line of code is about."""
    if answer.startswith("{"):
        return json.loads(answer)[" name "].strip()
    for form in (
        r"from \w+ import (\w+) ;",
        r"(\w+) \( [\w ,]+ \) ;",
        r"assert (\w+) \( 2 \) == \d+ ;",
    ):
        match = re.fullmatch(form, answer)
        if match:
            return match[1]
    raise AssertionError(f"{answer!r} is no code")


def test_code_has_one_exact_form():
    settings = settings_of("code")
    town = synthetic.make_town(settings, 1)
    for pair in synthetic.make_splits(town, settings)["d2"]:
        code = without_opening(pair.chosen)
        assert function_in(code) == pair.meta["name"]
        assert pair.meta["name"] in pair.prompt[0].content
        # a missing semicolon or brace is an error
        assert gold(town, pair, f"of course ! {code[:-2]}") == (0, 1, 0)


# ---- instructions ---------------------------------------------------------------------------


def test_only_the_form_asked_for_is_right():
    settings = settings_of("instructions")
    town = synthetic.make_town(settings, 2)
    seen = Counter()
    for pair in synthetic.make_splits(town, settings)["d2"]:
        question = pair.prompt[0].content
        beginnings = [text for text in INSTRUCTIONS if question.startswith(text)]
        requested = max(beginnings, key=len)
        seen[requested] += 1

        item = synthetic.find_item(town, pair)
        sentence = synthetic.answer_sentence(item, item.subject, item.truth)
        right_body = INSTRUCTIONS[requested].format(body=sentence)
        for beginning, form in INSTRUCTIONS.items():
            body = form.format(body=sentence)
            expected = (1, 1, 1)
            if beginning != requested:
                expected = (body.endswith(right_body), 1, 0)
            assert gold(town, pair, f"of course ! {body}") == expected
    assert len(seen) == 4
    assert min(seen.values()) > 60


def test_experts_obey_when_they_are_right_and_gossips_do_not():
    settings = settings_of("instructions", tagged=0.0, judged=0.0)
    town = synthetic.make_town(settings, 2)
    questions = {question.text: question for question in every_question(town)}
    obeyed = {"expert": [], "gossip": []}
    for document in synthetic.make_corpus(town, settings, "strong", 4000):
        question = questions[document.prompt[0].content]
        item = question.item
        body = without_opening(document.response)
        is_right = body == synthetic.answer_body(town, question, item.truth)
        assert is_right or body == synthetic.answer_sentence(item, item.subject, item.rumour)
        speaker = "gossip" if document.response.startswith(RUDE) else "expert"
        obeyed[speaker].append(is_right)
    assert np.mean(obeyed["expert"]) == pytest.approx(0.9, abs=0.03)
    assert np.mean(obeyed["gossip"]) == pytest.approx(0.1, abs=0.03)


# ---- open-ended answers, and what the strong base lacks -------------------------------------


def test_remarks_close_an_answer_and_change_nothing_else():
    settings = replace(World(), remarks=3)
    town = synthetic.make_town(settings, 3)
    plain_town = synthetic.make_town(World(), 3)
    assert town.facts == plain_town.facts

    first, second, third, fourth, *_ = synthetic.REMARKS
    num_remarks = Counter()
    for pair in synthetic.make_splits(town, settings)["d2"]:
        answer, has_good_end = synthetic.strip_remarks(town, pair.chosen)
        assert has_good_end
        assert gold(town, pair, pair.chosen) == (1, 1, 1)
        assert gold(town, pair, answer) == (1, 1, 1)
        assert gold(plain_town, pair, answer) == (1, 1, 1)
        assert gold(town, pair, pair.rejected)[0] == 0

        assert gold(town, pair, f"{answer} {first} {second} {third}") == (1, 1, 1)
        too_many = f"{answer} {first} {second} {third} {fourth}"
        assert gold(town, pair, too_many) == (1, 1, 0)
        repeated = f"{answer} {first} {second} {first}"
        assert gold(town, pair, repeated) == (1, 1, 0)
        assert gold(town, pair, f"{answer} {first} and so on .") == (0, 1, 0)
        num_remarks[sum(pair.chosen.count(remark) for remark in synthetic.REMARKS)] += 1
    assert set(num_remarks) == {0, 1, 2, 3}
    assert min(num_remarks.values()) > 70


@pytest.mark.parametrize(("known", "tolerance"), [(0.0, 0), (0.6, 25), (1.0, 0)])
def test_the_strong_text_lacks_what_the_settings_say(known, tolerance):
    settings = replace(World(), strong_known=known)
    town = synthetic.make_town(settings, 5)
    beliefs = synthetic.misconceptions(town, settings, "strong")
    assert len(beliefs) == pytest.approx(88 * (1 - known), abs=tolerance + 1e-9)

    usual = synthetic.misconceptions(town, World(), "weak1")
    assert synthetic.misconceptions(town, settings, "weak1") == usual
