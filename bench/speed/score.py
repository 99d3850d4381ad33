"""Scoring K = 3 candidates of a prompt against transformers: python -m bench.speed.score [DTYPE].

16 prompts of 128 tokens with three answers of 32 to 128 each, as MACPO's filter has them. The peer
scores them in batches of 8, sorted by length, with logits and cross-entropy.
"""

import random
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.speed.peers import (
    SCORING_TOKENS,
    VOCAB,
    load_with_adapter,
    make_folder,
    own_model,
    random_ids,
    read_dtypes,
)
from bench.speed.timing import alternate, largest_difference, missing, write_bench
from minmacpo.core.scoring import score
from minmacpo.data.tokenizer import Tokens

TITLE = (
    "Summed log-probabilities of three candidates for each of 16 prompts "
    "(128 tokens, answers of 32 to 128), 15M, one thread."
)


def candidates(answers: int, seed: int = 0) -> list[Tokens]:
    """16 prompts with so many answers each, side by side."""
    rng = random.Random(seed)
    rows = []
    for _ in range(16):
        prompt = random_ids(rng, 128, VOCAB)
        for _ in range(answers):
            answer = random_ids(rng, rng.randrange(32, 129), VOCAB)
            rows.append(Tokens(prompt + answer, [False] * 128 + [True] * len(answer)))
    return rows


@torch.inference_mode()
def by_transformers(model, rows: list[Tokens], size: int = 8) -> list[float]:
    """The same sums from logits and cross-entropy, in batches of `size` sorted by length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    logps = [0.0] * len(rows)
    for start in range(0, len(rows), size):
        group = order[start : start + size]
        width = len(rows[group[-1]].ids)  # the longest of the group
        tokens = torch.zeros(len(group), width, dtype=torch.long)  # (B, T)
        attended = torch.zeros(len(group), width, dtype=torch.long)  # (B, T)
        labels = torch.full((len(group), width), -100)  # (B, T)
        for number, i in enumerate(group):
            ids = torch.tensor(rows[i].ids)
            mask = torch.tensor(rows[i].mask)
            tokens[number, : len(ids)] = ids
            attended[number, : len(ids)] = 1
            labels[number, : len(ids)] = torch.where(mask, ids, -100)

        output = model(input_ids=tokens, attention_mask=attended, use_cache=False)
        logits = output.logits[:, :-1].float()  # (B, T - 1, V)
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        for i, loss in zip(group, losses.sum(1).tolist(), strict=True):
            logps[i] = -loss
    return logps


def compare(folder: Path, dtype: str, answers: int, lacks: str) -> dict:
    """One row, after both sides have given the same scores."""
    model, _ = own_model(folder, dtype)
    rows = candidates(answers)

    def own() -> list[float]:
        return score(model, rows, SCORING_TOKENS, log=lambda line: None, packed=True)

    row = {
        "work": f"scoring, {answers} answer(s) per prompt",
        "shape": "15M",
        "dtype": dtype,
        "peer": "transformers, sorted batches of 8",
        "target": ["score"] if answers == 3 and dtype == "bf16" else [],
        "note": lacks,
    }
    if lacks:
        return row | alternate(own, None, times=7)

    oracle = load_with_adapter(folder, dtype).eval()

    def peer() -> list[float]:
        return by_transformers(oracle, rows)

    worst = largest_difference(own(), peer())
    tolerance = 1e-5 if dtype == "fp32" else 2e-3
    if worst > tolerance:
        raise SystemExit(f"{dtype}: the scores differ by {worst:.2g} (relative)")
    row["equal"] = f"{len(rows)} scores equal within {worst:.1g} (relative)"
    return row | alternate(own, peer, times=7, warm=False)


def main(dtypes: list[str]) -> None:
    """Measure three answers a prompt and one, in every dtype."""
    torch.set_num_threads(1)
    lacks = missing("transformers", "peft")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), "15M")
        for dtype in dtypes:
            for answers in (3, 1):
                rows.append(compare(Path(folder), dtype, answers, lacks))
                write_bench("score", TITLE, rows, keep=True)


if __name__ == "__main__":
    main(read_dtypes())
