"""What connects a training with the stage that it is: log, metrics, bar, signals, state, ranks."""

from minmacpo.core.trainer import TrainerHooks
from minmacpo.pipeline.stage import StageContext


def trainer_hooks(context: StageContext) -> TrainerHooks:
    """The hooks of the training that a stage does; core.trainer knows neither run nor stage."""
    settings = context.run.config.run
    # The state lies beside the stage's folder, so that it lasts until the stage is whole
    state_folder = context.folder.with_name(f"state-{context.folder.name}")
    return TrainerHooks(
        name=context.name,
        seed=context.seed,
        max_tokens_per_batch=settings.max_tokens_per_batch,
        log_every=settings.log_every,
        save_every=settings.save_every,
        state_file=state_folder / "state.safetensors",
        metrics_file=context.folder / "metrics.jsonl",
        log=context.log,
        log_detail=context.log_detail,
        log_metrics=context.log_metrics,
        progress=context.progress,
        should_stop=lambda: context.should_stop,
        raise_if_stopped=context.raise_if_stopped,
        dist=context.dist,
    )
