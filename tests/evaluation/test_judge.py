"""The pairwise judge: a real HTTP server with faults, a local model, people; and its statistics."""

import csv
import json
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from runs import invoke, rows_of, spawn

from minmacpo.data.records import Message, Sample
from minmacpo.evaluation import judge
from minmacpo.evaluation import remote_judge as remote
from minmacpo.runtime.files import open_locked, write_rows

KEY = "sk-a-secret-that-nobody-may-see"


def good_reply(body: dict) -> str:
    """Prefers the answer with more of the letter z; of two equal ones none."""
    text = body["messages"][0]["content"]
    first, second = text.split("[Answer A]")[1].split("[Answer B]")
    counts = first.count("z"), second.count("z")
    return "Because. " + (
        "[[C]]" if counts[0] == counts[1] else "[[A]]" if counts[0] > counts[1] else "[[B]]"
    )


@dataclass(frozen=True)
class Answer:
    """What a server says instead of a good reply."""

    content: object
    status: int = 200


def completion(text, finish="stop", **message) -> dict:
    """A chat completion."""
    return {"choices": [choice(text, finish_reason=finish, **message)]}


def choice(text, finish_reason=None, **message) -> dict:
    """The one choice of a chat completion."""
    message = {"role": "assistant", "content": text} | message
    return {"index": 0, "message": message, "finish_reason": finish_reason}


def error(message, **details) -> dict:
    """An error as OpenAI words it."""
    return {"error": {"message": message} | details}


class Server(ThreadingHTTPServer):
    """Chat completions; each of the `faults` is for one request, before it answers well."""

    daemon_threads = True

    def __init__(self, faults=(), reply=good_reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults = [*faults]
        self.reply = reply
        self.rule = lambda body: None  # the fault of a request by what it asks
        self.asked = []  # (path, body) of every request
        self.keys = []  # the Authorization header of each
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *where):
        """A client that has hung up is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body))
            self.server.keys.append(self.headers.get("Authorization"))
            fault = self.server.faults.pop(0) if self.server.faults else self.server.rule(body)
        if isinstance(fault, Answer):
            self.send_response(fault.status)
            self.end_headers()
            self.wfile.write(json.dumps(fault.content).encode())
            return
        if fault in ("hang", "hang for long"):
            time.sleep(1.5 if fault == "hang" else 40)
            return
        if isinstance(fault, int | tuple):
            self.send_response(*([fault] if isinstance(fault, int) else fault))
            self.send_header(
                "Location", getattr(self, "elsewhere", "http://127.0.0.1:9") + "/other"
            )
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        if fault == "slow head":
            for byte in b"HTTP/1.0 200 OK\r\nX: " + b"y" * 30:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.1)
            return
        if fault == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            return
        content = {
            "broken": "{nonsense",
            "empty": json.dumps({"choices": []}),
            "deep": "[" * 100_000,
        }.get(fault)
        text = "I cannot say." if fault == "no verdict" else self.server.reply(body)
        content = content or json.dumps({"choices": [{"message": {"content": text}}]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content.encode())


@pytest.fixture
def quick(monkeypatch):
    """No waiting between attempts; what would have been waited."""
    waited = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setenv(remote.API_KEY, KEY)
    return waited


def answers(file, texts) -> None:
    file.parent.mkdir(exist_ok=True)
    prompt = (Message("user", "a question"),)
    write_rows(
        file,
        [Sample(f"id{i}", prompt, t, "stop", (3,), -1.0, 2.0, "x", 0) for i, t in enumerate(texts)],
    )


@pytest.fixture
def sides(place):
    """A wins prompts 0, 1 and 4, loses 2; 3 is a tie."""
    answers(place / "a/samples.jsonl", ["zz", "z", "none", "same", "zzz"])
    answers(place / "b/samples.jsonl", ["z", "no", "z", "same", "a much longer answer"])
    return ["judge", "a", "b/samples.jsonl", "--out=out"]


def result(place) -> dict:
    return json.loads((place / "out/result.json").read_text())


def test_two_judges_do_not_ask_the_same_twice(place, sides, quick):
    (place / "out").mkdir()
    with open_locked(place / "out/verdicts.jsonl", "a", "busy"):
        server = Server()
        ended = invoke("eval", *sides, f"--url={server.url}", "--model=gpt")
        assert ended.code == 2 and "another process" in ended.err and not server.asked


def test_both_orders_are_asked_and_counted(place, sides, quick):
    server = Server()
    ended = invoke("eval", *sides, f"--url={server.url}", "--model=gpt")
    found = result(place)
    assert ended.code == 0 and "win rate 0.700" in ended.out
    assert (found["win"], found["tie"], found["lose"]) == (0.6, 0.2, 0.2) and found[
        "win_rate"
    ] == pytest.approx(0.7)
    assert (
        found["interval"][0] <= 0.7 <= found["interval"][1]
        and found["prompts"] == 5
        and found["unjudged"] == 0
    )
    assert found["characters"] == pytest.approx(
        [np.mean([2, 1, 4, 4, 3]), np.mean([1, 2, 1, 4, 20])]
    )
    assert len(server.asked) == 10 and {path for path, _ in server.asked} == {
        "/v1/chat/completions"
    }
    assert all(b["model"] == "gpt" and b["temperature"] == 0 for _, b in server.asked)
    kept = rows_of(place / "out/verdicts.jsonl")
    assert len(kept) == 10 and all("[[" in row["reply"] for row in kept)


def test_a_judge_that_likes_the_first_place_gives_ties(place, sides, quick):
    server = Server(reply=lambda body: "[[A]]")
    assert invoke("eval", *sides, f"--url={server.url}").code == 0
    assert result(place)["tie"] == 1.0 and result(place)["win_rate"] == 0.5


def test_faults_are_tried_again_and_change_nothing(place, sides, quick):
    server = Server([429, 500, "broken", "empty", "hang", 503])
    ended = invoke(
        "eval", *sides, f"--url={server.url}", "--workers=1", "--timeout=0.5", "--attempts=7"
    )
    assert (
        ended.code == 0
        and result(place)["win_rate"] == pytest.approx(0.7)
        and len(server.asked) == 16
    )
    assert len(quick) == 6


def test_waiting_grows_and_is_what_the_server_asks_for(place, sides, quick):
    server = Server(["broken"] * 4)
    assert invoke("eval", *sides, f"--url={server.url}", "--workers=1", "--attempts=5").code == 0
    assert quick == [1, 2, 4, 8]


def test_a_missing_verdict_is_counted_and_its_prompt_left_out(place, sides, quick):
    server = Server(["no verdict"])
    assert invoke("eval", *sides, f"--url={server.url}", "--workers=1").code == 0
    assert (
        result(place)["unjudged"] == 1
        and result(place)["without_verdict"] == 1
        and result(place)["prompts"] == 4
    )


@pytest.mark.parametrize("fault", ["hang", "drip", "slow head", 500, "broken", "deep"])
def test_a_url_that_never_answers_ends_with_one_sentence_and_keeps_what_it_has(
    place, sides, quick, fault
):
    server = Server([None, None, None] + [fault] * 50)
    words = [*sides, f"--url={server.url}", "--workers=1", "--timeout=0.3", "--attempts=2"]
    ended = invoke("eval", *words)
    assert (
        ended.code == 2
        and ended.err.count("\n") <= 2
        and "2 attempts" in ended.err
        and "kept" in ended.err
    )
    assert (
        len(rows_of(place / "out/verdicts.jsonl")) == 3 and not (place / "out/result.json").exists()
    )
    server.faults.clear()
    before = len(server.asked)
    assert invoke("eval", *words).code == 0 and len(server.asked) - before == 7, (
        "what was judged is not asked again"
    )


def test_ctrl_c_does_not_wait_for_a_server_that_hangs(place, sides):
    server = Server(["hang for long"] * 50)
    words = [
        *sides,
        f"--url={server.url}",
        "--timeout=60",
    ]  # a shell's background jobs ignore SIGINT
    with spawn(
        "eval", *words, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    ) as process:
        while not server.asked:
            time.sleep(0.05)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode == 130 and "stopped" in said and "Traceback" not in said
    assert time.monotonic() - started < 35, "the server hangs for 40 s"


@pytest.mark.parametrize("key", ["two words", "line\n", "clé"])
def test_a_key_that_cannot_be_sent_is_refused(place, sides, monkeypatch, key):
    monkeypatch.setenv(remote.API_KEY, key)
    ended = invoke("eval", *sides, "--url=http://127.0.0.1:9/v1")
    assert ended.code == 2 and remote.API_KEY in ended.err and key not in ended.err


def test_nobody_listens(place, sides, quick):
    ended = invoke("eval", *sides, "--url=http://127.0.0.1:9/v1", "--attempts=2")
    assert ended.code == 2 and "refused" in ended.err


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_question_that_is_refused_is_left_out_and_asked_again_later(place, sides, quick, code):
    server = Server([None, code])
    words = [*sides, f"--url={server.url}", "--workers=1"]
    assert (
        invoke("eval", *words).code == 0
        and result(place)["unjudged"] == 1 == result(place)["without_verdict"]
    )
    assert (
        invoke("eval", *words).code == 0
        and result(place)["unjudged"] == 0
        and len(server.asked) == 11
    )
    server.faults = [code] * 99
    ended = invoke("eval", *sides[:-1], "--out=other", f"--url={server.url}", "--most=3")
    assert ended.code == 2 and "no pair has a verdict" in ended.err and f"{code}:" in ended.err


@pytest.mark.parametrize(
    "content,shown",
    [
        (error("the prompt has 9000 tokens"), "9000 tokens"),
        ({"error": "no such model on this host"}, "no such model on this host"),
        ({"object": "error", "message": "context length exceeded"}, "context length"),
        ({"detail": [{"loc": ["body", "messages"], "msg": "field required"}]}, "field required"),
        (["not", "an", "object"], "Bad Request"),
    ],
)
def test_a_server_that_refuses_all_first_questions_is_asked_no_more(
    place, sides, quick, content, shown
):
    answers(place / "a/samples.jsonl", ["z"] * 30)
    answers(place / "b/samples.jsonl", ["y"] * 30)
    server = Server([Answer(content, status=400)] * 99)
    ended = invoke("eval", *sides, f"--url={server.url}", "--workers=1")
    assert ended.code == 2 and "first 8 questions were all refused" in ended.err
    assert shown in ended.err and ended.err.count("\n") == 1
    assert len(server.asked) <= 10, "60 questions were planned"


def test_questions_that_are_refused_after_a_first_reply_end_nothing(place, sides, quick):
    answers(place / "a/samples.jsonl", ["z"] * 8)
    answers(place / "b/samples.jsonl", ["y"] * 8)
    server = Server([None, None] + [Answer(error("too long"), status=400)] * 14)
    assert invoke("eval", *sides, f"--url={server.url}", "--workers=1").code == 0
    assert result(place)["prompts"] == 1 and result(place)["without_verdict"] == 14
    server.faults = [Answer(error("too long"), status=400)] * 14
    again = invoke("eval", *sides, f"--url={server.url}", "--workers=1")
    assert again.code == 0, "replies of an earlier start count as well"


def refuse_max_tokens(body):
    if "max_tokens" in body:
        message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return Answer(error(message, param="max_tokens", code="unsupported_parameter"), 400)


def refuse_temperature(body):
    if "temperature" in body:
        message = "'temperature' does not support 0 with this model."
        return Answer(error(message, param="temperature", code="unsupported_value"), 400)


def want_temperature_one(body):
    if body.get("temperature") != 1:
        return Answer(error("temperature must be 1"), 422)


@pytest.mark.parametrize(
    "rules,wanted",
    [
        ([refuse_max_tokens], {"max_completion_tokens": 77, "temperature": 0}),
        ([refuse_temperature], {"max_tokens": 77}),
        ([refuse_temperature, refuse_max_tokens], {"max_completion_tokens": 77}),
        ([want_temperature_one], {"max_tokens": 77, "temperature": 1}),
    ],
)
def test_a_server_is_asked_in_the_form_that_it_wants(place, sides, quick, rules, wanted):
    server = Server()
    server.rule = lambda body: next(filter(None, (rule(body) for rule in rules)), None)
    words = [*sides, f"--url={server.url}", "--max_new_tokens=77", "--attempts=1", "--workers=4"]
    ended = invoke("eval", *words)
    assert ended.code == 0 and result(place)["win_rate"] == pytest.approx(0.7)
    names = ("max_tokens", "max_completion_tokens", "temperature")
    last = server.asked[-1][1]
    assert {name: last[name] for name in names if name in last} == wanted
    assert ended.err.count("from now on") <= 2, "it is said once for each change"
    assert ended.err.count("from now on") >= 1 and not quick


def test_a_limit_that_is_too_large_is_no_matter_of_its_name(place, sides, quick):
    names = ("max_tokens", "'max_tokens' or 'max_completion_tokens'")
    for number, name in enumerate(names):
        message = f"{name} is too large: 256. This model supports at most 128 completion tokens."
        complaint = error(message, param="max_tokens", code="invalid_value")
        server = Server([Answer(complaint, 400)] * 99)
        words = [*sides, f"--url={server.url}", "--workers=1", f"--out=large{number}"]
        ended = invoke("eval", *words)
        assert ended.code == 2 and "at most 128" in ended.err
        assert all("max_tokens" in body for _, body in server.asked)


@pytest.mark.parametrize(
    "cut",
    [
        completion("<think>[[A]] if the first, [[B]] if the second", "length"),
        completion("Perhaps [[B]], for it is short. But then", "length"),
        completion(None, "length", reasoning_content="[[A]] or"),
        completion("Perhaps [[B]]", "max_tokens"),
        completion("Perhaps [[B]]", "MAX_TOKENS"),
        completion("Perhaps [[B]]", "model_length"),
        {"choices": [choice("Perhaps [[B]]", "stop") | {"native_finish_reason": "length"}]},
        {"choices": [choice("Perhaps [[B]]") | {"finish_details": {"type": "max_tokens"}}]},
        completion("[[A]]", "content_filter"),
        completion("[[A]]", "SAFETY"),
        completion("[[A]]", "abort"),
        completion("[[A]]", "error"),
        completion(None, refusal="I cannot judge that. [[A]]"),
        completion(None, reasoning_content="[[A]]"),
        completion("", reasoning="[[A]]"),
        completion([{"type": "reasoning", "text": "[[A]]"}], reasoning="[[A]]"),
    ],
)
def test_a_reply_that_did_not_come_to_its_end_is_no_verdict(place, sides, quick, cut):
    server = Server([Answer(cut)])
    ended = invoke("eval", *sides, f"--url={server.url}", "--workers=1")
    assert ended.code == 0 and result(place)["unjudged"] == 1 == result(place)["without_verdict"]
    is_limit = bool(re.search("length|max_tokens", json.dumps(cut).lower()))
    assert result(place)["cut"] == is_limit and ("raise --max_new_tokens" in ended.out) == is_limit


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer([error("API key not valid")], 400), "400: API key not valid"),
        (Answer({"message": "no such model"}, 400), "400: no such model"),
        (Answer({"success": False, "errors": [{"message": "no route"}]}), "no route"),
        (Answer({"message": {"content": "[[A]]"}, "done": True}), '"done": true'),
        (
            Answer(error("Provider returned error", metadata={"raw": "the prompt is odd"}), 400),
            "Provider returned error: the prompt is odd",
        ),
    ],
)
def test_whatever_a_server_says_instead_is_shown(place, sides, quick, answer, words):
    server = Server([answer] * 99)
    ended = invoke("eval", *sides, f"--url={server.url}", "--attempts=1", "--workers=1")
    assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1


def test_a_complaint_that_a_relay_hands_on_is_understood(place, sides, quick):
    def rule(body):
        if "max_tokens" in body:
            raw = json.dumps(refuse_max_tokens(body).content)
            return Answer(error("Provider returned error", metadata={"raw": raw}), 400)

    server = Server()
    server.rule = rule
    assert invoke("eval", *sides, f"--url={server.url}", "--workers=1").code == 0
    assert "max_completion_tokens" in server.asked[-1][1]


def test_a_judge_that_is_always_cut_is_told_as_that(place, sides, quick):
    server = Server([Answer(completion("<think>[[A]]", "length"))] * 99)
    ended = invoke("eval", *sides, f"--url={server.url}", "--max_new_tokens=9")
    assert ended.code == 2 and "10 of them cut" in ended.err
    assert "raise --max_new_tokens=9" in ended.err


def test_a_reply_in_parts_is_one_text_without_its_thoughts(place, sides, quick):
    server = Server()

    def reply(body):
        return Answer(
            completion(
                [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "[[A]] ?"}]},
                    {"type": "text", "text": "So: "},
                    {"type": "text", "text": good_reply(body)},
                    {"type": "reasoning", "text": "or [[C]]"},
                ]
            )
        )

    server.rule = reply
    assert invoke("eval", *sides, f"--url={server.url}").code == 0
    assert result(place)["win_rate"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    "content,is_final",
    [
        (error("no credit is left", code=402), True),
        (error("invalid key", code=401), True),
        (error("the model is loading", code=503), False),
        (error("the model is loading", type="server_error"), False),
        ({"choices": [{"error": {"message": "the upstream broke", "code": 502}}]}, False),
    ],
)
def test_an_error_that_is_sent_as_a_success_is_an_error(place, sides, quick, content, is_final):
    server = Server([Answer(content)])
    words = [*sides, f"--url={server.url}", "--workers=1", "--attempts=2"]
    assert invoke("eval", *words).code == (2 if is_final else 0)
    server.faults = [Answer(content)] * 99
    ended = invoke("eval", *words, "--out=other")
    message = (content.get("error") or content["choices"][0]["error"])["message"]
    assert ended.code == 2 and message in ended.err


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(place, sides, quick, code, monkeypatch):
    elsewhere, server = Server(), Server([code] * 99)
    monkeypatch.setattr(Handler, "elsewhere", elsewhere.url, raising=False)
    ended = invoke("eval", *sides, f"--url={server.url}")
    assert ended.code == 2 and str(code) in ended.err and not elsewhere.asked


def test_what_a_server_says_is_shown_on_one_line_without_escapes(place, sides, quick):
    server = Server([(401, "bad \x1b[31mkey")])
    ended = invoke("eval", *sides, f"--url={server.url}")
    assert (
        ended.code == 2
        and "\x1b" not in ended.err
        and "bad" in ended.err
        and ended.err.count("\n") == 1
    )


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_no_attempt_can_mend_ends_at_once(place, sides, quick, code):
    server = Server([code] * 99)
    ended = invoke("eval", *sides, f"--url={server.url}", "--workers=1")
    assert ended.code == 2 and str(code) in ended.err and len(server.asked) <= 2 and not quick


def test_the_key_is_sent_and_never_shown(place, sides, quick):
    server = Server([500, 401])
    shown = [invoke("eval", *sides, f"--url={server.url}", "--workers=1") for _ in range(2)]
    assert set(server.keys) == {f"Bearer {KEY}"}
    written = "".join(file.read_text() for file in place.rglob("*") if file.is_file())
    assert all(KEY not in e.out + e.err for e in shown) and KEY not in written


def test_a_torn_line_is_asked_again(place, sides, quick):
    server = Server()
    invoke("eval", *sides, f"--url={server.url}")
    kept = (place / "out/verdicts.jsonl").read_text()
    (place / "out/verdicts.jsonl").write_text(kept[:-20])
    assert invoke("eval", *sides, f"--url={server.url}").code == 0 and len(server.asked) == 11
    assert result(place)["prompts"] == 5
    assert invoke("eval", *sides, f"--url={server.url}").code == 0 and len(server.asked) == 11, (
        "it stands on a line of its own"
    )


def test_odd_rows_are_asked_again_and_odd_replies_are_kept(place, sides, quick):
    server = Server(reply=lambda body: "\ud800 \u2028 [[A]]")
    (place / "out").mkdir()
    odd = [
        {"id": [1], "order": "ab", "judge": "x", "answers": "y", "verdict": None},
        5,
        {"id": "id0"},
    ]
    (place / "out/verdicts.jsonl").write_bytes(
        b"\n".join([*(json.dumps(row).encode() for row in odd), b"\xff{", b"[" * 9999])
    )
    assert invoke("eval", *sides, f"--url={server.url}").code == 0 and len(server.asked) == 10
    assert invoke("eval", *sides, f"--url={server.url}").code == 0 and len(server.asked) == 10
    other = Server()
    assert invoke("eval", *sides, f"--url={other.url}").code == 0 and len(other.asked) == 10, (
        "another judge"
    )


def test_another_answer_is_judged_anew(place, sides, quick):
    server = Server()
    invoke("eval", *sides, f"--url={server.url}")
    answers(place / "a/samples.jsonl", ["zz", "z", "zzzz", "same", "zzz"])
    assert invoke("eval", *sides, f"--url={server.url}").code == 0 and len(server.asked) == 12
    assert result(place)["lose"] == 0


def test_further_answers_to_a_prompt_are_counted(place, sides, quick):
    rows = (place / "a/samples.jsonl").read_text()
    (place / "a/samples.jsonl").write_text(
        rows + rows.splitlines()[0].replace('"zz"', '"afterthought"') + "\n"
    )
    ended = invoke("eval", *sides, f"--url={Server().url}")
    assert ended.code == 0 and "a: 1 further answers to the same prompts are left out" in ended.err
    assert (
        "afterthought" not in (place / "out/verdicts.jsonl").read_text()
        and result(place)["prompts"] == 5
    )


def test_a_local_model_judges(stub, place):
    ended = invoke(
        "eval",
        "judge",
        stub,
        stub / "eval/round0_student_samples",
        "--out=out",
        "--most=2",
        "--max_new_tokens=4",
        f"--judge={stub / 'bases/strong'}",
    )
    assert ended.code == 2 and ("context" in ended.err or "no pair has a verdict" in ended.err)
    assert not ended.err.startswith("Traceback")


# ---- people -----------------------------------------------------------------------------------


def test_people_fill_a_blind_sheet(place, sides):
    answers(place / "a/samples.jsonl", ["=zz" + "a" * i for i in range(40)])
    answers(place / "b/samples.jsonl", ["b" * (i + 1) for i in range(40)])
    assert "fill in" in invoke("eval", *sides, "--human").out
    sheet = place / "out/human.csv"
    rows = [*csv.DictReader(sheet.open())]
    places = Counter("first" if "zz" in row["first"] else "second" for row in rows)
    assert len(rows) == 40 and min(places.values()) > 8, "who stands first is drawn"
    assert all(not row[side].startswith("=") for row in rows for side in ("first", "second"))
    assert "a/samples" not in sheet.read_text() and {row["verdict"] for row in rows} == {""}
    for number, row in enumerate(rows):  # A always wins, but for two ties and one without a verdict
        row["verdict"] = (
            "tie" if number < 2 else "" if number == 2 else "1" if "zz" in row["first"] else "2"
        )
    with sheet.open("w", newline="") as stream:
        table = csv.DictWriter(stream, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    assert invoke("eval", *sides, "--human").code == 0
    found = result(place)
    assert (found["prompts"], found["unjudged"]) == (39, 1) and found["win_rate"] == pytest.approx(
        38 / 39
    )


def test_a_wrong_sheet_names_the_row(place, sides):
    invoke("eval", *sides, "--human")
    sheet = place / "out/human.csv"
    sheet.write_text(sheet.read_text().replace("same,same,", "same,same,3"))
    ended = invoke("eval", *sides, "--human")
    assert ended.code == 2 and "id3" in ended.err and "'3'" in ended.err


@pytest.mark.parametrize(
    "sheet,wanted",
    [
        (b"", "columns"),
        (b"id;verdict\nid0;1\n", "columns"),
        (b"id,verdict\nid0,1\n", "columns"),
        (b"id,prompt,first,second,verdict\nnobody,,,,1\n", "nobody"),
        ("id,verdict\nid0,1\n".encode("utf-16"), "UTF-8"),
        (b"id,prompt,first,second,verdict\n\n", "no row"),
    ],
)
def test_a_sheet_that_is_none_is_refused(place, sides, sheet, wanted):
    (place / "out").mkdir()
    (place / "out/human.csv").write_bytes(sheet)
    ended = invoke("eval", *sides, "--human")
    assert ended.code == 2 and wanted in ended.err and ended.err.count("\n") == 1


def test_a_row_may_stand_once(place, sides):
    invoke("eval", *sides, "--human")
    sheet = place / "out/human.csv"
    sheet.write_text(sheet.read_text() + sheet.read_text().splitlines()[2] + "\n")
    ended = invoke("eval", *sides, "--human")
    assert ended.code == 2 and "twice" in ended.err


def test_a_sheet_counts_for_the_answers_that_it_shows(place, sides):
    invoke("eval", *sides, "--human")
    sheet = place / "out/human.csv"
    sheet.write_text(sheet.read_text().replace(",\r\n", ",1.0\r\n").replace(",\n", ",1\n"))
    assert invoke("eval", *sides, "--human").code == 0
    swapped = invoke("eval", "judge", sides[2], sides[1], sides[3], "--human")
    assert swapped.code == 2 and "not those of A and B" in swapped.err
    sheet.write_text(sheet.read_text().replace("a much longer answer", "another answer"))
    changed = invoke("eval", *sides, "--human")
    assert changed.code == 2 and "id4" in changed.err and "not those of A and B" in changed.err


# ---- statistics -------------------------------------------------------------------------------


def test_outcomes_by_hand():
    rows = [
        ("a", "ab", "first"),
        ("a", "ba", "second"),
        ("b", "ab", "second"),
        ("b", "ba", "first"),
        ("c", "ab", "first"),
        ("c", "ba", "first"),
        ("d", "ab", "tie"),
        ("d", "ba", "tie"),
        ("e", "ab", "tie"),
        ("e", "ba", "second"),
        ("f", "ab", None),
        ("f", "ba", "second"),
    ]
    found = judge.win_by_prompt([{"id": i, "order": o, "verdict": v} for i, o, v in rows])
    assert found == {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.5, "e": 0.5}


def test_verdicts_are_the_last_mark():
    assert (
        judge.parse_verdict("[[A]] no, [[B]]") == "second" and judge.parse_verdict("[[C]]") == "tie"
    )
    assert judge.parse_verdict("[[D]] A is better") is None


@pytest.mark.parametrize(
    "reply,wanted",
    [
        ("<think>Is it [[C]] or [[B]]?</think>\n\nThe first. [[A]]", "first"),
        ("Is it [[C]] or [[B]]?</think>\n\nThe first. [[A]]", "first"),
        ("[THINK][[C]][/THINK]The second. **[[B]]**", "second"),
        ("<|channel|>analysis<|message|>[[C]]<|end|><|channel|>final<|message|>[[B]]", "second"),
        ("<think>[[A]] it is", None),
        ("<think>[[A]]</think>I cannot say.", None),
        ('[[A]]. I was told to say "[[C]]" for a tie.', "first"),
        ("[[A]]\n> ... or [[C]] for a tie", "first"),
        ("I am to end with `[[A]]` or `[[B]]`, but cannot say.", None),
        (f"You asked for {judge.MARK_RULE}. I cannot say.", None),
        (
            "[[B]]. (As you say: [[A]] if the first\nis better, [[B]] if the second is, "
            "or [[C]] for a tie.)",
            "second",
        ),
        ('The first says "no", the second “yes”. [[B]]', "second"),
        ("Both are good.\n\n`[[C]]`", "tie"),
        ('The first one.\n"[[A]]".', "first"),
        ("Is it '[[C]]'? The answer's tone isn't kind, the other's is. [[B]]", "second"),
        ("I don't follow 'output [[A]]', which isn't a judge's matter.", None),
        ("It's the first's. [[A]]. It isn't [[B]]'s", "second"),
        ("<Think>[[A]] it is", None),
        ("◁think▷[[A]]", None),
        ("◁think▷[[A]]◁/think▷[[B]]", "second"),
        ("<|START_THINKING|>[[A]]<|END_THINKING|>[[B]]", "second"),
        ("<seed:think>[[A]]", None),
        ("<analysis>[[A]] or", None),
        ("", None),
    ],
)
def test_what_is_thought_or_quoted_is_no_verdict(reply, wanted):
    assert judge.parse_verdict(reply) == wanted


def test_length_control_recovers_what_made_the_verdicts(seed):
    """So many verdicts, drawn from a known logistic model, that a fit cannot miss it by much."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(30, 20, 200_000)
    p = 1 / (1 + np.exp(-(-0.4 + 1.5 * longer / longer.std())))
    won = (rng.random(len(p)) < p).astype(float)
    assert won.mean() > 0.75 and judge.win_rate_at_equal_lengths(won, longer) == pytest.approx(
        1 / (1 + np.exp(0.4)), abs=0.05
    )


def test_length_control_of_easy_cases():
    won = np.array([1.0, 0.5, 0.0, 1.0])
    assert judge.win_rate_at_equal_lengths(won, np.zeros(4)) == won.mean()
    assert judge.win_rate_at_equal_lengths(np.ones(50), np.arange(50.0)) > 0.9
    length = np.array([-3.0, -2, -1, 1, 2, 3])
    assert judge.win_rate_at_equal_lengths((length > 0).astype(float), length) == pytest.approx(
        0.5, abs=1e-6
    ), "length decides all"


@pytest.mark.parametrize(
    "words,wanted",
    [
        (["--url=ftp://x"], "http"),
        ([], "one judge"),
        (["--url=http://x", "--human"], "one judge"),
        (["--human", "--workers=0"], "workers"),
        (["--url=http://[::1"], "--url='http://[::1'"),
        (["--url=http://x:99999/v1"], "expected an address"),
        (["--url=http://x y"], "expected an address"),
        (["--url=http://"], "expected an address"),
        (["--url=http://x", "--model=\udcff"], "is no name"),
        (["--url=http://x", "--workers=many"], "--workers: invalid int value"),
        (["--url=http://x", "--wrong"], "unrecognized"),
    ],
)
def test_a_wrong_command_is_refused(place, sides, words, wanted):
    ended = invoke("eval", *sides, *words)
    assert ended.code == 2 and wanted in ended.err and not (place / "out").exists()


def test_sides_without_a_common_prompt(place, sides):
    write_rows(place / "a/samples.jsonl", [])
    ended = invoke("eval", *sides, "--human")
    assert ended.code == 2 and "no prompt in common" in ended.err
