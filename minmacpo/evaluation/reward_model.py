"""Reward models as measures of answers: trained here, a Hugging Face classifier, or elsewhere.

python eval.py reward RUN                   a Bradley-Terry head on the run's strong base, trained
                                            on its true pairs
python eval.py reward RUN --pairs=FILE      the same, trained on pairs that the run has not seen
python eval.py reward RUN --model=FOLDER    a sequence classifier with one label, of any family in
                                            docs/models.md; --template=NAME says how dialogues are
                                            written for it (default: as its folder says)
python eval.py reward RUN --scores=FILE     {"id", "agent", "round", "score"} lines, joined by
                                            prompt id

Beside every score stands how often the model ranks held-out true pairs rightly; where the interval
of that share includes one half, the scores are called not informative.
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minmacpo import UserError
from minmacpo.config.parse import ArgParser
from minmacpo.core.batching import collate, plan_scoring
from minmacpo.core.checkpoint import load_classifier, load_model, read_config
from minmacpo.core.scoring import win_or_tie
from minmacpo.data.chat_template import Renderer, render_whole
from minmacpo.data.formats import read_data
from minmacpo.data.records import Message, Pair, Sample
from minmacpo.data.splits import first_turn
from minmacpo.data.templates import TEMPLATES
from minmacpo.data.tokenizer import Tokens, load_tokenizer
from minmacpo.evaluation.bootstrap import mean_interval
from minmacpo.evaluation.finished_run import FinishedRun, agent_label, read_run, read_samples
from minmacpo.evaluation.text_tables import bracketed
from minmacpo.pipeline.open_model import choose_template, say_template
from minmacpo.pipeline.prepare_data import base_templates, texts_of, warn_of_left_out
from minmacpo.runtime.device import resolve_device, resolve_dtype
from minmacpo.runtime.files import read_rows
from minmacpo.runtime.hub import local_folder
from minmacpo.runtime.progress import aligned

Text = tuple[Sequence[Message], str]  # a prompt and an answer to it
Rate = Callable[[Sequence[Text]], np.ndarray]  # the scores of texts, (N,)
AgentRound = tuple[int, str]  # the round and the agent

MAX_SCORE = 1e30  # what is larger would make no mean
SHOWN_PROMPT = 60  # characters of a prompt in an error


def run_reward(argv: Sequence[str]) -> dict:
    """The scores of every agent at every round, and the accuracy of what scores, as JSON."""
    args = parse_command(argv)
    run = read_run(args.run)
    if args.scores:
        return {
            "model": str(args.scores),
            "accuracy": None,
            "informative": None,
            "rows": join_scores(run, args.scores),
        }

    # What rates
    own = OwnPairs()
    if args.model:
        rate = load_rater(local_folder(args.model), run, args.template)
    else:
        if args.pairs:
            own = read_own_pairs(run, args.pairs)
        rate = train_reward_model(run, own.pairs)

    # How far it can be trusted, and what it says
    draws = run.config.eval.bootstrap
    test_pairs = complete_pairs(read_split(run, "test"), run)
    wins = rank_pairs(test_pairs, rate)
    accuracy_interval = mean_interval(wins, draws)
    texts = texts_of([*own.pairs, *test_pairs])
    rows = []
    for (t, agent), samples in read_test_answers(run).items():
        texts += [sample.response for sample in samples]
        scores = rate([(sample.prompt, sample.response) for sample in samples])
        score_by_prompt = scores.reshape(-1, run.config.eval.samples).mean(1)
        rows.append(score_row(agent, t, score_by_prompt, draws))
    warn_of_left_out(rate.renderer.tokenizer, texts)
    return {
        "model": str(args.model or "Bradley-Terry head on the strong base"),
        "accuracy": float(wins.mean()),
        "accuracy_interval": accuracy_interval,
        "informative": is_informative(accuracy_interval),
        "dropped": own.dropped,
        "read": own.reports,
        "rows": rows,
    }


def parse_command(argv: Sequence[str]) -> Namespace:
    """The command line; UserError if it names more than one thing that rates."""
    parser = ArgParser(
        "eval.py reward", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--template")
    parser.add_argument("--scores", type=Path)
    args = parser.parse_args(argv)
    sources = [source for source in (args.pairs, args.model, args.scores) if source]
    if len(sources) > 1:
        raise UserError("expected one of --pairs, --model and --scores")
    if args.template and not args.model:
        raise UserError("--template is for --model; others use the run's data.template")
    if args.template and args.template not in TEMPLATES:
        names = ", ".join(TEMPLATES)
        raise UserError(f"--template={args.template}: expected one of {names}")
    return args


def score_row(agent: str, t: int, score_by_prompt: np.ndarray, draws: int) -> dict:
    """A row of the table."""
    return {
        "agent": agent,
        "round": t,
        "score": float(score_by_prompt.mean()),
        "interval": mean_interval(score_by_prompt, draws),
    }


def is_informative(accuracy_interval: Sequence[float]) -> bool:
    """Whether an accuracy with this interval is told apart from one half."""
    low, high = accuracy_interval
    return not low <= 0.5 <= high


# ---- a head on a model ------------------------------------------------------------------------


@torch.inference_mode()
def last_hidden(
    model, rows: Sequence[Tokens], max_tokens: int, pad_token_id: int | None = None
) -> Tensor:
    """Hidden states of each row's last token, after the final norm, in fp32, (N, C).

    Args:
        max_tokens: of a forward pass, padding included.
        pad_token_id: a token that is not counted as the last one, though the row ends with it:
            models whose padding is their end token were trained to be read one token before it.
    """
    device = next(model.parameters()).device
    states = [None] * len(rows)
    for group in plan_scoring([len(row.ids) for row in rows], max_tokens):
        batch = collate([rows[i] for i in group], device)
        hidden = model(batch.tokens)  # (B, T, C)
        for place, i in enumerate(group):
            last = last_position(rows[i].ids, pad_token_id)
            states[i] = hidden[place, last].float().cpu()
    return torch.stack(states)


def last_position(ids: Sequence[int], pad_token_id: int | None) -> int:
    """The position of the last token that is not padding; 0 where there is none."""
    for position in reversed(range(len(ids))):
        if ids[position] != pad_token_id:
            return position
    return 0


def fit_head(chosen: Tensor, rejected: Tensor, decay: float = 1e-2, steps: int = 100) -> Tensor:
    """The weights of a Bradley-Terry head, (C,), by L-BFGS in fp64.

    They minimise the mean of -log sigmoid(w · (chosen - rejected)) + decay / 2 · |w|² over pairs,
    which is a convex problem.

    Args:
        chosen: hidden states of the better answers, (N, C).
        rejected: those of the worse ones.
    """
    difference = (chosen - rejected).double()  # (N, C)
    weight = torch.zeros(difference.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        margins = difference @ weight  # (N,)
        penalty = decay / 2 * weight.square().sum()
        loss = -torch.nn.functional.logsigmoid(margins).mean() + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


@dataclass(frozen=True, slots=True)
class Rater:
    """Scores texts by a head on a model's last hidden states."""

    folder: Path  # where the model came from, for errors
    model: torch.nn.Module
    head: Tensor  # (C,)
    renderer: Renderer
    max_tokens: int  # of a forward pass, padding included
    is_published: bool = False  # it reads dialogues to their very end, as a chat template has it
    pad_token_id: int | None = None

    def render(self, prompt: Sequence[Message], answer: str) -> Tokens:
        """The tokens that the model is to read."""
        if not self.is_published:
            return self.renderer.render(prompt, answer)
        ids = render_whole(self.renderer.tokenizer, self.renderer.template, prompt, answer)
        return Tokens(ids, [True] * len(ids))

    def __call__(self, texts: Sequence[Text]) -> np.ndarray:
        """The scores of prompts with an answer each, (N,)."""
        rows = [self.render(prompt, answer) for prompt, answer in texts]
        context = self.model.config.max_position_embeddings
        too_long = sum(len(row.ids) > context for row in rows)
        if too_long:
            raise UserError(
                f"{self.folder}: {too_long} texts are longer than its context of {context} tokens"
            )
        hidden = last_hidden(self.model, rows, self.max_tokens, self.pad_token_id)
        return (hidden.to(self.head.dtype) @ self.head).numpy()


def load_rater(folder: Path, run: FinishedRun, template: str | None) -> Rater:
    """A Hugging Face classifier, on the device and in the dtype of the run's settings.

    Args:
        template: how dialogues are written for it; None: as its folder says.
    """
    settings = run.config.run
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    classifier = load_classifier(folder, device, dtype)
    name, source = choose_template(template or "own", [], folder)
    say_template(folder, name, source)
    return Rater(
        folder=folder,
        model=classifier.model,
        head=classifier.head,
        renderer=Renderer(load_tokenizer(folder), name),
        max_tokens=settings.max_tokens_per_batch,
        is_published=True,
        pad_token_id=classifier.pad_token_id,
    )


def train_reward_model(run: FinishedRun, own_pairs: Sequence[Pair] = ()) -> Rater:
    """A Bradley-Terry head on the run's strong base.

    Args:
        own_pairs: what it is trained on; if empty, the true pairs of D1 and D2.
    """
    folder = strong_base(run)
    pairs = own_pairs
    if not pairs:
        known = [*read_split(run, "d1"), *read_split(run, "d2")]
        pairs = complete_pairs([pair for pair in known if "corrupted" not in pair.meta], run)
    settings = run.config.run
    device = resolve_device(settings.device)
    model = load_model(folder, device=device, dtype=resolve_dtype(settings.dtype, device))
    renderer = Renderer(load_tokenizer(folder), strong_template(run))
    max_tokens = settings.max_tokens_per_batch

    chosen_rows = [renderer.render(pair.prompt, pair.chosen) for pair in pairs]
    rejected_rows = [renderer.render(pair.prompt, pair.rejected) for pair in pairs]
    chosen = last_hidden(model, chosen_rows, max_tokens)
    rejected = last_hidden(model, rejected_rows, max_tokens)
    return Rater(
        folder=folder,
        model=model,
        head=fit_head(chosen, rejected),
        renderer=renderer,
        max_tokens=max_tokens,
    )


def rank_pairs(pairs: Sequence[Pair], rate: Rate) -> np.ndarray:
    """1 where the better answer is rated higher, 0.5 where both are rated the same, 0 elsewhere."""
    better = rate([(pair.prompt, pair.chosen) for pair in pairs])
    worse = rate([(pair.prompt, pair.rejected) for pair in pairs])
    return win_or_tie(better - worse)


# ---- what is read -----------------------------------------------------------------------------


def strong_base(run: FinishedRun) -> Path:
    """The folder of the run's strong base."""
    given = run.config.model.student
    return local_folder(given) if given else run.stage("bases/strong").path


def strong_template(run: FinishedRun) -> str:
    """The template that dialogues are written in for the run's strong base."""
    return base_templates(run.config)["strong"]


def read_split(run: FinishedRun, name: str) -> list[Pair]:
    """The pairs of a run's split, "d1", "d2" or "test"."""
    return read_rows(run.stage("data/slices").path / f"{name}.jsonl", Pair)


def complete_pairs(pairs: Sequence[Pair], run: FinishedRun) -> list[Pair]:
    """The pairs that have both answers; UserError if there is none."""
    complete = [pair for pair in pairs if pair.chosen and pair.rejected]
    if not complete:
        raise UserError(
            f"{run.folder}: its true answers have no worse ones beside them, so that no reward "
            "model can be tried; see --scores"
        )
    return complete


def fitting_pairs(run: FinishedRun, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that have both answers, each within the context of the run's strong base."""
    renderer = Renderer(load_tokenizer(strong_base(run)), strong_template(run))
    context = read_config(strong_base(run)).max_position_embeddings
    fitting = []
    for pair in pairs:
        if not pair.rejected:
            continue
        lengths = []
        for text in (pair.chosen, pair.rejected):
            tokens = renderer.render(pair.prompt, text)
            lengths.append(len(tokens.ids))
        if max(lengths) <= context:
            fitting.append(pair)
    return fitting


@dataclass(frozen=True, slots=True)
class OwnPairs:
    """Pairs from a file to train a reward model on."""

    pairs: list[Pair] = field(default_factory=list)
    dropped: int = 0  # rows that do not fit the context, or have one answer
    reports: list[str] = field(default_factory=list)  # what became of the rows, by file


def read_own_pairs(run: FinishedRun, path: str) -> OwnPairs:
    """The pairs of a file that a reward model can be trained on.

    Raises:
        UserError: no pair fits, or a prompt begins like one of the run's: what rates answers is to
            know nothing of their prompts.
    """
    pairs, reports = read_data(path, run.config.data.preference_label, setting="--pairs")
    first_turns = set()
    for split in ("d1", "d2", "test"):
        first_turns.update(first_turn(pair) for pair in read_split(run, split))
    for pair in pairs:
        if first_turn(pair) in first_turns:
            raise UserError(
                f"{path}: the prompt that begins with {first_turn(pair)[:SHOWN_PROMPT]!r} is one "
                "of the run's; leave such rows out"
            )
    fitting = fitting_pairs(run, pairs)
    if not fitting:
        raise UserError(
            f"{path}: no pair with two answers within the context of {strong_base(run)}"
        )
    lines = [f"{name}: {report}" for name, report in reports.items()]
    return OwnPairs(fitting, len(pairs) - len(fitting), lines)


def read_test_answers(run: FinishedRun) -> dict[AgentRound, list[Sample]]:
    """The test answers of every agent after every round that are on the disk."""
    answers = {}
    for name in sorted(run.metadata):
        if name.startswith("eval/round") and name.endswith("_samples"):
            middle = name.removeprefix("eval/round").removesuffix("_samples")
            t, _, agent = middle.partition("_")
            answers[int(t), agent] = read_samples(run.stage(name))
    if not answers:
        raise UserError(f"{run.folder}: no agent has been measured yet")
    return dict(sorted(answers.items()))


# ---- scores from elsewhere --------------------------------------------------------------------


def join_scores(run: FinishedRun, file: Path) -> list[dict]:
    """Rows of the table from an external file, several scores of a prompt averaged.

    Raises:
        UserError: a line is no score of an answer of this run, or an answer has none.
    """
    ids_of = {}
    for agent_round, samples in read_test_answers(run).items():
        ids_of[agent_round] = {sample.id for sample in samples}
    rows = []
    for (t, agent), scores_of in sorted(read_scores(file, ids_of).items()):
        missing = ids_of[t, agent] - scores_of.keys()
        if missing:
            raise UserError(
                f"{file}: has no score of {agent}, round {t}, for prompt {min(missing)}"
            )
        means = np.array([np.mean(scores_of[prompt_id]) for prompt_id in sorted(scores_of)])
        rows.append(score_row(agent, t, means, run.config.eval.bootstrap))
    if not rows:
        raise UserError(f"{file}: holds no score")
    return rows


def read_scores(
    file: Path, ids_of: dict[AgentRound, set[str]]
) -> dict[AgentRound, dict[str, list[float]]]:
    """The scores in an external file, by (round, agent) and prompt id.

    Args:
        ids_of: the prompts that an agent answered after a round.

    Raises:
        UserError: a line is no score, or one of an answer that there is not.
    """
    scores: dict[AgentRound, dict[str, list[float]]] = {}
    for number, row in enumerate(read_rows(file), 1):
        place = f"{file}, line {number}"
        if not is_score(row):
            raise UserError(
                f"{place}: is no score; expected "
                '{"id": text, "agent": text, "round": whole number, "score": number}'
            )
        agent_round = (row["round"], row["agent"])
        if row["id"] not in ids_of.get(agent_round, ()):
            raise UserError(
                f"{place}: this run has no answer of {row['agent']}, round {row['round']}, "
                f"to prompt {row['id']}"
            )
        of_agent = scores.setdefault(agent_round, {})
        of_agent.setdefault(row["id"], []).append(float(row["score"]))
    return scores


def is_score(row: dict) -> bool:
    """Whether a line of an external file has what it must have."""
    score = row.get("score")
    if type(row.get("round")) is not int or type(score) not in (int, float):  # True is an int
        return False
    if not abs(score) < MAX_SCORE:  # nan is not, either
        return False
    return isinstance(row.get("agent"), str) and isinstance(row.get("id"), str)


def format_rewards(result: dict) -> str:
    """The table for a terminal."""
    title = f"reward model: {result['model']}"
    if result.get("dropped"):
        title += f"; {result['dropped']} pairs left out (over-long, or one answer)"
    lines = [*result.get("read", ()), title]
    if result["accuracy"] is not None:
        accuracy = bracketed([result["accuracy"], *result["accuracy_interval"]])
        line = f"held-out accuracy {accuracy}"
        if not result["informative"]:
            line += "; NOT INFORMATIVE: the interval includes one half"
        lines.append(line)
    rows = []
    for row in result["rows"]:
        label = f"{agent_label(row['agent'])}, round {row['round']}"
        rows.append([label, bracketed([row["score"], *row["interval"]])])
    lines.append(aligned(["of the test answers", "mean score [95 %]"], rows))
    return "\n".join(lines)
