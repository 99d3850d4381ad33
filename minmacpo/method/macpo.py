"""MACPO (Lyu et al., arXiv 2410.07672), the algorithm on one page.

K weak teachers T_k and one strong student S; π is an agent's positive adapter, ν its negative one.

    I1-I2  π_k ← sft(T_k, D1 good)           ν_k ← sft from π_k (D1 bad)
    I3-I5  π_S ← sft(S, answers of π_1)      ν_S ← sft from π_S (answers of ν_1)
    I6     n_S, n_k ← answers of ν_S, ν_k on every prompt, sampled once: the hard negatives
    round  R1  y_k ← answers of π_k
           R2  p   ← per prompt, the y_k that is least perplexing to π_S       (eq. 6, 7)
           R3  π_S ← DPO + γ SFT (p over n_S)                                  (the student learns)
           R4  s   ← answers of π_S
           R5  π_k ← DPO + γ SFT (s over n_k)                                  (the teachers learn)

Each call of stages.py is a stage: it is computed only if its folder is missing. Every agent is yielded
as soon as it is trained, so that the caller can measure it while its base is in memory. This module
moves no tensor: it speaks of agents, files and stages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from minmacpo.config.schema import Dpo
from minmacpo.method.ai_feedback import tagged_prompts
from minmacpo.method.monitor import verdict
from minmacpo.method.pairs import pairs
from minmacpo.method.selection import CandidateSet
from minmacpo.pipeline.base_models import Base, Setup
from minmacpo.pipeline.model_pool import Session, TextColumn
from minmacpo.pipeline.run import Stage
from minmacpo.pipeline.sample_stage import sample
from minmacpo.pipeline.score_stage import score_texts
from minmacpo.pipeline.train_stage import TrainArgs, keep, prefer, sft

TAIL = 2.0  # temperature of macpo.negatives = tail


@dataclass(slots=True)
class Agent:
    """One side of the exchange: how it learns, its adapters so far, its cached negatives."""

    session: Session
    queries: TextColumn  # D2, of which only the prompts Q are used
    name: str  # "student", "teacher1", …
    base: Base
    sft_args: TrainArgs  # of SFT on good answers
    negative_sft_args: TrainArgs  # of SFT on bad ones
    dpo_args: TrainArgs  # of a round
    bad: TextColumn | None = None  # what ν is trained on
    positive: list[Stage] = field(default_factory=list)  # π^(0), π^(1), … the last is π
    negative: Stage | None = None  # ν
    cached: TextColumn | None = None  # n: the answers of ν to every prompt


@dataclass(frozen=True, slots=True)
class AgentCheckpoint:
    """An agent as it stands after `round`: what the caller measures."""

    agent: str
    round: int
    base: Base
    adapter: Stage


def make_agents(session: Session, ground: Setup) -> tuple[Agent, list[Agent]]:
    """The student and the K teachers, with their bases and paces."""
    s, d, queries = (
        session.config.sft,
        session.config.dpo,
        TextColumn(ground.slices, "d2.jsonl", "chosen"),
    )
    learn = (
        TrainArgs(s.student_lr, s.student_epochs, s.student_batch or s.batch),
        TrainArgs(s.student_negative_lr, s.student_negative_epochs, s.batch),
        TrainArgs(d.student_lr, d.epochs, d.batch),
    )
    teach = (
        TrainArgs(s.teacher_lr, s.teacher_epochs, s.batch),
        TrainArgs(s.teacher_negative_lr, s.teacher_negative_epochs, s.batch),
        TrainArgs(d.teacher_lr, d.epochs, d.batch),
    )
    weak = range(1, session.config.macpo.teachers + 1)
    student = Agent(session, queries, "student", ground.bases["strong"], *learn)
    return student, [
        Agent(session, queries, f"teacher{k}", ground.bases[f"weak{k}"], *teach) for k in weak
    ]


def run_macpo(session: Session, ground: Setup) -> Iterator[AgentCheckpoint]:
    """Initialisation, all rounds, and the controls; yields each agent after each of its updates."""
    settings = session.config.macpo
    student, teachers = make_agents(session, ground)
    good, bad = (TextColumn(ground.slices, "d1.jsonl", side) for side in ("chosen", "rejected"))
    for teacher in teachers:  # I1, I2, I6: on ground truth
        yield initialise(teacher, good, bad)
        positives(teacher, 1)  # R1 of the first round, while its base is in memory
    labels = positives(teachers[0], 1, "round0/weak_labels")  # I3
    yield initialise(student, labels, negatives(teachers[0], 0, "round0/weak_negatives"))  # I4 - I6

    for t in rounds(session):
        yield update(student, t, teachers)  # R1 - R3
        for teacher in (
            teachers if settings.update_teachers else ()
        ):  # -IW: the teachers do not learn
            yield update(teacher, t, [student])  # R4, R5
            if t < settings.rounds:
                positives(teacher, t + 1)  # R1 of the next round

    if settings.controls:
        yield from controls(student, labels)


def rounds(session: Session) -> Iterator[int]:
    """1 … R, or until the monitor sees in the student what macpo.stop says; the adapters of all rounds stay."""
    wanted = {"rollback": "collapsed"}.get(session.config.macpo.stop, session.config.macpo.stop)
    for t in range(1, session.config.macpo.rounds + 1):
        found = ""
        if wanted != "none":
            found = session.run.observe(
                lambda t=t: verdict(session.run.path, "student", t - 1), while_listing=""
            )
        if wanted != "none" and found.startswith(wanted):
            session.run.log(
                f"the student has {found} in round {t - 1}: no further round (macpo.stop = {session.config.macpo.stop})"
            )
            return
        yield t


def roll_back(session: Session, students: Sequence[AgentCheckpoint]) -> AgentCheckpoint:
    """The student of the last round before the monitor's first alarm, as final/student_pos (macpo.stop = rollback)."""
    last = kept = students[-1]  # `rounds` went no further than that alarm
    found = session.run.observe(
        lambda: verdict(session.run.path, "student", last.round), while_listing=""
    )
    if found.startswith("collapsed"):
        kept = students[-2]  # there is one: round 0 has nothing to be compared with
        session.run.log(
            f"the student has {found} in round {last.round}: back to round {kept.round}"
        )
    return replace(kept, agent="kept", adapter=keep(session, "final/student_pos", kept.adapter))


def initialise(agent: Agent, good: TextColumn, bad: TextColumn) -> AgentCheckpoint:
    """π^(0) from the base on good answers (I1, I4), then ν and its answers."""
    trained, agent.bad = imitate(agent, good), bad
    train_negative(agent, 0)
    return trained


def imitate(agent: Agent, good: TextColumn) -> AgentCheckpoint:
    """π^(0): SFT of the base on good answers."""
    name, key = f"round0/{agent.name}_pos", (agent.name, "pos", 0)
    agent.positive.append(sft(agent.session, name, agent.base, good, None, agent.sft_args, key))
    return AgentCheckpoint(agent.name, 0, agent.base, agent.positive[-1])


def train_negative(agent: Agent, t: int) -> None:
    """ν continues π on bad answers (I2, I5); then it is sampled once on every prompt (I6)."""
    name, key = f"round{t}/{agent.name}_neg", (agent.name, "neg", t)
    agent.negative = sft(
        agent.session, name, agent.base, agent.bad, agent.positive[-1], agent.negative_sft_args, key
    )
    agent.cached = negatives(agent, t)


def positives(agent: Agent, t: int, name: str | None = None) -> TextColumn:
    """The answers of π to all prompts, for round t (R1, R4); equal fingerprints are sampled once. A teacher offers
    macpo.answers of them, but for what has a name of its own."""
    answers = 1 if name or agent.name == "student" else agent.session.config.macpo.answers
    name, key = name or f"round{t}/positives_{agent.name}", (agent.name, "positives", t)
    return TextColumn(
        sample(
            agent.session,
            name,
            agent.base,
            agent.positive[-1],
            agent.queries,
            agent.name,
            key,
            answers,
        )
    )


def negatives(agent: Agent, t: int, name: str | None = None) -> TextColumn:
    """The answers of ν to all prompts (I6)."""
    name, key = name or f"round{t}/negatives_{agent.name}", (agent.name, "negatives", t)
    who, twin = f"{agent.name}_neg", agent.negative
    return TextColumn(sample(agent.session, name, agent.base, twin, agent.queries, who, key))


def update(agent: Agent, t: int, others: Sequence[Agent]) -> AgentCheckpoint:
    """Choose among the others' answers (R2), pair them with its own negatives, learn (R3, R5)."""
    settings = agent.session.config.macpo
    if settings.refresh_negatives and t > 1:
        train_negative(agent, t - 1)  # a new ν, from the updated π
    share = (
        settings.self_fraction if settings.mutual_positives else 1.0
    )  # -MP: it learns its own answers
    sources = [*(others if share < 1 else ()), *([agent] if share else ())]
    # R4 asks for the student's answers again, after its update: those before it need a name of their own
    own = f"round{t}/own_student" if 0 < share < 1 and agent.name == "student" else None
    answers = {
        source.name: positives(source, t, own if source is agent else None) for source in sources
    }
    offers = [
        CandidateSet(s.name, answers[s.name], votes(agent, t, s, others, answers)) for s in sources
    ]
    bad = negatives_of(agent, t, others)
    return contrast(agent, t, offers, bad, agent.session.config.dpo, (agent.name, share))


def votes(
    agent: Agent, t: int, source: Agent, others: Sequence[Agent], answers: dict[str, TextColumn]
) -> dict:
    """By criterion, the scores of `source`'s answers that decide (R2): perplexity is π's own (eq. 6);
    likelihood-ratio that of the source's π over its ν; agreement the mean of the other sides' π. None where
    there is nothing to decide."""
    session, settings, said, found = (
        agent.session,
        agent.session.config.macpo,
        answers[source.name],
        {},
    )
    wanted = {*settings.select} if len(answers) > 1 or settings.answers > 1 else set()
    wanted |= {"perplexity"} if settings.keep_fraction < 1 else set()
    wanted |= {"agreement"} if settings.pair_weighting == "agreement" else set()

    def scored(kind: str, judge: Agent, adapter: Stage, among: Sequence[TextColumn] = ()) -> Stage:
        return score_texts(
            session, f"round{t}/{kind}_{source.name}", judge.base, adapter, said, among
        )

    if "perplexity" in wanted:
        kind = "scores" if agent.name == "student" else f"scores_{agent.name}"
        found["perplexity"] = [(1.0, scored(kind, agent, agent.positive[-1], [*answers.values()]))]
    if "likelihood-ratio" in wanted and agent.name == "student":
        found["likelihood-ratio"] = [
            (1.0, scored("good", source, source.positive[-1])),
            (-1.0, scored("bad", source, source.negative)),
        ]
    peers = [other for other in others if other is not source]
    if "agreement" in wanted and agent.name == "student":
        found["agreement"] = [
            (1 / len(peers), scored(f"agreement_{p.name}", p, p.positive[-1])) for p in peers
        ]
    return found


def negatives_of(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """What is rejected in round t, by macpo.negatives. agent: the answers of one's own ν; other: those of another
    agent's (a control); previous: one's own answers before the update; persona: the bare base's under a bad tag;
    tail: one's own at a high temperature; contrastive: of ν, decoded away from π."""
    session, base, way = agent.session, agent.base, agent.session.config.macpo.negatives
    if way in ("agent", "other"):
        return (agent if way == "agent" else others[0]).cached
    name, key = f"round{t}/{way}_{agent.name}", (agent.name, way, t)
    if way == "previous":
        return TextColumn(
            sample(session, name, base, agent.positive[-1], agent.queries, agent.name, key)
        )
    if way == "tail":
        return TextColumn(
            sample(
                session,
                name,
                base,
                agent.positive[-1],
                agent.queries,
                f"{agent.name}_tail",
                key,
                temperature=TAIL,
            )
        )
    who = f"{agent.name}_{way}"
    if way == "contrastive":
        return TextColumn(
            sample(
                session,
                name,
                base,
                agent.negative,
                agent.queries,
                who,
                key,
                against=agent.positive[-1],
            )
        )
    asked = tagged_prompts(
        session, f"round0/bad_tag_prompts_{agent.name}", base, agent.queries, good=False
    )
    said = sample(session, f"round0/{way}_{agent.name}", base, None, asked, who, (agent.name, way))
    return TextColumn(said, side="untagged")


def contrast(
    agent: Agent,
    t: int,
    offers: Sequence[CandidateSet],
    bad: TextColumn,
    dpo: Dpo,
    own: tuple[str, float] = ("", 0.0),
) -> AgentCheckpoint:
    """Pair the chosen of the offers with bad answers, and learn by DPO + γ SFT from where the agent stands.
    `own`: the agent, and the share of prompts where its own answers count."""
    session, base, π = agent.session, agent.base, agent.positive[-1]
    reference = {"base": None, "init": agent.positive[0], "previous": π}[dpo.reference]
    familiar = score_texts(session, f"round{t}/reference_{agent.name}", base, reference, bad)
    name, key = f"round{t}/pairs_{agent.name}", (agent.name, "pairs", t)
    heard = reference is π and all("perplexity" in each.votes for each in offers)
    made = pairs(session, name, base, offers, bad, reference, familiar, own, key, heard)
    name, key = f"round{t}/{agent.name}_pos", (agent.name, "prefer", t)
    agent.positive.append(prefer(session, name, base, made, π, reference, agent.dpo_args, dpo, key))
    return AgentCheckpoint(agent.name, t, base, agent.positive[-1])


def controls(student: Agent, labels: TextColumn) -> Iterator[AgentCheckpoint]:
    """Naive SFT continued for as many steps as MACPO's student took, and the ceiling."""
    session, base, (initial, *updates) = student.session, student.base, student.positive
    rounds, train_args = session.config.macpo.rounds, replace(student.dpo_args, epochs=0)
    continued = sft(
        session,
        "controls/continued",
        base,
        labels,
        initial,
        train_args,
        ("continued",),
        match_steps_of=updates,
    )
    yield AgentCheckpoint("continued", rounds, base, continued)
    yield ceiling(student)


def ceiling(student: Agent) -> AgentCheckpoint:
    """What SFT on the truth of all prompts gives."""
    session, base, key = student.session, student.base, ("ceiling",)
    learned = sft(session, "controls/ceiling", base, student.queries, None, student.sft_args, key)
    return AgentCheckpoint("ceiling", session.config.macpo.rounds, base, learned)
