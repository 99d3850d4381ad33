"""Frozen linears in eight or in four bits, put in the place of nn.Linear: a base that is too large in bf16.

int8: a whole number of -127 … 127 for every weight, a scale for every output channel. nf4 (Dettmers et al. 2023): blocks
of 64 weights, each the nearest of sixteen quantiles of a normal distribution times the block's largest. LoRA, losses and
sampling see in_features, out_features and a product; a weight in 16 bits exists only while it is multiplied.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmacpo.config.schema import LINEARS

BLOCK = 64  # weights of nf4 that share a scale


FEW = 16  # rows up to which torch's own int8 product is the faster one on a CPU (bench/quant.py)


PART = (
    1 << 18
)  # weights that are quantised at a time, a multiple of BLOCK: what that takes beside them is small


OUTERMOST = (
    0.9677083  # where the outermost of nf4's quantiles lies, half a step from 1 (QLoRA, appendix E)
)


@functools.cache
def levels() -> Tensor:
    """nf4's sixteen values in fp32, from -1 to 1: seven quantiles below 0, 0, eight above."""
    above, below = (
        torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, n, dtype=torch.float64)[:-1])
        for n in (9, 8)
    )
    return (
        torch.cat((-below, torch.zeros(1, dtype=torch.float64), above.flip(0)))
        .div(above[0])
        .float()
    )


@functools.cache
def value_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256]: the two values that a byte of nf4 codes stands for, the low half first, side by side in one number of twice
    the width, so that one look-up gives both."""
    codes = torch.arange(256)
    pairs = levels()[torch.stack((codes % 16, codes // 16), dim=1)].to(dtype)
    return pairs.view(torch.int64 if dtype.itemsize == 4 else torch.int32)[:, 0].to(device)


def upwards(scale: Tensor) -> Tensor:
    """Scales as the least bf16 numbers that are no smaller, so that the codes are found for the very scale that is kept."""
    near = scale.to(torch.bfloat16)
    return torch.where(
        near.float() < scale, torch.nextafter(near, torch.full_like(near, torch.inf)), near
    )


def to_int8(weight: Tensor) -> dict[str, Tensor]:
    """{"codes" [out, in] int8, "scale" [out] bf16} of a weight [out, in]; a scale is not finite where a weight is not."""
    scale = upwards(weight.abs().amax(1).float() / 127)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    rows = max(1, PART // weight.shape[1])
    for part, into, size in zip(
        weight.split(rows), codes.split(rows), scale.split(rows), strict=True
    ):
        into.copy_((part.float() / size.float().clamp(min=1e-30)[:, None]).round_())
    return {"codes": codes, "scale": scale}


def to_nf4(weight: Tensor) -> dict[str, Tensor]:
    """{"codes" [blocks · 32] uint8, "scale" [blocks] bf16} of a weight [out, in], row by row, its end filled up with zeros;
    a scale is not finite where a weight is not."""
    borders, count = (
        (levels()[1:] + levels()[:-1]).to(weight.device) / 2,
        -(-weight.numel() // BLOCK),
    )
    codes = torch.empty(count * BLOCK // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(count, dtype=torch.bfloat16, device=weight.device)
    parts = weight.reshape(-1).split(PART), codes.split(PART // 2), scale.split(PART // BLOCK)
    for part, into, size in zip(*parts, strict=True):
        blocks = F.pad(part.float(), (0, -len(part) % BLOCK)).view(-1, BLOCK)
        size.copy_(upwards(blocks.abs().amax(1)))
        nearest = (
            torch.bucketize(
                blocks / size.float().clamp(min=1e-30)[:, None], borders, out_int32=True
            )
            .view(-1)
            .to(torch.uint8)
        )
        torch.bitwise_or(nearest[::2], nearest[1::2] << 4, out=into)
    return {"codes": codes, "scale": scale}


class Product(torch.autograd.Function):
    """x -> layer.product(x), and its gradient by layer.back; nothing is kept in between."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layer.back(grad), None


class Quantised(nn.Module):
    """x [..., in] -> [..., out] as the linear has it whose shape, bias and device it takes over; its codes and scale
    are to be loaded."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            linear.bias,
        )
        codes, scale = self.shapes(linear.out_features, linear.in_features)
        self.register_buffer(
            "codes", torch.empty(codes, dtype=self.kind, device=linear.weight.device)
        )
        self.register_buffer(
            "scale", torch.empty(scale, dtype=torch.bfloat16, device=linear.weight.device)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class Int8Linear(Quantised):
    kind = torch.int8

    @staticmethod
    def shapes(rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of codes and scale, for a weight [rows, columns]."""
        return (rows, columns), (rows,)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ: the scales are of the output, so that codes alone are multiplied, exact in bf16."""
        rows = x.reshape(-1, self.in_features)
        if (
            x.device.type == "cpu"
            and x.dtype == torch.bfloat16
            and len(rows) <= FEW
            and self.in_features % 16 == 0
        ):  # else it reads on
            return torch._weight_int8pack_mm(rows, self.codes, self.scale).view(
                *x.shape[:-1], self.out_features
            )
        return F.linear(x, self.codes.to(x.dtype)) * self.scale.to(x.dtype)

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of x from that of x Wᵀ."""
        return (grad * self.scale.to(grad.dtype)) @ self.codes.to(grad.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that this stands for."""
        return self.codes.to(dtype) * self.scale.to(dtype)[:, None]


class Nf4Linear(Quantised):
    kind = torch.uint8

    @staticmethod
    def shapes(rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of codes and scale, for a weight [rows, columns]."""
        blocks = -(-rows * columns // BLOCK)
        return (blocks * BLOCK // 2,), (blocks,)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ."""
        return F.linear(x, self.dense(x.dtype))

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of x from that of x Wᵀ."""
        return grad @ self.dense(grad.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that this stands for, in fp32 or bf16."""
        values = value_pairs(dtype, self.codes.device).index_select(0, self.codes.int()).view(dtype)
        values.view(-1, BLOCK).mul_(self.scale[:, None])
        return values[: self.out_features * self.in_features].view(
            self.out_features, self.in_features
        )


FORMS = {
    "int8": (Int8Linear, to_int8),
    "nf4": (Nf4Linear, to_nf4),
}  # what config.Model.quantize may be beside "none"


def quantize_linears(model: nn.Module, form: str) -> None:
    """An empty quantised linear in the place of every linear of the blocks; embedding, head and norms stay."""
    for name, module in [*model.named_modules()]:
        block, _, last = name.rpartition(".")
        if last in LINEARS:
            setattr(model.get_submodule(block), last, FORMS[form][0](module))


def pack_weight(name: str, weight: Tensor, form: str) -> dict[str, Tensor]:
    """What `quantize_linears` has in the place of this weight of the model, by its names; any other tensor as it is."""
    layer, _, last = name.rpartition(".")
    if last != "weight" or layer.rpartition(".")[2] not in LINEARS:
        return {name: weight}
    return {f"{layer}.{key}": tensor for key, tensor in FORMS[form][1](weight).items()}


def is_quantised(model: nn.Module) -> bool:
    """Whether any of its linears is."""
    return any(isinstance(module, Quantised) for module in model.modules())
