"""How a dialogue is written for a model: messages in, ids and the mask of what is trained on out.

A prompt becomes ids only here, so training, scoring and sampling cannot differ. The frames that
contents are put into stand in templates.py. A content is never more than text, whatever stands in
it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from minmacpo import UserError
from minmacpo.data.records import Message
from minmacpo.data.templates import TEMPLATES, Template
from minmacpo.data.tokenizer import Tokenizer, Tokens

HUMAN_MARK = "\n\nHuman:"  # what begins a human turn in HH-RLHF


# ---- from messages to segments --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """A frame and what is put into it."""

    frame: str
    content: str = ""
    tag: str = ""
    system: str = ""  # the system message, where it stands within a human turn
    trained: bool = False

    def fill(self, part: str) -> str:
        """A part of the frame with the content, the tag and the system message in their places."""
        return part.format(self.content, tag=self.tag, system=self.system)


def template_segments(
    name: str, messages: Sequence[Message], train_on: str = "last"
) -> Iterator[Segment]:
    """The segments of all that stands before the answer.

    Args:
        train_on: "all": the earlier answers are trained on, and segments of their own, but for
            those that the data says not to train on.
    """
    template = TEMPLATES[name]
    frames = {
        "system": template.system,
        "user": template.user,
        "assistant": template.earlier_answer,
    }
    yield Segment(template.begin)

    turns = normalize_messages(name, messages)
    system = ""
    system_turn = None  # the number of the turn that the system message is written in
    if template.merge_system and turns and turns[0].role == "system":
        system = turns.pop(0).content
        system_turn = turn_for_system(name, turns)

    tag = ""
    for number, message in enumerate(turns):
        if message.role == "tag":
            # it belongs to the next turn of the assistant
            tag = template.tag.format(message.content) if message.content else ""
            continue
        content = strip_content(template, message, behind_system=number == system_turn)
        if number == system_turn:
            system_frame = template.system.replace("{}", "{system}")
            if template.strip == "joined" and not content:
                system_frame = system_frame.rstrip()
            yield Segment(template.user.replace("{}", system_frame + "{}"), content, system=system)
        elif message.role == "assistant" and message.trained and train_on == "all":
            yield from answer_segments(template, content, tag)
        else:
            yield Segment(frames[message.role], content, tag)
        tag = ""
    yield Segment(template.assistant_header, tag=tag)


def answer_segments(template: Template, content: str, tag: str) -> Iterator[Segment]:
    """The segments of an earlier answer that is trained on: it, and what stands around it."""
    end = template.end_of_earlier
    trained_end = template.end if end.startswith(template.end) else ""
    yield Segment(template.header_of_earlier, tag=tag)
    yield Segment(template.assistant_prefix + "{}" + trained_end, content, trained=True)
    yield Segment(end.removeprefix(trained_end))


def strip_content(template: Template, message: Message, behind_system: bool = False) -> str:
    """A message's content without the white space that the template takes off.

    Args:
        behind_system: whether the system message stands before it, in the same turn.
    """
    content = message.content
    if template.strip == "joined" and behind_system:
        return content.rstrip()  # what is before it is within the joined text
    if template.strip != "nothing":
        return content.strip()
    if message.role == "system" and template.rstrip_system:
        return content.rstrip()
    return content


def turn_for_system(name: str, turns: Sequence[Message]) -> int:
    """The number of the human turn that the system message is written in."""
    if not turns or turns[0].role != "user":
        raise UserError(
            f"data.template = {name}: a system message has to stand before a human turn"
        )
    if TEMPLATES[name].merge_system == "first":
        return 0
    return max(number for number, turn in enumerate(turns) if turn.role == "user")


def normalize_messages(name: str, messages: Sequence[Message]) -> list[Message]:
    """The messages as the template's frames take them, a default system message included.

    Raises:
        UserError: the template has no place for one of the messages.
    """
    template = TEMPLATES[name]
    check_roles(name, messages)
    normalized = list(messages)
    has_system = bool(normalized) and normalized[0].role == "system"
    if template.default_system is not None and not has_system:
        normalized.insert(0, Message("system", template.default_system))
    if template.flatten:
        normalized = flatten_turns(normalized)
    return normalized


def check_roles(name: str, messages: Sequence[Message]) -> None:
    """UserError for a message that the template has no place for."""
    template = TEMPLATES[name]
    roles = {"user", "assistant"}
    if template.system is not None:
        roles.add("system")
    if template.tag is not None:
        roles.add("tag")
    for number, message in enumerate(messages, start=1):
        is_late_system = message.role == "system" and number > 1
        if message.role not in roles or is_late_system:
            advice = ""
            if message.role == "system" and not is_late_system:
                able = [name for name, other in TEMPLATES.items() if other.system is not None]
                advice = f"; those that have one: {', '.join(able)}"
            raise UserError(
                f"data.template = {name} has no place for message {number}, "
                f"of the role {message.role!r}{advice}"
            )


def flatten_turns(messages: list[Message]) -> list[Message]:
    """All turns as one human turn, "USER: hi ASSISTANT: hello USER: so?", behind the others."""
    speakers = {"user": "USER", "assistant": "ASSISTANT"}
    turns = []
    others = []
    for message in messages:
        if message.role in speakers:
            turns.append(f"{speakers[message.role]}: {message.content}")
        else:
            others.append(message)
    if len(turns) == 1:
        # a row of the released files is such a text already
        turns = [re.sub("^USER: USER: ", "USER: ", turns[0])]
    return [*others, Message("user", " ".join(turns))]


# ---- from segments to ids -------------------------------------------------------------------


def special_ids(tokenizer: Tokenizer, name: str) -> dict[str, int]:
    """{special token in a frame: its id}; <bos> and <begin> are -1 if the tokenizer has none.

    Raises:
        UserError: the tokenizer lacks another one.
    """
    ids = {"<bos>": tokenizer.bos, "<begin>": tokenizer.begin, "<eos>": tokenizer.eos}
    for token in TEMPLATES[name].optional_tokens:
        if token in tokenizer.special:
            ids[token] = tokenizer.special[token]
    for token in TEMPLATES[name].special_tokens:
        if token not in tokenizer.special:
            raise UserError(
                f"data.template = {name} needs the token {token}, which {tokenizer.where} lacks; "
                "use data.template=own, or plain"
            )
        ids[token] = tokenizer.special[token]
    return ids


def encode_segments(
    tokenizer: Tokenizer, name: str, segments: Iterable[Segment], before: Sequence[int] = ()
) -> Tokens:
    """The ids of segments, and which of them are trained on.

    Args:
        before: the ids behind which they stand.
    """
    parts = list(segment_parts(special_ids(tokenizer, name), segments))
    ids = []
    mask = []
    for number, part in enumerate(parts):
        if isinstance(part.content, int):
            ids.append(part.content)
        else:
            # tokens may take in the white space around them
            text = part.content
            last_ids = ids or before
            if last_ids and last_ids[-1] in tokenizer.stripping_ids:
                text = text.lstrip()
            following = parts[number + 1].content if number + 1 < len(parts) else None
            if following in tokenizer.stripping_before_ids:
                text = text.rstrip()
            if not text:
                continue
            takes_space = TEMPLATES[name].separate_texts
            if not text.startswith(" "):  # mistral's frames bring their space along
                takes_space = takes_space or takes_space_behind(tokenizer, name, last_ids)
            ids.extend(tokenizer.encode(text, start=takes_space))
        mask += [part.trained] * (len(ids) - len(mask))
    return Tokens(ids, mask)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of text between special tokens, or the id of one of these."""

    content: str | int
    trained: bool


def segment_parts(special: dict[str, int], segments: Iterable[Segment]) -> Iterator[Part]:
    """The parts of segments, without empty ones and without tokens that the tokenizer lacks.

    Args:
        special: as special_ids gives it.
    """
    split_at_special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
    for segment in segments:
        for part in split_at_special.split(segment.frame):
            content = special[part] if part in special else segment.fill(part)
            if content not in ("", -1):
                yield Part(content, segment.trained)


def takes_space_behind(tokenizer: Tokenizer, name: str, ids: Sequence[int]) -> bool:
    """Whether the tokenizer puts its space before a text that stands behind these ids.

    Args:
        ids: those right before the text; all of them, if it is the first one of a prompt.
    """
    if not ids:
        return True
    match tokenizer.space_before:
        case "first":
            # a begin token that the tokenizer puts before a text is no part of that text
            return TEMPLATES[name].begin == "<begin>" and list(ids) == [tokenizer.begin]
        case "document":
            return ids[-1] == tokenizer.bos
        case "always":
            return ids[-1] in tokenizer.names
    return False


def render_prompt(tokenizer: Tokenizer, name: str, messages: Sequence[Message]) -> list[int]:
    """The ids of the prompt in the template `name`, up to where the answer begins."""
    return encode_segments(tokenizer, name, template_segments(name, messages)).ids


def render(
    tokenizer: Tokenizer,
    name: str,
    messages: Sequence[Message],
    response: str | None = None,
    train_on: str = "last",
) -> Tokens:
    """The prompt and, if given, the response with what the template puts around it.

    The end token is the last one. The mask is True on the response's tokens alone, that included.

    Args:
        train_on: "all": it is True on the earlier answers and their ends of turn as well. Each of
            these is then tokenized by itself, as the response always is.
    """
    segments = template_segments(name, messages, train_on)
    prompt = encode_segments(tokenizer, name, segments)
    if response is None:
        return prompt

    template = TEMPLATES[name]
    text = strip_content(template, Message("assistant", response))
    segments = [
        Segment(template.no_thoughts),
        Segment(template.assistant_prefix + "{}" + template.end, text, trained=True),
    ]
    answer = encode_segments(tokenizer, name, segments, before=prompt.ids)
    return Tokens(prompt.ids + answer.ids, prompt.mask + answer.mask)


def render_whole(
    tokenizer: Tokenizer, name: str, messages: Sequence[Message], response: str
) -> list[int]:
    """The ids of a dialogue with its answer, as a published chat template ends it.

    Most write behind the last answer what they write behind every other one, a line break for
    instance, and reward models are read there.
    """
    ids = render(tokenizer, name, messages, response).ids
    template = TEMPLATES[name]
    if template.end and template.end_of_earlier.startswith(template.end):
        closing = Segment(template.end_of_earlier.removeprefix(template.end))
        ids = ids + encode_segments(tokenizer, name, [closing], before=ids).ids
    return ids


@dataclass(frozen=True, slots=True)
class Renderer:
    """A tokenizer and the name of the template that dialogues are written in for it."""

    tokenizer: Tokenizer
    template: str

    def render(
        self, prompt: Sequence[Message], response: str | None = None, train_on: str = "last"
    ) -> Tokens:
        """A prompt, and an answer to it if one is given, as token ids and mask."""
        return render(self.tokenizer, self.template, prompt, response, train_on)


# ---- from ids to the answer's text ----------------------------------------------------------


def end_of_turn_ids(tokenizer: Tokenizer, name: str) -> set[int]:
    """The ids that end an answer in this template."""
    end = TEMPLATES[name].end
    ids = special_ids(tokenizer, name)
    return {token_id for token, token_id in ids.items() if token in end}


def response_text(tokenizer: Tokenizer, name: str, ids: Sequence[int], whole: bool = True) -> str:
    """The text of a sampled answer up to its end token, without the white space around it.

    The thoughts that a model may write before its answer are no part of it. In the plain template
    it ends before a next human turn, with which a base model that has read whole dialogues may go
    on.

    Args:
        whole: whether the answer is complete. If not, as much of the text is given as no later
            token changes: no character of which bytes are missing, and nothing that may become the
            mark of a human turn.
    """
    ends = tokenizer.stop_ids | end_of_turn_ids(tokenizer, name)
    ids = list(takewhile(lambda token_id: token_id not in ends, ids))
    text = tokenizer.decode(ids[count_thoughts(tokenizer, ids) :])
    if not whole:
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    if name == "plain":
        text, mark, _ = text.partition(HUMAN_MARK)
        if not whole and not mark:
            text = without_partial_mark(text)
    return text.strip()


def count_thoughts(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """How many ids of a sampled answer are thoughts before it; all, where they have no end.

    Thoughts are what stands up to the first token </think>; a text of that name is no such token.
    """
    opening, closing = (tokenizer.find_token(name) for name in ("<think>", "</think>"))
    if closing in ids:
        return list(ids).index(closing) + 1
    return len(ids) if opening in ids else 0


def without_partial_mark(text: str) -> str:
    """The text without the longest beginning of HUMAN_MARK that it ends with."""
    for length in range(len(HUMAN_MARK) - 1, 0, -1):
        if text.endswith(HUMAN_MARK[:length]):
            return text[:-length]
    return text


def starts_next_turn(tokenizer: Tokenizer, name: str, ids: Sequence[int]) -> bool:
    """Whether a base model has gone on with the next human turn, so that its answer is complete."""
    return name == "plain" and HUMAN_MARK in tokenizer.decode(ids)


def dialogue_text(messages: Sequence[Message], response: str) -> str:
    """A dialogue as one text of the HH-RLHF kind, for training a tokenizer.

    What a system message says stands before it.
    """
    system = "".join(message.content for message in messages if message.role == "system")
    turns = [message for message in messages if message.role != "system"]
    prompt = "".join(segment.fill(segment.frame) for segment in template_segments("plain", turns))
    return f"{system}{prompt.removeprefix('<begin>')} {response}"


def template_text(
    name: str, messages: Sequence[Message], response: str | None, ends: Mapping[str, str]
) -> str:
    """What a template writes, as one text.

    Args:
        ends: what begin and end token are called, "bos" and "eos".
    """
    template = TEMPLATES[name]
    segments = list(template_segments(name, messages))
    if response is not None:
        text = strip_content(template, Message("assistant", response))
        frame = template.no_thoughts + template.assistant_prefix + "{}" + template.end
        segments.append(Segment(frame, text))
    bos = ends.get("bos", "")
    tokens = {"<begin>": bos, "<bos>": bos, "<eos>": ends.get("eos", "")}
    parts = []
    for segment in segments:
        for part in re.split("(<begin>|<bos>|<eos>)", segment.frame):
            parts.append(tokens[part] if part in tokens else segment.fill(part))
    return "".join(parts)


# ---- files for transformers -----------------------------------------------------------------


def chat_template(name: str) -> str | None:
    """The template in Jinja, as tokenizer_config.json has it; None for one that is more.

    A template that moves, joins or strips contents is more than frames, and has no Jinja here.
    """
    template = TEMPLATES[name]
    if (
        template.merge_system
        or template.flatten
        or template.separate_texts
        or template.strip != "nothing"
        or template.rstrip_system
        or template.earlier_header is not None
    ):
        return None

    if template.system is None:
        system = "raise_exception('no place for a system message')"
    else:
        system = jinja_text(template.system)
    answer_start = template.assistant_header + template.assistant_prefix + "{}"
    earlier_end = template.earlier_answer.removeprefix(answer_start)

    parts = [jinja_output(jinja_text(template.begin))]
    if template.default_system is not None:
        default = jinja_text(template.system, content=json.dumps(template.default_system))
        parts.append("{% if messages[0]['role'] != 'system' %}" + jinja_output(default))
        parts.append("{% endif %}")
    parts += [
        "{% for m in messages %}",
        "{% if m['role'] == 'assistant' %}" + jinja_output(jinja_text(answer_start)),
        "{% if loop.last %}" + jinja_output(jinja_text(template.end)),
        "{% else %}" + jinja_output(jinja_text(earlier_end)) + "{% endif %}",
        "{% elif m['role'] == 'system' %}" + jinja_output(system),
        "{% else %}" + jinja_output(jinja_text(template.user)) + "{% endif %}",
        "{% endfor %}",
        "{% if add_generation_prompt %}" + jinja_output(jinja_text(template.assistant_header)),
        "{% endif %}",
    ]
    return "".join(parts)


def jinja_output(expression: str) -> str:
    """The statement that writes an expression."""
    return "{{ " + expression + " }}"


def jinja_text(frame: str, content: str = "m['content']") -> str:
    """A frame as an expression in Jinja: its texts, the content and the two tokens, added up.

    "<|user|>\n{}<eos>" becomes "<|user|>\\n" + m['content'] + eos_token
    """
    names = {
        "{}": content,
        "<begin>": "bos_token",
        "<bos>": "bos_token",
        "<eos>": "eos_token",
    }
    terms = []
    for part in re.split(r"(\{\}|<begin>|<bos>|<eos>)", frame.replace("{tag}", "")):
        if part in names:
            terms.append(names[part])
        elif part:
            terms.append(json.dumps(part))
    return " + ".join(terms) or '""'


def tokenizer_notes(tokenizer: Tokenizer, name: str, context: int) -> dict:
    """The tokenizer_config.json beside a tokenizer.model made here.

    With it, transformers splits and writes text as we do: no space before a text, no token around
    it, and the special pieces found in text.
    """
    flags = {
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    special_tokens = {}
    for piece, token_id in tokenizer.special.items():
        special_tokens[str(token_id)] = {"content": piece} | flags
    notes = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "added_tokens_decoder": special_tokens,
    }
    template = chat_template(name)
    if template is not None:
        notes["chat_template"] = template
    return notes
