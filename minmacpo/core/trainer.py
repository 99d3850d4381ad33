"""The one optimisation loop, for pre-training, SFT and DPO; exact under accumulation and resume.

Nothing in it is random (no dropout, a plan made before), so a state is parameters, moments and a step.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from minmacpo import UserError
from minmacpo.core.batching import (
    collate,
    halved,
    limits,
    plan_steps,
    steps_per_epoch,
    worth_sharing,
)
from minmacpo.core.checkpoint import load_state, save_state
from minmacpo.data.tokenizer import Tokens
from minmacpo.pipeline.run import StageContext
from minmacpo.runtime.device import normalize_oom, peak_mb, resolve_device
from minmacpo.runtime.distributed import SINGLE_PROCESS, Distributed
from minmacpo.runtime.files import write_rows

KEPT = ("param", "step", "exp_avg", "exp_avg_sq")  # a parameter, and what AdamW keeps of it


@dataclass(frozen=True, slots=True)
class TrainExample:
    """One answer (one row), or a pair: row 0 is chosen, row 1 rejected. refs are their summed logps, and the
    pair's weight where pairs have weights."""

    id: str
    rows: tuple[Tokens, ...]
    refs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW with cosine decay from `lr` to `floor` · lr over `steps`, clipped at norm 1."""

    lr: float
    steps: int
    batch: int
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def rate(self, step: int) -> float:
        """Learning rate of step 0 … steps - 1."""
        return self.lr * (
            self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        )


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The steps that `fit` takes, each a list of micro-batches, each a list of units; `share`: see batching.collate."""

    steps: list[list[list[int]]]
    share: bool = False


def plan_of(
    units: Sequence[TrainExample],
    schedule: OptimizerConfig,
    work: StageContext,
    close: bool = False,
) -> list[list[list[int]]]:
    """The steps of `schedule`; `close`: see batching.limits."""
    lengths = [max(len(row.ids) for row in unit.rows) for unit in units]
    config = work.run.config
    budget, alike = limits(
        config.run.max_tokens_per_batch, resolve_device(config.run.device), close
    )
    return plan_steps(
        lengths, schedule.batch, schedule.steps, work.seed, budget // len(units[0].rows), alike
    )


def make_plan(
    units: Sequence[TrainExample], schedule: OptimizerConfig, work: StageContext
) -> BatchPlan:
    """`plan_of` rows of like length; padding and prompts in common are left out where that saves enough, and the log says how much."""
    steps = plan_of(units, schedule, work, close=True) if units else []
    first = steps[: steps_per_epoch(len(units), schedule.batch)]
    worth, words = worth_sharing(
        [row for unit in group for row in units[unit].rows] for groups in first for group in groups
    )
    work.log(words)
    return BatchPlan(steps, worth)


class MicroBatcher:
    """How this rank's micro-batches are cut: in two `times`, and once more whenever memory is short."""

    def __init__(self, work: StageContext):
        self.work, self.times = work, 0

    def share(self, groups: list[list[int]]) -> list[list[int]]:
        """This rank's micro-batches of a step, as small as was needed so far."""
        mine = self.work.dist.split_batches(groups)
        for _ in range(
            0 if self.work.dist.is_sharded else self.times
        ):  # there all ranks have equally many passes
            mine = halved(mine)
        return mine

    def again(self, mine: list[list[int]]) -> list[list[int]]:
        """Micro-batches half as large, for which memory may do; UserError if there are none."""
        if self.work.dist.is_sharded:  # others wait for this rank's next pass
            raise UserError(f"{self.work.name}: out of memory; lower run.max_tokens_per_batch")
        if max(map(len, mine), default=1) == 1:
            raise UserError(
                f"{self.work.name}: out of memory at one row or pair at a time; lower data.max_length"
            )
        self.times += 1
        most = self.work.run.config.run.max_tokens_per_batch >> self.times
        told = f"out of memory: the step is done again with micro-batches of {most} tokens at most"
        self.work.dist.warn(told, self.work.log)
        return halved(mine)


def fit(
    model,
    params: list,
    units: Sequence[TrainExample],
    objective,
    schedule: OptimizerConfig,
    work: StageContext,
    rows: Sequence[dict] = (),
    planned: BatchPlan | None = None,
) -> dict:
    """Train `params` in place by `schedule`, from the stage's saved state if there is one; returns counts. `planned`: None:
    as `plan_of` says.
    Writes metrics.jsonl (`rows`, then no times, so that it is reproducible) into the work folder. Raises
    UserError with_path rows for a loss or gradient that is not finite, or a first gradient that is zero."""
    if not units:
        raise UserError(f"{work.name}: no row to train on is left")
    planned = planned or BatchPlan(plan_of(units, schedule, work))
    config, plan, decay = work.run.config.run, planned.steps, schedule.weight_decay
    optimizer = torch.optim.AdamW(
        params, schedule.lr, schedule.betas, weight_decay=decay, fused=True
    )
    cut = MicroBatcher(work)
    watch = Watch(
        work, units, plan, optimizer, objective, steps_per_epoch(len(units), schedule.batch), cut
    )
    first = watch.resume()
    if len({*work.dist.gather(first)}) > 1:
        raise UserError(
            f"{watch.file}: not all ranks see the same training state; they need the same run folder"
        )
    if not first:  # a resumed training has them in its state
        watch.rows += rows
        for row in rows:
            work.log_metrics(row)
    with work.progress(len(plan), "step", first) as progress:
        for done, groups in enumerate(plan[first:], first + 1):
            optimizer.param_groups[0]["lr"] = schedule.rate(done - 1)
            watch.pending.append(
                train_step(
                    model,
                    params,
                    units,
                    groups,
                    objective,
                    optimizer,
                    (done - 1) / len(plan),
                    planned.share,
                    cut.share(groups),
                    work.dist,
                    cut.again,
                )
            )
            if done % config.log_every == 0 or done == len(plan):
                watch.report(done)
            if done % config.save_every == 0 or work.should_stop:
                watch.save(done)
                work.raise_if_stopped()
            progress.step()
    if work.dist.is_main:
        write_rows(work.folder / "metrics.jsonl", watch.rows)
    optimizer.state.clear()  # torch leaves an optimiser in a cycle of references: its moments would stay until the collector comes
    shown = ("loss", "rewards/margins")
    last = {k: round(v, 4) for row in watch.rows[-1:] for k, v in row.items() if k in shown}
    return {"rows": len(units), "steps": len(plan), "tokens": watch.tokens[-1]} | last


def train_step(
    model,
    params,
    units: Sequence[TrainExample],
    groups: list[list[int]],
    objective,
    optimizer,
    progress: float = 1.0,
    share: bool = False,
    mine: list[list[int]] | None = None,
    dist: Distributed = SINGLE_PROCESS,
    again: Callable | None = None,
) -> Tensor:
    """One optimiser step over micro-batches `groups`, of which this rank does `mine`, or where memory is short what `again`
    makes of them; returns its metrics and gradient norm [n + 1]."""
    mine = groups if mine is None else mine
    while True:
        try:
            with normalize_oom():
                total = add_gradients(
                    model, params[0].device, units, groups, mine, objective, progress, share
                )
            break
        except torch.OutOfMemoryError:
            if again is None:
                raise
        optimizer.zero_grad()  # outside of the handler, whose traceback holds the tensors of the pass
        mine = again(mine)
    total = dist.all_reduce_grads(params, total)
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return torch.cat((total, norm.detach()[None].to(total.dtype)))


def add_gradients(
    model,
    device: torch.device,
    units: Sequence[TrainExample],
    groups: list[list[int]],
    mine: list[list[int]],
    objective,
    progress: float,
    share: bool,
) -> Tensor:
    """The passes of a step over the micro-batches `mine`, forward and backward; returns the sums of its metrics [n]. The
    denominators are those of the whole step `groups`, so accumulation, and ranks, equal one large batch."""
    tokens = sum(sum(row.mask) for group in groups for unit in group for row in units[unit].rows)
    count, total = sum(map(len, groups)), torch.zeros(len(objective.metrics), device=device)
    for group in mine:
        rows = group or groups[0][:1]  # of an empty one nothing counts, see Distributed.share
        batch = collate([row for unit in rows for row in units[unit].rows], device, share)
        refs = torch.tensor([units[unit].refs for unit in rows]).to(device, non_blocking=True)
        loss, values = objective(model, batch, refs, count, tokens, progress)
        (loss if group else 0 * loss).backward()
        total = total + torch.stack(values) if group else total
    return total


class Watch:
    """Reads the metrics of several steps at once, stops a run that has gone wrong, logs, saves and resumes.
    The state lies beside the work folder, so that it lasts until `Run.provide` has sealed the stage."""

    def __init__(
        self,
        work: StageContext,
        units: Sequence[TrainExample],
        plan: list,
        optimizer,
        objective,
        per_epoch: int,
        cut: MicroBatcher,
    ):
        self.work, self.units, self.plan, self.optimizer, self.cut = (
            work,
            units,
            plan,
            optimizer,
            cut,
        )
        self.names, self.per_epoch = (*objective.metrics, "grad_norm"), per_epoch
        self.file = work.folder.with_name(f"state-{work.folder.name}") / "state.safetensors"
        self.rows: list[dict] = []  # of metrics.jsonl
        self.pending: list[Tensor] = []  # [n] on the device, of every step since the last row
        sizes = [sum(len(row.ids) for row in unit.rows) for unit in units]
        each = (sum(sizes[unit] for group in groups for unit in group) for groups in plan)
        self.tokens = list(accumulate(each, initial=0))  # trained on after so many steps
        self.clock, self.clock_tokens = time.monotonic(), 0

    def read(self, done: int) -> list[list[float]]:
        """The pending metrics [steps][n], `done` the last step; UserError with_path the rows of an unsound one."""
        values = torch.stack(self.pending).tolist() if self.pending else []
        for step, row in enumerate(values, done - len(values)):
            problem, remedy = None, ""
            if not all(map(math.isfinite, row)):
                problem, remedy = "a loss or gradient is not finite", "lower the learning rate"
            elif step == 0 and row[-1] == 0:
                problem = "the gradient of the first step is zero, so nothing would be learned"
                remedy = "see lora.alpha, dpo.beta and dpo.sft_weight, and whether the weights of the base are sound"
            if problem:
                rows = ", ".join(
                    [self.units[unit].id for group in self.plan[step] for unit in group][:8]
                )
                raise UserError(
                    f"{self.work.name}, step {step + 1}: {problem} (rows {rows}, ...); {remedy}"
                )
        return values

    def report(self, done: int) -> None:
        """The mean of the steps since the last report, as one line."""
        means = torch.tensor(self.read(done), dtype=torch.float64).mean(0).tolist()
        now, tokens = time.monotonic(), self.tokens[done]
        row = {"step": done, "epoch": round(done / self.per_epoch, 4)} | dict(
            zip(self.names, means, strict=True)
        )
        self.rows.append(row | {"lr": self.optimizer.param_groups[0]["lr"], "tokens": tokens})
        speed = round((tokens - self.clock_tokens) / max(now - self.clock, 1e-9))
        self.work.log_metrics(
            self.rows[-1],
            tokens_per_s=speed,
            peak_mem_gb=round(peak_mb(resolve_device(self.work.run.config.run.device)) / 1024, 3),
        )
        self.pending, self.clock, self.clock_tokens = [], now, tokens

    def save(self, done: int) -> None:
        """Write parameters, moments and the metrics so far, reported or not, which are the same on all ranks, and every rank's cut."""
        cuts = self.work.dist.gather(self.cut.times)
        if not self.work.dist.is_main:
            return
        tensors = {}
        for index, param in enumerate(self.optimizer.param_groups[0]["params"]):
            kept = self.optimizer.state[param] | {"param": param.detach()}
            tensors |= {f"{index}.{name}": kept[name].cpu() for name in KEPT}
        notes = {
            "stage": self.work.folder.name,
            "step": done,
            "rows": self.rows,
            "pending": self.read(done),
            "cuts": cuts,
        }
        save_state(self.file, tensors, notes)

    def resume(self) -> int:
        """Put back what `save` wrote, if anything; returns the step to go on with."""
        if not self.file.is_file():
            return 0
        tensors, notes = load_state(self.file)
        if notes.get("stage") != self.work.folder.name:
            raise UserError(
                f"{self.file}: is another stage's training state; delete it, and this stage trains anew"
            )
        for index, param in enumerate(self.optimizer.param_groups[0]["params"]):
            kept = {name: tensors[f"{index}.{name}"].to(param.device) for name in KEPT}
            param.data.copy_(kept.pop("param"))
            self.optimizer.state[param] = kept
        self.rows, self.clock_tokens = notes["rows"], self.tokens[notes["step"]]
        self.cut.times = dict(enumerate(notes["cuts"])).get(
            self.work.dist.rank, 0
        )  # there may be more ranks than there were
        self.pending = [torch.tensor(values, device=param.device) for values in notes["pending"]]
        for row in self.rows:
            self.work.log_metrics(row)
        self.work.log(f"resumed at step {notes['step']}")
        return notes["step"]
