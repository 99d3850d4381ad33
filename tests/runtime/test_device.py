"""What the machine has: free memory within a container, and bounded caches of kernels."""

import os
import re
import sys

from minmacpo.runtime import device as machine


def test_kernels_for_sizes_that_do_not_come_again_are_few(monkeypatch):
    """oneDNN's and torch's caches are bounded, unless the user has said how."""
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv(names[1], "7")
    machine.configure_torch(1)
    assert [os.environ[name] for name in names] == [str(machine.CACHED_KERNELS), "7"]


def test_what_is_free_is_no_more_than_a_container_may_take(monkeypatch):
    """The limits of a control group and of those around it count, less what is used, but for files
    that can be dropped.
    """
    told = {
        "meminfo": "MemAvailable:   8000 kB",
        "self/cgroup": "9:name=systemd:/\n0::/pod/inner\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/pod/memory.max": "5000000\n",
        "/sys/fs/cgroup/pod/memory.current": "2000000\n",
        "/sys/fs/cgroup/pod/memory.stat": "anon 7\nactive_file 5\ninactive_file 400000\n",
        "/sys/fs/cgroup/pod/inner/memory.max": "max\n",
    }

    def linux(file: str, pattern: str) -> str | None:
        found = re.search(pattern, told.get(file, ""))
        return found and found[1]

    monkeypatch.setattr(machine, "read_proc", lambda file, pattern: linux(str(file), pattern))
    assert machine.free_bytes("cpu") == 3_400_000
    told["/sys/fs/cgroup/pod/inner/memory.max"], told["/sys/fs/cgroup/pod/inner/memory.current"] = (
        "1000000\n",
        "900000\n",
    )
    assert machine.free_bytes("cpu") == 100_000
    told["meminfo"] = "MemAvailable:   50 kB"
    assert machine.free_bytes("cpu") == 51_200
    told.clear()
    assert machine.free_bytes("cpu") == sys.maxsize
