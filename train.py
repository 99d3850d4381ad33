"""Run MACPO: python train.py [@preset | @file.toml]... [--section.key=value]... (see --help)."""

import functools
import sys
from dataclasses import asdict

from minmacpo import UserError


def source_of(config) -> dict:
    """What identifies the run's texts: the world and its seed, or the files' content."""
    from minmacpo.data import find_files
    from minmacpo.files import sha256_file
    from minmacpo.prepare import TOKENIZER_TEXTS

    if config.data.path is None:
        few = config.pretrain.strong_steps * config.pretrain.batch  # documents the tokenizer may learn from
        shorter = {"tokenizer_texts": few} if few < TOKENIZER_TEXTS else {}
        return {"world": asdict(config.world), "seed": config.run.seed} | shorter
    data = {"shares": list(config.data.shares), "max_examples": config.data.max_examples, "seed": config.run.seed}
    return data | {"files": [[file.name, sha256_file(file)] for file in find_files(config.data.path)]}


def prepare(config):
    """Read or make the run's texts (in memory)."""
    from minmacpo import world
    from minmacpo.bases import given_tokenizers
    from minmacpo.prepare import base_names, fit_slices, prepare_hh

    given = given_tokenizers(config)
    if config.data.path is not None:
        return prepare_hh(config, given)
    town = world.make_town(config.world, config.run.seed)
    steps = {"strong": config.pretrain.strong_steps}
    corpora = {
        name: world.corpus(town, config.world, name, config.pretrain.batch * steps.get(name, config.pretrain.weak_steps))
        for name in base_names(config)
    }
    return fit_slices(config, world.slices(town, config.world), corpora, given, {})


def run_all(run, source: dict, prepared) -> None:
    """Every stage of the run: the ground, the algorithm, a measurement after each trained agent."""
    from minmacpo.bases import make_ground
    from minmacpo.evaluate import measure
    from minmacpo.macpo import run_macpo
    from minmacpo.workshop import Workshop

    shop = Workshop(run)
    ground = make_ground(run, source, prepared)
    for trained in run_macpo(shop, ground):
        measure(shop, ground, trained)


def show_plan(run, counts: dict) -> None:
    """The dry run: settings, rows, slices and stages."""
    from minmacpo.commandline import to_toml

    print(to_toml(run.config))
    for name, count in counts.items():
        print(f"{name}: {count}")
    print(f"\n{len(run.plan)} stages in {run.path}:")
    for number, planned in enumerate(run.plan.values(), 1):
        state = "finished" if planned.stage.finished else planned.size
        print(f"{number:4} {planned.stage.name:32} {planned.kind:12} {state}")


def main(argv: list[str]) -> int:
    """Run what the command line asks for; returns the exit code."""
    from minmacpo.commandline import help_text, parse

    command = parse(argv)
    if command.help:
        print(help_text())
        return 0
    import torch

    from minmacpo.evaluate import format_table, make_table
    from minmacpo.files import write_json
    from minmacpo.report import write_report
    from minmacpo.run import Run

    config = command.config
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    prepared = functools.cache(lambda: prepare(config))
    source = source_of(config)
    run = Run(config, command.stage, command.profile)
    run_all(run, source, prepared)
    if command.stage and command.stage not in run.plan:
        raise UserError(f"--stage={command.stage}: no such stage; --dry_run lists them")
    if command.dry_run or not all(p.stage.finished for n, p in run.plan.items() if n.startswith(("data/", "bases/"))):
        prepared()
    if command.dry_run:
        show_plan(run, prepared().counts)
        return 0
    run.begin()
    run.after_stage = lambda: write_report(run.path)
    run_all(run, source, prepared)
    table = make_table(run.path)
    if not command.stage:  # table.json says that the run is finished
        run.end()
        (run.path / "eval").mkdir(exist_ok=True)
        write_json(run.path / "eval/table.json", table)
    write_report(run.path)
    print(format_table(table))
    print(f"\nreport: {run.path / 'report.html'}")
    return 0


if __name__ == "__main__":
    from minmacpo.program import call

    sys.exit(call(main))
