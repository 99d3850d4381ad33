"""How the three programs end: one clear sentence and exit code 2, or 130 after Ctrl-C."""

import os
import sys
from collections.abc import Callable

from minmacpo import UserError
from minmacpo.progress import Interrupted


def call(main: Callable[[list[str]], int]) -> int:
    """Run `main` on the command line; returns the exit code."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 141
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {os.strerror(error.errno or 0)}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        number = getattr(stopped, "number", 2)
        print("\nstopped; all finished work is saved. The same command line goes on from here.", file=sys.stderr)
        return 128 + number
