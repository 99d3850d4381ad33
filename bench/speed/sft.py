"""One SFT-LoRA step against TRL + PEFT: python -m bench.speed.sft [DTYPE].

16 rows of 128 + 128 tokens, LoRA of rank 8 on q and v. `--peak SIDE SHAPE DTYPE` prints the peak
memory of a process that does two steps of one side.
"""

import sys
import tempfile
from pathlib import Path

import torch

from bench.speed.dpo import PLAIN, ROWS, Variant, add_memory, show_peak
from bench.speed.peers import ANSWERS, make_folder, make_rows, own_step, read_dtypes, trl_step
from bench.speed.timing import alternate, missing, write_bench

SIZE = "15M"
TITLE = (
    "One optimiser step of SFT on 16 rows of 128 + 128 tokens, the last 128 trained on, "
    "LoRA of rank 8 on q and v, 15M, one thread."
)
PLAIN_VARIANT = Variant("sft-15m-{}", "TRL + PEFT", PLAIN)
DEFAULT_VARIANT = Variant("sft-15m-{}-default", "TRL + PEFT, its default: gradient checkpointing")


def compare(folder: Path, dtype: str, variant: Variant, lacks: str) -> dict:
    """One row, timed after both sides have shown the same loss."""
    rows = make_rows(ROWS["sft"], 128, 128, ANSWERS["sft"])
    own, own_loss = own_step(folder, rows, dtype, "sft")
    row = {
        "work": "SFT-LoRA step",
        "shape": SIZE,
        "dtype": dtype,
        "peer": variant.peer,
        "target": [variant.target.format(dtype)],
        "note": lacks,
    }
    if lacks:
        return row | alternate(own, None)

    peer, peer_loss = trl_step(folder, rows, dtype, "sft", **variant.settings)
    tolerance = 1e-4 if dtype == "fp32" else 5e-3
    if abs(own_loss - peer_loss) > tolerance * peer_loss:
        raise SystemExit(f"{dtype}: the losses differ, {own_loss} and {peer_loss}")
    row["equal"] = f"loss {own_loss:.4f} / {peer_loss:.4f}"
    return row | alternate(own, peer, warm=False)


def main(dtypes: list[str]) -> None:
    """Measure every dtype; bf16 also against TRL's default settings."""
    torch.set_num_threads(1)
    lacks = missing("trl", "peft", "transformers", "datasets")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), SIZE)
        for dtype in dtypes:
            row = compare(Path(folder), dtype, PLAIN_VARIANT, lacks)
            rows.append(row)
            if not lacks:
                add_memory(row, SIZE, dtype, "peer", "sft")
            write_bench("sft", TITLE, rows, keep=True)

            if dtype == "bf16" and not lacks:
                row = compare(Path(folder), dtype, DEFAULT_VARIANT, lacks)
                rows.append(row)
                add_memory(row, SIZE, dtype, "peer-default", "sft")
                write_bench("sft", TITLE, rows, keep=True)


if __name__ == "__main__":
    if "--peak" in sys.argv:
        torch.set_num_threads(1)
        show_peak(*sys.argv[2:], kind="sft")
    else:
        main(read_dtypes())
