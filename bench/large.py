"""A student of 70B on one card: python -m bench.gpu --large [--tiny]; a DPO step at 1,024 tokens, scoring and sampling, in int8 and nf4.

Weights are made at random, layer by layer, where they stay, in the form in which they stay. `--tiny` does all this at toy size, on a
CPU if need be. Both print first what minmacpo/cli/memory_estimate.py counts at the large shape.
"""

import gc
import random
import time
from collections.abc import Iterator

import torch

from bench.gpu import Bench, ceilings, own_dpo, share
from bench.measure import alternate
from bench.peers import make_rows, random_slot
from minmacpo.cli.memory_estimate import PassSize, estimate_memory
from minmacpo.config.schema import Generate, Lora
from minmacpo.core.lora import disable_adapter, get_adapter_weights, set_adapter_weights
from minmacpo.core.model import Transformer
from minmacpo.core.model_config import ModelConfig
from minmacpo.core.sampling import generate
from minmacpo.core.scoring import score
from minmacpo.data.tokenizer import Tokens
from minmacpo.kernels.quantization import QUANTIZED_LINEARS, QuantizedLinear, quantize_linears

TITLE = "A student of Llama-2-70B's shape on one card, quantised: a DPO-LoRA step on a pair of 1,024 tokens a side, scoring, sampling."
SHAPE = (8192, 80, 64, 8, 28672, 32_000)  # width, layers, heads, key heads, MLP, vocabulary
LARGE = {
    "shape": SHAPE,
    "half": 512,
    "texts": 16,
    "new": 128,
    "rows": (1, 16, 64),
    "square": 8192,
    "copy": 2**30,
    "times": 3,
}
TINY = {
    "shape": (64, 2, 4, 2, 128, 32_000),
    "half": 8,
    "texts": 2,
    "new": 8,
    "rows": (1, 4),
    "square": 256,
    "copy": 2**20,
    "times": 1,
}
SPREAD = {
    "int8": 0.02 / 73,
    "nf4": 0.02 / 0.5,
}  # scales with which random codes are weights of standard deviation 0.02


def config_of(shape: tuple[int, ...]) -> ModelConfig:
    width, layers, heads, keys, mlp, vocab = shape
    return ModelConfig(vocab, width, mlp, layers, heads, keys, width // heads, 4096)


def largest_passes(size: dict) -> dict[str, PassSize]:
    """The largest pass of everything that is measured."""
    half = size["half"]
    batch = size["rows"][-1]
    score_rows = min(3 * size["texts"], max(1, 16384 // (2 * half)))
    return {
        "DPO-LoRA step": PassSize("train", rows=2, tokens=3 * half, scored_tokens=2 * half),
        "scoring": PassSize(
            "score",
            rows=score_rows,
            tokens=2 * half * score_rows,
            scored_tokens=half * score_rows,
        ),
        f"sampling, batch {batch}": PassSize(
            "sample",
            rows=batch,
            tokens=batch * half,
            scored_tokens=batch,
            cache_length=half + size["new"],
        ),
    }


def estimated_bytes(size: PassSize, config: ModelConfig, quantization: str) -> int:
    """Of a base in bf16 on a card, its linears quantised."""
    estimate = estimate_memory(
        size, config, Lora(), bytes_per_number=2, quantization=quantization, device="cuda"
    )
    return estimate.total


def show_plan() -> None:
    """What is needed at the large shape, about, for two vocabularies."""
    for vocab in (32_000, 128_256):
        config = config_of((*SHAPE[:-1], vocab))
        for work, size in largest_passes(LARGE).items():
            parts = []
            for quantization in ("none", *QUANTIZED_LINEARS):
                name = "bf16" if quantization == "none" else quantization
                gigabytes = estimated_bytes(size, config, quantization) / 1e9
                parts.append(f"{name} {gigabytes:.0f} GB")
            print(f"plan, 70B, vocabulary {vocab:,}, {work}: {', '.join(parts)}", flush=True)


@torch.no_grad()
def random_model(config: ModelConfig, form: str, device: str) -> Transformer:
    """A model of random weights in bf16, its linears in `form`; nothing else is ever as large as a layer."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
        quantize_linears(model, form)
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.codes.random_(*((-127, 128) if form == "int8" else (0, 256)))
            module.scale.fill_(SPREAD[form])
        for weight in module.parameters(recurse=False):
            weight.fill_(1) if weight.dim() == 1 else weight.normal_(std=0.02)
    return model


def linear_weights(model: Transformer) -> int:
    """Weights of the linear layers of all blocks."""
    total = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.in_features * module.out_features
    return total


class Large(Bench):
    """The model in one form, measured like Bench."""

    def __init__(self, size: dict, form: str, rows: list[dict], began: float):
        self.size, self.form, self.rows, self.began, self.title = size, form, rows, began, TITLE
        self.name = "large-tiny" if size is TINY else "large"
        self.device, self.config = (
            "cuda" if torch.cuda.is_available() else "cpu",
            config_of(size["shape"]),
        )
        torch.manual_seed(0)
        self.model = random_model(self.config, form, self.device)
        self.params = random_slot(self.model)
        self.adapter = get_adapter_weights(self.model)
        self.body = linear_weights(self.model)
        self.head = self.config.vocab_size * self.config.hidden_size

    def row(self, work: str, call, tokens: int) -> dict:
        """Wall seconds, tokens a second, and the peak of the card beside what was counted."""
        row = {"work": work, "dtype": self.form} | alternate(call, None, self.size["times"])
        row["own"]["tokens_per_s"] = tokens / row["own"]["wall_s"][0]
        size = largest_passes(self.size).get(work)
        if size is not None:
            row["own"]["counted_gb"] = estimated_bytes(size, self.config, self.form) / 1e9
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            call()
            row["own"]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return row


def dpo(bench: Large) -> list[dict]:
    """One step on one pair, with stored reference log-probabilities."""
    half = bench.size["half"]
    step = own_dpo(bench, make_rows(1, half, half, ("chosen", "rejected")))
    row = bench.row("DPO-LoRA step", step, 4 * half)
    if peak := row["own"].get("peak_gb"):
        row |= {"target": ["gpu-70b"], "ratio_free_gb": [140 - peak] * 3}
    row["ratio_share"] = share(
        bench, 4 * bench.body * 3 * half + 4 * bench.head * 2 * half, "matmul_flops", row["own"]
    )
    set_adapter_weights(bench.model, bench.adapter)
    return [row]


def scoring(bench: Large) -> list[dict]:
    """Log-probabilities of three answers to each prompt."""
    rng, half, rows = random.Random(0), bench.size["half"], []
    for _ in range(bench.size["texts"]):
        prompt = [rng.randrange(3, bench.config.vocab_size) for _ in range(half)]
        rows += [
            Tokens(
                prompt + [rng.randrange(3, bench.config.vocab_size) for _ in range(half)],
                [False] * half + [True] * half,
            )
            for _ in range(3)
        ]
    row = bench.row(
        "scoring",
        lambda: score(bench.model, rows, 16384, log=lambda text: None, packed=True),
        2 * half * len(rows),
    )
    flops = 2 * bench.body * bench.size["texts"] * 4 * half + 2 * bench.head * len(rows) * half
    row["ratio_share"] = share(bench, flops, "matmul_flops", row["own"])
    return [row]


def sampling(bench: Large) -> Iterator[dict]:
    """Answers side by side; the share is that of one read of the quantised weights and the cache a step."""
    new, half, config = bench.size["new"], bench.size["half"], bench.config
    disable_adapter(bench.model)
    read = sum(
        t.nbytes
        for name, t in bench.model.state_dict().items()
        if "embed" not in name and ".lora_" not in name
    )
    for rows in bench.size["rows"]:
        rng = random.Random(rows)
        prompts = [[rng.randrange(3, config.vocab_size) for _ in range(half)] for _ in range(rows)]
        row = bench.row(
            f"sampling, batch {rows}",
            lambda prompts=prompts, rows=rows: generate(
                bench.model, prompts, range(rows), Generate(0.95, 50, 0.7, new), set()
            ),
            rows * new,
        )
        cache = (
            4
            * rows
            * config.num_hidden_layers
            * config.num_key_value_heads
            * config.head_dim
            * (half + new // 2)
        )
        row["ratio_share"] = share(bench, (read + cache) * new, "copy_bytes", row["own"])
        yield row
    set_adapter_weights(bench.model, bench.adapter)


def main(tiny: bool) -> None:
    show_plan()
    if not tiny and not torch.cuda.is_available():
        raise SystemExit(
            "torch finds no GPU here; python -m bench.gpu --large --tiny runs the same code at toy size"
        )
    rows: list[dict] = []
    began = time.perf_counter()
    for form in QUANTIZED_LINEARS:
        bench = Large(TINY if tiny else LARGE, form, rows, began)
        for measure in (*(() if rows else (ceilings,)), dpo, scoring, sampling):
            bench.add(measure)
        del bench
        gc.collect()
        torch.cuda.empty_cache()
