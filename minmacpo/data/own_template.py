"""A model's own chat template, compared with those of templates.py.

The own template is a program in Jinja. Where jinja2 is installed it is run, in a sandbox, on three
dialogues; where it is not, the marks in its text have to do.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minmacpo import UserError
from minmacpo.data.bpe import MALFORMED
from minmacpo.data.chat_template import template_text
from minmacpo.data.records import Message
from minmacpo.data.templates import TEMPLATES, TODAY
from minmacpo.data.tokenizer import load_tokenizer
from minmacpo.data.tokenizer_files import FILES, named_ends, read_chat_template, read_optional

# What occurs in the chat templates that are written like one of ours: the first line of which all
# words occur counts.
MARKS = (
    ("smollm3", "<|im_start|>", "Knowledge Cutoff Date"),
    ("qwen3", "<|im_start|>", "enable_thinking"),
    ("qwen2.5", "<|im_start|>", "You are Qwen, created by Alibaba Cloud."),
    ("smollm2", "<|im_start|>", "named SmolLM, trained by Hugging Face"),
    ("qwen2", "<|im_start|>", "system\nYou are a helpful assistant."),
    ("chatml", "<|im_start|>"),
    ("llama-3.1", "<|start_header_id|>", "Cutting Knowledge Date"),
    ("llama-3", "<|start_header_id|>"),
    ("gemma", "<start_of_turn>"),
    ("llama-2", "<<SYS>>"),
    ("mistral-v3", "[INST]", "[AVAILABLE_TOOLS]"),
    ("mistral", "[INST]"),
    ("phi-3", "<|assistant|>", "<|end|>"),
    ("zephyr", "<|assistant|>"),
    ("turns", "<user>"),
    ("plain", "Human: "),
)

# How a template may be asked to write: as it likes, and with thoughts turned off and on
SWITCHES = (None, False, True)

SHOWN = 60  # characters of a text in a warning


@dataclass(frozen=True, slots=True)
class Sample:
    """A dialogue that templates are compared on; without a response it ends in a prompt."""

    messages: tuple[Message, ...]
    response: str | None


QUESTION = Message("user", "Who are you?")
SYSTEM = Message("system", "Be kind.")
EARLIER = (Message("user", "Hello"), Message("assistant", "Hi there"))
SAMPLES = (
    Sample((QUESTION,), None),
    Sample((*EARLIER, QUESTION), None),
    Sample((SYSTEM, QUESTION), None),
    Sample((QUESTION,), "A model."),
    Sample((*EARLIER, QUESTION), "A model."),
    Sample((SYSTEM, QUESTION), "A model."),
)


# ---- which template is a model's own ---------------------------------------------------------


def own_template(folder: Path) -> str:
    """The template in which a model's dialogues are written.

    It is the one that writes the same as the folder's chat template, or else has the same marks.
    Without a chat template it is "turns" for a tokenizer that was made here, "plain" for others.
    """
    source = read_chat_template(folder)
    if not source:
        return "turns" if was_made_here(folder) else "plain"
    return same_template(folder, source) or similar_template(source) or "plain"


def was_made_here(folder: Path) -> bool:
    """Whether a folder's tokenizer has the turn marks of those that are trained here."""
    if not (folder / "tokenizer.model").is_file():
        return False
    files = [folder / name for name in FILES if (folder / name).is_file()]
    return has_turn_marks(folder, tuple(file.stat().st_mtime_ns for file in files))


@cache
def has_turn_marks(folder: Path, changed: tuple[int, ...]) -> bool:
    """As `was_made_here`, looked at once: a run asks for the templates of its bases often.

    Args:
        changed: when each of the tokenizer's files was changed.
    """
    return bool(load_tokenizer(folder).turn_marks)


def template_warning(folder: Path, name: str) -> str | None:
    """One sentence where a model's own chat template writes dialogues otherwise than `name` does.

    Where jinja2 is not installed, or the chat template cannot be run, it is about marks alone.
    """
    source = read_chat_template(folder)
    if not source:
        return None
    texts = own_texts(folder, source)
    if texts is not None:
        difference = find_difference(texts, our_texts(folder, name))
        if difference is None:
            return None
        own, ours = difference
        advice = ""
        same = same_template(folder, source)
        likely = similar_template(source)
        if same is not None:
            advice = f"; --data.template={same} writes as it does"
        elif likely not in (None, name):
            advice = f"; --data.template={likely} is nearer to it"
        return (
            f"{folder}: its own chat template writes {own}, data.template = {name} writes "
            f"{ours}{advice}"
        )

    likely = similar_template(source)
    if likely is None or likely == name:
        return None
    return (
        f"{folder}: its own chat template has the marks of {likely}, dialogues are written as "
        f"{name}; --data.template={likely} may be meant (pip install jinja2 to have both compared)"
    )


def export_warning(base: Path, name: str) -> str | None:
    """One sentence where a model that keeps its base's chat template was used with another one."""
    if not read_chat_template(base):
        return (
            f"the exported model has no chat template, as its base has none; dialogues are to be "
            f"written for it as {name} writes them"
        )
    difference = template_warning(base, name)
    if difference is None:
        return None
    return (
        f"the exported model keeps the chat template of its base, which was not used: {difference}"
    )


def same_template(folder: Path, source: str) -> str | None:
    """The first template that writes the same as the folder's chat template."""
    texts = own_texts(folder, source)
    if texts is None:
        return None
    likely = similar_template(source)
    names = sorted(TEMPLATES, key=lambda name: name != likely)  # the likely one first
    for name in names:
        if find_difference(texts, our_texts(folder, name)) is None:
            return name
    return None


def similar_template(source: str) -> str | None:
    """The template whose marks a chat template has."""
    source = source.replace(r"\n", "\n")
    for name, *marks in MARKS:
        if all(mark in source for mark in marks):
            return name
    return None


def find_difference(
    variants: Sequence[Sequence[str | None]], ours: Sequence[str | None]
) -> tuple[str, str] | None:
    """Where two templates first differ, as shown in a warning: the model's own text, and ours.

    None if one of the variants is the same on all dialogues that both can write.

    Args:
        variants: the texts of the model's own template, by what it may be asked to do.
        ours: those of the other one; None of a dialogue that a template refuses.
    """
    first = None
    for own in variants:
        difference = None
        for sample, own_text, our_text in zip(SAMPLES, own, ours, strict=True):
            if own_text is None or our_text is None:
                continue
            if sample.response is not None:
                # behind an answer templates may go on as they like
                own_text = own_text[: len(our_text)]
            if own_text != our_text:
                difference = show_difference(own_text, our_text)
                break
        if difference is None:
            return None
        first = first or difference
    return first


def show_difference(own: str, ours: str) -> tuple[str, str]:
    """Two texts from a little before where they part, short and in quotation marks."""
    parting = 0
    while own[parting : parting + 1] == ours[parting : parting + 1] != "":
        parting += 1
    start = max(0, parting - SHOWN // 3)
    shown = []
    for text in (own, ours):
        part = text[start : start + SHOWN]
        before = "…" if start > 0 else ""
        behind = "…" if start + SHOWN < len(text) else ""
        shown.append(before + json.dumps(part, ensure_ascii=False) + behind)
    return shown[0], shown[1]


# ---- what both write --------------------------------------------------------------------------


def our_texts(folder: Path, name: str) -> list[str | None]:
    """What a template writes for each sample with a model's begin and end token."""
    ends = read_ends(folder)
    texts = []
    for sample in SAMPLES:
        try:
            texts.append(template_text(name, sample.messages, sample.response, ends))
        except UserError:
            texts.append(None)  # it has no place for a system message
    return texts


def own_texts(folder: Path, source: str) -> list[list[str | None]] | None:
    """What a model's chat template writes for each sample, by what it may be asked to do.

    None of a sample that it refuses. None at all where it cannot be run.
    """
    ends = read_ends(folder)
    bos = ends.get("bos", "")
    eos = ends.get("eos", "")
    variants = []
    for thinking in SWITCHES:
        texts = run_template(source, bos, eos, thinking)
        if texts is None:
            return None
        if texts not in variants:
            variants.append(texts)
    return variants


@cache
def run_template(source: str, bos: str, eos: str, thinking: bool | None) -> list[str | None] | None:
    """The text of each sample by a template in Jinja; None without jinja2, or if it writes none.

    Args:
        thinking: what the template is told of thoughts; None: nothing.
    """
    environment = make_environment()
    if environment is None:
        return None
    switches = {} if thinking is None else {"enable_thinking": thinking}
    texts = []
    for sample in SAMPLES:
        messages = [{"role": turn.role, "content": turn.content} for turn in sample.messages]
        if sample.response is not None:
            messages.append({"role": "assistant", "content": sample.response})
        try:
            program = environment.from_string(without_generation_tags(source))
            text = program.render(
                messages=messages,
                add_generation_prompt=sample.response is None,
                bos_token=bos,
                eos_token=eos,
                tools=None,
                documents=None,
                **switches,
            )
        except Exception:  # it is a program of somebody else, which may fail in any way
            text = None
        texts.append(text)
    return texts if any(texts) else None


def without_generation_tags(source: str) -> str:
    """A template without {% generation %}, which transformers alone knows: it writes nothing."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", lambda tag: blank_tag(tag[0]), source)


def blank_tag(tag: str) -> str:
    """A statement that writes nothing and takes off the same white space as this one."""
    before = "-" if tag.startswith("{%-") else ""
    behind = "-" if tag.endswith("-%}") else ""
    return "{%" + before + " set _ = 0 " + behind + "%}"


def make_environment():
    """Where a template is run: a sandbox with the names that transformers gives one; or None."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None

    def raise_exception(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = to_json
    environment.globals["strftime_now"] = lambda form: TODAY.get(form, TODAY["%d %b %Y"])
    return environment


def to_json(value, indent: int | None = None, **options) -> str:
    """JSON as transformers writes it: Jinja's own filter spells "<" as it stands in HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


# ---- what a folder says ------------------------------------------------------------------------


def read_ends(folder: Path) -> dict[str, str]:
    """The names of a model's begin and end token, "bos" and "eos", as far as it has them."""
    try:
        config = read_optional(folder / "tokenizer_config.json")
        ends = named_ends(read_optional(folder / "special_tokens_map.json") | config)
    except (UserError, *MALFORMED):
        return {}  # load_tokenizer says what is wrong with it
    return {end: name for end, name in ends.items() if isinstance(name, str)}
