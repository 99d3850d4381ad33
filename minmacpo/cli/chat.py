"""A dialogue in a terminal: an answer appears while it is sampled, and Ctrl-C ends it, not the program.

The same words with the same seed give the same dialogue: an answer's seed comes from the run's seed, the dialogue so
far and how many answers were given before.
"""

import contextlib
import re

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.data.chat_template import response_text, starts_next_turn
from minmacpo.data.records import Example, Message, Sample, example_id
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.sample_stage import Request, Sampler
from minmacpo.runtime.progress import escape_control_chars

CUT = " […]"  # behind an answer that is not whole, on the terminal and in the dialogue


LEAVE = "/quit or Ctrl-D leaves, /reset begins a new dialogue"


def shown(loaded: LoadedModel, template: str, said: Sample) -> str:
    """An answer as a terminal may show it, marked where it is not whole."""
    cut = said.finish == "length" and not starts_next_turn(loaded.tokenizer, template, said.tokens)
    return escape_control_chars(said.response) + CUT * cut


class Whole(Exception):
    """The answer has come to its end; what the model would say after it is not waited for."""


class Answer:
    """An answer while it is sampled: its ids, and its text, which is printed as far as it cannot change any more."""

    def __init__(self, loaded: LoadedModel, template: str):
        self.tokenizer, self.template, self.ids, self.shown = loaded.tokenizer, template, [], 0
        self.stops = loaded.answer_end_ids()

    @property
    def text(self) -> str:
        return response_text(self.tokenizer, self.template, self.ids)

    def show(self, text: str) -> None:
        """Print what of `text` is not on the terminal yet."""
        print(escape_control_chars(text[self.shown :]), end="", flush=True)
        self.shown = max(self.shown, len(text))

    def take(self, tokens: list[int]) -> None:
        """One more token; raises Whole if it is the last one, or if the base goes on with the human's next turn."""
        self.ids += tokens
        if tokens[0] in self.stops or starts_next_turn(self.tokenizer, self.template, self.ids):
            raise Whole
        self.show(response_text(self.tokenizer, self.template, self.ids, whole=False))


class Dialogue:
    """What was said so far, and who answers."""

    def __init__(self, config: Config, loaded: LoadedModel, agent: str):
        self.config, self.loaded, self.agent = config, loaded, agent
        self.messages: list[Message] = []
        self.answers = 0  # since the program began

    def reply(self, text: str) -> None:
        """Answer a human turn and keep both. The dialogue stays as it was where nothing is answered, and where no
        answer fits into the model's context any more (UserError)."""
        prompt, template = (*self.messages, Message("user", text)), self.config.data.template
        growing, cut = Answer(self.loaded, template), True
        request = Request(Example(example_id(prompt), prompt, ""), self.answers)
        sampler = Sampler(
            self.loaded,
            self.config.generate,
            self.agent,
            self.config.run.seed,
            on_token=growing.take,
        )
        try:
            sampler([request])
        except Whole:
            cut = False
        except KeyboardInterrupt:
            pass  # what was said until then is kept
        self.answers += 1
        said = growing.text
        growing.show(said)
        print(CUT * cut if said else "(no answer; what you said is not kept)")
        if said:
            self.messages = [*prompt, Message("assistant", said + CUT * cut)]

    def turn(self) -> bool:
        """Read a line from the terminal and do what it says; False: the person leaves."""
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return False
        except UnicodeDecodeError:
            raise UserError("that is no valid UTF-8") from None
        if line == "/reset":
            self.messages = []
        elif re.fullmatch(r"/\w+", line) and line != "/quit":
            print(f"{line} is unknown: {LEAVE}")
        elif line and line != "/quit":
            self.reply(line)
        return line != "/quit"


def talk(config: Config, loaded: LoadedModel, agent: str) -> None:
    """Talk until the person leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines, and takes more than the 4,095 bytes of a bare terminal

    told, dialogue = config.generate, Dialogue(config, loaded, agent)
    print(
        f"{agent}: template {config.data.template}, temperature {told.temperature:g}, top_k {told.top_k}, "
        f"top_p {told.top_p:g}, max_new_tokens {told.max_new_tokens}, seed {config.run.seed}\n{LEAVE}; Ctrl-C ends an answer"
    )
    going = True
    while going:
        try:
            going = dialogue.turn()
        except KeyboardInterrupt:
            print(f"\n{LEAVE}")
        except UserError as error:
            print(
                f"{escape_control_chars(str(error))}: say less, or begin a new dialogue with /reset"
            )
