"""What the files beside a tokenizer say of it: added tokens, begin and end, spaces before texts.

A token is a mark (it ends a turn, or begins one) or it is text, such as <think>. No text becomes a
mark, and no answer shows one. Which of both a token is depends on what the files say of it, on its
use in the chat template, and on its name.
"""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minmacpo import UserError
from minmacpo.data.bpe import MALFORMED, check_ids
from minmacpo.data.text_tokens import AddedToken, parse_added_token
from minmacpo.runtime.files import read_json

# All that a model folder may say of its tokenizer. The first two hold one; where both are there,
# the first is used.
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# Marks of the templates in chat_template.py, which are marks whatever a file says of them
TEMPLATE_MARKS = frozenset(
    (
        "<user>",
        "<bot>",
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        "[INST]",
        "[/INST]",
    )
)

# Where a space is put before a text: nowhere, at the start of all, at the start and behind every
# begin token, or behind every special token too.
SpaceBefore = Literal["never", "first", "document", "always"]


@dataclass(frozen=True, slots=True)
class TokenizerNotes:
    """What is said of a tokenizer beside its own file.

    Attributes:
        added_tokens: by id.
        ends: name or id of "bos" and "eos", where they are not those of the tokenizer's file.
        special_names: what is named as a token of some purpose, such as padding.
        stop_ids: that end an answer, but for the end token.
        chat_template: in Jinja; "" where there is none.
        adds_space: whether a text gets a space before it; None: as the tokenizer's file has it.
        space_before: where it gets one.
        adds_begin: whether a text gets the begin token before it; None: not said.
    """

    added_tokens: dict[int, AddedToken] = field(default_factory=dict)
    ends: dict[str, str | int] = field(default_factory=dict)
    special_names: frozenset[str] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    chat_template: str = ""
    adds_space: bool | None = None
    space_before: SpaceBefore = "document"
    adds_begin: bool | None = None

    def is_mark(self, token: AddedToken, names: Container[str], is_piece: bool = False) -> bool:
        """Whether no text becomes a token, and no answer shows it.

        Args:
            names: of all tokens.
            is_piece: whether the vocabulary of a sentencepiece model has it.
        """
        name = token.name
        if len(name) == 1:
            return False  # "!" where it pads is a character as well
        is_bracketed = re.fullmatch(r"<.+>|\[.+\]", name) is not None
        if token.special or name in self.special_names or name in TEMPLATE_MARKS:
            return True
        if is_bracketed and token.token_id in self.stop_ids:
            return True

        # <think> is text where </think> is there too
        tag = re.fullmatch(r"</?([\w-]+)>", name)
        if tag and f"<{tag[1]}>" in names and f"</{tag[1]}>" in names:
            return False
        if is_bracketed and name in self.chat_template:
            return not is_piece or name.startswith("<")
        if token.special is False:
            return False
        if is_piece:
            return re.fullmatch(r"<[|｜].+[|｜]>", name) is not None
        return is_bracketed


NO_NOTES = TokenizerNotes()


# ---- reading a folder -------------------------------------------------------------------------


def read_notes(folder: Path) -> TokenizerNotes:
    """What a model folder says of its tokenizer; UserError where a file is damaged."""
    config, special_map, added_ids = (read_optional(folder / name) for name in FILES[2:])
    has_json_only = not (folder / FILES[0]).is_file()
    file = {} if has_json_only else read_optional(folder / FILES[1])
    chat_template = read_chat_template(folder)
    try:
        check_ids(added_ids)
        added_tokens = {number: AddedToken(name, number) for name, number in added_ids.items()}
        for number, raw in config.get("added_tokens_decoder", {}).items():
            check_ids({raw["content"]: int(number)})
            added_tokens[int(number)] = parse_added_token(raw, int(number))
        named = special_map | config
        ends = named_ends(named)
        if has_json_only and not ends.get("eos"):
            ends = numbered_ends(read_optional(folder / "config.json"))
        return TokenizerNotes(
            added_tokens=added_tokens,
            ends=ends,
            special_names=named_tokens(named),
            stop_ids=frozenset(read_stop_ids(folder)),
            chat_template=chat_template,
            adds_space=says_space(config),
            space_before=where_space(config, file),
            adds_begin=says_begin(config, file, chat_template),
        )
    except MALFORMED:
        names = ", ".join(FILES[1:])
        raise UserError(
            f"{folder}: {names} or an id in config.json is damaged; tokens are text, and their "
            "ids whole numbers"
        ) from None


def read_optional(file: Path) -> dict:
    """The object in a JSON file; an empty one where there is no file."""
    return read_json(file) if file.is_file() else {}


def read_chat_template(folder: Path) -> str:
    """The chat template of a model folder, "" where it has none, or none that can be read.

    Of several templates it is the one that is called "default", or else the first.
    """
    template_file = folder / "chat_template.jinja"
    try:
        if template_file.is_file():
            return template_file.read_text("utf-8")
        config = read_optional(folder / "tokenizer_config.json")
        template = config.get("chat_template") or ""
        if not template:
            template = read_optional(folder / "chat_template.json").get("chat_template") or ""
        if isinstance(template, str):
            return template
        named = dict(named_templates(template))
    except (OSError, UserError, *MALFORMED):
        return ""  # load_tokenizer says what is wrong with it
    return named.get("default") or next(iter(named.values()), "")


def named_templates(templates: dict | list) -> Iterator[tuple[str, str]]:
    """(name, template) of each of several: an object, or a list of objects with both."""
    pairs = (
        templates.items()
        if isinstance(templates, dict)
        else ((entry["name"], entry["template"]) for entry in templates)
    )
    for name, template in pairs:
        if isinstance(template, str):
            yield name, template


def read_stop_ids(folder: Path) -> set[int]:
    """The ids that end an answer by config.json and generation_config.json.

    Raises:
        UserError: one is no whole number.
    """
    ids = set()
    for file in (folder / "config.json", folder / "generation_config.json"):
        eos = read_optional(file).get("eos_token_id")
        for end in eos if isinstance(eos, list) else [eos]:
            if end is not None and type(end) is not int:
                raise UserError(
                    f"{file}: eos_token_id = {eos!r}; expected a whole number, or a list of them"
                )
            ids.add(end)
    return ids - {None}


# ---- single keys --------------------------------------------------------------------------------


def named_ends(config: dict) -> dict[str, str | int]:
    """{"bos", "eos"} of a tokenizer_config.json, as far as it names them.

    {"eos_token": "</s>"} or {"eos_token": {"content": "</s>", "special": true}}
    """
    ends = {}
    for end in ("bos", "eos"):
        token = config.get(f"{end}_token")
        if isinstance(token, dict):
            token = token["content"]
        if token is not None:
            ends[end] = check_end(token)
    return ends


def numbered_ends(config: dict) -> dict[str, str | int]:
    """{"bos", "eos"} of a model's config.json; of several ids the first."""
    ends = {}
    for end in ("bos", "eos"):
        token_id = config.get(f"{end}_token_id")
        if isinstance(token_id, list):
            token_id = token_id[0]
        if token_id is not None:
            ends[end] = check_end(token_id)
    return ends


def check_end(token: object) -> str | int:
    """The name or id of a token; TypeError for something else."""
    if type(token) not in (str, int):
        raise TypeError(f"token {token!r:.60}")
    return token


def named_tokens(config: dict) -> frozenset[str]:
    """The names of all tokens of a purpose: "pad_token", "additional_special_tokens" and others."""
    tokens = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens += config.get(key) or []  # keys of an object are no names, and harm nothing
    names = set()
    for token in tokens:
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str):
            names.add(name)
    return frozenset(names)


def says_space(config: dict) -> bool | None:
    """Whether texts get a space before them, as far as a tokenizer_config.json says it."""
    for key in ("add_prefix_space", "add_dummy_prefix"):
        if type(config.get(key)) is bool:
            return config[key]
    return None


def where_space(config: dict, file: dict) -> SpaceBefore:
    """Where texts get a space before them, by the tokenizer.json beside a sentencepiece model.

    Without one, by `legacy`. Where nothing is said, a text behind a begin token begins a document.
    """
    for step in steps_of(file, "normalizer") + steps_of(file, "pre_tokenizer"):
        scheme = step.get("prepend_scheme")
        if step.get("type") == "Prepend":
            return "always"
        if step.get("type") == "Metaspace":
            if scheme in ("never", "first", "always"):
                return scheme
            return "always" if step.get("add_prefix_space", True) else "never"
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            return "always"
    legacy = config.get("legacy")
    if legacy is None:
        return "document"
    return "always" if legacy else "first"


def says_begin(config: dict, file: dict, chat_template: str) -> bool | None:
    """Whether texts get the begin token before them, as far as the files say it."""
    if "bos_token" in chat_template:
        return True
    if type(config.get("add_bos_token")) is bool:
        return config["add_bos_token"]
    return post_processor_begins(file)


def post_processor_begins(file: dict) -> bool | None:
    """Whether a tokenizer.json's post-processor puts a token before texts; None: it has none."""
    for step in steps_of(file, "post_processor"):
        if step.get("type") == "TemplateProcessing":
            return "SpecialToken" in step["single"][0]
        if "cls" in step:
            return True
    return None


def steps_of(file: dict, part: str) -> list[dict]:
    """The steps of a tokenizer.json's normalizer, pre_tokenizer or post_processor, one by one."""
    return flatten_steps(file.get(part))


def flatten_steps(step: dict | None) -> list[dict]:
    """A step, or the steps in a sequence of them."""
    if step is None:
        return []
    for key in ("normalizers", "pretokenizers", "processors"):
        if key in step:
            steps = []
            for inner in step[key]:
                steps.extend(flatten_steps(inner))
            return steps
    return [step]
