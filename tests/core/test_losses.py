"""Losses by hand, against torch's own functions, and against TRL."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import far, logits_of, random_model
from torch import Tensor
from torch.autograd import gradcheck

from minmacpo.config.schema import LOSS_SETTINGS, SETTINGS
from minmacpo.core.batching import Batch
from minmacpo.core.losses import (
    PREFERENCE_LOSSES,
    PairLogps,
    PreferenceLoss,
    implicit_rewards,
    ipo_loss,
    loss_settings,
    requires_reference,
    sigmoid_loss,
    simpo_loss,
)
from minmacpo.core.sft_loss import SFTLoss, StepTotals, sft_loss
from minmacpo.kernels.fused_logps import sequence_logps

# Values for the settings that a loss may have, other than their defaults
OTHER_SETTINGS = {
    "beta": 0.3,
    "label_smoothing": 0.1,
    "length_normalized": True,
    "length_penalty": 0.05,
    "target_margin": 0.7,
}


def ragged_mask(rows: int, width: int) -> Tensor:
    """A mask (B, T) with an answer of at least one token in every row, never at position 0."""
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for row in mask:
        start = int(torch.randint(1, width - 1, ()))
        end = int(torch.randint(start + 1, width + 1, ()))
        row[start:end] = True
    return mask


def pair_logps(
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, lengths=(1, 1)
) -> PairLogps:
    """One pair from plain numbers."""
    logps = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    numbers = [torch.tensor([number]) for number in (*logps, *lengths)]
    return PairLogps(*numbers)


def random_pairs(count: int) -> PairLogps:
    """fp64 log-probabilities, those of the policy with gradients, and lengths."""
    policy = -30 + 8 * torch.randn(2, count, dtype=torch.float64)
    reference = -30 + 8 * torch.randn(2, count, dtype=torch.float64)
    lengths = torch.randint(1, 40, (2, count))
    return PairLogps(
        policy_chosen=policy[0].clone().requires_grad_(True),
        policy_rejected=policy[1].clone().requires_grad_(True),
        reference_chosen=reference[0],
        reference_rejected=reference[1],
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    )


def gradients(losses: Tensor, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """d losses / d log-probability of the chosen and of the rejected answers."""
    return torch.autograd.grad(losses.sum(), (pairs.policy_chosen, pairs.policy_rejected))


# ---- every preference loss ------------------------------------------------------------------


def test_the_command_line_knows_every_loss_and_the_settings_that_it_uses():
    assert set(SETTINGS["dpo.loss"].type.__args__) == set(PREFERENCE_LOSSES)
    for name in PREFERENCE_LOSSES:
        used = {"beta", *LOSS_SETTINGS[name]} - {"reference"}
        assert used == set(loss_settings(name)), name
        assert ("reference" in LOSS_SETTINGS[name]) == requires_reference(name), name


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_loss_raises_the_chosen_answer_and_lowers_the_rejected(name, seed):
    function = PREFERENCE_LOSSES[name].function
    settings = {setting: OTHER_SETTINGS[setting] for setting in loss_settings(name)}
    settings |= {"label_smoothing": 0.0} if "label_smoothing" in settings else {}
    pair = pair_logps(-10.0, -10.0, -10.0, -10.0, lengths=(5, 5))
    pair.policy_chosen.requires_grad_(True)
    pair.policy_rejected.requires_grad_(True)

    losses = function(pair, **settings)

    of_chosen, of_rejected = gradients(losses, pair)
    assert losses.shape == (1,)
    assert of_chosen < 0 < of_rejected


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_loss_without_a_reference_does_not_look_at_one(name, seed):
    function = PREFERENCE_LOSSES[name].function
    needs_reference = PREFERENCE_LOSSES[name].requires_reference
    settings = {setting: OTHER_SETTINGS[setting] for setting in loss_settings(name)}
    pairs = random_pairs(5)
    policy_only = PairLogps(
        policy_chosen=pairs.policy_chosen,
        policy_rejected=pairs.policy_rejected,
        reference_chosen=None,
        reference_rejected=None,
        chosen_lengths=pairs.chosen_lengths,
        rejected_lengths=pairs.rejected_lengths,
    )

    if needs_reference:
        with pytest.raises(TypeError):
            function(policy_only, **settings)
    else:
        assert torch.equal(function(policy_only, **settings), function(pairs, **settings))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_preference_loss_hands_every_setting_to_its_function(name, seed):
    """The batch's loss changes with each setting that the function has, and with no other."""
    model = random_model(seed)
    batch, _ = pair_batch(model, 3)
    totals = StepTotals(examples=3, tokens=1)
    settings = {"beta": 0.2, "label_smoothing": 0.0, "target_margin": 0.5}
    plain, _ = PreferenceLoss(**settings, sft_weight=0.1, loss_type=name)(model, batch, totals)

    for setting, value in OTHER_SETTINGS.items():
        changed = settings | {setting: value}
        objective = PreferenceLoss(**changed, sft_weight=0.1, loss_type=name)
        loss, _ = objective(model, batch, totals)
        assert (loss != plain) == (setting in loss_settings(name)), setting


# ---- DPO ------------------------------------------------------------------------------------


def test_dpo_by_hand():
    # beta 0.1, log-ratios 2 and -3: margin 0.5, loss -log sigmoid(0.5) = 0.474077
    pair = pair_logps(-10.0, -23.0, -12.0, -20.0)

    assert sigmoid_loss(pair, beta=0.1).item() == pytest.approx(0.4740770, abs=1e-6)
    smoothed = sigmoid_loss(pair, beta=0.1, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(0.75 * 0.4740770 + 0.25 * 0.9740770, abs=1e-6)
    chosen, rejected = implicit_rewards(pair, beta=0.1)
    assert chosen.item() == pytest.approx(0.2)
    assert rejected.item() == pytest.approx(-0.3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_dpo_is_log_two_where_policy_and_reference_are_equal(smoothing, seed):
    chosen = torch.randn(9) * 50
    rejected = torch.randn(9) * 50
    lengths = torch.ones(9)
    pairs = PairLogps(chosen, rejected, chosen, rejected, lengths, lengths)

    losses = sigmoid_loss(pairs, beta=0.3, label_smoothing=smoothing)

    assert losses.tolist() == pytest.approx([math.log(2)] * 9)
    assert not any(reward.any() for reward in implicit_rewards(pairs, beta=0.3))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_dpo_values_and_gradients(beta, smoothing, seed):
    pairs = random_pairs(12)
    losses = sigmoid_loss(pairs, beta, smoothing)

    margin = beta * (pairs.chosen_log_ratio - pairs.rejected_log_ratio).detach()
    wanted = (1 - smoothing) * (1 + (-margin).exp()).log() + smoothing * (1 + margin.exp()).log()
    slope = -beta * ((1 - smoothing) * torch.sigmoid(-margin) - smoothing * torch.sigmoid(margin))
    of_chosen, of_rejected = gradients(losses, pairs)
    assert far(losses, wanted) <= 1e-12
    assert far(of_chosen, slope) <= 1e-12
    assert far(of_rejected, -slope) <= 1e-12

    chosen, rejected = implicit_rewards(pairs, beta)
    assert far(chosen - rejected, margin) <= 1e-12
    assert not chosen.requires_grad and not rejected.requires_grad


def test_a_constant_on_both_sides_changes_nothing(seed):
    vectors = [torch.randn(10, dtype=torch.float64) * 5 for _ in range(4)]
    shift = torch.randn(10, dtype=torch.float64) * 100
    lengths = torch.ones(10)

    before = sigmoid_loss(PairLogps(*vectors, lengths, lengths), 0.4, 0.1)
    chosen, rejected, *reference = vectors
    after = sigmoid_loss(
        PairLogps(chosen + shift, rejected + shift, *reference, lengths, lengths), 0.4, 0.1
    )

    assert far(before, after) <= 1e-10


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_loss_stays_finite_at_huge_margins(name):
    function = PREFERENCE_LOSSES[name].function
    settings = {setting: OTHER_SETTINGS[setting] for setting in loss_settings(name)}
    chosen = torch.tensor([1e5, -1e5], requires_grad=True)
    rejected = torch.tensor([-1e5, 1e5], requires_grad=True)
    pairs = PairLogps(
        chosen, rejected, torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2)
    )

    losses = function(pairs, **settings)
    losses.sum().backward()

    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


# ---- IPO and SimPO --------------------------------------------------------------------------
# TRL's whole IPO training is followed step by step in test_trainer.py


def test_ipo_by_hand():
    # log-ratios 2 over 4 tokens and -3 over 2: margin 0.5 + 1.5 = 2; 1 / (2 beta) = 5
    pair = pair_logps(-10.0, -23.0, -12.0, -20.0, lengths=(4, 2))

    assert ipo_loss(pair, beta=0.1).item() == pytest.approx(9.0)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_ipo_values_and_gradients(beta, seed):
    pairs = random_pairs(12)
    losses = ipo_loss(pairs, beta)

    chosen = pairs.chosen_log_ratio.detach() / pairs.chosen_lengths
    rejected = pairs.rejected_log_ratio.detach() / pairs.rejected_lengths
    distance = chosen - rejected - 1 / (2 * beta)
    of_chosen, of_rejected = gradients(losses, pairs)
    assert far(losses, distance**2) <= 1e-10
    assert far(of_chosen, 2 * distance / pairs.chosen_lengths) <= 1e-10
    assert far(of_rejected, -2 * distance / pairs.rejected_lengths) <= 1e-10


def test_simpo_by_hand():
    # -10 over 4 tokens and -23 over 2: -2.5 and -11.5; beta 0.1 * 9 - 0.4 = 0.5
    pair = pair_logps(-10.0, -23.0, 0.0, 0.0, lengths=(4, 2))

    assert simpo_loss(pair, beta=0.1, target_margin=0.4).item() == pytest.approx(0.474077, abs=1e-6)


def trl_simpo(beta: float, target_margin: float):
    """TRL's SimPO of mean log-probabilities (chosen, rejected): losses and both rewards."""
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    settings = SimpleNamespace(
        loss_type="simpo",
        beta=beta,
        simpo_gamma=target_margin,
        label_smoothing=0.0,
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    return lambda chosen, rejected: trainer.cpo_loss(settings, chosen, rejected)


@pytest.mark.parametrize("target_margin", [0.0, 0.5, 1.4])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_simpo_equals_trl_in_values_and_gradients(beta, target_margin, seed):
    pairs = random_pairs(12)
    ours = simpo_loss(pairs, beta, target_margin)
    theirs, their_chosen_rewards, their_rejected_rewards = trl_simpo(beta, target_margin)(
        pairs.policy_chosen / pairs.chosen_lengths, pairs.policy_rejected / pairs.rejected_lengths
    )

    assert far(ours, theirs) <= 1e-12
    for a, b in zip(gradients(ours, pairs), gradients(theirs, pairs), strict=True):
        assert far(a, b) <= 1e-12 and a.abs().max() > 0
    without_reference = PairLogps(
        pairs.policy_chosen,
        pairs.policy_rejected,
        None,
        None,
        pairs.chosen_lengths,
        pairs.rejected_lengths,
    )
    chosen_rewards, rejected_rewards = implicit_rewards(without_reference.per_token(), beta)
    assert far(chosen_rewards, their_chosen_rewards) <= 1e-12
    assert far(rejected_rewards, their_rejected_rewards) <= 1e-12


def test_simpo_of_a_batch_equals_trl_from_full_logits(seed):
    """Values, gradients of all weights, and rewards, with TRL's own mean log-probabilities."""
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    model = random_model(seed)
    params = list(model.parameters())
    batch, _ = pair_batch(model, 5, reference=False)
    labels = batch.tokens.masked_fill(~batch.mask, -100)
    means = trainer.get_batch_logps(logits_of(model, batch.tokens), labels, average_log_prob=True)
    losses, chosen_rewards, rejected_rewards = trl_simpo(2.0, 0.8)(means[0::2], means[1::2])
    theirs = torch.autograd.grad(losses.mean(), params)

    ours = PreferenceLoss(beta=2.0, sft_weight=0.0, loss_type="simpo", target_margin=0.8)
    loss, metrics = ours(model, batch, StepTotals(examples=5, tokens=1))

    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-4)
    for a, b in zip(torch.autograd.grad(loss, params), theirs, strict=True):
        assert far(a, b) <= 1e-4 * (1 + b.abs().max().item())
    assert metrics["simpo_loss"].item() == pytest.approx(losses.mean().item(), rel=1e-4)
    assert metrics["rewards/chosen"].item() == pytest.approx(chosen_rewards.mean().item(), rel=1e-4)
    assert metrics["rewards/rejected"].item() == pytest.approx(
        rejected_rewards.mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_gradcheck(name, seed):
    function = PREFERENCE_LOSSES[name].function
    settings = {setting: OTHER_SETTINGS[setting] for setting in loss_settings(name)}
    pairs = random_pairs(6)

    def of_policy(chosen: Tensor, rejected: Tensor) -> Tensor:
        return function(
            PairLogps(
                chosen,
                rejected,
                pairs.reference_chosen,
                pairs.reference_rejected,
                pairs.chosen_lengths,
                pairs.rejected_lengths,
            ),
            **settings,
        )

    assert gradcheck(of_policy, (pairs.policy_chosen, pairs.policy_rejected))


# ---- SFT ------------------------------------------------------------------------------------


def test_sft_loss_is_cross_entropy_over_the_masked_tokens(seed):
    model = random_model(seed)
    params = list(model.parameters())
    tokens = torch.randint(0, 61, (4, 15))
    mask = ragged_mask(4, 15)
    labels = tokens.masked_fill(~mask, -100)
    wanted = F.cross_entropy(
        logits_of(model, tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )

    totals = StepTotals(examples=4, tokens=int(mask.sum()))
    loss, metrics = SFTLoss()(model, Batch(tokens, mask), totals)

    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert metrics["loss"].item() == loss.item()
    ours = torch.autograd.grad(loss, params)
    theirs = torch.autograd.grad(wanted, params)
    for a, b in zip(ours, theirs, strict=True):
        assert far(a, b) <= 1e-5 * (1 + b.abs().max().item())
    assert sft_loss(torch.tensor([-1.0, -2.0, -3.0]), 12).item() == 0.5


def test_a_uniform_model_loses_the_logarithm_of_its_vocabulary(seed):
    model = random_model(seed)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens = torch.randint(0, 61, (6, 20))
    mask = ragged_mask(6, 20)

    totals = StepTotals(examples=6, tokens=int(mask.sum()))
    loss, _ = SFTLoss()(model, Batch(tokens, mask), totals)

    assert loss.item() == pytest.approx(math.log(61), rel=1e-6)


# ---- preference pairs of a batch ------------------------------------------------------------


def pair_batch(model, count: int, reference: bool = True) -> tuple[Batch, Tensor]:
    """A batch of pairs with made-up reference logps, and its rows' logps (2B,) from full logits."""
    tokens = torch.randint(0, 61, (2 * count, 18))
    mask = ragged_mask(2 * count, 18)
    logps = logits_of(model, tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    reference_logps = torch.randn(count, 2) * 5 - 30 if reference else None
    return Batch(tokens, mask, reference_logps=reference_logps), (logps * mask[:, 1:]).sum(1)


@pytest.mark.parametrize("sft_only", [False, True])
@pytest.mark.parametrize(("sft_weight", "smoothing"), [(0.0, 0.0), (0.2, 0.0), (1.0, 0.1)])
def test_the_combined_loss_by_hand(sft_weight, smoothing, sft_only, seed):
    model = random_model(seed)
    params = list(model.parameters())
    batch, logps = pair_batch(model, 5)
    objective = PreferenceLoss(0.3, sft_weight, smoothing, sft_only=sft_only)
    loss, metrics = objective(model, batch, StepTotals(examples=5, tokens=int(batch.mask.sum())))

    chosen = logps[0::2]
    rejected = logps[1::2]
    chosen_rewards = 0.3 * (chosen - batch.reference_logps[:, 0])
    rejected_rewards = 0.3 * (rejected - batch.reference_logps[:, 1])
    margin = chosen_rewards - rejected_rewards
    dpo = -(1 - smoothing) * margin.sigmoid().log() - smoothing * (-margin).sigmoid().log()
    sft = -chosen / batch.mask.sum(1)[0::2]
    wanted = sft.mean() if sft_only else (dpo + sft_weight * sft).mean()

    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    ours = torch.autograd.grad(loss, params)
    theirs = torch.autograd.grad(wanted, params)
    for a, b in zip(ours, theirs, strict=True):
        assert far(a, b) <= 1e-4 * (1 + b.abs().max().item())
    by_hand = {
        "loss": wanted,
        "dpo_loss": dpo.mean(),
        "sft_loss": sft.mean(),
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    assert tuple(metrics) == tuple(by_hand) == objective.metric_names
    for name, value in by_hand.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-4), name


def test_rejected_answers_carry_no_sft_gradient(seed):
    model = random_model(seed)
    batch, _ = pair_batch(model, 3)
    other_rejected = batch.tokens.clone()
    other_rejected[1::2] = torch.randint(0, 61, (3, 18))
    other = Batch(other_rejected, batch.mask, reference_logps=batch.reference_logps)
    objective = PreferenceLoss(0.3, 1.0, sft_only=True)

    grads = []
    for rows in (batch, other):
        loss, _ = objective(model, rows, StepTotals(examples=3, tokens=1))
        grads += torch.autograd.grad(loss, model.model.norm.weight)

    assert far(*grads) <= 1e-5 and grads[0].abs().max() > 0


@pytest.mark.parametrize("length", [1, 3, 15])
def test_the_sft_part_does_not_depend_on_length(length, seed):
    """A constant probability per token gives the same SFT term for a short and a long answer."""
    model = random_model(seed)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    mask = torch.zeros(2, 18, dtype=torch.bool)
    mask[0, 2 : 2 + length] = True
    mask[1, 2:9] = True
    batch = Batch(torch.randint(0, 61, (2, 18)), mask, reference_logps=torch.zeros(1, 2))

    _, metrics = PreferenceLoss(0.1, 0.2)(model, batch, StepTotals(examples=1, tokens=length))

    assert metrics["sft_loss"].item() == pytest.approx(math.log(61), rel=1e-6)
    assert metrics["logps/chosen"].item() == pytest.approx(-length * math.log(61), rel=1e-6)


def test_logps_at_the_reference_give_margin_zero(seed):
    model = random_model(seed)
    batch, _ = pair_batch(model, 4)
    reference = sequence_logps(model, batch.tokens, batch.mask).detach().view(-1, 2)
    at_reference = Batch(batch.tokens, batch.mask, reference_logps=reference)

    _, metrics = PreferenceLoss(0.5, 0.0)(model, at_reference, StepTotals(examples=4, tokens=1))

    assert metrics["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert abs(metrics["rewards/margins"].item()) <= 1e-6


def test_length_terms_and_weights_by_hand(seed):
    """Per token, with a penalty per token, and weighted pairs."""
    model = random_model(seed)
    batch, logps = pair_batch(model, 5)
    totals = StepTotals(examples=5, tokens=1)
    lengths = batch.mask[:, 1:].sum(1).float()
    chosen_length = lengths[0::2]
    rejected_length = lengths[1::2]
    chosen_ratio = logps[0::2] - batch.reference_logps[:, 0]
    rejected_ratio = logps[1::2] - batch.reference_logps[:, 1]
    per_token = 0.3 * (chosen_ratio / chosen_length - rejected_ratio / rejected_length)
    penalised = 0.3 * (chosen_ratio - rejected_ratio) + 0.25 * (chosen_length - rejected_length)
    weights = torch.tensor([0.2, 1.8, 1.0, 0.5, 1.5])

    for objective, margin in (
        (PreferenceLoss(0.3, 0.7, length_normalized=True), per_token),
        (PreferenceLoss(0.3, 0.7, length_penalty=0.25), penalised),
    ):
        by_hand = -F.logsigmoid(margin) - 0.7 * logps[0::2] / chosen_length
        loss, metrics = objective(model, batch, totals)
        assert far(loss, by_hand.mean()) < 1e-5

        def weighted(values: Tensor, objective=objective) -> Tensor:
            pairs = Batch(batch.tokens, batch.mask, None, batch.reference_logps, values)
            return objective(model, pairs, totals)[0]

        assert far(weighted(weights), (by_hand * weights).mean()) < 1e-5
        assert far(weighted(torch.ones(5)), loss) < 1e-6
        if objective.length_normalized:
            assert metrics["rewards/margins"].item() == pytest.approx(
                per_token.mean().item(), rel=1e-3, abs=1e-5
            )
