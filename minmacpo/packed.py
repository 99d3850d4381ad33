"""A model's twin for sampling on a CPU: the same weights, repacked once into the layout that oneDNN multiplies fastest."""

import copy

import torch
from torch import Tensor, nn

from minmacpo.model import Attention, Transformer

SMALLEST = 4_000_000  # weights; below, what finished runs have sampled stays what it was, to the last bit
LARGEST = 1_000_000_000  # weights; the twin holds its linears a second time


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out] as nn.Linear has it, from a weight in oneDNN's own order."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def packs(model: Transformer) -> bool:
    """True where a packed twin exists and pays: on a CPU with oneDNN, within the sizes above, in fp32 or bf16."""
    weight, size = model.model["embed_tokens"].weight, sum(p.numel() for p in model.parameters())
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not SMALLEST <= size <= LARGEST:
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and (bf16 or weight.dtype == torch.float32)


def pack(model: Transformer, rows: int) -> Transformer:
    """A twin of the model, for `rows` tokens at a time, that shares its parameters (an adapter's slot, too); its
    frozen linears are packed as they are now. No gradient passes."""
    twin = copy.deepcopy(model, {id(param): param for param in model.parameters()})
    for name, module in [*twin.named_modules()]:
        if type(module) is nn.Linear:
            parent, _, last = name.rpartition(".")
            setattr(twin.get_submodule(parent), last, PackedLinear(module, rows))
        elif isinstance(module, Attention):
            module.direct = True
    return twin
