"""From the words of a command line to a checked `Config`: flags, TOML files, presets, help.

Strict on purpose: an unknown name, a wrong type or a name without a value is an error that says
what is right. No torch is imported here, so that --help and a typo answer at once.
"""

import math
import re
import textwrap
import tomllib
import typing
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.schema import NON_IDENTITY_SETTINGS, SETTINGS, Config, flatten, toml_value
from minmacpo.config.validate import check

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "world"  # what `python train.py` runs

# Settings that had other names before November 2026
RENAMED = {
    "data.label": "data.preference_label",
    "data.long": "data.truncation_mode",
    "data.max_prompt": "data.max_prompt_length",
    "data.on_bad": "data.on_invalid_row",
    "dpo.gamma": "dpo.sft_weight",
    "generate.max_new": "generate.max_new_tokens",
    "macpo.keep": "macpo.keep_fraction",
    "macpo.mutual": "macpo.mutual_positives",
    "macpo.self_share": "macpo.self_fraction",
    "macpo.weights": "macpo.pair_weighting",
    "run.micro_tokens": "run.max_tokens_per_batch",
}

# Words of train.py that take no value
BARE_WORDS = {"--dry_run": "dry_run", "--profile": "profile", "--help": "help", "-h": "help"}

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # a TOML file cannot hold them
UNSAFE_IN_NAMES = re.compile(r"[^A-Za-z0-9_.,+-]")  # left out of the names of run folders
MAX_VALUE_IN_NAME = 40  # characters
MAX_NAME = 200  # bytes; file systems take 255
MAX_SHOWN_VALUE = 80  # characters of a wrong value in an error message
HELP_WIDTH = 100  # columns

HELP = """\
python train.py [@preset | @file.toml]... [--section.key=value | --section.key value]...
                [--method=NAME] [--stage=NAME] [--dry_run] [--profile] [--help]
python train.py @experiment-NAME [--seeds=0,1] [--dry_run] [what every run of it gets]

presets: @hh, @hh-real, @paper-hh-helpful, @paper-hh-harmless, @paper-pku, @tiny, @world
    (default: @world); files and flags are laid over it, left to right
torchrun --nproc-per-node=N train.py ... does any of this (but an experiment) on N processes;
    see [parallel]
experiments: a file each in minmacpo/config/presets/experiments; finished runs are not redone
--dry_run   read the data, print settings, row counts, splits and the stages with their tokens and
            memory; write nothing
--stage     compute this one stage only; the stages it needs must be finished, others may be
            computed beside it
--profile   write a Chrome trace of the first steps of each kind of stage into the run folder

The values below are those of `python train.py`, which is @world laid over the defaults. A default
that @world changes stands behind the value: it is that of the paper, or of its released scripts."""


class ArgParser(ArgumentParser):
    """The words of a command that is not train.py; what is wrong with them is one sentence."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True, slots=True)
class Command:
    """What `train.py` was asked: the settings, and the words that belong to the command alone."""

    config: Config
    stage: str | None = None
    dry_run: bool = False
    profile: bool = False
    help: bool = False


# ---- the command line of train.py


def parse(argv: list[str]) -> Command:
    """The words of `train.py` (see HELP) as a checked Command.

    Defaults first, then files from left to right, then flags. Unless a packaged preset comes
    first, @world is laid under them. What a file leaves "" must be given later.
    """
    words = split_words(argv)
    if "help" in words.bare:
        return Command(Config(), help=True)
    stage = words.values.pop("stage", None)

    files = list(words.files)
    if not files or files[0].endswith(".toml"):
        files.insert(0, DEFAULT_PRESET)
    layers = []
    for file in files:
        path = preset_path(file)
        layers.append((str(path), read_toml(path)))
    preset = merge_layers(layers)
    layers.append(("command line", words.values))
    config = merge_layers(layers)
    check_nothing_is_missing(layers, words.files)

    if config.run.name is None:
        label = "+".join(Path(file).stem for file in words.files) or DEFAULT_PRESET
        name = run_name(label, preset, config)
        config = replace(config, run=replace(config.run, name=name))
    if not states_shares(layers):
        config = leave_out_d0(config)
    check(config, stated=words.values)
    return Command(config, stage, **words.bare)


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a command line, sorted by what they are."""

    files: list[str]  # @-words, without the @
    values: dict[str, str]  # of settings, and of --stage
    bare: dict[str, bool]  # flags that take no value


def split_words(argv: list[str]) -> Words:
    """The words of a command line; UserError for one that is neither a file nor a setting."""
    words = Words(files=[], values={}, bare={})
    remaining = iter(argv)
    for word in remaining:
        if word.startswith("@") and len(word) > 1:
            words.files.append(word[1:])
        elif word in BARE_WORDS:
            words.bare[BARE_WORDS[word]] = True
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            if not equals:
                value = next(remaining, "")
                if value.startswith(("--", "@")):
                    value = ""  # the next word is no value
            if not value:
                raise UserError(
                    f"--{name} needs a value: --{name}=VALUE{did_you_mean(word, BARE_WORDS)}"
                )
            if name == "method":
                name = "run.method"
            words.values[name] = value
        else:
            raise UserError(f"{word!r}: expected @preset, @file.toml or --section.key=value")
    return words


def check_nothing_is_missing(layers: list[tuple[str, dict]], files: list[str]) -> None:
    """Raise UserError for a setting that a file leaves "" and nothing after it gives."""
    merged = {}
    for _, values in layers:
        merged.update(values)
    for name, field in SETTINGS.items():
        if merged.get(name) == "":
            what = field.metadata["help"].partition(";")[0]
            raise UserError(f"@{' @'.join(files)} needs --{name}=VALUE: {what}")


def did_you_mean(word: str, known) -> str:
    """The end of a sentence that offers the nearest known word; empty if none is near."""
    near = get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


# ---- layers of settings


def merge_layers(layers: list[tuple[str, dict[str, object]]]) -> Config:
    """Layers of (where from, values) over the defaults.

    The number of teachers is that of model.teachers, unless a layer states it.
    """
    config = Config()
    teachers_stated = False
    for where, values in layers:
        config = override(config, values, where)
        teachers_stated = teachers_stated or "macpo.teachers" in values
    if config.model.teachers and not teachers_stated:
        count = {"macpo.teachers": len(config.model.teachers)}
        config = override(config, count, "model.teachers")
    return config


def states_shares(layers: list[tuple[str, dict[str, object]]]) -> bool:
    """Whether the command line, or a file that is no packaged preset, states data.shares."""
    presets = {str(file) for file in PRESETS.glob("*.toml")}
    return any("data.shares" in values for where, values in layers if where not in presets)


def leave_out_d0(config: Config) -> Config:
    """The settings without a share for D0, text to pre-train on, where all bases are given.

    The other splits get the rows in the proportions that they had.
    """
    d0, *others = config.data.shares
    all_given = config.model.student and config.model.teachers
    if not all_given or config.data.path is None or d0 == 0 or sum(others) == 0:
        return config
    factor = sum(config.data.shares) / sum(others)
    shares = (0.0, *(round(share * factor, 6) for share in others))
    return replace(config, data=replace(config.data, shares=shares))


def override(config: Config, values: dict[str, object], where: str) -> Config:
    """A new Config with {"section.key": value} laid over it.

    Args:
        where: the file or "command line" that errors name.

    Raises:
        UserError: names are unknown, all of which it says, or a value has the wrong type.
    """
    unknown = [name for name in values if name not in SETTINGS]
    if unknown:
        raise UserError(f"{where}: {unknown_settings(unknown)}")
    for name, value in values.items():
        section_name, key = name.split(".")
        converted = convert(SETTINGS[name].type, value, f"{where}: {name}")
        # Sections are frozen, and so is the Config that holds them: both are made anew
        section = replace(getattr(config, section_name), **{key: converted})
        config = replace(config, **{section_name: section})
    return config


def unknown_settings(names: list[str]) -> str:
    """What is wrong with names that are no settings, and what to write in place of each."""
    if len(names) == 1:
        return f"unknown setting {names[0]!r}; {suggestion(names[0])}"
    complaints = [f"{name!r} ({suggestion(name)})" for name in names]
    return f"unknown settings {', '.join(complaints)}"


def suggestion(name: str) -> str:
    """What to write in the place of an unknown setting."""
    if name in RENAMED:
        return f"it is called {RENAMED[name]} now"
    key = name.rpartition(".")[2]
    if "." in name:
        candidates = get_close_matches(name, SETTINGS, 1) or settings_named(key)[:1]
    else:  # a bare name, such as --lr: all settings that it may stand for
        candidates = settings_named(key) or get_close_matches(name, SETTINGS, 1)
    if not candidates:
        return "python train.py --help lists all"
    return f"did you mean {', '.join(candidates)}?"


def settings_named(key: str) -> list[str]:
    """The settings with this key, or else those of whose key it is a word, such as `lr`."""
    same = []
    similar = []
    for name in SETTINGS:
        other = name.partition(".")[2]
        if other == key:
            same.append(name)
        elif key in other.split("_"):
            similar.append(name)
    return same or similar


# ---- values


def describe(kind) -> str:
    """A declared type in the words of `--help` and of error messages."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(args)
    if typing.get_origin(kind) is tuple:
        return f"list of {describe(args[0])}"
    if type(None) in args:
        return f"{describe(args[0])} | none"
    if typing.get_origin(kind) is typing.Union:  # a word or a number
        return " | ".join(describe(arg) for arg in args)
    return {int: "whole number", float: "number", bool: "true | false", str: "text"}[kind]


def convert(kind, value, name: str):
    """`value`, text from a flag or a TOML value, as the declared type of a setting.

    Raises:
        UserError: it cannot be one; the message begins with `name`.
    """
    args = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if type(None) in args:
        return None if value in ("none", None) else convert(args[0], value, name)
    if origin is typing.Union:  # a word or a number
        words, number_type = args
        if value in typing.get_args(words):
            return value
        number = to_number(number_type, value)
        if number is None:
            raise wrong_type(kind, value, name)
        return number
    if origin is tuple and isinstance(value, str | list | tuple):
        items = value.split(",") if isinstance(value, str) else value
        return tuple(convert(args[0], item, name) for item in items if item != "")
    if kind is str and isinstance(value, str) and not CONTROL_CHARACTERS.search(value):
        return value
    if kind in (int, float):
        number = to_number(kind, value)
        if number is None:
            raise wrong_type(kind, value, name)
        return number
    if isinstance(value, bool):
        value = str(value).lower()  # TOML's true is the word true
    if origin is typing.Literal and value in args:
        return value
    if kind is bool and value in ("true", "false"):
        return value == "true"
    raise wrong_type(kind, value, name)


def to_number(kind: type, value) -> int | float | None:
    """A finite number of this type from text or a number; None if it is none."""
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        return None
    try:
        number = kind(value)
        finite = math.isfinite(number)
    except (ValueError, TypeError, OverflowError):  # a whole number may be too large to look at
        return None
    return number if finite else None


def wrong_type(kind, value, name: str) -> UserError:
    """The error for a value that is not of the declared type, with the nearest one that is."""
    hint = ""
    is_choice = typing.get_origin(kind) is typing.Literal
    if is_choice and isinstance(value, str):
        hint = did_you_mean(value, typing.get_args(kind))
    return UserError(f"{name} = {shown_value(value)}: expected {describe(kind)}{hint}")


def shown_value(value) -> str:
    """A value as an error message shows it: without control characters, and cut if it is long."""
    text = str(value) if type(value) is not int else hex(value)  # Python writes no huge decimals
    if len(text) <= MAX_SHOWN_VALUE:
        return ascii(value)
    return ascii(text[:MAX_SHOWN_VALUE]) + "…"


# ---- files


def preset_path(word: str) -> Path:
    """File behind `@word`: a packaged preset's name, or a path that ends in .toml."""
    if word.endswith(".toml"):
        return Path(word)
    names = sorted(file.stem for file in PRESETS.glob("*.toml"))
    if word not in names:
        hint = did_you_mean(word, names) or "; did you mean a path that ends in .toml?"
        raise UserError(f"@{word}: no such preset ({', '.join(names)}){hint}")
    return PRESETS / f"{word}.toml"


def read_toml(path: Path) -> dict[str, object]:
    """{"section.key": value} of one TOML file; UserError if it is unreadable, broken or empty."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    if not tables:
        raise UserError(f"{path}: is empty; expected sections such as [dpo] with key = value lines")
    values = {}
    for section, keys in tables.items():
        if not isinstance(keys, dict):
            raise UserError(f"{path}: {section!r} stands outside a section such as [dpo]")
        for key, value in keys.items():
            values[f"{section}.{key}"] = value
    return values


def to_toml(config: Config) -> str:
    """The whole Config as TOML that `train.py @FILE` takes back unchanged."""
    lines = []
    for section, keys in asdict(config).items():
        lines.append(f"[{section}]")
        for key, value in keys.items():
            lines.append(f"{key} = {toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def override_by_run(config: Config, values: dict[str, object], file: Path) -> Config:
    """`override` by what a run's config.toml holds; UserError where another version wrote it."""
    try:
        return override(config, values, str(file))
    except UserError as error:
        raise UserError(
            f"{file.parent}: holds a run of another version of minmacpo, whose settings this one "
            f"does not know ({error}); choose another --run.name, or delete that folder"
        ) from None


def read_settings(file: Path) -> Config:
    """The settings in the config.toml of a run; UserError where they are no run's."""
    config = override_by_run(Config(), read_toml(file), file)
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


# ---- names of runs


def run_name(label: str, preset: Config, config: Config) -> str:
    """`label` plus "-key=value" for every setting in which `config` differs from `preset`.

    A value that is long, or could be mistaken for another part of the name, is told apart by a
    hash; so are names that are too long for a folder.
    """
    old = flatten(preset)
    new = flatten(config)
    keys = [name.partition(".")[2] for name in new]
    run_settings_last = sorted(new, key=lambda name: name.startswith("run."))
    for name in run_settings_last:
        if new[name] == old[name] or name in NON_IDENTITY_SETTINGS:
            continue
        key = name.partition(".")[2]
        shown = key if keys.count(key) == 1 else name
        label += f"-{shown}={value_in_name(new[name])}"
    if len(label.encode()) <= MAX_NAME:
        return label
    start = label.encode()[: MAX_NAME - 10].decode(errors="ignore")
    return f"{start}~{sha256(label.encode()).hexdigest()[:8]}"


def value_in_name(value) -> str:
    """A setting's value as a part of a folder's name."""
    if isinstance(value, tuple):
        text = ",".join(str(item) for item in value)
    else:
        text = toml_value(value).strip('"')
    if 0 < len(text) <= MAX_VALUE_IN_NAME and not UNSAFE_IN_NAMES.search(text):
        return text
    end = UNSAFE_IN_NAMES.sub("", Path(text).name)[-MAX_VALUE_IN_NAME:]
    return f"{end}~{sha256(text.encode()).hexdigest()[:6]}"


# ---- programs that are given a model or a run


def resolve_checkpoint(path: Path) -> Path:
    """The folder of a run's last student, or `path` itself where it is no run.

    Of a run that was rolled back it is the student that was kept.

    Raises:
        UserError: the run has no finished student yet.
    """
    is_model = (path / "config.json").exists() or (path / "adapter_config.json").exists()
    if is_model or not (path / "config.toml").is_file():
        return path
    students = {}  # by round
    for folder in path.glob("round*/student_pos"):
        number = folder.parent.name.removeprefix("round")
        if number.isdecimal():
            students[int(number)] = folder
    last_first = [students[number] for number in sorted(students, reverse=True)]
    for folder in [path / "final/student_pos", *last_first]:
        if (folder / "stage.json").is_file():
            return folder
    raise UserError(
        f"{path}: no student of this run is finished; name a folder in it, such as "
        f"{path / 'round0/teacher1_pos'}"
    )


def agent_settings(folder: Path, flags: dict[str, str]) -> Config:
    """The settings of the run that `folder` is a stage of, or the defaults, with flags over them.

    How long a prompt may be is then for the model to say, and no limit of the run's data counts.
    """
    run_settings = folder.resolve().parent.parent / "config.toml"
    values = {}
    if run_settings.is_file() and (folder / "stage.json").is_file():
        values = read_toml(run_settings)
    values["model.context"] = 10**9
    values["data.max_prompt_length"] = 1
    values["data.max_examples"] = "none"
    config = override_by_run(Config(), values, run_settings)
    config = override(config, flags, "command line")
    check(config)
    return config


def agent_flags(words: list[str], accepted: tuple[str, ...]) -> dict[str, str]:
    """{setting: text} of words such as --run.seed=3.

    Raises:
        UserError: a word begins with none of `accepted`, or has no value.
    """
    flags = {}
    for word in words:
        if not word.startswith(accepted) or "=" not in word:
            quotes = "" if word.startswith("--") else ", or a prompt of several words in quotes"
            raise UserError(f"{word}: expected one of {' '.join(accepted)} with its value{quotes}")
        name, _, value = word[2:].partition("=")
        flags[name] = value
    return flags


# ---- help


def help_text() -> str:
    """The whole of `train.py --help`: every setting with its value, type and meaning."""
    path = preset_path(DEFAULT_PRESET)
    values = flatten(override(Config(), read_toml(path), str(path)))
    defaults = flatten(Config())
    lines = [HELP]
    for section in fields(Config):
        lines += ["", f"[{section.name}]"]
        for key in fields(section.type):
            name = f"{section.name}.{key.name}"
            line = f"--{name} ({describe(key.type)}) = {toml_value(values[name])}"
            if values[name] != defaults[name]:
                line += f"   (default: {toml_value(defaults[name])})"
            lines += wrap_help(line, indent=2, rest=6)
            lines += wrap_help(key.metadata["help"], indent=8, rest=10)
    return "\n".join(lines)


def wrap_help(text: str, indent: int, rest: int) -> list[str]:
    """Lines of at most HELP_WIDTH columns; `rest` is the indent of all but the first."""
    return textwrap.wrap(
        text,
        HELP_WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
