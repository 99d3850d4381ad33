"""Frozen linears in eight or four bits, in the place of nn.Linear: for a base too large in bf16.

int8: a whole number from -127 to 127 for every weight, and a scale for every output channel.
nf4 (QLoRA, Dettmers et al. 2023): blocks of 64 weights, each the nearest of sixteen quantiles of a
normal distribution, times the largest of its block. LoRA, losses and sampling see in_features,
out_features and a product. A weight in 16 bits exists only while it is multiplied.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NF4_BLOCK = 64  # weights of nf4 that share a scale

# Rows up to which torch's own int8 product is the faster one on a CPU (bench/results/quant.py)
INT8_KERNEL_MAX_ROWS = 16

# Weights that are quantised at a time, a multiple of NF4_BLOCK: what that takes in fp32 is small
QUANTIZE_CHUNK = 1 << 18

# Where the outermost of nf4's quantiles lies, half a step from 1 (QLoRA, appendix E)
NF4_OUTERMOST = 0.9677083

SMALLEST_SCALE = 1e-30  # keeps a row or block of zeros from dividing by zero


class QuantizedLinear(nn.Module):
    """A linear that keeps codes and scales instead of a weight, (..., in) -> (..., out).

    It takes shape, bias and device from the linear that it replaces. Its codes and scales are
    empty until they are loaded; `quantize` makes them of a weight.
    """

    codes_dtype: torch.dtype

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        device = linear.weight.device
        codes_shape, scale_shape = self.buffer_shapes(linear.out_features, linear.in_features)
        codes = torch.empty(codes_shape, dtype=self.codes_dtype, device=device)
        scale = torch.empty(scale_shape, dtype=torch.bfloat16, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        y = QuantizedProduct.apply(x, self)
        if self.bias is None:
            return y
        return y + self.bias

    @staticmethod
    def buffer_shapes(out_features: int, in_features: int) -> tuple[tuple, tuple]:
        """The shapes of codes and scale."""
        raise NotImplementedError

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        """{"codes", "scale"} of a weight (out, in); a scale is not finite where a weight is not."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias: (..., in) -> (..., out)."""
        raise NotImplementedError

    def backward_input(self, grad: Tensor) -> Tensor:
        """The gradient of x, (..., in), from that of x W^T, (..., out)."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that codes and scales stand for."""
        raise NotImplementedError


class QuantizedProduct(torch.autograd.Function):
    """x -> layer.product(x), with nothing kept for the backward pass but the layer."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        """(..., in) -> (..., out)."""
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """(..., out) -> (..., in)."""
        return ctx.layer.backward_input(grad), None


def ceil_bf16(scale: Tensor) -> Tensor:
    """The least bf16 numbers that are no smaller, so that codes fit the very scale that is kept."""
    nearest = scale.to(torch.bfloat16)
    next_larger = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    was_rounded_down = nearest.float() < scale
    return torch.where(was_rounded_down, next_larger, nearest)


class Int8Linear(QuantizedLinear):
    """codes (out, in) int8, scale (out,) bf16."""

    codes_dtype = torch.int8

    @staticmethod
    def buffer_shapes(out_features: int, in_features: int) -> tuple[tuple, tuple]:
        return (out_features, in_features), (out_features,)

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        """{"codes", "scale"} of a weight, a few rows at a time."""
        largest = weight.abs().amax(1).float()  # (out,)
        scale = ceil_bf16(largest / 127)  # (out,)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        rows = max(1, QUANTIZE_CHUNK // weight.shape[1])
        for start in range(0, len(weight), rows):
            chunk = slice(start, start + rows)
            divisor = scale[chunk].float().clamp(min=SMALLEST_SCALE)
            scaled = weight[chunk].float() / divisor[:, None]  # (rows, in): -127 to 127
            codes[chunk] = scaled.round_()
        return {"codes": codes, "scale": scale}

    def product(self, x: Tensor) -> Tensor:
        if self.has_fast_kernel(x):
            rows = x.reshape(-1, self.in_features)
            y = torch._weight_int8pack_mm(rows, self.codes, self.scale)
            return y.view(*x.shape[:-1], self.out_features)
        # the scales belong to outputs, so the codes alone are multiplied, exact in bf16
        unscaled = F.linear(x, self.codes.to(x.dtype))  # (..., out)
        return unscaled * self.scale.to(x.dtype)

    def has_fast_kernel(self, x: Tensor) -> bool:
        """Whether torch's int8 product may be used, and is faster than dequantising first."""
        if x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return False
        rows = x.numel() // self.in_features
        # of another number of columns the kernel reads beyond their end
        return rows <= INT8_KERNEL_MAX_ROWS and self.in_features % 16 == 0

    def backward_input(self, grad: Tensor) -> Tensor:
        scaled = grad * self.scale.to(grad.dtype)  # (..., out)
        return scaled @ self.codes.to(grad.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype) * self.scale.to(dtype)[:, None]


class Nf4Linear(QuantizedLinear):
    """codes (blocks * 32,) uint8, two weights a byte, low half first; scale (blocks,) bf16.

    Blocks go row by row through the weight, and the last one is filled up with zeros.
    """

    codes_dtype = torch.uint8

    @staticmethod
    def buffer_shapes(out_features: int, in_features: int) -> tuple[tuple, tuple]:
        blocks = nf4_blocks(out_features * in_features)
        return (blocks * NF4_BLOCK // 2,), (blocks,)

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        """{"codes", "scale"} of a weight, chunk by chunk."""
        levels = nf4_levels()
        borders = (levels[1:] + levels[:-1]).to(weight.device) / 2  # (15,): between neighbours
        codes_shape, scale_shape = Nf4Linear.buffer_shapes(*weight.shape)
        codes = torch.empty(codes_shape, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(scale_shape, dtype=torch.bfloat16, device=weight.device)
        chunks = zip(
            weight.reshape(-1).split(QUANTIZE_CHUNK),
            codes.split(QUANTIZE_CHUNK // 2),
            scale.split(QUANTIZE_CHUNK // NF4_BLOCK),
            strict=True,
        )
        for values, chunk_codes, chunk_scale in chunks:
            padding = -len(values) % NF4_BLOCK
            blocks = F.pad(values.float(), (0, padding)).view(-1, NF4_BLOCK)
            chunk_scale.copy_(ceil_bf16(blocks.abs().amax(1)))

            # The number of the nearest level, 0 to 15, of every weight over its block's scale
            divisor = chunk_scale.float().clamp(min=SMALLEST_SCALE)
            nearest = torch.bucketize(blocks / divisor[:, None], borders, out_int32=True)
            nearest = nearest.view(-1).to(torch.uint8)
            low_half = nearest[::2]
            high_half = nearest[1::2] << 4
            torch.bitwise_or(low_half, high_half, out=chunk_codes)
        return {"codes": codes, "scale": scale}

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(x.dtype))

    def backward_input(self, grad: Tensor) -> Tensor:
        return grad @ self.dequantize(grad.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), in fp32 or bf16."""
        # one look-up gives both weights of a byte
        pairs = nf4_value_pairs(dtype, self.codes.device)  # (256,)
        values = pairs.index_select(0, self.codes.int()).view(dtype)  # (blocks * 64,)
        values.view(-1, NF4_BLOCK).mul_(self.scale[:, None])

        # what the last block was filled up with is left out
        size = self.out_features * self.in_features
        return values[:size].view(self.out_features, self.in_features)


def nf4_blocks(weights: int) -> int:
    """The number of blocks that so many weights fill."""
    return -(-weights // NF4_BLOCK)


@functools.cache
def nf4_levels() -> Tensor:
    """The sixteen values of nf4 in fp32, from -1 to 1: seven quantiles below 0, 0, eight above."""
    positive = normal_quantiles(9)  # (8,), the outermost first
    negative = normal_quantiles(8)  # (7,)
    zero = torch.zeros(1, dtype=torch.float64)
    levels = torch.cat((-negative, zero, positive.flip(0)))
    return levels.div(positive[0]).float()


def normal_quantiles(count: int) -> Tensor:
    """Quantiles of a normal distribution between NF4_OUTERMOST and a half, which is left out."""
    probabilities = torch.linspace(NF4_OUTERMOST, 0.5, count, dtype=torch.float64)[:-1]
    return torch.special.ndtri(probabilities)


@functools.cache
def nf4_value_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of every byte of codes, (256,), side by side in a number of twice the width.

    So one look-up gives both.
    """
    codes = torch.arange(256)
    low_and_high = torch.stack((codes % 16, codes // 16), dim=1)  # (256, 2)
    values = nf4_levels()[low_and_high].to(dtype)  # (256, 2)

    # the two read as one whole number, which `dequantize` reads as two values again
    pair_dtype = torch.int64 if dtype.itemsize == 4 else torch.int32
    pairs = values.view(pair_dtype)  # (256, 1)
    return pairs[:, 0].to(device)


# A kind of quantisation is added here; "none" stands beside them in the settings
QUANTIZED_LINEARS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear}


def quantize_linears(model: nn.Module, quantization: str) -> None:
    """Put an empty quantised linear in the place of every linear but the head."""
    kind = QUANTIZED_LINEARS[quantization]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, kind(module))


def quantize_weight(model: nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]:
    """What stands in the model for this weight, by name: codes and scale, or the weight itself.

    Args:
        model: its linears may have been replaced by `quantize_linears`.
        name: of the weight before that.
    """
    layer_name, _, attribute = name.rpartition(".")
    layer = model.get_submodule(layer_name)
    if attribute != "weight" or not isinstance(layer, QuantizedLinear):
        return {name: weight}
    quantized = layer.quantize(weight)
    return {f"{layer_name}.{key}": tensor for key, tensor in quantized.items()}


def is_quantized(model: nn.Module) -> bool:
    """Whether any of the model's linears is quantised."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())
