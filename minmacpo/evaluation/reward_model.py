"""Reward models as measures of answers: one trained here, a Hugging Face classifier, or scores from elsewhere.

python eval.py reward RUN                      a Bradley-Terry head on the run's strong base, trained on its true pairs
python eval.py reward RUN --pairs=FILE         the same, trained on pairs of which the run has seen none
python eval.py reward RUN --model=FOLDER       a sequence classifier with one label, of any family in the README
python eval.py reward RUN --scores=FILE        {"id", "agent", "round", "score"} lines, joined by prompt id

Beside every score stands how often the model ranks held-out true pairs rightly; where the interval of that share
includes one half, the scores are called not informative.
"""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minmacpo import UserError
from minmacpo.config.parse import ArgParser
from minmacpo.core.batching import collate, plan_scoring
from minmacpo.core.checkpoint import load_model, load_scorer, read_config
from minmacpo.core.scoring import win_or_tie
from minmacpo.data.chat_template import render
from minmacpo.data.formats import read_data
from minmacpo.data.records import Message, Pair, Sample
from minmacpo.data.splits import first_turn
from minmacpo.data.tokenizer import Tokens, load_tokenizer
from minmacpo.evaluation.bootstrap import mean_interval
from minmacpo.evaluation.finished_run import FinishedRun, agent_label, read_run
from minmacpo.evaluation.text_tables import bracketed
from minmacpo.runtime.files import read_rows
from minmacpo.runtime.progress import aligned

Rate = Callable[
    [Sequence[tuple[Sequence[Message], str]]], np.ndarray
]  # scores of (prompt, answer) texts


@torch.inference_mode()
def last_hidden(model, rows: Sequence[Tokens], budget: int) -> Tensor:
    """Hidden states [N, H] of each row's last token, after the final norm, in fp32."""
    out = [None] * len(rows)
    device = next(model.parameters()).device
    for group in plan_scoring([len(row.ids) for row in rows], budget):
        hidden = model(collate([rows[i] for i in group], device).tokens)
        for place, i in enumerate(group):
            out[i] = hidden[place, len(rows[i].ids) - 1].float().cpu()
    return torch.stack(out)


def fit_head(chosen: Tensor, rejected: Tensor, decay: float = 1e-2, steps: int = 100) -> Tensor:
    """Weights [H] of a Bradley-Terry head: minimise the mean of -log σ(w · (chosen - rejected)) + decay/2 · |w|²
    over pairs [N, H], by L-BFGS in fp64; the problem is convex."""
    difference = (chosen - rejected).double()
    weight = torch.zeros(difference.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            -torch.nn.functional.logsigmoid(difference @ weight).mean()
            + decay / 2 * weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def rater(model, weight: Tensor, folder: Path, run: FinishedRun) -> Rate:
    """Scores by a head `weight` [H] on the last hidden states of the model that came from `folder`."""
    tokenizer, most = load_tokenizer(folder), model.config.max_position_embeddings

    def rate(texts: Sequence[tuple[Sequence[Message], str]]) -> np.ndarray:
        """[N] scores; UserError for a text that the model cannot read whole."""
        rows = [
            render(tokenizer, run.config.data.template, prompt, answer) for prompt, answer in texts
        ]
        if long := sum(len(row.ids) > most for row in rows):
            raise UserError(f"{folder}: {long} texts are longer than its context of {most} tokens")
        return (
            last_hidden(model, rows, run.config.run.max_tokens_per_batch).to(weight.dtype) @ weight
        ).numpy()

    return rate


def base_of(run: FinishedRun) -> Path:
    """The folder of the run's strong base."""
    given = run.config.model.student
    return Path(given) if given else run.stage("bases/strong").path


def slice_of(run: FinishedRun, name: str) -> list[Pair]:
    """The pairs of d1, d2 or test."""
    return read_rows(run.stage("data/slices").path / f"{name}.jsonl", Pair)


def fitting(run: FinishedRun, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that have both answers, each within the context of the run's strong base."""
    tokenizer, most = (
        load_tokenizer(base_of(run)),
        read_config(base_of(run)).max_position_embeddings,
    )

    def long(pair: Pair, text: str) -> bool:
        return len(render(tokenizer, run.config.data.template, pair.prompt, text).ids) > most

    return [
        pair
        for pair in pairs
        if pair.rejected and not long(pair, pair.chosen) and not long(pair, pair.rejected)
    ]


def unseen(run: FinishedRun, path: str) -> tuple[list[Pair], int, list[str]]:
    """The `fitting` pairs of a file, how many rows do not fit, and what became of each file's rows. UserError if a prompt begins as one of the run's:
    what rates answers is to know nothing of them."""
    pairs, reports = read_data(path, run.config.data.preference_label, setting="--pairs")
    turns = {first_turn(pair) for name in ("d1", "d2", "test") for pair in slice_of(run, name)}
    if known := next((pair for pair in pairs if first_turn(pair) in turns), None):
        raise UserError(
            f"{path}: the prompt that begins with {first_turn(known)[:60]!r} is one of the run's; leave such rows out"
        )
    if not (fit := fitting(run, pairs)):
        raise UserError(f"{path}: no pair with two answers within the context of {base_of(run)}")
    return fit, len(pairs) - len(fit), [f"{name}: {report}" for name, report in reports.items()]


def trained_here(run: FinishedRun, own: Sequence[Pair] = ()) -> Rate:
    """A Bradley-Terry head on the run's strong base, trained on `own` pairs, or on the true pairs of D1 and D2."""
    folder = base_of(run)
    model, tokenizer, template = (
        load_model(folder),
        load_tokenizer(folder),
        run.config.data.template,
    )
    known = [
        pair
        for name in ("d1", "d2")
        for pair in slice_of(run, name)
        if "corrupted" not in pair.meta
    ]
    pairs = own or with_both(known, run)
    chosen, rejected = (
        last_hidden(
            model,
            [render(tokenizer, template, p.prompt, getattr(p, side)) for p in pairs],
            run.config.run.max_tokens_per_batch,
        )
        for side in ("chosen", "rejected")
    )
    return rater(model, fit_head(chosen, rejected), folder, run)


def with_both(pairs: Sequence[Pair], run: FinishedRun) -> list[Pair]:
    """The pairs that have both answers; UserError if there is none."""
    both = [pair for pair in pairs if pair.chosen and pair.rejected]
    if not both:
        raise UserError(
            f"{run.folder}: its true answers have no worse ones beside them, so that no reward model can be tried; see --scores"
        )
    return both


def ranked(pairs: Sequence[Pair], rate: Rate) -> np.ndarray:
    """[N] 1 where the better answer is rated higher, 0.5 where both are rated the same, 0 otherwise."""
    better, worse = (
        rate([(p.prompt, getattr(p, side)) for p in pairs]) for side in ("chosen", "rejected")
    )
    return win_or_tie(better - worse)


def accuracy(run: FinishedRun, rate: Rate) -> tuple[float, list[float]]:
    """Share of the test pairs whose better answer is rated higher (equal ones count half), and its interval."""
    right = ranked(with_both(slice_of(run, "test"), run), rate)
    return float(right.mean()), mean_interval(right, run.config.eval.bootstrap)


def informative(bounds: Sequence[float]) -> bool:
    """Whether an accuracy with this interval is told apart from one half."""
    return not bounds[0] <= 0.5 <= bounds[1]


def read_test_answers(run: FinishedRun) -> dict[tuple[int, str], list[Sample]]:
    """The test answers of every agent after every round, on the disk."""
    found = {}
    for name in sorted(
        n for n in run.metadata if n.startswith("eval/round") and n.endswith("_samples")
    ):
        t, _, agent = name[len("eval/round") : -len("_samples")].partition("_")
        found[int(t), agent] = read_rows(run.stage(name).path / "samples.jsonl", Sample)
    if not found:
        raise UserError(f"{run.folder}: no agent has been measured yet")
    return dict(sorted(found.items()))


def outside(
    file: Path, known: dict[tuple[int, str], set[str]]
) -> dict[tuple[int, str], dict[str, list[float]]]:
    """The scores of an external file by (round, agent) and prompt, of which there may be several; UserError for a line
    that is no score, or one of nobody and nothing that is `known`."""
    found: dict[tuple[int, str], dict] = {}
    for number, row in enumerate(read_rows(file), 1):
        t, agent, name, score = (
            row.get(key) if isinstance(row, dict) else None
            for key in ("round", "agent", "id", "score")
        )
        sound = (
            type(t) is int and type(score) in (int, float) and abs(score) < 1e30
        )  # nan is not, either
        if not (sound and isinstance(agent, str) and isinstance(name, str)):
            form = '{"id": text, "agent": text, "round": whole number, "score": number}'
            raise UserError(f"{file}, line {number}: is no score; expected {form}")
        if name not in known.get((t, agent), ()):
            raise UserError(
                f"{file}, line {number}: this run has no answer of {agent}, round {t}, to prompt {name}"
            )
        found.setdefault((t, agent), {}).setdefault(name, []).append(float(score))
    return found


def joined(run: FinishedRun, file: Path) -> list[dict]:
    """Rows of the table from an external file, several scores of a prompt averaged; UserError if an answer has none."""
    asked = {
        key: {sample.id for sample in samples} for key, samples in read_test_answers(run).items()
    }
    scores, rows = outside(file, asked), []
    for (t, agent), given in sorted(scores.items()):
        if missing := asked[t, agent] - given.keys():
            raise UserError(
                f"{file}: has no score of {agent}, round {t}, for prompt {min(missing)}"
            )
        values = np.array([np.mean(given[name]) for name in sorted(given)])
        rows.append(
            {
                "agent": agent,
                "round": t,
                "score": float(values.mean()),
                "interval": mean_interval(values, run.config.eval.bootstrap),
            }
        )
    if not rows:
        raise UserError(f"{file}: holds no score")
    return rows


def run_reward(argv: Sequence[str]) -> dict:
    """Rate every agent at every round; returns the accuracy on held-out pairs, and the rows."""
    parser = ArgParser(
        "eval.py reward", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--scores", type=Path)
    words = parser.parse_args(argv)
    run = read_run(words.run)
    if sum(map(bool, (words.pairs, words.model, words.scores))) > 1:
        raise UserError("expected one of --pairs, --model and --scores")
    if words.scores:
        return {
            "model": str(words.scores),
            "accuracy": None,
            "informative": None,
            "rows": joined(run, words.scores),
        }
    own, dropped, read = unseen(run, words.pairs) if words.pairs else ((), 0, [])
    rate = (
        rater(*load_scorer(words.model), words.model, run)
        if words.model
        else trained_here(run, own)
    )
    share, bounds_of_share = accuracy(run, rate)
    rows = []
    for (t, agent), samples in read_test_answers(run).items():
        values = (
            rate([(s.prompt, s.response) for s in samples])
            .reshape(-1, run.config.eval.samples)
            .mean(1)
        )
        bounds = mean_interval(values, run.config.eval.bootstrap)
        rows.append({"agent": agent, "round": t, "score": float(values.mean()), "interval": bounds})
    return {
        "model": str(words.model or "Bradley-Terry head on the strong base"),
        "accuracy": share,
        "accuracy_interval": bounds_of_share,
        "informative": informative(bounds_of_share),
        "dropped": dropped,
        "read": read,
        "rows": rows,
    }


def as_text(found: dict) -> str:
    """The table for a terminal."""
    lines = [
        *found.get("read", ()),
        f"reward model: {found['model']}"
        + (
            f"; {found['dropped']} pairs left out (over-long, or one answer)"
            if found.get("dropped")
            else ""
        ),
    ]
    if found["accuracy"] is not None:
        told = "" if found["informative"] else "; NOT INFORMATIVE: the interval includes one half"
        lines.append(
            f"held-out accuracy {bracketed([found['accuracy'], *found['accuracy_interval']])}{told}"
        )
    rows = [
        [
            f"{agent_label(row['agent'])}, round {row['round']}",
            bracketed([row["score"], *row["interval"]]),
        ]
        for row in found["rows"]
    ]
    return "\n".join([*lines, aligned(["of the test answers", "mean score [95 %]"], rows)])
