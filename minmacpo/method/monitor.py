"""Does training go wrong? Signs that need no gold label, read from an agent's finished stages after a round.

They are of its answers to the test prompts (the true answers are not looked at), of what it was trained on, and of
how far it has gone from its base. `alarms` says which signatures of collapse they show; macpo.stop acts on them.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from minmacpo.data.records import Pair, Sample
from minmacpo.data.text_metrics import distinct2, loops, overlap
from minmacpo.runtime.files import read_rows

# Thresholds: chosen on seeds 0 and 1 of the built-in world, RESULTS.md has the others.
SURPRISE = 1.3  # chosen answers against its own answers before the round, nats per token


ENTROPY = 1.15  # its own answers now against those of round 0, nats per token


NARROW = 0.6  # distinct-2 now against round 0


BROKEN = 0.1  # rise of the share of answers that loop, or are cut at the limit


SAME = 0.9  # share of prompts answered as in the round before: it has converged


def mean(values: Iterable[float]) -> float:
    """The mean; nan of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def answers(run: Path, agent: str, t: int) -> list[Sample]:
    """Its test answers after round t; [] where they are not on the disk."""
    file = run / f"eval/round{t}_{agent}_samples/samples.jsonl"
    return read_rows(file, Sample) if file.is_file() else []


def signs(run: Path, agent: str, t: int) -> dict[str, float]:
    """{sign: value} of an agent after round t; {} if it was not measured then.
    entropy: nats per token of its own answers, drawn at generate.temperature and scored at 1; kl: nats per answer above
    its bare base, which reads them as text, tokenized anew; distinct2: share of
    different word pairs; cut, loops: shares of answers; same: share of prompts answered as the round before;
    similarity: of the words of chosen and rejected in the round's pairs; surprise: nats per token of the chosen
    answers when the round began to train on them."""
    said, before = answers(run, agent, t), answers(run, agent, t - 1)
    if not said:
        return {}
    found = {
        "entropy": -sum(s.logp for s in said) / max(sum(len(s.tokens) for s in said), 1),
        "distinct2": distinct2([s.response for s in said]),
        "cut": mean(s.finish == "length" for s in said),
        "loops": mean(loops(s.response) for s in said),
    }
    if (based := run / f"eval/round{t}_{agent}_under_base/scores.jsonl").is_file():
        above = [
            s.logp - row["logp"]
            for s, row in zip(said, read_rows(based), strict=True)
            if row["logp"] is not None
        ]
        found |= {"kl": mean(above)} if above else {}
    if before:
        found["same"] = mean(a.response == b.response for a, b in zip(said, before, strict=True))
    if (pairs := run / f"round{t}/pairs_{agent}/pairs.jsonl").is_file():
        found["similarity"] = mean(overlap(p.chosen, p.rejected) for p in read_rows(pairs, Pair))
    if (trained := run / f"round{t}/{agent}_pos/metrics.jsonl").is_file():
        first = [
            row["sft_loss"] for row in read_rows(trained) if row["step"] and "sft_loss" in row
        ][:1]
        found |= {"surprise": first[0]} if first else {}
    return found


def alarms(history: Sequence[dict[str, float]]) -> list[str]:
    """The signatures of collapse that the last of an agent's `signs`, from round 0 on, shows against the others.
    surprised: what it learns is far from what it says itself; scattered: its answers grow less certain than at the
    start; narrow: they grow alike; broken: they loop, or do not end."""
    if len(history) < 2:
        return []
    start, before, now = history[0], history[-2], history[-1]
    shown = {
        "surprised": now.get("surprise", 0) > SURPRISE * before["entropy"],
        "scattered": now["entropy"] > ENTROPY * start["entropy"],
        "narrow": now["distinct2"] < NARROW * start["distinct2"],
        "broken": max(now[sign] - start[sign] for sign in ("loops", "cut")) > BROKEN,
    }
    return [name for name, holds in shown.items() if holds]


def verdict(run: Path, agent: str, t: int) -> str:
    """What became of an agent by round t: "collapsed (…)", "converged", or ""."""
    history = [signs(run, agent, i) for i in range(t + 1)]
    if not history[-1]:
        return ""
    history = [found for found in history if found]  # not every method measures every round
    if found := alarms(history):
        return f"collapsed ({', '.join(found)})"
    return "converged" if history[-1].get("same", 0) >= SAME else ""
