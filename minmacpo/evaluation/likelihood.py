"""How likely a model finds the answers of a file, and whether it prefers the better one of two.

python eval.py ppl PATH FILE         perplexity of the (better) answers per token, character and byte
python eval.py accuracy PATH FILE    how often the better answer has the higher log-probability, summed and per token;
                                     of an adapter also how often its implicit DPO reward is higher, against its base

PATH is a model or adapter folder, or a run: its last student; FILE holds rows of any form in the README. Settings are
those of PATH's run, or the defaults, under --data.template= (label, on_invalid_row, max_length, long, max_examples),
--run.device= (dtype, threads, max_tokens_per_batch), --model.quantize=, --eval.bootstrap= and --dpo.beta=. End tokens count; intervals are 95 %
bootstrap intervals over prompts. What is longer than data.max_length, or than the context, is treated as data.truncation_mode says.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minmacpo import UserError
from minmacpo.config.parse import ArgParser, agent_flags, agent_settings, resolve_checkpoint
from minmacpo.config.schema import Config
from minmacpo.core.batching import scoring_tokens
from minmacpo.core.lora import disable_adapter
from minmacpo.core.scoring import perplexity, score, win_or_tie
from minmacpo.data.chat_template import render
from minmacpo.data.formats import LoadReport, read_data
from minmacpo.data.records import Pair, example_id
from minmacpo.data.tokenizer import Tokens, show_mask
from minmacpo.evaluation.text_tables import bracketed
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.open_model import open_agent
from minmacpo.pipeline.prepare_data import truncate_pairs
from minmacpo.runtime.device import resolve_device
from minmacpo.runtime.progress import Progress, escape_control_chars

ACCEPTED = (
    "--data.template=",
    "--data.preference_label=",
    "--data.on_invalid_row=",
    "--data.max_length=",
    "--data.truncation_mode=",
    "--data.max_examples=",
    "--run.device=",
    "--run.dtype=",
    "--run.threads=",
    "--run.max_tokens_per_batch=",
    "--eval.bootstrap=",
    "--dpo.beta=",
    "--model.quantize=",
)


NEEDED = {"ppl": "chosen", "accuracy": "rejected"}  # the side that a row must have


def fit_pairs(
    config: Config,
    loaded: LoadedModel,
    pairs: Sequence[Pair],
    reports: Iterable[LoadReport],
    needed: str,
) -> tuple[list[Pair], dict[str, int]]:
    """(rows that can be measured, counts of rows read, kept, dropped and cut by reason); `needed` is the side that they
    must have: with "chosen", the rejected answers do not count. UserError if none is left."""
    able = [pair for pair in pairs if getattr(pair, needed)]
    wanted = [replace(pair, rejected="") for pair in able] if needed == "chosen" else able
    kept, reasons = truncate_pairs(
        config, loaded.tokenizer, wanted, loaded.max_length, loaded.max_length
    )
    counts = Counter()
    for report in reports:
        counts.update(report.counts)
    counts["kept"] = len(kept)
    counts.update(
        {f"without {needed} answer": len(pairs) - len(able)} if len(able) < len(pairs) else {},
        **reasons,
    )
    if not kept:
        told = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise UserError(
            f"no row is left to measure ({told}); see data.max_length = {loaded.max_length}, data.truncation_mode"
        )
    return kept, dict(counts)


def ratio(
    above: Sequence[float], below: Sequence[float], prompts: Sequence[str], draws: int
) -> tuple[float, list[float]]:
    """Σ above / Σ below over rows [N], and its 95 % interval: resamples prompts, each with all of its rows."""
    _, groups = np.unique(prompts, return_inverse=True)
    tops, bottoms = (
        np.bincount(groups, weights=np.asarray(values, float)) for values in (above, below)
    )
    rng, size = np.random.default_rng(0), len(tops)
    picks = (rng.integers(0, size, size) for _ in range(draws))
    drawn = [tops[pick].sum() / bottoms[pick].sum() for pick in picks]
    return float(tops.sum() / bottoms.sum()), np.quantile(drawn, [0.025, 0.975]).tolist()


def perplexities(
    pairs: Sequence[Pair], rows: Sequence[Tokens], logps: Sequence[float], draws: int
) -> dict:
    """Perplexity of the answers per token, character and byte of UTF-8, each with its interval, and their sizes."""
    prompts, found = [example_id(pair.prompt) for pair in pairs], {}
    sizes = {
        "tokens": [sum(row.mask) for row in rows],
        "characters": [len(pair.chosen) for pair in pairs],
        "bytes": [len(pair.chosen.encode()) for pair in pairs],
    }
    for unit, size in sizes.items():
        mean, bounds = ratio(logps, size, prompts, draws)
        name = {
            "tokens": "perplexity",
            "characters": "perplexity_char",
            "bytes": "perplexity_byte",
        }[unit]
        found[name] = perplexity(mean, 1)
        found[f"{name}_interval"] = [perplexity(bound, 1) for bound in reversed(bounds)]
    return found | {unit: sum(size) for unit, size in sizes.items()}


def preferences(pairs: Sequence[Pair], margins: dict[str, np.ndarray], draws: int) -> dict:
    """Of each kind of margin [pairs], better minus worse answer: the share above 0 (ties count half) and the mean."""
    prompts, ones, found = [example_id(pair.prompt) for pair in pairs], [1] * len(pairs), {}
    for kind, margin in margins.items():
        for name, values in ((f"{kind}_accuracy", win_or_tie(margin)), (f"{kind}_margin", margin)):
            found[name], found[f"{name}_interval"] = ratio(values, ones, prompts, draws)
    return found


def run_likelihood(command: str, argv: Sequence[str]) -> dict:
    """What `eval.py ppl` and `eval.py accuracy` find."""
    parser = ArgParser(
        f"eval.py {command}",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name in ("path", "file"):
        parser.add_argument(name, type=Path)
    words, rest = parser.parse_known_args(argv)
    flags = agent_flags(rest, ACCEPTED)
    folder = resolve_checkpoint(words.path)
    config = agent_settings(folder, flags)
    pairs, reports = read_data(
        str(words.file),
        preference_label=config.data.preference_label,
        skip_invalid=config.data.on_invalid_row == "skip",
        max_rows=config.data.max_examples,
        setting="FILE",
    )
    config, loaded, base = open_agent(folder, config, flags)
    pairs, counts = fit_pairs(config, loaded, pairs, reports.values(), NEEDED[command])
    sides = ("chosen", "rejected")[: 1 if command == "ppl" else 2]
    rows = [
        render(loaded.tokenizer, config.data.template, pair.prompt, getattr(pair, side))
        for pair in pairs
        for side in sides
    ]
    found = {
        "agent": str(folder),
        "base": str(base),
        "file": str(words.file),
        "template": config.data.template,
        "rows": counts,
        "forms": [f"{name}: {report}" for name, report in reports.items()],
        "first_row": show_mask(loaded.tokenizer, rows[0]),
    }
    logps, draws = scored(config, loaded, rows), config.eval.bootstrap
    if command == "ppl":
        return found | perplexities(pairs, rows, logps, draws)
    lengths = np.array([sum(row.mask) for row in rows])
    margins = {
        "summed": logps[::2] - logps[1::2],
        "per_token": (logps / lengths)[::2] - (logps / lengths)[1::2],
    }
    if folder != base:
        disable_adapter(loaded.model)
        rewards = config.dpo.beta * (logps - scored(config, loaded, rows))
        margins["reward"], found["beta"] = rewards[::2] - rewards[1::2], config.dpo.beta
    return found | preferences(pairs, margins, draws)


def scored(config: Config, loaded: LoadedModel, rows: Sequence[Tokens]) -> np.ndarray:
    """Summed log-probabilities [N] of the rows' answers, with a bar."""
    with Progress("scoring", len(rows), "answer", 0, None) as progress:
        budget = scoring_tokens(config.run.max_tokens_per_batch, resolve_device(config.run.device))
        return np.array(
            score(
                loaded.model, rows, budget, progress, log=lambda line: print(line, file=sys.stderr)
            )
        )


def as_text(found: dict) -> str:
    """What was found, for a terminal."""
    told = ", ".join(f"{count} {reason}" for reason, count in found["rows"].items())
    lines = [
        *found["forms"],
        f"rows: {told}",
        f"first row's end ({found['template']}): {escape_control_chars(found['first_row'][-400:])}",
    ]
    for name in [name for name in found if f"{name}_interval" in found]:
        lines.append(f"{name:20} {bracketed([found[name], *found[f'{name}_interval']], '.4f')}")
    if "tokens" in found:
        lines.append("{tokens} tokens, {characters} characters, {bytes} bytes".format(**found))
    if "beta" in found:
        lines.append(f"reward: {found['beta']:g} · (log-probability − that of the base)")
    return "\n".join(lines)
