"""Texts that a chat template has written already: their turns, where these are certain.

A data set may hold "<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n" where a prompt is
expected. It is taken apart where the whole text is of one template. A text that only looks like one
stays a text, and `looks_rendered` tells that it is to be warned of.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from minmacpo.data.records import Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True, slots=True)
class TurnMarks:
    """What stands around the turns of a template.

    Attributes:
        opening: before a turn; its group is the role.
        closings: behind a turn; any of these.
        must_close: whether each turn has one; otherwise the text has to end where an answer begins.
    """

    opening: re.Pattern
    closings: tuple[str, ...] = ()
    must_close: bool = True


MARKS = (
    TurnMarks(re.compile(r"\s*<\|im_start\|>(system|user|assistant)(?:\n|$)"), ("<|im_end|>",)),
    TurnMarks(
        re.compile(r"\s*<\|start_header_id\|>(system|user|assistant)<\|end_header_id\|>\s*"),
        ("<|eot_id|>",),
    ),
    TurnMarks(re.compile(r"\s*<start_of_turn>(user|model)(?:\n|$)"), ("<end_of_turn>",)),
    TurnMarks(
        re.compile(r"\s*<\|(system|user|prompter|assistant)\|>\s*"),
        ("</s>", "<|end|>", "<|endoftext|>"),
        must_close=False,
    ),
    TurnMarks(re.compile(r"\s*###\s*(Human|User|System|Assistant):\s*"), must_close=False),
)
BEGIN_TOKEN = re.compile(r"\s*(<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>)\s*")
EMPTY_THOUGHTS = re.compile(r"^<think>\s*</think>")

INSTRUCTION = re.compile(r"\s*(?:<s>)?\s*\[INST\]")
END_OF_INSTRUCTION = "[/INST]"
SYSTEM_IN_INSTRUCTION = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)

END_MARKS = (
    "</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>",
    "<|end_of_text|>", "<eos>",
)  # fmt: skip

# What a text begins or ends with that looks as if a template had written it; the last two are
# lists of messages that have become texts, and Alpaca's and others' words before an answer
FIRST_MARKS = re.compile(
    r"""\s*(?:<s>|<bos>|<\|begin_of_text\|>|<[|｜]begin▁of▁sentence[|｜]>)?\s*
    (?: <\|im_start\|> | <\|start_header_id\|> | <start_of_turn>
      | <\|(?:system|user|prompter|assistant)\|> | \[INST\] | <<SYS>> | \#\#\#\s*(?:Human|User):
      | \[\s*\{\s*['"](?:role|from|content|value)['"]\s*: )""",
    re.VERBOSE,
)
LAST_MARKS = re.compile(
    r"""(?: <\|im_start\|>assistant | assistant<\|end_header_id\|> | <start_of_turn>model
      | <\|assistant\|> | \[/INST\] | (?:^|\n|\s|>)(?:ASSISTANT|Assistant|assistant):
      | \#\#\#\s*(?:Response|Assistant|Output): )\s*$""",
    re.VERBOSE,
)


def parse_rendered(text: str) -> tuple[Message, ...]:
    """The turns of a text that a chat template has written; none where that is not certain."""
    begin = BEGIN_TOKEN.match(text)
    body = text[begin.end() :] if begin else text
    turns = parse_instructions(body)
    for marks in MARKS:
        turns = turns or parse_turns(body, marks)
    return turns


def parse_turns(text: str, marks: TurnMarks) -> tuple[Message, ...]:
    """The turns between these marks; none where the text is not theirs from end to end."""
    if not marks.opening.match(text):
        return ()  # as nearly every text: it is not searched any further
    _, *parts = marks.opening.split(text)
    turns = []
    awaits_answer = False
    all_closed = True
    for role, content in zip(parts[::2], parts[1::2], strict=True):
        content, is_closed = take_closing(content.strip(), marks.closings)
        content = EMPTY_THOUGHTS.sub("", content).strip()
        is_empty = not content
        if awaits_answer or (marks.must_close and not is_closed and not is_empty):
            return ()
        all_closed = all_closed and is_closed
        if ROLES[role.lower()] == "assistant" and is_empty and not is_closed:
            awaits_answer = True
        elif is_empty or holds_mark(content):
            return ()
        else:
            turns.append(Message(ROLES[role.lower()], content))
    is_whole = awaits_answer or all_closed
    return tuple(turns) if is_whole and is_dialogue(turns) else ()


def take_closing(content: str, closings: Sequence[str]) -> tuple[str, bool]:
    """(a turn without the mark at its end, whether it had one)."""
    for closing in closings:
        if content.endswith(closing):
            return content.removesuffix(closing).strip(), True
    return content, False


def parse_instructions(text: str) -> tuple[Message, ...]:
    """The turns of "[INST] hi [/INST] hello </s>[INST] so? [/INST]", as Llama 2 and Mistral."""
    if not INSTRUCTION.match(text):
        return ()
    _, *parts = INSTRUCTION.split(text)
    turns = []
    for number, part in enumerate(parts):
        question, mark, answer = part.partition(END_OF_INSTRUCTION)
        system = SYSTEM_IN_INSTRUCTION.match(question) if number == 0 else None
        if system:
            turns.append(Message("system", system[1].strip()))
            question = question[system.end() :]
        turns.append(Message("user", question.strip()))
        is_last = number == len(parts) - 1
        answer, is_closed = take_closing(answer.strip(), ("</s>",))
        if not mark or END_OF_INSTRUCTION in answer or is_closed == is_last:
            return ()
        if not is_last:
            turns.append(Message("assistant", answer))
        elif answer:
            return ()
    is_clean = all(turn.content and not holds_mark(turn.content) for turn in turns)
    return tuple(turns) if is_clean and is_dialogue(turns) else ()


def holds_mark(content: str) -> bool:
    """Whether a turn holds a mark of some template, so that its borders are not certain."""
    has_end = any(mark in content for mark in END_MARKS)
    return has_end or FIRST_MARKS.match(content) is not None or "<<SYS>>" in content


def is_dialogue(turns: Sequence[Message]) -> bool:
    """Whether turns begin with a person, behind at most one system message."""
    roles = [turn.role for turn in turns]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    return roles[:1] == ["user"] and "system" not in roles


def looks_rendered(text: str) -> bool:
    """Whether a text begins or ends as if a chat template had written it."""
    return FIRST_MARKS.match(text) is not None or LAST_MARKS.search(text) is not None


def without_end_marks(text: str) -> str:
    """An answer without the end of turn that a template has put behind it."""
    content, _ = take_closing(text.strip(), END_MARKS)
    return content


def ends_with_mark(text: str) -> bool:
    """Whether an answer ends with a template's end of turn."""
    return text.rstrip().endswith(END_MARKS)
