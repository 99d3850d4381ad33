"""What is measured of an agent after each of its updates, as stages of the run."""

from minmacpo.method.agents import AgentCheckpoint
from minmacpo.pipeline.artifacts import Policy, Setup, TextColumn
from minmacpo.pipeline.model_pool import Session
from minmacpo.pipeline.sample_stage import SampleArgs, sample
from minmacpo.pipeline.score_stage import score_texts

CONTROLS = ("kept", "continued", "ceiling")  # measured once, at the end of a run


def evaluate_agent(session: Session, setup: Setup, checkpoint: AgentCheckpoint) -> None:
    """Sample answers to the test prompts; score true and worse answers under agent and base."""
    base = checkpoint.base
    policy = Policy(checkpoint.agent, base, checkpoint.adapter)
    bare_base = Policy(base.name, base)
    prefix = f"eval/round{checkpoint.round}_{checkpoint.agent}"
    true_answers = TextColumn(setup.splits, "test.jsonl", "chosen")
    worse_answers = TextColumn(setup.splits, "test.jsonl", "rejected")

    # The student that is kept is the student of an earlier round: its answers are the same
    seed_agent = "student" if checkpoint.agent == "kept" else checkpoint.agent
    answers = sample(
        session,
        name=f"{prefix}_samples",
        policy=policy,
        prompts=true_answers,
        seed_key=("eval", seed_agent, checkpoint.round),
        args=SampleArgs(session.run.config.eval.samples),
    )

    # How far the answers are from the base: the monitor's "kl"
    if checkpoint.agent not in CONTROLS:
        columns = {"scores": TextColumn(answers)}
        score_texts(session, f"{prefix}_under_base", bare_base, columns)

    # Perplexity of the true answers, and whether the agent prefers them more than its base does
    for side, texts in (("truth", true_answers), ("worse", worse_answers)):
        score_texts(session, f"{prefix}_{side}", policy, {"scores": texts})
        score_texts(session, f"eval/base_{base.name}_{side}", bare_base, {"scores": texts})
