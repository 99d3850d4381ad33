"""LoRA adapters (Hu et al. 2021) in PEFT's conventions: a slot on every target linear of a model.

Adapters, dicts of tensors under PEFT's keys, are copied into the slot's parameters. So the
optimiser and a compiled graph never see another tensor.
"""

import re
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmacpo import UserError

PEFT_PREFIX = "base_model.model."

# What to do with an adapter that is more than LoRA
MERGE_INSTEAD = (
    "only plain LoRA is read: merge it in PEFT (merge_and_unload), and give the merged folder"
)

# The linears of a block, which target_modules = "all-linear" stands for
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Which linears get an adapter, and of which size; the update is scaled by alpha / r."""

    r: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")


class LoraLinear(nn.Module):
    """base(x) + alpha / r * B A x, around a frozen linear.

    The parameters are lora_A (r, in) and lora_B (out, r), in fp32 whatever the base's dtype.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float):
        super().__init__()
        self.base = base
        self.scaling = alpha / r
        device = next(chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Parameter(torch.zeros(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        down = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        up = F.linear(down, self.lora_B.to(x.dtype))  # (..., out)
        return torch.add(self.base(x), up, alpha=self.scaling)  # scaled at the end, as PEFT does


def attach_lora(model: nn.Module, config: LoraConfig) -> list[nn.Parameter]:
    """Freeze the model, put a slot on every targeted linear, and return the slot's parameters.

    As in PEFT, a target is the end of a linear's name, from a dot on, or a regular expression for
    the whole name. The parameters come in the model's order. The head cannot be a target, since
    losses and sampling use its weight alone.

    Raises:
        UserError: a target matches no linear of the blocks.
    """
    # Freeze first: the new parameters of the slots are the only ones that learn
    model.requires_grad_(False)
    linears = {}
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and name != "lm_head":
            linears[name] = module

    targeted = set()
    for target in config.targets:
        names = [name for name in linears if is_target(name, target)]
        if not names:
            raise UserError(
                f"lora.targets (target_modules of an adapter): {target} is no linear layer of the "
                "model's blocks; an adapter of another layer can be merged in PEFT "
                "(merge_and_unload)"
            )
        targeted.update(names)

    for name in targeted:
        parent, _, attribute = name.rpartition(".")
        layer = LoraLinear(linears[name], config.r, config.alpha)
        setattr(model.get_submodule(parent), attribute, layer)
    return list(lora_params(model).values())


def is_target(name: str, target: str) -> bool:
    """Whether a linear of that name is meant by one of LoraConfig.targets."""
    return f".{name}".endswith(f".{target}") or re.fullmatch(target, name) is not None


def lora_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """The slot's parameters under PEFT's keys, ...q_proj.lora_A.weight and ...lora_B.weight."""
    params = {}
    for name, param in model.named_parameters():
        if ".lora_" in name:
            params[f"{PEFT_PREFIX}{name}.weight"] = param
    return params


def get_adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the slot on the CPU, in fp32, under PEFT's keys."""
    weights = {}
    for key, param in lora_params(model).items():
        weights[key] = param.detach().to("cpu", torch.float32, copy=True)
    return weights


@torch.no_grad()
def set_adapter_weights(
    model: nn.Module, tensors: dict[str, Tensor], where: str = "adapter"
) -> None:
    """Copy an adapter into the slot.

    Args:
        tensors: by PEFT's keys.
        where: the adapter's folder, with which an error begins.

    Raises:
        UserError: a key is missing or unexpected, or a tensor has another shape or is not finite,
            or is a weight beside the adapter that is not the base's own.
    """
    params = lora_params(model)
    tensors = without_base_weights(model, tensors, where)
    # Keys that only one of the two has; the first in order is named
    for key in sorted(params.keys() ^ tensors.keys()):
        problem = "lacks" if key in params else "has an unexpected key"
        raise UserError(
            f"{where}: {problem} {key}; it is for another base, or for other lora.targets"
        )
    for key, tensor in tensors.items():
        param = params[key]
        if tensor.shape != param.shape:
            raise UserError(
                f"{where}: {key} is {list(tensor.shape)}, expected {list(param.shape)}: "
                "for another base, or rank"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {key} holds values that are not finite")
        param.copy_(tensor)


def without_base_weights(
    model: nn.Module, tensors: dict[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The tensors without the base's own weights, which PEFT can save beside an adapter.

    Raises:
        UserError: what is beside the adapter is not exactly a weight of the base.
    """
    base_weights = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        base_weights[name.replace(".base.", ".")] = param

    adapter = {}
    for key, tensor in tensors.items():
        if ".lora_" in key:
            adapter[key] = tensor
            continue
        name = key.removeprefix(PEFT_PREFIX)
        weight = base_weights.get(name)
        if weight is None:
            problem = "which is neither LoRA nor a weight of the base"
        elif tensor.shape != weight.shape:
            problem = f"of shape {list(tensor.shape)}, and the base has {list(weight.shape)}"
        elif not torch.equal(tensor.to(weight.device, weight.dtype), weight):
            problem = "with other values than the base has"
        else:
            continue
        raise UserError(f"{where}: holds {name} beside the adapter, {problem}; {MERGE_INSTEAD}")
    return adapter


@torch.no_grad()
def init_adapter(model: nn.Module, seed: int) -> None:
    """Put a fresh adapter into the slot, which does nothing yet: B is zero.

    A is Kaiming-uniform with a = sqrt(5), as in PEFT.
    """
    generator = torch.Generator().manual_seed(seed)
    for key, param in lora_params(model).items():
        if key.endswith("lora_A.weight"):
            # drawn on the CPU, so that every device has the same numbers
            fresh = torch.empty(param.shape)
            nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
            param.copy_(fresh)
    disable_adapter(model)


@torch.no_grad()
def disable_adapter(model: nn.Module) -> None:
    """Switch the adapter off: with B zero the model is its base, exactly."""
    for key, param in lora_params(model).items():
        if key.endswith("lora_B.weight"):
            param.zero_()


@torch.no_grad()
def merge_adapter(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base's weights with the model's adapter added, in fp32, and cast back.

    Args:
        weights: of the model's base under Hugging Face's names, in whatever dtype.
    """
    merged = dict(weights)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            base = weights[f"{name}.weight"]
            delta = layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())
            merged[f"{name}.weight"] = (base.float() + delta.to(base.device)).to(base.dtype)
    return merged
