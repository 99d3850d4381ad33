"""sample.py and eval.py on finished runs; train.py on files; the table against the files."""

import html
import json
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checks
import numpy as np
import pytest
import torch
from conftest import shared
from runs import (
    REPOSITORY,
    copy_run,
    invoke,
    rows_of,
    spawn,
    stages_of,
    train,
    write_stub,
)
from test_bad_input import HH, check_sentence, data_file, row, tree
from transformers import LlamaForCausalLM

from minmacpo import UserError
from minmacpo.cli.chat import CUT_MARK
from minmacpo.config.parse import agent_settings, resolve_checkpoint
from minmacpo.config.schema import Config
from minmacpo.core import checkpoint
from minmacpo.data import synthetic as world
from minmacpo.data.records import Message, Pair
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


def sample(*words):
    ended = invoke("sample", *words)
    assert ended.code == 0, ended.err
    return ended.out


# ---- sample.py ------------------------------------------------------------------------------


def test_an_adapter_and_a_base_answer(tiny, place):
    questions = [
        row["prompt"][0]["content"] for row in rows_of(tiny / "data/slices/test.jsonl")[:4]
    ]
    one, two = (
        [sample(tiny / name, q) for q in questions]
        for name in ("round2/student_pos", "bases/strong")
    )
    assert all(text.strip() for text in one) and one != two
    question, one = questions[0], one[0]
    assert sample(tiny / "round2/student_pos", question) == one
    assert list(place.iterdir()) == []


def test_an_answer_that_was_cut_says_so(tiny, place):
    question = rows_of(tiny / "data/slices/test.jsonl")[0]["prompt"][0]["content"]
    whole, cut = (
        sample(tiny / "round2/student_pos", question, "--generate.temperature=0", *more)
        for more in ([], ["--generate.max_new_tokens=2"])
    )
    assert (
        not whole.endswith(f"{CUT_MARK}\n")
        and cut.endswith(f"{CUT_MARK}\n")
        and whole.startswith(cut[: -len(CUT_MARK) - 1])
    )


def test_greedy_answers_are_those_of_peft(tiny, place):
    prompts = [r["prompt"][0]["content"] for r in rows_of(tiny / "data/slices/test.jsonl")[:4]]
    (place / "prompts.txt").write_text("\n".join(prompts) + "\n")
    folder = tiny / "round1/teacher2_pos"
    sample(folder, "--prompts", "prompts.txt", "--out", "answers.jsonl", "--generate.temperature=0")
    base = checks.base_of(tiny, "teacher2")
    model, end = checks.peft_model(base, folder), checks.pieces_of(base).eos_id()
    for found, prompt in zip(rows_of(place / "answers.jsonl"), prompts, strict=True):
        ids = checks.prompt_ids(base, [{"role": "user", "content": prompt}])
        wanted = model.generate(
            input_ids=torch.tensor([ids]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
        )
        assert found["tokens"] == wanted[0, len(ids) :].tolist()
        assert found["prompt"][0]["content"] == prompt


def test_prompts_in_a_file_as_text_and_as_json(stub, place):
    (place / "p.txt").write_text('where is it ?\n{"prompt": "what {is} it ?"}\n')
    out = sample(stub / "round1/student_pos", "--prompts=p.txt", "--out=a.jsonl", "--run.seed=3")
    found = rows_of(place / "a.jsonl")
    assert [r["prompt"][0]["content"] for r in found] == [
        "where is it ?",
        "what {is} it ?",
    ] and "a.jsonl" in out
    sample(stub / "round1/student_pos", "--prompts=p.txt", "--out=b.jsonl", "--run.seed=3")
    sample(stub / "round1/student_pos", "--prompts=p.txt", "--out=c.jsonl", "--run.seed=4")
    assert rows_of(place / "b.jsonl") == found != rows_of(place / "c.jsonl")


def test_an_export_is_the_adapter_merged_into_its_base(tiny, place):
    sample(tiny / "round2/student_pos", "--export", "merged")
    ids = torch.tensor(
        [checks.prompt_ids(tiny / "bases/strong", [{"role": "user", "content": "where is it ?"}])]
    )
    with torch.no_grad():
        merged = LlamaForCausalLM.from_pretrained(place / "merged")(input_ids=ids).logits
        wanted = checks.peft_model(tiny / "bases/strong", tiny / "round2/student_pos")(
            input_ids=ids
        ).logits
    assert (merged - wanted).abs().max() < 1e-4
    one, two = (
        sample(f, "where is it ?", "--generate.temperature=0", "--generate.max_new_tokens=8")
        for f in ("merged", tiny / "round2/student_pos")
    )
    assert one == two


def test_a_moved_run_still_answers(stub, place):
    """Adapters name their base relative to themselves."""
    copy_run(stub, place / "elsewhere")
    assert sample(place / "elsewhere/stub/round1/teacher1_pos", "hello") is not None


def test_a_base_is_asked_in_the_template_it_has_read(stub, place):
    """Not in that of its tokenizer, which always has the marks of turns."""
    folder = place / "strong"
    shutil.copytree(stub / "bases/strong", folder, copy_function=shutil.copyfile)

    def template(flags):
        config, loaded, _ = open_agent(folder, agent_settings(folder, flags), flags)
        assert config.data.template == loaded.template
        return loaded.template

    assert template({}) == "turns"
    notes = json.loads((folder / "stage.json").read_text())
    notes["settings"]["template"] = "plain"
    (folder / "stage.json").write_text(json.dumps(notes))
    assert template({}) == "plain"
    assert template({"data.template": "turns"}) == "turns"


def test_an_adapter_of_no_run_speaks_as_its_base_has_read(stub, place):
    run = copy_run(stub, place, ("bases", "round1"))
    notes = json.loads((run / "bases/strong/stage.json").read_text())
    notes["settings"]["template"] = "plain"
    (run / "bases/strong/stage.json").write_text(json.dumps(notes))
    folder = run / "round1/student_pos"
    assert open_model.open_folder(folder, Config()).template == "turns"
    (folder / "stage.json").unlink()
    assert open_model.open_folder(folder, Config()).template == "plain"


def test_a_run_stands_for_its_last_student(stub, place):
    run = copy_run(stub, place)
    question, asked = "where is it ?", ("--generate.temperature=1",)
    assert sample(run, question, *asked) == sample(run / "round2/student_pos", question, *asked)
    shutil.copytree(run / "round1/student_pos", run / "round10/student_pos")
    assert resolve_checkpoint(run) == run / "round10/student_pos"
    shutil.copytree(run / "round1/student_pos", run / "final/student_pos")
    assert resolve_checkpoint(run) == run / "final/student_pos"
    (run / "final/student_pos/stage.json").unlink()
    (run / "round10/student_pos/stage.json").unlink()
    assert resolve_checkpoint(run) == run / "round2/student_pos"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_odd_end_tokens_are_refused(stub, place, file):
    shutil.copytree(stub / "bases/strong", place / "odd", copy_function=shutil.copyfile)
    for end in ("2", [1, "x"], {"a": 1}, 2.0):
        raw = json.loads((place / "odd" / file).read_text()) | {"eos_token_id": end}
        (place / "odd" / file).write_text(json.dumps(raw))
        ended = invoke("sample", place / "odd", "hello")
        assert ended.code == 2 and "eos_token_id" in ended.err
        with pytest.raises(UserError, match="eos_token_id"):
            checkpoint.check_model_folder(place / "odd")


def test_half_a_surrogate_pair_is_no_prompt(stub, place):
    ended = invoke("sample", stub / "round1/student_pos", "a\ud800b")
    assert ended.code == 2 and "no valid text" in ended.err
    (place / "p.jsonl").write_text('{"prompt": "a\\ud800b"}\n')
    assert invoke("sample", stub / "round1/student_pos", "--prompts=p.jsonl", "--out=o").code == 2
    (place / "p.jsonl").write_text("")
    assert (
        "no usable row"
        in invoke("sample", stub / "round1/student_pos", "--prompts=p.jsonl", "--out=o").err
    )
    assert not (place / "o").exists()


def test_a_long_answer_is_asked_of_a_short_prompt(stub, place):
    sample(stub / "round1/student_pos", "hello", "--generate.max_new_tokens=90")
    assert (
        "room"
        in invoke(
            "sample", stub / "round1/student_pos", "hello", "--generate.max_new_tokens=999"
        ).err
    )


def test_given_bases_are_told_apart_by_every_byte(stub, place):
    config = Config()
    config = replace(
        config,
        data=replace(config.data, max_prompt_length=40, max_length=60),
        generate=replace(config.generate, max_new_tokens=10),
    )
    for name in ("one", "two"):
        shutil.copytree(stub / "bases/strong", place / name, copy_function=shutil.copyfile)
    prints = [
        bases.external_base(config, "strong", place / name).stage.fingerprint
        for name in ("one", "two")
    ]
    assert prints[0] == prints[1]
    raw = bytearray((place / "two/model.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (place / "two/model.safetensors").write_bytes(raw)
    assert bases.external_base(config, "strong", place / "two").stage.fingerprint != prints[0]


def test_a_real_model(place):
    folder = shared("weights/stories260K-hf")
    out = sample(
        folder, "Once upon a time", "--generate.temperature=0", "--generate.max_new_tokens=20"
    )
    assert out.strip()


class Kept(Exception):
    """Carries the settings that sample.py would answer with."""


def settings_used(monkeypatch, *words):
    """The settings with which sample.py opens a folder."""

    def open_folder(folder, config):
        raise Kept(config)

    with monkeypatch.context() as patch:
        patch.setattr(open_model, "open_folder", open_folder)
        with pytest.raises(Kept) as caught:
            invoke("sample", *words)
    return caught.value.args[0]


def test_the_settings_are_those_of_the_run_that_the_folder_is_a_stage_of(stub, place, monkeypatch):
    run = copy_run(stub, place / "runs", ("bases", "round1"))
    (run / "config.toml").write_text(
        (stub / "config.toml").read_text().replace('max_examples = "none"', "max_examples = 3")
    )
    assert "max_examples = 3" in (run / "config.toml").read_text()
    assert settings_used(monkeypatch, run / "round1/student_pos", "hello").data.max_examples is None
    for stage in ("bases/strong", "round1/student_pos"):
        assert settings_used(monkeypatch, run / stage, "hello").generate.max_new_tokens == 12
        monkeypatch.chdir(run / stage)
        assert settings_used(monkeypatch, ".", "hello").generate.max_new_tokens == 12
        assert (
            settings_used(
                monkeypatch, ".", "hello", "--generate.max_new_tokens=5"
            ).generate.max_new_tokens
            == 5
        )


def test_no_other_config_toml_counts(stub, place, monkeypatch):
    run = copy_run(stub, place / "a/b/runs", ("bases", "round1"))
    for folder in (
        place,
        place / "a",
        place / "a/b",
        run.parent,
        run / "round1",
        run / "round1/student_pos",
    ):
        (folder / "config.toml").write_text("[other]\nprogram = 'settings'\n")
    assert (
        settings_used(monkeypatch, run / "round1/student_pos", "hello").generate
        == Config().generate
    )
    shutil.copytree(
        run / "bases/strong", place / "a/b/model", ignore=shutil.ignore_patterns("stage.json")
    )
    assert settings_used(monkeypatch, place / "a/b/model", "hello").generate == Config().generate


def test_threads_of_an_answer(stub, place):
    threads = torch.get_num_threads()
    try:
        sample(
            stub / "round1/student_pos",
            "hello",
            "--run.threads=2",
            "--run.device=cpu",
            "--run.dtype=float32",
        )
        assert torch.get_num_threads() == 2
        sample(stub / "round1/student_pos", "hello")
        assert torch.get_num_threads() == 1  # the run's
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_export_is_whole_or_absent(stub, place, monkeypatch, stop):
    good, words = (
        checkpoint.save_tensors,
        (stub / "round1/student_pos", "--export", place / "new/merged"),
    )

    def torn(path, tensors, *rest):
        good(path, tensors, *rest)
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", torn)
        assert invoke("sample", *words).code == (130 if stop is KeyboardInterrupt else 2)
    assert list((place / "new").iterdir()) == []
    sample(*words)
    assert [path.name for path in (place / "new").iterdir()] == ["merged"]
    assert {path.name for path in (place / "new/merged").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    }


def test_a_killed_export_leaves_nothing_under_its_name(stub, place):
    """A process of its own, killed while it writes the weights; the same words then work."""
    code = (
        "import os, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0]));"
        "from minmacpo.core import checkpoint;"
        "checkpoint.save_tensors = lambda *args: os.kill(os.getpid(), 9);"
        "import sample; sample.main(sys.argv[1:])"
    )
    words = [str(REPOSITORY / "sample.py"), str(stub / "round1/student_pos"), "--export", "merged"]
    assert (
        subprocess.run([sys.executable, "-c", code, *words], cwd=place).returncode
        == -signal.SIGKILL
    )
    assert not (place / "merged").exists() and list(place.iterdir())
    sample(*words[1:])
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

    for module, name in (
        (open_model, "open_folder"),
        (table_module, "make_table"),
        (prepare_data, "given_tokenizers"),
    ):
        monkeypatch.setattr(module, name, interrupt)
    said = {
        "sample": stopped(monkeypatch, capsys, "sample", stub / "round1/student_pos", "hello"),
        "eval": stopped(monkeypatch, capsys, "eval", stub),
        "train": stopped(monkeypatch, capsys, "train", write_stub(place), "--dry_run"),
    }
    assert (
        "nothing half-written" in said["sample"]
        and "only reads" in said["eval"]
        and "goes on from here" in said["train"]
    )
    assert not any(
        "goes on" in said[name] or "is saved" in said[name] for name in ("sample", "eval")
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "PATH"),
        (["nowhere", "hello"], "nowhere"),
        (["EMPTY", "hello"], "no student of this run is finished"),
        (["RUN/round1/student_pos", ""], "PROMPT is empty"),
        (["RUN/round1/student_pos", "hello", "--n=0"], "--n=0"),
        (["RUN/round1/student_pos", "--n=2"], "PROMPT"),
        (["RUN/round1/student_pos", "hello", "--prompts=good.txt", "--out=x"], "PROMPT"),
        (["RUN/round1/student_pos", "--prompts=good.txt", "--out=EMPTY"], "no ordinary file"),
        (["RUN/round1/student_pos", "--prompts=EMPTY", "--out=x"], "no .jsonl or .json file"),
        (
            ["RUN/round1/student_pos", "--prompts=long.txt", "--out=x"],
            "no prompt is left; 1 over-long prompt",
        ),
        (
            [
                "RUN/round1/student_pos",
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
        (["RUN/round1/student_pos", "--prompts=none.txt", "--out=x"], "none.txt"),
        (["RUN/round1/student_pos", "--prompts=bad.txt", "--out=x"], "bad.txt, line 2"),
        (["RUN/round1/student_pos", "--prompts=empty.txt", "--out=x"], "empty.txt"),
        (["RUN/round1/student_pos", "--prompts=latin.txt", "--out=x"], "latin.txt, line 1"),
        (["RUN/round1/student_pos", "--prompts=bad.txt"], "--out"),
        (["RUN/round1/student_pos", "hello", "--out=x"], "--prompts"),
        (["RUN/round1/student_pos", "--prompts=good.txt", "--out=good.txt"], "good.txt"),
        (
            ["RUN/round1/student_pos", "--prompts=good.txt", "--out=no/such/folder/x"],
            "no/such/folder",
        ),
        (["RUN/round1/student_pos", "--export=good.txt"], "good.txt"),
        (["RUN/round1/student_pos", "hello", "--generate.temprature=1"], "generate.temperature"),
        (["RUN/round1/student_pos", "hello", "--generate.temperature=hot"], "number"),
        (["RUN/round1/student_pos", "hello", "--generate.top_p=0"], "top_p"),
        (["RUN/round1/student_pos", "hello", "--dpo.beta=1"], "dpo.beta"),
        (["RUN/round1/student_pos", "hello", "--run.name=x"], "--run.name"),
        (["RUN/round1/student_pos", "hello", "--run.save_every=3"], "--run.save_every"),
        (["RUN/round1/student_pos", "hello", "--run.sead=3"], "run.seed"),
        (["RUN/round1/student_pos", "hello", "--run.seed"], "--run.seed"),
        (["RUN/round1/student_pos", "hello", "--run.seed="], "whole number"),
        (["RUN/round1/student_pos", "hello", "--loud"], "--loud"),
        (["RUN/round1/student_pos", "word " * 300], "tokens"),
        (["RUN/round1/student_pos", "hello", "there"], "there"),
    ],
)
def test_sample_on_bad_input(stub, place, words, says):
    (place / "EMPTY").mkdir()
    shutil.copy(stub / "config.toml", place / "EMPTY")
    for name, text in (
        ("bad.txt", b"hello\n{\n"),
        ("long.txt", b"word " * 300),
        ("good.txt", b"hello\n"),
        ("empty.txt", b"\n"),
        ("latin.txt", b"\xe9\n"),
    ):
        (place / name).write_bytes(text)
    before = tree(place)
    ended = invoke("sample", *(word.replace("RUN", str(stub)) for word in words))
    check_sentence(ended.code, ended.err)
    assert says in ended.err and tree(place) == before


def test_sample_on_damaged_folders(stub, place):
    copy_run(stub, place, ("bases", "round1"))
    folder = place / "stub/round1/student_pos"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        raw = (folder / name).read_bytes()
        for broken in (raw[: len(raw) // 2], b"", b"[]"):
            (folder / name).write_bytes(broken)
            ended = invoke("sample", folder, "hello")
            check_sentence(ended.code, ended.err)
            assert str(folder) in ended.err
        (folder / name).write_bytes(raw)
    shutil.rmtree(place / "stub/bases/strong")
    ended = invoke("sample", folder, "hello")
    check_sentence(ended.code, ended.err)
    assert "bases/strong" in ended.err


# ---- eval.py --------------------------------------------------------------------------------


def test_the_table_again_from_the_disk(stub, tmp_path):
    printed = train(
        write_stub(tmp_path), f"--run.root={copy_run(stub, tmp_path / 'runs').parent}"
    ).out
    before = tree(stub)
    for words in ([stub], ["table", stub]):
        ended = invoke("eval", *words)
        assert ended.code == 0 and ended.out.strip() in printed
    found = json.loads(invoke("eval", stub, "--json").out)
    assert found == json.loads((stub / "eval/table.json").read_text()) and tree(stub) == before


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
    assert all(row["seeds"] == [0, 1] for row in rows)

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
    assert all(row["method"] in text and f"{row['student']:.3f}" in text for row in rows)
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
    before = tree(place)
    ended = invoke("eval", *(word.replace("RUN", str(stub)) for word in words))
    check_sentence(ended.code, ended.err)
    assert says in ended.err and tree(place) == before


def test_help_of_the_other_programs():
    for name in ("sample", "eval"):
        process = spawn(name, "--help")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "RUN" in out.upper() and err == ""


# ---- the numbers in the table ---------------------------------------------------------------


def test_the_table_says_what_the_files_say(tiny):
    table = json.loads((tiny / "eval/table.json").read_text())
    truth = {r["id"]: r for r in rows_of(tiny / "data/slices/test.jsonl")}
    config = read_run(tiny).config
    town = world.make_town(config.world, config.run.seed)
    assert len(table["rows"]) == 4 * 3 + 2 and table["world"] is True and table["rounds"] == 2
    for entry in table["rows"]:
        said = rows_of(tiny / f"eval/round{entry['round']}_{entry['agent']}_samples/samples.jsonl")
        assert len(said) == 2 * len(truth)
        golds = []
        for s in said:
            r = truth[s["id"]]
            pair = Pair(
                r["id"],
                tuple(Message(**m) for m in r["prompt"]),
                r["chosen"],
                r["rejected"],
                meta=r["meta"],
            )
            golds.append(world.gold_reward(town, pair, s["response"], s["finish"]))
        for key in ("gold", "right", "polite", "well_formed"):
            assert entry[key] == pytest.approx(np.mean([g[key] for g in golds]))
        low, high = entry["gold_interval"]
        assert low <= entry["gold"] + 1e-4 and entry["gold"] <= high + 1e-4
        assert entry["length"] == pytest.approx(np.mean([len(s["response"]) for s in said]))
        assert entry["hit_length"] == pytest.approx(
            np.mean([s["finish"] == "length" for s in said])
        )
        scores = {
            side: rows_of(tiny / f"eval/round{entry['round']}_{entry['agent']}_{side}/scores.jsonl")
            for side in ("truth", "worse")
        }
        logp = sum(r["logp"] for r in scores["truth"])
        assert entry["perplexity"] == pytest.approx(
            np.exp(-logp / sum(r["tokens"] for r in scores["truth"]))
        )
        assert entry["perplexity_char"] == pytest.approx(
            np.exp(-logp / sum(len(r["chosen"]) for r in truth.values()))
        )
        base = checks.base_of(tiny, entry["agent"]).name
        plain = {
            side: rows_of(tiny / f"eval/base_{base}_{side}/scores.jsonl")
            for side in ("truth", "worse")
        }
        margins = [
            (a["logp"] - c["logp"]) - (b["logp"] - d["logp"])
            for a, b, c, d in zip(
                scores["truth"], scores["worse"], plain["truth"], plain["worse"], strict=True
            )
        ]
        assert entry["accuracy"] == pytest.approx(np.mean([m > 0 for m in margins]))
    gold = {(r["agent"], r["round"]): r["gold"] for r in table["rows"]}
    best, ceiling = max(gold[f"teacher{k}", 0] for k in (1, 2, 3)), gold["ceiling", 2]
    for r in table["rows"]:
        if r.get("pgr") is not None:
            assert not r["agent"].startswith("teacher")
            assert r["pgr"] == pytest.approx((r["gold"] - best) / (ceiling - best))


def test_the_filter_and_the_negatives_in_the_table(tiny):
    table = json.loads((tiny / "eval/table.json").read_text())
    for entry in table["filter"]:
        chosen = [p["chosen_by"] for p in checks.pairs(tiny, entry["round"], "student")]
        assert {k: v["won"] for k, v in entry["sources"].items()} == pytest.approx(
            {k: chosen.count(k) / len(chosen) for k in set(chosen)}
        )
        shares = [(v["right"], chosen.count(k)) for k, v in entry["sources"].items()]
        assert entry["right"] == pytest.approx(sum(r * n for r, n in shares) / len(chosen))
    assert [e["round"] for e in table["filter"]] == [1, 2]
    assert [e["agent"] for e in table["negatives"]] == [
        "student",
        "teacher1",
        "teacher2",
        "teacher3",
    ]
    notes = stages_of(tiny)
    for e in table["negatives"]:
        wanted = [
            notes[f"round{t}/pairs_{e['agent']}"]["counts"]["negative_equal"] / 48 for t in (1, 2)
        ]
        assert e["equal"] == pytest.approx(wanted, abs=1e-4) and 0 <= e["wrong"] <= 1
    assert [c["name"] for c in table["cost"]] == sorted(
        (c["name"] for c in table["cost"]), key=lambda n: notes[n]["started"]
    )
    assert len(table["cost"]) == len(notes)


def test_warnings_about_negatives():
    rows = [
        {"agent": "a", "wrong": 0.69, "equal": []},
        {"agent": "b", "wrong": 0.71, "equal": [0.05, 0.11]},
        {"agent": "c", "wrong": None, "equal": [0.1]},
        {"agent": "d", "wrong": 0.7, "equal": []},
    ]
    found = warnings(rows)
    assert len(found) == 2 and "a" in found[0] and "69%" in found[0] and "11%" in found[1]


def test_an_interval_covers_the_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        low, high = mean_interval(rng.normal(0.5, 0.2, 60), 400)
        hits += low <= 0.5 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_every_agent_of_a_run_has_a_label(tiny):
    labels = [
        (row["agent"], row["round"], row["label"])
        for row in json.loads((tiny / "eval/table.json").read_text())["rows"]
    ]
    assert len(labels) == 4 * 3 + 2 == len(set(labels))
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
            shown += f">{prompt}</h3>" in page
        assert shown == page.count("<article>") == 5
    assert tables[0]["rows"] != tables[1]["rows"]
    # a process that has seen no other run says the same
    alone, _ = spawn("eval", str(run), "--json").communicate(timeout=60)
    assert tables[1] == json.loads(alone)


def test_a_stage_that_is_being_written_is_none(stub, place):
    run = copy_run(stub, place)
    shutil.copytree(run / "round1/pairs_student", run / ".partial/x")
    assert make_table(read_run(run)) == make_table(read_run(stub))


def test_the_report_at_every_moment_of_a_run(stub, place):
    """Written from any number of finished stages: three sentences, no network, no script."""
    run, notes = copy_run(stub, place), stages_of(stub)
    (run / "eval/table.json").unlink()
    stages = sorted(notes, key=lambda name: notes[name]["started"], reverse=True)
    for number, name in enumerate(stages):
        if number % 4 == 0 or number > len(stages) - 4:
            write_report(run)
            page = (run / "report.html").read_text()
            assert page.split('class="lead">')[1].split("</div>")[0].count("<p>") == 3
            assert "Still running" in page and f"{len(stages) - number} stages" in page
            elsewhere = page.replace(
                "https://arxiv.org/abs/2410.07672", "", 1
            )  # a link, nothing is loaded
            assert "<script" not in page and "://" not in elsewhere and "src=" not in page
        shutil.rmtree(run / name)
    write_report(run)
    page = (run / "report.html").read_text()
    assert page.count("has been measured") + page.count("has not been measured") == 3


def test_a_number_in_the_name_of_a_run_makes_no_teacher_of_it():
    assert (
        agent_label("teacher12") == "teacher 12"
        and agent_label("world-rounds=10") == "world-rounds=10"
    )
    assert charts.look("teacher4", 9).colour == "teacher1" == charts.look(
        "weak1", 0
    ).colour and charts.look("strong", 3) == charts.look("student", 0)
    runs = [charts.look(f"world-rounds={i}", i) for i in range(24)]
    assert len({*runs}) == 24 and len({run.colour for run in runs[:6]}) == 6
    drawn = charts.figure(
        "x", "y", {f"run-{i}": [Point(0, 0.1 * i), Point(1, 0.5)] for i in range(3)}
    )
    assert [drawn.count(f'class="{run.colour}"') for run in runs[:4]] == [1, 1, 1, 0]


def test_the_report_escapes_what_it_shows(place):
    (place / "hh").mkdir()
    rows = [row(f"<b>{i} & more</b>", f"<script>{i}</script>", f"</div>{i}") for i in range(90)]
    data_file(place / "hh", *rows, name="<i>.jsonl")
    data_file(place / "hh", *(row(f"plain {i}") for i in range(60)), name="b.jsonl")
    train(
        write_stub(place / "p"),
        *WORDS,
        f"--data.path={place / 'hh'}",
        "--run.name=hh",
        "--run.root=runs",
    )
    page = (place / "runs/hh/report.html").read_text()
    assert (
        "<script" not in page and "&lt;b&gt;" in page and "&lt;i&gt;" in page and "<i>" not in page
    )


# ---- dialogues ------------------------------------------------------------------------------


def hh_files(place: Path) -> Path:
    """Two files of multi-turn dialogues, with rows that cannot be used among them."""
    (place / "hh").mkdir()
    for name, count in (("one", 50), ("two", 40)):
        rows = [
            row(f"{name} {i}", f"answer {i} is long", f"reply {i * 7} is not") for i in range(count)
        ]
        for i in range(0, count, 5):
            deep = (
                f"\n\nHuman: {name} deep {i}\n\nAssistant: well\n\nHuman: and then {i} ?"
                "\n\nAssistant: "
            )
            rows.append(json.dumps({"chosen": deep + "good", "rejected": deep + "bad"}))
        rows += [row("odd", "same", "same"), row("odd", ""), row("far", "x " * 900)]
        data_file(place / "hh", *rows, name=f"{name}.jsonl.gz")
    return place / "hh"


WORDS = [*HH, "--macpo.rounds=1", "--generate.max_new_tokens=6", "--model.vocab=340"]


def test_a_run_on_files_of_dialogues(place):
    out = train(
        write_stub(place / "p"),
        *WORDS,
        f"--data.path={hh_files(place)}",
        "--run.name=hh",
        "--run.root=runs",
    ).out
    run = place / "runs/hh"
    table = json.loads((run / "eval/table.json").read_text())
    assert "one" in out and "two" in out and table["world"] is False
    for entry in table["rows"]:
        assert set(entry["files"]) <= {"one", "two"} and "gold" not in entry and "pgr" not in entry
        assert all(
            np.isfinite(entry[k])
            for k in ("perplexity", "perplexity_char", "accuracy", "length", "distinct2")
        )
    splits = {name: rows_of(run / f"data/slices/{name}.jsonl") for name in ("d1", "d2", "test")}
    first = {name: {r["prompt"][0]["content"] for r in part} for name, part in splits.items()}
    assert (
        not first["d1"] & first["d2"]
        and not first["d2"] & first["test"]
        and not first["d1"] & first["test"]
    )
    counts = stages_of(run)["data/slices"]["counts"]
    assert counts["rows"]["one"] == {
        "read": 63,
        "kept": 61,
        "identical answers": 1,
        "empty answer": 1,
    }
    assert len(rows_of(run / "data/slices/d2.jsonl")) == counts["splits"]["d2"]["rows"]
    texts = [
        r["prompt"][0]["content"] + r["response"]
        for r in rows_of(run / "data/corpus_strong/texts.jsonl")
    ]
    assert texts and not any(t.startswith(tuple(first["test"])) for t in texts)
    assert len(rows_of(run / "data/corpus_weak1/texts.jsonl")) < len(texts)
    again = train(
        write_stub(place / "p"),
        *WORDS,
        f"--data.path={place / 'hh'}",
        "--run.name=hh",
        "--run.root=runs",
    ).out
    assert again.strip() in out and out.endswith(again)


def test_what_depends_on_changed_files_is_computed_anew(place):
    words = [
        write_stub(place / "p"),
        *WORDS,
        f"--data.path={hh_files(place)}",
        "--run.name=hh",
        "--macpo.rounds=0",
        "--macpo.controls=false",
    ]
    train(*words)
    before = stages_of(place / "runs/hh")
    data_file(place / "hh", row("new"), name="three.jsonl")
    assert "computed anew" in train(*words).out
    after = stages_of(place / "runs/hh")
    assert before.keys() == after.keys()
    assert before["data/slices"]["fingerprint"] != after["data/slices"]["fingerprint"]


def test_two_given_teachers_on_dialogues(place):
    """The command line of the issue: K follows the folders, and the plan is for two teachers."""
    model = shared("weights/stories260K-hf")
    words = [
        f"--data.path={hh_files(place)}",
        f"--model.student={model}",
        f"--model.teachers={model},{model}",
    ]
    out = train("@hh", *words, "--dry_run").out
    assert "\nteachers = 2\n" in out and "round3/teacher2_pos" in out and "teacher3" not in out
    assert not (place / "runs").exists()


def test_given_models_are_used_and_left_alone(stub, place):
    for name in ("strong", "weak1"):
        shutil.copytree(stub / "bases" / name, place / "models" / name)
    before = tree(place / "models")
    words = [
        "--model.student=models/strong",
        "--model.teachers=models/weak1,models/weak1",
        "--data.template=plain",
    ]
    train(
        write_stub(place / "p"), *words, "--macpo.rounds=1", "--run.name=given", "--run.root=runs"
    )
    run = place / "runs/given"
    assert tree(place / "models") == before and not (run / "bases").exists()
    config = json.loads((run / "round1/student_pos/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == place / "models/strong"
    answer = sample(run / "round1/student_pos", "hello")
    assert answer is not None
