"""Opens a model, or an adapter with its base, for the programs that talk to it or measure it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minmacpo import UserError
from minmacpo.config.parse import override
from minmacpo.config.schema import Config
from minmacpo.core.checkpoint import load_adapter, read_adapter_config, why_no_folder, why_unread
from minmacpo.core.lora import set_adapter_weights
from minmacpo.data.own_template import own_template, template_warning
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.run_dir import check_stage
from minmacpo.runtime.device import configure_torch
from minmacpo.runtime.files import read_json
from minmacpo.runtime.hub import local_folder
from minmacpo.runtime.progress import escape_control_chars


@dataclass(frozen=True, slots=True)
class OpenedFolder:
    """A model from a folder, and the folder of its base."""

    loaded: LoadedModel
    base_folder: Path
    template_source: Literal["run", "request", "base"]  # see choose_template


def open_agent(
    folder: Path, config: Config, flags: Mapping[str, str]
) -> tuple[Config, LoadedModel, Path]:
    """The settings, the model and the folder of its base, of a base or an adapter folder.

    `config` is completed by what the folder says of the model: its template, how its base was
    quantized, and answers of at most half its context.

    Args:
        flags: settings from the command line, which stand over what the folder says.
    """
    quantization = flags.get("model.quantize", settings_of(folder).get("quantize", "none"))
    config = override(config, {"model.quantize": quantization}, str(folder / "stage.json"))
    configure_torch(config.run.threads)
    requested = requested_template(config) if "data.template" in flags else "own"
    opened = open_folder(folder, config, requested)
    loaded = opened.loaded
    say_template(opened.base_folder, loaded.template, opened.template_source)

    max_new_tokens = min(config.generate.max_new_tokens, loaded.context // 2)
    settings = {"generate.max_new_tokens": max_new_tokens} | dict(flags)
    config = override(config, settings | {"data.template": loaded.template}, "command line")
    return config, loaded, opened.base_folder


def requested_template(config: Config) -> str:
    """The one template of data.template; UserError where it has several, for several bases."""
    if len(config.data.template) > 1:
        raise UserError(
            f"data.template = {','.join(config.data.template)}: expected one template, as one "
            "model is asked"
        )
    return config.data.template[0]


def open_folder(folder: Path, config: Config, template: str = "own") -> OpenedFolder:
    """The model of a base or an adapter folder; model.quantize counts.

    Args:
        template: that dialogues are written in; "own": the one that the stage says which made the
            folder, or else the base's own.

    Raises:
        UserError: the folder is neither, the adapter's base is not where it says, or a file of
            a stage is damaged.
    """
    if (folder / "adapter_config.json").is_file():
        return open_adapter(folder, config, template)
    if not folder.is_dir():
        raise UserError(f"{folder}: {why_no_folder(folder)}")
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder}: is no model: it has neither config.json nor adapter_config.json"
            f"{why_unread(folder)}"
        )
    check_stage(folder)
    template, source = choose_template(template, [folder], folder)
    loaded = LoadedModel(folder, config, template, config.model.quantize)
    return OpenedFolder(loaded, folder, source)


def open_adapter(folder: Path, config: Config, template: str) -> OpenedFolder:
    """The base that an adapter folder names, with the adapter in its LoRA parameters."""
    lora, base_name = read_adapter_config(folder)
    base_folder = find_base(folder, base_name)
    check_stage(folder)
    check_stage(base_folder)
    template, source = choose_template(template, [folder, base_folder], base_folder)
    loaded = LoadedModel(base_folder, replace(config, lora=lora), template, config.model.quantize)
    set_adapter_weights(loaded.model, load_adapter(folder), str(folder))
    return OpenedFolder(loaded, base_folder, source)


def choose_template(template: str, stages: Sequence[Path], base_folder: Path) -> tuple[str, str]:
    """The template to write dialogues in, and how much is known of it.

    "run": a stage says which one the model was made with; otherwise "request" or "base", by where
    the template is from.

    Args:
        template: what is asked for; "own": the stage's, or else the base's own.
        stages: the folders that may be stages, the first of which counts.
    """
    known = [settings_of(folder).get("template") for folder in stages]
    known = [name for name in known if name]
    if known:
        return known[0] if template == "own" else template, "run"
    if template != "own":
        return template, "request"
    return own_template(base_folder), "base"


def find_base(folder: Path, base_name: str) -> Path:
    """The folder of an adapter's base: beside the adapter, or from where the program runs."""
    if base_name:
        for candidate in (folder / base_name, local_folder(base_name)):
            if candidate.is_dir():
                return candidate
    raise UserError(f"{folder}: its base {base_name!r} {why_no_folder(base_name)}")


def settings_of(folder: Path) -> dict:
    """The settings of the stage that a folder is; none if it is no stage."""
    file = folder / "stage.json"
    settings = read_json(file).get("settings") if file.is_file() else None
    return settings if isinstance(settings, dict) else {}


def say_template(folder: Path, template: str, source: str) -> None:
    """Say on stderr which template was found, and where the base's own looks like another one.

    Args:
        source: as choose_template has it; where a run has made the model, there is nothing to say.
    """
    if source == "run":
        return
    if source == "base":
        line = f"{folder}: dialogues are written as {template}, unless a template is given"
        print(escape_control_chars(line), file=sys.stderr)
    hint = template_warning(folder, template)
    if hint:
        print(f"WARNING: {escape_control_chars(hint)}", file=sys.stderr)
