"""The kinds of stage that the methods are made of, each a function from its inputs to a Stage."""

import functools
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO

import numpy as np
import torch

from minmacpo import UserError
from minmacpo.bases import Base
from minmacpo.batching import collate, steps_per_epoch
from minmacpo.checkpoint import save_adapter
from minmacpo.config import Dpo
from minmacpo.data import Pair, Sample
from minmacpo.files import Lines, each_row, in_runs, keep_block, kept_blocks, naming, write_atomic, write_rows
from minmacpo.fit import PairObjective, Planned, Schedule, SftObjective, Unit, fit, make_plan
from minmacpo.lora import read_adapter, reset_adapter
from minmacpo.losses import sequence_logps
from minmacpo.machine import allocating
from minmacpo.run import Stage, Work, derive_seed
from minmacpo.score import perplexity, score
from minmacpo.tokenizer import Tokens, show_mask
from minmacpo.workshop import Loaded, Texts, Workshop, answer

EARNED = 2e12  # logits whose reading and writing (12 bytes less of each at 3 TB/s) takes as long as to compile: 8 s; an estimate
BLOCKS = 4  # times as many prompts as are sampled side by side, in a block: those behind get the places of answers that ended
WINDOW = 2048  # texts that are rendered and scored at a time: memory does not grow with their number
UNSCORED = math.inf  # a log-probability that no text has


@dataclass(frozen=True, slots=True)
class Pace:
    """How an agent learns: peak learning rate, passes over the data, answers or pairs per step."""

    lr: float
    epochs: int
    batch: int

    def schedule(self, units: int, steps: int = 0) -> Schedule:
        """`steps` optimiser steps, or all passes over so many units."""
        return Schedule(self.lr, steps or self.epochs * steps_per_epoch(units, self.batch), self.batch)


def sft(shop: Workshop, name: str, base: Base, texts: Texts, start: Stage | None, pace: Pace, key: tuple,
        like: Sequence[Stage] = (), confidence: float = 0.0) -> Stage:  # fmt: skip
    """Supervised fine-tuning of the slot on `texts`, from `start` or from a fresh adapter (I1-I5).
    `like`: take as many optimiser steps as those trainings took together, whatever the pace says;
    `confidence`: the final weight of the auxiliary confidence loss (method.md 7.2)."""

    def learn(work: Work) -> dict:
        """Render, drop what cannot be trained on, fit."""
        loaded = shop.use(base, start)
        if start is None:
            reset_adapter(loaded.model, derive_seed(shop.config.run.seed, base.name, "adapter"))
        found = [(text, shop.render(loaded, text.prompt, text.response)) for text in texts.read()]
        found, dropped = sift(found, {
            "empty": lambda text, row: not text.response,
            "over_long": lambda text, row: len(row.ids) > loaded.limit,
        })  # fmt: skip
        warn_of(work, dropped, len(found))
        show_first(work, loaded, "row", [row for _, row in found])
        units = [Unit(text.id, (row,)) for text, row in found]
        schedule = pace.schedule(len(units), sum(stage.notes()["counts"]["steps"] for stage in like))
        plan = make_plan(units, schedule, work)
        objective = SftObjective(compiles(shop, loaded, units, schedule), confidence)
        counts = train(work, base, loaded, units, objective, schedule, plan)
        cut = sum(getattr(text, "finish", None) == "length" for text, _ in found)
        return counts | dropped | {"cut_at_limit": cut}

    settings, inputs = asdict(pace) | texts.settings, [base.stage, start, texts.stage, *like]
    settings |= ({"confidence": confidence} if confidence else {}) | log_lines(shop) | shop.quantised(base)
    size = f"sft, {'as many steps as the student' if like else f'{pace.epochs} epochs'} at lr {pace.lr:g}"
    return shop.stage(name, "sft/1", settings, inputs, learn, key, size)


def prefer(shop: Workshop, name: str, base: Base, pairs: Stage, start: Stage, reference: Stage | None,
           pace: Pace, dpo: Dpo, key: tuple) -> Stage:  # fmt: skip
    """The contrastive step (2.3): DPO + gamma · SFT on pairs.jsonl, continuing the adapter `start`."""
    contrast = shop.config.macpo.hard_negatives

    def learn(work: Work) -> dict:
        """Render both sides, check the start against the stored reference, fit."""
        loaded, units = shop.use(base, start), []
        for pair in each_row(pairs.path / "pairs.jsonl", Pair):
            rows = [shop.render(loaded, pair.prompt, text) for text in (pair.chosen, pair.rejected)]
            refs = (pair.ref_chosen_logps, pair.ref_rejected_logps)
            units.append(Unit(pair.id, tuple(rows), refs if pair.weight is None else (*refs, pair.weight)))
        show_first(work, loaded, "chosen", [unit.rows[0] for unit in units])
        show_first(work, loaded, "rejected", [unit.rows[1] for unit in units])
        words = {"base": "the bare base", "init": "round 0", "previous": "the last round"}[dpo.reference]
        work.log(f"reference policy: {words}; its logps are stored with the pairs")
        schedule = pace.schedule(len(units))
        compiled = compiles(shop, loaded, units, schedule)
        objective = PairObjective(dpo.beta, dpo.gamma, dpo.label_smoothing, contrast, compiled,
                                  dpo.length_normalized, dpo.length_penalty)  # fmt: skip
        plan = make_plan(units, schedule, work)
        first = [units[i] for i in plan.steps[0][0]] if schedule.steps else []
        before = check_start(shop, work, base, start, reference, first, objective, plan.share)
        return train(work, base, loaded, units, objective, schedule, plan, before)

    settings = {k: v for k, v in asdict(dpo).items() if k not in ("student_lr", "teacher_lr")}
    settings |= asdict(pace) | {"contrast": contrast} | log_lines(shop) | shop.quantised(base)
    size = f"{'DPO + SFT' if contrast else 'SFT term only'}, {pace.epochs} epoch at lr {pace.lr:g}"
    return shop.stage(name, "prefer/1", settings, [base.stage, pairs, start, reference], learn, key, size)


def log_lines(shop: Workshop) -> dict[str, int]:
    """run.log_every where it is not the usual: it says which lines metrics.jsonl has, and the monitor reads those."""
    every = shop.config.run.log_every
    return {} if every == type(shop.config.run)().log_every else {"log_every": every}


def compiles(shop: Workshop, loaded: Loaded, units: Sequence[Unit], schedule: Schedule) -> bool:
    """Whether the loss is compiled: as run.compile says; auto: on a GPU, if the stage's logits are worth the wait."""
    if shop.config.run.compile != "auto" or not shop.compiled:
        return shop.compiled
    trained = sum(sum(row.mask) for unit in units for row in unit.rows) * schedule.steps * schedule.batch / max(len(units), 1)
    return trained * loaded.model.config.vocab_size >= EARNED


def train(work: Work, base: Base, loaded: Loaded, units: list[Unit], objective, schedule: Schedule, plan: Planned,
          before: Sequence[dict] = ()) -> dict:  # fmt: skip
    """Fit the slot, check that it does something, and write it in PEFT's layout. `before`: first metrics."""
    counts = fit(loaded.model, loaded.slot_params, units, objective, schedule, work, before, plan)
    tensors = read_adapter(loaded.model)
    if schedule.steps and not any(t.any() for k, t in tensors.items() if k.endswith("lora_B.weight")):
        raise UserError(f"{work.name}: the trained adapter is still zero")
    if not work.ranks.main:
        return counts
    path, config = base.stage.path, work.run.config
    home = path.absolute() if base.stage.external else os.path.relpath(path, work.run.path / work.name)
    save_adapter(work.folder, tensors, config.lora, str(home))
    return counts


def keep(shop: Workshop, name: str, adapter: Stage) -> Stage:
    """A trained adapter under another name."""

    def copy(work: Work) -> dict:
        """Its files say the same from a folder of the same depth."""
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            write_atomic(work.folder / file, (adapter.path / file).read_bytes())
        return {"kept": adapter.name}

    return shop.stage(name, "keep/1", {}, [adapter], copy, size="the student before the first alarm")


def check_start(shop: Workshop, work: Work, base: Base, start: Stage, reference: Stage | None,
                first: list[Unit], objective, share: bool) -> list[dict]:  # fmt: skip
    """[metrics before the first step] of its first pairs, of half of them where memory is short; [] of none. Raises UserError unless
    they have their stored reference logps and, where reference and start are one, no margin; leaves `start` loaded."""
    try:
        with allocating():
            return [{"step": 0, "epoch": 0.0} | check_pairs(shop, work, base, start, reference, first, objective, share)] if first else []
    except torch.OutOfMemoryError:
        if len(first) == 1 or work.ranks.shards:
            raise UserError(f"{work.name}: out of memory before the first step; lower {'run.micro_tokens' if len(first) > 1 else 'data.max_length'}") from None
    return check_start(shop, work, base, start, reference, first[: len(first) // 2], objective, share)


def check_pairs(shop: Workshop, work: Work, base: Base, start: Stage, reference: Stage | None,
                first: list[Unit], objective, share: bool) -> dict:  # fmt: skip
    """The metrics of some pairs, if all is as `check_start` wants it."""
    rows, refs = [row for unit in first for row in unit.rows], [ref for unit in first for ref in unit.refs[:2]]
    model = shop.use(base, reference).model
    weight = next(model.parameters())
    batch, exact = collate(rows, weight.device, share), weight.dtype == torch.float32
    logps = sequence_logps(model, batch.tokens, batch.mask, objective.compiled, batch.shared).tolist()  # on the path of training
    worst = max(abs(a - b) / (1 + abs(b)) for a, b in zip(logps, refs, strict=True))
    if worst > (1e-4 if exact else 0.02):
        problem = f"stored reference logps differ from the model's by {worst:.2g} (relative)"
        raise UserError(f"{work.name}: {problem}")
    shop.use(base, start)
    refs = torch.tensor([unit.refs for unit in first], device=weight.device)
    with torch.no_grad():
        _, values = objective(model, batch, refs, len(first), int(batch.mask.sum()))
    found = dict(zip(objective.metrics, torch.stack(values).tolist(), strict=True))
    work.log(f"margin before the first step: {found['rewards/margins']:+.4f}")
    if start == reference and abs(found["rewards/margins"]) > (1e-3 if exact else 0.5):
        raise UserError(f"{work.name}: start and reference are the same, yet the margin is not zero: {found}")
    return found


def sample(shop: Workshop, name: str, base: Base, adapter: Stage | None, prompts: Texts, agent: str,
           key: tuple, answers: int = 1, temperature: float | None = None,
           against: Stage | None = None) -> Stage:  # fmt: skip
    """`answers` sampled answers per prompt, as samples.jsonl, in the prompts' order; `temperature` in place of
    the run's; `against`: decoded contrastively, away from that adapter (generate.contrast)."""
    config = shop.config
    if temperature is not None:
        config = replace(config, generate=replace(config.generate, temperature=temperature))

    def write_samples(work: Work) -> dict:
        """Sample in blocks of fixed size; a killed stage redoes one of them, or one a rank."""
        other = shop.use(base, against, "against") if against else None
        loaded, size = shop.use(base, adapter), config.generate.batch * BLOCKS
        asked = prompts.read()
        show_first(work, loaded, "prompt", [shop.render(loaded, example.prompt) for example in islice(asked, 1)])
        sizes = (len(shop.render(loaded, example.prompt).ids) for example in asked)
        order = np.argsort(np.fromiter(sizes, np.int32).repeat(answers), kind="stable").astype(np.int32)

        def answers_to(block: np.ndarray) -> list[dict]:
            jobs, side = [(asked[i // answers], i % answers) for i in block.tolist()], config.generate.batch
            return [asdict(s) for s in answer(config, loaded, agent, jobs, work.seed, other, None, side)]

        files = in_blocks(work, [order[start : start + size] for start in range(0, len(order), size)], answers_to)
        if not work.ranks.main:
            return {}
        counts = {"answers": len(order), "tokens": 0, "hit_length": 0, "empty": 0}
        write_rows(work.folder / "samples.jsonl", in_place(files, order, size, counts))
        for file in work.folder.glob("block*.jsonl"):
            file.unlink()
        return counts

    settings = asdict(config.generate) | prompts.settings | {"answers": answers, "agent": agent}
    settings |= ({"contrastive": True} if against else {}) | {"blocks": BLOCKS} | shop.quantised(base)
    inputs, size = [base.stage, adapter, prompts.stage, against], f"{answers} answer(s) per prompt"
    return shop.stage(name, "sample/1", settings, inputs, write_samples, key, size)


def in_blocks(work: Work, blocks: list[np.ndarray], answers_to: Callable[[np.ndarray], list[dict]]) -> list[Path]:
    """A file of answers for each block of jobs; those that a stopped stage has left are kept, the ranks share the others. []
    for all ranks but the main one."""
    kept = kept_blocks(work.folder) if work.ranks.main else {}
    missing = work.ranks.first(lambda: [number for number in range(len(blocks)) if number not in kept])
    total, left = sum(map(len, blocks)), sum(len(blocks[number]) for number in missing)
    with work.progress(total, "answer", total - left) as progress:
        for number, found in zip(missing, work.ranks.each([blocks[n] for n in missing], answers_to), strict=True):
            if work.ranks.main:
                kept[number] = keep_block(work.folder, number, found)
            progress.step(len(found))
    return [kept[number] for number in range(len(blocks))] if work.ranks.main else []


def in_place(files: Sequence[Path], order: np.ndarray, size: int, counts: dict[str, int]) -> Iterator[Sample]:
    """The samples of the blocks in the order of their jobs, `order` [N] being that in which they were made; counts them."""
    places, block = np.empty_like(order), functools.cache(lambda number: Lines(files[number], Sample))
    places[order] = np.arange(len(order), dtype=order.dtype)
    for place in map(int, places):
        said = block(place // size)[place % size]
        counts["tokens"] += len(said.tokens)
        counts["hit_length"] += said.finish == "length"
        counts["empty"] += not said.response
        yield said


FOUND = struct.Struct("dq")  # of a text its log-probability (UNSCORED: longer than the context), and its tokens


def scored_together(shop: Workshop, work: Work, base: Base, adapter: Stage | None, group: Sequence[Texts]) -> dict[tuple, IO]:
    """What was found of all texts of the group, by Texts.key, each a FOUND in a nameless file ({} for all ranks but the main
    one); WINDOW of each in one pass, so that answers to one prompt share it; kept for the group's next stage."""
    key = (base.stage.fingerprint, adapter and adapter.fingerprint, *(texts.key for texts in group))
    if shop.scored[0] != key:
        shop.scored = None, {}
        loaded, given = shop.use(base, adapter), [texts.read() for texts in group]
        context = loaded.model.config.max_position_embeddings
        found = {texts.key: tempfile.TemporaryFile(dir=work.folder.parent) for texts in group if work.ranks.main}  # noqa: SIM115 (closed when the next group comes)
        with work.progress(sum(map(len, given)), "text") as progress:
            for run in zip_longest(*(in_runs(texts, WINDOW) for texts in given), fillvalue=()):
                rows = [[shop.render(loaded, text.prompt, text.response) for text in part] for part in run]
                short = [row for part in rows for row in part if len(row.ids) <= context]
                logps = iter(score(loaded.model, short, shop.score_tokens, progress, work.ranks, work.log, share=True))
                for file, part in zip(found.values(), rows, strict=work.ranks.main):
                    with naming(work.folder.parent):
                        file.write(b"".join(FOUND.pack(next(logps) if len(row.ids) <= context else UNSCORED, sum(row.mask)) for row in part))
        shop.scored = key, found
    return shop.scored[1]


def score_rows(texts: Sequence, file: IO, counts: dict[str, int]) -> Iterator[dict]:
    """The rows of scores.jsonl from what `scored_together` found; counts them."""
    file.seek(0)
    found = (each for run in iter(lambda: file.read(FOUND.size * WINDOW), b"") for each in FOUND.iter_unpack(run))
    for text, (logp, tokens) in zip(texts, found, strict=True):
        known = logp != UNSCORED
        counts["texts"] += 1
        counts["tokens"] += tokens * known
        counts["over_long"] += not known
        yield {"id": text.id, "logp": logp if known else None, "tokens": tokens,
               "perplexity": perplexity(logp if known else -math.inf, tokens), "characters": len(text.response)}  # fmt: skip


def score_texts(shop: Workshop, name: str, base: Base, adapter: Stage | None, texts: Texts, among: Sequence[Texts] = ()) -> Stage:
    """Log-probability and perplexity of given texts, end token included, as scores.jsonl (2.4). A text longer
    than the model's context is counted; it has no log-probability, and the highest perplexity there is. `among`: these and
    others for the same prompts, which are scored together."""
    group = [*among] or [texts]

    def write_scores(work: Work) -> dict:
        """One row per text, in their order."""
        found = scored_together(shop, work, base, adapter, group)
        loaded, given, counts = shop.use(base, adapter), texts.read(), {"texts": 0, "tokens": 0, "over_long": 0}
        show_first(work, loaded, "row", [shop.render(loaded, text.prompt, text.response) for text in islice(given, 1)])
        if not work.ranks.main:
            return {}
        write_rows(work.folder / "scores.jsonl", score_rows(given, found[texts.key], counts))
        if long := counts["over_long"]:
            work.log(f"WARNING: {long} of {counts['texts']} texts are longer than the context of {base.name}")
        return counts

    inputs = [base.stage, adapter, texts.stage, *(other.stage for other in group if other != texts)]
    return shop.stage(name, "score/1", texts.settings | shop.quantised(base), inputs, write_scores)


def show_first(work: Work, loaded: Loaded, what: str, rows: Sequence[Tokens]) -> None:
    """Log the first of `rows` with its mask: at most 200 characters before its answer, and 200 of that."""
    text = show_mask(loaded.tokenizer, rows[0]) if rows else "none"
    work.log(f"first {what}: {text[max(0, text.find('⟦') - 200) :][:400]}")


def sift(found: list[tuple], problems: dict[str, Callable]) -> tuple[list[tuple], dict[str, int]]:
    """(all that has none of the problems, how much was dropped for which)."""
    reasons = [next((name for name, holds in problems.items() if holds(*each)), None) for each in found]
    kept = [each for each, reason in zip(found, reasons, strict=True) if reason is None]
    return kept, {name: reasons.count(name) for name in problems}


def warn_of(work: Work, dropped: dict[str, int], kept: int) -> None:
    """Log a warning where more than a tenth of a stage's rows was dropped."""
    if (gone := sum(dropped.values())) > 0.1 * (gone + kept):
        words = ", ".join(f"{name} {count}" for name, count in dropped.items() if count)
        work.log(f"WARNING: {gone} of {gone + kept} rows were dropped ({words})")
