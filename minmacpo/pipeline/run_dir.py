"""What belongs to a run's folder as a whole: whose it is, who may write in it, its metrics, the finished stages beside it."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from minmacpo import UserError
from minmacpo.config.parse import override, read_toml
from minmacpo.config.schema import PLACE, Config, flatten
from minmacpo.runtime.files import (
    check_links,
    describe,
    fingerprint,
    open_locked,
    read_json,
    read_rows,
)

PARTIAL = ".partial"  # unfinished stages live here, under their fingerprint, and locks


TIMES = {
    "time",
    "tokens_per_s",
    "peak_mem_gb",
}  # what a line of the run's metrics has beside the stage's own


def take(path: Path, stage: str | None, fingerprint: str | None) -> list[IO]:
    """[log.txt, locks] of a run folder, made if need be, that is this process's own; with `stage`, only that stage is, and
    others of the same run may be other processes'. UserError if somebody else has it; it is theirs until these are closed."""
    path.mkdir(parents=True, exist_ok=True)
    busy = f"{path}: another process works on this run; wait for it, or choose another --run.name"
    held = [open_locked(path / "log.txt", "a+", busy, shared=stage is not None)]
    if stage:
        (path / PARTIAL).mkdir(exist_ok=True)
        busy = f"{path / stage}: another process computes this stage"
        held.append(open_locked(path / PARTIAL / f"{fingerprint}.lock", "a+", busy))
    return held


def turn(path: Path) -> IO:
    """A lock that is waited for, to be closed soon: whoever computes one stage of the run holds it while it writes a file
    of all stages."""
    return open_locked(path / PARTIAL / "turn.lock", "a+", None)


def finished_under(root: Path) -> dict[str, Path]:
    """{fingerprint: folder} of the finished stages of all runs of the root."""
    found = {}
    for file in sorted(root.glob("*/[!.]*/*/stage.json")):  # not those in PARTIAL
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, RecursionError
        ):  # its own run will say so
            found[json.loads(file.read_bytes())["fingerprint"]] = file.parent
    return found


def read_metrics(run: Path, names: Iterable[str], only: str | None = None) -> list[dict]:
    """The lines of the finished ones of these stages in a run's metrics.jsonl, or, where they are not as the stage's own
    file has them, those, without times; an unfinished stage writes its own anew. `only`: that one does, others may be at work."""
    file, found, rows = run / "metrics.jsonl", {}, []
    for line in (
        file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ()
    ):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # torn by a kill
            row = json.loads(line)
            found.setdefault(row["stage"], []).append(row)
    for name in names:
        own, mine = run / name / "metrics.jsonl", found.get(name, [])
        if own.is_file() and (own.parent / "stage.json").is_file():
            with contextlib.suppress(UserError):  # `verify` will say so
                told = [{"stage": name} | row for row in read_rows(own)]
                same = [
                    {key: value for key, value in row.items() if key not in TIMES} for row in mine
                ] == told
                rows += mine if same else told
        elif only not in (None, name):
            rows += mine
    return rows


def check_folder(path: Path, config: Config) -> None:
    """Raise UserError if `path` holds something else than a run of this configuration, or a link, which could lead out of it."""
    check_links(path)
    file, names = path / "config.toml", {p.name for p in path.iterdir()} if path.is_dir() else set()
    if file.name not in names:
        begun = {"log.txt", "config.toml.tmp", PARTIAL}  # what is there before it, at a kill
        if names - begun or (path.exists() and not path.is_dir()):
            raise UserError(f"{path}: exists and is no run folder; choose another --run.name")
        return
    mine, theirs = flatten(config), flatten(override(Config(), read_toml(file), str(file)))
    for key in mine:
        if key not in PLACE and mine[key] != theirs[key]:
            problem = f"holds a run with {key} = {theirs[key]}, this one has {mine[key]}"
            raise UserError(f"{path}: {problem}; choose another --run.name, or delete that folder")


def check_stage(folder: Path) -> None:
    """`check_whole`, where the folder is a stage within a run; a copy elsewhere may have been changed."""
    if (folder / "stage.json").is_file() and (
        folder.resolve().parent.parent / "config.toml"
    ).is_file():
        check_whole(folder)


def check_whole(folder: Path) -> dict:
    """The stage.json of a finished stage's folder; UserError unless it and all files that it names are undamaged."""
    notes, remedy = (
        read_json(folder / "stage.json"),
        f"damaged; delete the folder {folder} and start again",
    )
    if notes.pop("checksum", None) != fingerprint(notes):
        raise UserError(f"{folder / 'stage.json'}: is {remedy}")
    for name, wanted in notes["files"].items():
        file = folder / name
        if (
            name != file.name
            or file.is_symlink()
            or not file.is_file()
            or wanted["size"] != file.stat().st_size
            or wanted != describe(file)
        ):
            raise UserError(f"{file}: is missing or {remedy}")
    return notes
