"""From the values in a row to messages: lists of turns, marked texts of the HH-RLHF kind, texts.

Reading is strict: what cannot be read raises InvalidRow with its reason. Text is taken without the
white space around it.
"""

import re
from collections.abc import Sequence

from minmacpo.data.records import Message
from minmacpo.data.rendered import parse_rendered, without_end_marks

Prompt = tuple[Message, ...]

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ANSWER = "\n\nAssistant:"

# Marks in a text that stands for a prompt; files that were changed on their way may have lost the
# blank lines before the first mark, or have one line end where HH-RLHF has two
FIRST_MARK = re.compile(r"\s*(Human|Assistant):")
PARAGRAPH_MARK = re.compile(r"\r?\n\r?\n(Human|Assistant):")
LINE_MARK = re.compile(r"\r?\n(Human|Assistant):")

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "prompter": "user",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "developer": "system",
}

# Where a message says that it calls a tool, which no template here can write
CALL_KEYS = ("tool_calls", "function_call")

# Where a message says whether it is to be trained on: OpenAI, axolotl, ms-swift
WEIGHT_KEYS = ("weight", "train", "trainable", "loss")

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


def describe_type(value: object) -> str:
    """The type of a value in words; of one that JSON does not have (parquet: dates) its name."""
    return JSON_TYPES.get(type(value), type(value).__name__)


# ---- lists of messages ----------------------------------------------------------------------


def parse_messages(value: object, name: str) -> Prompt:
    """The messages of a list of {"role", "content"} or {"from", "value"}.

    A single such message will do too; a text is a dialogue where it is marked as one, and else one
    human turn. Only an assistant's turn at the end may be empty.

    Args:
        name: of the field, for error messages; so in the functions below.
    """
    if isinstance(value, str):
        return parse_prompt_text(value, name)
    if not isinstance(value, list):
        value = [value]
    return check_turns(tuple(parse_message(turn, name) for turn in value), name)


def parse_message(turn: object, name: str) -> Message:
    """One message, of either kind."""
    if not isinstance(turn, dict):
        raise InvalidRow(
            "no message", f"{name!r} holds {describe_type(turn)} where a message should be"
        )
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if role is None:
        keys = ", ".join(map(repr, turn))
        raise InvalidRow(
            "no role", f"{name!r} holds a turn without 'role' or 'from'; its keys are {keys:.80}"
        )
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise InvalidRow(
            "unknown role", f"{name!r} holds a turn of {role!a:.80}; known are {', '.join(ROLES)}"
        )
    for key in CALL_KEYS:
        if turn.get(key):
            raise InvalidRow(
                "tool call", f"{name!r} holds a turn with {key!r}, which no template here can write"
            )
    text = parse_content(content, f"{name}: {role}")
    return Message(ROLES[role.lower()], text, trained=not is_untrained(turn))


def parse_content(content: object, name: str) -> str:
    """The text of a message, which may be a list of parts, as OpenAI has it."""
    if not isinstance(content, list):
        return parse_text(content, name)
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise InvalidRow("no text", f"{name!r} is a list that holds {describe_type(part)}")
        kind = part.get("type")
        if kind != "text":
            raise InvalidRow("no text", f"{name!r} holds a part of the type {kind!a:.40}")
        texts.append(parse_text(part.get("text"), name))
    return "\n".join(texts)


def check_turns(messages: Prompt, name: str) -> Prompt:
    """The messages, if there are any and none is empty but an assistant's at the end."""
    if not messages:
        raise InvalidRow("empty turn", f"{name!r} holds no turn")
    for number, message in enumerate(messages, start=1):
        may_be_empty = number == len(messages) and message.role == "assistant"
        if not message.content and not may_be_empty:
            raise InvalidRow("empty turn", f"{name!r} holds an empty turn")
    return messages


def parse_text(value: object, name: str) -> str:
    """A text without the white space around it."""
    if not isinstance(value, str):
        raise InvalidRow("no text", f"{name!r} is {describe_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRow("no valid text", f"{name!r} holds half a surrogate pair") from None
    return value.strip()


# ---- whether a message is trained on --------------------------------------------------------


def is_untrained(turn: object) -> bool:
    """Whether a message of a list says that it is not to be trained on: "weight": 0 and its kin."""
    if not isinstance(turn, dict):
        return False
    weights = [turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None]
    return any(is_zero_weight(weight) for weight in weights)


def is_zero_weight(weight: object) -> bool:
    """Whether a weight is 0 or false, also as a text."""
    return weight == 0 or str(weight).strip().lower() in ("0", "0.0", "false")


def is_plain_weight(weight: object) -> bool:
    """Whether a weight says no more than whether to train."""
    is_one = weight == 1 or str(weight).strip().lower() in ("1", "1.0", "true")
    return weight is None or is_one or is_zero_weight(weight)


# ---- marked texts ---------------------------------------------------------------------------


def parse_prompt_text(text: object, name: str) -> Prompt:
    r"""The turns of a text that stands for a prompt: a marked dialogue, or else one human turn.

    "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: so?\n\nAssistant:" has three turns. The first blank
    lines and the last mark may be missing. So it is with a text that a chat template has
    written, such as "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n".
    """
    content = parse_text(text, name)
    if not is_marked(content):
        turns = parse_rendered(content) or (Message("user", content),)
        return check_turns(turns, name)
    turns = split_marked(content)
    last = turns[-1]
    if last.role == "assistant" and not last.content:
        turns = turns[:-1]  # the mark behind which the answer comes
    return check_turns(turns, name)


def is_marked(text: str) -> bool:
    """Whether a text begins as a dialogue of "Human:" and "Assistant:" turns."""
    first = FIRST_MARK.match(text)
    if first is None:
        return False
    return first[1] == "Human" or "Human" in turn_marks(text).findall(text)


def turn_marks(text: str) -> re.Pattern:
    """What the turns of a marked dialogue begin with: a blank line, or only a new line."""
    return PARAGRAPH_MARK if PARAGRAPH_MARK.search(text.strip()) else LINE_MARK


def split_marked(text: str) -> Prompt:
    """The turns of a marked dialogue, empty ones included."""
    text = text.strip()
    _, *parts = turn_marks(text).split("\n\n" + text)
    turns = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append(Message(ROLES[speaker.lower()], content.strip()))
    return tuple(turns)


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


# ---- dialogues that end with an answer ------------------------------------------------------


def parse_dialogue(value: object, name: str) -> tuple[Prompt, str | None]:
    """(prompt, last answer) of a dialogue; the answer is None if a human turn is the last.

    Args:
        value: a text of the HH-RLHF kind, or of a chat template; or messages.
    """
    turns = parse_rendered(parse_text(value, name)) if isinstance(value, str) else ()
    if turns or not isinstance(value, str):
        *prompt, last = turns or parse_messages(value, name)
        return tuple(prompt), last.content if last.role == "assistant" else None

    try:
        prompt, answer = split_dialogue(value)
    except ValueError as error:
        raise InvalidRow("no dialogue", f"{name!r} is {error}") from None
    ends_with_human = HH_TURN.findall(value)[-1] == "Human"
    return prompt, None if ends_with_human else answer


def parse_answer(
    value: object, name: str, stated: Prompt, stated_text: str = ""
) -> tuple[Prompt, str | None]:
    r"""(turns before it, answer) of what stands beside a prompt; mostly there are no turns.

    Some files say the prompt again, as messages (ultrafeedback_binarized) or as a marked dialogue;
    in some the answer's own mark stands before it ("\n\nAssistant: hello").

    Args:
        value: a text, or messages of which the last is the answer.
        stated: the turns of the prompt's own column.
        stated_text: that column, where it is a text.
    """
    if not isinstance(value, str):
        return parse_dialogue(value, name)
    text = parse_text(value, name)
    if text.startswith("Human:") and HH_ANSWER in text:
        turns, answer = parse_dialogue("\n\n" + text, name)
        # An answer may itself be a dialogue, if one was asked for
        has_leading_lines = value.startswith("\n\n")
        if has_leading_lines or merge_prompts(stated, [turns]) is not None:
            return turns, answer
    if value.startswith(HH_ANSWER) or is_marked(stated_text):
        text = text.removeprefix("Assistant:").lstrip()
    elif parse_rendered(text):
        turns, answer = parse_dialogue(text, name)
        if merge_prompts(stated, [turns]) is not None:
            return turns, answer
    elif parse_rendered(stated_text.strip()):
        # The prompt's template may have ended the answer, or begun it
        turns = parse_rendered(f"{stated_text}{text}")
        text = turns[-1].content if len(turns) > len(stated) else without_end_marks(text)
    return (), text


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt with a system message, if one is given and the prompt has none."""
    if not system or (prompt and prompt[0].role == "system"):
        return prompt
    return (Message("system", system), *prompt)


# ---- the prompt that a row states more than once --------------------------------------------


def contains_turns(dialogue: Sequence[Message], part: Sequence[Message]) -> bool:
    """Whether the turns of `part` stand side by side in a dialogue."""
    size = len(part)
    starts = range(len(dialogue) - size + 1)
    return any(tuple(dialogue[start : start + size]) == tuple(part) for start in starts)


def merge_prompts(stated: Prompt, repeated: Sequence[Prompt]) -> Prompt | None:
    """The prompt of a row that says it in a column of its own, before its answers, or both.

    What all answers have before them is the prompt, as in TRL's `extract_prompt`. The column may
    leave out the system message and earlier turns, or have those which the answers leave out.

    Args:
        stated: the column's turns; may be empty.
        repeated: the turns before each answer that has some.

    Returns:
        None where they differ.
    """
    prompt = merge_turns(stated, repeated)
    if prompt is None:
        return None

    # A weight may stand in one of several lists that end alike
    turns = list(prompt)
    for source in (stated, *repeated):
        for position in range(1, min(len(source), len(turns)) + 1):
            same = source[-position] == turns[-position]
            if same and not source[-position].trained:
                turns[-position] = source[-position]
    return tuple(turns)


def merge_turns(stated: Prompt, repeated: Sequence[Prompt]) -> Prompt | None:
    """The turns that `merge_prompts` gives back; of those that are said twice, either."""
    if not repeated:
        return stated
    before = repeated[0]
    if any(other != before for other in repeated):
        return None
    if not stated or contains_turns(before, stated):
        return before
    if before and stated[-len(before) :] == before:
        return stated
    return None
