"""One DPO-LoRA step against TRL + PEFT: python -m bench.speed.dpo [SHAPE] [DTYPE] [VARIANT].

8 pairs of 128 + 128 tokens, LoRA of rank 8 on q and v. `--peak SIDE SHAPE DTYPE` prints the peak
memory of a process that does two steps of one side.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.speed.peers import (
    ANSWERS,
    DTYPES,
    make_folder,
    make_rows,
    own_step,
    trl_step,
    usual_dtypes,
)
from bench.speed.timing import (
    SHAPES,
    alternate,
    missing,
    read_words,
    run_alone,
    spread,
    write_bench,
)
from minmacpo.runtime.device import peak_mb

TITLE = (
    "One optimiser step of DPO on 8 pairs of 128 + 128 tokens, LoRA of rank 8 on q and v, "
    "one thread."
)
ROWS = {"dpo": 8, "sft": 16}  # of a step
PLAIN = {"gradient_checkpointing": False}


@dataclass(frozen=True, slots=True)
class Variant:
    """What is compared.

    Attributes:
        target: the key of the target, with the shape and dtype in it.
        peer: the name of the other side.
        settings: of the peer.
        store: whether our reference is computed before, once.
    """

    target: str
    peer: str
    settings: dict = field(default_factory=dict)
    store: bool = True


VARIANTS = {
    "plain": Variant("dpo-{}", "TRL + PEFT", PLAIN),
    "precomputed": Variant(
        "dpo-{}-precomputed",
        "TRL + PEFT, reference precomputed",
        PLAIN | {"precompute_ref_log_probs": True},
    ),
    "default": Variant("dpo-{}-default", "TRL + PEFT, its default: gradient checkpointing"),
    "both": Variant("dpo-{}-both", "TRL + PEFT; own reference in the step too", PLAIN, store=False),
}


# ---- memory ---------------------------------------------------------------------------------


def show_peak(side: str, size: str, dtype: str, kind: str = "dpo") -> None:
    """Print {"peak_mb"} of this process after two steps.

    Args:
        side: "own", "peer", or "peer-default" for TRL's default settings.
    """
    rows = make_rows(ROWS[kind], 128, 128, ANSWERS[kind])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # In a process of its own, so that this one holds one side alone
        run_alone("bench.speed.peers", place, size)
        if side == "own":
            step, _ = own_step(folder, rows, dtype, kind)
        elif side == "peer":
            step, _ = trl_step(folder, rows, dtype, kind, **PLAIN)
        else:
            step, _ = trl_step(folder, rows, dtype, kind)
        step()
    print(json.dumps({"peak_mb": round(peak_mb())}))


def add_memory(row: dict, size: str, dtype: str, side: str, kind: str = "dpo") -> None:
    """Add peak memory of both sides to a row, from processes of their own."""
    peaks = {}
    for name in ("own", side):
        [result] = run_alone(f"bench.speed.{kind}", "--peak", name, size, dtype)
        peaks[name] = result["peak_mb"]
    row["ratio_memory"] = spread([peaks[side] / peaks["own"]])
    row["own"]["peak_mb"] = peaks["own"]
    row["peer_values"]["peak_mb"] = peaks[side]


# ---- time -----------------------------------------------------------------------------------


def compare(folder: Path, size: str, dtype: str, variant: Variant, lacks: str) -> dict:
    """One row, timed after both sides have shown the same loss.

    Args:
        lacks: which packages of the peer are missing; then only the own side is timed.
    """
    rows = make_rows(ROWS["dpo"], 128, 128, ANSWERS["dpo"])
    own, own_loss = own_step(folder, rows, dtype, store=variant.store)
    row = {
        "work": "DPO-LoRA step",
        "shape": size,
        "dtype": dtype,
        "peer": variant.peer,
        "target": [variant.target.format(f"{size.lower()}-{dtype}")],
        "note": lacks,
    }
    if lacks:
        return row | alternate(own, None)

    peer, peer_loss = trl_step(folder, rows, dtype, **variant.settings)
    row["equal"] = f"loss {own_loss:.4f} / {peer_loss:.4f}"
    tolerance = 1e-4
    exact_loss = own_loss
    if dtype == "bf16":
        tolerance = 0.1
        _, exact_loss = own_step(folder, rows, "fp32")
        row["equal"] += f" (in fp32 {exact_loss:.4f}; logps are sums over 128 tokens)"
    if abs(own_loss - peer_loss) > tolerance or abs(own_loss - exact_loss) > 0.1:
        raise SystemExit(f"{size} {dtype}: the losses differ, {own_loss} and {peer_loss}")
    return row | alternate(own, peer, warm=False)


def main(sizes: list[str], dtypes: list[str], variants: list[str]) -> None:
    """Measure every variant at every shape and dtype; what there is so far is always written."""
    torch.set_num_threads(1)
    lacks = missing("trl", "peft", "transformers", "datasets")
    if lacks:
        variants = variants[:1]
    for size in sizes:
        for dtype in dtypes:
            with tempfile.TemporaryDirectory() as folder:
                make_folder(Path(folder), size)
                for name in variants:
                    row = compare(Path(folder), size, dtype, VARIANTS[name], lacks)
                    if dtype == "bf16" and not lacks:
                        if name == "plain":
                            add_memory(row, size, dtype, "peer")
                            row["target"].append(f"memory-{size.lower()}")
                        elif name == "default":
                            add_memory(row, size, dtype, "peer-default")
                    write_bench("dpo", TITLE, [row], keep=True)


if __name__ == "__main__":
    if "--peak" in sys.argv:
        torch.set_num_threads(1)
        show_peak(*sys.argv[2:])
    else:
        words = read_words([*SHAPES, *DTYPES, *VARIANTS])
        main(
            sizes=[word for word in words if word in SHAPES] or list(SHAPES),
            dtypes=[word for word in words if word in DTYPES] or usual_dtypes(),
            variants=[word for word in words if word in VARIANTS] or list(VARIANTS),
        )
