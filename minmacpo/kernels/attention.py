"""Attention and RMSNorm: `attention` picks the fastest of four implementations of one formula.

Shapes: B rows, T queries of a row, S keys of a row, H query heads, G key/value heads, D numbers
per head. A mask is broadcastable to (B, 1, T, S), and True where a query sees a key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EAGER_BF16_MAX_LEN = 512  # queries per row; eager attention keeps all T * S scores in memory


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    with_cache: bool = False,
    decoding: bool = False,
    prepacked: bool = False,
) -> Tensor:
    """Softmax attention of every query to the keys that its mask shows, (B, H, T, D).

    Args:
        q: (B, H, T, D).
        k, v: (B, G, S, D); every H / G query heads share one of them.
        mask: None for causal attention of rows that start at position 0.
        with_cache: the pass reads or writes a KV cache, so it samples.
        decoding: T is 1, and k and v are the cache itself.
        prepacked: the model is a copy made by core.prepack for sampling on a CPU.
    """
    if decoding and prepacked:
        # two matmuls over the cache: SDPA on a CPU is made for many queries, and up to 4x slower
        return decode_attention(q, k, v, mask)
    if decoding and q.is_cuda:
        # SDPA has no fast kernel for a mask together with grouped heads: it would copy the cache
        return gqa_decode_attention(q, k, v, mask)
    if with_cache and not prepacked:
        # one kernel for a prompt and for every token after it
        return sdpa(q, k, v, mask)
    is_bf16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if is_bf16_on_cpu and q.shape[2] <= EAGER_BF16_MAX_LEN:
        # SDPA on a CPU multiplies bf16 no faster than fp32; matmuls do
        return eager_bf16_attention(q, k, v, mask)
    return sdpa(q, k, v, mask)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by torch's own kernel; causal where mask is None."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


def eager_bf16_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by two matmuls, with all scores rounded to bf16 as in transformers' eager mode.

    With scores of size 20 an output of size 1 is up to 0.05 off, with scores of 100 up to 0.2
    (transformers: 0.1 and 0.4).
    """
    # --- Every query head gets keys and values of its own
    group_size = q.shape[1] // k.shape[1]
    if group_size > 1:
        k = k.repeat_interleave(group_size, 1)  # (B, H, S, D)
        v = v.repeat_interleave(group_size, 1)  # (B, H, S, D)

    # --- What is added to the scores: 0 where a query sees a key
    if mask is None:
        every_pair = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = every_pair.tril()  # (T, S): causal
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    bias.masked_fill_(~mask, -torch.inf)

    # --- Two matmuls, each over all rows and heads at once
    queries = q.flatten(0, 1)  # (B * H, T, D)
    keys = k.flatten(0, 1)  # (B * H, S, D)
    values = v.flatten(0, 1)  # (B * H, S, D)
    scale = q.shape[3] ** -0.5
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)  # (B * H, T, S)
    y = scores.softmax(-1) @ values  # (B * H, T, D)
    return y.view(q.shape)


def gqa_decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one query per row, (B, H, 1, D), the queries of a group as rows of one head."""
    queries = group_queries(q, k.shape[1])  # (B, G, H / G, D)
    y = F.scaled_dot_product_attention(queries, k, v, mask)  # (B, G, H / G, D)
    return y.reshape(q.shape)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one query per row, (B, H, 1, D), by two matmuls in the cache's own order."""
    scale = q.shape[3] ** -0.5
    queries = group_queries(q, k.shape[1]) * scale  # (B, G, H / G, D)
    if k.stride(3) == 1:
        # the usual cache, in which the D numbers of a position lie together
        scores = k @ queries.transpose(2, 3)  # (B, G, S, H / G)
        weights = masked_softmax(scores.transpose(2, 3), mask)  # (B, G, H / G, S)
        y = weights @ v  # (B, G, H / G, D)
        return y.reshape(q.shape)

    # the transposed cache of core.prepack, in which the S positions of a coordinate lie together
    scores = queries @ k.transpose(2, 3)  # (B, G, H / G, S)
    weights = masked_softmax(scores, mask)  # (B, G, H / G, S)
    y = v.transpose(2, 3) @ weights.transpose(2, 3)  # (B, G, D, H / G)
    return y.transpose(2, 3).reshape(q.shape)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Attention weights (..., S) of scores (..., S): 0 where the mask hides a key."""
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def group_queries(q: Tensor, kv_heads: int) -> Tensor:
    """(B, H, 1, D) -> (B, G, H / G, D)."""
    return q.reshape(q.shape[0], kv_heads, -1, q.shape[3])


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return rms_norm(x, self.weight, self.eps)


class OffsetRMSNorm(nn.RMSNorm):
    """RMSNorm with 1 + weight for a weight, and all of it in fp32 (Gemma)."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x, 1 + self.weight.to(wide), self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., C) normalised over the last dimension, times weight (C,), in the dtype of x."""
    frozen = x.requires_grad and not weight.requires_grad
    if frozen and x.device.type == "cpu" and x.dtype.itemsize <= 4:
        # torch's own backward makes three times as many passes over x on a CPU
        return FrozenRMSNorm.apply(x, weight, eps)
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


class FrozenRMSNorm(torch.autograd.Function):
    """RMSNorm whose weight does not learn, with a backward of few passes over x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """(..., C) -> (..., C)."""
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """The gradient of x in fp32: r * g - r^3 * x * mean(g * x).

        Here r = (mean(x^2) + eps)^-0.5 per token, and g = grad * weight.
        """
        x, weight = ctx.saved_tensors
        wide = x.float()
        grad = grad.float() * weight
        r = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()  # (..., 1)
        along_x = torch.linalg.vecdot(grad, wide)[..., None] / len(weight) * r**3  # (..., 1)
        return grad.mul_(r).addcmul_(wide, along_x, value=-1).to(x.dtype), None, None
