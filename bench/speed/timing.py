"""What the speed benchmarks share: timing both sides in turn, and writing one JSON file each."""

import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from minmacpo.runtime.device import code_commit, read_proc
from minmacpo.runtime.files import write_json

PLACE = Path("assets/bench")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "liger-kernel", "numpy")
INSTALL = "pip install -r requirements-dev.txt"

# Width x layers x heads x width of the MLP; the vocabulary has 32,000 tokens
SHAPES = {
    "15M": "288x6x6x768",
    "110M": "768x12x12x2048",
}
Spread = list[float]  # median, lowest, highest


# ---- timing ---------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> Spread:
    """[median, lowest, highest], of four digits each."""
    figures = (statistics.median(values), min(values), max(values))
    return [four_digits(value) for value in figures]


def four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def count_equal(own: Iterable, peer: Iterable) -> int:
    """In how many places two lists of the same length have the same."""
    count = 0
    for a, b in zip(own, peer, strict=True):
        count += a == b
    return count


def largest_difference(own: Sequence[float], peer: Sequence[float]) -> float:
    """How far a number is from the peer's at most, as a share of that one."""
    worst = 0.0
    for a, b in zip(own, peer, strict=True):
        worst = max(worst, abs(a - b) / abs(b))
    return worst


def clocked(call: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of the process) of one call; a GPU is waited for."""
    wall = time.perf_counter()
    cpu = time.process_time()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def alternate(own: Callable, peer: Callable | None, times: int = 5, warm: bool = True) -> dict:
    """The timed part of a row: own and peer in turn, `times` each.

    The ratios are those of neighbours in time, as the machine may be shared.

    Args:
        own: one call of this project's side.
        peer: the same work of another library; None: only the own side is measured.
        warm: call both once before timing begins.
    """
    if warm:
        own()
        if peer is not None:
            peer()

    own_times = []
    peer_times = []
    for _ in range(times):
        own_times.append(clocked(own))
        if peer is not None:
            peer_times.append(clocked(peer))

    row = {"ratio_cpu": None, "ratio_wall": None, "own": summary(own_times), "peer_values": {}}
    if peer is not None:
        wall_ratios = []
        cpu_ratios = []
        for (own_wall, own_cpu), (peer_wall, peer_cpu) in zip(own_times, peer_times, strict=True):
            wall_ratios.append(peer_wall / own_wall)
            cpu_ratios.append(peer_cpu / own_cpu)
        row["ratio_wall"] = spread(wall_ratios)
        row["ratio_cpu"] = spread(cpu_ratios)
        row["peer_values"] = summary(peer_times)
    return row


def summary(times: Sequence[tuple[float, float]]) -> dict[str, Spread]:
    """Medians and ranges of what `clocked` gave for several calls."""
    walls, cpus = zip(*times, strict=True)
    return {"wall_s": spread(walls), "cpu_s": spread(cpus)}


def run_alone(*words: str, times: int = 1) -> list[dict]:
    """What `python -m WORDS` prints as its last line (JSON), each time in a process of its own.

    That is how peaks of memory are measured.
    """
    results = []
    for _ in range(times):
        ended = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"python -m {' '.join(words)} failed:\n{ended.stderr[-2000:]}")
        results.append(json.loads(ended.stdout.strip().splitlines()[-1]))
    return results


# ---- command line and machine ---------------------------------------------------------------


def read_words(known: Collection[str] | None = None) -> list[str]:
    """The command line's words.

    --help prints the first lines of the program instead, and so does a word that is none of
    `known` (None: any word is taken).
    """
    words = sys.argv[1:]
    for word in words:
        is_help = word in ("-h", "--help")
        if is_help or (known is not None and word not in known):
            print(sys.modules["__main__"].__doc__.strip())
            if is_help:
                raise SystemExit(0)
            offered = f"; known: {', '.join(known)}" if known else ""
            raise SystemExit(f"\nerror: {word!r} is unknown{offered}")
    return words


def missing(*packages: str) -> str:
    """What a row's note says of packages that are not installed; "" if all are."""
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    if not lacking:
        return ""
    return f"{', '.join(lacking)} not installed ({INSTALL}): own side only"


def bf16_hardware() -> str:
    """The CPU's flags for multiplying bf16; "" where it is emulated."""
    flags = read_proc("cpuinfo", r"flags\s*: (.*)") or read_proc("cpuinfo", r"Features\s*: (.*)")
    present = (flags or "").split()
    return ", ".join(flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in present)


def machine() -> dict:
    """Where a figure was measured."""
    kilobytes = read_proc("meminfo", r"MemTotal:\s*(\d+)") or 0
    facts = {
        "processor": read_proc("cpuinfo", r"model name\s*: (.*)") or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(int(kilobytes) / 2**20),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bf16": bf16_hardware() or "none",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    installed = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


# ---- writing rows ---------------------------------------------------------------------------


def write_bench(name: str, title: str, rows: Sequence[dict], keep: bool = False, **more) -> None:
    """Write assets/bench/NAME.json and print its table; the form: bench/speed/__init__.py.

    The file stays as it is where it has a peer's figures that the new rows lack.

    Args:
        keep: rows of the file that are not measured anew stay in it.
        more: "notes" and "pictures".
    """
    PLACE.mkdir(parents=True, exist_ok=True)
    file = PLACE / f"{name}.json"
    old_rows = []
    if file.is_file():
        old_rows = json.loads(file.read_text("utf-8"))["rows"]

    if loses_a_peer(old_rows, rows):
        reason = "it has figures of a peer that could not be measured now."
        title += f" {file} is left as it was: {reason}"
    else:
        measured = {row_key(row) for row in rows}
        kept_rows = []
        for row in old_rows:
            if keep and row_key(row) not in measured:
                kept_rows.append(row)
        content = {
            "bench": name,
            "title": title,
            "command": f"python -m bench.speed.{name}",
            "machine": machine(),
            "versions": versions(),
            "date": datetime.now(UTC).date().isoformat(),
            "commit": (code_commit() or "unknown")[:12],
            "rows": [*kept_rows, *rows],
        }
        write_json(file, content | more)

    print(f"{title}\n")
    for row in rows:
        print(row_text(row))


def loses_a_peer(old_rows: Sequence[dict], rows: Sequence[dict]) -> bool:
    """Whether a row that has a peer's figures would be replaced by one without."""
    new_rows = {row_key(row): row for row in rows}
    for row in old_rows:
        replacement = new_rows.get(row_key(row), row)
        if row.get("peer_values") and not replacement.get("peer_values"):
            return True
    return False


def row_key(row: dict) -> tuple:
    """What tells a row of a file from the others."""
    return tuple(row.get(name) for name in ("work", "shape", "dtype", "peer"))


def row_text(row: dict) -> str:
    """One row as the terminal shows it."""
    names = (row["work"], row.get("shape"), row.get("dtype"), row.get("peer"))
    parts = [" · ".join(filter(None, names)) + ":"]
    for label in ("cpu", "wall", "memory"):
        ratio = row.get(f"ratio_{label}")
        if ratio:
            median, low, high = ratio
            parts.append(f"{label} x{median:.2f} ({low:.2f}-{high:.2f})")
    if row.get("own"):
        parts.append(f"own {figures(row['own'])}")
    if row.get("peer_values"):
        parts.append(f"peer {figures(row['peer_values'])}")
    for remark in (row.get("equal"), row.get("note")):
        if remark:
            parts.append(remark)
    return "  ".join(parts)


def figures(values: dict) -> str:
    """Measured values with their names, in one line."""
    return ", ".join(f"{name} {figure(value)}" for name, value in values.items())


def figure(value) -> str:
    """A number, or a median with its range."""
    if isinstance(value, list):
        median, low, high = value
        return f"{median:.4g} ({low:.4g}-{high:.4g})"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
