"""The benchmarks of decoding, of a round, of growth and of a card: without peers, too late, and what they call equal."""

import json
import re

import pytest
import torch

from bench import gpu, growth, large, macpo, measure, trl_macpo


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "PLACE", tmp_path)
    return tmp_path


def test_a_card_without_peers_reports_its_own_side(place, monkeypatch):
    monkeypatch.setattr(
        gpu,
        "missing",
        lambda *packages: f"{packages[0]} not installed (pip install x): own side only",
    )
    gpu.main(True)
    found = json.loads((place / "gpu-tiny.json").read_text())["rows"]
    works = [row["work"] for row in found]
    assert works == [
        "the card's ceilings",
        "sampling, batch 1",
        "sampling, batch 4",
        "scoring, 3 answers per prompt",
        *["DPO-LoRA step"] * 2,
    ]
    assert min(found[0]["own"]["matmul_flops"][0], found[0]["own"]["copy_bytes"][0]) > 1e6
    for row in found[1:]:
        assert (
            row["own"]["wall_s"][0] > 0
            and row["ratio_wall"] is None
            and "not installed" in row["note"]
            and "target" not in row
        )
        assert 0 < row["ratio_share"][1] <= row["ratio_share"][0] <= row["ratio_share"][2]


def test_a_card_says_what_came_too_late_and_what_failed(place, monkeypatch):
    bench = gpu.Bench(True)

    def broken(bench):
        raise RuntimeError("no kernel image")

    bench.add(broken)
    monkeypatch.setattr(gpu, "SECONDS", -1)
    bench.add(gpu.ceilings)
    notes = [row["note"] for row in json.loads((place / "gpu-tiny.json").read_text())["rows"]]
    assert notes == ["failed: RuntimeError: no kernel image", "not measured: -1 s were over"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_no_card_is_one_sentence():
    with pytest.raises(SystemExit, match=r"no GPU here; python -m bench\.gpu --tiny"):
        gpu.main(False)


def test_exponents_of_exact_laws():
    for power in (0.0, 1.0, 2.0):
        assert growth.exponent(
            [64, 128, 256], [7 * size**power for size in (64, 128, 256)]
        ) == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize("make", [growth.dpo_step, growth.decode_step])
def test_what_grows_runs_and_is_plotted(make, place, monkeypatch):
    monkeypatch.setattr(growth, "BASE", {"length": 8, "batch": 2, "vocabulary": 50, "width": 48})
    monkeypatch.setattr(growth, "RANGES", {"batch": (1, 2, 4)})
    monkeypatch.setattr(growth, "seconds", lambda call: [call() is not None and 1.0, 1.0, 1.0])
    row = growth.grow("DPO step", make, "batch")
    assert row["own"]["exponent"] == row["own"]["exponent_upper"] == 0 and row["own"][
        "cpu_s at 4"
    ] == [1.0, 1.0, 1.0]
    row["own"] |= {"cpu_s at 2": [2.0, 2.0, 2.0], "cpu_s at 4": [4.0, 4.0, 4.0]}
    drawn = growth.plot([row], "DPO step")
    assert drawn.startswith("<svg xmlns") and "0.00 in batch 0 to 2" in drawn


def test_the_least_perplexing_answer_of_each_prompt_is_chosen():
    offered = [[[5, 2], [6, 2]], [[7, 2], [8, 2]]]
    assert macpo.choose([[1.0, 4.0], [2.0, 3.0]], offered) == [[5, 2], [8, 2]]
    assert trl_macpo.whole([0, 9, 2]) == trl_macpo.whole([1, 9]) == [3, 9, 2]


def test_both_rounds_measure_the_same_perplexity(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from bench.peers import make_folder, own_model

    make_folder(tmp_path, "15M")
    prompts, texts = [[5, 6, 7]] * 3, [[9, 2], [10, 11, 12, 2], [13, 2]]
    mine = macpo.perplexities(own_model(tmp_path, "fp32")[0], prompts, texts)
    theirs = trl_macpo.perplexities(trl_macpo.load(tmp_path, "fp32"), prompts, texts, size=2)
    assert mine == pytest.approx(theirs, abs=1e-4) and len({round(value, 3) for value in mine}) == 3


def test_a_70b_student_is_measured_at_toy_size_and_planned_at_its_own(place, capsys):
    """The same code for all works in both forms; the plan says that each of them fits a card of 140 GB, and that bf16 does not."""
    large.main(True)
    rows, told = (
        json.loads((place / "large-tiny.json").read_text())["rows"],
        capsys.readouterr().out,
    )
    assert [(row["dtype"], row["work"]) for row in rows[1:]] == [
        (form, work)
        for form in ("int8", "nf4")
        for work in ("DPO-LoRA step", "scoring", "sampling, batch 1", "sampling, batch 4")
    ]
    assert all(row["own"]["tokens_per_s"] > 0 and len(row["ratio_share"]) == 3 for row in rows[1:])
    plans = re.findall(r"bf16 (\d+) GB, int8 (\d+) GB, nf4 (\d+) GB", told)
    assert len(plans) == 6 and all(
        int(bf16) > 140 > int(int8) > int(nf4) for bf16, int8, nf4 in plans
    )
