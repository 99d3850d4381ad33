"""Sampling: a batch is its rows one by one, the distribution is that of transformers' warpers."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import far, logits_of, ragged, random_model

from minmacpo.core.sampling import (
    Decoder,
    SamplingParams,
    contrast,
    generate,
    logits_to_probs,
    pick_token,
    sample_from_probs,
    uniform_noise,
)

GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=12)
SAMPLED = SamplingParams(temperature=1.3, top_k=0, top_p=1.0, max_new_tokens=12)
WAYS = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "top k": SamplingParams(temperature=0.95, top_k=7, top_p=1.0, max_new_tokens=12),
    "top p": SamplingParams(temperature=1.1, top_k=0, top_p=0.8, max_new_tokens=12),
    "the paper's": SamplingParams(temperature=0.95, top_k=50, top_p=0.7, max_new_tokens=12),
}


def new(settings: SamplingParams, **changes) -> SamplingParams:
    return dataclasses.replace(settings, **changes)


# ---- rows and batches -----------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fixed", [1, 2, 3])  # fixed, so that no draw can fall on a rounding error
def test_a_batch_equals_its_rows_one_by_one(way, fixed):
    model = random_model(fixed)
    prompts = ragged(fixed, 7, 61, 1, 25)
    seeds = list(range(100 * fixed, 100 * fixed + 7))
    settings = new(WAYS[way], max_new_tokens=30)
    stops = {5, 9, 13}
    ids, logps = generate(model, prompts, seeds, settings, stops)
    assert len({len(row) for row in ids}) > 2, "the rows should end at different steps"
    for prompt, seed, row, logp in zip(prompts, seeds, ids, logps, strict=True):
        alone, summed = generate(model, [prompt], [seed], settings, stops)
        assert alone == [row] and summed[0] == pytest.approx(logp, abs=1e-4)
    order = [3, 0, 6, 5, 1, 2, 4]
    again, _ = generate(
        model, [prompts[i] for i in order], [seeds[i] for i in order], settings, stops
    )
    assert again == [ids[i] for i in order]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7, 50])
@pytest.mark.parametrize("way", WAYS)
def test_rows_that_wait_for_a_place_get_the_same_answers(way, batch_size):
    model, prompts, seeds = random_model(4), ragged(4, 19, 61, 1, 25), list(range(40, 59))
    stops, settings = {5, 9, 13}, new(WAYS[way], max_new_tokens=29)
    ids, logps = generate(model, prompts, seeds, settings, stops)
    assert len({len(row) for row in ids}) > 2 and max(map(len, ids)) == 29
    found, summed = generate(model, prompts, seeds, settings, stops, batch_size=batch_size)
    assert found == ids and summed == pytest.approx(logps, abs=1e-4)


def test_waiting_rows_under_contrast():
    model, other, prompts = random_model(5), random_model(6), ragged(5, 9, 61, 1, 25)
    settings = new(SAMPLED, max_new_tokens=20)
    asked = (model, prompts, range(9), settings, {2, 7, 11, 20})
    wanted, logps = generate(*asked, amateur=other)
    found, summed = generate(*asked, amateur=other, batch_size=2)
    assert found == wanted and summed == pytest.approx(logps, abs=1e-4)


def test_a_row_does_not_depend_on_the_seeds_beside_it():
    model = random_model(7)
    prompts = ragged(7, 4, 61)
    first, _ = generate(model, prompts, [1, 2, 3, 4], SAMPLED, {2})
    second, _ = generate(model, prompts, [1, 12, 3, 14], SAMPLED, {2})
    assert first[0] == second[0] and first[2] == second[2]
    assert first[1] != second[1] and first[3] != second[3]


@pytest.mark.parametrize("way", WAYS)
def test_logps_are_those_of_the_full_forward_at_temperature_one(way, seed):
    model = random_model(seed)
    prompts = ragged(seed, 5, 61)
    ids, logps = generate(model, prompts, range(5), WAYS[way], {2, 7, 11, 20})
    for prompt, row, logp in zip(prompts, ids, logps, strict=True):
        whole = logits_of(model, torch.tensor([prompt + row]))[0].log_softmax(-1)
        wanted = sum(whole[len(prompt) - 1 + i, token].item() for i, token in enumerate(row))
        assert logp == pytest.approx(wanted, abs=1e-4)


def test_greedy_takes_the_likeliest_token(seed):
    model = random_model(seed)
    for prompt, row in zip(
        ragged(seed, 4, 61),
        generate(model, ragged(seed, 4, 61), range(4), GREEDY, set())[0],
        strict=True,
    ):
        whole = logits_of(model, torch.tensor([prompt + row]))[0]
        for step, token in enumerate(row):
            logits = whole[len(prompt) - 1 + step]
            assert logits[token] >= logits.max() - 1e-5
    a, b = (generate(model, [[4]], [own], GREEDY, set())[0] for own in (1, 2))
    assert a == b


def test_greedy_equals_transformers_on_ragged_prompts(model_folder):
    """The oracle runs one row at a time; ours side by side."""
    transformers = pytest.importorskip("transformers")
    from minmacpo.core.checkpoint import load_model

    prompts = ragged(5, 5, 400, 1, 20)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    eos = 17
    kwargs = dict(do_sample=False, max_new_tokens=25, eos_token_id=eos, pad_token_id=0)
    found = [
        theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **kwargs)[
            0, len(p) :
        ]
        for p in prompts
    ]
    ours, _ = generate(
        load_model(model_folder), prompts, range(5), new(GREEDY, max_new_tokens=25), {eos}
    )
    for prompt, mine, true in zip(prompts, ours, found, strict=True):
        for step, (a, b) in enumerate(zip(mine, true.tolist(), strict=False)):
            if a != b:  # only where the two best logits are equal within rounding may they part
                logits = theirs(torch.tensor([prompt + mine[:step]])).logits[0, -1]
                assert logits[b] - logits[a] < 2e-5
                break
        else:
            assert mine == true.tolist()


# ---- where an answer ends -------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("most", [1, 2, 7, 8, 9, 17])
def test_the_end_token_is_kept_and_nothing_follows_it(way, most):
    seed = 31  # fixed, as above
    model = random_model(seed, std=0.1)
    stops = set(range(40, 52))
    ids, _ = generate(
        model,
        ragged(seed, 24, 61),
        range(seed, seed + 24),
        new(WAYS[way], max_new_tokens=most),
        stops,
    )
    for row in ids:
        assert 1 <= len(row) <= most
        assert not stops & set(row[:-1])
        assert row[-1] in stops or len(row) == most
    longest, _ = generate(
        model,
        ragged(seed, 24, 61),
        range(seed, seed + 24),
        new(WAYS[way], max_new_tokens=17),
        stops,
    )
    assert [row[:most] for row in longest] == ids, "max_new_tokens only cuts"


def test_without_stop_ids_every_answer_has_full_length(seed):
    ids, _ = generate(random_model(seed), ragged(seed, 3, 61), range(3), SAMPLED, set())
    assert [len(row) for row in ids] == [12, 12, 12]


def test_the_model_is_left_as_it_was(seed):
    model = random_model(seed)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generate(model, ragged(seed, 3, 61), range(3), SAMPLED, {2})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (
        all(p.requires_grad for p in model.parameters()) and not torch.is_inference_mode_enabled()
    )


# ---- the distribution -----------------------------------------------------------------------


def dense(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """What `logits_to_probs` gives, as probabilities [B, V] of every token."""
    probs, ids = logits_to_probs(logits, temperature, top_k, top_p)
    return probs if ids is None else torch.zeros_like(logits).scatter(-1, ids, probs)


@pytest.mark.parametrize("temperature", [0.3, 0.95, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 2, 50, 299, 300, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.7, 0.95, 1.0])
def test_warp_equals_the_warpers_of_transformers(temperature, top_k, top_p, seed):
    process = pytest.importorskip("transformers").generation.logits_process
    logits = torch.randn(32, 300) * torch.rand(32, 1) * 8
    logits = logits[
        (logits.sort().values.diff() > 1e-6).all(-1)
    ]  # of two that are equal, either may be kept
    scores = (
        process.TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    )
    if top_k:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:  # leave out rows where rounding decides which token is the last of the nucleus
        total = scores.double().softmax(-1).sort(descending=True).values.cumsum(-1)
        clear = (total - top_p).abs().amin(-1) > 1e-5
        logits, scores = logits[clear], scores[clear]
        scores = process.TopPLogitsWarper(top_p)(None, scores)
    assert len(logits) > 4
    found, wanted = dense(logits, temperature, top_k, top_p), scores.softmax(-1)
    assert torch.equal(found > 1e-30, wanted > 1e-30)
    assert far(found, wanted) <= 1e-5
    assert far(found.sum(-1), torch.ones(len(found))) <= 1e-5


def test_warp_takes_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()[:, [2, 0, 3, 1]]
    for top_p, wanted in (
        (0.35, [0, 1, 0, 0]),
        (0.45, [0, 4 / 7, 0, 3 / 7]),
        (0.75, [2 / 9, 4 / 9, 0, 3 / 9]),
    ):
        assert dense(logits, 1.0, 0, top_p)[0].tolist() == pytest.approx(wanted, abs=1e-6)
    # after top-k 2 the likeliest token has 4/7 of what is left, so that it alone reaches 0.5
    assert dense(logits, 1.0, 2, 0.5)[0].tolist() == pytest.approx([0, 1, 0, 0], abs=1e-6)
    assert dense(logits, 0.5, 0, 1.0)[0].tolist() == pytest.approx(
        [4 / 30, 16 / 30, 1 / 30, 9 / 30], abs=1e-6
    )


@pytest.mark.parametrize("top_k", [61, 62, 10**6])
def test_filters_that_are_off_change_nothing(top_k, seed):
    logits = torch.randn(5, 61) * 3
    assert torch.equal(dense(logits, 0.8, top_k, 1.0), dense(logits, 0.8, 0, 1.0))
    assert far(dense(logits, 0.8, top_k, 1.0), (logits / 0.8).softmax(-1)) <= 1e-6
    uniform = torch.rand(5)
    all_on = pick_token(logits, SamplingParams(temperature=0.8, top_k=top_k, top_p=1.0), uniform)
    assert torch.equal(
        all_on[0],
        pick_token(logits, SamplingParams(temperature=0.8, top_k=0, top_p=1.0), uniform)[0],
    )


def test_temperature_zero_is_the_argmax_whatever_the_noise(seed):
    logits = torch.randn(20, 61)
    token, logp = pick_token(
        logits, SamplingParams(temperature=0.0, top_k=3, top_p=0.2), torch.rand(20)
    )
    assert (
        torch.equal(token, logits.argmax(-1)) and far(logp, logits.log_softmax(-1).amax(-1)) <= 1e-6
    )


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (12, 1.0), (0, 0.8), (12, 0.7)])
@pytest.mark.parametrize("fixed", [1, 2])
def test_chi_square_of_fifty_thousand_draws(top_k, top_p, fixed):
    """Rows are seeds, as in a run: the noise of neighbouring seeds must be independent, too."""
    count, size = 50_000, 30
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(fixed)) * 1.5
    wanted = dense(logits, 0.9, top_k, top_p)[0].double().numpy() * count
    uniform = torch.from_numpy(uniform_noise(range(fixed * count, (fixed + 1) * count), 1)[:, 0])
    probs, ids = logits_to_probs(logits.expand(count, -1), 0.9, top_k, top_p)
    found = np.bincount(sample_from_probs(probs, ids, uniform).numpy(), minlength=size)
    assert found.sum() == count and not found[wanted == 0].any()
    big = wanted >= 5
    found, wanted = [*found[big], found[~big].sum()], [*wanted[big], wanted[~big].sum()]
    pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if w > 0]
    statistic = sum((f - w) ** 2 / w for f, w in pairs)
    freedom = torch.tensor((len(pairs) - 1) / 2.0, dtype=torch.float64)
    p = torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)).item()
    assert p > 1e-4, (p, statistic)


def test_draw_inverts_the_cumulative_distribution():
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).expand(8, -1)
    uniform = torch.tensor([0.0, 0.25, 0.49999997, 0.5, 0.74999994, 0.75, 0.875, 1 - 2**-24])
    assert sample_from_probs(probs, None, uniform).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    ids = torch.tensor([[9, 4, 6, 1]]).expand(8, -1)
    assert sample_from_probs(probs, ids, uniform).tolist() == [9, 9, 9, 4, 4, 6, 6, 6]


def test_draw_never_takes_a_token_of_probability_zero(seed):
    probs = torch.rand(3000, 40) * (torch.rand(3000, 40) < 0.3)
    probs[:, 3] += 1e-3
    for uniform in (torch.rand(3000), torch.zeros(3000), torch.full((3000,), 1 - 2**-24)):
        assert (probs.gather(-1, sample_from_probs(probs, None, uniform)[:, None]) > 0).all()


# ---- the noise ------------------------------------------------------------------------------


def test_noise_is_that_of_its_seed_and_place(seed):
    seeds = [seed, 0, 2**63 - 1, 17, seed]
    table = uniform_noise(seeds, 40)
    assert table.shape == (5, 40) and table.dtype == np.float32
    assert (table >= 0).all() and (table < 1).all()
    assert (table[0] == table[4]).all() and len({row.tobytes() for row in table}) == 4
    assert (uniform_noise([17, seed], 25)[0] == table[3, :25]).all(), (
        "fewer steps, the same first numbers"
    )


def test_noise_is_uniform_and_rows_are_uncorrelated():
    table = uniform_noise(range(4000), 16).astype(np.float64)
    assert abs(table.mean() - 0.5) < 5 * (1 / 12 / table.size) ** 0.5
    assert abs(table.var() - 1 / 12) < 0.002
    centred = table - 0.5
    for shift in (1, 2, 7):
        assert (
            abs((centred[shift:] * centred[:-shift]).mean()) < 5 / 12 / ((4000 - shift) * 16) ** 0.5
        )
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 5 / 12 / (4000 * 15) ** 0.5


# ---- contrastive decoding -------------------------------------------------------------------


def test_decoding_goes_on_where_nothing_can_be_captured(seed, monkeypatch, capsys):
    def refuse():
        raise RuntimeError("no graphs here\nat all")

    model, token, where = random_model(seed), torch.tensor([5, 7]), torch.tensor([2, 3])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Decoder, "captures", True)
    decoder = Decoder([model], [model.new_cache(2, 8)])
    with torch.inference_mode():
        assert (
            not decoder.capture(token, where, 8) and decoder.graph is None and not Decoder.captures
        )
    assert capsys.readouterr().err.count("\n") == 1


def test_the_stream_of_a_capture_that_fails_at_its_end_is_left(seed, monkeypatch):
    """torch's context leaves its own stream only after `capture_end`."""
    begun = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            begun.append(self.name)

        def __exit__(self, *_):
            del begun[begun.index(self.name) :]  # what was in use before it is in use again

    class Graph:
        def capture_begin(self, **_):
            assert begun == ["now", "aside"]

        def capture_end(self):
            raise RuntimeError("operation failed due to a previous error during capture")

    for name, value in {
        "CUDAGraph": Graph,
        "stream": Stream,
        "current_stream": lambda: "now",
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", "aside")
    monkeypatch.setattr(Decoder, "captures", True)
    model = random_model(seed)
    with torch.inference_mode():
        assert not Decoder([model], [model.new_cache(2, 8)]).capture(
            torch.tensor([5, 7]), torch.tensor([2, 3]), 8
        )
    assert begun == []


def test_contrast_by_hand():
    """log p + (log p - log q) among tokens with a tenth of the likeliest one's probability."""
    p, q = torch.tensor([[0.6, 0.3, 0.07, 0.03]]), torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    found = contrast(p.log() + 3, q.log() - 2)[0]
    wanted = [2 * math.log(a) - math.log(b) for a, b in ((0.6, 0.7), (0.3, 0.1), (0.07, 0.1))]
    assert found[:3].tolist() == pytest.approx(wanted, abs=1e-5) and found[3] == -math.inf
    assert found.argmax() == 1, "the bad model's own favourite is what the other finds likely too"


def test_decoding_away_from_another_model_is_greedy_in_the_contrast(seed):
    model, other = random_model(seed), random_model(seed + 1)
    prompts = ragged(seed, 5, 61)
    settings = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=9)
    found, _ = generate(model, prompts, [0] * 5, settings, {2}, amateur=other)
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in tokens:
            with torch.no_grad():
                at = [logits_of(m, torch.tensor([ids]))[:, -1] for m in (model, other)]
            scores = contrast(*at)[0]
            assert scores[token] > scores.max() - 1e-4
            ids.append(token)
    plain, _ = generate(model, prompts, [0] * 5, settings, {2})
    assert plain != found
