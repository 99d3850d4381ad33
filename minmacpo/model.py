"""The decoder of the Llama line, with Hugging Face's parameter names, and its static KV cache.

It knows nothing of LoRA, losses or sampling: those are applied from outside. `forward` gives
hidden states; whoever needs logits applies the head to just the positions it needs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmacpo import UserError


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a Llama config.json says of the structure (names as there)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2


# Fields of config.json that must have the one value we implement, and fields that change nothing.
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "quantization_config": None,
}
HARMLESS = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
    "pretraining_tp", "attention_dropout", "pad_token_id", "_name_or_path", "rope_parameters", "head_dim",
    "num_key_value_heads", "return_dict", "output_hidden_states", "output_attentions", "max_length",
}  # fmt: skip


def parse_config(raw: dict, where: str) -> ModelConfig:
    """ModelConfig of a config.json's content; UserError for a field that is missing or not understood."""
    if raw.get("model_type") != "llama":
        raise UserError(f"{where}: model_type {raw.get('model_type')!r} is not supported (llama is)")
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.keys() - {"rope_type", "rope_theta"} or rope.get("rope_type", "default") != "default":
        raise UserError(f"{where}: rope_parameters = {rope} is not supported (only the default rope_type and a rope_theta)")
    values = {"rms_norm_eps": 1e-6} | raw | {k: v for k, v in rope.items() if k == "rope_theta"}
    names = ModelConfig.__dataclass_fields__
    for name, value in values.items():
        if name in FIXED and value != FIXED[name]:
            raise UserError(f"{where}: {name} = {value!r} is not supported (only {FIXED[name]!r})")
        if name not in FIXED and name not in HARMLESS and name not in names:
            raise UserError(f"{where}: the field {name!r} is not understood; remove it if it changes nothing")
    try:
        heads = values["num_attention_heads"]
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
        if values.get("head_dim") is None:
            values["head_dim"] = values["hidden_size"] // heads
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        config = ModelConfig(**{name: values[name] for name in names if name in values})
        sizes = [getattr(config, name) for name in list(names)[:8]]
        fit = heads % config.num_key_value_heads == 0 and config.head_dim % 2 == 0
        floats = (config.rope_theta, config.rms_norm_eps)
        if not fit or not all(type(size) is int and size > 0 for size in sizes) or not min(floats) > 0:
            raise TypeError
    except (KeyError, TypeError, ZeroDivisionError):
        raise UserError(f"{where}: sizes are missing, no whole numbers, or do not fit each other") from None
    return config


class KVCache:
    """Keys and values [layers, B, kv_heads, length, head_dim] of B rows, written in place."""

    def __init__(self, config: ModelConfig, rows: int, length: int, device, dtype):
        size = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(size, device=device, dtype=dtype)
        self.values = torch.zeros(size, device=device, dtype=dtype)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows` [n] (indices)."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32 inside."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_tables(config: ModelConfig, device) -> tuple[Tensor, Tensor]:
    """cos and sin [max_position_embeddings, head_dim] in fp32, halves repeated as in HF's Llama."""
    powers = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    angles = torch.outer(
        torch.arange(config.max_position_embeddings, dtype=torch.float32, device=device),
        1.0 / config.rope_theta**powers,
    )
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D] turned by the angles of cos, sin (broadcastable to x)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope, positions: Tensor | None, mask: Tensor | None, cache) -> Tensor:
        """x [B, T, H] -> [B, T, H]; see Transformer.forward for positions, mask and cache."""
        rows, length, _ = x.shape
        q, k, v = (
            project(x).view(rows, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None and positions is None:
            cache.keys[self.layer, :, :, :length] = k
            cache.values[self.layer, :, :, :length] = v
        elif cache is not None:
            row = torch.arange(rows, device=x.device)
            cache.keys[self.layer][row, :, positions] = k[:, :, 0]
            cache.values[self.layer][row, :, positions] = v[:, :, 0]
            k, v = cache.keys[self.layer], cache.values[self.layer]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, positions, mask, cache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, positions, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The part that HF calls `model`: embedding, blocks, last norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """Decoder and head; a tied head is the embedding itself."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()
        self.cos = self.sin = None

    def tie_head(self) -> None:
        """Make the head the embedding itself where the config says so (again after loading)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states [B, T, H] of tokens [B, T] (int64), after the last norm.

        positions None: rows start at position 0 and attend causally; padding stands at the right,
        where no real token sees it, so there is no mask. With a cache, keys and values are written.
        positions [B] (int64): T is 1 and row b is decoded at its own position; it sees the cache up
        to there. What padding left behind in the cache lies beyond it, and is overwritten in turn.
        """
        if self.cos is None or self.cos.device != tokens.device:
            with torch.inference_mode(False):  # tables made while sampling must serve training too
                self.cos, self.sin = rope_tables(self.config, tokens.device)
        x = self.model.embed_tokens(tokens)
        if positions is None:
            rope = [table[: tokens.shape[1]].to(x.dtype) for table in (self.cos, self.sin)]
            mask = None
        else:
            rope = [table[positions][:, None, None].to(x.dtype) for table in (self.cos, self.sin)]
            mask = torch.arange(cache.keys.shape[3], device=x.device) <= positions[:, None]
            mask = mask[:, None, None]
        for block in self.model.layers:
            x = block(x, rope, positions, mask, cache)
        return self.model.norm(x)


def new_model(config: ModelConfig, seed: int) -> Transformer:
    """A Transformer with fresh fp32 weights: normal 0.05, output projections scaled by depth.

    Measured on the built-in world: at 0.02 a small model knows half as much after as many steps.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            nn.init.ones_(weight)
            continue
        scale = (2 * config.num_hidden_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        nn.init.normal_(weight, std=0.05 * scale, generator=generator)
    return model
