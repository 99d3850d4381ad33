"""The base models of a run: given by the user, or pre-trained here on the run's own texts."""

import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.config.validate import parse_model_size
from minmacpo.core.checkpoint import check_model_folder, save_model, weight_files
from minmacpo.core.model import new_model
from minmacpo.core.model_config import ModelConfig
from minmacpo.core.sft_loss import SFTLoss
from minmacpo.core.trainer import OptimizerConfig, TrainExample, plan_packed_batches, train
from minmacpo.data.chat_template import Renderer, tokenizer_notes
from minmacpo.data.records import Example
from minmacpo.data.tokenizer import load_tokenizer, show_mask
from minmacpo.data.tokenizer_files import FILES
from minmacpo.pipeline.artifacts import BaseModel, Setup
from minmacpo.pipeline.prepare_data import (
    PreparedData,
    base_names,
    base_templates,
    corpus_stage,
    model_dirs,
    splits_stage,
    tokenizer_stage,
)
from minmacpo.pipeline.recompute import set_recompute
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.stage import Stage, StageContext
from minmacpo.pipeline.trainer_hooks import trainer_hooks
from minmacpo.runtime.device import resolve_device
from minmacpo.runtime.files import fingerprint, read_rows, sha256_file, write_json
from minmacpo.runtime.seeds import derive_seed


def setup_stages(run: Run, source: dict, prepared: Callable[[], PreparedData]) -> Setup:
    """The stages data/* and bases/*, from which every method starts.

    Args:
        source: identifies the texts.
        prepared: reads them, when needed.
    """
    base_models = {
        name: external_base(run.config, name, folder, run.dry)
        for name, folder in model_dirs(run.config).items()
    }
    fingerprints = [base.stage.fingerprint for base in base_models.values()]
    splits = splits_stage(run, source, prepared, fingerprints)

    missing = [name for name in base_names(run.config) if name not in base_models]
    if missing:
        tokenizer = tokenizer_stage(run, source, prepared)
        for name in missing:
            corpus = corpus_stage(run, name, source, prepared)
            base_models[name] = pretrained_base(run, name, tokenizer, corpus)
    return Setup(splits, base_models)


# --- Bases that the user gives


def external_base(config: Config, name: str, folder: Path, dry: bool = False) -> BaseModel:
    """A base that exists already; its fingerprint covers its files.

    Args:
        dry: tell weights apart by size and time, without reading them.

    Raises:
        UserError: the folder is not whole, or the context too short for the settings.
    """
    model_config, _ = check_model_folder(folder)
    context = model_config.max_position_embeddings
    longest_sample = config.data.max_prompt_length + config.generate.max_new_tokens
    needed = max(config.data.max_length, longest_sample)
    if needed > context:
        raise UserError(
            f"{folder}: its context is {context} tokens, the settings need {needed}; lower "
            "data.max_prompt_length, data.max_length or generate.max_new_tokens"
        )
    stage = Stage(str(folder), folder, model_fingerprint(folder, dry), external=True)
    return BaseModel(name, stage)


def model_fingerprint(folder: Path, dry: bool = False) -> str:
    """What identifies the model in a folder: 32 hex digits of all its files that matter.

    Args:
        dry: take weights by size and time, unread.
    """
    names = ("config.json", FILES[0], "generation_config.json", *FILES[1:])
    small_files = [folder / name for name in names if (folder / name).is_file()]
    digests = [[file.name, hash_unchanged(file)] for file in small_files]
    for file in weight_files(folder):
        status = file.stat()
        digest = [status.st_size, status.st_mtime_ns] if dry else hash_unchanged(file)
        digests.append([file.name, digest])
    return fingerprint(digests)


def hash_unchanged(file: Path) -> str:
    """The sha256 of a file, read once while its size and time stay."""
    status = file.stat()
    return hash_once(file, status.st_size, status.st_mtime_ns)


@functools.cache
def hash_once(file: Path, size: int, changed_ns: int) -> str:
    """The sha256 of a file as it is at this size and time; a run asks for it twice."""
    return sha256_file(file)


# --- Bases that are made here


def pretrained_base(run: Run, name: str, tokenizer: Stage, corpus: Stage) -> BaseModel:
    """A base that is pre-trained on the documents of a stage."""
    config = run.config
    schedule = pretraining_schedule(config, name)
    model_size = size_of(config, name)
    stage = run.stage(
        name=f"bases/{name}",
        kind="pretrain/3",
        settings={
            "shape": model_size,
            "context": config.model.context,
            "max_length": config.data.max_length,
            "template": base_templates(config)[name],
            "device": resolve_device(config.run.device),
            "max_tokens_per_batch": config.run.max_tokens_per_batch,
            "log_every": config.run.log_every,
        }
        | asdict(schedule),
        inputs=[tokenizer, corpus],
        compute=lambda context: pretrain(context, name, tokenizer, corpus),
        seed_key=(name, "pretrain"),
        summary=f"{schedule.steps} steps of {schedule.batch} documents, {model_size}",
    )
    return BaseModel(name, stage)


def size_of(config: Config, name: str) -> str:
    """The shape of a base, such as "192x4x6x512"; the weak ones are repeated as needed."""
    if name == "strong":
        return config.model.strong
    sizes = config.model.weak
    number = int(name.removeprefix("weak"))
    return sizes[(number - 1) % len(sizes)]


def pretraining_schedule(config: Config, name: str) -> OptimizerConfig:
    """Cosine to a tenth of the peak, with the moments that are usual for pre-training."""
    pretrain_settings = config.pretrain
    is_strong = name == "strong"
    return OptimizerConfig(
        lr=pretrain_settings.strong_lr if is_strong else pretrain_settings.weak_lr,
        steps=pretrain_settings.strong_steps if is_strong else pretrain_settings.weak_steps,
        batch=pretrain_settings.batch,
        min_lr_ratio=0.1,
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )


def made_config(config: Config, size: str, vocab_size: int) -> ModelConfig:
    """The structure of a base that is made here, for a tokenizer of so many pieces."""
    width, layers, heads, mlp = parse_model_size(size)
    return ModelConfig(
        vocab_size, width, mlp, layers, heads, heads, width // heads, config.model.context
    )


def pretrain(context: StageContext, name: str, tokenizer_stage: Stage, corpus: Stage) -> dict:
    """Train new weights on every token of the corpus, and write them as a Hugging Face folder."""
    config = context.run.config
    tokenizer = load_tokenizer(tokenizer_stage.path)

    # --- New weights
    model_config = replace(
        made_config(config, size_of(config, name), tokenizer.size),
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
    )
    seed = derive_seed(config.run.seed, name, "weights")
    device = resolve_device(config.run.device)
    model = new_model(model_config, seed).to(device)

    # --- Documents as rows, of which every token but the first is trained
    template = base_templates(config)[name]
    renderer = Renderer(tokenizer, template)
    examples, documents_cut = document_rows(renderer, corpus, config.data.max_length)
    context.log_detail(f"first row: {show_mask(tokenizer, examples[0].rows[0])[:400]}")

    # --- Train, and write
    schedule = pretraining_schedule(config, name)
    hooks = trainer_hooks(context)
    plan = plan_packed_batches(examples, schedule, hooks, device)
    set_recompute(context, model, examples, plan, kind="pretrain")
    counts = train(
        model,
        list(model.parameters()),
        examples,
        SFTLoss(),
        schedule,
        hooks,
        plan=plan,
    )
    save_model(context.folder, model_config, model.state_dict(), tokenizer.model)
    notes = tokenizer_notes(tokenizer, template, config.model.context)
    write_json(context.folder / FILES[2], notes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return counts | {"documents_cut": documents_cut, "parameters": parameters}


def document_rows(
    renderer: Renderer, corpus: Stage, max_length: int
) -> tuple[list[TrainExample], int]:
    """The documents as token rows of at most `max_length`, and how many had to be cut."""
    examples = []
    documents_cut = 0
    for text in read_rows(corpus.path / "texts.jsonl", Example):
        row = renderer.render(text.prompt, text.response)
        documents_cut += len(row.ids) > max_length
        row.ids = row.ids[:max_length]
        row.mask = [position > 0 for position in range(len(row.ids))]
        examples.append(TrainExample(text.id, (row,)))
    return examples, documents_cut
