"""What a run will do, before it does it: the tokens that each stage goes through, the memory that it needs.

Everything is read off the recipes that planning has listed (run.Run.stage), the texts and the config.json files; no
weight is read. An answer that is still to be sampled counts as generate.max_new_tokens tokens, also in another tokenizer.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minmacpo.cli.memory_estimate import Load, Need, beside, need
from minmacpo.config.schema import Config
from minmacpo.core.batching import (
    batch_limits,
    plan_scoring,
    plan_steps,
    scoring_tokens,
    steps_per_epoch,
)
from minmacpo.core.checkpoint import read_config
from minmacpo.core.model_config import ModelConfig
from minmacpo.data.chat_template import render
from minmacpo.data.records import Example
from minmacpo.data.tokenizer import Tokenizer, load_tokenizer
from minmacpo.pipeline.base_models import made_config
from minmacpo.pipeline.model_pool import TextColumn
from minmacpo.pipeline.prepare_data import PreparedData
from minmacpo.pipeline.run import Run, Stage
from minmacpo.runtime.device import resolve_device, resolve_dtype

SOURCES = {
    "samples.jsonl": "sample",
    "questions.jsonl": "ask",
    "pairs.jsonl": "preferences",
}  # file -> kind of its stage


KINDS = (
    "pretrain",
    "sft",
    "prefer",
    "sample",
    "score",
    "pairs",
)  # that a model works in, each a method of Plan


ENOUGH = 512  # rows that stand for all where only their greatest length is known


@dataclass(frozen=True, slots=True)
class Rows:
    """TextColumn by their tokens, prompts [n] and answers [n]; not `exact` where the answers are not known yet. Of pairs `answers` are
    the longer ones, and `others` the shorter ones where they are known."""

    prompts: list[int]
    answers: list[int]
    exact: bool = True
    others: list[int] | None = None

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], exact: bool = True) -> "Rows":
        """Rows of (tokens of the prompt, of the answer)."""
        return cls([prompt for prompt, _ in sizes], [answer for _, answer in sizes], exact)

    def lengths(self, limit: int) -> tuple[list[int], list[int]]:
        """(tokens of each row, of them those of the answer), no more than `limit`."""
        whole = [min(a + b, limit) for a, b in zip(self.prompts, self.answers, strict=True)]
        return whole, [min(answer, limit) for answer in self.answers]


@dataclass(frozen=True, slots=True)
class Task:
    """What a stage does: tokens in all, whether they are exact, its largest pass, and the model it is for."""

    tokens: int
    exact: bool
    load: Load
    model: ModelConfig


class Plan:
    """The tasks of a planned run. `prepared`: its texts; None: the settings alone, every row as long as they allow."""

    def __init__(self, run: Run, config: Config, prepared: PreparedData | None):
        self.run, self.config, self.prepared = run, config, prepared
        self.lengths: dict[tuple, list[tuple[int, int]]] = {}  # of texts that were rendered already
        self.tasks: dict[str, Task | None] = {}

    def under(self, config: Config) -> "Plan":
        """The plan under other settings of memory."""
        other = Plan(self.run, config, self.prepared)
        other.lengths = self.lengths
        return other

    def task(self, name: str) -> Task | None:
        """What the stage does; None for one that moves texts only."""
        kind = self.run.plan[name].kind.partition("/")[0]
        if name not in self.tasks:
            self.tasks[name] = getattr(self, kind)(name) if kind in KINDS else None
        return self.tasks[name]

    def model(self, base: Stage) -> tuple[ModelConfig, Tokenizer | None]:
        """(structure, tokenizer) of a base that is given or will be made."""
        if base.external:
            return given_model(base.path)
        made = self.prepared and made_tokenizer(self.prepared.tokenizer)
        form = self.run.recipes[base.name][0]["settings"]["shape"]
        return made_config(self.config, form, made.size if made else self.config.model.vocab), made

    def sizes(
        self, texts: Sequence[Example], key: tuple, tokenizer: Tokenizer
    ) -> list[tuple[int, int]]:
        """(tokens of the prompt, of the answer) of every text, rendered once for each tokenizer."""
        key = (*key, hash(tokenizer.model))
        if key not in self.lengths:
            rows = (
                render(tokenizer, self.config.data.template, text.prompt, text.response)
                for text in texts
            )
            self.lengths[key] = [(row.mask.count(False), row.mask.count(True)) for row in rows]
        return self.lengths[key]

    def rows(self, name: str, base: Stage) -> Rows:
        """The texts that the stage reads, in the tokens of `base`."""
        (recipe, inputs), (model, tokenizer) = self.run.recipes[name], self.model(base)
        data, kind, most = (
            self.config.data,
            self.run.plan[name].kind,
            self.config.generate.max_new_tokens,
        )
        file, side = recipe["settings"].get("texts", ("d2.jsonl", "prompt"))
        if file not in SOURCES and self.prepared is None:
            count = max(ENOUGH, self.config.generate.batch)
            return Rows([data.max_prompt_length] * count, [data.max_length] * count, False)
        if file not in SOURCES:
            part = file.removesuffix(".jsonl")
            texts = [
                Example(p.id, p.prompt, "" if side == "prompt" else getattr(p, side) or "")
                for p in self.prepared.slices[part]
            ]
            return Rows.of(self.sizes(texts, (part, side), tokenizer))
        source = next(stage for stage in inputs if stage.kind.startswith(SOURCES[file]))
        if source.finished and self.prepared:
            return self.read(TextColumn(source, file, side), base, kind.startswith("sample"))
        asked = self.rows(source.name, base)
        if file == "questions.jsonl":  # `feedback.ask` leaves out what is longer
            count = len(asked.prompts) * (
                2 if self.run.recipes[source.name][0]["settings"].get("compare") else 1
            )
            return Rows([model.max_position_embeddings - most - 1] * count, [1] * count, False)
        times = self.run.recipes[source.name][0]["settings"].get("answers", 1)
        return Rows(
            asked.prompts * times,
            [most] * (times * len(asked.prompts)),
            exact=kind.startswith("sample") and asked.exact,
        )

    def read(self, texts: TextColumn, base: Stage, asked: bool) -> Rows:
        """TextColumn that are on the disk already (not exact, as empty ones may be left out); `asked`: their prompts alone matter."""
        found, key = texts.read(), (texts.stage.name, texts.file, texts.side)
        texts = [Example(text.id, text.prompt, "" if asked else text.response) for text in found]
        return Rows.of(self.sizes(texts, key, self.model(base)[1]), exact=False)

    def pretrain(self, name: str) -> Task:
        """Every token of a document is trained on, but for the first."""
        (recipe, _), (model, tokenizer) = self.run.recipes[name], self.model(self.run.plan[name])
        most, settings = self.config.data.max_length, recipe["settings"]
        texts = self.prepared and self.prepared.corpora[name.partition("/")[2]]
        sizes = (
            [sum(size) for size in self.sizes(texts, (name,), tokenizer)]
            if texts
            else [most] * ENOUGH
        )
        lengths = [min(size, most) for size in sizes]
        steps = self.steps(recipe, lengths, settings["steps"], 1)
        tokens = sum(lengths[unit] for step in steps for group in step for unit in group)
        return Task(tokens, texts is not None, largest("pretrain", steps, lengths, lengths), model)

    def steps(
        self, recipe: dict, lengths: list[int], steps: int, rows: int
    ) -> list[list[list[int]]]:
        """The micro-batches that `fit` will take; of rows that are all alike, those of the first pass."""
        if not lengths:
            return []
        if self.prepared is None:
            steps = min(steps, steps_per_epoch(len(lengths), recipe["settings"]["batch"]))
        budget, alike = batch_limits(
            self.config.run.max_tokens_per_batch,
            resolve_device(self.config.run.device),
            not recipe["kind"].startswith("pretrain"),
        )
        return plan_steps(
            lengths,
            recipe["settings"]["batch"],
            max(steps, 1),
            recipe["seed"],
            budget // rows,
            alike,
        )

    def sft(self, name: str) -> Task:
        """All passes over the texts, or as many steps as other stages take together."""
        recipe, (base, *inputs) = self.run.recipes[name]
        rows, model = self.rows(name, base), self.model(base)[0]
        lengths, answers = rows.lengths(
            min(self.config.data.max_length, model.max_position_embeddings)
        )
        count, batch = recipe["settings"]["epochs"], recipe["settings"]["batch"]
        taken = count * steps_per_epoch(len(lengths), batch)
        taken = taken or sum(
            self.pair_steps(stage.name) for stage in inputs if stage.kind.startswith("prefer")
        )
        steps = self.steps(recipe, lengths, taken, 1)
        tokens = sum(lengths[unit] for step in steps for group in step for unit in group)
        return Task(tokens, rows.exact, largest("train", steps, lengths, answers), model)

    def pair_rows(self, name: str) -> Rows:
        """The prompts of the pairs that a stage makes, with an answer that is as long as one of theirs can be."""
        recipe, (base, *_) = self.run.recipes[name]
        if self.run.plan[name].finished and self.prepared:
            sides = [
                self.read(TextColumn(self.run.plan[name], "pairs.jsonl", side), base, False)
                for side in ("chosen", "rejected")
            ]
            longer, shorter = (
                [of(both) for both in zip(*(side.answers for side in sides), strict=True)]
                for of in (max, min)
            )
            return replace(sides[0], answers=longer, others=shorter)
        rows, settings, most = (
            self.rows(name, base),
            recipe["settings"],
            self.config.generate.max_new_tokens,
        )
        times = (
            len(settings["names"]) * self.config.macpo.answers if "all" in settings["select"] else 1
        )
        if settings["texts"][0] in SOURCES:
            return Rows(rows.prompts * times, [most] * (times * len(rows.prompts)), False)
        return replace(
            rows, answers=[self.config.data.max_length] * len(rows.answers), exact=False
        )  # true answers

    def pair_steps(self, name: str) -> int:
        """Optimiser steps of a prefer stage."""
        recipe, (_, pairs, *_) = self.run.recipes[name]
        return recipe["settings"]["epochs"] * steps_per_epoch(
            len(self.pair_rows(pairs.name).prompts), recipe["settings"]["batch"]
        )

    def prefer(self, name: str) -> Task:
        """Both sides of every pair."""
        recipe, (base, pairs, *_) = self.run.recipes[name]
        rows, model = self.pair_rows(pairs.name), self.model(base)[0]
        lengths, answers = rows.lengths(
            min(self.config.data.max_length, model.max_position_embeddings)
        )
        steps = self.steps(recipe, lengths, self.pair_steps(name), 2)
        others = [min(pair) for pair in zip(rows.others or answers, answers, strict=True)]
        tokens = (2 * sum(lengths) - sum(answers) + sum(others)) * recipe["settings"]["epochs"]
        return Task(tokens, False, largest("train", steps, lengths, answers, others), model)

    def sample(self, name: str) -> Task:
        """Prompts are read once for each answer."""
        (recipe, (base, *_)), most = self.run.recipes[name], self.config.generate.max_new_tokens
        rows, model, settings = self.rows(name, base), self.model(base)[0], recipe["settings"]
        count = len(rows.prompts) * settings["answers"]
        side, width = min(self.config.generate.batch, count), max(rows.prompts, default=0)
        models, twins = (
            2 if settings.get("contrastive") else 1,
            resolve_device(self.config.run.device) == "cpu" and not self.run.dist.is_sharded,
        )
        tokens = models * (sum(rows.prompts) * settings["answers"] + count * most)
        return Task(
            tokens,
            False,
            Load("sample", side, width, side, room=width + most, models=models, twins=twins),
            model,
        )

    def pairs(self, name: str) -> Task | None:
        """The chosen side is scored, unless it has been."""
        return (
            None
            if self.run.recipes[name][0]["settings"].get("heard")
            else self.score(name, self.pair_rows(name))
        )

    def score(self, name: str, rows: Rows | None = None) -> Task:
        """Every text once."""
        base = self.run.recipes[name][1][0]
        rows, model = rows or self.rows(name, base), self.model(base)[0]
        lengths, answers = rows.lengths(model.max_position_embeddings)
        groups = plan_scoring(
            lengths,
            scoring_tokens(
                self.config.run.max_tokens_per_batch, resolve_device(self.config.run.device)
            ),
        )
        return Task(sum(lengths), rows.exact, largest("score", [groups], lengths, answers), model)

    def need(self, name: str) -> Need | None:
        """What the stage holds at its peak, without the process itself."""
        if (task := self.task(name)) is None:
            return None
        world = (
            self.run.dist.world_size
            if self.run.dist.is_sharded and task.load.kind != "pretrain"
            else 1
        )
        return need(
            task.load,
            task.model,
            self.config.lora,
            self.size(task),
            self.form(name),
            world,
            resolve_device(self.config.run.device),
        )

    def size(self, task: Task) -> int:
        """Bytes of a number; bases are made in fp32."""
        return (
            torch.float32
            if task.load.kind == "pretrain"
            else resolve_dtype(self.config.run.dtype, self.config.run.device)
        ).itemsize

    def quantizer(self, name: str) -> str | None:
        """The setting that says how the stage's base is quantised; None where it is being made."""
        recipe, (base, *_) = self.run.recipes[name]
        if recipe["kind"].startswith("pretrain"):
            return None
        strong = Path(base.name) in (Path("bases/strong"), Path(self.config.model.student or ""))
        return "quantize" if strong else "quantize_teachers"

    def form(self, name: str) -> str:
        """How the stage's base is quantised: as planned, or as this plan's own settings have it."""
        planned, key = (
            self.run.recipes[name][0]["settings"].get("quantize", "none"),
            self.quantizer(name),
        )
        own, first = (
            key and getattr(config.model, key) for config in (self.config, self.run.config)
        )
        return planned if own == first else own

    def total(self, name: str) -> int:
        """Bytes that the stage adds to those of the process; 0 for one that moves texts only."""
        if (found := self.need(name)) is None:
            return 0
        task = self.task(name)
        return found.total + (
            beside(task.load, task.model, self.size(task), found)
            if resolve_device(self.config.run.device) == "cpu"
            else 0
        )


made_tokenizer = functools.cache(Tokenizer)


@functools.cache
def given_model(folder) -> tuple[ModelConfig, Tokenizer]:
    """(structure, tokenizer) of an HF folder."""
    return read_config(folder), load_tokenizer(folder)


def largest(
    kind: str,
    steps: Sequence,
    lengths: list[int],
    answers: list[int],
    others: list[int] | None = None,
) -> Load:
    """The largest of the micro-batches, of units of one row of such lengths, or of pairs whose other row has an answer of `others`."""
    sides, second = (1, [0] * len(lengths)) if others is None else (2, others)

    def computed(group: list[int]) -> int:
        """Its tokens: but for pre-training they are without padding and a prompt's second reading, or these are few (batching.WORTH)."""
        if kind == "pretrain":
            return len(group) * max(lengths[unit] for unit in group)
        return sum(lengths[unit] + second[unit] for unit in group)

    groups = [group for step in steps for group in step if group]
    if not groups:
        return Load(kind, 0, 0, 0)
    most, scored = (
        max(groups, key=computed),
        max(sum(answers[unit] + second[unit] for unit in group) for group in groups),
    )
    again, longest = any(len(step) > 1 for step in steps), max(lengths[unit] for unit in most)
    return Load(kind, sides * len(most), longest, scored, again, computed=computed(most))
