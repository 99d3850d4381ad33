"""What a run computes on: the device, the dtype, the versions, and how much memory there is."""

import contextlib
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from minmacpo import UserError, __version__
from minmacpo.runtime.progress import short_of_memory

CACHED_KERNELS = 64  # more than the micro-batches of one step need
CGROUPS = Path("/sys/fs/cgroup")


def resolve_device(name: str) -> str:
    """The device that run.device stands for: "cpu" or "cuda".

    Args:
        name: "auto", "cpu" or "cuda".
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = cuda, but torch finds no GPU; use run.device=cpu")
    return name


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of base weights and matrix products that run.dtype stands for.

    Args:
        name: "auto" or the name of a torch dtype.
        device: a device, or "auto" for the one that `resolve_device` picks.
    """
    if name != "auto":
        return getattr(torch, name)
    if resolve_device(device) == "cuda":
        return torch.bfloat16
    return torch.float32


def configure_torch(threads: int) -> None:
    """Set torch's threads and bound its caches of kernels; call it before the first product.

    oneDNN makes a kernel for every size of a product in bf16, and hardly two micro-batches have the
    same size. With its own bound of 1024 the cache can outgrow the model.

    Args:
        threads: how many; 0 leaves torch's own choice.
    """
    if threads:
        torch.set_num_threads(threads)
    for variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(CACHED_KERNELS))


def environment(device: str, dtype: torch.dtype) -> dict:
    """What env.json holds: all that bit-identity is promised for, the commit, the command line."""
    versions = {name: version(name) for name in ("numpy", "safetensors", "sentencepiece")}
    processor = read_proc("cpuinfo", r"model name\s*: (.*)") or platform.processor()
    return {
        "minmacpo": __version__,
        "commit": code_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **gpu_versions(device),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "command": " ".join(sys.argv),
    }


def gpu_versions(device: str) -> dict[str, str]:
    """What a GPU's results depend on; empty on the CPU."""
    if device != "cuda":
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def code_commit() -> str | None:
    """The git commit of the code; None where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def physical_cores() -> int:
    """Cores that this process may use, two threads of one core counted once."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # only Linux says it
        return os.cpu_count() or 1
    cores = set()
    for cpu in cpus:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        siblings = read_proc(topology / "thread_siblings_list", "(.*)")
        cores.add(siblings or cpu)
    return min(len(cores), cpu_quota())


def cpu_quota() -> int:
    """How many CPUs the control groups of this process let it use; sys.maxsize without a limit."""
    quota = sys.maxsize
    for folder in own_cgroups():
        limit = read_proc(folder / "cpu.max", r"^(\d+) \d+")
        if limit:
            period = read_proc(folder / "cpu.max", r"^\d+ (\d+)")
            quota = min(quota, max(1, int(limit) // int(period)))
    return quota


# --- Memory


def read_proc(file: str | Path, pattern: str) -> str | None:
    """The group of `pattern` in a file under /proc, or at a whole path; None without a match."""
    try:
        text = Path("/proc", file).read_text()
    except OSError:
        return None
    match = re.search(pattern, text)
    return match[1] if match else None


def free_bytes(device: str) -> int:
    """Memory of the device that may still be taken; sys.maxsize where the system does not say."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        # torch keeps freed blocks for itself
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    available = read_proc("meminfo", r"MemAvailable:\s*(\d+)")
    free = sys.maxsize
    if available:
        free = int(available) * 1024

    for folder in own_cgroups():
        free = min(free, free_in_cgroup(folder))
    return free


def own_cgroups() -> list[Path]:
    """The folder of this process's control group, and those around it.

    A container has limits of its own, and so may every group around it (man 7 cgroups).
    """
    path = read_proc("self/cgroup", r"(?m)^0::(/.*)$") or "/"
    group = Path(f"{CGROUPS}{path}")
    return [group, *group.parents]


def free_in_cgroup(folder: Path) -> int:
    """Memory below a control group's limit; sys.maxsize where it has none."""
    limit = read_proc(folder / "memory.max", r"^(\d+)")
    used = read_proc(folder / "memory.current", r"^(\d+)")
    if not limit or not used:
        return sys.maxsize
    # The kernel drops cached files before it refuses memory
    cached_files = read_proc(folder / "memory.stat", r"(?m)^inactive_file (\d+)") or 0
    return int(limit) - int(used) + int(cached_files)


@contextlib.contextmanager
def normalize_oom() -> Iterator[None]:
    """Raise torch.OutOfMemoryError for all lack of memory within, that of a CPU too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if short_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def reset_peaks(device: str) -> None:
    """Measure peak memory anew from here; where this is not Linux, it stays the whole process's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5: forget VmHWM (man 5 proc)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_mb(device: str = "cpu") -> float:
    """Peak memory since `reset_peaks` in MB: torch's tensors on a GPU, else the whole process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    kilobytes = read_proc("self/status", r"VmHWM:\s*(\d+)")
    if kilobytes:
        return int(kilobytes) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # which counts bytes, not kilobytes
        return peak / 2**20
    return peak / 1024


def process_bytes() -> int:
    """Memory that this process has now; where this is not Linux, the most that it has had."""
    kilobytes = read_proc("self/status", r"VmRSS:\s*(\d+)")
    if kilobytes:
        return int(kilobytes) * 1024
    return int(peak_mb() * 2**20)


def peaks(device: str) -> dict[str, int]:
    """Peak memory since `reset_peaks`, as stage.json has it."""
    memory = {"peak_mb": round(peak_mb())}
    if device == "cuda":
        memory["peak_gpu_mb"] = round(peak_mb(device))
    return memory
