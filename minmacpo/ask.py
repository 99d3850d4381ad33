"""One folder, a few prompts: what `sample.py` does, as two functions for a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minmacpo import UserError
from minmacpo.checkpoint import load_adapter, read_adapter_config
from minmacpo.commandline import overlay, read_toml
from minmacpo.config import Config, check
from minmacpo.data import Message, Sample, example_id
from minmacpo.files import read_json
from minmacpo.generate import generate
from minmacpo.lora import write_adapter
from minmacpo.run import derive_seed
from minmacpo.score import perplexity
from minmacpo.stages import Loaded, load_base
from minmacpo.tokenizer import default_template, render_prompt, response_text


@dataclass(frozen=True, slots=True)
class Opened:
    """A model ready to answer, the folder of its base, and the settings it answers with."""

    loaded: Loaded
    base: Path
    config: Config


def open_folder(folder: Path, settings: dict[str, str]) -> Opened:
    """The model behind a base folder or an adapter folder; UserError if it is neither.

    Settings come from the run that the folder belongs to, if any, and then from `settings`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder")
    home = next((p / "config.toml" for p in folder.absolute().parents if (p / "config.toml").is_file()), None)
    config = overlay(Config(), read_toml(home), str(home)) if home else Config()
    config = overlay(config, settings, "command line")
    check(config)
    base = folder
    if (folder / "adapter_config.json").is_file():
        lora, named = read_adapter_config(folder)
        config = replace(config, lora=lora)
        base = next((p for p in (folder / named, Path(named)) if named and p.is_dir()), None)
        if base is None:
            raise UserError(f"{folder}: its base {named!r} is not there")
    elif not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is no model: it has neither config.json nor adapter_config.json")
    loaded = load_base(base, config)
    if base != folder:
        write_adapter(loaded.model, load_adapter(folder), str(folder))
    template = stored_template(folder) or default_template(loaded.tokenizer)
    return Opened(loaded, base, replace(config, data=replace(config.data, template=template)))


def stored_template(folder: Path) -> str | None:
    """The template that an adapter was trained with, as its stage.json says."""
    notes = folder / "stage.json"
    return read_json(notes)["settings"].get("template") if notes.is_file() else None


def answer(opened: Opened, prompts: Sequence[str]) -> list[Sample]:
    """One answer per prompt, in order; the same prompt gets the same answer under the same seed."""
    loaded, config = opened.loaded, opened.config
    settings, samples = config.generate, []
    for start in range(0, len(prompts), settings.batch):
        messages = [(Message("user", prompt),) for prompt in prompts[start : start + settings.batch]]
        ids = [render_prompt(loaded.tokenizer, config.data.template, m) for m in messages]
        room = loaded.model.config.max_position_embeddings - settings.max_new
        if max(map(len, ids)) > room:
            raise UserError(f"a prompt has {max(map(len, ids))} tokens; at most {room} fit before the answer")
        names = [example_id(m) for m in messages]
        seeds = [derive_seed(config.run.seed, name) for name in names]
        tokens, logps = generate(loaded.model, ids, seeds, settings, loaded.stops)
        for name, message, new, logp, seed in zip(names, messages, tokens, logps, seeds, strict=True):
            finish = "stop" if new[-1] in loaded.stops else "length"
            text = response_text(loaded.tokenizer, config.data.template, new)
            samples.append(Sample(name, message, text, finish, tuple(new), logp, perplexity(logp, len(new)), str(opened.base), seed))
    return samples
