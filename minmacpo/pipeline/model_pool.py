"""Base models in memory, each with LoRA parameters that the adapters of its agents are put into.

Agents exchange text: whoever trains on an answer or scores it renders it with its own tokenizer.
"""

import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.core.batching import MemoryLimit
from minmacpo.core.checkpoint import (
    check_sizes,
    load_adapter,
    load_model,
    read_config,
    stop_ids,
    weight_bytes,
)
from minmacpo.core.lora import attach_lora, disable_adapter, set_adapter_weights
from minmacpo.data.chat_template import Renderer, end_of_turn_ids
from minmacpo.data.records import Message
from minmacpo.data.tokenizer import Tokens, load_tokenizer
from minmacpo.pipeline.artifacts import BaseModel, Policy
from minmacpo.pipeline.prepare_data import base_templates
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.stage import Stage
from minmacpo.runtime.device import free_bytes, resolve_device, resolve_dtype
from minmacpo.runtime.distributed import SINGLE_PROCESS, Distributed


class LoadedModel:
    """A base model in memory on the run's device, with empty LoRA parameters, and its tokenizer.

    Attributes:
        lora_params: all that is ever trained.
        template: the name of the chat template that texts are rendered with.
        max_length: tokens of the longest row that is trained on.
        batch_limit: how many answers are sampled side by side, fewer once memory was too short.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        template: str,
        quantization: str = "none",
        dist: Distributed = SINGLE_PROCESS,
    ):
        device = resolve_device(config.run.device)
        dtype = resolve_dtype(config.run.dtype, config.run.device)

        # A sharded model is moved to the device block by block, since it may not fit there whole
        self.model = load_model(folder, "cpu" if dist.is_sharded else device, dtype, quantization)
        self.lora_params = attach_lora(self.model, config.lora)
        dist.shard(self.model, self.lora_params, device)

        self.tokenizer = load_tokenizer(folder)
        check_sizes(folder, self.model.config, self.tokenizer)
        self.stop_token_ids = stop_ids(folder, self.tokenizer)
        self.template = template
        self.max_length = min(config.data.max_length, self.context)
        self.batch_limit = MemoryLimit(warn_smaller_batch, failure=sampling_failure)

    @property
    def context(self) -> int:
        """Tokens that the model can read at a time."""
        return self.model.config.max_position_embeddings

    def answer_end_ids(self) -> set[int]:
        """The tokens that end an answer in the model's chat template."""
        return self.stop_token_ids | end_of_turn_ids(self.tokenizer, self.template)

    @property
    def renderer(self) -> Renderer:
        """What makes token ids of dialogues for this model."""
        return Renderer(self.tokenizer, self.template)

    def render(
        self, prompt: Sequence[Message], response: str | None = None, train_on: str = "last"
    ) -> Tokens:
        """A prompt, and an answer to it if one is given, as token ids and mask."""
        return self.renderer.render(prompt, response, train_on)


def warn_smaller_batch(size: int) -> None:
    """Say that fewer answers are sampled side by side from here on."""
    print(
        f"WARNING: out of memory: from here {size} answers are sampled side by side "
        "(see generate.batch)",
        file=sys.stderr,
    )


def sampling_failure(size: int) -> UserError:
    """The error where not even so many answers can be sampled side by side."""
    setting = "generate.batch" if size > 1 else "generate.max_new_tokens"
    return UserError(
        f"out of memory while answers are sampled, {size} side by side; lower {setting}"
    )


class ModelPool:
    """The base models that stay in memory between stages; the oldest leave when memory is short."""

    def __init__(self, config: Config, dist: Distributed = SINGLE_PROCESS):
        quantizations = {config.model.quantize, config.model.quantize_teachers}
        if dist.is_sharded and quantizations != {"none"}:
            raise UserError(
                "parallel.shard divides weights among ranks, but not those of model.quantize; "
                "choose one of the two"
            )
        self.config = config
        self.dist = dist
        self.device = resolve_device(config.run.device)
        self.dtype = resolve_dtype(config.run.dtype, config.run.device)
        self.templates = base_templates(config)  # by base
        self.models: dict[str, LoadedModel] = {}  # the last used one stands last

    @property
    def may_compile(self) -> bool:
        """Whether losses are compiled, if run.compile = auto finds a stage long enough."""
        if self.config.run.compile == "auto":
            return self.device == "cuda"
        return self.config.run.compile == "true"

    def get(self, base: BaseModel, adapter: Stage | None, copy: str = "") -> LoadedModel:
        """The base in memory with the adapter in its LoRA parameters, or without any (None).

        Args:
            copy: names a second model of the same base, for two adapters at a time.
        """
        template = self.templates[base.name]
        key = f"{base.stage.fingerprint} {self.quantization(base)} {template} {copy}"
        loaded = self.models.pop(key, None)
        if loaded is None:
            self.make_room_for(base)
            loaded = LoadedModel(
                base.stage.path,
                self.config,
                template,
                quantization=self.quantization(base),
                dist=self.dist,
            )
        self.models[key] = loaded

        if adapter is None:
            disable_adapter(loaded.model)
        else:
            set_adapter_weights(loaded.model, load_adapter(adapter.path), str(adapter.path))
        return loaded

    def get_policy(self, policy: Policy) -> LoadedModel:
        """The base of a policy in memory, with its adapter."""
        return self.get(policy.base, policy.adapter)

    def make_room_for(self, base: BaseModel) -> None:
        """Drop the models that were used longest ago until twice the base's weights are free."""
        size = weight_bytes(
            read_config(base.stage.path), self.dtype.itemsize, self.quantization(base)
        )
        if self.dist.is_sharded:
            size //= self.dist.world_size
        needed = 2 * size * self.dist.ranks_per_device

        # All ranks drop the same models, since a sharded one needs all of them
        while self.models and self.dist.all_reduce_max(free_bytes(self.device) < needed):
            oldest = next(iter(self.models))
            del self.models[oldest]
            gc.collect()  # a sharded model refers to itself

    def quantization(self, base: BaseModel) -> str:
        """How the weights of a base are held in memory: "none", "int8" or "nf4"."""
        if base.name == "strong":
            return self.config.model.quantize
        return self.config.model.quantize_teachers

    def settings(self, base: BaseModel) -> dict:
        """The settings on which every stage depends that uses the base, beside its own."""
        return {
            "template": self.templates[base.name],
            "max_length": self.config.data.max_length,
            "device": self.device,
            "dtype": str(self.dtype),
            "max_tokens_per_batch": self.config.run.max_tokens_per_batch,
            "compile": self.may_compile,
            "lora": asdict(self.config.lora),
            "quantize": self.quantization(base),
        }


@dataclass(frozen=True, slots=True)
class Session:
    """What stages are computed with: the run that they belong to, and the models in memory."""

    run: Run
    models: ModelPool
