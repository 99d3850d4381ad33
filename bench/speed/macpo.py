"""A whole round of MACPO against the same method written with TRL, PEFT and generate: python -m bench.speed.macpo [DTYPE].

One student and two teachers of the 15M shape; 16 prompts of 32 tokens, 32 new tokens, eight pairs a step. Both sides load their
agents, sample, choose by the student's perplexity and train all three; files of stages are left out on both.
"""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import torch

from bench.speed import trl_macpo
from bench.speed.peers import BETA, DTYPES, LR, joined, make_folder, make_rows, own_model
from bench.speed.timing import alternate, bf16_hardware, missing, read_words, write_bench
from minmacpo.config.schema import Generate
from minmacpo.core.losses import PreferenceLoss
from minmacpo.core.sampling import generate
from minmacpo.core.scoring import score
from minmacpo.core.trainer import TrainExample, train_step

PROMPTS, PROMPT, NEW, BATCH = 16, 32, 32, 8
SAMPLING = Generate(0.95, 50, 0.7, NEW)
AGENTS = ("student", "teacher1", "teacher2")
TITLE = (
    f"One round with two teachers, 15M each: {PROMPTS} prompts of {PROMPT} tokens, answers of up to {NEW}, DPO + SFT with {BATCH} "
    "pairs a step, one thread, models loaded anew."
)
TextColumn = list[list[int]]


def sample(model, prompts: TextColumn, seed: int) -> TextColumn:
    """An answer to each prompt."""
    found, _ = generate(model, prompts, range(seed, seed + len(prompts)), SAMPLING, {2})
    return [trl_macpo.whole(text) for text in found]


def perplexities(model, prompts: TextColumn, texts: TextColumn) -> list[float]:
    """Mean negative log-probability per token of every text behind its prompt (perplexity is monotone in it)."""
    rows = [joined({"prompt": p, "text": t}, "text") for p, t in zip(prompts, texts, strict=True)]
    logps = score(model, rows, 16384, packed=True, log=lambda line: None)
    return [-logp / len(text) for logp, text in zip(logps, texts, strict=True)]


def choose(familiar: list[list[float]], offered: list[TextColumn]) -> TextColumn:
    """Of every prompt the answer with the lowest perplexity."""
    columns = zip(zip(*familiar, strict=True), zip(*offered, strict=True), strict=True)
    return [min(zip(column, texts, strict=True))[1] for column, texts in columns]


def learn(model, params: list, pairs: list[tuple], heard: list[float] | None = None) -> list[float]:
    """DPO + SFT on (prompt, chosen, rejected), one epoch; the loss of every step. The reference is the adapter at its start;
    `heard`: the chosen texts' log-probabilities under it, which the student knows from choosing them (pairing.pairs)."""
    texts = [
        tuple(joined({"prompt": prompt, "text": text}, "text") for text in sides)
        for prompt, *sides in pairs
    ]
    refs = iter(
        score(
            model,
            [text for pair in texts for text in (pair[1:] if heard else pair)],
            16384,
            packed=True,
            log=lambda line: None,
        )
    )
    units = [
        TrainExample(str(i), pair, (heard[i] if heard else next(refs), next(refs)))
        for i, pair in enumerate(texts)
    ]
    objective, optimizer = (
        PreferenceLoss(BETA, trl_macpo.GAMMA),
        torch.optim.AdamW(params, LR, weight_decay=0.0, fused=True),
    )
    groups = [
        [*range(start, min(start + BATCH, len(units)))] for start in range(0, len(units), BATCH)
    ]
    return [
        train_step(model, params, units, [group], objective, optimizer, packed=True)["loss"].item()
        for group in groups
    ]


def macpo_round(
    place: Path, prompts: TextColumn, negatives: dict[str, TextColumn], dtype: str
) -> None:
    """Teachers answer, the student takes the least perplexing answer and learns, answers, and the teachers learn from it."""
    agents = {name: own_model(place / name, dtype) for name in AGENTS}
    student, *teachers = AGENTS
    offered = [sample(agents[name][0], prompts, 0) for name in teachers]
    familiar = [perplexities(agents[student][0], prompts, texts) for texts in offered]
    chosen = choose(familiar, offered)
    heard = [
        -min(column) * len(text)
        for column, text in zip(zip(*familiar, strict=True), chosen, strict=True)
    ]
    learn(*agents[student], [*zip(prompts, chosen, negatives[student], strict=True)], heard)
    said = sample(agents[student][0], prompts, 0)
    for name in teachers:
        learn(*agents[name], [*zip(prompts, said, negatives[name], strict=True)])


def same_method(
    place: Path, prompts: TextColumn, negatives: dict[str, TextColumn], dtype: str
) -> str:
    """Given the same samples both sides must choose the same answers, and given the same pairs have the same first loss."""
    student, *teachers = AGENTS
    model, params = own_model(place / student, dtype)
    offered = [sample(own_model(place / name, dtype)[0], prompts, 0) for name in teachers]
    mine = choose([perplexities(model, prompts, texts) for texts in offered], offered)
    peer = trl_macpo.load(place / student, dtype)
    theirs = choose([trl_macpo.perplexities(peer, prompts, texts) for texts in offered], offered)
    agreed = sum(a == b for a, b in zip(mine, theirs, strict=True))
    pairs = [*zip(prompts, mine, negatives[student], strict=True)][:BATCH]
    loss, other = (
        learn(model, params, pairs)[0],
        trl_macpo.learn(peer, place / "trl", pairs, dtype, BATCH)[0],
    )
    if (
        agreed < len(prompts) - (2 if dtype == "bf16" else 0)
        or abs(loss - other) > (1e-3 if dtype == "fp32" else 0.02) * other
    ):
        raise SystemExit(
            f"{dtype}: {agreed} of {len(prompts)} choices are the same; losses {loss} and {other}"
        )
    return f"{agreed} of {len(prompts)} chosen answers; first loss {loss:.4f} / {other:.4f}"


def compare(place: Path, dtype: str, lacks: str, times: int) -> dict:
    """The row, timed after both sides were found to do the same."""
    rows = make_rows(PROMPTS, PROMPT, NEW, AGENTS)
    prompts, negatives = (
        [row["prompt"] for row in rows],
        {name: [row[name] for row in rows] for name in AGENTS},
    )
    row = {
        "work": "a MACPO round",
        "shape": "15M",
        "dtype": dtype,
        "peer": "TRL + PEFT + generate",
        "target": ["macpo"] if dtype == "fp32" else [],
        "note": lacks,
    }

    def mine():
        macpo_round(place, prompts, negatives, dtype)

    def theirs():
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            trl_macpo.macpo_round(place, prompts, negatives, dtype, NEW, BATCH)

    if lacks:
        return row | alternate(mine, None, times)
    equal = same_method(place, prompts, negatives, dtype)
    return row | alternate(mine, theirs, times) | {"equal": equal}


def main(dtypes: list[str]) -> None:
    torch.set_num_threads(1)
    lacks, rows = missing("trl", "peft", "transformers", "datasets"), []
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(AGENTS):
            make_folder(Path(folder, name), "15M", seed)
        for dtype in dtypes:
            rows.append(compare(Path(folder), dtype, lacks, 5))
            write_bench("macpo", TITLE, rows, keep=True)  # what there is so far


if __name__ == "__main__":
    main(read_words(DTYPES) or (["fp32", "bf16"] if bf16_hardware() else ["fp32"]))
