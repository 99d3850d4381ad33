"""BENCHMARKS.md from assets/bench/*.json: python -m bench.speed.page.

The form of those files: bench/speed/__init__.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from bench.markdown import markdown_table, named_values
from bench.speed.timing import PLACE, figures, read_words
from minmacpo.runtime.files import write_atomic


@dataclass(frozen=True, slots=True)
class Target:
    """What a row of a benchmark is to reach.

    Attributes:
        ratio: which of a row's ratios: ratio_cpu, ratio_wall, ...
        least: the smallest value that meets the target.
    """

    work: str
    peer: str
    ratio: str
    least: float


TARGETS = {
    "dpo-15m-bf16": Target("DPO-LoRA step, CPU, 15M, bf16", "TRL + PEFT", "cpu", 6.0),
    "dpo-110m-bf16": Target("DPO-LoRA step, CPU, 110M, bf16", "TRL + PEFT", "cpu", 4.5),
    "dpo-15m-fp32": Target("DPO-LoRA step, CPU, 15M, fp32", "TRL + PEFT", "cpu", 3.0),
    "dpo-110m-fp32": Target("DPO-LoRA step, CPU, 110M, fp32", "TRL + PEFT", "cpu", 2.0),
    "dpo-15m-bf16-precomputed": Target(
        "the same, 15M bf16, peer precomputes its reference", "TRL + PEFT", "cpu", 4.0
    ),
    "sft-15m-bf16": Target("SFT-LoRA step, CPU, 15M, bf16", "TRL + PEFT", "cpu", 4.0),
    "memory-15m": Target(
        "peak memory of the process on a DPO step, 15M, bf16", "TRL + PEFT", "memory", 8.0
    ),
    "memory-110m": Target(
        "peak memory of the process on a DPO step, 110M, bf16", "TRL + PEFT", "memory", 5.0
    ),
    "score": Target("scoring K = 3 candidates", "transformers, sorted batches", "cpu", 2.5),
    "generate": Target(
        "sampling top-p 0.7, top-k 50, batch 16", "transformers generate", "cpu", 3.0
    ),
    "macpo": Target("whole MACPO round, tiny, HH-shaped", "TRL + generate", "wall", 4.0),
    "gpu-dpo": Target("H200, Llama-2-7B shape, DPO-LoRA tokens/s", "TRL + PEFT", "wall", 2.5),
    "gpu-dpo-liger": Target("the same", "TRL + PEFT + Liger", "wall", 1.5),
    "gpu-memory": Target("the same, peak memory", "TRL + PEFT", "memory", 2.0),
    "gpu-dpo-share": Target(
        "the same, share of the measured matmul ceiling", "the card's ceiling", "share", 0.55
    ),
    "gpu-generate": Target(
        "H200, sampling, 7B shape, batch 1-16 and 256", "transformers generate", "wall", 5.0
    ),
    "gpu-generate-share": Target(
        "the same, batch up to 16, share of the bandwidth limit", "the card's ceiling", "share", 0.7
    ),
    "gpu-score": Target("H200, scoring, 7B shape", "transformers, batch", "wall", 2.0),
    "gpu-score-share": Target(
        "the same, share of the matmul ceiling", "the card's ceiling", "share", 0.6
    ),
    "gpu-70b": Target(
        "a DPO step at 1,024 tokens, 70B shape in int8 or 4 bit, GB free of 140",
        "one card",
        "free_gb",
        0.0,
    ),
}
INTRO = """# Benchmarks

Speed and memory against the libraries that people use, each set up as its own documentation
recommends. Made by `python -m bench.speed.page` from assets/bench/*.json, which `python -m
bench.speed.NAME` writes. Own and peer run in turn in one process on the same texts, dtype, LoRA and
optimiser, after both have computed the same; the column "equal" says how nearly. None is written
where fp32 losses or scores are more than 0.1 % apart (on a GPU bf16 ones 5 %), a bf16 loss of DPO
more than 0.1, of SFT 0.5 %, of a round 2 %, or where some token of a greedy text is not, to 0.001
(bf16: 0.25), the peer's likeliest. A ratio is that of neighbours in time (peer / own: above 1, this
project is faster), given as median (lowest-highest). Peak memory is that of a process in which one
side runs alone. Weights are random, which does not matter for speed. CPU time is what ratios are
judged by where the machine is shared.
"""


def page(place: Path) -> str:
    """BENCHMARKS.md of the JSON files in `place`; those of toy sizes are left out."""
    benches = []
    for file in sorted(place.glob("*.json")):
        if not file.stem.endswith("-tiny"):
            benches.append(json.loads(file.read_text("utf-8")))

    head = ["work", "peer", "target", "measured", "", "by"]
    targets = markdown_table(head, target_rows(benches))
    sections = map(bench_section, benches)
    return "\n".join([INTRO, "## Targets\n", targets, *sections])


# ---- targets --------------------------------------------------------------------------------


def target_rows(benches: list[dict]) -> list[list[str]]:
    """Each target beside what was measured, "short" where that falls short."""
    table = []
    for name, target in TARGETS.items():
        row, bench = worst_row(benches, name)
        ratio = row.get(f"ratio_{target.ratio}")
        sign = "×" if target.ratio in ("cpu", "wall", "memory") else ""
        if ratio is None:
            verdict = "not measured"
        elif ratio[0] >= target.least:
            verdict = "met"
        else:
            verdict = "**short**"
        least = f"≥ {target.least:g}{sign} ({target.ratio.replace('_', ' ')})"
        where = f"bench.speed.{bench}" if bench else ""
        table.append([target.work, target.peer, least, cell(ratio, sign), verdict, where])
    return table


def worst_row(benches: list[dict], name: str) -> tuple[dict, str]:
    """The measured row that is furthest from a target, and its benchmark; ({}, "") without one."""
    ratio = f"ratio_{TARGETS[name].ratio}"
    worst: dict = {}
    worst_bench = ""
    for bench in benches:
        for row in bench["rows"]:
            if name not in row.get("target", ()) or not row.get(ratio):
                continue
            if not worst or row[ratio][0] < worst[ratio][0]:
                worst = row
                worst_bench = bench["bench"]
    return worst, worst_bench


def cell(ratio: list[float] | None, sign: str = "×") -> str:
    """A ratio with its range; nothing where there is none."""
    if ratio is None:
        return ""
    median, low, high = ratio
    return f"{median:.2f}{sign} ({low:.2f}-{high:.2f})"


# ---- one benchmark --------------------------------------------------------------------------

COLUMNS = (
    "work", "shape", "dtype", "peer", "CPU time, peer / own", "wall, peer / own",
    "peak memory, peer / own", "own", "peer", "equal", "note",
)  # fmt: skip


def bench_section(bench: dict) -> str:
    """One benchmark: what and where, its table, its notes and pictures."""
    facts = {}
    for name, value in bench["machine"].items():
        facts[name.replace("_", " ")] = value
    where = f"{named_values(facts)}; {named_values(bench['versions'])}."

    # Columns in which no row has anything are left out
    table = list(map(cells, bench["rows"]))
    columns = []
    for head, *values in zip(COLUMNS, *table, strict=True):
        if any(values):
            columns.append((head, *values))
    head, *shown = zip(*columns, strict=True)

    parts = [
        f"## {bench['bench']}\n",
        f"{bench['title']} `{bench['command']}`\n",
        f"{bench['date']}, commit {bench['commit']}; {where}\n",
        markdown_table(head, shown),
    ]
    for note in bench.get("notes", ()):
        parts.append(f"{note}\n")
    for name in bench.get("pictures", ()):
        parts.append(f"![{name}]({(PLACE / name).as_posix()})\n")
    return "\n".join(parts)


def cells(row: dict) -> list[str]:
    """A row in the order of COLUMNS."""
    texts = []
    for name in ("work", "shape", "dtype", "peer"):
        texts.append(row.get(name) or "")
    for label in ("cpu", "wall", "memory"):
        texts.append(cell(row.get(f"ratio_{label}")))
    for side in ("own", "peer_values"):
        texts.append(figures(row.get(side) or {}))
    texts += [row.get("equal", ""), row.get("note", "")]
    return texts


if __name__ == "__main__":
    read_words([])
    write_atomic(Path("BENCHMARKS.md"), page(PLACE))
