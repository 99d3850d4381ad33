"""One DPO-LoRA step against TRL + PEFT: python -m bench.dpo [SHAPE] [DTYPE] [VARIANT]; 8 pairs of 128 + 128 tokens, LoRA of rank 8 on q and v.

`--peak SIDE SHAPE DTYPE` prints the peak memory of a process that does two steps of one side.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from bench.measure import SHAPES, alone, alternate, bf16_hardware, missing, spread, words, write
from bench.peers import DTYPES, make_folder, make_rows, own_step, trl_step
from minmacpo.runtime.device import peak_mb

TITLE = "One optimiser step of DPO on 8 pairs of 128 + 128 tokens, LoRA of rank 8 on q and v, one thread."
PLAIN = {"gradient_checkpointing": False}
VARIANTS = {  # what is compared: key of the target by shape and dtype, name of the peer, its settings, is our reference stored
    "plain": ("dpo-{}", "TRL + PEFT", PLAIN, True),
    "precomputed": (
        "dpo-{}-precomputed",
        "TRL + PEFT, reference precomputed",
        PLAIN | {"precompute_ref_log_probs": True},
        True,
    ),
    "default": ("dpo-{}-default", "TRL + PEFT, its default: gradient checkpointing", {}, True),
    "both": ("dpo-{}-both", "TRL + PEFT; own reference in the step too", PLAIN, False),
}


def peak(side: str, size: str, dtype: str, kind: str = "dpo") -> None:
    """Print {"peak_mb"} of this process after two steps."""
    names = ("chosen", "rejected") if kind == "dpo" else ("completion",)
    rows = make_rows(8 if kind == "dpo" else 16, 128, 128, names)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        alone("bench.peers", folder, size)  # so that this process holds one side alone
        step, _ = (
            own_step(place, rows, dtype, kind)
            if side == "own"
            else trl_step(place, rows, dtype, kind, **(PLAIN if side == "peer" else {}))
        )
        step()
    print(json.dumps({"peak_mb": round(peak_mb())}))


def memory(size: str, dtype: str, side: str, kind: str = "dpo") -> dict:
    """The memory part of a row, from processes of their own."""
    module = f"bench.{kind}"
    mine, theirs = (
        alone(module, "--peak", who, size, dtype)[0]["peak_mb"] for who in ("own", side)
    )
    return {
        "ratio_memory": spread([theirs / mine]),
        "own": {"peak_mb": mine},
        "peer_values": {"peak_mb": theirs},
    }


def compare(place: Path, size: str, dtype: str, variant: tuple, lacks: str, times: int) -> dict:
    """One row, timed after both sides have shown the same loss."""
    key, peer, settings, store = variant
    rows = make_rows(8, 128, 128, ("chosen", "rejected"))
    mine, loss = own_step(place, rows, dtype, store=store)
    row = {
        "work": "DPO-LoRA step",
        "shape": size,
        "dtype": dtype,
        "peer": peer,
        "target": [key.format(f"{size.lower()}-{dtype}")],
        "note": lacks,
    }
    if lacks:
        return row | alternate(mine, None, times)
    theirs, other = trl_step(place, rows, dtype, **settings)
    exact = loss if dtype == "fp32" else own_step(place, rows, "fp32")[1]
    if abs(loss - other) > (1e-4 if dtype == "fp32" else 0.1) or abs(loss - exact) > 0.1:
        raise SystemExit(f"{size} {dtype}: the losses differ, {loss} and {other}")
    equal = f"loss {loss:.4f} / {other:.4f}" + (
        f" (in fp32 {exact:.4f}; logps are sums over 128 tokens)" if dtype == "bf16" else ""
    )
    return row | alternate(mine, theirs, times, warm=False) | {"equal": equal}


def add_memory(row: dict, size: str, dtype: str) -> None:
    """Peak memory of both sides, in the row and as the target of its shape."""
    side = "peer" if row["peer"] == "TRL + PEFT" else "peer-default"
    found = memory(size, dtype, side)
    row["ratio_memory"] = found["ratio_memory"]
    row["target"] += [f"memory-{size.lower()}"] if dtype == "bf16" and side == "peer" else []
    for values in ("own", "peer_values"):
        row[values] |= found[values]


def main(sizes: list[str], dtypes: list[str], variants: list[str]) -> None:
    torch.set_num_threads(1)
    lacks = missing("trl", "peft", "transformers", "datasets")
    for size, dtype in ((size, dtype) for size in sizes for dtype in dtypes):
        with tempfile.TemporaryDirectory() as folder:
            make_folder(Path(folder), size)
            for name in variants[:1] if lacks else variants:
                row = compare(Path(folder), size, dtype, VARIANTS[name], lacks, 5)
                if not lacks and (name, dtype) in (("plain", "bf16"), ("default", "bf16")):
                    add_memory(row, size, dtype)
                write("dpo", TITLE, [row], keep=True)  # what there is so far


if __name__ == "__main__":
    if "--peak" in sys.argv:
        torch.set_num_threads(1)
        peak(*sys.argv[2:])
    else:
        chosen, both = (
            words([*SHAPES, *DTYPES, *VARIANTS]),
            ["fp32", "bf16"] if bf16_hardware() else ["fp32"],
        )
        found = [
            [word for word in chosen if word in known] or list(usual)
            for known, usual in ((SHAPES, SHAPES), (DTYPES, both), (VARIANTS, VARIANTS))
        ]
        main(*found)
