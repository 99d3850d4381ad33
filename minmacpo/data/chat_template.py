"""How a dialogue is written for a model: messages in, ids and the mask of what is trained on out.

A prompt becomes ids only here, so training, scoring and sampling cannot differ. A template is a few
frames: texts with a place for the content, {}, and with the names of special tokens. A content is
never more than text, whatever stands in it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from minmacpo import UserError
from minmacpo.data.records import Message
from minmacpo.data.tokenizer import Tokenizer, Tokens, load_tokenizer
from minmacpo.data.tokenizer_files import read_chat_template

HUMAN_MARK = "\n\nHuman:"  # what begins a human turn in HH-RLHF

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True, slots=True)
class Template:
    """How a dialogue is written.

    In a frame, {} is a message's content; {tag} is what the message with the role "tag" before it
    says (how the assistant is to speak next: RLCD, Yang et al. 2024); <bos> and <eos> are the
    tokenizer's begin and end token, and <begin> is what it puts before every text: its begin token,
    or nothing.

    An answer is written as `assistant_header`, `assistant_prefix`, its text, `end`. The header
    belongs to the prompt; the other three are trained on.
    """

    user: str
    assistant_header: str
    assistant_prefix: str = ""
    end: str = "<eos>"
    earlier_end: str | None = None  # behind the earlier answers of a dialogue; None: as `end`
    begin: str = ""
    system: str | None = None  # None: there is no place for a system message
    default_system: str = ""  # the system message where none is given
    merge_system: bool = False  # whether it is written within the first human turn
    tag: str | None = None  # None: there is no place for a tag
    special_tokens: tuple[str, ...] = ()  # that occur in the frames beside <bos> and <eos>
    strip_content: bool = False  # whether contents lose the white space around them
    separate_texts: bool = False  # whether every stretch of text is tokenized like a document
    flatten: bool = False  # whether all turns are written as the text of one human turn

    @property
    def earlier_answer(self) -> str:
        """The frame of an answer that is followed by more turns."""
        end = self.end if self.earlier_end is None else self.earlier_end
        return self.assistant_header + self.assistant_prefix + "{}" + end


# What each one makes of the dialogue "hi", "hello", "so?" with the answer "yes" is shown above it;
# what is trained on stands between ⟦ and ⟧.
TEMPLATES = {
    # <begin>\n\nHuman: hi\n\nAssistant: hello\n\nHuman: so?\n\nAssistant:⟦ yes<eos>⟧
    "plain": Template(
        user="\n\nHuman{tag}: {}",
        assistant_header="\n\nAssistant{tag}:",
        assistant_prefix=" ",
        earlier_end="",
        begin="<begin>",
        tag=" ({})",
    ),
    # <user>hi<bot>hello<eos><user>so?<bot>⟦yes<eos>⟧
    "turns": Template(
        user="<user>{tag}{}",
        assistant_header="<bot>{tag}",
        tag="( {} ) ",
        special_tokens=("<user>", "<bot>"),
    ),
    # <begin>A chat ... questions. USER: hi ASSISTANT: hello<eos> USER: so? ASSISTANT:⟦ yes<eos>⟧
    "vicuna": Template(
        user=" USER{tag}: {}",
        assistant_header=" ASSISTANT{tag}:",
        assistant_prefix=" ",
        begin="<begin>",
        system="{}",
        default_system=VICUNA,
        tag=" ({})",
    ),
    # <begin>Below is ... request.\n\n### Instruction:\nhi\n\n### Response:\nhello<eos>\n\n
    # ### Instruction:\nso?\n\n### Response:\n⟦yes<eos>⟧
    "alpaca": Template(
        user="### Instruction{tag}:\n{}\n\n",
        assistant_header="### Response{tag}:\n",
        earlier_end="<eos>\n\n",
        begin="<begin>",
        system="{}\n\n",
        default_system=ALPACA,
        tag=" ({})",
    ),
    # The next two are as the released MACPO runs had them: no begin token, each part tokenized by
    # itself, and a dialogue as one human turn, whose "USER: " is there twice. "vicuna" and "alpaca"
    # are what was meant.
    # A chat ... questions.USER: USER: hi ASSISTANT: hello USER: so? ASSISTANT:⟦yes<eos>⟧
    "vicuna-macpo": Template(
        user="USER: {} ASSISTANT:",
        assistant_header="",
        system="{}",
        default_system=VICUNA,
        separate_texts=True,
        flatten=True,
    ),
    # Below is ... request.\n\n### Instruction:\nhi\n\n### Response:\nhello<eos>\n\n
    # ### Instruction:\nso?\n\n### Response:\n⟦yes<eos>⟧
    "alpaca-macpo": Template(
        user="### Instruction:\n{}\n\n### Response:\n",
        assistant_header="",
        earlier_end="<eos>\n\n",
        system="{}",
        default_system=ALPACA + "\n\n",
        separate_texts=True,
    ),
    # <bos>[INST] hi [/INST] hello <eos><bos>[INST] so? [/INST]⟦ yes <eos>⟧
    "llama-2": Template(
        user="<bos>[INST] {} [/INST]",
        assistant_header="",
        assistant_prefix=" ",
        end=" <eos>",
        system="<<SYS>>\n{}\n<</SYS>>\n\n",
        merge_system=True,
        strip_content=True,
    ),
    # <bos><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant
    # <|end_header_id|>\n\nhello<|eot_id|> ... assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧
    "llama-3": Template(
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        assistant_header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        begin="<bos>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strip_content=True,
    ),
    # <bos> [INST] hi [/INST] hello<eos> [INST] so? [/INST]⟦ yes<eos>⟧
    "mistral": Template(
        user=" [INST] {} [/INST]",
        assistant_header="",
        assistant_prefix=" ",
        begin="<bos>",
        system="{}\n\n",
        merge_system=True,
    ),
    # <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n
    # <|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧
    "chatml": Template(
        user="<|im_start|>user\n{}<|im_end|>\n",
        assistant_header="<|im_start|>assistant\n",
        end="<|im_end|>",
        earlier_end="<|im_end|>\n",
        system="<|im_start|>system\n{}<|im_end|>\n",
        special_tokens=("<|im_start|>", "<|im_end|>"),
    ),
    # <|user|>\nhi<eos>\n<|assistant|>\nhello<eos>\n<|user|>\nso?<eos>\n<|assistant|>\n⟦yes<eos>⟧
    "zephyr": Template(
        user="<|user|>\n{}<eos>\n",
        assistant_header="<|assistant|>\n",
        earlier_end="<eos>\n",
        system="<|system|>\n{}<eos>\n",
    ),
}

# What occurs in the chat templates that are written like one of ours, looked for in this order.
CHAT_MARKS = {
    "<|im_start|>": "chatml",
    "<|start_header_id|>": "llama-3",
    "<<SYS>>": "llama-2",
    "[INST]": "mistral",
    "<|assistant|>": "zephyr",
    "<user>": "turns",
    "Human: ": "plain",
}


# ---- from messages to segments --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """A frame and what is put into it."""

    frame: str
    content: str = ""
    tag: str = ""

    def fill(self, part: str) -> str:
        """A part of the frame with the content and the tag in their places."""
        return part.format(self.content, tag=self.tag)


def template_segments(name: str, messages: Sequence[Message]) -> Iterator[Segment]:
    """The segments of all that stands before the answer."""
    template = TEMPLATES[name]
    frames = {
        "system": template.system,
        "user": template.user,
        "assistant": template.earlier_answer,
    }
    yield Segment(template.begin)
    tag = ""
    for message in normalize_messages(name, messages):
        if message.role == "tag":
            # it belongs to the next turn of the assistant
            tag = template.tag.format(message.content) if message.content else ""
            continue
        content = message.content.strip() if template.strip_content else message.content
        yield Segment(frames[message.role], content, tag)
        tag = ""
    yield Segment(template.assistant_header, tag=tag)


def normalize_messages(name: str, messages: Sequence[Message]) -> list[Message]:
    """The messages as the template's frames take them, a default system message included.

    Raises:
        UserError: the template has no place for one of the messages.
    """
    template = TEMPLATES[name]
    check_roles(name, messages)
    normalized = list(messages)
    has_system = bool(normalized) and normalized[0].role == "system"
    if template.default_system and not has_system:
        normalized.insert(0, Message("system", template.default_system))
        has_system = True
    if template.merge_system and has_system:
        normalized = merge_system(name, normalized)
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
            raise UserError(
                f"data.template = {name} has no place for message {number}, "
                f"of the role {message.role!r}"
            )


def merge_system(name: str, messages: list[Message]) -> list[Message]:
    """The messages with the system message, their first one, within the human turn behind it."""
    if len(messages) == 1 or messages[1].role != "user":
        raise UserError(
            f"data.template = {name}: a system message has to stand before a human turn"
        )
    system, first_turn, *others = messages
    content = TEMPLATES[name].system.format(system.content) + first_turn.content
    return [Message("user", content), *others]


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
) -> list[int]:
    """The ids of segments.

    Args:
        before: the ids behind which they stand.
    """
    special = special_ids(tokenizer, name)
    split_at_special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
    ids = []
    for segment in segments:
        for part in split_at_special.split(segment.frame):
            if part in special:
                if special[part] >= 0:
                    ids.append(special[part])
                continue
            text = segment.fill(part)
            if not text:
                continue
            takes_space = TEMPLATES[name].separate_texts
            if not text.startswith(" "):  # mistral's frames bring their space along
                takes_space = takes_space or takes_space_behind(tokenizer, name, ids or before)
            ids.extend(tokenizer.encode(text, start=takes_space))
    return ids


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
    return encode_segments(tokenizer, name, template_segments(name, messages))


def render(
    tokenizer: Tokenizer, name: str, messages: Sequence[Message], response: str | None = None
) -> Tokens:
    """The prompt and, if given, the response with what the template puts around it.

    The end token is the last one. The mask is True on the response's tokens alone, that included.
    """
    prompt = render_prompt(tokenizer, name, messages)
    if response is None:
        return Tokens(prompt, [False] * len(prompt))

    template = TEMPLATES[name]
    text = response.strip() if template.strip_content else response
    segment = Segment(template.assistant_prefix + "{}" + template.end, text)
    answer = encode_segments(tokenizer, name, [segment], before=prompt)
    return Tokens(prompt + answer, [False] * len(prompt) + [True] * len(answer))


@dataclass(frozen=True, slots=True)
class Renderer:
    """A tokenizer and the name of the template that dialogues are written in for it."""

    tokenizer: Tokenizer
    template: str

    def render(self, prompt: Sequence[Message], response: str | None = None) -> Tokens:
        """A prompt, and an answer to it if one is given, as token ids and mask."""
        return render(self.tokenizer, self.template, prompt, response)


# ---- from ids to the answer's text ----------------------------------------------------------


def end_of_turn_ids(tokenizer: Tokenizer, name: str) -> set[int]:
    """The ids that end an answer in this template."""
    end = TEMPLATES[name].end
    ids = special_ids(tokenizer, name)
    return {token_id for token, token_id in ids.items() if token in end}


def response_text(tokenizer: Tokenizer, name: str, ids: Sequence[int], whole: bool = True) -> str:
    """The text of a sampled answer up to its end token, without the white space around it.

    In the plain template it ends before a next human turn, with which a base model that has read
    whole dialogues may go on.

    Args:
        whole: whether the answer is complete. If not, as much of the text is given as no later
            token changes: no character of which bytes are missing, and nothing that may become the
            mark of a human turn.
    """
    ends = tokenizer.stop_ids | end_of_turn_ids(tokenizer, name)
    text = tokenizer.decode(list(takewhile(lambda token_id: token_id not in ends, ids)))
    if not whole:
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    if name == "plain":
        text, mark, _ = text.partition(HUMAN_MARK)
        if not whole and not mark:
            text = without_partial_mark(text)
    return text.strip()


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
        or template.strip_content
    ):
        return None

    if template.system is None:
        system = "raise_exception('no place for a system message')"
    else:
        system = jinja_text(template.system)
    answer_start = template.assistant_header + template.assistant_prefix + "{}"
    earlier_end = template.earlier_answer.removeprefix(answer_start)

    parts = [jinja_output(jinja_text(template.begin))]
    if template.default_system:
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


def own_template(folder: Path) -> str:
    """The template that a model folder's chat template looks like.

    Without one it is "turns" for a tokenizer that was made here, and "plain" for others.
    """
    text = read_chat_template(folder)
    for mark, likely in CHAT_MARKS.items():
        if mark in text:
            return likely
    if (folder / "tokenizer.model").is_file() and load_tokenizer(folder).turn_marks:
        return "turns"
    return "plain"


def template_hint(folder: Path, name: str) -> str | None:
    """A sentence, where the chat template of a model folder looks like another one of TEMPLATES.

    The folder's may differ from that one in its system message and in white space, so it is no more
    than a hint.
    """
    text = read_chat_template(folder)
    for mark, likely in CHAT_MARKS.items():
        if mark not in text:
            continue
        if likely == name:
            return None
        return (
            f"{folder}: has a chat template like {likely}, dialogues are written as {name}; "
            f"if it is a chat model, use --data.template={likely}"
        )
    return None
