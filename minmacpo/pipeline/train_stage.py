"""The stages that train an adapter: supervised fine-tuning, and preference learning on pairs."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from minmacpo import UserError
from minmacpo.config.schema import Dpo
from minmacpo.core.batching import MemoryLimit, steps_per_epoch
from minmacpo.core.checkpoint import save_adapter
from minmacpo.core.lora import get_adapter_weights, init_adapter
from minmacpo.core.losses import PreferenceLoss, SFTLoss, StepTotals, loss_title
from minmacpo.core.trainer import (
    OptimizerConfig,
    TrainExample,
    collate_examples,
    plan_packed_batches,
    train,
)
from minmacpo.data.records import Example, Pair, Sample
from minmacpo.data.tokenizer import Tokens
from minmacpo.kernels.fused_logps import sequence_logps
from minmacpo.pipeline.artifacts import Policy, TextColumn
from minmacpo.pipeline.model_pool import LoadedModel, ModelPool
from minmacpo.pipeline.run import Run, Stage, StageContext, derive_seed
from minmacpo.pipeline.stage_log import log_first_row, warn_dropped
from minmacpo.pipeline.trainer_hooks import trainer_hooks
from minmacpo.runtime.files import iter_rows, write_atomic

# torch.compile takes about 8 s for a loss. It spares 12 bytes of memory traffic for each logit, at
# 3 TB/s: from so many logits on, a stage is faster with it. An estimate.
COMPILE_THRESHOLD = 2e12


@dataclass(frozen=True, slots=True)
class SFTArgs:
    """How an agent learns from answers.

    Attributes:
        lr: peak learning rate.
        batch: answers per optimiser step.
        match_steps_of: take as many steps as these trainings together, in place of the epochs.
        confidence: final weight of the auxiliary confidence loss (Burns et al. 2023).
    """

    lr: float
    epochs: int
    batch: int
    confidence: float = 0.0
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
        }


@dataclass(frozen=True, slots=True)
class DPOArgs:
    """How an agent learns from preference pairs.

    Attributes:
        lr: peak learning rate.
        batch: pairs per optimiser step.
        dpo: the settings of the loss.
        use_dpo: False leaves the SFT term alone (the -HN ablation).
    """

    lr: float
    epochs: int
    batch: int
    dpo: Dpo = field(default_factory=Dpo)
    use_dpo: bool = True

    def optimizer_config(self, pairs: int) -> OptimizerConfig:
        """The schedule for so many pairs."""
        return OptimizerConfig(
            self.lr, self.epochs * steps_per_epoch(pairs, self.batch), self.batch
        )

    def loss(self, compiled: bool) -> PreferenceLoss:
        """The loss that these settings describe."""
        return PreferenceLoss(
            beta=self.dpo.beta,
            sft_weight=self.dpo.sft_weight,
            label_smoothing=self.dpo.label_smoothing,
            loss_type=self.dpo.loss,
            target_margin=self.dpo.target_margin,
            length_normalized=self.dpo.length_normalized,
            length_penalty=self.dpo.length_penalty,
            sft_only=not self.use_dpo,
            compiled=compiled,
        )

    def settings(self) -> dict:
        """What a stage's fingerprint says of it."""
        settings = asdict(self.dpo) | {"lr": self.lr, "epochs": self.epochs, "batch": self.batch}
        del settings["student_lr"], settings["teacher_lr"]  # `lr` is the agent's own
        return settings | {"use_dpo": self.use_dpo}


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """A stage with pairs.jsonl, and the policy under which the pairs' reference values were scored.

    `reference` is None where the loss needs none; then the pairs have no such values.
    """

    stage: Stage
    reference: Policy | None


def train_sft(
    run: Run,
    models: ModelPool,
    name: str,
    start: Policy,
    texts: TextColumn,
    args: SFTArgs,
    seed_key: tuple,
) -> Stage:
    """The stage with an adapter fine-tuned on `texts`, from the policy `start`.

    A `start` without an adapter means a fresh one, the same for all agents of that base.
    """

    def train_adapter(context: StageContext) -> dict:
        loaded = models.get_policy(start)
        if start.adapter is None:
            init_adapter(loaded.model, derive_seed(run.config.run.seed, start.base.name, "adapter"))

        # --- Tokenize, and drop what cannot be trained on
        examples = []
        dropped = {"empty": 0, "over_long": 0}
        cut_at_limit = 0
        for text in texts.read():
            row = loaded.render(text.prompt, text.response)
            if not text.response:
                dropped["empty"] += 1
            elif len(row.ids) > loaded.max_length:
                dropped["over_long"] += 1
            else:
                examples.append(TrainExample(text.id, (row,)))
                cut_at_limit += ends_at_limit(text)
        warn_dropped(context, dropped, len(examples))
        log_first_row(context, loaded, "row", examples[0].rows[0] if examples else None)

        # --- Train
        schedule = args.optimizer_config(len(examples))
        compiled = should_compile(models, loaded, examples, schedule)
        hooks = trainer_hooks(context)
        counts = train(
            loaded.model,
            loaded.lora_params,
            examples,
            SFTLoss(compiled, args.confidence),
            schedule,
            hooks,
            plan=plan_packed_batches(examples, schedule, hooks, models.device),
        )
        save_trained_adapter(context, start, loaded, schedule)
        return counts | dropped | {"cut_at_limit": cut_at_limit}

    length = "as many steps as the student" if args.match_steps_of else f"{args.epochs} epochs"
    inputs = [start.base.stage, start.adapter, texts.stage, *args.match_steps_of]
    return run.stage(
        name=name,
        kind="sft/2",
        settings=models.settings(start.base)
        | args.settings()
        | {"texts": texts.location, "log_every": run.config.run.log_every},
        inputs=[stage for stage in inputs if stage is not None],
        compute=train_adapter,
        seed_key=seed_key,
        summary=f"sft, {length} at lr {args.lr:g}",
    )


def ends_at_limit(text: Example | Sample) -> bool:
    """Whether an answer was sampled, and did not end before generate.max_new_tokens."""
    return isinstance(text, Sample) and text.finish == "length"


def train_dpo(
    run: Run,
    models: ModelPool,
    name: str,
    start: Policy,
    pairs: PreferenceData,
    args: DPOArgs,
    seed_key: tuple,
) -> Stage:
    """The stage with an adapter that continues `start` on preference pairs: DPO + weight * SFT."""

    def train_adapter(context: StageContext) -> dict:
        loaded = models.get_policy(start)
        examples = [
            pair_example(loaded, pair) for pair in iter_rows(pairs.stage.path / "pairs.jsonl", Pair)
        ]
        first = examples[0].rows if examples else (None, None)
        log_first_row(context, loaded, "chosen", first[0])
        log_first_row(context, loaded, "rejected", first[1])
        context.log_detail(describe_reference(args.dpo, pairs.reference))

        schedule = args.optimizer_config(len(examples))
        loss = args.loss(should_compile(models, loaded, examples, schedule))
        hooks = trainer_hooks(context)
        plan = plan_packed_batches(examples, schedule, hooks, models.device)
        check = StartCheck(context, models, start, pairs.reference, loss, plan.packed)
        first_batch = [examples[i] for i in plan.steps[0][0]] if plan.steps else []
        counts = train(
            loaded.model,
            loaded.lora_params,
            examples,
            loss,
            schedule,
            hooks,
            plan=plan,
            initial_metrics=check(first_batch),
        )
        save_trained_adapter(context, start, loaded, schedule)
        return counts

    term = f"{loss_title(args.dpo.loss)} + SFT" if args.use_dpo else "SFT term only"
    inputs = [start.base.stage, pairs.stage, start.adapter]
    if pairs.reference is not None:
        inputs.append(pairs.reference.adapter)
    return run.stage(
        name=name,
        kind="prefer/2",
        settings=models.settings(start.base)
        | args.settings()
        | {"log_every": run.config.run.log_every},
        inputs=[stage for stage in inputs if stage is not None],
        compute=train_adapter,
        seed_key=seed_key,
        summary=f"{term}, {args.epochs} epoch at lr {args.lr:g}",
    )


def pair_example(loaded: LoadedModel, pair: Pair) -> TrainExample:
    """A pair as token rows, chosen and rejected, with what the loss needs to know of it."""
    chosen = loaded.render(pair.prompt, pair.chosen)
    rejected = loaded.render(pair.prompt, pair.rejected)
    reference_logps = ()  # of a loss that needs no reference
    if pair.ref_chosen_logps is not None:
        reference_logps = (pair.ref_chosen_logps, pair.ref_rejected_logps)
    return TrainExample(pair.id, (chosen, rejected), reference_logps, pair.weight)


def describe_reference(dpo: Dpo, reference: Policy | None) -> str:
    """What the log says of the reference policy."""
    if reference is None:
        return "the loss needs no reference policy"
    names = {"base": "the bare base", "init": "round 0", "previous": "the last round"}
    return f"reference policy: {names[dpo.reference]}; its logps are stored with the pairs"


def should_compile(
    models: ModelPool,
    loaded: LoadedModel,
    examples: Sequence[TrainExample],
    schedule: OptimizerConfig,
) -> bool:
    """Whether the loss is compiled: as run.compile says; auto, if the stage is long enough."""
    if models.config.run.compile != "auto" or not models.may_compile:
        return models.may_compile
    rows: list[Tokens] = [row for example in examples for row in example.rows]
    tokens = sum(sum(row.mask) for row in rows)
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


@dataclass(frozen=True, slots=True)
class StartCheck:
    """A self-test before the first step of preference learning.

    The pairs of the first batch must have the reference log-probabilities that are stored with
    them, and no margin where the training starts from the reference itself. A wrong template, a
    damaged adapter or a mixed-up reference is found here, before hours of training.
    """

    context: StageContext
    models: ModelPool
    start: Policy
    reference: Policy | None
    loss: PreferenceLoss
    packed: bool  # see core/batching.py

    def __call__(self, examples: list[TrainExample]) -> list[dict]:
        """The metrics before the first step, of half the examples where memory is short.

        Leaves the adapter of `start` in the model.
        """
        if not examples:
            return []
        limit = MemoryLimit(on_halving=lambda size: None, failure=self.failure)
        # Of a sharded model the other ranks wait for this one's next pass: nothing is halved there
        smallest = len(examples) if self.context.dist.is_sharded else 1
        metrics = limit.run(lambda size: self.check(examples[:size]), len(examples), smallest)
        return [{"step": 0, "epoch": 0.0} | metrics]

    def failure(self, size: int) -> UserError:
        """The error where not even so many pairs fit into memory."""
        setting = "run.max_tokens_per_batch" if size > 1 else "data.max_length"
        return UserError(
            f"{self.context.name}: out of memory before the first step; lower {setting}"
        )

    def check(self, examples: list[TrainExample]) -> dict[str, float]:
        """The metrics of the examples, once both properties hold."""
        if self.reference is not None:
            self.check_stored_logps(examples)
        metrics = self.compute_metrics(examples)
        margin = metrics["rewards/margins"]
        self.context.log_detail(f"margin before the first step: {margin:+.4f}")
        tolerance = 1e-3 if self.models.dtype == torch.float32 else 0.5
        starts_at_reference = (
            self.reference is not None and self.reference.adapter == self.start.adapter
        )
        if starts_at_reference and abs(margin) > tolerance:
            raise UserError(
                f"{self.context.name}: start and reference are the same, yet the margin is not "
                f"zero: {metrics}"
            )
        return metrics

    def check_stored_logps(self, examples: list[TrainExample]) -> None:
        """Raise UserError unless the reference finds what is stored with the pairs."""
        model = self.models.get_policy(self.reference).model
        batch = collate_examples(examples, self.models.device, self.packed)
        # by the same kernel as in training
        logps = sequence_logps(model, batch.tokens, batch.mask, self.loss.compiled, batch.packed)
        stored = [value for example in examples for value in example.reference_logps]
        worst = 0.0
        for logp, expected in zip(logps.tolist(), stored, strict=True):
            worst = max(worst, abs(logp - expected) / (1 + abs(expected)))
        tolerance = 1e-4 if self.models.dtype == torch.float32 else 0.02
        if worst > tolerance:
            raise UserError(
                f"{self.context.name}: stored reference logps differ from the model's by "
                f"{worst:.2g} (relative)"
            )

    def compute_metrics(self, examples: list[TrainExample]) -> dict[str, float]:
        """The metrics of the loss under `start`, which stays in the model."""
        model = self.models.get_policy(self.start).model
        batch = collate_examples(examples, self.models.device, self.packed)
        totals = StepTotals(examples=len(examples), tokens=int(batch.mask.sum()))
        with torch.no_grad():
            _, metrics = self.loss(model, batch, totals)
        return {name: value.item() for name, value in metrics.items()}
