"""Ask a base or an adapter.

python sample.py PATH                             talk in a terminal: /reset, /quit; Ctrl-C ends an answer
python sample.py PATH PROMPT [--n=4]              one answer, or several
python sample.py PATH --prompts FILE --out FILE   answers as JSON lines; the same words go on after a kill
python sample.py PATH --export FOLDER             base and adapter merged into one Hugging Face folder

PATH is a model or adapter folder, or a run: its last student. --prompts takes rows of every form in the README, or a
prompt per line. Settings are those of PATH's run, or the defaults, under --generate.KEY= (temperature, top_k, top_p,
max_new_tokens, batch), --run.seed= (device, dtype, threads), --model.quantize= and --data.template= (label, on_invalid_row, long,
max_examples).
"""

import sys
from argparse import Namespace, RawTextHelpFormatter
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.parse import ArgParser, agent_flags, agent_settings, resolve_checkpoint
from minmacpo.data.records import Example, Message, example_id
from minmacpo.runtime.files import atomic_dir
from minmacpo.runtime.progress import escape_control_chars, run_main

ACCEPTED = (
    "--generate.",
    "--run.seed=",
    "--run.device=",
    "--run.dtype=",
    "--run.threads=",
    "--data.template=",
    "--data.preference_label=",
    "--data.on_invalid_row=",
    "--data.truncation_mode=",
    "--data.max_examples=",
    "--model.quantize=",
)


def parse_words(argv: list[str]) -> tuple[Namespace, dict[str, str]]:
    """The words of the command line, and the settings among them."""
    parser = ArgParser(
        "sample.py", description=__doc__, formatter_class=RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("prompt", nargs="?")
    for name in ("--prompts", "--out", "--export"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--n", default="1")
    words, rest = parser.parse_known_args(argv)
    flags, asked = agent_flags(rest, ACCEPTED), (words.prompt is not None) + bool(words.prompts)
    if not words.n.isdecimal() or not 0 < int(words.n) <= 1_000_000:
        raise UserError(f"--n={words.n}: expected a whole number above 0")
    if words.prompt is not None and not words.prompt.strip():
        raise UserError("PROMPT is empty")
    talking = not asked and not words.export and sys.stdin.isatty()
    if (
        not words.path
        or asked > 1
        or not (asked or words.export or talking)
        or bool(words.prompts) != bool(words.out)
    ):
        raise UserError(
            "expected PATH and PROMPT, --prompts FILE with --out FILE, or --export DIR (--help); PATH alone in a terminal"
        )
    if int(words.n) > 1 and not asked:
        raise UserError("--n is for a PROMPT or --prompts")
    if words.export and words.export.exists():
        raise UserError(f"{words.export}: exists already; it is not overwritten")
    return words, flags


def main(argv: list[str]) -> int:
    """Talk, answer or export as the command line asks; returns the exit code."""
    words, flags = parse_words(argv)
    folder, n = resolve_checkpoint(words.path), int(words.n)
    config = agent_settings(folder, flags)
    from minmacpo.cli.batch_sampling import fit_prompts, marked, read_prompts, write_answers
    from minmacpo.cli.chat import shown, talk
    from minmacpo.core.checkpoint import export_merged
    from minmacpo.pipeline.open_model import open_agent
    from minmacpo.pipeline.sample_stage import Request, Sampler

    rows, told = read_prompts(words.prompts, config) if words.prompts else ([], [])
    config, loaded, base = open_agent(folder, config, flags)
    if words.export:
        with atomic_dir(words.export) as folder_made:
            export_merged(loaded.model, base, folder_made)
        print(f"merged model: {words.export}")
    if words.prompts:
        prompts, lost = fit_prompts(config, loaded, rows)
        print(*map(escape_control_chars, filter(None, [*told, lost])), sep="\n", flush=True)
        found = write_answers(
            config, loaded, str(folder), marked(config, folder, base, prompts, n), words.out
        )
        print(
            f"{len(prompts) * n} answers: {words.out}"
            + f" ({found} were there already)" * bool(found)
        )
    elif words.prompt:
        prompt, size = (Message("user", words.prompt),), config.generate.batch
        example = Example(example_id(prompt), prompt, "")
        requests = [Request(example, number) for number in range(n)]
        sampler = Sampler(loaded, config.generate, str(folder), config.run.seed)
        for start in range(0, n, size):
            for number, said in enumerate(
                sampler(requests[start : start + size]),
                start + 1,
            ):
                print(f"[{number}] " * (n > 1) + shown(loaded, config.data.template, said))
    elif not words.export:
        talk(config, loaded, str(folder))
    return 0


if __name__ == "__main__":
    after = "what is not announced above is not done, and nothing half-written is left; the same words take up --out again."
    sys.exit(run_main(main, after))
