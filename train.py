"""Run MACPO: python train.py [@preset | @file.toml | @experiment-NAME]... [--section.key=value]... (see --help)."""

import functools
import sys
from dataclasses import asdict

from minmacpo import UserError
from minmacpo.config.parse import help_text, parse
from minmacpo.data import synthetic as world
from minmacpo.data.readers import find_files
from minmacpo.runtime.files import sha256_file
from minmacpo.runtime.progress import run_main


def source_of(config) -> dict:
    """What identifies the run's texts: the world and its seed, or the files' content."""
    from minmacpo.pipeline.prepare_data import TOKENIZER_TEXTS

    data, seed = config.data, config.run.seed
    if data.path is None:
        few = (
            config.pretrain.strong_steps * config.pretrain.batch
        )  # documents the tokenizer may learn from
        return {"world": asdict(config.world), "seed": seed} | (
            {"tokenizer_texts": few} if few < TOKENIZER_TEXTS else {}
        )
    files = {
        key: [[f.name, sha256_file(f)] for f in find_files(path, f"data.{key}")]
        for key, path in data.files.items()
    }
    source = {
        "shares": list(data.shares),
        "max_examples": data.max_examples,
        "seed": seed,
        "files": files.pop("path"),
    }
    chosen = {"label": data.preference_label, "on_invalid_row": data.on_invalid_row}
    return (
        source
        | files
        | (chosen if chosen != {"label": "better", "on_invalid_row": "error"} else {})
    )


def prepare(config):
    """Read or make the run's texts (in memory)."""
    from minmacpo.pipeline.prepare_data import (
        base_names,
        given_tokenizers,
        prepare_data,
        prepare_splits,
    )

    given = given_tokenizers(config)
    if config.data.path is not None:
        return prepare_data(config, given)
    place, part, town = (
        config.world,
        config.pretrain,
        world.make_town(config.world, config.run.seed),
    )
    steps = {
        name: part.strong_steps if name == "strong" else part.weak_steps
        for name in base_names(config)
    }
    corpora = {
        name: world.make_corpus(town, place, name, part.batch * count) for name, count in steps.items()
    }
    return prepare_splits(
        config, made := world.make_splits(town, place), corpora, given, world.shortfalls(made, place)
    )


def run_all(run, source: dict, prepared) -> None:
    """Every stage of the run: the ground, the algorithm, a measurement after each trained agent."""
    from minmacpo.evaluation.measure import evaluate_agent
    from minmacpo.method.baselines import run_method
    from minmacpo.pipeline.base_models import setup_stages
    from minmacpo.pipeline.model_pool import Session

    session, ground = Session(run), setup_stages(run, source, prepared)
    for trained in run_method(session, ground):
        evaluate_agent(session, ground, trained)


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
    from minmacpo.pipeline.run import Run
    from minmacpo.runtime.device import configure_torch, resolve_device

    config = command.config
    configure_torch(config.run.threads)
    dist.connect(resolve_device(config.run.device), config.parallel.shard)
    prepared, source = functools.cache(lambda: prepare(config)), source_of(config)
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
