"""What a person sees while a stage runs, and how a person stops it.

On a terminal a tqdm bar with rate and time left; elsewhere a plain line every ten seconds. Ctrl-C
and SIGTERM only raise a flag, which long loops look at between two steps, after saving.
"""

import signal
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal


class Interrupted(Exception):
    """A signal asked the run to stop; everything needed to go on has been saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Remembers the first SIGINT or SIGTERM; a second one acts at once."""

    def __init__(self):
        self.number = None

    def install(self) -> None:
        """Take over both signals for the rest of the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if self.number is not None:
            raise Interrupted(number)
        self.number = number

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)


class Progress:
    """Counts the steps of one stage and shows them; a context manager."""

    def __init__(self, label: str, total: int, unit: str, done: int, on_step: Callable[[], None] | None):
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.first, self.started, self.shown = done, time.monotonic(), time.monotonic()
        self.on_step = on_step
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=label, unit=unit, initial=done, leave=False, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.done += count
        if self.on_step:
            self.on_step()
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.shown > PLAIN_EVERY:
            self.shown = time.monotonic()
            meter = tqdm.format_meter(
                self.done, self.total, self.shown - self.started, unit=self.unit, ncols=0,
                prefix=self.label, initial=self.first,
            )  # fmt: skip
            print(meter, file=sys.stderr, flush=True)
