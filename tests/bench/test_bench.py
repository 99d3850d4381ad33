"""The benchmarks' shared parts: turns and ratios, files, the page, and what they say where a peer is missing."""

import json
import time

import pytest
import torch
from conftest import REPO  # noqa: F401  (puts the repository on the path)

from bench import loss, measure, page, peers
from bench.score import by_transformers, candidates
from minmacpo.core.scoring import score


def test_own_and_peer_take_turns_and_ratios_are_of_neighbours():
    calls = []

    def busy(name: str, seconds: float):
        def call():
            calls.append(name)
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        return call

    found = measure.alternate(busy("own", 0.02), busy("peer", 0.06), 3)
    assert calls == ["own", "peer"] * 4
    assert (
        2 < found["ratio_cpu"][0] < 4
        and found["ratio_cpu"][1] <= found["ratio_cpu"][0] <= found["ratio_cpu"][2]
    )
    assert (
        found["own"]["cpu_s"][0] == pytest.approx(0.02, rel=0.5)
        and found["peer_values"]["wall_s"][0] >= 0.05
    )
    alone = measure.alternate(busy("own", 0.0), None, 2)
    assert alone["ratio_cpu"] is None and alone["peer_values"] == {} and alone["own"]["cpu_s"]


def test_a_missing_peer_is_named_with_its_install_command():
    assert measure.missing("torch") == ""
    said = measure.missing("torch", "no_such_peer")
    assert said == "no_such_peer not installed (pip install -r requirements-dev.txt): own side only"


def row(key: str, ratio, **more) -> dict:
    return {
        "work": "step",
        "shape": "15M",
        "dtype": "bf16",
        "peer": "TRL",
        "target": [key],
        "ratio_cpu": ratio,
        "own": {"cpu_s": [1.0, 0.9, 1.1]},
        "peer_values": {},
    } | more


def test_the_page_says_met_short_and_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "PLACE", tmp_path)
    measure.write(
        "dpo",
        "A title.",
        [row("dpo-15m-bf16", [7.0, 6.5, 7.5]), row("dpo-15m-fp32", [2.5, 2.0, 4.0], dtype="fp32")],
        notes=["A note."],
    )
    text = page.page(tmp_path)
    lines = {
        line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")
    }
    assert "7.00× (6.50-7.50) | met | bench.dpo" in lines["DPO-LoRA step, CPU, 15M, bf16"]
    assert "2.50× (2.00-4.00) | **short** | bench.dpo" in lines["DPO-LoRA step, CPU, 15M, fp32"]
    assert (
        "not measured" in lines["scoring K = 3 candidates"]
        and "not measured" in lines["H200, scoring, 7B shape"]
    )
    assert (
        "A title. `python -m bench.dpo`" in text and "A note." in text and torch.__version__ in text
    )


def test_a_target_of_several_rows_is_judged_by_the_worst():
    rows = [row("score", [ratio] * 3, shape=str(ratio)) for ratio in (6.0, 2.0, 4.0)]
    [line] = [
        line
        for line in page.target_rows([{"bench": "score", "rows": rows}])
        if line[0].startswith("scoring K")
    ]
    assert line[3].startswith("2.00×") and line[4] == "**short**"


def test_a_row_measured_again_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "PLACE", tmp_path)
    measure.write("dpo", "T", [row("a", [1.0, 1.0, 1.0]), row("b", [2.0, 2.0, 2.0], dtype="fp32")])
    measure.write("dpo", "T", [row("a", [3.0, 3.0, 3.0])], keep=True)
    rows = json.loads((tmp_path / "dpo.json").read_text())["rows"]
    assert [(r["dtype"], r["ratio_cpu"][0]) for r in rows] == [("fp32", 2.0), ("bf16", 3.0)]


def test_figures_of_a_peer_are_not_lost_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "PLACE", tmp_path)
    measure.write("dpo", "T", [row("a", [3.0, 3.0, 3.0], peer_values={"cpu_s": [3.0, 3.0, 3.0]})])
    before = (tmp_path / "dpo.json").read_bytes()
    measure.write("dpo", "T", [row("a", None)], keep=True)
    assert (
        tmp_path / "dpo.json"
    ).read_bytes() == before and "is left as it was" in capsys.readouterr().out


def test_toy_sizes_are_not_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "PLACE", tmp_path)
    measure.write("gpu-tiny", "A toy.", [row("a", [1.0, 1.0, 1.0])])
    assert "A toy." not in page.page(tmp_path)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder of a very small shape, as make_folder writes it."""
    monkeypatch.setitem(measure.SHAPES, "small", "32x2x2x48")
    monkeypatch.setattr(peers, "VOCAB", 700)
    peers.make_folder(tmp_path, "small")
    return tmp_path


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_both_sides_of_a_training_benchmark_compute_the_same_loss(kind, small):
    for package in ("trl", "peft", "datasets"):
        pytest.importorskip(package)
    rows = peers.make_rows(4, 6, 5, ("chosen", "rejected") if kind == "dpo" else ("completion",))
    mine, loss_mine = peers.own_step(small, rows, "fp32", kind)
    theirs, loss_theirs = peers.trl_step(small, rows, "fp32", kind, gradient_checkpointing=False)
    assert loss_mine == pytest.approx(loss_theirs, rel=1e-4)
    assert mine() == pytest.approx(loss_mine, rel=1e-3) and theirs() == pytest.approx(
        loss_mine, rel=1e-3
    )


def test_both_sides_of_scoring_give_the_same_numbers(small, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("bench.score.VOCAB", 700)
    model, rows = peers.own_model(small, "fp32")[0], candidates(2)[:6]
    peers.disable_adapter(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(small / "base").eval()
    wanted = by_transformers(theirs, rows, 4)
    assert score(model, rows, 600, packed=True, log=lambda line: None) == pytest.approx(
        wanted, rel=1e-5
    )


def test_every_form_of_the_loss_gives_the_same_gradient(monkeypatch):
    monkeypatch.setattr(loss, "VOCAB", 500)
    monkeypatch.setattr(loss, "TOKENS", 64)
    torch.manual_seed(0)
    case = (torch.randn(64, 24), torch.randn(500, 24) / 5, torch.randint(500, (64,)))
    own = loss.gradient(lambda h, w, t: loss.margin_loss(loss.token_logps(h, w, t)), case)
    forms = {name: form for name, form in loss.forms().items() if not isinstance(form, str)}
    assert len(forms) >= 2
    for name, form in forms.items():
        value, grad = loss.gradient(form, case)
        assert value == pytest.approx(own[0], rel=1e-5), name
        assert (grad - own[1]).abs().max() <= 1e-5, name
