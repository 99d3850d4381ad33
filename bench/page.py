"""BENCHMARKS.md from assets/bench/*.json: python -m bench.page. The form of those files: bench/__init__.py."""

import json
from pathlib import Path

from bench.measure import PLACE, figure, words
from bench.results import markdown
from minmacpo.runtime.files import write_atomic

TARGETS = {  # key: (work, peer, which ratio, at least)
    "dpo-15m-bf16": ("DPO-LoRA step, CPU, 15M, bf16", "TRL + PEFT", "cpu", 6.0),
    "dpo-110m-bf16": ("DPO-LoRA step, CPU, 110M, bf16", "TRL + PEFT", "cpu", 4.5),
    "dpo-15m-fp32": ("DPO-LoRA step, CPU, 15M, fp32", "TRL + PEFT", "cpu", 3.0),
    "dpo-110m-fp32": ("DPO-LoRA step, CPU, 110M, fp32", "TRL + PEFT", "cpu", 2.0),
    "dpo-15m-bf16-precomputed": (
        "the same, 15M bf16, peer precomputes its reference",
        "TRL + PEFT",
        "cpu",
        4.0,
    ),
    "sft-15m-bf16": ("SFT-LoRA step, CPU, 15M, bf16", "TRL + PEFT", "cpu", 4.0),
    "memory-15m": (
        "peak memory of the process on a DPO step, 15M, bf16",
        "TRL + PEFT",
        "memory",
        8.0,
    ),
    "memory-110m": (
        "peak memory of the process on a DPO step, 110M, bf16",
        "TRL + PEFT",
        "memory",
        5.0,
    ),
    "score": ("scoring K = 3 candidates", "transformers, sorted batches", "cpu", 2.5),
    "generate": ("sampling top-p 0.7, top-k 50, batch 16", "transformers generate", "cpu", 3.0),
    "macpo": ("whole MACPO round, tiny, HH-shaped", "TRL + generate", "wall", 4.0),
    "gpu-dpo": ("H200, Llama-2-7B shape, DPO-LoRA tokens/s", "TRL + PEFT", "wall", 2.5),
    "gpu-dpo-liger": ("the same", "TRL + PEFT + Liger", "wall", 1.5),
    "gpu-memory": ("the same, peak memory", "TRL + PEFT", "memory", 2.0),
    "gpu-dpo-share": (
        "the same, share of the measured matmul ceiling",
        "the card's ceiling",
        "share",
        0.55,
    ),
    "gpu-generate": (
        "H200, sampling, 7B shape, batch 1-16 and 256",
        "transformers generate",
        "wall",
        5.0,
    ),
    "gpu-generate-share": (
        "the same, batch up to 16, share of the bandwidth limit",
        "the card's ceiling",
        "share",
        0.7,
    ),
    "gpu-score": ("H200, scoring, 7B shape", "transformers, batch", "wall", 2.0),
    "gpu-score-share": (
        "the same, share of the matmul ceiling",
        "the card's ceiling",
        "share",
        0.6,
    ),
    "gpu-70b": (
        "a DPO step at 1,024 tokens, 70B shape in int8 or 4 bit, GB free of 140",
        "one card",
        "free_gb",
        0.0,
    ),
}
INTRO = """# Benchmarks

Speed and memory against the libraries that people use, each set up as its own documentation recommends. Made by
`python -m bench.page` from assets/bench/*.json, which `python -m bench.NAME` writes. Own and peer run in turn in one
process on the same texts, dtype, LoRA and optimiser, after both have computed the same; the column "equal" says how nearly. None is written where
fp32 losses or scores are more than 0.1 % apart (on a GPU bf16 ones 5 %), a bf16 loss of DPO more than 0.1, of SFT 0.5 %, of a round 2 %, or where
some token of a greedy text is not, to 0.001 (bf16: 0.25), the peer's likeliest. A ratio is that of neighbours in time (peer / own: above 1, this
project is faster), given as median (lowest-highest). Peak memory is that of a process in which one side runs alone.
Weights are random, which does not matter for speed. CPU time is what ratios are judged by where the machine is shared.
"""


def cell(value, times: bool = True) -> str:
    """A ratio with its range; nothing where there is none."""
    return (
        ""
        if value is None
        else f"{value[0]:.2f}{'×' if times else ''} ({value[1]:.2f}-{value[2]:.2f})"
    )


def worst_rows(benches: list[dict]) -> dict[str, tuple[dict, dict]]:
    """{target: (the row that is furthest from it, of those that were measured; its benchmark)}."""
    found = {}
    for bench in benches:
        for row in bench["rows"]:
            for key in {*row.get("target", ())} & {*TARGETS}:
                which = f"ratio_{TARGETS[key][2]}"
                if row.get(which) and (key not in found or row[which][0] < found[key][0][which][0]):
                    found[key] = row, bench
    return found


def target_rows(benches: list[dict]) -> list[list[str]]:
    """Each target beside what was measured, "short" where that falls short."""
    found = worst_rows(benches)
    rows = []
    for key, (work, peer, which, least) in TARGETS.items():
        row, bench = found.get(key, ({}, {}))
        value, sign = row.get(f"ratio_{which}"), "×" if which in ("cpu", "wall", "memory") else ""
        verdict = "not measured" if value is None else "met" if value[0] >= least else "**short**"
        where = f"bench.{bench['bench']}" if bench else ""
        rows.append(
            [
                work,
                peer,
                f"≥ {least:g}{sign} ({which.replace('_', ' ')})",
                cell(value, bool(sign)),
                verdict,
                where,
            ]
        )
    return rows


def bench_section(bench: dict) -> str:
    """One benchmark: what and where, its table, its notes and pictures."""
    where = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in bench["machine"].items()
    )
    with_what = ", ".join(f"{name} {version}" for name, version in bench["versions"].items())
    head = [
        "work",
        "shape",
        "dtype",
        "peer",
        "CPU time, peer / own",
        "wall, peer / own",
        "peak memory, peer / own",
        "own",
        "peer",
        "equal",
        "note",
    ]
    table = []
    for row in bench["rows"]:
        sides = [
            ", ".join(f"{k} {figure(v)}" for k, v in (row.get(key) or {}).items())
            for key in ("own", "peer_values")
        ]
        ratios = [cell(row.get(f"ratio_{which}")) for which in ("cpu", "wall", "memory")]
        named = [row.get(key, "") or "" for key in ("work", "shape", "dtype", "peer")]
        table.append([*named, *ratios, *sides, row.get("equal", ""), row.get("note", "")])
    used = [i for i in range(len(head)) if any(row[i] for row in table)]
    parts = [
        f"## {bench['bench']}\n",
        f"{bench['title']} `{bench['command']}`\n",
        f"{bench['date']}, commit {bench['commit']}; {where}; {with_what}.\n",
        markdown([head[i] for i in used], [[row[i] for i in used] for row in table]),
    ]
    pictures = [f"![{name}]({(PLACE / name).as_posix()})\n" for name in bench.get("pictures", ())]
    return "\n".join([*parts, *(f"{note}\n" for note in bench.get("notes", ())), *pictures])


def page(place: Path) -> str:
    """BENCHMARKS.md of the JSON files in `place`."""
    benches = [
        json.loads(file.read_text("utf-8"))
        for file in sorted(place.glob("*.json"))
        if not file.stem.endswith("-tiny")
    ]
    targets = markdown(["work", "peer", "target", "measured", "", "by"], target_rows(benches))
    return "\n".join([INTRO, "## Targets\n", targets, *map(bench_section, benches)])


if __name__ == "__main__":
    words([])
    write_atomic(Path("BENCHMARKS.md"), page(PLACE))
