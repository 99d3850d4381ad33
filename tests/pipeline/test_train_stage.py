"""What stands around a training: when the loss is compiled, and the check before the first step."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from runs import new_variant, stages_of
from test_short_memory import with_short_memory
from test_trainer import answers, pairs, slotted

from minmacpo import UserError
from minmacpo.config.parse import parse
from minmacpo.core.losses import PreferenceLoss
from minmacpo.core.scoring import score
from minmacpo.core.trainer import BatchPlan, OptimizerConfig
from minmacpo.pipeline import recompute
from minmacpo.pipeline.preference_stage import StartCheck
from minmacpo.pipeline.recompute import set_recompute
from minmacpo.pipeline.train_stage import should_compile
from minmacpo.runtime.distributed import SINGLE_PROCESS


@pytest.mark.parametrize(
    ("setting", "may_compile", "steps", "compiled"),
    [
        ("auto", False, 10**9, False),  # on a CPU: the default run does not wait for a compiler
        ("auto", True, 10, False),
        ("auto", True, 10**9, True),
        ("true", True, 1, True),
        ("false", False, 10**9, False),
    ],
)
def test_auto_compiles_only_where_a_stage_is_long_enough(
    setting, may_compile, steps, compiled, seed
):
    config = SimpleNamespace(run=SimpleNamespace(compile=setting))
    models = SimpleNamespace(config=config, may_compile=may_compile)
    loaded = SimpleNamespace(model=random_model(seed))
    schedule = OptimizerConfig(1e-3, steps, 16)

    assert should_compile(models, loaded, answers(seed, 5), schedule) is compiled


def start_check(model, loss: PreferenceLoss) -> StartCheck:
    """The check of a training that starts from its reference, both of them `model`."""
    policy = SimpleNamespace(adapter=None)
    return StartCheck(
        context=SimpleNamespace(
            name="round1/student_pos",
            dist=SimpleNamespace(is_sharded=False),
            log_detail=lambda line: None,
        ),
        models=SimpleNamespace(
            get_policy=lambda policy: SimpleNamespace(model=model),
            device="cpu",
            dtype=torch.float32,
        ),
        start=policy,
        reference=policy if loss.requires_reference else None,
        loss=loss,
        packed=False,
    )


def scored_pairs(model, seed: int) -> list:
    """Pairs with the reference log-probabilities that the model gives them."""
    examples = []
    for pair in pairs(seed, 12):
        logps = score(model, pair.rows, 10**6, log=lambda line: None)
        examples.append(replace(pair, reference_logps=tuple(logps)))
    return examples


def test_the_check_takes_half_the_pairs_where_memory_is_short(seed):
    model, _ = slotted(seed)
    check = start_check(model, PreferenceLoss(0.2, 0.3))
    examples = scored_pairs(model, seed)

    for max_tokens in (10**9, 200):
        with_short_memory(model, max_tokens)
        (row,) = check(examples)
        assert row["step"] == 0
        assert row["rewards/margins"] == pytest.approx(0, abs=1e-4)

    with_short_memory(model, 3)
    with pytest.raises(UserError, match="out of memory before the first step"):
        check(examples)


def test_the_check_finds_stored_values_that_are_not_the_references(seed):
    model, _ = slotted(seed)
    check = start_check(model, PreferenceLoss(0.2, 0.3))
    examples = scored_pairs(model, seed)
    examples[3] = replace(examples[3], reference_logps=(-1.0, -2.0))

    with pytest.raises(UserError, match="stored reference logps differ"):
        check(examples)


def test_the_check_finds_a_reference_that_computes_no_numbers(seed):
    model, _ = slotted(seed)
    check = start_check(model, PreferenceLoss(0.2, 0.3))
    examples = scored_pairs(model, seed)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)

    with pytest.raises(UserError, match="stored reference logps differ"):
        check(examples)


def test_the_check_finds_a_margin_that_is_no_number(seed):
    model, _ = slotted(seed)
    check = start_check(model, PreferenceLoss(beta=math.nan, sft_weight=0.3))

    with pytest.raises(UserError, match="the margin is not zero"):
        check(scored_pairs(model, seed))


def test_the_check_of_a_loss_without_a_reference_looks_at_none(seed):
    model, _ = slotted(seed)
    check = start_check(model, PreferenceLoss(0.2, 0.3, loss_type="simpo", target_margin=0.5))
    examples = [replace(pair, reference_logps=None) for pair in pairs(seed, 6)]

    (row,) = check(examples)

    assert row["rewards/margins"] != 0, "there is no reference to be equal to"


@pytest.mark.parametrize(
    ("setting", "free", "twice"),
    [("auto", 2**40, False), ("auto", 2**10, True), ("true", 2**40, True), ("false", 2**10, False)],
)
def test_blocks_are_computed_twice_as_the_setting_says(setting, free, twice, seed, monkeypatch):
    monkeypatch.setattr(recompute, "free_bytes", lambda device: free)
    model = random_model(seed)
    examples = answers(seed, 5)
    lines = []
    context = SimpleNamespace(
        name="round0/student_pos",
        run=SimpleNamespace(config=parse([f"--run.checkpoint={setting}"]).config),
        dist=SINGLE_PROCESS,
        log=lines.append,
    )

    set_recompute(context, model, examples, BatchPlan([[[0, 1], [2, 3, 4]]]))

    assert model.recompute_blocks is twice
    assert len(lines) == (setting == "auto" and twice)
    assert all("run.checkpoint" in line for line in lines)


def test_a_run_whose_blocks_are_computed_twice_has_the_same_weights(stub, tmp_path):
    """Another setting makes no other stage, so that a run short of memory goes on with it."""
    words = ("--run.checkpoint=true", "--macpo.rounds=1", "--macpo.controls=false")
    run = new_variant(stub, tmp_path / "runs", *words, parts=("data",))
    for stage in ("bases/strong", "bases/weak1", "round0/student_neg", "round1/student_pos"):
        (weights,) = (stub / stage).glob("*.safetensors")
        assert (run / stage / weights.name).read_bytes() == weights.read_bytes()
        assert stages_of(run)[stage]["fingerprint"] == stages_of(stub)[stage]["fingerprint"]
