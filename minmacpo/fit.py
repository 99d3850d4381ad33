"""The one optimisation loop, for pre-training, SFT and DPO; exact under accumulation and resume.

It takes units (one row, or a chosen and a rejected row), a plan and an objective. Nothing in it is
random: the plan was made before, there is no dropout. So a state is parameters, moments and a step.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minmacpo import UserError
from minmacpo.batching import Batch, collate, plan_steps
from minmacpo.checkpoint import load_state, save_state
from minmacpo.files import write_rows
from minmacpo.losses import dpo_loss, masked_logps, sft_loss, sum_by_row
from minmacpo.machine import peak_mb
from minmacpo.run import Work
from minmacpo.tokenizer import Tokens


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

    def __call__(self, model, batch: Batch, refs: Tensor, units: int, tokens: int) -> tuple[Tensor, list[Tensor]]:
        logps, _ = masked_logps(model, batch.tokens, batch.mask, self.compiled)
        loss = sft_loss(logps, tokens)
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
    metrics = (
        "loss", "dpo_loss", "sft_loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
        "rewards/accuracies", "logps/chosen", "logps/rejected",
    )  # fmt: skip

    def __call__(self, model, batch: Batch, refs: Tensor, units: int, tokens: int) -> tuple[Tensor, list[Tensor]]:
        logps, rows = masked_logps(model, batch.tokens, batch.mask, self.compiled)
        chosen, rejected = sum_by_row(logps, rows, len(batch.tokens)).view(-1, 2).unbind(1)
        lengths = batch.mask[:, 1:].sum(1).view(-1, 2)[:, 0]
        sft = -chosen / lengths
        dpo, up, down = dpo_loss(chosen, rejected, refs[:, 0], refs[:, 1], self.beta, self.label_smoothing)
        loss = (dpo + self.gamma * sft if self.contrast else sft).sum() / units
        values = [dpo, sft, up, down, up - down, (up > down).float(), chosen, rejected]
        return loss, [loss.detach()] + [value.detach().sum() / units for value in values]


def fit(
    model, params: Sequence[Tensor], units: Sequence[Unit], objective, schedule: Schedule, work: Work
) -> dict:
    """Train `params` in place by `schedule`; returns counts. Resumes from the work folder's state.

    Writes metrics.jsonl (no times, so that it is reproducible) into the work folder. Raises
    UserError naming rows for a loss or gradient that is not finite, or a gradient that is zero.
    """
    config, device = work.run.config.run, next(model.parameters()).device
    if not units:
        raise UserError(f"{work.name}: no row to train on is left")
    lengths = [max(len(row.ids) for row in unit.rows) for unit in units]
    plan = plan_steps(lengths, schedule.batch, schedule.steps, work.seed, len(units[0].rows), config.micro_tokens)
    optimizer = torch.optim.AdamW(
        params, lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay, fused=True
    )
    watch = Watch(work, units, plan, objective.metrics, schedule, device)
    first = resume(work, params, optimizer, watch)
    with work.progress(len(plan), "step", first) as progress:
        for step in range(first, len(plan)):
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            watch.note(step, train_step(model, params, units, plan[step], objective, optimizer, device))
            last, saving = step + 1 == len(plan), (step + 1) % config.save_every == 0
            if (step + 1) % config.log_every == 0 or last or saving:
                watch.report(step)
            if saving or work.stopping:
                save(work, params, optimizer, watch, step + 1)
                work.check()
            progress.step()
    (work.folder / "state.safetensors").unlink(missing_ok=True)
    return watch.finish(lengths)


def train_step(model, params, units, groups: list[list[int]], objective, optimizer, device) -> Tensor:
    """One optimiser step over micro-batches `groups`; returns its metrics and gradient norm [n + 1].

    The denominators are those of the whole step, so accumulation equals one large batch.
    """
    rows = [row for group in groups for unit in group for row in units[unit].rows]
    tokens = sum(sum(row.mask) for row in rows)
    count = sum(map(len, groups))
    total = 0
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
    """Sums metrics on the device, reads them at intervals, and stops a run that has gone wrong."""

    def __init__(self, work: Work, units, plan, names: Sequence[str], schedule: Schedule, device):
        self.work, self.units, self.plan, self.schedule = work, units, plan, schedule
        self.names = (*names, "grad_norm")
        self.rows: list[dict] = []
        self.pending: list[Tensor] = []
        self.epoch_steps = -(-len(units) // schedule.batch)
        self.tokens = 0
        self.clock, self.clock_tokens = time.monotonic(), 0

    def note(self, step: int, values: Tensor) -> None:
        """Keep one step's metrics [n] without reading them."""
        self.pending.append(values)
        self.tokens += sum(len(row.ids) for group in self.plan[step] for unit in group for row in self.units[unit].rows)

    def report(self, step: int) -> None:
        """Read the steps since the last report, check them, and write their mean as one line."""
        if not self.pending:
            return
        values, self.pending = self.checked(step), []
        means = dict(zip(self.names, values.double().mean(0).tolist(), strict=True))
        row = {"step": step + 1, "epoch": round((step + 1) / self.epoch_steps, 4)}
        row |= means | {"lr": self.schedule.rate(step), "tokens": self.tokens}
        self.rows.append(row)
        now = time.monotonic()
        rate = (self.tokens - self.clock_tokens) / max(now - self.clock, 1e-9)
        self.clock, self.clock_tokens = now, self.tokens
        self.work.metrics(row, tokens_per_s=round(rate), peak_mem_gb=round(peak_mb() / 1024, 3))

    def checked(self, step: int) -> Tensor:
        """The metrics [steps, n] not yet reported, up to `step`; a value that is not sound ends the run."""
        values = torch.stack(self.pending) if self.pending else torch.empty(0, len(self.names))
        start = step + 1 - len(values)
        for offset, finite in enumerate(values.isfinite().all(1).tolist()):
            if not finite:
                self.stop(start + offset, "a loss or gradient is not finite")
        if start == 0 and len(values) and values[0, -1] == 0:
            self.stop(0, "the gradient of the first step is zero, so nothing would be learned")
        return values

    def stop(self, step: int, problem: str) -> None:
        """End the run, naming the rows of the step."""
        rows = ", ".join([self.units[unit].id for group in self.plan[step] for unit in group][:8])
        raise UserError(f"{self.work.name}, step {step + 1}: {problem} (rows {rows}, ...); lower the learning rate")

    def finish(self, lengths: Sequence[int]) -> dict:
        """Write metrics.jsonl and return the stage's counts."""
        write_rows(self.work.folder / "metrics.jsonl", self.rows)
        last = {k: round(v, 4) for k, v in self.rows[-1].items() if k in ("loss", "rewards/margins")} if self.rows else {}
        return {"rows": len(self.units), "steps": len(self.plan), "tokens": self.tokens} | last


def save(work: Work, params, optimizer, watch: Watch, step: int) -> None:
    """Write parameters, moments and the metrics so far, reported or not."""
    tensors, pending = {}, watch.checked(step - 1).tolist()
    for index, param in enumerate(params):
        state = optimizer.state[param]
        tensors |= {
            f"{index}.param": param.detach().cpu(),
            f"{index}.exp_avg": state["exp_avg"].cpu(),
            f"{index}.exp_avg_sq": state["exp_avg_sq"].cpu(),
        }
    notes = {"step": step, "rows": watch.rows, "tokens": watch.tokens, "pending": pending}
    save_state(work.folder / "state.safetensors", tensors, notes)


def resume(work: Work, params, optimizer, watch: Watch) -> int:
    """Put back what `save` wrote, if anything; returns the step to go on with."""
    found = load_state(work.folder / "state.safetensors")
    if found is None:
        return 0
    tensors, notes = found
    for index, param in enumerate(params):
        param.data.copy_(tensors[f"{index}.param"])
        optimizer.state[param] = {
            "step": torch.tensor(float(notes["step"]), device=param.device),
            "exp_avg": tensors[f"{index}.exp_avg"].to(param.device),
            "exp_avg_sq": tensors[f"{index}.exp_avg_sq"].to(param.device),
        }
    watch.rows, watch.tokens = notes["rows"], notes["tokens"]
    watch.pending = [torch.tensor(values, device=params[0].device) for values in notes["pending"]]
    watch.clock_tokens = watch.tokens
    for row in watch.rows:
        work.metrics(row)
    work.log(f"resumed at step {notes['step']}")
    return notes["step"]
