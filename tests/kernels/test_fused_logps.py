"""Losses against plain autograd, torch's own functions, and numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import far, logits_of, random_model
from torch.autograd import gradcheck

from minmacpo.config.schema import Lora
from minmacpo.core.batching import Batch
from minmacpo.core.lora import attach_lora, init_adapter, slot
from minmacpo.core.losses import PreferenceLoss, SFTLoss, dpo_loss, sft_loss
from minmacpo.kernels import fused_logps as losses
from minmacpo.kernels.fused_logps import FrozenHeadLogps, masked_logps, sequence_logps, token_logps


class Stub:
    """A model whose hidden states are given: all that the losses see of one."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor):
        self.hidden, self.lm_head = hidden, type("Head", (), {"weight": weight})

    def __call__(self, tokens):
        assert tokens.shape == self.hidden.shape[:2]
        return self.hidden


def case(tokens: int, dtype=torch.float64, size: int = 5, vocab: int = 11):
    """hidden [N, H], head weight [V, H], targets [N]."""
    hidden = torch.randn(tokens, size, dtype=dtype)
    return hidden, torch.randn(vocab, size, dtype=dtype), torch.randint(0, vocab, (tokens,))


def plain_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) [N] in its readable form: the oracle of token_logps."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def ragged_mask(rows: int, width: int) -> torch.Tensor:
    """A mask [B, T] with an answer of at least one token in every row, never at position 0."""
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for row in mask:
        start = int(torch.randint(1, width - 1, ()))
        row[start : int(torch.randint(start + 1, width + 1, ()))] = True
    return mask


# ---- log-probabilities of tokens ------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_gradcheck_of_the_frozen_head(chunk, monkeypatch, seed):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    hidden, weight, targets = case(7)
    hidden.requires_grad_(True)
    assert gradcheck(lambda h: FrozenHeadLogps.apply(h, weight, targets, False), hidden)


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("trained_head", [False, True])
def test_gradcheck_of_masked_and_summed_logps(chunk, trained_head, monkeypatch, seed):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    hidden = torch.randn(3, 8, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=trained_head)
    tokens, mask = torch.randint(0, 11, (3, 8)), ragged_mask(3, 8)
    inputs = (hidden, weight) if trained_head else (hidden,)
    assert gradcheck(lambda h, w=weight: masked_logps(Stub(h, w), tokens, mask)[0], inputs)
    assert gradcheck(lambda h, w=weight: sequence_logps(Stub(h, w), tokens, mask), inputs)


@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 12, 40])
@pytest.mark.parametrize(
    "way", ["no gradient", "frozen head", "trained head", "trained head, fixed hidden"]
)
def test_token_logps_equal_the_plain_form(way, tokens, monkeypatch, seed):
    monkeypatch.setattr(losses, "CHUNK", 6)
    hidden, weight, targets = case(tokens)
    hidden.requires_grad_(way in ("frozen head", "trained head"))
    weight.requires_grad_(way.startswith("trained"))
    upstream = torch.randn(tokens, dtype=torch.float64)
    found = token_logps(hidden, weight, targets)
    wanted = plain_logps(hidden, weight, targets)
    assert far(found, wanted) <= 1e-12
    assert found.requires_grad == (way != "no gradient")
    inputs = [t for t in (hidden, weight) if t.requires_grad]
    if inputs:
        for a, b in zip(
            torch.autograd.grad(found, inputs, upstream),
            torch.autograd.grad(wanted, inputs, upstream),
            strict=True,
        ):
            assert far(a, b) <= 1e-12 and a.abs().max() > 0
    hidden, weight = hidden.detach().requires_grad_(True), weight.detach().requires_grad_(True)
    with torch.no_grad():
        assert far(token_logps(hidden, weight, targets), wanted) <= 1e-12


@pytest.mark.parametrize("trained_head", [False, True])
def test_token_logps_equal_cross_entropy(trained_head, monkeypatch, seed):
    monkeypatch.setattr(losses, "CHUNK", 16)
    hidden, weight, targets = case(50, torch.float32, 24, 300)
    hidden.requires_grad_(True)
    weight.requires_grad_(trained_head)
    found, wanted = (
        token_logps(hidden, weight, targets),
        -F.cross_entropy(hidden @ weight.T, targets, reduction="none"),
    )
    assert found.dtype == torch.float32 and far(found, wanted) <= 2e-5
    inputs = [hidden, weight] if trained_head else [hidden]
    for a, b in zip(
        torch.autograd.grad(found.sum(), inputs),
        torch.autograd.grad(wanted.sum(), inputs),
        strict=True,
    ):
        assert far(a, b) <= 1e-4


def test_nothing_of_vocabulary_size_is_kept_for_the_backward_pass(monkeypatch, seed):
    monkeypatch.setattr(losses, "CHUNK", 8)
    hidden, weight, targets = case(64, torch.float32, 4, 5000)
    kept = []
    hidden.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        token_logps(hidden, weight, targets).sum().backward()
        assert max(kept) <= 64 * 4, "only the direction [N, H] may be kept"
        kept.clear()
        weight.requires_grad_(True)
        out = token_logps(hidden, weight, targets)
        assert all(size < 8 * 5000 for size in kept if size != weight.numel()), (
            "the chunks must be recomputed"
        )
        out.sum().backward()


def test_bf16_logps_and_gradients_are_those_of_fp32_within_rounding(seed):
    hidden, weight, targets = case(200, torch.float32, 64, 500)
    hidden, weight = hidden.bfloat16(), (weight / 8).bfloat16()
    a, b = hidden.clone().requires_grad_(True), hidden.float().requires_grad_(True)
    upstream = torch.rand(200) + 0.5
    found, wanted = token_logps(a, weight, targets), plain_logps(b, weight.float(), targets)
    assert found.dtype == torch.float32 and far(found, wanted) < 0.05
    found.backward(upstream)
    wanted.backward(upstream)
    assert a.grad.dtype == torch.bfloat16
    assert ((a.grad.float() - b.grad).norm() / b.grad.norm()).item() < 0.02


def test_extreme_logits_stay_finite(seed):
    hidden, weight, targets = case(9, torch.float32)
    hidden = (hidden * 1e4).requires_grad_(True)
    logps = token_logps(hidden, weight, targets)
    assert far(logps, plain_logps(hidden, weight, targets)) <= 1e-2
    logps.sum().backward()
    assert logps.isfinite().all() and hidden.grad.isfinite().all()


def test_no_token_gives_no_logp(seed):
    hidden, weight, targets = case(0, torch.float32)
    assert token_logps(hidden.requires_grad_(True), weight, targets).shape == (0,)


@pytest.mark.slow
def test_the_compiled_chunk_equals_the_plain_form(seed):
    for tokens in (7, 33):
        hidden, weight, targets = case(tokens, torch.float32, 16, 100)
        a, b = hidden.clone().requires_grad_(True), hidden.clone().requires_grad_(True)
        found, wanted = (
            token_logps(a, weight, targets, compiled=True),
            plain_logps(b, weight, targets),
        )
        upstream = torch.randn(tokens)
        found.backward(upstream)
        wanted.backward(upstream)
        assert far(found, wanted) <= 1e-4 and far(a.grad, b.grad) <= 1e-4


# ---- whole models ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [5, 4096])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_every_gradient_of_a_model_equals_that_of_full_logits(lora, tied, chunk, monkeypatch, seed):
    """Tied or not, trained as a whole (pre-training) or by its slot: no part of a gradient is lost."""
    monkeypatch.setattr(losses, "CHUNK", chunk)
    model = random_model(seed, tie_word_embeddings=tied).double()
    params = dict(model.named_parameters())
    if lora:
        attach_lora(model, Lora())
        params = slot(model)
        with torch.no_grad():
            for param in params.values():
                param.data = torch.randn(param.shape, dtype=torch.float64) * 0.1
    tokens, mask = torch.randint(0, 61, (4, 19)), ragged_mask(4, 19)
    upstream = torch.randn(4, dtype=torch.float64)
    found = sequence_logps(model, tokens, mask)
    logps = logits_of(model, tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    wanted = (logps * mask[:, 1:]).sum(1)
    assert far(found, wanted) <= 1e-10
    mine = torch.autograd.grad(found, list(params.values()), upstream)
    true = torch.autograd.grad(wanted, list(params.values()), upstream)
    for name, a, b in zip(params, mine, true, strict=True):
        assert far(a, b) <= 1e-10 * (1 + b.abs().max().item()) and b.abs().max() > 0, name


def test_masked_logps_name_their_rows(seed):
    model = random_model(seed)
    tokens, mask = torch.randint(0, 61, (5, 14)), ragged_mask(5, 14)
    mask[2] = False  # a row without a trained token
    logps, rows = masked_logps(model, tokens, mask)
    assert rows.tolist() == [row for row in range(5) for _ in range(int(mask[row].sum()))]
    whole = logits_of(model, tokens).log_softmax(-1)
    wanted = [
        whole[b, t - 1, tokens[b, t]].item() for b in range(5) for t in range(14) if mask[b, t]
    ]
    assert logps.tolist() == pytest.approx(wanted, abs=1e-5)
    summed = sequence_logps(model, tokens, mask)
    assert (
        summed[2] == 0
        and far(summed, torch.zeros(5).index_add(0, rows, torch.tensor(wanted))) <= 1e-4
    )


def test_padding_and_prompt_have_no_say(seed):
    model = random_model(seed)
    tokens, mask = torch.randint(0, 61, (3, 12)), ragged_mask(3, 12)
    longer = torch.cat((tokens, torch.randint(0, 61, (3, 7))), 1)
    wider = torch.cat((mask, torch.zeros(3, 7, dtype=torch.bool)), 1)
    assert far(sequence_logps(model, tokens, mask), sequence_logps(model, longer, wider)) <= 1e-4


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(seed):
    model = random_model(seed)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens, mask = torch.randint(0, 61, (6, 20)), ragged_mask(6, 20)
    lengths = mask.sum(1)
    assert (-sequence_logps(model, tokens, mask) / lengths).exp().tolist() == pytest.approx(
        [61.0] * 6, rel=1e-5
    )
    loss, _ = SFTLoss()(model, Batch(tokens, mask), torch.zeros(6, 0), 6, int(lengths.sum()))
    assert loss.item() == pytest.approx(math.log(61), rel=1e-6)


# ---- sft and dpo ----------------------------------------------------------------------------


def test_sft_loss_is_cross_entropy_over_the_masked_tokens(seed):
    model = random_model(seed)
    tokens, mask = torch.randint(0, 61, (4, 15)), ragged_mask(4, 15)
    loss, values = SFTLoss()(model, Batch(tokens, mask), torch.zeros(4, 0), 4, int(mask.sum()))
    labels = tokens.masked_fill(~mask, -100)
    wanted = F.cross_entropy(
        logits_of(model, tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and values[0].item() == loss.item()
    for a, b in zip(
        *(torch.autograd.grad(x, list(model.parameters())) for x in (loss, wanted)), strict=True
    ):
        assert far(a, b) <= 1e-5 * (1 + b.abs().max().item())
    assert sft_loss(torch.tensor([-1.0, -2.0, -3.0]), 12).item() == 0.5


def test_dpo_by_hand():
    """β 0.1, log-ratios 2 and -3: margin 0.5, loss -log σ(0.5) = 0.474077."""
    loss, up, down = dpo_loss(*(torch.tensor([x]) for x in (-10.0, -23.0, -12.0, -20.0)), beta=0.1)
    assert loss.item() == pytest.approx(0.4740770, abs=1e-6)
    assert (up.item(), down.item()) == (pytest.approx(0.2), pytest.approx(-0.3))
    smooth, *_ = dpo_loss(
        *(torch.tensor([x]) for x in (-10.0, -23.0, -12.0, -20.0)), beta=0.1, label_smoothing=0.25
    )
    assert smooth.item() == pytest.approx(0.75 * 0.4740770 + 0.25 * 0.9740770, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_dpo_is_log_two_where_policy_and_reference_are_equal(smoothing, seed):
    chosen, rejected = torch.randn(2, 9) * 50
    loss, up, down = dpo_loss(chosen, rejected, chosen, rejected, 0.3, smoothing)
    assert loss.tolist() == pytest.approx([math.log(2)] * 9) and not up.any() and not down.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_dpo_values_and_gradients(beta, smoothing, seed):
    vectors = [(torch.randn(12, dtype=torch.float64) * 5).requires_grad_(True) for _ in range(4)]
    loss, up, down = dpo_loss(*vectors, beta, smoothing)
    assert gradcheck(lambda *v: dpo_loss(*v, beta, smoothing)[0], vectors)
    margin = beta * ((vectors[0] - vectors[2]) - (vectors[1] - vectors[3]))
    wanted = (1 - smoothing) * (1 + (-margin).exp()).log() + smoothing * (1 + margin.exp()).log()
    assert far(loss, wanted) <= 1e-12 and far(up - down, margin.detach()) <= 1e-12
    assert not up.requires_grad and not down.requires_grad
    slope = torch.autograd.grad(loss.sum(), vectors)
    hand = -beta * ((1 - smoothing) * torch.sigmoid(-margin) - smoothing * torch.sigmoid(margin))
    for found, sign in zip(slope, (1, -1, -1, 1), strict=True):
        assert far(found, sign * hand) <= 1e-12
    if not smoothing:
        assert (slope[0] < 0).all() and (slope[1] > 0).all(), "chosen must rise, rejected must fall"


def test_a_constant_on_both_sides_changes_nothing(seed):
    vectors = [torch.randn(10, dtype=torch.float64) * 5 for _ in range(4)]
    before, *_ = dpo_loss(*vectors, 0.4, 0.1)
    shift = torch.randn(10, dtype=torch.float64) * 100
    after, *_ = dpo_loss(vectors[0] + shift, vectors[1] + shift, *vectors[2:], 0.4, 0.1)
    assert far(before, after) <= 1e-10


def test_dpo_stays_finite_at_huge_margins():
    far_apart = [torch.tensor([x, -x], requires_grad=True) for x in (1e5, -1e5)]
    loss, *_ = dpo_loss(*far_apart, torch.zeros(2), torch.zeros(2), 1.0, 0.1)
    loss.sum().backward()
    assert loss.isfinite().all() and all(v.grad.isfinite().all() for v in far_apart)


# ---- the pair objective ---------------------------------------------------------------------


def pairs(model, count: int):
    """A batch of `count` pairs, reference logps, and the full-logits logps of its rows."""
    tokens, mask = torch.randint(0, 61, (2 * count, 18)), ragged_mask(2 * count, 18)
    refs = torch.randn(count, 2) * 5 - 30
    logps = logits_of(model, tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return Batch(tokens, mask), refs, (logps * mask[:, 1:]).sum(1)


@pytest.mark.parametrize("contrast", [True, False])
@pytest.mark.parametrize(("gamma", "smoothing"), [(0.0, 0.0), (0.2, 0.0), (1.0, 0.1)])
def test_the_combined_loss_by_hand(gamma, smoothing, contrast, seed):
    model = random_model(seed)
    batch, refs, logps = pairs(model, 5)
    objective = PreferenceLoss(0.3, gamma, smoothing, contrast)
    loss, values = objective(model, batch, refs, 5, int(batch.mask.sum()))
    chosen, rejected = logps[0::2], logps[1::2]
    tokens = batch.mask.sum(1)[0::2]
    margin = 0.3 * (chosen - refs[:, 0] - rejected + refs[:, 1])
    dpo = -(1 - smoothing) * margin.sigmoid().log() - smoothing * (-margin).sigmoid().log()
    sft = -chosen / tokens
    wanted = (dpo + gamma * sft).mean() if contrast else sft.mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    for a, b in zip(
        *(torch.autograd.grad(x, list(model.parameters())) for x in (loss, wanted)), strict=True
    ):
        assert far(a, b) <= 1e-4 * (1 + b.abs().max().item())
    found = dict(zip(objective.metrics, [v.item() for v in values], strict=True))
    up, down = 0.3 * (chosen - refs[:, 0]), 0.3 * (rejected - refs[:, 1])
    by_hand = {
        "loss": wanted,
        "dpo_loss": dpo.mean(),
        "sft_loss": sft.mean(),
        "rewards/chosen": up.mean(),
        "rewards/rejected": down.mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (up > down).float().mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    assert found == {
        name: pytest.approx(value.item(), rel=1e-3, abs=1e-4) for name, value in by_hand.items()
    }


def test_rejected_answers_carry_no_sft_gradient(seed):
    """With gamma alone (no contrast) only the chosen rows are learned from."""
    model = random_model(seed)
    batch, refs, _ = pairs(model, 3)
    objective = PreferenceLoss(0.3, 1.0, contrast=False)
    other = Batch(batch.tokens.clone(), batch.mask.clone())
    other.tokens[1::2] = torch.randint(0, 61, (3, 18))
    grads = [
        torch.autograd.grad(objective(model, b, refs, 3, 1)[0], model.model.norm.weight)[0]
        for b in (batch, other)
    ]
    assert far(*grads) <= 1e-5 and grads[0].abs().max() > 0


@pytest.mark.parametrize("length", [1, 3, 15])
def test_the_sft_part_does_not_depend_on_length(length, seed):
    """A constant probability per token gives the same SFT term for a short and a long answer."""
    model = random_model(seed)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    mask = torch.zeros(2, 18, dtype=torch.bool)
    mask[0, 2 : 2 + length] = mask[1, 2:9] = True
    batch = Batch(torch.randint(0, 61, (2, 18)), mask)
    _, values = PreferenceLoss(0.1, 0.2)(model, batch, torch.zeros(1, 2), 1, length)
    found = dict(zip(PreferenceLoss.metrics, values, strict=True))
    assert found["sft_loss"].item() == pytest.approx(math.log(61), rel=1e-6)
    assert found["logps/chosen"].item() == pytest.approx(-length * math.log(61), rel=1e-6)


def test_logps_at_the_reference_give_margin_zero(seed):
    model = random_model(seed)
    attach_lora(model, Lora())
    init_adapter(model, seed)
    batch, _, _ = pairs(model, 4)
    refs = sequence_logps(model, batch.tokens, batch.mask).detach().view(-1, 2)
    _, values = PreferenceLoss(0.5, 0.0)(model, batch, refs, 4, 1)
    found = dict(zip(PreferenceLoss.metrics, values, strict=True))
    assert (
        found["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
        and abs(found["rewards/margins"].item()) <= 1e-6
    )


# ---- lengths and weights ------------------------------------------------------------------------


def test_length_terms_and_weights_by_hand(seed):
    """Summed logps and lengths by hand: per token, with a penalty per token, and weighted pairs."""
    model = random_model(seed)
    batch, refs, logps = pairs(model, 5)
    sizes = batch.mask[:, 1:].sum(1).view(-1, 2).float()
    (c, r), (n, m) = logps.view(-1, 2).unbind(1), sizes.unbind(1)
    sft, weights = -c / n, torch.tensor([0.2, 1.8, 1.0, 0.5, 1.5])
    raw = 0.3 * ((c - refs[:, 0]) - (r - refs[:, 1]))
    per_token = 0.3 * ((c - refs[:, 0]) / n - (r - refs[:, 1]) / m)
    for objective, margin in (
        (PreferenceLoss(0.3, 0.7, length_normalized=True), per_token),
        (PreferenceLoss(0.3, 0.7, length_penalty=0.25), raw + 0.25 * (n - m)),
    ):
        each = -torch.nn.functional.logsigmoid(margin) + 0.7 * sft
        plain = objective(model, batch, refs, 5, 1)[0]
        assert far(plain, each.mean()) < 1e-5
        weighted = objective(model, batch, torch.cat([refs, weights[:, None]], 1), 5, 1)[0]
        assert far(weighted, (each * weights).mean()) < 1e-5
        assert (
            far(objective(model, batch, torch.cat([refs, torch.ones(5, 1)], 1), 5, 1)[0], plain)
            < 1e-6
        )
