"""Opens a model, or an adapter with its base, for the programs that talk to it or measure it."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.parse import override
from minmacpo.config.schema import Config
from minmacpo.core.checkpoint import load_adapter, read_adapter_config, why_no_folder, why_unread
from minmacpo.core.lora import set_adapter_weights
from minmacpo.data.chat_template import template_hint
from minmacpo.data.tokenizer import Tokenizer
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.run_dir import check_stage
from minmacpo.runtime.device import configure_torch
from minmacpo.runtime.files import read_json
from minmacpo.runtime.hub import local_folder
from minmacpo.runtime.progress import escape_control_chars


@dataclass(frozen=True, slots=True)
class OpenedFolder:
    """A model from a folder, the folder of its base, and the template it was trained with."""

    loaded: LoadedModel
    base_folder: Path
    template: str | None  # None: not known


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
    opened = open_folder(folder, config)

    template = opened.template
    if template is None:
        requested = flags.get("data.template")
        template = default_chat_template(opened.base_folder, opened.loaded.tokenizer, requested)
    settings = {
        "data.template": template,
        "generate.max_new_tokens": min(config.generate.max_new_tokens, opened.loaded.context // 2),
    }
    config = override(config, settings | dict(flags), "command line")
    opened.loaded.template = config.data.template
    return config, opened.loaded, opened.base_folder


def open_folder(folder: Path, config: Config) -> OpenedFolder:
    """The model of a base or an adapter folder; model.quantize counts.

    Raises:
        UserError: the folder is neither, the adapter's base is not where it says, or a file of
            a stage is damaged.
    """
    if (folder / "adapter_config.json").is_file():
        return open_adapter(folder, config)
    if not folder.is_dir():
        raise UserError(f"{folder}: {why_no_folder(folder)}")
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder}: is no model: it has neither config.json nor adapter_config.json"
            f"{why_unread(folder)}"
        )
    check_stage(folder)
    loaded = LoadedModel(folder, config, config.model.quantize)
    return OpenedFolder(loaded, folder, settings_of(folder).get("template"))


def open_adapter(folder: Path, config: Config) -> OpenedFolder:
    """The base that an adapter folder names, with the adapter in its LoRA parameters."""
    lora, base_name = read_adapter_config(folder)
    base_folder = find_base(folder, base_name)
    check_stage(folder)
    check_stage(base_folder)
    loaded = LoadedModel(base_folder, replace(config, lora=lora), config.model.quantize)
    set_adapter_weights(loaded.model, load_adapter(folder), str(folder))
    template = settings_of(folder).get("template") or settings_of(base_folder).get("template")
    return OpenedFolder(loaded, base_folder, template)


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


def default_chat_template(folder: Path, tokenizer: Tokenizer, requested: str | None) -> str:
    """The template for a base of which no run is known: as requested, or as its tokens suggest.

    Where the chat template of the folder looks like another one, a warning on stderr says so.
    """
    if requested:
        template = requested
    elif tokenizer.turn_marks:
        template = "turns"
    else:
        template = "plain"
    hint = template_hint(folder, template)
    if hint:
        print(f"WARNING: {escape_control_chars(hint)}", file=sys.stderr)
    return template
