"""How the three programs end: one clear sentence and exit code 2, or 130 after Ctrl-C."""

import os
import sys
from collections.abc import Callable

from minmacpo import UserError
from minmacpo.progress import Interrupted


def call(main: Callable[[list[str]], int]) -> int:
    """Run `main` on the command line; returns the exit code."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()  # a reader that has gone is noticed here, not when Python exits
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        number = getattr(stopped, "number", 2)
        print("\nstopped; all finished work is saved. The same command line goes on from here.", file=sys.stderr)
        return 128 + number
