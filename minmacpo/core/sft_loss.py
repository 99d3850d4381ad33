"""The loss of supervised fine-tuning and pre-training, and what every loss is called with.

It stands apart from the losses of preference pairs, so that an edit of those leaves pre-trained
bases and supervised trainings as they are.

Shapes: N trained tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minmacpo.core.batching import Batch
from minmacpo.kernels.fused_logps import masked_logps


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What a whole optimiser step holds.

    Every micro-batch divides by these, so that their gradients add up to those of one large batch.
    """

    examples: int
    tokens: int  # trained ones
    progress: float = 1.0  # how much of the training is done before this step, 0 to 1


# The loss of a micro-batch, and by name its part of each metric's mean over the step
LossOutput = tuple[Tensor, dict[str, Tensor]]


def sft_loss(logps: Tensor, tokens: int) -> Tensor:
    """Cross-entropy (): minus the sum of logps (N,) over `tokens`, the step's trained tokens."""
    return -logps.sum() / tokens


@dataclass(frozen=True, slots=True)
class SFTLoss:
    """Cross-entropy per trained token of the whole step.

    With `confidence` > 0 a part of it is towards the model's own likeliest token. That part grows
    to `confidence` over the first fifth of the steps: the auxiliary confidence loss of Burns et al.
    2023.
    """

    compiled: bool = False
    confidence: float = 0.0
    metric_names: ClassVar[tuple[str, ...]] = ("loss",)

    def __call__(self, model, batch: Batch, totals: StepTotals) -> LossOutput:
        confidence_weight = None
        if self.confidence:
            weight = self.confidence * min(1.0, totals.progress / 0.2)
            confidence_weight = torch.tensor(weight, device=batch.tokens.device)
        logps, _ = masked_logps(
            model, batch.tokens, batch.mask, self.compiled, confidence_weight, batch.packed
        )
        loss = sft_loss(logps, totals.tokens)
        return loss, {"loss": loss.detach()}
