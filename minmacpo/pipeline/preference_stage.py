"""The stage that trains an adapter on preference pairs, after a check of where it starts."""

from dataclasses import asdict, dataclass, field

import torch

from minmacpo import UserError
from minmacpo.config.schema import Dpo
from minmacpo.core.batching import MemoryLimit, steps_per_epoch
from minmacpo.core.losses import PREFERENCE_LOSSES, PreferenceLoss
from minmacpo.core.sft_loss import StepTotals
from minmacpo.core.trainer import (
    OptimizerConfig,
    TrainExample,
    collate_examples,
    plan_packed_batches,
    train,
)
from minmacpo.data.records import Pair
from minmacpo.kernels.fused_logps import sequence_logps
from minmacpo.pipeline.artifacts import Policy
from minmacpo.pipeline.model_pool import LoadedModel, ModelPool, Session
from minmacpo.pipeline.recompute import set_recompute
from minmacpo.pipeline.stage import Stage, StageContext
from minmacpo.pipeline.stage_log import log_first_row
from minmacpo.pipeline.train_stage import save_trained_adapter, should_compile
from minmacpo.pipeline.trainer_hooks import trainer_hooks
from minmacpo.runtime.files import iter_rows


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

    @property
    def title(self) -> str:
        """What is trained with, for logs and plans: "DPO + SFT"."""
        if not self.use_dpo:
            return "SFT term only"
        return f"{PREFERENCE_LOSSES[self.dpo.loss].title} + SFT"

    def optimizer_config(self, pairs: int) -> OptimizerConfig:
        """The schedule for so many pairs."""
        steps = self.epochs * steps_per_epoch(pairs, self.batch)
        return OptimizerConfig(self.lr, steps, self.batch)

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


def train_dpo(
    session: Session,
    name: str,
    start: Policy,
    pairs: PreferenceData,
    args: DPOArgs,
    seed_key: tuple,
) -> Stage:
    """The stage with an adapter that continues `start` on preference pairs: DPO + weight * SFT."""
    models = session.models

    def train_adapter(context: StageContext) -> dict:
        # --- Pairs as token rows
        loaded = models.get_policy(start)
        examples = []
        for pair in iter_rows(pairs.stage.path / "pairs.jsonl", Pair):
            examples.append(pair_example(loaded, pair))
        chosen, rejected = examples[0].rows if examples else (None, None)
        log_first_row(context, loaded, "chosen", chosen)
        log_first_row(context, loaded, "rejected", rejected)
        context.log_detail(describe_loss(args, pairs.reference))

        # --- The schedule, the loss, and which pairs go into which step
        schedule = args.optimizer_config(len(examples))
        loss = args.loss(should_compile(models, loaded, examples, schedule))
        hooks = trainer_hooks(context)
        plan = plan_packed_batches(examples, schedule, hooks, models.device)
        set_recompute(context, loaded.model, examples, plan)

        # --- Check the first batch, then train
        check = StartCheck(context, models, start, pairs.reference, loss, plan.packed)
        first_batch = []
        if plan.steps:
            first_batch = [examples[number] for number in plan.steps[0][0]]
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

    inputs = [start.base.stage, pairs.stage, start.adapter]
    if pairs.reference is not None:
        inputs.append(pairs.reference.adapter)
    return session.run.stage(
        name=name,
        kind="prefer/2",
        settings=models.settings(start.base)
        | args.settings()
        | {"log_every": session.run.config.run.log_every},
        inputs=[stage for stage in inputs if stage is not None],
        compute=train_adapter,
        seed_key=seed_key,
        summary=f"{args.title}, {args.epochs} epoch at lr {args.lr:g}",
    )


def pair_example(loaded: LoadedModel, pair: Pair) -> TrainExample:
    """A pair as token rows, chosen and rejected, with what the loss needs to know of it."""
    chosen = loaded.render(pair.prompt, pair.chosen)
    rejected = loaded.render(pair.prompt, pair.rejected)
    reference_logps = None  # of a loss that needs no reference
    if pair.ref_chosen_logps is not None:
        reference_logps = (pair.ref_chosen_logps, pair.ref_rejected_logps)
    return TrainExample(pair.id, (chosen, rejected), reference_logps, pair.weight)


def describe_loss(args: DPOArgs, reference: Policy | None) -> str:
    """What the log says of the loss and of its reference policy."""
    if reference is None:
        return f"loss: {args.title}, without a reference policy"
    names = {"base": "the bare base", "init": "round 0", "previous": "the last round"}
    name = names[args.dpo.reference]
    return f"loss: {args.title}; reference policy: {name}, whose logps are stored with the pairs"


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
        title = PREFERENCE_LOSSES[self.loss.loss_type].title
        self.context.log_detail(f"{title} margin before the first step: {margin:+.4f}")
        tolerance = 1e-3 if self.models.dtype == torch.float32 else 0.5
        starts_at_reference = (
            self.reference is not None and self.reference.adapter == self.start.adapter
        )
        if starts_at_reference and not abs(margin) <= tolerance:  # nan is refused too
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
        logps = logps.cpu().double()  # (2B,)
        stored = torch.tensor(
            [example.reference_logps for example in examples], dtype=torch.float64
        )
        stored = stored.flatten()  # (2B,): chosen and rejected in turn, as the rows are
        differences = (logps - stored).abs() / (1 + stored.abs())
        worst = differences.max().item()  # nan where any of them is
        tolerance = 1e-4 if self.models.dtype == torch.float32 else 0.02
        if not worst <= tolerance:  # the other way round, nan would pass
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
