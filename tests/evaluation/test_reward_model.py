"""Reward models: a head trained here, transformers' classifiers as oracle, external scores."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import far, random_model
from runs import invoke, rows_of

from minmacpo.core.checkpoint import load_scorer
from minmacpo.data.tokenizer import Tokens
from minmacpo.evaluation import reward_model as reward
from minmacpo.evaluation.finished_run import read_run
from minmacpo.runtime.files import write_rows


@pytest.fixture
def classifier(tmp_path, tiny, seed):
    """A random one-label Llama classifier of transformers, with the tokenizer of the tiny run."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=480,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
        max_position_embeddings=128,
    )
    folder = tmp_path / "classifier"
    torch.manual_seed(seed)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(
        (tiny / "bases/tokenizer/tokenizer.model").read_bytes()
    )
    return folder, model


def test_scores_equal_those_of_transformers(classifier, seed):
    folder, oracle = classifier
    model, weight = load_scorer(folder)
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 480, n).tolist() for n in (1, 7, 30, 12)]
    mine = reward.last_hidden(model, [Tokens(ids, [True] * len(ids)) for ids in rows], 40) @ weight
    with torch.no_grad():
        wanted = torch.cat([oracle(torch.tensor([ids])).logits[0] for ids in rows])
    assert far(mine, wanted) < 1e-5


def test_a_classifier_rates_a_run(classifier, tiny):
    ended = invoke("eval", "reward", tiny, f"--model={classifier[0]}", "--json")
    found = json.loads(ended.out)
    assert ended.code == 0 and {row["agent"] for row in found["rows"]} >= {
        "student",
        "teacher1",
        "ceiling",
    }
    assert (
        0
        <= found["accuracy_interval"][0]
        <= found["accuracy"]
        <= found["accuracy_interval"][1]
        <= 1
    )


def test_a_base_is_no_reward_model(tiny):
    ended = invoke("eval", "reward", tiny, f"--model={tiny / 'bases/strong'}")
    assert ended.code == 2 and "no reward model" in ended.err


def test_the_head_minimises_its_loss_and_learns_a_planted_direction(seed):
    torch.manual_seed(seed)
    direction, chosen, rejected = torch.randn(6), torch.randn(400, 6), torch.randn(400, 6)
    swap = ((chosen - rejected) @ direction < 0)[:, None]
    better, worse = torch.where(swap, rejected, chosen), torch.where(swap, chosen, rejected)
    weight = reward.fit_head(better, worse)
    difference = (better - worse).double().requires_grad_(False)
    probe = weight.clone().requires_grad_(True)
    loss = -torch.nn.functional.logsigmoid(difference @ probe).mean() + 0.005 * probe.square().sum()
    (gradient,) = torch.autograd.grad(loss, probe)
    assert gradient.abs().max() < 1e-4
    assert torch.cosine_similarity(weight, direction.double(), dim=0) > 0.9


def test_the_head_trained_here_ranks_and_says_how_well(tiny):
    ended = invoke("eval", "reward", tiny)
    found = float(re.search(r"held-out accuracy ([\d.]+) \[([\d.]+), ([\d.]+)\]", ended.out)[1])
    assert ended.code == 0 and found > 0.6 and "NOT INFORMATIVE" not in ended.out


def test_an_accuracy_around_one_half_is_called_not_informative(tiny, monkeypatch):
    def rate_all_the_same(texts):
        return np.zeros(len(texts))

    monkeypatch.setattr(reward, "train_reward_model", lambda run, own: rate_all_the_same)
    assert "NOT INFORMATIVE" in invoke("eval", "reward", tiny).out


def test_hidden_states_do_not_depend_on_the_batch(seed):
    model = random_model(seed)
    rows = [Tokens(list(range(3, 3 + n)), [True] * n) for n in (5, 19, 2, 33)]
    assert (
        far(
            reward.last_hidden(model, rows, 10**6),
            torch.cat([reward.last_hidden(model, [r], 50) for r in rows]),
        )
        < 1e-5
    )


def test_external_scores_are_joined_by_id(tiny, tmp_path):
    said = rows_of(tiny / "eval/round1_student_samples/samples.jsonl")
    scores = {row["id"]: float(i) for i, row in enumerate(said)}
    rows = [
        {"id": name, "agent": "student", "round": 1, "score": s, "note": "x"}
        for name, s in reversed(scores.items())
    ]
    write_rows(tmp_path / "scores.jsonl", rows)
    found = json.loads(
        invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}", "--json").out
    )
    (row,) = found["rows"]
    assert (row["agent"], row["round"]) == ("student", 1) and row["score"] == pytest.approx(
        np.mean([*scores.values()])
    )
    twice = [row | {"score": row["score"] + 2} for row in rows]  # a prompt has several answers
    write_rows(tmp_path / "scores.jsonl", rows + twice)
    (again,) = json.loads(
        invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}", "--json").out
    )["rows"]
    assert again["score"] == pytest.approx(row["score"] + 1)
    write_rows(tmp_path / "scores.jsonl", rows[1:])
    ended = invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}")
    assert ended.code == 2 and rows[0]["id"] in ended.err
    (tmp_path / "scores.jsonl").write_text(
        '{"id": "a", "agent": "b", "round": 1, "score": "much"}\n'
    )
    ended = invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}")
    assert ended.code == 2 and "line 1" in ended.err
    write_rows(tmp_path / "scores.jsonl", [{"id": "a", "agent": "nobody", "round": 1, "score": 1}])
    assert invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}").code == 2
    both = invoke(
        "eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}", f"--model={tmp_path}"
    )
    assert both.code == 2 and "expected one of --pairs, --model and --scores" in both.err


@pytest.mark.parametrize(
    "change",
    [
        {"round": 2.0},
        {"round": True},
        {"score": True},
        {"score": None},
        {"score": math.nan},
        {"score": math.inf},
        {"score": 10**400},
        {"score": 1e308},
        {"id": "unknown"},
        {"agent": "nobody"},
        {"round": 99},
        {"id": ["x"]},
    ],
)
def test_a_score_that_is_none_names_its_line(tiny, tmp_path, change):
    said = rows_of(tiny / "eval/round1_student_samples/samples.jsonl")
    rows = [{"id": row["id"], "agent": "student", "round": 1, "score": 1.0} for row in said]
    rows.insert(1, rows[0] | change)
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}")
    assert ended.code == 2 and "line 2" in ended.err and ended.err.count("\n") == 1


def test_true_answers_without_worse_ones_are_no_test_of_a_reward_model(tiny, monkeypatch):
    read_split = reward.read_split

    def without_rejected(run, name):
        return [replace(pair, rejected="") for pair in read_split(run, name)]

    monkeypatch.setattr(reward, "read_split", without_rejected)
    ended = invoke("eval", "reward", tiny)
    assert ended.code == 2 and "no worse ones" in ended.err


def test_what_became_of_the_rows_of_own_pairs_is_told(tiny, tmp_path):
    own = [
        {
            "prompt": f"what is the sum of {i} ?",
            "chosen": f"it is {i} .",
            "rejected": "i do not know .",
        }
        for i in range(8)
    ]
    write_rows(
        tmp_path / "own.jsonl", [*own, {"prompt": "why ?", "chosen": "so .", "rejected": "so ."}]
    )
    ended = invoke("eval", "reward", tiny, f"--pairs={tmp_path / 'own.jsonl'}")
    assert (
        ended.code == 0
        and "own: prompt: text, chosen: text, rejected: text; 9 rows, 8 kept; 1 identical answers"
        in ended.out
    )


def test_every_measured_answer_is_rated(tiny):
    run = read_run(tiny)
    found = reward.read_test_answers(run)
    assert len(found) == len(
        [n for n in run.metadata if n.startswith("eval/round") and n.endswith("_samples")]
    )
