"""Log-probabilities of tokens against plain autograd and torch's own functions."""

import pytest
import torch
import torch.nn.functional as F
from conftest import far, logits_of, random_model
from torch.autograd import gradcheck

from minmacpo.config.schema import Lora
from minmacpo.core.lora import attach_lora, lora_params
from minmacpo.kernels import fused_logps
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
    monkeypatch.setattr(fused_logps, "CHUNK", chunk)
    hidden, weight, targets = case(7)
    hidden.requires_grad_(True)
    assert gradcheck(lambda h: FrozenHeadLogps.apply(h, weight, targets, False), hidden)


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("trained_head", [False, True])
def test_gradcheck_of_masked_and_summed_logps(chunk, trained_head, monkeypatch, seed):
    monkeypatch.setattr(fused_logps, "CHUNK", chunk)
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
    monkeypatch.setattr(fused_logps, "CHUNK", 6)
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
    monkeypatch.setattr(fused_logps, "CHUNK", 16)
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
    monkeypatch.setattr(fused_logps, "CHUNK", 8)
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
    """Tied or not, trained as a whole (pre-training) or by its adapter: no part is lost."""
    monkeypatch.setattr(fused_logps, "CHUNK", chunk)
    model = random_model(seed, tie_word_embeddings=tied).double()
    params = dict(model.named_parameters())
    if lora:
        attach_lora(model, Lora())
        params = lora_params(model)
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
