"""Bases in memory, each with one slot: what stages train, score with and sample from.

Text is the interface between agents: an answer travels as text, and whoever trains on it or scores
it renders it with its own tokenizer.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minmacpo import UserError
from minmacpo.bases import Base
from minmacpo.checkpoint import load_adapter, load_model, read_adapter_config, stop_ids, weight_files
from minmacpo.config import Config
from minmacpo.data import Example, Pair, Sample, chosen_side, rejected_side
from minmacpo.files import read_json, read_records
from minmacpo.generate import generate
from minmacpo.lora import attach_lora, clear_adapter, write_adapter
from minmacpo.machine import device_of, dtype_of
from minmacpo.run import Run, Stage, derive_seed
from minmacpo.score import perplexity
from minmacpo.tokenizer import Tokenizer, Tokens, load_tokenizer, render, render_prompt, response_text


@dataclass(frozen=True, slots=True)
class Texts:
    """One answer per prompt: a side of a file of pairs, or the responses of a file of samples."""

    stage: Stage
    file: str = "samples.jsonl"
    side: str = "response"

    def read(self) -> list[Example]:
        """The texts, in the file's order."""
        path = self.stage.path / self.file
        if self.side == "response":
            return [Example(s.id, s.prompt, s.response, s.meta | {"finish": s.finish}) for s in read_records(path, Sample)]
        side = chosen_side if self.side == "chosen" else rejected_side
        return [side(pair) for pair in read_records(path, Pair)]

    @property
    def settings(self) -> list[str]:
        return [self.file, self.side]


@dataclass(slots=True)
class Loaded:
    """A base in memory with its slot: `slot_params` is all that ever trains."""

    model: torch.nn.Module
    slot_params: list
    tokenizer: Tokenizer
    stops: set[int]


def load_base(folder: Path, config: Config) -> Loaded:
    """The model of an HF folder with an empty slot, on the run's device in the run's dtype."""
    model = load_model(folder, device_of(config), dtype_of(config))
    tokenizer = load_tokenizer(folder)
    return Loaded(model, attach_lora(model, config.lora), tokenizer, stop_ids(folder, tokenizer))


def open_folder(folder: Path, config: Config) -> tuple[Loaded, Path, str | None]:
    """(model, folder of its base, template it was trained with, if known) of a base or adapter folder.

    Raises UserError if `folder` is neither, or if the adapter's base is not where it says.
    """
    if not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: is no model: it has neither config.json nor adapter_config.json")
        return load_base(folder, config), folder, None
    lora, named = read_adapter_config(folder)
    base = next((p for p in (folder / named, Path(named)) if named and p.is_dir()), None)
    if base is None:
        raise UserError(f"{folder}: its base {named!r} is not there")
    loaded = load_base(base, replace(config, lora=lora))
    write_adapter(loaded.model, load_adapter(folder), str(folder))
    notes = folder / "stage.json"
    return loaded, base, read_json(notes)["settings"].get("template") if notes.is_file() else None


class Workshop:
    """The run, and the bases that stay in memory between stages (oldest out when memory is short)."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()

    def use(self, base: Base, adapter: Stage | None) -> Loaded:
        """The base with `adapter` in its slot; None: the slot switched off."""
        key = base.stage.fingerprint
        if key not in self.loaded:
            size = sum(file.stat().st_size for file in weight_files(base.stage.path))
            while self.loaded and free_bytes(device_of(self.config)) < 2 * size:
                self.loaded.popitem(last=False)
            self.loaded[key] = load_base(base.stage.path, self.config)
        self.loaded.move_to_end(key)
        loaded = self.loaded[key]
        if adapter is None:
            clear_adapter(loaded.model)
        else:
            write_adapter(loaded.model, load_adapter(adapter.path), str(adapter.path))
        return loaded

    def settings(self, *sections) -> dict:
        """What every stage with a model depends on, and the given parts of the configuration."""
        config = self.config
        common = {"template": config.data.template, "device": device_of(config), "dtype": str(dtype_of(config)),
                  "max_length": config.data.max_length, "micro_tokens": config.run.micro_tokens,
                  "lora": asdict(config.lora), "compile": config.run.compile}  # fmt: skip
        for section in sections:
            common |= section if isinstance(section, dict) else asdict(section)
        return common

    @property
    def compiled(self) -> bool:
        """Whether the loss chunk goes through torch.compile."""
        return self.config.run.compile == "true" or (
            self.config.run.compile == "auto" and device_of(self.config) == "cuda"
        )


def free_bytes(device: str) -> int:
    """Memory that is still free on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def present(*stages: Stage | None) -> list[Stage]:
    """The stages that are there."""
    return [stage for stage in stages if stage is not None]


def render_rows(shop: Workshop, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Tokens]:
    """Prompts and answers as ids and masks."""
    return [render(tokenizer, shop.config.data.template, e.prompt, e.response) for e in examples]


def answer(config: Config, loaded: Loaded, agent: str, jobs: Sequence[tuple[Example, int]], seed: int) -> list[Sample]:
    """One sample per job (a prompt, the number of the answer), all decoded side by side."""
    template, tokenizer = config.data.template, loaded.tokenizer
    seeds = [derive_seed(seed, example.id, number) for example, number in jobs]
    prompts = [render_prompt(tokenizer, template, example.prompt) for example, _ in jobs]
    room = loaded.model.config.max_position_embeddings - config.generate.max_new
    if max(map(len, prompts)) > room:
        raise UserError(f"a prompt has {max(map(len, prompts))} tokens; at most {room} fit before the answer")
    samples = []
    found = generate(loaded.model, prompts, seeds, config.generate, loaded.stops)
    for (example, _), one, new, logp in zip(jobs, seeds, *found, strict=True):
        text, finish = response_text(tokenizer, template, new), "stop" if new[-1] in loaded.stops else "length"
        meta = {k: v for k, v in example.meta.items() if k != "finish"}
        ppl = perplexity(logp, len(new))
        samples.append(Sample(example.id, example.prompt, text, finish, tuple(new), logp, ppl, agent, one, meta))
    return samples
