"""Answers that models judge or steer: what self-rewarding, RLAIF and RLCD ask, and the pairs they make of it.

The words of the questions are settings ([feedback]): the papers' on real models, the town's own in the world.
Questions, replies and preferences are stages like all others, so what was asked can be read on the disk.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict

from minmacpo import UserError
from minmacpo.data.chat_template import TEMPLATES
from minmacpo.data.records import Example, Message, Pair, Sample, format_dialogue
from minmacpo.pipeline.base_models import Base
from minmacpo.pipeline.model_pool import Session, TextColumn
from minmacpo.pipeline.run import Stage, StageContext
from minmacpo.runtime.files import read_rows, write_rows

Preference = tuple[TextColumn, TextColumn]  # chosen and rejected answers, prompt by prompt


def conversation(prompt: Sequence[Message]) -> str:
    """A prompt as text inside a question: a single turn as it is, several with their speakers."""
    return format_dialogue(
        prompt, {"system": "System", "user": "Human", "assistant": "Assistant"}, "\n\n"
    )


def question(template: str, example: Sample, **answers: str) -> tuple[Message, ...]:
    """A setting of [feedback] filled in, as a prompt of one turn."""
    return (Message("user", template.format(prompt=conversation(example.prompt), **answers)),)


def ask(
    session: Session,
    name: str,
    base: Base,
    texts: TextColumn,
    questions: Callable[[list], list[list[Example]]],
    **known,
) -> TextColumn:
    """questions.jsonl: what `questions` makes of the texts, a group for each prompt; `known`: what it depends on
    beside them and [feedback]. A group that `base` has no room for, beside an answer, is left out whole and
    counted."""

    def write_questions(work: StageContext) -> dict:
        """Ask what fits."""
        loaded, kept = session.use(base, None), []
        room = loaded.model.config.max_position_embeddings - session.config.generate.max_new_tokens
        groups = questions(texts.read())
        for group in groups:
            sizes = [len(session.render(loaded, e.prompt, e.response or None).ids) for e in group]
            kept += group if max(sizes) <= room else []
        if not work.dist.is_main:
            return {}
        write_rows(work.folder / "questions.jsonl", kept)
        if not kept:
            raise UserError(
                f"{work.name}: no question fits into the {room} tokens that {base.name} has for it"
            )
        lost = len(groups) - len({example.meta["of"] for example in kept})
        if lost > 0.1 * len(groups):
            work.log(
                f"WARNING: the questions about {lost} of {len(groups)} prompts are too long for {base.name}"
            )
        return {"questions": len(kept), "prompts": len(groups), "over_long": lost}

    settings = {
        "feedback": asdict(session.config.feedback),
        "max_new_tokens": session.config.generate.max_new_tokens,
    }
    stage = session.stage(
        name, "ask/1", settings | texts.settings | known, [base.stage, texts.stage], write_questions
    )
    return TextColumn(stage, "questions.jsonl", "question")


def prefer_by(
    session: Session,
    name: str,
    inputs: Sequence[Stage],
    choose: Callable[[], tuple[list[Pair | None], dict]],
) -> Preference:
    """pairs.jsonl of what `choose` prefers; a None is a prompt without preference, left out and counted."""

    def write_preferences(work: StageContext) -> dict:
        """Judge, and keep what has a better and a worse side."""
        found, counts = choose()
        made = [pair for pair in found if pair]
        counts = {"pairs": len(made), "no_preference": len(found) - len(made)} | counts
        if not made:
            raise UserError(
                f"{work.name}: no prompt is left with a better and a worse answer ({counts})"
            )
        if len(made) < 0.9 * len(found):
            work.log(
                f"WARNING: {len(found) - len(made)} of {len(found)} prompts have no preference"
            )
        write_rows(work.folder / "pairs.jsonl", made)
        return counts

    settings = {"feedback": asdict(session.config.feedback)}
    stage = session.stage(name, "preferences/1", settings, inputs, write_preferences)
    return TextColumn(stage, "pairs.jsonl", "chosen"), TextColumn(stage, "pairs.jsonl", "rejected")


def grouped(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The candidates [n] of every prompt, in order."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.id, []).append(sample)
    return list(groups.values())


def pair_of(best: Sample, worst: Sample) -> Pair:
    """What a labeller prefers to what, of two answers to one prompt."""
    return Pair(
        best.id, best.prompt, best.response, worst.response, "preferred", "other", meta=best.meta
    )


# ---- RLCD: the same prompt with a good and with a bad tag ---------------------------------------
def tagged(seed: int, settings, texts: Sequence[Example], good: bool) -> list[list[Example]]:
    """Every prompt with a tag before the open turn, and the opposite one before earlier answers (RLCD, section 3).
    The pair of tags is drawn per prompt, the same for both sides."""
    found = []
    for text in texts:
        sides = list(zip(settings.good_tags, settings.bad_tags, strict=True))
        tags = random.Random(repr((seed, "tags", text.id))).choice(sides)
        mine, other = tags if good else tags[::-1]
        earlier = [
            [Message("tag", other), m] if m.role == "assistant" else [m] for m in text.prompt
        ]
        prompt = (*(m for turn in earlier for m in turn), Message("tag", mine))
        found.append([Example(text.id, prompt, "", text.meta | {"of": text.id})])
    return found


def tagged_prompts(
    session: Session, name: str, base: Base, queries: TextColumn, good: bool
) -> TextColumn:
    """The queries under a good tag, or under a bad one; UserError, also while planning, where the template has no
    place for a tag."""
    config = session.config
    if TEMPLATES[config.data.template].tag is None:
        able = ", ".join(name for name, template in TEMPLATES.items() if template.tag)
        raise UserError(
            f"data.template = {config.data.template} has no place for a tag, which run.method = rlcd and "
            f"macpo.negatives = persona need; {able} have one"
        )
    return ask(
        session,
        name,
        base,
        queries,
        lambda texts: tagged(config.run.seed, config.feedback, texts, good),
        good_tag=good,
        seed=config.run.seed,
    )


def by_tag(
    queries: TextColumn, good: TextColumn, bad: TextColumn
) -> tuple[list[Pair | None], dict]:
    """Chosen is what was said under the good tag; the prompt has no tag any more."""
    sides = [{s.id: s for s in side.read()} for side in (good, bad)]
    both = [(query, *(side.get(query.id) for side in sides)) for query in queries.read()]
    pairs = [
        Pair(q.id, q.prompt, a.response, b.response, "good_tag", "bad_tag", meta=q.meta)
        if a and b
        else None
        for q, a, b in both
    ]
    return pairs, {}


# ---- RLAIF: a labeller compares two answers, in both orders -------------------------------------
def comparisons(settings, samples: Sequence[Sample]) -> list[list[Example]]:
    """Per prompt with two candidates: each option, in each order of the two."""
    found = []
    for a, b in grouped(samples):
        asked = [
            question(settings.compare, a, first=x.response, second=y.response)
            for x, y in ((a, b), (b, a))
        ]
        found.append(
            [
                Example(f"{a.id}/{i}", prompt, option, {"of": a.id})
                for i, (prompt, option) in enumerate(
                    (p, o) for p in asked for o in settings.options
                )
            ]
        )
    return found


def first_preferred(logps: Sequence[float]) -> float:
    """p(the first candidate is better), the mean over both orders of the softmax over both options (RLAIF), from
    the log-probabilities of first and second option, then of the same two with the candidates exchanged."""
    return (
        sum(1 / (1 + math.exp(min(other - own, 700))) for own, other in (logps[:2], logps[:1:-1]))
        / 2
    )


def by_comparison(candidates: TextColumn, scores: Stage) -> tuple[list[Pair | None], dict]:
    """Chosen is the candidate that the labeller finds likelier to be better."""
    known: dict[str, list[float]] = {}
    for row in read_rows(scores.path / "scores.jsonl"):
        known.setdefault(row["id"].rpartition("/")[0], []).append(row["logp"])
    pairs, undecided = [], 0
    for a, b in grouped(candidates.read()):
        logps = known.get(a.id)
        place = logps and (logps[0] > logps[1]) == (logps[2] > logps[3])  # the same place won twice
        undecided += bool(place)
        if logps and a.response != b.response:
            best, worst = (a, b) if first_preferred(logps) > 0.5 else (b, a)
            pairs.append(pair_of(best, worst))
        else:
            pairs.append(None)
    return pairs, {"order_decided": undecided}


# ---- self-rewarding: the student scores its own answers ------------------------------------------
def judgements(settings, samples: Sequence[Sample]) -> list[list[Example]]:
    """Per prompt: the request for a score of each candidate."""
    return [
        [
            Example(
                f"{s.id}/{i}", question(settings.rubric, s, response=s.response), "", {"of": s.id}
            )
            for i, s in enumerate(group)
        ]
        for group in grouped(samples)
    ]


def points(reply: str, verdicts: Sequence[str]) -> int | None:
    """The verdict that a judgement ends with, as its place in `verdicts`; None: it has none (a parse failure)."""
    where, _, value = max(
        (reply.rfind(text), len(text), value) for value, text in enumerate(verdicts)
    )
    return value if where >= 0 else None


def by_score(
    settings, candidates: TextColumn, replies: TextColumn
) -> tuple[list[Pair | None], dict]:
    """Chosen is the candidate with the highest mean score, rejected that with the lowest; ties are dropped."""
    found: dict[str, list[int | None]] = {}
    for reply in replies.read():
        found.setdefault(reply.id, []).append(points(reply.response, settings.verdicts))
    pairs, failures = [], sum(score is None for scores in found.values() for score in scores)
    for group in grouped(candidates.read()):
        scored = []
        for i, candidate in enumerate(group):
            known = [score for score in found.get(f"{candidate.id}/{i}", []) if score is not None]
            scored += [(sum(known) / len(known), candidate)] if known else []
        scored.sort(key=lambda each: each[0], reverse=True)  # of equal ones the first stays first
        same = not scored or scored[0][0] == scored[-1][0]
        pairs.append(None if same else pair_of(scored[0][1], scored[-1][1]))
    return pairs, {"replies": sum(map(len, found.values())), "parse_failures": failures}
