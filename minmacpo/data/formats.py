"""What a row of a file can look like, and how it becomes a prompt with the answers that it has.

Reading is strict: the first row of a file says which fields its rows have. A row with other fields,
or one that cannot be read, is an error with file and line, unless such rows are to be skipped. What
can be read but not used is counted by reason, and so are columns that are not read (columns.py).

To add a format, write a function from a row to `Sides`, put it into FORMATS, and say in
`format_name` which fields it has.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from minmacpo import UserError
from minmacpo.data.columns import (
    ANSWER_FIELDS,
    CHOSEN_FIELDS,
    DIALOGUE_FIELDS,
    LABEL_FIELDS,
    LABELLED_FIELDS,
    PROMPT_FIELDS,
    REJECTED_FIELDS,
    SYSTEM_FIELDS,
    Row,
    add_context,
    check_no_answers,
    contradicts_scores,
    ends_untrained,
    first_field,
    response_list,
    take_label,
    take_scored_answers,
    unread_columns,
)
from minmacpo.data.dialogues import (
    InvalidRow,
    Prompt,
    describe_type,
    merge_prompts,
    parse_answer,
    parse_dialogue,
    parse_messages,
    parse_text,
)
from minmacpo.data.file_kinds import conversion, kind_by_name
from minmacpo.data.parquet import read_parquet
from minmacpo.data.readers import (
    ENDINGS,
    check_kind,
    files_left_aside,
    find_files,
    is_array,
    is_parquet,
    read_array,
    read_lines,
    split_pair_paths,
)
from minmacpo.data.records import Pair, Sample, example_id, format_dialogue
from minmacpo.data.rendered import ends_with_mark, looks_rendered

# A row has all fields of at least one of these.
REQUIRED_FIELDS = (
    {"prompt"},
    {"conversations"},
    {"conversation"},
    {"messages"},
    {"instruction", "output"},
    {"instruction", "response"},
    {"instruction", "completion"},
    {"question", "response"},
    {"query", "response"},
    {"input", "response"},
    {"input", "output"},
    {"input", "completion"},
    {"chosen", "rejected"},
    {"chosen_messages", "rejected_messages"},
)

# What becomes of bad answers, as it is counted.
JOINED = "bad answers joined with a good one to their prompt"
LEFT_ALONE = "bad answers without a good one to their prompt, which alone is used"

# What is odd about rows that are used all the same: what it is, and what to do about it.
ODD_PROMPT = "prompts that look as if a chat template had written them"
ODD_ANSWER = "answers that end with a chat template's mark"
ODD_START = "answers that begin with their prompt"
ADVICE = {
    ODD_PROMPT: 'are taken as one human turn; give the turns as "messages", or the text alone',
    ODD_ANSWER: "keep it as text; take it off, as the template of the base writes its own",
    ODD_START: "keep it; take it off, as an answer stands behind its prompt anyway",
}
SHOWN_START = 40  # characters of a line that is no JSON
SHORTEST_START = 12  # characters of a prompt that no answer begins with by chance

UNDERSTOOD = (
    'understood are "chosen" and "rejected" dialogues (HH-RLHF, or lists of messages); '
    '"prompt" with "chosen" and "rejected", with "response" or "completion", with "response_0" '
    'and "response_1" (PKU-SafeRLHF), or alone; "conversations" (ShareGPT) or "messages"; '
    '"instruction" with "output" (Alpaca)'
)


@dataclass(slots=True)
class Sides:
    """What a row holds.

    Attributes:
        answers: none, one, or two with the better one first; None for a dialogue that ends with a
            human turn.
        stated: the prompt in a column of its own; empty if there is none.
        repeated: the turns before each answer, of those answers that are dialogues.
        is_labelled: whether a label may say that the only answer is a bad one.
    """

    answers: list[str | None]
    stated: Prompt = ()
    repeated: list[Prompt] = field(default_factory=list)
    is_labelled: bool = False


@dataclass(slots=True)
class ParsedRow:
    """What became of a row.

    Attributes:
        pair: None if the row cannot be used. A bad answer alone is its `rejected`.
        reason: "kept", or why the row cannot be used.
        unread: columns that hold something and are not used.
        label: whether the only answer is a good one; None if the row does not say it.
        odd: which of ADVICE the row needs.
    """

    pair: Pair | None
    reason: str
    unread: list[str] = field(default_factory=list)
    label: bool | None = None
    odd: list[str] = field(default_factory=list)


@dataclass(slots=True)
class LoadReport:
    """What became of the rows of one file."""

    fields: dict[str, str] = field(default_factory=dict)  # {field: type of its value}
    counts: Counter = field(default_factory=lambda: Counter(read=0, kept=0))
    first: dict[str, int] = field(default_factory=dict)  # {reason to drop a row: first row}
    unread: Counter = field(default_factory=Counter)  # {column that is not used: rows}
    joined: Counter = field(default_factory=Counter)  # {what became of labelled answers: rows}
    odd: Counter = field(default_factory=Counter)  # {what is odd, one of ADVICE: rows}
    unit: str = "line"  # or "row", of an array or a table
    not_read: str = ""  # why no row of the file has been read

    def add(self, number: int, reason: str) -> None:
        """Count the row of this number under "kept" or the reason why it was not kept."""
        self.counts["read"] += 1
        self.counts[reason] += 1
        if reason != "kept":
            self.first.setdefault(reason, number)

    def __str__(self) -> str:
        """On one line: "prompt: text; 9 rows, 7 kept; 2 blank line (first in line 3)"."""
        if self.not_read:
            return self.not_read
        fields = ", ".join(f"{name}: {kind}" for name, kind in self.fields.items())
        parts = [
            fields or "no form recognised",
            f"{self.counts['read']} rows, {self.counts['kept']} kept",
        ]
        for reason, number in self.first.items():
            parts.append(f"{self.counts[reason]} {reason} (first in {self.unit} {number})")
        for what, count in self.joined.items():
            parts.append(f"{count} {what}")
        for what, count in self.odd.items():
            parts.append(f"{count} {what}")
        if self.unread:
            parts.append(f"not used: {list_columns(self.unread)}")
        return "; ".join(parts)


def list_columns(unread: Mapping[str, int]) -> str:
    """ "'tools' (in 12 rows)": the columns that are not used, the first ten of them."""
    shown = [f"{ascii(name)[:60]} (in {count} rows)" for name, count in unread.items()]
    if len(shown) > 10:
        shown = [*shown[:10], f"and {len(shown) - 10} more"]
    return ", ".join(shown)


def column_warnings(reports: Mapping[str, LoadReport]) -> list[str]:
    """One sentence for each file that is not read, has columns that are not used, or odd texts."""
    sentences = []
    for name, report in reports.items():
        if report.not_read:
            sentences.append(f"{name}: {report.not_read}")
        if report.unread:
            sentences.append(
                f"{name}: columns that are not used: {list_columns(report.unread)}; docs/data.md "
                "says which are"
            )
        for what, count in report.odd.items():
            sentences.append(f"{name}: {count} {what} {ADVICE[what]}")
    return sentences


# ---- the formats ----------------------------------------------------------------------------


def read_dialogues(row: Row, preference_label: str) -> Sides:
    r"""Two dialogues that differ in their last answer: HH-RLHF, or lists of messages.

    {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"}
    """
    sides = Sides([])
    for names in (CHOSEN_FIELDS, REJECTED_FIELDS):
        name = row.first(names)
        turns_before, answer = parse_dialogue(row.take(name), name)
        sides.repeated.append(turns_before)
        sides.answers.append(answer)
    return sides


def read_preference(row: Row, preference_label: str) -> Sides:
    """A prompt with a chosen answer, and mostly a rejected one.

    {"prompt": "hi", "chosen": "hello", "rejected": "go away"}
    {"messages": [... , {"role": "assistant", "content": "hello"}], "rejected_response": "go away"}
    """
    prompt = read_prompt(row)
    chosen_name = row.first((*CHOSEN_FIELDS, *ANSWER_FIELDS))
    names = [name for name in (chosen_name, row.first(REJECTED_FIELDS)) if name]
    sides = with_answers(row, prompt, [(name, row.take(name)) for name in names])
    if len(prompt) > 1 and prompt[-1].role == "assistant":
        # The dialogue's last turn is the chosen answer, said again or only there
        if chosen_name is None:
            sides.answers.insert(0, prompt[-1].content)
        if sides.answers[0] == prompt[-1].content:
            sides.stated = prompt[:-1]
    return sides


def read_labelled_responses(row: Row, preference_label: str) -> Sides:
    """Two responses and labels that say which is the better, and which the safer one: PKU-SafeRLHF.

    {"prompt": "hi", "response_0": "go away", "response_1": "hello",
     "better_response_id": 1, "safer_response_id": 1}
    """
    label = f"{preference_label}_response_id"
    better = row.take(label)
    row.read |= {"better_response_id", "safer_response_id"}
    if type(better) is not int or better not in (0, 1):
        raise InvalidRow(
            "no label", f"{label!r} is {better!a:.80} instead of 0 or 1; see data.preference_label"
        )
    names = (f"response_{better}", f"response_{1 - better}")
    return with_answers(row, read_prompt(row), [(name, row.take(name)) for name in names])


def read_scored_answers(row: Row, preference_label: str) -> Sides:
    """Several answers with scores or ranks: the best one and the worst.

    {"prompt": "hi", "responses": ["go away", "hello"], "scores": [1, 4]}
    {"prompt": "hi", "answers": [{"answer": "hello", "rank": 1}, {"answer": "go away", "rank": 2}]}
    """
    name = response_list(row)
    answers = take_scored_answers(row, name)
    best = max(answers, key=lambda answer: answer.quality)
    worst = min(answers, key=lambda answer: answer.quality)
    if best.quality == worst.quality:
        worst = best  # they are then counted as identical answers
    return with_answers(row, read_prompt(row), [(name, best.value), (name, worst.value)])


def read_answers(row: Row, preference_label: str) -> Sides:
    """A prompt with one answer, or with a list of a better and a worse one.

    {"prompt": "hi", "response": ["hello", "go away"]}
    {"prompt": "hi", "completion": "hello", "label": true}                  (TRL, unpaired)
    {"instruction": "Say hi.", "input": "in French", "output": "salut"}     (Alpaca)
    """
    name = row.first(ANSWER_FIELDS)
    value = row.take(name)
    prompt = read_prompt(row)
    # A list is of two answers, unless it holds the messages of one
    is_messages = isinstance(value, list) and any(isinstance(part, dict) for part in value)
    if is_messages or not isinstance(value, list):
        sides = with_answers(row, prompt, [(name, value)])
        sides.is_labelled = True
        return sides
    if len(value) != 2:
        raise InvalidRow(
            "no pair", f"{name!r} holds {len(value)} texts instead of a better and a worse one"
        )
    label_name = row.first(LABEL_FIELDS)
    if label_name is not None:
        raise InvalidRow(
            "unknown label",
            f"{label_name!r} stands beside the two answers of {name!r}, of which the first is "
            'taken for the better; give them as "chosen" and "rejected"',
        )
    return with_answers(row, prompt, [(name, answer) for answer in value])


def read_conversation(row: Row, preference_label: str) -> Sides:
    """A dialogue, of which the last turn is the answer if the assistant speaks it.

    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    {"messages": [{"role": "user", "content": "hi"}]}
    {"prompt": "hi", "messages": [...]}             (the prompt is one of the dialogue's turns)
    """
    name = row.first(DIALOGUE_FIELDS)
    if name is None:
        messages = read_prompt(row)
        stated = ()
    else:
        messages = parse_messages(row.take(name), name)
        stated = read_prompt(row)
    if messages[-1].role != "assistant":
        return Sides([], stated, [messages])
    sides = Sides([messages[-1].content], stated, [messages[:-1]], is_labelled=True)
    if stated == messages:
        sides.stated = ()
    return sides


FORMATS: dict[str, Callable[[Row, str], Sides]] = {
    "dialogues": read_dialogues,
    "preference": read_preference,
    "labelled responses": read_labelled_responses,
    "scored answers": read_scored_answers,
    "answers": read_answers,
    "conversation": read_conversation,
}


def format_name(row: Row) -> str:
    """Which of FORMATS a row has, by its fields; a field that is null counts as absent."""
    if row.first(PROMPT_FIELDS) is None:
        return "dialogues"
    if all(row.has(name) for name in LABELLED_FIELDS):
        return "labelled responses"
    if row.first((*CHOSEN_FIELDS, *REJECTED_FIELDS)):
        return "preference"
    if response_list(row):
        return "scored answers"
    if row.first(ANSWER_FIELDS):
        return "answers"
    return "conversation"


# ---- parts of a row -------------------------------------------------------------------------


def read_prompt(row: Row) -> Prompt:
    """The messages in the prompt's column; of Alpaca the instruction with its input."""
    name = row.first(PROMPT_FIELDS)
    prompt = parse_messages(row.take(name), name)
    if name != "instruction":
        return prompt

    # Alpaca's text for a dialogue with a system message is nowhere fixed
    for unread in (*SYSTEM_FIELDS, "history"):
        if row.fields.get(unread):
            raise InvalidRow(
                "form not recognised",
                f'{unread!r} beside "instruction" is not read; use "messages"',
            )

    # Dolly calls the input "context"
    input_name = "input"
    if not row.fields.get("input") and isinstance(row.fields.get("context"), str):
        input_name = "context"
    more = parse_text(row.take(input_name) or "", input_name)
    if more:
        last = prompt[-1]
        return (*prompt[:-1], replace(last, content=f"{last.content}\n\n{more}"))
    return prompt


def with_answers(row: Row, prompt: Prompt, answers: Sequence[tuple[str, object]]) -> Sides:
    """The prompt with its answers, the better one first, each a text or the dialogue's last turns.

    Args:
        answers: (field, value) of each.
    """
    stated = row.fields.get(row.first(PROMPT_FIELDS))
    stated_text = stated if isinstance(stated, str) else ""
    sides = Sides([], prompt)
    for name, value in answers:
        turns_before, answer = parse_answer(value, name, prompt, stated_text)
        if turns_before:
            sides.repeated.append(turns_before)
        sides.answers.append(answer)
    return sides


# ---- rows -----------------------------------------------------------------------------------


def parse_row(fields: Mapping, preference_label: str = "better") -> ParsedRow:
    """What becomes of a row; InvalidRow if it cannot be read.

    Args:
        preference_label: which label of PKU-SafeRLHF decides, "better" or "safer".
    """
    row = Row(fields)
    sides = FORMATS[format_name(row)](row, preference_label)
    label = take_label(row) if sides.is_labelled else None
    prompt = merge_prompts(sides.stated, sides.repeated)
    if prompt is not None:
        prompt = add_context(row, prompt)

    reason = why_unusable(row, prompt, sides.answers)
    if reason is not None:
        return ParsedRow(None, reason)

    # a row may have one answer, or none
    chosen, rejected, *_ = [*sides.answers, "", ""]
    if label is False:
        chosen, rejected = "", chosen
    pair = Pair(example_id(prompt), prompt, chosen, rejected)
    unread = unread_columns(row, prompt, sides.answers)
    if not sides.answers:
        check_no_answers(row, unread)
    return ParsedRow(pair, "kept", unread, label, find_odd(pair))


def find_odd(pair: Pair) -> list[str]:
    """What is odd about the texts of a row, of ADVICE."""
    odd = []
    if has_odd_prompt(pair.prompt):
        odd.append(ODD_PROMPT)
    answers = [answer for answer in (pair.chosen, pair.rejected) if answer]
    if any(map(ends_with_mark, answers)):
        odd.append(ODD_ANSWER)
    question = pair.prompt[-1].content
    has_start = answers and all(answer.startswith(question) for answer in answers)
    if has_start and len(question) >= SHORTEST_START:
        odd.append(ODD_START)
    return odd


def has_odd_prompt(prompt: Prompt) -> bool:
    """Whether a human turn looks as if a chat template had written it."""
    return any(turn.role == "user" and looks_rendered(turn.content) for turn in prompt)


def why_unusable(row: Row, prompt: Prompt | None, answers: Sequence[str | None]) -> str | None:
    """The reason why a row that can be read cannot be used; None if it can."""
    two_answers = len(answers) == 2
    if prompt is None:
        return "prompts differ"
    if not prompt or prompt[-1].role != "user" or not prompt[-1].content:
        return "no human turn before the answer"
    if None in answers:
        return "human turn at the end"
    if "" in answers:
        return "empty answer"
    if two_answers and answers[0] == answers[1]:
        return "identical answers"
    if two_answers and contradicts_scores(row):
        return "rejected answer scored above the chosen one"
    if ends_untrained(row):
        return "weight 0"
    return None


def check_fields(row: object, expected: Mapping[str, str]) -> dict[str, str]:
    """{field: type of its value} of the fields that are looked at.

    Args:
        expected: those of the rows before; empty for a first row.

    Raises:
        InvalidRow: the row is no object, has other fields than expected, or lacks some.
    """
    if not isinstance(row, dict):
        raise InvalidRow("no object", f"it is {describe_type(row)}; {UNDERSTOOD}")
    fields = {name: describe_type(row[name]) for name in decisive_fields(row)}

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
    if not has_known_form(row, fields):
        names = ", ".join(ascii(name) for name in row)
        problem = f"its keys are {names[:200] or 'none'}"
        for name, value in row.items():
            if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
                problem += f"; if the rows stand in {name!a:.60}, give that array alone"
                break
        raise InvalidRow("form not recognised", f"{problem}; {UNDERSTOOD}")
    return fields


def decisive_fields(row: Mapping) -> list[str]:
    """The columns that say which form a row has, and what its answers are worth."""
    names = []
    prompt_name = first_field(row, PROMPT_FIELDS)
    if prompt_name is not None:
        names.append(prompt_name)
    dialogue_name = first_field(row, DIALOGUE_FIELDS)
    if dialogue_name not in (None, prompt_name):
        names.append(dialogue_name)
    for candidates in (CHOSEN_FIELDS, REJECTED_FIELDS):
        name = first_field(row, candidates)
        if name is not None:
            names.append(name)
    answer_names = [name for name in LABELLED_FIELDS + ANSWER_FIELDS if row.get(name) is not None]
    scored_name = response_list(Row(row))
    if scored_name is not None and scored_name not in answer_names:
        answer_names.append(scored_name)
    has_one_answer = len(answer_names) == 1 or dialogue_name is not None
    if has_one_answer and not any(name in names for name in CHOSEN_FIELDS + REJECTED_FIELDS):
        answer_names += [name for name in LABEL_FIELDS if row.get(name) is not None]
    return names + answer_names


def has_known_form(row: Mapping, fields: Mapping[str, str]) -> bool:
    """Whether a row has all that one of the forms needs."""
    known = any(required <= fields.keys() for required in REQUIRED_FIELDS)
    has_prompt = first_field(row, PROMPT_FIELDS) is not None
    has_two_sides = first_field(row, CHOSEN_FIELDS) and first_field(row, REJECTED_FIELDS)
    is_scored = response_list(Row(row)) is not None
    if has_prompt and (has_two_sides or is_scored):
        known = True
    # what is rejected needs an answer that is better
    has_better = first_field(row, (*CHOSEN_FIELDS, *ANSWER_FIELDS, *DIALOGUE_FIELDS)) is not None
    only_rejected = first_field(row, REJECTED_FIELDS) is not None and not has_better
    return known and not only_rejected


def parse_line(line: str) -> object:
    """The value in a line of JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = f"{error}; it begins with {line[:SHOWN_START]!a}"
        is_open = line.startswith("{") and line.endswith(("{", "[", ","))
        if is_open and "Extra data" not in str(error):
            problem = "the object goes on in the next line; a row is one line, as jq -c makes it"
        raise InvalidRow("not valid JSON", f"{problem}; {UNDERSTOOD}") from None


# ---- files ----------------------------------------------------------------------------------


def read_items(file: Path, report: LoadReport, plain_prompts: bool) -> Iterator[tuple[int, object]]:
    """(number, item) of every line, or of every row of an array or table; blank ones are ""."""
    check_kind(file)
    if is_parquet(file):
        report.unit = "row"
        return read_parquet(file)
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
) -> Iterator[ParsedRow]:
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
            parsed = parse_row(row, preference_label)
            report.fields = fields  # of a row that can be read
        except InvalidRow as error:
            if not skip_invalid:
                where = f"{file}, {report.unit} {number}"
                raise UserError(f"{where}: {error.reason}: {error.details}") from None
            parsed = ParsedRow(None, f"skipped ({error.reason})")
        report.add(number, parsed.reason)
        report.unread.update(parsed.unread)
        report.odd.update(parsed.odd)
        if parsed.pair is not None:
            yield parsed


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
    rows: list[ParsedRow] = []
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
        for row in usable:
            pair = row.pair
            unique_id = example_id(pair.prompt, occurrences[pair.id])
            occurrences[pair.id] += 1
            row.pair = replace(pair, id=unique_id, meta={"file": name} | pair.meta)
            rows.append(row)
    if split_pair_paths(path):
        check_unlabelled(rows, path)
    pairs = join_labelled(rows, reports)
    for file in files_left_aside(path):
        name = str(file.relative_to(path))
        kind = kind_by_name(file.name)
        advice = conversion(kind, file)
        reports[name] = LoadReport(not_read=f"is {kind.name} and not read; {advice}")
    if not pairs:
        counts = "; ".join(f"{name}: {report}" for name, report in reports.items())
        raise UserError(f"{setting}: no usable row in {path} ({counts[:400]})")
    return pairs, reports


def check_unlabelled(rows: Sequence[ParsedRow], path: str) -> None:
    """UserError for a label in "GOOD,BAD", where the file says which answers are good."""
    for row in rows:
        if row.label is not None:
            raise UserError(
                f"{path}: answers in {row.pair.meta['file']} have labels, and the files are to say "
                "which are good; give one file with the answers of both kinds"
            )


def join_labelled(rows: Sequence[ParsedRow], reports: Mapping[str, LoadReport]) -> list[Pair]:
    """The pairs of all rows; a bad answer goes to a good one to the same prompt, in order.

    Of a bad answer that is left alone the prompt is kept, without an answer. The reports count what
    became of the bad ones.
    """
    bad_by_prompt: dict[Prompt, list[ParsedRow]] = defaultdict(list)
    for row in rows:
        if row.label is False:
            bad_by_prompt[row.pair.prompt].append(row)

    # A good answer takes the first bad one that differs from it
    joined = set()  # ids of Python objects: rows may be equal
    pairs: list[Pair] = []
    for row in rows:
        pair = row.pair
        candidates = bad_by_prompt.get(pair.prompt, []) if row.label else []
        for index, bad in enumerate(candidates):
            if bad.pair.rejected != pair.chosen:
                joined.add(id(candidates.pop(index)))
                pair = replace(pair, rejected=bad.pair.rejected)
                break
        pairs.append(pair)

    usable = []
    for row, pair in zip(rows, pairs, strict=True):
        if row.label is False:
            was_joined = id(row) in joined
            reports[pair.meta["file"]].joined[JOINED if was_joined else LEFT_ALONE] += 1
            if was_joined:
                continue
            pair = replace(pair, rejected="")
        usable.append(pair)
    return usable


def display_name(file: Path) -> str:
    """A file's name without endings; bytes that are no UTF-8 are escaped."""
    name = os.fsencode(file.name).decode("utf-8", "backslashreplace")
    return re.sub(r"\.((jsonl?|ndjson)(\.gz)?|parquet|pq)$", "", name)


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
