"""Scoring K = 3 candidates of a prompt against transformers: python -m bench.score [DTYPE].

16 prompts of 128 tokens with three answers of 32 to 128 each, as MACPO's filter has them. The peer scores them in batches of 8,
sorted by length, with logits and cross-entropy.
"""

import random
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.measure import alternate, bf16_hardware, missing, words, write
from bench.peers import DTYPES, VOCAB, make_folder, own_model
from minmacpo.core.scoring import score
from minmacpo.data.tokenizer import Tokens

TITLE = "Summed log-probabilities of three candidates for each of 16 prompts (128 tokens, answers of 32 to 128), 15M, one thread."


def candidates(answers: int, seed: int = 0) -> list[Tokens]:
    """16 prompts with so many answers each, side by side."""
    rng, rows = random.Random(seed), []
    for _ in range(16):
        prompt = [rng.randrange(3, VOCAB) for _ in range(128)]
        for _ in range(answers):
            answer = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(32, 129))]
            rows.append(Tokens(prompt + answer, [False] * 128 + [True] * len(answer)))
    return rows


@torch.inference_mode()
def by_transformers(model, rows: list[Tokens], size: int = 8) -> list[float]:
    """The same sums from logits and cross-entropy, in batches of `size` sorted by length."""
    order, found = sorted(range(len(rows)), key=lambda i: len(rows[i].ids)), [0.0] * len(rows)
    for start in range(0, len(rows), size):
        group = order[start : start + size]
        width = max(len(rows[i].ids) for i in group)
        tokens = torch.tensor([rows[i].ids + [0] * (width - len(rows[i].ids)) for i in group])
        seen = torch.tensor(
            [[1] * len(rows[i].ids) + [0] * (width - len(rows[i].ids)) for i in group]
        )
        labels = torch.tensor(
            [
                [t if m else -100 for t, m in zip(rows[i].ids, rows[i].mask, strict=True)]
                + [-100] * (width - len(rows[i].ids))
                for i in group
            ]
        )
        logits = (
            model(input_ids=tokens, attention_mask=seen, use_cache=False).logits[:, :-1].float()
        )
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        for i, loss in zip(group, losses.sum(1).tolist(), strict=True):
            found[i] = -loss
    return found


def compare(place: Path, dtype: str, answers: int, lacks: str) -> dict:
    """One row, after both sides have given the same scores."""
    model, rows = own_model(place, dtype)[0], candidates(answers)

    def mine() -> list[float]:
        return score(model, rows, 16384, log=lambda line: None, packed=True)

    row = {
        "work": f"scoring, {answers} answer(s) per prompt",
        "shape": "15M",
        "dtype": dtype,
        "peer": "transformers, sorted batches of 8",
        "target": ["score"] if (answers, dtype) == (3, "bf16") else [],
        "note": lacks,
    }
    if lacks:
        return row | alternate(mine, None, 7)
    import peft
    import transformers

    transformers.utils.logging.set_verbosity_error()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=DTYPES[dtype])
    theirs = peft.PeftModel.from_pretrained(theirs, place / "adapter").eval()
    found, wanted = mine(), by_transformers(theirs, rows)
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
    if worst > (1e-5 if dtype == "fp32" else 2e-3):
        raise SystemExit(f"{dtype}: the scores differ by {worst:.2g} (relative)")
    equal = f"{len(rows)} scores equal within {worst:.1g} (relative)"
    return (
        row
        | alternate(mine, lambda: by_transformers(theirs, rows), 7, warm=False)
        | {"equal": equal}
    )


def main(dtypes: list[str]) -> None:
    torch.set_num_threads(1)
    lacks, rows = missing("transformers", "peft"), []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), "15M")
        for dtype in dtypes:
            for answers in (3, 1):
                rows.append(compare(Path(folder), dtype, answers, lacks))
                write("score", TITLE, rows, keep=True)


if __name__ == "__main__":
    main(words(DTYPES) or (["fp32", "bf16"] if bf16_hardware() else ["fp32"]))
