"""Memory of sampling, scoring and pair building as prompts grow in number.

    python -m bench.speed.rows [10000 100000 ...]

Every number is a process of its own, with a base that can do nothing, two agents' answers of two
tokens and an agent's negatives: the stages of a round without training. Printed is the peak of
resident memory in every stage, and its distance from the first number's.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.speed.timing import read_words
from minmacpo.config.parse import parse
from minmacpo.core.checkpoint import save_model
from minmacpo.core.model import new_model
from minmacpo.core.model_config import ModelConfig
from minmacpo.data.records import Message, Pair
from minmacpo.data.tokenizer import Tokenizer, train_tokenizer
from minmacpo.method.pairs import PairInputs, build_pairs
from minmacpo.method.selection import CandidateSet, Selection
from minmacpo.pipeline.artifacts import Policy, ScoreColumn, TextColumn
from minmacpo.pipeline.base_models import external_base
from minmacpo.pipeline.model_pool import ModelPool, Session
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.sample_stage import sample
from minmacpo.pipeline.score_stage import score_texts
from minmacpo.pipeline.stage import StageContext
from minmacpo.runtime.files import write_rows

STAGES = ("sample", "score", "pairs")
WORDS = [
    "@tiny",
    "--run.name=x",
    "--generate.max_new_tokens=2",
    "--generate.batch=512",
    "--run.log_every=100",
    "--data.max_length=64",
    "--data.max_prompt_length=40",
]


def question(number: int) -> str:
    """The prompt of this number."""
    return f"who is number {number} and what does he do on day {number % 7} ?"


def write_base(folder: Path) -> None:
    """Write a base that can do nothing: one layer, eight wide."""
    pieces = train_tokenizer([question(i) for i in range(500)], 400)
    config = ModelConfig(
        vocab_size=Tokenizer(pieces).size,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
    )
    folder.mkdir()
    save_model(folder, config, new_model(config, 0).state_dict(), pieces)


def prompts(count: int) -> Iterator[Pair]:
    """So many pairs, each of another question."""
    for number in range(count):
        prompt = (Message("user", question(number)),)
        yield Pair(str(number), prompt, "he is a baker .", "go away .")


def run_stages(root: Path, count: int) -> None:
    """Make the stages on so many prompts; prints the peak of each kind in MB."""
    write_base(root / "base")
    run = Run(parse([*WORDS, f"--run.root={root}"]).config)
    session = Session(run, ModelPool(run.config))
    policy = Policy("a", external_base(run.config, "strong", root / "base"))
    run.begin()

    def write_splits(context: StageContext) -> dict:
        write_rows(context.folder / "d2.jsonl", prompts(count))
        return {"rows": count}

    splits = run.stage("data/slices", "slices/2", {"count": count}, [], write_splits)
    queries = TextColumn(splits, "d2.jsonl", "chosen")
    samples = {}
    scores = {}
    for source in ("a", "b", "bad"):
        stage = sample(session, f"round1/{source}", policy, queries, seed_key=(source,))
        samples[source] = TextColumn(stage)
        scores[source] = score_texts(
            session, f"round1/scores_{source}", policy, {"scores": samples[source]}
        )
    inputs = PairInputs(
        candidates=[
            CandidateSet(source, samples[source], ScoreColumn(scores[source]))
            for source in ("a", "b")
        ],
        selection=Selection(),
        rejected=samples["bad"],
        rejected_scores=ScoreColumn(scores["bad"]),
        reference=Policy("a", policy.base),
        learner=replace(policy, adapter=scores["bad"]),  # any other than the reference
    )
    pairs = build_pairs(session, "round1/pairs", inputs, ("pairs",))

    peaks = []
    sampled = [texts.stage for texts in samples.values()]
    for stages in (sampled, list(scores.values()), [pairs]):
        peak = 0
        for stage in stages:
            peak = max(peak, stage.notes()["peak_mb"])
        peaks.append(peak)
    print(*peaks)


def main(counts: list[int]) -> None:
    """Print a line for every number of prompts."""
    first_peaks = None
    for count in counts:
        with tempfile.TemporaryDirectory() as root:
            command = [sys.executable, "-m", "bench.speed.rows", "--one", root, str(count)]
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
        last_line = ended.stdout.splitlines()[-1]
        peaks = list(map(int, last_line.split()))
        if first_peaks is None:
            first_peaks = peaks
        parts = []
        for kind, peak, first in zip(STAGES, peaks, first_peaks, strict=True):
            parts.append(f"{kind} {peak} MB ({peak / first - 1:+.1%})")
        print(f"{count:9,} prompts: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    if "--one" in sys.argv:
        run_stages(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        words = read_words()
        for word in words:
            if not word.isdecimal():
                sys.exit(f"{__doc__}\nerror: {word} is no number of prompts")
        main(list(map(int, words)) or [10_000, 100_000, 1_000_000])
