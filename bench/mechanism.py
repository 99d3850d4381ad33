"""The mechanism that the paper names, measured: python -m bench.mechanism RUN RUN..., into assets/results/mechanism.json.

A perplexity matrix per round: whose answers (positives of that round, cached negatives) are how familiar to whose policy
as it stands before its update; and how the teachers complement each other. RUNs are finished runs of the built-in world.
"""

import sys
from pathlib import Path

import numpy as np

from minmacpo import UserError
from minmacpo.core.scoring import perplexity, score
from minmacpo.data.chat_template import render
from minmacpo.data.records import Sample
from minmacpo.evaluation.finished_run import FinishedRun, read_run
from minmacpo.evaluation.gold import gold_reward
from minmacpo.pipeline.open_model import open_folder
from minmacpo.runtime.files import read_rows, write_json
from minmacpo.runtime.progress import run_main


def texts_of(run: FinishedRun, t: int, agents: list[str]) -> dict[str, list[Sample]]:
    """{"positives of …", "negatives of …": samples} of round t, as far as they are on the disk."""
    names = {f"positives of {a}": f"round{t}/positives_{a}" for a in agents}
    names |= {f"negatives of {a}": f"round0/negatives_{a}" for a in agents}
    return {
        label: read_rows(run.stage(name).path / "samples.jsonl", Sample)
        for label, name in names.items()
        if name in run.metadata
    }


def matrix(run: Path, t: int) -> dict[str, dict[str, float]]:
    """{texts: {policy: median perplexity}} at the start of round t."""
    past = read_run(run)
    agents = ["student", *past.teachers]
    found: dict[str, dict[str, float]] = {}
    for agent in agents:
        last = max(i for i in range(t) if f"round{i}/{agent}_pos" in past.metadata)
        loaded = open_folder(past.stage(f"round{last}/{agent}_pos").path, past.config).loaded
        for label, samples in texts_of(past, t, agents).items():
            rows = [
                render(loaded.tokenizer, past.config.data.template, s.prompt, s.response)
                for s in samples
            ]
            logps = score(loaded.model, rows, past.config.run.max_tokens_per_batch)
            values = [
                perplexity(logp, sum(row.mask)) for logp, row in zip(logps, rows, strict=True)
            ]
            found.setdefault(label, {})[agent] = float(np.median(values))
    return found


def complement(run: Path, t: int) -> dict[str, float]:
    """Shares of prompts by how many of the teachers are right in round t."""
    past = read_run(run)
    right = []
    for teacher in past.teachers:
        said = read_rows(past.stage(f"round{t}/positives_{teacher}").path / "samples.jsonl", Sample)
        right.append([gold_reward(past.config, s, s.response)["right"] for s in said])
    counts = np.sum(right, 0)
    return {
        "none": float(np.mean(counts == 0)),
        "all": float(np.mean(counts == len(right))),
        "some but not all": float(np.mean((counts > 0) & (counts < len(right)))),
    }


def main(runs: list[str]) -> int:
    if not runs:
        raise UserError(
            "expected finished runs of the built-in world: python -m bench.mechanism RUN RUN"
        )
    rounds = range(1, read_run(runs[0]).config.macpo.rounds + 1)
    found = {"runs": [Path(run).name for run in runs], "rounds": {}}
    for t in rounds:
        tables = [matrix(Path(run), t) for run in runs]
        mean = {
            label: {p: float(np.mean([table[label][p] for table in tables])) for p in row}
            for label, row in tables[0].items()
        }
        shares = [complement(Path(run), t) for run in runs]
        right = {key: float(np.mean([share[key] for share in shares])) for key in shares[0]}
        found["rounds"][str(t)] = {"perplexity": mean, "teachers right": right}
    write_json(Path("assets/results/mechanism.json"), found)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "nothing was written."))
