"""The five kinds of stage that the methods are made of: sft, prefer, sample, score_texts, pairs.

Each is a function that names its inputs and gives back a Stage; what it computes, it reads from
its inputs' files and writes into its own folder.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from minmacpo import UserError
from minmacpo.bases import Base
from minmacpo.batching import collate, padding_share, plan_scoring, plan_steps, steps_per_epoch
from minmacpo.checkpoint import save_adapter
from minmacpo.data import Example, Pair, Sample, chosen_side, rejected_side
from minmacpo.files import read_records, read_rows, write_records, write_rows
from minmacpo.fit import PairObjective, Schedule, SftObjective, Unit, fit
from minmacpo.lora import read_adapter, reset_adapter
from minmacpo.losses import sequence_logps
from minmacpo.run import Stage, Work, derive_seed
from minmacpo.score import perplexity, score
from minmacpo.tokenizer import render_prompt, show_mask
from minmacpo.workshop import Loaded, Texts, Workshop, answer, present, render_rows

# ---- training -------------------------------------------------------------------------------


def sft(
    shop: Workshop, name: str, base: Base, texts: Texts, start: Stage | None, lr: float, epochs: int,
    batch: int, key: tuple, like: Sequence[Stage] = (),
) -> Stage:  # fmt: skip
    """Supervised fine-tuning of the slot on `texts`, from `start` or from a fresh adapter (I1-I5).

    `like`: take as many optimiser steps as those trainings took together, instead of `epochs`.
    """
    settings = shop.settings({"lr": lr, "epochs": epochs, "batch": batch, "texts": texts.settings})

    def compute(work: Work) -> dict:
        loaded = shop.use(base, start)
        if start is None:
            reset_adapter(loaded.model, derive_seed(shop.config.run.seed, base.name, "adapter"))
        rows, counts = trainable(shop, loaded, texts.read())
        work.log(f"first row: {show_mask(loaded.tokenizer, rows[0].rows[0])[:400]}" if rows else "no row is left")
        steps = sum(stage.notes()["counts"]["steps"] for stage in like)
        schedule = Schedule(lr, steps or epochs * steps_per_epoch(len(rows), batch), batch)
        return finish_training(shop, work, base, loaded, rows, SftObjective(shop.compiled), schedule) | counts

    inputs = [base.stage, *present(start), texts.stage, *like]
    size = f"sft, {epochs or 'as many steps as the student, no'} epochs at lr {lr:g}"
    return shop.run.stage(name, "sft/1", settings, inputs, compute, key, size)


def trainable(shop: Workshop, loaded: Loaded, examples: Sequence[Example]) -> tuple[list[Unit], dict]:
    """Units of the answers that can be trained on, and how many could not, or had been cut."""
    units, counts = [], dict(empty=0, over_long=0, cut_at_limit=0)
    limit = min(shop.config.data.max_length, loaded.model.config.max_position_embeddings)
    for example, row in zip(examples, render_rows(shop, loaded.tokenizer, examples), strict=True):
        reason = "empty" if not example.response else "over_long" if len(row.ids) > limit else None
        if reason:
            counts[reason] += 1
            continue
        counts["cut_at_limit"] += example.meta.get("finish") == "length"
        units.append(Unit(example.id, (row,)))
    return units, counts


def finish_training(shop: Workshop, work: Work, base: Base, loaded: Loaded, units, objective, schedule) -> dict:
    """Fit, check that the adapter does something, and write it in PEFT's layout."""
    counts = fit(loaded.model, loaded.slot_params, units, objective, schedule, work)
    tensors = read_adapter(loaded.model)
    if schedule.steps and not any(t.any() for k, t in tensors.items() if k.endswith("lora_B.weight")):
        raise UserError(f"{work.name}: the trained adapter is still zero")
    folder = shop.run.path / work.name
    home = str(base.stage.path.absolute()) if base.stage.external else os.path.relpath(base.stage.path, folder)
    save_adapter(work.folder, tensors, shop.config.lora, home)
    groups = plan_scoring([len(row.ids) for unit in units for row in unit.rows], shop.config.run.micro_tokens)
    return counts | {"padding": round(padding_share(groups, [len(r.ids) for u in units for r in u.rows]), 4)}


def prefer(
    shop: Workshop, name: str, base: Base, pairs: Stage, start: Stage, reference: Stage | None, lr: float, key: tuple
) -> Stage:
    """The contrastive step (2.3): DPO + gamma · SFT on pairs.jsonl, continuing the adapter `start`."""
    dpo, contrast = shop.config.dpo, shop.config.macpo.hard_negatives
    settings = shop.settings(dpo, {"lr": lr, "contrast": contrast})
    for unused in ("student_lr", "teacher_lr"):
        settings.pop(unused)

    def compute(work: Work) -> dict:
        loaded = shop.use(base, reference)
        units = [pair_unit(shop, loaded, pair) for pair in read_records(pairs.path / "pairs.jsonl", Pair)]
        objective = PairObjective(dpo.beta, dpo.gamma, dpo.label_smoothing, contrast, shop.compiled)
        schedule = Schedule(lr, dpo.epochs * steps_per_epoch(len(units), dpo.batch), dpo.batch)
        words = {"base": "the bare base", "init": "round 0", "previous": "the last round"}[dpo.reference]
        work.log(f"reference policy: {words}; its logps are stored with the pairs")
        if units and schedule.steps:
            first = first_group(shop, work, units, schedule)
            check_reference(work, loaded, first)
            shop.use(base, start)
            start_margins(work, loaded, first, objective, start == reference)
            work.log(f"first chosen: {show_mask(loaded.tokenizer, first[0].rows[0])[:400]}")
        shop.use(base, start)
        return finish_training(shop, work, base, loaded, units, objective, schedule)

    inputs = [base.stage, pairs, start, *present(reference)]
    size = f"{'DPO + SFT' if contrast else 'SFT term only'}, {dpo.epochs} epoch at lr {lr:g}"
    return shop.run.stage(name, "prefer/1", settings, inputs, compute, key, size)


def pair_unit(shop: Workshop, loaded: Loaded, pair: Pair) -> Unit:
    """Two rendered rows, chosen first, with their stored reference logps."""
    rows = render_rows(shop, loaded.tokenizer, (chosen_side(pair), rejected_side(pair)))
    return Unit(pair.id, tuple(rows), (pair.ref_chosen_logps, pair.ref_rejected_logps))


def first_group(shop: Workshop, work: Work, units: Sequence[Unit], schedule: Schedule) -> list[Unit]:
    """The units of the first micro-batch that `fit` will see."""
    lengths = [max(len(row.ids) for row in unit.rows) for unit in units]
    budget = shop.config.run.micro_tokens
    return [units[i] for i in plan_steps(lengths, schedule.batch, 1, work.seed, 2, budget)[0][0]]


def check_reference(work: Work, loaded: Loaded, units: Sequence[Unit]) -> None:
    """The training path must find the logps that are stored with the pairs; UserError if not."""
    batch = collate([row for unit in units for row in unit.rows], next(loaded.model.parameters()).device)
    with torch.no_grad():
        found = sequence_logps(loaded.model, batch.tokens, batch.mask).tolist()
    stored = [value for unit in units for value in unit.refs]
    slack = 1e-4 if next(loaded.model.parameters()).dtype == torch.float32 else 0.02
    worst = max(abs(a - b) / (1 + abs(b)) for a, b in zip(found, stored, strict=True))
    if worst > slack:
        raise UserError(f"{work.name}: stored reference logps differ from the model's by {worst:.2g} (relative)")


def start_margins(work: Work, loaded: Loaded, units: Sequence[Unit], objective: PairObjective, same: bool) -> None:
    """Log the margins before the first step; where reference and start are one, they must be zero."""
    device = next(loaded.model.parameters()).device
    batch = collate([row for unit in units for row in unit.rows], device)
    refs = torch.tensor([unit.refs for unit in units], device=device)
    with torch.no_grad():
        _, values = objective(loaded.model, batch, refs, len(units), int(batch.mask.sum()))
    found = dict(zip(objective.metrics, torch.stack(values).tolist(), strict=True))
    work.metrics({"step": 0} | found)
    work.log(f"margin before the first step: {found['rewards/margins']:+.4f}")
    slack = 1e-3 if next(loaded.model.parameters()).dtype == torch.float32 else 0.5
    if same and abs(found["rewards/margins"]) > slack:
        raise UserError(f"{work.name}: start and reference are the same, yet the margin is not zero: {found}")


# ---- sampling and scoring -------------------------------------------------------------------


def sample(
    shop: Workshop, name: str, base: Base, adapter: Stage | None, prompts: Texts, agent: str, key: tuple, answers: int = 1
) -> Stage:
    """`answers` sampled answers per prompt, as samples.jsonl, in the prompts' order."""
    settings = shop.settings(shop.config.generate, {"answers": answers, "agent": agent, "texts": prompts.settings})

    def compute(work: Work) -> dict:
        loaded = shop.use(base, adapter)
        jobs = [(example, number) for example in prompts.read() for number in range(answers)]
        lengths = [len(render_prompt(loaded.tokenizer, shop.config.data.template, e.prompt)) for e, _ in jobs]
        order = sorted(range(len(jobs)), key=lambda i: (lengths[i], i))
        size = shop.config.generate.batch
        blocks = [order[i : i + size] for i in range(0, len(order), size)]
        files = [work.folder / f"block{number}.jsonl" for number in range(len(blocks))]
        done: dict[int, Sample] = {}
        with work.progress(len(jobs), "answer") as progress:
            for file, block in zip(files, blocks, strict=True):
                if not file.is_file():
                    work.check()
                    write_records(file, answer(shop.config, loaded, agent, [jobs[i] for i in block], work.seed))
                done |= zip(block, read_records(file, Sample), strict=True)
                progress.step(len(block))
        samples = [done[i] for i in range(len(jobs))]
        write_records(work.folder / "samples.jsonl", samples)
        for file in files:
            file.unlink()
        return sample_counts(samples)

    inputs = [base.stage, *present(adapter), prompts.stage]
    return shop.run.stage(name, "sample/1", settings, inputs, compute, key, f"{answers} answer(s) per prompt")


def sample_counts(samples: Sequence[Sample]) -> dict:
    """What stage.json and the log say of a set of samples."""
    return {
        "answers": len(samples),
        "tokens": sum(len(s.tokens) for s in samples),
        "hit_length": sum(s.finish == "length" for s in samples),
        "empty": sum(not s.response for s in samples),
    }


def score_texts(shop: Workshop, name: str, base: Base, adapter: Stage | None, texts: Texts) -> Stage:
    """Log-probability and perplexity of given texts, end token included, as scores.jsonl (2.4)."""

    def compute(work: Work) -> dict:
        loaded = shop.use(base, adapter)
        examples = texts.read()
        rows = render_rows(shop, loaded.tokenizer, examples)
        with work.progress(len(rows), "text") as progress:
            logps = score(loaded.model, rows, shop.config.run.micro_tokens, progress)
        out = []
        for example, row, logp in zip(examples, rows, logps, strict=True):
            tokens = sum(row.mask)
            out.append({"id": example.id, "logp": logp, "tokens": tokens, "perplexity": perplexity(logp, tokens),
                        "characters": len(example.response)})  # fmt: skip
        write_rows(work.folder / "scores.jsonl", out)
        return {"texts": len(out), "tokens": sum(row["tokens"] for row in out)}

    inputs = [base.stage, *present(adapter), texts.stage]
    return shop.run.stage(name, "score/1", shop.settings({"texts": texts.settings}), inputs, compute)


# ---- pairs ----------------------------------------------------------------------------------


def select(shop: Workshop, candidates: Sequence[Sequence[Example]], scores: Sequence[Stage], key: tuple) -> list[int | None]:
    """Which candidate answers each prompt: the least perplexing (ties: the first), or a random one.

    An empty answer never wins; None where all are empty.
    """
    values = [[row["perplexity"] for row in read_rows(s.path / "scores.jsonl")] for s in scores]
    winners = []
    for index, answers in enumerate(zip(*candidates, strict=True)):
        able = [k for k, answer in enumerate(answers) if answer.response]
        if not able:
            winners.append(None)
        elif values:
            winners.append(min(able, key=lambda k: (values[k][index], k)))
        else:
            winners.append(random.Random(repr((shop.config.run.seed, *key, answers[0].id))).choice(able))
    return winners


def pairs(
    shop: Workshop, name: str, base: Base, candidates: dict[str, Texts], scores: Sequence[Stage],
    negatives: Texts, reference: Stage | None, reference_scores: Stage, key: tuple,
) -> Stage:  # fmt: skip
    """pairs.jsonl: per prompt the selected candidate against the agent's own cached negative (R3, R5).

    `reference_scores` are the negatives' logps under the reference; those of the chosen answers are
    computed here. A pair whose negative is empty or equals its chosen side is dropped and counted.
    """
    names = list(candidates)
    settings = shop.settings({"names": names})

    def compute(work: Work) -> dict:
        answers = [texts.read() for texts in candidates.values()]
        bad = negatives.read()
        bad_logps = [row["logp"] for row in read_rows(reference_scores.path / "scores.jsonl")]
        reasons = ("pairs", "all_empty", "negative_empty", "negative_equal", "over_long")
        counts = dict.fromkeys((*reasons, *(f"chosen_{who}" for who in names)), 0)
        loaded = shop.use(base, reference)
        made = []
        for index, winner in enumerate(select(shop, answers, scores, key)):
            chosen = None if winner is None else answers[winner][index]
            reason = pair_problem(shop, loaded, chosen, bad[index])
            counts[reason or f"chosen_{names[winner]}"] += 1
            if not reason:
                made.append(
                    Pair(chosen.id, chosen.prompt, chosen.response, bad[index].response, names[winner], base.name,
                         None, bad_logps[index], {k: v for k, v in chosen.meta.items() if k != "finish"})
                )  # fmt: skip
        counts["pairs"] = len(made)
        rows = render_rows(shop, loaded.tokenizer, [chosen_side(pair) for pair in made])
        logps = score(loaded.model, rows, shop.config.run.micro_tokens)
        made = [replace(pair, ref_chosen_logps=logp) for pair, logp in zip(made, logps, strict=True)]
        write_records(work.folder / "pairs.jsonl", made)
        if counts["negative_equal"] > 0.1 * len(bad):
            work.log(f"WARNING: {counts['negative_equal']} of {len(bad)} negatives equal their positive")
        return counts

    inputs = [base.stage, *(t.stage for t in candidates.values()), *scores, negatives.stage, reference_scores, *present(reference)]
    return shop.run.stage(name, "pairs/1", settings, inputs, compute, key)


def pair_problem(shop: Workshop, loaded: Loaded, chosen: Example | None, negative: Example) -> str | None:
    """Why a pair cannot be trained on, None if it can."""
    if chosen is None:
        return "all_empty"
    if not negative.response:
        return "negative_empty"
    if negative.response == chosen.response:
        return "negative_equal"
    limit = min(shop.config.data.max_length, loaded.model.config.max_position_embeddings)
    rows = render_rows(shop, loaded.tokenizer, (chosen, negative))
    return "over_long" if max(len(row.ids) for row in rows) > limit else None


