"""How cost grows with sequence length, batch, vocabulary and model size.

    python -m bench.speed.growth

One of the four grows while the others stay at BASE; an exponent is the slope of a line through log
cost over log size, for the whole range and for its upper half, where constants no longer hide the
law. Expected at the limit: 1 in batch; between 1 and 2 in length (attention); up to 1 in
vocabulary; 2 in width, for weights.
"""

import re
from collections.abc import Callable

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
TITLE = (
    "CPU seconds of one DPO-LoRA step (pairs of prompt and answer, half a length each) and of "
    "one sampling step (cache full to the length), fp32, one thread."
)


# ---- what is measured -----------------------------------------------------------------------


def model_of(width: int, vocabulary: int) -> tuple[Transformer, list[torch.nn.Parameter]]:
    """A model of four layers with an adapter, and the adapter's parameters."""
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 48,
        num_key_value_heads=width // 48,
        head_dim=48,
        max_position_embeddings=2048,
    )
    model = new_model(config, 0)
    params = attach_lora(model, Lora())
    init_adapter(model, 0)
    return model, params


def dpo_step(length: int, batch: int, vocabulary: int, width: int) -> Callable:
    """A call that does an optimiser step on `batch` pairs."""
    model, params = model_of(width, vocabulary)
    examples = []
    for i, row in enumerate(make_rows(batch, length // 2, length // 2, ("chosen", "rejected"))):
        small = {name: [token % vocabulary for token in ids] for name, ids in row.items()}
        texts = (joined(small, "chosen"), joined(small, "rejected"))
        examples.append(TrainExample(str(i), texts, (-500.0, -500.0)))
    loss = PreferenceLoss(0.1, 0.2)
    optimizer = torch.optim.AdamW(params, 1e-5, fused=True)
    all_at_once = [list(range(batch))]
    return lambda: train_step(model, params, examples, all_at_once, loss, optimizer, packed=True)


def decode_step(length: int, batch: int, vocabulary: int, width: int) -> Callable:
    """A call that samples one token for `batch` rows behind `length` tokens."""
    model, _ = model_of(width, vocabulary)
    if can_prepack(model):
        model = prepack(model, batch)
    settings = Generate(temperature=0.95, top_k=50, top_p=0.7)
    uniform = torch.rand(batch)
    cache = model.new_cache(batch, length)
    token = torch.ones(batch, 1, dtype=torch.long)
    positions = torch.full((batch,), length - 1)

    @torch.inference_mode()
    def step():
        hidden = model(token, positions=positions, cache=cache)[:, 0]
        return pick_token(model.lm_head(hidden), settings, uniform)

    return step


# ---- exponents ------------------------------------------------------------------------------


def seconds(call: Callable[[], object], least: float = 0.05) -> list[float]:
    """[Median, lowest, highest] CPU seconds of a call, of five measurements.

    A measurement takes at least `least` seconds.
    """
    call()
    _, once = clocked(call)
    times = max(1, round(least / max(once, 1e-4)))

    def many_calls() -> None:
        for _ in range(times):
            call()

    costs = []
    for _ in range(5):
        _, cpu = clocked(many_calls)
        costs.append(cpu / times)
    return spread(costs)


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of the line through (log size, log cost)."""
    slope, _ = np.polyfit(np.log(sizes), np.log(costs), 1)
    return float(f"{slope:.3f}")


def grow(work: str, make: Callable, what: str) -> dict:
    """One row: costs over the range of `what`, and its exponents."""
    sizes = RANGES[what]
    measured = {}
    for size in sizes:
        measured[size] = seconds(make(**BASE | {what: size}))
    costs = [measured[size][0] for size in sizes]
    half = len(sizes) // 2
    own = {
        "exponent": exponent(sizes, costs),
        "exponent_upper": exponent(sizes[half:], costs[half:]),
    }
    for size, cost in measured.items():
        own[f"cpu_s at {size}"] = cost
    return {
        "work": f"{work} over {what}",
        "shape": f"{sizes[0]} to {sizes[-1]}",
        "dtype": "fp32",
        "peer": "",
        "ratio_cpu": None,
        "ratio_wall": None,
        "own": own,
        "peer_values": {},
    }


def curve_of(row: dict) -> list[Point]:
    """Doublings of cost over doublings of size."""
    costs = []
    for name, value in row["own"].items():
        if name.startswith("cpu_s at "):
            costs.append((int(name.split()[-1]), value[0]))
    first_size, first_cost = costs[0]
    points = []
    for size, cost in costs:
        x = float(np.log2(size / first_size))
        y = float(np.log2(cost / first_cost))
        points.append(Point(x, y))
    return points


def plot(rows: list[dict], work: str) -> str:
    """The costs of one kind of work as a chart that stands alone."""
    curves = {}
    for row in rows:
        if row["work"].startswith(work):
            what = row["work"].split()[-1]
            curves[f"{row['own']['exponent']:.2f} in {what}"] = curve_of(row)

    upwards = f"upwards, doublings of the cost of a {work}"
    label = f"doublings of size; {upwards}; beside the lines, exponents"
    drawing = chart(curves, label, ChartSize(900, 400, 220))
    style = read_style() + "svg{background:var(--paper);font:13px system-ui,sans-serif;margin:0}"
    opening = '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="400"'
    return re.sub("^<svg", opening, drawing).replace(">", f"><style>{style}</style>", 1)


def main() -> None:
    """Let each of the four grow, for both kinds of work; what there is so far is written."""
    torch.set_num_threads(1)
    PLACE.mkdir(parents=True, exist_ok=True)
    rows = []
    pictures = []
    notes = [f"All else at {BASE}, four layers."]
    for work, make in {"DPO step": dpo_step, "sampling step": decode_step}.items():
        picture = f"growth-{work.split()[0].lower()}.svg"
        pictures.append(picture)
        for what in RANGES:
            rows.append(grow(work, make, what))
            write_atomic(PLACE / picture, plot(rows, work))
            write_bench("growth", TITLE, rows, pictures=pictures, notes=notes)


if __name__ == "__main__":
    read_words([])
    main()
