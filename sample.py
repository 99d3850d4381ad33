"""Ask a base or an adapter: python sample.py PATH [PROMPT] [--prompts FILE --out FILE] [--export DIR].

PATH is a model folder, or an adapter folder such as runs/world/round3/student_pos. FILE holds one
prompt per line, as text or as {"prompt": text}; the answers go to --out as JSON lines. --export
writes base and adapter merged as one Hugging Face folder. --generate.KEY=VALUE and --run.seed=N as
in train.py; the defaults are those of the run that PATH belongs to.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from dataclasses import replace
from pathlib import Path

from minmacpo import UserError


def parse_words(argv: list[str]) -> tuple[Namespace, dict[str, str]]:
    """The words of the command line, and the settings among them."""
    parser = ArgumentParser("sample.py", description=__doc__, formatter_class=RawTextHelpFormatter)
    for name in ("path", "prompt"):
        parser.add_argument(name, nargs="?")
    for name in ("prompts", "out", "export"):
        parser.add_argument(f"--{name}")
    words, rest = parser.parse_known_args(argv)
    settings = dict(word[2:].partition("=")[::2] for word in rest)
    if not all(word.startswith(("--generate.", "--run.")) and "=" in word for word in rest):
        raise UserError(f"{' '.join(rest)}: expected --generate.KEY=VALUE; see sample.py --help")
    if not words.path or not (words.prompt or words.prompts or words.export):
        raise UserError("expected PATH and a PROMPT, --prompts FILE or --export DIR; see sample.py --help")
    if bool(words.prompts) != bool(words.out):
        raise UserError("--prompts FILE and --out FILE belong together")
    for target in (words.out, words.export):
        if target and Path(target).exists():
            raise UserError(f"{target}: exists already; it is not overwritten")
    return words, settings


def read_prompts(file: str) -> list[str]:
    """The prompts of a file, one per line."""
    from minmacpo.data import read_lines

    prompts = []
    for number, line in read_lines(Path(file)):
        try:
            prompt = json.loads(line).get("prompt") if line.startswith("{") else line
        except ValueError:
            raise UserError(f"{file}, line {number}: is no JSON") from None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f'{file}, line {number}: expected a prompt, as text or as {{"prompt": text}}')
        prompts.append(prompt)
    return prompts


def settings_of(folder: Path, flags: dict[str, str]):
    """The settings of the run that `folder` belongs to, if any, with `flags` laid over them."""
    from minmacpo.commandline import overlay, read_toml
    from minmacpo.config import Config, check

    home = next((p / "config.toml" for p in folder.absolute().parents if (p / "config.toml").is_file()), None)
    config = overlay(overlay(Config(), read_toml(home) if home else {}, str(home)), flags, "command line")
    check(config)
    return config


def main(argv: list[str]) -> int:
    """Answer or export what the command line asks for; returns the exit code."""
    words, flags = parse_words(argv)
    prompts = ([words.prompt] if words.prompt else []) + (read_prompts(words.prompts) if words.prompts else [])
    from minmacpo.checkpoint import export_merged
    from minmacpo.data import Example, Message, example_id
    from minmacpo.files import write_records
    from minmacpo.tokenizer import default_template
    from minmacpo.workshop import answer, open_folder

    folder = Path(words.path)
    loaded, base, template = open_folder(folder, config := settings_of(folder, flags))
    template = template or default_template(loaded.tokenizer)
    most = min(config.generate.max_new, loaded.model.config.max_position_embeddings // 2)
    config = replace(config, data=replace(config.data, template=template), generate=replace(config.generate, max_new=most))
    if words.export:
        export_merged(loaded.model, base, Path(words.export))
        print(f"merged model: {words.export}")
    examples = [Example(example_id(p), p, "") for p in ((Message("user", prompt),) for prompt in prompts)]
    size, samples = config.generate.batch, []
    for start in range(0, len(examples), size):
        jobs = [(example, 0) for example in examples[start : start + size]]
        samples += answer(config, loaded, str(folder), jobs, config.run.seed)
    if words.out:
        write_records(Path(words.out), samples)
        print(f"{len(samples)} answers: {words.out}")
    else:
        print(*(sample.response for sample in samples), sep="\n")
    return 0


if __name__ == "__main__":
    from minmacpo.program import call

    sys.exit(call(main))
