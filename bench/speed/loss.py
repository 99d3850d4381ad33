"""From hidden states to log-probabilities and their gradients: python -m bench.speed.loss [SHAPE].

The form of kernels/fused_logps.py for a frozen head against plain logits, checkpointed chunks,
torch's F.linear_cross_entropy and Liger's DPO loss, on the trained tokens of 8 pairs of 128 + 128.
Plain logits are the oracle of the tests.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.speed.timing import alternate, bf16_hardware, missing, read_words, write_bench
from minmacpo.core.losses import PairLogps, sigmoid_loss
from minmacpo.kernels.fused_logps import chunk_logps, in_chunks, token_logps
from minmacpo.runtime.device import peak_mb, reset_peaks

TITLE = (
    "DPO loss of 2,048 trained tokens of 16 answers from hidden states, vocabulary 32,000, "
    "forward and backward, frozen head, one thread."
)
WIDTHS = {"15M": 288, "110M": 768}
TOKENS = 2048
ANSWERS = 16
VOCAB = 32_000
BETA = 0.1
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

# Hidden states (N, C), the head's weight (V, C), targets (N,)
Case = tuple[Tensor, Tensor, Tensor]


def margin_loss(logps: Tensor) -> Tensor:
    """The mean DPO loss of token logps (N,), even answers chosen, against references of zero."""
    answers = logps.view(ANSWERS, -1).sum(1)
    chosen, rejected = answers.view(-1, 2).unbind(1)
    zero = torch.zeros_like(chosen)
    return sigmoid_loss(PairLogps(chosen, rejected, zero, zero, zero, zero), BETA).mean()


# ---- the forms: hidden, weight, targets -> loss -----------------------------------------------


def own_form(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What this project uses."""
    return margin_loss(token_logps(hidden, weight, targets))


def plain_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    logps = (hidden @ weight.T).float().log_softmax(-1)  # (N, V)
    return margin_loss(logps.gather(-1, targets[:, None])[:, 0])


def checkpointed_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits of some tokens at a time, computed again in the backward pass."""
    logps = []
    for chunk, chunk_targets in in_chunks(hidden, targets, len(weight)):
        logps.append(checkpoint(chunk_logps, chunk, weight, chunk_targets, use_reentrant=False))
    return margin_loss(torch.cat(logps))


def torch_form(options, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's fused cross-entropy."""
    losses = F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)
    return margin_loss(-losses)


def liger_form(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's chunked DPO loss; it wants the chosen answers first, then the rejected."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    order = [*range(0, ANSWERS, 2), *range(1, ANSWERS, 2)]
    answers = hidden.view(ANSWERS, -1, hidden.shape[1])[order]
    answer_targets = targets.view(ANSWERS, -1)[order]
    loss = LigerFusedLinearDPOLoss(
        beta=BETA, compute_nll_loss=False, use_ref_model=False, compiled=False
    )
    return loss(weight, answers, answer_targets)[0]


def forms() -> dict[str, Callable | str]:
    """Each way to the loss, or why there is none."""
    available: dict[str, Callable | str] = {
        "plain logits": plain_logits,
        "checkpointed chunks": checkpointed_chunks,
    }
    if hasattr(F, "linear_cross_entropy"):
        name = "torch F.linear_cross_entropy"
        available[name] = functools.partial(torch_form, None)
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            options = torch.nn.LinearCrossEntropyOptions()
            available[f"{name}, chunked"] = functools.partial(torch_form, options)

    lacks = missing("liger_kernel").replace("-r requirements-dev.txt", "liger-kernel")
    available["Liger's chunked DPO loss"] = lacks or liger_form
    return available


# ---- measuring ------------------------------------------------------------------------------


def gradient(form: Callable, case: Case) -> tuple[float, Tensor]:
    """(Loss, its gradient with respect to the hidden states)."""
    hidden, weight, targets = case
    hidden = hidden.detach().requires_grad_(True)
    loss = form(hidden, weight, targets)
    loss.backward()
    return loss.item(), hidden.grad


def peak_of(form: Callable, case: Case) -> int:
    """MB that this process grows by at most."""
    reset_peaks("cpu")
    before = peak_mb()
    gradient(form, case)
    return round(peak_mb() - before)


def random_case(width: int, dtype: torch.dtype) -> Case:
    """Random hidden states, head and targets."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, width).to(dtype)
    weight = (torch.randn(VOCAB, width) * width**-0.5).to(dtype)
    return hidden, weight, torch.randint(VOCAB, (TOKENS,))


def compare(name: str, form: Callable | str, shape: str, dtype: torch.dtype) -> dict:
    """One row: another form against the own one; a `form` that is a text says why there is none."""
    row = {
        "work": "frozen head, DPO loss",
        "shape": shape,
        "dtype": DTYPE_NAMES[dtype],
        "peer": name,
        "own": {},
        "peer_values": {},
    }
    if isinstance(form, str):
        return row | {"note": form}

    case = random_case(WIDTHS[shape], dtype)
    own_loss, own_grad = gradient(own_form, case)
    try:
        loss, grad = gradient(form, case)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0][:120]
        return row | {"note": f"fails: {reason}"}

    tolerance = 1e-3 if dtype == torch.float32 else 0.02
    if abs(own_loss - loss) > tolerance * abs(loss):
        raise SystemExit(f"{name}: the losses differ, {own_loss} and {loss}")
    distance = ((own_grad - grad).float().norm() / grad.float().norm()).item()

    row |= alternate(
        lambda: gradient(own_form, case), lambda: gradient(form, case), times=5, warm=False
    )
    row["own"]["peak_mb"] = peak_of(own_form, case)
    row["peer_values"]["peak_mb"] = peak_of(form, case)
    losses = f"loss {own_loss:.5f} / {loss:.5f}"
    row["equal"] = f"{losses}, gradients differ by {distance:.1g} (relative)"
    return row


def main(shapes: list[str]) -> None:
    """Measure every form at every shape and dtype."""
    torch.set_num_threads(1)
    dtypes = [torch.float32]
    if bf16_hardware():
        dtypes.append(torch.bfloat16)
    rows = []
    for shape in shapes:
        for dtype in dtypes:
            for name, form in forms().items():
                rows.append(compare(name, form, shape, dtype))
                write_bench("loss", TITLE, rows, keep=True)


if __name__ == "__main__":
    main(read_words(WIDTHS) or list(WIDTHS))
