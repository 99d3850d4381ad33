"""activation(gate) * up, the middle of a gated feed-forward layer, in little memory.

Autograd alone would keep three tensors of the layer's inner width for its backward pass: gate,
activation(gate) and up. The second is made anew here, which costs one elementwise operation.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def gated_activation(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up, of two tensors of one shape; values and gradients are autograd's own.

    Args:
        activation: an elementwise function that autograd knows.
    """
    if not torch.is_grad_enabled():
        return activation(gate) * up  # nothing is kept anyway
    return GatedActivation.apply(gate, up, activation)


class GatedActivation(torch.autograd.Function):
    """The product, which keeps nothing but its two inputs."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        (grad_gate,) = torch.autograd.grad(activated, gate, grad * up)
        return grad_gate, grad * activated.detach(), None
