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

CHUNK = 2048  # tokens per head matmul: [CHUNK, vocabulary] is the largest tensor that exists
compile_once = functools.cache(torch.compile)  # a function's compiled form, the same for the whole process


def chunk_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log p(target) [N] from hidden [N, H], head weight [V, H], targets [N]."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def chunk_logps_direction(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(target) [N], its gradient W[y] - Σ_v p_v W[v] with respect to hidden [N, H])."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    total = logits.logsumexp(-1, keepdim=True)
    logps = (logits.gather(-1, targets[:, None]) - total)[:, 0]
    probs = (logits - total).exp().to(hidden.dtype)
    return logps, weight[targets] - probs @ weight


class FrozenHeadLogps(torch.autograd.Function):
    """token_logps for a head that needs no gradient; see the module's first lines."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, compiled):
        """log p(target) [N]; keeps the gradient of each with respect to hidden [N, H]."""
        step = compile_once(chunk_logps_direction, dynamic=True) if compiled else chunk_logps_direction
        chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        logps, directions = zip(*(step(h, weight, t) for h, t in chunks), strict=True)
        ctx.save_for_backward(torch.cat(directions))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        (direction,) = ctx.saved_tensors
        return grad[:, None].to(direction.dtype) * direction, None, None, None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, compiled: bool = False) -> Tensor:
    """log p(target) [N] (fp32; fp64 for fp64 input) of hidden [N, H] under head weight [V, H].
    Gradients: of nothing (scoring), of hidden (LoRA), of the head too (pre-training, chunks recomputed)."""
    chunks = list(zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True))
    if torch.is_grad_enabled() and weight.requires_grad and len(chunks) > 1:
        return torch.cat([checkpoint(chunk_logps, h, weight, t, use_reentrant=False) for h, t in chunks])
    if torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad:
        return FrozenHeadLogps.apply(hidden, weight, targets, compiled)
    return torch.cat([chunk_logps(h, weight, t) for h, t in chunks])


def masked_logps(model, tokens: Tensor, mask: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """(log p [N] of the N tokens under mask, their row [N]) of tokens [B, T], mask [B, T] bool.
    Only they reach the head. Position 0 has nothing before it and is not scored; no template masks it in."""
    hidden, picked = model(tokens)[:, :-1], mask[:, 1:]
    logps = token_logps(hidden[picked], model.lm_head.weight, tokens[:, 1:][picked], compiled)
    return logps, picked.nonzero()[:, 0]


def sum_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count]: values [N] summed over equal rows [N]."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, rows, values)


def sequence_logps(model, tokens: Tensor, mask: Tensor, compiled: bool = False) -> Tensor:
    """Summed log-probability [B] (fp32) of the tokens under mask [B, T], end token included."""
    return sum_by_row(*masked_logps(model, tokens, mask, compiled), len(tokens))


def sft_loss(logps: Tensor, tokens: int) -> Tensor:
    """Cross-entropy: minus the sum of logps [N] over `tokens`, the trained tokens of the whole step."""
    return -logps.sum() / tokens


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
    beta: float, label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, rewards/chosen, rewards/rejected), each [N], from summed logps [N]; rewards carry no gradient.
    Sigmoid DPO (Rafailov et al. 2023, eq. 7), conservative: a share `label_smoothing` of pairs is flipped."""
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss, (beta * chosen).detach(), (beta * rejected).detach()
