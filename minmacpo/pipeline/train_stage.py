"""The stage that trains an adapter on answers, and what every training of one has in common."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from minmacpo import UserError
from minmacpo.core.batching import steps_per_epoch
from minmacpo.core.checkpoint import save_adapter
from minmacpo.core.lora import get_adapter_weights, init_adapter
from minmacpo.core.sft_loss import SFTLoss
from minmacpo.core.trainer import (
    OptimizerConfig,
    TrainExample,
    plan_packed_batches,
    train,
)
from minmacpo.data.records import Example, Sample
from minmacpo.pipeline.artifacts import Policy, TextColumn
from minmacpo.pipeline.model_pool import LoadedModel, ModelPool, Session
from minmacpo.pipeline.recompute import set_recompute
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.stage import Stage, StageContext
from minmacpo.pipeline.stage_log import log_first_row, warn_dropped
from minmacpo.pipeline.trainer_hooks import trainer_hooks
from minmacpo.runtime.files import write_atomic
from minmacpo.runtime.seeds import derive_seed

# torch.compile takes about 8 s for a loss. It spares 12 bytes of memory traffic for each logit, at
# 3 TB/s: from so many logits on, a stage is faster with it. An estimate.
COMPILE_THRESHOLD = 2e12


@dataclass(frozen=True, slots=True)
class SFTArgs:
    """How an agent learns from answers.

    Attributes:
        lr: peak learning rate.
        batch: answers per optimiser step.
        train_on: the "last" answer of a dialogue, or "all" of them.
        match_steps_of: take as many steps as these trainings together, in place of the epochs.
        confidence: final weight of the auxiliary confidence loss (Burns et al. 2023).
    """

    lr: float
    epochs: int
    batch: int
    confidence: float = 0.0
    train_on: str = "last"
    match_steps_of: Sequence[Stage] = ()

    def optimizer_config(self, examples: int) -> OptimizerConfig:
        """The schedule for so many examples."""
        steps = self.epochs * steps_per_epoch(examples, self.batch)
        if self.match_steps_of:
            steps = sum(stage.notes()["counts"]["steps"] for stage in self.match_steps_of)
        return OptimizerConfig(self.lr, steps, self.batch)

    def settings(self) -> dict:
        """What a stage's fingerprint says of it; the stages to match are among its inputs."""
        return {
            "lr": self.lr,
            "epochs": self.epochs,
            "batch": self.batch,
            "confidence": self.confidence,
            "train_on": self.train_on,
        }


def train_sft(
    session: Session,
    name: str,
    start: Policy,
    texts: TextColumn,
    args: SFTArgs,
    seed_key: tuple,
) -> Stage:
    """The stage with an adapter fine-tuned on `texts`, from the policy `start`.

    A `start` without an adapter means a fresh one, the same for all agents of that base.
    """
    models = session.models
    config = session.run.config

    def train_adapter(context: StageContext) -> dict:
        loaded = models.get_policy(start)
        if start.adapter is None:
            init_adapter(loaded.model, derive_seed(config.run.seed, start.base.name, "adapter"))

        # --- Tokenize, and drop what cannot be trained on
        examples = []
        dropped = {"empty": 0, "over_long": 0}
        cut_at_limit = 0
        for text in texts.read():
            row = loaded.render(text.prompt, text.response, args.train_on)
            if not text.response:
                dropped["empty"] += 1
            elif len(row.ids) > loaded.max_length:
                dropped["over_long"] += 1
            else:
                examples.append(TrainExample(text.id, (row,)))
                cut_at_limit += ends_at_limit(text)
        warn_dropped(context, dropped, len(examples))
        first_row = examples[0].rows[0] if examples else None
        log_first_row(context, loaded, "row", first_row)

        # --- Train
        schedule = args.optimizer_config(len(examples))
        compiled = should_compile(models, loaded, examples, schedule)
        hooks = trainer_hooks(context)
        plan = plan_packed_batches(examples, schedule, hooks, models.device)
        set_recompute(context, loaded.model, examples, plan)
        counts = train(
            loaded.model,
            loaded.lora_params,
            examples,
            SFTLoss(compiled, args.confidence),
            schedule,
            hooks,
            plan=plan,
        )
        save_trained_adapter(context, start, loaded, schedule)
        return counts | dropped | {"cut_at_limit": cut_at_limit}

    length = f"{args.epochs} epochs"
    if args.match_steps_of:
        length = "as many steps as the student"
    inputs = [start.base.stage, start.adapter, texts.stage, *args.match_steps_of]
    return session.run.stage(
        name=name,
        kind="sft/2",
        settings=models.settings(start.base)
        | args.settings()
        | {"texts": texts.location, "log_every": config.run.log_every},
        inputs=[stage for stage in inputs if stage is not None],
        compute=train_adapter,
        seed_key=seed_key,
        summary=f"sft, {length} at lr {args.lr:g}",
    )


def ends_at_limit(text: Example | Sample) -> bool:
    """Whether an answer was sampled, and did not end before generate.max_new_tokens."""
    return isinstance(text, Sample) and text.finish == "length"


def should_compile(
    models: ModelPool,
    loaded: LoadedModel,
    examples: Sequence[TrainExample],
    schedule: OptimizerConfig,
) -> bool:
    """Whether the loss is compiled: as run.compile says; auto, if the stage is long enough."""
    if models.config.run.compile != "auto" or not models.may_compile:
        return models.may_compile
    # Logits of the whole training: those of one pass, times the passes that the schedule makes
    tokens = sum(example.trained_tokens for example in examples)
    trained_tokens = tokens * schedule.steps * schedule.batch / max(len(examples), 1)
    return trained_tokens * loaded.model.config.vocab_size >= COMPILE_THRESHOLD


def save_trained_adapter(
    context: StageContext, start: Policy, loaded: LoadedModel, schedule: OptimizerConfig
) -> None:
    """Write the trained adapter in PEFT's layout; an error where training has changed nothing."""
    tensors = get_adapter_weights(loaded.model)
    matrices = [tensor for name, tensor in tensors.items() if name.endswith("lora_B.weight")]
    if schedule.steps and not any(matrix.any() for matrix in matrices):
        raise UserError(f"{context.name}: the trained adapter is still zero")
    if not context.dist.is_main:
        return
    base_folder = start.base.stage.path
    if start.base.stage.external:
        location = base_folder.absolute()
    else:  # a base of this run moves with it
        location = os.path.relpath(base_folder, context.run.path / context.name)
    save_adapter(context.folder, tensors, context.run.config.lora, str(location))


def copy_adapter(run: Run, name: str, adapter: Stage) -> Stage:
    """The stage with a trained adapter under another name, in a folder of the same depth."""

    def copy(context: StageContext) -> dict:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            write_atomic(context.folder / file, (adapter.path / file).read_bytes())
        return {"kept": adapter.name}

    return run.stage(
        name=name,
        kind="keep/1",
        settings={},
        inputs=[adapter],
        compute=copy,
        summary="the student before the first alarm",
    )
