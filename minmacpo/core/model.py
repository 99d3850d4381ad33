"""The decoder of the Llama line, with Hugging Face's parameter names, and its static KV cache.

LoRA, losses and sampling come from outside. `forward` gives hidden states; who needs logits applies the head.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmacpo.core.model_config import ModelConfig, Rope
from minmacpo.kernels.attention import (
    Norm,
    attend,
    attend_bf16,
    attend_group,
    attend_one,
    small_bf16,
)


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position [head_dim / 2] in fp32 of every pair of coordinates that turns together. Scaled ropes
    turn the slow pairs, which have not gone round once in the context of pre-training, slower by `factor`."""
    powers = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    rope, plain = config.variant.rope, 1.0 / config.rope_theta**powers
    if rope.rope_type == "default":
        return plain
    slow, context = plain / rope.factor, rope.original_max_position_embeddings
    if rope.rope_type == "linear":
        return slow
    if rope.rope_type == "llama3":  # kept: the share of its own frequency that a pair keeps
        rounds = context / (2 * math.pi / plain)
        kept = (rounds - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    else:  # yarn (Peng et al. 2023): between the pairs that go round beta_fast and beta_slow times
        bounds = [
            pair_that_turns(rounds, context, config) for rounds in (rope.beta_fast, rope.beta_slow)
        ]
        if rope.truncate:
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        first, last = max(bounds[0], 0), min(bounds[1], config.head_dim - 1)
        pairs = torch.arange(config.head_dim // 2, device=device).float()
        kept = 1 - (pairs - first) / (last - first or 0.001)
    kept = kept.clamp(0, 1)
    return slow * (1 - kept) + plain * kept


def pair_that_turns(rounds: float, context: int, config: ModelConfig) -> float:
    """The number of the pair, as a fraction, that goes round so many times in so many tokens."""
    return (
        config.head_dim
        * math.log(context / (rounds * 2 * math.pi))
        / (2 * math.log(config.rope_theta))
    )


def rope_scale(rope: Rope) -> float:
    """What yarn multiplies queries and keys by, so that attention over more tokens stays as sharp."""
    if rope.rope_type != "yarn" or rope.attention_factor is not None:
        return 1.0 if rope.attention_factor is None else rope.attention_factor
    above, below = (
        (rope.mscale, rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else (1.0, 0.0)
    )
    growth = 0.1 * math.log(max(rope.factor, 1.0))
    return (above * growth + 1) / (below * growth + 1)


def rope_angles(config: ModelConfig, positions: Tensor) -> Tensor:
    """[..., head_dim] in fp32 for positions [...], halves repeated as in HF's Llama."""
    angles = positions[..., None] * rope_frequencies(config, positions.device)
    return torch.cat((angles, angles), dim=-1)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """True where a token at position `queries` sees one at `keys` (broadcast): itself and the past, of which the
    last `window` tokens."""
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


WHOLE = 32  # what a packed twin reads, and its cache, is a multiple of this long: kernels round an odd end in another way


class Shared(NamedTuple):
    """Which tokens of rows [B, T] are computed: padding is not, nor is a prompt again that an earlier row has. `kept` [N]: their
    numbers among the B · T; `origin` [B, T]: which of the N stands there (any, in padding). All but attention is done
    on the N alone; attention on whole rows, so that an answer sees its prompt and itself, as if it were alone."""

    kept: Tensor
    origin: Tensor


class OutputIndex(NamedTuple):
    """The M of the computed N tokens whose hidden states are asked for; of the others the last block computes keys and values only.
    `source` [M]: their numbers among the N; `rows`: as Shared has it, with M in place of N."""

    source: Tensor
    rows: Shared


def want(picked: Tensor, shared: Shared) -> OutputIndex:
    """Those at the places picked [B, T] (bool)."""
    kept, origin = picked.flatten().nonzero()[:, 0], torch.zeros_like(shared.origin)
    origin.view(-1)[kept] = torch.arange(len(kept), device=kept.device)
    return OutputIndex(shared.origin.flatten()[kept], Shared(kept, origin))


def of_wanted(x: Tensor, wanted: OutputIndex | None) -> Tensor:
    """Of x [1, N, H] the M tokens wanted; all where None is."""
    return x if wanted is None else x.index_select(1, wanted.source)


def in_rows(x: Tensor, shared: Shared) -> Tensor:
    """[1, heads, N, D] of the tokens that are computed, as [B, heads, T, D] of the rows."""
    flat = x[0].transpose(0, 1).flatten(1)
    return (
        flat.index_select(0, shared.origin.flatten())
        .view(*shared.origin.shape, *x.shape[1::2])
        .transpose(1, 2)
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D] turned by the angles of cos, sin (broadcastable to x)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    direct = False  # with a cache too by plain products (packed.pack)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        variant = config.variant
        self.q_proj = nn.Linear(config.hidden_size, width, bias=variant.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=variant.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=variant.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=variant.o_bias)
        for name in ("q_norm", "k_norm"):
            norm = Norm(config.head_dim, config.rms_norm_eps) if variant.qk_norm else nn.Identity()
            self.add_module(name, norm)

    def forward(
        self, x: Tensor, rope, positions: Tensor | None, mask: Tensor | None, cache, shared, wanted
    ) -> Tensor:
        """x [B, T, H] -> [B, T, H], or [1, M, H] of those `wanted`; see Transformer.forward for positions, mask, cache (this
        layer's) and shared."""
        asking, turns, places = of_wanted(x, wanted), rope, shared
        if wanted is not None:
            turns, places = [table[wanted.source] for table in rope], wanted.rows
        rows, length, _ = x.shape
        q, k, v = (
            proj(each).view(rows, each.shape[1], -1, self.head_dim).transpose(1, 2)
            for proj, each in ((self.q_proj, asking), (self.k_proj, x), (self.v_proj, x))
        )
        q, k = rotate(self.q_norm(q), *turns), rotate(self.k_norm(k), *rope)
        if cache is not None and positions is None:
            cache[0, :, :, :length], cache[1, :, :, :length] = k, v
        elif cache is not None:
            row = torch.arange(rows, device=x.device)
            cache[0][row, :, positions], cache[1][row, :, positions] = k[:, :, 0], v[:, :, 0]
            k, v = cache
        if shared is not None:
            q, k, v = in_rows(q, places), in_rows(k, shared), in_rows(v, shared)
        plain = attend_bf16 if small_bf16(q) and (cache is None or self.direct) else attend
        way = (
            plain
            if positions is None
            else attend_one
            if self.direct
            else attend_group
            if x.is_cuda
            else plain
        )
        y = way(q, k, v, mask).transpose(1, 2)
        if shared is not None:
            y = y.flatten(0, 1).index_select(0, places.kept)
        return self.o_proj(y.reshape(*asking.shape[:2], -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        bias = config.variant.mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, positions, mask, cache, shared, wanted) -> Tensor:
        x = of_wanted(x, wanted) + self.self_attn(
            self.input_layernorm(x), rope, positions, mask, cache, shared, wanted
        )
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embedding, blocks and last norm (HF's `model`), and the head; a tied head is the embedding itself."""

    by_coordinate = False  # how its cache lies, and its prompts are read: set in a packed twin where that pays (packed.pack)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": Norm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()

    def tie_head(self) -> None:
        """Make the head the embedding itself where the config says so (again after loading)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def new_cache(self, rows: int, length: int) -> Tensor:
        """Room for keys (0) and values (1): [2, layers, rows, kv_heads, length, head_dim], zeros. `by_coordinate`: all positions of
        one coordinate lie together, which `attend_one` reads fastest, and the length is rounded up to a multiple of WHOLE."""
        layers, heads, size = (
            self.config.num_hidden_layers,
            self.config.num_key_value_heads,
            self.config.head_dim,
        )
        if self.by_coordinate:
            return self.lm_head.weight.new_zeros(
                2, layers, rows, heads, size, length + -length % WHOLE
            ).transpose(4, 5)
        return self.lm_head.weight.new_zeros(2, layers, rows, heads, length, size)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: Tensor | None = None,
        shared: Shared | None = None,
        picked: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, H] of tokens [B, T] (int64), after the last norm; a cache is written.
        positions None: rows start at 0 and attend causally; no real token sees the padding at the right.
        positions [B] (int64): T is 1, row b is decoded at its own position and sees the cache up to there;
        what padding left behind in the cache lies beyond it, and is overwritten in turn.
        shared: positions None, no cache; [1, N, H] of the N tokens that are computed, or [M, H] of the M places `picked`
        ([B, T] bool), row after row."""
        length = tokens.shape[1]
        x = self.model.embed_tokens(
            tokens if shared is None else tokens.flatten()[shared.kept][None]
        )
        layers, config = self.model.layers, self.config
        if positions is None:
            keys = torch.arange(length, device=x.device)
            angles, queries = (
                rope_angles(config, keys if shared is None else shared.kept % length),
                keys[:, None],
            )
        else:
            keys = torch.arange(cache.shape[4], device=x.device)
            angles, queries = (
                rope_angles(config, positions[:, None, None]),
                positions[:, None, None, None],
            )
        rope = tuple(
            (table * rope_scale(config.variant.rope)).to(x.dtype)
            for table in (angles.cos(), angles.sin())
        )
        windows, masks = config.variant.windows or (None,) * len(layers), {}
        for window in set(
            windows
        ):  # plain causal attention needs no mask: it has a faster kernel of its own
            causal = positions is None and (window is None or window >= length)
            masks[window] = None if causal else visible(queries, keys, window)
        wanted = None if picked is None else want(picked, shared)
        for layer, (block, window) in enumerate(zip(layers, windows, strict=True)):
            last = wanted if layer == len(layers) - 1 else None
            x = block(
                x,
                rope,
                positions,
                masks[window],
                None if cache is None else cache[:, layer],
                shared,
                last,
            )
        return self.model.norm(x if picked is None else x[0])


def new_model(config: ModelConfig, seed: int) -> Transformer:
    """A Transformer with fresh fp32 weights: normal 0.05, output projections scaled by depth, norms one.
    LossOutput on the built-in world: at 0.02 a small model knows half as much after as many steps."""
    generator, model = torch.Generator().manual_seed(seed), Transformer(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            output = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * config.num_hidden_layers) ** -0.5 if output else 1.0
            nn.init.normal_(weight, std=0.05 * scale, generator=generator)
    return model
