"""How likely a model finds the answers of a file, and whether it prefers the better one of two.

python eval.py ppl PATH FILE         perplexity of the (better) answers per token, character, byte
python eval.py accuracy PATH FILE    how often the better answer has the higher log-probability,
                                     summed and per token; of an adapter also how often its
                                     implicit DPO reward is higher, against its base

PATH is a model or adapter folder, or a run: its last student; FILE holds rows of any form in the
README. Settings are those of PATH's run, or the defaults, under --data.template= (system,
preference_label, on_invalid_row, max_length, truncation_mode, max_examples), --run.device= (dtype,
threads, max_tokens_per_batch), --model.quantize=, --eval.bootstrap= and --dpo.beta=. End tokens
count; intervals are 95 % bootstrap intervals over prompts. What is longer than data.max_length, or
than the context, is treated as data.truncation_mode says.
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
from minmacpo.data.dialogues import with_system
from minmacpo.data.formats import LoadReport, column_warnings, read_data
from minmacpo.data.records import Pair, example_id
from minmacpo.data.splits import TOO_FEW
from minmacpo.data.tokenizer import Tokens, show_mask
from minmacpo.evaluation.bootstrap import estimate_ratio
from minmacpo.evaluation.text_tables import bracketed
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.open_model import open_agent
from minmacpo.pipeline.prepare_data import truncate_pairs
from minmacpo.runtime.device import resolve_device
from minmacpo.runtime.hub import local_folder
from minmacpo.runtime.progress import Progress, escape_control_chars

ACCEPTED_FLAGS = (
    "--data.template=",
    "--data.system=",
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

SHOWN_END = 400  # characters of the first row that are printed


def run_likelihood(command: str, argv: Sequence[str]) -> dict:
    """The measures of `eval.py ppl` or `eval.py accuracy`, as JSON.

    Args:
        command: "ppl" or "accuracy".
    """
    # What is asked
    parser = ArgParser(
        f"eval.py {command}",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("file", type=Path)
    args, rest = parser.parse_known_args(argv)
    flags = agent_flags(rest, ACCEPTED_FLAGS)
    folder = resolve_checkpoint(local_folder(args.path))
    config = agent_settings(folder, flags)

    # The rows are read before the model: they are the quicker error
    pairs, reports = read_data(
        str(args.file),
        preference_label=config.data.preference_label,
        skip_invalid=config.data.on_invalid_row == "skip",
        max_rows=config.data.max_examples,
        setting="FILE",
    )
    pairs = [replace(pair, prompt=with_system(pair.prompt, config.data.system)) for pair in pairs]
    for warning in column_warnings(reports):
        print(f"WARNING: {escape_control_chars(warning)}", file=sys.stderr)
    config, loaded, base = open_agent(folder, config, flags)
    needs_rejected = command == "accuracy"
    pairs, counts = fit_pairs(config, loaded, pairs, reports.values(), needs_rejected)

    chosen = render_answers(loaded, pairs, "chosen")
    result = {
        "agent": str(folder),
        "base": str(base),
        "file": str(args.file),
        "template": loaded.template,
        "rows": counts,
        "forms": [f"{name}: {report}" for name, report in reports.items()],
        "first_row": show_mask(loaded.tokenizer, chosen[0]),
    }
    if command == "ppl":
        logps = score_rows(config, loaded, chosen)
        return result | perplexity_measures(pairs, chosen, logps, config.eval.bootstrap)

    rejected = render_answers(loaded, pairs, "rejected")
    is_adapter = folder != base
    margins = preference_margins(config, loaded, chosen, rejected, is_adapter)
    if is_adapter:
        result["beta"] = config.dpo.beta
    return result | preference_measures(pairs, margins, config.eval.bootstrap)


# ---- the rows ---------------------------------------------------------------------------------


def fit_pairs(
    config: Config,
    loaded: LoadedModel,
    pairs: Sequence[Pair],
    reports: Iterable[LoadReport],
    needs_rejected: bool,
) -> tuple[list[Pair], dict[str, int]]:
    """The rows that can be measured, and how many were read, kept, dropped and cut, by reason.

    Args:
        needs_rejected: a row must have a worse answer too; otherwise that one does not count.

    Raises:
        UserError: no row is left.
    """
    needed = "rejected" if needs_rejected else "chosen"
    complete = [pair for pair in pairs if getattr(pair, needed)]
    if not needs_rejected:
        complete = [replace(pair, rejected="") for pair in complete]
    limit = loaded.max_length
    if not complete:
        expected = "eval.py ppl measures answers"
        if needs_rejected:
            expected = "eval.py accuracy compares two answers to a prompt, eval.py ppl measures one"
        raise UserError(
            f"no row is left to measure: none of the {len(pairs)} usable rows has a {needed} "
            f"answer; {expected}"
        )
    fitting, reasons = truncate_pairs(config, loaded.renderer, complete, limit, limit)

    counts = Counter()
    for report in reports:
        counts.update(report.counts)
    counts["kept"] = len(fitting)
    if len(complete) < len(pairs):
        counts[f"without {needed} answer"] = len(pairs) - len(complete)
    counts.update(reasons)
    if not fitting:
        raise UserError(
            f"no row is left to measure ({list_counts(counts)}); "
            f"see data.max_length = {limit}, data.truncation_mode"
        )
    return fitting, dict(counts)


def list_counts(counts: dict[str, int]) -> str:
    """ "5 read, 3 kept"."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def render_answers(loaded: LoadedModel, pairs: Sequence[Pair], side: str) -> list[Tokens]:
    """Every prompt with its answer of a side, "chosen" or "rejected", as ids and mask."""
    return [loaded.render(pair.prompt, getattr(pair, side)) for pair in pairs]


def score_rows(config: Config, loaded: LoadedModel, rows: Sequence[Tokens]) -> np.ndarray:
    """Summed log-probabilities of the rows' answers, (N,), with a bar."""
    max_tokens = scoring_tokens(config.run.max_tokens_per_batch, resolve_device(config.run.device))

    def log(line: str) -> None:
        print(line, file=sys.stderr)

    with Progress("scoring", len(rows), "answer", 0, None) as progress:
        return np.array(score(loaded.model, rows, max_tokens, progress, log=log))


# ---- measures ---------------------------------------------------------------------------------


def perplexity_measures(
    pairs: Sequence[Pair], rows: Sequence[Tokens], logps: np.ndarray, draws: int
) -> dict:
    """Perplexity of the answers per token, character and byte of UTF-8, with intervals."""
    prompts = [example_id(pair.prompt) for pair in pairs]
    tokens = [sum(row.mask) for row in rows]
    characters = [len(pair.chosen) for pair in pairs]
    utf8_bytes = [len(pair.chosen.encode()) for pair in pairs]
    measures = {}
    for name, sizes in (
        ("perplexity", tokens),
        ("perplexity_char", characters),
        ("perplexity_byte", utf8_bytes),
    ):
        mean_logp = estimate_ratio(logps, sizes, prompts, draws)
        low, high = mean_logp.interval
        measures[name] = perplexity(mean_logp.value, 1)
        measures[f"{name}_interval"] = [perplexity(high, 1), perplexity(low, 1)]
    sums = {"tokens": sum(tokens), "characters": sum(characters), "bytes": sum(utf8_bytes)}
    return measures | sums


def preference_margins(
    config: Config,
    loaded: LoadedModel,
    chosen: Sequence[Tokens],
    rejected: Sequence[Tokens],
    is_adapter: bool,
) -> dict[str, np.ndarray]:
    """How much more a model prefers the better answers, (N,), by kind of margin.

    "summed" and "per_token" compare log-probabilities; "reward", of an adapter alone, compares
    beta * (log-probability - that of the base), DPO's implicit reward.
    """
    # Both answers to a prompt stand side by side, as they have the prompt in common
    rows = []
    for better, worse in zip(chosen, rejected, strict=True):
        rows += [better, worse]
    logps = score_rows(config, loaded, rows)
    means = logps / np.array([sum(row.mask) for row in rows])
    margins = {"summed": better_minus_worse(logps), "per_token": better_minus_worse(means)}
    if is_adapter:
        disable_adapter(loaded.model)
        base_logps = score_rows(config, loaded, rows)
        margins["reward"] = better_minus_worse(config.dpo.beta * (logps - base_logps))
    return margins


def better_minus_worse(values: np.ndarray) -> np.ndarray:
    """(2N,) with better and worse answers in turn -> (N,)."""
    return values[::2] - values[1::2]


def preference_measures(pairs: Sequence[Pair], margins: dict[str, np.ndarray], draws: int) -> dict:
    """By kind of margin: the share above 0, of which ties count half, and the mean."""
    prompts = [example_id(pair.prompt) for pair in pairs]
    ones = np.ones(len(pairs))
    measures = {}
    for kind, margin in margins.items():
        for name, values in (
            (f"{kind}_accuracy", win_or_tie(margin)),
            (f"{kind}_margin", margin),
        ):
            mean = estimate_ratio(values, ones, prompts, draws)
            measures[name] = mean.value
            measures[f"{name}_interval"] = mean.interval
    return measures


def format_likelihood(result: dict) -> str:
    """The measures for a terminal."""
    first_row = escape_control_chars(result["first_row"][-SHOWN_END:])
    lines = [
        *result["forms"],
        f"rows: {list_counts(result['rows'])}",
        f"first row's end ({result['template']}): {first_row}",
    ]
    for name, value in result.items():
        if f"{name}_interval" in result:
            lines.append(f"{name:20} {bracketed([value, *result[f'{name}_interval']], '.4f')}")
    if "tokens" in result:
        lines.append(
            f"{result['tokens']} tokens, {result['characters']} characters, {result['bytes']} bytes"
        )
    if "beta" in result:
        lines.append(f"reward: {result['beta']:g} · (log-probability − that of the base)")
    if result["rows"]["kept"] < TOO_FEW:
        lines.append(f"{result['rows']['kept']} rows are too few to tell; give at least {TOO_FEW}")
    return "\n".join(lines)
