r"""Ask a base or an adapter.

python sample.py PATH                             talk in a terminal: /reset, /quit; Ctrl-C ends an
                                                  answer
python sample.py PATH < FILE                      the lines are the turns of a dialogue; each gets
                                                  its answer on one line, line breaks as \n
python sample.py PATH PROMPT [--n=4]              one answer, or several
python sample.py PATH --prompts FILE --out FILE   answers as JSON lines; the same words go on after
                                                  a kill
python sample.py PATH --export FOLDER             base and adapter merged into one Hugging Face
                                                  folder

PATH is a model or adapter folder, or a run: its last student. --prompts takes rows of every form in
docs/data.md, or a prompt per line. Settings are those of PATH's run, or the defaults. These may be
given: --generate.KEY= (temperature, top_k, top_p, max_new_tokens, batch); --run.KEY= (seed, device,
dtype, threads); --model.quantize=; --data.KEY= (template, system, preference_label, on_invalid_row,
truncation_mode, max_examples).
"""

import io
import sys
from argparse import RawTextHelpFormatter
from dataclasses import dataclass
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.parse import ArgParser, agent_flags, agent_settings, resolve_checkpoint
from minmacpo.runtime.hub import local_folder
from minmacpo.runtime.progress import escape_control_chars, run_main

ACCEPTED = (
    "--generate.",
    "--run.seed=",
    "--run.device=",
    "--run.dtype=",
    "--run.threads=",
    "--data.template=",
    "--data.system=",
    "--data.preference_label=",
    "--data.on_invalid_row=",
    "--data.truncation_mode=",
    "--data.max_examples=",
    "--model.quantize=",
)
AFTER_STOP = (
    "what is not announced above is not done, and nothing half-written is left; the same words "
    "take up --out again."
)


@dataclass(frozen=True, slots=True)
class SampleCommand:
    """What the command line asks for. Without prompt, prompts and export: a dialogue."""

    path: Path
    flags: dict[str, str]  # settings by name
    prompt: str | None
    prompts: Path | None
    out: Path | None
    export: Path | None
    answers: int  # to each prompt


def main(argv: list[str]) -> int:
    """Talk, answer or export as the command line asks; returns the exit code."""
    command = parse_command(argv)
    folder = resolve_checkpoint(local_folder(command.path))
    config = agent_settings(folder, command.flags)

    from minmacpo.cli.batch_sampling import answer_file, read_prompts
    from minmacpo.cli.chat import answer_lines, print_answers, talk
    from minmacpo.pipeline.open_model import open_agent

    pairs = read_prompts(command.prompts, config) if command.prompts else []
    config, loaded, base = open_agent(folder, config, command.flags)
    if command.export:
        export(loaded.model, base, command.export)
        say_unused_template(base, loaded.template)
    if command.prompts:
        answer_file(config, loaded, folder, base, pairs, command.answers, command.out)
    elif command.prompt:
        print_answers(config, loaded, str(folder), command.prompt, command.answers)
    elif not command.export:
        stdin = sys.stdin or io.StringIO()  # None where it was closed
        if stdin.isatty():
            talk(config, loaded, str(folder))
        else:
            answer_lines(config, loaded, str(folder), stdin)
    return 0


def export(model, base: Path, target: Path) -> None:
    """Write base and adapter as one Hugging Face folder, whole or not at all."""
    from minmacpo.core.checkpoint import export_merged
    from minmacpo.runtime.files import atomic_dir

    with atomic_dir(target) as folder:
        dtype = export_merged(model, base, folder)
    print(f"merged model: {target} (in {dtype}, as its base)")


def say_unused_template(base: Path, template: str) -> None:
    """Warn where the exported folder's chat template, its base's, is not the one that was used."""
    from minmacpo.data.own_template import export_warning

    warning = export_warning(base, template)
    if warning:
        print(f"WARNING: {escape_control_chars(warning)}", file=sys.stderr)


def parse_command(argv: list[str]) -> SampleCommand:
    """The words of the command line; UserError for those that do not go together."""
    parser = ArgParser(
        "sample.py", description=__doc__, formatter_class=RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--export", type=Path)
    parser.add_argument("--n", default="1")
    words, settings = parser.parse_known_args(argv)
    flags = agent_flags(settings, ACCEPTED)

    if not words.n.isdecimal() or not 0 < int(words.n) <= 1_000_000:
        raise UserError(f"--n={words.n}: expected a whole number above 0")
    if words.prompt is not None and not words.prompt.strip():
        raise UserError("PROMPT is empty")
    two_tasks = words.prompt is not None and words.prompts is not None
    half_a_task = (words.prompts is None) != (words.out is None)
    if words.path is None or two_tasks or half_a_task:
        raise UserError(
            "expected PATH, and PROMPT, --prompts FILE with --out FILE, or --export DIR (--help); "
            "PATH alone talks in a terminal, or answers the lines of standard input"
        )
    answers_something = words.prompt is not None or words.prompts is not None
    if int(words.n) > 1 and not answers_something:
        raise UserError("--n is for a PROMPT or --prompts")
    if words.export is not None and words.export.exists():
        raise UserError(f"{words.export}: exists already; it is not overwritten")
    return SampleCommand(
        path=words.path,
        flags=flags,
        prompt=words.prompt,
        prompts=words.prompts,
        out=words.out,
        export=words.export,
        answers=int(words.n),
    )


if __name__ == "__main__":
    sys.exit(run_main(main, AFTER_STOP))
