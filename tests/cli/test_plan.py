"""The plan of a run before it starts: memory against every tensor that lives, tokens against finished runs, refusals,
the presets of the paper against their sources, and bases of 13 GB of which only the headers exist."""

import dataclasses
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import weakref
from collections import Counter

import pytest
import torch
from conftest import REPO, config_of, random_model, shared
from runs import copy_run, invoke, train, write_stub
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minmacpo.cli import dry_run as dryrun
from minmacpo.cli import memory_estimate as memory
from minmacpo.cli import plan
from minmacpo.cli.memory_estimate import HEAP, Load, beside, need, parameters
from minmacpo.config.parse import parse
from minmacpo.config.schema import LINEARS, Generate, Lora, flatten
from minmacpo.core import trainer as fit
from minmacpo.core.batching import collate
from minmacpo.core.lora import attach_lora
from minmacpo.core.sampling import generate
from minmacpo.data.chat_template import template_hint
from minmacpo.data.tokenizer import Tokens
from minmacpo.kernels.fused_logps import SMALL_VOCAB, masked_logps, sequence_logps
from minmacpo.pipeline.run import Run
from minmacpo.runtime import device as machine
from minmacpo.runtime.files import read_json

# ---- memory -------------------------------------------------------------------------------------


class Living(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as somebody holds them."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(out):
            if (
                isinstance(leaf, torch.Tensor)
                and leaf.device.type != "meta"
                and (key := (kept := leaf.untyped_storage())._cdata) not in old | self.sizes.keys()
            ):
                self.sizes[key] = kept.nbytes()
                self.now += kept.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(kept, self.gone, key)
        return out

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def shape_of(rng: random.Random):
    """A model of some odd shape."""
    head, keys = rng.choice([16, 32]), rng.choice([1, 2, 4])
    return config_of(
        vocab_size=rng.choice([500, 4000, 8000]),
        hidden_size=rng.choice([64, 192]),
        intermediate_size=rng.choice([160, 400]),
        num_hidden_layers=rng.choice([4, 8]),
        head_dim=head,
        num_key_value_heads=keys,
        num_attention_heads=keys * rng.choice([1, 2]),
        max_position_embeddings=512,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["train", "pretrain", "score"])
def test_the_tensors_of_a_step_are_as_large_as_was_said(kind, dtype, seed):
    if kind == "pretrain" and dtype != torch.float32:
        pytest.skip("bases are made in fp32")
    for _ in range(4):
        rng, config = random.Random(seed := seed + 1), shape_of(random.Random(seed))
        lora, rows, length = (
            Lora(4, 8, rng.choice([("q_proj", "v_proj"), LINEARS])),
            rng.choice([4, 16]),
            rng.choice([90, 200]),
        )
        model = random_model(
            seed, **dataclasses.asdict(config) | {"rope_scaling": config.rope_scaling}
        ).to(dtype)
        learning = list(model.parameters()) if kind == "pretrain" else attach_lora(model, lora)
        tokens, mask = (
            torch.randint(3, 60, (rows, length)),
            torch.zeros(rows, length, dtype=torch.bool),
        )
        mask[:, length // 2 :] = True
        with Living() as living, torch.set_grad_enabled(kind != "score"):
            logps = (
                masked_logps(model, tokens, mask)[0]
                if kind != "score"
                else sequence_logps(model, tokens, mask)
            )
            if kind != "score":
                logps.sum().backward()
        found = need(Load(kind, rows, length, int(mask.sum())), config, lora, dtype.itemsize)
        learned = sum(p.numel() for p in learning)
        told = found.total - found.weights - found.learning
        told += {"train": 4 * learned, "pretrain": found.learning - 8 * learned, "score": 0}[
            kind
        ]  # gradients are made here
        hidden = (
            kind != "pretrain" and config.vocab_size <= SMALL_VOCAB
        )  # within logsumexp, where nobody sees it
        inside = found.head * dtype.itemsize // 8 if hidden else 0
        assert told - inside <= living.peak * 1.15 + 3e5 and told >= living.peak * 0.92 - 1e5, (
            told,
            living.peak,
            config,
            rows,
            length,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_prompt_in_common_only_what_attention_needs_is_counted_twice(dtype, seed):
    for _ in range(3):
        rng, config = random.Random(seed := seed + 1), shape_of(random.Random(seed))
        lora, pairs, most, asked = (
            Lora(4, 8, ("q_proj", "v_proj")),
            rng.choice([3, 8]),
            rng.choice([60, 90]),
            rng.choice([70, 110]),
        )
        model = random_model(
            seed, **dataclasses.asdict(config) | {"rope_scaling": config.rope_scaling}
        ).to(dtype)
        learned = sum(p.numel() for p in attach_lora(model, lora))
        answers = [rng.randint(most // 2, most) for _ in range(2 * pairs - 1)] + [most]
        rows = [
            Tokens([3 + i // 2] * asked + [40] * answer, [False] * asked + [True] * answer)
            for i, answer in enumerate(answers)
        ]
        batch = collate(rows, packed=True)
        with Living() as living:
            masked_logps(model, batch.tokens, batch.mask, packed=batch.packed)[0].sum().backward()
        load = Load(
            "train", 2 * pairs, asked + most, sum(answers), computed=pairs * asked + sum(answers)
        )
        found = need(load, config, lora, dtype.itemsize)
        told = found.total - found.weights - found.learning + 4 * learned
        inside = found.head * dtype.itemsize // 8 if config.vocab_size <= SMALL_VOCAB else 0
        last = (
            1 - sum(answers) / load.tokens
        ) / config.num_hidden_layers  # of prompts the last block keeps less than is counted
        assert (
            told - inside <= living.peak * (1.15 + last) + 3e5 and told >= living.peak * 0.92 - 1e5
        ), (told, living.peak, config, pairs, asked, most)


def test_the_cache_of_an_answer_is_counted_twice(seed):
    """Once more where rows end: those that go on are copied."""
    config, rows, most = shape_of(random.Random(seed)), 12, 40
    model = random_model(seed, **dataclasses.asdict(config) | {"rope_scaling": config.rope_scaling})
    prompts = [[5] * random.Random(seed + i).randrange(60, 100) for i in range(rows)]
    width = max(map(len, prompts))
    with Living() as living:
        generate(
            model,
            prompts,
            [*range(rows)],
            Generate(max_new_tokens=most, batch=rows, top_k=0, top_p=1.0, temperature=1.0),
            {*range(0, 500, 40)},
        )
    found = need(Load("sample", rows, width, rows, room=width + most), config, Lora(targets=()), 4)
    assert (
        living.peak <= found.total - found.weights + 1e5
        and found.cache >= 2 * rows * config.num_hidden_layers * (width + most) * 4
    )


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1, "head_dim": 16}]
)
def test_parameters_are_counted(changes, seed):
    model, lora = random_model(seed, **changes), Lora(3, 8, ("q_proj", "v_proj", "down_proj"))
    base = sum(p.numel() for p in model.parameters())
    assert parameters(model.config, lora) == (
        base,
        sum(p.numel() for p in attach_lora(model, lora)),
    )


def test_what_lies_beside_the_tensors_grows_with_blocks_that_the_heap_keeps(seed, monkeypatch):
    """Libraries for all, more of them to train, and in bf16 where this CPU has it; the heap's part only of blocks that glibc does not map."""
    config = shape_of(random.Random(seed))

    def found(kind: str, rows: int, size: int = 4) -> int:
        load = Load(kind, rows, 100, rows * 50, room=120 * (kind == "sample"))
        return beside(load, config, size, need(load, config, Lora(), size))

    few, many = 4, 1 + HEAP // (4 * 100 * config.hidden_size)
    assert found("score", 1) < found("score", 2 * few) and found("sample", many) == found(
        "score", many
    )
    assert (
        found("score", many) <= found("sample", few) <= found("sample", 2 * few)
    )  # a cache that is counted twice makes up for it
    assert found("train", many) > found("score", many)
    monkeypatch.setattr(memory, "tuned", lambda: True)
    less = found("score", few)
    monkeypatch.setattr(memory, "tuned", lambda: False)
    assert less < found("score", few), "malloc as it is leaves more unused"
    for kernels in (False, True):
        monkeypatch.setattr(memory, "multiplies_bf16", lambda kernels=kernels: kernels)
        assert (found("train", 2 * many, 2) > found("train", 2 * many)) is kernels


def test_kernels_for_sizes_that_do_not_come_again_are_few(monkeypatch):
    """oneDNN's and torch's caches are bounded, unless the user has said how."""
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv(names[1], "7")
    machine.configure_torch(2)
    assert [os.environ[name] for name in names] == [str(machine.CACHED_KERNELS), "7"]


# ---- tokens, against a finished run -------------------------------------------------------------


def planned(out: str) -> dict[str, tuple[str, str]]:
    """{stage: (kind, the rest of its line)} of a dry run."""
    lines = out.partition(" stages in ")[2].splitlines()[1:]
    return {line.split()[1]: (line.split()[2], line) for line in lines}


def count(text: str) -> float:
    return (
        float(text[:-1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[text[-1]]
        if text[-1] in "kMG"
        else float(text)
    )


@pytest.mark.parametrize(
    "method", ["macpo", "self-rewarding", "dpo-truth", "rlaif", "rlcd", "confident"]
)
def test_tokens_are_those_of_the_run(method, tiny, methods, tmp_path):
    """Those of unknown answers are no more than said where models write words: those of the stub write broken bytes,
    which are more tokens when they are read again."""
    done, preset = (tiny, "@tiny") if method == "macpo" else (methods[method], write_stub(tmp_path))
    lines = planned(
        train(preset, f"--run.root={tmp_path / 'none'}", f"--method={method}", "--dry_run").out
    )
    exact = 0
    for name, (kind, line) in lines.items():
        said = re.search(r"(<= )?([\d.e+]+[kMG]?) tokens, [\d.]+ (MB|GB)$", line)
        assert bool(said) == (
            kind.partition("/")[0] in ("pretrain", "sft", "prefer", "sample", "score", "pairs")
        ), line
        if said and kind[:4] in ("pret", "sft/", "pref") and (done / name / "stage.json").exists():
            real = read_json(done / name / "stage.json")["counts"]["tokens"]
            if not said[1] or method == "macpo":
                assert real <= count(said[2]) * 1.006 and (
                    said[1] or real >= count(said[2]) * 0.994
                ), (line, real)
            exact += not said[1]
    assert exact >= 3


def test_what_is_on_the_disk_is_read(tiny, tmp_path):
    """The tokens of a stage whose inputs are finished are those that it went through, sampled answers among them."""
    run, names = (
        copy_run(tiny, tmp_path / "runs"),
        ["round0/student_pos", "round0/student_neg", "round1/teacher2_pos"],
    )
    real = {name: read_json(run / name / "stage.json")["counts"]["tokens"] for name in names}
    for name in names:
        shutil.rmtree(run / name)
    lines = planned(train("@tiny", f"--run.root={run.parent}", "--dry_run").out)
    for name in names:
        said = re.search(r"(<= )?([\d.e+]+k?) tokens", lines[name][1])
        assert said[1] and 0.85 * count(said[2]) <= real[name] <= 1.006 * count(said[2]), lines[
            name
        ]  # pairs: by their longer side


@pytest.mark.parametrize("stage", ["round1/positives_student", "round1/pairs_student"])
def test_a_stage_that_has_left_nothing_is_planned_with(stage, tiny, tmp_path):
    run = copy_run(tiny, tmp_path / "runs")
    for file in (run / stage).glob("*.jsonl"):
        file.write_text("")
    for other in (run / "round1").iterdir():
        if other.name != stage.partition("/")[2] and other.name != "pairs_student":
            shutil.rmtree(other)
    assert "round1/student_pos" in train("@tiny", f"--run.root={run.parent}", "--dry_run").out


def test_what_is_free_is_no_more_than_a_container_may_take(monkeypatch):
    """The limits of a control group and of those around it count, less what is used, but for files that can be dropped."""
    told = {
        "meminfo": "MemAvailable:   8000 kB",
        "self/cgroup": "9:name=systemd:/\n0::/pod/inner\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/pod/memory.max": "5000000\n",
        "/sys/fs/cgroup/pod/memory.current": "2000000\n",
        "/sys/fs/cgroup/pod/memory.stat": "anon 7\nactive_file 5\ninactive_file 400000\n",
        "/sys/fs/cgroup/pod/inner/memory.max": "max\n",
    }

    def linux(file: str, pattern: str) -> str | None:
        found = re.search(pattern, told.get(file, ""))
        return found and found[1]

    monkeypatch.setattr(machine, "read_proc", lambda file, pattern: linux(str(file), pattern))
    assert machine.free_bytes("cpu") == 3_400_000
    told["/sys/fs/cgroup/pod/inner/memory.max"], told["/sys/fs/cgroup/pod/inner/memory.current"] = (
        "1000000\n",
        "900000\n",
    )
    assert machine.free_bytes("cpu") == 100_000
    told["meminfo"] = "MemAvailable:   50 kB"
    assert machine.free_bytes("cpu") == 51_200
    told.clear()
    assert machine.free_bytes("cpu") == sys.maxsize


# ---- what does not fit --------------------------------------------------------------------------


def refused(place, monkeypatch, free: int, *words) -> str:
    monkeypatch.setattr(dryrun, "free_bytes", lambda device: free)
    ended = invoke(
        "train", write_stub(place / "p"), f"--run.root={place / 'runs'}", "--sft.batch=64", *words
    )
    assert ended.code == 2 and not (place / "runs").exists() and ended.err.count("\n") == 1
    return ended.err


def test_what_cannot_fit_is_refused_with_what_would(place, monkeypatch):
    words = ("--run.max_tokens_per_batch=20000", "--model.vocab=420")
    said = refused(place, monkeypatch, (85 + 23 << 20) + 2_500_000, *words)
    assert re.search(
        r"bases/\w+ needs about \d+ MB of memory, of which \d+ MB are free on the cpu; --run.max_tokens_per_batch=\d+ would fit",
        said,
    )
    lowered, stage = (
        re.search(r"--run.max_tokens_per_batch=\d+", said)[0],
        re.search(r"bases/\w+", said)[0],
    )
    out = invoke(
        "train",
        write_stub(place / "p"),
        f"--run.root={place / 'runs'}",
        "--sft.batch=64",
        *words,
        lowered,
        "--dry_run",
    )
    assert out.code == 0 and f"WARNING: {stage} needs" not in out.err


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("bases/strong", "run.max_tokens_per_batch"),
        ("round0/student_pos", "run.max_tokens_per_batch"),
        ("round1/reference_student", "run.max_tokens_per_batch"),
        ("round1/positives_student", "generate.batch"),
    ],
)
def test_the_setting_that_would_make_it_fit_is_that_of_the_stage(stage, key, place):
    """Of a pre-training, a training, a scoring, a sampling that is a little too large; and with it, it fits."""
    config = parse(
        [
            write_stub(place / "p"),
            f"--run.root={place / 'runs'}",
            "--run.max_tokens_per_batch=20000",
            "--generate.batch=512",
            "--sft.batch=64",
        ]
    ).config
    run = Run(config)
    __import__("train").run_all(run, {}, None)
    planned = plan.Plan(run, config, None)
    free = planned.total(stage) - 1
    [change] = dryrun.remedy(planned, stage, free)
    assert (
        ".".join(change[:2]) == key
        and planned.under(dryrun.changed(config, [change])).total(stage) <= free
    )


def test_with_all_settings_that_are_named_every_stage_fits(place, monkeypatch):
    """Not the first that fails alone."""
    words = [
        "--run.max_tokens_per_batch=20000",
        "--generate.batch=512",
        "--model.strong=64x2x4x128",
    ]
    config = parse(
        [write_stub(place / "p"), f"--run.root={place / 'runs'}", "--sft.batch=64", *words]
    ).config
    run = Run(config)
    __import__("train").run_all(run, {}, None)
    monkeypatch.setattr(plan, "beside", lambda *_: 0)
    for free in (6_000_000, 12_000_000, 30_000_000):
        monkeypatch.setattr(dryrun, "free_bytes", lambda device, free=free: free)
        said = dryrun.problem(run, None)
        flags = dict(re.findall(r"--(\w+\.\w+)=(\d+)", said))
        assert said.endswith(" would fit") and flags.keys() == {
            "run.max_tokens_per_batch",
            "generate.batch",
        }
        other = dryrun.changed(
            config, [(*key.split("."), int(value)) for key, value in flags.items()]
        )
        planned = plan.Plan(run, other, None)
        assert (
            all(planned.total(name) <= free for name in run.plan)
            and dryrun.first_that_fails(planned, free) is None
        )


def test_a_dry_run_warns_of_what_a_run_is_refused_for(place, monkeypatch):
    said = refused(place, monkeypatch, 1 << 20)
    assert "no setting makes it fit" in said
    ended = invoke(
        "train",
        write_stub(place / "p"),
        f"--run.root={place / 'runs'}",
        "--sft.batch=64",
        "--dry_run",
    )
    assert ended.code == 0 and f"WARNING: {said.removeprefix('error: ')}" in ended.err


@pytest.mark.parametrize(
    ("dtype", "known"), [("bfloat16", False), ("bfloat16", True), ("float32", False)]
)
def test_slow_products_are_told_of(dtype, known, place, monkeypatch):
    monkeypatch.setattr(dryrun, "multiplies_bf16", lambda: known)
    said = invoke(
        "train",
        write_stub(place / "p"),
        f"--run.root={place / 'runs'}",
        f"--run.dtype={dtype}",
        "--run.device=cpu",
        "--dry_run",
    ).err
    assert ("run.dtype=float32 may be" in said) is (dtype == "bfloat16" and not known)


def test_a_finished_run_needs_nothing(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(dryrun, "free_bytes", lambda device: 0)
    run = copy_run(stub, tmp_path / "runs")
    train(write_stub(tmp_path), f"--run.root={run.parent}")


# ---- the presets of the paper -------------------------------------------------------------------

SCRIPTS = {  # from the released training scripts; "framework": its defaults in the pinned versions, where they are silent
    "run.seed": (42, "framework"),
    "run.dtype": ("bfloat16", "scripts, SFT"),
    "data.max_length": (1024, "framework"),
    "lora.r": (8, "framework"),
    "lora.alpha": (16, "framework: 2 r"),
    "lora.targets": (("q_proj", "v_proj"), "scripts"),
    "sft.batch": (2 * 2 * 8, "scripts: per device x accumulated x GPUs"),
    "sft.student_lr": (5e-5, "scripts, pos_initial"),
    "sft.student_epochs": (3, "scripts, pos_initial"),
    "sft.student_negative_lr": (5e-5, "scripts, neg_initial"),
    "sft.student_negative_epochs": (1, "scripts, neg_initial"),
    "sft.teacher_lr": (5e-5, "as the student's"),
    "sft.teacher_epochs": (3, "as the student's"),
    "sft.teacher_negative_lr": (5e-5, "as the student's"),
    "sft.teacher_negative_epochs": (1, "as the student's"),
    "dpo.batch": (2 * 1 * 8, "scripts"),
    "dpo.epochs": (1, "scripts"),
    "dpo.student_lr": (1e-5, "scripts, stage 1 to 3"),
    "dpo.teacher_lr": (1e-5, "as the student's"),
    "dpo.beta": (0.1, "framework"),
    "dpo.sft_weight": (0.2, "scripts"),
    "dpo.label_smoothing": (0.0, "framework"),
    "dpo.reference": ("base", "scripts: none is given, adapters are switched off"),
    "dpo.length_normalized": (False, "framework"),
    "dpo.length_penalty": (0.0, "framework"),
    "generate.temperature": (0.95, "framework"),
    "generate.top_p": (0.7, "framework"),
    "generate.top_k": (50, "framework"),
    "generate.max_new_tokens": (512, "framework"),
    "generate.batch": (4 * 8, "scripts, test"),
    "macpo.teachers": (3, "files: agent3"),
    "macpo.rounds": (3, "scripts: stage 1 to 3"),
    "macpo.answers": (1, "files"),
    "macpo.select": (("perplexity",), "paper, perplexity filter"),
    "macpo.keep_fraction": (1.0, "files: no prompt is missing"),
    "macpo.negatives": ("agent", "files"),
    "macpo.refresh_negatives": (False, "files: equal in all stages"),
    "macpo.mutual_positives": (True, "paper"),
    "macpo.hard_negatives": (True, "paper"),
    "macpo.update_teachers": (True, "files"),
    "eval.samples": (1, "scripts, test"),
}
SETS = {
    "paper-hh-helpful": {"data.template": "vicuna-macpo", "sft.student_batch": 32},
    "paper-hh-harmless": {
        "data.template": "vicuna-macpo",
        "sft.student_batch": 2 * 1 * 8,
    },  # no accumulation in that script
    "paper-pku": {"data.template": "alpaca-macpo", "sft.student_batch": 32},
}


@pytest.mark.parametrize("name", SETS)
def test_every_value_of_a_paper_preset_is_that_of_its_source(name):
    found = flatten(
        parse([f"@{name}", "--data.path=x", "--model.student=s", "--model.teachers=a,b,c"]).config
    )
    wanted = {key: value for key, (value, _) in SCRIPTS.items()} | SETS[name]
    assert {key: found[key] for key in wanted} == wanted
    rows = [5000, 5000, 1000 if name == "paper-pku" else 2000]
    assert found["data.shares"] == pytest.approx((0, *(n / sum(rows) for n in rows)), abs=1e-4)
    schedule = fit.OptimizerConfig(1.0, 10, 1)
    assert (schedule.floor, schedule.betas, schedule.weight_decay) == (
        0.0,
        (0.9, 0.999),
        0.0,
    ) and schedule.rate(0) == 1.0
    lines = (REPO / f"minmacpo/config/presets/{name}.toml").read_text().splitlines()
    bare = [
        line
        for line in lines
        if re.match(r"\w+ = ", line)
        and "#" not in line
        and line.partition(" ")[0] not in ("temperature", "top_p", "top_k", "max_new_tokens")
    ]
    assert not bare, "each value says where it is from"


@pytest.mark.parametrize("name", SETS)
def test_a_paper_preset_asks_for_what_only_its_user_has(name):
    words = [f"@{name}"]
    for key, value in (("data.path", "x"), ("model.student", "s"), ("model.teachers", "a,b,c")):
        ended = invoke("train", *words)
        assert ended.code == 2 and f"@{name} needs --{key}=VALUE" in ended.err
        words.append(f"--{key}={value}")


# ---- real sizes, by their headers ---------------------------------------------------------------

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "hidden_act": "silu",
}


def hollow(folder, raw: dict, tokenizer: bytes):
    """A checkpoint of that shape in bf16: config.json, tokenizer, the header of its weights, and a hole behind it."""
    from minmacpo.core.model import Transformer
    from minmacpo.core.model_config import parse_config

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    with torch.device("meta"):
        weights = Transformer(parse_config(raw, "config.json")).state_dict()
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in weights.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [end, end := end + 2 * weight.numel()],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return folder


def test_a_dry_run_reads_no_weight_of_a_7b_base(tmp_path):
    tokenizer = shared("tokenizers/llama2-tokenizer.model").read_bytes()
    mistral = LLAMA_7B | {
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
    }
    student, first, second = (
        hollow(tmp_path / name, raw, tokenizer)
        for name, raw in (("s", LLAMA_7B), ("a", LLAMA_7B), ("b", mistral))
    )
    about = (student / "model.safetensors").stat()
    assert about.st_size > 13e9 and about.st_blocks * 512 < 1e6, "needs a file system with holes"
    rows = [
        {"prompt": f"What is {i} and {i} ?", "chosen": f"It is {2 * i} .", "rejected": "no ."}
        for i in range(120)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        "@paper-pku",
        f"--data.path={tmp_path / 'rows.jsonl'}",
        f"--model.student={student}",
        f"--model.teachers={first},{second},{first}",
        f"--run.root={tmp_path / 'runs'}",
        "--dry_run",
    ]
    # not ru_maxrss: a new process takes that over from the one that started it, which may be large
    code = "import sys, train; from minmacpo.machine import peak_mb; sys.exit(train.main(sys.argv[1:]) or print('peak', round(peak_mb())))"
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    lines = planned(ended.stdout.rpartition("peak")[0])
    assert int(ended.stdout.split()[-1]) < 700, "in MB"
    assert (
        Counter(kind for kind, _ in lines.values())["prefer/1"] == 3 * 4
        and not (tmp_path / "runs").exists()
    )
    assert 13 < float(re.search(r"([\d.]+) GB$", lines["round3/student_pos"][1])[1]) < 30


# ---- templates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{{'<|im_start|>' + role}}", "chatml"),
        ("{{'<|start_header_id|>'}}", "llama-3"),
        ("{{'[INST] <<SYS>>'}}", "llama-2"),
        ("{{'[INST] ' + m}}", "mistral"),
        ("{{'<|assistant|>'}}", "zephyr"),
        ("{{'<user>'}}", "turns"),
        ("{{'\\n\\nHuman: '}}", "plain"),
        ("{{ m }}", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "list"])
def test_another_chat_template_of_a_base_is_said(text, kind, place, tmp_path):
    if text and place == "chat_template.jinja":
        (tmp_path / place).write_text(text)
    elif text:
        told = text if place != "list" else [{"name": "default", "template": text}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": told}))
    said = template_hint(tmp_path, "vicuna")
    assert (said and re.search(r"--data\.template=(\S+)", said)[1]) == kind
    assert kind is None or template_hint(tmp_path, kind) is None


def test_the_hint_is_given_by_every_program(stub, tmp_path):
    """By a dry run, in the log of a run, and where a base is asked; of our own bases there is nothing to say."""
    shutil.copytree(stub / "bases/strong", base := tmp_path / "base")
    (base / "stage.json").unlink()
    words = [
        write_stub(tmp_path),
        f"--run.root={tmp_path / 'runs'}",
        f"--model.student={base}",
        f"--model.teachers={base},{base}",
        "--run.name=x",
        "--macpo.rounds=0",
    ]
    assert (
        "WARNING" not in invoke("train", *words, "--dry_run").err + invoke("sample", base, "hi").err
    )
    (base / "chat_template.jinja").write_text("{{'<|im_start|>'}}")
    hint = f"WARNING: {base}: has a chat template like chatml, dialogues are written as turns"
    assert (
        invoke("train", *words, "--dry_run").err.count(hint) == 1
        and hint in invoke("sample", base, "hi").err
    )
    train(*words)
    assert (tmp_path / "runs/x/log.txt").read_text().count(hint) == 1
    assert hint not in invoke("sample", tmp_path / "runs/x/round0/student_pos", "hi").err, (
        "a run knows its template"
    )
