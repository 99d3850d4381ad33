"""The systems that MACPO is compared with, each in the words of its paper, made of the same stages.

All make as many passes over the same prompts as MACPO's student in its rounds, so that a difference is one of
method.
"""

from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial

from minmacpo.method import ai_feedback as feedback
from minmacpo.method.macpo import (
    Agent,
    AgentCheckpoint,
    ceiling,
    contrast,
    imitate,
    make_agents,
    positives,
    roll_back,
    rounds,
    run_macpo,
)
from minmacpo.method.selection import CandidateSet
from minmacpo.pipeline.base_models import Setup
from minmacpo.pipeline.model_pool import Session, TextColumn
from minmacpo.pipeline.run import Stage
from minmacpo.pipeline.sample_stage import sample
from minmacpo.pipeline.score_stage import score_texts
from minmacpo.pipeline.train_stage import TrainArgs, sft


def run_method(session: Session, ground: Setup) -> Iterator[AgentCheckpoint]:
    """The agents of `run.method`, each as soon as it is trained; then the student that macpo.stop = rollback keeps."""
    methods = {
        "macpo": run_macpo,
        "sft": start,
        "sft-continued": continued,
        "confident": confident,
        "spin": spin,
        "self-rewarding": self_rewarding,
        "rlaif": rlaif,
        "rlcd": rlcd,
        "dpo-truth": dpo_truth,
        "ceiling": truth,
    }
    students = []
    for trained in methods[session.config.run.method](session, ground):
        yield trained
        students += [trained] if trained.agent == "student" else []
    if session.config.macpo.stop == "rollback":
        yield roll_back(session, students)


def start(
    session: Session, ground: Setup
) -> Generator[AgentCheckpoint, None, tuple[Agent, TextColumn]]:
    """Naive weak-to-strong SFT (Burns et al. 2023): the student imitates teacher 1's answers. The other
    teachers and the ceiling are trained and measured too, to place the result between them (PGR)."""
    student, teachers = make_agents(session, ground)
    truth = TextColumn(ground.slices, "d1.jsonl", "chosen")
    for teacher in teachers:
        yield imitate(teacher, truth)
    labels = positives(teachers[0], 1, "round0/weak_labels")
    yield imitate(student, labels)
    if session.config.macpo.controls:
        yield ceiling(student)
    return student, labels


def continued(session: Session, ground: Setup) -> Iterator[AgentCheckpoint]:
    """Naive SFT that goes on with the same labels."""
    student, labels = yield from start(session, ground)
    yield imitate_long(
        student, labels, student.positive[0], replace(student.dpo_args, epochs=0), 0.0
    )


def confident(session: Session, ground: Setup) -> Iterator[AgentCheckpoint]:
    """SFT with the auxiliary confidence loss, from the base (Burns et al. 2023; here token by token): a share
    of the loss, growing over the first fifth of the steps, is towards what the student finds likeliest itself."""
    student, labels = yield from start(session, ground)
    yield imitate_long(student, labels, None, student.sft_args, session.config.sft.confidence)


def imitate_long(
    student: Agent,
    labels: TextColumn,
    first: Stage | None,
    train_args: TrainArgs,
    confidence: float,
) -> AgentCheckpoint:
    """SFT from `first` for the passes of all rounds in addition to the pace's own."""
    session, rounds = student.session, student.session.config.macpo.rounds
    train_args = replace(train_args, epochs=train_args.epochs + rounds * student.dpo_args.epochs)
    name, key = f"round{rounds}/student_pos", ("student", "long")
    learned = sft(
        session, name, student.base, labels, first, train_args, key, confidence=confidence
    )
    return AgentCheckpoint("student", rounds, student.base, learned)


def spin(session: Session, ground: Setup) -> Iterator[AgentCheckpoint]:
    """Self-play (Chen et al. 2024): each round prefers the weak labels to its own answers of that moment.
    The opponent who gave them is the reference; there is no SFT term."""
    student, labels = yield from start(session, ground)
    loss = replace(session.config.dpo, reference="previous", sft_weight=0.0)
    for t in rounds(session):
        yield contrast(student, t, [CandidateSet("teacher1", labels)], positives(student, t), loss)


def dpo_truth(session: Session, ground: Setup) -> Iterator[AgentCheckpoint]:
    """DPO + γ SFT on the ground-truth pairs of all prompts: what preferences could give at most."""
    student, _ = yield from start(session, ground)
    good, bad = (TextColumn(ground.slices, "d2.jsonl", side) for side in ("chosen", "rejected"))
    for t in rounds(session):
        yield contrast(student, t, [CandidateSet("truth", good)], bad, session.config.dpo)


def truth(session: Session, ground: Setup) -> Iterator[AgentCheckpoint]:
    """SFT on the ground truth of all prompts, from the base, for the passes of all rounds."""
    student, _ = yield from start(session, ground)
    yield imitate_long(student, student.queries, None, student.sft_args, 0.0)


def self_rewarding(session: Session, ground: Setup) -> Iterator[AgentCheckpoint]:
    """Each round the student answers every prompt several times, scores its answers by a rubric itself, and
    prefers the best to the worst (Yuan et al. 2024); the reference is itself before that round."""
    student, _ = yield from start(session, ground)
    settings, loss = (
        session.config.feedback,
        replace(session.config.dpo, reference="previous", sft_weight=0.0),
    )
    for t in rounds(session):
        said = several(student, t, settings.candidates)
        asked = feedback.ask(
            session,
            f"round{t}/judge_questions",
            student.base,
            said,
            partial(feedback.judgements, settings),
        )
        key = ("student", "judge", t)
        replies = sample(
            session,
            f"round{t}/judgements",
            student.base,
            student.positive[-1],
            asked,
            "student",
            key,
            settings.judgements,
        )
        chosen, rejected = feedback.prefer_by(
            session,
            f"round{t}/preferences",
            [said.stage, replies],
            partial(feedback.by_score, settings, said, TextColumn(replies)),
        )
        yield contrast(student, t, [CandidateSet("preferred", chosen)], rejected, loss)


def rlaif(session: Session, ground: Setup) -> Iterator[AgentCheckpoint]:
    """The student answers every prompt twice, and the base of a weak teacher (which can judge; what fine-tuning taught
    it is to answer) says which answer is better (Lee et al. 2023; as in the RLCD release); DPO on those pairs takes
    the place of a reward model and PPO."""
    student, _ = yield from start(session, ground)
    labeller, said = ground.bases["weak1"], several(student, 1, 2)
    asked = feedback.ask(
        session,
        "round1/judge_questions",
        labeller,
        said,
        partial(feedback.comparisons, session.config.feedback),
        compare=True,
    )
    scores = score_texts(session, "round1/judgements", labeller, None, asked)
    yield from learn_preferences(
        student,
        feedback.prefer_by(
            session,
            "round1/preferences",
            [said.stage, scores],
            partial(feedback.by_comparison, said, scores),
        ),
    )


def rlcd(session: Session, ground: Setup) -> Iterator[AgentCheckpoint]:
    """A weak model answers every prompt under a good and under a bad tag; the answers are the pairs, nobody
    judges them (Yang et al. 2024)."""
    student, _ = yield from start(session, ground)
    speaker, sides, queries = ground.bases["weak1"], [], student.queries
    for side in ("good", "bad"):
        asked = feedback.tagged_prompts(
            session, f"round1/{side}_tag_prompts", speaker, queries, side == "good"
        )
        name, key = f"round1/{side}_tag_answers", ("weak1", side)
        sides.append(
            TextColumn(sample(session, name, speaker, None, asked, f"weak1_{side}_tag", key))
        )
    inputs = [queries.stage, *(said.stage for said in sides)]
    yield from learn_preferences(
        student,
        feedback.prefer_by(
            session, "round1/preferences", inputs, partial(feedback.by_tag, queries, *sides)
        ),
    )


def several(agent: Agent, t: int, answers: int) -> TextColumn:
    """`answers` answers of an agent to every prompt."""
    name, key = f"round{t}/candidates_{agent.name}", (agent.name, "candidates", t)
    adapter = agent.positive[-1]
    return TextColumn(
        sample(agent.session, name, agent.base, adapter, agent.queries, agent.name, key, answers)
    )


def learn_preferences(student: Agent, preference: feedback.Preference) -> Iterator[AgentCheckpoint]:
    """DPO on given pairs, once a round; the reference is the naive student."""
    chosen, rejected = preference
    loss = replace(student.session.config.dpo, reference="init", sft_weight=0.0)
    for t in rounds(student.session):
        yield contrast(student, t, [CandidateSet("preferred", chosen)], rejected, loss)
