"""Answers that models judge or steer: what self-rewarding, RLAIF and RLCD ask, and their pairs.

The words of the questions are settings ([feedback]): the papers' on real models, the town's own in
the built-in world. Questions, replies and preferences are stages like all others, so what was asked
can be read on the disk.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from minmacpo import UserError
from minmacpo.config.schema import Feedback
from minmacpo.data.records import Example, Message, Pair, Sample, format_dialogue
from minmacpo.data.templates import TEMPLATES
from minmacpo.pipeline.artifacts import BaseModel, Score, ScoreColumn, TextColumn
from minmacpo.pipeline.model_pool import Session
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.stage import Stage, StageContext
from minmacpo.runtime.files import write_rows

Preference = Pair | None  # None: a prompt on which the labeller prefers nothing


# --- Questions


def ask(
    session: Session,
    name: str,
    base: BaseModel,
    texts: TextColumn,
    questions: Callable[[Sequence], list[list[Example]]],
    **settings,
) -> TextColumn:
    """The stage with questions.jsonl: what `questions` makes of the texts, a group per prompt.

    A group that does not fit into the context of `base`, beside an answer, is left out whole.

    Args:
        settings: what `questions` depends on beside the texts and [feedback].
    """
    config = session.run.config
    max_new_tokens = config.generate.max_new_tokens

    def write_questions(context: StageContext) -> dict:
        # --- The questions that leave room for an answer
        loaded = session.models.get(base, None)
        room = loaded.context - max_new_tokens
        groups = questions(texts.read())
        asked = []
        over_long = 0
        for group in groups:
            lengths = []
            for question in group:
                row = loaded.render(question.prompt, question.response or None)
                lengths.append(len(row.ids))
            if max(lengths) <= room:
                asked += group
            else:
                over_long += 1
        if not context.dist.is_main:
            return {}

        # --- Write them
        write_rows(context.folder / "questions.jsonl", asked)
        if not asked:
            raise UserError(
                f"{context.name}: no question fits into the {room} tokens that {base.name} has "
                "for it"
            )
        if over_long > 0.1 * len(groups):
            context.log(
                f"WARNING: the questions about {over_long} of {len(groups)} prompts are too long "
                f"for {base.name}"
            )
        return {"questions": len(asked), "prompts": len(groups), "over_long": over_long}

    stage = session.run.stage(
        name=name,
        kind="ask/2",
        settings=session.models.settings(base)
        | {
            "feedback": asdict(config.feedback),
            "max_new_tokens": max_new_tokens,
            "texts": texts.location,
        }
        | settings,
        inputs=[base.stage, texts.stage],
        compute=write_questions,
    )
    return TextColumn(stage, "questions.jsonl", "question")


def fill_template(template: str, example: Example | Sample, **answers: str) -> tuple[Message, ...]:
    """A setting of [feedback] with the prompt and the answers put in, as a prompt of one turn."""
    prompt = conversation(example.prompt)
    return (Message("user", template.format(prompt=prompt, **answers)),)


def conversation(prompt: Sequence[Message]) -> str:
    """A prompt as text inside a question: a single turn as it is, several with their speakers."""
    speakers = {"system": "System", "user": "Human", "assistant": "Assistant"}
    return format_dialogue(prompt, speakers, "\n\n")


def answers_by_prompt(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The answers to every prompt, in order."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.id, []).append(sample)
    return list(groups.values())


# --- Preferences


def write_preferences(
    run: Run,
    name: str,
    inputs: Sequence[Stage],
    label: Callable[[], tuple[list[Preference], dict]],
) -> tuple[TextColumn, TextColumn]:
    """The stage with pairs.jsonl of what `label` prefers: its chosen and its rejected answers.

    A prompt without a preference is left out and counted.
    """

    def write_pairs(context: StageContext) -> dict:
        preferences, label_counts = label()
        pairs = [preference for preference in preferences if preference is not None]
        undecided = len(preferences) - len(pairs)
        counts = {"pairs": len(pairs), "no_preference": undecided} | label_counts
        if not pairs:
            raise UserError(
                f"{context.name}: no prompt is left with a better and a worse answer ({counts})"
            )
        if len(pairs) < 0.9 * len(preferences):
            context.log(f"WARNING: {undecided} of {len(preferences)} prompts have no preference")
        write_rows(context.folder / "pairs.jsonl", pairs)
        return counts

    stage = run.stage(
        name=name,
        kind="preferences/2",
        settings={"feedback": asdict(run.config.feedback)},
        inputs=inputs,
        compute=write_pairs,
    )
    return TextColumn(stage, "pairs.jsonl", "chosen"), TextColumn(stage, "pairs.jsonl", "rejected")


def preference(better: Sample, worse: Sample) -> Pair:
    """What a labeller prefers to what, of two answers to one prompt."""
    return Pair(
        id=better.id,
        prompt=better.prompt,
        chosen=better.response,
        rejected=worse.response,
        chosen_by="preferred",
        rejected_by="other",
        meta=better.meta,
    )


# --- RLCD: the same prompt with a good and with a bad tag


def tagged_prompts(
    session: Session, name: str, base: BaseModel, prompts: TextColumn, good: bool
) -> TextColumn:
    """The prompts under a good tag, or under a bad one.

    Raises:
        UserError: the chat template has no place for a tag; also while planning.
    """
    config = session.run.config
    template = session.models.templates[base.name]
    if TEMPLATES[template].tag is None:
        able = ", ".join(other for other, frames in TEMPLATES.items() if frames.tag)
        raise UserError(
            f"data.template = {template} has no place for a tag, which run.method = "
            f"rlcd and macpo.negatives = persona need; {able} have one"
        )
    return ask(
        session,
        name=name,
        base=base,
        texts=prompts,
        questions=lambda texts: add_tags(texts, config.feedback, config.run.seed, good),
        good_tag=good,
        seed=config.run.seed,
    )


def add_tags(
    texts: Iterable[Example], feedback: Feedback, seed: int, good: bool
) -> list[list[Example]]:
    """Every prompt with a tag before the open turn, and the opposite one before earlier answers.

    The pair of tags is drawn for each prompt, the same for both sides (RLCD, section 3).
    """
    tag_pairs = list(zip(feedback.good_tags, feedback.bad_tags, strict=True))
    groups = []
    for text in texts:
        good_tag, bad_tag = random.Random(repr((seed, "tags", text.id))).choice(tag_pairs)
        own_tag, opposite_tag = (good_tag, bad_tag) if good else (bad_tag, good_tag)
        prompt = []
        for message in text.prompt:
            if message.role == "assistant":
                prompt.append(Message("tag", opposite_tag))
            prompt.append(message)
        prompt.append(Message("tag", own_tag))
        groups.append([Example(text.id, tuple(prompt), "", text.meta | {"of": text.id})])
    return groups


def label_by_tag(
    run: Run, name: str, prompts: TextColumn, good: TextColumn, bad: TextColumn
) -> tuple[TextColumn, TextColumn]:
    """The stage that prefers the answer under the good tag to that under the bad one."""
    return write_preferences(
        run,
        name,
        inputs=[prompts.stage, good.stage, bad.stage],
        label=lambda: prefer_good_tag(prompts.read(), good.read(), bad.read()),
    )


def prefer_good_tag(
    prompts: Iterable[Example], good: Iterable[Sample], bad: Iterable[Sample]
) -> tuple[list[Preference], dict]:
    """A pair for every prompt with both answers; the prompt has no tag any more."""
    good_answers = {sample.id: sample.response for sample in good}
    bad_answers = {sample.id: sample.response for sample in bad}
    preferences: list[Preference] = []
    for prompt in prompts:
        if prompt.id not in good_answers or prompt.id not in bad_answers:
            preferences.append(None)
            continue
        pair = Pair(
            id=prompt.id,
            prompt=prompt.prompt,
            chosen=good_answers[prompt.id],
            rejected=bad_answers[prompt.id],
            chosen_by="good_tag",
            rejected_by="bad_tag",
            meta=prompt.meta,
        )
        preferences.append(pair)
    return preferences, {}


# --- RLAIF: a labeller compares two answers, in both orders


def comparison_questions(
    template: str, options: Sequence[str], samples: Iterable[Sample]
) -> list[list[Example]]:
    """For every prompt with two answers: each option, in each order of the two."""
    groups = []
    for a, b in answers_by_prompt(samples):
        group = []
        for first, second in ((a, b), (b, a)):
            prompt = fill_template(template, a, first=first.response, second=second.response)
            for option in options:
                group.append(Example(f"{a.id}/{len(group)}", prompt, option, {"of": a.id}))
        groups.append(group)
    return groups


def label_by_comparison(
    run: Run, name: str, candidates: TextColumn, questions: TextColumn, scores: Stage
) -> tuple[TextColumn, TextColumn]:
    """The stage that prefers the answer which the labeller finds likelier to be better.

    Args:
        questions: from `comparison_questions`; `scores` are theirs under the labeller.
    """
    return write_preferences(
        run,
        name,
        inputs=[candidates.stage, questions.stage, scores],
        label=lambda: prefer_likelier(
            candidates.read(), option_logps(questions.read(), ScoreColumn(scores).read())
        ),
    )


def option_logps(questions: Iterable[Example], scores: Iterable[Score]) -> dict[str, list[float]]:
    """The log-probabilities of the options by prompt, in the order of its questions."""
    logps: dict[str, list[float]] = {}
    for question, score in zip(questions, scores, strict=True):
        logps.setdefault(question.meta["of"], []).append(score.logp)
    return logps


def prefer_likelier(
    candidates: Iterable[Sample], logps_by_prompt: dict[str, list[float]]
) -> tuple[list[Preference], dict]:
    """A pair for every prompt whose two answers differ and were compared.

    Args:
        logps_by_prompt: of both options, then of the same with the answers exchanged.
    """
    preferences: list[Preference] = []
    order_decided = 0
    for a, b in answers_by_prompt(candidates):
        logps = logps_by_prompt.get(a.id)
        if logps is None:
            preferences.append(None)
            continue
        if (logps[0] > logps[1]) == (logps[2] > logps[3]):
            order_decided += 1  # the same place won twice, whoever stood there
        if a.response == b.response:
            preferences.append(None)
        elif first_preferred(logps) > 0.5:
            preferences.append(preference(better=a, worse=b))
        else:
            preferences.append(preference(better=b, worse=a))
    return preferences, {"order_decided": order_decided}


def first_preferred(logps: Sequence[float]) -> float:
    """p(the first answer is better): the mean over both orders of a softmax over the options.

    Args:
        logps: of the first and the second option, then of both with the answers exchanged.
    """
    in_order = sigmoid(logps[0] - logps[1])
    exchanged = sigmoid(logps[3] - logps[2])
    return (in_order + exchanged) / 2


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), also where that exponential overflows."""
    return 1 / (1 + math.exp(min(-x, 700)))


# --- Self-rewarding: the student scores its own answers


def rubric_questions(template: str, samples: Iterable[Sample]) -> list[list[Example]]:
    """For every prompt: the request for a score of each of its answers."""
    groups = []
    for answers in answers_by_prompt(samples):
        group = []
        for number, answer in enumerate(answers):
            prompt = fill_template(template, answer, response=answer.response)
            group.append(Example(f"{answer.id}/{number}", prompt, "", {"of": answer.id}))
        groups.append(group)
    return groups


def label_by_scores(
    run: Run, name: str, candidates: TextColumn, replies: TextColumn
) -> tuple[TextColumn, TextColumn]:
    """The stage that prefers the answer with the highest mean score to that with the lowest."""
    verdicts = run.config.feedback.verdicts
    return write_preferences(
        run,
        name,
        inputs=[candidates.stage, replies.stage],
        label=lambda: prefer_highest_score(candidates.read(), replies.read(), verdicts),
    )


def prefer_highest_score(
    candidates: Iterable[Sample], replies: Iterable[Sample], verdicts: Sequence[str]
) -> tuple[list[Preference], dict]:
    """A pair for every prompt whose answers got different scores; ties are dropped."""
    scores: dict[str, list[int | None]] = {}  # by the request's id
    for reply in replies:
        scores.setdefault(reply.id, []).append(parse_score(reply.response, verdicts))
    reply_count = sum(len(values) for values in scores.values())
    failures = sum(values.count(None) for values in scores.values())

    preferences: list[Preference] = []
    for answers in answers_by_prompt(candidates):
        scored = []
        for number, answer in enumerate(answers):
            values = scores.get(f"{answer.id}/{number}", [])
            parsed = [value for value in values if value is not None]
            if parsed:
                scored.append((sum(parsed) / len(parsed), answer))
        scored.sort(key=lambda entry: entry[0], reverse=True)  # of equals the first stays first
        if not scored or scored[0][0] == scored[-1][0]:
            preferences.append(None)
        else:
            preferences.append(preference(better=scored[0][1], worse=scored[-1][1]))
    return preferences, {"replies": reply_count, "parse_failures": failures}


def parse_score(reply: str, verdicts: Sequence[str]) -> int | None:
    """The verdict that a reply ends with, as its index; None where it has none."""
    last = -1
    length = 0
    score = None
    for index, verdict in enumerate(verdicts):
        position = reply.rfind(verdict)
        # of two at one place the longer one: "Score: 10" also holds "Score: 1"
        if position >= 0 and (position, len(verdict)) >= (last, length):
            last = position
            length = len(verdict)
            score = index
    return score
