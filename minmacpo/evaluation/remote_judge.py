"""A model behind an OpenAI-compatible URL: how it is asked, many questions side by side, and what can go wrong.

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
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from http.client import HTTPException
from queue import SimpleQueue
from urllib.parse import urlsplit

from minmacpo import UserError
from minmacpo.runtime.progress import escape_control_chars

KEY = "OPENAI_API_KEY"  # the environment variable that holds the key


UNASKED = (400, 413, 422)  # answers about one question, such as one that is too long


Ask = Callable[[str], str]  # from a question to the reply


class Stay(urllib.request.HTTPRedirectHandler):
    """No redirect is followed: it would take the key elsewhere."""

    def redirect_request(self, *about) -> None:
        return None


OPENER = urllib.request.build_opener(Stay)


def hidden(text: str) -> str:
    """A server's words without the key, which it may send back; a shorter one is no secret, but a local server's dummy."""
    key = os.environ.get(KEY, "")
    return text.replace(key, f"${KEY}") if len(key) >= 8 else text


def plain(text: str) -> str:
    """A server's words on one line, without what would act on a terminal."""
    return " ".join(escape_control_chars(hidden(text)).split())[:200]


def check_request(url: str, model: str) -> None:
    """UserError for an address, a model's name or a key that no request can be made of."""
    if re.search("[@?#]", url):
        raise UserError(
            f"--url holds @, ? or #: a password or key there would be kept with the verdicts; put it in ${KEY}"
        )
    try:
        parts = urlsplit(url)
        sound = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and re.fullmatch("[!-~]+", url)
        )
    except ValueError:  # of a port or an IPv6 address
        sound = False
    if not sound:
        raise UserError(f"--url={url!a}: expected an address such as http://localhost:8000/v1")
    if not model.isprintable():  # a byte that is no UTF-8 has come as a surrogate
        raise UserError(f"--model={model!a}: is no name of a model")
    if not re.fullmatch("[!-~]*", os.environ.get(KEY, "")):
        raise UserError(f"${KEY} holds a space, a line break or another character that no key has")


def over_http(words: Namespace) -> Ask:
    """Asks a chat completion of `words.url` (model, max_new_tokens, timeout in seconds, attempts). 429, 5xx, a broken reply, a
    hang or a lost connection is tried again after 1, 2, 4 … seconds or what Retry-After says (at most --timeout); the reply raises UserError
    when the attempts are spent, and at once for what no attempt can mend (a wrong key, an unknown model)."""
    url, key = words.url.rstrip("/") + "/chat/completions", os.environ.get(KEY)
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )

    def ask(question: str) -> str:
        """The reply to one question."""
        body = {
            "model": words.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": words.max_new_tokens,
        }
        problem = ""
        for attempt in range(words.attempts):
            pause = float(2**attempt)
            try:
                request = urllib.request.Request(url, json.dumps(body).encode(), headers)
                answer = within(
                    words.timeout, lambda request=request: fetch(request, words.timeout)
                )
                reply = json.loads(answer)["choices"][0]["message"]["content"]
                if isinstance(reply, str):
                    return hidden(reply)
                problem = "the reply holds no text"
            except urllib.error.HTTPError as error:
                if error.code in UNASKED:
                    return f"{error.code}: {hidden(error.reason)}"  # a reply without a verdict
                if error.code != 429 and error.code < 500:
                    raise UserError(
                        f"{url}: answers {error.code} ({plain(error.reason)}); see --url, --model and ${KEY}"
                    ) from None
                problem, wait = f"it answers {error.code}", error.headers.get("Retry-After", "")
                pause = float(wait) if re.fullmatch(r"[0-9]{1,9}", wait) else pause
            except (OSError, HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError, RecursionError):
                problem = "the reply is no chat completion"
            if attempt + 1 < words.attempts:
                time.sleep(min(pause, words.timeout))
        raise UserError(
            f"{url}: no verdict after {words.attempts} attempt{'s' * (words.attempts > 1)} ({plain(problem)}); what was judged is kept"
        )

    return ask


def fetch(request: urllib.request.Request, seconds: float, most: int = 1 << 24) -> bytes:
    """The body of the reply; OSError if it is longer than `most` bytes, or pauses for so many seconds."""
    with OPENER.open(request, timeout=seconds) as answer:
        body = answer.read(most + 1)
    if len(body) > most:
        raise OSError("the reply is endless")
    return body


def apart(call: Callable[[], object]) -> Future:
    """`call` in a thread of its own, which nobody waits for when the program ends."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], object]):
    """What `call` returns; OSError if that takes longer, as a reply does that comes byte by byte."""
    try:
        return apart(call).result(seconds)
    except TimeoutError:
        raise OSError("timed out") from None


def asked(ask: Ask, jobs: Sequence[tuple], workers: int) -> Iterator[tuple]:
    """(key, reply) of jobs (key, question), as they come; without workers one after the other. The first error ends
    it; who stops listening ends the asking."""
    if not workers:
        yield from ((key, ask(question)) for key, question in jobs)
        return
    left, done = deque(jobs), SimpleQueue()

    def work() -> None:
        """Ask what is left, until nothing is, or a question fails."""
        with contextlib.suppress(IndexError):  # none is left
            while True:
                key, question = left.popleft()
                try:
                    done.put((key, ask(question), None))
                except Exception as error:
                    done.put((key, "", error))
                    return

    for _ in range(workers):
        apart(work)
    try:
        for _ in jobs:
            key, reply, error = done.get()
            if error:
                raise error
            yield key, reply
    finally:
        left.clear()
