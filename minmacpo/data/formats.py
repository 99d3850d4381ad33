"""What a row of a file can look like, and how it becomes a prompt with the answers that it has. No torch here.

Reading is strict: the keys of a file's first row say its form, and a row of another form, or one that cannot be
read, is an error with file and line, unless such rows are to be skipped. What can be read but not used is counted
under its reason. Text is taken without the white space around it.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
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

TURN = re.compile(r"\n\n(Human|Assistant):")


ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


PROMPTS = ("prompt", "conversations", "messages", "instruction")


ANSWERS = ("chosen", "rejected", "response_0", "response_1", "response", "completion", "output")


KINDS = {
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


UNDERSTOOD = (
    'understood are "chosen" and "rejected" dialogues (HH-RLHF, or lists of messages); "prompt" with "chosen" and '
    '"rejected", with "response" or "completion", with "response_0" and "response_1" (PKU-SafeRLHF), or alone; '
    '"conversations" (ShareGPT) or "messages"; "instruction" with "output" (Alpaca)'
)


class BadRow(Exception):
    """A row that cannot be read: (reason, as it is counted; details)."""


@dataclass(slots=True)
class Report:
    """What became of the rows of one file."""

    form: dict[str, str] = field(
        default_factory=dict
    )  # the keys that were used, and the kinds of their values
    counts: Counter = field(default_factory=lambda: Counter(read=0, kept=0))
    first: dict[str, int] = field(
        default_factory=dict
    )  # where each reason to drop a row occurred first
    unit: str = "line"

    def __str__(self) -> str:
        """All in one line."""
        lost = [
            f"{count} {reason} (first in {self.unit} {self.first[reason]})"
            for reason, count in self.counts.items()
            if reason in self.first
        ]
        form = (
            ", ".join(f"{key}: {kind}" for key, kind in self.form.items()) or "no form recognised"
        )
        return f"{form}; {self.counts['read']} rows, {self.counts['kept']} kept" + "".join(
            f"; {each}" for each in lost
        )


def detect_format(row: object, wanted: Mapping[str, str]) -> dict[str, str]:
    """{key: kind of its value} of the keys that make a form, null being as good as absent; BadRow unless the row
    has one, and the one that is `wanted`, if any is."""
    if not isinstance(row, dict):
        raise BadRow("no object", f"it is {KINDS.get(type(row), 'null')}; {UNDERSTOOD}")
    form = {key: KINDS[type(row[key])] for key in PROMPTS + ANSWERS if row.get(key) is not None}
    for key in wanted | form if wanted else ():
        if form.get(key) != wanted.get(key):
            mine, others = (f.get(key, "absent") for f in (form, wanted))
            raise BadRow(
                "another form",
                f"{key!r} is {mine}, and {others} in the rows before; a file has one form",
            )
    needed = (
        {"prompt"},
        {"conversations"},
        {"messages"},
        {"instruction", "output"},
        {"chosen", "rejected"},
    )
    if not any(keys <= form.keys() for keys in needed) or (
        "rejected" in form and "chosen" not in form
    ):
        raise BadRow(
            "form not recognised",
            f"its keys are {', '.join(map(ascii, row))[:200] or 'none'}; {UNDERSTOOD}",
        )
    return form


def text_of(value: object, key: str) -> str:
    """A text without the white space around it; BadRow if it is none."""
    if not isinstance(value, str):
        raise BadRow("no text", f"{key!r} is {KINDS.get(type(value), 'null')}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("no valid text", f"{key!r} holds half a surrogate pair") from None
    return value.strip()


def messages_of(value: object, key: str) -> tuple[Message, ...]:
    """A list of {"role", "content"} or {"from", "value"}, or one such message, or the text of one human turn;
    BadRow if it is none. Only the assistant's last turn may be empty."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    found = []
    for turn in value if isinstance(value, list) else [value]:
        if not isinstance(turn, dict):
            raise BadRow(
                "no message",
                f"{key!r} holds {KINDS.get(type(turn), 'null')} where a message should be",
            )
        role, content = (
            turn.get(name, turn.get(other))
            for name, other in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(
                "unknown role",
                f"{key!r} holds a turn of {role!a:.80}; known are {', '.join(ROLES)}",
            )
        found.append(Message(ROLES[role], text_of(content, f"{key}: {role}")))
    if (
        not found
        or not all(m.content for m in found[:-1])
        or not (found[-1].content or found[-1].role == "assistant")
    ):
        raise BadRow("empty turn", f"{key!r} holds {'an empty turn' if found else 'no turn'}")
    return tuple(found)


def split_dialogue(text: str) -> tuple[tuple[Message, ...], str]:
    """(prompt, last answer) of an HH-RLHF dialogue, cut at its last assistant turn; ValueError if it is none."""
    head, mark, answer = text.rpartition("\n\nAssistant:")
    before, *rest = TURN.split(head)
    if not mark or before.strip():
        raise ValueError(r'no dialogue of "\n\nHuman: …" and "\n\nAssistant: …" turns')
    turns = zip(rest[::2], rest[1::2], strict=True)
    return tuple(
        Message(ROLES[role.lower()], content.strip()) for role, content in turns
    ), answer.strip()


def dialogue(value: object, key: str) -> tuple[tuple[Message, ...], str | None]:
    """(prompt, last answer) of a dialogue, as text of the HH-RLHF kind or as messages; None: it ends otherwise."""
    if not isinstance(value, str):
        *prompt, last = messages_of(value, key)
        return tuple(prompt), last.content if last.role == "assistant" else None
    text_of(value, key)
    try:
        prompt, answer = split_dialogue(value)
    except ValueError as error:
        raise BadRow("no dialogue", f"{key!r} is {error}") from None
    return prompt, None if TURN.findall(value)[-1] == "Human" else answer


def answers_in(row: Mapping, label: str) -> list[tuple[str, object]]:
    """(key, value) of the answers, the better one first; `label`: which judgement of PKU-SafeRLHF decides."""
    if row.get("response_0") is not None:
        better = row.get(f"{label}_response_id")
        if type(better) is not int or better not in (0, 1):
            raise BadRow(
                "no label",
                f"'{label}_response_id' is {better!a:.80} instead of 0 or 1; see data.preference_label",
            )
        return [(key, row.get(key)) for key in (f"response_{better}", f"response_{1 - better}")]
    found = [(key, row[key]) for key in ANSWERS if row.get(key) is not None]
    if found and found[0][0] == "chosen":
        return [(key, value) for key, value in found if key in ("chosen", "rejected")]
    for key, value in found[:1]:
        if isinstance(value, list) and not any(isinstance(part, dict) for part in value):
            if len(value) != 2:
                raise BadRow(
                    "no pair",
                    f"{key!r} holds {len(value)} texts instead of a better and a worse one",
                )
            return [(key, text) for text in value]
    return found[:1]


def read_sides(row: Mapping, label: str) -> tuple[list[tuple[Message, ...]], list[str | None]]:
    """(prompts, as often as the row has one; none, one or two answers, the better one first)."""
    key, found = (
        next((key for key in PROMPTS if row.get(key) is not None), None),
        answers_in(row, label),
    )
    if key is None:
        prompts, answers = zip(*(dialogue(value, name) for name, value in found), strict=True)
        return list(prompts), list(answers)
    if key == "instruction" and (odd := [name for name in ("history", "system") if row.get(name)]):
        raise BadRow(
            "form not recognised", f'{odd[0]!r} beside "instruction" is not read; use "messages"'
        )
    prompt, answers = messages_of(row[key], key), []
    if key == "instruction" and (more := text_of(row.get("input") or "", "input")):
        prompt = (Message("user", f"{prompt[0].content}\n\n{more}"),)
    if not found and prompt[-1].role == "assistant":
        return [prompt[:-1]], [prompt[-1].content]
    prompts = [prompt]
    for name, value in found:
        before, answer = (
            ((), text_of(value, name)) if isinstance(value, str) else dialogue(value, name)
        )
        prompts += [before] if before else []  # a list of messages may hold the prompt again
        answers.append(answer)
    return prompts, answers


def parse_row(row: Mapping, label: str = "better") -> tuple[Pair | None, str]:
    """(pair, "kept") or (None, why it cannot be used); BadRow for a row that cannot be read."""
    prompts, answers = read_sides(row, label)
    prompt = prompts[0]
    if len(set(prompts)) > 1:
        return None, "prompts differ"
    if not prompt or prompt[-1].role != "user" or not prompt[-1].content:
        return None, "no human turn before the answer"
    if None in answers:
        return None, "human turn at the end"
    if "" in answers:
        return None, "empty answer"
    if len(answers) == 2 and answers[0] == answers[1]:
        return None, "identical answers"
    return Pair(example_id(prompt), prompt, *[*answers, "", ""][:2]), "kept"


def load(text: str, prompt: bool = False) -> object:
    """The value in a line of JSON, BadRow if it is none; or the line as a `prompt`."""
    if prompt:
        return {"prompt": text}
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("not valid JSON", f"{error}; {UNDERSTOOD}") from None


def read_file(
    file: Path, report: Report, label: str, skip: bool, most: int | None, prompts: bool = False
) -> Iterator[Pair]:
    """The usable ones of the first `most` rows, one at a time; `report` is filled. UserError for a row that cannot
    be read, unless such rows are to be skipped (and counted). `prompts`: if the first line holds no object, every such
    line is itself a prompt."""
    array = is_array(file) and not (prompts and not file.name.endswith(ENDINGS))
    plain = None if prompts else False
    report.unit = "row" if array else "line"
    for number, item in islice(read_array(file) if array else read_lines(file), most):
        pair, reason = None, "blank line"
        try:
            if item != "":
                plain = not (array or item.startswith("{")) if plain is None else plain
                row = item if array else load(item, plain and not item.startswith("{"))
                form = detect_format(row, report.form)
                pair, reason = parse_row(row, label)
                report.form = form
        except BadRow as bad:
            if not skip:
                raise UserError(
                    f"{file}, {report.unit} {number}: {bad.args[0]}: {bad.args[1]}"
                ) from None
            reason = f"skipped ({bad.args[0]})"
        report.counts.update(("read", reason))
        if pair:
            yield pair
        else:
            report.first.setdefault(reason, number)


def read_data(
    path: str,
    label: str = "better",
    skip: bool = False,
    most: int | None = None,
    key: str = "data.path",
    prompts: bool = False,
) -> tuple[list[Pair], dict[str, Report]]:
    """All usable rows of a file or folder, and by file what became of its rows. Reads `most` rows at most, spread
    evenly over the files. A pair's meta["file"] is its file's name without endings. UserError for a row that
    cannot be read (unless it is to be skipped), or when none is left; it names the setting `key`. `prompts`: a line may be
    a prompt as it is."""
    files, pairs, reports, seen = find_files(path, key), [], {}, Counter()
    for index, file in enumerate(files):
        shown = os.fsencode(file.name).decode("utf-8", "backslashreplace")
        name = re.sub(r"\.jsonl?(\.gz)?$", "", shown)
        name = (
            name
            if name not in reports
            else str(file if split_pair_paths(path) else file.relative_to(path))
        )
        report = reports[name] = Report()
        limit = None if most is None else most // len(files) + (index < most % len(files))
        for pair in read_file(file, report, label, skip, limit, prompts):
            own_id = example_id(pair.prompt, seen[pair.id])
            seen[pair.id] += 1
            pairs.append(replace(pair, id=own_id, meta={"file": name}))
    if not pairs:
        raise UserError(
            f"{key}: no usable row in {path} ({'; '.join(f'{k}: {v}' for k, v in reports.items())[:400]})"
        )
    return pairs, reports


def released(record: Pair | Sample, named: bool = False) -> dict:
    """A pair or a sampled answer as a row of the files that MACPO's authors released (method.md 4.2): a dialogue is one
    text with "USER: " before each human turn; before a single question too if `named`, as in their HH files."""
    instruction = format_dialogue(
        record.prompt, {"user": "USER", "assistant": "ASSISTANT", "system": "SYSTEM"}, " "
    )
    instruction = (
        f"USER: {instruction}" if named and not instruction.startswith("USER: ") else instruction
    )
    output = [record.chosen, record.rejected] if isinstance(record, Pair) else record.response
    return {"instruction": instruction, "input": "", "output": output}
