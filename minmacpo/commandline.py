"""From the words of a command line to a checked `Config`: flags, TOML files, presets, help.

Strict on purpose: an unknown key, a wrong type or a key without a value is an error that names
the nearest right one. No torch here.
"""

import functools
import math
import re
import tomllib
import types
import typing
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Literal

from minmacpo import UserError
from minmacpo.config import Config, check, flatten, toml_value

PRESETS = Path(__file__).parent / "presets"
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # what a TOML file cannot hold as it is


@dataclass(frozen=True, slots=True)
class Command:
    """What `train.py` was asked: the settings, and the words that belong to the command alone."""

    config: Config
    dry_run: bool = False
    profile: bool = False
    help: bool = False
    stage: str | None = None


@functools.cache
def section_keys(section) -> dict[str, object]:
    """Declared type of every key of a section (an instance)."""
    return typing.get_type_hints(type(section))


def describe(kind) -> str:
    """A declared type in the words of `--help` and of error messages."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " | ".join(args)
    if typing.get_origin(kind) is tuple:
        return f"list of {describe(args[0])}"
    if isinstance(kind, types.UnionType):
        return f"{describe(args[0])} | none"
    return {int: "whole number", float: "number", bool: "true | false", str: "text"}[kind]


def convert(kind, value, key: str):
    """`value` (text from a flag, or a TOML value) as the declared type; UserError otherwise."""
    args = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if value in ("none", None) else convert(args[0], value, key)
    if typing.get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, list | tuple):
            return tuple(convert(args[0], item, key) for item in items if item != "")
    elif typing.get_origin(kind) is Literal:
        value = str(value).lower() if isinstance(value, bool) else value
        if value in args:
            return value
    elif kind is bool:
        if isinstance(value, bool) or value in ("true", "false"):
            return value in (True, "true")
    elif kind is str:
        if isinstance(value, str) and value and not UNWRITABLE.search(value):
            return value
    elif not isinstance(value, bool) and isinstance(value, str | int | float):
        try:
            number = kind(value) if isinstance(value, str) or kind is float else value
            if isinstance(number, kind) and math.isfinite(number):
                return number
        except (ValueError, OverflowError):
            pass
    shown = ascii(value) if len(str(value)) <= 80 else ascii(str(value)[:80]) + "…"
    raise UserError(f"{key} = {shown}: expected {describe(kind)}")


known_keys = functools.cache(lambda: tuple(flatten(Config())))


def check_key(key: str, where: str) -> None:
    """Raise UserError, with the nearest right name, unless `key` is a known "section.key"."""
    known = known_keys()
    if key in known:
        return
    section, _, name = key.partition(".")
    near = get_close_matches(key, known, 1, 0.6)
    near = near or [k for k in known if k.partition(".")[2] == (name or section)][:1]
    hint = f"; did you mean {near[0]}?" if near else "; python train.py --help lists all"
    raise UserError(f"{where}: unknown setting {key!r}{hint}")


def overlay(config: Config, values: dict[str, object], where: str) -> Config:
    """A new Config with the flat {"section.key": value} laid over it; types are checked."""
    for key, value in values.items():
        check_key(key, where)
        section, name = key.split(".")
        part = getattr(config, section)
        value = convert(section_keys(part)[name], value, f"{where}: {key}")
        config = replace(config, **{section: replace(part, **{name: value})})
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
    """Flat {"section.key": value} of one TOML file; UserError if unreadable, broken or empty."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    if not tables:
        raise UserError(f"{path}: is empty; expected sections such as [dpo] with key = value lines")
    flat = {}
    for section, keys in tables.items():
        if not isinstance(keys, dict):
            raise UserError(f"{path}: {section!r} stands outside a section such as [dpo]")
        flat |= {f"{section}.{key}": value for key, value in keys.items()}
    return flat


def split_words(argv: list[str]) -> tuple[list[str], dict[str, str], set[str]]:
    """argv as (@-words without the @, {key: text}, bare flags); UserError for anything else."""
    files, values, bare = [], {}, set()
    words = iter(argv)
    for word in words:
        if word.startswith("@") and len(word) > 1:
            files.append(word[1:])
        elif word in ("--dry_run", "--profile", "--help", "-h"):
            bare.add(word.lstrip("-")[0])
        elif word.startswith("--") and len(word) > 2:
            key, equals, text = word[2:].partition("=")
            text = text if equals else next(words, "--")
            if not text or (not equals and text.startswith(("--", "@"))):
                raise UserError(f"--{key} needs a value: --{key}=VALUE")
            values[{"method": "run.method"}.get(key, key)] = text
        else:
            raise UserError(f"{word!r}: expected @preset, @file.toml or --section.key=value")
    return files, values, bare


def parse(argv: list[str]) -> Command:
    """The command line of `train.py` as a checked Command (grammar: --help).

    Settings are laid over each other: defaults, TOML files from left to right, flags. Unless the
    first file is a packaged preset, @world is the ground. Raises UserError.
    """
    files, values, bare = split_words(argv)
    stage = values.pop("stage", None)
    ground = [] if files and not files[0].endswith(".toml") else ["world"]
    config = Config()
    for word in ground + files:
        path = preset_path(word)
        config = overlay(config, read_toml(path), str(path))
    preset, config = config, overlay(config, values, "command line")
    if "hh" in files and config.data.path is None:
        raise UserError("@hh needs --data.path=FOLDER_OR_FILE, HH-RLHF files as published")
    if config.run.name is None:
        label = "+".join(Path(word).stem for word in files) or "world"
        config = replace(config, run=replace(config.run, name=run_name(label, preset, config)))
    check(config)
    return Command(config, "d" in bare, "p" in bare, "h" in bare, stage)


def run_name(label: str, preset: Config, config: Config) -> str:
    """`label` plus "-key=value" for every setting in which `config` differs from `preset`.

    A value that is long, or could be mistaken for another part of the name, is told apart by a hash.
    """
    old, new = flatten(preset), flatten(config)
    last = [key.split(".")[1] for key in new]
    for key, value in sorted(new.items(), key=lambda item: item[0].startswith("run.")):
        if value == old[key] or key in ("run.root", "run.name"):
            continue
        short = key.split(".")[1] if last.count(key.split(".")[1]) == 1 else key
        text = ",".join(map(str, value)) if isinstance(value, tuple) else toml_value(value).strip('"')
        if not re.fullmatch(r"[A-Za-z0-9_.,+-]{1,40}", text):
            text = f"{re.sub(r'[^A-Za-z0-9_.,+-]', '', Path(text).name)[-40:]}~{sha256(text.encode()).hexdigest()[:6]}"
        label += f"-{short}={text}"
    raw = label.encode()
    return label if len(raw) <= 200 else f"{raw[:190].decode(errors='ignore')}~{sha256(raw).hexdigest()[:8]}"


def to_toml(config: Config) -> str:
    """The whole Config as TOML that `train.py @FILE` takes back unchanged."""
    lines = []
    for section, keys in asdict(config).items():
        lines += [f"[{section}]", *(f"{k} = {toml_value(v)}" for k, v in keys.items()), ""]
    return "\n".join(lines)


def help_text() -> str:
    """The whole of `train.py --help`."""
    presets = ", ".join("@" + p.stem for p in sorted(PRESETS.glob("*.toml")))
    lines = [
        "python train.py [@preset | @file.toml]... [--section.key=value | --section.key value]...",
        "                [--method=NAME] [--stage=NAME] [--dry_run] [--profile] [--help]",
        "",
        f"presets: {presets} (default @world; files and flags are laid over it, left to right)",
        "--dry_run   read the data, print settings, row counts, slices and the stage plan; write nothing",
        "--stage     compute this one stage only; the stages it needs must be finished",
        "--profile   write a Chrome trace of the first steps of each kind of stage into the run folder",
        "Defaults are those of the released MACPO scripts; a preset's values are in minmacpo/presets.",
    ]
    for part in fields(Config):
        lines += ["", f"[{part.name}]"]
        kinds = section_keys(part.default)
        for key in fields(part.default):
            head = f"  --{part.name}.{key.name} ({describe(kinds[key.name])})"
            lines.append(f"{head} = {toml_value(key.default)}")
            lines += [f"        {key.metadata['help']}"] if key.metadata["help"] else []
    return "\n".join(lines)
