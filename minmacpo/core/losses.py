"""Losses of preference pairs, with the metrics that are logged.

A preference loss is a function of `PairLogps`. To add one, write it, put it into PREFERENCE_LOSSES,
and add its name and settings to LOSS_SETTINGS in config/schema.py: `--dpo.loss=NAME` then trains
with it.

Where the reference's log-probabilities come from: they are constants of the pairs, scored before
the training and stored in pairs.jsonl. `learn_preferences` in method/agents.py says which policy
is the reference and has them scored. The trainer puts them into `Batch.reference_logps`, and
`PreferenceLoss.pair_logps` takes them from there; here only the policy is computed.

Shapes: B pairs, in a batch of 2B rows (row 2i is chosen, row 2i + 1 rejected).
A log-probability of an answer is summed over its tokens, its end token included, in fp32, in nats.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from minmacpo.core.batching import Batch
from minmacpo.core.sft_loss import LossOutput, StepTotals
from minmacpo.kernels.fused_logps import sequence_logps

# --- Losses on preference pairs


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a preference loss may look at; all (B,)."""

    policy_chosen: Tensor  # of the model that is trained, with gradient
    policy_rejected: Tensor
    reference_chosen: Tensor | None  # stored with the pairs; None for a loss without a reference
    reference_rejected: Tensor | None
    chosen_lengths: Tensor  # tokens
    rejected_lengths: Tensor

    @property
    def chosen_log_ratio(self) -> Tensor:
        """How much likelier than the reference the policy finds the chosen answer; nats, (B,)."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_log_ratio(self) -> Tensor:
        """The same of the rejected answer; nats, (B,)."""
        return self.policy_rejected - self.reference_rejected

    def per_token(self) -> "PairLogps":
        """The same pairs with log-probabilities averaged over the tokens of their answers."""
        reference_chosen = None
        reference_rejected = None
        if self.reference_chosen is not None:
            reference_chosen = self.reference_chosen / self.chosen_lengths
            reference_rejected = self.reference_rejected / self.rejected_lengths
        return PairLogps(
            policy_chosen=self.policy_chosen / self.chosen_lengths,
            policy_rejected=self.policy_rejected / self.rejected_lengths,
            reference_chosen=reference_chosen,
            reference_rejected=reference_rejected,
            chosen_lengths=self.chosen_lengths,
            rejected_lengths=self.rejected_lengths,
        )


def sigmoid_loss(
    logps: PairLogps,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    length_penalty: float = 0.0,
) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7); with smoothing, conservative DPO. (B,)

    Args:
        label_smoothing: assumed fraction of pairs whose preference is flipped.
        length_normalized: log-probabilities per token in place of summed ones.
        length_penalty: added to the margin per token by which the chosen answer is the longer one
            (Park et al. 2024, R-DPO).
    """
    if length_normalized:
        logps = logps.per_token()
    extra_tokens = logps.chosen_lengths - logps.rejected_lengths
    margin = logps.chosen_log_ratio - logps.rejected_log_ratio
    logits = beta * margin + length_penalty * extra_tokens
    right = -F.logsigmoid(logits)  # the loss if the preference is right
    flipped = -F.logsigmoid(-logits)  # and if it is the other way round
    return (1 - label_smoothing) * right + label_smoothing * flipped


def ipo_loss(logps: PairLogps, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17), on log-probabilities per token as in TRL. (B,)"""
    logps = logps.per_token()
    margin = logps.chosen_log_ratio - logps.rejected_log_ratio
    return (margin - 1 / (2 * beta)) ** 2


def simpo_loss(logps: PairLogps, beta: float, target_margin: float) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): no reference, log-probabilities per token. (B,)"""
    logps = logps.per_token()
    margin = logps.policy_chosen - logps.policy_rejected
    return -F.logsigmoid(beta * margin - target_margin)


@dataclass(frozen=True, slots=True)
class LossKind:
    """A preference loss as the rest of the code knows it.

    Attributes:
        title: the loss as the literature calls it, for logs, plans and reports.
        requires_reference: whether the reference policy's log-probabilities must be scored.
        rewards_per_token: whether the logged rewards are of log-probabilities per token.
    """

    function: Callable[..., Tensor]
    title: str
    requires_reference: bool = True
    rewards_per_token: bool = False


# A loss is added here
PREFERENCE_LOSSES: dict[str, LossKind] = {
    "sigmoid": LossKind(sigmoid_loss, "DPO"),
    "ipo": LossKind(ipo_loss, "IPO"),
    "simpo": LossKind(simpo_loss, "SimPO", requires_reference=False, rewards_per_token=True),
}


def requires_reference(loss_type: str) -> bool:
    """Whether the loss compares the policy with a reference; if not, none need be scored."""
    return PREFERENCE_LOSSES[loss_type].requires_reference


def loss_settings(loss_type: str) -> tuple[str, ...]:
    """The settings that the loss uses: the names of its function's parameters after `logps`."""
    function = PREFERENCE_LOSSES[loss_type].function
    _, *names = inspect.signature(function).parameters
    return tuple(names)


def implicit_rewards(logps: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """Rewards (B,) that the policy implies for chosen and rejected answers; they carry no gradient.

    beta times the log-ratio to the reference (Rafailov et al. 2023, eq. 5 without its constant);
    for a loss without a reference, beta times the policy's own log-probability (Meng et al. 2024).
    """
    if logps.reference_chosen is None:
        chosen = logps.policy_chosen
        rejected = logps.policy_rejected
    else:
        chosen = logps.chosen_log_ratio
        rejected = logps.rejected_log_ratio
    return (beta * chosen).detach(), (beta * rejected).detach()


# --- What is trained


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """Mean over pairs of a preference loss plus `sft_weight` times the SFT term, as in the paper.

    The SFT term is the cross-entropy per token of the chosen answer. Pairs may have weights, whose
    mean is 1.
    """

    beta: float
    sft_weight: float
    label_smoothing: float = 0.0
    loss_type: str = "sigmoid"  # a key of PREFERENCE_LOSSES
    target_margin: float = 0.0
    length_normalized: bool = False
    length_penalty: float = 0.0
    sft_only: bool = False  # the ablation -HN: the SFT term, with weight 1
    compiled: bool = False

    @property
    def preference_name(self) -> str:
        """The name of the preference term among the metrics."""
        return "dpo_loss" if self.loss_type == "sigmoid" else f"{self.loss_type}_loss"

    @property
    def metric_names(self) -> tuple[str, ...]:
        """TRL's names, and those of the two terms, in the order in which they are logged."""
        return (
            "loss",
            self.preference_name,
            "sft_loss",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        )

    @property
    def requires_reference(self) -> bool:
        """Whether the batch must hold the reference's log-probabilities."""
        return requires_reference(self.loss_type)

    def __call__(self, model, batch: Batch, totals: StepTotals) -> LossOutput:
        # --- Log-probabilities of both answers of every pair
        logps = self.pair_logps(model, batch)

        # --- The preference term and the SFT term of every pair
        kind = PREFERENCE_LOSSES[self.loss_type]
        settings = {name: getattr(self, name) for name in loss_settings(self.loss_type)}
        preference = kind.function(logps, **settings)  # (B,)
        sft = -logps.policy_chosen / logps.chosen_lengths  # (B,)

        # --- Their sum, as a mean over the pairs of the whole step
        combined = sft if self.sft_only else preference + self.sft_weight * sft
        if batch.weights is not None:
            combined = combined * batch.weights
        loss = combined.sum() / totals.examples

        # --- This batch's part of the metrics' means over the step
        per_token = self.length_normalized or kind.rewards_per_token
        rewarded = logps.per_token() if per_token else logps
        chosen_rewards, rejected_rewards = implicit_rewards(rewarded, self.beta)
        of_pairs = {
            self.preference_name: preference,
            "sft_loss": sft,
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "logps/chosen": logps.policy_chosen,
            "logps/rejected": logps.policy_rejected,
        }
        metrics = {"loss": loss.detach()}
        for name, values in of_pairs.items():
            metrics[name] = values.detach().sum() / totals.examples
        return loss, metrics

    def pair_logps(self, model, batch: Batch) -> PairLogps:
        """The policy's log-probabilities, computed, beside the reference's, which the batch has."""
        # --- The policy: one pass over the rows of both sides
        # (2B,)
        logps = sequence_logps(model, batch.tokens, batch.mask, self.compiled, batch.packed)
        policy_chosen, policy_rejected = logps.view(-1, 2).unbind(1)  # (B,), (B,)
        lengths = batch.mask[:, 1:].sum(1)  # (2B,): position 0 is never scored
        chosen_lengths, rejected_lengths = lengths.view(-1, 2).unbind(1)  # (B,), (B,)

        # --- The reference: what was stored with the pairs
        reference_chosen = None
        reference_rejected = None
        if self.requires_reference:
            reference_chosen, reference_rejected = batch.reference_logps.unbind(1)
        return PairLogps(
            policy_chosen=policy_chosen,
            policy_rejected=policy_rejected,
            reference_chosen=reference_chosen,
            reference_rejected=reference_rejected,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
