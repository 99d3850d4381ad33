"""An agent of MACPO, and the stages that it learns and speaks in.

A stage returns at once if its folder exists, and computes the folder otherwise. So nothing here
moves a tensor: these functions say which policy reads which texts, under which name and seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from minmacpo.config.schema import Config, Dpo, Macpo
from minmacpo.core.losses import requires_reference
from minmacpo.method.pairs import PairInputs, build_pairs
from minmacpo.method.selection import SCORES, CandidateSet, Selection
from minmacpo.pipeline.artifacts import BaseModel, Policy, ScoreColumn, Setup, TextColumn
from minmacpo.pipeline.model_pool import Session
from minmacpo.pipeline.preference_stage import DPOArgs, PreferenceData, train_dpo
from minmacpo.pipeline.sample_stage import ONE_ANSWER, SampleArgs, sample
from minmacpo.pipeline.score_stage import score_texts
from minmacpo.pipeline.stage import Stage
from minmacpo.pipeline.train_stage import SFTArgs, train_sft


@dataclass(frozen=True, slots=True)
class AgentCheckpoint:
    """An agent as it stands after a round: what the caller measures."""

    agent: str
    round: int
    base: BaseModel
    adapter: Stage


@dataclass(slots=True)
class Agent:
    """A frozen base model with two adapters: how it should answer, and how it should not.

    Attributes:
        prompts: D2, of which only the prompts Q are read.
        positive: the adapters after round 0, 1, ...; the last is the present one.
        negative: the adapter that hard negatives are sampled from.
        negative_data: the bad answers that the negative adapter is trained on.
        hard_negatives: what the negative adapter answers to every prompt.
    """

    session: Session
    name: str  # "student", "teacher1", ...
    base: BaseModel
    prompts: TextColumn
    sft_args: SFTArgs
    negative_sft_args: SFTArgs
    dpo_args: DPOArgs
    positive: list[Stage] = field(default_factory=list)
    negative: Stage | None = None
    negative_data: TextColumn | None = None
    hard_negatives: TextColumn | None = None

    @property
    def config(self) -> Config:
        return self.session.run.config

    @property
    def is_student(self) -> bool:
        return self.name == "student"

    @property
    def bare_base(self) -> Policy:
        """The base without an adapter."""
        return Policy(self.name, self.base)

    @property
    def policy(self) -> Policy:
        """How the agent answers at present."""
        return Policy(self.name, self.base, self.positive[-1])

    @property
    def initial_policy(self) -> Policy:
        """How the agent answered after round 0."""
        return Policy(self.name, self.base, self.positive[0])

    @property
    def negative_policy(self) -> Policy:
        """How the agent answers where it should not."""
        return Policy(f"{self.name}_neg", self.base, self.negative)

    def checkpoint(self, t: int) -> AgentCheckpoint:
        """The agent as it stands after round t."""
        return AgentCheckpoint(self.name, t, self.base, self.positive[-1])


def make_agents(session: Session, setup: Setup) -> tuple[Agent, list[Agent]]:
    """The student and the K teachers, with their bases and their training settings."""
    config = session.run.config
    sft = config.sft
    dpo = config.dpo
    use_dpo = config.macpo.hard_negatives  # -HN: the SFT term alone
    prompts = TextColumn(setup.splits, "d2.jsonl", "chosen")

    # The earlier answers of a dialogue are good ones: a negative agent learns none of them
    train_on = config.data.train_on

    student = Agent(
        session=session,
        name="student",
        base=setup.base_models["strong"],
        prompts=prompts,
        sft_args=SFTArgs(
            sft.student_lr,
            sft.student_epochs,
            sft.student_batch or sft.batch,
            train_on=train_on,
        ),
        negative_sft_args=SFTArgs(sft.student_negative_lr, sft.student_negative_epochs, sft.batch),
        dpo_args=DPOArgs(dpo.student_lr, dpo.epochs, dpo.batch, dpo, use_dpo),
    )
    teachers = []
    for k in range(1, config.macpo.teachers + 1):
        teacher = Agent(
            session=session,
            name=f"teacher{k}",
            base=setup.base_models[f"weak{k}"],
            prompts=prompts,
            sft_args=SFTArgs(sft.teacher_lr, sft.teacher_epochs, sft.batch, train_on=train_on),
            negative_sft_args=SFTArgs(
                sft.teacher_negative_lr, sft.teacher_negative_epochs, sft.batch
            ),
            dpo_args=DPOArgs(dpo.teacher_lr, dpo.epochs, dpo.batch, dpo, use_dpo),
        )
        teachers.append(teacher)
    return student, teachers


# --- Learning from answers


def train_positive(agent: Agent, answers: TextColumn) -> None:
    """The positive adapter of round 0: SFT of the base on good answers (I1, I4)."""
    adapter = train_sft(
        agent.session,
        name=f"round0/{agent.name}_pos",
        start=agent.bare_base,
        texts=answers,
        args=agent.sft_args,
        seed_key=(agent.name, "pos", 0),
    )
    agent.positive.append(adapter)


def train_negative(agent: Agent, t: int) -> None:
    """The negative adapter continues the positive one on bad answers (I2, I5)."""
    agent.negative = train_sft(
        agent.session,
        name=f"round{t}/{agent.name}_neg",
        start=agent.policy,
        texts=agent.negative_data,
        args=agent.negative_sft_args,
        seed_key=(agent.name, "neg", t),
    )


# --- Answering


def sample_answers(
    agent: Agent,
    name: str,
    policy: Policy,
    seed_key: tuple,
    prompts: TextColumn | None = None,
    args: SampleArgs = ONE_ANSWER,
) -> TextColumn:
    """What one of an agent's policies answers to every prompt, sampled in the stage `name`.

    Args:
        seed_key: tells the answers from the agent's others, which are sampled under other seeds.
        prompts: None: the agent's own, Q.
    """
    stage = sample(
        agent.session,
        name=name,
        policy=policy,
        prompts=agent.prompts if prompts is None else prompts,
        seed_key=(agent.name, *seed_key),
        args=args,
    )
    return TextColumn(stage)


def sample_positives(agent: Agent, t: int, name: str = "", answers: int = 1) -> TextColumn:
    """The agent's present answers to all prompts, for round t (R1, R4).

    Args:
        name: of the stage; empty: positives_ and the agent's name.
    """
    stage = name or f"positives_{agent.name}"
    return sample_answers(
        agent,
        f"round{t}/{stage}",
        agent.policy,
        seed_key=("positives", t),
        args=SampleArgs(answers),
    )


def sample_weak_labels(teacher: Agent) -> TextColumn:
    """One answer of a teacher to every prompt, which the student imitates (I3).

    It has the seed of the teacher's first answer in round 1, and so is that answer.
    """
    return sample_answers(teacher, "round0/weak_labels", teacher.policy, seed_key=("positives", 1))


def sample_negatives(agent: Agent, t: int, name: str = "") -> TextColumn:
    """The answers of the agent's negative adapter to all prompts (I6).

    Args:
        name: of the stage; empty: negatives_ and the agent's name.
    """
    stage = name or f"negatives_{agent.name}"
    return sample_answers(
        agent, f"round{t}/{stage}", agent.negative_policy, seed_key=("negatives", t)
    )


# --- Scoring candidates (R2)


def score_candidates(
    agent: Agent,
    t: int,
    sources: Sequence[Agent],
    answers: Mapping[str, TextColumn],
    others: Sequence[Agent],
) -> list[CandidateSet]:
    """The answers of every source with the scores that decide among them (paper, eq. 6).

    Only what is looked at is computed: nothing where there is one candidate to each prompt, no
    fraction of the prompts is left out, and pairs have no weights.

    Args:
        agent: who is to choose.
        answers: by the name of their source.
        others: the agents on the other side, whose agreement may be asked for.
    """
    scores = required_scores(agent.config.macpo, several=len(sources) > 1)

    # All sources' answers are scored in one stage, since they share their prompts
    learner_scores = {}
    if "perplexity" in scores:
        learner_scores = score_under_learner(agent, t, answers)

    candidates = []
    for source in sources:
        candidate_set = CandidateSet(
            source.name, answers[source.name], learner_scores.get(source.name)
        )
        # A teacher has one other side, the student: nothing else that could be asked
        if agent.is_student and "likelihood-ratio" in scores:
            candidate_set = add_likelihoods(candidate_set, t, source)
        if agent.is_student and "agreement" in scores:
            peers = [other for other in others if other is not source]
            candidate_set = add_agreement(candidate_set, t, peers)
        candidates.append(candidate_set)
    return candidates


def add_likelihoods(candidate_set: CandidateSet, t: int, source: Agent) -> CandidateSet:
    """The candidates with their scores under their own source's two adapters."""
    answers = candidate_set.answers
    return replace(
        candidate_set,
        positive_scores=score_one(source, source.policy, f"round{t}/good_{source.name}", answers),
        negative_scores=score_one(
            source, source.negative_policy, f"round{t}/bad_{source.name}", answers
        ),
    )


def add_agreement(candidate_set: CandidateSet, t: int, peers: Sequence[Agent]) -> CandidateSet:
    """The candidates with their scores under the other teachers, never under their author."""
    scores = []
    for peer in peers:
        name = f"round{t}/agreement_{peer.name}_{candidate_set.source}"
        scores.append(score_one(peer, peer.policy, name, candidate_set.answers))
    return replace(candidate_set, peer_scores=tuple(scores))


def required_scores(macpo: Macpo, several: bool) -> set[str]:
    """The names, as in macpo.select, of the scores that candidates need.

    Args:
        several: whether there are several sources.
    """
    scores = set()
    if several or macpo.answers > 1:  # else there is one candidate, which is chosen unseen
        scores |= set(macpo.select) & SCORES.keys()
    if macpo.keep_fraction < 1:
        scores.add("perplexity")
    if macpo.pair_weighting == "agreement":
        scores.add("agreement")
    return scores


def score_under_learner(
    agent: Agent, t: int, answers: Mapping[str, TextColumn]
) -> dict[str, ScoreColumn]:
    """The scores of all sources' answers under the agent itself, by source, in one stage."""
    stage = score_texts(agent.session, f"round{t}/scores_{agent.name}", agent.policy, answers)
    return {source: ScoreColumn(stage, f"{source}.jsonl") for source in answers}


def score_one(agent: Agent, policy: Policy, name: str, texts: TextColumn) -> ScoreColumn:
    """The scores of one column of texts under one of an agent's policies."""
    return ScoreColumn(score_texts(agent.session, name, policy, {"scores": texts}))


# --- Learning from preferences (R3, R5)


def learn_preferences(
    agent: Agent,
    t: int,
    candidates: Sequence[CandidateSet],
    rejected: TextColumn,
    *,
    selection: Selection | None = None,
    dpo: Dpo | None = None,
) -> None:
    """Pair the selected candidates with rejected answers; the positive adapter learns from them.

    The loss needs log-probabilities under its reference policy (core/losses.py). `reference_policy`
    says who that is, by dpo.reference. The rejected answers are scored under it in a stage of their
    own, the chosen ones while pairs are made; pairs.jsonl holds both, and the training reads them
    from there. So no second model is in memory while the policy learns.

    Args:
        selection: how candidates are chosen; None: there is one to each prompt.
        dpo: the settings of the loss; None: those of the run.
    """
    args = agent.dpo_args if dpo is None else replace(agent.dpo_args, dpo=dpo)

    # --- The rejected answers under the reference, if the loss has one. Hard negatives stay the
    #     same over the rounds, so with a fixed reference this stage is computed once
    reference = reference_policy(agent, args.dpo)
    rejected_scores = None
    if reference is not None:
        rejected_scores = score_one(agent, reference, f"round{t}/reference_{agent.name}", rejected)

    # --- Pairs: select, join, drop what is unusable, score the chosen answers under the reference
    pairs = build_pairs(
        agent.session,
        name=f"round{t}/pairs_{agent.name}",
        inputs=PairInputs(
            candidates=candidates,
            selection=selection or Selection(),
            rejected=rejected,
            rejected_scores=rejected_scores,
            reference=reference,
            learner=agent.policy,
        ),
        seed_key=(agent.name, "pairs", t),
    )

    # --- The positive adapter continues on them
    adapter = train_dpo(
        agent.session,
        name=f"round{t}/{agent.name}_pos",
        start=agent.policy,
        pairs=PreferenceData(pairs, reference),
        args=args,
        seed_key=(agent.name, "prefer", t),
    )
    agent.positive.append(adapter)


def reference_policy(agent: Agent, dpo: Dpo) -> Policy | None:
    """The policy that the loss compares with; None for a loss that needs none."""
    if not requires_reference(dpo.loss):
        return None
    policies = {
        "base": agent.bare_base,  # adapter off, as in the released scripts, in every round
        "init": agent.initial_policy,  # the usual DPO: where preference learning began
        "previous": agent.policy,  # iterative DPO: the agent before this round
    }
    return policies[dpo.reference]


# --- What the student is compared with


def train_continued(student: Agent, weak_labels: TextColumn) -> AgentCheckpoint:
    """Naive SFT continued for as many steps as the student took in its rounds."""
    args = student.dpo_args
    adapter = train_sft(
        student.session,
        name="controls/continued",
        start=student.initial_policy,
        texts=weak_labels,
        args=SFTArgs(
            args.lr,
            0,
            args.batch,
            train_on=student.sft_args.train_on,
            match_steps_of=tuple(student.positive[1:]),
        ),
        seed_key=("continued",),
    )
    return AgentCheckpoint("continued", student.config.macpo.rounds, student.base, adapter)


def train_ceiling(student: Agent) -> AgentCheckpoint:
    """SFT on the true answers to all prompts: the strong ceiling (Burns et al. 2023)."""
    adapter = train_sft(
        student.session,
        name="controls/ceiling",
        start=student.bare_base,
        texts=student.prompts,
        args=student.sft_args,
        seed_key=("ceiling",),
    )
    return AgentCheckpoint("ceiling", student.config.macpo.rounds, student.base, adapter)
