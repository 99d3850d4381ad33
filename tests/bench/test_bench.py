"""The speed benchmarks: what they time, write and print, and that both sides compute the same."""

import json
import time

import pytest
import torch
from conftest import REPO

from bench.speed import dpo, generate, loss, padding, page, peers, profile, rows, sft, timing
from bench.speed import score as score_bench
from bench.speed.score import by_transformers, candidates
from minmacpo.config.schema import Generate
from minmacpo.core.scoring import score
from minmacpo.runtime.files import write_rows


def row(work: str, ratio, dtype: str = "bf16", **more) -> dict:
    """A row as a benchmark writes it."""
    return {
        "work": work,
        "shape": "15M",
        "dtype": dtype,
        "peer": "TRL",
        "ratio_cpu": ratio,
        "own": {"cpu_s": [1.0, 1.0, 1.0]},
        "peer_values": {},
    } | more


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """An empty folder in the place of assets/bench."""
    monkeypatch.setattr(timing, "PLACE", tmp_path)
    return tmp_path


# ---- timing ---------------------------------------------------------------------------------


def test_own_and_peer_take_turns_and_ratios_are_of_neighbours():
    calls = []

    def busy(name: str, seconds: float):
        def call():
            calls.append(name)
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        return call

    timed = timing.alternate(busy("own", 0.02), busy("peer", 0.06), 3)

    assert calls == ["own", "peer"] * 4, "once to warm up, then three times"
    median, low, high = timed["ratio_cpu"]
    assert low <= median <= high
    assert 2 < median < 4
    assert timed["own"]["cpu_s"][0] == pytest.approx(0.02, rel=0.5)
    assert timed["peer_values"]["wall_s"][0] >= 0.05


def test_without_a_peer_only_the_own_side_is_timed():
    timed = timing.alternate(lambda: None, None, 2)

    assert timed["ratio_cpu"] is None
    assert timed["peer_values"] == {}
    assert timed["own"]["cpu_s"]


def test_a_missing_peer_is_named_with_its_install_command():
    remedy = "(pip install -r requirements-dev.txt)"

    assert timing.missing("torch") == ""
    note = timing.missing("torch", "no_such_peer")
    assert note == f"no_such_peer not installed {remedy}: own side only"


# ---- files and page -------------------------------------------------------------------------


def test_the_page_says_met_short_and_not_measured(assets):
    rows = [
        row("DPO", [7.0, 6.5, 7.5], target=["dpo-15m-bf16"]),
        row("DPO", [2.5, 2.0, 4.0], dtype="fp32", target=["dpo-15m-fp32"]),
    ]
    timing.write_bench("dpo", "A title.", rows, notes=["A note."])
    text = page.page(assets)

    lines = {}
    for line in text.splitlines():
        if line.startswith("|"):
            lines[line.split(" | ")[0].strip("| ")] = line
    met = "7.00× (6.50-7.50) | met | bench.speed.dpo"
    short = "2.50× (2.00-4.00) | **short** | bench.speed.dpo"
    assert met in lines["DPO-LoRA step, CPU, 15M, bf16"]
    assert short in lines["DPO-LoRA step, CPU, 15M, fp32"]
    assert "not measured" in lines["scoring K = 3 candidates"]
    assert "not measured" in lines["H200, scoring, 7B shape"]
    assert "A title. `python -m bench.speed.dpo`" in text
    assert "A note." in text
    assert torch.__version__ in text


def test_a_target_of_several_rows_is_judged_by_the_worst():
    rows = [row("score", [ratio] * 3, target=["score"]) for ratio in (6.0, 2.0, 4.0)]
    table = page.target_rows([{"bench": "score", "rows": rows}])

    [line] = [line for line in table if line[0].startswith("scoring K")]
    assert line[3].startswith("2.00×")
    assert line[4] == "**short**"


def test_a_row_measured_again_takes_the_place_of_the_old_one(assets):
    first = [row("a", [1.0, 1.0, 1.0]), row("b", [2.0, 2.0, 2.0], dtype="fp32")]
    timing.write_bench("dpo", "T", first)
    timing.write_bench("dpo", "T", [row("a", [3.0, 3.0, 3.0])], keep=True)

    rows = json.loads((assets / "dpo.json").read_text())["rows"]
    assert [(row["dtype"], row["ratio_cpu"][0]) for row in rows] == [("fp32", 2.0), ("bf16", 3.0)]


def test_figures_of_a_peer_are_not_lost_where_it_is_missing(assets, capsys):
    with_peer = row("a", [3.0, 3.0, 3.0], peer_values={"cpu_s": [3.0, 3.0, 3.0]})
    timing.write_bench("dpo", "T", [with_peer])
    before = (assets / "dpo.json").read_bytes()
    timing.write_bench("dpo", "T", [row("a", None)], keep=True)

    assert (assets / "dpo.json").read_bytes() == before
    assert "is left as it was" in capsys.readouterr().out


def test_toy_sizes_are_not_on_the_page(assets):
    timing.write_bench("gpu-tiny", "A toy.", [row("a", [1.0, 1.0, 1.0])])

    assert "A toy." not in page.page(assets)


def test_benchmarks_md_is_what_its_command_makes(monkeypatch):
    monkeypatch.chdir(REPO)

    assert page.page(timing.PLACE) == (REPO / "BENCHMARKS.md").read_text("utf-8")


# ---- both sides compute the same ------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder of a very small shape, as make_folder writes it."""
    monkeypatch.setitem(timing.SHAPES, "small", "32x2x2x48")
    monkeypatch.setattr(peers, "VOCAB", 700)
    peers.make_folder(tmp_path, "small")
    return tmp_path


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_both_sides_of_a_training_benchmark_compute_the_same_loss(kind, small):
    for package in ("trl", "peft", "datasets"):
        pytest.importorskip(package)
    answers = ("chosen", "rejected") if kind == "dpo" else ("completion",)
    rows = peers.make_rows(4, 6, 5, answers)

    own_step, own_loss = peers.own_step(small, rows, "fp32", kind)
    trl_step, trl_loss = peers.trl_step(small, rows, "fp32", kind, gradient_checkpointing=False)

    assert own_loss == pytest.approx(trl_loss, rel=1e-4)
    assert own_step() == pytest.approx(own_loss, rel=1e-3)
    assert trl_step() == pytest.approx(own_loss, rel=1e-3)


def test_both_sides_of_scoring_give_the_same_numbers(small, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("bench.speed.score.VOCAB", 700)
    rows = candidates(2)[:6]
    model, _ = peers.own_model(small, "fp32")
    peers.disable_adapter(model)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(small / "base").eval()

    logps = score(model, rows, 600, packed=True, log=lambda line: None)

    assert logps == pytest.approx(by_transformers(oracle, rows, 4), rel=1e-5)


def test_every_form_of_the_loss_gives_the_same_gradient(monkeypatch):
    monkeypatch.setattr(loss, "VOCAB", 500)
    monkeypatch.setattr(loss, "TOKENS", 64)
    torch.manual_seed(0)
    case = (torch.randn(64, 24), torch.randn(500, 24) / 5, torch.randint(500, (64,)))
    own_loss, own_grad = loss.gradient(loss.own_form, case)

    forms = {name: form for name, form in loss.forms().items() if not isinstance(form, str)}
    assert len(forms) >= 2
    for name, form in forms.items():
        value, grad = loss.gradient(form, case)
        assert value == pytest.approx(own_loss, rel=1e-5), name
        assert (grad - own_grad).abs().max() <= 1e-5, name


# ---- every benchmark runs, small --------------------------------------------------------------


@pytest.fixture
def quick(small, monkeypatch):
    """The small folder, and benchmarks that call each side once."""

    def call_once(own, peer, times=1, warm=True):
        own()
        return {"ratio_cpu": None, "ratio_wall": None, "own": {"cpu_s": [1.0, 1.0, 1.0]}}

    for module in (dpo, generate, profile, score_bench, sft):
        if hasattr(module, "alternate"):
            monkeypatch.setattr(module, "alternate", call_once)
        if hasattr(module, "VOCAB"):
            monkeypatch.setattr(module, "VOCAB", 700)
    return small


def test_the_own_side_of_every_training_benchmark_runs(quick):
    row = dpo.compare(quick, "small", "fp32", dpo.VARIANTS["both"], lacks="no peer")
    assert row["target"] == ["dpo-small-fp32-both"]
    assert row["note"] == "no peer"

    row = sft.compare(quick, "fp32", sft.PLAIN_VARIANT, lacks="no peer")
    assert row["target"] == ["sft-15m-fp32"]


def test_the_own_side_of_scoring_and_decoding_runs(quick, monkeypatch):
    row = score_bench.compare(quick, "fp32", 3, lacks="no peer")
    assert row["work"] == "scoring, 3 answer(s) per prompt"

    monkeypatch.setattr(generate, "SAMPLING", Generate(max_new_tokens=4))
    row = generate.compare(quick, "fp32", "sampling, top-p 0.7, top-k 50", lacks="no peer")
    assert row["target"] == ["generate"]


def test_answers_that_fill_free_places_are_those_of_blocks(quick):
    assert generate.refilled(quick, "fp32")["equal"] == "64 of 64 texts"


def test_the_profile_of_a_decode_step_is_told(quick, monkeypatch):
    monkeypatch.setattr(generate, "milliseconds", lambda call, times=20: call() is None or 1.0)
    text = generate.paragraph(generate.decode_profile(quick, "fp32"))
    assert text.startswith("One decode step (fp32, 16 rows, position 192)")


@pytest.mark.slow
def test_the_profile_of_a_training_step_adds_up(quick):
    row, note = profile.measure(quick, "fp32", trace=None)
    shares = [row["own"][part] for part in (*profile.PARTS, "the rest")]
    assert sum(shares) == pytest.approx(1, abs=0.01)
    assert "of that ceiling" in note


def test_the_stages_of_a_round_without_training_are_made(tmp_path, capsys):
    rows.run_stages(tmp_path, 20)

    peaks = capsys.readouterr().out.splitlines()[-1].split()
    assert len(peaks) == len(rows.STAGES)
    assert all(int(peak) > 0 for peak in peaks)


def test_padding_is_counted(tmp_path, tokenizer_bytes, assets, capsys):
    pairs = []
    for i in range(9):
        prompt = f"\n\nHuman: where does kadol live ? {'please ' * i}\n\nAssistant:"
        pairs.append({"chosen": f"{prompt} on oak street .", "rejected": f"{prompt} go away !"})
    write_rows(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes)

    padding.main(str(tmp_path / "pairs.jsonl"), str(tmp_path / "tokenizer.model"))

    table = json.loads((assets / "padding.json").read_text())["rows"]
    assert [row["work"] for row in table] == [
        "DPO pairs",
        "SFT answers",
        "scoring, sorted",
        "scoring, answers of a prompt together",
    ]
    for row in table:
        assert row["own"]["computed_tokens"] <= row["own"]["padded_tokens"]
    assert table[0]["note"].startswith("9 pairs, 0 of more than")
