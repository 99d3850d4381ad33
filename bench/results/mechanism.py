"""The mechanism that the paper names, measured.

    python -m bench.results.mechanism RUN RUN...        writes assets/results/mechanism.json

A perplexity matrix per round: whose answers (positives of that round, cached negatives) are how
familiar to whose policy as it stands before its update; and how the teachers complement each other.
RUNs are finished runs of the built-in world.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.results.store import PLACE
from minmacpo import UserError
from minmacpo.core.scoring import perplexity, score
from minmacpo.data.records import Sample
from minmacpo.evaluation.finished_run import FinishedRun, read_run
from minmacpo.evaluation.gold import gold_reward
from minmacpo.pipeline.open_model import open_folder
from minmacpo.runtime.files import read_rows, write_json
from minmacpo.runtime.progress import run_main


def samples_of(run: FinishedRun, stage: str) -> list[Sample]:
    """The samples of a stage."""
    return read_rows(run.stage(stage).path / "samples.jsonl", Sample)


def answers_of(run: FinishedRun, t: int, agents: list[str]) -> dict[str, list[Sample]]:
    """{"positives of A", "negatives of A": samples} of round t, as far as they are on the disk."""
    answers = {}
    for kind, at_round in (("positives", t), ("negatives", 0)):
        for agent in agents:
            stage = f"round{at_round}/{kind}_{agent}"
            if stage in run.metadata:
                answers[f"{kind} of {agent}"] = samples_of(run, stage)
    return answers


def perplexity_matrix(run: FinishedRun, t: int) -> dict[str, dict[str, float]]:
    """{answers: {policy: median perplexity}} at the start of round t."""
    agents = ["student", *run.teachers]
    answers = answers_of(run, t, agents)
    matrix: dict[str, dict[str, float]] = {label: {} for label in answers}
    for agent in agents:
        for i in range(t):
            if f"round{i}/{agent}_pos" in run.metadata:
                last_update = f"round{i}/{agent}_pos"
        adapter = run.stage(last_update).path
        loaded = open_folder(adapter, run.config).loaded
        for label, samples in answers.items():
            rows = []
            for sample in samples:
                rows.append(loaded.render(sample.prompt, sample.response))
            logps = score(loaded.model, rows, run.config.run.max_tokens_per_batch)
            values = []
            for row, logp in zip(rows, logps, strict=True):
                values.append(perplexity(logp, sum(row.mask)))
            matrix[label][agent] = float(np.median(values))
    return matrix


def teachers_right(run: FinishedRun, t: int) -> dict[str, float]:
    """Shares of prompts by how many of the teachers are right in round t."""
    right_of_teacher = []
    for teacher in run.teachers:
        right = []
        for sample in samples_of(run, f"round{t}/positives_{teacher}"):
            right.append(gold_reward(run.config, sample, sample.response)["right"])
        right_of_teacher.append(right)
    counts = np.sum(right_of_teacher, 0)
    none = float(np.mean(counts == 0))
    all_of_them = float(np.mean(counts == len(run.teachers)))
    some = (counts > 0) & (counts < len(run.teachers))
    return {"none": none, "all": all_of_them, "some but not all": float(np.mean(some))}


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every value of rows with the same names."""
    means = {}
    for name in rows[0]:
        means[name] = float(np.mean([row[name] for row in rows]))
    return means


def main(words: list[str]) -> int:
    """Measure the runs that are named; returns the exit code."""
    if not words:
        command = "python -m bench.results.mechanism RUN RUN"
        raise UserError(f"expected finished runs of the built-in world: {command}")

    runs = list(map(read_run, words))
    rounds = {}
    for t in range(1, runs[0].config.macpo.rounds + 1):
        matrices = [perplexity_matrix(run, t) for run in runs]
        mean_matrix = {}
        for label in matrices[0]:
            mean_matrix[label] = mean_of([matrix[label] for matrix in matrices])
        shares = mean_of([teachers_right(run, t) for run in runs])
        rounds[str(t)] = {"perplexity": mean_matrix, "teachers right": shares}

    names = [Path(word).name for word in words]
    write_json(PLACE / "mechanism.json", {"runs": names, "rounds": rounds})
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "nothing was written."))
