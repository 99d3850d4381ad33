"""A run's folder as a whole: whose it is, who may write in it, its metrics, its finished stages."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from minmacpo import UserError
from minmacpo.config.parse import override_by_run, read_toml
from minmacpo.config.schema import NON_IDENTITY_SETTINGS, Config, flatten
from minmacpo.runtime.files import (
    check_links,
    describe,
    fingerprint,
    open_locked,
    read_json,
    read_rows,
    replace_fsync,
)

CONFIG = "config.toml"
LOG = "log.txt"
METRICS = "metrics.jsonl"
IN_PROGRESS_DIR = ".partial"  # unfinished stages, named by their fingerprints, and locks
SET_ASIDE_DIR = ".stale"  # finished stages that other code or settings made, until the run ends

# What a line of the run's metrics.jsonl has beside those of the stage's own file
TIMING_KEYS = {"time", "tokens_per_s", "peak_mem_gb"}


# --- Who may write


def acquire_run_lock(path: Path, stage: str | None, stage_fingerprint: str | None) -> list[IO]:
    """log.txt and the locks of a run folder, which is made if need be; held while they are open.

    Args:
        stage: the only stage that this process computes. Others of the same run may then be
            computed by other processes.

    Raises:
        UserError: if another process works on the run, or on the stage.
    """
    path.mkdir(parents=True, exist_ok=True)
    busy = f"{path}: another process works on this run; wait for it, or choose another --run.name"
    files = [open_locked(path / LOG, "a+", busy, shared=stage is not None)]
    if stage:
        (path / IN_PROGRESS_DIR).mkdir(exist_ok=True)
        busy = f"{path / stage}: another process computes this stage"
        lock = path / IN_PROGRESS_DIR / f"{stage_fingerprint}.lock"
        files.append(open_locked(lock, "a+", busy))
    return files


def shared_files_lock(path: Path) -> IO:
    """A lock that is waited for, held while a process of several writes a file of all stages."""
    return open_locked(path / IN_PROGRESS_DIR / "turn.lock", "a+", None)


def check_folder(path: Path, config: Config) -> None:
    """Raise UserError unless `path` is free, or holds a run of this configuration."""
    check_links(path)
    file = path / CONFIG
    names = {child.name for child in path.iterdir()} if path.is_dir() else set()

    if CONFIG not in names:
        # A kill may have come before the settings were written
        begun = {LOG, f"{CONFIG}.tmp", IN_PROGRESS_DIR}
        if names - begun or (path.exists() and not path.is_dir()):
            raise UserError(f"{path}: exists and is no run folder; choose another --run.name")
        return

    theirs = flatten(override_by_run(Config(), read_toml(file), file))
    for name, value in flatten(config).items():
        if name not in NON_IDENTITY_SETTINGS and value != theirs[name]:
            raise UserError(
                f"{path}: holds a run with {name} = {theirs[name]}, this one has {value}; "
                "choose another --run.name, or delete that folder"
            )


# --- Finished stages


def recorded_fingerprint(folder: Path) -> str | None:
    """The fingerprint in a stage's stage.json; None where there is none, or a broken one."""
    notes = read_notes_leniently(folder / "stage.json")
    return notes.get("fingerprint")


def read_notes_leniently(file: Path) -> dict:
    """A stage.json; empty where it is missing or broken, which `check_notes` tells the user."""
    try:
        return read_json(file)
    except UserError:
        return {}


def finished_stages(run: Path) -> Iterator[tuple[Path, dict]]:
    """Folder and stage.json of every finished stage of a run, those that are set aside last."""
    for pattern in ("[!.]*/*/stage.json", f"{SET_ASIDE_DIR}/*/stage.json"):
        for file in sorted(run.glob(pattern)):
            notes = read_notes_leniently(file)
            # a damaged one is no stage of another version: `check_notes` tells the user of it
            if is_intact(notes):
                yield file.parent, notes


def check_stage(folder: Path) -> None:
    """`check_whole` of a stage within a run; a copy elsewhere may have been changed."""
    is_stage = (folder / "stage.json").is_file()
    if is_stage and (folder.resolve().parent.parent / CONFIG).is_file():
        check_whole(folder)


def check_whole(folder: Path) -> dict:
    """A finished stage's stage.json; UserError unless it and its files are undamaged."""
    notes = check_notes(folder)
    for name, recorded in notes["files"].items():
        if not is_undamaged(folder, name, recorded):
            raise UserError(
                f"{folder / name}: is missing or damaged; delete the folder {folder} "
                "and start again"
            )
    return notes


def check_notes(folder: Path) -> dict:
    """A finished stage's stage.json; UserError if it is damaged."""
    notes = read_json(folder / "stage.json")
    if not is_intact(notes):
        raise UserError(
            f"{folder / 'stage.json'}: is damaged; delete the folder {folder} and start again"
        )
    del notes["checksum"]
    return notes


def is_intact(notes: dict) -> bool:
    """Whether a stage.json is as it was written, by its own checksum."""
    content = {name: value for name, value in notes.items() if name != "checksum"}
    return "checksum" in notes and notes["checksum"] == fingerprint(content)


def is_undamaged(folder: Path, name: str, recorded: dict) -> bool:
    """Whether a file is what stage.json says of it."""
    file = folder / name
    if name != file.name or file.is_symlink() or not file.is_file():
        return False
    # The size is looked at first: it costs nothing
    return recorded["size"] == file.stat().st_size and recorded == describe(file)


def set_aside(run: Path, folder: Path, stage_fingerprint: str) -> None:
    """Move a finished stage out of the way; a later run, or this one, may take it from there."""
    target = run / SET_ASIDE_DIR / stage_fingerprint
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    replace_fsync(folder, target)


# --- Metrics


def read_metrics(run: Path, stages: Iterable[str], only: str | None = None) -> list[dict]:
    """The lines of a run's metrics.jsonl as they should be after a kill, in the stages' order.

    A finished stage's lines are those of its own file; the run's file has times as well, which are
    taken where the rest agrees. An unfinished stage will write its lines again.

    Args:
        only: the one stage that this process computes; others may be computed at this moment, so
            their lines stay.
    """
    lines = lines_by_stage(run / METRICS)
    rows = []
    for name in stages:
        with_times = lines.get(name, [])
        own_file = run / name / METRICS
        if own_file.is_file() and (own_file.parent / "stage.json").is_file():
            with contextlib.suppress(UserError):  # a damaged one is told when the stage is checked
                without_times = [{"stage": name, **row} for row in read_rows(own_file)]
                agree = [drop_timing(row) for row in with_times] == without_times
                rows += with_times if agree else without_times
        elif only not in (None, name):
            rows += with_times
    return rows


def lines_by_stage(file: Path) -> dict[str, list[dict]]:
    """The whole lines of a run's metrics.jsonl, by the stage that wrote them."""
    if not file.exists():
        return {}
    lines: dict[str, list[dict]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        # A kill may have torn a line
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = json.loads(line)
            lines.setdefault(row["stage"], []).append(row)
    return lines


def drop_timing(row: dict) -> dict:
    """A line of the run's metrics.jsonl as the stage's own file has it."""
    return {key: value for key, value in row.items() if key not in TIMING_KEYS}
