"""Every implementation of attention against SDPA in fp64, and RMSNorm's own backward."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import far

from minmacpo.kernels.attention import (
    OffsetRMSNorm,
    RMSNorm,
    attention,
    decode_attention,
    eager_bf16_attention,
    gqa_decode_attention,
    sdpa,
)


def transposed_in_memory(x: torch.Tensor) -> torch.Tensor:
    """The same (B, G, S, D), its positions side by side in memory, as in a prepacked cache."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_one_query_attends_as_sdpa_has_it(kv_heads, seed):
    q = torch.randn(5, 6, 1, 8)
    k = torch.randn(5, kv_heads, 20, 8)
    v = torch.randn(5, kv_heads, 20, 8)
    mask = torch.arange(20) <= torch.randint(0, 20, (5, 1, 1, 1))
    exact = sdpa(q.double(), k.double(), v.double(), mask)

    assert far(decode_attention(q, k, v, mask).double(), exact) <= 1e-5
    assert far(gqa_decode_attention(q, k, v, mask).double(), exact) <= 1e-5
    k, v = transposed_in_memory(k), transposed_in_memory(v)
    assert far(decode_attention(q, k, v, mask).double(), exact) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("prepacked", [False, True])
def test_whichever_is_picked_for_rows_gives_the_same(dtype, window, with_cache, prepacked, seed):
    q = torch.randn(3, 6, 40, 16).to(dtype)
    k = torch.randn(3, 2, 40, 16).to(dtype)
    v = torch.randn(3, 2, 40, 16).to(dtype)
    mask = None
    if window is not None:
        mask = torch.ones(40, 40, dtype=torch.bool).tril().triu(-window)
    exact = sdpa(q.double(), k.double(), v.double(), mask)

    y = attention(q, k, v, mask, with_cache=with_cache, prepacked=prepacked)

    assert far(y.double(), exact) <= (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_attention_in_bf16_is_no_coarser_than_that_of_transformers(size, seed):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q = (torch.randn(4, 4, 64, 32) * size).bfloat16()
    k = (torch.randn(4, 4, 64, 32) * size**0.5).bfloat16()
    v = torch.randn(4, 4, 64, 32).bfloat16()
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    exact = sdpa(q.double(), k.double(), v.double(), mask)
    bias = torch.zeros(64, 64).masked_fill(~mask, -torch.inf).bfloat16()
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    theirs = llama.eager_attention_forward(module, q, k, v, bias[None, None], 32**-0.5)[0]

    our_error = (eager_bf16_attention(q, k, v, mask) - exact).square().mean()
    their_error = (theirs.transpose(1, 2) - exact).square().mean()

    assert our_error <= their_error


@pytest.mark.parametrize("kind", [RMSNorm, OffsetRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_frozen_norm_is_torchs(kind, dtype, seed):
    norm = kind(24, 1e-3).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(5, 7, 24).to(dtype)
    grad = torch.randn(5, 7, 24).to(dtype)
    exact_input = x.double().requires_grad_()
    weight = norm.weight.detach().double() + (kind is OffsetRMSNorm)
    F.rms_norm(exact_input, (24,), weight, 1e-3).backward(grad.double())

    x.requires_grad_()
    norm.weight.requires_grad_(False)
    norm(x).backward(grad)

    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    largest = exact_input.grad.abs().max().item()
    assert far(x.grad.double(), exact_input.grad) <= tolerance * largest
    assert norm.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_norm_is_gemmas_to_the_last_bit_of_bf16(dtype, seed):
    """In bf16 too 1 + weight keeps all bits of the weight."""
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    ours, theirs = OffsetRMSNorm(24, 1e-6).to(dtype), gemma.Gemma3RMSNorm(24).to(dtype)
    assert not ours.weight.any() and not theirs.weight.any()
    x = (5 * torch.randn(7, 3, 24)).to(dtype)
    for norm in (ours, theirs):
        norm.weight.data.copy_(torch.linspace(-0.02, 0.03, 24))

    for needs_gradient in (False, True):
        ours.weight.requires_grad_(not needs_gradient)
        y = ours(x.requires_grad_(needs_gradient))
        assert y.dtype == dtype
        if dtype == torch.bfloat16:
            assert (y == theirs(x)).float().mean() > 0.99  # sums differ in their order
        assert far(y.float(), theirs(x).float()) <= (1e-6 if dtype == torch.float32 else 0.04)
