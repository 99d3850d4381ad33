"""DPO-LoRA, sampling and scoring at Llama-2-7B's shape on one card (bench/speed/gpu.py).

The peer's model has this project's very tensors, so that both fit.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.speed.card import CardBench, ceilings, random_answers
from bench.speed.generate import by_transformers
from bench.speed.peers import (
    config_of,
    make_rows,
    random_ids,
    random_slot,
    step_of,
    trl_trainer,
)
from bench.speed.score import by_transformers as score_by_transformers
from bench.speed.timing import INSTALL, alternate, largest_difference, missing, spread
from minmacpo.config.schema import Generate
from minmacpo.core.lora import disable_adapter, get_adapter_weights, set_adapter_weights
from minmacpo.core.model import Transformer
from minmacpo.core.model_config import ModelConfig
from minmacpo.core.sampling import generate

TITLE = (
    "One card: DPO-LoRA, sampling and scoring at Llama-2-7B's shape in bf16, "
    "beside the card's own ceilings measured in the same run."
)
# shape: width, layers, heads, width of the MLP, vocabulary
LARGE = {
    "shape": (4096, 32, 32, 11008, 32_000),
    "pairs": 8,
    "tokens": 256,
    "new": 128,
    "rows": (1, 16, 256),
    "square": 8192,
    "copy": 2**30,
    "times": 5,
}
TINY = {
    "shape": (64, 2, 4, 128, 32_000),
    "pairs": 2,
    "tokens": 16,
    "new": 8,
    "rows": (1, 4),
    "square": 256,
    "copy": 2**20,
    "times": 2,
}


class Bench(CardBench):
    """The measurements of a model in bf16 beside other libraries."""

    title = TITLE

    def __init__(self, tiny: bool):
        super().__init__(rows=[], began=time.perf_counter())
        self.name = "gpu-tiny" if tiny else "gpu"
        self.size = TINY if tiny else LARGE
        width, layers, heads, mlp, vocab = self.size["shape"]
        self.config = config_of((width, layers, heads, heads, mlp, vocab))

        torch.manual_seed(0)
        self.model = random_model(self.config, self.device)
        self.plain = dict(self.model.state_dict())
        self.params = random_slot(self.model)
        self.adapter = get_adapter_weights(self.model)
        self.body = 0
        for name, weight in self.plain.items():
            if "layers" in name:
                self.body += weight.numel()
        self.head = self.plain["lm_head.weight"].numel()

    def timed(self, own: Callable, peer: Callable | None, peaks: bool = False) -> dict:
        """`alternate`, and on a GPU the peak of each side's tensors in GB."""
        row = alternate(own, peer, self.size["times"])
        if not peaks or self.device == "cpu":
            return row

        row["own"]["peak_gb"] = peak_gb(own)
        if peer:
            row["peer_values"]["peak_gb"] = peak_gb(peer)
            ratio = row["peer_values"]["peak_gb"] / row["own"]["peak_gb"]
            row["ratio_memory"] = spread([ratio])
        return row


def random_model(config: ModelConfig, device: str) -> Transformer:
    """A model of random weights in bf16, made on the device."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model.to_empty(device=device)
    for weight in model.parameters():
        if weight.dim() == 1:  # of a norm
            torch.nn.init.ones_(weight)
        else:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def peak_gb(call: Callable[[], object]) -> float:
    """The largest size of the tensors on the GPU during a call."""
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30


def peer_model(bench: Bench):
    """transformers' model on this project's tensors, without adapter."""
    import transformers

    own = bench.config
    config = transformers.LlamaConfig(
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_hidden_layers=own.num_hidden_layers,
        num_attention_heads=own.num_attention_heads,
        max_position_embeddings=own.max_position_embeddings,
        rms_norm_eps=own.rms_norm_eps,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(bench.plain, assign=True)
    # The rotary tables are no weights: they still lie on the meta device
    with torch.device(bench.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


# ---- DPO ------------------------------------------------------------------------------------


def trl_dpo(bench: Bench, rows: list[dict], folder: str, liger: bool) -> Callable[[], float]:
    """The same step of TRL on PEFT, with Liger's loss if wanted."""
    settings = {"bf16": True, "use_liger_kernel": liger}
    trainer = trl_trainer(peer_model(bench), rows, Path(folder), "dpo", settings)
    return step_of(trainer, bench.adapter)


def dpo(bench: Bench, liger: bool = False) -> list[dict]:
    """One DPO-LoRA step."""
    pairs = bench.size["pairs"]
    half = bench.size["tokens"]
    rows = make_rows(pairs, half, half, ("chosen", "rejected"))
    lacks = missing("trl", "peft", "transformers", "datasets")
    row = {"work": "DPO-LoRA step", "peer": "TRL + PEFT"}
    row["target"] = ["gpu-dpo", "gpu-memory", "gpu-dpo-share"]
    if liger:
        row["peer"] = "TRL + PEFT + Liger"
        row["target"] = ["gpu-dpo-liger"]
        reason = no_liger(bench)
        if reason and not lacks:
            lacks = f"liger-kernel not measured: {reason}"
    row["note"] = lacks

    own = bench.dpo_step(rows)
    with tempfile.TemporaryDirectory() as folder:
        peer = None if lacks else trl_dpo(bench, rows, folder, liger)
        own_loss = own()
        set_adapter_weights(bench.model, bench.adapter)
        if peer:
            peer_loss = peer()
            row["equal"] = f"loss {own_loss:.4f} / {peer_loss:.4f}"
            if abs(own_loss - peer_loss) > 0.05 * max(1.0, abs(peer_loss)):
                raise ValueError(f"the losses differ: {own_loss} and {peer_loss}")
        row |= bench.timed(own, peer, peaks=True)

    # A pair is one prompt and two answers; only the answers pass the head
    tokens = pairs * 3 * half
    trained = pairs * 2 * half
    flops = 4 * bench.body * tokens + 4 * bench.head * trained
    row["ratio_share"] = bench.share_of("matmul_flops", flops, row["own"])
    row["own"]["tokens_per_s"] = pairs * 4 * half / row["own"]["wall_s"][0]
    return [row]


def no_liger(bench: Bench) -> str:
    """Why Liger's kernels cannot be measured here; "" if they can."""
    if bench.device == "cpu":
        return "its kernels need a GPU"
    if missing("liger_kernel"):
        return f"not installed ({INSTALL})"
    return ""


def dpo_liger(bench: Bench) -> list[dict]:
    """One DPO-LoRA step against Liger's kernels."""
    return dpo(bench, liger=True)


# ---- sampling and scoring -------------------------------------------------------------------


def sampling(bench: Bench) -> Iterator[dict]:
    """Sampling with several batch sizes.

    The share is that of one read of the weights and the cache a step.
    """
    lacks = missing("transformers")
    peer = None if lacks else peer_model(bench)
    new = bench.size["new"]
    settings = Generate(temperature=0.95, top_k=50, top_p=0.7, max_new_tokens=new)
    peer_settings = {"do_sample": True, "temperature": 0.95, "top_k": 50, "top_p": 0.7}
    if bench.device == "cuda":
        peer_settings["cache_implementation"] = "static"
    weights = 0
    for name, weight in bench.plain.items():
        if "embed" not in name:
            weights += weight.nbytes

    disable_adapter(bench.model)
    for batch in bench.size["rows"]:
        prompts = random_prompts(bench, batch)

        def own(prompts=prompts):
            return generate(bench.model, prompts, range(len(prompts)), settings, set())

        def by_peer(prompts=prompts):
            with torch.device(bench.device):
                return by_transformers(peer, prompts, new, **peer_settings)

        row = {"work": f"sampling, batch {batch}", "peer": "transformers generate", "note": lacks}
        row["target"] = ["gpu-generate"]
        if batch <= 16:
            row["target"].append("gpu-generate-share")
        row |= bench.timed(own, None if lacks else by_peer)

        # Keys and values, two bytes each, of half the answer on average
        numbers = 2 * bench.config.num_hidden_layers * bench.config.hidden_size
        cache = batch * numbers * 2 * (bench.size["tokens"] + new // 2)
        row["ratio_share"] = bench.share_of("copy_bytes", (weights + cache) * new, row["own"])
        row["own"]["tokens_per_s"] = batch * new / row["own"]["wall_s"][0]
        yield row
    set_adapter_weights(bench.model, bench.adapter)


def random_prompts(bench: Bench, count: int) -> list[list[int]]:
    """So many prompts of random ids."""
    rng = random.Random(0)
    length = bench.size["tokens"]
    return [random_ids(rng, length, bench.config.vocab_size) for _ in range(count)]


def scoring(bench: Bench) -> list[dict]:
    """Log-probabilities of three answers to each prompt."""
    half = bench.size["tokens"]
    prompts = bench.size["pairs"]
    lacks = missing("transformers")
    rows = random_answers(random.Random(0), bench.config.vocab_size, prompts, half)
    disable_adapter(bench.model)
    peer = None if lacks else peer_model(bench)

    def own() -> list[float]:
        return bench.score(rows, packed=True)

    def by_peer() -> list[float]:
        with torch.device(bench.device):
            return score_by_transformers(peer, rows)

    row = {
        "work": "scoring, 3 answers per prompt",
        "peer": "transformers, batches of 8",
        "target": ["gpu-score", "gpu-score-share"],
        "note": lacks,
    }
    if peer:
        worst = largest_difference(own(), by_peer())
        row["equal"] = f"scores within {worst:.1g} (relative)"
        if worst > 0.01:
            raise ValueError(f"the scores differ by {worst:.2g} (relative)")

    row |= bench.timed(own, by_peer if peer else None)
    # A prompt is computed once for its three answers
    body_flops = 2 * bench.body * prompts * 4 * half
    head_flops = 2 * bench.head * len(rows) * half
    flops = body_flops + head_flops
    row["ratio_share"] = bench.share_of("matmul_flops", flops, row["own"])
    set_adapter_weights(bench.model, bench.adapter)
    return [row]


def main(tiny: bool) -> None:
    """Measure everything; `tiny`: at toy size."""
    if not tiny and not torch.cuda.is_available():
        command = "python -m bench.speed.gpu --tiny"
        raise SystemExit(f"torch finds no GPU here; {command} runs the same code at toy size")
    bench = Bench(tiny)
    for measure in (ceilings, sampling, scoring, dpo, dpo_liger):
        bench.add(measure)
