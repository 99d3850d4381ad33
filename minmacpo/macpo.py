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

Each call below is a stage: it is computed only if its folder is missing. The functions yield every
agent as soon as it is trained, so that the caller can measure it while its base is in memory. This
module moves no tensor: it speaks of agents, files and stages.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from minmacpo.bases import Base, Ground
from minmacpo.config import Config
from minmacpo.run import Stage
from minmacpo.stages import pairs, prefer, sample, score_texts, sft
from minmacpo.workshop import Texts, Workshop


@dataclass(slots=True)
class Agent:
    """One side of the exchange: how it learns, its adapters now, its cached negatives."""

    name: str  # "student", "teacher1", …
    base: Base
    good_rate: tuple[float, int]  # learning rate and epochs of SFT on good answers
    bad_rate: tuple[float, int]  # and on bad ones
    prefer_lr: float
    good: Texts | None = None  # what π was first trained on
    bad: Texts | None = None  # what ν is trained on
    initial: Stage | None = None  # π^(0)
    positive: Stage | None = None  # π
    negative: Stage | None = None  # ν
    negatives: Texts | None = None  # n: its own bad answers on every prompt


@dataclass(frozen=True, slots=True)
class Trained:
    """An agent as it stands after `round`: what the caller measures."""

    agent: str
    round: int
    base: Base
    adapter: Stage


def make_agents(config: Config, ground: Ground) -> tuple[Agent, list[Agent]]:
    """The student and the K teachers, with their bases and rates."""
    s, d = config.sft, config.dpo
    learn = (s.student_lr, s.student_epochs), (s.student_negative_lr, s.student_negative_epochs), d.student_lr
    teach = (s.teacher_lr, s.teacher_epochs), (s.teacher_negative_lr, s.teacher_negative_epochs), d.teacher_lr
    student = Agent("student", ground.bases["strong"], *learn)
    weak = range(1, config.macpo.teachers + 1)
    return student, [Agent(f"teacher{k}", ground.bases[f"weak{k}"], *teach) for k in weak]


def run_macpo(shop: Workshop, ground: Ground) -> Iterator[Trained]:
    """Initialisation, all rounds, and the controls; yields each agent after each of its updates."""
    settings = shop.config.macpo
    student, teachers = make_agents(shop.config, ground)
    queries = Texts(ground.slices, "d2.jsonl", "chosen")  # Q: only the prompts are used

    # I1, I2, I6: the teachers on ground truth
    for teacher in teachers:
        teacher.good = Texts(ground.slices, "d1.jsonl", "chosen")
        teacher.bad = Texts(ground.slices, "d1.jsonl", "rejected")
        yield initialise(shop, queries, teacher)
        positives(shop, queries, teacher, 1)
    # I3 - I6: the student on what teacher 1 and its negative agent answer
    student.good = positives(shop, queries, teachers[0], 1, "round0/weak_labels")
    student.bad = negatives(shop, queries, teachers[0], 0, "round0/weak_negatives")
    yield initialise(shop, queries, student)

    # whose answers an agent learns: those of the other side, or (-MP) its own
    others = {student.name: teachers} | {teacher.name: [student] for teacher in teachers}
    sources = others if settings.mutual else {agent.name: [agent] for agent in (student, *teachers)}
    updates = []
    for t in range(1, settings.rounds + 1):
        # R1 - R3: the student learns
        yield update(shop, queries, student, t, sources[student.name])
        updates.append(student.positive)
        refresh(shop, queries, student, t)
        # R4, R5: the teachers learn (-IW: they do not)
        for teacher in teachers if settings.update_teachers else ():
            yield update(shop, queries, teacher, t, sources[teacher.name])
            refresh(shop, queries, teacher, t)
            if t < settings.rounds:
                positives(shop, queries, teacher, t + 1)  # now, while its base is in memory

    if settings.controls:
        yield from controls(shop, ground, student, updates)


def initialise(shop: Workshop, queries: Texts, agent: Agent) -> Trained:
    """π^(0) from the agent's good texts (I1, I4); ν from π^(0) and its bad ones; its negatives on Q."""
    name, batch, key = f"round0/{agent.name}_pos", shop.config.sft.batch, (agent.name, "pos", 0)
    agent.initial = sft(shop, name, agent.base, agent.good, None, *agent.good_rate, batch, key)
    agent.positive = agent.initial
    train_negative(shop, queries, agent, 0)
    return Trained(agent.name, 0, agent.base, agent.positive)


def train_negative(shop: Workshop, queries: Texts, agent: Agent, t: int) -> None:
    """ν continues π on bad answers (I2, I5); then it is sampled once on every prompt (I6)."""
    name, batch, key = f"round{t}/{agent.name}_neg", shop.config.sft.batch, (agent.name, "neg", t)
    agent.negative = sft(shop, name, agent.base, agent.bad, agent.positive, *agent.bad_rate, batch, key)
    agent.negatives = negatives(shop, queries, agent, t)


def positives(shop: Workshop, queries: Texts, agent: Agent, t: int, name: str | None = None) -> Texts:
    """The answers of π on all prompts, for round t (R1, R4); equal fingerprints are sampled once."""
    name, key = name or f"round{t}/positives_{agent.name}", (agent.name, "positives", t)
    return Texts(sample(shop, name, agent.base, agent.positive, queries, agent.name, key))


def negatives(shop: Workshop, queries: Texts, agent: Agent, t: int, name: str | None = None) -> Texts:
    """The answers of ν on all prompts (I6)."""
    name, key = name or f"round{t}/negatives_{agent.name}", (agent.name, "negatives", t)
    return Texts(sample(shop, name, agent.base, agent.negative, queries, f"{agent.name}_neg", key))


def update(shop: Workshop, queries: Texts, agent: Agent, t: int, sources: list[Agent]) -> Trained:
    """Select among the sources' answers (R2), pair with the agent's own negatives, learn (R3, R5)."""
    name, base, π, n = agent.name, agent.base, agent.positive, agent.negatives
    answers = {source.name: positives(shop, queries, source, t) for source in sources}
    scores = []
    if len(answers) > 1 and shop.config.macpo.select == "perplexity":
        scores = [score_texts(shop, f"round{t}/scores_{who}", base, π, said) for who, said in answers.items()]
    reference = {"base": None, "init": agent.initial, "previous": π}[shop.config.dpo.reference]
    familiar = score_texts(shop, f"round{t}/reference_{name}", base, reference, n)
    key = (name, "pairs", t)
    made = pairs(shop, f"round{t}/pairs_{name}", base, answers, scores, n, reference, familiar, key)
    lr, key = agent.prefer_lr, (name, "prefer", t)
    agent.positive = prefer(shop, f"round{t}/{name}_pos", base, made, π, reference, lr, key)
    return Trained(name, t, base, agent.positive)


def refresh(shop: Workshop, queries: Texts, agent: Agent, t: int) -> None:
    """The setting refresh_negatives: a new ν from the updated π, sampled anew, for the next round."""
    if shop.config.macpo.refresh_negatives and t < shop.config.macpo.rounds:
        train_negative(shop, queries, agent, t)


def controls(shop: Workshop, ground: Ground, student: Agent, updates: list[Stage]) -> Iterator[Trained]:
    """Naive SFT continued for as many steps as MACPO's student took, and the ceiling."""
    rounds, base, sft_, dpo = shop.config.macpo.rounds, student.base, shop.config.sft, shop.config.dpo
    key, rate = ("continued",), (student.prefer_lr, 0)  # no epochs of its own: the steps of `updates`
    continued = sft(
        shop, "controls/continued", base, student.good, student.initial, *rate, dpo.batch, key, like=updates
    )
    yield Trained("continued", rounds, base, continued)
    truth = Texts(ground.slices, "d2.jsonl", "chosen")
    ceiling = sft(shop, "controls/ceiling", base, truth, None, *student.good_rate, sft_.batch, ("ceiling",))
    yield Trained("ceiling", rounds, base, ceiling)
