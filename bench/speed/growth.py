"""How cost grows with sequence length, batch, vocabulary and model size: python -m bench.speed.growth; exponents and a plot.

One of the four grows while the others stay at BASE; an exponent is the slope of a line through log cost over log size, for the
whole range and for its upper half, where constants no longer hide the law. Expected at the limit: 1 in batch; between 1 and 2
in length (attention); up to 1 in vocabulary; 2 in width, for weights.
"""

import re

import numpy as np
import torch

from bench.speed.peers import joined, make_rows
from bench.speed.timing import PLACE, clocked, read_words, spread, write_bench
from minmacpo.config.schema import Generate, Lora
from minmacpo.core.lora import attach_lora, init_adapter
from minmacpo.core.losses import PreferenceLoss
from minmacpo.core.model import Transformer, new_model
from minmacpo.core.model_config import ModelConfig
from minmacpo.core.prepack import can_prepack, prepack
from minmacpo.core.sampling import pick_token
from minmacpo.core.trainer import TrainExample, train_step
from minmacpo.evaluation.charts import ChartSize, Point, chart
from minmacpo.evaluation.html import read_style
from minmacpo.runtime.files import write_atomic

BASE = {"length": 128, "batch": 4, "vocabulary": 16_000, "width": 192}
RANGES = {
    "length": (64, 128, 256, 512),
    "batch": (2, 4, 8, 16),
    "vocabulary": (4_000, 8_000, 16_000, 32_000),
    "width": (96, 192, 384, 768),
}
TITLE = "CPU seconds of one DPO-LoRA step (pairs of prompt and answer, half a length each) and of one sampling step (cache full to the length), fp32, one thread."


def new(width: int, vocabulary: int) -> tuple[Transformer, list]:
    """A model of four layers with a slot, and the slot's parameters."""
    model = new_model(
        ModelConfig(vocabulary, width, 4 * width, 4, width // 48, width // 48, 48, 2048), 0
    )
    params = attach_lora(model, Lora())
    init_adapter(model, 0)
    return model, params


def dpo_step(length: int, batch: int, vocabulary: int, width: int):
    """A call that does an optimiser step on `batch` pairs."""
    model, params = new(width, vocabulary)
    rows = [
        {side: [i % vocabulary for i in ids] for side, ids in row.items()}
        for row in make_rows(batch, length // 2, length // 2, ("chosen", "rejected"))
    ]
    units = [
        TrainExample(str(i), (joined(row, "chosen"), joined(row, "rejected")), (-500.0, -500.0))
        for i, row in enumerate(rows)
    ]
    optimizer = torch.optim.AdamW(params, 1e-5, fused=True)
    return lambda: train_step(
        model, params, units, [[*range(batch)]], PreferenceLoss(0.1, 0.2), optimizer, packed=True
    )


def decode_step(length: int, batch: int, vocabulary: int, width: int):
    """A call that samples one token for `batch` rows behind `length` tokens."""
    model, settings, uniform = new(width, vocabulary)[0], Generate(0.95, 50, 0.7), torch.rand(batch)
    model = prepack(model, batch) if can_prepack(model) else model
    cache, token, where = (
        model.new_cache(batch, length),
        torch.ones(batch, 1, dtype=torch.long),
        torch.full((batch,), length - 1),
    )

    @torch.inference_mode()
    def step():
        return pick_token(
            model.lm_head(model(token, positions=where, cache=cache)[:, 0]), settings, uniform
        )

    return step


def seconds(call, least: float = 0.05) -> list[float]:
    """[median, lowest, highest] CPU seconds of a call, of five measurements of at least so long."""
    call()
    times = max(1, round(least / max(clocked(call)[1], 1e-4)))
    return spread([clocked(lambda: [call() for _ in range(times)])[1] / times for _ in range(5)])


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of the line through (log size, log cost)."""
    return float(f"{np.polyfit(np.log(sizes), np.log(costs), 1)[0]:.3f}")


def grow(work: str, make, what: str) -> dict:
    """One row: costs over the range of `what`, and its exponents."""
    sizes = RANGES[what]
    found = [seconds(make(**BASE | {what: size})) for size in sizes]
    costs = [cost[0] for cost in found]
    half = len(sizes) // 2
    return {
        "work": f"{work} over {what}",
        "shape": f"{sizes[0]} to {sizes[-1]}",
        "dtype": "fp32",
        "peer": "",
        "ratio_cpu": None,
        "ratio_wall": None,
        "own": {
            "exponent": exponent(sizes, costs),
            "exponent_upper": exponent(sizes[half:], costs[half:]),
            **{f"cpu_s at {size}": cost for size, cost in zip(sizes, found, strict=True)},
        },
        "peer_values": {},
    }


def plot(rows: list[dict], work: str) -> str:
    """The costs of one kind of work as a chart that stands alone: doublings of cost over doublings of size."""
    lines = {}
    for row in (row for row in rows if row["work"].startswith(work)):
        points = [
            (int(key.split()[-1]), value[0])
            for key, value in row["own"].items()
            if key.startswith("cpu_s")
        ]
        name = f"{row['own']['exponent']:.2f} in {row['work'].split()[-1]}"
        lines[name] = [
            Point(float(np.log2(size / points[0][0])), float(np.log2(cost / points[0][1])))
            for size, cost in points
        ]
    style = read_style() + "svg{background:var(--paper);font:13px system-ui,sans-serif;margin:0}"
    drawing = chart(
        lines,
        f"doublings of size; upwards, doublings of the cost of a {work}; beside the lines, exponents",
        ChartSize(900, 400, 220),
    )
    return re.sub(
        "^<svg", '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="400"', drawing
    ).replace(">", f"><style>{style}</style>", 1)


def main() -> None:
    torch.set_num_threads(1)
    rows, pictures = [], []
    PLACE.mkdir(parents=True, exist_ok=True)
    for work, make in {"DPO step": dpo_step, "sampling step": decode_step}.items():
        pictures.append(f"growth-{work.split()[0].lower()}.svg")
        for what in RANGES:
            rows.append(grow(work, make, what))
            write_atomic(PLACE / pictures[-1], plot(rows, work))
            write_bench(
                "growth",
                TITLE,
                rows,
                pictures=pictures,
                notes=[f"All else at {BASE}, four layers."],
            )  # what there is so far


if __name__ == "__main__":
    read_words([])
    main()
