"""What a person sees while a program runs, how a person stops it, and how it ends.

On a terminal a stage has a bar with rate and time left, elsewhere a plain line every ten seconds.
Ctrl-C, SIGTERM and SIGHUP only raise a flag, at which long loops look between two steps, after
saving.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm

from minmacpo import UserError

RESUMES = "all finished work is saved. The same command line goes on from here."
CLEAR_LINE = "\r\x1b[K"  # on a terminal
PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal

# Control characters but line break and tab, marks that turn the direction of text or end its line,
# half surrogate pairs
CONTROL_CHARS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


# --- Text


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in columns; the first is aligned to the left, the others to the right."""
    table = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *cells in table:
        parts = [first.ljust(widths[0])]
        for cell, width in zip(cells, widths[1:], strict=True):
            parts.append(cell.rjust(width))
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def gigabytes(size: int) -> str:
    """Bytes as text: 12 MB, 3.45 GB."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GB"
    return f"{size / 2**20:.0f} MB"


def thousands(count: float) -> str:
    """A count in three digits: 12, 3.4k, 56M."""
    for unit in ("", "k", "M"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}G"


def escape_control_chars(text: str) -> str:
    """Text as a terminal or a page may show it: characters that would act stand as escapes."""

    def escape(match: re.Match) -> str:
        return ascii(match[0])[1:-1]  # without its quotes

    return CONTROL_CHARS.sub(escape, text)


# --- Signals


class Interrupted(Exception):
    """A signal asked the run to stop; everything needed to go on has been saved."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


class Signals:
    """Remembers the first SIGINT, SIGTERM or SIGHUP; a second one acts at once."""

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.number: int | None = None

    def install(self) -> None:
        """Take over these signals for the rest of the process."""
        for number in self.numbers:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup has it ignored
            signal.signal(number, self.remember)

    def remember(self, number: int, frame) -> None:
        """The handler: note the first signal, act on the second."""
        if self.number is not None:
            raise Interrupted(number)
        self.number = number

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)


# --- The bar


class Progress(tqdm):
    """A bar for one stage on a terminal; elsewhere a plain line every PLAIN_EVERY seconds.

    `position` is the line, counted from the cursor's, that the bars of this process have.
    """

    position: int | None = None

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        done: int,
        on_step: Callable[[], None] | None,
        shown: bool = True,
    ):
        """Args:
        done: how many of `total` units are finished already.
        on_step: called after every step, for the profiler.
        """
        self.on_step = on_step
        self.plain = not sys.stderr.isatty()
        options = {"dynamic_ncols": True, "position": Progress.position}
        if self.plain:
            options = {"mininterval": PLAIN_EVERY, "delay": PLAIN_EVERY, "ncols": 0}
        super().__init__(
            total=total,
            desc=escape_control_chars(label),
            unit=unit,
            initial=done,
            leave=False,
            disable=not shown,
            **options,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar, or print it as a line of its own."""
        if not self.plain:
            super().display(msg, pos)
        elif msg != "":  # tqdm clears its bar with an empty text
            print(msg or self, file=sys.stderr, flush=True)

    def step(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.update(count)
        if self.on_step:
            self.on_step()


# --- How a program ends


def short_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, as Python, torch or a CPU's allocator say it."""
    if isinstance(error, MemoryError):
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch is not imported here
        return True
    return "can't allocate memory" in str(error) or "bad_alloc" in str(error)


def run_main(main: Callable[[list[str]], int | None], after_stop: str = RESUMES) -> int:
    """Run a program's `main` on the command line and return its exit code.

    The code is 2 after one clear sentence on stderr, 130 after Ctrl-C.

    Args:
        after_stop: what is true when the program was stopped.
    """
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()  # a reader that has gone is noticed here, not when Python exits
        return code
    except UserError as error:
        return complain(str(error))
    except BrokenPipeError:
        # Python would complain once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return complain(f"{error.filename or 'a file'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not short_of_memory(error):
            raise
        return complain(f"out of memory; {after_stop}")
    except (Interrupted, KeyboardInterrupt) as error:
        restore_signals()
        print(f"\nstopped; {after_stop}", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)


def complain(sentence: str) -> int:
    """Print an error; returns the exit code for it."""
    print(f"error: {escape_control_chars(sentence)}", file=sys.stderr)
    return 2


def restore_signals() -> None:
    """Let signals act as usual: one more would be raised where nobody catches it."""
    for number in Signals.numbers:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
