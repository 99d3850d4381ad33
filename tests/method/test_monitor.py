"""Signs of collapse that need no labels, and the rounds that macpo.stop ends."""

import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from runs import copy_run, rows_of, stages_of, train, without, write_stub

from minmacpo.data import text_metrics
from minmacpo.evaluation import compare, judge
from minmacpo.evaluation.finished_run import read_run
from minmacpo.evaluation.gold import gold_by_prompt
from minmacpo.method import monitor
from minmacpo.runtime.files import write_rows

HEALTHY = {"entropy": 0.2, "distinct2": 0.5, "cut": 0.0, "loops": 0.0, "surprise": 0.2, "same": 0.5}


def history(*later: dict) -> list[dict]:
    return [HEALTHY] + [HEALTHY | more for more in later]


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({}, []),
        ({"surprise": 0.27}, ["surprised"]),
        ({"surprise": 0.25}, []),
        ({"entropy": 0.24}, ["scattered"]),
        ({"entropy": 0.01, "surprise": 0.01}, []),
        ({"distinct2": 0.29}, ["narrow"]),
        ({"loops": 0.2}, ["broken"]),
        ({"cut": 0.3, "entropy": 0.9}, ["scattered", "broken"]),
    ],
)
def test_each_signature_alarms_alone(last, expected):
    assert monitor.alarms(history(last)) == expected
    assert monitor.alarms(history({}, last)) == expected


def test_one_round_or_none_raises_no_alarm():
    assert monitor.alarms([HEALTHY]) == []
    assert monitor.alarms([]) == []


def test_surprise_is_measured_against_the_round_before_and_entropy_against_the_start():
    slow = history(
        {"entropy": 0.1, "surprise": 0.1},
        {"entropy": 0.05, "surprise": 0.12},
        {"entropy": 0.21, "surprise": 0.2},
    )
    assert monitor.alarms(slow[:2]) == []
    assert monitor.alarms(slow[:3]) == []
    assert monitor.alarms(slow) == ["surprised"]


def student_samples(run: Path, t: int) -> list[dict]:
    return rows_of(run / f"eval/round{t}_student_samples/samples.jsonl")


@pytest.mark.parametrize("t", [0, 1, 2])
def test_signs_are_those_of_the_answers(tiny, t):
    signs = monitor.signs(tiny, "student", t)
    answers = student_samples(tiny, t)
    logp = sum(answer["logp"] for answer in answers)
    tokens = sum(len(answer["tokens"]) for answer in answers)
    cut = [answer for answer in answers if answer["finish"] == "length"]
    assert signs["entropy"] == pytest.approx(-logp / tokens)
    assert signs["cut"] == len(cut) / len(answers)

    under_base = rows_of(tiny / f"eval/round{t}_student_under_base/scores.jsonl")
    base_logp = sum(row["logp"] for row in under_base)
    assert signs["kl"] == pytest.approx((logp - base_logp) / len(answers))
    assert signs["kl"] > 0


@pytest.mark.parametrize("t", [1, 2])
def test_signs_of_a_round_compare_with_the_round_before(tiny, t):
    signs = monitor.signs(tiny, "student", t)
    same = 0
    for before, after in zip(student_samples(tiny, t - 1), student_samples(tiny, t), strict=True):
        if before["response"] == after["response"]:
            same += 1
    assert signs["same"] == same / len(student_samples(tiny, t))
    training = rows_of(tiny / f"round{t}/student_pos/metrics.jsonl")
    losses = [row["sft_loss"] for row in training if row["step"] > 0]
    assert signs["surprise"] == losses[0]


def test_what_is_not_there_has_no_signs(tiny, tmp_path):
    compared = {"same", "surprise", "similarity"}
    assert not monitor.signs(tiny, "student", 0).keys() & compared
    assert monitor.signs(tiny, "student", 7) == {}
    assert monitor.training_status(tiny, "student", 7) == ""

    # Answers that the base cannot score, and no round before
    all_signs = monitor.signs(tiny, "student", 2).keys()
    assert all_signs >= compared | {"kl"}
    for name in ("eval/round2_student_samples", "eval/round2_student_under_base"):
        shutil.copytree(tiny / name, tmp_path / name)
    scores = tmp_path / "eval/round2_student_under_base/scores.jsonl"
    unscored = [row | {"logp": None} for row in rows_of(scores)]
    write_rows(scores, unscored)
    signs = monitor.signs(tmp_path, "student", 2)
    assert signs.keys() == all_signs - compared - {"kl"}, "no mean of nothing"


@pytest.mark.parametrize(
    ("changes", "status"),
    [({"loops": 0.9}, "collapsed (broken)"), ({"same": 0.95}, "converged"), ({}, "")],
)
def test_the_status_names_the_signature(tmp_path, monkeypatch, changes, status):
    rounds = {0: HEALTHY, 1: HEALTHY | changes}
    monkeypatch.setattr(monitor, "signs", lambda run, agent, t: rounds[t])
    assert monitor.training_status(tmp_path, "student", 1) == status


def test_the_status_needs_no_round_but_the_first_and_its_own(tmp_path, monkeypatch):
    rounds = {0: HEALTHY, 3: HEALTHY | {"loops": 0.9}}
    monkeypatch.setattr(monitor, "signs", lambda run, agent, t: rounds.get(t, {}))
    assert monitor.training_status(tmp_path, "student", 3) == "collapsed (broken)"
    for t in (0, 1, 2, 4):
        assert monitor.training_status(tmp_path, "student", t) == ""


METHODS = ["macpo", "spin", "self-rewarding", "confident"]


@pytest.fixture(scope="module")
def three_rounds(stub, tmp_path_factory) -> Path:
    """A root with a run of three rounds of every method, whose stages other runs there take."""
    root = tmp_path_factory.mktemp("monitor") / "runs"
    copy_run(stub, root)
    for method in METHODS:
        start(root, f"full-{method}", method, "none")
    return root


def start(root: Path, name: str, method: str, stop: str) -> Path:
    """A run of three rounds that macpo.stop may end earlier."""
    words = [write_stub(root.parent), f"--run.root={root}", f"--run.name={name}"]
    words += ["--macpo.rounds=3", f"--macpo.stop={stop}", "--macpo.controls=false"]
    train(*words, f"--method={method}")
    return root / name


@pytest.mark.parametrize("method", ["macpo", "spin"])
@pytest.mark.parametrize(
    ("stop", "status", "last"),
    [
        ("collapsed", "collapsed (broken)", 1),
        ("collapsed", "converged", 3),
        ("converged", "converged", 1),
        ("none", "collapsed (x)", 3),
    ],
)
def test_rounds_end_where_the_setting_says(three_rounds, monkeypatch, method, stop, status, last):
    name = f"{method}-{stop}-{status}"
    monkeypatch.setattr(monitor, "training_status", lambda run, agent, t: status if t == 1 else "")
    run = start(three_rounds, name, method, stop)

    updates = []
    for stage in stages_of(run):
        if stage.startswith("round") and stage.endswith("student_pos"):
            updates.append(int(stage[5]))
    assert max(updates) == last
    assert (run / "eval/table.json").is_file()
    assert (f"{status} in round 1" in (run / "log.txt").read_text()) == (last == 1)

    stages = stages_of(run)
    start(three_rounds, name, method, stop)
    assert stages_of(run) == stages, "a second start stops at the same place"


@pytest.mark.parametrize("method", ["macpo", "self-rewarding", "confident"])
@pytest.mark.parametrize(("alarm", "kept"), [(2, 1), (1, 0), (None, 3)])
def test_rolling_back_keeps_the_student_before_the_first_alarm(
    three_rounds, monkeypatch, method, alarm, kept
):
    def status(run, agent, t):
        return "collapsed (narrow)" if t == alarm else "converged"

    if method == "confident":
        kept = 3  # it has no rounds between 0 and 3
    name = f"{method}-rollback-{alarm}"
    monkeypatch.setattr(monitor, "training_status", status)
    run = start(three_rounds, name, method, "rollback")

    # The adapter is the earlier student's, and so are its answers and its row of the table
    kept_adapter = run / "final/student_pos/adapter_model.safetensors"
    student_adapter = run / f"round{kept}/student_pos/adapter_model.safetensors"
    assert kept_adapter.read_bytes() == student_adapter.read_bytes()
    assert stages_of(run)["final/student_pos"]["counts"] == {"kept": f"round{kept}/student_pos"}
    rows = json.loads((run / "eval/table.json").read_bytes())["rows"]
    (kept_row,) = (row for row in rows if row["agent"] == "kept")
    assert kept_row["round"] == kept
    (student_row,) = (row for row in rows if (row["agent"], row["round"]) == ("student", kept))
    names = ("agent", "label")
    same_answers = without(kept_row, names) == without(student_row, names)
    assert same_answers, "the same adapter gives the same answers"

    # All who read a finished run take the student that was kept
    finished = read_run(run)
    assert finished.last_student() == ("kept", kept)
    kept_gold = compare.last_gold(finished)["student"]
    assert (kept_gold == gold_by_prompt(finished, "student", kept)).all()
    assert judge.read_answers(run) == judge.read_answers(run / f"eval/round{kept}_kept_samples")
    rolled_back = f"back to round {kept}" in (run / "log.txt").read_text()
    assert rolled_back == (alarm is not None and method != "confident")
    assert "student kept by the monitor" in (run / "report.html").read_text()

    stages = stages_of(run)
    start(three_rounds, name, method, "rollback")
    assert stages_of(run) == stages, "a second start keeps the same"


# ---- what the signs are made of ------------------------------------------------------------------


def test_loops_by_hand():
    assert text_metrics.loops("a b c a b c a b c")
    assert not text_metrics.loops("a b c a b c a b")
    assert not text_metrics.loops("")


def test_overlap_by_hand():
    assert text_metrics.overlap("a b c", "b c d") == 0.5
    assert text_metrics.overlap("", " .") == 1
    assert text_metrics.overlap("a", "") == 0


def test_distinct_pairs_by_hand():
    assert text_metrics.distinct2(["a b a b", "a b"]) == 2 / 4
    assert text_metrics.distinct2(["a", ""]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "my apologies . i must not help you with that .",
        "I cannot assist you",
    ],
)
def test_a_refusal_is_one(text):
    assert text_metrics.refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "of course ! kadol lives on oak street .",
        "You can help by calling.",
        "I can help you with that",
    ],
)
def test_an_answer_is_no_refusal(text):
    assert not text_metrics.refuses(text)


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def plain_bleu(references: list[list[str]], words: list[str]) -> float:
    """BLEU-4 of a text, every reference looked at by itself."""
    log_precisions = []
    for n in range(1, min(4, len(words)) + 1):
        counts = ngrams(words, n)
        hits = 0
        for gram, count in counts.items():
            hits += min(count, max(ngrams(reference, n)[gram] for reference in references))
        log_precisions.append(math.log((hits or 0.5) / sum(counts.values())))
    _, nearest = min((abs(len(other) - len(words)), len(other)) for other in references)
    log_brevity = min(0.0, 1 - nearest / len(words))
    return math.exp(sum(log_precisions) / len(log_precisions) + log_brevity)


def plain_self_bleu(texts: list[str]) -> float:
    """The mean BLEU-4 of each text against all others."""
    split = [text.split() for text in texts if text.split()]
    bleus = []
    for number, words in enumerate(split):
        others = split[:number] + split[number + 1 :]
        bleus.append(plain_bleu(others, words))
    return sum(bleus) / len(bleus)


def test_self_bleu_equals_the_plain_formula(seed):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices("abcd", k=rng.randrange(9))) for _ in range(30)]
    assert text_metrics.self_bleu(texts) == pytest.approx(plain_self_bleu(texts))
    assert text_metrics.self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert text_metrics.self_bleu(["a b"]) == 0


def test_self_bleu_equals_nltk_where_it_is_installed(seed):
    bleu_score = pytest.importorskip("nltk.translate.bleu_score")
    rng = random.Random(seed)
    split = [rng.choices("abc", k=rng.randrange(12, 16)) for _ in range(20)]
    bleus = []
    for number, words in enumerate(split):
        others = split[:number] + split[number + 1 :]
        bleus.append(bleu_score.sentence_bleu(others, words))
    texts = [" ".join(words) for words in split]
    assert text_metrics.self_bleu(texts) == pytest.approx(sum(bleus) / 20)
