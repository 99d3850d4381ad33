"""One LoRA slot per target linear of a frozen model (Hu et al. 2021, in PEFT's conventions).

Adapters, dicts with PEFT's keys, are copied into it: optimiser and compiled graph never see another tensor.
"""

import re
from itertools import chain

import torch
from torch import Tensor, nn

from minmacpo import UserError
from minmacpo.config.schema import Lora

PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """base(x) + alpha / r · B A x around a frozen linear; fp32 masters lora_A [r, in] and lora_B [out, r]."""

    def __init__(self, base: nn.Module, r: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / r
        device = next(chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Parameter(torch.zeros(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))

    def forward(self, x: Tensor) -> Tensor:
        delta = nn.functional.linear(
            nn.functional.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)
        )
        return torch.add(self.base(x), delta, alpha=self.scale)  # scaled at the end, as PEFT does


def attach_lora(model: nn.Module, config: Lora) -> list[nn.Parameter]:
    """Put a slot on every linear of the blocks that config.targets picks, and freeze all the rest. As in PEFT, a
    target is the end of a linear's name from a dot on, or a pattern (re) of the whole name.
    Returns the slot's parameters in a fixed order; UserError if a target matches nothing."""
    model.requires_grad_(False)
    linears = {
        name: module for name, module in model.named_modules() if hasattr(module, "in_features")
    }
    linears.pop("lm_head", None)  # losses and sampling use its weight alone
    picked = set()
    for target in config.targets:
        names = {
            name
            for name in linears
            if f".{name}".endswith(f".{target}") or re.fullmatch(target, name)
        }
        if not names:
            raise UserError(f"lora.targets: {target} is no linear layer of the model's blocks")
        picked |= names
    for name in picked:
        block, _, last = name.rpartition(".")
        setattr(model.get_submodule(block), last, LoraLinear(linears[name], config.r, config.alpha))
    return list(slot(model).values())


def slot(model: nn.Module) -> dict[str, nn.Parameter]:
    """The slot's parameters under PEFT's keys, …q_proj.lora_A.weight and …q_proj.lora_B.weight."""
    named = ((name, param) for name, param in model.named_parameters() if ".lora_" in name)
    return {f"{PREFIX}{name}.weight": param for name, param in named}


def get_adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the slot on the CPU, fp32, under PEFT's keys."""
    return {
        key: tensor.detach().to("cpu", torch.float32, copy=True)
        for key, tensor in slot(model).items()
    }


@torch.no_grad()
def set_adapter_weights(
    model: nn.Module, tensors: dict[str, Tensor], where: str = "adapter"
) -> None:
    """Copy an adapter into the slot; UserError for a missing or unexpected key, shape, or NaN."""
    mine = slot(model)
    for key in sorted(mine.keys() ^ tensors.keys()):
        problem = "lacks" if key in mine else "has an unexpected key"
        raise UserError(
            f"{where}: {problem} {key}; it is for another base, or for other lora.targets"
        )
    for key, tensor in tensors.items():
        if tensor.shape != mine[key].shape:
            raise UserError(
                f"{where}: {key} is {list(tensor.shape)}, expected {list(mine[key].shape)}: for another base, or rank"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {key} holds values that are not finite")
        mine[key].copy_(tensor)


@torch.no_grad()
def init_adapter(model: nn.Module, seed: int) -> None:
    """A fresh adapter in the slot: A kaiming-uniform (a = √5) as in PEFT, B zero, so it does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in slot(model).items():
        if key.endswith("lora_A.weight"):  # drawn on the CPU: the same numbers on every device
            tensor.copy_(
                nn.init.kaiming_uniform_(torch.empty(tensor.shape), a=5**0.5, generator=generator)
            )
    disable_adapter(model)


@torch.no_grad()
def disable_adapter(model: nn.Module) -> None:
    """Switch the adapter off: with B zero the model is its base, exactly."""
    for key, tensor in slot(model).items():
        if key.endswith("lora_B.weight"):
            tensor.zero_()


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """{HF name: tensor} of the whole model with the slot merged in (in fp32, then cast back)."""
    weights = {
        k.replace(".base.", "."): v for k, v in model.state_dict().items() if ".lora_" not in k
    }
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            delta = layer.scale * (layer.lora_B.float() @ layer.lora_A.float())
            weights[f"{name}.weight"] = (layer.base.weight.float() + delta).to(
                layer.base.weight.dtype
            )
    return weights
