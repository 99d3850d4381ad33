"""The table of chat templates: how each family of models writes a dialogue.

A template is a few frames: texts with a place for the content, {}, and with the names of special
tokens. chat_template.py makes ids of them.
"""

from dataclasses import dataclass, replace
from typing import Literal

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


QWEN_2 = "You are a helpful assistant."
QWEN_2_5 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM_2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM_3 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
SMOLLM_3_THINKING = SMOLLM_3 + (
    " Your role as an assistant involves thoroughly exploring questions through a systematic "
    "thinking process before providing the final precise and accurate solutions. This requires "
    "engaging in a comprehensive cycle of analysis, summarizing, exploration, reassessment, "
    "reflection, backtracking, and iteration to develop well-considered thinking process. Please "
    "structure your response into two main sections: Thought and Solution using the specified "
    "format: <think> Thought section </think> Solution section. In the Thought section, detail "
    "your reasoning process in steps. Each step should include detailed considerations such as "
    "analysing questions, summarizing relevant findings, brainstorming new ideas, verifying the "
    "accuracy of the current steps, refining any errors, and revisiting previous steps. In the "
    "Solution section, based on various attempts, explorations, and reflections from the Thought "
    "section, systematically present the final solution that you deem correct. The Solution "
    "section should be logical, accurate, and concise and detail necessary steps needed to reach "
    "the conclusion."
)

# Two families write the day into every prompt. Here it is always the same, so that a prompt is the
# same tomorrow; these are the formats in which they ask for it.
TODAY = {"%d %b %Y": "26 Jul 2024", "%d %B %Y": "08 July 2025"}


@dataclass(frozen=True, slots=True)
class Template:
    """How a dialogue is written.

    In a frame, {} is a message's content; {tag} is what the message with the role "tag" before it
    says (how the assistant is to speak next: RLCD, Yang et al. 2024); <bos> and <eos> are the
    tokenizer's begin and end token, and <begin> is what it puts before every text: its begin token,
    or nothing.

    An answer is written as `assistant_header`, `assistant_prefix`, its text, `end`. The header
    belongs to the prompt; the other three are trained on.

    A model that may think before it answers gets the header alone. Behind it a given answer has
    `no_thoughts`, which is not trained on either.
    """

    user: str
    assistant_header: str
    assistant_prefix: str = ""
    end: str = "<eos>"
    earlier_header: str | None = None  # of the earlier answers of a dialogue; None: as the last
    earlier_end: str | None = None  # behind them; None: as `end`
    no_thoughts: str = ""  # what stands between header and answer where a model that thinks did not
    begin: str = ""
    system: str | None = None  # None: there is no place for a system message
    default_system: str | None = None  # the system message where none is given
    merge_system: Literal["", "first", "last"] = ""  # within which human turn it is written
    rstrip_system: bool = False  # whether it loses the white space at its end
    tag: str | None = None  # None: there is no place for a tag
    special_tokens: tuple[str, ...] = ()  # that occur in the frames beside <bos> and <eos>
    # written as tokens where the tokenizer has them, and as text where it does not
    optional_tokens: tuple[str, ...] = ()
    # Whose white space is lost at both ends: of each content, or of a content together with the
    # system message before it
    strip: Literal["nothing", "contents", "joined"] = "nothing"
    separate_texts: bool = False  # whether every stretch of text is tokenized like a document
    flatten: bool = False  # whether all turns are written as the text of one human turn

    @property
    def earlier_answer(self) -> str:
        """The frame of an answer that is followed by more turns."""
        return self.header_of_earlier + self.assistant_prefix + "{}" + self.end_of_earlier

    @property
    def header_of_earlier(self) -> str:
        """What stands before an answer that is followed by more turns."""
        return self.assistant_header if self.earlier_header is None else self.earlier_header

    @property
    def end_of_earlier(self) -> str:
        """What stands behind an answer that is followed by more turns."""
        return self.end if self.earlier_end is None else self.earlier_end


def smollm3_system(mode: str) -> str:
    """The frame of SmolLM3's system message in one of its two modes."""
    return (
        "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"
        f"Today Date: {TODAY['%d %B %Y']}\nReasoning Mode: {mode}\n\n"
        "## Custom Instructions\n\n{}\n\n"
    )


# What each one makes of the dialogue "hi", "hello", "so?" with the answer "yes" is shown above it;
# what is trained on stands between ⟦ and ⟧.
FAMILIES = {
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
        merge_system="first",
        optional_tokens=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
        strip="joined",
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
        strip="contents",
    ),
    # <bos> [INST] hi [/INST] hello<eos> [INST] so? [/INST]⟦ yes<eos>⟧
    "mistral": Template(
        user=" [INST] {} [/INST]",
        assistant_header="",
        assistant_prefix=" ",
        begin="<bos>",
        system="{}\n\n",
        merge_system="first",
        optional_tokens=("[INST]", "[/INST]"),
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
        optional_tokens=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    # <bos>[INST] hi[/INST] hello<eos>[INST] so?[/INST]⟦ yes<eos>⟧
    "mistral-v3": Template(
        user="[INST] {}[/INST]",
        assistant_header="",
        assistant_prefix=" ",
        begin="<bos>",
        system="{}\n\n",
        merge_system="last",
        special_tokens=("[INST]", "[/INST]"),
    ),
    # <bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nhello<end_of_turn>\n
    # <start_of_turn>user\nso?<end_of_turn>\n<start_of_turn>model\n⟦yes<end_of_turn>⟧
    "gemma": Template(
        user="<start_of_turn>user\n{}<end_of_turn>\n",
        assistant_header="<start_of_turn>model\n",
        end="<end_of_turn>",
        earlier_end="<end_of_turn>\n",
        begin="<bos>",
        system="{}\n\n",
        merge_system="first",
        special_tokens=("<start_of_turn>", "<end_of_turn>"),
        strip="contents",
    ),
    # <|user|>\nhi<|end|>\n<|assistant|>\nhello<|end|>\n<|user|>\nso?<|end|>\n
    # <|assistant|>\n⟦yes<|end|>⟧
    "phi-3": Template(
        user="<|user|>\n{}<|end|>\n",
        assistant_header="<|assistant|>\n",
        end="<|end|>",
        earlier_end="<|end|>\n",
        system="<|system|>\n{}<|end|>\n",
        special_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
}

# Those that are written like one of these
VARIANTS = {
    "qwen2": replace(FAMILIES["chatml"], default_system=QWEN_2),
    "qwen2.5": replace(FAMILIES["chatml"], default_system=QWEN_2_5),
    # ... <|im_start|>assistant\nhello<|im_end|>\n ... <|im_start|>assistant\n
    # <think>\n\n</think>\n\n⟦yes<|im_end|>⟧
    "qwen3": replace(
        FAMILIES["chatml"],
        assistant_header="<|im_start|>assistant\n<think>\n\n</think>\n\n",
        earlier_header="<|im_start|>assistant\n",
    ),
    "qwen3-thinking": replace(
        FAMILIES["chatml"],
        earlier_header="<|im_start|>assistant\n",
        no_thoughts="<think>\n\n</think>\n\n",
    ),
    "smollm2": replace(FAMILIES["chatml"], default_system=SMOLLM_2),
    # <|im_start|>system\n ... \n\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n
    # <think>\n\n</think>\nhello<|im_end|>\n ... : nothing ends its system message
    "smollm3": replace(
        FAMILIES["chatml"],
        assistant_header="<|im_start|>assistant\n<think>\n\n</think>\n",
        system=smollm3_system("/no_think"),
        default_system=SMOLLM_3,
        rstrip_system=True,
    ),
    "smollm3-thinking": replace(
        FAMILIES["chatml"],
        system=smollm3_system("/think"),
        default_system=SMOLLM_3_THINKING,
        rstrip_system=True,
    ),
    # As llama-3, but every dialogue has a system message, and that begins with two dates
    "llama-3.1": replace(
        FAMILIES["llama-3"],
        system="<|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\n"
        f"Today Date: {TODAY['%d %b %Y']}\n\n{{}}<|eot_id|>",
        default_system="",
    ),
}

TEMPLATES = FAMILIES | VARIANTS
