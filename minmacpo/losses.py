"""From hidden states to losses, without ever building [tokens, vocabulary] for a whole batch.

The head is frozen under LoRA. Then d logp(y) / d hidden = W[y] - Σ_v p_v W[v] does not depend on
the gradient that comes from above (one number per token), so the forward pass of a chunk can
compute it at once: two head matmuls per token, nothing recomputed, nothing of vocabulary size kept.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # tokens per head matmul: [CHUNK, vocabulary] is the largest tensor that exists


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log p(target) [N] from hidden [N, H], head weight [V, H], targets [N]; the readable form."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def chunk_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As `plain_logps`, keeping less: one pass for the log-sum-exp, one gather."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def chunk_logps_direction(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(target) [N], its gradient W[y] - Σ_v p_v W[v] with respect to hidden [N, H])."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    logps = (logits.gather(-1, targets[:, None]) - total)[:, 0]
    probs = (logits - total).exp().to(hidden.dtype)
    return logps, weight[targets] - probs @ weight


@functools.cache
def compiled_direction():
    """`chunk_logps_direction` through torch.compile, once per process, any number of tokens."""
    return torch.compile(chunk_logps_direction, dynamic=True)


class FrozenHeadLogps(torch.autograd.Function):
    """token_logps for a head that needs no gradient; see the module's first lines."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, compiled):
        """log p(target) [N]; keeps the gradient of each with respect to hidden [N, H]."""
        step = compiled_direction() if compiled else chunk_logps_direction
        parts = [
            step(h, weight, t) for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
        ctx.save_for_backward(torch.cat([direction for _, direction in parts]))
        return torch.cat([logps for logps, _ in parts])

    @staticmethod
    def backward(ctx, grad):
        (direction,) = ctx.saved_tensors
        return grad[:, None].to(direction.dtype) * direction, None, None, None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, compiled: bool = False) -> Tensor:
    """log p(target) [N] (fp32; fp64 for fp64 input) of hidden [N, H] under head weight [V, H].

    Three ways, by what needs a gradient: none (scoring), hidden only (LoRA), or the head too
    (pre-training): then each chunk is recomputed in the backward pass, and both gradients are right.
    """
    if len(targets) == 0:
        return hidden.sum(-1)
    if torch.is_grad_enabled() and weight.requires_grad:
        chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        if len(targets) <= CHUNK:
            return chunk_logps(hidden, weight, targets)
        return torch.cat([checkpoint(chunk_logps, h, weight, t, use_reentrant=False) for h, t in chunks])
    if torch.is_grad_enabled() and hidden.requires_grad:
        return FrozenHeadLogps.apply(hidden, weight, targets, compiled)
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([chunk_logps(h, weight, t) for h, t in chunks])


def masked_logps(model, tokens: Tensor, mask: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """(log p [N] of the N tokens under mask, their row [N]) of tokens [B, T], mask [B, T] bool.

    Prompt and padding never reach the head: hidden states are picked before it. A token at position
    0 has nothing before it and cannot be scored; no template puts the mask there.
    """
    hidden = model(tokens)[:, :-1]
    picked = mask[:, 1:]
    rows = picked.nonzero()[:, 0]
    return token_logps(hidden[picked], model.lm_head.weight, tokens[:, 1:][picked], compiled), rows


def sum_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count]: values [N] summed over equal rows [N]."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, rows, values)


def sequence_logps(model, tokens: Tensor, mask: Tensor, compiled: bool = False) -> Tensor:
    """Summed log-probability [B] (fp32) of the tokens under mask [B, T], end token included."""
    logps, rows = masked_logps(model, tokens, mask, compiled)
    return sum_by_row(logps, rows, len(tokens))


def sft_loss(logps: Tensor, tokens: int) -> Tensor:
    """Cross-entropy: minus the sum of logps [N] over `tokens`, the trained tokens of the whole step."""
    return -logps.sum() / tokens


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, rewards/chosen, rewards/rejected), each [N], from summed logps [N].

    Sigmoid DPO (Rafailov et al. 2023, eq. 7); `label_smoothing` is conservative DPO's share of
    flipped preferences. Rewards carry no gradient.
    """
    chosen = policy_chosen - reference_chosen
    rejected = policy_rejected - reference_rejected
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss, (beta * chosen).detach(), (beta * rejected).detach()
