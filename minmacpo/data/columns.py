"""The columns of a row: which one is taken for what, and what becomes of those beside them.

A column whose meaning is known is used: a system text, earlier turns, the label of an answer, the
scores of several. One that says nothing to a model (HARMLESS) is passed over. Any other is counted
by its name, so that nothing is left out without a word.
"""

import math
import re
from collections.abc import Mapping, Sequence

from minmacpo.data.dialogues import (
    ROLES,
    WEIGHT_KEYS,
    InvalidRow,
    Prompt,
    check_turns,
    describe_type,
    is_marked,
    is_plain_weight,
    is_untrained,
    parse_messages,
    parse_text,
)
from minmacpo.data.records import Message

# The columns of the prompt; the first that a row has is taken.
PROMPT_FIELDS = (
    "prompt", "conversations", "conversation", "messages", "instruction", "question", "query",
    "input",
)  # fmt: skip
DIALOGUE_FIELDS = ("conversations", "conversation", "messages")  # may end with the answer

# Those of the answers; the first of a tuple that a row has is taken.
CHOSEN_FIELDS = ("chosen", "chosen_response", "chosen_messages", "response_j")
REJECTED_FIELDS = ("rejected", "rejected_response", "rejected_messages", "response_k")
ANSWER_FIELDS = ("response", "completion", "output")
LABELLED_FIELDS = ("response_0", "response_1")  # PKU-SafeRLHF
RESPONSE_LISTS = ("responses", "completions", "answers", "candidates", "generations")

# Several answers with a number each: the higher, or for ranks the lower, the better.
SCORE_FIELDS = ("overall_score", "scores", "score", "rewards", "reward", "ratings", "rating")
RANK_FIELDS = ("ranks", "rank")
TEXT_FIELDS = ("response", "answer", "text", "content", "completion", "output")

# Scores of a chosen and a rejected answer, which must not contradict their names.
SCORE_PAIRS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rm_score", "rejected_rm_score"),
    ("chosen_quality", "rejected_quality"),
)

SYSTEM_FIELDS = ("system", "system_prompt", "system_message", "system_instruction")
HISTORY_FIELDS = ("history", "context")

# Whether an answer is a good one, of TRL's and LLaMA-Factory's KTO rows, BeaverTails and others.
LABEL_FIELDS = (
    "label", "kto_tag", "is_safe", "is_good", "is_chosen", "is_preferred", "desirable",
    "is_desirable", "safe", "is_response_safe", "is_correct", "is_accepted", "accepted",
    "thumbs_up", "liked", "is_harmless", "is_helpful",
)  # fmt: skip
GOOD_LABELS = {
    "true", "1", "good", "yes", "chosen", "desirable", "positive", "+1", "safe", "accepted",
    "correct", "liked", "thumbs_up", "👍",
}  # fmt: skip
BAD_LABELS = {
    "false", "0", "bad", "no", "rejected", "undesirable", "negative", "-1", "unsafe", "incorrect",
    "disliked", "thumbs_down", "👎",
}  # fmt: skip

# Columns that hold answers, though not which one is the better: HelpSteer2, SHP, WebGPT, ...
ANSWER_LIKE = re.compile(
    r"(response|answer|completion|output|reply|human_ref|summary)[ _-]?([0-9]{1,2}|[a-d])", re.I
)

# Columns that may be passed over without a word, by the reason.
HARMLESS = {
    "names the row": (
        "id", "_id", "idx", "index", "uid", "uuid", "qid", "post_id", "row_id", "prompt_id",
        "question_id",
        "conversation_id", "conversation_hash", "chat_id", "sample_id", "example_id", "data_id",
        "instruction_id", "hash", "md5", "sha256", "prompt_hash", "__index_level_0__",
    ),
    "says where the row comes from": (
        "source", "sources", "dataset", "dataset_name", "data_source", "origin", "split", "url",
        "license", "file", "path", "link", "prompt_source", "created_at", "timestamp", "date",
        "version",
    ),
    "sorts the row": (
        "category", "categories", "sub_category", "subcategory", "topic", "topics", "task", "tasks",
        "task_type", "domain", "subject", "lang", "language", "tags", "type", "difficulty", "level",
        "intent", "skill", "harm_category", "prompt_type",
    ),
    "says who wrote the row": (
        "model", "models", "model_name", "generator", "author", "annotator", "annotators",
        "annotator_id", "worker_id", "user_id", "username", "chosen_model", "rejected_model",
        "chosen-model", "rejected-model", "chosen_by", "rejected_by", "judge", "rater",
    ),
    "counts what the row holds": (
        "num_turns", "n_turns", "turn", "turns", "num_responses", "num_tokens", "tokens",
        "token_count", "length", "chosen_length", "rejected_length", "prompt_length", "word_count",
    ),
    "is a bag of all these": ("meta", "metadata", "meta_data", "extra", "extra_info", "info"),
    "is what chosen and rejected were picked from": ("all_generated_responses", "all_rm_scores"),
}  # fmt: skip
ASSISTANTS = {name for name, role in ROLES.items() if role == "assistant"}
# One score of two cannot contradict anything
LONE_SCORES = {name for names in SCORE_PAIRS for name in names}
HARMLESS_NAMES = LONE_SCORES | {name for names in HARMLESS.values() for name in names}

# Of PKU-SafeRLHF: labels that data.preference_label does not name, hashes, and who wrote what
HARMLESS_BEGINNINGS = ("response_0_", "response_1_", "is_response_0_", "is_response_1_")

# Keys of a message that no template here writes, and that say nothing of its text
HARMLESS_KEYS = (
    "role", "from", "content", "value", "name", "id", "index", "timestamp", "date", "model",
    "tool_calls", "function_call",
)  # fmt: skip


def first_field(row: Mapping, names: Sequence[str]) -> str | None:
    """The first of these columns that a row has; null is as good as absent."""
    return next((name for name in names if row.get(name) is not None), None)


class Row:
    """A row of which is known what has been read.

    Attributes:
        fields: the row as it stands in the file.
        read: names of the columns that have been taken.
    """

    def __init__(self, fields: Mapping):
        self.fields = fields
        self.read: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the row has this column; null is as good as absent."""
        return self.fields.get(name) is not None

    def first(self, names: Sequence[str]) -> str | None:
        """The first of these columns that the row has."""
        return first_field(self.fields, names)

    def take(self, name: str) -> object:
        """The value of a column, which counts as read from then on."""
        self.read.add(name)
        return self.fields.get(name)


# ---- a system text and earlier turns --------------------------------------------------------


def add_context(row: Row, prompt: Prompt) -> Prompt:
    """The prompt behind the row's earlier turns and its system text, which stand in own columns."""
    system = [message for message in prompt[:1] if message.role == "system"]
    turns = prompt[len(system) :]
    history = take_history(row)
    if history and turns[: len(history)] != history:
        if history[0].role == "system" and not system:
            system, history = [history[0]], history[1:]
        turns = (*history, *turns)

    for text in take_system_texts(row):
        if not system:
            system = [Message("system", text)]
        elif system[0].content != text:
            raise InvalidRow(
                "two system messages",
                f"the row says {system[0].content!a:.60} and {text!a:.60}; leave one of them",
            )
    return (*system, *turns)


def take_system_texts(row: Row) -> list[str]:
    """What stands in the columns for a system text."""
    texts = []
    for name in SYSTEM_FIELDS:
        if row.has(name):
            text = parse_text(row.take(name), name)
            if text:
                texts.append(text)
    return texts


def take_history(row: Row) -> Prompt:
    """The turns before the prompt's, from a column of pairs, of messages, or of a marked dialogue.

    A "context" that is no list of turns is none: it stays unread.
    """
    turns: Prompt = ()
    for name in HISTORY_FIELDS:
        value = row.fields.get(name)
        if not value or (name == "context" and not holds_turns(value)):
            continue
        turns += parse_history(row.take(name), name)
    return turns


def holds_turns(value: object) -> bool:
    """Whether a value is a list of messages or of pairs."""
    return isinstance(value, list) and all(isinstance(turn, dict | list) for turn in value)


def parse_history(value: object, name: str) -> Prompt:
    """Earlier turns: [["hi", "hello"], ...], a list of messages, or a marked dialogue."""
    if isinstance(value, str) and is_marked(parse_text(value, name)):
        return parse_messages(value, name)
    if not isinstance(value, list):
        raise InvalidRow(
            "history not read",
            f"{name!r} is {describe_type(value)}; expected a list of [question, answer] pairs or "
            "of messages",
        )
    if not any(isinstance(turn, list) for turn in value):
        return parse_messages(value, name)

    turns = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InvalidRow(
                "history not read", f"{name!r} holds something other than [question, answer] pairs"
            )
        question, answer = pair
        turns.append(Message("user", parse_text(question, name)))
        turns.append(Message("assistant", parse_text(answer, name)))
    return check_turns(tuple(turns), name)


# ---- labels and scores ----------------------------------------------------------------------


def take_label(row: Row) -> bool | None:
    """Whether the row's only answer is a good one, as its label says; None without a label."""
    labels = {}
    for name in LABEL_FIELDS:
        if row.has(name):
            labels[name] = parse_label(row.take(name), name)
    if len(set(labels.values())) > 1:
        raise InvalidRow(
            "unknown label", f"{' and '.join(map(repr, labels))} contradict each other"
        )
    return next(iter(labels.values()), None)


def parse_label(value: object, name: str) -> bool:
    """Whether a label says "good": true or false, 1 or 0 (or -1), or such a word."""
    word = str(value).strip().lower()
    if isinstance(value, float) and value.is_integer():
        word = str(int(value))
    if word in GOOD_LABELS:
        return True
    if word in BAD_LABELS:
        return False
    raise InvalidRow(
        "unknown label",
        f"{name!r} is {value!a:.40}, which says neither that the answer is good nor that it is "
        "bad; expected true or false, 1 or 0; rename the column if it says something else",
    )


def contradicts_scores(row: Row) -> bool:
    """Whether scores of the row's two answers say that the rejected one is the better."""
    contradicted = False
    for chosen_name, rejected_name in SCORE_PAIRS:
        if row.has(chosen_name) and row.has(rejected_name):
            chosen = parse_score(row.take(chosen_name), chosen_name)
            rejected = parse_score(row.take(rejected_name), rejected_name)
            contradicted = contradicted or chosen < rejected
    return contradicted


def parse_score(value: object, name: str) -> float:
    """A number, or a text that is one."""
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if math.isnan(score):
        raise InvalidRow("no score", f"{name!r} is {value!a:.40} where a number should be")
    return score


class ScoredAnswer:
    """One of several answers to a prompt.

    Attributes:
        value: a text, or messages.
        quality: the higher, the better.
    """

    def __init__(self, value: object, quality: float):
        self.value = value
        self.quality = quality


def response_list(row: Row) -> str | None:
    """The column with a list of answers that are scored or ranked; None where there is none."""
    for name in (*RESPONSE_LISTS, *ANSWER_FIELDS):
        value = row.fields.get(name)
        if isinstance(value, list) and value:
            of_list = score_list(row, len(value))
            of_items = all(isinstance(item, dict) for item in value) and score_key(value)
            if of_list or of_items:
                return name
    return None


def score_list(row: Row, size: int) -> str | None:
    """The column with as many scores or ranks as there are answers."""
    for name in (*SCORE_FIELDS, *RANK_FIELDS):
        value = row.fields.get(name)
        if isinstance(value, list) and len(value) == size:
            return name
    return None


def score_key(answers: Sequence[Mapping]) -> str | None:
    """The key under which every answer of a list has its own score or rank."""
    for name in (*SCORE_FIELDS, *RANK_FIELDS):
        if all(answer.get(name) is not None for answer in answers):
            return name
    return None


def take_scored_answers(row: Row, name: str) -> list[ScoredAnswer]:
    """The answers in a column that `response_list` has named, with their scores."""
    values = row.take(name)
    scores_name = score_list(row, len(values))
    if scores_name is not None:
        scores = row.take(scores_name)
    else:
        scores_name = score_key(values)
        scores = [value[scores_name] for value in values]

    answers = []
    for value, score in zip(values, scores, strict=True):
        quality = parse_score(score, scores_name)
        if scores_name in RANK_FIELDS:
            quality = -quality
        if isinstance(value, dict) and "role" not in value and "from" not in value:
            value = value.get(first_field(value, TEXT_FIELDS))
        answers.append(ScoredAnswer(value, quality))
    return answers


# ---- what is left ---------------------------------------------------------------------------


def unread_columns(row: Row, prompt: Prompt, answers: Sequence[str | None]) -> list[str]:
    """The columns, and keys of messages, that hold something and have not been read.

    Args:
        prompt: what became of the row; a column that says the same again is no loss.
        answers: so, too.
    """
    known = {message.content for message in prompt} | set(answers)
    scored_name = response_list(row)
    unread = []
    for name, value in row.fields.items():
        if name in row.read and name == scored_name:
            unread += unread_keys_of_answers(value, name)
        elif name in row.read:
            unread += unread_keys(value, name)
        elif not is_harmless(name, value) and not repeats(value, known):
            unread.append(name)
    return unread


def unread_keys(value: object, name: str) -> list[str]:
    """ "messages.thinking": the keys of messages, in a list of them or one, that are not read."""
    turns = value if isinstance(value, list) else [value]
    if not all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):
        return []
    keys = {}  # in their order, each once
    for turn in turns:
        for key, content in turn.items():
            is_read = key in HARMLESS_KEYS or (key in WEIGHT_KEYS and is_plain_weight(content))
            if not is_read and not is_empty(content):
                keys[f"{name}.{key}"] = True
    return list(keys)


def unread_keys_of_answers(answers: Sequence, name: str) -> list[str]:
    """ "completions.principle": the keys of scored answers that are not read."""
    known = {*TEXT_FIELDS, *SCORE_FIELDS, *RANK_FIELDS, *HARMLESS_NAMES, *HARMLESS_KEYS}
    keys = {}  # in their order, each once
    for answer in answers:
        for key, content in answer.items() if isinstance(answer, dict) else ():
            if key not in known and not is_empty(content):
                keys[f"{name}.{key}"] = True
    return list(keys)


def check_no_answers(row: Row, unread: Sequence[str]) -> None:
    """InvalidRow where a row of which only the prompt is read has answers all the same."""
    names = [name for name in unread if ANSWER_LIKE.fullmatch(name)]
    if names:
        raise InvalidRow(
            "answers not read",
            f"{' and '.join(map(repr, names))}: no column that is known says which answer is the "
            'better; name them "chosen" and "rejected"',
        )
    for name in RESPONSE_LISTS:
        if name in unread and isinstance(row.fields[name], list):
            raise InvalidRow(
                "answers not read",
                f"{name!r} holds answers without a score or rank for each; expected them in "
                "'scores' or 'ranks'",
            )


def is_empty(value: object) -> bool:
    """Whether a value holds nothing; false and 0 say something."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def is_harmless(name: str, value: object) -> bool:
    """Whether a column may be passed over without a word."""
    is_full_weight = name == "weight" and value == 1
    known = name.lower() in HARMLESS_NAMES or name.startswith(HARMLESS_BEGINNINGS)
    return known or is_full_weight or is_empty(value)


def repeats(value: object, known: set[str | None]) -> bool:
    """Whether a text, or each of a list of messages, is known from the prompt or the answers."""
    if not isinstance(value, str | list | dict):
        return False
    if isinstance(value, str) and value.strip() in known:
        return True
    try:
        turns = parse_messages(value, "")
    except InvalidRow:
        return False
    return all(turn.content in known for turn in turns)


def ends_untrained(row: Row) -> bool:
    """Whether an answer of the row, or the row itself, has the weight 0."""
    for name in row.read - set(HISTORY_FIELDS):
        value = row.fields.get(name)
        last = value[-1] if isinstance(value, list) and value else value
        if is_untrained(last) and last.get("role", last.get("from")) in ASSISTANTS:
            return True
    weight = row.fields.get("weight")
    return weight is not None and not isinstance(weight, bool) and weight == 0
