"""Ask a base or an adapter: python sample.py PATH [PROMPT] [--prompts FILE --out FILE] [--export DIR].

PATH is a model folder, or an adapter folder such as runs/world/round3/student_pos. FILE holds one
prompt per line, as text or as {"prompt": text}; answers go to --out as JSON lines. --export writes
base and adapter merged into one Hugging Face folder. --generate.KEY=VALUE and --run.seed=N as in
train.py; the defaults are those of the run that PATH belongs to.
"""

import argparse
import json
import sys
from pathlib import Path

from minmacpo import UserError


def parse_words(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The words of the command line, and the settings among them."""
    parser = argparse.ArgumentParser("sample.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("prompt", nargs="?")
    for name, words in (("prompts", "file with one prompt per line"), ("out", "file for the answers"),
                        ("export", "folder for the merged model")):  # fmt: skip
        parser.add_argument(f"--{name}", help=words)
    words, rest = parser.parse_known_args(argv)
    settings = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--") and "=" in word)
    if len(settings) != len(rest) or not all(k.startswith(("generate.", "run.")) for k in settings):
        raise UserError(f"{' '.join(rest)}: expected --generate.KEY=VALUE; see sample.py --help")
    if not (words.prompt or words.prompts or words.export):
        raise UserError("nothing to do: give a PROMPT, --prompts FILE or --export DIR")
    return words, settings


def read_prompts(words: argparse.Namespace) -> list[str]:
    """The prompts that were asked for, in order."""
    prompts = [words.prompt] if words.prompt else []
    if words.prompts:
        from minmacpo.data import read_lines

        for number, line in read_lines(Path(words.prompts)):
            try:
                row = json.loads(line) if line.startswith("{") else {"prompt": line}
            except ValueError:
                raise UserError(f"{words.prompts}, line {number}: is no JSON") from None
            if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
                raise UserError(f'{words.prompts}, line {number}: expected a prompt as text or {{"prompt": text}}')
            prompts.append(row["prompt"])
    return prompts


def main(argv: list[str]) -> int:
    words, settings = parse_words(argv)
    prompts = read_prompts(words)
    if words.prompts and not words.out:
        raise UserError("--prompts FILE needs --out FILE for the answers")
    for target in (words.out, words.export):
        if target and Path(target).exists():
            raise UserError(f"{target}: exists already; it is not overwritten")
    from minmacpo.ask import answer, open_folder
    from minmacpo.checkpoint import export_merged
    from minmacpo.files import write_records

    opened = open_folder(Path(words.path), settings)
    if words.export:
        export_merged(opened.loaded.model, opened.base, Path(words.export))
        print(f"merged model: {words.export}")
    samples = answer(opened, prompts)
    if words.out:
        write_records(Path(words.out), samples)
        print(f"{len(samples)} answers: {words.out}")
    else:
        for sample in samples:
            print(sample.response)
    return 0


if __name__ == "__main__":
    from minmacpo.program import call

    sys.exit(call(main))
