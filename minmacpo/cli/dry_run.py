"""What is said of a run before it starts: its stages, and whether they fit into memory."""

import sys
from collections.abc import Callable

import torch

from minmacpo import UserError
from minmacpo.cli.plan import Plan
from minmacpo.config.parse import to_toml
from minmacpo.config.schema import Config
from minmacpo.core.memory_estimate import MemoryEstimate
from minmacpo.core.prepack import multiplies_bf16
from minmacpo.data.own_template import template_warning
from minmacpo.data.splits import TOO_FEW
from minmacpo.pipeline.prepare_data import PreparedData, base_templates, model_dirs
from minmacpo.pipeline.run import Run
from minmacpo.runtime.device import free_bytes, process_bytes, resolve_device, resolve_dtype
from minmacpo.runtime.progress import escape_control_chars, gigabytes, thousands

NOTES = """\
tokens: without padding. "<=": at most; an answer that is not sampled yet counts as
    generate.max_new_tokens tokens.
memory: at the peak of a stage, with its own base alone; an estimate, good to about 30 %."""


def show_plan(run: Run, prepare: Callable[[], PreparedData]) -> None:
    """Print the dry run: settings, rows, and the stages with the work that is left."""
    process = process_bytes()  # before the texts are read
    prepared = prepare()
    plan = Plan(run, prepared)
    if plan.device != "cpu":
        process = 0  # it takes none of the device's memory

    # --- A line for each stage, and what all of them come to
    total_tokens = 0
    most_memory = 0
    most_memory_stage = ""
    lines = []
    for number, (name, stage) in enumerate(run.plan.items(), start=1):
        notes = [stage.summary] if stage.summary else []
        workload = plan.workload(name)
        if stage.finished:
            notes = ["finished"]
        elif workload is not None:
            memory = plan.memory(name).total + process
            sign = "" if workload.exact else "<= "
            notes.append(f"{sign}{thousands(workload.tokens)} tokens, {gigabytes(memory)}")
            total_tokens += workload.tokens
            if memory > most_memory:
                most_memory, most_memory_stage = memory, name
        lines.append(f"{number:4} {name:32} {stage.kind:12} {'; '.join(notes)}".rstrip())

    # --- Settings, rows, stages
    print(escape_control_chars(to_toml(run.config)))
    for name, count in prepared.counts.items():
        print(f"{name}: {count}")
    for line in describe_templates(run.config):
        print(escape_control_chars(line))
    if total_tokens:
        print(
            f"\nin all <= {thousands(total_tokens)} tokens; "
            f"at most {gigabytes(most_memory)} of memory, in {most_memory_stage}\n{NOTES}"
        )
    print(f"\n{len(lines)} stages in {run.path}:", *lines, sep="\n", flush=True)
    for line in run.reuse_lines():
        print(escape_control_chars(line), flush=True)

    # --- What is odd, or will not work; on stderr
    warnings = hints(run) + prepared.warnings + few_rows(run.config, prepared)
    memory_problem = find_memory_problem(plan, free_memory(plan))
    if memory_problem is not None:
        warnings.append(memory_problem)
    for warning in warnings:
        print(f"WARNING: {escape_control_chars(warning)}", file=sys.stderr)


def check_before_start(run: Run, prepare: Callable[[], PreparedData]) -> None:
    """Raise UserError for bad data or too little memory, before there is a run folder."""
    made_of_texts = [
        stage for name, stage in run.plan.items() if name.startswith(("data/", "bases/"))
    ]
    if not all(stage.finished for stage in made_of_texts):
        prepare()
    check_memory(run, prepare)


def check_memory(run: Run, prepare: Callable[[], PreparedData]) -> None:
    """Raise UserError if a stage needs more memory than there is, however rough the estimate.

    The texts are read only where rows as long as the settings allow would not fit.
    """
    plan = Plan(run, prepared=None)  # texts as long as the settings allow
    free = free_memory(plan)
    if find_memory_problem(plan, free) is None:
        return
    problem = find_memory_problem(Plan(run, prepare()), free)
    if problem is not None:
        raise UserError(problem)


def free_memory(plan: Plan) -> int:
    """Bytes of the device's memory that this rank may take."""
    return free_bytes(plan.device) // plan.run.dist.ranks_per_device


def find_memory_problem(plan: Plan, free: int) -> str | None:
    """One sentence about the first unfinished stage that cannot fit; None if all may."""
    run = plan.run
    for name, stage in run.plan.items():
        if stage.finished or run.only not in (None, name):
            continue
        memory = plan.memory(name)
        if memory is None or memory.fits(free):
            continue
        if run.config.run.checkpoint != "false":
            recomputing = plan.memory(name, recompute=True)  # what the training would do there
            memory = min(memory, recomputing, key=lambda estimate: estimate.total)
        if not memory.fits(free):
            return (
                f"{name} needs about {gigabytes(memory.total)} of memory, of which "
                f"{gigabytes(free)} are free on the {plan.device}; {advice(plan, name, memory)}"
            )
    return None


def advice(plan: Plan, name: str, memory: MemoryEstimate) -> str:
    """What to change, by what takes most of the memory."""
    config = plan.config
    parts = {
        "weights": memory.weights + memory.learning,
        "passes": memory.activations + memory.working,
        "cache": memory.cache,
    }
    largest = max(parts, key=parts.get)

    # What holds the base as it is, and what would make it smaller
    if largest == "weights":
        changes = []
        if plan.dtype == torch.float32 and plan.kind(name) != "pretrain":
            changes.append("--run.dtype=bfloat16")
        if plan.kind(name) != "pretrain" and not config.parallel.shard:
            changes.append("--model.quantize=int8 or nf4 (of teachers: --model.quantize_teachers)")
        changes.append("a smaller base")
        return f"most of it are weights: take {', or '.join(changes)}"

    # Fewer texts side by side; where that is one already, a shorter one
    if largest == "cache" or plan.kind(name) == "sample":
        return f"lower generate.batch = {config.generate.batch}"
    if plan.workload(name).largest_pass.rows > 1:
        return f"lower run.max_tokens_per_batch = {config.run.max_tokens_per_batch}"
    return f"lower data.max_length = {config.data.max_length}"


def few_rows(config: Config, prepared: PreparedData) -> list[str]:
    """A warning where the test split is too small for its numbers to mean anything."""
    count = len(prepared.splits["test"])
    if config.data.path is None or count >= TOO_FEW:
        return []
    return [
        f"the test split has {count} rows, which are too few to tell agents apart "
        f"(at least {TOO_FEW}); see data.shares and data.test"
    ]


def describe_templates(config: Config) -> list[str]:
    """Which template each given base has, where it was found in its folder."""
    if "own" not in config.data.template or not model_dirs(config):
        return []
    templates = base_templates(config)
    found = ", ".join(f"{base} {templates[base]}" for base in model_dirs(config))
    return [f"templates of the given bases: {found}"]


def hints(run: Run) -> list[str]:
    """What is odd about the settings, though it works: sharding, dtype and chat templates."""
    config = run.config
    warnings = []
    if config.parallel.shard and run.dist.world_size == 1:
        warnings.append("parallel.shard divides nothing without torchrun")
    on_cpu = resolve_device(config.run.device) == "cpu"
    dtype = resolve_dtype(config.run.dtype, config.run.device)
    if on_cpu and dtype == torch.bfloat16 and not multiplies_bf16():
        warnings.append(
            "this CPU has no products in bfloat16 that oneDNN uses; run.dtype=float32 may be "
            "several times faster"
        )

    templates = base_templates(config)
    given = {(folder, templates[base]) for base, folder in model_dirs(config).items()}
    for folder, template in sorted(given):
        hint = template_warning(folder, template)
        if hint:
            warnings.append(hint)
    return warnings
