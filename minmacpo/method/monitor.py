"""Does training go wrong? Signs that need no gold label, read from an agent's finished stages.

They are of its answers to the test prompts (the true answers are not looked at), of what it was
trained on, and of how far it has gone from its base. `alarms` says which signatures of collapse
they show; `rounds` ends MACPO when macpo.stop says so.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from minmacpo.data.records import Pair, Sample
from minmacpo.data.text_metrics import distinct2, loops, overlap
from minmacpo.pipeline.run import Run
from minmacpo.runtime.files import read_rows

# Thresholds, chosen on seeds 0 and 1 of the built-in world; RESULTS.md has the other seeds.
MAX_SURPRISE = 1.3  # chosen answers against its own answers before the round, nats per token
MAX_ENTROPY = 1.15  # its own answers now against those of round 0, nats per token
MIN_DISTINCT2 = 0.6  # distinct-2 now against round 0
MAX_BROKEN_RISE = 0.1  # rise of the share of answers that loop, or are cut at the limit
CONVERGED_SAME = 0.9  # share of prompts answered as in the round before


def rounds(run: Run) -> Iterator[int]:
    """1 ... R, or until the monitor sees in the student what macpo.stop waits for."""
    settings = run.config.macpo
    awaited = "collapsed" if settings.stop == "rollback" else settings.stop
    for t in range(1, settings.rounds + 1):
        status = ""
        if settings.stop != "none":
            status = observed_status(run, t - 1)
        if status and status.startswith(awaited):
            run.log(
                f"the student has {status} in round {t - 1}: no further round "
                f"(macpo.stop = {settings.stop})"
            )
            return
        yield t


def observed_status(run: Run, t: int) -> str:
    """`training_status` of the student by round t; "" where the rounds are only listed."""
    return run.observe(lambda: training_status(run.path, "student", t), while_listing="")


def training_status(run_folder: Path, agent: str, t: int) -> str:
    """What became of an agent by round t: "collapsed (...)", "converged", or ""."""
    history = []
    for earlier in range(t):
        signs_then = signs(run_folder, agent, earlier)
        if signs_then:  # not every method measures every round
            history.append(signs_then)
    now = signs(run_folder, agent, t)
    if not now:
        return ""

    raised = alarms([*history, now])
    if raised:
        return f"collapsed ({', '.join(raised)})"
    if now.get("same", 0) >= CONVERGED_SAME:
        return "converged"
    return ""


def alarms(history: Sequence[dict[str, float]]) -> list[str]:
    """The signatures of collapse that the last of an agent's `signs` shows against the others.

    surprised: what it learns is far from what it says itself; scattered: its answers grow less
    certain than at the start; narrow: they grow alike; broken: they loop, or do not end.

    Args:
        history: the signs after every round, from round 0 on.
    """
    if len(history) < 2:
        return []
    start = history[0]
    before = history[-2]
    now = history[-1]
    loops_rise = now["loops"] - start["loops"]
    cut_rise = now["cut"] - start["cut"]

    raised = []
    if now.get("surprise", 0) > MAX_SURPRISE * before["entropy"]:
        raised.append("surprised")
    if now["entropy"] > MAX_ENTROPY * start["entropy"]:
        raised.append("scattered")
    if now["distinct2"] < MIN_DISTINCT2 * start["distinct2"]:
        raised.append("narrow")
    if max(loops_rise, cut_rise) > MAX_BROKEN_RISE:
        raised.append("broken")
    return raised


def signs(run_folder: Path, agent: str, t: int) -> dict[str, float]:
    """The signs of an agent after round t, by name; none if it was not measured then.

    Returns:
        entropy: nats per token of its own answers, drawn at generate.temperature, scored at 1;
        distinct2: share of different word pairs;
        cut, loops: shares of answers;
        kl: nats per answer above its bare base, which reads the answers as text;
        same: share of prompts answered as in the round before;
        similarity: of the words of chosen and rejected in the round's pairs;
        surprise: nats per token of the chosen answers when the round began to train on them.
    """
    samples = read_test_answers(run_folder, agent, t)
    if not samples:
        return {}
    earlier = read_test_answers(run_folder, agent, t - 1)

    # --- From the answers themselves
    responses = [sample.response for sample in samples]
    total_logp = sum(sample.logp for sample in samples)
    tokens = sum(len(sample.tokens) for sample in samples)
    signs = {
        "entropy": -total_logp / max(tokens, 1),
        "distinct2": distinct2(responses),
        "cut": mean(sample.finish == "length" for sample in samples),
        "loops": mean(map(loops, responses)),
    }

    # --- From other stages, where they are on the disk
    others = {
        "kl": distance_from_base(run_folder, agent, t, samples),
        "same": share_unchanged(samples, earlier),
        "similarity": similarity_of_pairs(run_folder, agent, t),
        "surprise": first_sft_loss(run_folder, agent, t),
    }
    for name, value in others.items():
        if value is not None:
            signs[name] = value
    return signs


def read_test_answers(run_folder: Path, agent: str, t: int) -> list[Sample]:
    """Its test answers after round t; none where they are not on the disk."""
    file = run_folder / f"eval/round{t}_{agent}_samples/samples.jsonl"
    if not file.is_file():
        return []
    return read_rows(file, Sample)


def distance_from_base(
    run_folder: Path, agent: str, t: int, samples: Sequence[Sample]
) -> float | None:
    """Nats per answer by which the agent finds its answers likelier than its bare base does."""
    file = run_folder / f"eval/round{t}_{agent}_under_base/scores.jsonl"
    if not file.is_file():
        return None
    differences = []
    for sample, score in zip(samples, read_rows(file), strict=True):
        if score["logp"] is not None:
            differences.append(sample.logp - score["logp"])
    if not differences:
        return None
    return mean(differences)


def share_unchanged(samples: Sequence[Sample], before: Sequence[Sample]) -> float | None:
    """The share of prompts that got the answer of the round before."""
    if not before:
        return None
    unchanged = []
    for new, old in zip(samples, before, strict=True):
        unchanged.append(new.response == old.response)
    return mean(unchanged)


def similarity_of_pairs(run_folder: Path, agent: str, t: int) -> float | None:
    """How many words chosen and rejected answers have in common, in the round's pairs."""
    file = run_folder / f"round{t}/pairs_{agent}/pairs.jsonl"
    if not file.is_file():
        return None
    return mean(overlap(pair.chosen, pair.rejected) for pair in read_rows(file, Pair))


def first_sft_loss(run_folder: Path, agent: str, t: int) -> float | None:
    """The SFT term of the first logged steps of the round's training."""
    file = run_folder / f"round{t}/{agent}_pos/metrics.jsonl"
    if not file.is_file():
        return None
    for row in read_rows(file):
        if row["step"] > 0 and "sft_loss" in row:
            return row["sft_loss"]
    return None


def mean(values: Iterable[float]) -> float:
    """The mean; nan of nothing."""
    values = list(values)
    if not values:
        return math.nan
    return sum(values) / len(values)
