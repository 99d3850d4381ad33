"""One SFT-LoRA step against TRL + PEFT: python -m bench.sft [DTYPE]; 16 rows of 128 + 128 tokens, LoRA of rank 8 on q and v.

`--peak SIDE SHAPE DTYPE` prints the peak memory of a process that does two steps of one side.
"""

import sys
import tempfile
from pathlib import Path

import torch

from bench.dpo import PLAIN, memory, peak
from bench.measure import alternate, bf16_hardware, missing, words, write
from bench.peers import DTYPES, make_folder, make_rows, own_step, trl_step

TITLE = "One optimiser step of SFT on 16 rows of 128 + 128 tokens, the last 128 trained on, LoRA of rank 8 on q and v, 15M, one thread."
VARIANTS = [
    ("sft-15m-{}", "TRL + PEFT", PLAIN),
    ("sft-15m-{}-default", "TRL + PEFT, its default: gradient checkpointing", {}),
]


def compare(place: Path, dtype: str, variant: tuple, lacks: str) -> dict:
    """One row, timed after both sides have shown the same loss."""
    key, peer, settings = variant
    rows = make_rows(16, 128, 128, ("completion",))
    mine, loss = own_step(place, rows, dtype, "sft")
    row = {
        "work": "SFT-LoRA step",
        "shape": "15M",
        "dtype": dtype,
        "peer": peer,
        "target": [key.format(dtype)],
        "note": lacks,
    }
    if lacks:
        return row | alternate(mine, None, 5)
    theirs, other = trl_step(place, rows, dtype, "sft", **settings)
    if abs(loss - other) > (1e-4 if dtype == "fp32" else 5e-3) * other:
        raise SystemExit(f"{dtype}: the losses differ, {loss} and {other}")
    return (
        row | alternate(mine, theirs, 5, warm=False) | {"equal": f"loss {loss:.4f} / {other:.4f}"}
    )


def main(dtypes: list[str]) -> None:
    torch.set_num_threads(1)
    lacks, rows = missing("trl", "peft", "transformers", "datasets"), []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), "15M")
        for dtype in dtypes:
            for number, variant in enumerate(VARIANTS[: 1 if lacks or dtype == "fp32" else 2]):
                rows.append(row := compare(Path(folder), dtype, variant, lacks))
                if not lacks:
                    found = memory("15M", dtype, "peer" if number == 0 else "peer-default", "sft")
                    row["ratio_memory"] = found["ratio_memory"]
                    for values in ("own", "peer_values"):
                        row[values] |= found[values]
                write("sft", TITLE, rows, keep=True)


if __name__ == "__main__":
    if "--peak" in sys.argv:
        torch.set_num_threads(1)
        peak(*sys.argv[2:], kind="sft")
    else:
        main(words(DTYPES) or (["fp32", "bf16"] if bf16_hardware() else ["fp32"]))
