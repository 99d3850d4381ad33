"""A dialogue in a terminal: an answer appears while it is sampled, and Ctrl-C ends it.

Lines that come from a file or another program are a dialogue too: each gets its answer on one line.

The same words with the same seed give the same dialogue: an answer's seed comes from the run's
seed, the dialogue so far, and how many answers were given before.
"""

import contextlib
import re
import sys
from collections.abc import Iterable

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.data.chat_template import response_text, starts_next_turn
from minmacpo.data.dialogues import InvalidRow, parse_prompt_text, with_system
from minmacpo.data.formats import has_odd_prompt
from minmacpo.data.records import Example, Message, Sample, example_id
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.prepare_data import warn_of_left_out
from minmacpo.pipeline.sample_stage import Request, Sampler
from minmacpo.runtime.progress import escape_control_chars

CUT_MARK = " […]"  # behind an answer that is not whole, on the terminal and in the dialogue
COMMANDS = "/quit or Ctrl-D leaves, /reset begins a new dialogue"


# ---- single answers


def print_answers(config: Config, loaded: LoadedModel, agent: str, prompt: str, count: int) -> None:
    """Sample so many answers to one prompt, and print each as it comes, a batch at a time."""
    messages = with_system(parse_prompt(prompt), config.data.system)
    warn_of_left_out(loaded.tokenizer, [message.content for message in messages])
    example = Example(example_id(messages), messages, "")
    sampler = Sampler(loaded, config.generate, agent, config.run.seed)
    batch_size = config.generate.batch
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        answers = sampler([Request(example, number) for number in numbers])
        for number, answer in zip(numbers, answers, strict=True):
            prefix = f"[{number + 1}] " if count > 1 else ""
            print(prefix + display_answer(loaded, answer))


def parse_prompt(text: str) -> tuple[Message, ...]:
    """The turns of PROMPT, which may be a dialogue marked as in HH-RLHF, or by a chat template."""
    try:
        turns = parse_prompt_text(text, "PROMPT")
    except InvalidRow as error:
        raise UserError(f"{error.reason}: {error.details}") from None
    if has_odd_prompt(turns):
        print(
            "WARNING: PROMPT looks as if a chat template had written it, and is taken as one human "
            "turn; give the text alone",
            file=sys.stderr,
        )
    return turns


def display_answer(loaded: LoadedModel, answer: Sample) -> str:
    """An answer as a terminal may show it, marked where it is not whole."""
    text = escape_control_chars(answer.response)
    whole = answer.finish == "stop" or starts_next_turn(
        loaded.tokenizer, loaded.template, answer.tokens
    )
    return text if whole else text + CUT_MARK


# ---- a dialogue


class StopGeneration(Exception):
    """The answer has come to its end; what the model would say after it is not waited for."""


class StreamedAnswer:
    """An answer while it is sampled; its text is printed as far as it cannot change any more.

    Where `is_shown` is false, nothing is printed.
    """

    def __init__(self, loaded: LoadedModel, is_shown: bool = True):
        self.loaded = loaded
        self.is_shown = is_shown
        self.end_ids = loaded.answer_end_ids()
        self.ids: list[int] = []
        self.printed = 0  # characters

    def text(self, whole: bool = True) -> str:
        """The answer; unless it is whole, without characters that the next token may change."""
        return response_text(self.loaded.tokenizer, self.loaded.template, self.ids, whole=whole)

    def print_new(self, text: str) -> None:
        """Print what of `text` is not on the terminal yet."""
        print(escape_control_chars(text[self.printed :]), end="", flush=True)
        self.printed = max(self.printed, len(text))

    def add_token(self, tokens: list[int]) -> None:
        """Add the next token and print what it settles.

        Args:
            tokens: one, as one answer is sampled.

        Raises:
            StopGeneration: it ends the answer, or the base goes on with the human's next turn.
        """
        self.ids += tokens
        next_turn = starts_next_turn(self.loaded.tokenizer, self.loaded.template, self.ids)
        if tokens[0] in self.end_ids or next_turn:
            raise StopGeneration
        if self.is_shown:
            self.print_new(self.text(whole=False))


class Dialogue:
    """What was said so far, and who answers."""

    def __init__(self, config: Config, loaded: LoadedModel, agent: str, make_sampler=Sampler):
        self.is_streamed = True  # answers appear while they are sampled, and Ctrl-C ends one
        self.config = config
        self.loaded = loaded
        self.agent = agent
        self.make_sampler = make_sampler
        self.messages = self.opening()
        self.answers = 0  # since the program began

    def opening(self) -> list[Message]:
        """What stands before the first human turn: data.system, if it is given."""
        return list(with_system((), self.config.data.system))

    def reply(self, text: str) -> None:
        """Answer a human turn and keep both; if nothing is answered, the dialogue stays as it was.

        Raises:
            UserError: no answer fits into the model's context any more.
        """
        warn_of_left_out(self.loaded.tokenizer, [text])
        prompt = (*self.messages, Message("user", text))
        answer = StreamedAnswer(self.loaded, self.is_streamed)
        sampler = self.make_sampler(
            self.loaded,
            self.config.generate,
            self.agent,
            self.config.run.seed,
            on_token=answer.add_token,
        )
        whole = False
        try:
            sampler([Request(Example(example_id(prompt), prompt, ""), self.answers)])
        except StopGeneration:
            whole = True
        except KeyboardInterrupt:
            if not self.is_streamed:
                raise
            # what was said until then is kept
        self.answers += 1

        response = answer.text()
        if not response:
            print("(no answer; what you said is not kept)")
            return
        mark = "" if whole else CUT_MARK
        if self.is_streamed:
            answer.print_new(response)
            print(mark)
        else:
            print(on_one_line(response + mark), flush=True)
        self.messages = [*prompt, Message("assistant", response + mark)]

    def read_turn(self) -> bool:
        """Read a line from the terminal and do what it says; False: the person leaves."""
        try:
            line = input("> ")
        except EOFError:
            print()
            return False
        except UnicodeDecodeError:
            raise UserError("that is no valid UTF-8") from None
        return self.take_line(line.strip())

    def take_line(self, line: str) -> bool:
        """Answer a line, or do the command that it is; False: the person leaves."""
        if line == "/quit":
            return False
        if line == "/reset":
            self.messages = self.opening()
        elif re.fullmatch(r"/\w+", line):
            print(f"{line} is unknown: {COMMANDS}")
        elif line:
            self.reply(line)
        return True


def on_one_line(text: str) -> str:
    r"""The text with its line breaks as \n, and without what would act on a terminal."""
    lines = text.split("\n")
    return "\\n".join(escape_control_chars(line) for line in lines)


def answer_lines(config: Config, loaded: LoadedModel, agent: str, lines: Iterable[str]) -> None:
    """Answer the lines of a file or another program, as the turns of a dialogue.

    Raises:
        UserError: there is no line, one is no UTF-8, or the dialogue no longer fits the context.
    """
    dialogue = Dialogue(config, loaded, agent)
    dialogue.is_streamed = False
    number = 0
    try:
        for line in lines:
            number += 1
            if not dialogue.take_line(line.strip()):
                return
    except UnicodeDecodeError:
        raise UserError("standard input is no valid UTF-8") from None
    except UserError as error:
        raise UserError(
            f"standard input, line {number}: {error}; a line /reset begins a new dialogue"
        ) from None
    if number == 0:
        raise UserError(
            "standard input has no line to answer; give PROMPT, --prompts FILE with --out FILE, "
            "or --export DIR, or start it in a terminal (--help)"
        )


def talk(config: Config, loaded: LoadedModel, agent: str) -> None:
    """Talk until the person leaves."""
    with contextlib.suppress(ImportError):
        # input() then edits lines, and takes more than the 4,095 bytes of a bare terminal
        import readline  # noqa: F401

    settings = config.generate
    print(
        f"{agent}: template {loaded.template}, temperature {settings.temperature:g}, "
        f"top_k {settings.top_k}, top_p {settings.top_p:g}, "
        f"max_new_tokens {settings.max_new_tokens}, seed {config.run.seed}\n"
        f"{COMMANDS}; Ctrl-C ends an answer"
    )
    dialogue = Dialogue(config, loaded, agent)
    talking = True
    while talking:
        try:
            talking = dialogue.read_turn()
        except KeyboardInterrupt:
            print(f"\n{COMMANDS}")
        except UserError as error:
            problem = escape_control_chars(str(error))
            print(f"{problem}: say less, or begin a new dialogue with /reset")
