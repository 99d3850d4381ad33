"""Whether a training computes its blocks twice (activation checkpointing), to keep less."""

import functools
from collections.abc import Sequence

from minmacpo.core.batching import token_counts
from minmacpo.core.memory_estimate import PassSize, estimate_memory
from minmacpo.core.model import Transformer
from minmacpo.core.trainer import BatchPlan, TrainExample, padded_tokens, rows_of
from minmacpo.pipeline.stage import StageContext
from minmacpo.runtime.device import free_bytes
from minmacpo.runtime.progress import gigabytes


def set_recompute(
    context: StageContext,
    model: Transformer,
    examples: Sequence[TrainExample],
    plan: BatchPlan,
    kind: str = "train",
) -> None:
    """Let the model compute its blocks twice, or once, in this training; all bits stay the same.

    As run.checkpoint says; "auto": twice where the largest pass would not fit into the free memory,
    which the log then says.

    Args:
        kind: "train" where an adapter learns, "pretrain" where all weights do.
    """
    setting = context.run.config.run.checkpoint
    model.recompute_blocks = setting == "true"
    if setting != "auto" or not plan.steps:
        return

    # --- What the training adds to the weights, which are in memory already
    weight = model.lm_head.weight
    size = largest_pass(kind, examples, plan)

    def needed_bytes(recompute: bool) -> int:
        estimate = estimate_memory(
            size,
            model.config,
            context.run.config.lora,
            bytes_per_number=weight.dtype.itemsize,
            device=weight.device.type,
            recompute=recompute,
        )
        return estimate.learning + estimate.activations + estimate.working

    needed = needed_bytes(recompute=False)
    free = free_bytes(weight.device.type) // context.dist.ranks_per_device
    helps = needed > free and needed_bytes(recompute=True) < needed  # not with a single block

    # --- One rank that needs it makes all do it: they share the passes of a sharded model
    if context.dist.all_reduce_max(int(helps)):
        model.recompute_blocks = True
        context.log(
            f"{context.name}: a pass needs about {gigabytes(needed)}, {gigabytes(free)} are free: "
            "every block is computed twice, to keep less (run.checkpoint)"
        )


def largest_pass(kind: str, examples: Sequence[TrainExample], plan: BatchPlan) -> PassSize:
    """The size of the planned micro-batch with the most padded tokens."""
    groups = [group for micro_batches in plan.steps for group in micro_batches]
    largest_group = max(groups, key=functools.partial(padded_tokens, examples))
    largest = [examples[number] for number in largest_group]
    counts = token_counts([rows_of(largest)])
    return PassSize(
        kind=kind,
        rows=len(rows_of(largest)),
        tokens=counts.computed if plan.packed else counts.padded,
        scored_tokens=sum(example.trained_tokens for example in largest),
    )
