"""Answers to a file of prompts, in a file that only grows: a killed program goes on where it was.

Prompts are answered in fixed blocks of generate.batch rows, in their order. A block that a kill has torn is sampled
again whole, with the same rows side by side, so that every number comes out the same; of its rows those are added
that are not there yet.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.core.checkpoint import read_adapter_config
from minmacpo.data.formats import read_data
from minmacpo.data.records import Example, Pair
from minmacpo.pipeline.base_models import model_fingerprint
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.prepare_data import truncate_pairs
from minmacpo.pipeline.run import derive_seed
from minmacpo.pipeline.sample_stage import Request, Sampler
from minmacpo.runtime.device import resolve_device, resolve_dtype
from minmacpo.runtime.files import fingerprint, open_locked, sha256_file, to_jsonl, with_path
from minmacpo.runtime.progress import Progress

Job = tuple[Example, int]  # a prompt, and the number of the answer to it


def read_prompts(file: Path, config: Config) -> tuple[list[Pair], list[str]]:
    """The prompts of a file's rows (any of forms.py, or lines of text), and a line for people on each file."""
    data = config.data
    pairs, reports = read_data(
        str(file),
        preference_label=data.preference_label,
        skip_invalid=data.on_invalid_row == "skip",
        max_rows=data.max_examples,
        setting="--prompts",
        plain_prompts=True,
    )
    told = [f"{name}: {report}" for name, report in reports.items()]
    return [replace(pair, chosen="", rejected="") for pair in pairs], told


def fit_prompts(
    config: Config, loaded: LoadedModel, prompts: Sequence[Pair]
) -> tuple[list[Example], str]:
    """The prompts that leave room for an answer, and a sentence on the others; UserError if none is left."""
    context, most = loaded.model.config.max_position_embeddings, config.generate.max_new_tokens
    kept, reasons = truncate_pairs(config, loaded.tokenizer, prompts, context - most, context)
    lost = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    told = f"{lost}: with generate.max_new_tokens = {most} there is room for {max(context - most, 0)} tokens; see data.truncation_mode"
    if not kept:
        raise UserError(f"no prompt is left; {told}")
    return [Example(pair.id, pair.prompt, "", pair.meta) for pair in kept], told if lost else ""


def agent_print(folder: Path, base: Path) -> str:
    """What identifies an agent: 32 hex digits of its base, and of its adapter if it has one."""
    if folder == base:
        return model_fingerprint(base)
    adapter = [
        asdict(read_adapter_config(folder)[0]),
        sha256_file(folder / "adapter_model.safetensors"),
    ]
    return fingerprint([model_fingerprint(base), adapter])


def marked(
    config: Config, folder: Path, base: Path, prompts: Sequence[Example], count: int
) -> list[Job]:
    """`count` jobs for each prompt, each of which says in its meta["made"] what all of them depend on."""
    depends = {
        "agent": agent_print(folder, base),
        "generate": asdict(config.generate),
        "seed": config.run.seed,
        "template": config.data.template,
        "device": resolve_device(config.run.device),
        "dtype": str(resolve_dtype(config.run.dtype, config.run.device)),
        "prompts": [prompt.id for prompt in prompts],
        "count": count,
    }
    form = config.model.quantize
    made = fingerprint(depends | ({} if form == "none" else {"quantize": form}))
    return [
        (replace(prompt, meta=prompt.meta | {"made": made}), n)
        for prompt in prompts
        for n in range(count)
    ]


def write_answers(
    config: Config, loaded: LoadedModel, agent: str, jobs: Sequence[Job], out: Path
) -> int:
    """Add to `out` the answers that are not there yet; returns how many were. UserError if it holds anything but
    answers to these jobs by the agent of this name, or if another process writes it."""
    size, busy = (
        config.generate.batch,
        f"{out}: another process is writing it; wait for it, or give another --out",
    )
    if out.exists() and not out.is_file():
        raise UserError(f"{out}: is no ordinary file, to which answers could be added")
    with (
        with_path(out),
        open_locked(out, "ab", busy) as stream,
    ):  # closing it writes once more what could not be written
        sampler = Sampler(loaded, config.generate, agent, config.run.seed)
        found = done = rows_there(out, agent, jobs, config.run.seed, stream)
        with Progress("answers", len(jobs), "answer", done, None) as progress:
            while done < len(jobs):
                start = done - done % size
                requests = [Request(*job) for job in jobs[start : start + size]]
                rows = sampler(requests)[done - start :]
                stream.write(to_jsonl(rows).encode())
                stream.flush()
                os.fsync(stream.fileno())
                done += len(rows)
                progress.step(len(rows))
    return found


def rows_there(out: Path, agent: str, jobs: Sequence[Job], seed: int, stream: BinaryIO) -> int:
    """How many of the jobs' answers `out` holds; a last line torn by a kill is taken off through `stream`.
    UserError if it holds something else."""
    *lines, torn = out.read_bytes().split(b"\n")
    if len(lines) + bool(torn) > len(jobs):
        raise UserError(
            f"{out}: holds more than the {len(jobs)} answers asked for; give another --out"
        )
    for number, (line, (example, count)) in enumerate(zip(lines, jobs, strict=False), 1):
        try:
            row = json.loads(line)
            found = (row["id"], row["agent"], row["seed"], row["meta"]["made"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{out}, line {number}: is no answer of sample.py; give another --out"
            ) from None
        if found != (example.id, agent, derive_seed(seed, example.id, count), example.meta["made"]):
            problem = "was made from other prompts, with other settings or another seed, or by another PATH"
            raise UserError(f"{out}, line {number}: {problem}; give another --out")
    begins = f'{{"id": "{jobs[len(lines)][0].id}"'.encode() if torn else b""
    if not (begins.startswith(torn) or torn.startswith(begins)):
        raise UserError(f"{out}: does not end as answers of sample.py do; give another --out")
    stream.truncate(sum(len(line) + 1 for line in lines))
    return len(lines)
