"""The systems that MACPO is compared with, each in the words of its paper, made of the same stages.

All make as many passes over the same prompts as MACPO's student in its rounds, so that a difference is one of
method.
"""

from collections.abc import Generator, Iterator
from dataclasses import replace

from minmacpo.bases import Ground
from minmacpo.macpo import Agent, Trained, ceiling, contrast, imitate, make_agents, positives, run_macpo
from minmacpo.run import Stage
from minmacpo.stages import Pace, sft
from minmacpo.workshop import Texts, Workshop


def run_method(shop: Workshop, ground: Ground) -> Iterator[Trained]:
    """The agents of `run.method`, each as soon as it is trained."""
    methods = {"macpo": run_macpo, "sft": naive, "sft-continued": continued, "confident": confident,
               "spin": spin, "dpo-truth": dpo_truth}  # fmt: skip
    return methods[shop.config.run.method](shop, ground)


def start(shop: Workshop, ground: Ground) -> Generator[Trained, None, tuple[Agent, Texts]]:
    """Naive weak-to-strong SFT (Burns et al. 2023): the student imitates teacher 1's answers. The other
    teachers and the ceiling are trained and measured too, to place the result between them (PGR)."""
    student, teachers = make_agents(shop, ground)
    truth = Texts(ground.slices, "d1.jsonl", "chosen")
    for teacher in teachers:
        yield imitate(teacher, truth)
    labels = positives(teachers[0], 1, "round0/weak_labels")
    yield imitate(student, labels)
    if shop.config.macpo.controls:
        yield ceiling(student)
    return student, labels


def naive(shop: Workshop, ground: Ground) -> Iterator[Trained]:
    """Nothing but the start."""
    yield from start(shop, ground)


def continued(shop: Workshop, ground: Ground) -> Iterator[Trained]:
    """Naive SFT that goes on with the same labels."""
    student, labels = yield from start(shop, ground)
    yield imitate_long(student, labels, student.positive[0], replace(student.prefer_pace, epochs=0), 0.0)


def confident(shop: Workshop, ground: Ground) -> Iterator[Trained]:
    """SFT with the auxiliary confidence loss, from the base (Burns et al. 2023; here token by token): a share
    of the loss, growing over the first fifth of the steps, is towards what the student finds likeliest itself."""
    student, labels = yield from start(shop, ground)
    yield imitate_long(student, labels, None, student.good_pace, shop.config.sft.confidence)


def imitate_long(student: Agent, labels: Texts, first: Stage | None, pace: Pace, confidence: float) -> Trained:
    """SFT from `first` for the passes of all rounds in addition to the pace's own."""
    shop, rounds = student.shop, student.shop.config.macpo.rounds
    pace = replace(pace, epochs=pace.epochs + rounds * student.prefer_pace.epochs)
    name, key = f"round{rounds}/student_pos", ("student", "long")
    learned = sft(shop, name, student.base, labels, first, pace, key, confidence=confidence)
    return Trained("student", rounds, student.base, learned)


def spin(shop: Workshop, ground: Ground) -> Iterator[Trained]:
    """Self-play (Chen et al. 2024): each round prefers the weak labels to its own answers of that moment.
    The opponent who gave them is the reference; there is no SFT term."""
    student, labels = yield from start(shop, ground)
    loss = replace(shop.config.dpo, reference="previous", gamma=0.0)
    for t in range(1, shop.config.macpo.rounds + 1):
        yield contrast(student, t, {"teacher1": labels}, (), positives(student, t), loss)


def dpo_truth(shop: Workshop, ground: Ground) -> Iterator[Trained]:
    """DPO + γ SFT on the ground-truth pairs of all prompts: what preferences could give at most."""
    student, _ = yield from start(shop, ground)
    good, bad = (Texts(ground.slices, "d2.jsonl", side) for side in ("chosen", "rejected"))
    for t in range(1, shop.config.macpo.rounds + 1):
        yield contrast(student, t, {"truth": good}, (), bad, shop.config.dpo)
