"""Where the time of one DPO step goes, beside the floor of its FLOPs.

    python -m bench.speed.profile [--trace FILE]

The step of bench/speed/dpo.py (15M, 8 pairs of 128 + 128 tokens) under torch.profiler; --trace
writes a Chrome trace of it. The floor counts what cannot be left out: the base's matmuls forward
and back through activations, attention, and the head twice.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.markdown import named_values
from bench.speed.peers import (
    ANSWERS,
    DTYPES,
    VOCAB,
    Step,
    make_folder,
    make_rows,
    own_step,
    usual_dtypes,
)
from bench.speed.timing import SHAPES, read_words, write_bench
from minmacpo.config.validate import parse_model_size

TITLE = (
    "One optimiser step of DPO (15M, 8 pairs of 128 + 128 tokens, LoRA of rank 8 on q and v), "
    "one thread, by operator."
)
# Parts of a step, and what the names of their operators hold
PARTS = {
    "matmuls (linears, head)": ("aten::mm", "aten::addmm"),
    "attention": ("bmm", "softmax", "scaled_dot"),
    "exponentials and sums of the head": (
        "aten::exp_", "aten::sub_", "aten::amax", "aten::logsumexp",
    ),
    "copies and casts": ("aten::copy_",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flops:
    """What a step cannot do without."""

    base: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.base + self.attention + self.head


def step_flops() -> Flops:
    """FLOPs of a step of the 15M shape."""
    width, layers, _, mlp = parse_model_size(SHAPES["15M"])
    tokens = 8 * 384  # of 8 pairs, the prompt once for both answers
    trained = 2048
    block = 4 * width * width + 3 * width * mlp
    # The last block computes queries, output and MLP for the answers alone
    left_out = (2 * width * width + 3 * width * mlp) * (tokens - trained)
    base = layers * block * tokens - left_out
    attention = 3 * layers * 16 * 256 * 256 * 2 * width
    return Flops(base=4 * base, attention=attention, head=4 * width * VOCAB * trained)


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of the base's widest matmul on 1,024 rows, this step's ceiling."""
    width, _, _, mlp = parse_model_size(SHAPES["15M"])
    a = torch.randn(1024, width).to(dtype)
    b = torch.randn(mlp, width).to(dtype)
    a @ b.T
    start = time.process_time()
    for _ in range(100):
        a @ b.T
    return 100 * 2 * 1024 * width * mlp / (time.process_time() - start)


def shares_by_part(step: Step, trace: str | None) -> dict[str, float]:
    """Which share of a step's time every part takes."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    if trace:
        profiler.export_chrome_trace(trace)

    total = 0.0
    times = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        total += event.self_cpu_time_total
        for part, names in PARTS.items():
            if any(name in event.key for name in names):
                times[part] += event.self_cpu_time_total
    shares = {part: round(spent / total, 3) for part, spent in times.items()}
    shares["the rest"] = round(1 - sum(shares.values()), 3)
    return shares


def measure(folder: Path, dtype: str, trace: str | None) -> tuple[dict, str]:
    """(A row, a paragraph) of one step."""
    step, _ = own_step(folder, make_rows(8, 128, 128, ANSWERS["dpo"]), dtype)
    start = time.process_time()
    step()
    seconds = time.process_time() - start
    shares = shares_by_part(step, trace)

    flops = step_flops()
    ceiling = matmul_rate(DTYPES[dtype])
    floor = flops.total / ceiling
    row = {
        "work": "DPO-LoRA step",
        "shape": "15M",
        "dtype": dtype,
        "own": {"cpu_s": round(seconds, 3), "floor_s": round(floor, 3)} | shares,
        "peer_values": {},
    }
    parts = named_values(shares, ".0%")
    note = (
        f"**{dtype}**: {seconds:.2f} CPU seconds; {parts}. "
        f"The floor is {flops.total / 1e9:.0f} GFLOP (base {flops.base / 1e9:.0f}, "
        f"attention {flops.attention / 1e9:.0f}, head {flops.head / 1e9:.0f}), "
        f"{floor:.2f} s at the {ceiling / 1e9:.0f} GFLOP/s that this core reaches on the base's "
        f"widest matmul: the step runs at {floor / seconds:.0%} of that ceiling."
    )
    return row, note


def main(trace: str | None) -> None:
    """Profile a step in every dtype."""
    torch.set_num_threads(1)
    rows = []
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), "15M")
        for dtype in usual_dtypes():
            row, note = measure(Path(folder), dtype, trace)
            rows.append(row)
            notes.append(note)
    write_bench("profile", TITLE, rows, notes=notes)


if __name__ == "__main__":
    words = read_words()
    if words and (words[0] != "--trace" or len(words) != 2):
        sys.exit(f"{__doc__}\nerror: expected nothing, or --trace FILE")
    main(words[1] if words else None)
