"""The decoder of the Llama line, with Hugging Face's parameter names, and its static KV cache.

LoRA, losses and sampling come from outside. `Transformer` returns hidden states; who needs logits
applies its `lm_head`.

Shapes: B rows, T tokens of a row in this pass, S positions of the cache, C = hidden size, H query
heads, G key/value heads, D numbers per head, L layers. A packed pass computes N of its B * T
tokens, and M of these N reach the head.
"""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minmacpo.core.model_config import ModelConfig, RopeScaling
from minmacpo.kernels.attention import OffsetRMSNorm, RMSNorm, attention
from minmacpo.kernels.gated_activation import gated_activation

# By the names of config.json's hidden_act
ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}

# A prepacked copy reads prompts, and keeps a cache, in multiples of this many tokens: its kernels
# round the odd end of a length in another way.
CACHE_ALIGN = 32


# --- Rotary positions


class Rope(NamedTuple):
    """Cosines and sines of the tokens' positions, broadcastable to (B, heads, T, D)."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """x (B, heads, T, D) with every pair of coordinates turned by its angle."""
        left, right = x.chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1)
        return x * self.cos + turned * self.sin

    def select(self, tokens: Tensor) -> "Rope":
        """The tables of some tokens of a packed pass: (N, D) -> (M, D)."""
        return Rope(self.cos[tokens], self.sin[tokens])


def rope_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rope:
    """Tables (..., D) in `dtype` for positions (...); both halves of D have the same angles."""
    half = positions[..., None] * rope_frequencies(config, positions.device)  # (..., D / 2) fp32
    angles = torch.cat((half, half), dim=-1)  # (..., D)
    scale = rope_attention_factor(config.rope_scaling)
    return Rope((angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype))


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position, (D / 2,) in fp32, of every pair of coordinates.

    Scaled ropes slow those pairs down by `factor` that have not gone round once in the context of
    pre-training; fast pairs keep their frequency, and the ones between are blended.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling.rope_type == "default":
        return plain
    slow = plain / scaling.factor
    if scaling.rope_type == "linear":
        return slow
    if scaling.rope_type == "llama3":
        plain_weight = llama3_plain_weight(plain, scaling)
    else:
        plain_weight = yarn_plain_weight(config, device)
    plain_weight = plain_weight.clamp(0, 1)
    return slow * (1 - plain_weight) + plain * plain_weight


def llama3_plain_weight(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """How much of its own frequency every pair keeps, (D / 2,), before it is clamped to 0 ... 1."""
    wavelength = 2 * math.pi / plain  # tokens
    rounds = scaling.original_max_position_embeddings / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return (rounds - low) / (high - low)


def yarn_plain_weight(config: ModelConfig, device: torch.device) -> Tensor:
    """As `llama3_plain_weight`: a ramp over the pairs' numbers (YaRN, Peng et al. 2023)."""
    scaling = config.rope_scaling
    first = find_correction_dim(scaling.beta_fast, config)
    last = find_correction_dim(scaling.beta_slow, config)
    if scaling.truncate:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, config.head_dim - 1)
    pairs = torch.arange(config.head_dim // 2, device=device).float()
    width = last - first or 0.001  # not zero where both bounds are the same pair
    return 1 - (pairs - first) / width


def find_correction_dim(rounds: float, config: ModelConfig) -> float:
    """The number, as a fraction, of the pair that goes round `rounds` times in pre-training."""
    context = config.rope_scaling.original_max_position_embeddings
    return (
        config.head_dim
        * math.log(context / (rounds * 2 * math.pi))
        / (2 * math.log(config.rope_theta))
    )


def rope_attention_factor(scaling: RopeScaling) -> float:
    """What YaRN multiplies queries and keys by, so that attention to more tokens stays as sharp."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.rope_type != "yarn":
        return 1.0
    growth = 0.1 * math.log(max(scaling.factor, 1.0))
    if scaling.mscale and scaling.mscale_all_dim:
        return (scaling.mscale * growth + 1) / (scaling.mscale_all_dim * growth + 1)
    return growth + 1


# --- The KV cache


class LayerCache(NamedTuple):
    """One layer's part of a KVCache, and where this pass writes to it."""

    keys: Tensor  # (B, G, S, D)
    values: Tensor  # (B, G, S, D)
    positions: Tensor | None  # (B,), of row b's one new token; None for prompts from position 0

    @property
    def decoding(self) -> bool:
        return self.positions is not None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the pass's keys and values (B, G, T, D), and return those that it attends to."""
        if self.positions is None:
            length = k.shape[2]
            self.keys[:, :, :length] = k
            self.values[:, :, :length] = v
            return k, v  # a prompt sees nothing but itself
        rows = torch.arange(len(self.positions), device=k.device)
        self.keys[rows, :, self.positions] = k[:, :, 0]
        self.values[rows, :, self.positions] = v[:, :, 0]
        return self.keys, self.values


class KVCache:
    """Keys and values of all layers in one tensor, (2, L, B, G, S, D)."""

    def __init__(self, data: Tensor):
        self.data = data

    @property
    def length(self) -> int:
        """Positions that there is room for."""
        return self.data.shape[4]

    def layer(self, number: int, positions: Tensor | None) -> LayerCache:
        """Views of one layer's keys and values, for a pass at these positions."""
        return LayerCache(self.data[0, number], self.data[1, number], positions)

    def first(self, length: int) -> "KVCache":
        """A view of the first `length` positions."""
        return KVCache(self.data[..., :length, :])

    def split_rows(self, size: int) -> list["KVCache"]:
        """Views of `size` rows each, the last of what is left."""
        return [KVCache(part) for part in self.data.split(size, dim=2)]

    def select_rows(self, rows: Tensor) -> "KVCache":
        """A copy of these rows, in this order; a row may come twice."""
        return KVCache(self.data[:, :, rows])

    def write_rows(self, rows: Tensor, other: "KVCache") -> None:
        """Put the rows of a cache that is no longer than this one in the place of `rows`."""
        self.data[:, :, rows, :, : other.length] = other.data


# --- Packed passes: tokens that are computed once, and tokens whose output is needed


class PackedIndex(NamedTuple):
    """Which tokens of rows (B, T) a packed pass computes.

    Padding is not computed, nor is a prompt again that an earlier row has. Everything but
    attention is done on the N computed tokens alone. Attention is done on whole rows, so that an
    answer sees its prompt and itself as if its row were alone.
    """

    token_index: Tensor  # (N,): numbers of the computed tokens among the B * T
    gather_index: Tensor  # (B, T): which of the N tokens stands there; any, in padding


class OutputIndex(NamedTuple):
    """The M of N computed tokens whose hidden states are returned.

    The last block computes only keys and values of the others.
    """

    source: Tensor  # (M,): their numbers among the N
    packed: PackedIndex  # where they stand in the rows, with M in place of N

    def select(self, x: Tensor) -> Tensor:
        """(1, N, C) -> (1, M, C)."""
        return x.index_select(1, self.source)


def output_index(output_mask: Tensor, packed: PackedIndex) -> OutputIndex:
    """The index of the tokens under output_mask (B, T) bool, row after row."""
    token_index = output_mask.flatten().nonzero()[:, 0]  # (M,)
    gather_index = torch.zeros_like(packed.gather_index)  # (B, T)
    numbers = torch.arange(len(token_index), device=token_index.device)
    gather_index.view(-1)[token_index] = numbers
    source = packed.gather_index.flatten()[token_index]  # (M,)
    return OutputIndex(source, PackedIndex(token_index, gather_index))


def unpack(x: Tensor, packed: PackedIndex) -> Tensor:
    """Packed tokens as rows: (1, heads, N, D) -> (B, heads, T, D)."""
    heads, _, head_dim = x.shape[1:]
    flat = x[0].transpose(0, 1).flatten(1)  # (N, heads * D)
    rows = flat.index_select(0, packed.gather_index.flatten())  # (B * T, heads * D)
    return rows.view(*packed.gather_index.shape, heads, head_dim).transpose(1, 2)


def pack(x: Tensor, packed: PackedIndex) -> Tensor:
    """Rows as packed tokens: (B, T, C) -> (1, N, C)."""
    return x.flatten(0, 1).index_select(0, packed.token_index)[None]


# --- The layers


class LayerPass(NamedTuple):
    """What a layer is told of a pass beside its input."""

    rope: Rope | None  # None: the layer knows no positions
    mask: Tensor | None  # broadcastable to (B, 1, T, S); None: causal, from position 0
    cache: LayerCache | None  # this layer's keys and values, in a prefill or decode pass
    packed: PackedIndex | None  # where the tokens of a packed pass stand in their rows
    outputs: OutputIndex | None  # the M tokens whose output is needed, in its last layer


def new_norm(config: ModelConfig, size: int) -> nn.Module:
    """The normalisation of this family over the last dimension, of `size` numbers."""
    kind = OffsetRMSNorm if config.offset_norms else RMSNorm
    return kind(size, config.rms_norm_eps)


class Embedding(nn.Embedding):
    """The rows of tokens, (...) -> (..., C), multiplied by a scale.

    It starts uninitialised: weights come from a file or from `new_model`, and what nn.Embedding
    would draw on the meta device needs torch's compiler, which takes a second to import.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = config.embedding_scale

    def reset_parameters(self) -> None:
        pass

    def forward(self, tokens: Tensor) -> Tensor:
        x = super().forward(tokens)
        if self.scale == 1:
            return x
        return x * torch.tensor(self.scale).to(x.dtype).item()  # rounded to x's dtype, as Gemma's


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    prepacked = False  # core.prepack sets it in its copies: see kernels.attention

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        hidden = config.hidden_size
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, hidden, bias=config.o_bias)

        # Qwen3 and Gemma 3 normalise every head's queries and keys, OLMo-2 those of all together
        self.qk_norm = config.qk_norm
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm == "head":
            self.q_norm = new_norm(config, config.head_dim)
            self.k_norm = new_norm(config, config.head_dim)
        elif config.qk_norm == "width":
            self.q_norm = new_norm(config, q_width)
            self.k_norm = new_norm(config, kv_width)

        # the kernels divide scores by the root of head_dim
        self.query_scale = 1.0
        if config.query_pre_attn_scalar is not None:
            self.query_scale = (config.head_dim / config.query_pre_attn_scalar) ** 0.5

    def forward(self, x: Tensor, layer: LayerPass) -> Tensor:
        """(B, T, C) -> (B, T, C); in a packed pass (1, N, C) -> (1, N, C) or (1, M, C)."""
        # the last block of a packed pass needs the queries of fewer tokens
        query_input = x
        query_rope = layer.rope
        query_packed = layer.packed
        if layer.outputs is not None:
            query_input = layer.outputs.select(x)  # (1, M, C)
            query_packed = layer.outputs.packed
            if layer.rope is not None:
                query_rope = layer.rope.select(layer.outputs.source)

        q = self.split_heads(self.q_proj(query_input), self.q_norm)  # (B, H, T, D)
        k = self.split_heads(self.k_proj(x), self.k_norm)  # (B, G, T, D)
        v = self.split_heads(self.v_proj(x))  # (B, G, T, D)

        # rotary positions after the norm
        if layer.rope is not None:
            q = query_rope.rotate(q)
            k = layer.rope.rotate(k)
        if self.query_scale != 1:
            q = q * self.query_scale

        cache = layer.cache
        if cache is not None:
            k, v = cache.update(k, v)  # (B, G, S, D) when decoding
        # attention is done on whole rows, with every prompt in its place
        if layer.packed is not None:
            q = unpack(q, query_packed)  # (1, H, M, D) -> (B, H, T, D)
            k = unpack(k, layer.packed)  # (1, G, N, D) -> (B, G, T, D)
            v = unpack(v, layer.packed)  # (1, G, N, D) -> (B, G, T, D)

        y = attention(
            q,
            k,
            v,
            layer.mask,
            with_cache=cache is not None,
            decoding=cache is not None and cache.decoding,
            prepacked=self.prepacked,
        )
        y = self.merge_heads(y)  # (B, T, H * D)
        if layer.packed is not None:
            y = pack(y, query_packed)  # (1, M, H * D)
        return self.o_proj(y)

    def split_heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D), normalised before or after as the family does."""
        if norm is not None and self.qk_norm == "width":
            x = norm(x)  # (B, T, heads * D)
        x = x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, heads, T, D)
        if norm is not None and self.qk_norm == "head":
            x = norm(x)
        return x

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, T, H * D)."""
        return x.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Gated feed-forward layer, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        hidden = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)  # (B, T, inner)
        up = self.up_proj(x)  # (B, T, inner)
        return self.down_proj(gated_activation(gate, up, self.activation))


class Block(nn.Module):
    """One layer: attention and MLP, each added to its input.

    Norms have Hugging Face's names: post_attention_layernorm is applied to what attention gives in
    Gemma 3 and OLMo-2, and to the input of the MLP in the others.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norms = config.norms
        if config.norms != "after":
            self.input_layernorm = new_norm(config, config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = new_norm(config, config.hidden_size)
        if config.norms == "around":
            self.pre_feedforward_layernorm = new_norm(config, config.hidden_size)
        self.mlp = MLP(config)
        if config.norms != "before":
            self.post_feedforward_layernorm = new_norm(config, config.hidden_size)

    def forward(self, x: Tensor, layer: LayerPass) -> Tensor:
        """Shapes as in Attention.forward."""
        residual = x if layer.outputs is None else layer.outputs.select(x)  # (1, M, C) of outputs
        if self.norms == "before":
            x = residual + self.self_attn(self.input_layernorm(x), layer)
            return x + self.mlp(self.post_attention_layernorm(x))

        if self.norms == "around":
            x = self.input_layernorm(x)
        x = residual + self.post_attention_layernorm(self.self_attn(x, layer))
        y = self.pre_feedforward_layernorm(x) if self.norms == "around" else x
        return x + self.post_feedforward_layernorm(self.mlp(y))


class Transformer(nn.Module):
    """Embedding, blocks and last norm (Hugging Face's `model`), and the head.

    A tied head is the embedding itself.
    """

    # Whether its cache holds all positions of a coordinate side by side, and its prompts are read
    # in multiples of CACHE_ALIGN; core.prepack sets it in copies for which that is faster.
    transposed_cache = False

    # Activation checkpointing: a training keeps nothing of a block but its input, and computes the
    # block a second time in the backward pass. Same bits, a third more work, far less memory.
    recompute_blocks = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": Embedding(config),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": new_norm(config, config.hidden_size),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()

    def tie_head(self) -> None:
        """Make the head the embedding itself where the config says so (again after loading)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache with room for `length` positions of every row, or a few more."""
        config = self.config
        layers = config.num_hidden_layers
        kv_heads = config.num_key_value_heads
        new_zeros = self.lm_head.weight.new_zeros
        if not self.transposed_cache:
            return KVCache(new_zeros(2, layers, rows, kv_heads, length, config.head_dim))
        aligned = length + -length % CACHE_ALIGN
        data = new_zeros(2, layers, rows, kv_heads, config.head_dim, aligned)
        return KVCache(data.transpose(4, 5))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        packed: PackedIndex | None = None,
        output_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, of tokens (B, T) int64, in one of four kinds of pass:

            plain    forward(tokens)                     -> (B, T, C)
            packed   forward(tokens, packed=...)         -> (1, N, C)
                     forward(..., output_mask=(B, T))    -> (M, C)
            prefill  forward(tokens, cache=...)          -> (B, T, C), the cache is written
            decode   forward(tokens, positions, cache)   -> (B, 1, C), the cache is written

        All but decode read rows from position 0. Attention is causal and padding is at the right,
        so no token sees padding. When decoding, T is 1: the token of row b stands at positions[b]
        and sees the cache up to there. What padding left in the cache lies beyond, and is
        overwritten in turn.
        """
        # 1. Which tokens are computed, at which positions they stand, and what they see
        length = tokens.shape[1]
        outputs = None
        if packed is not None:
            x = self.model.embed_tokens(pack_tokens(tokens, packed))  # (1, N, C)
            rope_positions = packed.token_index % length  # (N,)
            masks = self.prompt_masks(length, x.device)
            if output_mask is not None:
                outputs = output_index(output_mask, packed)
        elif positions is not None:
            x = self.model.embed_tokens(tokens)  # (B, 1, C)
            rope_positions = positions[:, None, None]  # (B, 1, 1)
            masks = self.decode_masks(positions, cache.length)
        else:
            x = self.model.embed_tokens(tokens)  # (B, T, C)
            rope_positions = torch.arange(length, device=x.device)  # (T,)
            masks = self.prompt_masks(length, x.device)

        # 2. All blocks, the last of which may compute fewer tokens
        ropes = self.layer_ropes(rope_positions, x.dtype)
        last = len(self.model.layers) - 1
        for number, block in enumerate(self.model.layers):
            layer = LayerPass(
                rope=ropes[number],
                mask=masks[number],
                cache=None if cache is None else cache.layer(number, positions),
                packed=packed,
                outputs=outputs if number == last else None,
            )
            if self.recompute_blocks and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no state of a generator to put back
                x = checkpoint(block, x, layer, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, layer)
        if outputs is not None:
            x = x[0]  # (M, C)
        return self.model.norm(x)

    def layer_ropes(self, positions: Tensor, dtype: torch.dtype) -> list[Rope | None]:
        """Rotary tables for every layer; None where a layer knows no positions."""
        config = self.config
        tables = {"none": None, "global": rope_tables(config, positions, dtype)}
        if "local" in config.layer_ropes:
            local = replace(config, rope_theta=config.local_rope_theta, rope_scaling=RopeScaling())
            tables["local"] = rope_tables(local, positions, dtype)
        names = config.layer_ropes or ("global",) * config.num_hidden_layers
        return [tables[name] for name in names]

    def prompt_masks(self, length: int, device: torch.device) -> list[Tensor | None]:
        """A mask for every layer, of rows from position 0; None where it is merely causal."""
        by_window = {}
        for window in set(self.sliding_windows):
            by_window[window] = None
            if window is not None and window < length:
                positions = torch.arange(length, device=device)
                by_window[window] = causal_mask(positions[:, None], positions, window)  # (T, T)
        return [by_window[window] for window in self.sliding_windows]

    def decode_masks(self, positions: Tensor, cache_length: int) -> list[Tensor]:
        """A mask (B, 1, 1, S) for every layer, of one token in every row."""
        keys = torch.arange(cache_length, device=positions.device)
        queries = positions[:, None, None, None]
        by_window = {}
        for window in set(self.sliding_windows):
            by_window[window] = causal_mask(queries, keys, window)
        return [by_window[window] for window in self.sliding_windows]

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """The window of every layer; None where a token sees all before it."""
        return self.config.sliding_windows or (None,) * self.config.num_hidden_layers


def pack_tokens(tokens: Tensor, packed: PackedIndex) -> Tensor:
    """Ids of the tokens that a packed pass computes: (B, T) -> (1, N)."""
    return tokens.flatten()[packed.token_index][None]


def causal_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """True where a token at position `queries` sees one at position `keys` (broadcast).

    It sees itself and the past; with a window, only the last `window` tokens, itself included.
    """
    mask = keys <= queries
    if window is not None:
        mask = mask & (keys > queries - window)
    return mask


def new_model(config: ModelConfig, seed: int) -> Transformer:
    """A Transformer with fresh fp32 weights: normal with std 0.05, norms one.

    The output projections are scaled down by depth (GPT-2). Measured on the built-in world: with
    std 0.02 a small model knows half as much after as many steps.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    output_scale = (2 * config.num_hidden_layers) ** -0.5
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            continue  # norms stay one
        is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = output_scale if is_output else 1.0
        nn.init.normal_(weight, std=0.05 * scale, generator=generator)
    return model
