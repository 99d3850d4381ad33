"""Command lines, TOML files, presets, names of run folders, help."""

import itertools
import random
import re
import tomllib
import typing
from dataclasses import fields, replace

import pytest

from minmacpo import UserError
from minmacpo.config.parse import (
    PRESETS,
    RENAMED,
    convert,
    describe,
    help_text,
    override,
    parse,
    preset_path,
    read_toml,
    to_toml,
)
from minmacpo.config.schema import SETTINGS, Config, flatten, toml_value
from minmacpo.config.validate import check


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(list(argv))
    message = str(caught.value)
    assert message and len(message.splitlines()) <= 5
    return message


def toml(folder, text: str, name: str = "my.toml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return f"@{folder / name}"


# ---- precedence -----------------------------------------------------------------------------


def test_defaults_then_preset_then_files_left_to_right_then_flags(tmp_path):
    a = toml(tmp_path, "[dpo]\nbeta = 0.2\nsft_weight = 0.3\n[macpo]\nrounds = 5\n", "a.toml")
    b = toml(tmp_path, "[dpo]\nbeta = 0.7\n", "b.toml")
    config = parse(["@tiny", a, b, "--dpo.sft_weight=0.9"]).config
    assert config.dpo.beta == 0.7  # b over a
    assert config.dpo.sft_weight == 0.9  # flag over a
    assert config.macpo.rounds == 5  # a over @tiny
    tiny = read_toml(PRESETS / "tiny.toml")
    assert config.world.d1 == tiny["world.d1"] != Config().world.d1  # @tiny over the default
    assert config.dpo.epochs == Config().dpo.epochs  # default
    assert parse(["@tiny", b, a]).config.dpo.beta == 0.2  # the other order
    assert (
        parse(["--dpo.sft_weight=0.9", "@tiny", a]).config.dpo.sft_weight == 0.9
    )  # wherever the flag stands


def test_world_is_the_ground_of_nothing_and_of_a_file_but_not_of_a_preset(tmp_path):
    world, tiny = (read_toml(PRESETS / f"{name}.toml") for name in ("world", "tiny"))
    assert parse([]).config.generate.batch == world["generate.batch"] != Config().generate.batch
    mine = toml(tmp_path, "[dpo]\nbeta = 0.2\n")
    assert replace(parse([mine]).config, run=Config().run, dpo=Config().dpo) == replace(
        parse(["@world"]).config, run=Config().run, dpo=Config().dpo
    )
    key = next(k for k in world if k not in tiny) if world.keys() - tiny.keys() else None
    if key:
        section, name = key.split(".")
        default = getattr(getattr(Config(), section), name)
        assert getattr(getattr(parse(["@tiny"]).config, section), name) == default


def test_last_flag_wins_and_both_spellings_are_equal():
    one = parse(
        ["--dpo.beta=0.25", "--macpo.mutual_positives=false", "--lora.targets=q_proj,o_proj"]
    ).config
    two = parse(
        [
            "--dpo.beta",
            "0.25",
            "--macpo.mutual_positives",
            "false",
            "--lora.targets",
            "q_proj,o_proj",
        ]
    ).config
    assert one == two and one.dpo.beta == 0.25 and one.macpo.mutual_positives is False
    assert one.lora.targets == ("q_proj", "o_proj")
    assert parse(["--dpo.beta=0.25", "--dpo.beta", "0.75"]).config.dpo.beta == 0.75


def test_words_of_the_command():
    command = parse(
        ["@tiny", "--dry_run", "--profile", "--stage=round1/student_pos", "--method=macpo"]
    )
    assert (command.dry_run, command.profile, command.help) == (True, True, False)
    assert command.stage == "round1/student_pos" and command.config.run.method == "macpo"
    plain = parse(["@tiny"])
    assert (plain.dry_run, plain.profile, plain.help, plain.stage) == (False, False, False, None)
    assert parse(["--help"]).help and parse(["-h"]).help


# ---- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--dpo.beta=1", "dpo.beta", 1.0),
        ("--dpo.beta=5e-1", "dpo.beta", 0.5),
        ("--run.seed=-3", "run.seed", -3),
        ("--macpo.mutual_positives=true", "macpo.mutual_positives", True),
        ("--run.compile=false", "run.compile", "false"),
        ("--data.max_examples=none", "data.max_examples", None),
        ("--data.max_examples=7", "data.max_examples", 7),
        ("--model.student=none", "model.student", None),
        ("--data.shares=0.4,0.2,0.2,0.2", "data.shares", (0.4, 0.2, 0.2, 0.2)),
        ("--model.weak=8x1x2x16,16x1x2x32", "model.weak", ("8x1x2x16", "16x1x2x32")),
        ("--data.path=a=b", "data.path", "a=b"),
    ],
)
def test_values_by_declared_type(flag, key, value):
    found = flatten(parse(["@tiny", flag]).config)[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--dpo.beta=high", "number"),
        ("--dpo.beta=nan", "number"),
        ("--dpo.beta=inf", "number"),
        ("--dpo.beta=1e999", "number"),
        ("--macpo.rounds=2.5", "whole number"),
        ("--macpo.rounds=three", "whole number"),
        ("--macpo.rounds=" + "9" * 400, "whole number"),
        ("--macpo.rounds=" + "9" * 5000, "whole number"),
        ("--macpo.mutual_positives=yes", "true | false"),
        ("--macpo.mutual_positives=1", "true | false"),
        ("--macpo.select=best", "perplexity | random"),
        ("--dpo.reference=start", "base | init | previous"),
        ("--data.shares=0.5,x", "number"),
        ("--data.max_examples=many", "whole number"),
        ("--run.seed=none", "whole number"),
    ],
)
def test_wrong_type_names_key_and_expected_type(flag, expected):
    message = refused("@tiny", flag)
    assert flag[2:].partition("=")[0] in message and expected in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[dpo]\nbeta = '0.5x'\n", "dpo.beta"),
        ("[dpo]\nbeta = true\n", "dpo.beta"),
        ("[dpo]\nbeta = [0.5]\n", "dpo.beta"),
        ("[dpo]\nbeta = {a = 1}\n", "dpo.beta"),
        ("[dpo]\nbeta = nan\n", "dpo.beta"),
        ("[macpo]\nrounds = 3.0\n", "macpo.rounds"),
        ("[macpo]\nrounds = false\n", "macpo.rounds"),
        ("[macpo]\nmutual_positives = 1\n", "macpo.mutual_positives"),
        ("[macpo]\nmutual_positives = 1979-05-27\n", "macpo.mutual_positives"),
        ("[run]\nroot = ''\n", "run.root"),
        ("[run]\nroot = 3\n", "run.root"),
        ("[lora]\ntargets = [1]\n", "lora.targets"),
        ("[lora]\ntargets = [['q_proj']]\n", "lora.targets"),
        ("[data]\nshares = 0.5\n", "data.shares"),
        ("[dpo.beta]\nx = 1\n", "dpo.beta"),
    ],
)
def test_wrong_type_in_a_file_names_file_and_key(tmp_path, text, key):
    message = refused(toml(tmp_path, text))
    assert key in message and "my.toml" in message


def test_lists_replace_and_never_merge(tmp_path):
    file = toml(tmp_path, "[lora]\ntargets = ['o_proj']\n[model]\nteachers = ['a', 'b', 'c']\n")
    config = parse(["@tiny", file, "--model.teachers=x,y,z"]).config
    assert config.lora.targets == ("o_proj",) and config.model.teachers == ("x", "y", "z")
    assert (
        parse(
            ["@tiny", file, toml(tmp_path, "[model]\nteachers = []\n", "b.toml")]
        ).config.model.teachers
        == ()
    )


def test_what_a_file_leaves_empty_must_be_given_later(tmp_path):
    message = refused("@hh")
    assert message.startswith("@hh needs --data.path=") and "file or folder of pairs" in message
    assert parse(["@hh", "--data.path=x"]).config.data.path == "x"
    assert parse(["@hh", "--data.path=x"]).config.run.name == "hh-path=x"
    mine = toml(tmp_path, "[model]\nstudent = ''\n")
    message = refused("@tiny", mine, "--run.seed=1")
    assert mine in message and "--model.student=" in message and "HF folder" in message
    given = toml(tmp_path, "[model]\nstudent = 'a'\n", "later.toml")
    assert parse(["@tiny", mine, given]).config.model.student == "a"
    assert parse(["@tiny", mine, "--model.student=none"]).config.model.student is None
    assert "dpo.beta" in refused(toml(tmp_path, "[dpo]\nbeta = ''\n", "number.toml"))
    assert "did you mean dpo.beta?" in refused(toml(tmp_path, "[dpo]\nbata = ''\n", "typo.toml"))


# ---- the number of teachers -----------------------------------------------------------------


def test_the_number_of_teachers_is_that_of_the_given_folders(tmp_path):
    two = parse(["@hh", "--data.path=x", "--model.student=s", "--model.teachers=a,a"]).config
    assert two.macpo.teachers == 2 and "teachers = 2\n" in to_toml(two)
    assert parse([toml(tmp_path, to_toml(two))]).config == two
    mine = toml(tmp_path, "[model]\nteachers = ['a', 'b', 'c', 'd']\n")
    assert parse([mine]).config.macpo.teachers == 4
    assert parse([mine, "--model.teachers=a,b"]).config.macpo.teachers == 2
    assert parse([mine, "--model.teachers=,"]).config.macpo.teachers == Config().macpo.teachers == 3
    assert parse(["--model.teachers=a"]).config.macpo.teachers == 1


@pytest.mark.parametrize("folders", ["a", "a,b", "a,b,c,d"])
def test_a_stated_number_of_teachers_is_kept(tmp_path, folders):
    mine = toml(tmp_path, "[macpo]\nteachers = 3\n")
    for words in (["--macpo.teachers=3"], [mine], [mine, "@tiny"]):
        message = refused(*words, f"--model.teachers={folders}")
        assert (
            "model.teachers" in message
            and "must be a list of 3" in message
            and "macpo.teachers" in message
        )
    assert parse([mine, "--model.teachers=a,b", "--macpo.teachers=2"]).config.macpo.teachers == 2


def test_names_of_runs_with_given_teachers(tmp_path):
    def name(*words):
        return parse(["@tiny", *words]).config.run.name

    mine = toml(tmp_path, "[model]\nteachers = ['a', 'b']\n")
    assert name("--model.teachers=a,b,c") == "tiny-model.teachers=a,b,c"
    assert name("--model.teachers=a,b") == "tiny-model.teachers=a,b-macpo.teachers=2"
    assert name("--model.teachers=a,b", "--macpo.teachers=2") == name("--model.teachers=a,b")
    assert name(mine) == name(mine, "--macpo.teachers=2") == "tiny+my"
    assert name(mine, "--model.teachers=a,b,c") == "tiny+my-model.teachers=a,b,c-macpo.teachers=3"


# ---- typos and grammar ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--dpo.bata=1", "dpo.beta"),
        ("--dop.beta=1", "dpo.beta"),
        ("--macpo.round=1", "macpo.rounds"),
        ("--lora.target=q", "lora.targets"),
        ("--generate.temprature=1", "generate.temperature"),
        ("--seed=1", "run.seed"),
        ("--beta=1", "dpo.beta"),
        ("--train.seed=1", "run.seed"),
        ("--run.sead=1", "run.seed"),
        ("--marco.mutual_positives=false", "macpo.mutual_positives"),
    ],
)
def test_a_typo_offers_the_nearest_name(tmp_path, flag, nearest):
    key, _, value = flag[2:].partition("=")
    message = refused("@tiny", flag)
    assert repr(key) in message and f"did you mean {nearest}?" in message
    section, dot, name = key.partition(".")
    if dot:
        message = refused(
            toml(tmp_path, f"[{section}]\n{name} = {value if value != 'q' else repr('q')}\n")
        )
        assert (
            repr(key) in message and f"did you mean {nearest}?" in message and "my.toml" in message
        )


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_refused_with_its_new_one(tmp_path, old):
    assert RENAMED[old] in SETTINGS and old not in SETTINGS
    sentence = f"{old!r}; it is called {RENAMED[old]} now"
    assert sentence in refused("@tiny", f"--{old}=1")
    section, _, key = old.partition(".")
    message = refused(toml(tmp_path, f"[{section}]\n{key} = 1\n"))
    assert sentence in message and "my.toml" in message


def test_all_old_names_of_a_file_or_a_command_line_are_named_at_once(tmp_path):
    renamed = list(RENAMED.items())[:3]
    flags = [f"--{old}=1" for old, _ in renamed]
    file = toml(tmp_path, "[data]\nlabel = 1\nlong = 1\nmax_prompt = 1\n")
    for message in (refused("@tiny", *flags), refused(file)):
        for old, new in renamed:
            assert f"{old!r} (it is called {new} now)" in message


@pytest.mark.parametrize(
    ("flag", "offered"),
    [
        ("--lr=1", ["sft.teacher_lr", "sft.student_lr", "dpo.student_lr", "dpo.teacher_lr"]),
        ("--batch=3", ["pretrain.batch", "sft.batch", "dpo.batch", "generate.batch"]),
        ("--negatives=agent", ["macpo.negatives"]),
        ("--positives=true", ["macpo.mutual_positives"]),
    ],
)
def test_a_bare_name_offers_all_settings_that_it_may_stand_for(flag, offered):
    message = refused("@tiny", flag)
    assert all(name in message for name in offered), message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--dpo.loss=ipo2", "ipo"),
        ("--macpo.select=perplexty", "perplexity"),
        ("--run.device=xyz", None),
        ("--run.method=rlhf", "rlaif"),
    ],
)
def test_a_wrong_value_offers_the_nearest_one(flag, value):
    message = refused("@tiny", flag)
    assert ("did you mean" in message) == (value is not None)
    assert value is None or message.endswith(f"did you mean {value}?")


def test_a_key_far_from_all_points_to_help():
    assert "--help" in refused("--xyzzy.plugh=1")


@pytest.mark.parametrize(
    "argv",
    [
        ["--dpo.beta"],
        ["--dpo.beta="],
        ["--dpo.beta", "--macpo.rounds=1"],
        ["--dpo.beta", "@tiny"],
        ["--stage"],
        ["--stage="],
        ["--method"],
        ["--run.name="],
    ],
)
def test_a_key_without_value(argv):
    assert "needs a value" in refused(*argv) and argv[0].strip("-=") in refused(*argv)


@pytest.mark.parametrize(
    "word", ["tiny", "-x", "-", "--", "@", "", " ", "dpo.beta=1", "-dpo.beta=1", "-n", "1"]
)
def test_words_that_are_neither_preset_nor_setting(word):
    assert repr(word) in refused(word) or "unknown" in refused(word)


@pytest.mark.parametrize(("word", "near"), [("@tniy", "tiny"), ("@worlds", "world")])
def test_an_unknown_preset_offers_the_nearest(word, near):
    assert f"did you mean {near}?" in refused(word) and word in refused(word)


def test_presets_are_named_when_nothing_is_near():
    assert all(p.stem in refused("@qqqqqq") for p in PRESETS.glob("*.toml"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("# nothing but a comment\n", "empty"),
        ("[dpo\nbeta = 1\n", "not valid TOML"),
        ("[dpo]\nbeta = \n", "not valid TOML"),
        ("[dpo]\nbeta = 1\nbeta = 2\n", "not valid TOML"),
        (f"[run]\nseed = {'9' * 5000}\n", "not valid TOML"),
        (f"[run]\nseed = {'[' * 5000}\n", "not valid TOML"),
        ("beta = 1\n", "outside a section"),
    ],
)
def test_broken_or_empty_toml(tmp_path, text, problem):
    message = refused(toml(tmp_path, text))
    assert problem in message and "my.toml" in message


def test_toml_that_is_missing_no_file_or_no_text(tmp_path):
    assert "cannot be read" in refused(f"@{tmp_path}/none.toml")
    (tmp_path / "folder.toml").mkdir()
    assert "cannot be read" in refused(f"@{tmp_path}/folder.toml")
    (tmp_path / "latin.toml").write_bytes(b"[run]\nname = '\xe9'\n")
    assert "latin.toml" in refused(f"@{tmp_path}/latin.toml")


# ---- combinations ---------------------------------------------------------------------------

IMPOSSIBLE = [
    "--dpo.beta=0",
    "--dpo.beta=-1",
    "--macpo.rounds=-1",
    "--macpo.teachers=0",
    "--dpo.label_smoothing=0.5",
    "--dpo.label_smoothing=-0.1",
    "--generate.top_p=0",
    "--generate.top_p=1.5",
    "--generate.temperature=-1",
    "--generate.max_new_tokens=0",
    "--generate.max_new_tokens=65",
    "--data.max_prompt_length=96",
    "--data.max_length=129",
    "--model.context=64",
    "--lora.r=0",
    "--lora.alpha=0",
    "--lora.targets=",
    "--lora.targets=,",
    "--lora.targets=w_proj",
    "--lora.targets=lm_head",
    "--sft.batch=0",
    "--sft.teacher_lr=0",
    "--sft.student_epochs=-1",
    "--world.held_names=8",
    "--world.verbs=9",
    "--world.names=481",
    "--world.expert_right=1.1",
    "--data.shares=0.5,0.5",
    "--data.shares=0.5,0.5,0.5,0.5",
    "--data.shares=1,0,0,0",
    "--data.shares=0.5,0.3,0.3,-0.1",
    "--data.max_examples=0",
    "--run.name=a/b",
    "--run.name=..",
    "--run.name=.",
    "--model.strong=64x2x4",
    "--model.strong=64x2x4x0",
    "--model.strong=30x2x4x8",
    "--model.strong=12x2x4x8",
    "--model.strong=\u00b2x1x2x3",
    "--model.strong=" + "9" * 5000 + "x1x1x1",
    "--model.weak=ax1x2x3",
    "--run.max_tokens_per_batch=0",
    "--run.save_every=0",
    "--run.threads=-1",
    "--eval.samples=0",
    "--pretrain.strong_steps=-1",
    "--macpo.rounds=1000000000000",
    "--macpo.teachers=1000000000000",
    "--run.threads=1000000000000",
]


@pytest.mark.parametrize("flag", IMPOSSIBLE)
def test_impossible_settings_are_refused_by_name(flag):
    message = refused("@tiny", flag)
    assert (
        flag[2:].partition("=")[0] in message
        or "expected a shape" in message
        or "width / heads" in message
    )


def test_prompt_and_answer_must_fit_the_context():
    message = refused("@tiny", "--data.max_prompt_length=95", "--generate.max_new_tokens=40")
    assert "135" in message and "128" in message


def test_the_context_rule_is_left_to_a_given_model():
    check(
        parse(
            ["@tiny", "--model.student=x", "--model.teachers=a,b,c", "--data.max_length=500"]
        ).config
    )


# ---- round trip -----------------------------------------------------------------------------


def test_dump_and_load_give_the_same_config(tmp_path):
    words = [
        ["@tiny"],
        [],
        ["@tiny", "--data.max_examples=3", '--data.path=/a b/\u00fc"\\x', "--model.teachers=a,b,c"],
        [
            "--run.seed=-5",
            "--dpo.beta=1e-05",
            "--sft.student_lr=1e-300",
            "--macpo.mutual_positives=false",
        ],
    ]
    for argv in words:
        config = parse(argv).config
        again = parse([toml(tmp_path, to_toml(config))]).config
        assert again == config
        assert flatten(override(Config(), read_toml(tmp_path / "my.toml"), "x")) == flatten(config)


def test_dump_and_load_of_random_configs(tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(40):
        values = {
            key: random_value(rng, kind) for key, kind in kinds().items() if rng.random() < 0.5
        }
        config = override(Config(), values, "test")
        assert override(Config(), read_toml(path_of(tmp_path, to_toml(config))), "file") == config


def path_of(folder, text):
    (folder / "random.toml").write_text(text, encoding="utf-8")
    return folder / "random.toml"


def kinds() -> dict[str, object]:
    return {key: setting.type for key, setting in SETTINGS.items()}


def random_value(rng: random.Random, kind):
    text = "".join(
        rng.choice("ab/\\\"'#[]{},.= \u00e9\u4e2d\U0001f600") for _ in range(rng.randint(1, 9))
    )
    if kind == typing.Literal["auto"] | int:
        return rng.choice(["auto", rng.randint(-(10**9), 10**9)])
    if isinstance(kind, type(int | None)):
        return rng.choice([None, random_value(rng, typing.get_args(kind)[0])])
    if typing.get_origin(kind) is tuple:
        return [random_value(rng, typing.get_args(kind)[0]) for _ in range(rng.randint(0, 3))]
    if typing.get_origin(kind) is typing.Literal:
        return rng.choice(typing.get_args(kind))
    return {
        bool: rng.random() < 0.5,
        int: rng.randint(-(10**9), 10**9),
        str: text,
        float: rng.choice([rng.random(), 1e-17, 1e17, -0.0, 3.0, 10.0 ** rng.randint(-200, 200)]),
    }[kind]


def test_text_that_no_toml_file_can_hold_is_refused():
    for text in ("a\nb", "a\x00b", "\x7f", "a\udcff"):
        assert "data.path" in refused("@tiny", f"--data.path={text}")


def test_presets_are_valid_toml_with_known_keys_and_pass_the_checks():
    for file in PRESETS.glob("*.toml"):
        given = {
            "hh": ["--data.path=x"],
            "paper": ["--data.path=x", "--model.student=s", "--model.teachers=a,b,c"],
        }
        parse([f"@{file.stem}", *given.get(file.stem.partition("-")[0], [])])
        assert tomllib.loads(file.read_text())


def test_a_preset_is_found_by_name_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toml(tmp_path, "[dpo]\nbeta = 0.3\n", "tiny.toml")
    assert preset_path("tiny").parent == PRESETS
    assert parse(["@tiny.toml"]).config.dpo.beta == 0.3 != parse(["@tiny"]).config.dpo.beta


def test_every_default_has_the_type_of_its_setting():
    """Else a value written to config.toml and read again would be another one to a fingerprint."""
    for key, value in flatten(Config()).items():
        again = convert(SETTINGS[key].type, value, key)
        assert again == value and type(again) is type(value), key


# ---- names of run folders -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "world"),
        (["@world"], "world"),
        (["@tiny"], "tiny"),
        (["--macpo.mutual_positives=false"], "world-mutual_positives=false"),
        (["--macpo.rounds=10", "--run.seed=1"], "world-rounds=10-seed=1"),
        (["--run.seed=1", "--macpo.rounds=10"], "world-rounds=10-seed=1"),
        (["--macpo.teachers=1"], "world-macpo.teachers=1"),
        (["--macpo.select=random"], "world-select=random"),
        (["--run.root=elsewhere"], "world"),
        (["--macpo.mutual_positives=true"], "world"),
        (["--dpo.beta=0.05", "@tiny"], "tiny-beta=0.05"),
        (["--sft.batch=8"], "world-sft.batch=8"),
        (["--dpo.batch=8"], "world-dpo.batch=8"),
        (["--run.name=mine", "--run.seed=7"], "mine"),
        (["--run.name=none"], "world"),
    ],
)
def test_run_names(argv, name):
    assert parse(argv).config.run.name == name


def test_a_file_names_the_run(tmp_path):
    mine = toml(tmp_path, "[dpo]\nbeta = 0.2\n")
    assert parse([mine]).config.run.name == "my"
    assert parse(["@tiny", mine, "--run.seed=2"]).config.run.name == "tiny+my-seed=2"
    named = toml(tmp_path, "[run]\nname = 'fixed'\n", "b.toml")
    command = parse([named, "--run.seed=2"])
    assert command.config.run.name == "fixed"


def test_variants_never_share_a_name():
    """Every pair of command lines with different settings gets different names."""
    flags = [
        "--sft.batch=8",
        "--dpo.batch=8",
        "--generate.batch=8",
        "--pretrain.batch=8",
        "--model.teachers=a,b,c",
        "--model.teachers=x/a,b,c",
        "--model.teachers=y/a,b,c",
        "--data.path=x/data",
        "--data.path=y/data",
        "--data.path=/data",
        "--data.path=data",
        "--data.path=[data]",
        "--data.path=data-seed=1",
        '--data.path=da"ta',
        "--data.path=da\\ta",
        "--run.seed=1",
        "--run.seed=11",
        "--macpo.rounds=1",
        "--data.path=" + "a" * 60,
        "--data.path=" + "a" * 61,
        "--data.path=" + "b" + "a" * 60,
        "--lora.targets=q_proj",
        "--lora.targets=q_proj,k_proj",
        "--lora.targets=k_proj,q_proj",
        "--dpo.beta=0.1",
        "--dpo.beta=0.11",
        "--model.student=s",
        "--model.student=S",
        "--data.path=s",
        "--data.path=s t",
    ]
    lines = [[], *([f] for f in flags), *map(list, itertools.combinations(flags, 2))]
    names = {}
    for argv in lines:
        config = parse(["@tiny", *argv]).config
        name = config.run.name
        assert names.setdefault(name, flatten(config)) == flatten(config), (name, argv)
        assert "/" not in name and "\\" not in name and len(name.encode()) <= 255


def test_long_names_stay_folder_names(tmp_path):
    mine = toml(tmp_path, "[dpo]\nbeta = 0.2\n", "\u4e2d" * 70 + ".toml")
    flags = [mine] + [
        f"--{k}={v}"
        for k, v in {
            "sft.teacher_lr": 0.123456789,
            "sft.student_lr": 0.1234567891,
            "sft.teacher_negative_lr": 0.12345678,
            "sft.student_negative_lr": 0.1234567,
            "dpo.student_lr": 0.123456,
            "dpo.teacher_lr": 0.12345,
            "pretrain.strong_lr": 0.123,
            "pretrain.weak_lr": 0.12345678,
            "data.path": "\u4e2d" * 60,
        }.items()
    ]
    one, two = parse(["@tiny", *flags]), parse(["@tiny", *flags, "--run.seed=1"])
    assert one.config.run.name != two.config.run.name
    assert max(len(c.config.run.name.encode()) for c in (one, two)) <= 255


# ---- help -----------------------------------------------------------------------------------


def unwrapped_help() -> str:
    """The help with one line for each setting and one for what it means, however long."""
    return re.sub(r"\n( {6}| {10})(?! )", " ", help_text())


def test_help_is_no_wider_than_a_terminal():
    assert max(map(len, help_text().splitlines())) <= 100


def test_help_lists_every_key_with_type_default_and_line():
    text = unwrapped_help()
    lines = text.splitlines()
    for section in fields(Config):
        assert f"[{section.name}]" in lines
        for key in fields(section.default):
            kind = describe(key.type)
            head = next(
                i
                for i, line in enumerate(lines)
                if line.startswith(f"  --{section.name}.{key.name} (")
            )
            assert f"({kind}) = " in lines[head]
            assert lines[head + 1].strip() == key.metadata["help"]
    for word in (
        "--dry_run",
        "--stage",
        "--profile",
        "--method",
        *(f"@{p.stem}" for p in PRESETS.glob("*.toml")),
    ):
        assert word in text


def test_every_key_has_its_line_of_help():
    bare = [
        f"{s.name}.{k.name}"
        for s in fields(Config)
        for k in fields(s.default)
        if not k.metadata["help"].strip()
    ]
    assert bare == []


def test_help_shows_the_values_of_a_plain_run_and_the_defaults_beside_them():
    """Both as the TOML file would say them; the default only where it is another value."""
    pattern = r"^  --(\S+) \(.*?\) = (.*?)(?: +\(default: (.*)\))?$"
    lines = re.findall(pattern, unwrapped_help(), re.M)
    shown = {name: value for name, value, _ in lines}
    behind = {name: default for name, _, default in lines if default}
    plain_run = flatten(replace(parse([]).config, run=Config().run))
    defaults = flatten(Config())
    assert shown == {name: toml_value(value) for name, value in plain_run.items()}
    changed = [name for name in defaults if plain_run[name] != defaults[name]]
    assert behind == {name: toml_value(defaults[name]) for name in changed}
    assert len(changed) > 20
    assert behind["dpo.beta"] == "0.1" and shown["dpo.beta"] == "0.5"


# ---- anything else --------------------------------------------------------------------------


def test_random_command_lines_raise_nothing_but_user_errors(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    keys = [
        *kinds(),
        "stage",
        "method",
        "dry_run",
        "help",
        "profile",
        "run",
        "run.",
        ".seed",
        "",
        "a.b.c",
    ]
    pieces = [
        "nan",
        "-inf",
        "0",
        "-1",
        "1e309",
        "9" * 30,
        "9" * 5000,
        "true",
        "none",
        "",
        " ",
        ",",
        ",,",
        "=",
        "--",
        "@",
        "-",
        "a/b",
        "../..",
        "\x00",
        "\n",
        "\udcff",
        "\U0001f600",
        "[",
        '"',
        "\\",
        "64x2x4x128",
        "0x0x0x0",
        "q_proj",
        "0.5,0.2,0.2,0.1",
        "tiny",
        "world.toml",
        ".toml",
        "x.toml",
        "auto",
        "cuda",
        "1_0",
        "0x10",
        "\u0663",
        "\u00b2x1x2x3",
        "\u00b2",
    ]
    accepted = 0
    for _ in range(300):
        argv = ["@tiny"] if rng.random() < 0.5 else []
        for _ in range(rng.randint(0, 4)):
            key = rng.choice(keys)
            if rng.random() < 0.2:
                key = "".join(rng.sample(key, len(key)))
            value = "".join(rng.choices(pieces, k=rng.choice((1, 1, 1, 2))))
            form = rng.choice(
                [
                    "--{k}={v}",
                    "--{k} {v}",
                    "@{v}",
                    "{v}",
                    "--{k}",
                    "-{k}={v}",
                    "--{k}={v}",
                    "--{k}={v}",
                ]
            )
            argv += (
                form.format(k=key, v=value).split(" ")
                if " {v}" in form
                else [form.format(k=key, v=value)]
            )
        try:
            command = parse(argv)
        except UserError as error:
            assert len(str(error).splitlines()) <= 5
        else:
            if not command.help:  # --help answers before anything is laid or named
                accepted += 1
                assert (
                    parse([toml(tmp_path, to_toml(command.config), "again.toml")]).config
                    == command.config
                )
    assert accepted > 5


# ---- shares where all bases are given -------------------------------------------------------

GIVEN = ["--data.path=x", "--model.student=s", "--model.teachers=a,b,c"]


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        (["@hh", *GIVEN], (0, 0.25, 0.45, 0.3)),
        (["@hh-real", *GIVEN], (0, 0.24, 0.46, 0.3)),
        (["@tiny", *GIVEN], (0, 0.3, 0.5, 0.2)),
        (["@hh", *GIVEN, "--data.shares=0.6,0.1,0.2,0.1"], (0.6, 0.1, 0.2, 0.1)),
        (["@hh", *GIVEN[:2]], (0.6, 0.1, 0.18, 0.12)),
        (["@hh", GIVEN[0], GIVEN[2]], (0.6, 0.1, 0.18, 0.12)),
    ],
)
def test_default_shares_leave_d0_out_where_all_bases_are_given(words, shares):
    assert parse(words).config.data.shares == pytest.approx(shares)


def test_a_file_may_state_a_share_for_d0(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("[data]\nshares = [0.4, 0.2, 0.2, 0.2]\n")
    assert parse(["@hh", f"@{file}", *GIVEN]).config.data.shares == (0.4, 0.2, 0.2, 0.2)


def test_shares_that_are_derived_are_not_in_a_runs_name():
    given = parse(["@hh", *GIVEN]).config.run.name
    assert "shares" not in given


@pytest.mark.parametrize(
    "words",
    [
        ["--dpo.target_margin=0.5"],
        ["--dpo.loss=simpo", "--dpo.reference=base"],
        ["--dpo.loss=ipo", "--dpo.label_smoothing=0"],
    ],
)
def test_a_setting_that_the_loss_does_not_use_is_refused_even_at_its_default(words):
    name = words[-1][2:].partition("=")[0]
    with pytest.raises(UserError, match=rf"dpo\.loss=\w+ (does not use|uses no reference).*{name}"):
        parse(words)
