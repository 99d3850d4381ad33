"""A rough estimate of the memory that a stage needs at its peak, good to about 30 %.

It is counted from the shape of the model and of the stage's largest forward pass; nothing is tried
out, and no weight is read. What is left out is small (masks, logsumexps) or rare (the scores of
attention, where a CPU computes them in bfloat16). All sizes are bytes.
"""

import functools
from dataclasses import dataclass, replace

import torch

from minmacpo.core.checkpoint import weight_bytes
from minmacpo.core.lora import LoraConfig, attach_lora
from minmacpo.core.model import Transformer
from minmacpo.core.model_config import ModelConfig
from minmacpo.kernels.fused_logps import chunk_size

FP32 = 4  # bytes of a number; adapters, gradients and moments are always in fp32
SAFETY = 0.7  # a stage is refused only where so much of its estimate does not fit


@dataclass(frozen=True, slots=True)
class PassSize:
    """The largest forward pass of a stage."""

    kind: str  # "pretrain" (all weights learn), "train" (the adapter learns), "score" or "sample"
    rows: int  # texts side by side
    tokens: int  # that are computed: padding and a prompt's second reading may be left out
    scored_tokens: int  # of these, the ones whose logits are needed
    cache_length: int = 0  # positions of the cache of keys and values
    models: int = 1  # with their own weights and cache: two in contrastive decoding


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a stage holds at its peak, by what it is for."""

    weights: int  # of the base
    learning: int  # the adapter with gradients and moments; of a base that learns, these two
    activations: int  # kept for the backward pass
    working: int  # in use for a moment: one layer's activations, or one chunk's logits
    cache: int = 0  # keys and values

    @property
    def total(self) -> int:
        return self.weights + self.learning + self.activations + self.working + self.cache

    def fits(self, free: int) -> bool:
        """Whether it may fit into so many bytes, as far as an estimate can say."""
        return SAFETY * self.total <= free


def estimate_memory(
    size: PassSize,
    model: ModelConfig,
    lora: LoraConfig,
    *,
    bytes_per_number: int,
    quantization: str = "none",
    device: str = "cpu",
    world_size: int = 1,
    recompute: bool = False,
) -> MemoryEstimate:
    """The memory of a pass of this size.

    Args:
        bytes_per_number: of the base's dtype.
        world_size: ranks that divide the base's weights among them (parallel.shard).
        recompute: a training computes every block twice, and keeps one block's tensors at a time.
    """
    model = replace(model, eos_token_id=None)  # a list there could not be a key of the caches
    base_size, adapter_size = parameter_counts(model, lora)
    weights = weight_bytes_once(model, bytes_per_number, quantization) // world_size
    stream = bytes_per_number * size.tokens * model.hidden_size  # what one layer gives the next
    mlp = 3 * bytes_per_number * size.tokens * model.intermediate_size  # gate, up, their product
    heads = model.num_attention_heads + model.num_key_value_heads
    attention = 3 * bytes_per_number * size.tokens * model.head_dim * heads  # q, k, v, y
    layer = max(mlp, attention)  # at work at once
    chunk_tokens = min(size.scored_tokens, chunk_size(model.vocab_size, device))
    logits = FP32 * chunk_tokens * model.vocab_size

    if size.kind == "sample":
        # sorted logits, probabilities, their sums and their indices for every row's next token
        next_tokens = 5 * FP32 * size.rows * model.vocab_size
        return MemoryEstimate(
            weights=size.models * weights,
            learning=size.models * FP32 * adapter_size,
            activations=3 * stream,
            working=max(layer, next_tokens),
            # when rows end, those that go on are copied into a smaller cache: half as much again
            cache=3 * size.models * cache_bytes(size, model, bytes_per_number) // 2,
        )
    if size.kind == "score":
        return MemoryEstimate(
            weights=weights,
            learning=FP32 * adapter_size,
            activations=3 * stream,
            working=max(layer, logits),
        )

    down_proj_learns = size.kind == "pretrain" or "down_proj" in lora.targets
    per_layer = bytes_per_number * size.tokens * kept_numbers(model, down_proj_learns)
    activations = model.num_hidden_layers * per_layer
    if recompute:
        activations = model.num_hidden_layers * stream + per_layer
    if size.kind == "train":
        return MemoryEstimate(
            weights=weights,
            learning=4 * FP32 * adapter_size,  # values, gradients, two moments
            activations=activations,
            working=max(layer, logits),
        )
    # pre-training: weights in fp32, a gradient and two moments of each, and the head learns too:
    # its logits, their exponentials and the gradients of both
    return MemoryEstimate(
        weights=FP32 * base_size,
        learning=3 * FP32 * base_size,
        activations=activations,
        working=max(layer, 4 * logits),
    )


def kept_numbers(model: ModelConfig, down_proj_learns: bool) -> int:
    """How many numbers of a token one layer keeps for its backward pass."""
    heads = model.num_attention_heads + model.num_key_value_heads
    attention = 2 * model.head_dim * heads  # queries, keys, values and what attention gives
    if model.qk_norm != "none":
        attention += model.head_dim * heads  # queries and keys before their norm as well
    norms = 3 * model.hidden_size  # what the two norms get, and the input of the projections
    if model.norms == "around":
        norms += 2 * model.hidden_size  # what the two norms behind attention and MLP get
    mlp = 2 * model.intermediate_size  # gate, up
    if down_proj_learns:
        mlp += model.intermediate_size  # it needs its input: their product
    return attention + norms + mlp


def cache_bytes(size: PassSize, model: ModelConfig, bytes_per_number: int) -> int:
    """Keys and values of all layers, for every row and position."""
    per_position = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    return bytes_per_number * size.rows * size.cache_length * per_position


weight_bytes_once = functools.cache(weight_bytes)


@functools.cache
def parameter_counts(model: ModelConfig, lora: LoraConfig) -> tuple[int, int]:
    """(parameters of the base, parameters of its adapter)."""
    with torch.device("meta"):  # shapes without memory
        transformer = Transformer(model)
        base = sum(parameter.numel() for parameter in transformer.parameters())
        adapter = attach_lora(transformer, lora)
    return base, sum(parameter.numel() for parameter in adapter)
