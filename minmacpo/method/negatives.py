"""What is rejected in a round, by macpo.negatives: one function per kind, found by its name.

To add a kind, write a function and put it into NEGATIVES; the command line then knows it once its
name stands in config/schema.py. A function gets the agent that learns, the round, and the agents on
the other side; it returns one answer per prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from minmacpo.method.agents import Agent, sample_answers
from minmacpo.method.ai_feedback import tagged_prompts
from minmacpo.pipeline.artifacts import Policy, TextColumn
from minmacpo.pipeline.sample_stage import SampleArgs

TAIL_TEMPERATURE = 2.0


def own_hard_negatives(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The answers of the agent's negative adapter: MACPO's hard negatives."""
    return agent.hard_negatives


def others_hard_negatives(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The hard negatives of another agent: a control, since they are not familiar."""
    return others[0].hard_negatives


def previous_answers(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The agent's own answers before the update, as in self-play."""
    return sample_answers(
        agent, f"round{t}/previous_{agent.name}", agent.policy, seed_key=("previous", t)
    )


def persona_answers(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The answers of the bare base under a bad tag, sampled once."""
    prompts = tagged_prompts(
        agent.session,
        name=f"round0/bad_tag_prompts_{agent.name}",
        base=agent.base,
        prompts=agent.prompts,
        good=False,
    )
    answers = sample_answers(
        agent,
        f"round0/persona_{agent.name}",
        Policy(f"{agent.name}_persona", agent.base),
        seed_key=("persona",),
        prompts=prompts,
    )
    return replace(answers, column="untagged")


def tail_answers(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The agent's own answers at a high temperature."""
    return sample_answers(
        agent,
        f"round{t}/tail_{agent.name}",
        replace(agent.policy, name=f"{agent.name}_tail"),
        seed_key=("tail", t),
        args=SampleArgs(temperature=TAIL_TEMPERATURE),
    )


def contrastive_answers(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The answers of the negative adapter, decoded away from the positive one."""
    return sample_answers(
        agent,
        f"round{t}/contrastive_{agent.name}",
        replace(agent.negative_policy, name=f"{agent.name}_contrastive"),
        seed_key=("contrastive", t),
        args=SampleArgs(contrast_adapter=agent.policy.adapter),
    )


NEGATIVES: dict[str, Callable[[Agent, int, Sequence[Agent]], TextColumn]] = {
    "agent": own_hard_negatives,
    "other": others_hard_negatives,
    "previous": previous_answers,
    "persona": persona_answers,
    "tail": tail_answers,
    "contrastive": contrastive_answers,
}
