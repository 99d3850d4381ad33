"""What is said of a run before it starts: its stages, what does not fit in memory, and the settings with which it would."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from minmacpo import UserError
from minmacpo.cli.plan import Plan
from minmacpo.config.parse import to_toml
from minmacpo.config.schema import Config
from minmacpo.core.prepack import multiplies_bf16
from minmacpo.data.chat_template import template_hint
from minmacpo.pipeline.prepare_data import PreparedData
from minmacpo.pipeline.run import Run
from minmacpo.runtime.device import free_bytes, process_bytes, resolve_device, resolve_dtype
from minmacpo.runtime.progress import escape_control_chars, gigabytes, thousands

NOTES = """\
tokens: without padding. "<=": at most, for an answer that is not sampled yet counts as generate.max_new_tokens tokens, in every tokenizer.
memory: at the peak, of this stage's base alone; other bases stay loaded while there is room."""


def first_that_fails(plan: Plan, free: int) -> str | None:
    """The first stage, of those that are still to be computed, that needs more than so many bytes."""
    run, seen = plan.run, set()
    for name in (
        name for name, stage in run.plan.items() if run.only in (None, name) and not stage.finished
    ):
        recipe, inputs = run.recipes[name]
        settings = [
            recipe["settings"].get(key) for key in ("batch", "texts", "shape", "contrastive")
        ]
        like = repr((recipe["kind"], [s.fingerprint for s in inputs[:1]], settings))
        if (plan.prepared or like not in seen) and plan.total(
            name
        ) > free:  # with rows of one length it would be the same
            return name
        seen.add(like)
    return None


def room(run: Run) -> int:
    """Bytes of memory that are free to this rank."""
    return free_bytes(resolve_device(run.config.run.device)) // run.dist.ranks_per_device


def problem(run: Run, prepared: PreparedData | None) -> str | None:
    """One sentence about the first stage that cannot fit, and the settings with which every stage would; None: all do."""
    plan, free, flags = Plan(run, run.config, prepared), room(run), {}
    if not (name := first_that_fails(plan, free)):
        return None
    said = f"{name} needs about {gigabytes(plan.total(name))} of memory, of which {gigabytes(free)} are free on the {resolve_device(run.config.run.device)}"
    while name:
        if not (changes := remedy(plan, name, free)):
            return f"{said}; no setting makes {name if flags else 'it'} fit: take a smaller base, lower data.max_length, or another machine"
        flags |= {f"--{section}.{setting}": new for section, setting, new in changes}
        plan = plan.under(changed(plan.config, changes))
        name = first_that_fails(plan, free)
    return f"{said}; {' with '.join(f'{flag}={new}' for flag, new in flags.items())} would fit"


def changed(config: Config, changes: Sequence[tuple[str, str, object]]) -> Config:
    """The settings with some, each (section, name, value), in the place of theirs."""
    for section, name, value in changes:
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def remedy(plan: Plan, name: str, free: int) -> Sequence[tuple[str, str, object]]:
    """The first settings, lowered as little as need be, with which the stage fits; () if none do."""
    config, part = (
        plan.config,
        "generate" if plan.run.plan[name].kind.startswith("sample") else "run",
    )
    key = "batch" if part == "generate" else "max_tokens_per_batch"
    value = getattr(getattr(config, part), key)
    halves = [(part, key, value >> times) for times in range(1, value.bit_length())]
    small = [("run", "dtype", "bfloat16")] * (
        resolve_dtype(config.run.dtype, config.run.device).itemsize > 2
    )
    able = (
        plan.quantizer(name) and plan.form(name) == "none" and not config.parallel.shard
    )  # the two do not go together
    forms = [("model", plan.quantizer(name), form) for form in ("int8", "nf4") if able]
    for first in ([], *([change] for change in small), *([form, *small] for form in forms)):
        for changes in (first, *([*first, half] for half in halves)):
            if changes and plan.under(changed(config, changes)).total(name) <= free:
                return changes
    return ()


def check_memory(run: Run, prepared: Callable[[], PreparedData]) -> None:
    """Raise UserError for a stage that cannot fit. The texts are looked at only where rows as long as the settings
    allow would not fit."""
    if first_that_fails(Plan(run, run.config, None), room(run)) and (
        said := problem(run, prepared())
    ):
        raise UserError(said)


def show_plan(run: Run, prepared: Callable[[], PreparedData]) -> None:
    """The dry run: settings, rows, slices, and the stages with what each will take."""
    process = (
        process_bytes() if resolve_device(run.config.run.device) == "cpu" else 0
    )  # before the texts are read
    plan, tokens, most, lines = Plan(run, run.config, prepared()), 0, (0, "no stage"), []
    for number, (name, stage) in enumerate(run.plan.items(), 1):
        words, task = (
            "finished" if stage.finished else stage.size,
            None if stage.finished else plan.task(name),
        )
        if task:
            asked, tokens = plan.total(name) + process, tokens + task.tokens
            most = max(most, (asked, name))
            words = f"{words + '; ' if words else ''}{'' if task.exact else '<= '}{thousands(task.tokens)} tokens, {gigabytes(asked)}"
        lines.append(f"{number:4} {name:32} {stage.kind:12} {words}".rstrip())
    print(
        escape_control_chars(to_toml(run.config)),
        *(f"{name}: {count}" for name, count in prepared().counts.items()),
        sep="\n",
    )
    if tokens:
        print(
            f"\nin all <= {thousands(tokens)} tokens; at most {gigabytes(most[0])} of memory, in {most[1]}\n{NOTES}"
        )
    print(f"\n{len(lines)} stages in {run.path}:", *lines, sep="\n", flush=True)
    for said in filter(None, [*hints(run), problem(run, prepared())]):
        print(f"WARNING: {escape_control_chars(said)}", file=sys.stderr)


def hints(run: Run) -> list[str]:
    """What is odd about data.template and the chat templates of the given bases, about parallel.shard, and about run.dtype."""
    given = {stage.path for _, inputs in run.recipes.values() for stage in inputs if stage.external}
    odd = (
        ["parallel.shard divides nothing without torchrun"]
        if run.config.parallel.shard and run.dist.world_size == 1
        else []
    )
    if (
        resolve_device(run.config.run.device) == "cpu"
        and resolve_dtype(run.config.run.dtype, run.config.run.device) == torch.bfloat16
        and not multiplies_bf16()
    ):
        odd += [
            "this CPU has no products in bfloat16 that oneDNN uses; run.dtype=float32 may be several times faster"
        ]
    return odd + [
        said
        for folder in sorted(given)
        if (said := template_hint(folder, run.config.data.template))
    ]
