"""What self-rewarding, RLAIF and RLCD ask, and the preferences they read from the replies."""

import math

import pytest
from runs import invoke, rows_of, stages_of, write_stub

from minmacpo.config.schema import Config, Feedback
from minmacpo.data.records import Example, Message, Sample
from minmacpo.method import ai_feedback as feedback
from minmacpo.pipeline.artifacts import Score

WORLD = Feedback(
    rubric="{prompt} {response} good ?",
    verdicts=("bad .", "good ."),
    compare="{prompt} 1 {first} 2 {second} ?",
    options=("one", "two"),
    good_tags=("nice", "true"),
    bad_tags=("rude", "false"),
)


def said(name: str, text: str, question: str = "q", **more) -> Sample:
    return Sample(
        name, (Message("user", question),), text, "stop", (3,), -1.0, 1.0, "student", 0, **more
    )


def content(example: Example) -> str:
    return example.prompt[-1].content


def test_every_speaker_has_a_name_and_a_tag_has_none():
    system, user, bot, tag = (
        Message(role, role[:1]) for role in ("system", "user", "assistant", "tag")
    )
    assert feedback.conversation((user,)) == feedback.conversation((user, tag)) == "u"
    assert feedback.conversation((user, bot, user)) == "Human: u\n\nAssistant: a\n\nHuman: u"
    assert feedback.conversation((system, user, tag)) == "System: s\n\nHuman: u"


# ---- self-rewarding ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply,wanted",
    [
        ("Good because. Score: 4", 4),
        ("Score: 2 … no, Score: 5", 5),
        ("score: 3", None),
        ("", None),
        ("Score: 0", 0),
        ("Score: 3/5", 3),
    ],
)
def test_the_score_is_the_last_verdict(reply, wanted):
    assert feedback.parse_score(reply, Config().feedback.verdicts) == wanted


def test_of_two_verdicts_at_one_place_the_longer_counts():
    assert feedback.parse_score("Score: 10", tuple(f"Score: {i}" for i in range(11))) == 10


def test_judgements_ask_about_every_candidate():
    groups = feedback.rubric_questions(
        WORLD.rubric, [said("a", "x"), said("a", "y"), said("b", "z {odd}", "q2")]
    )
    assert [[(e.id, content(e)) for e in group] for group in groups] == [
        [("a/0", "q x good ?"), ("a/1", "q y good ?")],
        [("b/0", "q2 z {odd} good ?")],
    ]


def test_the_best_mean_score_is_chosen_and_ties_and_failures_are_counted():
    candidates = [
        said("a", "x"),
        said("a", "y"),
        said("a", "z"),
        said("b", "u"),
        said("b", "v"),
        said("c", "w"),
        said("c", "t"),
    ]
    verdicts = {
        "a/0": ["bad .", "good ."],
        "a/1": ["good .", "good ."],
        "a/2": ["bad .", "what ?"],
        "b/0": ["good ."],
        "b/1": ["good ."],
        "c/0": ["?"],
        "c/1": ["good ."],
    }
    replies = [said(name, reply) for name, given in verdicts.items() for reply in given]
    pairs, counts = feedback.prefer_highest_score(candidates, replies, WORLD.verdicts)
    assert [(p.chosen, p.rejected) if p else None for p in pairs] == [("y", "z"), None, None]
    assert counts == {"replies": 10, "parse_failures": 2}


# ---- RLAIF ---------------------------------------------------------------------------------------


def test_comparisons_ask_each_option_in_both_orders():
    (group,) = feedback.comparison_questions(
        WORLD.compare, WORLD.options, [said("a", "x"), said("a", "y")]
    )
    assert [(e.id, content(e), e.response) for e in group] == [
        ("a/0", "q 1 x 2 y ?", "one"),
        ("a/1", "q 1 x 2 y ?", "two"),
        ("a/2", "q 1 y 2 x ?", "one"),
        ("a/3", "q 1 y 2 x ?", "two"),
    ]


def test_log_probabilities_of_the_options_are_grouped_by_prompt():
    (group,) = feedback.comparison_questions(
        WORLD.compare, WORLD.options, [said("a", "x"), said("a", "y")]
    )
    scores = [Score(logp=-float(number), tokens=1) for number in range(4)]
    assert feedback.option_logps(group, scores) == {"a": [0, -1, -2, -3]}


def test_both_orders_are_averaged():
    """By hand: p(first) = σ(l_one - l_two) in the first order, σ(l_two - l_one) in the second."""
    one, two = 1 / (1 + math.exp(-(2 - 1))), 1 / (1 + math.exp(-(5 - 3)))
    assert feedback.first_preferred([2, 1, 3, 5]) == pytest.approx((one + two) / 2)
    assert feedback.first_preferred([-1, -5, -1, -5]) == pytest.approx(0.5), (
        "a labeller that likes a place prefers nothing"
    )
    assert feedback.first_preferred([0, -5000, -5000, 0]) == 1
    assert feedback.first_preferred([-5000, 0, 0, -5000]) == pytest.approx(0)


def test_a_comparison_prefers_what_the_labeller_does():
    logps = {"a": [-1, -2, -3, -1], "b": [-1, -2, -1, -9], "same": [-1, -2, -3, -1]}
    candidates = [
        *(said(n, t) for n in ("a", "b", "lost") for t in "xy"),
        said("same", "z"),
        said("same", "z"),
    ]
    pairs, counts = feedback.prefer_likelier(candidates, logps)
    assert [(p.chosen, p.rejected) if p else None for p in pairs] == [
        ("x", "y"),
        ("y", "x"),
        None,
        None,
    ]
    assert counts == {"order_decided": 1}


# ---- RLCD ----------------------------------------------------------------------------------------


def test_tags_are_matched_drawn_by_prompt_and_opposite_in_earlier_turns():
    long = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    rows = [Example(str(i), long, "") for i in range(40)]
    good, bad = (
        [group[0].prompt for group in feedback.add_tags(rows, WORLD, 3, side)]
        for side in (True, False)
    )
    pairs = {(g[-1].content, b[-1].content) for g, b in zip(good, bad, strict=True)}
    assert pairs == {("nice", "rude"), ("true", "false")}
    for g, b in zip(good, bad, strict=True):
        assert (
            [m.role for m in g]
            == ["user", "tag", "assistant", "user", "tag"]
            == [m.role for m in b]
        )
        assert g[1].content == b[-1].content and b[1].content == g[-1].content
    assert good == [group[0].prompt for group in feedback.add_tags(rows, WORLD, 3, True)]


def test_pairs_of_tags_have_the_prompt_without_them():
    asked = Example("a", (Message("user", "q"),), "truth", {"kind": "fact"})
    good = [said("a", "yes"), said("b", "yes")]
    prompts = [asked, Example("b", asked.prompt, "")]
    pairs, _ = feedback.prefer_good_tag(prompts, good, bad=[said("a", "no")])
    assert pairs[1] is None and (pairs[0].prompt, pairs[0].chosen, pairs[0].rejected) == (
        asked.prompt,
        "yes",
        "no",
    )


# ---- in runs
# ---------------------------------------------------------------------------------------


def test_what_was_asked_and_answered_is_on_the_disk(methods):
    run = methods["rlaif"]
    asked, scores = (
        rows_of(run / "round1/judge_questions/questions.jsonl"),
        rows_of(run / "round1/judgements/scores.jsonl"),
    )
    assert len(asked) == 4 * 12 and [a["id"] for a in asked] == [s["id"] for s in scores]
    assert {a["response"] for a in asked} == {"first .", "second ."}
    assert "bases/weak1" in stages_of(run)["round1/judgements"]["inputs"]
    chosen = {
        p["id"]: (p["chosen"], p["rejected"])
        for p in rows_of(run / "round1/preferences/pairs.jsonl")
    }
    for t in (1, 2):
        assert all(
            (p["chosen"], p["rejected"]) == chosen[p["id"]]
            for p in rows_of(run / f"round{t}/pairs_student/pairs.jsonl")
        )
        settings = stages_of(run)[f"round{t}/student_pos"]["settings"]
        assert settings["sft_weight"] == 0 and settings["reference"] == "init"


def test_self_rewarding_judges_itself_anew_each_round(methods):
    run = methods["self-rewarding"]
    for t in (1, 2):
        inputs = stages_of(run)[f"round{t}/judgements"]["inputs"]
        assert f"round{t - 1}/student_pos" in inputs and "bases/strong" in inputs
        counts = stages_of(run)[f"round{t}/preferences"]["counts"]
        assert counts["replies"] == 12 * 4 * 3 and counts["parse_failures"] >= 0
        assert stages_of(run)[f"round{t}/student_pos"]["settings"]["reference"] == "previous"


def test_rlcd_speaks_under_tags_and_learns_without(methods):
    run = methods["rlcd"]
    for side, tag in (("good", "an expert speaks"), ("bad", "a gossip speaks")):
        rows = rows_of(run / f"round1/{side}_tag_answers/samples.jsonl")
        assert all(row["prompt"][-1] == {"role": "tag", "content": tag} for row in rows)
    assert all(len(p["prompt"]) == 1 for p in rows_of(run / "round2/pairs_student/pairs.jsonl"))


def test_questions_too_long_are_counted_and_none_left_is_an_error(place):
    """In the world a rubric of 100 words leaves no room; the run ends with a sentence."""
    words = [
        write_stub(place),
        "--method=self-rewarding",
        "--macpo.rounds=1",
        "--macpo.controls=false",
        "--feedback.rubric=" + "word " * 150 + "{prompt} {response}",
    ]
    ended = invoke("train", *words)
    assert ended.code == 2 and "no question fits" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    "words,wanted",
    [
        (["--feedback.rubric=no holes"], "feedback.rubric"),
        (["--feedback.rubric={prompt} {response} {more}"], "feedback.rubric"),
        (["--feedback.rubric={prompt} {response} {"], "feedback.rubric"),
        (["--feedback.rubric={prompt!z} {response}"], "feedback.rubric"),
        (["--feedback.rubric={prompt:d} {response}"], "feedback.rubric"),
        (["--feedback.compare={prompt} {first:99999999999} {second}"], "feedback.compare"),
        (["--feedback.compare={prompt}"], "feedback.compare"),
        (["--macpo.select=perplexity,perplexity"], "macpo.select"),
        (["--feedback.verdicts=one"], "feedback.verdicts"),
        (["--feedback.options=a,a"], "feedback.options"),
        (["--feedback.bad_tags=a,b"], "feedback.bad_tags"),
        (["--feedback.candidates=1"], "feedback.candidates"),
        (["--macpo.select=perplexity,random"], "macpo.select"),
        (["--macpo.select=agreement", "--macpo.teachers=1"], "macpo.teachers"),
        (["--macpo.select=agrement"], "agreement"),
        (["--macpo.keep_fraction=0"], "macpo.keep_fraction"),
        (["--macpo.self_fraction=0.5", "--macpo.mutual_positives=false"], "macpo.self_fraction"),
        (["--macpo.negatives=tail", "--macpo.refresh_negatives=true"], "macpo.negatives"),
        (["--data.noise=1.5"], "data.noise"),
        (["--world.tagged=0.9", "--world.judged=0.2"], "world.tagged"),
    ],
)
def test_impossible_settings_are_refused(place, words, wanted):
    ended = invoke("train", "@tiny", *words)
    assert ended.code == 2 and wanted in ended.err and not (place / "runs").exists()
