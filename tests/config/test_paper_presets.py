"""The presets of the paper against their sources: the released scripts and their framework."""

import re

import pytest
from conftest import REPO
from runs import invoke

from minmacpo.config.parse import parse
from minmacpo.config.schema import flatten
from minmacpo.core.trainer import OptimizerConfig

# From the released training scripts; "framework": its defaults in the pinned versions, where the
# scripts are silent
SCRIPTS = {
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
    "paper-hh-helpful": {"data.template": ("vicuna-macpo",), "sft.student_batch": 32},
    "paper-hh-harmless": {
        "data.template": ("vicuna-macpo",),
        "sft.student_batch": 2 * 1 * 8,
    },  # no accumulation in that script
    "paper-pku": {"data.template": ("alpaca-macpo",), "sft.student_batch": 32},
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
    schedule = OptimizerConfig(1.0, 10, 1)
    assert (schedule.min_lr_ratio, schedule.betas, schedule.weight_decay) == (
        0.0,
        (0.9, 0.999),
        0.0,
    ) and schedule.lr_at(0) == 1.0
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
