"""The benchmarks of decoding, of a round, of growth and of a card."""

import json
import re

import pytest
import torch

from bench.speed import card, card_7b, card_70b, growth, macpo, timing, trl_macpo
from bench.speed.peers import make_folder, own_model


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """An empty folder in the place of assets/bench."""
    monkeypatch.setattr(timing, "PLACE", tmp_path)
    return tmp_path


# ---- a card ---------------------------------------------------------------------------------


def test_a_card_without_peers_reports_its_own_side(assets, monkeypatch):
    def missing(*packages: str) -> str:
        return f"{packages[0]} not installed (pip install x): own side only"

    monkeypatch.setattr(card_7b, "missing", missing)
    card_7b.main(tiny=True)

    rows = json.loads((assets / "gpu-tiny.json").read_text())["rows"]
    assert [row["work"] for row in rows] == [
        "the card's ceilings",
        "sampling, batch 1",
        "sampling, batch 4",
        "scoring, 3 answers per prompt",
        "DPO-LoRA step",
        "DPO-LoRA step",
    ]
    assert rows[0]["own"]["matmul_flops"][0] > 1e6
    assert rows[0]["own"]["copy_bytes"][0] > 1e6
    for row in rows[1:]:
        assert row["own"]["wall_s"][0] > 0
        assert row["ratio_wall"] is None
        assert "not installed" in row["note"]
        assert "target" not in row
        median, low, high = row["ratio_share"]
        assert 0 < low <= median <= high


def test_a_card_says_what_came_too_late_and_what_failed(assets, monkeypatch):
    bench = card_7b.Bench(tiny=True)

    def broken(bench):
        raise RuntimeError("no kernel image")

    bench.add(broken)
    monkeypatch.setattr(card, "SECONDS", -1)
    bench.add(card.ceilings)

    rows = json.loads((assets / "gpu-tiny.json").read_text())["rows"]
    assert [row["note"] for row in rows] == [
        "failed: RuntimeError: no kernel image",
        "not measured: -1 s were over",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("module", [card_7b, card_70b])
def test_no_card_is_one_sentence(module):
    with pytest.raises(SystemExit, match=r"no GPU here; python -m bench\.speed\.gpu .*--tiny"):
        module.main(tiny=False)


def test_a_70b_student_is_measured_at_toy_size_and_planned_at_its_own(assets, capsys):
    """The plan says that every work fits a card of 140 GB when quantised, and not in bf16."""
    card_70b.main(tiny=True)

    rows = json.loads((assets / "large-tiny.json").read_text())["rows"]
    works = ("DPO-LoRA step", "scoring", "sampling, batch 1", "sampling, batch 4")
    expected = []
    for quantization in ("int8", "nf4"):
        expected += [(quantization, work) for work in works]
    assert [(row["dtype"], row["work"]) for row in rows[1:]] == expected
    for row in rows[1:]:
        assert row["own"]["tokens_per_s"] > 0
        assert len(row["ratio_share"]) == 3

    plans = re.findall(r"bf16 (\d+) GB, int8 (\d+) GB, nf4 (\d+) GB", capsys.readouterr().out)
    assert len(plans) == 6
    for bf16, int8, nf4 in plans:
        assert int(bf16) > 140 > int(int8) > int(nf4)


# ---- growth ---------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponents_of_exact_laws(power):
    sizes = [64, 128, 256]
    costs = [7 * size**power for size in sizes]

    assert growth.exponent(sizes, costs) == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize("make", [growth.dpo_step, growth.decode_step])
def test_what_grows_runs_and_is_plotted(make, assets, monkeypatch):
    def one_second(call):
        assert call() is not None
        return [1.0, 1.0, 1.0]

    monkeypatch.setattr(growth, "BASE", {"length": 8, "batch": 2, "vocabulary": 50, "width": 48})
    monkeypatch.setattr(growth, "RANGES", {"batch": (1, 2, 4)})
    monkeypatch.setattr(growth, "seconds", one_second)
    row = growth.grow("DPO step", make, "batch")

    assert row["own"]["exponent"] == 0
    assert row["own"]["exponent_upper"] == 0
    assert row["own"]["cpu_s at 4"] == [1.0, 1.0, 1.0]
    row["own"] |= {"cpu_s at 2": [2.0, 2.0, 2.0], "cpu_s at 4": [4.0, 4.0, 4.0]}
    drawing = growth.plot([row], "DPO step")
    assert drawing.startswith("<svg xmlns")
    assert "0.00 in batch 0 to 2" in drawing


# ---- a round --------------------------------------------------------------------------------


def test_the_least_perplexing_answer_of_each_prompt_is_chosen():
    offered = [[[5, 2], [6, 2]], [[7, 2], [8, 2]]]

    assert trl_macpo.choose([[1.0, 4.0], [2.0, 3.0]], offered) == [[5, 2], [8, 2]]


def test_a_text_of_the_peer_is_ended_and_never_empty():
    assert trl_macpo.whole([0, 9, 2]) == [3, 9, 2]
    assert trl_macpo.whole([1, 9]) == [3, 9, 2]


def test_both_rounds_measure_the_same_perplexity(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    make_folder(tmp_path, "15M")
    prompts = [[5, 6, 7]] * 3
    texts = [[9, 2], [10, 11, 12, 2], [13, 2]]

    model, _ = own_model(tmp_path, "fp32")
    own = macpo.perplexities(model, prompts, texts)
    peer = trl_macpo.perplexities(trl_macpo.load(tmp_path, "fp32"), prompts, texts, size=2)

    assert own == pytest.approx(peer, abs=1e-4)
    assert len({round(value, 3) for value in own}) == 3
