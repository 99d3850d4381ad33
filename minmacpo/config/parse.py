"""From the words of a command line to a checked `Config`: flags, TOML files, presets, help. No torch here.

Strict on purpose: an unknown key, a wrong type or a key without a value is an error that says what is right.
"""

import contextlib
import math
import re
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


UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # what a TOML file cannot hold as it is


UNSAFE = re.compile(r"[^A-Za-z0-9_.,+-]")  # what the name of a run does not hold


MOST_TOML = 1 << 20


DOTTED = re.compile(r"""(?:\.[ \t]*(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*){20}""")


BARE = {"--dry_run": "dry_run", "--profile": "profile", "--help": "help", "-h": "help"}


class ArgParser(ArgumentParser):
    """The words of a command that is not train.py; what is wrong with them is one sentence."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


HELP = """\
python train.py [@preset | @file.toml]... [--section.key=value | --section.key value]...
                [--method=NAME] [--stage=NAME] [--dry_run] [--profile] [--help]
python train.py @experiment-NAME [--seeds=0,1] [--dry_run] [what every run of it gets]

presets: @hh, @hh-real, @paper-hh-helpful, @paper-hh-harmless, @paper-pku, @tiny, @world (default @world; files and flags are laid over it, left to right)
torchrun --nproc-per-node=N train.py ... does any of this (but an experiment) on N processes; see [parallel]
experiments: a file each in minmacpo/config/presets/experiments; finished runs are not redone
--dry_run   read the data, print settings, row counts, slices and the stages with their tokens and memory; write nothing
--stage     compute this one stage only; the stages it needs must be finished, others may be computed beside it
--profile   write a Chrome trace of the first steps of each kind of stage into the run folder
Defaults are those of the released MACPO scripts; a preset's values are in minmacpo/config/presets."""


@dataclass(frozen=True, slots=True)
class Command:
    """What `train.py` was asked: the settings, and the words that belong to the command alone."""

    config: Config
    stage: str | None = None
    dry_run: bool = False
    profile: bool = False
    help: bool = False


def describe(kind) -> str:
    """A declared type in the words of `--help` and of error messages."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(args)
    if typing.get_origin(kind) is tuple:
        return f"list of {describe(args[0])}"
    if type(None) in args:
        return f"{describe(args[0])} | none"
    return {int: "whole number", float: "number", bool: "true | false", str: "text"}[kind]


def convert(kind, value, key: str):
    """`value` (text from a flag, or a TOML value) as the declared type; UserError otherwise."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in args:
        return None if value in ("none", None) else convert(args[0], value, key)
    if origin is tuple and isinstance(value, str | list | tuple):
        items = value.split(",") if isinstance(value, str) else value
        return tuple(convert(args[0], item, key) for item in items if item != "")
    if kind is str and isinstance(value, str) and not UNWRITABLE.search(value):
        return value
    word = str(value).lower() if isinstance(value, bool) else value  # TOML's true is the word true
    if origin is typing.Literal and word in args:
        return word
    if kind is bool and word in ("true", "false"):
        return word == "true"
    if kind in (int, float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            number = kind(value) if isinstance(value, str) or kind is float else value
            if isinstance(number, kind) and math.isfinite(number):
                return number
    text = (
        hex(value) if type(value) is int else str(value)
    )  # Python writes no number of thousands of digits
    shown = ascii(value) if len(text) <= 80 else ascii(text[:80]) + "…"
    near = (
        get_close_matches(value, args, 1)
        if origin is typing.Literal and isinstance(value, str)
        else []
    )
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{key} = {shown}: expected {describe(kind)}{hint}")


def override(config: Config, values: dict[str, object], where: str) -> Config:
    """A new Config with {"section.key": value} laid over it; UserError for unknown keys and wrong types."""
    for key, value in values.items():
        if key not in SETTINGS:
            same_name = [
                known for known in SETTINGS if known.split(".")[1] == key.rpartition(".")[2]
            ]
            near = (get_close_matches(key, SETTINGS, 1) or same_name)[:1]
            hint = f"did you mean {near[0]}?" if near else "python train.py --help lists all"
            raise UserError(f"{where}: unknown setting {key!r}; {hint}")
        section, name = key.split(".")
        value = convert(SETTINGS[key].type, value, f"{where}: {key}")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def preset_path(word: str) -> Path:
    """File behind `@word`: a packaged preset's name, or a path that ends in .toml."""
    if word.endswith(".toml"):
        return Path(word)
    names = sorted(p.stem for p in PRESETS.glob("*.toml"))
    if word not in names:
        near = get_close_matches(word, names, 1) or ["a path that ends in .toml"]
        raise UserError(f"@{word}: no such preset ({', '.join(names)}); did you mean {near[0]}?")
    return PRESETS / f"{word}.toml"


def read_toml(path: Path) -> dict[str, object]:
    """Flat {"section.key": value} of one TOML file; UserError if unreadable, broken, empty, or what a parser would need gigabytes for."""
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > MOST_TOML or DOTTED.search(text):
            raise ValueError(
                f"more than {MOST_TOML} characters, or a key of more than twenty parts"
            )
        tables = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    if not tables:
        raise UserError(f"{path}: is empty; expected sections such as [dpo] with key = value lines")
    for section, keys in tables.items():
        if not isinstance(keys, dict):
            raise UserError(f"{path}: {section!r} stands outside a section such as [dpo]")
    return {
        f"{section}.{key}": value for section, keys in tables.items() for key, value in keys.items()
    }


def resolve_checkpoint(path: Path) -> Path:
    """`path`, or in its place the last student of the run that it is (the one that the monitor kept, if any).
    UserError if the run has none yet."""
    if not (path / "config.toml").is_file() or any(
        (path / name).exists() for name in ("config.json", "adapter_config.json")
    ):
        return path
    rounds = [p for p in path.glob("round*/student_pos") if p.parent.name[5:].isdecimal()]
    found = [path / "final/student_pos", *sorted(rounds, key=lambda p: -int(p.parent.name[5:]))]
    for folder in found:
        if (folder / "stage.json").is_file():
            return folder
    raise UserError(
        f"{path}: no student of this run is finished; name a folder in it, such as {path / 'round0/teacher1_pos'}"
    )


def agent_settings(folder: Path, flags: dict[str, str]) -> Config:
    """The settings of the run that `folder` is a stage of, or else the defaults, with `flags` over them. How long a
    prompt may be is then for the model to say, and no limit of the run's own data counts."""
    home = folder.resolve().parent.parent / "config.toml"
    known = read_toml(home) if home.is_file() and (folder / "stage.json").is_file() else {}
    known |= {"model.context": 10**9, "data.max_prompt_length": 1, "data.max_examples": "none"}
    config = override(Config(), known, str(home))
    check(config := override(config, flags, "command line"))
    return config


def agent_flags(words: list[str], accepted: tuple[str, ...]) -> dict[str, str]:
    """{setting: text} of words such as --run.seed=3; UserError for one that begins with none of `accepted`."""
    if odd := [word for word in words if not word.startswith(accepted) or "=" not in word]:
        quotes = "" if odd[0].startswith("--") else ", or a prompt of several words in quotes"
        raise UserError(f"{odd[0]}: expected one of {' '.join(accepted)} with its value{quotes}")
    return dict(word[2:].split("=", 1) for word in words)


def split_words(argv: list[str]) -> tuple[list[str], dict[str, str], dict[str, bool]]:
    """argv as (@-words without the @, {key: text}, {bare flag: True}); UserError for anything else."""
    files, values, bare = [], {}, {}
    words = iter(argv)
    for word in words:
        if word.startswith("@") and len(word) > 1:
            files.append(word[1:])
        elif word in BARE:
            bare[BARE[word]] = True
        elif word.startswith("--") and len(word) > 2:
            key, equals, text = word[2:].partition("=")
            text = text if equals else next(words, "")
            if not text or (not equals and text.startswith(("--", "@"))):
                near = get_close_matches(word, BARE, 1)
                raise UserError(
                    f"--{key} needs a value: --{key}=VALUE"
                    + (f"; did you mean {near[0]}?" if near else "")
                )
            values["run.method" if key == "method" else key] = text
        else:
            raise UserError(f"{word!r}: expected @preset, @file.toml or --section.key=value")
    return files, values, bare


def lay(layers: list[tuple[str, dict[str, object]]]) -> Config:
    """Layers (where from, values) over the defaults; K follows model.teachers unless a layer states it."""
    config = Config()
    for where, values in layers:
        config = override(config, values, where)
    if config.model.teachers and not any("macpo.teachers" in values for _, values in layers):
        config = override(config, {"macpo.teachers": len(config.model.teachers)}, "model.teachers")
    return config


def parse(argv: list[str]) -> Command:
    """The words of `train.py` (see HELP) as a checked Command: defaults, files from left to right, flags.
    Unless a packaged preset comes first, @world is the ground. What a file leaves "" must be given later."""
    files, values, bare = split_words(argv)
    if "help" in bare:
        return Command(Config(), help=True)
    stage = values.pop("stage", None)
    ground = [] if files and not files[0].endswith(".toml") else ["world"]
    layers = [(str(path), read_toml(path)) for path in map(preset_path, ground + files)]
    preset, config = lay(layers), lay([*layers, ("command line", values)])
    laid = {
        key: value
        for values in [*(values for _, values in layers), values]
        for key, value in values.items()
    }
    if needed := next((key for key in SETTINGS if laid.get(key) == ""), None):
        raise UserError(
            f"@{' @'.join(files)} needs --{needed}=VALUE: {SETTINGS[needed].metadata['help'].partition(';')[0]}"
        )
    if config.run.name is None:
        label = "+".join(Path(word).stem for word in files) or "world"
        config = replace(config, run=replace(config.run, name=run_name(label, preset, config)))
    check(config)
    return Command(config, stage, **bare)


def read_settings(file: Path) -> Config:
    """The settings in the config.toml of a run; UserError where they are no run's."""
    config = override(Config(), read_toml(file), str(file))
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def run_name(label: str, preset: Config, config: Config) -> str:
    """`label` plus "-key=value" for every setting in which `config` differs from `preset`; a value that is
    long, or could be mistaken for another part of the name, is told apart by a hash."""
    old, new = flatten(preset), flatten(config)
    last = [key.split(".")[1] for key in new]
    for key, value in sorted(new.items(), key=lambda item: item[0].startswith("run.")):
        if value == old[key] or key in NON_IDENTITY_SETTINGS:
            continue
        short = key.split(".")[1] if last.count(key.split(".")[1]) == 1 else key
        text = (
            ",".join(map(str, value)) if isinstance(value, tuple) else toml_value(value).strip('"')
        )
        if UNSAFE.search(text) or not 0 < len(text) <= 40:
            text = (
                f"{UNSAFE.sub('', Path(text).name)[-40:]}~{sha256(text.encode()).hexdigest()[:6]}"
            )
        label += f"-{short}={text}"
    raw = label.encode()
    return (
        label
        if len(raw) <= 200
        else f"{raw[:190].decode(errors='ignore')}~{sha256(raw).hexdigest()[:8]}"
    )


def to_toml(config: Config) -> str:
    """The whole Config as TOML that `train.py @FILE` takes back unchanged."""
    lines = []
    for section, keys in asdict(config).items():
        lines += [
            f"[{section}]",
            *(f"{key} = {toml_value(value)}" for key, value in keys.items()),
            "",
        ]
    return "\n".join(lines)


def help_text() -> str:
    """The whole of `train.py --help`."""
    lines = [HELP]
    for section in fields(Config):
        lines += ["", f"[{section.name}]"]
        for key in fields(section.type):
            head = (
                f"  --{section.name}.{key.name} ({describe(key.type)}) = {toml_value(key.default)}"
            )
            lines += [head, f"        {key.metadata['help']}"]
    return "\n".join(lines)
