"""The algorithm: what must hold of the files of finished runs."""

import hashlib
import json
from dataclasses import replace

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
    made = stages_of(run)
    for name, notes in made.items():
        for source, fingerprint in notes["inputs"].items():
            assert made[source]["fingerprint"] == fingerprint, (name, source)


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
    for a, b in (
        ("round1/positives_teacher1", "round0/weak_labels"),
        ("round0/negatives_teacher1", "round0/weak_negatives"),
    ):
        files = [(run / name / "samples.jsonl").read_bytes() for name in (a, b)]
        assert files[0] == files[1]
        assert stages_of(run)[a]["fingerprint"] == stages_of(run)[b]["fingerprint"]


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
            names |= {
                f"round{t}/{part}_{agent}" for part in ("positives", "pairs", "reference")
            } | {f"round{t}/{agent}_pos"}
    names |= {f"round{t}/scores_student" for t in checks.rounds_of(run)}
    assert {
        name for name in stages_of(run) if not name.startswith(("data", "bases", "eval"))
    } == names


# ---- training -------------------------------------------------------------------------------


def test_contrastive_steps_continue_the_last_adapter_and_are_dpo_plus_sft(run):
    last = checks.rounds_of(run)[-1]
    for t, agent in ((1, "student"), (last, "student"), (1, "teacher2"), (last, "teacher1")):
        checks.check_prefer(run, t, agent)


def test_negative_agents_continue_their_positive_twin(run):
    checks.check_negative_student(run)
    checks.check_negative_teacher(run, "teacher2")


def test_naive_sft_continued_takes_as_many_steps_as_the_student(run):
    found = {
        name: notes["counts"]["steps"]
        for name, notes in stages_of(run).items()
        if "steps" in notes["counts"]
    }
    student = sum(found[f"round{t}/student_pos"] for t in checks.rounds_of(run))
    assert found["controls/continued"] == student > 0
    config = checks.settings_of(run)
    texts = list(checks.samples(run, "round0/weak_labels").values())
    checks.check_sft(
        run,
        "controls/continued",
        "student",
        run / "round0/student_pos",
        texts,
        "response",
        config["dpo"]["student_lr"],
        config["dpo"]["batch"],
        student,
    )


def test_the_ceiling_is_trained_like_the_student_but_on_the_truth(run):
    sft, d2 = checks.settings_of(run)["sft"], rows_of(run / "data/slices/d2.jsonl")
    notes = stages_of(run)["controls/ceiling"]
    assert (
        notes["settings"] | {"texts": ["samples.jsonl", "response"]}
        == stages_of(run)["round0/student_pos"]["settings"]
    )
    assert notes["counts"]["steps"] == sft["student_epochs"] * -(-len(d2) // sft["batch"])
    assert notes["settings"]["texts"] == ["d2.jsonl", "chosen"]


def test_small_micro_batches_do_not_change_a_step(stub):
    checks.check_accumulation(stub)


def test_bases_are_the_same_bits_after_everything(stub, tmp_path, monkeypatch):
    pools = []
    good = ModelPool.__init__

    def remember(self, *args, **kwargs):
        pools.append(self)
        good(self, *args, **kwargs)

    monkeypatch.setattr(ModelPool, "__init__", remember)
    again = variant_anew(stub, tmp_path)
    for name, notes in stages_of(again).items():
        if name.startswith("bases/"):
            for file, listed in notes["files"].items():
                assert (
                    hashlib.sha256((again / name / file).read_bytes()).hexdigest()
                    == listed["sha256"]
                )
                assert (again / name / file).read_bytes() == (stub / name / file).read_bytes()
    loaded = pools[-1].models
    assert len(loaded) == 3  # strong, weak1, weak2: all trained in this process
    files = [
        load_tensors(again / "bases" / name / "model.safetensors")[0]
        for name in ("strong", "weak1", "weak2")
    ]
    for entry in loaded.values():
        memory = {
            k.replace(".base.", "."): v
            for k, v in entry.model.state_dict().items()
            if ".lora_" not in k
        }
        assert any(
            memory.keys() == f.keys() and all(torch.equal(memory[k], f[k]) for k in f)
            for f in files
        )


# ---- other people's software ----------------------------------------------------------------


def test_every_adapter_works_in_peft(run):
    checks.check_adapters_work(run)


def test_bases_load_in_transformers_without_a_word(run, caplog):
    for folder in sorted((run / "bases").iterdir()):
        if folder.name == "tokenizer":
            continue
        model = checks.plain_model(folder)
        names = set(load_tensors(folder / "model.safetensors")[0])
        assert (
            names == set(model.state_dict())
            and model.generation_config.eos_token_id == checks.pieces_of(folder).eos_id()
        )
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


# ---- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["init", "previous"])
def test_other_references(stub, tmp_path, setting):
    """The student's reference may have found the perplexity already."""
    run = variant(stub, tmp_path, f"--dpo.reference={setting}", "--macpo.controls=false")
    checks.check_reference(run)
    known = {
        t
        for t in checks.rounds_of(run)
        if not stages_of(run)[f"round{t}/pairs_student"]["settings"]["scores_chosen"]
    }
    assert known == {t for t in checks.rounds_of(run) if t == 1 or setting == "previous"}
    margins = checks.margins_before_the_first_step(run)
    same = {f"round{t}/{a}_pos" for t, a in checks.updated(run) if t == 1 or setting == "previous"}
    assert max(abs(margins[name]) for name in same) < 1e-5
    assert all(abs(margins[name]) > 1e-5 for name in margins.keys() - same)


def test_margins_before_the_first_step_are_not_zero_against_the_base(stub):
    assert min(map(abs, checks.margins_before_the_first_step(stub).values())) > 1e-5


def test_one_teacher_needs_no_scores(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.teachers=1", "--macpo.controls=false")
    assert not list(run.glob("round*/scores_*")) and not (run / "bases/weak2").exists()
    for t in checks.rounds_of(run):
        said = checks.samples(run, f"round{t}/positives_teacher1")
        made = checks.pairs(run, t, "student")
        assert made and all(
            p["chosen"] == said[p["id"]]["response"] and p["chosen_by"] == "teacher1" for p in made
        )
    checks.check_order(run)
    checks.check_prefer(run, 1, "student")


def test_three_teachers_repeat_the_bases(stub, tmp_path):
    run = variant(
        stub, tmp_path, "--macpo.teachers=3", "--macpo.rounds=1", "--model.weak=8x1x2x16,16x1x2x16"
    )
    sizes = [
        json.loads((run / f"bases/weak{k}/config.json").read_text())["hidden_size"]
        for k in (1, 2, 3)
    ]
    assert sizes == [8, 16, 8]
    checks.check_filter(run)


def test_a_random_pick_needs_no_scores_and_takes_every_teacher(stub, tmp_path):
    run = variant(
        stub,
        tmp_path,
        "--macpo.select=random",
        "--world.d2=40",
        "--macpo.update_teachers=false",
        "--macpo.controls=false",
    )
    assert not list(run.glob("round*/scores_*"))
    checks.check_pairs_are_whole(run)
    chosen = [[p["chosen_by"] for p in checks.pairs(run, t, "student")] for t in (1, 2)]
    for names in chosen:
        assert set(names) == {"teacher1", "teacher2"} and 8 <= names.count("teacher1") <= 32
    assert chosen[0] != chosen[1]


def test_without_hard_negatives_only_the_sft_term_trains(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.hard_negatives=false", "--macpo.controls=false")
    for t, agent in ((1, "student"), (2, "teacher1")):
        checks.check_prefer(run, t, agent)
    assert all(name in stages_of(run) for name in ("round1/pairs_student", "round2/teacher2_pos"))
    # same pairs in round 1, another adapter from them
    assert (run / "round1/pairs_student/pairs.jsonl").read_bytes() == (
        stub / "round1/pairs_student/pairs.jsonl"
    ).read_bytes()
    assert not torch.equal(
        *(checks.adapter_tensors(r / "round1/student_pos").popitem()[1] for r in (run, stub))
    )


def test_frozen_teachers_stay_and_are_sampled_anew(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.update_teachers=false", "--macpo.controls=false")
    assert not list(run.glob("round[1-9]/teacher*")) and not list(
        run.glob("round[1-9]/pairs_teacher*")
    )
    checks.check_teachers_answer_before_their_update(run)
    for teacher in checks.teachers_of(run):
        answers = [
            (run / f"round{t}/positives_{teacher}/samples.jsonl").read_bytes() for t in (1, 2)
        ]
        assert answers[0] != answers[1]
        assert (run / f"round0/{teacher}_pos/adapter_model.safetensors").read_bytes() == (
            stub / f"round0/{teacher}_pos/adapter_model.safetensors"
        ).read_bytes()
    assert (run / "round1/student_pos/adapter_model.safetensors").read_bytes() == (
        stub / "round1/student_pos/adapter_model.safetensors"
    ).read_bytes()
    rows = json.loads((run / "eval/table.json").read_text())["rows"]
    assert [row["round"] for row in rows if row["agent"] == "teacher1"] == [0]
    checks.check_filter(run)
    checks.check_scores(run)


def test_without_mutual_positives_everybody_learns_its_own_fresh_answers(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.mutual_positives=false", "--macpo.controls=false")
    check_inputs_are_those_on_the_disk(run)
    assert not list(run.glob("round*/scores_*"))
    for t, agent in checks.updated(run):
        said = checks.samples(run, f"round{t}/positives_{agent}")
        made = checks.pairs(run, t, agent)
        assert made and all(
            p["chosen"] == said[p["id"]]["response"] and p["chosen_by"] == agent for p in made
        )
        checks.check_samples(
            run, f"round{t}/positives_{agent}", agent, run / f"round{t - 1}/{agent}_pos"
        )
    checks.check_negatives_are_cached(run)
    checks.check_prefer(run, 2, "student")


def test_refreshed_negatives(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.refresh_negatives=true", "--macpo.controls=false")
    check_inputs_are_those_on_the_disk(run)
    for agent in checks.agents_of(run):
        first, second = (checks.pairs(run, t, agent) for t in (1, 2))
        fresh = checks.samples(run, f"round1/negatives_{agent}")
        old = checks.samples(run, f"round0/negatives_{agent}")
        assert all(p["rejected"] == old[p["id"]]["response"] for p in first)
        assert all(p["rejected"] == fresh[p["id"]]["response"] for p in second)
        assert [p["rejected"] for p in first] != [p["rejected"] for p in second]
        checks.check_samples(run, f"round1/negatives_{agent}", agent, run / f"round1/{agent}_neg")
    checks.check_reference(run)
    assert not list(run.glob("round2/*_neg")) and not list(run.glob("round2/negatives_*"))
    config = checks.settings_of(run)["sft"]
    texts = list(checks.samples(run, "round0/weak_negatives").values())
    checks.check_sft(
        run,
        "round1/student_neg",
        "student",
        run / "round1/student_pos",
        texts,
        "response",
        config["student_negative_lr"],
        config["batch"],
        -(-12 // config["batch"]),
    )


def test_no_rounds_at_all(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.rounds=0")
    assert stages_of(run)["controls/continued"]["counts"]["steps"] == 0
    for key, tensor in checks.adapter_tensors(run / "controls/continued").items():
        assert torch.equal(tensor, checks.adapter_tensors(run / "round0/student_pos")[key])


def test_without_controls(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.controls=false", "--macpo.rounds=1")
    assert not (run / "controls").exists() and not list(run.glob("eval/*ceiling*"))
    rows = json.loads((run / "eval/table.json").read_text())["rows"]
    assert {row["agent"] for row in rows} == {"student", "teacher1", "teacher2"}


# ---- answers that cannot be used ------------------------------------------------------------


def change_answers(monkeypatch, change) -> None:
    """Every sampled answer becomes what `change` makes of the sampler and the sample."""
    good = Sampler.__call__

    def sample_changed(self, *args):
        return [replace(sample, response=change(self, sample)) for sample in good(self, *args)]

    monkeypatch.setattr(Sampler, "__call__", sample_changed)


def test_empty_and_equal_answers_are_left_out_and_counted(stub, tmp_path, monkeypatch):
    def sometimes_nothing(sampler, sample):
        agent = sample.agent
        number = int(sample.id, 16)
        text = sample.response
        if agent.startswith("teacher") and number % 4 == 0:
            text = ""  # nobody has an answer; also the teachers' own negatives
        if agent == "teacher1" and number % 4 == 1:
            text = ""
        if agent in ("student", "student_neg") and number % 4 == 2:
            text = "the same"
        if agent == "student_neg" and number % 4 == 3:
            text = ""
        return text

    change_answers(monkeypatch, sometimes_nothing)
    run = variant_anew(
        stub, tmp_path, "--world.d2=40", "--macpo.rounds=1", "--macpo.controls=false"
    )
    checks.check_order(run)
    checks.check_pairs_are_whole(run)
    checks.check_filter(run)
    d2 = [int(row["id"], 16) % 4 for row in rows_of(run / "data/slices/d2.jsonl")]
    counts = stages_of(run)["round1/pairs_student"]["counts"]
    assert counts["all_empty"] == d2.count(0) > 0 and counts["negative_empty"] == d2.count(3) > 0
    assert (
        counts["pairs"]
        == d2.count(1) + d2.count(2)
        == counts["chosen_teacher1"] + counts["chosen_teacher2"]
    )
    assert stages_of(run)["round0/student_pos"]["counts"]["empty"] == d2.count(0) + d2.count(1)
    assert stages_of(run)["round0/weak_labels"]["counts"]["empty"] == d2.count(0) + d2.count(1)
    log = (run / "log.txt").read_text()
    lost = 40 - counts["pairs"]
    reasons = f"(all_empty {d2.count(0)}, negative_empty {d2.count(3)})"
    assert f"WARNING: {lost} of 40 rows were dropped {reasons}" in log


def test_equal_negatives_are_dropped_counted_and_warned_of(stub, tmp_path, monkeypatch):
    change_answers(
        monkeypatch,
        lambda sampler, sample: "the same" if int(sample.id, 16) % 2 else sample.response,
    )
    run = variant_anew(stub, tmp_path, "--macpo.rounds=1", "--macpo.controls=false")
    odd = sum(int(row["id"], 16) % 2 for row in rows_of(run / "data/slices/d2.jsonl"))
    for agent in checks.agents_of(run):
        counts = stages_of(run)[f"round1/pairs_{agent}"]["counts"]
        assert counts["negative_equal"] == odd > 1 and counts["pairs"] == 12 - odd
    assert (run / "log.txt").read_text().count("WARNING") == 3
    table = json.loads((run / "eval/table.json").read_text())
    assert len([w for w in table["warnings"] if "equal their positive" in w]) == 3


def longer(monkeypatch, tokens: int, share: int) -> None:
    """Every `share`th prompt is answered at such length that prompt and answer have `tokens`
    tokens.
    """

    def talkative(sampler, sample):
        if int(sample.id, 16) % share:
            return sample.response or "x"
        text = "no " if sample.agent.endswith("_neg") else "yes "
        while len(sampler.loaded.render(sample.prompt, text).ids) < tokens:
            text += "z"
        return text

    change_answers(monkeypatch, talkative)


@pytest.mark.parametrize(("share", "warned"), [(2, True), (40, False)])
def test_over_long_answers_are_dropped_counted_and_warned_of(
    stub, tmp_path, monkeypatch, share, warned
):
    """Longer than data.max_length, yet within the model's context."""
    longer(monkeypatch, 100, share)
    run = variant_anew(
        stub, tmp_path, "--world.d2=40", "--macpo.rounds=1", "--macpo.controls=false"
    )
    long = sum(int(row["id"], 16) % share == 0 for row in rows_of(run / "data/slices/d2.jsonl"))
    lines = (run / "log.txt").read_text().splitlines()
    for name in ("round0/student_pos", "round1/pairs_student", "round1/pairs_teacher1"):
        assert stages_of(run)[name]["counts"]["over_long"] == long
        mine = [line for line in lines if f"] {name}  " in line]
        assert f"over_long {long}" in mine[-1]
        said = [line for line in mine if "WARNING" in line]
        assert bool(said) == warned == (long > 4) and all(
            f"{long} of 40 rows were dropped (over_long {long})" in line for line in said
        )
    assert (long > 0) or not warned


def test_a_text_longer_than_the_context_is_not_scored(stub, tmp_path, monkeypatch):
    """It never wins the filter, and is counted; a pair that it is left in is dropped."""
    longer(monkeypatch, 150, 2)
    run = variant_anew(stub, tmp_path, "--macpo.rounds=1", "--macpo.controls=false")
    rows = rows_of(run / "round1/scores_student/teacher1.jsonl")
    long = [row for row in rows if int(row["id"], 16) % 2 == 0]
    assert long and all(row["logp"] is None and row["perplexity"] > 1e29 for row in long)
    assert all(row["logp"] < 0 for row in rows if row not in long)
    both = 2 * len(long)  # teacher2's answers to these prompts are as long
    assert stages_of(run)["round1/scores_student"]["counts"]["over_long"] == both
    assert (
        f"WARNING: {both} of {2 * len(rows)} texts are longer than the context"
        in (run / "log.txt").read_text()
    )
    assert not {row["id"] for row in rows_of(run / "round1/pairs_student/pairs.jsonl")} & {
        row["id"] for row in long
    }


def test_a_random_pick_counts_every_prompt(stub, tmp_path, monkeypatch):
    def silent(sampler, sample):
        quiet = {"teacher1": (0, 1), "teacher2": (0,)}.get(sample.agent, ())
        return "" if int(sample.id, 16) % 4 in quiet else sample.response or "x"

    change_answers(monkeypatch, silent)
    run = variant_anew(
        stub,
        tmp_path,
        "--macpo.select=random",
        "--world.d2=40",
        "--macpo.rounds=1",
        "--macpo.update_teachers=false",
        "--macpo.controls=false",
    )
    kinds = [int(row["id"], 16) % 4 for row in rows_of(run / "data/slices/d2.jsonl")]
    counts = stages_of(run)["round1/pairs_student"]["counts"]
    assert counts["all_empty"] == kinds.count(0) > 0
    assert counts["chosen_teacher2"] >= kinds.count(1) - counts["negative_equal"] > 0
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
    made = {}
    for name, more in [("plain", []), *BEYOND.items()]:
        train(write_stub(root), f"--run.root={root / 'runs'}", f"--run.name={name}", *flags, *more)
        made[name] = root / "runs" / name
    return made


def test_each_setting_makes_another_student_and_no_two_the_same(beyond):
    found = {
        name: checks.adapter_tensors(run / "round1/student_pos") for name, run in beyond.items()
    }
    flat = {
        name: torch.cat([tensors[key].flatten() for key in sorted(tensors)])
        for name, tensors in found.items()
    }
    for name, values in flat.items():
        for other, more in flat.items():
            assert name == other or not torch.equal(values, more), (name, other)


def test_negatives_are_whose_they_should_be(beyond):
    places = {
        "plain": "round0/negatives_student",
        "other": "round0/negatives_teacher1",
        "previous": "round1/previous_student",
        "persona": "round0/persona_student",
        "tail": "round1/tail_student",
        "contrastive": "round1/contrastive_student",
    }
    for name, place in places.items():
        said = checks.samples(beyond[name], place)
        made = checks.pairs(beyond[name], 1, "student")
        assert made and all(p["rejected"] == said[p["id"]]["response"] for p in made), name
        assert {p["rejected_by"] for p in made} == {next(iter(said.values()))["agent"]}, name
    asked = checks.samples(beyond["persona"], "round0/persona_student")
    assert all(
        row["prompt"][-1] == {"role": "tag", "content": "a gossip speaks"} for row in asked.values()
    )
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
    assert (
        "rejected answers of round 1"
        in warnings([{"agent": "a", "wrong": 0.1, "equal": [], "rejected": True}])[0]
    )


def test_every_offer_counts_once(beyond):
    prompts = 12
    counts = {
        name: stages_of(run)["round1/pairs_student"]["counts"] for name, run in beyond.items()
    }
    for name, found in counts.items():
        dropped = sum(
            found[k] for k in ("all_empty", "negative_empty", "negative_equal", "over_long")
        )
        wanted = 3 * prompts if name == "all" else prompts
        assert found["pairs"] + dropped + found.get("not_kept", 0) == wanted, name
    assert counts["keep"]["not_kept"] == 6
    said = rows_of(beyond["answers"] / "round1/positives_teacher2/samples.jsonl")
    assert len(said) == 2 * prompts and len({row["id"] for row in said}) == prompts
    assert [row["id"] for row in said[::2]] == [row["id"] for row in said[1::2]]
    weights = [p["weight"] for p in checks.pairs(beyond["weights"], 1, "student")]
    assert np.mean(weights) == pytest.approx(1) and len(set(weights)) > 3
    assert all(p["weight"] is None for p in checks.pairs(beyond["plain"], 1, "student"))


def test_the_share_of_own_positives_is_the_student_s(beyond):
    found = [p["chosen_by"] for p in checks.pairs(beyond["self"], 1, "student")]
    assert 0 < found.count("student") < len(found)


def test_agreement_is_what_the_other_teachers_say(beyond):
    """Two of three teachers score an answer, never its author."""
    names = {n.partition("/")[2] for n in stages_of(beyond["agreement"]) if "/agreement_" in n}
    assert names == {
        f"agreement_teacher{a}_teacher{b}" for a in (1, 2, 3) for b in (1, 2, 3) if a != b
    }
    assert not [n for n in stages_of(beyond["agreement"]) if "/scores_" in n]


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
    [["--macpo.negatives=previous"], ["--macpo.self_fraction=0.25", "--macpo.negatives=tail"]],
)
def test_every_stage_stands_on_the_inputs_that_it_names(stub, tmp_path, flags):
    """Also with negatives that a round takes from the last one, or that it samples itself."""
    run = variant(stub, tmp_path, *flags, "--macpo.controls=false")
    check_inputs_are_those_on_the_disk(run)


def test_with_own_positives_mixed_in_teachers_learn_from_the_updated_student(stub, tmp_path):
    run = variant(stub, tmp_path, "--macpo.self_fraction=0.5", "--macpo.controls=false")
    made = stages_of(run)
    check_inputs_are_those_on_the_disk(run)
    assert "round0/student_pos" in made["round1/own_student"]["inputs"]
    assert "round1/student_pos" in made["round1/positives_student"]["inputs"]
    assert {"round1/own_student", "round1/positives_teacher1"} <= made["round1/pairs_student"][
        "inputs"
    ].keys()
    assert {"round1/positives_student", "round1/positives_teacher1"} <= made[
        "round1/pairs_teacher1"
    ]["inputs"].keys()


def test_a_name_that_stands_for_two_stages_is_a_defect_that_shows(tmp_path):
    run = Run(parse(["@tiny", f"--run.root={tmp_path}"]).config)
    run.stage("a/b", "x/1", {}, [], lambda work: {})
    run.stage("a/b", "x/1", {}, [], lambda work: {})
    with pytest.raises(RuntimeError, match="a/b"):
        run.stage("a/b", "x/1", {"other": 1}, [], lambda work: {})


def test_a_prompt_without_a_negative_is_left_out_and_counted(stub, tmp_path, monkeypatch):
    """A tagged prompt can be too long for a base that has room for the plain one."""
    good_tags = ai_feedback.add_tags

    def longer(*args):
        groups = good_tags(*args)
        (first,) = groups[0]
        groups[0] = [replace(first, prompt=(Message("user", "long " * 200), *first.prompt[1:]))]
        return groups

    monkeypatch.setattr(ai_feedback, "add_tags", longer)
    run = variant_anew(stub, tmp_path, "--macpo.negatives=persona", "--macpo.controls=false")
    all_counts = [notes["counts"] for name, notes in stages_of(run).items() if "/pairs_" in name]
    assert all_counts
    for counts in all_counts:
        assert counts["no_negative"] == 1
        dropped = sum(
            counts[reason]
            for reason in ("all_empty", "negative_empty", "negative_equal", "over_long")
        )
        assert counts["pairs"] + dropped + 1 == 12


# ---- losses without a reference ---------------------------------------------------------------


def test_a_loss_without_a_reference_scores_and_stores_none(stub, tmp_path):
    run = variant(stub, tmp_path, "--dpo.loss=simpo", "--macpo.rounds=1", "--macpo.controls=false")

    assert not [name for name in stages_of(run) if "/reference_" in name]
    for agent in checks.agents_of(run):
        pairs = checks.pairs(run, 1, agent)
        assert pairs
        assert all(pair["ref_chosen_logps"] is None for pair in pairs)
        assert all(pair["ref_rejected_logps"] is None for pair in pairs)
    log = (run / "log.txt").read_text()
    assert "loss: SimPO + SFT, without a reference policy" in log and "reference policy:" not in log
    assert "SimPO margin before the first step" in log  # its own, without a reference
