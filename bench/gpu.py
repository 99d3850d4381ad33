"""Everything on one card: python -m bench.gpu [--tiny] (--large: bench/large.py); under nine minutes, and the file holds what there is after each measurement.

Needs only the repository: weights are made at random on the device; a library that is not installed is named in the row. The
peer's model has this project's very tensors, so that both fit. `--tiny` runs the same code at toy size, on a CPU if need be.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from bench.generate import by_transformers
from bench.measure import INSTALL, alternate, clocked, missing, spread, words, write
from bench.peers import BETA, LR, joined, make_rows, random_slot, step_of, word_tokenizer
from bench.score import by_transformers as score_by_transformers
from minmacpo.config.schema import Generate, Lora
from minmacpo.core.lora import disable_adapter, get_adapter_weights, set_adapter_weights
from minmacpo.core.losses import PreferenceLoss
from minmacpo.core.model import Transformer
from minmacpo.core.model_config import ModelConfig
from minmacpo.core.sampling import generate
from minmacpo.core.scoring import score
from minmacpo.core.trainer import TrainExample, train_step
from minmacpo.data.tokenizer import Tokens

SECONDS = 480  # no measurement begins later
TITLE = "One card: DPO-LoRA, sampling and scoring at Llama-2-7B's shape in bf16, beside the card's own ceilings measured in the same run."
BIG = {
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


class Bench:
    """The rows so far, the device, and this project's model on it."""

    title = TITLE

    def __init__(self, tiny: bool):
        self.size, self.name, self.began, self.rows = (
            (TINY if tiny else BIG),
            "gpu-tiny" if tiny else "gpu",
            time.perf_counter(),
            [],
        )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        width, layers, heads, mlp, vocab = self.size["shape"]
        self.config = ModelConfig(vocab, width, mlp, layers, heads, heads, width // heads, 2048)
        torch.manual_seed(0)
        with torch.device("meta"):
            self.model = Transformer(self.config).to(torch.bfloat16)
        self.model.to_empty(device=self.device)
        for weight in self.model.parameters():
            torch.nn.init.ones_(weight) if weight.dim() == 1 else torch.nn.init.normal_(
                weight, std=0.02
            )
        self.plain = {key: tensor for key, tensor in self.model.state_dict().items()}
        self.params = random_slot(self.model)
        self.adapter = get_adapter_weights(self.model)
        self.body = sum(t.numel() for key, t in self.plain.items() if "layers" in key)

    def add(self, measure: Callable[["Bench"], Iterable[dict]]) -> None:
        """Rows of one measurement; what fails or comes too late is a row that says so."""
        found = []
        if time.perf_counter() - self.began > SECONDS:
            found.append({"work": measure.__name__, "note": f"not measured: {SECONDS} s were over"})
        else:
            try:
                for row in measure(self):
                    found.append(row)
            except Exception as error:  # one library's trouble, or too large a size, must not cost the other figures
                found.append(
                    {
                        "work": measure.__name__,
                        "note": f"failed: {type(error).__name__}: {str(error)[:200]}",
                    }
                )
        for row in found:
            if self.size is TINY:
                row.pop("target", None)  # toy sizes answer no target
            self.rows.append(
                {"shape": "x".join(map(str, self.size["shape"])), "dtype": "bf16"} | row
            )
        write(self.name, self.title, self.rows, keep=False)

    def ceiling(self, name: str) -> float:
        """A ceiling that was measured before, per second."""
        return next(row["own"][name][0] for row in self.rows if name in row.get("own", {}))


def ceilings(bench: Bench) -> list[dict]:
    """FLOP/s of a large bf16 matmul, bytes/s of a large copy, read and written."""
    side, count = bench.size["square"], bench.size["copy"]
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    b, c = (torch.empty(count, device=bench.device, dtype=torch.uint8) for _ in range(2))
    works = {
        "matmul_flops": (lambda: a @ a, 2 * side**3),
        "copy_bytes": (lambda: c.copy_(b), 2 * count),
    }
    own = {
        name: spread(
            [
                10 * amount / clocked(lambda call=call: [call() for _ in range(10)])[0]
                for _ in range(6)
            ][1:]
        )
        for name, (call, amount) in works.items()
    }
    return [{"work": "the card's ceilings", "own": own}]


def peer_model(bench: Bench):
    """transformers' model on this project's tensors, without adapter."""
    import transformers

    width, layers, heads, mlp, vocab = bench.size["shape"]
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        rms_norm_eps=bench.config.rms_norm_eps,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(bench.plain, assign=True)
    with torch.device(bench.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def share(bench: Bench, amount: float, name: str, own: dict) -> list[float]:
    """Which part of a ceiling `amount` of work per call is, from the call's wall seconds."""
    middle, low, high = own["wall_s"]
    return [
        float(f"{amount / seconds / bench.ceiling(name):.3g}") for seconds in (middle, high, low)
    ]


def timed(bench: Bench, mine: Callable, theirs: Callable | None, peaks: bool = False) -> dict:
    """`alternate`, and on a GPU the peak of each side's tensors in GB."""
    found = alternate(mine, theirs, bench.size["times"])
    for side, call in (
        (("own", mine), ("peer_values", theirs)) if peaks and bench.device == "cuda" else ()
    ):
        if call:
            torch.cuda.reset_peak_memory_stats()
            call()
            found[side]["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    if "peak_gb" in found["peer_values"]:
        found["ratio_memory"] = spread([found["peer_values"]["peak_gb"] / found["own"]["peak_gb"]])
    return found


def own_dpo(bench: Bench, rows: list[dict]) -> Callable[[], float]:
    """A step with stored reference log-probabilities."""
    texts = [(joined(row, "chosen"), joined(row, "rejected")) for row in rows]
    disable_adapter(bench.model)
    refs = iter(score(bench.model, [text for pair in texts for text in pair], 16384, log=print))
    set_adapter_weights(bench.model, bench.adapter)
    units = [TrainExample(str(i), pair, (next(refs), next(refs))) for i, pair in enumerate(texts)]
    objective = PreferenceLoss(BETA, 0.0, compiled=bench.device == "cuda")
    optimizer = torch.optim.AdamW(bench.params, LR, weight_decay=0.0, fused=True)
    return lambda: train_step(
        bench.model, bench.params, units, [[*range(len(units))]], objective, optimizer, packed=True
    )["loss"].item()


def trl_dpo(bench: Bench, rows: list[dict], place: str, liger: bool) -> Callable[[], float]:
    """The same step of TRL on PEFT, with Liger's loss if wanted."""
    import datasets
    import peft
    import trl

    texts = [
        {side: "".join(f" w{i}" for i in ids if i != 2) for side, ids in row.items()}
        for row in rows
    ]
    arguments = trl.DPOConfig(
        output_dir=place,
        per_device_train_batch_size=len(rows),
        max_steps=1,
        learning_rate=LR,
        weight_decay=0.0,
        beta=BETA,
        max_length=None,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        bf16=True,
        use_cpu=bench.device == "cpu",
        disable_tqdm=True,
        use_liger_kernel=liger,
    )
    lora = peft.LoraConfig(
        r=Lora().r, lora_alpha=Lora().alpha, target_modules=[*Lora().targets], task_type="CAUSAL_LM"
    )
    trainer = trl.DPOTrainer(
        peer_model(bench),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=word_tokenizer(),
        peft_config=lora,
    )
    return step_of(trainer, bench.adapter)


def dpo(bench: Bench, liger: bool = False) -> list[dict]:
    """One DPO-LoRA step."""
    half, peer = bench.size["tokens"], "TRL + PEFT + Liger" if liger else "TRL + PEFT"
    rows, lacks = (
        make_rows(bench.size["pairs"], half, half, ("chosen", "rejected")),
        missing("trl", "peft", "transformers", "datasets"),
    )
    lacks = lacks or (
        f"liger-kernel not measured: {reason}" if liger and (reason := no_liger(bench)) else ""
    )
    mine, row = own_dpo(bench, rows), {"work": "DPO-LoRA step", "peer": peer, "note": lacks}
    row["target"] = ["gpu-dpo-liger"] if liger else ["gpu-dpo", "gpu-memory", "gpu-dpo-share"]
    with tempfile.TemporaryDirectory() as place:
        theirs, first = None if lacks else trl_dpo(bench, rows, place, liger), mine()
        set_adapter_weights(bench.model, bench.adapter)
        if theirs:
            other = theirs()
            row["equal"] = f"loss {first:.4f} / {other:.4f}"
            if abs(first - other) > 0.05 * max(1.0, abs(other)):
                raise ValueError(f"the losses differ: {first} and {other}")
        row |= timed(bench, mine, theirs, peaks=True)
    tokens, trained = bench.size["pairs"] * 3 * half, bench.size["pairs"] * 2 * half
    row["ratio_share"] = share(
        bench,
        4 * bench.body * tokens + 4 * bench.plain["lm_head.weight"].numel() * trained,
        "matmul_flops",
        row["own"],
    )
    row["own"]["tokens_per_s"] = bench.size["pairs"] * 4 * half / row["own"]["wall_s"][0]
    return [row]


def no_liger(bench: Bench) -> str:
    """Why Liger's kernels cannot be measured here; "" if they can."""
    if bench.device == "cpu":
        return "its kernels need a GPU"
    return f"not installed ({INSTALL})" if missing("liger_kernel") else ""


def dpo_liger(bench: Bench) -> list[dict]:
    """One DPO-LoRA step against Liger's kernels."""
    return dpo(bench, liger=True)


def sampling(bench: Bench) -> Iterator[dict]:
    """Sampling at several numbers of rows; the share is that of one read of weights and cache a step."""
    lacks, new = missing("transformers"), bench.size["new"]
    peer, settings = None if lacks else peer_model(bench), Generate(0.95, 50, 0.7, new)
    disable_adapter(bench.model)
    for rows in bench.size["rows"]:
        rng = random.Random(0)
        prompts = [
            [rng.randrange(3, bench.config.vocab_size) for _ in range(bench.size["tokens"])]
            for _ in range(rows)
        ]

        def theirs(prompts=prompts):
            how = {"do_sample": True, "temperature": 0.95, "top_k": 50, "top_p": 0.7} | (
                {"cache_implementation": "static"} if bench.device == "cuda" else {}
            )
            with torch.device(bench.device):
                return by_transformers(peer, prompts, new, **how)

        row = {"work": f"sampling, batch {rows}", "peer": "transformers generate", "note": lacks}
        row["target"] = ["gpu-generate"] + (["gpu-generate-share"] if rows <= 16 else [])
        row |= timed(
            bench,
            lambda prompts=prompts, rows=rows: generate(
                bench.model, prompts, range(rows), settings, set()
            ),
            None if lacks else theirs,
        )
        weights = sum(t.nbytes for key, t in bench.plain.items() if "embed" not in key)
        cache = (
            2
            * rows
            * bench.config.num_hidden_layers
            * bench.config.hidden_size
            * 2
            * (bench.size["tokens"] + new // 2)
        )
        row["ratio_share"] = share(bench, (weights + cache) * new, "copy_bytes", row["own"])
        row["own"]["tokens_per_s"] = rows * new / row["own"]["wall_s"][0]
        yield row
    set_adapter_weights(bench.model, bench.adapter)


def scoring(bench: Bench) -> list[dict]:
    """Log-probabilities of three answers to each prompt."""
    rng, half, lacks = random.Random(0), bench.size["tokens"], missing("transformers")
    rows = []
    for _ in range(bench.size["pairs"]):
        prompt = [rng.randrange(3, bench.config.vocab_size) for _ in range(half)]
        rows += [
            Tokens(
                prompt + [rng.randrange(3, bench.config.vocab_size) for _ in range(half)],
                [False] * half + [True] * half,
            )
            for _ in range(3)
        ]
    disable_adapter(bench.model)
    peer = None if lacks else peer_model(bench)

    def mine() -> list[float]:
        return score(bench.model, rows, 16384, log=print, packed=True)

    def theirs() -> list[float]:
        with torch.device(bench.device):
            return score_by_transformers(peer, rows)

    row = {
        "work": "scoring, 3 answers per prompt",
        "peer": "transformers, batches of 8",
        "target": ["gpu-score", "gpu-score-share"],
        "note": lacks,
    }
    if peer:
        worst = max(abs(a - b) / abs(b) for a, b in zip(mine(), theirs(), strict=True))
        row["equal"] = f"scores within {worst:.1g} (relative)"
        if worst > 0.01:
            raise ValueError(f"the scores differ by {worst:.2g} (relative)")
    row |= timed(bench, mine, theirs if peer else None)
    flops = (
        2 * bench.body * bench.size["pairs"] * 4 * half
        + 2 * bench.plain["lm_head.weight"].numel() * len(rows) * half
    )
    row["ratio_share"] = share(bench, flops, "matmul_flops", row["own"])
    set_adapter_weights(bench.model, bench.adapter)
    return [row]


def main(tiny: bool) -> None:
    if not tiny and not torch.cuda.is_available():
        raise SystemExit(
            "torch finds no GPU here; python -m bench.gpu --tiny runs the same code at toy size"
        )
    bench = Bench(tiny)
    for measure in (ceilings, sampling, scoring, dpo, dpo_liger):
        bench.add(measure)


if __name__ == "__main__":
    given = words(["--tiny", "--large"])
    if "--large" in given:
        from bench import large

        large.main("--tiny" in given)
    else:
        main("--tiny" in given)
