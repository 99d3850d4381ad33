"""Bad input: one clear sentence on stderr, exit code 2, nothing half-written, no new folder."""

import contextlib
import errno
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import shared
from runs import (
    REPOSITORY,
    STUB,
    change_json,
    copy_run,
    flip_bits,
    inodes,
    invoke,
    stages_of,
    train,
    write_stub,
)
from safetensors.torch import load_file, save_file

from minmacpo.pipeline import prepare_data


def tree(folder: Path) -> dict[str, object]:
    """{path: content, None of a folder} of everything under a folder."""
    content = {}
    for path in sorted(folder.rglob("*")):
        content[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return content


def refused(folder: Path, *words, program: str = "train") -> str:
    """The sentence with which a program refuses; everything in `folder` stays as it was."""
    before = tree(folder)
    ended = invoke(program, *words)
    check_sentence(ended.code, ended.err)
    assert tree(folder) == before
    return ended.err


def check_sentence(code: int, err: str) -> None:
    """A program ended with exit code 2, and said one sentence on few lines."""
    assert code == 2, err
    assert "Traceback" not in err, err
    lines = err.strip().splitlines()
    assert 1 <= len(lines) <= 5, err
    assert max(map(len, lines)) < 700, err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) > 15


# ---- the command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--dpo.bata=1", "did you mean dpo.beta?"),
        ("--dop.beta=1", "did you mean dpo.beta?"),
        ("--dpo.beta=high", "number"),
        ("--dpo.beta", "needs a value"),
        ("--dpo.beta=", "needs a value"),
        ("--dpo.beta=nan", "dpo.beta"),
        ("--dpo.beta=0", "dpo.beta"),
        ("--macpo.rounds=-1", "macpo.rounds"),
        ("--macpo.rounds=1000000000000000", "macpo.rounds"),
        ("--macpo.teachers=1000000000000000", "macpo.teachers"),
        ("--run.threads=1000000000000000", "run.threads"),
        ("--model.vocab=1000000000000000", "model.vocab"),
        ("--model.vocab=1", "model.vocab"),
        ("--model.vocab=-5", "model.vocab"),
        ("--generate.max_new_tokens=1000", "128"),
        ("--data.max_length=4000", "model.context"),
        ("@tniy", "did you mean tiny?"),
        ("@none.toml", "none.toml"),
        ("--run.name=a/b", "run.name"),
        ("--run.name=../x", "run.name"),
        ("--run.root=a\nb", "run.root"),
        ("--stage=round1/nothing", "no such stage"),
        ("--stage=/etc/passwd", "no such stage"),
        ("--stage=", "needs a value"),
        ("--lora.targets=w_proj", "lora.targets"),
        ("--data.path=nowhere", "does not exist"),
        ("--data.path=.", "no .jsonl"),
        ("--data.path=x\x00y", "data.path"),
        ("--model.student=nowhere", "nowhere"),
        ("--model.teachers=no,where,here", "no"),
        ("--model.teachers=a,b --macpo.teachers=3", "must be a list of 3"),
        ("--model.teachers=a,b,c,d --macpo.teachers=3", "must be a list of 3"),
        ("--run.device=tpu", "run.device"),
        ("--run.device=cuda", "GPU"),
        ("--pretrain.weak_steps=0", "weak1"),
        ("--pretrain.strong_steps=0", "strong"),
        ("--help=1", "help"),
        ("train", "expected"),
    ],
)
def test_one_wrong_word(place, word, says):
    if word == "--run.device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    words = word.split(" ")
    assert says in refused(place, "@tiny", *words, "--dry_run")
    assert says in refused(place, "@tiny", *words)


def test_dialogues_need_their_files(place):
    assert "@hh needs --data.path=" in refused(place, "@hh")


def test_a_stage_whose_inputs_are_missing_begins_no_run(place):
    assert "round0/student_neg" in refused(place, "@tiny", "--stage=round0/student_neg")


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "[dpo", "dpo = 1\n", "[dpo]\nbeta = 'x'\n", "[what]\nx = 1\n"]
)
def test_bad_toml(place, text):
    (place / "my.toml").write_text(text)
    assert "my.toml" in refused(place, "@my.toml")


def test_as_a_process_too(place):
    """Once from a real shell: the exit code, and stderr alone."""
    command = [sys.executable, str(REPOSITORY / "train.py"), "--dpo.bata=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    check_sentence(done.returncode, done.stderr)
    assert done.stdout == ""
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("program", ["train", "sample", "eval"])
def test_an_old_python_is_told_so(place, program):
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
sys.version_info = (3, 10, 2)
sys.version = "3.10.2 (main)"
import {program}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert "this is 3.10.2. Make" in done.stderr


# ---- data -----------------------------------------------------------------------------------


def row(i: int, chosen: str = "yes", rejected: str = "no") -> str:
    prompt = f"\n\nHuman: question number {i} ?\n\nAssistant: "
    return json.dumps({"chosen": prompt + chosen, "rejected": prompt + rejected})


ROWS = [row(i, f"answer {i} is long", f"reply {i * 7} is not") for i in range(60)]
HH = ["--data.template=plain", "--data.shares=0.4,0.2,0.2,0.2", "--model.vocab=330"]


def data_file(place: Path, *lines, name: str = "x.jsonl") -> Path:
    """A file of these lines (text or bytes); compressed, if its name ends so."""
    content = b""
    for line in lines:
        if isinstance(line, str):
            line = line.encode()
        content += line + b"\n"
    if name.endswith(".gz"):
        content = gzip.compress(content)
    (place / name).write_bytes(content)
    return place / name


@pytest.fixture
def preset(tmp_path):
    return write_stub(tmp_path)


def test_good_rows_make_a_run(place, preset):
    """The same words with nothing wrong in the file."""
    out = train(preset, *HH, f"--data.path={data_file(place, *ROWS)}", "--dry_run").out
    assert "'read': 60, 'kept': 60" in out
    assert not (place / "runs").exists()
    assert "\nrepeated prompts left out: {'d2': 0, 'test': 0}\n" in out


def test_repeated_prompts_are_counted(place, preset):
    """In D2 and test a prompt occurs once; the dry run and the stage say how many were left out."""
    words = [preset, *HH, f"--data.path={data_file(place, *ROWS, *ROWS)}"]
    plan = train(*words, "--dry_run").out
    train(*words, "--stage=data/slices")
    (run,) = (place / "runs").iterdir()
    counts = stages_of(run)["data/slices"]["counts"]
    kept = {name: counts["splits"][name]["rows"] for name in ("d2", "test")}
    left_out = counts["repeated prompts left out"]
    assert left_out == kept
    assert left_out["d2"] > 5
    assert f"\nrepeated prompts left out: {left_out}\n" in plan


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"chosen": ', "JSON"),
        (json.dumps({"chosen": "\n\nHuman: q\n\nAssistant: a"}), "rejected"),
        (json.dumps({"chosen": 3, "rejected": 4}), "chosen"),
        (json.dumps({"chosen": "no turns", "rejected": "none"}), "dialogue"),
        (b'{"chosen": "\xff"}', "UTF-8"),
        ('{"chosen": "\\ud800", "rejected": ""}', "surrogate"),
        ("[]", "chosen"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(place, preset, line, says):
    for name in ("x.jsonl", "y.jsonl.gz"):
        file = data_file(place, *ROWS[:7], line, *ROWS[7:], name=name)
        message = refused(place, preset, *HH, f"--data.path={file}")
        assert f"{name}, line 8" in message
        assert says in message
        assert refused(place, preset, *HH, f"--data.path={file}", "--dry_run") == message


def test_files_without_usable_rows(place, preset):
    (place / "empty.jsonl").touch()
    assert "no usable row" in refused(place, preset, *HH, "--data.path=empty.jsonl")
    data_file(place, *[row(i, "same", "same") for i in range(9)])
    assert "identical answers" in refused(place, preset, *HH, "--data.path=x.jsonl")
    data_file(place, *ROWS[:2])
    assert "no row is left for d1" in refused(place, preset, *HH, "--data.path=x.jsonl")


def test_rows_that_are_all_too_long(place, preset):
    long = [row(i, "word " * 300, "other " * 300) for i in range(60)]
    words = [preset, *HH, f"--data.path={data_file(place, *long)}"]
    assert "over-long" in refused(place, *words)
    assert "over-long" in refused(place, *words, "--data.truncation_mode=cut_prompt")


def test_a_truncated_gzip_and_a_folder_without_data(place, preset):
    file = data_file(place, *ROWS, name="x.jsonl.gz")
    file.write_bytes(file.read_bytes()[:200])
    assert "x.jsonl.gz" in refused(place, preset, *HH, "--data.path=x.jsonl.gz")
    (place / "folder").mkdir()
    assert "no .jsonl" in refused(place, preset, *HH, "--data.path=folder")


def test_too_little_text_for_the_tokenizer_or_a_base(place, preset):
    words = [preset, *HH, f"--data.path={data_file(place, *ROWS)}"]
    assert "model.vocab" in refused(place, *words, "--model.vocab=10")
    assert "D0" in refused(place, *words, "--data.shares=0,0.3,0.3,0.3")
    assert "weak" in refused(place, *words, "--pretrain.weak_share=1e-9")


# ---- models ---------------------------------------------------------------------------------


@pytest.fixture
def models(stub, place):
    """Copies of two bases of the good run, and the words that use them."""
    for name in ("strong", "weak1"):
        shutil.copytree(stub / "bases" / name, place / name)
    return ["--model.student=strong", "--model.teachers=weak1,weak1"]


def test_given_models_work(place, models, preset):
    train(preset, *models, "--dry_run")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_a_model_folder_that_lacks_a_file(place, models, preset, name):
    (place / "weak1" / name).unlink()
    message = refused(place, preset, *models)
    assert "weak1" in message
    assert name in message


def test_a_model_folder_of_pickles(place, models, preset):
    (place / "strong/model.safetensors").rename(place / "strong/pytorch_model.bin")
    assert "save_pretrained" in refused(place, preset, *models)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "k_proj.bias"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"hidden_size": "16"}, "hidden_size = '16'"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"max_position_embeddings": 32}, "context"),
        ({"vocab_size": 100}, "pieces"),
    ],
)
def test_a_model_that_is_not_understood(place, models, preset, changes, says):
    change_json(place / "strong/config.json", **changes)
    message = refused(place, preset, *models)
    assert says in message
    assert "strong" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"', "{}"])
def test_a_broken_config_json(place, models, preset, text):
    (place / "strong/config.json").write_text(text)
    assert "config.json" in refused(place, preset, *models)


def test_a_broken_tokenizer(place, models, preset):
    (place / "strong/tokenizer.model").write_bytes(b"no model at all")
    assert "tokenizer.model" in refused(place, preset, *models)


def broken_weights(file: Path, how: str) -> None:
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "no safetensors":
        file.write_bytes(b"\x00" * 50)
    else:
        tensors = load_file(file)
        if how == "missing":
            tensors.pop("model.norm.weight")
        elif how == "unexpected":
            tensors["model.extra"] = tensors["model.norm.weight"].clone()
        else:
            tensors["model.norm.weight"] = tensors["model.norm.weight"][:3].clone()
        save_file(tensors, file)


@pytest.mark.parametrize("how", ["truncated", "no safetensors", "missing", "unexpected", "shape"])
def test_broken_weights_are_one_sentence(place, models, preset, how):
    broken_weights(place / "strong/model.safetensors", how)
    message = refused(place, preset, *models)
    assert "strong" in message


def damaged(folder: Path, how: str) -> None:
    """A model folder, or one of an adapter, made unreadable."""
    file = folder / "model.safetensors"
    if how == "not finite":
        tensors = load_file(file)
        tensors["model.norm.weight"][1] = float("nan")
        save_file(tensors, file, {"format": "pt"})
    elif how == "flipped":
        flip_bits(file, 20, 4)
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "leads away":
        names = dict.fromkeys(load_file(file), "../away.safetensors")
        file.rename(folder.parent / "away.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        change_json(folder / "config.json", model_type="gpt_neox")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("not finite", "not finite"),
        ("flipped", "damaged"),
        ("folder", "is a folder"),
        ("leads away", "index.json"),
        ("family", "only llama, mistral"),
    ],
)
def test_an_export_of_a_damaged_model_leaves_nothing(place, models, how, says):
    (place / "strong/stage.json").unlink(missing_ok=True)  # a model that is no stage
    damaged(place / "strong", how)
    assert says in refused(place, "strong", "--export", "merged", program="sample")
    assert says in refused(place, "strong", "hello", program="sample")


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("round1/student_pos", "adapter_model.safetensors"),
        ("round1/student_pos", "stage.json"),
        ("bases/strong", "model.safetensors"),
    ],
)
def test_no_program_takes_a_damaged_stage(place, stub, part, file):
    """One bit of a weight is another one; so does an edited answer not count."""
    run = copy_run(stub, place / "runs")
    flip_bits(run / part / file, -40, 64)
    for words in (["hello"], ["--export", "merged"]):
        message = refused(place, run / "round1/student_pos", *words, program="sample")
        assert f"{part}/{file}" in message
        assert "damaged" in message or "cannot be read" in message
        assert not (place / "merged").exists()

    first = run / "eval/round2_student_samples"
    second = run / "eval/round1_student_samples"
    answers = first / "samples.jsonl"
    answers.write_bytes(answers.read_bytes().replace(b'"response": "', b'"response": "x', 1))
    words = ["judge", first, second, "--human", "--out=out"]
    assert "samples.jsonl: is missing or damaged" in refused(place, *words, program="eval")


@pytest.mark.parametrize(
    "notes",
    [
        '{"settings": [1]}',
        '{"settings": {"quantize": ["int8"]}}',
        '{"settings": null}',
        '{"name": "mine"}',
    ],
)
def test_a_stage_json_of_another_program_is_no_traceback(place, models, notes):
    (place / "strong/stage.json").write_text(notes)
    ended = invoke("sample", place / "strong", "hello", "--generate.max_new_tokens=2")
    assert ended.code == 0 or "stage.json: model.quantize = " in ended.err


def copy_adapter(stub: Path, place: Path) -> Path:
    """A folder with an adapter of the good run, which is no stage any more."""
    adapter = place / "adapter"
    shutil.copytree(stub / "round0/student_pos", adapter)
    (adapter / "stage.json").unlink()
    return adapter


def test_an_adapter_in_another_kind_of_number_is_refused(place, models, stub):
    adapter = copy_adapter(stub, place)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(place / "strong"))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for dtype in (torch.float8_e4m3fn, torch.int64, torch.bool):
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file)
        assert "expected F64, F32, BF16, F16" in refused(place, adapter, "hello", program="sample")


def test_an_adapter_of_another_base(place, models, stub):
    adapter = copy_adapter(stub, place)
    sentences = {
        "../weak1": "another base",
        "org/model": "hf download org/model --local-dir org/model",
        "../nowhere": "no folder",
    }
    for base, says in sentences.items():
        change_json(adapter / "adapter_config.json", base_model_name_or_path=base)
        assert says in refused(place, adapter, "--export", "merged", program="sample")
    assert "hf download org/model" in refused(place, "org/model", "hello", program="sample")


def test_a_model_whose_context_is_too_short(place, preset):
    folder = shared("weights/stories260K-hf")
    words = [f"--model.student={folder}", f"--model.teachers={folder},{folder}"]
    words += ["--data.template=plain", "--data.max_length=600"]
    assert "512" in refused(place, preset, *words)


def test_turns_need_a_tokenizer_made_here(place, preset):
    folder = shared("weights/stories260K-hf")
    words = [f"--model.student={folder}", f"--model.teachers={folder},{folder}"]
    assert "data.template" in refused(place, preset, *words)


# ---- run folders ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(stub, tmp_path_factory):
    """A copy of the good run for tests that damage one file and put it back."""
    root = tmp_path_factory.mktemp("kept")
    return copy_run(stub, root / "runs"), [write_stub(root), f"--run.root={root / 'runs'}"]


@contextlib.contextmanager
def put_back(file: Path) -> Iterator[bytes]:
    """The content of a file, which it has again in the end."""
    content = file.read_bytes()
    try:
        yield content
    finally:
        if file.is_dir():
            file.rmdir()
        file.write_bytes(content)


def damage(file: Path, how: str, rng: random.Random) -> None:
    size = file.stat().st_size
    if how == "truncated":
        os.truncate(file, rng.randrange(size))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "bit flipped":
        flip_bits(file, rng.randrange(size), 1 << rng.randrange(8))
    elif how == "deleted":
        file.unlink()
    else:
        file.unlink()
        file.mkdir()


FILES = [
    "data/slices/d2.jsonl",
    "bases/tokenizer/tokenizer.model",
    "bases/strong/model.safetensors",
    "bases/weak1/config.json",
    "round0/student_pos/adapter_model.safetensors",
    "round0/weak_labels/samples.jsonl",
    "round1/scores_student/teacher1.jsonl",
    "round1/pairs_student/pairs.jsonl",
    "round2/teacher1_pos/metrics.jsonl",
    "eval/round2_student_samples/samples.jsonl",
]


@pytest.mark.parametrize("how", ["truncated", "empty", "bit flipped", "deleted", "a folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_stage_file_is_named(kept, name, how, seed):
    run, words = kept
    with put_back(run / name):
        damage(run / name, how, random.Random(seed))
        message = refused_quietly(run, *words)
    assert name in message
    assert "damaged" in message or "cannot be read" in message


@pytest.mark.parametrize("how", ["truncated", "empty", "bit flipped"])
@pytest.mark.parametrize("name", ["data/slices", "round1/student_pos", "eval/round1_student_truth"])
def test_a_damaged_stage_json_is_named(kept, name, how, seed):
    run, words = kept
    file = run / name / "stage.json"
    for attempt in range(8):
        with put_back(file) as good:
            damage(file, how, random.Random(seed + attempt))
            ended = invoke("train", *words)
            damaged = file.read_bytes()
        if ended.code == 0:  # a space of the indentation, or the name of the checksum
            assert values_but_the_checksum(damaged, good) == values_but_the_checksum(good, good)
        else:
            check_sentence(ended.code, ended.err)
            assert name in ended.err


def values_but_the_checksum(text: bytes, good: bytes) -> dict:
    """What a stage.json says besides the checksum of the good one, whatever that is called."""
    checksum = json.loads(good)["checksum"]
    return {key: value for key, value in json.loads(text).items() if value != checksum}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "null",
        "{}",
        '{"files": {}, "fingerprint": "x"}',
        '{"files": [], "fingerprint": 3}',
    ],
)
def test_a_stage_json_that_says_something_else(kept, text):
    run, words = kept
    file = run / "round1/pairs_student/stage.json"
    with put_back(file):
        file.write_text(text)
        assert "round1/pairs_student" in refused_quietly(run, *words)


@pytest.mark.parametrize("text", ["", "[dpo", "\x00", "[dpo]\nbate = 1\n", "[dpo]\nbeta = 'x'\n"])
def test_a_damaged_config_toml(kept, text):
    run, words = kept
    with put_back(run / "config.toml"):
        (run / "config.toml").write_text(text)
        assert "config.toml" in refused(run, *words)


def refused_quietly(run: Path, *words) -> str:
    """As `refused`, but files at the top of the run (environment, log) may be new."""
    before = inodes(run)
    ended = invoke("train", *words)
    check_sentence(ended.code, ended.err)
    assert inodes(run) == before
    return ended.err


def test_a_damaged_state_of_an_unfinished_training(stub, place, preset):
    copy_run(stub, place / "runs", ("data", "bases"))
    shutil.copy(stub / "config.toml", place / "runs/stub")
    name = "round0/teacher1_pos"
    folder = place / "runs/stub/.partial" / f"state-{stages_of(stub)[name]['fingerprint']}"
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_bytes(b"\x00" * 99)
    ended = invoke("train", preset, f"--stage={name}")
    assert ended.code == 2
    assert "state.safetensors" in ended.err
    assert "Traceback" not in ended.err


def test_another_configuration_under_an_explicit_name(kept):
    run, words = kept
    message = refused(run.parent, *words, "--run.name=stub", "--dpo.sft_weight=0.7")
    assert "dpo.sft_weight" in message


# ---- the disk -------------------------------------------------------------------------------


def test_a_root_that_is_a_file_or_below_one(place, preset):
    (place / "file").write_text("x")
    for root in ("file", "file/below", "file/far/below"):
        assert root.partition("/")[0] in refused(place, preset, f"--run.root={root}")


def test_a_root_that_cannot_be_written(place, preset):
    """The user of the tests may be root, whom no mode stops; /proc stops everybody."""
    assert "/proc" in refused(place, preset, "--run.root=/proc/minmacpo")


def leave_free(monkeypatch, megabytes: int) -> None:
    """So much of a disk of one gigabyte is free."""
    free = megabytes * 10**6
    usage = shutil._ntuple_diskusage(total=10**9, used=10**9 - free, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_a_full_disk_is_seen_before_anything_is_written(place, preset, monkeypatch):
    leave_free(monkeypatch, megabytes=5)
    assert "5 MB free" in refused(place, preset)


def test_the_room_asked_for_is_that_of_what_is_still_to_be_computed(
    kept, place, preset, monkeypatch
):
    leave_free(monkeypatch, megabytes=40)
    big = "--model.strong=512x8x8x2048"
    message = refused(place, preset, big)
    assert "40 MB free" in message
    (needed,) = re.findall(r"about (\d+) MB", message)
    assert int(needed) > 500
    train(preset, big, "--stage=data/slices")  # this one stage has room
    _, finished_words = kept
    train(*finished_words)  # and so has a run that is finished


@pytest.mark.parametrize(
    "after", [*(pytest.param(after, marks=pytest.mark.slow) for after in (1, 40, 200)), 3]
)
def test_a_disk_that_fills_up_leaves_no_temporary_file(stub, place, preset, monkeypatch, after):
    words = [preset, "--macpo.rounds=1", "--macpo.controls=false", "--run.name=x"]
    flushes = 0

    def full(handle):
        nonlocal flushes
        flushes += 1
        if flushes >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        ended = invoke("train", *words, whole=True)
    check_sentence(ended.code, ended.err)
    assert "No space left" in ended.err
    assert not list(place.rglob("*.tmp"))
    assert not list(place.rglob("state.safetensors"))
    assert not list(place.glob("runs/*/.partial/*"))
    for notes in place.glob("runs/*/*/*/stage.json"):  # what is there, is whole
        for name, listed in json.loads(notes.read_bytes())["files"].items():
            assert (notes.parent / name).stat().st_size == listed["size"]
    train(*words)  # room has been made
    adapter = "round1/student_pos/adapter_model.safetensors"
    assert (place / "runs/x" / adapter).read_bytes() == (stub / adapter).read_bytes()


def test_bad_input_does_not_touch_what_is_there(place, preset):
    """A run that exists stays as it is when the next command line is wrong."""
    (place / "runs/other").mkdir(parents=True)
    (place / "runs/other/config.toml").write_text(STUB)
    refused(place, preset, "--data.path=nowhere")
    refused(place, preset, "--run.name=other", "--run.seed=3")


# ---- training that cannot work --------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_rows_and_writes_no_stage(stub, place, preset):
    copy_run(stub, place / "runs", ("data", "bases"))
    ended = invoke("train", preset, "--run.name=x", "--sft.teacher_lr=1e38")
    check_sentence(ended.code, ended.err)
    assert "round0/teacher1_pos" in ended.err
    assert "not finite" in ended.err
    assert "rows" in ended.err
    assert not (place / "runs/x/round0/teacher1_pos").exists()


def test_a_split_is_never_empty(place, preset, monkeypatch):
    monkeypatch.setattr(prepare_data, "truncate_pair", lambda *args: None)
    assert "no row is left" in refused(place, preset)
