"""What a run computes on: device, dtype, versions, memory."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

from minmacpo import UserError, __version__
from minmacpo.config import Config


def device_of(config: Config) -> str:
    """"cpu" or "cuda", from run.device."""
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


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def code_commit() -> str | None:
    """The git commit of the code, None where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def environment(config: Config) -> dict:
    """Everything that bit-identity is promised for, and the command line."""
    return {
        "minmacpo": __version__,
        "commit": code_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": processor_name(),
        "device": device_of(config),
        "dtype": str(dtype_of(config)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
    }


def processor_name() -> str:
    """The CPU's model name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
