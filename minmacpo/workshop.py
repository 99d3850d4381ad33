"""Bases in memory, each with one slot: what stages train, score with and sample from.

Agents exchange text: whoever trains on an answer or scores it renders it with its own tokenizer.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minmacpo import UserError
from minmacpo.bases import Base
from minmacpo.checkpoint import load_adapter, load_model, read_adapter_config, stop_ids, weight_files
from minmacpo.config import Config
from minmacpo.data import Example, Message, Pair, Sample
from minmacpo.files import read_json, read_records
from minmacpo.generate import generate
from minmacpo.lora import attach_lora, clear_adapter, write_adapter
from minmacpo.machine import device_of, dtype_of
from minmacpo.run import Run, Stage, Work, derive_seed
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
        return [Example(r.id, r.prompt, getattr(r, self.side), r.meta) for r in self.records()]

    def records(self) -> list[Pair] | list[Sample]:
        """All that the file says of them."""
        return read_records(self.stage.path / self.file, Sample if self.side == "response" else Pair)

    @property
    def settings(self) -> list[str]:
        return [self.file, self.side]


@dataclass(slots=True)
class Loaded:
    """A base in memory with its slot: `slot_params` is all that ever trains; `limit` in tokens."""

    model: torch.nn.Module
    slot_params: list
    tokenizer: Tokenizer
    stops: set[int]
    limit: int


def load_base(folder: Path, config: Config) -> Loaded:
    """The model of an HF folder with an empty slot, on the run's device in the run's dtype."""
    model, tokenizer = load_model(folder, device_of(config), dtype_of(config)), load_tokenizer(folder)
    limit = min(config.data.max_length, model.config.max_position_embeddings)
    return Loaded(model, attach_lora(model, config.lora), tokenizer, stop_ids(folder, tokenizer), limit)


def open_folder(folder: Path, config: Config) -> tuple[Loaded, Path, str | None]:
    """(model, folder of its base, template it was trained with, if known) of a base or adapter folder.
    Raises UserError if `folder` is neither, or if the adapter's base is not where it says."""
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
        self.loaded: dict[str, Loaded] = {}  # the last used one last

    def use(self, base: Base, adapter: Stage | None) -> Loaded:
        """The base with `adapter` in its slot; None: the slot switched off."""
        key, folder = base.stage.fingerprint, base.stage.path
        if key not in self.loaded:
            size = sum(file.stat().st_size for file in weight_files(folder))
            while self.loaded and free_bytes(device_of(self.config)) < 2 * size:
                del self.loaded[next(iter(self.loaded))]
        loaded = self.loaded[key] = self.loaded.pop(key, None) or load_base(folder, self.config)
        if adapter is None:
            clear_adapter(loaded.model)
        else:
            write_adapter(loaded.model, load_adapter(adapter.path), str(adapter.path))
        return loaded

    def stage(self, name: str, kind: str, settings: dict, inputs: Sequence[Stage | None],
              compute: Callable[[Work], dict], key: tuple = (), size: str = "") -> Stage:  # fmt: skip
        """`Run.stage` with the settings that every stage with a model depends on, and the inputs not None."""
        config = self.config
        common = {"template": config.data.template, "device": device_of(config),
                  "dtype": str(dtype_of(config)), "max_length": config.data.max_length,
                  "micro_tokens": config.run.micro_tokens, "lora": asdict(config.lora),
                  "compile": config.run.compile}  # fmt: skip
        return self.run.stage(name, kind, common | settings, [s for s in inputs if s], compute, key, size)

    def render(self, loaded: Loaded, prompt: Sequence[Message], response: str) -> Tokens:
        """A prompt and its answer as ids and mask."""
        return render(loaded.tokenizer, self.config.data.template, prompt, response)

    @property
    def compiled(self) -> bool:
        """Whether the loss chunk goes through torch.compile."""
        wanted = self.config.run.compile
        return wanted == "true" or (wanted == "auto" and device_of(self.config) == "cuda")


def free_bytes(device: str) -> int:
    """Memory that is still free on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def answer(config: Config, loaded: Loaded, agent: str, jobs: list[tuple[Example, int]],
           seed: int) -> list[Sample]:  # fmt: skip
    """One sample per job (a prompt, the number of the answer), all decoded side by side."""
    template, tokenizer = config.data.template, loaded.tokenizer
    seeds = [derive_seed(seed, example.id, number) for example, number in jobs]
    prompts = [render_prompt(tokenizer, template, example.prompt) for example, _ in jobs]
    room = loaded.model.config.max_position_embeddings - config.generate.max_new
    if (longest := max(map(len, prompts))) > room:
        raise UserError(f"a prompt has {longest} tokens; at most {room} fit before the answer")
    found = generate(loaded.model, prompts, seeds, config.generate, loaded.stops)
    samples = []
    for (e, _), own, new, logp in zip(jobs, seeds, *found, strict=True):
        text, ppl = response_text(tokenizer, template, new), perplexity(logp, len(new))
        finish = "stop" if new[-1] in loaded.stops else "length"
        samples.append(Sample(e.id, e.prompt, text, finish, tuple(new), logp, ppl, agent, own, e.meta))
    return samples
