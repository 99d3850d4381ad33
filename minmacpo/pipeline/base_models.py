"""The first stages of a run: its texts on disk, a tokenizer, and the base models, made here or given.

TextColumn are read and made to fit in memory, before a run folder exists: bad input leaves nothing behind.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.config.validate import shape
from minmacpo.core.checkpoint import check_model_folder, save_model, weight_files
from minmacpo.core.losses import SFTLoss
from minmacpo.core.model import new_model
from minmacpo.core.model_config import ModelConfig
from minmacpo.core.trainer import OptimizerConfig, TrainExample, train
from minmacpo.data.chat_template import render, tokenizer_notes
from minmacpo.data.records import Example
from minmacpo.data.tokenizer import FILES, Tokenizer, load_tokenizer, show_mask
from minmacpo.kernels.fused_logps import SMALL_VOCAB
from minmacpo.pipeline.prepare_data import LONGER, PreparedData, base_names, model_dirs
from minmacpo.pipeline.run import Run, Stage, StageContext, derive_seed
from minmacpo.pipeline.trainer_hooks import trainer_hooks
from minmacpo.runtime.device import resolve_device
from minmacpo.runtime.files import (
    fingerprint,
    read_rows,
    sha256_file,
    write_atomic,
    write_json,
    write_rows,
)


@dataclass(frozen=True, slots=True)
class Base:
    """A frozen pre-trained model: an HF folder, made by a stage of this run or given by the user."""

    name: str
    stage: Stage


@dataclass(frozen=True, slots=True)
class Setup:
    """What the algorithm stands on: `slices` holds d1, d2 and test; bases by name."""

    slices: Stage
    bases: dict[str, Base]


def external_base(config: Config, name: str, folder: Path, dry: bool = False) -> Base:
    """A base that exists already; its fingerprint covers its files (`dry`: of the weights, size and time).
    UserError if the folder is not whole, or the context too short for the settings."""
    context = check_model_folder(folder)[0].max_position_embeddings
    needed = max(
        config.data.max_length, config.data.max_prompt_length + config.generate.max_new_tokens
    )
    if needed > context:
        lower = "lower data.max_prompt_length, data.max_length or generate.max_new_tokens"
        raise UserError(
            f"{folder}: its context is {context} tokens, the settings need {needed}; {lower}"
        )
    return Base(name, Stage(str(folder), folder, model_fingerprint(folder, dry), external=True))


def model_fingerprint(folder: Path, dry: bool = False) -> str:
    """What identifies the model in an HF folder: 32 hex digits of all its files that matter; `dry`: weights by their
    size and time, unread."""
    small = (
        folder / file for file in ("config.json", FILES[0], "generation_config.json", *FILES[1:])
    )
    weights = weight_files(folder)
    seen = [
        (file, file.stat().st_size, file.stat().st_mtime_ns)
        for file in [*filter(Path.is_file, small), *weights]
    ]
    return fingerprint(
        [
            [file.name, [*about] if dry and file in weights else hash_once(file, *about)]
            for file, *about in seen
        ]
    )


hash_once = functools.cache(
    lambda file, size, changed: sha256_file(file)
)  # a run plans its stages before it computes them


def setup_stages(run: Run, source: dict, prepared: Callable[[], PreparedData]) -> Setup:
    """The stages data/* and bases/*. `source` identifies the texts; `prepared` reads them when needed."""
    config, data = run.config, run.config.data
    bases = {
        name: external_base(config, name, folder, run.dry)
        for name, folder in model_dirs(config).items()
    }
    origin = source | {"template": data.template, "vocab": config.model.vocab}
    limits = {
        "max_prompt_length": data.max_prompt_length,
        "max_length": data.max_length,
        "long": data.truncation_mode,
    }
    limits |= {"noise": data.noise, "noise_kind": data.noise_kind} if data.noise else {}
    limits |= {"label_of": "another subject"} if data.noise and data.noise_kind == "label" else {}
    settings = origin | limits | {"given": [base.stage.fingerprint for base in bases.values()]}

    def write_slices(work: StageContext) -> dict:
        """d1, d2 and test, their ids, and what was counted on the way."""
        if short := prepared().counts.get("shorter than asked for"):
            work.log(
                f"WARNING: too few questions: {', '.join(f'{name} {size}' for name, size in short.items())}; see world.names"
            )
        if LONGER in prepared().counts:
            work.log(
                f"WARNING: {LONGER}, so that no sampled one can be like them: {prepared().counts[LONGER]}"
            )
        for name, pairs in prepared().slices.items():
            write_rows(work.folder / f"{name}.jsonl", pairs)
        ids = {name: [pair.id for pair in pairs] for name, pairs in prepared().slices.items()}
        write_json(work.folder / "split.json", ids)
        return {
            k: count for k, count in prepared().counts.items() if k not in ("d0", LONGER)
        }  # they depend on more than the settings of the slices

    def write_tokenizer(work: StageContext) -> dict:
        write_atomic(work.folder / "tokenizer.model", prepared().tokenizer)
        return {"pieces": Tokenizer(prepared().tokenizer).size}

    slices = run.stage("data/slices", "slices/2", settings, [], write_slices, ("data",))
    if missing := [name for name in base_names(config) if name not in bases]:
        tokenizer = run.stage(
            "bases/tokenizer", "tokenizer/2", origin, [], write_tokenizer, ("data",)
        )
        bases |= {name: make_base(run, name, origin, tokenizer, prepared) for name in missing}
    return Setup(slices, bases)


def make_base(
    run: Run, name: str, origin: dict, tokenizer: Stage, prepared: Callable[[], PreparedData]
) -> Base:
    """Two stages: the text of base `name`, and the base pre-trained on it."""
    config, part, weak = run.config, run.config.pretrain, run.config.model.weak
    if name == "strong":
        form, lr, steps = config.model.strong, part.strong_lr, part.strong_steps
    else:
        form, lr, steps = weak[(int(name[4:]) - 1) % len(weak)], part.weak_lr, part.weak_steps
    share = {} if name == "strong" else {"weak_share": part.weak_share}
    share = {"documents": steps * part.batch} if config.data.path is None else share
    schedule = OptimizerConfig(
        lr, steps, part.batch, min_lr_ratio=0.1, betas=(0.9, 0.95), weight_decay=0.1
    )
    settings = {
        "shape": form,
        "context": config.model.context,
        "max_length": config.data.max_length,
        "template": config.data.template,
        "device": resolve_device(config.run.device),
        "max_tokens_per_batch": config.run.max_tokens_per_batch,
    } | asdict(schedule)
    if (
        config.model.vocab > SMALL_VOCAB
    ):  # a faster way changed the last bits of what such bases learn
        settings["arithmetic"] = 3

    def write_corpus(work: StageContext) -> dict:
        write_rows(work.folder / "texts.jsonl", prepared().corpora[name])
        return {"documents": len(prepared().corpora[name])}

    source = origin | share | {"base": name}
    corpus = run.stage(f"data/corpus_{name}", "corpus/2", source, [], write_corpus, ("data",))
    size = f"{steps} steps of {part.batch} documents, {form}"
    return Base(
        name,
        run.stage(
            f"bases/{name}",
            "pretrain/1",
            settings,
            [tokenizer, corpus],
            lambda work: pretrain(work, name, form, schedule, tokenizer, corpus),
            (name, "pretrain"),
            size,
        ),
    )


def made_config(config: Config, form: str, pieces: int) -> ModelConfig:
    """The structure of a base made here, of the shape `form`, for a tokenizer of so many pieces."""
    width, layers, heads, mlp = shape(form)
    return ModelConfig(
        pieces, width, mlp, layers, heads, heads, width // heads, config.model.context
    )


def pretrain(
    work: StageContext,
    name: str,
    form: str,
    schedule: OptimizerConfig,
    tokenizer: Stage,
    corpus: Stage,
) -> dict:
    """Train new weights of the shape `form` on every token of the corpus, and write them as an HF folder."""
    config, most, pieces = (
        work.run.config,
        work.run.config.data.max_length,
        load_tokenizer(tokenizer.path),
    )
    model_config = replace(
        made_config(config, form, pieces.size), bos_token_id=pieces.bos, eos_token_id=pieces.eos
    )
    model = new_model(model_config, derive_seed(config.run.seed, name, "weights")).to(
        resolve_device(config.run.device)
    )
    texts = read_rows(corpus.path / "texts.jsonl", Example)
    rows = [render(pieces, config.data.template, text.prompt, text.response) for text in texts]
    cut = sum(len(row.ids) > most for row in rows)
    for row in rows:
        row.ids, row.mask = row.ids[:most], [i > 0 for i in range(min(len(row.ids), most))]
    work.log(f"first row: {show_mask(pieces, rows[0])[:400]}")
    units = [TrainExample(text.id, (row,)) for text, row in zip(texts, rows, strict=True)]
    counts = train(model, list(model.parameters()), units, SFTLoss(), schedule, trainer_hooks(work))
    save_model(work.folder, model_config, model.state_dict(), pieces.model)
    write_json(
        work.folder / FILES[2], tokenizer_notes(pieces, config.data.template, config.model.context)
    )
    return counts | {"documents_cut": cut, "parameters": sum(p.numel() for p in model.parameters())}
