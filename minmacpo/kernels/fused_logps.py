"""From hidden states to losses, without ever building [tokens, vocabulary] for a whole batch.

Under LoRA the head is frozen. Then d logp(y) / d hidden = W[y] - Σ_v p_v W[v] does not depend on the gradient
from above (one number per token), so the forward pass of a chunk can compute it at once: two head matmuls per
token, nothing recomputed, nothing of vocabulary size kept.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = (
    2048  # most tokens per head matmul: [its rows, vocabulary] is the largest tensor that exists
)


LOGITS = (
    1 << 23
)  # most logits at a time: what is done to them is done within a CPU's cache (bench/loss.py)


BLOCK = 256  # tokens that a matmul takes up best: of 262, each costs an eighth more


STRIP = 1 << 20  # of these, logits of bf16 that are fp32 at a time


SMALL = (
    4096  # a vocabulary up to which nothing is gained by taking each exponential once, and in place
)


compile_once = functools.cache(
    torch.compile
)  # a function's compiled form, the same for the whole process


def target_logits(logits: Tensor, targets: Tensor, likeliest: Tensor, own: Tensor | None) -> Tensor:
    """[N, 1] of logits [N, V], at least in fp32: the target's; with `own`, mixed with that of the `likeliest` token [N]."""
    found = widened(logits.gather(-1, targets[:, None]))
    return (
        found
        if own is None
        else torch.lerp(found, widened(logits.gather(-1, likeliest[:, None])), own)
    )


def widened(x: Tensor) -> Tensor:
    """x, in fp32 if it has fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def take_exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(largest, sum of the exponentials of what is left without it), [N, 1], at least in fp32, of logits [N, V], which become those
    exponentials. Of those with fewer bits, on a CPU, only STRIP are fp32 at a time."""
    plain = (
        logits.device.type == "cpu" and not torch.compiler.is_compiling()
    )  # a compiler keeps no wide copy
    if plain and logits.dtype.itemsize < 4 and len(logits) > 1 and logits.numel() > STRIP:
        tops, masses = zip(
            *map(take_exponentials, logits.split(max(1, STRIP // logits.shape[1]))), strict=True
        )
        return torch.cat(tops), torch.cat(masses)
    wide = widened(logits)
    top = wide.amax(-1, keepdim=True)
    mass = wide.sub_(top).exp_().sum(-1, keepdim=True)
    if wide is not logits:
        logits.copy_(wide)
    return top, mass


def chunk_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, own: Tensor | None = None
) -> Tensor:
    """log p(target) [N] from hidden [N, H], head weight [V, H], targets [N]; `own` as in token_logps."""
    logits = hidden @ weight.T
    likeliest = targets if own is None else logits.argmax(-1)
    found = target_logits(logits, targets, likeliest, own)
    if logits.requires_grad or len(weight) <= SMALL:
        return found[:, 0] - widened(logits).logsumexp(-1)
    top, mass = take_exponentials(logits)
    return (found - top - mass.log())[:, 0]


def chunk_logps_direction(
    hidden: Tensor, weight: Tensor, targets: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(log p(target) [N], its gradient W[y] - Σ_v p_v W[v] with respect to hidden [N, H]); with `own`, W[y]
    is mixed with the row of the likeliest token, through whose choice no gradient goes."""
    logits = hidden @ weight.T
    likeliest = targets if own is None else logits.argmax(-1)
    found, rows = target_logits(logits, targets, likeliest, own), weight[targets]
    if own is not None:
        rows = torch.lerp(rows, weight[likeliest], own.to(weight.dtype))
    if len(weight) <= SMALL:
        logits = widened(logits)
        total = logits.logsumexp(-1, keepdim=True)
        return (found - total)[:, 0], rows - logits.sub_(total).exp_().to(hidden.dtype) @ weight
    top, mass = take_exponentials(logits)  # probabilities times `mass` are left
    return (found - top - mass.log())[:, 0], rows - (logits @ weight) / mass.to(hidden.dtype)


def chunk_size(vocab: int, device: str = "cpu") -> int:
    """Tokens of a chunk: on a CPU one, or as many as have at most LOGITS, in whole BLOCKs."""
    if device != "cpu":
        return CHUNK
    size = max(1, min(CHUNK, LOGITS // vocab))
    return size - size % BLOCK if size > BLOCK else size


def in_chunks(hidden: Tensor, targets: Tensor, vocab: int) -> list[tuple[Tensor, Tensor]]:
    """Parts of hidden [N, H] and targets [N], by `chunk_size`."""
    size = chunk_size(vocab, hidden.device.type)
    return list(zip(hidden.split(size), targets.split(size), strict=True))


class FrozenHeadLogps(torch.autograd.Function):
    """token_logps for a head that needs no gradient; see the module's first lines."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, compiled, own=None):
        """log p(target) [N]; keeps the gradient of each with respect to hidden [N, H]."""
        step, weight = (
            compile_once(chunk_logps_direction, dynamic=True)
            if compiled
            else chunk_logps_direction,
            weight.detach(),
        )
        chunks = in_chunks(hidden, targets, len(weight))
        logps, directions = zip(*(step(h, weight, t, own) for h, t in chunks), strict=True)
        ctx.save_for_backward(torch.cat(directions))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        (direction,) = ctx.saved_tensors
        return grad[:, None].to(direction.dtype) * direction, None, None, None, None


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    compiled: bool = False,
    own: Tensor | None = None,
) -> Tensor:
    """log p(target) [N] (fp32; fp64 for fp64 input) of hidden [N, H] under head weight [V, H].
    Gradients: of nothing (scoring), of hidden (LoRA), of the head too (pre-training, chunks recomputed).
    `own` (0-dim): the share of the model's own likeliest token u, (1 - own) log p(target) + own log p(u)."""
    chunks = in_chunks(hidden, targets, len(weight))
    if torch.is_grad_enabled() and weight.requires_grad and len(chunks) > 1:
        return torch.cat(
            [checkpoint(chunk_logps, h, weight, t, own, use_reentrant=False) for h, t in chunks]
        )
    if torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad:
        return FrozenHeadLogps.apply(hidden, weight, targets, compiled, own)
    return torch.cat([chunk_logps(h, weight, t, own) for h, t in chunks])


def masked_logps(
    model,
    tokens: Tensor,
    mask: Tensor,
    compiled: bool = False,
    own: Tensor | None = None,
    shared=None,
) -> tuple[Tensor, Tensor]:
    """(log p [N] of the N tokens under mask, their row [N]) of tokens [B, T], mask [B, T] bool.
    Only they reach the head. Position 0 has nothing before it and is not scored; no template masks it in.
    `shared` (model.PackedIndex): which tokens the model computes."""
    picked = mask[:, 1:]
    rows, places = picked.nonzero(
        as_tuple=True
    )  # a GPU is waited for here, before it has the model to compute
    if shared is None:
        hidden = model(tokens)[rows, places]
    else:
        hidden = model(tokens, packed=shared, output_mask=F.pad(picked, (0, 1)))
    logps = token_logps(hidden, model.lm_head.weight, tokens[rows, places + 1], compiled, own)
    return logps, rows


def sequence_logps(
    model, tokens: Tensor, mask: Tensor, compiled: bool = False, shared=None
) -> Tensor:
    """Summed log-probability [B] (fp32) of the tokens under mask [B, T], end token included."""
    logps, rows = masked_logps(model, tokens, mask, compiled, shared=shared)
    return logps.new_zeros(len(tokens)).index_add(0, rows, logps)
