"""MACPO (Lyu et al., arXiv 2410.07672) on one page.

K weak teachers and one strong student align each other. An agent is a frozen base model with two
LoRA adapters: `positive`, how it should answer, and `negative`, how it should not.

Every call below that learns, samples or scores is a *stage* of the run: it returns at once if its
folder exists, and computes the folder otherwise. So this page can be read as the algorithm, and a
killed run continues where it stopped.

    D1     prompts with a good and a bad answer: the ground truth, which only the teachers see
    Q      prompts without answers
    t      the round, 1 ... R; round 0 is the initialisation

The comments number its parts. I1, I2: the teachers' positive and negative adapters; I3 to I5: the
student's, from the first teacher's answers; I6: hard negatives. R1: the teachers answer; R2: one
answer is selected per prompt; R3: the student learns; R4: it answers; R5: the teachers learn.
"""

from collections.abc import Iterator, Sequence

from minmacpo.method.agents import (
    Agent,
    AgentCheckpoint,
    learn_preferences,
    make_agents,
    sample_negatives,
    sample_positives,
    sample_weak_labels,
    score_candidates,
    train_ceiling,
    train_continued,
    train_negative,
    train_positive,
)
from minmacpo.method.monitor import rounds
from minmacpo.method.negatives import NEGATIVES
from minmacpo.method.selection import Selection
from minmacpo.pipeline.artifacts import Setup, TextColumn
from minmacpo.pipeline.model_pool import Session


def run_macpo(session: Session, setup: Setup) -> Iterator[AgentCheckpoint]:
    """Train all agents; yields each of them after each of its updates, to be measured."""
    settings = session.run.config.macpo
    student, teachers = make_agents(session, setup)

    # --- Round 0: the teachers learn good and bad behaviour from ground truth
    for teacher in teachers:
        train_positive(teacher, TextColumn(setup.splits, "d1.jsonl", "chosen"))  # I1
        teacher.negative_data = TextColumn(setup.splits, "d1.jsonl", "rejected")
        train_negative(teacher, t=0)  # I2
        teacher.hard_negatives = sample_negatives(teacher, t=0)  # I6
        yield teacher.checkpoint(0)

    # --- Round 0: the student learns both from what the first teacher says
    weak_labels = sample_weak_labels(teachers[0])  # I3
    train_positive(student, weak_labels)  # I4
    student.negative_data = sample_negatives(teachers[0], t=0, name="weak_negatives")
    train_negative(student, t=0)  # I5
    student.hard_negatives = sample_negatives(student, t=0)  # I6
    yield student.checkpoint(0)

    for t in rounds(session.run):
        # --- R1 to R3: the student learns from its teachers
        update_agent(student, t, others=teachers)
        yield student.checkpoint(t)

        # --- R4, R5: the teachers learn from the student's new answers
        if settings.update_teachers:  # -IW: they do not learn
            for teacher in teachers:
                update_agent(teacher, t, others=[student])
                yield teacher.checkpoint(t)

    if settings.controls:
        yield train_continued(student, weak_labels)
        yield train_ceiling(student)


def update_agent(agent: Agent, t: int, others: Sequence[Agent]) -> None:
    """One round of one agent: it prefers the others' answers to its own bad ones.

    The student learns from the least perplexing of its teachers' answers; a teacher, from what the
    student answers after its update.
    """
    settings = agent.config.macpo

    # --- Once a round, if asked for: a new negative adapter from the updated positive one
    if settings.refresh_negatives and t > 1:
        train_negative(agent, t - 1)
        agent.hard_negatives = sample_negatives(agent, t - 1)

    # --- R1, R4: the sources answer every prompt
    self_fraction = settings.self_fraction if settings.mutual_positives else 1.0  # -MP
    sources = list(others) if self_fraction < 1 else []
    if self_fraction > 0:
        sources.append(agent)
    answers = {}
    for source in sources:
        name = ""
        if source is agent and agent.is_student and self_fraction < 1:
            name = "own_student"  # the teachers will ask it again after its update
        count = 1 if source.is_student else settings.answers
        answers[source.name] = sample_positives(source, t, name, count)

    # --- R2: every answer gets its perplexity under the agent (eq. 6); the least perplexing one
    #     is chosen when the pairs are made (eq. 7)
    candidates = score_candidates(agent, t, sources, answers, others)
    selection = Selection(
        rules=settings.select,
        keep_fraction=settings.keep_fraction,
        pair_weighting=settings.pair_weighting,
        self_agent=agent.name,
        self_fraction=self_fraction,
    )

    # --- R3, R5: DPO + SFT on the chosen answers over the agent's own negatives
    rejected = NEGATIVES[settings.negatives](agent, t, others)
    learn_preferences(agent, t, candidates, rejected, selection=selection)
