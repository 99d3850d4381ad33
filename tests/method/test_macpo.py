"""The algorithm: what must hold of the files of finished runs."""

import hashlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import checks
import numpy as np
import pytest
import torch
from runs import copy_run, differences, new_variant, rows_of, stages_of, train, write_stub

from minmacpo.config.parse import parse
from minmacpo.core.checkpoint import load_tensors
from minmacpo.data import synthetic as world
from minmacpo.data.records import Message, Pair
from minmacpo.evaluation.finished_run import read_run
from minmacpo.evaluation.gold import gold_reward
from minmacpo.evaluation.table import negative_rows, warnings
from minmacpo.method import ai_feedback
from minmacpo.method.negatives import TAIL_TEMPERATURE
from minmacpo.pipeline.model_pool import ModelPool
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.sample_stage import Sampler
from minmacpo.runtime.files import read_rows
from train import run_all


@pytest.fixture(params=["tiny", "stub"])
def run(request):
    return request.getfixturevalue(request.param)


def variant(stub, tmp_path, *words: str):
    """A finished run with other settings; what they leave as it is comes from the good run."""
    return new_variant(stub, tmp_path / "runs", *words)


def variant_anew(stub, tmp_path, *words: str):
    """The same for a test that changes how something is computed: only data and bases are taken."""
    return new_variant(stub, tmp_path / "runs", *words, parts=("data", "bases"))


def check_inputs_are_those_on_the_disk(run) -> None:
    """What every stage.json says of its inputs is what lies there."""
    stages = stages_of(run)
    for name, notes in stages.items():
        for source, fingerprint in notes["inputs"].items():
            assert stages[source]["fingerprint"] == fingerprint, (name, source)


def column(run: Path, t: int, agent: str, name: str) -> list:
    """One column of the pairs that an agent learns from in a round."""
    return [pair[name] for pair in checks.pairs(run, t, agent)]


# ---- invariants -----------------------------------------------------------------------------


def test_all_files_about_d2_have_its_prompts_in_its_order(run):
    checks.check_order(run)


def test_the_rejected_side_is_sampled_once_and_never_again(run):
    checks.check_negatives_are_cached(run)


def test_negatives_come_from_the_negative_twins(run):
    checks.check_negatives_are_the_negative_twins(run)


def test_the_teachers_of_a_round_learn_the_student_s_answers(run):
    checks.check_teachers_learn_the_student_s_answers(run)


def test_the_student_answers_after_its_update_and_the_teachers_before_theirs(run):
    checks.check_student_answers_after_its_update(run)
    checks.check_teachers_answer_before_their_update(run)


def test_the_student_keeps_the_least_perplexing_answer(run):
    checks.check_filter(run)


def test_perplexities_are_those_of_the_student_before_its_update(run):
    checks.check_scores(run)


def test_held_out_answers_are_scored_under_their_own_agent(run):
    checks.check_evaluation(run)


def test_reference_logps_are_those_of_the_bare_base(run):
    assert checks.settings_of(run)["dpo"]["reference"] == "base"
    checks.check_reference(run)


def test_pairs_are_whole(run):
    checks.check_pairs_are_whole(run)


def test_the_first_round_reuses_the_labels_that_the_student_was_made_from(run):
    check_same_samples(run, "round1/positives_teacher1", "round0/weak_labels")
    check_same_samples(run, "round0/negatives_teacher1", "round0/weak_negatives")


def check_same_samples(run: Path, name: str, other: str) -> None:
    samples = (run / name / "samples.jsonl").read_bytes()
    assert samples == (run / other / "samples.jsonl").read_bytes()
    assert stages_of(run)[name]["fingerprint"] == stages_of(run)[other]["fingerprint"]


def test_every_stage_of_the_algorithm_is_there_and_no_other(run):
    names = {
        "round0/weak_labels",
        "round0/weak_negatives",
        "controls/continued",
        "controls/ceiling",
    }
    for agent in checks.agents_of(run):
        names |= {f"round0/{agent}_pos", f"round0/{agent}_neg", f"round0/negatives_{agent}"}
        for t in checks.rounds_of(run):
            names.add(f"round{t}/{agent}_pos")
            for part in ("positives", "pairs", "reference"):
                names.add(f"round{t}/{part}_{agent}")
    for t in checks.rounds_of(run):
        names.add(f"round{t}/scores_student")
    setup = ("data/", "bases/", "eval/")
    assert {name for name in stages_of(run) if not name.startswith(setup)} == names


# ---- training -------------------------------------------------------------------------------


def test_contrastive_steps_continue_the_last_adapter_and_are_dpo_plus_sft(run):
    last = checks.rounds_of(run)[-1]
    for t, agent in ((1, "student"), (last, "student"), (1, "teacher2"), (last, "teacher1")):
        checks.check_prefer(run, t, agent)


def test_negative_agents_continue_their_positive_twin(run):
    checks.check_negative_student(run)
    checks.check_negative_teacher(run, "teacher2")


def test_naive_sft_continued_takes_as_many_steps_as_the_student(run):
    stages = stages_of(run)
    steps = 0
    for t in checks.rounds_of(run):
        steps += stages[f"round{t}/student_pos"]["counts"]["steps"]
    assert steps > 0
    assert stages["controls/continued"]["counts"]["steps"] == steps
    dpo = checks.settings_of(run)["dpo"]
    rows = checks.answered(run, "round0/weak_labels")
    args = checks.TrainArgs(dpo["student_lr"], dpo["batch"], steps)
    checks.check_sft(run, "controls/continued", run / "round0/student_pos", rows, args)


def test_the_ceiling_is_trained_like_the_student_but_on_the_truth(run):
    sft = checks.settings_of(run)["sft"]
    notes = stages_of(run)["controls/ceiling"]
    assert notes["settings"]["texts"] == ["d2.jsonl", "chosen"]
    student_settings = stages_of(run)["round0/student_pos"]["settings"]
    assert notes["settings"] | {"texts": ["samples.jsonl", "response"]} == student_settings
    rows = len(rows_of(run / "data/slices/d2.jsonl"))
    assert notes["counts"]["steps"] == sft["student_epochs"] * math.ceil(rows / sft["batch"])


def test_small_micro_batches_do_not_change_a_step(stub):
    checks.check_accumulation(stub)


def test_bases_are_the_same_bits_after_everything(stub, tmp_path, monkeypatch):
    pools = []
    make_pool = ModelPool.__init__

    def remember(self, *args, **kwargs):
        pools.append(self)
        make_pool(self, *args, **kwargs)

    monkeypatch.setattr(ModelPool, "__init__", remember)
    again = variant_anew(stub, tmp_path)
    for name, notes in stages_of(again).items():
        if name.startswith("bases/"):
            for file, listed in notes["files"].items():
                content = (again / name / file).read_bytes()
                assert hashlib.sha256(content).hexdigest() == listed["sha256"]
                assert content == (stub / name / file).read_bytes()

    # In memory too: strong, weak1, weak2, all trained in this process
    loaded = pools[-1].models
    assert len(loaded) == 3
    weights_of_bases = []
    for name in ("strong", "weak1", "weak2"):
        weights, _ = load_tensors(again / "bases" / name / "model.safetensors")
        weights_of_bases.append(weights)
    for entry in loaded.values():
        weights = {}
        for name, tensor in entry.model.state_dict().items():
            if ".lora_" not in name:
                weights[name.replace(".base.", ".")] = tensor
        assert any(has_same_bits(weights, of_base) for of_base in weights_of_bases)


def has_same_bits(weights: dict, others: dict) -> bool:
    if weights.keys() != others.keys():
        return False
    return all(torch.equal(weights[name], others[name]) for name in others)


# ---- other people's software ----------------------------------------------------------------


def test_every_adapter_works_in_peft(run):
    checks.check_adapters_work(run)


def test_bases_load_in_transformers_without_a_word(run, caplog):
    for folder in sorted((run / "bases").iterdir()):
        if folder.name == "tokenizer":
            continue
        model = checks.plain_model(folder)
        weights, _ = load_tensors(folder / "model.safetensors")
        assert weights.keys() == model.state_dict().keys()
        assert model.generation_config.eos_token_id == checks.pieces_of(folder).eos_id()
        for parameter in model.parameters():
            assert torch.isfinite(parameter).all()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


# ---- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["init", "previous"])
def test_other_references(stub, tmp_path, setting):
    """The student's reference may have found the perplexity already."""
    run = variant(stub, tmp_path, f"--dpo.reference={setting}", "--macpo.controls=false")
    checks.check_reference(run)
    # In these rounds the reference is the policy before its update
    same_rounds = {t for t in checks.rounds_of(run) if t == 1 or setting == "previous"}
    for t in checks.rounds_of(run):
        settings = stages_of(run)[f"round{t}/pairs_student"]["settings"]
        assert settings["scores_chosen"] == (t not in same_rounds)
    margins = checks.margins_before_the_first_step(run)
    for t, agent in checks.updated(run):
        margin = abs(margins[f"round{t}/{agent}_pos"])
        if t in same_rounds:
            assert margin < 1e-5
        else:
            assert margin > 1e-5


def test_margins_before_the_first_step_are_not_zero_against_the_base(stub):
    assert min(map(abs, checks.margins_before_the_first_step(stub).values())) > 1e-5


def test_one_teacher_needs_no_scores(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.teachers=1", "--macpo.controls=false")
    assert list(run.glob("round*/scores_*")) == []
    assert not (run / "bases/weak2").exists()
    for t in checks.rounds_of(run):
        check_chosen_is_of(run, t, "student", "teacher1")
    checks.check_order(run)
    checks.check_prefer(run, 1, "student")


def check_chosen_is_of(run: Path, t: int, agent: str, author: str) -> None:
    """All that an agent learns to prefer in a round are this author's answers of the round."""
    answers = checks.samples(run, f"round{t}/positives_{author}")
    pairs = checks.pairs(run, t, agent)
    assert pairs
    for pair in pairs:
        assert pair["chosen"] == answers[pair["id"]]["response"]
        assert pair["chosen_by"] == author


def check_rejected_are(run: Path, t: int, agent: str, name: str) -> None:
    """All that an agent learns to avoid in a round are the samples of this stage."""
    answers = checks.samples(run, name)
    pairs = checks.pairs(run, t, agent)
    assert pairs
    for pair in pairs:
        answer = answers[pair["id"]]
        assert pair["rejected"] == answer["response"]
        assert pair["rejected_by"] == answer["agent"]


def test_three_teachers_repeat_the_bases(stub, tmp_path):
    words = ["--macpo.teachers=3", "--macpo.rounds=1", "--model.weak=8x1x2x16,16x1x2x16"]
    run = variant(stub, tmp_path, *words)
    sizes = []
    for k in (1, 2, 3):
        config = json.loads((run / f"bases/weak{k}/config.json").read_text())
        sizes.append(config["hidden_size"])
    assert sizes == [8, 16, 8]
    checks.check_filter(run)


def test_a_random_pick_needs_no_scores_and_takes_every_teacher(stub, tmp_path):
    words = ["--macpo.select=random", "--world.d2=40"]
    words += ["--macpo.update_teachers=false", "--macpo.controls=false"]
    run = variant(stub, tmp_path, *words)
    assert list(run.glob("round*/scores_*")) == []
    checks.check_pairs_are_whole(run)
    first = column(run, 1, "student", "chosen_by")
    second = column(run, 2, "student", "chosen_by")
    for names in (first, second):
        assert set(names) == {"teacher1", "teacher2"}
        assert 8 <= names.count("teacher1") <= 32
    assert first != second


def test_without_hard_negatives_only_the_sft_term_trains(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.hard_negatives=false", "--macpo.controls=false")
    for t, agent in ((1, "student"), (2, "teacher1")):
        checks.check_prefer(run, t, agent)
    assert "round2/teacher2_pos" in stages_of(run)
    # same pairs in round 1, another adapter from them
    pairs = "round1/pairs_student/pairs.jsonl"
    assert (run / pairs).read_bytes() == (stub / pairs).read_bytes()
    adapter = checks.adapter_tensors(run / "round1/student_pos")
    stub_adapter = checks.adapter_tensors(stub / "round1/student_pos")
    assert not has_same_bits(adapter, stub_adapter)


def test_frozen_teachers_stay_and_are_sampled_anew(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.update_teachers=false", "--macpo.controls=false")
    assert list(run.glob("round[1-9]/teacher*")) == []
    assert list(run.glob("round[1-9]/pairs_teacher*")) == []
    checks.check_teachers_answer_before_their_update(run)
    for teacher in checks.teachers_of(run):
        first = (run / f"round1/positives_{teacher}/samples.jsonl").read_bytes()
        second = (run / f"round2/positives_{teacher}/samples.jsonl").read_bytes()
        assert first != second
    unchanged = [f"round0/{teacher}_pos" for teacher in checks.teachers_of(run)]
    for name in [*unchanged, "round1/student_pos"]:
        adapter = f"{name}/adapter_model.safetensors"
        assert (run / adapter).read_bytes() == (stub / adapter).read_bytes()
    rows = json.loads((run / "eval/table.json").read_text())["rows"]
    assert [row["round"] for row in rows if row["agent"] == "teacher1"] == [0]
    checks.check_filter(run)
    checks.check_scores(run)


def test_without_mutual_positives_everybody_learns_its_own_fresh_answers(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.mutual_positives=false", "--macpo.controls=false")
    check_inputs_are_those_on_the_disk(run)
    assert not list(run.glob("round*/scores_*"))
    for t, agent in checks.updated(run):
        check_chosen_is_of(run, t, agent, agent)
        adapter = run / f"round{t - 1}/{agent}_pos"
        checks.check_samples(run, f"round{t}/positives_{agent}", agent, adapter)
    checks.check_negatives_are_cached(run)
    checks.check_prefer(run, 2, "student")


def test_refreshed_negatives(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.refresh_negatives=true", "--macpo.controls=false")
    check_inputs_are_those_on_the_disk(run)
    for agent in checks.agents_of(run):
        check_rejected_are(run, 1, agent, f"round0/negatives_{agent}")
        check_rejected_are(run, 2, agent, f"round1/negatives_{agent}")
        assert column(run, 1, agent, "rejected") != column(run, 2, agent, "rejected")
        checks.check_samples(run, f"round1/negatives_{agent}", agent, run / f"round1/{agent}_neg")
    checks.check_reference(run)
    assert not list(run.glob("round2/*_neg"))
    assert not list(run.glob("round2/negatives_*"))
    sft = checks.settings_of(run)["sft"]
    rows = checks.answered(run, "round0/weak_negatives")
    args = checks.TrainArgs(sft["student_negative_lr"], sft["batch"], math.ceil(12 / sft["batch"]))
    checks.check_sft(run, "round1/student_neg", run / "round1/student_pos", rows, args)


def test_no_rounds_at_all(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.rounds=0")
    assert stages_of(run)["controls/continued"]["counts"]["steps"] == 0
    continued = checks.adapter_tensors(run / "controls/continued")
    student = checks.adapter_tensors(run / "round0/student_pos")
    assert has_same_bits(continued, student)


def test_without_controls(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.controls=false", "--macpo.rounds=1")
    assert not (run / "controls").exists()
    assert not list(run.glob("eval/*ceiling*"))
    rows = json.loads((run / "eval/table.json").read_text())["rows"]
    assert {row["agent"] for row in rows} == {"student", "teacher1", "teacher2"}


# ---- answers that cannot be used ------------------------------------------------------------


def change_answers(monkeypatch, change) -> None:
    """Every sampled answer becomes what `change` makes of the sampler and the sample."""
    good = Sampler.__call__

    def sample_changed(self, *args):
        return [replace(sample, response=change(self, sample)) for sample in good(self, *args)]

    monkeypatch.setattr(Sampler, "__call__", sample_changed)


def remainder(prompt_id: str, divisor: int) -> int:
    """Deals out prompts at random, but always alike."""
    return int(prompt_id, 16) % divisor


def d2_remainders(run: Path, divisor: int) -> list[int]:
    return [remainder(row["id"], divisor) for row in rows_of(run / "data/slices/d2.jsonl")]


def test_empty_and_equal_answers_are_left_out_and_counted(stub, tmp_path, monkeypatch):
    def sometimes_nothing(sampler, sample):
        agent = sample.agent
        case = remainder(sample.id, 4)
        text = sample.response
        if case == 0 and agent.startswith("teacher"):
            text = ""  # nobody has an answer; also the teachers' own negatives
        if case == 1 and agent == "teacher1":
            text = ""
        if case == 2 and agent in ("student", "student_neg"):
            text = "the same"
        if case == 3 and agent == "student_neg":
            text = ""
        return text

    change_answers(monkeypatch, sometimes_nothing)
    run = variant_anew(
        stub, tmp_path, "--world.d2=40", "--macpo.rounds=1", "--macpo.controls=false"
    )
    checks.check_order(run)
    checks.check_pairs_are_whole(run)
    checks.check_filter(run)
    remainders = d2_remainders(run, 4)
    nobody_answers = remainders.count(0)
    no_negative = remainders.count(3)
    no_label = nobody_answers + remainders.count(1)
    usable = 40 - nobody_answers - no_negative
    assert nobody_answers > 0
    assert no_negative > 0

    stages = stages_of(run)
    counts = stages["round1/pairs_student"]["counts"]
    assert counts["all_empty"] == nobody_answers
    assert counts["negative_empty"] == no_negative
    assert counts["pairs"] == usable
    assert counts["chosen_teacher1"] + counts["chosen_teacher2"] == usable
    assert stages["round0/student_pos"]["counts"]["empty"] == no_label
    assert stages["round0/weak_labels"]["counts"]["empty"] == no_label
    reasons = f"(all_empty {nobody_answers}, negative_empty {no_negative})"
    warning = f"WARNING: {40 - usable} of 40 rows were dropped {reasons}"
    assert warning in (run / "log.txt").read_text()


def test_equal_negatives_are_dropped_counted_and_warned_of(stub, tmp_path, monkeypatch):
    def odd_ones_are_equal(sampler, sample):
        return "the same" if remainder(sample.id, 2) == 1 else sample.response

    change_answers(monkeypatch, odd_ones_are_equal)
    run = variant_anew(stub, tmp_path, "--macpo.rounds=1", "--macpo.controls=false")
    odd = d2_remainders(run, 2).count(1)
    for agent in checks.agents_of(run):
        counts = stages_of(run)[f"round1/pairs_{agent}"]["counts"]
        assert odd > 1
        assert counts["negative_equal"] == odd
        assert counts["pairs"] == 12 - odd
    assert (run / "log.txt").read_text().count("WARNING") == 3
    table = json.loads((run / "eval/table.json").read_text())
    warned = [warning for warning in table["warnings"] if "equal their positive" in warning]
    assert len(warned) == 3


def longer(monkeypatch, tokens: int, share: int) -> None:
    """Of every `share`th prompt the answer is so long that both together have `tokens` tokens."""

    def talkative(sampler, sample):
        if remainder(sample.id, share) != 0:
            return sample.response or "x"
        text = "no " if sample.agent.endswith("_neg") else "yes "
        while len(sampler.loaded.render(sample.prompt, text).ids) < tokens:
            text += "z"
        return text

    change_answers(monkeypatch, talkative)


@pytest.mark.parametrize(
    ("share", "warned"), [(2, True), pytest.param(40, False, marks=pytest.mark.slow)]
)
def test_over_long_answers_are_dropped_counted_and_warned_of(
    stub, tmp_path, monkeypatch, share, warned
):
    """Longer than data.max_length, yet within the model's context."""
    longer(monkeypatch, 100, share)
    run = variant_anew(
        stub, tmp_path, "--world.d2=40", "--macpo.rounds=1", "--macpo.controls=false"
    )
    long = d2_remainders(run, share).count(0)
    lines = (run / "log.txt").read_text().splitlines()
    for name in ("round0/student_pos", "round1/pairs_student", "round1/pairs_teacher1"):
        assert stages_of(run)[name]["counts"]["over_long"] == long
        of_stage = [line for line in lines if f"] {name}  " in line]
        assert f"over_long {long}" in of_stage[-1]
        warnings = [line for line in of_stage if "WARNING" in line]
        assert (warnings != []) == warned
        for warning in warnings:
            assert f"{long} of 40 rows were dropped (over_long {long})" in warning
    assert (long > 4) == warned


def test_a_text_longer_than_the_context_is_not_scored(stub, tmp_path, monkeypatch):
    """It never wins the filter, and is counted; a pair that it is left in is dropped."""
    longer(monkeypatch, 150, 2)
    run = variant_anew(stub, tmp_path, "--macpo.rounds=1", "--macpo.controls=false")
    rows = rows_of(run / "round1/scores_student/teacher1.jsonl")
    long = set()
    for row in rows:
        if remainder(row["id"], 2) == 0:
            long.add(row["id"])
            assert row["logp"] is None
            assert row["perplexity"] > 1e29
        else:
            assert row["logp"] < 0
    assert long
    both = 2 * len(long)  # teacher2's answers to these prompts are as long
    assert stages_of(run)["round1/scores_student"]["counts"]["over_long"] == both
    warning = f"WARNING: {both} of {2 * len(rows)} texts are longer than the context"
    assert warning in (run / "log.txt").read_text()
    assert not {pair["id"] for pair in checks.pairs(run, 1, "student")} & long


def test_a_random_pick_counts_every_prompt(stub, tmp_path, monkeypatch):
    def silent(sampler, sample):
        unanswered = {"teacher1": (0, 1), "teacher2": (0,)}.get(sample.agent, ())
        if remainder(sample.id, 4) in unanswered:
            return ""
        return sample.response or "x"

    change_answers(monkeypatch, silent)
    words = ["--macpo.select=random", "--world.d2=40", "--macpo.rounds=1"]
    words += ["--macpo.update_teachers=false", "--macpo.controls=false"]
    run = variant_anew(stub, tmp_path, *words)
    remainders = d2_remainders(run, 4)
    counts = stages_of(run)["round1/pairs_student"]["counts"]
    assert counts["all_empty"] == remainders.count(0) > 0
    assert counts["chosen_teacher2"] >= remainders.count(1) - counts["negative_equal"] > 0
    assert counts["chosen_teacher1"] + counts["chosen_teacher2"] == counts["pairs"]
    assert sum(counts.values()) - counts["pairs"] - counts["tokens"] == 40
    checks.check_order(run)
    checks.check_pairs_are_whole(run)


# ---- settings beyond the paper ----------------------------------------------------------------

BEYOND = {
    "all": ["--macpo.select=all"],
    "likelihood-ratio": ["--macpo.select=likelihood-ratio"],
    "agreement": ["--macpo.select=agreement"],
    "two": ["--macpo.select=perplexity,agreement"],
    "shortest": ["--macpo.select=shortest"],
    "answers": ["--macpo.answers=2"],
    "keep": ["--macpo.keep_fraction=0.5"],
    "keep by ratio": [
        "--macpo.keep_fraction=0.75",
        "--macpo.select=likelihood-ratio",
        "--macpo.answers=2",
    ],
    "weights": ["--macpo.pair_weighting=agreement"],
    "self": ["--macpo.self_fraction=0.5"],
    "other": ["--macpo.negatives=other"],
    "previous": ["--macpo.negatives=previous"],
    "persona": ["--macpo.negatives=persona"],
    "tail": ["--macpo.negatives=tail"],
    "contrastive": ["--macpo.negatives=contrastive"],
    "normalized": ["--dpo.length_normalized=true"],
    "penalty": ["--dpo.length_penalty=0.5"],
}


@pytest.fixture(scope="module")
def beyond(stub, tmp_path_factory):
    """A run of each setting, of three teachers (so that agreement has somebody to ask).

    They have one round, in which the student alone learns.
    """
    root = tmp_path_factory.mktemp("beyond")
    copy_run(stub, root / "runs")
    flags = [
        "--macpo.teachers=3",
        "--macpo.rounds=1",
        "--macpo.update_teachers=false",
        "--macpo.controls=false",
        "--sft.student_epochs=2",
    ]
    runs = {}
    for name, more in [("plain", []), *BEYOND.items()]:
        train(write_stub(root), f"--run.root={root / 'runs'}", f"--run.name={name}", *flags, *more)
        runs[name] = root / "runs" / name
    return runs


def test_each_setting_makes_another_student_and_no_two_the_same(beyond):
    adapters = {}
    for name, run in beyond.items():
        adapters[name] = checks.adapter_tensors(run / "round1/student_pos")
    for name, other in itertools.combinations(adapters, 2):
        assert not has_same_bits(adapters[name], adapters[other]), (name, other)


def test_negatives_are_whose_they_should_be(beyond):
    stages = {
        "plain": "round0/negatives_student",
        "other": "round0/negatives_teacher1",
        "previous": "round1/previous_student",
        "persona": "round0/persona_student",
        "tail": "round1/tail_student",
        "contrastive": "round1/contrastive_student",
    }
    for name, stage in stages.items():
        check_rejected_are(beyond[name], 1, "student", stage)
    tag = {"role": "tag", "content": "a gossip speaks"}
    for answer in checks.samples(beyond["persona"], "round0/persona_student").values():
        assert answer["prompt"][-1] == tag
    notes = stages_of(beyond["tail"])
    assert notes["round1/tail_student"]["settings"]["temperature"] == TAIL_TEMPERATURE
    assert notes["round1/positives_teacher1"]["settings"]["temperature"] == 0.7


def test_the_table_judges_the_negatives_that_were_rejected(beyond):
    run = read_run(beyond["previous"])
    student, *teachers = negative_rows(run)
    pairs = read_rows(run.stage("round1/pairs_student").path / "pairs.jsonl", Pair)
    right = [gold_reward(run.config, pair, pair.rejected)["right"] for pair in pairs]
    assert student["wrong"] == pytest.approx(1 - np.mean(right))
    assert student["rejected"]
    assert [row["wrong"] for row in teachers] == [None] * 3, "they learned from no pairs"
    (warning,) = warnings([{"agent": "a", "wrong": 0.1, "equal": [], "rejected": True}])
    assert "rejected answers of round 1" in warning


def test_every_offer_counts_once(beyond):
    prompts = 12
    for name, run in beyond.items():
        counts = stages_of(run)["round1/pairs_student"]["counts"]
        dropped = checks.dropped_pairs(counts) + counts.get("not_kept", 0)
        offers = 3 * prompts if name == "all" else prompts
        assert counts["pairs"] + dropped == offers, name


def test_half_of_the_prompts_are_kept(beyond):
    counts = stages_of(beyond["keep"])["round1/pairs_student"]["counts"]
    assert counts["not_kept"] == 6


def test_two_answers_to_a_prompt_stand_side_by_side(beyond):
    answers = rows_of(beyond["answers"] / "round1/positives_teacher2/samples.jsonl")
    first = [answer["id"] for answer in answers[::2]]
    second = [answer["id"] for answer in answers[1::2]]
    assert first == second
    assert len(first) == 12
    assert len(set(first)) == 12


def test_weights_differ_around_one(beyond):
    weights = column(beyond["weights"], 1, "student", "weight")
    assert np.mean(weights) == pytest.approx(1)
    assert len(set(weights)) > 3
    assert set(column(beyond["plain"], 1, "student", "weight")) == {None}


def test_the_share_of_own_positives_is_the_student_s(beyond):
    authors = column(beyond["self"], 1, "student", "chosen_by")
    assert 0 < authors.count("student") < len(authors)


def test_agreement_is_what_the_other_teachers_say(beyond):
    """Two of three teachers score an answer, never its author."""
    expected = set()
    for author, judge in itertools.permutations((1, 2, 3), 2):
        expected.add(f"round1/agreement_teacher{author}_teacher{judge}")
    stages = stages_of(beyond["agreement"])
    assert {name for name in stages if "/agreement_" in name} == expected
    assert [name for name in stages if "/scores_" in name] == []


# ---- the gold reward ------------------------------------------------------------------------


def test_gold_never_reaches_training(stub, tmp_path, monkeypatch):
    """With the gold reward replaced by a constant, every file but the table stays as it was."""
    constant = {"gold": 0.5, "right": 0.5, "polite": 0.5, "well_formed": 0.5}
    monkeypatch.setattr(world, "gold_reward", lambda *args: constant)
    train(write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}")
    table = json.loads((tmp_path / "runs/stub/eval/table.json").read_text())
    assert {row["gold"] for row in table["rows"]} == {0.5}
    assert differences(tmp_path / "runs/stub", stub) == ["eval/table.json"]


# ---- one name, one stage ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--macpo.self_fraction=0.5"],
        ["--macpo.negatives=persona"],
        ["--macpo.mutual_positives=false"],
        ["--macpo.negatives=previous"],
        ["--macpo.self_fraction=0.25", "--macpo.negatives=tail"],
        ["--macpo.refresh_negatives=true"],
        ["--macpo.negatives=contrastive"],
    ],
)
def test_no_stage_stands_in_for_another_of_its_name(tmp_path, flags):
    """Listing the stages would raise; what each stands on is listed before it."""
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", *flags]
    run = Run(parse(words).config)
    run_all(run, {}, None)

    listed = set()
    for name, (_, inputs) in run.recipes.items():
        for source in inputs:
            assert run.plan[source.name].fingerprint == source.fingerprint
            assert source.name in listed, (name, source.name)
        listed.add(name)


@pytest.mark.parametrize(
    "flags",
    [
        ["--macpo.negatives=previous"],
        ["--macpo.self_fraction=0.25", "--macpo.negatives=tail"],
        pytest.param(["--macpo.negatives=persona"], marks=pytest.mark.slow),
        pytest.param(["--macpo.negatives=contrastive"], marks=pytest.mark.slow),
    ],
)
def test_every_stage_stands_on_the_inputs_that_it_names(stub, tmp_path, flags):
    """Also with negatives that a round takes from the last one, or that it samples itself."""
    run = variant(stub, tmp_path, *flags, "--macpo.controls=false")
    check_inputs_are_those_on_the_disk(run)


def test_with_own_positives_mixed_in_teachers_learn_from_the_updated_student(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.self_fraction=0.5", "--macpo.controls=false")
    check_inputs_are_those_on_the_disk(run)
    inputs = {name: notes["inputs"].keys() for name, notes in stages_of(run).items()}
    assert "round0/student_pos" in inputs["round1/own_student"]
    assert "round1/student_pos" in inputs["round1/positives_student"]
    assert inputs["round1/pairs_student"] >= {"round1/own_student", "round1/positives_teacher1"}
    assert inputs["round1/pairs_teacher1"] >= {
        "round1/positives_student",
        "round1/positives_teacher1",
    }


def test_a_name_that_stands_for_two_stages_is_a_defect_that_shows(tmp_path):
    run = Run(parse(["@tiny", f"--run.root={tmp_path}"]).config)
    run.stage("a/b", "x/1", {}, [], lambda work: {})
    run.stage("a/b", "x/1", {}, [], lambda work: {})
    with pytest.raises(RuntimeError, match="a/b"):
        run.stage("a/b", "x/1", {"other": 1}, [], lambda work: {})


def test_a_prompt_without_a_negative_is_left_out_and_counted(stub, tmp_path, monkeypatch):
    """A tagged prompt can be too long for a base that has room for the plain one."""
    add_tags = ai_feedback.add_tags

    def add_tags_to_long(*args):
        groups = add_tags(*args)
        (first,) = groups[0]
        long_prompt = (Message("user", "long " * 200), *first.prompt[1:])
        groups[0] = [replace(first, prompt=long_prompt)]
        return groups

    monkeypatch.setattr(ai_feedback, "add_tags", add_tags_to_long)
    run = variant_anew(stub, tmp_path, "--macpo.negatives=persona", "--macpo.controls=false")
    all_counts = [notes["counts"] for name, notes in stages_of(run).items() if "/pairs_" in name]
    assert all_counts
    for counts in all_counts:
        assert counts["no_negative"] == 1
        assert counts["pairs"] + checks.dropped_pairs(counts) + 1 == 12


# ---- losses without a reference ---------------------------------------------------------------


def test_a_loss_without_a_reference_scores_and_stores_none(stub, tmp_path):
    run = variant(stub, tmp_path, "--dpo.loss=simpo", "--macpo.rounds=1", "--macpo.controls=false")

    assert not [name for name in stages_of(run) if "/reference_" in name]
    for agent in checks.agents_of(run):
        assert set(column(run, 1, agent, "ref_chosen_logps")) == {None}
        assert set(column(run, 1, agent, "ref_rejected_logps")) == {None}
    log = (run / "log.txt").read_text()
    assert "loss: SimPO + SFT, without a reference policy" in log
    assert "reference policy:" not in log
    assert "SimPO margin before the first step" in log  # its own, without a reference
