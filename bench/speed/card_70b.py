"""A student of Llama-2-70B's shape on one card, in int8 and nf4 (bench/speed/gpu.py --large).

A DPO step at 1,024 tokens, scoring and sampling. Weights are made at random, layer by layer, where
they stay, in the form in which they stay. What the memory estimate says of the large shape is
printed first.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator

import torch

from bench.speed.card import SCORING_TOKENS, CardBench, ceilings, random_answers
from bench.speed.peers import config_of, make_rows, random_ids, random_slot
from bench.speed.timing import alternate
from minmacpo.config.schema import Generate, Lora
from minmacpo.core.lora import disable_adapter, get_adapter_weights, set_adapter_weights
from minmacpo.core.memory_estimate import PassSize, estimate_memory
from minmacpo.core.model import Transformer
from minmacpo.core.model_config import ModelConfig
from minmacpo.core.sampling import generate
from minmacpo.kernels.quantization import QUANTIZED_LINEARS, QuantizedLinear, quantize_linears

TITLE = (
    "A student of Llama-2-70B's shape on one card, quantised: "
    "a DPO-LoRA step on a pair of 1,024 tokens a side, scoring, sampling."
)
SHAPE = (8192, 80, 64, 8, 28672, 32_000)  # width, layers, heads, key heads, MLP, vocabulary
POSITIONS = 4096
# half: tokens of a prompt, and of an answer
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
# Scales with which random codes are weights of standard deviation 0.02
SCALES = {"int8": 0.02 / 73, "nf4": 0.02 / 0.5}


# ---- the estimate of memory -----------------------------------------------------------------


def largest_passes(size: dict) -> dict[str, PassSize]:
    """The largest pass of everything that is measured."""
    half = size["half"]
    batch = size["rows"][-1]
    texts = min(3 * size["texts"], max(1, SCORING_TOKENS // (2 * half)))
    return {
        "DPO-LoRA step": PassSize("train", rows=2, tokens=3 * half, scored_tokens=2 * half),
        "scoring": PassSize(
            "score", rows=texts, tokens=2 * half * texts, scored_tokens=half * texts
        ),
        f"sampling, batch {batch}": PassSize(
            "sample",
            rows=batch,
            tokens=batch * half,
            scored_tokens=batch,
            cache_length=half + size["new"],
        ),
    }


def estimated_gb(size: PassSize, config: ModelConfig, quantization: str) -> float:
    """What the memory estimate says of a pass, in GB; two bytes a number where not quantised."""
    estimate = estimate_memory(
        size, config, Lora(), bytes_per_number=2, quantization=quantization, device="cuda"
    )
    return estimate.total / 1e9


def show_plan() -> None:
    """Print what is needed at the large shape, for two vocabularies."""
    for vocab in (32_000, 128_256):
        config = config_of((*SHAPE[:-1], vocab), POSITIONS)
        for work, size in largest_passes(LARGE).items():
            parts = []
            for quantization in ("none", *QUANTIZED_LINEARS):
                name = "bf16" if quantization == "none" else quantization
                parts.append(f"{name} {estimated_gb(size, config, quantization):.0f} GB")
            print(f"plan, 70B, vocabulary {vocab:,}, {work}: {', '.join(parts)}", flush=True)


# ---- the model ------------------------------------------------------------------------------


@torch.no_grad()
def random_model(config: ModelConfig, quantization: str, device: str) -> Transformer:
    """A model of random weights in bf16 with quantised linears, never larger than it stays."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
        quantize_linears(model, quantization)
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            if quantization == "int8":
                module.codes.random_(-127, 128)
            else:
                module.codes.random_(0, 256)
            module.scale.fill_(SCALES[quantization])
        for weight in module.parameters(recurse=False):
            if weight.dim() == 1:  # of a norm
                weight.fill_(1)
            else:
                weight.normal_(std=0.02)
    return model


def block_weights(config: ModelConfig) -> int:
    """How many weights the linear layers of all blocks have."""
    with torch.device("meta"):
        model = Transformer(config)
    count = 0
    for weight in model.model.layers.parameters():
        if weight.dim() == 2:
            count += weight.numel()
    return count


class Large(CardBench):
    """The measurements of the model in one quantisation."""

    title = TITLE

    def __init__(self, size: dict, quantization: str, rows: list[dict], began: float):
        super().__init__(rows, began)
        self.size = size
        self.quantization = quantization
        self.name = "large-tiny" if size is TINY else "large"
        self.config = config_of(size["shape"], POSITIONS)

        torch.manual_seed(0)
        self.model = random_model(self.config, quantization, self.device)
        self.params = random_slot(self.model)
        self.adapter = get_adapter_weights(self.model)
        self.body = block_weights(self.config)
        self.head = self.config.vocab_size * self.config.hidden_size

    def row(self, work: str, call: Callable[[], object], tokens: int) -> dict:
        """Wall seconds, tokens a second, and the peak of the card beside the estimate."""
        row = {"work": work, "dtype": self.quantization}
        row |= alternate(call, None, self.size["times"])
        row["own"]["tokens_per_s"] = tokens / row["own"]["wall_s"][0]
        size = largest_passes(self.size).get(work)
        if size:
            row["own"]["counted_gb"] = estimated_gb(size, self.config, self.quantization)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            call()
            row["own"]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return row


# ---- what is measured -----------------------------------------------------------------------


def dpo(bench: Large) -> list[dict]:
    """One step on one pair, with stored reference log-probabilities."""
    half = bench.size["half"]
    step = bench.dpo_step(make_rows(1, half, half, ("chosen", "rejected")))
    row = bench.row("DPO-LoRA step", step, 4 * half)
    peak = row["own"].get("peak_gb")
    if peak:
        row["target"] = ["gpu-70b"]
        row["ratio_free_gb"] = [140 - peak] * 3
    # One prompt and two answers; only the answers pass the head
    flops = 4 * bench.body * 3 * half + 4 * bench.head * 2 * half
    row["ratio_share"] = bench.share_of("matmul_flops", flops, row["own"])
    set_adapter_weights(bench.model, bench.adapter)
    return [row]


def scoring(bench: Large) -> list[dict]:
    """Log-probabilities of three answers to each prompt."""
    half = bench.size["half"]
    texts = bench.size["texts"]
    rows = random_answers(random.Random(0), bench.config.vocab_size, texts, half)

    def call() -> list[float]:
        return bench.score(rows, packed=True)

    tokens = 2 * half * len(rows)
    row = bench.row("scoring", call, tokens)
    # A prompt is computed once for its three answers
    body_flops = 2 * bench.body * texts * 4 * half
    head_flops = 2 * bench.head * len(rows) * half
    flops = body_flops + head_flops
    row["ratio_share"] = bench.share_of("matmul_flops", flops, row["own"])
    return [row]


def sampling(bench: Large) -> Iterator[dict]:
    """Answers side by side.

    The share is that of one read of the quantised weights and the cache a step.
    """
    new = bench.size["new"]
    half = bench.size["half"]
    config = bench.config
    settings = Generate(temperature=0.95, top_k=50, top_p=0.7, max_new_tokens=new)
    disable_adapter(bench.model)
    weights = 0
    for name, tensor in bench.model.state_dict().items():
        if "embed" not in name and ".lora_" not in name:
            weights += tensor.nbytes

    for batch in bench.size["rows"]:
        rng = random.Random(batch)
        prompts = [random_ids(rng, half, config.vocab_size) for _ in range(batch)]

        def call(prompts=prompts):
            return generate(bench.model, prompts, range(len(prompts)), settings, set())

        row = bench.row(f"sampling, batch {batch}", call, batch * new)
        # Keys and values, two bytes each, of half the answer on average
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        cache = 2 * batch * numbers * (half + new // 2)
        row["ratio_share"] = bench.share_of("copy_bytes", (weights + cache) * new, row["own"])
        yield row
    set_adapter_weights(bench.model, bench.adapter)


def main(tiny: bool) -> None:
    """Measure everything; `tiny`: at toy size."""
    show_plan()
    if not tiny and not torch.cuda.is_available():
        command = "python -m bench.speed.gpu --large --tiny"
        raise SystemExit(f"torch finds no GPU here; {command} runs the same code at toy size")

    rows: list[dict] = []
    began = time.perf_counter()
    for quantization in QUANTIZED_LINEARS:
        bench = Large(TINY if tiny else LARGE, quantization, rows, began)
        if not rows:
            bench.add(ceilings)
        for measure in (dpo, scoring, sampling):
            bench.add(measure)
        # The next model is made where this one lies
        del bench
        gc.collect()
        torch.cuda.empty_cache()
