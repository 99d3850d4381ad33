"""CPU seconds of the default run by kind of stage, with an older commit's code and with this: python -m bench.default [COMMIT] [TIMES].

Both run in turn, each in a root of its own, so that nothing is taken from another run; a turn of both takes ten minutes.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench.measure import spread, words, write

TITLE = "The default run (`python train.py`), CPU seconds by kind of stage, one thread; the peer is this project before its faster ways."
BEFORE = "8b93da9285e2"
KINDS = {
    "pretrain": "pre-training",
    "sft": "SFT",
    "prefer": "DPO + SFT",
    "sample": "sampling",
    "score": "scoring",
    "pairs": "pairs",
}


def seconds(code: Path, root: Path) -> Counter:
    """CPU seconds by kind of stage of a default run with this code."""
    subprocess.run(
        [sys.executable, code / "train.py", f"--run.root={root}"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found = Counter()
    for file in root.glob("world/*/*/stage.json"):
        notes = json.loads(file.read_bytes())
        found[notes["kind"].partition("/")[0]] += notes["cpu_seconds"]
    return found


def same(old: Path, new: Path) -> str:
    """How far the tables of two runs are apart."""
    sides = [
        {
            (row["agent"], row["round"]): row
            for row in json.loads((root / "world/eval/table.json").read_bytes())["rows"]
        }
        for root in (old, new)
    ]
    gold, perplexity = (
        max(abs(row[key] - sides[1][who][key]) for who, row in sides[0].items())
        for key in ("gold", "perplexity")
    )
    return f"{len(sides[0])} rows of the table: gold reward within {gold:.1g}, perplexity within {perplexity:.1g}"


def main(commit: str = BEFORE, times: str = "1") -> None:
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ".", f"{folder}/code"], check=True)
        subprocess.run(["git", "-C", f"{folder}/code", "checkout", "--quiet", commit], check=True)
        for turn in range(int(times)):
            turns.append(
                [
                    seconds(code, Path(folder, f"{side}{turn}"))
                    for side, code in enumerate((Path(folder, "code"), Path.cwd()))
                ]
            )
        equal = same(Path(folder, "00"), Path(folder, "10"))
    rows = []
    for kind, work in {**KINDS, "all": "all stages"}.items():
        old, new = (
            [sum(side.values()) if kind == "all" else side[kind] for side in sides]
            for sides in zip(*turns, strict=True)
        )
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
    write("default", TITLE, rows)


if __name__ == "__main__":
    if len(given := words()) > 2:
        sys.exit(f"{__doc__}\nerror: expected no more than COMMIT and TIMES")
    main(*given)
