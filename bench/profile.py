"""Where the time of one DPO step goes, beside the floor of its FLOPs: python -m bench.profile [--trace FILE].

The step of bench.dpo (15M, 8 pairs of 128 + 128 tokens) under torch.profiler; `--trace` writes a Chrome trace of it. The floor counts
what cannot be left out: the base's matmuls forward and back through activations, attention, and the head twice.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import SHAPES, bf16_hardware, words, write
from bench.peers import DTYPES, VOCAB, make_folder, make_rows, own_step
from minmacpo.config.validate import parse_model_size

TITLE = "One optimiser step of DPO (15M, 8 pairs of 128 + 128 tokens, LoRA of rank 8 on q and v), one thread, by operator."
PARTS = {
    "matmuls (linears, head)": ("aten::mm", "aten::addmm"),
    "attention": ("bmm", "softmax", "scaled_dot"),
    "exponentials and sums of the head": (
        "aten::exp_",
        "aten::sub_",
        "aten::amax",
        "aten::logsumexp",
    ),
    "copies and casts": ("aten::copy_",),
}


def rate(dtype: torch.dtype, width: int, mlp: int) -> float:
    """FLOPs per second of the base's widest matmul on 1,024 rows, the machine's ceiling for this step."""
    a, b = torch.randn(1024, width).to(dtype), torch.randn(mlp, width).to(dtype)
    a @ b.T
    start = time.process_time()
    for _ in range(100):
        a @ b.T
    return 100 * 2 * 1024 * width * mlp / (time.process_time() - start)


def floor() -> tuple[float, float, float]:
    """FLOPs of a step of the base, of attention and of the head."""
    width, layers, _, mlp = parse_model_size(SHAPES["15M"])
    tokens, trained, body = 8 * 384, 2048, layers * (4 * width * width + 3 * width * mlp)
    body = body * tokens - (2 * width * width + 3 * width * mlp) * (
        tokens - trained
    )  # the last block does the rest for answers alone
    return 4 * body, 3 * layers * 16 * 256 * 256 * 2 * width, 4 * width * VOCAB * trained


def measure(place: Path, dtype: str, trace: str | None) -> tuple[dict, str]:
    """(a row, a paragraph) of one step."""
    width, _, _, mlp = parse_model_size(SHAPES["15M"])
    step, _ = own_step(place, make_rows(8, 128, 128, ("chosen", "rejected")), dtype)
    start = time.process_time()
    step()
    seconds = time.process_time() - start
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    if trace:
        found.export_chrome_trace(trace)
    events = [(event.key, event.self_cpu_time_total) for event in found.key_averages()]
    total = sum(spent for _, spent in events)
    shares = {
        part: sum(spent for key, spent in events if any(name in key for name in names)) / total
        for part, names in PARTS.items()
    }
    flops, ceiling = floor(), rate(DTYPES[dtype], width, mlp)
    least = sum(flops) / ceiling
    shares = {name: round(share, 3) for name, share in shares.items()} | {
        "the rest": round(1 - sum(shares.values()), 3)
    }
    words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    base, attention, head = (f"{part / 1e9:.0f}" for part in flops)
    note = (
        f"**{dtype}**: {seconds:.2f} CPU seconds; {words}. The floor is {sum(flops) / 1e9:.0f} GFLOP (base {base}, attention {attention}, "
        f"head {head}), {least:.2f} s at the {ceiling / 1e9:.0f} GFLOP/s that this core reaches on the base's widest matmul: the step runs at "
        f"{least / seconds:.0%} of that ceiling."
    )
    return {
        "work": "DPO-LoRA step",
        "shape": "15M",
        "dtype": dtype,
        "own": {"cpu_s": round(seconds, 3), "floor_s": round(least, 3)} | shares,
        "peer_values": {},
    }, note


def main(trace: str | None) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), "15M")
        found = [
            measure(Path(folder), dtype, trace)
            for dtype in (["fp32", "bf16"] if bf16_hardware() else ["fp32"])
        ]
    write("profile", TITLE, [row for row, _ in found], notes=[note for _, note in found])


if __name__ == "__main__":
    if (given := words()) and (given[0] != "--trace" or len(given) != 2):
        sys.exit(f"{__doc__}\nerror: expected nothing, or --trace FILE")
    main(given[1] if given else None)
