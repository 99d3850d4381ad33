"""A prepacked copy is its model: in single products, in logits, and in whole answers."""

import pytest
import torch
import torch.nn.functional as F
from conftest import far, ragged, random_model
from test_packing import MODELS
from test_sampling import WAYS, new

from minmacpo.core import prepack as prepack_module
from minmacpo.core.lora import (
    LoraConfig,
    LoraLinear,
    attach_lora,
    lora_params,
    set_adapter_weights,
)
from minmacpo.core.model import CACHE_ALIGN
from minmacpo.core.prepack import PrepackedLinear, can_prepack, multiplies_bf16, prepack
from minmacpo.core.sampling import SamplingParams, generate, prefill

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
IN_BF16 = pytest.mark.skipif(
    not multiplies_bf16(), reason="oneDNN repacks no bf16 on this CPU, and can_prepack() says so"
)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=IN_BF16)]


@pytest.fixture
def prepack_small_models(monkeypatch):
    monkeypatch.setattr(prepack_module, "MIN_WEIGHTS", 0)


def count(model: torch.nn.Module, kind: type) -> int:
    """How many modules of a class the model has."""
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 300])
@torch.inference_mode()
def test_a_prepacked_linear_is_the_linear_at_any_number_of_rows(dtype, bias, rows, seed):
    linear = torch.nn.Linear(48, 80, bias=bias).to(dtype)
    x = torch.randn(rows, 3, 48).to(dtype)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)

    y = PrepackedLinear(linear, linear.weight, 16)(x)

    assert y.dtype == dtype
    assert far(y.double(), exact) <= (1e-5 if dtype == torch.float32 else 0.02)


@torch.inference_mode()
def test_logits_depend_on_neither_the_rows_beside_nor_the_room_left(seed):
    model = random_model(seed)
    prompts = ragged(seed, 7, 61, 1, 90)
    packed = prepack(model, 7)

    logits = []  # of row 3, after its prompt and after one more token
    for rows, room in (([0, 1, 2, 3, 4, 5, 6], 150), ([3], 1), ([1, 3], 40)):
        (first,), (cache,) = prefill([packed], [prompts[row] for row in rows], room)
        positions = torch.tensor([len(prompts[row]) for row in rows])
        second = packed(torch.tensor(rows)[:, None], positions=positions, cache=cache)
        place = rows.index(3)
        logits.append((first[place], second[place]))
        # positions lie side by side in memory, in the cache of some of the rows too
        assert cache.length % CACHE_ALIGN == 0
        assert cache.data.stride(4) == 1
        assert cache.select_rows(torch.tensor([0])).data.stride(4) == 1

    for first, second in logits[1:]:
        assert far(first, logits[0][0]) <= 1e-5
        assert far(second, logits[0][1]) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fixed", [1, 2])  # fixed, so that no draw can fall on a rounding error
def test_answers_are_those_of_the_plain_model_in_a_batch_and_alone(
    way, fixed, prepack_small_models, monkeypatch
):
    model = random_model(fixed)
    prompts = ragged(fixed, 7, 61, 1, 25)
    settings = new(WAYS[way], max_new_tokens=30)
    stops = {5, 9, 13}
    assert can_prepack(model)

    answers, logps = generate(model, prompts, range(7), settings, stops)

    for seed, prompt in enumerate(prompts):
        alone, logp = generate(model, [prompt], [seed], settings, stops)
        assert alone == [answers[seed]]
        assert logp[0] == pytest.approx(logps[seed], abs=1e-4)
    monkeypatch.setattr(prepack_module, "MIN_WEIGHTS", 10**9)
    plain, plain_logps = generate(model, prompts, range(7), settings, stops)
    assert plain == answers
    assert plain_logps == pytest.approx(logps, abs=1e-4)


@pytest.mark.parametrize("kind", ["window", "smollm3", "gemma3", "olmo2"])
@pytest.mark.parametrize("fixed", [1, 2])
def test_answers_of_every_family(kind, fixed, prepack_small_models, monkeypatch):
    model = random_model(fixed, **MODELS[kind])
    prompts = ragged(fixed, 5, 61, 1, 25)
    settings = SamplingParams(temperature=0.9, max_new_tokens=30)
    assert can_prepack(model)
    answers, logps = generate(model, prompts, range(5), settings, {5, 9})

    monkeypatch.setattr(prepack_module, "MIN_WEIGHTS", 10**9)
    plain, plain_logps = generate(model, prompts, range(5), settings, {5, 9})

    assert plain == answers
    assert plain_logps == pytest.approx(logps, abs=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_copy_has_the_adapter_and_leaves_the_model_alone(dtype, seed):
    model = random_model(seed).to(dtype)
    tokens = torch.randint(0, 61, (3, 9))
    attach_lora(model, LoraConfig(targets=("q_proj", "down_proj")))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    without_adapter = prepack(model, 4)(tokens)
    adapter = {key: torch.randn(param.shape) * 0.3 for key, param in lora_params(model).items()}
    set_adapter_weights(model, adapter)

    packed = prepack(model, 4)

    # every linear of two layers, and the head; in fp32 the adapters are merged into them
    assert count(packed, PrepackedLinear) == 7 * model.config.num_hidden_layers + 1
    assert count(packed, LoraLinear) == (0 if dtype == torch.float32 else 4)
    assert far(packed(tokens), model(tokens)) <= (1e-4 if dtype == torch.float32 else 0.2)
    assert far(packed(tokens), without_adapter) > 0.3

    assert count(model, PrepackedLinear) == 0
    for key, tensor in model.state_dict().items():
        if ".lora_" not in key:
            assert torch.equal(tensor, before[key]), key


def test_a_torch_without_onednn_is_told_once(monkeypatch, capsys):
    prepack_module.warn_without_onednn.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_prepack(random_model(0))
    assert not capsys.readouterr().err, "a small model would not be prepacked anyway"

    monkeypatch.setattr(prepack_module, "MIN_WEIGHTS", 0)
    assert not can_prepack(random_model(0))
    assert not can_prepack(random_model(0))
    assert capsys.readouterr().err.count("no oneDNN") == 1
    prepack_module.warn_without_onednn.cache_clear()


def test_small_and_huge_models_and_other_dtypes_stay_plain(monkeypatch):
    model = random_model(0)
    assert not can_prepack(model), "the built-in world's runs keep their bytes"

    monkeypatch.setattr(prepack_module, "MIN_WEIGHTS", 0)
    assert can_prepack(model)
    assert not can_prepack(random_model(0).to(torch.float16))

    monkeypatch.setattr(prepack_module, "MAX_WEIGHTS", 10)
    assert not can_prepack(model)
