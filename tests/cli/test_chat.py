"""sample.py in a terminal: streaming, several turns, Ctrl-C, and text that acts on a terminal."""

import builtins
import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from runs import REPOSITORY, invoke, spawn
from test_bad_input import check_sentence

from minmacpo import UserError
from minmacpo.cli import chat
from minmacpo.config.schema import Config
from minmacpo.core.checkpoint import load_model, save_weights
from minmacpo.data.chat_template import render_prompt, response_text
from minmacpo.data.records import Message, Sample
from minmacpo.data.tokenizer import load_tokenizer
from minmacpo.pipeline.open_model import open_folder
from minmacpo.pipeline.sample_stage import Sampler
from minmacpo.runtime.progress import escape_control_chars


class Terminal:
    """sample.py in a pseudo terminal of its own."""

    def __init__(self, *words):
        self.seen, self.read = "", 0
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ["TERM"] = "dumb"
            os.execv(
                sys.executable, [sys.executable, str(REPOSITORY / "sample.py"), *map(str, words)]
            )

    def part(self, wait: float) -> bool:
        """Read what has come; False: nothing more will."""
        if select.select([self.handle], [], [], wait)[0]:
            try:
                raw = os.read(self.handle, 1 << 16)
            except OSError:
                return False
            self.seen += raw.decode(errors="replace").replace("\r\n", "\n")
            return bool(raw)
        return True

    def until(self, pattern: str, seconds: float = 90) -> str:
        """All that has come since the last call, up to the pattern."""
        end = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.seen, self.read)):
            assert time.monotonic() < end and self.part(0.05), self.seen[self.read :]
        text, self.read = self.seen[self.read : found.end()], found.end()
        return text

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def interrupt(self) -> str:
        """What Ctrl-C does at the prompt; pressed when readline waits, as a person would."""
        time.sleep(0.5)
        self.type("\x03")
        return self.until(r"(?m)^> ")

    def ask(self, text: str) -> str:
        """The answer to a line."""
        self.type(text + "\n")
        self.until(re.escape(text) + "\n")
        return self.until(r"(?m)^> ").removesuffix("> ").removesuffix("\n")

    def end(self) -> int:
        """The exit code, when all is read."""
        while self.part(1):
            pass
        os.close(self.handle)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal():
    opened = []

    def start(*words) -> Terminal:
        opened.append(Terminal(*words))
        return opened[-1]

    yield start
    for one in opened:
        with contextlib.suppress(OSError):
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)


@pytest.fixture
def endless(stub, place):
    """A base whose answers have no end before they are 1,900 tokens long."""
    folder = place / "endless"
    folder.mkdir()
    for file in (stub / "bases/strong").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace(": 128", ": 4096")
    )
    model, end = load_model(folder), load_tokenizer(folder).eos
    torch.manual_seed(0)
    weights = {
        k: 3 * torch.randn(v.shape) if k.startswith("lm_head") else v
        for k, v in model.state_dict().items()
    }
    weights["lm_head.weight"][end] = 0
    save_weights(folder, model.config, weights)
    return folder, ("--generate.max_new_tokens=1900",)


# ---- a terminal ------------------------------------------------------------------------------


def test_a_dialogue(tiny, terminal, monkeypatch):
    agent = tiny / "round2/student_pos"
    one = terminal(agent)
    assert "template turns" in one.until(r"(?m)^> ")
    question = "what is it ?"
    first = one.ask(question)
    assert first == invoke("sample", agent, question).out.removesuffix("\n") and first
    second = one.ask("and where does it live ?")
    assert "/reset" in one.ask("/rest") and "unknown" in one.seen
    assert one.ask("/reset") == ""
    one.type("x " * 3000 + "\n")  # more than a bare terminal's line
    assert (
        "a prompt has 6" in (long := one.until(r"(?m)^> ")) and "room" in long and "/reset" in long
    )
    assert one.ask("what is it ?")  # the program is well
    assert "/quit" in one.interrupt()
    one.type("\x04")
    assert one.end() == 0

    # Once more, of the run itself: its last student
    typed = iter([question, "and where does it live ?", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda mark: next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    again = invoke("sample", tiny)
    assert again.code == 0
    assert again.out.endswith(f"\n{first}\n{second}\n")


def test_ctrl_c_ends_an_answer_while_it_streams_and_a_kill_leaves_nothing(endless, terminal, place):
    folder, settings = endless
    before = sorted(place.rglob("*"))
    one = terminal(folder, *settings)
    one.until(r"(?m)^> ")
    one.type("hello\n")
    one.until(r"hello\n\S")  # the answer has begun, and is not at its end
    time.sleep(0.3)
    assert one.part(0) and "[…]" not in one.seen
    one.type("\x03")
    said = one.until(r"(?m)^> ")
    assert "[…]\n> " in said and "/quit" not in said
    assert "/quit" in one.interrupt()
    one.type("again\n")
    one.until(r"again\n\S")
    os.kill(one.pid, signal.SIGKILL)
    assert one.end() == -signal.SIGKILL
    assert "Traceback" not in one.seen
    assert sorted(place.rglob("*")) == before


def say(monkeypatch, *lines: str) -> None:
    """Let these lines be what standard input holds."""
    text = "".join(line + "\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_lines_that_are_piped_get_an_answer_each(stub, monkeypatch):
    folder = stub / "bases/strong"
    words = ["--generate.max_new_tokens=6", "--data.template=turns"]
    say(monkeypatch, "where is it ?", "", "and now ?", "/reset", "where is it ?", "/quit", "more")
    ended = invoke("sample", folder, *words)
    answers = ended.out.splitlines()
    assert ended.code == 0 and len(answers) == 3, ended.err
    say(monkeypatch, "where is it ?", "and now ?")
    again = invoke("sample", folder, *words)
    assert again.out.splitlines() == answers[:2], "the same words give the same dialogue"


def test_what_has_no_token_in_a_dialogue_is_told(stub, capsys):
    dialogue = scripted_dialogue(stub, "yes")
    dialogue.loaded.tokenizer.processor.count_left_out = lambda text: text.count("\x04")
    dialogue.take_line("a\x04b\x04 ?")
    dialogue.take_line("a")
    assert capsys.readouterr().err.count("has no token for 2 characters") == 1


def test_a_process_answers_what_another_one_writes(stub):
    words = [stub / "bases/strong", "--generate.max_new_tokens=4", "--data.template=turns"]
    with spawn("sample", *words, stdin=subprocess.PIPE) as process:
        out, err = process.communicate("hi\nwho ?\n")
    assert process.returncode == 0 and out.count("\n") == 2, err


def test_an_answer_of_several_lines_is_piped_as_one(stub, capsys):
    dialogue = scripted_dialogue(stub, "one\ntwo\x1b[31m")
    dialogue.is_streamed = False
    dialogue.take_line("hi")
    shown = capsys.readouterr().out
    assert shown.startswith("one\\ntwo") and shown.count("\n") == 1 and "\x1b" not in shown
    assert dialogue.messages[1].content.startswith("one\ntwo"), "the model sees the line break"


@pytest.mark.parametrize("piped", [io.StringIO(""), None])
def test_standard_input_without_a_line_is_told(stub, monkeypatch, piped):
    monkeypatch.setattr(sys, "stdin", piped)
    ended = invoke("sample", stub / "round1/student_pos")
    check_sentence(ended.code, ended.err)
    assert "no line to answer" in ended.err and "terminal" in ended.err


def test_a_piped_dialogue_that_fills_the_context_names_its_line(stub, monkeypatch):
    say(monkeypatch, "hi", "word " * 400)
    ended = invoke("sample", stub / "bases/strong", "--generate.max_new_tokens=4")
    check_sentence(ended.code, ended.err)
    assert "line 2" in ended.err and "context" in ended.err


def test_piped_bytes_that_are_no_text_are_refused(stub, monkeypatch):
    raw = io.BytesIO(b"hi\n\xff\xfe\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
    ended = invoke("sample", stub / "bases/strong", "--generate.max_new_tokens=4")
    check_sentence(ended.code, ended.err)
    assert "UTF-8" in ended.err


# ---- what is said, without one ----------------------------------------------------------------


def open_base(stub, template="turns", max_new_tokens=50):
    """Settings and the stub's strong base, which speaks in this template."""
    config = Config()
    generate = replace(config.generate, max_new_tokens=max_new_tokens)
    config = replace(config, generate=generate)
    return config, open_folder(stub / "bases/strong", config, template).loaded


def scripted_dialogue(stub, text: str, then: BaseException | None = None) -> chat.Dialogue:
    """A dialogue whose model says this text, and then raises that, if anything."""
    config, loaded = open_base(stub)

    def make_sampler(loaded, settings, agent, seed, on_token):
        def sampler(requests):
            for token in loaded.tokenizer.encode(text):
                on_token([token])
            if then is not None:
                raise then

        return sampler

    return chat.Dialogue(config, loaded, "x", make_sampler)


def test_a_dialogue_is_rendered_as_in_training(stub, capsys):
    config, loaded = open_base(stub, max_new_tokens=6)
    asked = []

    class Recorder(Sampler):
        def decode(self, prompts, seeds, batch_size):
            asked.append(prompts[0])
            return Sampler.decode(self, prompts, seeds, batch_size)

    dialogue = chat.Dialogue(config, loaded, "x", Recorder)
    dialogue.reply("where is it ?")
    first_turn = dialogue.messages
    dialogue.reply("and now ?")

    messages = [*first_turn, Message("user", "and now ?")]
    assert [message.role for message in messages] == ["user", "assistant", "user"]
    assert asked[1] == render_prompt(loaded.tokenizer, "turns", messages)
    assert escape_control_chars(first_turn[1].content) in capsys.readouterr().out


def test_a_system_message_stands_before_every_dialogue(stub, capsys):
    config, loaded = open_base(stub, max_new_tokens=6)
    config = replace(config, data=replace(config.data, system="be kind"))
    dialogue = chat.Dialogue(config, loaded, "x")
    assert dialogue.messages == [Message("system", "be kind")]
    # its template has no place for one
    with pytest.raises(UserError, match="no place for message 1"):
        dialogue.reply("where is it ?")


@pytest.mark.parametrize("text", ["\n\nHuman: where ?\n\nAssistant:", "Human: where ?", "where ?"])
def test_a_marked_prompt_is_a_dialogue(text):
    assert chat.parse_prompt(text) == (Message("user", "where ?"),)


def test_a_system_message_without_a_place_says_which_templates_have_one(stub):
    words = ["--data.template=turns", "--data.system=be kind", "--generate.max_new_tokens=2"]
    ended = invoke("sample", stub / "bases/strong", "hi", *words)
    assert ended.code == 2 and "data.template = turns has no place" in ended.err
    assert "those that have one: vicuna, alpaca" in ended.err


def test_a_marked_prompt_without_a_turn_is_refused():
    with pytest.raises(UserError, match="'PROMPT' holds an empty turn"):
        chat.parse_prompt("Human:")


def test_pieces_of_characters_are_held_back(stub, capsys):
    text = "é 🙂 日本 ok"
    _, loaded = open_base(stub)
    tokenizer = loaded.tokenizer
    answer = chat.StreamedAnswer(loaded)
    pieces = []
    for token in tokenizer.encode(text):
        answer.add_token([token])
        pieces.append(capsys.readouterr().out)
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 3
    assert "" in pieces
    assert not any("�" in piece for piece in pieces)
    with pytest.raises(chat.StopGeneration):
        answer.add_token([tokenizer.eos])

    # an answer that ends amid a character
    answer.ids = [*tokenizer.encode("ab"), *tokenizer.encode("🙂")[:-1]]
    assert answer.text().startswith("ab")
    assert "�" in answer.text()


@pytest.mark.parametrize("template", ["plain", "turns"])
def test_what_is_settled_stays(tokenizer, template):
    """After every token, what is shown is the beginning of what the answer is in the end."""
    for text in (
        "  one\n\nHuman",
        "a\n\n\nHuman: b",
        "a\n\nHumanity 🙂\n\nHu man",
        "\n\nHuman: x",
        "é\t\n b \n",
    ):
        ids, shown = tokenizer.encode(text), ""
        for n in range(len(ids) + 1):
            now = response_text(tokenizer, template, ids[:n], whole=False)
            assert now.startswith(shown)
            shown = now
        assert response_text(tokenizer, template, ids).startswith(shown)


def test_a_base_that_speaks_for_the_human_is_stopped(stub, capsys):
    _, loaded = open_base(stub, template="plain")
    answer = chat.StreamedAnswer(loaded)
    with pytest.raises(chat.StopGeneration):
        for token in loaded.tokenizer.encode("yes .\n\nHuman: and then ? what else"):
            answer.add_token([token])
    assert answer.text() == "yes ."
    assert capsys.readouterr().out == "yes ."


@pytest.mark.parametrize(
    ("then", "mark"),
    [(KeyboardInterrupt(), chat.CUT_MARK), (chat.StopGeneration(), ""), (None, chat.CUT_MARK)],
)
def test_a_cut_answer_is_kept_and_marked(stub, capsys, then, mark):
    dialogue = scripted_dialogue(stub, "it is so", then)
    dialogue.reply("why ?")
    assert dialogue.messages == [Message("user", "why ?"), Message("assistant", "it is so" + mark)]
    assert capsys.readouterr().out.endswith(f"{mark}\n")

    dialogue = scripted_dialogue(stub, "", then)
    dialogue.reply("why ?")
    assert dialogue.messages == []
    assert "not kept" in capsys.readouterr().out


def test_a_full_context_is_said_and_nothing_is_forgotten(stub, capsys):
    config, loaded = open_base(stub, max_new_tokens=20)
    dialogue = chat.Dialogue(config, loaded, "x")
    lengths = []
    with pytest.raises(UserError, match="room for 108"):
        for _ in range(30):
            dialogue.reply("where is it now ?")
            lengths.append(len(dialogue.messages))
    assert lengths
    assert len(dialogue.messages) == lengths[-1] > 1


EVIL = "a\x1b[2Jb\x07\x9b31m\rc\x7f\u202ed\te\nf 🙂‍🙂"


def test_text_that_acts_on_a_terminal_is_made_inert(stub, capsys):
    shown = escape_control_chars(EVIL)
    assert shown == "a\\x1b[2Jb\\x07\\x9b31m\\rc\\x7f\\u202ed\te\nf 🙂‍🙂"
    assert escape_control_chars(shown) == shown
    assert escape_control_chars("\ud83d") == "\\ud83d"

    dialogue = scripted_dialogue(stub, EVIL, chat.StopGeneration())
    dialogue.reply("x")
    assert capsys.readouterr().out == shown + "\n"
    assert dialogue.messages[1].content == EVIL

    answer = Sample("p1", (), EVIL, "stop", (5,), -1.0, 2.0, "x", 0, {})
    assert chat.display_answer(dialogue.loaded, answer) == shown
