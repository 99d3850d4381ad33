"""Each defect below, put in on purpose, makes a check fail that holds of the good run.

The defects are those of the issue's list. A run with a defect starts from the good run's data and
bases, so that the defect alone is new; the checks are those that test_macpo.py makes of good runs.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import checks
import pytest
import torch
from runs import copy_run, invoke, write_stub

from minmacpo import UserError
from minmacpo.core import lora, losses
from minmacpo.core import trainer as fit
from minmacpo.core.losses import StepTotals
from minmacpo.core.trainer import collate_examples
from minmacpo.data import chat_template as templates
from minmacpo.data.tokenizer import Tokens
from minmacpo.evaluation import measure
from minmacpo.method import agents, macpo, selection
from minmacpo.pipeline import train_stage
from minmacpo.pipeline.run import Run


def everywhere(patch, good: Callable, bad: Callable) -> None:
    """Put `bad` in the place of the library's function `good` wherever it has been imported."""
    for module in [m for name, m in sys.modules.items() if name.startswith("minmacpo.")]:
        for name in [name for name, value in vars(module).items() if value is good]:
            patch(module, name, bad)


def filter_takes_the_highest(patch) -> None:
    def most_perplexing(candidates, rng):
        return [min(candidates, key=lambda candidate: candidate.mean_logp)]

    patch(selection, "RULES", selection.RULES | {"perplexity": most_perplexing})


def sides_swapped(patch) -> None:
    good = train_stage.TrainExample

    def swapped(id, rows, reference_logps=None, weight=None):
        if reference_logps is not None:
            reference_logps = reference_logps[::-1]
        return good(id, rows[::-1], reference_logps, weight)

    patch(train_stage, "TrainExample", swapped)


def loss_prefers_the_rejected(patch) -> None:
    good = losses.sigmoid_loss

    def flipped(logps, *args, **settings):
        swapped = replace(
            logps,
            policy_chosen=logps.policy_rejected,
            policy_rejected=logps.policy_chosen,
            reference_chosen=logps.reference_rejected,
            reference_rejected=logps.reference_chosen,
        )
        return good(swapped, *args, **settings)

    flipped.__signature__ = inspect.signature(good)  # by which the loss gets its settings
    patch(losses, "PREFERENCE_LOSSES", losses.PREFERENCE_LOSSES | {"sigmoid": (flipped, True)})


def prompt_not_masked(patch) -> None:
    good = templates.render

    def unmasked(*args):
        row = good(*args)
        return Tokens(row.ids, [False] + [True] * (len(row.ids) - 1))

    everywhere(patch, good, unmasked)


def end_token_lost(patch) -> None:
    good = templates.render
    everywhere(patch, good, lambda *args: Tokens(good(*args).ids[:-1], good(*args).mask[:-1]))


def end_token_not_trained(patch) -> None:
    good = templates.render
    everywhere(patch, good, lambda *args: Tokens(good(*args).ids, [*good(*args).mask[:-1], False]))


def reference_is_the_start(patch) -> None:
    patch(agents, "reference_policy", lambda agent, dpo: agent.policy)


def teachers_given_the_filtered_answers(patch) -> None:
    patch(Run, "check_name", lambda run, stage: None)  # which would stop it at once
    good = macpo.update_agent
    students = []
    all_teachers = []

    def update_agent(agent, t, others):
        if agent.is_student:
            students.append(agent)
            all_teachers.append(others)
        else:
            macpo.sample_positives(students[-1], t)  # sampled, but not used
        return good(agent, t, all_teachers[-1])

    patch(macpo, "update_agent", update_agent)


def negatives_sampled_anew(patch) -> None:
    good = macpo.update_agent

    def update_agent(agent, t, others):
        if t > 1:
            agent.hard_negatives = macpo.sample_negatives(agent, t - 1)
        return good(agent, t, others)

    patch(macpo, "update_agent", update_agent)


def student_answers_before_its_update(patch) -> None:
    patch(Run, "check_name", lambda run, stage: None)  # which would stop it at once
    good = macpo.update_agent

    def update_agent(agent, t, others):
        if agent.is_student:
            macpo.sample_positives(agent, t)
        return good(agent, t, others)

    patch(macpo, "update_agent", update_agent)


def mean_of_means(patch) -> None:
    def train_step(model, params, units, groups, objective, optimizer, **rest):
        means = dict.fromkeys(objective.metric_names, 0)
        for group in groups:
            batch = collate_examples([units[unit] for unit in group], params[0].device)
            totals = StepTotals(examples=len(group), tokens=int(batch.mask.sum()))
            loss, metrics = objective(model, batch, totals)
            (loss / len(groups)).backward()
            for name, value in metrics.items():
                means[name] = means[name] + value / len(groups)
        means["grad_norm"] = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return means

    patch(fit, "train_step", train_step)


def first_teacher_left_in_the_slot(patch) -> None:
    good = measure.score_texts

    def score_texts(run, models, name, policy, texts):
        adapter = policy.adapter
        if adapter and adapter.name.endswith("/teacher2_pos"):
            wrong = replace(adapter, path=adapter.path.parent / "teacher1_pos")
            policy = replace(policy, adapter=wrong)
        return good(run, models, name, policy, texts)

    patch(measure, "score_texts", score_texts)


def no_adapter_in_the_slot_of_the_scorer(patch) -> None:
    good = agents.score_texts

    def score_texts(run, models, name, policy, texts):
        return good(run, models, name, replace(policy, adapter=None), texts)

    patch(agents, "score_texts", score_texts)


def start_is_the_base(patch) -> None:
    good = train_stage.StartCheck.compute_metrics

    def compute_metrics(self, examples):
        metrics = good(self, examples)
        lora.disable_adapter(self.models.get_policy(self.start).model)
        return metrics

    patch(train_stage.StartCheck, "compute_metrics", compute_metrics)


@dataclass(frozen=True)
class Case:
    defect: Callable
    check: Callable


def prefer_student(run) -> None:
    checks.check_prefer(run, 1, "student")


CASES = [
    Case(filter_takes_the_highest, checks.check_filter),
    Case(sides_swapped, prefer_student),
    Case(loss_prefers_the_rejected, prefer_student),
    Case(prompt_not_masked, prefer_student),
    Case(prompt_not_masked, checks.check_negative_student),
    Case(prompt_not_masked, checks.check_scores),
    Case(end_token_lost, checks.check_scores),
    Case(end_token_lost, checks.check_negative_student),
    Case(end_token_not_trained, checks.check_negative_student),
    Case(end_token_not_trained, prefer_student),
    Case(reference_is_the_start, checks.check_reference),
    Case(reference_is_the_start, prefer_student),
    Case(teachers_given_the_filtered_answers, checks.check_teachers_learn_the_student_s_answers),
    Case(negatives_sampled_anew, checks.check_negatives_are_cached),
    Case(student_answers_before_its_update, checks.check_student_answers_after_its_update),
    Case(mean_of_means, checks.check_accumulation),
    Case(mean_of_means, prefer_student),
    Case(mean_of_means, checks.check_negative_student),
    Case(first_teacher_left_in_the_slot, checks.check_evaluation),
    Case(no_adapter_in_the_slot_of_the_scorer, checks.check_scores),
    Case(start_is_the_base, prefer_student),
]


def short_run(stub, root, made: dict, defect: Callable | None):
    """A run with a defect (made once for all its checks), or the error that ended it."""
    if defect not in made:
        folder = root / (defect.__name__ if defect else "good")
        copy_run(stub, folder, ("data", "bases"))
        patcher = pytest.MonkeyPatch()
        with patcher.context() as context:
            if defect:
                defect(
                    lambda where, name, value: context.setattr(where, name, value, raising=False)
                )
            rounds = 2 if defect in (None, negatives_sampled_anew) else 1
            words = [f"--macpo.rounds={rounds}", "--macpo.controls=false", "--run.name=run"]
            ended = invoke("train", write_stub(folder, "x"), f"--run.root={folder}", *words)
        made[defect] = UserError(ended.err) if ended.code else folder / "run"
    return made[defect]


@pytest.fixture(scope="module")
def runs_made(stub, tmp_path_factory):
    made, root = {}, tmp_path_factory.mktemp("defects")
    return lambda defect: short_run(stub, root, made, defect)


def verdict(run, check: Callable) -> None:
    """Raises AssertionError, or what the run itself ended with."""
    if isinstance(run, UserError):
        raise run
    check(run)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.defect.__name__}-{c.check.__name__}")
def test_a_defect_does_not_pass(runs_made, case):
    with pytest.raises((AssertionError, UserError)):
        verdict(runs_made(case.defect), case.check)


@pytest.mark.parametrize(
    "check", dict.fromkeys(case.check for case in CASES), ids=lambda c: c.__name__
)
def test_the_same_checks_hold_without_a_defect(runs_made, check):
    verdict(runs_made(None), check)


def test_every_defect_of_the_issue_is_among_them():
    assert {case.defect for case in CASES} >= {
        filter_takes_the_highest,
        sides_swapped,
        prompt_not_masked,
        end_token_lost,
        reference_is_the_start,
        teachers_given_the_filtered_answers,
        negatives_sampled_anew,
        student_answers_before_its_update,
        mean_of_means,
        first_teacher_left_in_the_slot,
    }
