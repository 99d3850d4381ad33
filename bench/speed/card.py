"""A session of measurements on one card, and the card's own ceilings."""

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from bench.speed.peers import BETA, LR, joined, random_ids
from bench.speed.timing import clocked, spread, write_bench
from minmacpo.core.lora import disable_adapter, set_adapter_weights
from minmacpo.core.losses import PreferenceLoss
from minmacpo.core.model import Transformer
from minmacpo.core.scoring import score
from minmacpo.core.trainer import TrainExample, train_step
from minmacpo.data.tokenizer import Tokens

SECONDS = 480  # no measurement begins later
SCORING_TOKENS = 16384  # tokens of a forward pass


class CardBench:
    """The rows so far, the device, and this project's model on it.

    Attributes:
        name: of the file in assets/bench; one that ends in "-tiny" answers no target.
        body: weights of the linear layers of all blocks.
        head: weights of the head.
    """

    name: str
    title: str
    size: dict
    model: Transformer
    params: list[torch.nn.Parameter]
    adapter: dict[str, torch.Tensor]
    body: int
    head: int

    def __init__(self, rows: list[dict], began: float):
        self.rows = rows
        self.began = began
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def add(self, measure: Callable[["CardBench"], Iterable[dict]]) -> None:
        """Rows of one measurement; what fails or comes too late is a row that says so."""
        work = measure.__name__
        new_rows = []
        if time.perf_counter() - self.began > SECONDS:
            new_rows.append({"work": work, "note": f"not measured: {SECONDS} s were over"})
        else:
            try:
                for row in measure(self):
                    new_rows.append(row)
            except Exception as error:
                # One library's trouble, or too large a size, must not cost the other figures
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                new_rows.append({"work": work, "note": f"failed: {reason}"})

        for row in new_rows:
            if self.name.endswith("-tiny"):
                row.pop("target", None)
            shape = "x".join(map(str, self.size["shape"]))
            self.rows.append({"shape": shape, "dtype": "bf16"} | row)
        write_bench(self.name, self.title, self.rows)

    def ceiling(self, name: str) -> float:
        """A ceiling that was measured before, per second."""
        for row in self.rows:
            if name in row.get("own", {}):
                return row["own"][name][0]
        raise LookupError(f"{name} was not measured")

    def share_of(self, ceiling: str, amount: float, own: dict) -> list[float]:
        """Which part of a ceiling `amount` of work per call is, from the call's wall seconds."""
        median, low, high = own["wall_s"]
        limit = self.ceiling(ceiling)
        shares = []
        for seconds in (median, high, low):
            share = amount / seconds / limit
            shares.append(float(f"{share:.3g}"))
        return shares

    def score(self, texts: Sequence[Tokens], packed: bool = False) -> list[float]:
        """Summed log-probabilities of texts under the model as it stands."""
        return score(self.model, texts, SCORING_TOKENS, log=print, packed=packed)

    def dpo_step(self, rows: list[dict]) -> Callable[[], float]:
        """One step of DPO with stored reference log-probabilities; it returns the loss."""
        pairs = []
        texts = []
        for row in rows:
            pair = (joined(row, "chosen"), joined(row, "rejected"))
            pairs.append(pair)
            texts += pair

        disable_adapter(self.model)
        logps = self.score(texts)
        set_adapter_weights(self.model, self.adapter)
        examples = []
        for i, pair in enumerate(pairs):
            references = (logps[2 * i], logps[2 * i + 1])
            examples.append(TrainExample(str(i), pair, references))

        loss = PreferenceLoss(BETA, 0.0, compiled=self.device == "cuda")
        optimizer = torch.optim.AdamW(self.params, LR, weight_decay=0.0, fused=True)
        all_at_once = [list(range(len(examples)))]

        def step() -> float:
            metrics = train_step(
                self.model, self.params, examples, all_at_once, loss, optimizer, packed=True
            )
            return metrics["loss"].item()

        return step


def ceilings(bench: CardBench) -> list[dict]:
    """FLOP/s of a large bf16 matmul, bytes/s of a large copy, read and written."""
    side = bench.size["square"]
    count = bench.size["copy"]
    matrix = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    source = torch.empty(count, device=bench.device, dtype=torch.uint8)
    target = torch.empty(count, device=bench.device, dtype=torch.uint8)

    own = {
        "matmul_flops": per_second(lambda: matrix @ matrix, 2 * side**3),
        "copy_bytes": per_second(lambda: target.copy_(source), 2 * count),
    }
    return [{"work": "the card's ceilings", "own": own}]


def per_second(call: Callable[[], object], amount: float) -> list[float]:
    """How much is done a second where a call does `amount`; the first of six rounds warms up."""

    def ten_calls() -> None:
        for _ in range(10):
            call()

    rates = []
    for _ in range(6):
        wall, _ = clocked(ten_calls)
        rates.append(10 * amount / wall)
    return spread(rates[1:])


def random_answers(rng, vocab: int, prompts: int, half: int) -> list[Tokens]:
    """Three answers to each of so many prompts; prompt and answer have `half` tokens each."""
    rows = []
    for _ in range(prompts):
        prompt = random_ids(rng, half, vocab)
        for _ in range(3):
            mask = [False] * half + [True] * half
            answer = random_ids(rng, half, vocab)
            rows.append(Tokens(prompt + answer, mask))
    return rows
