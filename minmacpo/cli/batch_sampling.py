"""Answers to a file of prompts, in a file that only grows: a killed program goes on where it was.

Prompts are answered in fixed blocks of generate.batch rows, in their order. A block that a kill has
torn is sampled again whole, with the same rows side by side, so that every number comes out the
same; of its rows those are added that are not there yet.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.core.checkpoint import read_adapter_config
from minmacpo.data.dialogues import with_system
from minmacpo.data.formats import column_warnings, read_data
from minmacpo.data.records import Example, Pair
from minmacpo.pipeline.base_models import model_fingerprint
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.prepare_data import truncate_pairs
from minmacpo.pipeline.sample_stage import Request, Sampler
from minmacpo.runtime.device import resolve_device, resolve_dtype
from minmacpo.runtime.files import fingerprint, open_locked, sha256_file, to_jsonl, with_path
from minmacpo.runtime.progress import Progress, escape_control_chars
from minmacpo.runtime.seeds import derive_seed


def read_prompts(file: Path, config: Config) -> list[Pair]:
    """The prompts of a file's rows, of any form that data.path takes, or a prompt per line.

    What was read and skipped is printed, a line for each file.
    """
    data = config.data
    pairs, reports = read_data(
        str(file),
        preference_label=data.preference_label,
        skip_invalid=data.on_invalid_row == "skip",
        max_rows=data.max_examples,
        setting="--prompts",
        plain_prompts=True,
    )
    for name, report in reports.items():
        print(escape_control_chars(f"{name}: {report}"), flush=True)
    for warning in column_warnings(reports):
        print(f"WARNING: {escape_control_chars(warning)}", file=sys.stderr)
    prompts = []
    for pair in pairs:
        prompt = with_system(pair.prompt, data.system)
        prompts.append(replace(pair, prompt=prompt, chosen="", rejected=""))
    return prompts


def answer_file(
    config: Config,
    loaded: LoadedModel,
    folder: Path,
    base: Path,
    pairs: Sequence[Pair],
    answers: int,
    out: Path,
) -> None:
    """Add to `out` the answers that are not there yet, and print how many there are.

    Args:
        folder: of the adapter, or of the base where there is none.
        base: folder of its base.
        pairs: whose prompts are answered.
        answers: how many to each prompt.
    """
    prompts = fit_prompts(config, loaded, pairs)
    # Every answer says in its meta["made"] what it depends on, so that others are not mixed with it
    identity = identify_answers(config, folder, base, prompts, answers)
    requests = []
    for prompt in prompts:
        prompt = replace(prompt, meta=prompt.meta | {"made": identity})
        requests += [Request(prompt, number) for number in range(answers)]

    already = write_answers(config, loaded, str(folder), requests, out)
    note = f" ({already} were there already)" if already else ""
    print(f"{len(requests)} answers: {out}{note}")


def fit_prompts(config: Config, loaded: LoadedModel, pairs: Sequence[Pair]) -> list[Example]:
    """The prompts that leave room for an answer; what happened to the others is printed.

    Raises:
        UserError: no prompt is left.
    """
    context = loaded.context
    new_tokens = config.generate.max_new_tokens
    room = context - new_tokens
    fitting, reasons = truncate_pairs(config, loaded.renderer, pairs, room, context)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    note = (
        f"{counts}: with generate.max_new_tokens = {new_tokens} there is room for "
        f"{max(room, 0)} tokens; see data.truncation_mode"
    )
    if not fitting:
        raise UserError(f"no prompt is left; {note}")
    if reasons:
        print(escape_control_chars(note), flush=True)
    return [Example(pair.id, pair.prompt, "", pair.meta) for pair in fitting]


def identify_answers(
    config: Config, folder: Path, base: Path, prompts: Sequence[Example], answers: int
) -> str:
    """A fingerprint of all that the answers to these prompts depend on."""
    identity = {
        "agent": identify_agent(folder, base),
        "generate": asdict(config.generate),
        "seed": config.run.seed,
        "template": config.data.template,
        "system": config.data.system,
        "quantize": config.model.quantize,
        "device": resolve_device(config.run.device),
        "dtype": str(resolve_dtype(config.run.dtype, config.run.device)),
        "prompts": [prompt.id for prompt in prompts],
        "count": answers,
    }
    return fingerprint(identity)


def identify_agent(folder: Path, base: Path) -> str:
    """A fingerprint of a base, and of its adapter if it has one."""
    if folder == base:
        return model_fingerprint(base)
    lora, _ = read_adapter_config(folder)
    adapter = [asdict(lora), sha256_file(folder / "adapter_model.safetensors")]
    return fingerprint([model_fingerprint(base), adapter])


def write_answers(
    config: Config, loaded: LoadedModel, agent: str, requests: Sequence[Request], out: Path
) -> int:
    """Add to `out` the answers that are not there yet; returns how many were.

    Raises:
        UserError: it holds anything but answers to these requests by the agent of this name, or
            another process writes it.
    """
    if out.exists() and not out.is_file():
        raise UserError(f"{out}: is no ordinary file, to which answers could be added")
    busy = f"{out}: another process is writing it; wait for it, or give another --out"
    sampler = Sampler(loaded, config.generate, agent, config.run.seed)
    block_size = config.generate.batch

    # with_path also covers the closing of the file, which writes what could not be written before
    with with_path(out), open_locked(out, "ab", busy) as stream:
        already = count_answers(out, agent, requests, config.run.seed, stream)
        done = already
        with Progress("answers", len(requests), "answer", done, None) as progress:
            while done < len(requests):
                # The whole block of the first missing answer, as it was begun before a kill
                start = done - done % block_size
                block = sampler(requests[start : start + block_size])
                missing = block[done - start :]
                stream.write(to_jsonl(missing).encode())
                stream.flush()
                os.fsync(stream.fileno())
                done += len(missing)
                progress.step(len(missing))
    return already


def count_answers(
    out: Path, agent: str, requests: Sequence[Request], seed: int, stream: BinaryIO
) -> int:
    """How many of the requests `out` answers already.

    A last line that a kill has torn is taken off through `stream`.

    Raises:
        UserError: it holds something else.
    """
    *lines, torn = out.read_bytes().split(b"\n")  # what follows the last line end
    if len(lines) + bool(torn) > len(requests):
        raise UserError(
            f"{out}: holds more than the {len(requests)} answers asked for; give another --out"
        )
    for number, line in enumerate(lines, start=1):
        check_answer(line, requests[number - 1], agent, seed, f"{out}, line {number}")

    if torn:
        beginning = f'{{"id": "{requests[len(lines)].prompt.id}"'.encode()
        if not (beginning.startswith(torn) or torn.startswith(beginning)):
            raise UserError(f"{out}: does not end as answers of sample.py do; give another --out")
    stream.truncate(sum(len(line) + 1 for line in lines))
    return len(lines)


def check_answer(line: bytes, request: Request, agent: str, seed: int, where: str) -> None:
    """Raise UserError unless the line answers the request, with these settings."""
    prompt = request.prompt
    try:
        row = json.loads(line)
        answer = (row["id"], row["agent"], row["seed"], row["meta"]["made"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{where}: is no answer of sample.py; give another --out") from None
    expected_seed = derive_seed(seed, prompt.id, request.number)
    if answer != (prompt.id, agent, expected_seed, prompt.meta["made"]):
        raise UserError(
            f"{where}: was made from other prompts, with other settings or another seed, or by "
            "another PATH; give another --out"
        )
