"""The decoder of the Llama line, with Hugging Face's parameter names, and its static KV cache.

LoRA, losses and sampling come from outside. `forward` gives hidden states; who needs logits applies the head.
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
    eos_token_id: int | list[int] | None = 2


# Fields of config.json that must have the one value we implement, and fields that change nothing.
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
         "rope_scaling": None, "rope_type": "default", "quantization_config": None}  # fmt: skip
HARMLESS = {"architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
            "pretraining_tp", "attention_dropout", "pad_token_id", "_name_or_path", "rope_parameters",
            "return_dict", "output_hidden_states", "output_attentions", "max_length", "id2label", "label2id",
            "problem_type", "num_labels"}  # fmt: skip


def parse_config(raw: dict, where: str) -> ModelConfig:
    """ModelConfig of a config.json's content; UserError for a field that is missing or not understood."""
    names, rope = ModelConfig.__annotations__, raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters = {rope!r} is not supported (only an object)")
    values = {"model_type": None, "rms_norm_eps": 1e-6} | raw | rope
    for name, value in values.items():
        if name in FIXED and value != FIXED[name]:
            raise UserError(f"{where}: {name} = {value!r} is not supported (only {FIXED[name]!r})")
        if name not in FIXED.keys() | HARMLESS | names.keys():
            raise UserError(f"{where}: the field {name!r} is not understood; remove it if it changes nothing")
    try:
        heads = values["num_attention_heads"]
        derived = {"num_key_value_heads": heads, "head_dim": values["hidden_size"] // heads}
        values |= {name: value for name, value in derived.items() if values.get(name) is None}
        config = ModelConfig(**{name: values[name] for name in names if name in values})
        sizes = [values[name] for name, kind in names.items() if kind is int]
        fit = heads % config.num_key_value_heads == 0 and config.head_dim % 2 == 0
        positive = min(config.rope_theta, config.rms_norm_eps) > 0
        if not fit or not positive or not all(type(size) is int and size > 0 for size in sizes):
            raise TypeError
    except (KeyError, TypeError, ZeroDivisionError):
        raise UserError(f"{where}: sizes are missing, no whole numbers, or do not fit each other") from None
    return config


def rope_angles(config: ModelConfig, positions: Tensor) -> Tensor:
    """[..., head_dim] in fp32 for positions [...], halves repeated as in HF's Llama."""
    powers = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[..., None] * (1.0 / config.rope_theta**powers)
    return torch.cat((angles, angles), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D] turned by the angles of cos, sin (broadcastable to x)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope, positions: Tensor | None, mask: Tensor | None, cache) -> Tensor:
        """x [B, T, H] -> [B, T, H]; see Transformer.forward for positions, mask and cache (this layer's)."""
        rows, length, _ = x.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).view(rows, length, -1, self.head_dim).transpose(1, 2) for proj in projections)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None and positions is None:
            cache[0, :, :, :length], cache[1, :, :, :length] = k, v
        elif cache is not None:
            row = torch.arange(rows, device=x.device)
            cache[0][row, :, positions], cache[1][row, :, positions] = k[:, :, 0], v[:, :, 0]
            k, v = cache
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
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
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, positions, mask, cache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, positions, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embedding, blocks and last norm (HF's `model`), and the head; a tied head is the embedding itself."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
        })  # fmt: skip
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()

    def tie_head(self) -> None:
        """Make the head the embedding itself where the config says so (again after loading)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def new_cache(self, rows: int, length: int) -> Tensor:
        """Room for keys (0) and values (1): [2, layers, rows, kv_heads, length, head_dim], zeros."""
        layers, heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        return self.lm_head.weight.new_zeros(2, layers, rows, heads, length, self.config.head_dim)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, H] of tokens [B, T] (int64), after the last norm; a cache is written.
        positions None: rows start at 0 and attend causally; no real token sees the padding at the right.
        positions [B] (int64): T is 1, row b is decoded at its own position and sees the cache up to there;
        what padding left behind in the cache lies beyond it, and is overwritten in turn."""
        x, mask = self.model.embed_tokens(tokens), None
        if positions is None:
            angles = rope_angles(self.config, torch.arange(tokens.shape[1], device=x.device))
        else:
            angles = rope_angles(self.config, positions[:, None, None])
            mask = torch.arange(cache.shape[4], device=x.device) <= positions[:, None, None, None]
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer, block in enumerate(self.model.layers):
            x = block(x, rope, positions, mask, None if cache is None else cache[:, layer])
        return self.model.norm(x)


def new_model(config: ModelConfig, seed: int) -> Transformer:
    """A Transformer with fresh fp32 weights: normal 0.05, output projections scaled by depth, norms one.
    Measured on the built-in world: at 0.02 a small model knows half as much after as many steps."""
    generator, model = torch.Generator().manual_seed(seed), Transformer(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            output = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * config.num_hidden_layers) ** -0.5 if output else 1.0
            nn.init.normal_(weight, std=0.05 * scale, generator=generator)
    return model
