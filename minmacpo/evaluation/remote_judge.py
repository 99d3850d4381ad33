"""Questions to a model behind an OpenAI-compatible URL: many side by side, and what can go wrong.

Nothing here waits for a thread: whoever presses Ctrl-C leaves at once, whatever a server does.
"""

import contextlib
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPException
from queue import SimpleQueue
from urllib.parse import urlsplit

from minmacpo import UserError
from minmacpo.runtime.progress import escape_control_chars

API_KEY = "OPENAI_API_KEY"  # the environment variable that holds the key

# HTTP codes that are about one question, such as one that is too long: its reply has no verdict
QUESTION_REFUSED = (400, 413, 422)

MAX_REPLY_BYTES = 1 << 24
SECRET_LENGTH = 8  # a shorter key is no secret, but a local server's dummy
SHOWN_WORDS = 200  # characters of a server's words

Ask = Callable[[str], str]  # from a question to the reply


@dataclass(frozen=True, slots=True)
class Server:
    """A model behind a URL, and how it is asked."""

    url: str
    model: str
    max_new_tokens: int
    timeout: float  # seconds a reply may take
    attempts: int

    @property
    def address(self) -> str:
        """Where chat completions are asked for."""
        return self.url.rstrip("/") + "/chat/completions"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key elsewhere."""

    def redirect_request(self, *about) -> None:
        return None


OPENER = urllib.request.build_opener(NoRedirect)


class AttemptFailed(Exception):
    """An attempt brought no reply, and another one may.

    `pause` is how many seconds the server asks to wait, if it says so.
    """

    def __init__(self, problem: str, pause: float | None = None):
        super().__init__(problem)
        self.pause = pause


def hide_key(text: str) -> str:
    """A server's words without the key, which it may send back."""
    key = os.environ.get(API_KEY, "")
    return text.replace(key, f"${API_KEY}") if len(key) >= SECRET_LENGTH else text


def on_one_line(text: str) -> str:
    """A server's words on one line, without what would act on a terminal."""
    return " ".join(escape_control_chars(hide_key(text)).split())[:SHOWN_WORDS]


def check_request(url: str, model: str) -> None:
    """UserError for an address, a model's name or a key that no request can be made of."""
    if re.search("[@?#]", url):
        raise UserError(
            "--url holds @, ? or #: a password or key there would be kept with the verdicts; "
            f"put it in ${API_KEY}"
        )
    if not is_address(url):
        raise UserError(f"--url={url!a}: expected an address such as http://localhost:8000/v1")
    if not model.isprintable():  # a byte that is no UTF-8 has come as a surrogate
        raise UserError(f"--model={model!a}: is no name of a model")
    if not re.fullmatch("[!-~]*", os.environ.get(API_KEY, "")):
        raise UserError(
            f"${API_KEY} holds a space, a line break or another character that no key has"
        )


def is_address(url: str) -> bool:
    """Whether a request can be made of it."""
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port or an IPv6 address
        return False
    is_plain = re.fullmatch("[!-~]+", url) is not None
    return parts.scheme in ("http", "https") and has_host and is_plain


# ---- one question -----------------------------------------------------------------------------


def over_http(server: Server) -> Ask:
    """Asks a server for chat completions, greedily.

    What may pass (429, 5xx, a broken reply, a hang, a lost connection) is tried again after 1, 2,
    4 ... seconds, or what Retry-After says, at most the timeout. The function returned raises
    UserError when the attempts are spent, and at once for what no attempt can mend, such as a wrong
    key or an unknown model.
    """

    def ask(question: str) -> str:
        """The reply to one question."""
        problem = ""
        for attempt in range(server.attempts):
            try:
                return ask_once(server, question)
            except AttemptFailed as failure:
                problem = str(failure)
                pause = 2.0**attempt if failure.pause is None else failure.pause
            is_last = attempt + 1 == server.attempts
            if not is_last:
                time.sleep(min(pause, server.timeout))
        plural = "s" if server.attempts > 1 else ""
        raise UserError(
            f"{server.address}: no verdict after {server.attempts} attempt{plural} "
            f"({on_one_line(problem)}); what was judged is kept"
        )

    return ask


def ask_once(server: Server, question: str) -> str:
    """The reply of one attempt.

    Raises:
        AttemptFailed: another attempt may succeed.
        UserError: none will.
    """
    request = make_request(server, question)
    try:
        body = call_within(server.timeout, lambda: fetch(request, server.timeout))
        reply = json.loads(body)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return refusal_or_raise(server, error)
    except (OSError, HTTPException) as error:
        problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise AttemptFailed(problem) from None
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise AttemptFailed("the reply is no chat completion") from None
    if not isinstance(reply, str):
        raise AttemptFailed("the reply holds no text")
    return hide_key(reply)


def make_request(server: Server, question: str) -> urllib.request.Request:
    """The request for one chat completion."""
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(API_KEY)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": server.max_new_tokens,
    }
    return urllib.request.Request(server.address, json.dumps(body).encode(), headers)


def refusal_or_raise(server: Server, error: urllib.error.HTTPError) -> str:
    """What stands for the reply to a question that a server refused; raises for other errors."""
    if error.code in QUESTION_REFUSED:
        return f"{error.code}: {hide_key(error.reason)}"
    if error.code != 429 and error.code < 500:
        raise UserError(
            f"{server.address}: answers {error.code} ({on_one_line(error.reason)}); "
            f"see --url, --model and ${API_KEY}"
        ) from None
    wait = error.headers.get("Retry-After", "")
    pause = float(wait) if re.fullmatch(r"[0-9]{1,9}", wait) else None
    raise AttemptFailed(f"it answers {error.code}", pause) from None


def fetch(request: urllib.request.Request, seconds: float, most: int = MAX_REPLY_BYTES) -> bytes:
    """The body of the reply; OSError if it is too long, or pauses for so many seconds."""
    with OPENER.open(request, timeout=seconds) as answer:
        body = answer.read(most + 1)
    if len(body) > most:
        raise OSError("the reply is endless")
    return body


# ---- many questions side by side --------------------------------------------------------------


def call_in_thread(function: Callable[[], object]) -> Future:
    """Calls a function in a thread that nobody waits for when the program ends."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def call_within(seconds: float, function: Callable[[], object]):
    """What a function returns; OSError if that takes longer, as a reply byte by byte does."""
    try:
        return call_in_thread(function).result(seconds)
    except TimeoutError:
        raise OSError("timed out") from None


def ask_all(ask: Ask, jobs: Sequence[tuple], workers: int) -> Iterator[tuple]:
    """(key, reply) of all jobs, which are (key, question), as the replies come.

    The first error ends the asking; so does whoever stops listening.

    Args:
        workers: how many questions are asked side by side; 0: one after the other, in this thread.
    """
    if not workers:
        for key, question in jobs:
            yield key, ask(question)
        return

    waiting = deque(jobs)
    replies = SimpleQueue()

    def work() -> None:
        """Ask what is waiting, until nothing is, or a question fails."""
        with contextlib.suppress(IndexError):  # nothing is waiting
            while True:
                key, question = waiting.popleft()
                try:
                    replies.put((key, ask(question), None))
                except Exception as error:
                    replies.put((key, "", error))
                    return

    for _ in range(workers):
        call_in_thread(work)
    try:
        for _ in jobs:
            key, reply, error = replies.get()
            if error:
                raise error
            yield key, reply
    finally:
        waiting.clear()
