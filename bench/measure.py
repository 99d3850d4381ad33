"""What the speed benchmarks share: own and peer in turn, medians and ranges, peaks of memory, one JSON each."""

import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from minmacpo.runtime.device import code_commit, linux
from minmacpo.runtime.files import write_json

PLACE = Path("assets/bench")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "liger-kernel", "numpy")
INSTALL = "pip install -r requirements-dev.txt"
SHAPES = {
    "15M": "288x6x6x768",
    "110M": "768x12x12x2048",
}  # width x layers x heads x mlp, vocabulary 32,000
KEY = ("work", "shape", "dtype", "peer")  # of a row
Spread = list[float]  # median, lowest, highest


def words(known: Collection[str] | None = None) -> list[str]:
    """The command line's words; --help prints the first lines of the program instead, and so does a word that is none of `known`."""
    given = sys.argv[1:]
    if strange := [
        word
        for word in given
        if word in ("-h", "--help") or (known is not None and word not in known)
    ]:
        print(sys.modules["__main__"].__doc__.strip())
        asked = strange[0] in ("-h", "--help")
        raise SystemExit(
            0
            if asked
            else f"\nerror: {strange[0]!r} is unknown"
            + (f"; known: {', '.join(known)}" if known else "")
        )
    return given


def spread(values: Sequence[float]) -> Spread:
    """[median, lowest, highest], of four digits each."""
    return [
        float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))
    ]


def clocked(call: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of the process) of one call; a GPU is waited for."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def alternate(own: Callable, peer: Callable | None, times: int = 5, warm: bool = True) -> dict:
    """The timed part of a row: both called once to warm up (`warm`), then in turn, `times` each. The ratios are those of
    neighbours in time, as the machine may be shared. Without a peer only its own side is measured."""
    sides = [own] if peer is None else [own, peer]
    for call in sides if warm else ():
        call()
    found = [[clocked(call) for call in sides] for _ in range(times)]
    values = [
        {
            name: spread([turn[side][i] for turn in found])
            for i, name in enumerate(("wall_s", "cpu_s"))
        }
        for side in range(len(sides))
    ]
    if peer is None:
        return {"ratio_cpu": None, "ratio_wall": None, "own": values[0], "peer_values": {}}
    wall, cpu = (spread([theirs[i] / mine[i] for mine, theirs in found]) for i in range(2))
    return {"ratio_cpu": cpu, "ratio_wall": wall, "own": values[0], "peer_values": values[1]}


def alone(*words: str, times: int = 1) -> list[dict]:
    """What `python -m WORDS` prints as its last line (JSON), each of `times` in a process of its own: for peaks of memory."""
    found = []
    for _ in range(times):
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"python -m {' '.join(words)} failed:\n{done.stderr[-2000:]}")
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return found


def missing(*packages: str) -> str:
    """ "" if all are installed; else what a row's note says."""
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(lacking)} not installed ({INSTALL}): own side only" if lacking else ""


def bf16_hardware() -> str:
    """What multiplies bf16 here: the CPU's flags for it, or a GPU; "" where it is emulated."""
    flags = (
        linux("cpuinfo", r"flags\s*: (.*)") or linux("cpuinfo", r"Features\s*: (.*)") or ""
    ).split()
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags]
    return ", ".join(found)


def machine() -> dict:
    """Where a figure was measured."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    kilobytes = linux("meminfo", r"MemTotal:\s*(\d+)") or 0
    return {
        "processor": linux("cpuinfo", r"model name\s*: (.*)") or "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(int(kilobytes) / 2**20),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bf16": bf16_hardware() or "none",
    } | gpu


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(name: str, title: str, rows: Sequence[dict], keep: bool = False, **more) -> None:
    """assets/bench/NAME.json (form: this package's first lines), and its table on the screen. `keep`: rows of the
    file that are not measured anew stay in it. The file stays as it is where it has a peer's figures that the new rows lack."""
    PLACE.mkdir(parents=True, exist_ok=True)
    file = PLACE / f"{name}.json"
    old = json.loads(file.read_text("utf-8"))["rows"] if file.is_file() else []
    new = {key_of(row): row for row in rows}
    if any(
        row.get("peer_values") and not new.get(key_of(row), row).get("peer_values") for row in old
    ):
        title += (
            f" {file} is left as it was: it has figures of a peer that could not be measured now."
        )
    else:
        kept = [row for row in old if key_of(row) not in new] if keep else []
        known = {
            "bench": name,
            "title": title,
            "command": f"python -m bench.{name}",
            "machine": machine(),
            "versions": versions(),
            "date": datetime.now(UTC).date().isoformat(),
            "commit": (code_commit() or "unknown")[:12],
        }
        write_json(file, known | {"rows": [*kept, *rows]} | more)
    print(f"{title}\n", *map(line, rows), sep="\n")


def key_of(row: dict) -> tuple:
    """What tells a row of a file from the others."""
    return tuple(row.get(key) for key in KEY)


def line(row: dict) -> str:
    """One row as the terminal shows it."""
    ratios = [
        f"{key.removeprefix('ratio_')} x{row[key][0]:.2f} ({row[key][1]:.2f}-{row[key][2]:.2f})"
        for key in ("ratio_cpu", "ratio_wall", "ratio_memory")
        if row.get(key)
    ]
    sides = [
        f"{side} " + ", ".join(f"{k} {figure(v)}" for k, v in row[key].items())
        for side, key in (("own", "own"), ("peer", "peer_values"))
        if row.get(key)
    ]
    head = " · ".join(
        filter(None, (row["work"], row.get("shape"), row.get("dtype"), row.get("peer")))
    )
    return "  ".join(
        filter(None, (f"{head}:", *ratios, *sides, row.get("equal", ""), row.get("note", "")))
    )


def figure(value) -> str:
    """A number, or a median with its range."""
    if isinstance(value, list):
        return f"{value[0]:.4g} ({value[1]:.4g}-{value[2]:.4g})"
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
