"""What a run will do: how many tokens every stage goes through, and how much memory it needs.

All of it is read off the stages that the run has listed, the texts, and the config.json of each
base; no weight is read. An answer that is not sampled yet counts as generate.max_new_tokens tokens.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minmacpo.core.batching import batch_limits, scoring_tokens, steps_per_epoch
from minmacpo.core.checkpoint import read_config
from minmacpo.core.memory_estimate import MemoryEstimate, PassSize, estimate_memory
from minmacpo.core.model_config import ModelConfig
from minmacpo.data.chat_template import Renderer
from minmacpo.data.records import Example
from minmacpo.data.tokenizer import Tokenizer, load_tokenizer
from minmacpo.pipeline.artifacts import TextColumn
from minmacpo.pipeline.base_models import made_config
from minmacpo.pipeline.prepare_data import PreparedData
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.stage import Stage
from minmacpo.runtime.device import resolve_device, resolve_dtype

# Kinds of stage whose files are the texts of later ones
PRODUCERS = {
    "samples.jsonl": "sample",
    "questions.jsonl": "ask",
    "pairs.jsonl": "preferences",
}

# How many texts stand for all of them where only the greatest length is known
ROWS_OF_UNKNOWN_TEXTS = 512


@dataclass(frozen=True, slots=True)
class TextLengths:
    """Tokens of the texts that a stage reads: of each prompt, and of the answer to it."""

    prompts: list[int]
    answers: list[int]
    exact: bool = True  # False: answers may be shorter, or left out
    rejected: list[int] | None = None  # of pairs: the tokens of the second answer
    earlier: list[int] | None = None  # of each prompt, those that are trained on (data.train_on)

    def rows(self, limit: int) -> list[int]:
        """Tokens of prompt and answer together, no more than `limit`."""
        rows = []
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            rows.append(min(prompt + answer, limit))
        return rows

    def trained(self, limit: int) -> list[int]:
        """Tokens of each row that are trained on, no more than `limit`."""
        earlier = self.earlier or [0] * len(self.answers)
        counts = []
        for before, answer in zip(earlier, self.answers, strict=True):
            counts.append(min(before + answer, limit))
        return counts


@dataclass(frozen=True, slots=True)
class Reader:
    """A base and the template that texts are written in for it, and what it trains on of them."""

    base: Stage
    template: str
    train_on: str = "last"


@dataclass(frozen=True, slots=True)
class Workload:
    """What one stage does: tokens in all, and its largest forward pass with this model."""

    tokens: int
    exact: bool  # False: at most so many tokens
    largest_pass: PassSize
    model: ModelConfig


class Plan:
    """The workloads of a listed run."""

    def __init__(self, run: Run, prepared: PreparedData | None):
        """`prepared`: the run's texts; None: every text as long as the settings allow."""
        self.run = run
        self.config = run.config
        self.prepared = prepared
        self.device = resolve_device(run.config.run.device)
        self.dtype = resolve_dtype(run.config.run.dtype, run.config.run.device)
        self.workloads: dict[str, Workload | None] = {}
        self.token_counts: dict[tuple, TextLengths] = {}  # by texts, tokenizer and template

    # ---- what the run has listed

    def kind(self, name: str) -> str:
        """The function of a stage, without its version."""
        return self.run.plan[name].kind.partition("/")[0]

    def settings(self, name: str) -> dict:
        recipe, _ = self.run.recipes[name]
        return recipe["settings"]

    def inputs(self, name: str) -> Sequence[Stage]:
        """The stages that it reads; the first one is its base model."""
        _, inputs = self.run.recipes[name]
        return inputs

    # ---- results

    def workload(self, name: str) -> Workload | None:
        """What the stage does; None for one that works without a model."""
        if name not in self.workloads:  # a stage may be asked about several times
            self.workloads[name] = self.find_workload(name)
        return self.workloads[name]

    def find_workload(self, name: str) -> Workload | None:
        """What a stage computes with a model, by its kind; None if it needs none."""
        kind = self.kind(name)
        if kind == "pretrain":
            return self.pretrain(name)
        if kind == "sft":
            return self.sft(name)
        if kind == "prefer":
            return self.prefer(name)
        if kind == "sample":
            return self.sample(name)
        if kind == "score":
            return self.score(name, self.texts(name))
        if kind == "pairs" and self.settings(name)["scores_chosen"]:
            return self.score(name, self.pairs(name))  # the chosen side under the reference
        return None

    def memory(self, name: str, recompute: bool = False) -> MemoryEstimate | None:
        """What the stage holds at its peak, beside the process itself; None without a model.

        Args:
            recompute: a training computes every block twice, as run.checkpoint = true makes it do.
        """
        workload = self.workload(name)
        if workload is None:
            return None
        dtype = self.dtype
        world_size = 1
        if workload.largest_pass.kind == "pretrain":
            dtype = torch.float32  # of a base while it is made, by one rank
        elif self.run.dist.is_sharded:
            world_size = self.run.dist.world_size
        return estimate_memory(
            workload.largest_pass,
            workload.model,
            self.config.lora,
            bytes_per_number=dtype.itemsize,
            quantization=self.settings(name).get("quantize", "none"),
            device=self.device,
            world_size=world_size,
            recompute=recompute or self.config.run.checkpoint == "true",
        )

    # ---- models

    def model(self, base: Stage) -> tuple[ModelConfig, Tokenizer | None]:
        """Shape and tokenizer of a base that is given or will be made here."""
        if base.external:
            return read_given_model(base.path)
        tokenizer = None
        vocab_size = self.config.model.vocab
        if self.prepared is not None:
            tokenizer = made_tokenizer(self.prepared.tokenizer)
            vocab_size = tokenizer.size
        shape = self.settings(base.name)["shape"]
        return made_config(self.config, shape, vocab_size), tokenizer

    def reader(self, name: str) -> Reader:
        """Whose tokens the stage's texts are counted in: those of its base, its first input."""
        settings = self.settings(name)
        train_on = settings.get("train_on", "last")
        return Reader(self.inputs(name)[0], settings["template"], train_on)

    def row_limit(self, model: ModelConfig) -> int:
        """Tokens of the longest row that is trained on."""
        return min(self.config.data.max_length, model.max_position_embeddings)

    # ---- texts

    def texts(self, name: str) -> TextLengths:
        """Lengths of the texts that the stage reads, in tokens of its base."""
        texts = self.settings(name).get("texts", ("d2.jsonl", "prompt"))
        if isinstance(texts, dict):
            return self.column_texts(name, texts)
        file, column = texts
        reader = self.reader(name)
        if file not in PRODUCERS:
            return self.split_texts(split_name(file), column, reader)
        return self.made_texts(self.source(name, file), file, column, reader)

    def column_texts(self, name: str, columns: dict[str, list[str]]) -> TextLengths:
        """Several columns of texts that a stage scores side by side, one after the other."""
        _, *inputs = self.inputs(name)
        reader = self.reader(name)
        prompts = []
        answers = []
        exact = True
        sources = inputs[-len(columns) :]  # behind an adapter, if there is one
        for (file, column), source in zip(columns.values(), sources, strict=True):
            if file in PRODUCERS:
                lengths = self.made_texts(source, file, column, reader)
            else:
                lengths = self.split_texts(split_name(file), column, reader)
            prompts += lengths.prompts
            answers += lengths.answers
            exact = exact and lengths.exact
        return TextLengths(prompts, answers, exact)

    def made_texts(self, source: Stage, file: str, column: str, reader: Reader) -> TextLengths:
        """The texts of a stage that samples answers, asks questions or makes pairs."""
        if source.finished and self.prepared is not None:
            return self.read(TextColumn(source, file, column), reader)
        if file == "questions.jsonl":
            return self.questions(source, reader)

        # Answers that are not sampled yet, each as long as it can be
        answers_per_prompt = self.settings(source.name).get("answers", 1)
        lengths = self.prompts_of(source, reader)
        prompts = lengths.prompts * answers_per_prompt
        longest = self.config.generate.max_new_tokens
        return TextLengths(
            prompts,
            [longest] * len(prompts),
            exact=False,
            earlier=lengths.earlier and lengths.earlier * answers_per_prompt,
        )

    def source(self, name: str, file: str) -> Stage:
        """The input of the stage that makes this file."""
        for stage in self.inputs(name):
            if stage.kind.startswith(PRODUCERS[file]):
                return stage
        raise ValueError(f"{name} reads {file}, but none of its inputs makes it")

    def prompts_of(self, source: Stage, reader: Reader) -> TextLengths:
        """The prompts that an unfinished stage answers, in tokens of another stage's base."""
        file, column = self.settings(source.name).get("texts", ("d2.jsonl", "prompt"))
        if file not in PRODUCERS:
            return self.split_texts(split_name(file), column, reader)
        return self.texts(source.name)

    def split_texts(self, split: str, column: str, reader: Reader) -> TextLengths:
        """The prompts of d1, d2 or test, with one side of their pairs, or without an answer."""
        if self.prepared is None:
            return self.longest_texts()
        texts = []
        for pair in self.prepared.splits[split]:
            answer = ""  # also where a pair has none of the side that is asked for
            if column != "prompt":
                answer = getattr(pair, column) or ""
            texts.append(Example(pair.id, pair.prompt, answer))
        return self.count_tokens(texts, (split, column), reader)

    def longest_texts(self) -> TextLengths:
        """Texts as long as the settings allow."""
        data = self.config.data
        count = max(ROWS_OF_UNKNOWN_TEXTS, self.config.generate.batch)
        return TextLengths([data.max_prompt_length] * count, [data.max_length] * count, exact=False)

    def questions(self, source: Stage, reader: Reader) -> TextLengths:
        """Questions that are not asked yet, each as long as one may be."""
        model, _ = self.model(reader.base)
        count = len(self.texts(source.name).prompts)
        if self.settings(source.name).get("compare"):
            count *= 2  # two answers are shown in both orders
        # One token of the answer is scored, or some are sampled; the question has the rest
        longest = model.max_position_embeddings - self.config.generate.max_new_tokens - 1
        return TextLengths([longest] * count, [1] * count, exact=False)

    def pairs(self, name: str) -> TextLengths:
        """The pairs that a stage makes, each answer as long as it can be."""
        # --- They are made already
        reader = self.reader(name)
        stage = self.run.plan[name]
        if stage.finished and self.prepared is not None:
            chosen = self.read(TextColumn(stage, "pairs.jsonl", "chosen"), reader)
            rejected = self.read(TextColumn(stage, "pairs.jsonl", "rejected"), reader)
            return TextLengths(chosen.prompts, chosen.answers, False, rejected.answers)

        # --- Their answers are of the data
        settings = self.settings(name)
        prompts = self.texts(name).prompts
        file, _ = settings["texts"]
        if file not in PRODUCERS:
            longest = self.config.data.max_length
            return TextLengths(prompts, [longest] * len(prompts), exact=False)

        # --- They are sampled: one pair for each prompt, or one for every answer of every source
        if "all" in settings["select"]:
            prompts = prompts * (len(settings["names"]) * self.config.macpo.answers)
        longest = self.config.generate.max_new_tokens
        return TextLengths(prompts, [longest] * len(prompts), exact=False)

    def read(self, column: TextColumn, reader: Reader) -> TextLengths:
        """Texts of a finished stage; not exact, as empty answers may be left out."""
        texts = [Example(text.id, text.prompt, text.response) for text in column.read()]
        key = (column.stage.name, column.file, column.column)
        lengths = self.count_tokens(texts, key, reader)
        return replace(lengths, exact=False)

    def count_tokens(self, texts: Sequence[Example], key: tuple, reader: Reader) -> TextLengths:
        """Lengths in the tokens of a base, counted once for each tokenizer and template."""
        _, tokenizer = self.model(reader.base)
        key = (*key, hash(tokenizer.model), reader.template, reader.train_on)
        if key not in self.token_counts:
            renderer = Renderer(tokenizer, reader.template)
            lengths = TextLengths([], [], earlier=[])
            for text in texts:
                # The mask marks the tokens that are trained on
                row = renderer.render(text.prompt, text.response, reader.train_on)
                earlier = 0
                if reader.train_on == "all":
                    earlier = renderer.render(text.prompt, None, "all").mask.count(True)
                answer = row.mask.count(True) - earlier
                lengths.prompts.append(len(row.mask) - answer)
                lengths.answers.append(answer)
                lengths.earlier.append(earlier)
            self.token_counts[key] = lengths
        return self.token_counts[key]

    # ---- one function for each kind of stage

    def pretrain(self, name: str) -> Workload:
        """Every token of every document that is drawn."""
        stage = self.run.plan[name]
        model, _ = self.model(stage)
        settings = self.settings(name)
        limit = self.config.data.max_length
        rows = [limit] * ROWS_OF_UNKNOWN_TEXTS
        if self.prepared is not None:
            documents = self.prepared.corpora[name.partition("/")[2]]
            reader = Reader(stage, settings["template"])
            rows = self.count_tokens(documents, (name,), reader).rows(limit)

        documents_drawn = settings["steps"] * settings["batch"]
        return Workload(
            tokens=round(documents_drawn * mean(rows)),
            exact=self.prepared is not None,
            largest_pass=largest_pass(
                "pretrain", rows, rows, self.training_budget(), settings["batch"]
            ),
            model=model,
        )

    def sft(self, name: str) -> Workload:
        """All passes over the texts, or as many steps as other trainings took together."""
        # --- The rows
        base, *others = self.inputs(name)
        model, _ = self.model(base)
        settings = self.settings(name)
        texts = self.texts(name)
        limit = self.row_limit(model)
        rows = texts.rows(limit)
        trained = texts.trained(limit)

        # --- How often each is gone through
        tokens = settings["epochs"] * sum(rows)
        if not settings["epochs"]:  # a control, which takes the steps of the preference trainings
            steps = 0
            for stage in others:
                if stage.kind.startswith("prefer"):
                    steps += self.preference_steps(stage.name)
            tokens = round(steps * settings["batch"] * mean(rows))

        return Workload(
            tokens=tokens,
            exact=texts.exact,
            largest_pass=largest_pass(
                "train", rows, trained, self.training_budget(), settings["batch"]
            ),
            model=model,
        )

    def prefer(self, name: str) -> Workload:
        """Both answers of every pair; their prompt is computed once."""
        base, pairs_stage, *_ = self.inputs(name)
        model, _ = self.model(base)
        settings = self.settings(name)
        pairs = self.pairs(pairs_stage.name)
        limit = self.row_limit(model)
        all_rejected = pairs.rejected or pairs.answers  # as long as the chosen ones, if not known

        rows = []
        answers = []  # of both sides
        tokens = 0
        for prompt, chosen, rejected in zip(
            pairs.prompts, pairs.answers, all_rejected, strict=True
        ):
            chosen = min(chosen, limit)
            rejected = min(rejected, limit)
            answers.append(chosen + rejected)
            # In memory both answers follow one prompt (core/batching.py); tokens are counted as if
            # each had its own
            rows.append(min(prompt + chosen + rejected, 2 * limit))
            tokens += min(prompt + chosen, limit) + min(prompt + rejected, limit)
        return Workload(
            tokens=settings["epochs"] * tokens,
            exact=False,
            largest_pass=largest_pass(
                "train", rows, answers, self.training_budget(), settings["batch"]
            ),
            model=model,
        )

    def preference_steps(self, name: str) -> int:
        """Optimiser steps of a preference training."""
        _, pairs_stage, *_ = self.inputs(name)
        settings = self.settings(name)
        count = len(self.pairs(pairs_stage.name).prompts)
        return settings["epochs"] * steps_per_epoch(count, settings["batch"])

    def sample(self, name: str) -> Workload:
        """Every prompt is read once for each of its answers."""
        base = self.inputs(name)[0]
        model, _ = self.model(base)
        settings = self.settings(name)
        models = 2 if settings.get("contrastive") else 1

        # --- Tokens that are read, and those that are written if every answer is as long as it can
        prompts = self.texts(name).prompts
        answers = settings["answers"] * len(prompts)
        new_tokens = self.config.generate.max_new_tokens
        tokens_read = settings["answers"] * sum(prompts)
        tokens_written = answers * new_tokens

        # --- The largest pass reads the longest prompt for each answer of a batch
        longest = max(prompts, default=0)
        rows = min(self.config.generate.batch, answers)
        return Workload(
            tokens=models * (tokens_read + tokens_written),
            exact=False,
            largest_pass=PassSize(
                kind="sample",
                rows=rows,
                tokens=rows * longest,
                scored_tokens=rows,
                cache_length=longest + new_tokens,
                models=models,
            ),
            model=model,
        )

    def score(self, name: str, texts: TextLengths) -> Workload:
        """Every text once."""
        model, _ = self.model(self.inputs(name)[0])
        limit = model.max_position_embeddings
        rows = texts.rows(limit)
        answers = [min(answer, limit) for answer in texts.answers]
        budget = scoring_tokens(self.config.run.max_tokens_per_batch, self.device)
        return Workload(
            tokens=sum(rows),
            exact=texts.exact,
            largest_pass=largest_pass("score", rows, answers, budget, len(rows)),
            model=model,
        )

    def training_budget(self) -> int:
        """Tokens of a micro-batch."""
        budget, _ = batch_limits(
            self.config.run.max_tokens_per_batch, self.device, similar_lengths=True
        )
        return budget


def largest_pass(
    kind: str, rows: Sequence[int], answers: Sequence[int], budget: int, batch: int
) -> PassSize:
    """The pass with the longest rows: as many as go into the budget, and no more than a batch."""
    if not rows:
        return PassSize(kind, rows=0, tokens=0, scored_tokens=0)
    longest_first = sorted(range(len(rows)), key=lambda i: rows[i], reverse=True)
    fitting = budget // max(rows)
    count = max(1, min(batch, fitting))  # a row that is longer than the budget is computed alone
    picked = longest_first[:count]
    return PassSize(
        kind=kind,
        rows=len(picked),
        tokens=sum(rows[i] for i in picked),
        scored_tokens=sum(answers[i] for i in picked),
    )


def split_name(file: str) -> str:
    """The name of the split that is in a file of the data: "d2" for "d2.jsonl"."""
    return file.removesuffix(".jsonl")


def mean(values: Sequence[int]) -> float:
    """The mean of some numbers; 0 of none."""
    if not values:
        return 0.0
    return sum(values) / len(values)


made_tokenizer = functools.cache(Tokenizer)


@functools.cache
def read_given_model(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """Shape and tokenizer of a Hugging Face folder."""
    return read_config(folder), load_tokenizer(folder)
