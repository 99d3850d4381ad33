"""What the machine has: free memory within a container, and bounded caches of kernels."""

import os
import re
import sys

from minmacpo.runtime import device


def test_kernels_for_sizes_that_do_not_come_again_are_few(monkeypatch):
    """oneDNN's and torch's caches are bounded, unless the user has said how."""
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    device.configure_torch(1)
    assert os.environ["LRU_CACHE_CAPACITY"] == str(device.CACHED_KERNELS)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


def test_what_is_free_is_no_more_than_a_container_may_take(monkeypatch):
    """The limits of a control group and of those around it count, less what is used.

    Files that can be dropped are not counted as used.
    """
    contents = {
        "meminfo": "MemAvailable:   8000 kB",
        "self/cgroup": "9:name=systemd:/\n0::/pod/inner\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/pod/memory.max": "5000000\n",
        "/sys/fs/cgroup/pod/memory.current": "2000000\n",
        "/sys/fs/cgroup/pod/memory.stat": "anon 7\nactive_file 5\ninactive_file 400000\n",
        "/sys/fs/cgroup/pod/inner/memory.max": "max\n",
    }

    def read_proc(file, pattern: str) -> str | None:
        match = re.search(pattern, contents.get(str(file), ""))
        return match[1] if match else None

    monkeypatch.setattr(device, "read_proc", read_proc)
    assert device.free_bytes("cpu") == 3_400_000
    contents["/sys/fs/cgroup/pod/inner/memory.max"] = "1000000\n"
    contents["/sys/fs/cgroup/pod/inner/memory.current"] = "900000\n"
    assert device.free_bytes("cpu") == 100_000
    contents["meminfo"] = "MemAvailable:   50 kB"
    assert device.free_bytes("cpu") == 51_200
    contents.clear()
    assert device.free_bytes("cpu") == sys.maxsize
