"""How glibc's malloc is asked to waste less of its heap: it reads that before a program's first line, so train.py starts twice."""

import contextlib
import os
import sys

TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1"


def start_again() -> None:
    """Put this process in its own place (exec: the same number and words) with TUNABLES in its environment. Nothing happens the second
    time, without glibc, under a debugger, and where the command line is not this program's own.

    Tensors lie at multiples of 64 bytes, and what malloc cuts off to align one goes to its cache of small blocks, where it never joins
    its neighbours again: the next tensor of the same size no longer fits into the hole, and the heap grows, by chance (640 to 735 MB in
    five equal trainings of 15M in int8; 544 to 557 without that cache). Large pages pay for what the cache had saved."""
    found = os.environ.get("GLIBC_TUNABLES", "")
    known = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
    watched = sys.gettrace() or "pydevd" in sys.modules
    if not known or "malloc.tcache_count" in found or watched or sys.orig_argv[-len(sys.argv) :] != sys.argv:
        return
    with contextlib.suppress(OSError):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": f"{found}:{TUNABLES}".lstrip(":")})
