"""Run MACPO: python train.py [@preset | @file.toml | @experiment-NAME]... [--section.key=value]... (see --help)."""

import functools
import sys

from minmacpo import UserError
from minmacpo.config.parse import help_text, parse
from minmacpo.runtime.progress import run_main


def run_all(run, source: dict, prepared) -> None:
    """Every stage of the run: the ground, the algorithm, a measurement after each trained agent."""
    from minmacpo.evaluation.measure import evaluate_agent
    from minmacpo.method.baselines import run_method
    from minmacpo.pipeline.base_models import setup_stages
    from minmacpo.pipeline.model_pool import ModelPool

    models = ModelPool(run.config, run.dist)
    setup = setup_stages(run, source, prepared)
    for checkpoint in run_method(run, models, setup):
        evaluate_agent(run, models, setup, checkpoint)


def main(argv: list[str]) -> int | None:
    """Run what the command line asks for; returns the exit code, None for 0."""
    if any(word.startswith("@experiment-") for word in argv) and not {"--help", "-h"} & {*argv}:
        from minmacpo.evaluation.experiments import run_experiment

        return run_experiment(argv, __file__)
    command = parse(argv)
    if command.help:
        return print(help_text())
    from minmacpo.runtime.distributed import meet

    with (dist := meet()).report_first_error():
        return obey(command, dist)


def obey(command, dist) -> int | None:
    """The run, or the part of it, that is asked for, done together with the other ranks."""
    from minmacpo.cli.dry_run import check_memory, hints, show_plan
    from minmacpo.evaluation.report import finish, write_report
    from minmacpo.pipeline.prepare_data import identify_source, prepare
    from minmacpo.pipeline.run import Run
    from minmacpo.runtime.device import configure_torch, resolve_device

    config = command.config
    configure_torch(config.run.threads)
    dist.connect(resolve_device(config.run.device), config.parallel.shard)
    prepared = functools.cache(lambda: prepare(config))
    source = identify_source(config)
    run = Run(config, command.stage, command.profile, command.dry_run, dist)
    run_all(run, source, prepared)  # only lists the stages
    if command.stage and command.stage not in run.plan:
        raise UserError(f"--stage={command.stage}: no such stage; --dry_run lists them")
    if command.dry_run:
        return dist.run_on_main(lambda: show_plan(run, prepared))
    made = [stage for name, stage in run.plan.items() if name.startswith(("data/", "bases/"))]
    dist.run_on_main(
        lambda: all(stage.finished for stage in made) or bool(prepared())
    )  # bad data is an error before there is a run folder
    dist.run_on_main(lambda: check_memory(run, prepared))
    run.begin()
    for said in hints(run):
        run.log(f"WARNING: {said}")
    run.after_stage = write_report
    run_all(run, source, prepared)
    if dist.is_main:
        print(finish(run))


if __name__ == "__main__":
    sys.exit(run_main(main))
