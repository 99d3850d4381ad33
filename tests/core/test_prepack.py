"""The packed twin is the model: products, single tokens' attention, whole answers; a model's bytes decide nothing else."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import far, ragged, random_model
from test_sampling import WAYS, new

from minmacpo.config.schema import Lora
from minmacpo.core import prepack as packed
from minmacpo.core import sampling
from minmacpo.core.lora import LoraLinear, attach_lora, lora_params, set_adapter_weights
from minmacpo.core.model import CACHE_ALIGN
from minmacpo.core.prepack import PrepackedLinear, can_prepack, multiplies_bf16, prepack
from minmacpo.core.sampling import generate, prefill
from minmacpo.kernels.attention import decode_attention, gqa_decode_attention

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
IN_BF16 = pytest.mark.skipif(
    not multiplies_bf16(), reason="oneDNN repacks no bf16 on this CPU, and can_prepack() says so"
)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=IN_BF16)]


@pytest.fixture
def small_too(monkeypatch):
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 300])
@torch.inference_mode()
def test_a_packed_linear_is_the_linear_at_any_number_of_rows(dtype, bias, rows, seed):
    linear = torch.nn.Linear(48, 80, bias=bias).to(dtype)
    x = torch.randn(rows, 3, 48).to(dtype)
    wanted = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    found = PrepackedLinear(linear, linear.weight, 16)(x)
    assert found.dtype == dtype and far(found.double(), wanted) <= (
        1e-5 if dtype == torch.float32 else 0.02
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_one_query_attends_as_sdpa_has_it(kv_heads, seed):
    q, k, v = (
        torch.randn(5, 6, 1, 8),
        torch.randn(5, kv_heads, 20, 8),
        torch.randn(5, kv_heads, 20, 8),
    )
    mask = torch.arange(20) <= torch.randint(0, 20, (5, 1, 1, 1))
    wanted = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, enable_gqa=True
    )
    assert (
        far(decode_attention(q, k, v, mask).double(), wanted) <= 1e-5
        and far(gqa_decode_attention(q, k, v, mask).double(), wanted) <= 1e-5
    )
    k, v = (
        each.transpose(2, 3).contiguous().transpose(2, 3) for each in (k, v)
    )  # as a packed twin's cache lies
    assert far(decode_attention(q, k, v, mask).double(), wanted) <= 1e-5


def test_a_twins_logits_depend_on_neither_the_rows_beside_nor_the_room_left(seed):
    model, prompts = random_model(seed), ragged(seed, 7, 61, 1, 90)
    with torch.inference_mode():
        twin, found = prepack(model, 7), []
        for rows, room in (((0, 1, 2, 3, 4, 5, 6), 150), ((3,), 1), ((1, 3), 40)):
            (first,), (cache,) = prefill([twin], [prompts[i] for i in rows], room)
            assert (
                cache.length % CACHE_ALIGN == 0
                and cache.select_rows(torch.tensor([0])).data.stride()[4]
                == cache.data.stride()[4]
                == 1
            )
            where = torch.tensor([len(prompts[i]) for i in rows])
            step = twin(torch.tensor(rows)[:, None], positions=where, cache=cache)
            found.append((first[rows.index(3)], step[rows.index(3)]))
    assert all(
        far(*pair) <= 1e-5 for other in found[1:] for pair in zip(found[0], other, strict=True)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fixed", [1, 2])
def test_packed_answers_are_the_plain_ones_in_a_batch_and_alone(way, fixed, small_too, monkeypatch):
    model, prompts, settings = (
        random_model(fixed),
        ragged(fixed, 7, 61, 1, 25),
        new(WAYS[way], max_new_tokens=30),
    )
    assert can_prepack(model)
    ids, logps = generate(model, prompts, range(7), settings, {5, 9, 13})
    for i, prompt in enumerate(prompts):
        alone, summed = generate(model, [prompt], [i], settings, {5, 9, 13})
        assert alone == [ids[i]] and summed[0] == pytest.approx(logps[i], abs=1e-4)
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 10**9)
    plain, summed = generate(model, prompts, range(7), settings, {5, 9, 13})
    assert plain == ids and summed == pytest.approx(logps, abs=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_has_the_adapter_and_leaves_the_model_alone(dtype, seed):
    model, tokens = random_model(seed).to(dtype), torch.randint(0, 61, (3, 9))
    attach_lora(model, Lora(targets=("q_proj", "down_proj")))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.inference_mode():
        bare = prepack(model, 4)(tokens)
        set_adapter_weights(
            model, {key: torch.randn(t.shape) * 0.3 for key, t in lora_params(model).items()}
        )
        twin = prepack(model, 4)
        assert (
            sum(type(m) is PrepackedLinear for m in twin.modules())
            == 7 * model.config.num_hidden_layers + 1
        )
        assert sum(type(m) is LoraLinear for m in twin.modules()) == (
            0 if dtype == torch.float32 else 4
        )
        assert not any(type(m) is PrepackedLinear for m in model.modules())
        assert far(twin(tokens), model(tokens)) <= (1e-4 if dtype == torch.float32 else 0.2)
        assert far(twin(tokens), bare) > 0.3
    assert all(
        torch.equal(t, before[key]) for key, t in model.state_dict().items() if ".lora_" not in key
    )


def test_a_torch_without_onednn_is_said_once(monkeypatch, capsys):
    packed.warn_without_onednn.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not can_prepack(random_model(0)) and not capsys.readouterr().err, (
        "a small model would not be packed anyway"
    )
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 0)
    assert not can_prepack(random_model(0)) and not can_prepack(random_model(0))
    assert capsys.readouterr().err.count("no oneDNN") == 1
    packed.warn_without_onednn.cache_clear()


def test_small_and_huge_models_and_other_dtypes_stay_plain(monkeypatch):
    model = random_model(0)
    assert not can_prepack(model), "the built-in world's runs keep their bytes"
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 0)
    assert can_prepack(model) and not can_prepack(random_model(0).to(torch.float16))
    monkeypatch.setattr(packed, "MAX_WEIGHTS", 10)
    assert not can_prepack(model)


# ---- prompts that rows share --------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_shared_prompts_are_read_once_and_answer_as_if_alone(way, monkeypatch):
    model, (a, b, c), read = random_model(4), ragged(4, 3, 61, 2, 20), []
    prompts, seeds = [b, a, b, c, a, b], range(6)
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, tokens, **kw: read.append(tokens.shape) or forward(self, tokens, **kw),
    )
    ids, logps = generate(model, prompts, seeds, WAYS[way], {2, 7, 11, 20})
    assert read[0] == (3, max(map(len, (a, b, c)))) and read[1] == (6, 1)
    for prompt, seed, row, logp in zip(prompts, seeds, ids, logps, strict=True):
        alone, summed = generate(model, [prompt], [seed], WAYS[way], {2, 7, 11, 20})
        assert alone == [row] and summed[0] == pytest.approx(logp, abs=1e-4)


@torch.inference_mode()
def test_rows_of_one_prompt_have_caches_of_their_own():
    logits, caches = prefill([random_model(1)], [[5, 6, 7], [8], [5, 6, 7]], 4)
    assert torch.equal(logits[0][0], logits[0][2]) and torch.equal(
        caches[0].data[:, :, 0], caches[0].data[:, :, 2]
    )
    caches[0].data[:, :, 0] = 1
    assert caches[0].length == 7 and not torch.equal(
        caches[0].data[:, :, 0], caches[0].data[:, :, 2]
    )


@pytest.mark.parametrize("room", [1, 3, 64])
def test_reading_only_the_used_part_of_the_cache_changes_nothing(room, monkeypatch):
    model, settings = random_model(9), dataclasses.replace(WAYS["sampled"], max_new_tokens=40)
    prompts = ragged(9, 5, 61, 1, 12)
    wanted, logps = generate(model, prompts, range(5), settings, {3})
    monkeypatch.setattr(sampling, "CACHE_STEP", room)
    found, summed = generate(model, prompts, range(5), settings, {3})
    assert found == wanted and summed == pytest.approx(logps, abs=1e-4)
