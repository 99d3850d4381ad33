"""The systems that MACPO is compared with, each in the words of its paper, made of the same stages.

All make as many passes over the same prompts as MACPO's student in its rounds, so that a difference
is one of method. To add a method, write a function and put it into METHODS; the command line then
knows it once its name stands in config/schema.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from minmacpo.method import ai_feedback
from minmacpo.method.agents import (
    Agent,
    AgentCheckpoint,
    learn_preferences,
    make_agents,
    sample_answers,
    sample_positives,
    sample_weak_labels,
    train_ceiling,
    train_positive,
)
from minmacpo.method.macpo import run_macpo
from minmacpo.method.monitor import observed_status, rounds
from minmacpo.method.selection import CandidateSet
from minmacpo.pipeline.artifacts import Policy, Setup, TextColumn
from minmacpo.pipeline.model_pool import Session
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.sample_stage import SampleArgs, sample
from minmacpo.pipeline.score_stage import score_texts
from minmacpo.pipeline.train_stage import SFTArgs, copy_adapter, train_sft


def run_method(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """The agents of `run.method`, each as soon as it is trained, to be measured.

    With macpo.stop = rollback the student that is kept comes last.
    """
    config = session.run.config
    method = METHODS[config.run.method]
    students = []
    for checkpoint in method(session, setup):
        yield checkpoint
        if checkpoint.agent == "student":
            students.append(checkpoint)
    if config.macpo.stop == "rollback":
        yield roll_back(session.run, students)


def roll_back(run: Run, students: Sequence[AgentCheckpoint]) -> AgentCheckpoint:
    """The student of the last round before the monitor's first alarm, as final/student_pos."""
    last = students[-1]  # `rounds` went no further than that alarm
    best = last
    status = observed_status(run, last.round)
    if status.startswith("collapsed"):
        best = students[-2]  # there is one: round 0 has nothing to be compared with
        run.log(f"the student has {status} in round {last.round}: back to round {best.round}")
    adapter = copy_adapter(run, "final/student_pos", best.adapter)
    return replace(best, agent="kept", adapter=adapter)


# --- Supervised fine-tuning


@dataclass(frozen=True, slots=True)
class Start:
    """What all baselines begin with."""

    student: Agent
    weak_labels: TextColumn
    checkpoints: list[AgentCheckpoint]


def start(session: Session, setup: Setup) -> Start:
    """Naive weak-to-strong SFT (Burns et al. 2023): the student imitates teacher 1's answers.

    The other teachers and the ceiling are trained too, to place the result between them (PGR).
    """
    student, teachers = make_agents(session, setup)
    checkpoints = []
    for teacher in teachers:
        train_positive(teacher, TextColumn(setup.splits, "d1.jsonl", "chosen"))
        checkpoints.append(teacher.checkpoint(0))
    weak_labels = sample_weak_labels(teachers[0])
    train_positive(student, weak_labels)
    checkpoints.append(student.checkpoint(0))
    if session.run.config.macpo.controls:
        checkpoints.append(train_ceiling(student))
    return Start(student, weak_labels, checkpoints)


def naive_sft(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """The student imitates teacher 1, and that is all."""
    yield from start(session, setup).checkpoints


def continued_sft(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """Naive SFT that goes on with the same labels."""
    begun = start(session, setup)
    yield from begun.checkpoints
    student = begun.student
    args = SFTArgs(
        student.dpo_args.lr,
        epochs=0,
        batch=student.dpo_args.batch,
        train_on=student.sft_args.train_on,
    )
    yield train_long(student, begun.weak_labels, student.initial_policy, args)


def confident_sft(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """SFT from the base with the auxiliary confidence loss (Burns et al. 2023; here by token).

    A part of the loss, growing over the first fifth of the steps, is towards what the student
    finds likeliest itself.
    """
    begun = start(session, setup)
    yield from begun.checkpoints
    student = begun.student
    args = replace(student.sft_args, confidence=session.run.config.sft.confidence)
    yield train_long(student, begun.weak_labels, student.bare_base, args)


def long_ceiling(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """SFT on the true answers to all prompts, from the base, for the passes of all rounds."""
    begun = start(session, setup)
    yield from begun.checkpoints
    student = begun.student
    yield train_long(student, student.prompts, student.bare_base, student.sft_args)


def train_long(student: Agent, texts: TextColumn, begin: Policy, args: SFTArgs) -> AgentCheckpoint:
    """SFT for the passes of all rounds in addition to those of `args`."""
    last_round = student.config.macpo.rounds
    passes = args.epochs + last_round * student.dpo_args.epochs
    adapter = train_sft(
        student.session,
        name=f"round{last_round}/student_pos",
        start=begin,
        texts=texts,
        args=replace(args, epochs=passes),
        seed_key=("student", "long"),
    )
    return AgentCheckpoint("student", last_round, student.base, adapter)


# --- Preference learning


def spin(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """Self-play (Chen et al. 2024): prefers the weak labels to its own answers of that moment.

    The opponent who gave those answers is the reference; there is no SFT term.
    """
    begun = start(session, setup)
    yield from begun.checkpoints
    student = begun.student
    dpo = replace(session.run.config.dpo, reference="previous", sft_weight=0.0)
    for t in rounds(session.run):
        chosen = CandidateSet("teacher1", begun.weak_labels)
        rejected = sample_positives(student, t)
        learn_preferences(student, t, [chosen], rejected, dpo=dpo)
        yield student.checkpoint(t)


def dpo_on_truth(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """DPO + SFT on the ground-truth pairs of all prompts: what preferences could give at most."""
    begun = start(session, setup)
    yield from begun.checkpoints
    chosen = CandidateSet("truth", TextColumn(setup.splits, "d2.jsonl", "chosen"))
    rejected = TextColumn(setup.splits, "d2.jsonl", "rejected")
    for t in rounds(session.run):
        learn_preferences(begun.student, t, [chosen], rejected)
        yield begun.student.checkpoint(t)


def self_rewarding(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """The student scores several answers of its own by a rubric (Yuan et al. 2024).

    It prefers the best to the worst; the reference is itself before that round.
    """
    begun = start(session, setup)
    yield from begun.checkpoints
    student = begun.student
    settings = session.run.config.feedback
    dpo = replace(session.run.config.dpo, reference="previous", sft_weight=0.0)
    for t in rounds(session.run):
        # --- Several answers to each prompt, and a question to the student about each of them
        candidates = sample_candidates(student, t, settings.candidates)
        requests = ai_feedback.ask(
            session,
            name=f"round{t}/judge_questions",
            base=student.base,
            texts=candidates,
            questions=partial(ai_feedback.rubric_questions, settings.rubric),
        )

        # --- Its verdicts, and the pairs of the best and the worst answer
        replies = sample_answers(
            student,
            f"round{t}/judgements",
            student.policy,
            seed_key=("judge", t),
            prompts=requests,
            args=SampleArgs(settings.judgements),
        )
        chosen, rejected = ai_feedback.label_by_scores(
            session.run, f"round{t}/preferences", candidates, replies
        )

        # --- Learn from them
        preferred = CandidateSet("preferred", chosen)
        learn_preferences(student, t, [preferred], rejected, dpo=dpo)
        yield student.checkpoint(t)


def rlaif(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """A weak model says which of the student's two answers is better (Lee et al. 2023).

    The labeller is the base of a teacher, which can judge; what fine-tuning taught the teacher is
    to answer. DPO on those pairs takes the place of a reward model and PPO, as in the RLCD release.
    """
    begun = start(session, setup)
    yield from begun.checkpoints

    # --- Two answers to each prompt, and both options in both orders
    settings = session.run.config.feedback
    labeller = setup.base_models["weak1"]
    candidates = sample_candidates(begun.student, 1, answers=2)
    requests = ai_feedback.ask(
        session,
        name="round1/judge_questions",
        base=labeller,
        texts=candidates,
        questions=partial(ai_feedback.comparison_questions, settings.compare, settings.options),
        compare=True,  # tells the stage from one that asks something else about these texts
    )

    # --- How likely the labeller finds each option
    scores = score_texts(
        session, "round1/judgements", Policy("weak1", labeller), {"scores": requests}
    )
    chosen, rejected = ai_feedback.label_by_comparison(
        session.run, "round1/preferences", candidates, requests, scores
    )
    yield from learn_given_preferences(begun.student, chosen, rejected)


def rlcd(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """A weak model answers every prompt under a good and under a bad tag (Yang et al. 2024).

    The answers are the pairs; nobody judges them.
    """
    begun = start(session, setup)
    yield from begun.checkpoints

    # --- The speaker answers every prompt under both tags
    speaker = setup.base_models["weak1"]
    prompts = begun.student.prompts
    answers = {}
    for tag in ("good", "bad"):
        tagged = ai_feedback.tagged_prompts(
            session,
            name=f"round1/{tag}_tag_prompts",
            base=speaker,
            prompts=prompts,
            good=tag == "good",
        )
        stage = sample(
            session,
            name=f"round1/{tag}_tag_answers",
            policy=Policy(f"weak1_{tag}_tag", speaker),
            prompts=tagged,
            seed_key=("weak1", tag),
        )
        answers[tag] = TextColumn(stage)

    # --- Chosen is what it says under the good one; the tags are gone
    chosen, rejected = ai_feedback.label_by_tag(
        session.run, "round1/preferences", prompts, good=answers["good"], bad=answers["bad"]
    )
    yield from learn_given_preferences(begun.student, chosen, rejected)


def sample_candidates(agent: Agent, t: int, answers: int) -> TextColumn:
    """Several answers of an agent to every prompt, to be judged."""
    return sample_answers(
        agent,
        f"round{t}/candidates_{agent.name}",
        agent.policy,
        seed_key=("candidates", t),
        args=SampleArgs(answers),
    )


def learn_given_preferences(
    student: Agent, chosen: TextColumn, rejected: TextColumn
) -> Iterator[AgentCheckpoint]:
    """DPO on given pairs, once a round; the reference is the naive student."""
    dpo = replace(student.config.dpo, reference="init", sft_weight=0.0)
    preferred = CandidateSet("preferred", chosen)
    for t in rounds(student.session.run):
        learn_preferences(student, t, [preferred], rejected, dpo=dpo)
        yield student.checkpoint(t)


METHODS: dict[str, Callable[[Session, Setup], Iterator[AgentCheckpoint]]] = {
    "macpo": run_macpo,
    "sft": naive_sft,
    "sft-continued": continued_sft,
    "confident": confident_sft,
    "spin": spin,
    "self-rewarding": self_rewarding,
    "rlaif": rlaif,
    "rlcd": rlcd,
    "dpo-truth": dpo_on_truth,
    "ceiling": long_ceiling,
}
