"""Losses of supervised fine-tuning and of preference pairs, with their metrics."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minmacpo.core.batching import Batch
from minmacpo.kernels.fused_logps import masked_logps, sequence_logps


def sft_loss(logps: Tensor, tokens: int) -> Tensor:
    """Cross-entropy: minus the sum of logps [N] over `tokens`, the trained tokens of the whole step."""
    return -logps.sum() / tokens


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    offset: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, rewards/chosen, rewards/rejected), each [N], from summed logps [N]; rewards carry no gradient.
    Sigmoid DPO (Rafailov et al. 2023, eq. 7), conservative: a share `label_smoothing` of pairs is flipped;
    `offset` [N] is added to the margin."""
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    margin = beta * (chosen - rejected) + offset
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss, (beta * chosen).detach(), (beta * rejected).detach()


LossOutput = tuple[Tensor, list[Tensor]]  # a loss, and the values of its objective's metrics


@dataclass(frozen=True, slots=True)
class SFTLoss:
    """Cross-entropy per trained token of the whole step. With `confidence` > 0 a share of it, which grows to
    that over the first fifth of the steps, is towards the model's own likeliest token (Burns et al. 2023)."""

    compiled: bool = False
    confidence: float = 0.0
    metrics = ("loss",)

    def __call__(
        self, model, batch: Batch, refs: Tensor, units: int, tokens: int, progress=1.0
    ) -> LossOutput:
        share = self.confidence * min(1.0, progress / 0.2)
        own = torch.tensor(share, device=batch.tokens.device) if self.confidence else None
        loss = sft_loss(
            masked_logps(model, batch.tokens, batch.mask, self.compiled, own, batch.shared)[0],
            tokens,
        )
        return loss, [loss.detach()]


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """Mean over pairs of -log σ(β D) - γ · mean_m log π(c_m), D from summed logps (paper: DPO plus SFT).
    Rows 2i are chosen, 2i + 1 rejected; refs [pairs, 2], or [pairs, 3] with weights of mean 1. Without `contrast`
    (the -HN ablation): the SFT term, weight 1. `length_normalized`: D from logps per token; `length_penalty` α:
    βD + α (|c| - |r|) in place of βD (R-DPO, Park et al. 2024)."""

    beta: float
    sft_weight: float
    label_smoothing: float = 0.0
    contrast: bool = True
    compiled: bool = False
    length_normalized: bool = False
    length_penalty: float = 0.0
    metrics = (
        "loss",
        "dpo_loss",
        "sft_loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )

    def __call__(
        self, model, batch: Batch, refs: Tensor, units: int, tokens: int, progress=1.0
    ) -> LossOutput:
        logps = sequence_logps(model, batch.tokens, batch.mask, self.compiled, batch.shared)
        chosen, rejected = logps.view(-1, 2).unbind(1)
        lengths = batch.mask[:, 1:].sum(1).view(-1, 2)
        sft, offset = -chosen / lengths[:, 0], self.length_penalty * (lengths[:, 0] - lengths[:, 1])
        sides = logps.view(-1, 2), refs[:, :2]
        (pi, pi_bad), (ref, ref_bad) = (
            (side / lengths if self.length_normalized else side).unbind(1) for side in sides
        )
        dpo, up, down = dpo_loss(pi, pi_bad, ref, ref_bad, self.beta, self.label_smoothing, offset)
        each = dpo + self.sft_weight * sft if self.contrast else sft
        loss = (each * refs[:, 2] if refs.shape[1] > 2 else each).sum() / units
        values = [dpo, sft, up, down, up - down, (up > down).float(), chosen, rejected]
        return loss, [loss.detach()] + [value.detach().sum() / units for value in values]
