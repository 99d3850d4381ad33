"""What a run computes on: device, dtype, versions; how much memory and disk it takes."""

import contextlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from minmacpo import UserError, __version__
from minmacpo.config.schema import Config
from minmacpo.config.validate import shape
from minmacpo.data.readers import find_files
from minmacpo.runtime.progress import short_of_memory

KERNELS = 64  # that are kept; a micro-batch has fewer


def device_of(config: Config) -> str:
    """ "cpu" or "cuda", from run.device."""
    if config.run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device = cuda, but torch finds no GPU; use run.device=cpu")
    return config.run.device


def dtype_of(config: Config) -> torch.dtype:
    """Dtype of base weights and matmuls, from run.dtype."""
    if config.run.dtype == "auto":
        return torch.bfloat16 if device_of(config) == "cuda" else torch.float32
    return getattr(torch, config.run.dtype)


def configure_torch(config: Config) -> None:
    """Before the first product: torch's threads, and how many kernels torch and oneDNN keep, of each 1024 by themselves. oneDNN makes
    one for every size of a product in bf16, and hardly two micro-batches have one size: after 120 of them a process of 500 MB
    held 1.6 GB."""
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def environment(config: Config) -> dict:
    """Everything that bit-identity is promised for, the code's commit, and the command line."""
    return {
        "minmacpo": __version__,
        "commit": code_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("numpy", "safetensors", "sentencepiece")},
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": linux("cpuinfo", r"model name\s*: (.*)") or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **gpu(device_of(config)),
        "device": device_of(config),
        "dtype": str(dtype_of(config)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "command": " ".join(sys.argv),
    }


def gpu(device: str) -> dict[str, str]:
    """What a GPU's results depend on; {} on the CPU."""
    if device != "cuda":
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def code_commit() -> str | None:
    """The git commit of the code, None where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
            or None
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def linux(file: str, pattern: str) -> str | None:
    """The group of `pattern` in /proc/`file`, or a file elsewhere by its whole path; None where there is none."""
    try:
        found = re.search(pattern, Path("/proc", file).read_text())
    except OSError:
        return None
    return found and found[1]


def free_bytes(device: str) -> int:
    """Memory that is still free on the device, and may be taken; where the system does not say, as much as one could wish."""
    if device == "cuda":
        return (
            torch.cuda.mem_get_info()[0]
            + torch.cuda.memory_reserved()
            - torch.cuda.memory_allocated()
        )
    free = int(linux("meminfo", r"MemAvailable:\s*(\d+)") or sys.maxsize) * 1024
    group = Path("/sys/fs/cgroup" + (linux("self/cgroup", r"(?m)^0::(/.*)$") or "/"))
    for place in (
        group,
        *group.parents,
    ):  # a container's limit, or that of a group around it (man 7 cgroups)
        most, used = (
            linux(str(place / name), r"^(\d+)") for name in ("memory.max", "memory.current")
        )
        if most and used:  # of which files that were read can be dropped
            free = min(
                free,
                int(most)
                - int(used)
                + int(linux(str(place / "memory.stat"), r"(?m)^inactive_file (\d+)") or 0),
            )
    return free


@contextlib.contextmanager
def normalize_oom() -> Iterator[None]:
    """Memory that is short within is torch.OutOfMemoryError, also that of a CPU, of which allocators say it in other ways."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not short_of_memory(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise torch.OutOfMemoryError(str(error)) from None


def reset_peaks(device: str) -> None:
    """Measure peak memory anew from here; where this is not Linux, it stays that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5: forget VmHWM (man 5 proc)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_mb(device: str = "cpu") -> float:
    """Peak memory since `reset_peaks`, in MB: of torch's tensors on a GPU, else all that this process has resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if kilobytes := linux("self/status", r"VmHWM:\s*(\d+)"):
        return int(kilobytes) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 1024
    )


def process_bytes() -> int:
    """Memory that this process has now; where this is not Linux, the most that it has had."""
    kilobytes = linux("self/status", r"VmRSS:\s*(\d+)")
    return int(kilobytes) * 1024 if kilobytes else int(peak_mb() * 2**20)


def peaks(device: str) -> dict[str, int]:
    """{"peak_mb"} since `reset_peaks`, and on a GPU {"peak_gpu_mb"} of torch's tensors."""
    return {"peak_mb": round(peak_mb())} | (
        {"peak_gpu_mb": round(peak_mb(device))} if device == "cuda" else {}
    )


def disk_need(config: Config, kinds: Iterable[str]) -> int:
    """Bytes that stages of these kinds write, about: weights of the largest shape, text by rows and length."""
    model, data, town, shares = config.model, config.data, config.world, config.data.shares
    shapes = [
        (width, layers, mlp) for width, layers, _, mlp in map(shape, (model.strong, *model.weak))
    ]
    base = max(
        width * (2 * model.vocab + layers * (4 * width + 3 * mlp)) for width, layers, mlp in shapes
    )
    for folder in filter(None, (model.student, *model.teachers)):
        given = json.loads((Path(folder) / "config.json").read_text())
        shapes.append(
            (given["hidden_size"], given["num_hidden_layers"], given["intermediate_size"])
        )
    linear = max(layers * (width + mlp) for width, layers, mlp in shapes)
    slot = linear * config.lora.r * len(config.lora.targets)
    if data.path is None:
        documents = config.pretrain.batch * max(
            config.pretrain.strong_steps, config.pretrain.weak_steps
        )
        answers = max(town.d1, town.d2, town.test * config.eval.samples)
        corpus, text = (4 * data.max_length * rows for rows in (documents, answers))
    else:
        size, *own = (
            sum(
                file.stat().st_size * (4 if file.suffix == ".gz" else 1)
                for file in find_files(path)
            )
            for path in data.files.values()
        )
        corpus, text = (
            size * shares[0],
            size * max(shares[1], shares[2], shares[3] * config.eval.samples),
        )
        text = max([text, *(part * config.eval.samples for part in own)])
    count = Counter(kind.partition("/")[0] for kind in kinds)
    adapters, texts = (
        count["sft"] + count["prefer"],
        count["slices"] + count["sample"] + count["pairs"],
    )
    largest = base if count["pretrain"] else slot if adapters else 0
    state = 6 * largest  # values and two moments; the old file and the new one
    weights = count["pretrain"] * base + adapters * slot + state
    return (
        round(4 * weights + count["corpus"] * corpus + texts * text) + 20_000_000
    )  # logs, metrics, report
