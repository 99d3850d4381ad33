"""Many questions side by side, and no waiting for a thread when a program ends.

Whoever presses Ctrl-C leaves at once, whatever the other side of a connection does.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue


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


def ask_all(ask: Callable, jobs: Sequence[tuple], workers: int) -> Iterator[tuple]:
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
                    replies.put((key, None, error))
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
