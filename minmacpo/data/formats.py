"""What a row of a file can look like, and how it becomes a prompt with the answers that it has.

Reading is strict: the first row of a file says which fields its rows have. A row with other fields,
or one that cannot be read, is an error with file and line, unless such rows are to be skipped. What
can be read but not used is counted by reason. Text is taken without the white space around it.

To add a format, write a function from a row to `Sides`, put it into FORMATS, and say in
`format_name` which fields it has.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from minmacpo import UserError
from minmacpo.data.readers import (
    ENDINGS,
    find_files,
    is_array,
    read_array,
    read_lines,
    split_pair_paths,
)
from minmacpo.data.records import Message, Pair, Sample, example_id, format_dialogue

Prompt = tuple[Message, ...]

# The fields that are looked at; the first that a row has is taken.
PROMPT_FIELDS = ("prompt", "conversations", "messages", "instruction")
SINGLE_ANSWER_FIELDS = ("response_1", "response", "completion", "output")
ANSWER_FIELDS = ("chosen", "rejected", "response_0", *SINGLE_ANSWER_FIELDS)

# A row has all fields of at least one of these.
REQUIRED_FIELDS = (
    {"prompt"},
    {"conversations"},
    {"messages"},
    {"instruction", "output"},
    {"chosen", "rejected"},
)

UNDERSTOOD = (
    'understood are "chosen" and "rejected" dialogues (HH-RLHF, or lists of messages); '
    '"prompt" with "chosen" and "rejected", with "response" or "completion", with "response_0" '
    'and "response_1" (PKU-SafeRLHF), or alone; "conversations" (ShareGPT) or "messages"; '
    '"instruction" with "output" (Alpaca)'
)

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ANSWER = "\n\nAssistant:"

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

JSON_TYPES = {
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class InvalidRow(Exception):
    """A row that cannot be read.

    Attributes:
        reason: in a few words, as it is counted.
        details: what stands there, and what was expected.
    """

    def __init__(self, reason: str, details: str):
        super().__init__(reason, details)
        self.reason = reason
        self.details = details


@dataclass(slots=True)
class Sides:
    """What a row holds.

    Attributes:
        prompts: the prompt, as often as the row has it; a usable row has the same each time.
        answers: none, one, or two with the better one first; None for a dialogue that ends with a
            human turn.
    """

    prompts: list[Prompt]
    answers: list[str | None]


@dataclass(slots=True)
class LoadReport:
    """What became of the rows of one file."""

    fields: dict[str, str] = field(default_factory=dict)  # {field: type of its value}
    counts: Counter = field(default_factory=lambda: Counter(read=0, kept=0))
    first: dict[str, int] = field(default_factory=dict)  # {reason to drop a row: first row}
    unit: str = "line"  # or "row", of an array

    def add(self, number: int, reason: str) -> None:
        """Count the row of this number under "kept" or the reason why it was not kept."""
        self.counts["read"] += 1
        self.counts[reason] += 1
        if reason != "kept":
            self.first.setdefault(reason, number)

    def __str__(self) -> str:
        """On one line: "prompt: text; 9 rows, 7 kept; 2 blank line (first in line 3)"."""
        fields = ", ".join(f"{name}: {kind}" for name, kind in self.fields.items())
        parts = [
            fields or "no form recognised",
            f"{self.counts['read']} rows, {self.counts['kept']} kept",
        ]
        for reason, number in self.first.items():
            parts.append(f"{self.counts[reason]} {reason} (first in {self.unit} {number})")
        return "; ".join(parts)


# ---- the formats ----------------------------------------------------------------------------


def read_dialogues(row: Mapping, preference_label: str) -> Sides:
    r"""Two dialogues that differ in their last answer: HH-RLHF, or lists of messages.

    {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"}
    """
    sides = Sides([], [])
    for name in ("chosen", "rejected"):
        prompt, answer = parse_dialogue(row[name], name)
        sides.prompts.append(prompt)
        sides.answers.append(answer)
    return sides


def read_preference(row: Mapping, preference_label: str) -> Sides:
    """A prompt with a chosen answer, and mostly a rejected one.

    {"prompt": "hi", "chosen": "hello", "rejected": "go away"}
    """
    names = ("chosen", "rejected")
    answers = [(name, row[name]) for name in names if row.get(name) is not None]
    return with_answers(read_prompt(row), answers)


def read_labelled_responses(row: Mapping, preference_label: str) -> Sides:
    """Two responses and labels that say which is the better, and which the safer one: PKU-SafeRLHF.

    {"prompt": "hi", "response_0": "go away", "response_1": "hello",
     "better_response_id": 1, "safer_response_id": 1}
    """
    label = f"{preference_label}_response_id"
    better = row.get(label)
    if type(better) is not int or better not in (0, 1):
        raise InvalidRow(
            "no label", f"{label!r} is {better!a:.80} instead of 0 or 1; see data.preference_label"
        )
    names = (f"response_{better}", f"response_{1 - better}")
    return with_answers(read_prompt(row), [(name, row.get(name)) for name in names])


def read_answers(row: Mapping, preference_label: str) -> Sides:
    """A prompt with one answer, or with a list of a better and a worse one.

    {"prompt": "hi", "response": ["hello", "go away"]}
    {"instruction": "Say hi.", "input": "in French", "output": "salut"}     (Alpaca)
    """
    name = first_field(row, SINGLE_ANSWER_FIELDS)
    value = row[name]
    prompt = read_prompt(row)
    # A list is of two answers, unless it holds the messages of one
    is_messages = isinstance(value, list) and any(isinstance(part, dict) for part in value)
    if is_messages or not isinstance(value, list):
        return with_answers(prompt, [(name, value)])
    if len(value) != 2:
        raise InvalidRow(
            "no pair", f"{name!r} holds {len(value)} texts instead of a better and a worse one"
        )
    return with_answers(prompt, [(name, answer) for answer in value])


def read_conversation(row: Mapping, preference_label: str) -> Sides:
    """A dialogue, of which the last turn is the answer if the assistant speaks it.

    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    {"messages": [{"role": "user", "content": "hi"}]}
    """
    messages = read_prompt(row)
    if messages[-1].role == "assistant":
        return Sides([messages[:-1]], [messages[-1].content])
    return Sides([messages], [])


FORMATS: dict[str, Callable[[Mapping, str], Sides]] = {
    "dialogues": read_dialogues,
    "preference": read_preference,
    "labelled responses": read_labelled_responses,
    "answers": read_answers,
    "conversation": read_conversation,
}


def format_name(row: Mapping) -> str:
    """Which of FORMATS a row has, by its fields; a field that is null counts as absent."""
    if first_field(row, PROMPT_FIELDS) is None:
        return "dialogues"
    if row.get("response_0") is not None:
        return "labelled responses"
    if row.get("chosen") is not None:
        return "preference"
    if first_field(row, SINGLE_ANSWER_FIELDS):
        return "answers"
    return "conversation"


def first_field(row: Mapping, names: tuple[str, ...]) -> str | None:
    """The first of these fields that the row has."""
    return next((name for name in names if row.get(name) is not None), None)


# ---- parts of a row -------------------------------------------------------------------------


def read_prompt(row: Mapping) -> Prompt:
    """The messages before the answer; of Alpaca the instruction with its input."""
    name = first_field(row, PROMPT_FIELDS)
    prompt = parse_messages(row[name], name)
    if name != "instruction":
        return prompt

    for unread in ("history", "system"):
        if row.get(unread):
            raise InvalidRow(
                "form not recognised",
                f'{unread!r} beside "instruction" is not read; use "messages"',
            )
    more = parse_text(row.get("input") or "", "input")
    if more:
        return (Message("user", f"{prompt[0].content}\n\n{more}"),)
    return prompt


def with_answers(prompt: Prompt, answers: Sequence[tuple[str, object]]) -> Sides:
    """The prompt with its answers, the better one first, each a text or the dialogue's last turns.

    Args:
        answers: (field, value) of each.
    """
    sides = Sides([prompt], [])
    for name, value in answers:
        if isinstance(value, str):
            sides.answers.append(parse_text(value, name))
            continue
        turns_before, answer = parse_dialogue(value, name)
        if turns_before:  # some files say the prompt again, as ultrafeedback_binarized does
            sides.prompts.append(turns_before)
        sides.answers.append(answer)
    return sides


def parse_dialogue(value: object, name: str) -> tuple[Prompt, str | None]:
    """(prompt, last answer) of a dialogue; the answer is None if a human turn is the last.

    Args:
        value: a text of the HH-RLHF kind, or messages.
        name: of the field, for error messages; so in the functions below.
    """
    if not isinstance(value, str):
        *prompt, last = parse_messages(value, name)
        return tuple(prompt), last.content if last.role == "assistant" else None

    parse_text(value, name)  # for its checks: the text is split as it is
    try:
        prompt, answer = split_dialogue(value)
    except ValueError as error:
        raise InvalidRow("no dialogue", f"{name!r} is {error}") from None
    ends_with_human = HH_TURN.findall(value)[-1] == "Human"
    return prompt, None if ends_with_human else answer


def split_dialogue(text: str) -> tuple[Prompt, str]:
    r"""(prompt, last answer) of an HH-RLHF dialogue, which is cut at its last assistant turn.

    "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: so?\n\nAssistant: yes" has three turns as its
    prompt, and "yes" as its answer. ValueError if the text is no such dialogue.
    """
    # a human turn behind the last answer stays in it, as the files have it
    prompt_text, mark, answer = text.rpartition(HH_ANSWER)
    before, *parts = HH_TURN.split(prompt_text)  # speaker and content by turns
    if not mark or before.strip():
        raise ValueError(r'no dialogue of "\n\nHuman: …" and "\n\nAssistant: …" turns')
    turns = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append(Message(ROLES[speaker.lower()], content.strip()))
    return tuple(turns), answer.strip()


def parse_messages(value: object, name: str) -> Prompt:
    """The messages of a list of {"role", "content"} or {"from", "value"}.

    A single such message, or a text as one human turn, will do too. Only an assistant's turn at the
    end may be empty.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        value = [value]
    messages = tuple(parse_message(turn, name) for turn in value)

    if not messages:
        raise InvalidRow("empty turn", f"{name!r} holds no turn")
    for number, message in enumerate(messages, start=1):
        may_be_empty = number == len(messages) and message.role == "assistant"
        if not message.content and not may_be_empty:
            raise InvalidRow("empty turn", f"{name!r} holds an empty turn")
    return messages


def parse_message(turn: object, name: str) -> Message:
    """One message, of either kind."""
    if not isinstance(turn, dict):
        raise InvalidRow(
            "no message", f"{name!r} holds {JSON_TYPES[type(turn)]} where a message should be"
        )
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRow(
            "unknown role", f"{name!r} holds a turn of {role!a:.80}; known are {', '.join(ROLES)}"
        )
    return Message(ROLES[role], parse_text(content, f"{name}: {role}"))


def parse_text(value: object, name: str) -> str:
    """A text without the white space around it."""
    if not isinstance(value, str):
        raise InvalidRow("no text", f"{name!r} is {JSON_TYPES[type(value)]}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRow("no valid text", f"{name!r} holds half a surrogate pair") from None
    return value.strip()


# ---- rows -----------------------------------------------------------------------------------


def parse_row(row: Mapping, preference_label: str = "better") -> tuple[Pair | None, str]:
    """(pair, "kept"), or (None, why the row cannot be used); InvalidRow if it cannot be read.

    Args:
        preference_label: which label of PKU-SafeRLHF decides, "better" or "safer".
    """
    sides = FORMATS[format_name(row)](row, preference_label)
    prompt = sides.prompts[0]
    if len(set(sides.prompts)) > 1:
        return None, "prompts differ"
    if not prompt or prompt[-1].role != "user" or not prompt[-1].content:
        return None, "no human turn before the answer"
    if None in sides.answers:
        return None, "human turn at the end"
    if "" in sides.answers:
        return None, "empty answer"
    if len(sides.answers) == 2 and sides.answers[0] == sides.answers[1]:
        return None, "identical answers"

    # a row may have one answer, or none
    chosen, rejected, *_ = [*sides.answers, "", ""]
    return Pair(example_id(prompt), prompt, chosen, rejected), "kept"


def check_fields(row: object, expected: Mapping[str, str]) -> dict[str, str]:
    """{field: type of its value} of the fields that are looked at.

    Args:
        expected: those of the rows before; empty for a first row.

    Raises:
        InvalidRow: the row is no object, has other fields than expected, or lacks some.
    """
    if not isinstance(row, dict):
        raise InvalidRow("no object", f"it is {JSON_TYPES[type(row)]}; {UNDERSTOOD}")

    fields = {}
    for name in PROMPT_FIELDS + ANSWER_FIELDS:
        if row.get(name) is not None:
            fields[name] = JSON_TYPES[type(row[name])]

    # A file has rows of one form, null being as good as absent
    if expected:
        for name in expected | fields:
            kind = fields.get(name, "absent")
            expected_kind = expected.get(name, "absent")
            if kind != expected_kind:
                raise InvalidRow(
                    "another form",
                    f"{name!r} is {kind}, and {expected_kind} in the rows before; "
                    "a file has one form",
                )

    has_required = any(required <= fields.keys() for required in REQUIRED_FIELDS)
    only_rejected = "rejected" in fields and "chosen" not in fields
    if not has_required or only_rejected:
        names = ", ".join(ascii(name) for name in row)
        raise InvalidRow(
            "form not recognised", f"its keys are {names[:200] or 'none'}; {UNDERSTOOD}"
        )
    return fields


def parse_line(line: str) -> object:
    """The value in a line of JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRow("not valid JSON", f"{error}; {UNDERSTOOD}") from None


# ---- files ----------------------------------------------------------------------------------


def read_items(file: Path, report: LoadReport, plain_prompts: bool) -> Iterator[tuple[int, object]]:
    """(number, item) of every line, or of every row of an array; blank ones are ""."""
    is_text_file = plain_prompts and not file.name.endswith(ENDINGS)
    if is_array(file) and not is_text_file:
        report.unit = "row"
        return read_array(file)
    return read_lines(file)


def read_file(
    file: Path,
    report: LoadReport,
    preference_label: str,
    skip_invalid: bool,
    max_rows: int | None,
    plain_prompts: bool = False,
) -> Iterator[Pair]:
    """The usable ones of the first `max_rows` rows, one at a time; the report is filled.

    Args:
        plain_prompts: if the first line holds no JSON object, every such line is itself a prompt.
        (The other arguments are those of `read_data`.)

    Raises:
        UserError: a row cannot be read, and is not to be skipped.
    """
    items = read_items(file, report, plain_prompts)
    is_jsonl = None if plain_prompts else True  # None: the first line tells
    for number, item in islice(items, max_rows):
        if item == "":
            report.add(number, "blank line")
            continue
        try:
            # the rows of an array are values already
            row = item
            if report.unit == "line":
                is_object = item.startswith("{")
                if is_jsonl is None:
                    is_jsonl = is_object
                row = parse_line(item) if is_jsonl or is_object else {"prompt": item}
            fields = check_fields(row, expected=report.fields)
            pair, reason = parse_row(row, preference_label)
            report.fields = fields  # of a row that can be read
        except InvalidRow as error:
            if not skip_invalid:
                where = f"{file}, {report.unit} {number}"
                raise UserError(f"{where}: {error.reason}: {error.details}") from None
            pair = None
            reason = f"skipped ({error.reason})"
        report.add(number, reason)
        if pair is not None:
            yield pair


def read_data(
    path: str,
    preference_label: str = "better",
    skip_invalid: bool = False,
    max_rows: int | None = None,
    setting: str = "data.path",
    plain_prompts: bool = False,
) -> tuple[list[Pair], dict[str, LoadReport]]:
    """All usable rows of a file or folder, and {file: what became of its rows}.

    A pair's meta["file"] is the name of its file without endings.

    Args:
        preference_label: which label of PKU-SafeRLHF decides, "better" or "safer".
        skip_invalid: whether rows that cannot be read are skipped and counted.
        max_rows: most rows that are read, spread evenly over the files.
        setting: the setting that holds the path, for error messages.
        plain_prompts: whether a line may be a prompt as it is.

    Raises:
        UserError: a row cannot be read, and is not to be skipped; or no row is left.
    """
    files = find_files(path, setting)
    pairs = []
    reports: dict[str, LoadReport] = {}
    occurrences = Counter()
    for index, file in enumerate(files):
        # Files of one name, in two folders, are told apart by their paths
        name = display_name(file)
        if name in reports:
            is_one_of_two = bool(split_pair_paths(path))
            name = str(file if is_one_of_two else file.relative_to(path))
        reports[name] = LoadReport()

        # Its part of max_rows; the first files get what the division leaves
        file_limit = None
        if max_rows is not None:
            file_limit = max_rows // len(files)
            if index < max_rows % len(files):
                file_limit += 1

        usable = read_file(
            file,
            reports[name],
            preference_label=preference_label,
            skip_invalid=skip_invalid,
            max_rows=file_limit,
            plain_prompts=plain_prompts,
        )
        # Rows with the same prompt get ids of their own
        for pair in usable:
            unique_id = example_id(pair.prompt, occurrences[pair.id])
            occurrences[pair.id] += 1
            pairs.append(replace(pair, id=unique_id, meta={"file": name}))
    if not pairs:
        counts = "; ".join(f"{name}: {report}" for name, report in reports.items())
        raise UserError(f"{setting}: no usable row in {path} ({counts[:400]})")
    return pairs, reports


def display_name(file: Path) -> str:
    """A file's name without endings; bytes that are no UTF-8 are escaped."""
    name = os.fsencode(file.name).decode("utf-8", "backslashreplace")
    return re.sub(r"\.jsonl?(\.gz)?$", "", name)


# ---- export ---------------------------------------------------------------------------------


def released(record: Pair | Sample, with_speaker: bool = False) -> dict:
    """A pair or a sampled answer as a row of the files that MACPO's authors released.

    {"instruction": "USER: hi ASSISTANT: hello USER: so?", "input": "", "output": ["yes", "no"]}

    Args:
        with_speaker: whether "USER: " stands before a single question too, as in their HH files.
    """
    speakers = {"user": "USER", "assistant": "ASSISTANT", "system": "SYSTEM"}
    instruction = format_dialogue(record.prompt, speakers, " ")
    if with_speaker and not instruction.startswith("USER: "):
        instruction = f"USER: {instruction}"
    if isinstance(record, Pair):
        output = [record.chosen, record.rejected]
    else:
        output = record.response
    return {"instruction": instruction, "input": "", "output": output}
