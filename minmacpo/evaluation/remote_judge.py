"""Questions to a model behind an OpenAI-compatible URL, and what can go wrong with them."""

import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http.client import HTTPException
from urllib.parse import urlsplit

from minmacpo import UserError
from minmacpo.evaluation.asking import call_within
from minmacpo.runtime.progress import escape_control_chars

API_KEY = "OPENAI_API_KEY"  # the environment variable that holds the key

# HTTP codes that are about one question, such as one that is too long: its reply has no verdict
QUESTION_REFUSED = (400, 413, 422)

MAX_REPLY_BYTES = 1 << 24
SECRET_LENGTH = 8  # a shorter key is no secret, but a local server's dummy
SHOWN_WORDS = 200  # characters of a server's words


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge has said; `problem` says why it is no verdict, whatever it holds."""

    text: str
    problem: str = ""
    is_refused: bool = False  # the server has not taken the question


Ask = Callable[[str], Reply]

CUT = "cut at the limit of new tokens"  # the problem of a reply that --max_new_tokens has cut

# Why a reply has ended, as servers call it: by itself, at the limit, or by a filter
END_REASONS = ("", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete")
LIMIT_REASONS = (
    "length", "max_tokens", "max_output_tokens", "max_length", "model_length",
    "model_context_window_exceeded",
)  # fmt: skip
FILTER_REASONS = (
    "content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content",
    "guardrail_intervened", "sensitive",
)  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class RequestForm:
    """What a request names: some servers know no `max_tokens`, or take no temperature but 1."""

    limit_field: str = "max_tokens"
    temperature: float | None = 0.0  # None: it is left to the server

    def adapted(self, complaint: "Complaint") -> "RequestForm":
        """The form that a server asks for with its complaint; the same one if it is about else."""
        text = complaint.message.lower()
        if re.search(TOO_LARGE, text):
            return self  # whatever parameter it names
        about_limit = complaint.parameter == "max_tokens" or "max_tokens" in text
        unknown = "unsupported" in complaint.code or re.search(UNKNOWN_PARAMETER, text)
        if "max_completion_tokens" in text or (about_limit and unknown):
            return replace(self, limit_field="max_completion_tokens")
        if complaint.parameter == "temperature" or "temperature" in text:
            # greedy first, then what the server does by itself, then what all servers take
            return replace(self, temperature=None if self.temperature == 0 else 1.0)
        return self

    def __str__(self) -> str:
        if self.temperature is None:
            return f"{self.limit_field} and no temperature"
        return f"{self.limit_field} and temperature {self.temperature:g}"


# How servers say that a question or its answer does not fit, and that they lack a parameter
TOO_LARGE = "too large|too long|context length|context window|context size"
UNKNOWN_PARAMETER = "not support|unsupported|unknown|unrecognized|unexpected|not permitted|extra"


@dataclass(frozen=True, slots=True)
class Complaint:
    """What a server says of a request that it does not answer."""

    status: int
    message: str
    parameter: str = ""  # of the request that it is about, where the server names one
    code: str = ""

    def __str__(self) -> str:
        return on_one_line(f"{self.status}: {self.message}")


class RemoteJudge:
    """Asks a server for chat completions, greedily if it lets one; threads may share it.

    What may pass (429, 5xx, a broken reply, a hang, a lost connection) is tried again after 1, 2,
    4 ... seconds, or what Retry-After says, at most the timeout. A call raises UserError when the
    attempts are spent, and at once for what no attempt can mend, such as a wrong key or an unknown
    model.
    """

    def __init__(self, server: Server):
        self.server = server
        self.form = RequestForm()
        self.lock = threading.Lock()

    def __call__(self, question: str) -> Reply:
        """The reply to one question."""
        server = self.server
        problem = ""
        attempt = 0
        while attempt < server.attempts:
            form = self.form
            try:
                return self.ask_once(question, form)
            except WrongForm as refusal:
                self.adapt(form, refusal.complaint)
                continue  # another form is no further attempt: there are six of them
            except AttemptFailed as failure:
                problem = str(failure)
                pause = 2.0**attempt if failure.pause is None else failure.pause
            attempt += 1
            if attempt < server.attempts:
                time.sleep(min(pause, server.timeout))
        plural = "s" if server.attempts > 1 else ""
        raise UserError(
            f"{server.address}: no verdict after {server.attempts} attempt{plural} "
            f"({on_one_line(problem)}); what was judged is kept"
        )

    def adapt(self, form: RequestForm, complaint: Complaint) -> None:
        """Ask in another form from now on, and say so once."""
        with self.lock:
            if self.form != form:
                return  # another thread has been told the same
            self.form = form.adapted(complaint)
            print(
                f"{self.server.address}: asked with {self.form} from now on ({complaint})",
                file=sys.stderr,
            )

    def ask_once(self, question: str, form: RequestForm) -> Reply:
        """The reply of one attempt.

        Raises:
            WrongForm: the server wants another form of request.
            AttemptFailed: another attempt may succeed.
            UserError: none will.
        """
        server = self.server
        request = make_request(server, question, form)
        try:
            answer = call_within(server.timeout, lambda: fetch(request, server.timeout))
        except (OSError, HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
            raise AttemptFailed(problem) from None

        complaint = read_complaint(answer)
        if complaint is None:
            return read_reply(answer.body)
        if complaint.status in QUESTION_REFUSED:
            if form.adapted(complaint) != form:
                raise WrongForm(complaint)
            return Reply("", f"refused ({complaint})", is_refused=True)
        if complaint.status != 429 and complaint.status < 500:
            raise UserError(
                f"{server.address}: answers {complaint}; see --url, --model and ${API_KEY}"
            )
        raise AttemptFailed(f"it answers {complaint}", answer.retry_after)


class WrongForm(Exception):
    """A server takes a request only in another form."""

    def __init__(self, complaint: Complaint):
        super().__init__(str(complaint))
        self.complaint = complaint


def make_request(server: Server, question: str, form: RequestForm) -> urllib.request.Request:
    """The request for one chat completion."""
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(API_KEY)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    body = {"model": server.model, "messages": [{"role": "user", "content": question}]}
    if form.temperature is not None:
        body["temperature"] = form.temperature
    body[form.limit_field] = server.max_new_tokens
    return urllib.request.Request(server.address, json.dumps(body).encode(), headers)


# ---- what comes back --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """The answer to a request, whatever its status."""

    status: int
    reason: str
    body: bytes
    retry_after: float | None = None  # seconds


def fetch(
    request: urllib.request.Request, seconds: float, most: int = MAX_REPLY_BYTES
) -> HttpAnswer:
    """The answer to a request; OSError if it is too long, or pauses for so many seconds."""
    try:
        stream = OPENER.open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        stream = error
    with stream:
        body = stream.read(most + 1)
        if len(body) > most:
            raise OSError("the reply is endless")
        return HttpAnswer(stream.status, stream.reason, body, read_pause(stream.headers))


def read_pause(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait, if it says so."""
    text = headers.get("Retry-After", "")
    return float(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def read_json_object(body: bytes) -> dict:
    """The JSON object of a body, or the first of a list; an empty one if it is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if isinstance(content, list) and content:
        content = content[0]
    return content if isinstance(content, dict) else {}


def read_complaint(answer: HttpAnswer) -> Complaint | None:
    """What a server complains of; None for an answer that is no complaint.

    Servers say it in several ways, some of them with the status 200:
    {"error": {"message": "...", "param": "...", "code": 402}}, {"error": "..."},
    {"object": "error", "message": "...", "code": 400}, {"detail": "..."},
    {"choices": [{"error": {...}}]}, [{"error": {...}}]. A relay hands on what the server behind it
    says in {"error": {"metadata": {"raw": "..."}}}.
    """
    content = read_json_object(answer.body)
    error = content.get("error") or choice_error(content)
    if error is None and content.get("object") == "error":
        error = content
    is_error = answer.status >= 300
    if not error and not is_error:
        return None

    details = error if isinstance(error, dict) else {}
    message = details.get("message") or error or content.get("message") or content.get("detail")
    if not message:
        message = answer.reason or "without a reason"
    code = details.get("code") or details.get("type") or ""
    status = answer.status
    if not is_error:
        # an error sent as a success: its own number counts, and one without may pass
        has_number = type(code) is int and 300 <= code < 600
        status = code if has_number else 500
    if not isinstance(message, str):
        message = json.dumps(message)
    metadata = details.get("metadata")
    if isinstance(metadata, dict) and metadata.get("raw"):
        message = f"{message}: {metadata['raw']}"
    return Complaint(
        status=status,
        message=message,
        parameter=str(details.get("param") or ""),
        code=str(code),
    )


def choice_error(content: dict) -> object | None:
    """The error of the first choice, where one failed while it was written."""
    choice = first_choice(content)
    return choice.get("error") or None


def first_choice(content: dict) -> dict:
    """The first choice of a chat completion; an empty one if there is none."""
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return {}
    return choices[0]


def read_reply(body: bytes) -> Reply:
    """The reply of a chat completion; AttemptFailed if it is none.

    A reply that the limit has cut, or a filter, may quote a verdict on its way to another one.
    """
    choice = first_choice(read_json_object(body))
    message = choice.get("message")
    if not isinstance(message, dict):
        start = on_one_line(body[:SHOWN_WORDS].decode("utf-8", "replace"))
        raise AttemptFailed(f"the reply is no chat completion: {start}")
    text = message_text(message.get("content"))
    if isinstance(message.get("refusal"), str) and not text:
        return Reply(hide_key(message["refusal"]), "the model refuses to judge")
    problem = why_unfinished(choice)
    has_thoughts = any(message.get(key) for key in ("reasoning_content", "reasoning"))
    if not text and not problem and has_thoughts:
        problem = "thoughts without an answer behind them"
    if text is None and not problem:
        raise AttemptFailed("the reply holds no text")
    return Reply(hide_key(text or ""), problem)


def why_unfinished(choice: dict) -> str:
    """The problem of a reply that did not come to its end; empty if it did."""
    reasons = []
    for key in ("finish_reason", "native_finish_reason"):
        if isinstance(choice.get(key), str):
            reasons.append(choice[key].lower())
    details = choice.get("finish_details")
    if isinstance(details, dict):
        reasons.append(str(details.get("type")).lower())
    if any(reason in LIMIT_REASONS for reason in reasons):
        return CUT
    if any(reason in FILTER_REASONS for reason in reasons):
        return "cut by a filter of the server"
    if reasons and reasons[0] not in END_REASONS:
        return on_one_line(f"ended by the server ({reasons[0]})")
    return ""


def message_text(content: object) -> str | None:
    """The text of a message's content, which may be a list of parts; None if it has none.

    Parts of another type than text hold thoughts.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")
        text = part.get("text") if is_text else None
        if isinstance(text, str):
            texts.append(text)
    return "".join(texts) if texts else None
