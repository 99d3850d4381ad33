"""How a dialogue is written for a model: messages in, ids and the trained mask out.

Only here a prompt becomes ids, so training, scoring and sampling cannot differ. A template is a few frames, texts
with a place for the content and with the names of special tokens; a content is never more than text.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minmacpo import UserError
from minmacpo.data.records import Message
from minmacpo.data.tokenizer import Tokenizer, Tokens

HUMAN = "\n\nHuman:"  # the mark of a human turn in HH-RLHF


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@dataclass(frozen=True, slots=True)
class Template:
    """In a frame, {} is the content, {tag} what a message with the role "tag" says (how the assistant is to speak
    next: RLCD, Yang et al. 2024), <bos> and <eos> are the tokenizer's own, and `tokens` more special tokens."""

    user: str
    mark: str  # before an answer
    lead: str = ""  # within the answer, before its text
    end: str = "<eos>"  # within the answer, behind its text
    past: str | None = None  # behind an earlier answer; None: as `end`
    begin: str = ""  # before all
    system: str | None = None  # None: there is no place for such a message
    default: str = ""  # the system message where none is given
    folded: bool = False  # the system message is a part of the first human turn
    tag: str | None = None  # None: there is no place for one
    tokens: tuple[str, ...] = ()
    stripped: bool = False  # contents without white space around them
    apart: bool = False  # every text as if it began a document
    flat: bool = False  # all turns as the text of one


TEMPLATES = {
    "plain": Template(
        user="\n\nHuman{tag}: {}",
        mark="\n\nAssistant{tag}:",
        lead=" ",
        past="",
        begin="<bos>",
        tag=" ({})",
    ),
    "turns": Template(
        user="<user>{tag}{}", mark="<bot>{tag}", tag="( {} ) ", tokens=("<user>", "<bot>")
    ),
    "vicuna": Template(
        user=" USER{tag}: {}",
        mark=" ASSISTANT{tag}:",
        lead=" ",
        begin="<bos>",
        system="{}",
        default=VICUNA,
        tag=" ({})",
    ),
    "alpaca": Template(
        user="### Instruction{tag}:\n{}\n\n",
        mark="### Response{tag}:\n",
        past="<eos>\n\n",
        begin="<bos>",
        system="{}\n\n",
        default=ALPACA,
        tag=" ({})",
    ),
    # As the released MACPO runs had them: no begin token, each part tokenised by itself, and a dialogue as one
    # human turn, whose "USER: " is there twice. "vicuna" and "alpaca" are what was meant.
    "vicuna-macpo": Template(
        user="USER: {} ASSISTANT:", mark="", system="{}", default=VICUNA, apart=True, flat=True
    ),
    "alpaca-macpo": Template(
        user="### Instruction:\n{}\n\n### Response:\n",
        mark="",
        past="<eos>\n\n",
        system="{}",
        default=ALPACA + "\n\n",
        apart=True,
    ),
    "llama-2": Template(
        user="<bos>[INST] {} [/INST]",
        mark="",
        lead=" ",
        end=" <eos>",
        system="<<SYS>>\n{}\n<</SYS>>\n\n",
        folded=True,
        stripped=True,
    ),
    "llama-3": Template(
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        begin="<bos>",
        end="<|eot_id|>",
        mark="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stripped=True,
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Template(
        user=" [INST] {} [/INST]", mark="", lead=" ", begin="<bos>", system="{}\n\n", folded=True
    ),
    "chatml": Template(
        user="<|im_start|>user\n{}<|im_end|>\n",
        mark="<|im_start|>assistant\n",
        end="<|im_end|>",
        past="<|im_end|>\n",
        system="<|im_start|>system\n{}<|im_end|>\n",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "zephyr": Template(
        user="<|user|>\n{}<eos>\n",
        mark="<|assistant|>\n",
        past="<eos>\n",
        system="<|system|>\n{}<eos>\n",
    ),
}


# What the chat template of a folder says that is written like one of these, looked for in this order.
CHAT_MARKS = (
    ("<|im_start|>", "chatml"),
    ("<|start_header_id|>", "llama-3"),
    ("<<SYS>>", "llama-2"),
    ("[INST]", "mistral"),
    ("<|assistant|>", "zephyr"),
    ("<user>", "turns"),
    ("Human: ", "plain"),
)


def placed(name: str, messages: Sequence[Message]) -> list[Message]:
    """The messages as the template's frames take them, the system message first where it has one; UserError for
    one that it has no place for."""
    template, found = TEMPLATES[name], list(messages)
    homeless = {"system": template.system, "tag": template.tag, "user": "", "assistant": ""}
    for i, message in enumerate(found):
        if homeless.get(message.role) is None or (message.role == "system" and i):
            raise UserError(
                f"data.template = {name} has no place for message {i + 1}, of the role {message.role!r}"
            )
    if template.default and (not found or found[0].role != "system"):
        found.insert(0, Message("system", template.default))
    if template.folded and found and found[0].role == "system":
        if len(found) == 1 or found[1].role != "user":
            raise UserError(
                f"data.template = {name}: a system message has to stand before a human turn"
            )
        found[:2] = [Message("user", template.system.format(found[0].content) + found[1].content)]
    if template.flat:
        names = {"user": "USER", "assistant": "ASSISTANT"}
        said = [f"{names[m.role]}: {m.content}" for m in found if m.role in names]
        if len(said) == 1 and said[0].startswith(
            "USER: USER: "
        ):  # a released row is one text already
            said = [said[0].removeprefix("USER: ")]
        found = [m for m in found if m.role not in names] + [Message("user", " ".join(said))]
    return found


def frames(name: str, messages: Sequence[Message]) -> Iterator[tuple[str, str, str]]:
    """(frame, content, tag) of all that stands before the answer."""
    template, tag = TEMPLATES[name], ""
    past = template.end if template.past is None else template.past
    of = {
        "system": template.system,
        "user": template.user,
        "assistant": template.mark + template.lead + "{}" + past,
    }
    yield template.begin, "", ""
    for message in placed(name, messages):
        if message.role == "tag":
            tag = message.content and template.tag.format(message.content)
        else:
            yield (
                of[message.role],
                message.content.strip() if template.stripped else message.content,
                tag,
            )
            tag = ""
    yield template.mark, "", tag


def special_ids(tokenizer: Tokenizer, name: str) -> dict[str, int]:
    """The ids of the template's special tokens, <bos> among them if the tokenizer has one; UserError if it lacks
    another."""
    if missing := [token for token in TEMPLATES[name].tokens if token not in tokenizer.special]:
        remedy = "use data.template=plain, or the template that the model was made with"
        raise UserError(
            f"data.template = {name} needs the token {missing[0]}, which the tokenizer lacks; {remedy}"
        )
    own = {"<bos>": tokenizer.bos, "<eos>": tokenizer.eos}
    return own | {token: tokenizer.special[token] for token in TEMPLATES[name].tokens}


def write(
    tokenizer: Tokenizer, name: str, pieces: Iterator[tuple[str, str, str]], start: bool
) -> list[int]:
    """ids of frames with their contents; `start`: a text begins with them."""
    special, ids = special_ids(tokenizer, name), []
    cut = re.compile("(" + "|".join(map(re.escape, special)) + ")")
    for frame, content, tag in pieces:
        for part in cut.split(frame):
            if part in special:
                ids += [special[part]] if special[part] >= 0 else []
            elif text := part.format(content, tag=tag):
                first = (ids[-1] == tokenizer.bos if ids else start) and text[
                    0
                ] != " "  # mistral has its space
                ids += tokenizer.encode(text, start=TEMPLATES[name].apart or first)
    return ids


def render_prompt(tokenizer: Tokenizer, name: str, messages: Sequence[Message]) -> list[int]:
    """ids of the prompt in the template `name`, up to where the answer begins."""
    return write(tokenizer, name, frames(name, messages), True)


def render(
    tokenizer: Tokenizer, name: str, messages: Sequence[Message], response: str | None = None
) -> Tokens:
    """The prompt and, if given, the response with what the template puts around it, its end token last; the mask
    is True on these alone."""
    prompt, answer, template = render_prompt(tokenizer, name, messages), [], TEMPLATES[name]
    if response is not None:
        text = response.strip() if template.stripped else response
        answer = write(tokenizer, name, [(template.lead + "{}" + template.end, text, "")], False)
    return Tokens(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def chat_template(name: str) -> str | None:
    """The template in Jinja, as tokenizer_config.json has it; None for one that does more with a content than to put
    it into a frame."""
    template = TEMPLATES[name]
    if template.folded or template.flat or template.apart or template.stripped:
        return None

    def text(frame: str, content: str = "m['content']") -> str:
        """An expression for the frame: its pieces, the content and the two tokens, added up."""
        parts = re.split(r"(\{\}|<bos>|<eos>)", frame.replace("{tag}", ""))
        words = {"{}": content, "<bos>": "bos_token", "<eos>": "eos_token"}
        return " + ".join(words.get(part) or json.dumps(part) for part in parts if part) or '""'

    past = template.end if template.past is None else template.past
    system = (
        text(template.system)
        if template.system is not None
        else "raise_exception('no place for a system message')"
    )
    absent = text(template.system or "", json.dumps(template.default))
    default = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {absent} }}}}{{% endif %}}"
    return (
        f"{{{{ {text(template.begin)} }}}}{default if template.default else ''}{{% for m in messages %}}"
        f"{{% if m['role'] == 'assistant' %}}{{{{ {text(template.mark + template.lead + '{}')} }}}}"
        f"{{% if loop.last %}}{{{{ {text(template.end)} }}}}{{% else %}}{{{{ {text(past)} }}}}{{% endif %}}"
        f"{{% elif m['role'] == 'system' %}}{{{{ {system} }}}}{{% else %}}{{{{ {text(template.user)} }}}}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {text(template.mark)} }}}}{{% endif %}}"
    )


def tokenizer_notes(tokenizer: Tokenizer, name: str, context: int) -> dict:
    """tokenizer_config.json beside a tokenizer.model made here, so that transformers splits and writes text as we do:
    no space before a text, no token around it, and the special pieces found in text."""
    plain = {
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
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
        "added_tokens_decoder": {
            str(i): {"content": piece} | plain for piece, i in tokenizer.special.items()
        },
    }
    return notes | ({"chat_template": written} if (written := chat_template(name)) else {})


def template_hint(folder: Path, name: str) -> str | None:
    """A sentence where the chat template of an HF folder has the marks of another one of TEMPLATES; it may differ from
    that in its system message and in white space, so it is no more than a hint."""
    try:
        config = (
            json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            if (folder / "tokenizer_config.json").is_file()
            else {}
        )
        file, named = folder / "chat_template.jinja", config.get("chat_template") or ""
        text = (
            file.read_text("utf-8")
            if file.is_file()
            else named
            if isinstance(named, str)
            else json.dumps(named)
        )
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # load_tokenizer says what is wrong with it
    kind = next((kind for mark, kind in CHAT_MARKS if mark in text), None)
    if kind in (None, name):
        return None
    return f"{folder}: has a chat template like {kind}, dialogues are written as {name}; if it is a chat model, use --data.template={kind}"


def end_of_turn_ids(tokenizer: Tokenizer, name: str) -> set[int]:
    """The ids that end an answer in this template."""
    return {i for token, i in special_ids(tokenizer, name).items() if token in TEMPLATES[name].end}


def response_text(tokenizer: Tokenizer, name: str, ids: Sequence[int], whole: bool = True) -> str:
    """The answer's text behind sampled `ids`: no end token, no space around, and no next human turn, which a
    base model that has read whole dialogues may go on with (in the plain template). Not `whole`: as much of it as no
    later token changes, without a character of which bytes are missing, or what may become the mark of such a turn."""
    text = tokenizer.decode([i for i in ids if i != tokenizer.eos])
    if not whole:
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    if name == "plain":
        text, mark, _ = text.partition(HUMAN)
        if not whole and not mark:
            text = text[: len(text) - max(n for n in range(len(HUMAN)) if text.endswith(HUMAN[:n]))]
    return text.strip()


def goes_on(tokenizer: Tokenizer, name: str, ids: Sequence[int]) -> bool:
    """Whether a base goes on behind its answer with the next human turn, so that the answer is whole."""
    return name == "plain" and HUMAN in tokenizer.decode(ids)


def dialogue_text(messages: Sequence[Message], response: str) -> str:
    """A dialogue as one text of the HH-RLHF kind, for training a tokenizer; what a system message says stands before it."""
    system, turns = (
        [m for m in messages if (m.role == "system") == first] for first in (True, False)
    )
    prompt = "".join(
        frame.format(content, tag=tag) for frame, content, tag in frames("plain", turns)
    )
    return f"{''.join(m.content for m in system)}{prompt.removeprefix('<bos>')} {response}"
