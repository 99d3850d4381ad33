"""The one optimisation loop, for pre-training, SFT and preference losses.

Nothing in it is random (there is no dropout, and batches are planned beforehand), so the state of a
training is its parameters, AdamW's two moments and a step number: a training that was killed goes
on to the same bits. It needs no run: `train(model, params, examples, loss, config)` works in a
notebook (docs/core.md).
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minmacpo import UserError
from minmacpo.core.batching import (
    Batch,
    Groups,
    MemoryLimit,
    batch_limits,
    collate,
    plan_steps,
    should_pack,
    split_to_fit,
    steps_per_epoch,
)
from minmacpo.core.checkpoint import load_state, save_state
from minmacpo.core.sft_loss import LossOutput, StepTotals
from minmacpo.data.tokenizer import Tokens
from minmacpo.runtime.device import peak_mb
from minmacpo.runtime.distributed import SINGLE_PROCESS, Distributed
from minmacpo.runtime.files import write_rows

MAX_GRAD_NORM = 1.0

Loss = Callable[[nn.Module, Batch, StepTotals], LossOutput]  # SFTLoss or PreferenceLoss


# --- What a training gets


@dataclass(frozen=True, slots=True)
class TrainExample:
    """One answer (one row), or a preference pair (row 0 is chosen, row 1 is rejected)."""

    id: str
    rows: tuple[Tokens, ...]
    reference_logps: tuple[float, float] | None = None  # of a pair: chosen, rejected; nats
    weight: float | None = None  # of a pair, where pairs have weights

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def trained_tokens(self) -> int:
        """Tokens under the masks of all rows."""
        return sum(sum(row.mask) for row in self.rows)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW with cosine decay from `lr` to `min_lr_ratio` times lr over `steps` steps."""

    lr: float
    steps: int
    batch: int  # answers or pairs per step
    min_lr_ratio: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0 ... steps - 1."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))  # from 1 to 0
        ratio = self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine
        return self.lr * ratio


class NoProgress:
    """A progress bar that shows nothing."""

    def step(self) -> None:
        """One more step is done."""


def no_progress(total: int, unit: str, done: int = 0):
    """A context with a bar for `total` units that shows nothing."""
    return contextlib.nullcontext(NoProgress())


def ignore(*args, **kwargs) -> None:
    """Do nothing."""


def never() -> bool:
    """False: nobody asks a training in a notebook to stop."""
    return False


@dataclass(frozen=True, slots=True)
class TrainerHooks:
    """What surrounds a training. A run fills it in; the defaults suit a notebook."""

    name: str = "training"  # begins every error message
    seed: int = 0  # of the order of the examples
    max_tokens_per_batch: int = 16384  # padding included, in one forward pass
    log_every: int = 5  # steps between two rows of metrics
    save_every: int = 50  # steps between two saved states
    state_file: Path | None = None  # where the training state is saved; None: nowhere
    metrics_file: Path | None = None  # where all rows of metrics are written at the end
    log: Callable[[str], None] = print
    log_detail: Callable[[str], None] = print  # what only a closer look needs
    log_metrics: Callable[..., None] = ignore  # (row, **timing), row by row
    progress: Callable = no_progress  # (total, unit, done) -> a context with `step()`
    should_stop: Callable[[], bool] = never  # asked after every step; the state is then saved
    raise_if_stopped: Callable[[], None] = ignore  # called after the state has been saved
    dist: Distributed = SINGLE_PROCESS


# --- Plans


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The steps of a training: micro-batches, each a list of numbers of examples."""

    steps: list[Groups]
    packed: bool = False  # see core/batching.py


def plan_batches(
    examples: Sequence[TrainExample],
    config: OptimizerConfig,
    hooks: TrainerHooks,
    device: str,
    similar_lengths: bool = False,
) -> BatchPlan:
    """The steps of `config`; `similar_lengths`: each micro-batch has rows of about one length."""
    max_tokens, max_length_ratio = batch_limits(hooks.max_tokens_per_batch, device, similar_lengths)
    steps = plan_steps(
        lengths=[example.max_length for example in examples],
        batch_size=config.batch,
        steps=config.steps,
        seed=hooks.seed,
        max_tokens=max_tokens // len(examples[0].rows),
        max_length_ratio=max_length_ratio,
    )
    return BatchPlan(steps)


def plan_packed_batches(
    examples: Sequence[TrainExample], config: OptimizerConfig, hooks: TrainerHooks, device: str
) -> BatchPlan:
    """Rows of similar lengths, packed where that saves enough; the log says how much."""
    if not examples:
        return BatchPlan([])
    steps = plan_batches(examples, config, hooks, device, similar_lengths=True).steps
    batches = []
    for micro_batches in steps[: steps_per_epoch(len(examples), config.batch)]:
        for group in micro_batches:
            batches.append(rows_of(examples[number] for number in group))
    packed, line = should_pack(batches)
    hooks.log_detail(line)
    return BatchPlan(steps, packed)


# --- One step


def rows_of(examples: Iterable[TrainExample]) -> list[Tokens]:
    """The rows of all examples, one after the other."""
    rows: list[Tokens] = []
    for example in examples:
        rows += example.rows
    return rows


def padded_tokens(examples: Sequence[TrainExample], group: Sequence[int]) -> int:
    """Tokens of a micro-batch, padding included.

    Args:
        group: its examples, by number.
    """
    rows = len(group) * len(examples[group[0]].rows)
    return rows * max(examples[number].max_length for number in group)


def collate_examples(
    examples: Sequence[TrainExample], device: torch.device, packed: bool = False
) -> Batch:
    """The rows of some examples as one batch, with what their pairs know beforehand."""
    batch = collate(rows_of(examples), device, packed)
    reference_logps = None
    weights = None
    if examples[0].reference_logps is not None:
        reference_logps = torch.tensor([example.reference_logps for example in examples])
        reference_logps = reference_logps.to(device, non_blocking=True)  # (B, 2)
    if examples[0].weight is not None:
        weights = torch.tensor([example.weight for example in examples])
        weights = weights.to(device, non_blocking=True)  # (B,)
    return Batch(
        tokens=batch.tokens,
        mask=batch.mask,
        packed=batch.packed,
        reference_logps=reference_logps,
        weights=weights,
    )


def step_totals(
    examples: Sequence[TrainExample], micro_batches: Groups, progress: float
) -> StepTotals:
    """What a whole step holds, on all ranks: the denominators of its losses and metrics."""
    count = 0
    trained_tokens = 0
    for group in micro_batches:
        count += len(group)
        trained_tokens += sum(examples[number].trained_tokens for number in group)
    return StepTotals(count, trained_tokens, progress)


def train_step(
    model: nn.Module,
    params: Sequence[nn.Parameter],
    examples: Sequence[TrainExample],
    micro_batches: Groups,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    progress: float = 1.0,
    packed: bool = False,
    memory: MemoryLimit | None = None,
    dist: Distributed = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """One optimiser step on the examples of all micro-batches; returns its metrics, on the device.

    Args:
        micro_batches: of the whole step, by the examples' numbers; this rank does its part of them.
        progress: how much of the training is done before this step, 0 to 1.
        packed: see core/batching.py.
        memory: how many padded tokens a pass may have; None: short memory is an error.
        dist: the ranks that do the step together.
    """
    # --- What the whole step holds, of which this rank does a part
    totals = step_totals(examples, micro_batches, progress)
    local_batches = dist.split_batches(micro_batches)

    padded_size = functools.partial(padded_tokens, examples)

    def forward_backward(max_tokens: int) -> Tensor:
        """Gradients of all local passes; again from the start if an earlier try has failed."""
        optimizer.zero_grad()
        total = torch.zeros(len(loss.metric_names), device=params[0].device)
        for group in split_to_fit(local_batches, padded_size, max_tokens):
            # Of an empty group nothing counts, but other ranks wait for its pass
            numbers = group or micro_batches[0][:1]
            batch = collate_examples([examples[i] for i in numbers], total.device, packed)
            loss_value, metrics = loss(model, batch, totals)
            if group:
                loss_value.backward()  # gradients add up over the passes
                total = total + torch.stack([metrics[name] for name in loss.metric_names])
            else:
                # The other ranks also wait for its backward pass, which must add nothing
                (0 * loss_value).backward()
        return total

    # --- Forward and backward passes, in smaller ones if memory is short
    sizes = [padded_size(group) for group in local_batches if group]
    singles = [padded_size([number]) for group in local_batches for number in group]
    if memory is None:
        total = forward_backward(max(sizes, default=1))
    else:
        # Sharded ranks must all do the same number of passes, so there none is divided
        smallest = max(sizes if dist.is_sharded else singles, default=1)
        total = memory.run(forward_backward, size=max(sizes, default=1), smallest=smallest)

    # --- The optimiser
    total = dist.all_reduce_grads(params, total)
    grad_norm = torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()

    metrics = dict(zip(loss.metric_names, total.unbind(), strict=True))
    metrics["grad_norm"] = grad_norm.detach().to(total.dtype)
    return metrics


# --- The loop


def train(
    model: nn.Module,
    params: Sequence[nn.Parameter],
    examples: Sequence[TrainExample],
    loss: Loss,
    config: OptimizerConfig,
    hooks: TrainerHooks = TrainerHooks(),
    plan: BatchPlan | None = None,
    initial_metrics: Sequence[dict] = (),
) -> dict:
    """Train `params` in place, from the saved state if there is one; returns what was done.

    Args:
        model: whose `params` are trained; what else it has stays as it is.
        plan: the steps; None: those of `plan_batches`.
        initial_metrics: rows of metrics from before the first step.

    Returns:
        Counts of rows, steps and tokens, and the last metrics.

    Raises:
        UserError: there is nothing to train on, memory is too short, a loss or gradient is not
            finite, or the first gradient is zero.
    """
    if not examples:
        raise UserError(f"{hooks.name}: no row to train on is left")
    if plan is None:
        plan = plan_batches(examples, config, hooks, params[0].device.type)
    optimizer = torch.optim.AdamW(
        params,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    metrics = MetricLog(examples, plan, config, hooks)
    memory = training_memory_limit(hooks)
    state = TrainerState(optimizer, metrics, memory, hooks)

    # --- Go on from a saved state, or begin
    first_step = state.resume_on_all_ranks()
    if first_step == 0:
        metrics.rows += initial_metrics
    for row in metrics.rows:
        hooks.log_metrics(row)

    # --- Every step
    steps = len(plan.steps)
    with hooks.progress(steps, "step", first_step) as progress:
        for step in range(first_step, steps):
            optimizer.param_groups[0]["lr"] = config.lr_at(step)
            values = train_step(
                model,
                params,
                examples,
                plan.steps[step],
                loss,
                optimizer,
                progress=step / steps,
                packed=plan.packed,
                memory=memory,
                dist=hooks.dist,
            )
            metrics.add(values)

            done = step + 1
            if done % hooks.log_every == 0 or done == steps:
                metrics.report(done, optimizer.param_groups[0]["lr"], params[0].device.type)
            if done % hooks.save_every == 0 or hooks.should_stop():
                state.save(done)
                hooks.raise_if_stopped()
            progress.step()

    if hooks.metrics_file is not None and hooks.dist.is_main:
        write_rows(hooks.metrics_file, metrics.rows)
    # torch leaves an optimiser in a cycle of references: its moments would stay in memory until the
    # garbage collector comes
    optimizer.state.clear()
    return metrics.summary()


def training_memory_limit(hooks: TrainerHooks) -> MemoryLimit:
    """The padded tokens of a pass: every halving is told, as it may happen on this rank alone."""

    def on_halving(max_tokens: int) -> None:
        line = "out of memory: the step is done again with micro-batches of at most "
        hooks.dist.warn(f"{line}{max_tokens} tokens", hooks.log)

    def failure(max_tokens: int) -> UserError:
        remedy = "at one row or pair at a time; lower data.max_length"
        if hooks.dist.is_sharded:
            remedy = "in a forward pass; lower run.max_tokens_per_batch"
        return UserError(f"{hooks.name}: out of memory {remedy}")

    return MemoryLimit(on_halving, failure)


# --- Metrics


class MetricLog:
    """The metrics of the steps, which are copied from the device a few at a time, and checked."""

    def __init__(
        self,
        examples: Sequence[TrainExample],
        plan: BatchPlan,
        config: OptimizerConfig,
        hooks: TrainerHooks,
    ):
        self.examples = examples
        self.plan = plan
        self.hooks = hooks
        self.steps_per_epoch = steps_per_epoch(len(examples), config.batch)
        self.rows: list[dict] = []  # of metrics.jsonl; they have no times, to be reproducible
        self.names: list[str] = []
        # (metrics,) on the device, of every step since the last row
        self.pending: list[Tensor] = []
        self.tokens_after = self.count_tokens()
        self.last_time = time.monotonic()
        self.last_tokens = 0

    def count_tokens(self) -> list[int]:
        """Tokens that have been trained on after 0, 1, ... steps."""
        sizes = [example.tokens for example in self.examples]
        counts = [0]
        for micro_batches in self.plan.steps:
            step_tokens = 0
            for group in micro_batches:
                step_tokens += sum(sizes[number] for number in group)
            counts.append(counts[-1] + step_tokens)
        return counts

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Take the metrics of one more step; nothing waits for the device."""
        self.names = list(metrics)
        self.pending.append(torch.stack(list(metrics.values())))

    def read_pending(self, done: int) -> list[list[float]]:
        """The pending metrics of the steps up to `done`, on the CPU, after a check of each."""
        if not self.pending:
            return []
        values = torch.stack(self.pending).tolist()  # (steps, metrics)
        for step, step_values in enumerate(values, start=done - len(values)):
            self.check(step, step_values)
        return values

    def check(self, step: int, values: list[float]) -> None:
        """Raise UserError if the metrics of a step say that training has gone wrong."""
        grad_norm = values[-1]
        if not all(map(math.isfinite, values)):
            problem = "a loss or gradient is not finite"
            remedy = "lower the learning rate"
        elif step == 0 and grad_norm == 0:
            problem = "the gradient of the first step is zero, so nothing would be learned"
            remedy = (
                "see lora.alpha, dpo.beta and dpo.sft_weight, and whether the weights of the base "
                "are sound"
            )
        else:
            return
        numbers = [number for group in self.plan.steps[step] for number in group]
        ids = ", ".join(self.examples[number].id for number in numbers[:8])
        raise UserError(
            f"{self.hooks.name}, step {step + 1}: {problem} (rows {ids}, ...); {remedy}"
        )

    def report(self, done: int, lr: float, device: str) -> None:
        """Log the means over the steps since the last report, as one row."""
        # --- The row; it has no times, to be reproducible
        values = torch.tensor(self.read_pending(done), dtype=torch.float64)  # (steps, metrics)
        row = {"step": done, "epoch": round(done / self.steps_per_epoch, 4)}
        row |= zip(self.names, values.mean(0).tolist(), strict=True)
        row["lr"] = lr
        row["tokens"] = self.tokens_after[done]
        self.rows.append(row)

        # --- How fast the steps since the last report were
        now = time.monotonic()
        seconds = max(now - self.last_time, 1e-9)
        self.hooks.log_metrics(
            row,
            tokens_per_s=round((self.tokens_after[done] - self.last_tokens) / seconds),
            peak_mem_gb=round(peak_mb(device) / 1024, 3),
        )
        self.pending = []
        self.last_time = now
        self.last_tokens = self.tokens_after[done]

    def summary(self) -> dict:
        """Counts of the whole training, and the last loss and margin."""
        summary = {
            "rows": len(self.examples),
            "steps": len(self.plan.steps),
            "tokens": self.tokens_after[-1],
        }
        last_row = self.rows[-1] if self.rows else {}
        for name, value in last_row.items():
            if name in ("loss", "rewards/margins"):
                summary[name] = round(value, 4)
        return summary


# --- Stop and resume


@dataclass(slots=True)
class TrainerState:
    """Saves all that a training needs to go on to the same bits, and puts it back."""

    optimizer: torch.optim.Optimizer
    metrics: MetricLog
    memory: MemoryLimit
    hooks: TrainerHooks
    params: list[nn.Parameter] = field(init=False)

    def __post_init__(self):
        self.params = self.optimizer.param_groups[0]["params"]

    def save(self, done: int) -> None:
        """Write parameters, moments, and the metrics so far, whether reported or not.

        They are the same on all ranks; how far memory reaches may differ between them.
        """
        memory_limits = self.hooks.dist.gather(self.memory.limit)
        if self.hooks.state_file is None or not self.hooks.dist.is_main:
            return
        tensors = {}
        for number, param in enumerate(self.params):
            moments = self.optimizer.state[param]
            tensors[f"{number}.param"] = param.detach().cpu()
            tensors[f"{number}.step"] = moments["step"].cpu()
            tensors[f"{number}.exp_avg"] = moments["exp_avg"].cpu()
            tensors[f"{number}.exp_avg_sq"] = moments["exp_avg_sq"].cpu()
        notes = {
            "name": self.hooks.name,
            "step": done,
            "rows": self.metrics.rows,
            "names": self.metrics.names,
            "pending": self.metrics.read_pending(done),
            "memory_limits": memory_limits,
        }
        save_state(self.hooks.state_file, tensors, notes)

    def resume_on_all_ranks(self) -> int:
        """`resume` on every rank; UserError unless all of them are at the same step."""
        step = self.resume()
        if len(set(self.hooks.dist.gather(step))) > 1:
            raise UserError(
                f"{self.hooks.state_file}: not all ranks see the same training state; they need "
                "the same run folder"
            )
        return step

    def resume(self) -> int:
        """Put back what `save` wrote, if anything; returns how many steps are done."""
        path = self.hooks.state_file
        if path is None or not path.is_file():
            return 0
        tensors, notes = load_state(path)
        if notes.get("name") != self.hooks.name:
            raise UserError(
                f"{path}: is another stage's training state; delete it, and this stage trains anew"
            )

        # --- Parameters, copied in place since the model holds these very tensors, and moments
        for number, param in enumerate(self.params):
            param.data.copy_(tensors[f"{number}.param"])
            self.optimizer.state[param] = {
                "step": tensors[f"{number}.step"].to(param.device),
                "exp_avg": tensors[f"{number}.exp_avg"].to(param.device),
                "exp_avg_sq": tensors[f"{number}.exp_avg_sq"].to(param.device),
            }

        # --- Metrics, and how far memory reached; there may be more ranks than there were
        step = notes["step"]
        device = self.params[0].device
        self.metrics.rows = notes["rows"]
        self.metrics.names = notes["names"]
        self.metrics.pending = [torch.tensor(row, device=device) for row in notes["pending"]]
        self.metrics.last_tokens = self.metrics.tokens_after[step]
        if self.hooks.dist.rank < len(notes["memory_limits"]):
            self.memory.limit = notes["memory_limits"][self.hooks.dist.rank]
        self.hooks.log(f"resumed at step {step}")
        return step
