"""Each defect below, put in on purpose, makes a check fail that holds of the good run.

A run with a defect starts from the good run's data and bases, so that the defect alone is new; the
checks are those that test_macpo.py makes of good runs.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import checks
import pytest
import torch
from runs import copy_run, invoke, write_stub

from minmacpo import UserError
from minmacpo.core import losses, trainer
from minmacpo.core.lora import disable_adapter
from minmacpo.core.sft_loss import StepTotals
from minmacpo.data import chat_template
from minmacpo.data.tokenizer import Tokens
from minmacpo.evaluation import measure
from minmacpo.method import agents, macpo, selection
from minmacpo.pipeline import preference_stage
from minmacpo.pipeline.model_pool import ModelPool
from minmacpo.pipeline.run import Run

Patch = pytest.MonkeyPatch


def patch_everywhere(patch: Patch, good: Callable, bad: Callable) -> None:
    """Put `bad` in the place of the library's function `good` wherever it has been imported."""
    modules = [module for name, module in sys.modules.items() if name.startswith("minmacpo.")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if value is good:
                patch.setattr(module, name, bad)


# ---- selection and pairs --------------------------------------------------------------------


def filter_takes_the_highest(patch: Patch) -> None:
    def most_perplexing(candidates, rng):
        return [min(candidates, key=lambda candidate: candidate.mean_logp)]

    patch.setitem(selection.RULES, "perplexity", most_perplexing)


def sides_swapped(patch: Patch) -> None:
    good = preference_stage.pair_example

    def pair_example(loaded, pair):
        example = good(loaded, pair)
        rows = example.rows[::-1]
        return replace(example, rows=rows, reference_logps=example.reference_logps[::-1])

    patch.setattr(preference_stage, "pair_example", pair_example)


def reference_is_the_start(patch: Patch) -> None:
    patch.setattr(agents, "reference_policy", lambda agent, dpo: agent.policy)


# ---- rows and losses ------------------------------------------------------------------------


def loss_prefers_the_rejected(patch: Patch) -> None:
    good = losses.sigmoid_loss

    @functools.wraps(good)
    def sigmoid_loss(logps, *args, **settings):
        swapped = replace(
            logps,
            policy_chosen=logps.policy_rejected,
            policy_rejected=logps.policy_chosen,
            reference_chosen=logps.reference_rejected,
            reference_rejected=logps.reference_chosen,
        )
        return good(swapped, *args, **settings)

    patch.setitem(losses.PREFERENCE_LOSSES, "sigmoid", losses.LossKind(sigmoid_loss, "DPO"))


def patch_rows(patch: Patch, change: Callable[[Tokens], Tokens]) -> None:
    """Let `change` alter every row that is rendered."""
    good = chat_template.render

    def render(*args):
        return change(good(*args))

    patch_everywhere(patch, good, render)


def prompt_not_masked(patch: Patch) -> None:
    patch_rows(patch, lambda row: Tokens(row.ids, [False] + [True] * (len(row.ids) - 1)))


def end_token_lost(patch: Patch) -> None:
    patch_rows(patch, lambda row: Tokens(row.ids[:-1], row.mask[:-1]))


def end_token_not_trained(patch: Patch) -> None:
    patch_rows(patch, lambda row: Tokens(row.ids, [*row.mask[:-1], False]))


def mean_of_means(patch: Patch) -> None:
    """A step whose micro-batches count alike, however many tokens and pairs they have."""

    def train_step(
        model, params, examples, micro_batches, loss, optimizer, *, progress=1.0, **rest
    ):
        total = 0
        for group in micro_batches:
            batch = trainer.collate_examples([examples[i] for i in group], params[0].device)
            tokens = int(batch.mask.sum())
            totals = StepTotals(examples=len(group), tokens=tokens, progress=progress)
            value, metrics = loss(model, batch, totals)
            (value / len(micro_batches)).backward()
            total = total + torch.stack(list(metrics.values())) / len(micro_batches)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics = dict(zip(loss.metric_names, total.unbind(), strict=True))
        return metrics | {"grad_norm": grad_norm}

    patch.setattr(trainer, "train_step", train_step)


# ---- the algorithm --------------------------------------------------------------------------


def allow_names_twice(patch: Patch) -> None:
    """Switch off the run's own check, which would stop the next two defects at once."""
    patch.setattr(Run, "check_name", lambda run, stage: None)


def teachers_given_the_filtered_answers(patch: Patch) -> None:
    allow_names_twice(patch)
    good = macpo.update_agent
    student_and_teachers = []

    def update_agent(agent, t, others):
        if agent.is_student:
            student_and_teachers[:] = [agent, others]
            good(agent, t, others)
        else:
            student, teachers = student_and_teachers
            macpo.sample_positives(student, t)  # sampled, but not used
            good(agent, t, teachers)

    patch.setattr(macpo, "update_agent", update_agent)


def negatives_sampled_anew(patch: Patch) -> None:
    good = macpo.update_agent

    def update_agent(agent, t, others):
        if t > 1:
            agent.hard_negatives = macpo.sample_negatives(agent, t - 1)
        good(agent, t, others)

    patch.setattr(macpo, "update_agent", update_agent)


def student_answers_before_its_update(patch: Patch) -> None:
    allow_names_twice(patch)
    good = macpo.update_agent
    early_answers = {}
    good_positives = macpo.sample_positives

    def update_agent(agent, t, others):
        if agent.is_student:
            early_answers[t] = good_positives(agent, t)
        good(agent, t, others)

    def sample_positives(agent, t, name="", answers=1):
        if agent.is_student:
            return early_answers[t]
        return good_positives(agent, t, name, answers)

    patch.setattr(macpo, "update_agent", update_agent)
    patch.setattr(macpo, "sample_positives", sample_positives)


# ---- adapters -------------------------------------------------------------------------------


def first_teacher_left_in_the_model(patch: Patch) -> None:
    good = measure.score_texts

    def score_texts(session, name, policy, texts):
        adapter = policy.adapter
        if adapter and adapter.name.endswith("/teacher2_pos"):
            wrong = replace(adapter, path=adapter.path.parent / "teacher1_pos")
            policy = replace(policy, adapter=wrong)
        return good(session, name, policy, texts)

    patch.setattr(measure, "score_texts", score_texts)


def scorer_without_adapter(patch: Patch) -> None:
    good = agents.score_texts

    def score_texts(session, name, policy, texts):
        return good(session, name, replace(policy, adapter=None), texts)

    patch.setattr(agents, "score_texts", score_texts)


def start_is_the_base(patch: Patch) -> None:
    good_get = ModelPool.get_policy
    good_train = agents.train_dpo
    is_training = []

    def get_policy(models, policy):
        loaded = good_get(models, policy)
        if is_training:
            disable_adapter(loaded.model)
        return loaded

    def train_dpo(*args, **settings):
        is_training.append(True)
        try:
            return good_train(*args, **settings)
        finally:
            is_training.pop()

    patch.setattr(ModelPool, "get_policy", get_policy)
    patch.setattr(agents, "train_dpo", train_dpo)


# ---- the checks that must find them ---------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A defect, and a check that must fail of a run with it."""

    defect: Callable[[Patch], None]
    check: Callable[[Path], None]


def check_student_update(run: Path) -> None:
    """The student's first contrastive step is DPO + SFT on its pairs."""
    checks.check_prefer(run, 1, "student")


CASES = [
    Case(filter_takes_the_highest, checks.check_filter),
    Case(sides_swapped, check_student_update),
    Case(loss_prefers_the_rejected, check_student_update),
    Case(prompt_not_masked, check_student_update),
    Case(prompt_not_masked, checks.check_negative_student),
    Case(prompt_not_masked, checks.check_scores),
    Case(end_token_lost, checks.check_scores),
    Case(end_token_lost, checks.check_negative_student),
    Case(end_token_not_trained, checks.check_negative_student),
    Case(end_token_not_trained, check_student_update),
    Case(reference_is_the_start, checks.check_reference),
    Case(reference_is_the_start, check_student_update),
    Case(teachers_given_the_filtered_answers, checks.check_teachers_learn_the_student_s_answers),
    Case(negatives_sampled_anew, checks.check_negatives_are_cached),
    Case(student_answers_before_its_update, checks.check_student_answers_after_its_update),
    Case(mean_of_means, checks.check_accumulation),
    Case(mean_of_means, check_student_update),
    Case(mean_of_means, checks.check_negative_student),
    Case(first_teacher_left_in_the_model, checks.check_evaluation),
    Case(scorer_without_adapter, checks.check_scores),
    Case(start_is_the_base, check_student_update),
]
CHECKS = list(dict.fromkeys(case.check for case in CASES))

# Each defect costs a run of its own; these stand by in the slow suite
SLOW = {
    end_token_not_trained,
    mean_of_means,
    scorer_without_adapter,
    student_answers_before_its_update,
    teachers_given_the_filtered_answers,
}


@functools.cache
def run_with(defect: Callable[[Patch], None] | None, stub: Path, root: Path) -> Path | UserError:
    """A run with a defect (made once for all its checks), or the error that ended it."""
    folder = root / (defect.__name__ if defect else "good")
    copy_run(stub, folder, ("data", "bases"))
    # The defect of negatives shows in the second round
    rounds = 2 if defect in (None, negatives_sampled_anew) else 1
    words = [f"--macpo.rounds={rounds}", "--macpo.controls=false", "--run.name=run"]
    with Patch.context() as patch:
        if defect:
            defect(patch)
        ended = invoke("train", write_stub(folder, "x"), f"--run.root={folder}", *words)
    return UserError(ended.err) if ended.code else folder / "run"


@pytest.fixture(scope="module")
def make_run(stub, tmp_path_factory) -> Callable[[Callable | None], Path | UserError]:
    """A function that makes the run with a defect, or without any (None)."""
    root = tmp_path_factory.mktemp("defects")
    return lambda defect: run_with(defect, stub, root)


def check_run(run: Path | UserError, check: Callable[[Path], None]) -> None:
    """Raises AssertionError, or what the run itself ended with."""
    if isinstance(run, UserError):
        raise run
    check(run)


def case_name(case: Case) -> str:
    return f"{case.defect.__name__}-{case.check.__name__}"


def with_mark(case: Case):
    return pytest.param(case, marks=pytest.mark.slow if case.defect in SLOW else ())


@pytest.mark.parametrize("case", [with_mark(case) for case in CASES], ids=case_name)
def test_a_defect_does_not_pass(make_run, case):
    run = make_run(case.defect)

    with pytest.raises((AssertionError, UserError)):
        check_run(run, case.check)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_same_checks_hold_without_a_defect(make_run, check):
    check_run(make_run(None), check)
