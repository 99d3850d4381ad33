"""Run MACPO, or a method that it is compared with.

python train.py [@preset | @file.toml]... [--section.key=value]...    --help lists all settings
python train.py @experiment-NAME                                      many runs under one question

A run is declared twice by the same calls: first its stages are listed, then they are computed.
What needs torch is imported where it is used, so that --help and a typo are answered at once.
"""

import functools
import sys
from collections.abc import Callable

from minmacpo import UserError
from minmacpo.config.parse import Command, help_text, parse
from minmacpo.runtime.progress import run_main


def main(argv: list[str]) -> int:
    """Run what the command line asks for; returns the exit code."""
    asks_for_help = "--help" in argv or "-h" in argv
    if not asks_for_help and any(word.startswith("@experiment-") for word in argv):
        from minmacpo.evaluation.experiments import run_experiment

        return run_experiment(argv, __file__)
    command = parse(argv)
    if command.help:
        print(help_text())
        return 0

    from minmacpo.runtime.distributed import meet

    dist = meet()  # the other processes, if torchrun has started several
    with dist.report_first_error():
        run_command(command, dist)
    return 0


def run_command(command: Command, dist) -> None:
    """List the stages of the run and, unless this is a dry run, compute them."""
    from minmacpo.cli.dry_run import check_before_start, describe_templates, hints, show_plan
    from minmacpo.cli.side_by_side import count_workers, stage_costs
    from minmacpo.evaluation.report import finish, write_report
    from minmacpo.pipeline.prepare_data import identify_source, prepare
    from minmacpo.pipeline.run import Run
    from minmacpo.pipeline.scheduler import is_new_worker, serve_as_new_process
    from minmacpo.runtime.device import configure_torch, resolve_device

    config = command.config
    configure_torch(config.run.threads)
    dist.connect(resolve_device(config.run.device), config.parallel.shard)

    # --- List the stages
    source = identify_source(config)
    prepared = functools.cache(functools.partial(prepare, config))  # read when somebody asks
    run = Run(config, command.stage, command.profile, command.dry_run, dist)
    run_all(run, source, prepared)
    if command.stage and command.stage not in run.plan:
        raise UserError(f"--stage={command.stage}: no such stage; --dry_run lists them")
    if command.dry_run:
        dist.run_on_main(lambda: show_plan(run, prepared))
        return

    # --- Compute them, or some of them for another process
    if is_new_worker():
        serve_as_new_process(run)
        return
    dist.run_on_main(lambda: check_before_start(run, prepared))
    workers = count_workers(run, prepared)
    run.begin(workers.count, stage_costs(run))
    if workers.warning:
        run.log(f"WARNING: {workers.warning}")
    for line in describe_templates(config):
        run.log(line)
    for hint in hints(run):
        run.log(f"WARNING: {hint}")
    run.after_stage = write_report
    run_all(run, source, prepared)
    if dist.is_main:
        print(finish(run))


def run_all(run, source: dict, prepared: Callable) -> None:
    """Every stage of the run, in its order: data, bases, the algorithm, and what is measured.

    Args:
        source: what identifies the texts, for the fingerprints.
        prepared: returns the texts.
    """
    from minmacpo.evaluation.measure import evaluate_agent
    from minmacpo.method.baselines import run_method
    from minmacpo.pipeline.base_models import setup_stages
    from minmacpo.pipeline.model_pool import ModelPool, Session

    session = Session(run, ModelPool(run.config, run.dist))
    setup = setup_stages(run, source, prepared)
    for checkpoint in run_method(session, setup):
        evaluate_agent(session, setup, checkpoint)
    run.complete()


if __name__ == "__main__":
    sys.exit(run_main(main))
