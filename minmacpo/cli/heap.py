"""How glibc's malloc is asked to waste less of its heap: it reads that before a program's first line, so train.py starts twice."""

import contextlib
import os
import platform
import sys
from itertools import pairwise

TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1"


MARK = "MINMACPO_STARTED_AGAIN"  # the number of a process that has been: TUNABLES may be taken from it (man 8 ld.so)


def tuned() -> bool:
    """Whether malloc's cache of small blocks is off here."""
    return "malloc.tcache_count=0" in os.environ.get("GLIBC_TUNABLES", "")


def start_again() -> None:
    """Put this process in its own place (exec: the same number and words) with TUNABLES in its environment, before the user's own, which
    win. Nothing happens the second time, without glibc, where the user has set that cache, and unless the command line is `python
    [options] FILE [words]`: a debugger or a pipe would not go on.

    Tensors lie at multiples of 64 bytes, and what malloc cuts off to align one goes to its cache of small blocks, where it never joins
    its neighbours again: the next tensor of the same size no longer fits into the hole, and the heap grows, by chance (640 to 735 MB in
    five equal trainings of 15M in int8; 544 to 557 without that cache). Large pages pay for what the cache had saved."""
    env, before, own = os.environ, sys.orig_argv[: -len(sys.argv)], sys.orig_argv[-len(sys.argv) :]
    found = env.get("GLIBC_TUNABLES", "")
    plain = all(
        word.startswith("-") or last in ("-X", "-W") for last, word in pairwise(before)
    ) and os.path.isfile(sys.argv[0])
    done = "malloc.tcache_count" in found or env.get(MARK) == str(os.getpid())
    if (
        plain
        and own == sys.argv
        and not done
        and sys.executable
        and platform.libc_ver()[0] == "glibc"
    ):
        with contextlib.suppress(OSError):
            os.execve(
                sys.executable,
                sys.orig_argv,
                {
                    **env,
                    "GLIBC_TUNABLES": f"{TUNABLES}:{found}".rstrip(":"),
                    MARK: str(os.getpid()),
                },
            )
