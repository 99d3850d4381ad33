"""Attention and normalisation: the plain form and the faster ones beside it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_ROWS = 512  # tokens of the longest rows whose attention in bf16 is done with plain matmuls on a CPU; it keeps all scores


class FrozenNorm(torch.autograd.Function):
    """RMSNorm whose weight [H] does not learn."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        """x [..., H] over the root of its mean square, times weight."""
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx, grad):
        """In fp32, of y = w x r with r = (mean of x² + eps)^-½: w grad r - x r³ (mean of w grad x)."""
        x, weight = ctx.saved_tensors
        grad, wide = grad.float() * weight, x.float()
        scale = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        along = torch.linalg.vecdot(grad, wide)[..., None] / len(weight) * scale**3
        return grad.mul_(scale).addcmul_(wide, along, value=-1).to(x.dtype), None, None


class Norm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        """On a CPU torch's own way back makes three times as many passes over x as FrozenNorm's."""
        by_hand = (
            x.requires_grad
            and not self.weight.requires_grad
            and x.device.type == "cpu"
            and x.dtype.itemsize <= 4
        )
        return FrozenNorm.apply(x, self.weight, self.eps) if by_hand else super().forward(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q [B, heads, T, D] to k, v [B, kv_heads, S, D] under `mask`, None: causally."""
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )


def attend_group(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What `attend` gives of one query per row, q [B, heads, 1, D], the queries of a group as rows of one head: a GPU has no fast kernel
    for a mask and groups together, and the slow one repeats the whole cache."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(grouped, k, v, mask).reshape(q.shape)


def small_bf16(q: Tensor) -> bool:
    """Whether `attend_bf16` is the faster one: on a CPU the kernel multiplies bf16 no faster than fp32."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] <= SMALL_ROWS


def attend_bf16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` with plain matmuls, and all scores in memory, rounded to bf16 as in transformers' eager attention: at scores of 20 an
    output of size 1 is 0.05 off, at 100 it is 0.2 (there 0.1 and 0.4)."""
    _, heads, length, size = q.shape
    if heads != k.shape[1]:
        k, v = (each.repeat_interleave(heads // each.shape[1], 1) for each in (k, v))
    if mask is None:
        mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril()
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    scores = torch.baddbmm(
        hidden, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=size**-0.5
    )
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(q.shape)


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What `attend` gives of one query per row, q [B, heads, 1, D], k and v [B, kv_heads, S, D], as two plain products, each in
    the order in which the cache lies: on a CPU its kernel, made for many queries, takes up to four times as long."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]) * q.shape[3] ** -0.5
    if k.stride(3) == 1:  # a position's coordinates lie together
        scores = (k @ grouped.transpose(2, 3)).transpose(2, 3).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).reshape(q.shape)
    scores = (grouped @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    return (v.transpose(2, 3) @ scores.softmax(-1).transpose(2, 3)).transpose(2, 3).reshape(q.shape)
