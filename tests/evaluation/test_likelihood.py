"""eval.py ppl and accuracy: the numbers of transformers and PEFT, and what becomes of every row."""

import json

import checks
import numpy as np
import pytest
from runs import invoke, rows_of
from test_bad_input import check_sentence, tree

from minmacpo.evaluation.bootstrap import estimate_ratio


def measured(command, *words) -> dict:
    ended = invoke("eval", command, *words, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def logps(model, base, rows, side) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities, lengths) of the answers by somebody else's model."""
    made = [checks.row_of(base, row["prompt"], row[side]) for row in rows]
    return np.array(checks.scored(model, made)), np.array([count for _, count in made])


@pytest.fixture
def file(tiny):
    return tiny / "data/slices/test.jsonl"


@pytest.mark.parametrize("name", ["round2/student_pos", "bases/strong"])
def test_perplexity_is_that_of_transformers(tiny, file, name):
    base, rows = tiny / "bases/strong", rows_of(file)
    model = (
        checks.plain_model(base)
        if name.startswith("bases")
        else checks.peft_model(base, tiny / name)
    )
    logp, tokens = logps(model, base, rows, "chosen")
    found = measured("ppl", tiny / name, file)
    sizes = {
        "": tokens.sum(),
        "_char": sum(len(r["chosen"]) for r in rows),
        "_byte": sum(len(r["chosen"].encode()) for r in rows),
    }
    for unit, size in sizes.items():
        assert found[f"perplexity{unit}"] == pytest.approx(np.exp(-logp.sum() / size), rel=1e-5)
        low, high = found[f"perplexity{unit}_interval"]
        assert low < found[f"perplexity{unit}"] < high
    assert found["tokens"] == tokens.sum() and found["rows"] == {
        "read": len(rows),
        "kept": len(rows),
    }


def test_accuracy_is_that_of_peft_against_its_base(tiny, file):
    base, rows, adapter = tiny / "bases/strong", rows_of(file), tiny / "round2/student_pos"
    found = measured("accuracy", tiny, file, "--dpo.beta=0.3")  # the run: its last student
    assert found["agent"] == str(adapter) and found["base"].endswith("bases/strong")
    margins = {}
    for who, model in (
        ("own", checks.peft_model(base, adapter)),
        ("base", checks.plain_model(base)),
    ):
        (good, long), (bad, short) = (
            logps(model, base, rows, side) for side in ("chosen", "rejected")
        )
        margins[who] = good - bad, good / long - bad / short
    wanted = {
        "summed": margins["own"][0],
        "per_token": margins["own"][1],
        "reward": 0.3 * (margins["own"][0] - margins["base"][0]),
    }
    for kind, margin in wanted.items():
        assert found[f"{kind}_accuracy"] == pytest.approx(np.mean(margin > 0))
        assert found[f"{kind}_margin"] == pytest.approx(margin.mean(), abs=1e-4)
    plain = measured("accuracy", base, file)
    assert (
        plain["summed_margin"] == pytest.approx(margins["base"][0].mean(), abs=1e-4)
        and "reward_accuracy" not in plain
    )
    table = next(
        r
        for r in json.loads((tiny / "eval/table.json").read_text())["rows"]
        if r["agent"] == "student" and r["round"] == 2
    )
    assert table["accuracy"] == pytest.approx(found["reward_accuracy"])


def test_rows_without_what_is_needed_are_counted(stub, place):
    rows = [{"prompt": f"where is it {i} ?", "response": ["yes é", "no"]} for i in range(3)]
    rows += [
        {"prompt": "same ?", "response": ["x", "x"]},
        {"prompt": "far " * 200, "response": ["a", "b"]},
    ]
    (place / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    agent = stub / "round1/student_pos"
    found = measured("ppl", agent, "f.jsonl")
    assert found["rows"] == {"read": 5, "kept": 3, "identical answers": 1, "over-long prompt": 1}
    assert (found["characters"], found["bytes"]) == (15, 18) and "⟦" in found["first_row"]
    cut = measured("accuracy", agent, "f.jsonl", "--data.truncation_mode=cut_prompt")
    assert cut["rows"] == {"read": 5, "kept": 4, "identical answers": 1, "prompt cut": 1}
    words = invoke("eval", "accuracy", agent, "f.jsonl").out
    assert (
        "5 rows, 4 kept; 1 identical answers (first in line 4)" in words
        and "reward_margin" in words
    )
    (place / "one.jsonl").write_text(json.dumps({"prompt": "a ?", "response": "b"}))
    assert measured("ppl", agent, "one.jsonl")["rows"] == {"read": 1, "kept": 1}
    ended = invoke("eval", "accuracy", agent, "one.jsonl")
    check_sentence(ended.code, ended.err)
    assert "none of the 1 usable rows has a rejected answer" in ended.err
    assert "max_length" not in ended.err


def test_labels_of_pku_and_limits_of_length(stub, place):
    row = {"prompt": "where ?", "response_0": "short .", "response_1": "a longer one here ."}
    rows = [row | {"better_response_id": 0, "safer_response_id": 1}] * 2
    (place / "f.json").write_text(json.dumps(rows))
    base = stub / "bases/strong"
    sizes = [
        measured("ppl", base, "f.json", f"--data.preference_label={label}")["characters"]
        for label in ("better", "safer")
    ]
    assert sizes == [14, 38]
    assert (
        "3 tokens" not in (err := invoke("eval", "ppl", base, "f.json", "--data.max_length=3").err)
        and "over-long" in err
    )
    assert (
        invoke(
            "eval", "ppl", base, "f.json", "--data.max_length=3", "--data.truncation_mode=raise"
        ).code
        == 2
    )
    assert measured("ppl", base, "f.json", "--data.template=plain")["template"] == "plain"


def test_the_interval_covers_the_ratio_as_often_as_it_says():
    """Over prompts: rows of one prompt are no evidence of their own."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        means = np.repeat(rng.normal(1, 0.5, 50), 4)
        size = rng.integers(1, 20, 200)
        tops = size * (means + rng.normal(0, 0.1, 200))
        found = estimate_ratio(tops, size, [str(i // 4) for i in range(200)], 300)
        low, high = found.interval
        assert low <= found.value <= high
        hits += low <= 1 <= high
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
    files = {
        "good": b'{"prompt": "a", "response": ["b", "c"]}',
        "bad": b"{",
        "latin": b"\xe9",
        "prompts": b'{"prompt": "a"}',
    }
    for name, text in files.items():
        (place / f"{name}.jsonl").write_bytes(text + b"\n")
    before = tree(place)
    ended = invoke("eval", *(word.replace("RUN", str(stub)) for word in words))
    check_sentence(ended.code, ended.err)
    assert says in ended.err and tree(place) == before
