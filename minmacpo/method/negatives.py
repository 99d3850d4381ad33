"""What is rejected in a round, by macpo.negatives: one function per kind, found by its name.

To add a kind, write a function and put it into NEGATIVES; the command line then knows it once its
name stands in config/schema.py. A function gets the agent that learns, the round, and the agents on
the other side; it returns one answer per prompt.
"""

from collections.abc import Callable, Sequence

from minmacpo.method.agents import Agent
from minmacpo.method.ai_feedback import tagged_prompts
from minmacpo.pipeline.artifacts import Policy, TextColumn
from minmacpo.pipeline.sample_stage import sample

TAIL_TEMPERATURE = 2.0


def own_hard_negatives(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The answers of the agent's negative adapter: MACPO's hard negatives."""
    return agent.hard_negatives


def others_hard_negatives(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The hard negatives of another agent: a control, since they are not familiar."""
    return others[0].hard_negatives


def previous_answers(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The agent's own answers before the update, as in self-play."""
    stage = sample(
        agent.run,
        agent.models,
        name=f"round{t}/previous_{agent.name}",
        policy=agent.policy,
        prompts=agent.prompts,
        seed_key=(agent.name, "previous", t),
    )
    return TextColumn(stage)


def persona_answers(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The answers of the bare base under a bad tag, sampled once."""
    prompts = tagged_prompts(
        agent.run,
        agent.models,
        name=f"round0/bad_tag_prompts_{agent.name}",
        base=agent.base,
        prompts=agent.prompts,
        good=False,
    )
    stage = sample(
        agent.run,
        agent.models,
        name=f"round0/persona_{agent.name}",
        policy=Policy(f"{agent.name}_persona", agent.base),
        prompts=prompts,
        seed_key=(agent.name, "persona"),
    )
    return TextColumn(stage, column="untagged")


def tail_answers(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The agent's own answers at a high temperature."""
    stage = sample(
        agent.run,
        agent.models,
        name=f"round{t}/tail_{agent.name}",
        policy=Policy(f"{agent.name}_tail", agent.base, agent.positive[-1]),
        prompts=agent.prompts,
        seed_key=(agent.name, "tail", t),
        temperature=TAIL_TEMPERATURE,
    )
    return TextColumn(stage)


def contrastive_answers(agent: Agent, t: int, others: Sequence[Agent]) -> TextColumn:
    """The answers of the negative adapter, decoded away from the positive one."""
    stage = sample(
        agent.run,
        agent.models,
        name=f"round{t}/contrastive_{agent.name}",
        policy=Policy(f"{agent.name}_contrastive", agent.base, agent.negative),
        prompts=agent.prompts,
        seed_key=(agent.name, "contrastive", t),
        contrast_adapter=agent.positive[-1],
    )
    return TextColumn(stage)


NEGATIVES: dict[str, Callable[[Agent, int, Sequence[Agent]], TextColumn]] = {
    "agent": own_hard_negatives,
    "other": others_hard_negatives,
    "previous": previous_answers,
    "persona": persona_answers,
    "tail": tail_answers,
    "contrastive": contrastive_answers,
}
