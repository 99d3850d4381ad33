"""A copy of a model for sampling on a CPU, its weights in the memory layout that oneDNN likes best.

The copy shares the model's parameters. It is made once per batch of answers, since an adapter may
have changed in between.
"""

import copy
import functools
import sys
from itertools import chain

import torch
from torch import Tensor, nn

from minmacpo.core.lora import LoraLinear
from minmacpo.core.model import Attention, Transformer
from minmacpo.runtime.distributed import weights_are_sharded

# Weights of the models that are prepacked. Smaller ones gain nothing, and what finished runs have
# sampled with them stays the same to the last bit; of larger ones a second copy takes too much.
MIN_WEIGHTS = 8_000_000
MAX_WEIGHTS = 1_000_000_000


class PrepackedLinear(nn.Module):
    """A linear whose `weight` (out, in) is kept in oneDNN's own order, (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear, weight: Tensor, rows: int):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.prepacked = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(x, self.prepacked, self.bias, "none", [], "")


def can_prepack(model: Transformer) -> bool:
    """Whether a prepacked copy exists and pays: on a CPU with oneDNN, in fp32 or bf16."""
    weight = model.model["embed_tokens"].weight
    if weights_are_sharded(model) or weight.device.type != "cpu":
        return False
    size = sum(param.numel() for param in model.parameters())
    if not MIN_WEIGHTS <= size <= MAX_WEIGHTS:
        return False
    if not has_onednn():
        warn_without_onednn()
        return False
    if weight.dtype == torch.bfloat16:
        return multiplies_bf16()
    return weight.dtype == torch.float32


def has_onednn() -> bool:
    """Whether this torch has oneDNN, and the operator that is used here."""
    available = torch.backends.mkldnn.is_available()
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this CPU; torch does it several times slower."""
    available = torch.backends.mkldnn.is_available()
    return available and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache  # once per process
def warn_without_onednn() -> None:
    """Say on stderr that sampling is slower than it could be."""
    print(
        "WARNING: this torch has no oneDNN, so weights are not repacked and sampling is slower",
        file=sys.stderr,
    )


def prepack(model: Transformer, rows: int) -> Transformer:
    """A prepacked copy of the model with its present adapter, for `rows` tokens at a time.

    It shares parameters and quantised linears with the model. In fp32 the adapter is merged into
    the copy's weights; in bf16, where merging would round it, it stays beside them. No gradient
    passes through it.
    """
    # What `deepcopy` finds here under a tensor's id, it takes in place of a copy
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    packed_model = copy.deepcopy(model, shared)

    # In bf16 a transposed cache is the slower one
    packed_model.transposed_cache = model.lm_head.weight.dtype == torch.float32
    for module in packed_model.modules():
        if isinstance(module, Attention):
            module.prepacked = True
    prepack_linears(packed_model, rows)
    return packed_model


def prepack_linears(module: nn.Module, rows: int) -> None:
    """Replace every nn.Linear within the module by a prepacked one."""
    for name, child in list(module.named_children()):
        if is_mergeable(child):
            update = child.lora_B @ child.lora_A  # (out, in)
            merged = child.base.weight + child.scaling * update
            setattr(module, name, PrepackedLinear(child.base, merged, rows))
        elif type(child) is nn.Linear:
            setattr(module, name, PrepackedLinear(child, child.weight, rows))
        else:
            prepack_linears(child, rows)


def is_mergeable(module: nn.Module) -> bool:
    """Whether it is an adapter on a plain linear in fp32."""
    if not isinstance(module, LoraLinear) or type(module.base) is not nn.Linear:
        return False
    return module.base.weight.dtype == torch.float32
