"""How many stages of a run are computed side by side, and how long each may take."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minmacpo.cli.dry_run import free_memory
from minmacpo.cli.plan import Plan
from minmacpo.pipeline.prepare_data import PreparedData
from minmacpo.pipeline.run import Run
from minmacpo.runtime.device import physical_cores, process_bytes, resolve_device
from minmacpo.runtime.progress import gigabytes

# What a token costs by kind of pass, in forward passes over it: training goes backward too, and a
# sampled token is computed by itself
TOKEN_COSTS = {"pretrain": 3.0, "train": 3.0, "score": 1.0, "sample": 2.0}


@dataclass(frozen=True, slots=True)
class WorkerCount:
    """How many processes compute stages, and a sentence where these are fewer than asked for."""

    count: int
    warning: str = ""


def count_workers(run: Run, prepare: Callable[[], PreparedData]) -> WorkerCount:
    """As many worker processes as run.workers says, or fewer where they cannot work."""
    asked = run.config.run.workers
    on_gpu = resolve_device(run.config.run.device) == "cuda"
    wanted = asked
    if asked == "auto" and on_gpu:
        wanted = torch.cuda.device_count()
    elif asked == "auto":
        threads = run.config.run.threads or physical_cores()  # 0: torch takes all cores
        wanted = max(1, physical_cores() // threads)
    if wanted == 1:
        return WorkerCount(1)

    # --- What allows one alone
    reason = why_one(run)
    count = 1

    # --- A GPU for each, or memory: each of them may have to compute the largest stage
    if not reason and on_gpu:
        count = min(wanted, torch.cuda.device_count())
        reason = "each needs a GPU of its own"
    elif not reason:
        free = free_memory(Plan(run, None))
        need = largest_need(Plan(run, None))
        if wanted * need > free:  # rows as long as the settings allow; the real ones may be shorter
            need = largest_need(Plan(run, prepare()))
        count = max(1, min(wanted, free // need))
        reason = f"{gigabytes(free)} of memory are free, and one of them may need {gigabytes(need)}"

    if count == wanted or asked == "auto":
        return WorkerCount(count)
    return WorkerCount(count, f"run.workers = {asked} is lowered to {count}: {reason}")


def why_one(run: Run) -> str:
    """Why only one process can compute the stages; empty if several can."""
    if run.dist.world_size > 1:
        return "under torchrun all processes compute one stage together"
    if run.only:
        return "--stage computes one stage"
    if run.profile:
        return "--profile looks at one process"
    return ""


def largest_need(plan: Plan) -> int:
    """Bytes of a process that computes the largest unfinished stage."""
    largest = 0
    for name, stage in plan.run.plan.items():
        memory = plan.memory(name)
        if memory is not None and not stage.finished:
            largest = max(largest, memory.total)
    return largest + process_bytes()


def stage_costs(run: Run) -> dict[str, float]:
    """About how long each stage takes, in an unknown unit: tokens times weights."""
    plan = Plan(run, None)
    costs = {}
    for name in run.plan:
        workload = plan.workload(name)
        if workload is not None:
            model = workload.model
            layer = model.hidden_size * (4 * model.hidden_size + 3 * model.intermediate_size)
            weights = model.num_hidden_layers * layer + model.vocab_size * model.hidden_size
            token_cost = TOKEN_COSTS[workload.largest_pass.kind]
            costs[name] = token_cost * workload.tokens * weights
    return costs
