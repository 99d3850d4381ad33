"""CPU seconds of the default run by kind of stage, with older code and with this.

    python -m bench.speed.default [COMMIT] [TIMES]

Both run in turn, each in a root of its own, so that nothing is taken from another run; both
together take ten minutes.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench.speed.timing import read_words, spread, write_bench

TITLE = (
    "The default run (`python train.py`), CPU seconds by kind of stage, one thread; "
    "the peer is this project before its faster ways."
)
BEFORE = "8b93da9285e2"
KINDS = {
    "pretrain": "pre-training",
    "sft": "SFT",
    "prefer": "DPO + SFT",
    "sample": "sampling",
    "score": "scoring",
    "pairs": "pairs",
}


def run_default(code: Path, root: Path) -> Counter:
    """Make a default run with this code; its CPU seconds by kind of stage, "all" of them too."""
    subprocess.run(
        [sys.executable, code / "train.py", f"--run.root={root}"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = Counter()
    for file in root.glob("world/*/*/stage.json"):
        notes = json.loads(file.read_bytes())
        kind = notes["kind"].partition("/")[0]
        seconds[kind] += notes["cpu_seconds"]
        seconds["all"] += notes["cpu_seconds"]
    return seconds


def table_of(root: Path) -> dict[tuple, dict]:
    """{(agent, round): row} of the table of a default run."""
    table = json.loads((root / "world/eval/table.json").read_bytes())
    return {(row["agent"], row["round"]): row for row in table["rows"]}


def distance_of_tables(old: Path, new: Path) -> str:
    """How far the tables of two runs are apart."""
    old_table = table_of(old)
    new_table = table_of(new)
    distances = []
    for measure in ("gold", "perplexity"):
        largest = 0.0
        for at, row in old_table.items():
            largest = max(largest, abs(row[measure] - new_table[at][measure]))
        distances.append(largest)
    rows = f"{len(old_table)} rows of the table"
    return f"{rows}: gold reward within {distances[0]:.1g}, perplexity within {distances[1]:.1g}"


def main(commit: str = BEFORE, times: str = "1") -> None:
    """Make the runs, and write a row for each kind of stage."""
    old_seconds = []
    new_seconds = []
    with tempfile.TemporaryDirectory() as place:
        old_code = Path(place, "code")
        subprocess.run(["git", "clone", "--quiet", ".", old_code], check=True)
        subprocess.run(["git", "-C", old_code, "checkout", "--quiet", commit], check=True)
        for number in range(int(times)):
            old_seconds.append(run_default(old_code, Path(place, f"old{number}")))
            new_seconds.append(run_default(Path.cwd(), Path(place, f"new{number}")))
        equal = distance_of_tables(Path(place, "old0"), Path(place, "new0"))

    rows = []
    for kind, work in {**KINDS, "all": "all stages"}.items():
        old = [seconds[kind] for seconds in old_seconds]
        new = [seconds[kind] for seconds in new_seconds]
        rows.append(
            {
                "work": work,
                "shape": "world",
                "dtype": "fp32",
                "peer": f"commit {commit[:7]}",
                "own": {"cpu_s": spread(new)},
                "peer_values": {"cpu_s": spread(old)},
                "ratio_cpu": spread([a / b for a, b in zip(old, new, strict=True)]),
            }
        )
    rows[-1]["equal"] = equal
    write_bench("default", TITLE, rows)


if __name__ == "__main__":
    words = read_words()
    if len(words) > 2:
        sys.exit(f"{__doc__}\nerror: expected no more than COMMIT and TIMES")
    main(*words)
