"""activation(gate) * up gives the bits of autograd, and keeps its two inputs alone."""

import pytest
import torch
from conftest import kept_bytes

from minmacpo.core.model import ACTIVATIONS
from minmacpo.kernels.gated_activation import gated_activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_are_those_of_autograd_to_the_bit(name, dtype, seed):
    activation = ACTIVATIONS[name]
    gate = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
    up = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 5, 8, dtype=dtype)

    product = gated_activation(gate, up, activation)
    plain = activation(gate) * up

    assert product.equal(plain)
    found = torch.autograd.grad(product, (gate, up), upstream)
    wanted = torch.autograd.grad(plain, (gate, up), upstream)
    assert found[0].equal(wanted[0])
    assert found[1].equal(wanted[1])


@pytest.mark.parametrize("learns", [(True, False), (False, True)])
def test_one_input_may_need_no_gradient(learns, seed):
    gate = torch.randn(4, 6, requires_grad=learns[0])
    up = torch.randn(4, 6, requires_grad=learns[1])
    learning = [x for x in (gate, up) if x.requires_grad]

    found = torch.autograd.grad(gated_activation(gate, up, torch.tanh).sum(), learning)
    wanted = torch.autograd.grad((torch.tanh(gate) * up).sum(), learning)

    assert found[0].equal(wanted[0])


def test_two_tensors_are_kept_where_autograd_keeps_three(seed):
    gate = torch.randn(10, 100, requires_grad=True)
    up = torch.randn(10, 100, requires_grad=True)
    activation = ACTIVATIONS["silu"]

    assert kept_bytes(lambda: gated_activation(gate, up, activation)) == 2 * gate.nbytes
    assert kept_bytes(lambda: activation(gate) * up) == 3 * gate.nbytes
    with torch.no_grad():
        assert kept_bytes(lambda: gated_activation(gate, up, activation)) == 0
