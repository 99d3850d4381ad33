"""How much of a batch is padding, and how many tokens are computed.

    python -m bench.speed.padding DATA TOKENIZER

DATA: a file or folder of HH-RLHF pairs; TOKENIZER: a tokenizer.model. Batches are those that
training and scoring plan by default (16 pairs or 32 answers per step, micro-batches of 16,384
tokens), of rows of at most 1,024 tokens.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.speed.timing import read_words, write_bench
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

TITLE = (
    "Tokens of planned batches of HH-RLHF pairs: padding included, without padding, and computed "
    "(no padding, a prompt once for all its answers). Only attention is done on padding."
)


def padding_row(work: str, groups: Sequence[Sequence[Tokens]], note: str) -> dict:
    """One row of the table."""
    counts = token_counts(groups)
    own = {
        "padded_tokens": counts.padded,
        "padding_share_of_attention": round(1 - counts.real / counts.padded, 4),
        "computed_tokens": counts.computed,
        "saved_share": round(1 - counts.computed / counts.padded, 4),
    }
    return {"work": work, "own": own, "peer_values": {}, "note": note}


def longest(rows: Sequence[Tokens]) -> int:
    """The length of the longest row."""
    return max(len(row.ids) for row in rows)


def grouped(rows: Sequence[Tokens], groups: Iterable[Sequence[int]]) -> list[list[Tokens]]:
    """The rows of every group of indices."""
    result = []
    for group in groups:
        result.append([rows[i] for i in group])
    return result


def training_groups(
    examples: Sequence[Sequence[Tokens]], batch: int, budget: int
) -> list[list[Tokens]]:
    """The micro-batches of one epoch; an example is one row, or a pair of rows."""
    lengths = list(map(longest, examples))
    steps = math.ceil(len(examples) / batch)
    groups = []
    for step in plan_steps(lengths, batch, steps, 0, budget, MAX_LENGTH_RATIO):
        for group in step:
            rows = []
            for i in group:
                rows += examples[i]
            groups.append(rows)
    return groups


def main(data: str, model: str) -> None:
    """Count the tokens of the data's batches."""
    config = Config()
    budget = config.run.max_tokens_per_batch
    tokenizer = Tokenizer(Path(model).read_bytes())

    pairs = []
    too_long = 0
    for pair in read_data(data, skip_invalid=True, setting="data")[0]:
        rows = []
        for text in (pair.chosen, pair.rejected):
            rows.append(render(tokenizer, "plain", pair.prompt, text))
        if longest(rows) > config.data.max_length:
            too_long += 1
        else:
            pairs.append(rows)
    texts = list(itertools.chain.from_iterable(pairs))
    left_out = f"{too_long} of more than {config.data.max_length} tokens left out"

    dpo_groups = training_groups(pairs, config.dpo.batch, budget // 2)
    sft_groups = training_groups([rows[:1] for rows in pairs], config.sft.batch, budget)
    lengths = [len(text.ids) for text in texts]
    sorted_groups = grouped(texts, plan_scoring(lengths, budget))
    packed_groups = grouped(texts, plan_packed(texts, budget))

    table = [
        padding_row("DPO pairs", dpo_groups, f"{len(pairs)} pairs, {left_out}"),
        padding_row("SFT answers", sft_groups, ""),
        padding_row("scoring, sorted", sorted_groups, "all texts known beforehand"),
        padding_row("scoring, answers of a prompt together", packed_groups, ""),
    ]
    write_bench("padding", TITLE, table)


if __name__ == "__main__":
    words = read_words()
    if len(words) != 2:
        sys.exit(f"{__doc__}\nerror: DATA and TOKENIZER are needed")
    main(*words)
