"""Bases in memory, each with one slot: what stages train, score with and sample from.

Agents exchange text: whoever trains on an answer or scores it renders it with its own tokenizer.
"""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minmacpo import UserError
from minmacpo.config.parse import override
from minmacpo.config.schema import Config
from minmacpo.core.batching import scoring_tokens
from minmacpo.core.checkpoint import (
    check_sizes,
    load_adapter,
    load_model,
    read_adapter_config,
    read_config,
    stop_ids,
    why_no_folder,
    weight_bytes,
)
from minmacpo.core.lora import attach_lora, disable_adapter, set_adapter_weights
from minmacpo.core.prepack import is_sharded
from minmacpo.core.sampling import generate
from minmacpo.core.scoring import perplexity
from minmacpo.data.chat_template import (
    end_of_turn_ids,
    render,
    render_prompt,
    response_text,
    template_hint,
)
from minmacpo.data.records import Example, Message, Pair, Sample
from minmacpo.data.tokenizer import Tokenizer, Tokens, load_tokenizer
from minmacpo.pipeline.base_models import Base
from minmacpo.pipeline.prepare_data import truncate_pair
from minmacpo.pipeline.run import Run, Stage, StageContext, derive_seed
from minmacpo.pipeline.run_dir import check_stage
from minmacpo.runtime.device import (
    configure_torch,
    free_bytes,
    normalize_oom,
    resolve_device,
    resolve_dtype,
)
from minmacpo.runtime.distributed import SINGLE_PROCESS, Distributed
from minmacpo.runtime.files import JsonlView, read_json
from minmacpo.runtime.progress import escape_control_chars


@dataclass(frozen=True, slots=True)
class TextColumn:
    """One text per prompt: a side of a file of pairs, the responses of a file of samples ("untagged": as answers
    to the prompt without its tag), or questions."""

    stage: Stage
    file: str = "samples.jsonl"
    side: str = "response"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.stage.fingerprint, self.file, self.side

    @property
    def settings(self) -> dict[str, list[str]]:
        return {"texts": [self.file, self.side]}

    def read(self) -> Sequence[Example] | Sequence[Sample]:
        """The texts, in the file's order, each read from it where it is looked at; sampled ones with all that is known of them."""
        file = self.stage.path / self.file
        if self.side == "question":
            return JsonlView(file, Example)
        if self.side in ("response", "untagged"):
            return (
                JsonlView(file, Sample, untag)
                if self.side == "untagged"
                else JsonlView(file, Sample)
            )
        return JsonlView(
            file,
            Pair,
            lambda pair: Example(pair.id, pair.prompt, getattr(pair, self.side), pair.meta),
        )


def untag(sample: Sample) -> Sample:
    """The sample as if it had been asked for without a tag (templates.Template)."""
    return replace(
        sample, prompt=tuple(message for message in sample.prompt if message.role != "tag")
    )


class LoadedModel:
    """The model of an HF folder in memory with an empty slot, on the run's device in the run's dtype.
    `lora_params` is all that ever trains; a row longer than `limit` tokens is not trained on. `form`: see quant.py."""

    def __init__(
        self, folder: Path, config: Config, form: str = "none", dist: Distributed = SINGLE_PROCESS
    ):
        self.model = load_model(
            folder,
            "cpu" if dist.is_sharded else resolve_device(config.run.device),
            resolve_dtype(config.run.dtype, config.run.device),
            form,
        )
        self.lora_params, self.tokenizer = (
            attach_lora(self.model, config.lora),
            load_tokenizer(folder),
        )
        dist.shard(self.model, self.lora_params, resolve_device(config.run.device))
        check_sizes(folder, self.model.config, self.tokenizer)
        self.stops = stop_ids(folder, self.tokenizer)
        self.limit = min(config.data.max_length, self.model.config.max_position_embeddings)
        self.places = (
            sys.maxsize
        )  # answers side by side for which memory has not been too short yet

    def ends(self, template: str) -> set[int]:
        """The tokens that end an answer in this template."""
        return self.stops | end_of_turn_ids(self.tokenizer, template)


def open_folder(folder: Path, config: Config) -> tuple[LoadedModel, Path, str | None]:
    """(model, folder of its base, template it was trained with, if known) of a base or adapter folder; model.quantize counts.
    Raises UserError if `folder` is neither, if the adapter's base is not where it says, or if a stage's files are damaged."""
    if not (folder / "adapter_config.json").is_file():
        if not folder.is_dir():
            raise UserError(f"{folder}: {why_no_folder(folder)}")
        if not (folder / "config.json").exists():
            raise UserError(
                f"{folder}: is no model: it has neither config.json nor adapter_config.json"
            )
        check_stage(folder)
        return (
            LoadedModel(folder, config, config.model.quantize),
            folder,
            settings_of(folder).get("template"),
        )
    lora, named = read_adapter_config(folder)
    base = next((p for p in (folder / named, Path(named)) if named and p.is_dir()), None)
    if base is None:
        raise UserError(f"{folder}: its base {named!r} {why_no_folder(named)}")
    check_stage(folder)
    check_stage(base)
    loaded = LoadedModel(base, replace(config, lora=lora), config.model.quantize)
    set_adapter_weights(loaded.model, load_adapter(folder), str(folder))
    return loaded, base, settings_of(folder).get("template") or settings_of(base).get("template")


def settings_of(folder: Path) -> dict:
    """The settings of the stage that a folder is; none if it is none."""
    settings = (read_json(folder / "stage.json") if (folder / "stage.json").is_file() else {}).get(
        "settings"
    )
    return settings if isinstance(settings, dict) else {}


def open_agent(
    folder: Path, config: Config, flags: Mapping[str, str]
) -> tuple[Config, LoadedModel, Path]:
    """(settings, model, folder of its base) of a base or adapter folder. `config` is completed by what the model
    says of itself: its template, how its base was quantised, and answers that take no more than half of its context; `flags`
    stand over that."""
    form = flags.get("model.quantize", settings_of(folder).get("quantize", "none"))
    config = override(config, {"model.quantize": form}, str(folder / "stage.json"))
    configure_torch(config.run.threads)
    loaded, base, template = open_folder(folder, config)
    most = min(config.generate.max_new_tokens, loaded.model.config.max_position_embeddings // 2)
    template = template or default_chat_template(base, loaded.tokenizer, flags.get("data.template"))
    return (
        override(
            config,
            {"data.template": template, "generate.max_new_tokens": most} | dict(flags),
            "command line",
        ),
        loaded,
        base,
    )


def fit_rows(
    config: Config, loaded: LoadedModel, pairs: Sequence[Pair], prompt: int, length: int
) -> tuple[list[Pair], Counter]:
    """The pairs that fit into so many tokens of the prompt, and of prompt and answer, over-long ones being treated as
    data.truncation_mode says; and how many were dropped or cut, by reason."""
    config, reasons = (
        replace(config, data=replace(config.data, max_prompt_length=prompt, max_length=length)),
        Counter(),
    )
    fitting = (truncate_pair(config, pair, [loaded.tokenizer], reasons) for pair in pairs)
    return [pair for pair in fitting if pair], reasons


def default_chat_template(folder: Path, tokenizer: Tokenizer, asked: str | None) -> str:
    """How to speak to a base of which no run is known: as asked, or in the marks of its tokenizer, or plainly. Where its
    chat template looks like another one, that is said on stderr."""
    template = asked or ("turns" if tokenizer.turn_marks else "plain")
    if said := template_hint(folder, template):
        print(f"WARNING: {escape_control_chars(said)}", file=sys.stderr)
    return template


class Session:
    """The run, and the bases that stay in memory between stages (oldest out when memory is short)."""

    def __init__(self, run: Run):
        self.run, self.config, wanted = run, run.config, run.config.run.compile
        if run.dist.is_sharded and {
            run.config.model.quantize,
            run.config.model.quantize_teachers,
        } != {"none"}:
            raise UserError(
                "parallel.shard divides weights among ranks, but not those of model.quantize; choose one of the two"
            )
        self.compiled = wanted == "true" or (
            wanted == "auto" and resolve_device(run.config.run.device) == "cuda"
        )
        self.score_tokens = scoring_tokens(
            self.config.run.max_tokens_per_batch, resolve_device(self.config.run.device)
        )
        self.scored: tuple = (
            None,
            {},
        )  # what was scored last, for the next stage of the same group (stages.scored_together)
        self.loaded: dict[str, LoadedModel] = {}  # by fingerprint, the last used one last

    def use(self, base: Base, adapter: Stage | None, copy: str = "") -> LoadedModel:
        """The base with `adapter` in its slot; None: the slot switched off. `copy` names a second one of the same
        base, for two adapters at a time."""
        form, folder, dist = (
            self.quantised(base).get("quantize", "none"),
            base.stage.path,
            self.run.dist,
        )
        key = base.stage.fingerprint + form + copy
        if key not in self.loaded:
            dtype = resolve_dtype(self.config.run.dtype, self.config.run.device)
            size = weight_bytes(read_config(folder), dtype.itemsize, form)
            if dist.is_sharded:
                size //= dist.world_size
            while self.loaded and dist.all_reduce_max(
                free_bytes(resolve_device(self.config.run.device))
                < 2 * size * dist.ranks_per_device
            ):
                del self.loaded[next(iter(self.loaded))]
                gc.collect()  # a sharded one refers to itself
        loaded = self.loaded[key] = self.loaded.pop(key, None) or LoadedModel(
            folder, self.config, form, dist
        )
        if adapter is None:
            disable_adapter(loaded.model)
        else:
            set_adapter_weights(loaded.model, load_adapter(adapter.path), str(adapter.path))
        return loaded

    def quantised(self, base: Base) -> dict[str, str]:
        """How the base is held in memory, as a setting of its stages; none if its weights are not quantised."""
        model = self.config.model
        form = model.quantize if base.name == "strong" else model.quantize_teachers
        return {} if form == "none" else {"quantize": form}

    def stage(
        self,
        name: str,
        kind: str,
        settings: dict,
        inputs: Sequence[Stage | None],
        compute: Callable[[StageContext], dict],
        key: tuple = (),
        size: str = "",
    ) -> Stage:
        """`Run.stage` with the settings that every stage with a model depends on, and the inputs not None."""
        data, device, dtype = (
            self.config.data,
            resolve_device(self.config.run.device),
            str(resolve_dtype(self.config.run.dtype, self.config.run.device)),
        )
        common = {
            "template": data.template,
            "max_length": data.max_length,
            "device": device,
            "dtype": dtype,
            "max_tokens_per_batch": self.config.run.max_tokens_per_batch,
            "compile": self.compiled,
            "lora": asdict(self.config.lora),
            "arithmetic": 3,
        }
        return self.run.stage(
            name, kind, common | settings, [s for s in inputs if s], compute, key, size
        )

    def render(
        self, loaded: LoadedModel, prompt: Sequence[Message], response: str | None = None
    ) -> Tokens:
        """A prompt, and its answer if given, as ids and mask."""
        return render(loaded.tokenizer, self.config.data.template, prompt, response)


def answer(
    config: Config,
    loaded: LoadedModel,
    agent: str,
    jobs: list[tuple[Example, int]],
    seed: int,
    against: LoadedModel | None = None,
    tell: Callable[[list[int]], None] | None = None,
    places: int | None = None,
) -> list[Sample]:
    """One sample per job (a prompt, the number of the answer), `places` (None: all) decoded side by side, half as many where
    memory is short; `against`: away from what that model would say; `tell` gets the tokens as they are sampled (generate.generate)."""
    template, tokenizer = config.data.template, loaded.tokenizer
    seeds = [derive_seed(seed, example.id, number) for example, number in jobs]
    prompts = [render_prompt(tokenizer, template, example.prompt) for example, _ in jobs]
    room = loaded.model.config.max_position_embeddings - config.generate.max_new_tokens
    if (longest := max(map(len, prompts))) > room:
        most = f"with generate.max_new_tokens = {config.generate.max_new_tokens} the context has room for {max(room, 0)}"
        raise UserError(f"a prompt has {longest} tokens; {most}")
    other, stops = against.model if against else None, loaded.ends(template)
    found, places = None, min(places or len(jobs), len(jobs), loaded.places)
    while found is None:
        try:
            with normalize_oom():
                found = generate(
                    loaded.model, prompts, seeds, config.generate, stops, other, tell, places
                )
        except torch.OutOfMemoryError:
            if places == 1 or is_sharded(loaded.model):  # other ranks wait for this one's next pass
                setting = "generate.batch" if places > 1 else "generate.max_new_tokens"
                raise UserError(
                    f"out of memory while answers are sampled, {places} side by side; lower {setting}"
                ) from None
            places = loaded.places = places // 2
            print(
                f"WARNING: out of memory: from here {places} answers are sampled side by side (see generate.batch)",
                file=sys.stderr,
            )
    samples = []
    for (e, _), own, new, logp in zip(jobs, seeds, *found, strict=True):
        text, ppl = response_text(tokenizer, template, new), perplexity(logp, len(new))
        finish = "stop" if new[-1] in stops else "length"
        samples.append(
            Sample(e.id, e.prompt, text, finish, tuple(new), logp, ppl, agent, own, e.meta)
        )
    return samples
