"""A round of MACPO against the same method written with TRL, PEFT and generate.

    python -m bench.speed.macpo [DTYPE]

One student and two teachers of the 15M shape; 16 prompts of 32 tokens, 32 new tokens, eight pairs a
step. Both sides load their agents, sample, choose by the student's perplexity and train all three;
files of stages are left out on both.
"""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.speed import trl_macpo
from bench.speed.peers import (
    BETA,
    LR,
    SCORING_TOKENS,
    joined,
    make_folder,
    make_rows,
    own_model,
    read_dtypes,
)
from bench.speed.timing import alternate, count_equal, missing, write_bench
from bench.speed.trl_macpo import Pair, Texts, mean_losses
from minmacpo.config.schema import Generate
from minmacpo.core.losses import PreferenceLoss
from minmacpo.core.sampling import generate
from minmacpo.core.scoring import score
from minmacpo.core.trainer import TrainExample, train_step
from minmacpo.data.tokenizer import Tokens

PROMPTS = 16
PROMPT = 32
NEW = 32
BATCH = 8
SAMPLING = Generate(temperature=0.95, top_k=50, top_p=0.7, max_new_tokens=NEW)
STUDENT = "student"
TEACHERS = ("teacher1", "teacher2")
AGENTS = (STUDENT, *TEACHERS)
TITLE = (
    f"One round with two teachers, 15M each: {PROMPTS} prompts of {PROMPT} tokens, answers of up "
    f"to {NEW}, DPO + SFT with {BATCH} pairs a step, one thread, models loaded anew."
)


# ---- the round ------------------------------------------------------------------------------


def sample(model, prompts: Texts, seed: int) -> Texts:
    """An answer to each prompt."""
    texts, _ = generate(model, prompts, range(seed, seed + len(prompts)), SAMPLING, {2})
    return [trl_macpo.whole(text) for text in texts]


def tokens_of(prompt: list[int], text: list[int]) -> Tokens:
    """Prompt and answer, of which the answer is trained on."""
    return joined({"prompt": prompt, "text": text}, "text")


def logps_of(model, rows: Sequence[Tokens]) -> list[float]:
    """Summed log-probabilities of the answers."""
    return score(model, rows, SCORING_TOKENS, packed=True, log=lambda line: None)


def perplexities(model, prompts: Texts, texts: Texts) -> list[float]:
    """Mean negative log-probability per token of every text."""
    rows = list(map(tokens_of, prompts, texts))
    return mean_losses(logps_of(model, rows), texts)


def learn(
    model, params: list, pairs: list[Pair], chosen_logps: list[float] | None = None
) -> list[float]:
    """DPO + SFT on the pairs, one epoch; the loss of every step.

    The reference is the adapter at its start.

    Args:
        chosen_logps: the chosen texts' log-probabilities under it, where they are known from
            choosing them.
    """
    chosen_rows = []
    rejected_rows = []
    for prompt, chosen, rejected in pairs:
        chosen_rows.append(tokens_of(prompt, chosen))
        rejected_rows.append(tokens_of(prompt, rejected))
    rejected_logps = logps_of(model, rejected_rows)
    if chosen_logps is None:
        chosen_logps = logps_of(model, chosen_rows)

    examples = []
    for i in range(len(pairs)):
        rows = (chosen_rows[i], rejected_rows[i])
        references = (chosen_logps[i], rejected_logps[i])
        examples.append(TrainExample(str(i), rows, references))

    loss = PreferenceLoss(BETA, trl_macpo.SFT_WEIGHT)
    optimizer = torch.optim.AdamW(params, LR, weight_decay=0.0, fused=True)
    losses = []
    for start in range(0, len(examples), BATCH):
        group = list(range(start, min(start + BATCH, len(examples))))
        metrics = train_step(model, params, examples, [group], loss, optimizer, packed=True)
        losses.append(metrics["loss"].item())
    return losses


def macpo_round(folder: Path, prompts: Texts, negatives: dict[str, Texts], dtype: str) -> None:
    """Teachers answer, the student learns the least perplexing answer, teachers learn its own."""
    agents = {name: own_model(folder / name, dtype) for name in AGENTS}
    student, student_params = agents[STUDENT]

    # The student learns from the teachers
    offered = []
    perplexities_of = []
    for name in TEACHERS:
        teacher, _ = agents[name]
        answers = sample(teacher, prompts, 0)
        offered.append(answers)
        perplexities_of.append(perplexities(student, prompts, answers))
    chosen = trl_macpo.choose(perplexities_of, offered)
    chosen_logps = []
    for i, text in enumerate(chosen):
        best = min(values[i] for values in perplexities_of)
        chosen_logps.append(-best * len(text))
    pairs = list(zip(prompts, chosen, negatives[STUDENT], strict=True))
    learn(student, student_params, pairs, chosen_logps)

    # The teachers learn from the student
    answers = sample(student, prompts, 0)
    for name in TEACHERS:
        model, params = agents[name]
        learn(model, params, list(zip(prompts, answers, negatives[name], strict=True)))


# ---- measuring ------------------------------------------------------------------------------


def check_same_method(folder: Path, prompts: Texts, negatives: dict[str, Texts], dtype: str) -> str:
    """What is equal on both sides.

    Of the same samples both must choose the same answers, and of the same pairs have the same
    first loss; ends the benchmark otherwise.
    """
    model, params = own_model(folder / STUDENT, dtype)
    peer = trl_macpo.load(folder / STUDENT, dtype)

    # The answers that both choose
    offered = []
    own_values = []
    peer_values = []
    for name in TEACHERS:
        teacher, _ = own_model(folder / name, dtype)
        answers = sample(teacher, prompts, 0)
        offered.append(answers)
        own_values.append(perplexities(model, prompts, answers))
        peer_values.append(trl_macpo.perplexities(peer, prompts, answers))
    own_chosen = trl_macpo.choose(own_values, offered)
    peer_chosen = trl_macpo.choose(peer_values, offered)
    agreed = count_equal(own_chosen, peer_chosen)

    # The first loss of both
    pairs = list(zip(prompts, own_chosen, negatives[STUDENT], strict=True))[:BATCH]
    loss, *_ = learn(model, params, pairs)
    peer_loss, *_ = trl_macpo.learn(peer, folder / "trl", pairs, dtype, BATCH)

    most_other_choices = 0
    tolerance = 1e-3
    if dtype == "bf16":
        most_other_choices = 2
        tolerance = 0.02
    differs = abs(loss - peer_loss) > tolerance * peer_loss
    choices = f"{agreed} of {len(prompts)}"
    if differs or agreed < len(prompts) - most_other_choices:
        losses = f"losses {loss} and {peer_loss}"
        raise SystemExit(f"{dtype}: {choices} choices are the same; {losses}")
    return f"{choices} chosen answers; first loss {loss:.4f} / {peer_loss:.4f}"


def compare(folder: Path, dtype: str, lacks: str) -> dict:
    """The row, timed after both sides were found to do the same."""
    rows = make_rows(PROMPTS, PROMPT, NEW, AGENTS)
    prompts = [row["prompt"] for row in rows]
    negatives = {}
    for name in AGENTS:
        negatives[name] = [row[name] for row in rows]
    row = {
        "work": "a MACPO round",
        "shape": "15M",
        "dtype": dtype,
        "peer": "TRL + PEFT + generate",
        "target": ["macpo"] if dtype == "fp32" else [],
        "note": lacks,
    }

    def own():
        macpo_round(folder, prompts, negatives, dtype)

    def peer():
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            trl_macpo.macpo_round(folder, prompts, negatives, dtype, NEW, BATCH)

    if lacks:
        return row | alternate(own, None)
    row["equal"] = check_same_method(folder, prompts, negatives, dtype)
    return row | alternate(own, peer)


def main(dtypes: list[str]) -> None:
    """Measure a round in every dtype; what there is so far is always written."""
    torch.set_num_threads(1)
    lacks = missing("trl", "peft", "transformers", "datasets")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(AGENTS):
            make_folder(Path(folder, name), "15M", seed)
        for dtype in dtypes:
            rows.append(compare(Path(folder), dtype, lacks))
            write_bench("macpo", TITLE, rows, keep=True)


if __name__ == "__main__":
    main(read_dtypes())
