"""What a person sees while a stage runs, and how a person stops it.

On a terminal a tqdm bar with rate and time left; elsewhere a plain line every ten seconds. Ctrl-C
and SIGTERM only raise a flag, which long loops look at between two steps, after saving.
"""

import signal
import sys
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


class Progress(tqdm):
    """A bar for one stage on a terminal; elsewhere a plain line every PLAIN_EVERY seconds."""

    def __init__(self, label: str, total: int, unit: str, done: int, on_step: Callable[[], None] | None):
        self.on_step, self.plain = on_step, not sys.stderr.isatty()
        pace = {"mininterval": PLAIN_EVERY, "delay": PLAIN_EVERY, "ncols": 0} if self.plain else {"dynamic_ncols": True}
        super().__init__(total=total, desc=label, unit=unit, initial=done, leave=False, **pace)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar, or print it as a line of its own."""
        if not self.plain:
            super().display(msg, pos)
        elif msg != "":
            print(msg or self, file=sys.stderr, flush=True)

    def step(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.update(count)
        if self.on_step:
            self.on_step()
