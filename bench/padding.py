"""How much of a batch is padding, and how many tokens are computed: python -m bench.padding DATA TOKENIZER.

DATA: a file or folder of HH-RLHF pairs; TOKENIZER: a tokenizer.model. Batches are those that training and scoring plan by
default (16 pairs or 32 answers per step, micro-batches of 16,384 tokens), of rows of at most 1,024 tokens.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measure import words, write
from minmacpo.config.schema import Config
from minmacpo.core.batching import (
    MAX_LENGTH_RATIO,
    plan_packed,
    plan_scoring,
    plan_steps,
    token_counts,
)
from minmacpo.data.chat_template import render
from minmacpo.data.formats import read_data
from minmacpo.data.tokenizer import Tokenizer, Tokens

TITLE = "Tokens of planned batches of HH-RLHF pairs: padding included, without padding, and computed (no padding, a prompt once for all its answers). Only attention is done on padding."


def counted(work: str, groups: Sequence[Sequence[Tokens]], note: str) -> dict:
    """One row of the table."""
    counts = token_counts(groups)
    own = {
        "padded_tokens": counts.padded,
        "padding_share_of_attention": round(1 - counts.real / counts.padded, 4),
        "computed_tokens": counts.computed,
        "saved_share": round(1 - counts.computed / counts.padded, 4),
    }
    return {"work": work, "own": own, "peer_values": {}, "note": note}


def main(data: str, model: str) -> None:
    config, tokenizer = Config(), Tokenizer(Path(model).read_bytes())
    pairs, _ = read_data(data, skip_invalid=True, setting="data")
    found = [
        tuple(
            render(tokenizer, "plain", pair.prompt, text) for text in (pair.chosen, pair.rejected)
        )
        for pair in pairs
    ]
    kept = [pair for pair in found if max(len(row.ids) for row in pair) <= config.data.max_length]
    lengths, budget = (
        [max(len(row.ids) for row in pair) for pair in kept],
        config.run.max_tokens_per_batch,
    )
    per_step = plan_steps(
        lengths, config.dpo.batch, -(-len(kept) // config.dpo.batch), 0, budget // 2, MAX_LENGTH_RATIO
    )
    groups = [[row for i in group for row in kept[i]] for step in per_step for group in step]
    rows = [
        counted(
            "DPO pairs",
            groups,
            f"{len(kept)} pairs, {len(found) - len(kept)} of more than {config.data.max_length} tokens left out",
        )
    ]
    chosen = [pair[0] for pair in kept]
    per_step = plan_steps(
        [len(row.ids) for row in chosen],
        config.sft.batch,
        -(-len(chosen) // config.sft.batch),
        0,
        budget,
        MAX_LENGTH_RATIO,
    )
    rows.append(
        counted(
            "SFT answers", [[chosen[i] for i in group] for step in per_step for group in step], ""
        )
    )
    flat = [row for pair in kept for row in pair]
    plain = plan_scoring([len(row.ids) for row in flat], budget)
    rows.append(
        counted(
            "scoring, sorted",
            [[flat[i] for i in group] for group in plain],
            "all texts known beforehand",
        )
    )
    rows.append(
        counted(
            "scoring, answers of a prompt together",
            [[flat[i] for i in group] for group in plan_packed(flat, budget)],
            "",
        )
    )
    write("padding", TITLE, rows)


if __name__ == "__main__":
    if len(given := words()) != 2:
        sys.exit(f"{__doc__}\nerror: DATA and TOKENIZER are needed")
    main(*given)
