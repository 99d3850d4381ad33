"""Activation checkpointing: a block that is computed twice gives the bits of one that is kept."""

import pytest
import torch
from conftest import kept_bytes, random_model
from test_packing import MODELS, rows_of
from test_quantization import quantize_and_dequantize

from minmacpo.config.schema import Lora
from minmacpo.core.batching import collate
from minmacpo.core.lora import attach_lora, init_adapter, lora_params
from minmacpo.kernels.fused_logps import sequence_logps


def add_adapter(model, seed: int) -> list[torch.Tensor]:
    """Random LoRA matrices on all that may have some."""
    attach_lora(model, Lora(targets=("q_proj", "v_proj", "gate_proj", "down_proj")))
    init_adapter(model, seed)
    params = list(lora_params(model).values())
    for param in params:
        param.data.normal_(std=0.1)
    return params


def gradients(model, params, batch, upstream) -> list[torch.Tensor]:
    """Summed logps of every row, and their gradients under `upstream`."""
    logps = sequence_logps(model, batch.tokens, batch.mask, packed=batch.packed)
    return [logps.detach(), *torch.autograd.grad(logps, params, upstream)]


def check_same_bits(model, params, batch) -> None:
    """Blocks that are computed twice give the values and gradients of blocks that are kept."""
    upstream = torch.randn(len(batch.tokens), dtype=torch.float64)

    kept = gradients(model, params, batch, upstream)
    model.recompute_blocks = True
    recomputed = gradients(model, params, batch, upstream)

    for found, wanted in zip(recomputed, kept, strict=True):
        assert found.equal(wanted)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("learns", ["adapter", "everything"])
@pytest.mark.parametrize("kind", MODELS)
def test_values_and_gradients_are_the_same_to_the_bit(kind, learns, packed, seed):
    model = random_model(seed, **MODELS[kind])
    params = list(model.parameters())
    if learns == "adapter":
        params = add_adapter(model, seed)
    check_same_bits(model, params, collate(rows_of(seed, 5), packed=packed))


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_so_are_those_of_an_adapter_on_a_quantized_base(quantization, seed):
    model, _ = quantize_and_dequantize(random_model(seed, hidden_size=64), quantization)
    params = add_adapter(model, seed)
    check_same_bits(model, params, collate(rows_of(seed, 5)))


def test_nothing_within_a_block_is_kept(seed):
    """The inputs of the blocks, which torch keeps in another way, are not counted."""
    model = random_model(seed)
    add_adapter(model, seed)
    batch = collate(rows_of(seed, 5))

    kept = kept_bytes(lambda: model(batch.tokens))
    model.recompute_blocks = True
    recomputed = kept_bytes(lambda: model(batch.tokens))

    assert recomputed < kept / 10
    with torch.no_grad():
        assert kept_bytes(lambda: model(batch.tokens)) == 0
