"""The one optimisation loop, for pre-training, SFT and DPO; exact under accumulation and resume.

Nothing in it is random (no dropout, a plan made before), so a state is parameters, moments and a step.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from minmacpo import UserError
from minmacpo.batching import Batch, collate, plan_steps, steps_per_epoch
from minmacpo.checkpoint import load_state, save_state
from minmacpo.files import write_rows
from minmacpo.losses import dpo_loss, masked_logps, sft_loss, sum_by_row
from minmacpo.machine import peak_mb
from minmacpo.run import Work
from minmacpo.tokenizer import Tokens

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of every parameter, beside the step
Measured = tuple[Tensor, list[Tensor]]  # a loss, and the values of its objective's metrics


@dataclass(frozen=True, slots=True)
class Unit:
    """One answer (one row), or a pair: row 0 is chosen, row 1 rejected. refs are their summed logps."""

    id: str
    rows: tuple[Tokens, ...]
    refs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """AdamW with cosine decay from `lr` to `floor` · lr over `steps`, clipped at norm 1."""

    lr: float
    steps: int
    batch: int
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def rate(self, step: int) -> float:
        """Learning rate of step 0 … steps - 1."""
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


@dataclass(frozen=True, slots=True)
class SftObjective:
    """Cross-entropy per trained token of the whole step."""

    compiled: bool = False
    metrics = ("loss",)

    def __call__(self, model, batch: Batch, refs: Tensor, units: int, tokens: int) -> Measured:
        loss = sft_loss(masked_logps(model, batch.tokens, batch.mask, self.compiled)[0], tokens)
        return loss, [loss.detach()]


@dataclass(frozen=True, slots=True)
class PairObjective:
    """mean over pairs of DPO + gamma · SFT on the chosen side; rows 2i chosen, 2i + 1 rejected.

    L = -log σ(β D) - γ · mean_m log π(c_m), D from summed logps (paper: DPO plus an SFT term).
    Without `contrast` (the -HN ablation) L is the SFT term alone, with weight 1.
    """

    beta: float
    gamma: float
    label_smoothing: float = 0.0
    contrast: bool = True
    compiled: bool = False
    metrics = ("loss", "dpo_loss", "sft_loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
               "rewards/accuracies", "logps/chosen", "logps/rejected")  # fmt: skip

    def __call__(self, model, batch: Batch, refs: Tensor, units: int, tokens: int) -> Measured:
        logps, rows = masked_logps(model, batch.tokens, batch.mask, self.compiled)
        chosen, rejected = sum_by_row(logps, rows, len(batch.tokens)).view(-1, 2).unbind(1)
        sft = -chosen / batch.mask[:, 1:].sum(1).view(-1, 2)[:, 0]
        dpo, up, down = dpo_loss(chosen, rejected, refs[:, 0], refs[:, 1], self.beta, self.label_smoothing)
        loss = (dpo + self.gamma * sft if self.contrast else sft).sum() / units
        values = [dpo, sft, up, down, up - down, (up > down).float(), chosen, rejected]
        return loss, [loss.detach()] + [value.detach().sum() / units for value in values]


def plan_of(units: Sequence[Unit], schedule: Schedule, work: Work) -> list[list[list[int]]]:
    """The steps that `fit` will take, each a list of micro-batches, each a list of units."""
    lengths = [max(len(row.ids) for row in unit.rows) for unit in units]
    each, budget = len(units[0].rows), work.run.config.run.micro_tokens
    return plan_steps(lengths, schedule.batch, schedule.steps, work.seed, each, budget)


def fit(model, params: list, units: Sequence[Unit], objective, schedule: Schedule, work: Work) -> dict:
    """Train `params` in place by `schedule`, from the work folder's state if it has one; returns counts.
    Writes metrics.jsonl (no times, so that it is reproducible) into the work folder. Raises UserError
    naming rows for a loss or gradient that is not finite, or a first gradient that is zero."""
    if not units:
        raise UserError(f"{work.name}: no row to train on is left")
    config, device = work.run.config.run, next(model.parameters()).device
    decay = schedule.weight_decay
    optimizer = torch.optim.AdamW(params, schedule.lr, schedule.betas, weight_decay=decay, fused=True)
    watch = Watch(work, units, objective, schedule, optimizer)
    plan, first = watch.plan, watch.resume()
    with work.progress(len(plan), "step", first) as progress:
        for done, groups in enumerate(plan[first:], first + 1):
            optimizer.param_groups[0]["lr"] = schedule.rate(done - 1)
            watch.pending.append(train_step(model, params, units, groups, objective, optimizer, device))
            saving = done % config.save_every == 0
            if done % config.log_every == 0 or done == len(plan) or saving:
                watch.report(done)
            if saving or work.stopping:
                watch.save(done)
                work.check()
            progress.step()
    watch.file.unlink(missing_ok=True)
    write_rows(work.folder / "metrics.jsonl", watch.rows)
    shown = ("loss", "rewards/margins")
    last = {k: round(v, 4) for row in watch.rows[-1:] for k, v in row.items() if k in shown}
    return {"rows": len(units), "steps": len(plan), "tokens": watch.tokens[-1]} | last


def train_step(model, params, units, groups: list[list[int]], objective, optimizer, device) -> Tensor:
    """One optimiser step over micro-batches `groups`; returns its metrics and gradient norm [n + 1].
    The denominators are those of the whole step, so accumulation equals one large batch."""
    tokens = sum(sum(row.mask) for group in groups for unit in group for row in units[unit].rows)
    count, total = sum(map(len, groups)), 0
    for group in groups:
        batch = collate([row for unit in group for row in units[unit].rows], device)
        refs = torch.tensor([units[unit].refs for unit in group], device=device)
        loss, values = objective(model, batch, refs, count, tokens)
        loss.backward()
        total = total + torch.stack(values)
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return torch.cat((total, norm.detach()[None].to(total.dtype)))


class Watch:
    """Reads the metrics of several steps at once, stops a run that has gone wrong, saves and resumes."""

    def __init__(self, work: Work, units: Sequence[Unit], objective, schedule: Schedule, optimizer):
        self.work, self.units, self.schedule, self.optimizer = work, units, schedule, optimizer
        self.plan, self.names = plan_of(units, schedule, work), (*objective.metrics, "grad_norm")
        self.file, self.params = work.folder / "state.safetensors", optimizer.param_groups[0]["params"]
        self.rows: list[dict] = []  # of metrics.jsonl
        self.pending: list[Tensor] = []  # [n] on the device, of every step since the last report
        sizes = [sum(len(row.ids) for row in unit.rows) for unit in units]
        each = (sum(sizes[unit] for group in groups for unit in group) for groups in self.plan)
        self.tokens = list(accumulate(each, initial=0))  # trained on after so many steps
        self.clock, self.clock_tokens = time.monotonic(), 0

    def checked(self, done: int) -> list[list[float]]:
        """The metrics [steps][n] not yet reported after `done` steps; one that is not sound ends the run."""
        values = torch.stack(self.pending).tolist() if self.pending else []
        for step, row in enumerate(values, done - len(values)):
            problem = None if all(map(math.isfinite, row)) else "a loss or gradient is not finite"
            if step == 0 and row[-1] == 0 and not problem:
                problem = "the gradient of the first step is zero, so nothing would be learned"
            if problem:
                rows = ", ".join([self.units[unit].id for group in self.plan[step] for unit in group][:8])
                where = f"{self.work.name}, step {step + 1}"
                raise UserError(f"{where}: {problem} (rows {rows}, ...); lower the learning rate")
        return values

    def report(self, done: int) -> None:
        """Read the steps since the last report, check them, and write their mean as one line."""
        means = torch.tensor(self.checked(done), dtype=torch.float64).mean(0).tolist()
        tokens, now = self.tokens[done], time.monotonic()
        epoch = done / steps_per_epoch(len(self.units), self.schedule.batch)
        row = {"step": done, "epoch": round(epoch, 4)} | dict(zip(self.names, means, strict=True))
        self.rows.append(row | {"lr": self.schedule.rate(done - 1), "tokens": tokens})
        speed = (tokens - self.clock_tokens) / max(now - self.clock, 1e-9)
        self.work.metrics(self.rows[-1], tokens_per_s=round(speed), peak_mem_gb=round(peak_mb() / 1024, 3))
        self.pending, self.clock, self.clock_tokens = [], now, tokens

    def save(self, done: int) -> None:
        """Write parameters, moments and the metrics so far, reported or not."""
        tensors, notes = {}, {"step": done, "rows": self.rows, "pending": self.checked(done)}
        for index, param in enumerate(self.params):
            kept = {"param": param.detach()} | {name: self.optimizer.state[param][name] for name in MOMENTS}
            tensors |= {f"{index}.{name}": tensor.cpu() for name, tensor in kept.items()}
        save_state(self.file, tensors, notes)

    def resume(self) -> int:
        """Put back what `save` wrote, if anything; returns the step to go on with."""
        if not (found := load_state(self.file)):
            return 0
        tensors, notes = found
        step, device = notes["step"], self.params[0].device
        for index, param in enumerate(self.params):
            param.data.copy_(tensors[f"{index}.param"])
            moments = {name: tensors[f"{index}.{name}"].to(device) for name in MOMENTS}
            self.optimizer.state[param] = {"step": torch.tensor(float(step), device=device)} | moments
        self.rows, self.clock_tokens = notes["rows"], self.tokens[step]
        self.pending = [torch.tensor(values, device=device) for values in notes["pending"]]
        for row in self.rows:
            self.work.metrics(row)
        self.work.log(f"resumed at step {step}")
        return step
