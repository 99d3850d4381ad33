"""eval.py ppl and accuracy: the numbers of transformers and PEFT, and what becomes of every row."""

import json
from dataclasses import dataclass

import checks
import numpy as np
import pytest
from runs import invoke, rows_of
from test_bad_input import check_sentence, refused

from minmacpo.evaluation.bootstrap import estimate_ratio
from minmacpo.runtime.files import write_rows


def measured(command, *words) -> dict:
    """What eval.py ppl or accuracy says, as JSON."""
    ended = invoke("eval", command, *words, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


@dataclass(frozen=True)
class Answers:
    """Log-probabilities and lengths in tokens of one column, by somebody else's model."""

    logps: np.ndarray
    tokens: np.ndarray


def answers_under(model, base, rows, column) -> Answers:
    spans = [checks.row_of(base, row["prompt"], row[column]) for row in rows]
    counts = [count for _, count in spans]
    return Answers(np.array(checks.scored(model, spans)), np.array(counts))


@pytest.fixture
def file(tiny):
    return tiny / "data/slices/test.jsonl"


@pytest.mark.parametrize("name", ["round2/student_pos", "bases/strong"])
def test_perplexity_is_that_of_transformers(tiny, file, name):
    base = tiny / "bases/strong"
    rows = rows_of(file)
    if name == "bases/strong":
        model = checks.plain_model(base)
    else:
        model = checks.peft_model(base, tiny / name)
    answers = answers_under(model, base, rows, "chosen")
    logp = answers.logps.sum()
    texts = "".join(row["chosen"] for row in rows)
    sizes = {
        "perplexity": answers.tokens.sum(),
        "perplexity_char": len(texts),
        "perplexity_byte": len(texts.encode()),
    }

    result = measured("ppl", tiny / name, file)
    assert result["tokens"] == answers.tokens.sum()
    assert result["rows"] == {"read": len(rows), "kept": len(rows)}
    for unit, size in sizes.items():
        assert result[unit] == pytest.approx(np.exp(-logp / size), rel=1e-5)
        low, high = result[f"{unit}_interval"]
        assert low < result[unit] < high


@dataclass(frozen=True)
class Margins:
    """Of every pair: how much more a model likes the chosen than the rejected answer."""

    summed: np.ndarray
    per_token: np.ndarray


def margins_under(model, base, rows) -> Margins:
    chosen = answers_under(model, base, rows, "chosen")
    rejected = answers_under(model, base, rows, "rejected")
    per_token = chosen.logps / chosen.tokens - rejected.logps / rejected.tokens
    return Margins(chosen.logps - rejected.logps, per_token)


def test_accuracy_is_that_of_peft_against_its_base(tiny, file):
    base = tiny / "bases/strong"
    adapter = tiny / "round2/student_pos"
    rows = rows_of(file)
    own = margins_under(checks.peft_model(base, adapter), base, rows)
    of_base = margins_under(checks.plain_model(base), base, rows)
    margins = {
        "summed": own.summed,
        "per_token": own.per_token,
        "reward": 0.3 * (own.summed - of_base.summed),
    }

    result = measured("accuracy", tiny, file, "--dpo.beta=0.3")  # the run: its last student
    assert result["agent"] == str(adapter)
    assert result["base"].endswith("bases/strong")
    for kind, margin in margins.items():
        assert result[f"{kind}_accuracy"] == pytest.approx(np.mean(margin > 0))
        assert result[f"{kind}_margin"] == pytest.approx(margin.mean(), abs=1e-4)

    base_result = measured("accuracy", base, file)
    assert base_result["summed_margin"] == pytest.approx(of_base.summed.mean(), abs=1e-4)
    assert "reward_accuracy" not in base_result

    table = json.loads((tiny / "eval/table.json").read_text())["rows"]
    (entry,) = (row for row in table if (row["agent"], row["round"]) == ("student", 2))
    assert entry["accuracy"] == pytest.approx(result["reward_accuracy"])


def test_rows_without_what_is_needed_are_counted(stub, place):
    rows = [{"prompt": f"where is it {i} ?", "response": ["yes é", "no"]} for i in range(3)]
    rows += [
        {"prompt": "same ?", "response": ["x", "x"]},
        {"prompt": "far " * 200, "response": ["a", "b"]},
    ]
    write_rows(place / "f.jsonl", rows)
    agent = stub / "round1/student_pos"

    result = measured("ppl", agent, "f.jsonl")
    assert result["rows"] == {"read": 5, "kept": 3, "identical answers": 1, "over-long prompt": 1}
    assert result["characters"] == 15
    assert result["bytes"] == 18
    assert "⟦" in result["first_row"]
    cut = measured("accuracy", agent, "f.jsonl", "--data.truncation_mode=cut_prompt")
    assert cut["rows"] == {"read": 5, "kept": 4, "identical answers": 1, "prompt cut": 1}
    out = invoke("eval", "accuracy", agent, "f.jsonl").out
    assert "5 rows, 4 kept; 1 identical answers (first in line 4)" in out
    assert "reward_margin" in out


def test_a_row_without_a_rejected_answer_has_a_perplexity_alone(stub, place):
    agent = stub / "round1/student_pos"
    write_rows(place / "one.jsonl", [{"prompt": "a ?", "response": "b"}])
    assert measured("ppl", agent, "one.jsonl")["rows"] == {"read": 1, "kept": 1}
    ended = invoke("eval", "accuracy", agent, "one.jsonl")
    check_sentence(ended.code, ended.err)
    assert "none of the 1 usable rows has a rejected answer" in ended.err
    assert "max_length" not in ended.err


@pytest.fixture
def pku_file(place):
    """Two equal rows in the format of PKU-SafeRLHF."""
    row = {
        "prompt": "where ?",
        "response_0": "short .",
        "response_1": "a longer one here .",
        "better_response_id": 0,
        "safer_response_id": 1,
    }
    (place / "f.json").write_text(json.dumps([row, row]))
    return place / "f.json"


@pytest.mark.parametrize(("label", "characters"), [("better", 14), ("safer", 38)])
def test_labels_of_pku(stub, pku_file, label, characters):
    word = f"--data.preference_label={label}"
    assert measured("ppl", stub / "bases/strong", pku_file, word)["characters"] == characters


def test_limits_of_length(stub, pku_file):
    words = ["ppl", stub / "bases/strong", pku_file]
    err = invoke("eval", *words, "--data.max_length=3").err
    assert "3 tokens" not in err
    assert "over-long" in err
    raising = invoke("eval", *words, "--data.max_length=3", "--data.truncation_mode=raise")
    assert raising.code == 2
    assert measured(*words, "--data.template=plain")["template"] == "plain"


def test_the_interval_covers_the_ratio_as_often_as_it_says():
    """Over prompts: rows of one prompt are no evidence of their own."""
    rng = np.random.default_rng(0)
    prompts = [str(row // 4) for row in range(200)]
    hits = 0
    for _ in range(200):
        means = np.repeat(rng.normal(1, 0.5, 50), 4)
        sizes = rng.integers(1, 20, 200)
        sums = sizes * (means + rng.normal(0, 0.1, 200))
        ratio = estimate_ratio(sums, sizes, prompts, 300)
        low, high = ratio.interval
        assert low <= ratio.value <= high
        if low <= 1 <= high:
            hits += 1
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ppl"], "required: path, file"),
        (["ppl", "RUN/bases/strong"], "required: file"),
        (["ppl", "nowhere", "good.jsonl"], "nowhere"),
        (["ppl", "RUN/bases/strong", "none.jsonl"], "none.jsonl"),
        (["accuracy", "RUN/bases/strong", "bad.jsonl"], "bad.jsonl, line 1"),
        (["accuracy", "RUN/bases/strong", "latin.jsonl"], "latin.jsonl, line 1"),
        (["accuracy", "RUN/bases/strong", "prompts.jsonl"], "none of the 1 usable rows has a rej"),
        (["ppl", "RUN/bases/strong", "prompts.jsonl"], "has a chosen answer; eval.py ppl"),
        (["ppl", "RUN/bases/strong", "."], "line 1"),
        (["ppl", "RUN/round1/pairs_student", "good.jsonl"], "no model"),
        (["ppl", "RUN/bases/strong", "good.jsonl", "--generate.top_k=3"], "--generate.top_k=3"),
        (["ppl", "RUN/bases/strong", "good.jsonl", "--data.max_length=no"], "data.max_length"),
        (["ppl", "RUN/bases/strong", "good.jsonl", "more"], "more"),
    ],
)
def test_bad_input(stub, place, words, says):
    (place / "good.jsonl").write_text('{"prompt": "a", "response": ["b", "c"]}\n')
    (place / "bad.jsonl").write_text("{\n")
    (place / "latin.jsonl").write_bytes(b"\xe9\n")
    (place / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    words = [word.replace("RUN", str(stub)) for word in words]
    assert says in refused(place, *words, program="eval")
