"""Prompts that answers share are read once; decoding reads only the used part of a cache."""

import pytest
import torch
from conftest import ragged, random_model
from test_sampling import SAMPLED, WAYS, new

from minmacpo.core import sampling
from minmacpo.core.model import Transformer
from minmacpo.core.sampling import generate, prefill


@pytest.mark.parametrize("way", WAYS)
def test_shared_prompts_are_read_once_and_answer_as_if_alone(way, monkeypatch):
    model = random_model(4)
    a, b, c = ragged(4, 3, 61, 2, 20)
    prompts = [b, a, b, c, a, b]
    stops = {2, 7, 11, 20}
    passes = []
    forward = Transformer.forward

    def recorded(self, tokens, **inputs):
        passes.append(tuple(tokens.shape))
        return forward(self, tokens, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "forward", recorded)
        answers, logps = generate(model, prompts, range(6), WAYS[way], stops)

    longest = max(len(prompt) for prompt in prompts)
    assert passes[:2] == [(3, longest), (6, 1)]  # three prompts are read, six rows decoded
    for seed, prompt in enumerate(prompts):
        alone, logp = generate(model, [prompt], [seed], WAYS[way], stops)
        assert alone == [answers[seed]]
        assert logp[0] == pytest.approx(logps[seed], abs=1e-4)


@torch.inference_mode()
def test_rows_of_one_prompt_have_caches_of_their_own():
    (logits,), (cache,) = prefill([random_model(1)], [[5, 6, 7], [8], [5, 6, 7]], 4)
    assert cache.length == 7
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(cache.data[:, :, 0], cache.data[:, :, 2])

    cache.data[:, :, 0] = 1
    assert not torch.equal(cache.data[:, :, 0], cache.data[:, :, 2])


@pytest.mark.parametrize("step", [1, 3, 64])
def test_reading_only_the_used_part_of_the_cache_changes_nothing(step, monkeypatch):
    model = random_model(9)
    prompts = ragged(9, 5, 61, 1, 12)
    settings = new(SAMPLED, max_new_tokens=40)
    expected, expected_logps = generate(model, prompts, range(5), settings, {3})

    monkeypatch.setattr(sampling, "CACHE_STEP", step)
    answers, logps = generate(model, prompts, range(5), settings, {3})

    assert answers == expected
    assert logps == pytest.approx(expected_logps, abs=1e-4)
