"""The kinds of stage that the methods are made of, each a function from its inputs to a Stage."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from minmacpo import UserError
from minmacpo.config.schema import Dpo
from minmacpo.core.batching import steps_per_epoch
from minmacpo.core.checkpoint import save_adapter
from minmacpo.core.lora import get_adapter_weights, init_adapter
from minmacpo.core.losses import PreferenceLoss, SFTLoss, StepTotals, loss_title, requires_reference
from minmacpo.core.trainer import (
    BatchPlan,
    OptimizerConfig,
    TrainExample,
    collate_examples,
    plan_packed_batches,
)
from minmacpo.core.trainer import train as fit
from minmacpo.data.records import Pair
from minmacpo.kernels.fused_logps import sequence_logps
from minmacpo.pipeline.base_models import Base
from minmacpo.pipeline.model_pool import LoadedModel, Session, TextColumn
from minmacpo.pipeline.run import Stage, StageContext, derive_seed
from minmacpo.pipeline.stage_log import show_first, sift, warn_of
from minmacpo.pipeline.trainer_hooks import trainer_hooks
from minmacpo.runtime.device import normalize_oom, resolve_device
from minmacpo.runtime.files import iter_rows, write_atomic

EARNED = 2e12  # logits whose reading and writing (12 bytes less of each at 3 TB/s) takes as long as to compile: 8 s; an estimate


@dataclass(frozen=True, slots=True)
class TrainArgs:
    """How an agent learns: peak learning rate, passes over the data, answers or pairs per step."""

    lr: float
    epochs: int
    batch: int

    def schedule(self, units: int, steps: int = 0) -> OptimizerConfig:
        """`steps` optimiser steps, or all passes over so many units."""
        return OptimizerConfig(
            self.lr, steps or self.epochs * steps_per_epoch(units, self.batch), self.batch
        )


def sft(
    session: Session,
    name: str,
    base: Base,
    texts: TextColumn,
    start: Stage | None,
    train_args: TrainArgs,
    key: tuple,
    match_steps_of: Sequence[Stage] = (),
    confidence: float = 0.0,
) -> Stage:
    """Supervised fine-tuning of the slot on `texts`, from `start` or from a fresh adapter (I1-I5).
    `match_steps_of`: take as many optimiser steps as those trainings took together, whatever the train_args says;
    `confidence`: the final weight of the auxiliary confidence loss (method.md 7.2)."""

    def learn(work: StageContext) -> dict:
        """Render, drop what cannot be trained on, fit."""
        loaded = session.use(base, start)
        if start is None:
            init_adapter(loaded.model, derive_seed(session.config.run.seed, base.name, "adapter"))
        found = [
            (text, session.render(loaded, text.prompt, text.response)) for text in texts.read()
        ]
        found, dropped = sift(
            found,
            {
                "empty": lambda text, row: not text.response,
                "over_long": lambda text, row: len(row.ids) > loaded.limit,
            },
        )
        warn_of(work, dropped, len(found))
        show_first(work, loaded, "row", [row for _, row in found])
        units = [TrainExample(text.id, (row,)) for text, row in found]
        schedule = train_args.schedule(
            len(units), sum(stage.notes()["counts"]["steps"] for stage in match_steps_of)
        )
        plan = plan_packed_batches(units, schedule, trainer_hooks(work), resolve_device(session.config.run.device))
        objective = SFTLoss(compiles(session, loaded, units, schedule), confidence)
        counts = train(work, base, loaded, units, objective, schedule, plan)
        cut = sum(getattr(text, "finish", None) == "length" for text, _ in found)
        return counts | dropped | {"cut_at_limit": cut}

    settings, inputs = (
        asdict(train_args) | texts.settings,
        [base.stage, start, texts.stage, *match_steps_of],
    )
    settings |= (
        ({"confidence": confidence} if confidence else {})
        | log_lines(session)
        | session.quantised(base)
    )
    size = f"sft, {'as many steps as the student' if match_steps_of else f'{train_args.epochs} epochs'} at lr {train_args.lr:g}"
    return session.stage(name, "sft/1", settings, inputs, learn, key, size)


def prefer(
    session: Session,
    name: str,
    base: Base,
    pairs: Stage,
    start: Stage,
    reference: Stage | None,
    train_args: TrainArgs,
    dpo: Dpo,
    key: tuple,
) -> Stage:
    """The contrastive step (2.3): DPO + gamma · SFT on pairs.jsonl, continuing the adapter `start`."""
    contrast = session.config.macpo.hard_negatives

    def learn(work: StageContext) -> dict:
        """Render both sides, check the start against the stored reference, fit."""
        loaded, units = session.use(base, start), []
        for pair in iter_rows(pairs.path / "pairs.jsonl", Pair):
            rows = [
                session.render(loaded, pair.prompt, text) for text in (pair.chosen, pair.rejected)
            ]
            refs = (pair.ref_chosen_logps, pair.ref_rejected_logps)
            units.append(TrainExample(pair.id, tuple(rows), refs, pair.weight))
        show_first(work, loaded, "chosen", [unit.rows[0] for unit in units])
        show_first(work, loaded, "rejected", [unit.rows[1] for unit in units])
        if requires_reference(dpo.loss):
            policies = {"base": "the bare base", "init": "round 0", "previous": "the last round"}
            policy = policies[dpo.reference]
            work.log(f"reference policy: {policy}; its logps are stored with the pairs")
        schedule = train_args.schedule(len(units))
        compiled = compiles(session, loaded, units, schedule)
        objective = PreferenceLoss(
            beta=dpo.beta,
            sft_weight=dpo.sft_weight,
            label_smoothing=dpo.label_smoothing,
            loss_type=dpo.loss,
            target_margin=dpo.target_margin,
            length_normalized=dpo.length_normalized,
            length_penalty=dpo.length_penalty,
            sft_only=not contrast,
            compiled=compiled,
        )
        plan = plan_packed_batches(units, schedule, trainer_hooks(work), resolve_device(session.config.run.device))
        first = [units[i] for i in plan.steps[0][0]] if schedule.steps else []
        before = check_start(session, work, base, start, reference, first, objective, plan.packed)
        return train(work, base, loaded, units, objective, schedule, plan, before)

    settings = {k: v for k, v in asdict(dpo).items() if k not in ("student_lr", "teacher_lr")}
    settings |= (
        asdict(train_args) | {"contrast": contrast} | log_lines(session) | session.quantised(base)
    )
    title = f"{loss_title(dpo.loss)} + SFT"
    size = f"{title if contrast else 'SFT term only'}, {train_args.epochs} epoch at lr {train_args.lr:g}"
    return session.stage(
        name, "prefer/1", settings, [base.stage, pairs, start, reference], learn, key, size
    )


def log_lines(session: Session) -> dict[str, int]:
    """run.log_every where it is not the usual: it says which lines metrics.jsonl has, and the monitor reads those."""
    every = session.config.run.log_every
    return {} if every == type(session.config.run)().log_every else {"log_every": every}


def compiles(
    session: Session, loaded: LoadedModel, units: Sequence[TrainExample], schedule: OptimizerConfig
) -> bool:
    """Whether the loss is compiled: as run.compile says; auto: on a GPU, if the stage's logits are worth the wait."""
    if session.config.run.compile != "auto" or not session.compiled:
        return session.compiled
    trained = (
        sum(sum(row.mask) for unit in units for row in unit.rows)
        * schedule.steps
        * schedule.batch
        / max(len(units), 1)
    )
    return trained * loaded.model.config.vocab_size >= EARNED


def train(
    work: StageContext,
    base: Base,
    loaded: LoadedModel,
    units: list[TrainExample],
    objective,
    schedule: OptimizerConfig,
    plan: BatchPlan,
    before: Sequence[dict] = (),
) -> dict:
    """Fit the slot, check that it does something, and write it in PEFT's layout. `before`: first metrics."""
    counts = fit(
        loaded.model,
        loaded.lora_params,
        units,
        objective,
        schedule,
        trainer_hooks(work),
        plan=plan,
        initial_metrics=before,
    )
    tensors = get_adapter_weights(loaded.model)
    if schedule.steps and not any(
        t.any() for k, t in tensors.items() if k.endswith("lora_B.weight")
    ):
        raise UserError(f"{work.name}: the trained adapter is still zero")
    if not work.dist.is_main:
        return counts
    path, config = base.stage.path, work.run.config
    home = (
        path.absolute() if base.stage.external else os.path.relpath(path, work.run.path / work.name)
    )
    save_adapter(work.folder, tensors, config.lora, str(home))
    return counts


def keep(session: Session, name: str, adapter: Stage) -> Stage:
    """A trained adapter under another name."""

    def copy(work: StageContext) -> dict:
        """Its files say the same from a folder of the same depth."""
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            write_atomic(work.folder / file, (adapter.path / file).read_bytes())
        return {"kept": adapter.name}

    return session.stage(
        name, "keep/1", {}, [adapter], copy, size="the student before the first alarm"
    )


def check_start(
    session: Session,
    work: StageContext,
    base: Base,
    start: Stage,
    reference: Stage | None,
    first: list[TrainExample],
    objective,
    share: bool,
) -> list[dict]:
    """[metrics before the first step] of its first pairs, of half of them where memory is short; [] of none. Raises UserError unless
    they have their stored reference logps and, where reference and start are one, no margin; leaves `start` loaded."""
    try:
        with normalize_oom():
            return (
                [
                    {"step": 0, "epoch": 0.0}
                    | check_pairs(session, work, base, start, reference, first, objective, share)
                ]
                if first
                else []
            )
    except torch.OutOfMemoryError:
        if len(first) == 1 or work.dist.is_sharded:
            raise UserError(
                f"{work.name}: out of memory before the first step; lower {'run.max_tokens_per_batch' if len(first) > 1 else 'data.max_length'}"
            ) from None
    return check_start(
        session, work, base, start, reference, first[: len(first) // 2], objective, share
    )


def check_pairs(
    session: Session,
    work: StageContext,
    base: Base,
    start: Stage,
    reference: Stage | None,
    first: list[TrainExample],
    objective,
    share: bool,
) -> dict:
    """The metrics of some pairs, if all is as `check_start` wants it."""
    refs = [ref for unit in first for ref in unit.reference_logps]
    model = session.use(base, reference).model
    weight = next(model.parameters())
    batch = collate_examples(first, weight.device, share)
    exact = weight.dtype == torch.float32
    logps = sequence_logps(
        model, batch.tokens, batch.mask, objective.compiled, batch.packed
    ).tolist()  # on the path of training
    worst = max(abs(a - b) / (1 + abs(b)) for a, b in zip(logps, refs, strict=True))
    if worst > (1e-4 if exact else 0.02):
        problem = f"stored reference logps differ from the model's by {worst:.2g} (relative)"
        raise UserError(f"{work.name}: {problem}")
    session.use(base, start)
    totals = StepTotals(examples=len(first), tokens=int(batch.mask.sum()))
    with torch.no_grad():
        _, metrics = objective(model, batch, totals)
    found = {name: value.item() for name, value in metrics.items()}
    work.log(f"margin before the first step: {found['rewards/margins']:+.4f}")
    zero_margin = objective.requires_reference and start == reference
    if zero_margin and abs(found["rewards/margins"]) > (1e-3 if exact else 0.5):
        raise UserError(
            f"{work.name}: start and reference are the same, yet the margin is not zero: {found}"
        )
    return found
