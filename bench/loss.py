"""From hidden states to log-probabilities and their gradients: python -m bench.loss.

The form of losses.py for a frozen head against plain logits, checkpointed chunks, torch's F.linear_cross_entropy and Liger's DPO loss, on
the trained tokens of 8 pairs of 128 + 128. The first is what is used; plain logits are the oracle of the tests.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bench.measure import alternate, bf16_hardware, missing, words, write
from minmacpo.core.losses import PairLogps, sigmoid_loss
from minmacpo.kernels.fused_logps import chunk_logps, in_chunks, token_logps
from minmacpo.runtime.device import peak_mb, reset_peaks

TITLE = "DPO loss of 2,048 trained tokens of 16 answers from hidden states, vocabulary 32,000, forward and backward, frozen head, one thread."
WIDTHS = {"15M": 288, "110M": 768}
TOKENS, ANSWERS, VOCAB, BETA = 2048, 16, 32_000, 0.1


def margin_loss(logps: torch.Tensor) -> torch.Tensor:
    """The mean DPO loss of token logps [TOKENS], even answers chosen, against references of zero."""
    chosen, rejected = logps.view(ANSWERS, -1).sum(1).view(-1, 2).unbind(1)
    zero = torch.zeros_like(chosen)
    return sigmoid_loss(PairLogps(chosen, rejected, zero, zero, zero, zero), BETA).mean()


def plain(hidden, weight, targets):
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def checkpointed(hidden, weight, targets):
    chunks = in_chunks(hidden, targets, len(weight))
    return torch.cat(
        [checkpoint(chunk_logps, h, weight, t, use_reentrant=False) for h, t in chunks]
    )


def of_torch(options, hidden, weight, targets):
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def of_liger(hidden, weight, targets) -> torch.Tensor:
    """Liger's chunked DPO loss; it wants the chosen answers first, then the rejected."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    order = [*range(0, ANSWERS, 2), *range(1, ANSWERS, 2)]
    x, y = hidden.view(ANSWERS, -1, hidden.shape[1])[order], targets.view(ANSWERS, -1)[order]
    loss = LigerFusedLinearDPOLoss(
        beta=BETA, compute_nll_loss=False, use_ref_model=False, compiled=False
    )
    return loss(weight, x, y)[0]


def forms() -> dict[str, Callable | str]:
    """Each way to the loss, or why there is none."""
    found = {"plain logits": plain, "checkpointed chunks": checkpointed}
    if hasattr(F, "linear_cross_entropy"):
        found["torch F.linear_cross_entropy"] = functools.partial(of_torch, None)
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            found["torch F.linear_cross_entropy, chunked"] = functools.partial(
                of_torch, torch.nn.LinearCrossEntropyOptions()
            )
    made = {
        name: (lambda h, w, t, form=form: margin_loss(form(h, w, t)))
        for name, form in found.items()
    }
    lacks = missing("liger_kernel").replace("-r requirements-dev.txt", "liger-kernel")
    return made | {"Liger's chunked DPO loss": lacks or of_liger}


def gradient(form: Callable, case: tuple) -> tuple[float, torch.Tensor]:
    """(loss, its gradient with respect to hidden)."""
    hidden = case[0].detach().requires_grad_(True)
    loss = form(hidden, *case[1:])
    loss.backward()
    return loss.item(), hidden.grad


def peak_of(form: Callable, case: tuple) -> int:
    """MB that this process grows by at most."""
    reset_peaks("cpu")
    before = peak_mb()
    gradient(form, case)
    return round(peak_mb() - before)


def compare(name: str, form: Callable | str, shape: str, dtype: torch.dtype) -> dict:
    """One row: that way against the one of losses.py."""
    torch.manual_seed(0)
    width = WIDTHS[shape]
    case = (
        torch.randn(TOKENS, width).to(dtype),
        (torch.randn(VOCAB, width) * width**-0.5).to(dtype),
        torch.randint(VOCAB, (TOKENS,)),
    )

    def own(hidden, weight, targets):
        return margin_loss(token_logps(hidden, weight, targets))

    row = {
        "work": "frozen head, DPO loss",
        "shape": shape,
        "dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype],
        "peer": name,
    }
    if isinstance(form, str):
        return row | {"own": {}, "peer_values": {}, "note": form}
    try:
        (loss, found), (other, wanted) = gradient(own, case), gradient(form, case)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return row | {
            "own": {},
            "peer_values": {},
            "note": f"fails: {str(error).splitlines()[0][:120]}",
        }
    away = ((found - wanted).float().norm() / wanted.float().norm()).item()
    if abs(loss - other) > (1e-3 if dtype == torch.float32 else 0.02) * abs(other):
        raise SystemExit(f"{name}: the losses differ, {loss} and {other}")
    timed = alternate(lambda: gradient(own, case), lambda: gradient(form, case), 5, warm=False)
    timed["own"]["peak_mb"], timed["peer_values"]["peak_mb"] = (
        peak_of(own, case),
        peak_of(form, case),
    )
    return (
        row
        | timed
        | {"equal": f"loss {loss:.5f} / {other:.5f}, gradients differ by {away:.1g} (relative)"}
    )


def main(shapes: list[str]) -> None:
    torch.set_num_threads(1)
    rows = []
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16) if bf16_hardware() else (torch.float32,):
            for name, form in forms().items():
                rows.append(compare(name, form, shape, dtype))
                write("loss", TITLE, rows, keep=True)


if __name__ == "__main__":
    main(words(WIDTHS) or [*WIDTHS])
