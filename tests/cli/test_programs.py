"""sample.py and eval.py on finished runs; train.py on files; the table against the files."""

import html
import itertools
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import checks
import numpy as np
import pytest
import torch
from conftest import shared
from runs import (
    REPOSITORY,
    change_json,
    copy_run,
    flip_bits,
    invoke,
    rows_of,
    spawn,
    stages_of,
    train,
    write_stub,
)
from test_bad_input import HH, check_sentence, data_file, put_back, refused, row, tree
from transformers import LlamaForCausalLM

from minmacpo import UserError
from minmacpo.cli.chat import CUT_MARK
from minmacpo.config.parse import agent_settings, resolve_checkpoint
from minmacpo.config.schema import Config
from minmacpo.core import checkpoint
from minmacpo.data import synthetic as world
from minmacpo.data.records import Pair
from minmacpo.evaluation import charts
from minmacpo.evaluation import table as table_module
from minmacpo.evaluation.bootstrap import mean_interval
from minmacpo.evaluation.charts import Point
from minmacpo.evaluation.finished_run import agent_label, read_run
from minmacpo.evaluation.gold import gold_by_prompt
from minmacpo.evaluation.report import write_report
from minmacpo.evaluation.table import make_table, warnings
from minmacpo.pipeline import base_models as bases
from minmacpo.pipeline import open_model, prepare_data
from minmacpo.pipeline.open_model import open_agent
from minmacpo.runtime.files import read_rows


def sample(*words) -> str:
    """What sample.py prints, which must succeed."""
    ended = invoke("sample", *words)
    assert ended.code == 0, ended.err
    return ended.out


def first_prompts(run: Path, count: int) -> list[str]:
    """The first prompts of a run's test split."""
    rows = rows_of(run / "data/slices/test.jsonl")[:count]
    return [row["prompt"][0]["content"] for row in rows]


# ---- sample.py ------------------------------------------------------------------------------


def test_an_adapter_and_a_base_answer(tiny, place):
    prompts = first_prompts(tiny, 4)
    adapter_answers = [sample(tiny / "round2/student_pos", prompt) for prompt in prompts]
    base_answers = [sample(tiny / "bases/strong", prompt) for prompt in prompts]
    for answer in adapter_answers:
        assert answer.strip()
    assert adapter_answers != base_answers
    assert sample(tiny / "round2/student_pos", prompts[0]) == adapter_answers[0]
    assert list(place.iterdir()) == []


def test_an_answer_that_was_cut_says_so(tiny, place):
    (prompt,) = first_prompts(tiny, 1)
    words = [tiny / "round2/student_pos", prompt, "--generate.temperature=0"]
    whole = sample(*words)
    cut = sample(*words, "--generate.max_new_tokens=2")
    assert CUT_MARK not in whole
    assert cut.endswith(f"{CUT_MARK}\n")
    assert whole.startswith(cut.removesuffix(f"{CUT_MARK}\n"))


def test_greedy_answers_are_those_of_peft(tiny, place):
    prompts = first_prompts(tiny, 4)
    (place / "prompts.txt").write_text("\n".join(prompts) + "\n")
    folder = tiny / "round1/teacher2_pos"
    sample(folder, "--prompts", "prompts.txt", "--out", "answers.jsonl", "--generate.temperature=0")
    answers = rows_of(place / "answers.jsonl")
    assert [answer["prompt"][0]["content"] for answer in answers] == prompts

    base = checks.base_of(tiny, "teacher2")
    model = checks.peft_model(base, folder)
    end = checks.pieces_of(base).eos_id()
    for answer in answers:
        ids = checks.prompt_ids(base, answer["prompt"])
        generated = model.generate(
            input_ids=torch.tensor([ids]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
        )
        assert answer["tokens"] == generated[0, len(ids) :].tolist()


def test_prompts_in_a_file_as_text_and_as_json(stub, place):
    (place / "p.txt").write_text('where is it ?\n{"prompt": "what {is} it ?"}\n')
    words = [stub / "round1/student_pos", "--prompts=p.txt"]
    out = sample(*words, "--out=a.jsonl", "--run.seed=3")
    assert "a.jsonl" in out
    rows = rows_of(place / "a.jsonl")
    prompts = [row["prompt"][0]["content"] for row in rows]
    assert prompts == ["where is it ?", "what {is} it ?"]

    sample(*words, "--out=b.jsonl", "--run.seed=3")
    sample(*words, "--out=c.jsonl", "--run.seed=4")
    assert rows_of(place / "b.jsonl") == rows
    assert rows_of(place / "c.jsonl") != rows


def test_an_export_is_the_adapter_merged_into_its_base(tiny, place):
    base = tiny / "bases/strong"
    adapter = tiny / "round2/student_pos"
    sample(adapter, "--export", "merged")
    ids = checks.prompt_ids(base, [{"role": "user", "content": "where is it ?"}])
    merged = LlamaForCausalLM.from_pretrained(place / "merged")
    with torch.no_grad():
        merged_logits = merged(input_ids=torch.tensor([ids])).logits
        adapter_logits = checks.peft_model(base, adapter)(input_ids=torch.tensor([ids])).logits
    assert (merged_logits - adapter_logits).abs().max() < 1e-4

    words = ["where is it ?", "--generate.temperature=0", "--generate.max_new_tokens=8"]
    assert sample("merged", *words) == sample(adapter, *words)


def test_a_moved_run_still_answers(stub, place):
    """Adapters name their base relative to themselves."""
    copy_run(stub, place / "elsewhere")
    assert sample(place / "elsewhere/stub/round1/teacher1_pos", "hello") is not None


def write_template(base: Path, template: str) -> None:
    """Say in a base's stage.json that it has read dialogues in this template."""
    notes = json.loads((base / "stage.json").read_text())
    settings = notes["settings"] | {"template": template}
    change_json(base / "stage.json", settings=settings)


def test_a_base_is_asked_in_the_template_it_has_read(stub, place):
    """Not in that of its tokenizer, which always has the marks of turns."""
    folder = place / "strong"
    shutil.copytree(stub / "bases/strong", folder, copy_function=shutil.copyfile)

    def template(flags):
        config, loaded, _ = open_agent(folder, agent_settings(folder, flags), flags)
        assert config.data.template == (loaded.template,)
        return loaded.template

    assert template({}) == "turns"
    write_template(folder, "plain")
    assert template({}) == "plain"
    assert template({"data.template": "turns"}) == "turns"


def test_an_adapter_of_no_run_speaks_as_its_base_has_read(stub, place):
    run = copy_run(stub, place, ("bases", "round1"))
    write_template(run / "bases/strong", "plain")
    folder = run / "round1/student_pos"
    assert open_model.open_folder(folder, Config()).loaded.template == "turns"
    (folder / "stage.json").unlink()
    assert open_model.open_folder(folder, Config()).loaded.template == "plain"


def test_a_run_stands_for_its_last_student(stub, place):
    run = copy_run(stub, place)
    words = ["where is it ?", "--generate.temperature=1"]
    assert sample(run, *words) == sample(run / "round2/student_pos", *words)
    shutil.copytree(run / "round1/student_pos", run / "round10/student_pos")
    assert resolve_checkpoint(run) == run / "round10/student_pos"
    shutil.copytree(run / "round1/student_pos", run / "final/student_pos")
    assert resolve_checkpoint(run) == run / "final/student_pos"
    (run / "final/student_pos/stage.json").unlink()
    (run / "round10/student_pos/stage.json").unlink()
    assert resolve_checkpoint(run) == run / "round2/student_pos"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_odd_end_tokens_are_refused(stub, place, file):
    odd = place / "odd"
    shutil.copytree(stub / "bases/strong", odd, copy_function=shutil.copyfile)
    for end in ("2", [1, "x"], {"a": 1}, 2.0):
        change_json(odd / file, eos_token_id=end)
        ended = invoke("sample", odd, "hello")
        assert ended.code == 2
        assert "eos_token_id" in ended.err
        with pytest.raises(UserError, match="eos_token_id"):
            checkpoint.check_model_folder(odd)


def test_half_a_surrogate_pair_is_no_prompt(stub, place):
    agent = stub / "round1/student_pos"
    ended = invoke("sample", agent, "a\ud800b")
    assert ended.code == 2
    assert "no valid text" in ended.err

    file = place / "p.jsonl"
    words = [agent, "--prompts=p.jsonl", "--out=o"]
    file.write_text('{"prompt": "a\\ud800b"}\n')
    assert invoke("sample", *words).code == 2
    file.write_text("")
    assert "no usable row" in invoke("sample", *words).err
    assert not (place / "o").exists()


def test_a_long_answer_is_asked_of_a_short_prompt(stub, place):
    agent = stub / "round1/student_pos"
    sample(agent, "hello", "--generate.max_new_tokens=90")
    assert "room" in invoke("sample", agent, "hello", "--generate.max_new_tokens=999").err


def test_given_bases_are_told_apart_by_every_byte(stub, place):
    config = Config()
    data = replace(config.data, max_prompt_length=40, max_length=60)
    config = replace(config, data=data, generate=replace(config.generate, max_new_tokens=10))

    def fingerprint(folder: Path) -> str:
        return bases.external_base(config, "strong", folder).stage.fingerprint

    for name in ("one", "two"):
        shutil.copytree(stub / "bases/strong", place / name, copy_function=shutil.copyfile)
    assert fingerprint(place / "one") == fingerprint(place / "two")
    weights = place / "two/model.safetensors"
    flip_bits(weights, weights.stat().st_size // 2, 1)
    assert fingerprint(place / "one") != fingerprint(place / "two")


def test_a_real_model(place):
    words = ["--generate.temperature=0", "--generate.max_new_tokens=20"]
    answer = sample(shared("weights/stories260K-hf"), "Once upon a time", *words)
    assert answer.strip()


class Kept(Exception):
    """Carries the settings that sample.py would answer with."""


def settings_used(monkeypatch, *words):
    """The settings with which sample.py opens a folder."""

    def open_folder(folder, config, template):
        raise Kept(config)

    with monkeypatch.context() as patch:
        patch.setattr(open_model, "open_folder", open_folder)
        with pytest.raises(Kept) as caught:
            invoke("sample", *words)
    return caught.value.args[0]


def test_the_settings_are_those_of_the_run_that_the_folder_is_a_stage_of(stub, place, monkeypatch):
    run = copy_run(stub, place / "runs", ("bases", "round1"))
    settings = (stub / "config.toml").read_text()
    assert 'max_examples = "none"' in settings
    settings = settings.replace('max_examples = "none"', "max_examples = 3")
    (run / "config.toml").write_text(settings)
    used = settings_used(monkeypatch, run / "round1/student_pos", "hello")
    assert used.data.max_examples is None

    for stage in ("bases/strong", "round1/student_pos"):
        used = settings_used(monkeypatch, run / stage, "hello")
        assert used.generate.max_new_tokens == 12
        monkeypatch.chdir(run / stage)
        used = settings_used(monkeypatch, ".", "hello")
        assert used.generate.max_new_tokens == 12
        used = settings_used(monkeypatch, ".", "hello", "--generate.max_new_tokens=5")
        assert used.generate.max_new_tokens == 5


def test_no_other_config_toml_counts(stub, place, monkeypatch):
    run = copy_run(stub, place / "a/b/runs", ("bases", "round1"))
    agent = run / "round1/student_pos"
    for folder in (place, place / "a", place / "a/b", run.parent, run / "round1", agent):
        (folder / "config.toml").write_text("[other]\nprogram = 'settings'\n")
    assert settings_used(monkeypatch, agent, "hello").generate == Config().generate

    model = place / "a/b/model"
    shutil.copytree(run / "bases/strong", model, ignore=shutil.ignore_patterns("stage.json"))
    assert settings_used(monkeypatch, model, "hello").generate == Config().generate


def test_threads_of_an_answer(stub, place):
    agent = stub / "round1/student_pos"
    threads = torch.get_num_threads()
    try:
        words = ["--run.threads=2", "--run.device=cpu", "--run.dtype=float32"]
        sample(agent, "hello", *words)
        assert torch.get_num_threads() == 2
        sample(agent, "hello")
        assert torch.get_num_threads() == 1  # the run's
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)]
)
def test_an_export_is_whole_or_absent(stub, place, monkeypatch, stop, code):
    save_tensors = checkpoint.save_tensors
    words = [stub / "round1/student_pos", "--export", place / "new/merged"]

    def torn(path, tensors, *rest):
        save_tensors(path, tensors, *rest)
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", torn)
        assert invoke("sample", *words).code == code
    assert list((place / "new").iterdir()) == []

    sample(*words)
    assert [path.name for path in (place / "new").iterdir()] == ["merged"]
    files = {path.name for path in (place / "new/merged").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.model"}


def test_a_killed_export_leaves_nothing_under_its_name(stub, place):
    """A process of its own, killed while it writes the weights; the same words then work."""
    code = f"""
import os
import signal
import sys

sys.path.insert(0, {str(REPOSITORY)!r})
import sample
from minmacpo.core import checkpoint

checkpoint.save_tensors = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
sample.main(sys.argv[1:])
"""
    words = [str(stub / "round1/student_pos"), "--export", "merged"]
    killed = subprocess.run([sys.executable, "-c", code, *words], cwd=place)
    assert killed.returncode == -signal.SIGKILL
    assert not (place / "merged").exists()
    assert list(place.iterdir()) != []
    sample(*words)
    assert (place / "merged/model.safetensors").is_file()


def stopped(monkeypatch, capsys, name: str, *words) -> str:
    """What a program says when Ctrl-C comes while it works."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / f"{name}.py"), run_name="__main__")
    assert caught.value.code == 130
    return capsys.readouterr().err


def test_each_program_says_what_is_true_after_ctrl_c(stub, place, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(open_model, "open_folder", interrupt)
    monkeypatch.setattr(table_module, "make_table", interrupt)
    monkeypatch.setattr(prepare_data, "given_renderers", interrupt)

    message = stopped(monkeypatch, capsys, "sample", stub / "round1/student_pos", "hello")
    assert "nothing half-written" in message
    assert "goes on" not in message
    assert "is saved" not in message

    message = stopped(monkeypatch, capsys, "eval", stub)
    assert "only reads" in message
    assert "goes on" not in message
    assert "is saved" not in message

    message = stopped(monkeypatch, capsys, "train", write_stub(place), "--dry_run")
    assert "goes on from here" in message


AGENT = "RUN/round1/student_pos"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "PATH"),
        (["nowhere", "hello"], "nowhere"),
        (["EMPTY", "hello"], "no student of this run is finished"),
        ([AGENT, ""], "PROMPT is empty"),
        ([AGENT, "hello", "--n=0"], "--n=0"),
        ([AGENT, "--n=2"], "PROMPT"),
        ([AGENT, "hello", "--prompts=good.txt", "--out=x"], "PROMPT"),
        ([AGENT, "--prompts=good.txt", "--out=EMPTY"], "no ordinary file"),
        ([AGENT, "--prompts=EMPTY", "--out=x"], "no .jsonl or .json file"),
        (
            [AGENT, "--prompts=long.txt", "--out=x"],
            "no prompt is left; 1 over-long prompt",
        ),
        (
            [
                AGENT,
                "--prompts=long.txt",
                "--out=x",
                "--data.truncation_mode=raise",
            ],
            "too long",
        ),
        (["RUN/round1", "hello"], "no model"),
        (["RUN/round1/pairs_student", "hello"], "no model"),
        (["RUN/config.toml", "hello"], "model folder"),
        (["RUN/bases/tokenizer", "hello"], "no model"),
        ([AGENT, "--prompts=none.txt", "--out=x"], "none.txt"),
        ([AGENT, "--prompts=bad.txt", "--out=x"], "bad.txt, line 2"),
        ([AGENT, "--prompts=empty.txt", "--out=x"], "empty.txt"),
        ([AGENT, "--prompts=latin.txt", "--out=x"], "latin.txt, line 1"),
        ([AGENT, "--prompts=bad.txt"], "--out"),
        ([AGENT, "hello", "--out=x"], "--prompts"),
        ([AGENT, "--prompts=good.txt", "--out=good.txt"], "good.txt"),
        (
            [AGENT, "--prompts=good.txt", "--out=no/such/folder/x"],
            "no/such/folder",
        ),
        ([AGENT, "--export=good.txt"], "good.txt"),
        ([AGENT, "hello", "--generate.temprature=1"], "generate.temperature"),
        ([AGENT, "hello", "--generate.temperature=hot"], "number"),
        ([AGENT, "hello", "--generate.top_p=0"], "top_p"),
        ([AGENT, "hello", "--dpo.beta=1"], "dpo.beta"),
        ([AGENT, "hello", "--run.name=x"], "--run.name"),
        ([AGENT, "hello", "--run.save_every=3"], "--run.save_every"),
        ([AGENT, "hello", "--run.sead=3"], "run.seed"),
        ([AGENT, "hello", "--run.seed"], "--run.seed"),
        ([AGENT, "hello", "--run.seed="], "whole number"),
        ([AGENT, "hello", "--loud"], "--loud"),
        ([AGENT, "word " * 300], "tokens"),
        ([AGENT, "hello", "there"], "there"),
    ],
)
def test_sample_on_bad_input(stub, place, words, says):
    (place / "EMPTY").mkdir()
    shutil.copy(stub / "config.toml", place / "EMPTY")
    (place / "bad.txt").write_text("hello\n{\n")
    (place / "long.txt").write_text("word " * 300)
    (place / "good.txt").write_text("hello\n")
    (place / "empty.txt").write_text("\n")
    (place / "latin.txt").write_bytes(b"\xe9\n")
    words = [word.replace("RUN", str(stub)) for word in words]
    assert says in refused(place, *words, program="sample")


def test_sample_on_damaged_folders(stub, place):
    copy_run(stub, place, ("bases", "round1"))
    folder = place / "stub/round1/student_pos"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with put_back(folder / name) as content:
            for broken in (content[: len(content) // 2], b"", b"[]"):
                (folder / name).write_bytes(broken)
                assert str(folder) in refused(place, folder, "hello", program="sample")
    shutil.rmtree(place / "stub/bases/strong")
    assert "bases/strong" in refused(place, folder, "hello", program="sample")


# ---- eval.py --------------------------------------------------------------------------------


def test_the_table_again_from_the_disk(stub, tmp_path):
    run = copy_run(stub, tmp_path / "runs")
    printed = train(write_stub(tmp_path), f"--run.root={run.parent}").out
    before = tree(stub)
    for words in ([stub], ["table", stub]):
        ended = invoke("eval", *words)
        assert ended.code == 0
        assert ended.out.strip() in printed
    table = json.loads(invoke("eval", stub, "--json").out)
    assert table == json.loads((stub / "eval/table.json").read_text())
    assert tree(stub) == before


SMALL_RUN = ("--macpo.teachers=1", "--macpo.rounds=1", "--macpo.controls=false")


def test_runs_side_by_side(tmp_path):
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", *SMALL_RUN]
    own_positives = "--macpo.mutual_positives=false"
    for more in ([], [own_positives], ["--run.seed=1"], [own_positives, "--run.seed=1"]):
        train(*words, *more)
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 4

    rows = json.loads(invoke("eval", "compare", *runs, "--json").out)
    names = [
        "stub-macpo.teachers=1-rounds=1-controls=false",
        "stub-macpo.teachers=1-rounds=1-mutual_positives=false-controls=false",
    ]
    assert [row["method"] for row in rows] == names
    assert [row["seeds"] for row in rows] == [[0, 1], [0, 1]]

    # each number is the mean over the seeds of what the runs themselves say
    for compared in rows:
        for t in (0, 1):
            golds = []
            for name in (compared["method"], f"{compared['method']}-seed=1"):
                run = read_run(tmp_path / "runs" / name)
                golds.append(gold_by_prompt(run, "student", t).mean())
            assert compared["by_round"][str(t)] == pytest.approx(np.mean(golds))
        assert compared["student"] == pytest.approx(compared["by_round"]["1"])
    difference = rows[1]["student"] - rows[0]["student"]
    assert rows[1]["student_difference"] == pytest.approx(difference)
    low, high = rows[1]["student_interval"]
    assert low <= rows[1]["student_difference"] <= high
    assert names[1] in invoke("eval", "compare", *runs).out

    page = tmp_path / "side.html"
    assert invoke("eval", "compare", *runs, f"--page={page}").code == 0
    text = page.read_text()
    for compared in rows:
        assert compared["method"] in text
        assert f"{compared['student']:.3f}" in text
    assert "<svg" in text
    assert "$" not in text
    again = invoke("eval", "compare", *runs, f"--page={page}")
    assert "not overwritten" in again.err
    assert page.read_text() == text
    assert invoke("eval", "compare", *runs, "--page=").code == 2
    assert invoke("eval", runs[0], "--page=x").code == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere"),
        (["RUN/round1"], "no run folder"),
        (["RUN/config.toml"], "no run folder"),
        (["RUN", "RUN"], "one run"),
        (["compare", "RUN"], "two"),
        (["compare", "RUN", "nowhere"], "nowhere"),
        (["RUN", "--jsn"], "--jsn"),
        (["compare", "RUN", "EMPTY"], "EMPTY"),
        (["EMPTY"], "EMPTY"),
        (["BROKEN"], "BROKEN"),
    ],
)
def test_eval_on_bad_input(stub, place, words, says):
    for name in ("EMPTY", "BROKEN"):
        (place / name).mkdir()
        shutil.copy(stub / "config.toml", place / name)
    (place / "BROKEN/eval/round0_student_samples").mkdir(parents=True)
    (place / "BROKEN/eval/round0_student_samples/stage.json").write_text("{")
    words = [word.replace("RUN", str(stub)) for word in words]
    assert says in refused(place, *words, program="eval")


def test_help_of_the_other_programs():
    for name in ("sample", "eval"):
        process = spawn(name, "--help")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "RUN" in out.upper()
        assert err == ""


# ---- the numbers in the table ---------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the right and of the worse answers to the test prompts."""

    truth: list[dict]
    worse: list[dict]

    def margins(self) -> np.ndarray:
        right = np.array([row["logp"] for row in self.truth])
        wrong = np.array([row["logp"] for row in self.worse])
        return right - wrong


def read_scores(run: Path, prefix: str) -> Scores:
    """The scores that a run has under this beginning of the names of two stages."""
    truth = rows_of(run / f"eval/{prefix}_truth/scores.jsonl")
    worse = rows_of(run / f"eval/{prefix}_worse/scores.jsonl")
    return Scores(truth, worse)


def test_the_table_says_how_many_agents_there_are(tiny):
    table = json.loads((tiny / "eval/table.json").read_text())
    assert len(table["rows"]) == 4 * 3 + 2
    assert table["world"] is True
    assert table["rounds"] == 2


def test_the_table_says_what_the_answers_are_worth(tiny):
    config = read_run(tiny).config
    town = world.make_town(config.world, config.run.seed)
    pairs = {pair.id: pair for pair in read_rows(tiny / "data/slices/test.jsonl", Pair)}
    for entry in json.loads((tiny / "eval/table.json").read_text())["rows"]:
        folder = tiny / f"eval/round{entry['round']}_{entry['agent']}_samples"
        answers = rows_of(folder / "samples.jsonl")
        assert len(answers) == 2 * len(pairs)

        golds = []
        for answer in answers:
            pair = pairs[answer["id"]]
            golds.append(world.gold_reward(town, pair, answer["response"], answer["finish"]))
        for part in ("gold", "right", "polite", "well_formed"):
            assert entry[part] == pytest.approx(np.mean([gold[part] for gold in golds]))
        low, high = entry["gold_interval"]
        assert low <= entry["gold"] + 1e-4
        assert entry["gold"] <= high + 1e-4

        lengths = [len(answer["response"]) for answer in answers]
        cut = [answer["finish"] == "length" for answer in answers]
        assert entry["length"] == pytest.approx(np.mean(lengths))
        assert entry["hit_length"] == pytest.approx(np.mean(cut))


def test_the_table_says_how_the_test_pairs_are_scored(tiny):
    test_rows = rows_of(tiny / "data/slices/test.jsonl")
    characters = sum(len(row["chosen"]) for row in test_rows)
    for entry in json.loads((tiny / "eval/table.json").read_text())["rows"]:
        scores = read_scores(tiny, f"round{entry['round']}_{entry['agent']}")
        logp = sum(row["logp"] for row in scores.truth)
        tokens = sum(row["tokens"] for row in scores.truth)
        assert entry["perplexity"] == pytest.approx(np.exp(-logp / tokens))
        assert entry["perplexity_char"] == pytest.approx(np.exp(-logp / characters))

        base = checks.base_of(tiny, entry["agent"]).name
        margins = scores.margins() - read_scores(tiny, f"base_{base}").margins()
        assert entry["accuracy"] == pytest.approx(np.mean(margins > 0))


def test_pgr_is_what_of_the_gap_between_teachers_and_ceiling_is_recovered(tiny):
    rows = json.loads((tiny / "eval/table.json").read_text())["rows"]
    gold = {(row["agent"], row["round"]): row["gold"] for row in rows}
    best_teacher = max(gold[f"teacher{k}", 0] for k in (1, 2, 3))
    gap = gold["ceiling", 2] - best_teacher
    for entry in rows:
        if entry.get("pgr") is not None:
            assert not entry["agent"].startswith("teacher")
            assert entry["pgr"] == pytest.approx((entry["gold"] - best_teacher) / gap)


def test_the_filter_in_the_table(tiny):
    entries = json.loads((tiny / "eval/table.json").read_text())["filter"]
    assert [entry["round"] for entry in entries] == [1, 2]
    for entry in entries:
        chosen = [pair["chosen_by"] for pair in checks.pairs(tiny, entry["round"], "student")]
        assert entry["sources"].keys() == set(chosen)
        right = 0
        for teacher, source in entry["sources"].items():
            won = chosen.count(teacher) / len(chosen)
            assert source["won"] == pytest.approx(won)
            right += source["right"] * won
        assert entry["right"] == pytest.approx(right)


def test_the_negatives_in_the_table(tiny):
    entries = json.loads((tiny / "eval/table.json").read_text())["negatives"]
    agents = [entry["agent"] for entry in entries]
    assert agents == ["student", "teacher1", "teacher2", "teacher3"]
    notes = stages_of(tiny)
    for entry in entries:
        equal = []
        for t in (1, 2):
            counts = notes[f"round{t}/pairs_{entry['agent']}"]["counts"]
            equal.append(counts["negative_equal"] / 48)
        assert entry["equal"] == pytest.approx(equal, abs=1e-4)
        assert 0 <= entry["wrong"] <= 1


def test_the_cost_of_every_stage_in_the_table(tiny):
    notes = stages_of(tiny)
    names = [row["name"] for row in json.loads((tiny / "eval/table.json").read_text())["cost"]]
    assert set(names) == notes.keys()
    assert len(names) == len(notes)
    assert names == sorted(names, key=lambda name: notes[name]["started"])


def test_warnings_about_negatives():
    rows = [
        {"agent": "a", "wrong": 0.69, "equal": []},
        {"agent": "b", "wrong": 0.71, "equal": [0.05, 0.11]},
        {"agent": "c", "wrong": None, "equal": [0.1]},
        {"agent": "d", "wrong": 0.7, "equal": []},
    ]
    of_a, of_b = warnings(rows)
    assert "a" in of_a
    assert "69%" in of_a
    assert "11%" in of_b


def test_an_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        low, high = mean_interval(rng.normal(0.5, 0.2, 60), 400)
        if low <= 0.5 <= high:
            hits += 1
    assert 0.90 <= hits / 300 <= 0.98


def test_every_agent_of_a_run_has_a_label(tiny):
    rows = json.loads((tiny / "eval/table.json").read_text())["rows"]
    labels = [(row["agent"], row["round"], row["label"]) for row in rows]
    assert len(labels) == 4 * 3 + 2
    assert len(set(labels)) == len(labels)
    assert labels[0] == ("teacher1", 0, "teacher 1, round 0")
    assert labels[9:] == [
        ("student", 0, "student, round 0 (naive SFT)"),
        ("student", 1, "student, round 1"),
        ("student", 2, "student, round 2"),
        ("continued", 2, "naive SFT continued"),
        ("ceiling", 2, "ceiling"),
    ]


# ---- the table and the report of folders that are not as they should be ----------------------


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", '{"fingerprint": "x", "counts": {}, "files": {}, "started": 1}']
)
@pytest.mark.parametrize(
    "name", ["eval/round0_student_samples", "round1/pairs_student", "round1/my_notes"]
)
def test_a_foreign_stage_json_is_named(stub, place, name, text):
    run = copy_run(stub, place)
    (run / name).mkdir(exist_ok=True)
    (run / name / "stage.json").write_text(text)
    ended = invoke("eval", run)
    check_sentence(ended.code, ended.err)
    assert f"{name}/stage.json" in ended.err
    with pytest.raises(UserError, match=f"{name}/stage.json"):
        write_report(run)


@pytest.mark.parametrize(
    "name",
    [
        "eval/round1_student_truth/scores.jsonl",
        "round1/pairs_student/pairs.jsonl",
        "round0/teacher1_pos/metrics.jsonl",
        "round1/positives_student/samples.jsonl",
    ],
)
def test_a_damaged_file_is_not_evaluated(stub, place, name):
    run = copy_run(stub, place)
    (run / name).write_text((run / name).read_text().replace("1", "2", 1))
    with pytest.raises(UserError, match=name):
        write_report(run)


@pytest.mark.slow
def test_a_folder_made_anew_is_read_anew(place):
    """One process, one path, two runs after each other: table and page are those of the second."""
    run = place / "runs/x"
    words = [write_stub(place / "p"), f"--run.root={place / 'runs'}", "--run.name=x", *SMALL_RUN]
    tables = []
    for seed in (0, 1):
        shutil.rmtree(run, ignore_errors=True)
        train(*words, f"--run.seed={seed}")
        tables.append(json.loads(invoke("eval", run, "--json").out))
        page = (run / "report.html").read_text()
        shown = 0
        for pair in rows_of(run / "data/slices/d2.jsonl"):
            prompt = html.escape(pair["prompt"][-1]["content"])
            if f">{prompt}</h3>" in page:
                shown += 1
        assert shown == 5
        assert page.count("<article>") == 5
    first, second = tables
    assert first["rows"] != second["rows"]
    # a process that has seen no other run says the same
    alone, _ = spawn("eval", str(run), "--json").communicate(timeout=60)
    assert second == json.loads(alone)


def test_a_stage_that_is_being_written_is_none(stub, place):
    run = copy_run(stub, place)
    shutil.copytree(run / "round1/pairs_student", run / ".partial/x")
    assert make_table(read_run(run)) == make_table(read_run(stub))


def test_the_report_at_every_moment_of_a_run(stub, place):
    """Written from any number of finished stages: three sentences, no network, no script."""
    run = copy_run(stub, place)
    notes = stages_of(stub)
    (run / "eval/table.json").unlink()
    stages = sorted(notes, key=lambda name: notes[name]["started"], reverse=True)
    for number, name in enumerate(stages):
        if number % 4 == 0 or number > len(stages) - 4:
            write_report(run)
            page = (run / "report.html").read_text()
            check_unfinished_page(page)
            assert f"{len(stages) - number} stages" in page
        shutil.rmtree(run / name)
    write_report(run)
    page = (run / "report.html").read_text()
    assert page.count("has been measured") + page.count("has not been measured") == 3


def check_unfinished_page(page: str) -> None:
    (lead,) = re.findall('class="lead">(.*?)</div>', page, re.DOTALL)
    assert lead.count("<p>") == 3
    assert "Still running" in page
    # One link to the paper, nothing is loaded
    elsewhere = page.replace("https://arxiv.org/abs/2410.07672", "", 1)
    assert "://" not in elsewhere
    assert "<script" not in page
    assert "src=" not in page


def test_a_number_in_the_name_of_a_run_makes_no_teacher_of_it():
    assert agent_label("teacher12") == "teacher 12"
    assert agent_label("world-rounds=10") == "world-rounds=10"


def test_agents_are_drawn_by_their_names_and_runs_by_their_number():
    assert charts.look("teacher4", 9).colour == "teacher1"
    assert charts.look("weak1", 0).colour == "teacher1"
    assert charts.look("strong", 3) == charts.look("student", 0)
    runs = [charts.look(f"world-rounds={number}", number) for number in range(24)]
    colours = [run.colour for run in runs]
    assert len(set(runs)) == 24
    assert len(set(colours[:6])) == 6

    lines = {f"run-{i}": [Point(0, 0.1 * i), Point(1, 0.5)] for i in range(3)}
    drawn = charts.figure("x", "y", lines)
    assert [drawn.count(f'class="{colour}"') for colour in colours[:4]] == [1, 1, 1, 0]


def test_the_report_escapes_what_it_shows(place):
    (place / "hh").mkdir()
    rows = [row(f"<b>{i} & more</b>", f"<script>{i}</script>", f"</div>{i}") for i in range(90)]
    plain_rows = [row(f"plain {i}") for i in range(60)]
    data_file(place / "hh", *rows, name="<i>.jsonl")
    data_file(place / "hh", *plain_rows, name="b.jsonl")
    train(*hh_words(place))
    page = (place / "runs/hh/report.html").read_text()
    assert "<script" not in page
    assert "&lt;b&gt;" in page
    assert "&lt;i&gt;" in page
    assert "<i>" not in page


# ---- dialogues ------------------------------------------------------------------------------


def hh_files(place: Path) -> Path:
    """Two files of multi-turn dialogues, with rows that cannot be used among them."""
    (place / "hh").mkdir()
    for name, count in (("one", 50), ("two", 40)):
        rows = []
        for i in range(count):
            rows.append(row(f"{name} {i}", f"answer {i} is long", f"reply {i * 7} is not"))
        for i in range(0, count, 5):
            deep = f"\n\nHuman: {name} deep {i}\n\nAssistant: well"
            deep += f"\n\nHuman: and then {i} ?\n\nAssistant: "
            rows.append(json.dumps({"chosen": deep + "good", "rejected": deep + "bad"}))
        rows += [row("odd", "same", "same"), row("odd", ""), row("far", "x " * 900)]
        data_file(place / "hh", *rows, name=f"{name}.jsonl.gz")
    return place / "hh"


def hh_words(place: Path) -> list[str]:
    """The words of a run on the files in `place`/hh."""
    words = [write_stub(place / "p"), *WORDS, f"--data.path={place / 'hh'}"]
    return [*words, "--run.name=hh", "--run.root=runs"]


WORDS = [*HH, "--macpo.rounds=1", "--generate.max_new_tokens=6", "--model.vocab=340"]


def test_a_run_on_files_of_dialogues(place):
    hh_files(place)
    out = train(*hh_words(place)).out
    run = place / "runs/hh"
    assert "one" in out
    assert "two" in out

    # The table has all that needs no gold reward
    table = json.loads((run / "eval/table.json").read_text())
    assert table["world"] is False
    for entry in table["rows"]:
        assert set(entry["files"]) <= {"one", "two"}
        assert not {"gold", "pgr"} & entry.keys()
        for name in ("perplexity", "perplexity_char", "accuracy", "length", "distinct2"):
            assert np.isfinite(entry[name]), name

    # No first prompt is in two splits, and bases have read none of the test's
    first_turns = {}
    for name in ("d1", "d2", "test"):
        rows = rows_of(run / f"data/slices/{name}.jsonl")
        first_turns[name] = {row["prompt"][0]["content"] for row in rows}
    for one, other in itertools.combinations(first_turns.values(), 2):
        assert not one & other
    texts = []
    for text in rows_of(run / "data/corpus_strong/texts.jsonl"):
        texts.append(text["prompt"][0]["content"] + text["response"])
    assert texts
    for text in texts:
        assert not text.startswith(tuple(first_turns["test"]))
    assert len(rows_of(run / "data/corpus_weak1/texts.jsonl")) < len(texts)

    # Every row is counted
    counts = stages_of(run)["data/slices"]["counts"]
    one = {"read": 63, "kept": 61, "identical answers": 1, "empty answer": 1}
    assert counts["rows"]["one"] == one
    assert len(rows_of(run / "data/slices/d2.jsonl")) == counts["splits"]["d2"]["rows"]

    again = train(*hh_words(place)).out
    assert again.strip() in out
    assert out.endswith(again)


def test_what_depends_on_changed_files_is_computed_anew(place):
    hh_files(place)
    words = [*hh_words(place), "--macpo.rounds=0", "--macpo.controls=false"]
    train(*words)
    before = stages_of(place / "runs/hh")
    data_file(place / "hh", row("new"), name="three.jsonl")
    assert "computed anew" in train(*words).out
    after = stages_of(place / "runs/hh")
    assert before.keys() == after.keys()
    assert before["data/slices"]["fingerprint"] != after["data/slices"]["fingerprint"]


def test_two_given_teachers_on_dialogues(place):
    """K follows the folders that are given, and the plan is for two teachers."""
    model = shared("weights/stories260K-hf")
    words = [f"--data.path={hh_files(place)}"]
    words += [f"--model.student={model}", f"--model.teachers={model},{model}"]
    out = train("@hh", *words, "--dry_run").out
    assert "\nteachers = 2\n" in out
    assert "round3/teacher2_pos" in out
    assert "teacher3" not in out
    assert not (place / "runs").exists()


def test_given_models_are_used_and_left_alone(stub, place):
    models = place / "models"
    for name in ("strong", "weak1"):
        shutil.copytree(stub / "bases" / name, models / name)
    before = tree(models)
    words = ["--model.student=models/strong", "--model.teachers=models/weak1,models/weak1"]
    words += ["--data.template=plain", "--macpo.rounds=1", "--run.name=given", "--run.root=runs"]
    train(write_stub(place / "p"), *words)
    run = place / "runs/given"
    assert tree(models) == before
    assert not (run / "bases").exists()
    config = json.loads((run / "round1/student_pos/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == models / "strong"
    assert sample(run / "round1/student_pos", "hello") is not None
