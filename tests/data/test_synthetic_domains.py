"""What the world can be beyond the town as it is by default: other domains, open answers, gaps, corrupted truth."""

import functools
import json
import re
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest

from minmacpo import UserError
from minmacpo.config.parse import parse
from minmacpo.config.schema import World
from minmacpo.data import synthetic as world
from minmacpo.data.synthetic_domains import ARITHMETIC, CODE, DOMAINS, INSTRUCTIONS, TOPICS, TOWN
from minmacpo.pipeline import prepare_data

OTHERS = ["arithmetic", "code", "instructions"]
SUMS = {
    r"(\d+) plus (\d+) is (\d+) , minus (\d+) is (\d+) \.": lambda a, b, s, c, r: (
        (a + b == s) + 2 * (s - c == r)
    ),
    r"(\d+) minus (\d+) is (\d+) , plus (\d+) is (\d+) \.": lambda a, b, s, c, r: (
        (a - b == s) + 2 * (s + c == r)
    ),
    r"twice (\d+) and (\d+) is (\d+) , minus (\d+) is (\d+) \.": lambda a, b, s, c, r: (
        (2 * a + b == s) + 2 * (s - c == r)
    ),
    r"(\d+) apples and (\d+) more are (\d+) , less (\d+) that leaves (\d+) \.": lambda a, b, s, c, r: (
        (a + b == s) + 2 * (s - c == r)
    ),
}


def settings_of(domain: str, **more) -> World:
    return replace(World(), domain=domain, names=24, **more)


@functools.cache
def prepared(*words: str):
    """The texts of a run with these flags; made once, and not to be changed."""
    return prepare_data.prepare(parse([*words]).config)


@pytest.fixture(params=OTHERS)
def place(request):
    settings = settings_of(request.param)
    return settings, world.make_town(settings, 4)


def gold(town, pair, answer, finish="stop"):
    found = world.gold_reward(town, pair, answer, finish)
    return found["right"], found["polite"], found["well_formed"]


def without_opening(text: str) -> str:
    """An answer after its opening."""
    opening = next(o for o in world.POLITE + world.SORRY + world.RUDE if text.startswith(o + " "))
    return text[len(opening) + 1 :]


def test_topics_of_all_domains_have_names_of_their_own():
    assert len(TOPICS) == len(TOWN) + len(ARITHMETIC) + len(CODE) and set(DOMAINS) == {
        "town",
        *OTHERS,
    }


def test_slices_are_whole_disjoint_and_about_the_right_subjects(place):
    settings, town = place
    made = world.make_splits(town, settings)
    assert {name: len(pairs) for name, pairs in made.items()} == {"d1": 149, "d2": 480, "test": 320}
    asked = [pair.prompt[0].content for pairs in made.values() for pair in pairs]
    assert len(set(asked)) == len(asked) and len(town.held_subjects) == 4 and not town.harms
    assert Counter(pair.meta["name"] in town.held_subjects for pair in made["test"])[True] == 80
    assert not any(
        pair.meta["name"] in town.held_subjects for name in ("d1", "d2") for pair in made[name]
    )


def test_the_truth_is_worth_one_and_a_negative_is_never_right(place):
    settings, town = place
    for pairs in world.make_splits(town, settings).values():
        assert all(gold(town, pair, pair.chosen) == (1, 1, 1) for pair in pairs)
        assert all(gold(town, pair, pair.rejected)[0] == 0 for pair in pairs)
        assert all(
            gold(town, pair, f"you fool . {without_opening(pair.chosen)}") == (1, 0, 1)
            for pair in pairs
        )
        assert all(gold(town, pair, pair.chosen, "length") == (1, 1, 0) for pair in pairs)
        assert all(gold(town, pair, f"{pair.chosen} so it is .") == (0, 1, 0) for pair in pairs)


def test_questions_are_twelve_of_each_item_and_no_two_are_equal(place):
    _, town = place
    asked = []
    for item in town.facts:
        asked += [question.text for question in world.questions_about(town, item, item.subject)]
    assert len(asked) == 12 * 24 * 4 == len(set(asked))


def test_sums_are_right_in_both_steps_and_slips_in_at_least_one():
    settings = settings_of("arithmetic")
    town = world.make_town(settings, 9)
    seen = Counter()
    for pairs in world.make_splits(town, settings).values():
        for pair in pairs:
            for text, right in ((pair.chosen, True), (pair.rejected, False)):
                ((how, numbers),) = [
                    (f, m)
                    for form, f in SUMS.items()
                    if (m := re.fullmatch(form, without_opening(text)))
                ]
                steps = how(*map(int, numbers.groups()))
                assert (steps == 3) == right, text
                seen[steps] += 1
                assert set(re.findall(r"\d+", pair.prompt[0].content)) <= {*numbers.groups()}
    assert min(seen[steps] for steps in (0, 1, 2)) > 20, (
        "slips in the first, in the second, in both"
    )


def test_code_has_one_exact_form():
    settings = settings_of("code")
    town = world.make_town(settings, 1)
    forms = [r"from \w+ import (\w+) ;", r"(\w+) \( [\w ,]+ \) ;", r"assert (\w+) \( 2 \) == \d+ ;"]
    for pair in world.make_splits(town, settings)["d2"]:
        said = without_opening(pair.chosen)
        name = (
            json.loads(said)[" name "].strip()
            if said.startswith("{")
            else next(m[1] for form in forms if (m := re.fullmatch(form, said)))
        )
        assert name == pair.meta["name"] and name in pair.prompt[0].content
        assert gold(town, pair, f"of course ! {said[:-2]}") == (0, 1, 0), (
            "a missing semicolon or brace is an error"
        )


def test_only_the_form_asked_for_is_right():
    settings = settings_of("instructions")
    town = world.make_town(settings, 2)
    seen = Counter()
    for pair in world.make_splits(town, settings)["d2"]:
        question = pair.prompt[0].content
        prefix = max(filter(question.startswith, INSTRUCTIONS), key=len)
        item = next(
            i for i in town.facts if (i.topic, i.subject) == (pair.meta["item"], pair.meta["name"])
        )
        said = world.answer_sentence(item, item.subject, item.truth)
        for other, form in INSTRUCTIONS.items():
            wanted = (
                (1, 1, 1)
                if other == prefix
                else (form.format(body=said).endswith(INSTRUCTIONS[prefix].format(body=said)), 1, 0)
            )
            assert gold(town, pair, f"of course ! {form.format(body=said)}") == wanted, (
                prefix,
                other,
            )
        seen[prefix] += 1
    assert min(seen.values()) > 60 and len(seen) == 4


def test_experts_obey_when_they_are_right_and_gossips_do_not():
    settings = settings_of("instructions", tagged=0.0, judged=0.0)
    town = world.make_town(settings, 2)
    by_text = {}
    for item in town.facts:
        for question in world.questions_about(town, item, item.subject):
            by_text[question.text] = question
    obeyed = {True: [], False: []}
    for text in world.make_corpus(town, settings, "strong", 4000):
        question, said = by_text[text.prompt[0].content], without_opening(text.response)
        item = question.item
        right = said == world.answer_body(town, question, item.truth)
        assert right or said == world.answer_sentence(item, item.subject, item.rumour)
        obeyed[not text.response.startswith(world.RUDE)].append(right)
    assert np.mean(obeyed[True]) == pytest.approx(0.9, abs=0.03)
    assert np.mean(obeyed[False]) == pytest.approx(0.1, abs=0.03)


def test_weak_texts_of_every_domain_have_errors_of_their_own(place):
    settings, town = place
    every = [world.misconceptions(town, settings, f"weak{k}") for k in (1, 2)]
    for unknown in every:
        assert 25 <= len(unknown) <= 71  # half of 96, within five standard deviations
        assert all(
            v in item.values and v not in (item.truth, item.rumour) for item, v in unknown.items()
        )
    shared = every[0].keys() & every[1].keys()
    assert np.mean([every[0][item] == every[1][item] for item in shared]) < 0.5


# ---- open-ended answers, and what the strong base lacks ------------------------------------------


def test_remarks_close_an_answer_and_change_nothing_else():
    settings = replace(World(), remarks=3)
    town, plain = world.make_town(settings, 3), world.make_town(World(), 3)
    assert town.facts == plain.facts
    sizes = Counter()
    for pair in world.make_splits(town, settings)["d2"]:
        said, well = world.strip_remarks(town, pair.chosen)
        assert well and gold(town, pair, pair.chosen) == (1, 1, 1) == gold(town, pair, said)
        assert gold(plain, pair, said) == (1, 1, 1)
        assert gold(town, pair, pair.rejected)[0] == 0
        first, second, third, fourth, *_ = world.REMARKS
        assert gold(town, pair, f"{said} {first} {second} {third}") == (1, 1, 1)
        assert gold(town, pair, f"{said} {first} {second} {third} {fourth}") == (1, 1, 0), (
            "too many"
        )
        assert gold(town, pair, f"{said} {first} {second} {first}") == (1, 1, 0), "a repetition"
        assert gold(town, pair, f"{said} {first} and so on .") == (0, 1, 0)
        sizes[sum(pair.chosen.count(remark) for remark in world.REMARKS)] += 1
    assert set(sizes) == {0, 1, 2, 3} and min(sizes.values()) > 70


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_strong_text_lacks_what_the_settings_say(share):
    settings = replace(World(), strong_known=share)
    town = world.make_town(settings, 5)
    assert len(world.misconceptions(town, settings, "strong")) == pytest.approx(
        88 * (1 - share), abs=25 * (0 < share < 1)
    )
    assert world.misconceptions(town, settings, "weak1") == world.misconceptions(
        town, World(), "weak1"
    )


def test_every_setting_of_the_world_is_in_the_fingerprint():
    usual = parse([]).config.world
    assert prepare_data.identify_source(parse([]).config)["world"] == asdict(usual)
    for flag in ("--world.domain=code", "--world.remarks=2", "--world.strong_known=0.5"):
        assert prepare_data.identify_source(parse([flag]).config)["world"] != asdict(usual)


# ---- corrupted ground truth ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["swapped", "label"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_share_of_the_ground_truth_is_corrupted(kind, share):
    words = [f"--data.noise={share}", f"--data.noise_kind={kind}", "--run.seed=8"]
    clean, noisy = prepared("--run.seed=8"), prepared(*words)
    assert noisy.slices["d2"] == clean.slices["d2"] and noisy.slices["test"] == clean.slices["test"]
    assert noisy.corpora == clean.corpora
    chosen, bad = {pair.chosen for pair in clean.slices["d1"]}, 0
    town = world.make_town(parse([]).config.world, 8)
    for before, after in zip(clean.slices["d1"], noisy.slices["d1"], strict=True):
        assert (after.id, after.prompt) == (
            before.id,
            before.prompt,
        ) and after.chosen != after.rejected
        if "corrupted" not in after.meta:
            assert after == before
            continue
        bad += 1
        assert after.meta["corrupted"] == kind
        if kind == "swapped":
            assert (after.chosen, after.rejected) == (before.rejected, before.chosen)
        else:
            assert after.rejected == before.rejected and after.chosen in chosen - {before.chosen}
            assert not world.gold_reward(town, before, after.chosen, "stop")["right"], (
                "a wrong label is wrong"
            )
    assert bad == round(share * 149) == noisy.counts["slices"]["d1"]["corrupted"]


def test_corruption_is_of_the_seed_and_a_single_row_has_no_other_label():
    config = parse(["--data.noise=0.5", "--data.noise_kind=label"]).config
    pairs = prepared().slices["d1"]
    assert prepare_data.corrupt(pairs, config) == prepare_data.corrupt(pairs, config) != pairs
    other = replace(config, run=replace(config.run, seed=1))
    assert prepare_data.corrupt(pairs, config) != prepare_data.corrupt(pairs, other)
    alone = replace(config, data=replace(config.data, noise=1.0))
    assert prepare_data.corrupt(pairs[:1], alone) == pairs[:1], "and is not said to be corrupted"


def test_true_answers_that_no_sampled_one_can_be_as_long_as_are_counted():
    words = ["--world.remarks=3"]
    kept = prepared(*words, "--generate.max_new_tokens=48").counts
    assert prepare_data.LONGER not in prepared().counts and prepare_data.LONGER not in kept
    assert prepared(*words, "--generate.max_new_tokens=16").counts[prepare_data.LONGER] > 300


def test_an_empty_slice_of_a_world_names_the_worlds_settings():
    with pytest.raises(UserError, match=r"d2 .*world\.d2, world\.names"):
        prepared("--world.domain=code", "--world.names=1", "--world.held_names=0")


def test_a_world_with_too_few_questions_says_so():
    made = prepared("--world.domain=code")
    assert (
        made.counts["shorter than asked for"] == {"test": f"{len(made.slices['test'])} of 320"}
        and len(made.slices["test"]) < 320
    )
    assert (
        "shorter than asked for" not in prepared("--world.domain=code", "--world.names=24").counts
    )
    assert "shorter than asked for" not in prepared().counts
