"""A model's twin for sampling on a CPU: the same weights, repacked once into the layout that oneDNN multiplies fastest."""

import copy
import functools
import sys
from itertools import chain

import torch
from torch import Tensor, nn

from minmacpo.core.lora import LoraLinear
from minmacpo.core.model import Attention, Transformer

SMALLEST = (
    8_000_000  # weights; below, what finished runs have sampled stays what it was, to the last bit
)


LARGEST = 1_000_000_000  # weights; the twin holds its linears a second time


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out] as nn.Linear has it, from `weight` [out, in] in oneDNN's own order."""

    def __init__(self, linear: nn.Linear, weight: Tensor, rows: int):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def sharded(model: nn.Module) -> bool:
    """Whether some parameters are only a part of what they stand for, the rest being with other ranks (parallel.shard)."""
    return any(type(param) is not nn.Parameter for param in model.parameters())


def packs(model: Transformer) -> bool:
    """True where a packed twin exists and pays: on a CPU with oneDNN, within the sizes above, in fp32 or bf16."""
    weight, size = model.model["embed_tokens"].weight, sum(p.numel() for p in model.parameters())
    if sharded(model) or weight.device.type != "cpu" or not SMALLEST <= size <= LARGEST:
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        say_missing()
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bf16())


def multiplies_bf16() -> bool:
    """Whether oneDNN does on this CPU; else torch does (with AVX2 4 GFLOP/s, against 30 in fp32, of one thread)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def say_missing() -> None:
    """One line for a process whose torch has no oneDNN."""
    print(
        "WARNING: this torch has no oneDNN, so weights are not repacked and sampling is slower",
        file=sys.stderr,
    )


def pack(model: Transformer, rows: int) -> Transformer:
    """A twin of the model as it is now, for `rows` tokens at a time, that shares its parameters and quantised linears. In fp32 an adapter is merged
    into what is packed; in bf16, where merging would round it, it stays the slot. No gradient passes."""
    twin = copy.deepcopy(
        model, {id(kept): kept for kept in chain(model.parameters(), model.buffers())}
    )
    twin.transposed_cache = model.lm_head.weight.dtype == torch.float32  # in bf16 it does not pay
    for name, module in [*twin.named_modules()]:
        parent, _, last = name.rpartition(".")
        if (
            isinstance(module, LoraLinear)
            and type(module.base) is nn.Linear
            and module.base.weight.dtype == torch.float32
        ):
            merged = module.base.weight + module.scale * (module.lora_B @ module.lora_A)
            setattr(twin.get_submodule(parent), last, PackedLinear(module.base, merged, rows))
        elif type(module) is nn.Linear and type(twin.get_submodule(parent)) is not PackedLinear:
            setattr(twin.get_submodule(parent), last, PackedLinear(module, module.weight, rows))
        elif isinstance(module, Attention):
            module.prepacked = True
    return twin
