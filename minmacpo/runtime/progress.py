"""What a person sees while a program runs, how a person stops it, and how it ends.

On a terminal a tqdm bar with rate and time left; elsewhere a plain line every ten seconds. Ctrl-C,
SIGTERM and SIGHUP only raise a flag, which long loops look at between two steps, after saving.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm

from minmacpo import UserError


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns with two spaces between them: the first one starts, the others end at one place."""
    first, *widths = (max(map(len, column)) for column in zip(head, *rows, strict=True))
    lines = (
        "  ".join([f"{name:{first}}", *map(str.rjust, cells, widths)])
        for name, *cells in [head, *rows]
    )
    return "\n".join(map(str.rstrip, lines))


def gigabytes(size: int) -> str:
    """Bytes: 12 MB, 3.45 GB."""
    return f"{size / 2**30:.2f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB"


def thousands(count: float) -> str:
    """A count in three digits: 12, 3.4k, 56M."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5 or unit == "G":
            return f"{count:.3g}{unit}"
        count /= 1000


RESUMES = "all finished work is saved. The same command line goes on from here."


# Control characters but line break and tab, marks that turn the direction of text or end its line, half surrogate pairs.
ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal


class Interrupted(Exception):
    """A signal asked the run to stop; everything needed to go on has been saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Remembers the first SIGINT, SIGTERM or SIGHUP; a second one acts at once."""

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    number: int | None = None

    def install(self) -> None:
        """Take over these signals for the rest of the process."""
        for number in self.numbers:
            if (
                number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
            ):  # nohup ignores it
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

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        done: int,
        on_step: Callable[[], None] | None,
        shown: bool = True,
    ):
        self.on_step, self.plain = on_step, not sys.stderr.isatty()
        plain = {"mininterval": PLAIN_EVERY, "delay": PLAIN_EVERY, "ncols": 0}
        train_args = plain if self.plain else {"dynamic_ncols": True}
        super().__init__(
            total=total,
            desc=escape_control_chars(label),
            unit=unit,
            initial=done,
            leave=False,
            disable=not shown,
            **train_args,
        )

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


def escape_control_chars(text: str) -> str:
    """Text as a terminal or a page may show it: what would act on the terminal, or on the text around it, stands there
    as its escape."""
    return ACTIVE.sub(lambda found: ascii(found[0])[1:-1], text)


def short_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is short: Python's error, torch's of a GPU, or that of an allocator of a CPU."""
    named = (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    )  # torch's, which is not loaded here
    return named or "can't allocate memory" in str(error) or "bad_alloc" in str(error)


def run_main(main: Callable[[list[str]], int | None], after_stop: str = RESUMES) -> int:
    """Run `main` on the command line; returns the exit code, 2 after one clear sentence, 130 after Ctrl-C;
    `after_stop` is what is true then."""
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()  # a reader that has gone is noticed here, not when Python exits
        return code
    except UserError as error:
        print(f"error: {escape_control_chars(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(
            escape_control_chars(f"error: {error.filename or 'a file'}: {error.strerror or error}"),
            file=sys.stderr,
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        if not short_of_memory(error):
            raise
        print(f"error: out of memory; {after_stop}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        for listening in (
            number for number in Signals.numbers if callable(signal.getsignal(number))
        ):
            signal.signal(
                listening, signal.SIG_DFL
            )  # one more would be raised where nobody catches it
        number = getattr(stopped, "number", 2)
        print(f"\nstopped; {after_stop}", file=sys.stderr)
        return 128 + number
