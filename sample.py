"""Ask a base or an adapter: python sample.py PATH [PROMPT] [--prompts FILE --out FILE] [--export DIR].

PATH is a model or adapter folder, FILE holds a prompt per line, as text or as {"prompt": text}; answers go to --out as
JSON lines, --export merges base and adapter. --generate.KEY=, --run.seed=… and --data.template= are as in PATH's run.
"""

import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path

from minmacpo import UserError
from minmacpo.commandline import overlay, read_toml
from minmacpo.config import Config, check
from minmacpo.data import Example, Message, example_id, read_lines
from minmacpo.files import move, write_rows
from minmacpo.progress import call

ACCEPTED = ("--generate.", "--data.template=", "--run.seed=", "--run.device=", "--run.dtype=", "--run.threads=")


def parse_words(argv: list[str]) -> tuple[Namespace, dict[str, str]]:
    """The words of the command line, and the settings among them."""
    parser = ArgumentParser("sample.py", description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("prompt", nargs="?")
    for name in ("--prompts", "--out", "--export"):
        parser.add_argument(name, type=Path)
    words, rest = parser.parse_known_args(argv)
    if odd := [word for word in rest if not word.startswith(ACCEPTED) or "=" not in word]:
        raise UserError(f"{odd[0]}: expected --generate.KEY=, --run.seed=, device, dtype, threads or --data.template=")
    asked = words.prompt or words.prompts or words.export
    if not words.path or not asked or bool(words.prompts) != bool(words.out):
        raise UserError("expected PATH and PROMPT, --prompts FILE with --out FILE, or --export DIR (--help)")
    if taken := [target for target in (words.out, words.export) if target and target.exists()]:
        raise UserError(f"{taken[0]}: exists already; it is not overwritten")
    return words, dict(word[2:].split("=", 1) for word in rest)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, one per line."""
    prompts = []
    for number, line in read_lines(file):
        try:
            prompt = json.loads(line)["prompt"] if line.startswith("{") else line
        except (ValueError, KeyError, RecursionError):
            prompt = None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f'{file}, line {number}: expected a prompt, as text or as {{"prompt": text}}')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{file}: holds no prompt")
    return prompts


def settings_of(folder: Path, flags: dict[str, str]) -> Config:
    """The settings of the run that `folder` is a stage of, or else the defaults, with `flags` over them."""
    home = folder.resolve().parent.parent / "config.toml"
    known = read_toml(home) if home.is_file() and (folder / "stage.json").is_file() else {}
    config = overlay(Config(), known | {"model.context": 10**9}, str(home))  # `answer` checks the model's own
    check(config := overlay(config, flags, "command line"))
    return config


def main(argv: list[str]) -> int:
    """Answer or export what the command line asks for; returns the exit code."""
    words, flags = parse_words(argv)
    texts = ([words.prompt] if words.prompt else []) + (read_prompts(words.prompts) if words.prompts else [])
    import torch

    from minmacpo.checkpoint import export_merged
    from minmacpo.workshop import answer, open_folder, usual_template

    config = settings_of(words.path, flags)
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    loaded, base, template = open_folder(words.path, config)
    most = min(config.generate.max_new, loaded.model.config.max_position_embeddings // 2)
    template = template or usual_template(base, loaded.tokenizer, flags.get("data.template"))
    config = overlay(config, {"data.template": template, "generate.max_new": most} | flags, "command line")
    if words.export:
        words.export.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=words.export.parent) as beside:
            export_merged(loaded.model, base, Path(beside) / "whole")
            move(Path(beside) / "whole", words.export)
        print(f"merged model: {words.export}")
    prompts, samples, size = [(Message("user", text),) for text in texts], [], config.generate.batch
    jobs = [(Example(example_id(prompt), prompt, ""), 0) for prompt in prompts]
    for i in range(0, len(jobs), size):
        samples += answer(config, loaded, str(words.path), jobs[i : i + size], config.run.seed)
    if words.out:
        write_rows(words.out, samples)
    said = [f"{len(samples)} answers: {words.out}"] if words.out else [sample.response for sample in samples]
    print(*said, sep="\n", end="\n" * bool(said))
    return 0


if __name__ == "__main__":
    sys.exit(call(main, "what is not announced above is not done, and nothing half-written is left."))
