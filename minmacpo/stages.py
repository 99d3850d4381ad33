"""The five kinds of stage that the methods are made of, each a function from its inputs to a Stage."""

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain

import torch

from minmacpo import UserError
from minmacpo.bases import Base
from minmacpo.batching import collate, padding_share, plan_scoring, steps_per_epoch
from minmacpo.checkpoint import save_adapter
from minmacpo.data import Example, Pair, Sample
from minmacpo.files import read_records, read_rows, write_records, write_rows
from minmacpo.fit import PairObjective, Schedule, SftObjective, Unit, fit, plan_of
from minmacpo.lora import read_adapter, reset_adapter
from minmacpo.losses import sequence_logps
from minmacpo.run import Stage, Work, derive_seed
from minmacpo.score import perplexity, score
from minmacpo.tokenizer import render_prompt, show_mask
from minmacpo.workshop import Loaded, Texts, Workshop, answer


def sft(shop: Workshop, name: str, base: Base, texts: Texts, start: Stage | None, lr: float, epochs: int,
        batch: int, key: tuple, like: Sequence[Stage] = ()) -> Stage:  # fmt: skip
    """Supervised fine-tuning of the slot on `texts`, from `start` or from a fresh adapter (I1-I5).
    `like`: take as many optimiser steps as those trainings took together, instead of `epochs`."""

    def compute(work: Work) -> dict:
        loaded = shop.use(base, start)
        if start is None:
            reset_adapter(loaded.model, derive_seed(shop.config.run.seed, base.name, "adapter"))
        units, counts = [], dict(empty=0, over_long=0, cut_at_limit=0)
        for record in texts.records():
            text = getattr(record, texts.side)
            row = shop.render(loaded, record.prompt, text)
            if not text or len(row.ids) > loaded.limit:
                counts["over_long" if text else "empty"] += 1
            else:
                counts["cut_at_limit"] += getattr(record, "finish", None) == "length"
                units.append(Unit(record.id, (row,)))
        if units:
            work.log(f"first row: {show_mask(loaded.tokenizer, units[0].rows[0])[:400]}")
        else:
            work.log("no row is left")
        steps = sum(stage.notes()["counts"]["steps"] for stage in like)
        schedule = Schedule(lr, steps or epochs * steps_per_epoch(len(units), batch), batch)
        return train(work, base, loaded, units, SftObjective(shop.compiled), schedule) | counts

    settings = {"lr": lr, "epochs": epochs, "batch": batch, "texts": texts.settings}
    size = f"sft, {epochs or 'as many steps as the student, no'} epochs at lr {lr:g}"
    return shop.stage(name, "sft/1", settings, [base.stage, start, texts.stage, *like], compute, key, size)


def train(work: Work, base: Base, loaded: Loaded, units: list[Unit], objective, schedule: Schedule) -> dict:
    """Fit the slot, check that the adapter does something, and write it in PEFT's layout."""
    counts = fit(loaded.model, loaded.slot_params, units, objective, schedule, work)
    tensors = read_adapter(loaded.model)
    if schedule.steps and not any(t.any() for k, t in tensors.items() if k.endswith("lora_B.weight")):
        raise UserError(f"{work.name}: the trained adapter is still zero")
    path, config = base.stage.path, work.run.config
    home = path.absolute() if base.stage.external else os.path.relpath(path, work.run.path / work.name)
    save_adapter(work.folder, tensors, config.lora, str(home))
    lengths = [len(row.ids) for unit in units for row in unit.rows]
    padding = padding_share(plan_scoring(lengths, config.run.micro_tokens), lengths)
    return counts | {"padding": round(padding, 4)}


def prefer(shop: Workshop, name: str, base: Base, pairs: Stage, start: Stage, reference: Stage | None,
           lr: float, key: tuple) -> Stage:  # fmt: skip
    """The contrastive step (2.3): DPO + gamma · SFT on pairs.jsonl, continuing the adapter `start`."""
    dpo, contrast = shop.config.dpo, shop.config.macpo.hard_negatives

    def compute(work: Work) -> dict:
        loaded = shop.use(base, start)
        units = [pair_unit(shop, loaded, pair) for pair in read_records(pairs.path / "pairs.jsonl", Pair)]
        objective = PairObjective(dpo.beta, dpo.gamma, dpo.label_smoothing, contrast, shop.compiled)
        schedule = Schedule(lr, dpo.epochs * steps_per_epoch(len(units), dpo.batch), dpo.batch)
        words = {"base": "the bare base", "init": "round 0", "previous": "the last round"}[dpo.reference]
        work.log(f"reference policy: {words}; its logps are stored with the pairs")
        if schedule.steps:
            first = [units[i] for i in plan_of(units, schedule, work)[0][0]]
            check_start(shop, work, base, start, reference, first, objective)
        return train(work, base, loaded, units, objective, schedule)

    settings = {k: v for k, v in asdict(dpo).items() if k not in ("student_lr", "teacher_lr")}
    settings |= {"lr": lr, "contrast": contrast}
    size = f"{'DPO + SFT' if contrast else 'SFT term only'}, {dpo.epochs} epoch at lr {lr:g}"
    return shop.stage(name, "prefer/1", settings, [base.stage, pairs, start, reference], compute, key, size)


def pair_unit(shop: Workshop, loaded: Loaded, pair: Pair) -> Unit:
    """Two rendered rows, chosen first, with their stored reference logps."""
    rows = tuple(shop.render(loaded, pair.prompt, text) for text in (pair.chosen, pair.rejected))
    return Unit(pair.id, rows, (pair.ref_chosen_logps, pair.ref_rejected_logps))


def check_start(shop: Workshop, work: Work, base: Base, start: Stage, reference: Stage | None,
                units: list[Unit], objective) -> None:  # fmt: skip
    """Raise UserError unless the first micro-batch has, before the first step, the reference logps that
    are stored with the pairs and, where reference and start are one, no margin; leaves the start loaded."""
    rows, refs = [row for unit in units for row in unit.rows], [unit.refs for unit in units]
    loaded = shop.use(base, reference)
    weight = next(loaded.model.parameters())
    batch, exact = collate(rows, weight.device), weight.dtype == torch.float32
    with torch.no_grad():
        logps = sequence_logps(loaded.model, batch.tokens, batch.mask).tolist()
    worst = max(abs(a - b) / (1 + abs(b)) for a, b in zip(logps, chain(*refs), strict=True))
    if worst > (1e-4 if exact else 0.02):
        problem = f"stored reference logps differ from the model's by {worst:.2g} (relative)"
        raise UserError(f"{work.name}: {problem}")
    shop.use(base, start)
    refs = torch.tensor(refs, device=weight.device)
    with torch.no_grad():
        _, values = objective(loaded.model, batch, refs, len(units), int(batch.mask.sum()))
    found = dict(zip(objective.metrics, torch.stack(values).tolist(), strict=True))
    work.metrics({"step": 0} | found)
    work.log(f"margin before the first step: {found['rewards/margins']:+.4f}")
    if start == reference and abs(found["rewards/margins"]) > (1e-3 if exact else 0.5):
        raise UserError(f"{work.name}: start and reference are the same, yet the margin is not zero: {found}")
    work.log(f"first chosen: {show_mask(loaded.tokenizer, rows[0])[:400]}")


def sample(shop: Workshop, name: str, base: Base, adapter: Stage | None, prompts: Texts, agent: str,
           key: tuple, answers: int = 1) -> Stage:  # fmt: skip
    """`answers` sampled answers per prompt, as samples.jsonl, in the prompts' order."""
    config = shop.config

    def compute(work: Work) -> dict:
        loaded = shop.use(base, adapter)
        jobs = [(example, number) for example in prompts.read() for number in range(answers)]
        lengths = [len(render_prompt(loaded.tokenizer, config.data.template, e.prompt)) for e, _ in jobs]
        order, size = sorted(range(len(jobs)), key=lambda i: lengths[i]), config.generate.batch
        starts = range(0, len(jobs), size)
        blocks = {work.folder / f"block{i // size}.jsonl": order[i : i + size] for i in starts}
        done: dict[int, Sample] = {}
        with work.progress(len(jobs), "answer") as progress:
            for file, block in blocks.items():
                if not file.is_file():
                    work.check()
                    write_records(file, answer(config, loaded, agent, [jobs[i] for i in block], work.seed))
                done |= zip(block, read_records(file, Sample), strict=True)
                progress.step(len(block))
        samples = [done[i] for i in range(len(jobs))]
        write_records(work.folder / "samples.jsonl", samples)
        for file in blocks:
            file.unlink()
        return {"answers": len(jobs), "tokens": sum(len(s.tokens) for s in samples),
                "hit_length": sum(s.finish == "length" for s in samples),
                "empty": sum(not s.response for s in samples)}  # fmt: skip

    settings = asdict(config.generate) | {"answers": answers, "agent": agent, "texts": prompts.settings}
    inputs = [base.stage, adapter, prompts.stage]
    return shop.stage(name, "sample/1", settings, inputs, compute, key, f"{answers} answer(s) per prompt")


def score_texts(shop: Workshop, name: str, base: Base, adapter: Stage | None, texts: Texts) -> Stage:
    """Log-probability and perplexity of given texts, end token included, as scores.jsonl (2.4)."""

    def compute(work: Work) -> dict:
        loaded, examples = shop.use(base, adapter), texts.read()
        rows = [shop.render(loaded, example.prompt, example.response) for example in examples]
        with work.progress(len(rows), "text") as progress:
            logps = score(loaded.model, rows, shop.config.run.micro_tokens, progress, work.check)
        tokens = [sum(row.mask) for row in rows]
        scores = [{"id": e.id, "logp": logp, "tokens": n, "perplexity": perplexity(logp, n),
                   "characters": len(e.response)}
                  for e, logp, n in zip(examples, logps, tokens, strict=True)]  # fmt: skip
        write_rows(work.folder / "scores.jsonl", scores)
        return {"texts": len(rows), "tokens": sum(tokens)}

    inputs = [base.stage, adapter, texts.stage]
    return shop.stage(name, "score/1", {"texts": texts.settings}, inputs, compute)


def select(shop: Workshop, candidates: Sequence[list[Example]], scores: Sequence[Stage],
           key: tuple) -> list[int | None]:  # fmt: skip
    """Which candidate answers each prompt: the least perplexing (ties: the first), or a random one.
    An empty answer never wins; None where all are empty."""
    values = [[row["perplexity"] for row in read_rows(s.path / "scores.jsonl")] for s in scores]
    winners = []
    for index, answers in enumerate(zip(*candidates, strict=True)):
        able = [k for k, answer in enumerate(answers) if answer.response]
        dice = random.Random(repr((shop.config.run.seed, *key, answers[0].id)))
        if able:
            winners.append(min(able, key=lambda k: values[k][index]) if values else dice.choice(able))
        else:
            winners.append(None)
    return winners


def pairs(shop: Workshop, name: str, base: Base, candidates: dict[str, Texts], scores: Sequence[Stage],
          negatives: Texts, reference: Stage | None, familiar: Stage, key: tuple) -> Stage:  # fmt: skip
    """pairs.jsonl: per prompt the selected candidate against the agent's own cached negative (R3, R5).
    `familiar` holds the negatives' logps under the reference; those of the chosen answers are computed
    here. A pair whose negative is empty or equals its chosen side is dropped and counted."""
    names = list(candidates)

    def compute(work: Work) -> dict:
        loaded = shop.use(base, reference)
        answers, bad = [texts.read() for texts in candidates.values()], negatives.read()
        bad_logps = [row["logp"] for row in read_rows(familiar.path / "scores.jsonl")]
        counts = dict(pairs=0, all_empty=0, negative_empty=0, negative_equal=0, over_long=0)
        counts |= {f"chosen_{who}": 0 for who in names}
        made, rows = [], []
        for i, winner in enumerate(select(shop, answers, scores, key)):
            best, worse, who = answers[winner or 0][i], bad[i].response, names[winner or 0]
            sides = [shop.render(loaded, best.prompt, text) for text in (best.response, worse)]
            problems = {"all_empty": winner is None, "negative_empty": not worse,
                        "negative_equal": worse == best.response,
                        "over_long": max(len(side.ids) for side in sides) > loaded.limit}  # fmt: skip
            problem = next((name for name, holds in problems.items() if holds), None)
            counts[problem or f"chosen_{who}"] += 1
            if not problem:
                made.append(Pair(best.id, best.prompt, best.response, worse, who, base.name,
                                 ref_rejected_logps=bad_logps[i], meta=best.meta))  # fmt: skip
                rows.append(sides[0])
        counts["pairs"] = len(made)
        logps = score(loaded.model, rows, shop.config.run.micro_tokens, check=work.check)
        made = [replace(pair, ref_chosen_logps=logp) for pair, logp in zip(made, logps, strict=True)]
        write_records(work.folder / "pairs.jsonl", made)
        if counts["negative_equal"] > 0.1 * len(bad):
            work.log(f"WARNING: {counts['negative_equal']} of {len(bad)} negatives equal their positive")
        return counts

    answered = [texts.stage for texts in candidates.values()]
    inputs = [base.stage, *answered, *scores, negatives.stage, familiar, reference]
    return shop.stage(name, "pairs/1", {"names": names}, inputs, compute, key)
