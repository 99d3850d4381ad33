"""Log-probabilities of tokens from hidden states, without (tokens, vocabulary) of a whole batch.

Under LoRA the head is frozen. The gradient of log p(y) with respect to the hidden state,

    d log p(y) / d hidden = W[y] - sum over v of p(v) W[v],

then does not depend on the gradient from above, which is one number per token. So the forward pass
of a chunk computes it at once: two head matmuls per token, nothing is recomputed, and nothing of
vocabulary size is kept for the backward pass.

Shapes: B rows of T tokens, N tokens whose log-probability is wanted, C hidden size, V vocabulary.
The head's weight W is (V, C).
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Most tokens of a chunk: (CHUNK, V) logits are the largest tensor that exists
CHUNK = 2048

# Most logits of a chunk on a CPU, so that they stay in its cache (bench/speed/loss.py)
MAX_CPU_LOGITS = 1 << 23

# A matmul takes tokens up best in whole blocks of so many: of 262, each costs an eighth more
BLOCK = 256

# bf16 logits of which an fp32 copy is made at a time, on a CPU
FP32_CHUNK = 1 << 20

# Up to this vocabulary nothing is gained by taking every exponential once, and in place
SMALL_VOCAB = 4096


@functools.cache
def compile_once(function: Callable) -> Callable:
    """The compiled form of a function, for tensors of any size; one for the whole process."""
    return torch.compile(function, dynamic=True)


def upcast(x: Tensor) -> Tensor:
    """x, in fp32 if it has fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def target_logits(
    logits: Tensor, targets: Tensor, predicted: Tensor, confidence_weight: Tensor | None
) -> Tensor:
    """(N, 1) logits of the targets, mixed with those of the predicted tokens if there is a weight.

    Args:
        logits: (N, V).
        targets: (N,) token ids.
        predicted: (N,) the model's own likeliest tokens.
        confidence_weight: see `token_logps`.
    """
    of_targets = upcast(logits.gather(-1, targets[:, None]))  # (N, 1)
    if confidence_weight is None:
        return of_targets
    of_predicted = upcast(logits.gather(-1, predicted[:, None]))  # (N, 1)
    return torch.lerp(of_targets, of_predicted, confidence_weight)


def exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits (N, V) by exp(logits - largest); returns (largest, sum of them), each (N, 1).

    Divided by their sum, what stands in `logits` afterwards are the probabilities. Both results are
    at least fp32. On a CPU only FP32_CHUNK of narrower logits have a wide copy at a time; compiled
    code makes no copy anyway.
    """
    is_eager_cpu = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    is_narrow = logits.dtype.itemsize < 4
    is_large = len(logits) > 1 and logits.numel() > FP32_CHUNK
    if is_eager_cpu and is_narrow and is_large:
        return exponentials_in_parts_(logits)

    wide = upcast(logits)
    largest = wide.amax(-1, keepdim=True)
    wide.sub_(largest).exp_()
    total = wide.sum(-1, keepdim=True)
    if wide is not logits:
        logits.copy_(wide)
    return largest, total


def exponentials_in_parts_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`exponentials_` of a few rows at a time, of about FP32_CHUNK logits."""
    rows = max(1, FP32_CHUNK // logits.shape[1])
    largest_parts = []
    total_parts = []
    for part in logits.split(rows):
        largest, total = exponentials_(part)
        largest_parts.append(largest)
        total_parts.append(total)
    return torch.cat(largest_parts), torch.cat(total_parts)


def chunk_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, confidence_weight: Tensor | None = None
) -> Tensor:
    """(N,) log p(target) from hidden (N, C), head weight (V, C), targets (N,)."""
    logits = hidden @ weight.T  # (N, V)
    predicted = targets if confidence_weight is None else logits.argmax(-1)
    numerator = target_logits(logits, targets, predicted, confidence_weight)  # (N, 1)

    if logits.requires_grad or len(weight) <= SMALL_VOCAB:
        log_total = upcast(logits).logsumexp(-1)  # (N,)
        return numerator[:, 0] - log_total

    largest, total = exponentials_(logits)  # what is in `logits` is not looked at any more
    logps = numerator - largest - total.log()  # (N, 1)
    return logps[:, 0]


def chunk_logps_and_grad(
    hidden: Tensor, weight: Tensor, targets: Tensor, confidence_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(N,) log p(target), and its gradient (N, C) with respect to hidden (see the module's head).

    With a confidence weight, W[y] is mixed with the row of the likeliest token; no gradient goes
    through the choice of that token.
    """
    # --- W[y], and its product with hidden
    logits = hidden @ weight.T  # (N, V)
    predicted = targets if confidence_weight is None else logits.argmax(-1)
    numerator = target_logits(logits, targets, predicted, confidence_weight)  # (N, 1)

    target_rows = weight[targets]  # (N, C): W[y]
    if confidence_weight is not None:
        target_rows = torch.lerp(target_rows, weight[predicted], confidence_weight.to(weight.dtype))

    # --- The sum over v of p(v) W[v], and the logarithm of what normalises p
    if len(weight) <= SMALL_VOCAB:
        logits = upcast(logits)
        log_total = logits.logsumexp(-1, keepdim=True)  # (N, 1)
        logps = numerator - log_total  # (N, 1)
        probs = logits.sub_(log_total).exp_()  # (N, V)
        expected_rows = probs.to(hidden.dtype) @ weight  # (N, C)
    else:
        largest, total = exponentials_(logits)
        logps = numerator - largest - total.log()  # (N, 1)
        # Their product with W is divided by the sum, not each of V exponentials
        expected_rows = (logits @ weight) / total.to(hidden.dtype)  # (N, C)
    return logps[:, 0], target_rows - expected_rows


def chunk_size(vocab: int, device: str = "cpu") -> int:
    """Tokens of a chunk; on a CPU as many as MAX_CPU_LOGITS allow, if possible in whole BLOCKs."""
    if device != "cpu":
        return CHUNK
    size = max(1, min(CHUNK, MAX_CPU_LOGITS // vocab))
    if size > BLOCK:
        size -= size % BLOCK
    return size


def in_chunks(hidden: Tensor, targets: Tensor, vocab: int) -> list[tuple[Tensor, Tensor]]:
    """Parts of hidden (N, C) and targets (N,), each of `chunk_size` tokens."""
    size = chunk_size(vocab, hidden.device.type)
    return list(zip(hidden.split(size), targets.split(size), strict=True))


class FrozenHeadLogps(torch.autograd.Function):
    """`token_logps` for a head that needs no gradient; see the module's head."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, compiled, confidence_weight=None):
        """(N,) log p(target); keeps the gradient of each with respect to hidden (N, C)."""
        weight = weight.detach()
        compute = chunk_logps_and_grad
        if compiled:
            compute = compile_once(chunk_logps_and_grad)

        logps = []
        grads = []
        for chunk, chunk_targets in in_chunks(hidden, targets, len(weight)):
            chunk_logp, chunk_grad = compute(chunk, weight, chunk_targets, confidence_weight)
            logps.append(chunk_logp)
            grads.append(chunk_grad)
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        (logp_grad,) = ctx.saved_tensors
        hidden_grad = grad[:, None].to(logp_grad.dtype) * logp_grad
        return hidden_grad, None, None, None, None


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    compiled: bool = False,
    confidence_weight: Tensor | None = None,
) -> Tensor:
    """(N,) log p(target) in fp32 (fp64 for fp64 input), with the gradients that are asked for.

    Gradients go to nothing (scoring), to hidden (LoRA), or to the head as well (pre-training, where
    every chunk is recomputed in the backward pass).

    Args:
        hidden: (N, C).
        weight: (V, C), the head.
        targets: (N,) token ids.
        compiled: whether the chunk of a frozen head is compiled.
        confidence_weight: () weight w of the model's own likeliest token u: the result is
            (1 - w) log p(target) + w log p(u) (Burns et al. 2023, the auxiliary confidence loss).
    """
    train_head = torch.is_grad_enabled() and weight.requires_grad
    train_hidden = torch.is_grad_enabled() and hidden.requires_grad

    # LoRA: the gradient is computed in the forward pass, see the module's head
    if train_hidden and not train_head:
        return FrozenHeadLogps.apply(hidden, weight, targets, compiled, confidence_weight)

    # Scoring and pre-training. Autograd would keep the logits of every chunk: with several of them
    # each is computed again in the backward pass, so that only one chunk's exist at a time
    chunks = in_chunks(hidden, targets, len(weight))
    logps = []
    for chunk, chunk_targets in chunks:
        inputs = (chunk, weight, chunk_targets, confidence_weight)
        if train_head and len(chunks) > 1:
            logps.append(checkpoint(chunk_logps, *inputs, use_reentrant=False))
        else:
            logps.append(chunk_logps(*inputs))
    return torch.cat(logps)


def masked_logps(
    model,
    tokens: Tensor,
    mask: Tensor,
    compiled: bool = False,
    confidence_weight: Tensor | None = None,
    packed=None,
) -> tuple[Tensor, Tensor]:
    """(N,) log p of the N tokens under the mask, and the row (N,) that each is of.

    Only these tokens reach the head. Position 0 has nothing before it and is not scored; no chat
    template masks it in.

    Args:
        tokens: (B, T) ids.
        mask: (B, T) bool.
        compiled, confidence_weight: see `token_logps`.
        packed: which tokens the model computes, if not all (core/batching.py).
    """
    predicts = mask[:, 1:]  # (B, T - 1): whether the token after this one is asked for
    # A GPU is waited for here, before it has the model to compute
    rows, positions = predicts.nonzero(as_tuple=True)  # (N,), (N,)
    if packed is None:
        hidden = model(tokens)[rows, positions]  # (N, C)
    else:
        hidden = model(tokens, packed=packed, output_mask=F.pad(predicts, (0, 1)))  # (N, C)
    targets = tokens[rows, positions + 1]
    logps = token_logps(hidden, model.lm_head.weight, targets, compiled, confidence_weight)
    return logps, rows


def sequence_logps(
    model, tokens: Tensor, mask: Tensor, compiled: bool = False, packed=None
) -> Tensor:
    """(B,) log-probability of every row, summed over the tokens under its mask (B, T); fp32."""
    logps, rows = masked_logps(model, tokens, mask, compiled, packed=packed)
    return logps.new_zeros(len(tokens)).index_add(0, rows, logps)
