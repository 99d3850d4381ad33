"""From files or the built-in world to the splits: over-long rows, noise, files for each split."""

import functools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from byte_pairs import SMOLLM_2_LACKS, lacking_bytes
from runs import invoke, rows_of, stages_of, train, write_stub
from test_bad_input import ROWS, refused
from test_chat_template import base_folder
from texts import hh_row, make_pair, random_json_text, write_lines

from minmacpo import UserError
from minmacpo.config.parse import parse
from minmacpo.data import synthetic
from minmacpo.data.chat_template import Renderer, render, render_prompt
from minmacpo.data.records import Message, Pair
from minmacpo.data.tokenizer import load_tokenizer
from minmacpo.pipeline import prepare_data

LONG = "".join(chr(97 + number % 26) for number in range(300))
GIVEN_MODELS = ("--model.student=x", "--model.teachers=a,b,c")  # so that no tokenizer is made


def config_for(truncation_mode: str, max_prompt_length: int = 40, max_length: int = 64):
    """Settings with small limits."""
    flags = (
        f"--data.max_prompt_length={max_prompt_length}",
        f"--data.max_length={max_length}",
        f"--data.truncation_mode={truncation_mode}",
        "--data.template=plain",
        "--generate.max_new_tokens=8",
    )
    return parse(["@tiny", *flags, *GIVEN_MODELS]).config


def prepare_d2(config, tokenizer, *pairs: Pair) -> tuple[list[Pair], dict[str, int]]:
    """The D2 that is made of these pairs, and what is counted of it."""
    given = [Renderer(tokenizer, "plain")]
    prepared = prepare_data.prepare_splits(config, {"d2": list(pairs)}, {}, given, {})
    return prepared.splits["d2"], prepared.counts["splits"]["d2"]


# ---- over-long rows -------------------------------------------------------------------------


def test_over_long_rows_are_dropped_and_counted(tokenizer):
    short = make_pair("hello there")
    over_long = [make_pair(LONG), make_pair("hi", chosen=LONG), make_pair("ho", rejected=LONG)]
    pairs, counts = prepare_d2(config_for("drop"), tokenizer, short, *over_long)
    assert pairs == [short]
    assert counts == {"rows": 1, "over-long prompt": 1, "over-long answer": 2}


@pytest.mark.parametrize("template", ["plain", "turns"])
@pytest.mark.parametrize(
    ("chosen", "rejected"), [("of course", "no"), ("no", "happy to help"), ("x y z", "日本")]
)
def test_prompt_and_answer_are_counted_to_the_token(tokenizer, template, chosen, rejected):
    """A row of exactly max_length tokens, leading space and end token included, is used."""
    pair = make_pair("where does kadol live ? " * 4, chosen=chosen, rejected=rejected)
    prompt_tokens = len(render_prompt(tokenizer, template, pair.prompt))
    row_tokens = 0
    for answer in (chosen, rejected):
        row_tokens = max(row_tokens, len(render(tokenizer, template, pair.prompt, answer).ids))
    assert prompt_tokens > 16

    def truncate(max_prompt_length: int, max_length: int) -> tuple[Pair | None, Counter]:
        config = config_for("drop", max_prompt_length, max_length)
        renderer = Renderer(tokenizer, template)
        reasons = Counter()
        return prepare_data.truncate_pair(
            config, pair, [renderer], reasons, [pair.chosen, pair.rejected]
        ), reasons

    assert truncate(prompt_tokens, row_tokens) == (pair, {})
    assert truncate(prompt_tokens, row_tokens - 1) == (None, {"over-long answer": 1})
    assert truncate(prompt_tokens - 1, row_tokens) == (None, {"over-long prompt": 1})


@pytest.mark.parametrize(
    ("truncation_mode", "counts"),
    [
        ("drop", {"rows": 1, "over-long answer": 2, "over-long prompt": 1}),
        ("cut_prompt", {"rows": 3, "over-long answer": 1, "prompt cut": 2}),
    ],
)
def test_an_over_long_answer_is_not_taken_for_an_over_long_prompt(
    tokenizer, truncation_mode, counts
):
    """The prompt is within its limit; the answer leaves it no room. And the other way round."""
    medium = make_pair("q w e " * 5, chosen="x y z " * 6)
    max_length = len(render(tokenizer, "plain", medium.prompt, medium.chosen).ids) - 1
    assert len(render_prompt(tokenizer, "plain", medium.prompt)) <= 40 < max_length

    config = config_for(truncation_mode, max_length=max_length)
    pairs = [make_pair("hi"), medium, make_pair(LONG), make_pair(LONG, chosen=LONG)]
    assert prepare_d2(config, tokenizer, *pairs)[1] == counts


def test_a_prompt_that_no_cut_makes_short_enough_is_dropped(tokenizer):
    """The marks of the template alone are longer than max_prompt_length."""
    marks = len(render_prompt(tokenizer, "plain", (Message("user", ""),)))
    reasons = Counter()
    config = config_for("cut_prompt", max_prompt_length=marks - 1)
    renderer = Renderer(tokenizer, "plain")
    assert prepare_data.truncate_pair(config, make_pair(LONG), [renderer], reasons, []) is None
    assert reasons == {"over-long prompt": 1}


def test_a_system_message_stays_when_its_dialogue_is_cut():
    system = Message("system", "be kind")
    turns = tuple(Message("user", f"turn {number} of them") for number in range(4))

    def cut(max_characters: int, *prompt: Message):
        def fits(messages) -> bool:
            return sum(len(message.content) for message in messages) <= max_characters

        return prepare_data.cut_prompt(prompt, fits)

    assert cut(40, system, *turns) == (system, *turns[2:])
    first, last = cut(12, system, *turns)
    assert first == system
    assert turns[-1].content.endswith(last.content)
    assert cut(7, system, *turns) is None
    assert cut(4, system) == (Message("system", "kind"),)


def test_a_cut_prompt_keeps_its_end(tokenizer):
    config = config_for("cut_prompt")
    short = make_pair("hello there")
    last_turn = LONG + " the end of it"
    long = make_pair("first", "old answer", last_turn)
    pairs, counts = prepare_d2(config, tokenizer, short, long, make_pair("hi", chosen=LONG))
    assert counts == {"rows": 2, "prompt cut": 1, "over-long answer": 1}

    first, cut = pairs
    assert first == short
    assert cut == replace(long, prompt=cut.prompt)  # answers and id are as they were
    (turn,) = cut.prompt
    assert turn.role == "user"
    assert turn.content.endswith(" the end of it")
    assert last_turn.endswith(turn.content)
    # it is cut no more than needed
    assert 20 < len(render_prompt(tokenizer, "plain", cut.prompt)) <= config.data.max_prompt_length
    row = render(tokenizer, "plain", cut.prompt, cut.chosen)
    assert len(row.ids) <= config.data.max_length


def test_whole_turns_go_first(tokenizer):
    long = make_pair(LONG, "middle", "the last question")
    (cut,), _ = prepare_d2(config_for("cut_prompt"), tokenizer, long)
    assert cut.prompt == (Message("assistant", "middle"), Message("user", "the last question"))


def test_prompts_that_a_cut_makes_equal_stand_in_one_split(tokenizer):
    splits = {}
    for name in ("d1", "d2", "test"):
        splits[name] = [
            make_pair(LONG + name, "old", "the last question"),
            make_pair("of " + name),
        ]
    prepared = prepare_data.prepare_splits(
        config_for("cut_prompt"), splits, {}, [Renderer(tokenizer, "plain")], {}
    )
    sizes = {name: len(pairs) for name, pairs in prepared.splits.items()}
    assert sizes == {"d1": 2, "d2": 1, "test": 1}
    counts = prepared.counts["splits"]["test"]
    assert counts == {"rows": 1, "prompt cut": 1, "equal after the cut": 1}


def test_an_answer_that_leaves_room_for_a_shorter_prompt_only(tokenizer):
    """max_length counts prompt and answer: a prompt within its own limit may be too long."""
    answer = "x y z " * 6
    answer_tokens = len(tokenizer.encode(answer))
    pair = make_pair("q w e " * 5, chosen=answer)
    prompt_tokens = len(render_prompt(tokenizer, "plain", pair.prompt))
    assert prompt_tokens <= 40 < 48 < prompt_tokens + answer_tokens

    pairs, _ = prepare_d2(config_for("drop", max_length=48), tokenizer, make_pair("hi"), pair)
    assert len(pairs) == 1

    max_length = answer_tokens + 26
    config = config_for("cut_prompt", max_length=max_length)
    _, cut = prepare_d2(config, tokenizer, make_pair("hi"), pair)[0]
    assert len(render(tokenizer, "plain", cut.prompt, answer).ids) <= max_length


@pytest.mark.parametrize("truncation_mode", ["drop", "cut_prompt"])
def test_every_row_fits_whatever_the_text(tokenizer, seed, truncation_mode):
    rng = random.Random(seed)
    pairs = [make_pair("hi")]
    for _ in range(60):
        turns = []
        for _ in range(rng.choice((1, 3))):
            turns.append(random_json_text(rng).strip() + "x" * rng.randrange(30))
        chosen = "y" + random_json_text(rng).strip()
        pairs.append(make_pair(*turns, chosen=chosen, rejected="n" * rng.randint(1, 30)))

    config = config_for(truncation_mode)
    fitting, counts = prepare_d2(config, tokenizer, *pairs)
    reasons = ("rows", "over-long prompt", "over-long answer", "equal after the cut")
    assert sum(counts.get(reason, 0) for reason in reasons) == 61
    for pair in fitting:
        prompt = render_prompt(tokenizer, "plain", pair.prompt)
        assert len(prompt) <= config.data.max_prompt_length
        for answer in (pair.chosen, pair.rejected):
            row = render(tokenizer, "plain", pair.prompt, answer)
            assert len(row.ids) <= config.data.max_length


def test_no_row_left_in_a_split_is_an_error(tokenizer):
    with pytest.raises(UserError, match="no row is left for d2"):
        prepare_d2(config_for("drop"), tokenizer, make_pair(LONG))


def test_the_tokenizer_that_needs_most_tokens_decides(tokenizer):
    class Wordy:
        bos = eos = begin = 0
        space_before = "never"
        stripping_ids = frozenset()
        stripping_before_ids = frozenset()

        def encode(self, text, start=False):
            return [1] * (3 * len(text))

    splits = {"d2": [make_pair("a question of twenty")]}
    with pytest.raises(UserError, match="no row is left"):
        prepare_data.prepare_splits(
            config_for("drop"),
            splits,
            {},
            [Renderer(tokenizer, "plain"), Renderer(Wordy(), "plain")],
            {},
        )


# ---- characters without a token -------------------------------------------------------------


def lacking_folder(folder: Path, seed: int) -> Path:
    """A base whose byte-level tokenizer lacks the tokens that SmolLM2's lacks."""
    base_folder(folder, "smollm-2", seed)
    file = folder / "tokenizer.json"
    file.write_text(lacking_bytes(file.read_text(), SMOLLM_2_LACKS))
    return folder


def test_characters_without_a_token_are_counted(tmp_path, seed):
    """Each once, in whatever part of the rows they stand, under every tokenizer that lacks them."""
    tokenizer = load_tokenizer(lacking_folder(tmp_path / "base", seed))
    pair = make_pair("a\x04b\x16", chosen="no\x1d", rejected="yes\x07")
    given = [Renderer(tokenizer, "plain")]
    prepared = prepare_data.prepare_splits(config_for("drop"), {"d2": [pair]}, {}, given, {})
    assert prepared.counts["characters without a token"] == {tokenizer.where: 3}


def test_programs_that_read_a_file_say_how_many_characters_they_leave_out(tmp_path, seed):
    """In one line, whatever the number of rows."""
    base = lacking_folder(tmp_path / "base", seed)
    rows = []
    for number in range(40):
        prompt = f"where is house {number} ?"
        rows.append({"prompt": prompt, "chosen": f"in row\x13 {number}", "rejected": "no"})
    file = write_lines(tmp_path / "rows.jsonl", *map(json.dumps, rows))
    says = f"{base}/tokenizer.json: has no token for 40 characters of the texts"

    measured = invoke("eval", "ppl", base, file, "--data.template=plain")
    assert measured.code == 0, measured.err
    assert [line for line in measured.err.splitlines() if says in line][1:] == []
    assert says in measured.err

    answered = invoke(
        "sample", base, "a\x04b\x16?", "--data.template=plain", "--generate.max_new_tokens=2"
    )
    assert answered.code == 0, answered.err
    assert answered.err.count(says.replace(" 40 ", " 2 ")) == 1

    given = f"--model.student={base}", f"--model.teachers={base},{base}"
    settings = *given, f"--data.path={file}", f"--run.root={tmp_path / 'runs'}"
    planned = train(write_stub(tmp_path), *settings, "--data.template=plain", "--dry_run")
    assert f"characters without a token: {{'{base}/tokenizer.json'" in planned.out


# ---- shares ---------------------------------------------------------------------------------


def test_rows_outside_the_shares_are_counted(tokenizer, tmp_path):
    rows = [hh_row((f"question {number}",)) for number in range(100)]
    file = write_lines(tmp_path / "x.jsonl", *rows)
    flags = (f"--data.path={file}", "--data.shares=0.1,0.1,0.1,0.1", "--data.template=plain")
    models = ("--model.student=x", "--model.teachers=a")
    config = parse(["@tiny", *flags, *models]).config
    counts = prepare_data.prepare_data(config, [Renderer(tokenizer, "plain")]).counts
    assert counts["in no split"] == 60
    assert counts["kept"] == 100


def test_weak_bases_read_shares_of_their_own(tokenizer, tmp_path):
    rows = [hh_row((f"question {number}",)) for number in range(260)]
    file = write_lines(tmp_path / "x.jsonl", *rows)

    def corpora(weak_share: float, teachers: str = "a,b"):
        flags = (
            f"--data.path={file}",
            f"--pretrain.weak_share={weak_share}",
            "--data.shares=0.8,0.05,0.1,0.05",
            "--data.template=plain",
            "--model.student=x",
            f"--model.teachers={teachers}",
        )
        config = parse(["@tiny", *flags]).config
        return prepare_data.prepare_data(config, [Renderer(tokenizer, "plain")]).corpora

    halves = corpora(0.5)
    assert list(halves) == ["strong", "weak1", "weak2"]
    assert len(halves["strong"]) == 2 * 208  # both answers of 0.8 * 260 rows
    assert 150 < len(halves["weak1"]) < 266
    assert halves["weak1"] != halves["weak2"]
    assert all(document in halves["strong"] for document in halves["weak1"])

    assert corpora(0.5) == halves
    assert corpora(0.5, teachers="a")["weak1"] == halves["weak1"]
    assert corpora(1.0)["weak1"] == halves["strong"]


# ---- files for each split -------------------------------------------------------------------


def flags_of_files(folder: Path) -> list[str]:
    """Flags with D1 of pairs, D2 of prompts, a test of answers, and dialogues for the bases.

    Two prompts stand in several of the files.
    """
    pairs = []
    for number in range(9):
        answers = [f"good {number}", f"bad {number}"]
        pairs.append({"prompt": f"ask {number}", "response": answers})
    write_lines(folder / "d1.json", json.dumps(pairs))

    prompts = [json.dumps({"prompt": f"tell {number}"}) for number in range(8)]
    write_lines(folder / "d2.jsonl", *prompts, json.dumps({"prompt": "ask 3"}))

    tasks = []
    for number in range(7):
        tasks.append({"instruction": f"do {number}", "input": "", "output": f"done {number}"})
    tasks.append({"instruction": "ask 4", "input": "", "output": "x"})
    write_lines(folder / "test.json.gz", json.dumps(tasks))

    write_lines(folder / "all.jsonl", *ROWS)
    return [
        f"--data.path={folder / 'all.jsonl'}",
        f"--data.d1={folder / 'd1.json'}",
        f"--data.d2={folder / 'd2.jsonl'}",
        f"--data.test={folder / 'test.json.gz'}",
        "--data.template=plain",
        "--data.shares=1,0,0,0",
        "--model.vocab=330",
    ]


def test_a_run_on_files_for_each_split(place):
    """Prompts suffice for D2, answers for the test: there is no preference accuracy, then."""
    flags = ("--macpo.rounds=1", "--macpo.controls=false", "--run.name=own")
    out = train(write_stub(place / "p"), *flags_of_files(place), *flags).out
    run = place / "runs/own"

    ids = json.loads((run / "data/slices/split.json").read_text())
    for name in ("d1", "d2", "test"):
        rows = rows_of(run / f"data/slices/{name}.jsonl")
        assert len(rows) == 8
        assert [row["id"] for row in rows] == ids[name]

    counts = stages_of(run)["data/slices"]["counts"]
    left_out = {"d2": 0, "test": 0, "first turn of another split": 2}
    assert counts["repeated prompts left out"] == left_out
    report = counts["read test test"]
    assert report.startswith("instruction: text, output: text; 8 rows, 8 kept")

    for row in json.loads((run / "eval/table.json").read_text())["rows"]:
        assert "accuracy" not in row
        assert row["perplexity"] > 1
    assert "pref.acc" not in out
    page = (run / "report.html").read_text()
    assert "Perplexity of true answers" in page


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--macpo.controls=true"], "no row of d2 has a chosen answer"),
        (["--run.method=dpo-truth"], "no row of d2 has a rejected answer"),
        (["--data.d1={}/test.json.gz"], "no row is left for d1"),
        (
            ["--data.test={}/d2.jsonl"],
            "no row is left for d2 (too few rows, or their prompts are in another split)",
        ),
        (
            ["--data.test={}/d2.jsonl", "--data.d2={}/test.json.gz"],
            "no row is left for test (without chosen answer: 9)",
        ),
        (["--data.d1=nowhere"], "data.d1: nowhere does not exist"),
        (["--data.d2={}/p"], "data.d2: no .jsonl"),
        (["--data.path=none"], "data.path"),
        (["--data.test=none"], "data.shares"),
        (["--data.truncation_mode=raise", "--data.max_prompt_length=8"], "is too long"),
    ],
)
def test_what_the_splits_need(place, flags, words):
    preset = write_stub(place / "p")
    more = [flag.format(place) for flag in flags]
    base = [preset, *flags_of_files(place), "--macpo.controls=false"]
    assert words in refused(place, *base, *more)


def test_long_rows_may_be_an_error(place):
    preset = write_stub(place / "p")
    flags = ("--macpo.controls=false", "--data.max_prompt_length=10", "--dry_run")
    base = [preset, *flags_of_files(place), *flags]
    assert "over-long prompt" in invoke("train", *base).err

    sentence = refused(place, *base, "--data.truncation_mode=raise")
    assert "d1: the row that begins with 'ask 0'" in sentence


def test_what_a_run_reads_is_in_its_recipe(place):
    path, d1, d2, test, *_ = flags_of_files(place)

    def source(*flags: str) -> str:
        return json.dumps(prepare_data.identify_source(parse([path, *flags]).config))

    sources = [
        source(),
        source(d1),
        source(d2),
        source(test),
        source("--data.preference_label=safer"),
        source("--data.on_invalid_row=skip"),
    ]
    assert len(set(sources)) == len(sources)


# ---- given bases ----------------------------------------------------------------------------


def prepare_rows(place, tokenizer, *flags: str, rows=None):
    """The texts of a run on own rows, all of whose bases are given."""
    if rows is None:
        rows = [{"prompt": f"ask {n}", "chosen": "yes", "rejected": "no"} for n in range(40)]
    file = write_lines(place / "own.jsonl", *map(json.dumps, rows))
    words = ["@hh", f"--data.path={file}", *GIVEN_MODELS, *flags]
    config = parse(words).config
    template = prepare_data.base_templates(config)["weak1"]
    return prepare_data.prepare_data(config, [Renderer(tokenizer, template)])


def test_the_default_shares_leave_d0_out_where_all_bases_are_given(place, tokenizer):
    prepared_rows = prepare_rows(place, tokenizer)
    sizes = {name: len(pairs) for name, pairs in prepared_rows.splits.items()}
    assert sizes == {"d1": 10, "d2": 18, "test": 12}  # 0.1, 0.18 and 0.12 of 0.4
    assert prepared_rows.counts["D0"].startswith("not used, as all bases are given")
    assert "0, 0.25, 0.45, 0.3" in prepared_rows.counts["D0"]
    assert prepared_rows.warnings == []


def test_a_share_of_d0_that_nothing_reads_is_said(place, tokenizer):
    prepared_rows = prepare_rows(place, tokenizer, "--data.shares=0.5,0.2,0.2,0.1")
    assert len(prepared_rows.splits["d1"]) == 8
    (warning,) = prepared_rows.warnings
    assert "data.shares gives D0 50% of the first turns" in warning
    assert "40 answers" in warning


@pytest.mark.parametrize(
    ("flags", "kept", "dropped"),
    [
        ((), 6, 3),  # the controls train on D2's true answers
        (("--run.method=ceiling", "--macpo.controls=false"), 6, 3),
        (("--macpo.controls=false",), 9, 0),
        (("--run.method=dpo-truth",), 3, 6),
    ],
)
def test_only_answers_that_are_read_have_to_fit(place, tokenizer, flags, kept, dropped):
    long = LONG * 9
    others = [{"prompt": f"ask {n}", "chosen": "yes", "rejected": "no"} for n in range(30)]
    d2 = []
    for n in range(3):
        d2.append({"prompt": f"d2 {n}", "chosen": "yes", "rejected": "no"})
        d2.append({"prompt": f"d2 long {n}", "chosen": long, "rejected": "no"})
        d2.append({"prompt": f"d2 long rejected {n}", "chosen": "yes", "rejected": long})
    file = write_lines(place / "d2.jsonl", *map(json.dumps, d2))
    prepared_rows = prepare_rows(place, tokenizer, f"--data.d2={file}", *flags, rows=others)
    assert len(prepared_rows.splits["d2"]) == kept
    assert prepared_rows.counts["splits"]["d2"].get("over-long answer", 0) == dropped
    # answers of D1 are always read
    d1 = [{"prompt": "d1 long", "chosen": "yes", "rejected": long}, others[0]]
    file = write_lines(place / "d1.jsonl", *map(json.dumps, d1))
    prepared_rows = prepare_rows(place, tokenizer, f"--data.d1={file}", *flags, rows=others)
    assert prepared_rows.counts["splits"]["d1"] == {"rows": 1, "over-long answer": 1}


def test_what_is_read_of_d2_is_in_the_recipe_of_own_files_alone():
    world = {str(prepare_data.answers_read(parse(list(flags)).config)) for flags in
             ((), ("--macpo.controls=false",))}  # fmt: skip
    assert len(world) == 1
    path = ["@hh", "--data.path=x"]
    own = {str(prepare_data.answers_read(parse([*path, *flags]).config)) for flags in
           ((), ("--macpo.controls=false",), ("--run.method=dpo-truth",))}  # fmt: skip
    assert len(own) == 3


# ---- system messages ------------------------------------------------------------------------


def test_a_system_message_stands_before_dialogues_that_have_none(place, tokenizer):
    rows = [{"prompt": f"ask {n}", "chosen": "yes", "rejected": "no"} for n in range(40)]
    rows += [row | {"prompt": f"own {row['prompt']}", "system": "be brief"} for row in rows]
    flags = ("--data.system=be kind", "--data.template=vicuna")
    prepared_rows = prepare_rows(place, tokenizer, *flags, rows=rows)
    seen = set()
    for pairs in prepared_rows.splits.values():
        for pair in pairs:
            system, question = pair.prompt
            is_own = question.content.startswith("own ")
            assert system == Message("system", "be brief" if is_own else "be kind")
            seen.add(is_own)
    assert seen == {True, False}


def test_a_template_without_a_place_for_a_system_message_is_refused(place, tokenizer):
    with pytest.raises(UserError, match=r"data\.system is .*data\.template = plain .*vicuna"):
        prepare_rows(place, tokenizer, "--data.system=be kind")
    rows = [{"prompt": f"ask {n}", "system": "s", "chosen": "y", "rejected": "n"} for n in range(9)]
    with pytest.raises(UserError, match="own: rows have a system message"):
        prepare_rows(place, tokenizer, rows=rows)


# ---- the built-in world ---------------------------------------------------------------------


@functools.cache
def prepared(*flags: str):
    """The texts of a run with these flags, little of it to pre-train on.

    They are made once, and not to be changed.
    """
    little_text = ("--pretrain.strong_steps=40", "--pretrain.weak_steps=5")
    return prepare_data.prepare(parse([*little_text, *flags]).config)


def test_every_setting_of_the_world_is_in_the_recipe():
    usual = prepare_data.identify_source(parse([]).config)
    for flag in ("--world.domain=code", "--world.remarks=2", "--world.strong_known=0.5"):
        assert prepare_data.identify_source(parse([flag]).config) != usual


@pytest.mark.parametrize("kind", ["swapped", "label"])
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_a_share_of_the_ground_truth_is_corrupted(kind, noise):
    clean = prepared("--run.seed=8")
    noisy = prepared(f"--data.noise={noise}", f"--data.noise_kind={kind}", "--run.seed=8")
    assert noisy.splits["d2"] == clean.splits["d2"]
    assert noisy.splits["test"] == clean.splits["test"]
    assert noisy.corpora == clean.corpora

    town = synthetic.make_town(parse([]).config.world, 8)
    every_chosen = {pair.chosen for pair in clean.splits["d1"]}
    num_corrupted = 0
    for before, after in zip(clean.splits["d1"], noisy.splits["d1"], strict=True):
        assert (after.id, after.prompt) == (before.id, before.prompt)
        assert after.chosen != after.rejected
        if "corrupted" not in after.meta:
            assert after == before
            continue
        num_corrupted += 1
        assert after.meta["corrupted"] == kind
        if kind == "swapped":
            assert (after.chosen, after.rejected) == (before.rejected, before.chosen)
        else:
            assert after.rejected == before.rejected
            assert after.chosen in every_chosen - {before.chosen}
            # a wrong label is wrong
            assert synthetic.gold_reward(town, before, after.chosen, "stop")["right"] == 0
    assert num_corrupted == round(noise * 149)
    assert num_corrupted == noisy.counts["splits"]["d1"]["corrupted"]


def test_corruption_is_of_the_seed_and_a_single_row_has_no_other_label():
    config = parse(["--data.noise=0.5", "--data.noise_kind=label"]).config
    pairs = prepared().splits["d1"]
    corrupted = prepare_data.corrupt(pairs, config)
    assert corrupted != pairs
    assert prepare_data.corrupt(pairs, config) == corrupted

    other_seed = replace(config, run=replace(config.run, seed=1))
    assert prepare_data.corrupt(pairs, other_seed) != corrupted

    # without another label to take it stays true, and is not called corrupted
    all_noisy = replace(config, data=replace(config.data, noise=1.0))
    assert prepare_data.corrupt(pairs[:1], all_noisy) == pairs[:1]


def test_true_answers_that_no_sampled_one_can_be_as_long_as_are_counted():
    longer = prepare_data.LONGER
    remarks = "--world.remarks=3"
    assert longer not in prepared().counts
    assert longer not in prepared(remarks, "--generate.max_new_tokens=48").counts
    assert prepared(remarks, "--generate.max_new_tokens=16").counts[longer] > 300


def test_an_empty_split_of_a_world_names_the_worlds_settings():
    with pytest.raises(UserError, match=r"d2 .*world\.d2, world\.names"):
        prepared("--world.domain=code", "--world.names=1", "--world.held_names=0")


def test_a_world_with_too_few_questions_says_so():
    short = prepared("--world.domain=code")
    size = len(short.splits["test"])
    assert size < 320
    assert short.counts["shorter than asked for"] == {"test": f"{size} of 320"}

    enough = prepared("--world.domain=code", "--world.names=24")
    assert "shorter than asked for" not in enough.counts
    assert "shorter than asked for" not in prepared().counts
