"""One LoRA slot per target linear of a frozen model (Hu et al. 2021, in PEFT's conventions).

An adapter is a plain dict of tensors with PEFT's keys; it lives in files and is copied into the
slot. There is one slot, so the optimiser and a compiled graph never see another tensor.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmacpo import UserError
from minmacpo.config import Lora

PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """base(x) + alpha / r · B A x around any frozen linear module with in_features, out_features.

    lora_A [r, in] and lora_B [out, r] are fp32 masters, used in the dtype of x.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, device):
        super().__init__()
        self.base = base
        self.scale = alpha / r
        self.lora_A = nn.Parameter(torch.zeros(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A.to(x.dtype)) * self.scale
        return self.base(x) + F.linear(low, self.lora_B.to(x.dtype))


def attach_lora(model: nn.Module, config: Lora) -> list[nn.Parameter]:
    """Put a slot on every linear whose name ends in one of config.targets; freeze all the rest.

    Returns the slot's parameters in a fixed order. Raises UserError if a target matches nothing.
    """
    model.requires_grad_(False)
    found = set()
    for name, module in list(model.named_modules()):
        target = name.rpartition(".")[2]
        if target not in config.targets:
            continue
        if not hasattr(module, "in_features") or target == "lm_head":
            raise UserError(f"lora.targets: {target} is no linear layer of the blocks")
        device = next(module.parameters()).device
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, target, LoraLinear(module, config.r, config.alpha, device))
        found.add(target)
    if set(config.targets) - found:
        raise UserError(f"lora.targets: the model has no {', '.join(sorted(set(config.targets) - found))}")
    return list(slot(model).values())


def slot(model: nn.Module) -> dict[str, nn.Parameter]:
    """The slot's parameters under PEFT's keys, …q_proj.lora_A.weight and …q_proj.lora_B.weight."""
    return {
        f"{PREFIX}{name}.{side}.weight": getattr(module, side)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
        for side in ("lora_A", "lora_B")
    }


def read_adapter(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the slot on the CPU, fp32, under PEFT's keys."""
    return {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in slot(model).items()}


@torch.no_grad()
def write_adapter(model: nn.Module, tensors: dict[str, Tensor], where: str = "adapter") -> None:
    """Copy an adapter into the slot; UserError for a missing or unexpected key, shape, or NaN."""
    mine = slot(model)
    for key in sorted(mine.keys() ^ tensors.keys()):
        problem = "lacks" if key in mine else "has an unexpected key"
        raise UserError(f"{where}: {problem} {key}; its lora.targets are not those of this run")
    for key, tensor in tensors.items():
        if tensor.shape != mine[key].shape:
            raise UserError(f"{where}: {key} is {list(tensor.shape)}, expected {list(mine[key].shape)}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {key} holds values that are not finite")
        mine[key].copy_(tensor)


@torch.no_grad()
def reset_adapter(model: nn.Module, seed: int) -> None:
    """A fresh adapter in the slot: A kaiming-uniform (a = √5) as in PEFT, B zero, so it does nothing."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in slot(model).items():
        if key.endswith("lora_B.weight"):
            tensor.zero_()
        else:
            fresh = torch.empty(tensor.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            tensor.copy_(fresh)


@torch.no_grad()
def clear_adapter(model: nn.Module) -> None:
    """Switch the adapter off: with B zero the model is its base, exactly."""
    for key, tensor in slot(model).items():
        if key.endswith("lora_B.weight"):
            tensor.zero_()


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """{HF name: tensor} of the whole model with the slot merged in (in fp32, then cast back)."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        parent = model.get_submodule(name.rsplit(".", 2)[0]) if ".base." in name else None
        if parent is not None:
            delta = parent.scale * (parent.lora_B.float() @ parent.lora_A.float())
            tensor = (tensor.float() + delta).to(tensor.dtype)
        weights[name.replace(".base.", ".")] = tensor
    return weights
