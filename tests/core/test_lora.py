"""Adapters against PEFT: the same files, the same logits, the same gradients, the same start."""

import json
import math

import pytest
import torch
from conftest import far, logits_of, random_model
from safetensors.torch import load_file, save_file

from minmacpo import UserError
from minmacpo.config import schema
from minmacpo.core.checkpoint import (
    export_merged,
    load_adapter,
    load_model,
    read_adapter_config,
    save_adapter,
    stop_ids,
)
from minmacpo.core.lora import (
    PEFT_PREFIX,
    TARGET_MODULES,
    LoraConfig,
    attach_lora,
    disable_adapter,
    get_adapter_weights,
    init_adapter,
    lora_params,
    merge_adapter,
    set_adapter_weights,
)

SETTINGS = {
    "paper": LoraConfig(),
    "all layers": LoraConfig(r=3, alpha=7.0, targets=TARGET_MODULES),
    "wide": LoraConfig(r=16, alpha=4.0, targets=("down_proj",)),
    "rank one": LoraConfig(r=1, alpha=1.5, targets=("o_proj", "k_proj")),
}


@pytest.fixture(params=SETTINGS)
def settings(request) -> LoraConfig:
    return SETTINGS[request.param]


def fill(model, seed: int, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """Put a random adapter, B too, into the model; returns it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, tensor in get_adapter_weights(model).items():
        tensors[key] = scale * torch.randn(tensor.shape, generator=generator)
    set_adapter_weights(model, tensors)
    return tensors


def tokens_for(model) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (3, 30))


# ---- against PEFT ---------------------------------------------------------------------------


def test_peft_reads_our_adapter_folder(settings, model_folder, tmp_path, seed):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ours = load_model(model_folder)
    tokens = tokens_for(ours)
    base_logits = logits_of(ours, tokens)
    params = attach_lora(ours, settings)
    save_adapter(tmp_path, fill(ours, seed), settings, "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()

    our_logits = logits_of(ours, tokens)
    their_logits = theirs(tokens).logits

    assert far(our_logits, base_logits) > 0.01
    assert far(our_logits, their_logits) <= 1e-5
    upstream = torch.randn_like(our_logits) / our_logits.numel() ** 0.5
    our_logits.backward(upstream)
    their_logits.backward(upstream)
    their_params = {}
    for name, param in theirs.named_parameters():
        if param.requires_grad:
            their_params[name.replace(".default", "")] = param
    assert lora_params(ours).keys() == their_params.keys()
    assert len(params) == len(their_params)
    for key, param in lora_params(ours).items():
        grad = their_params[key].grad
        assert far(param.grad, grad) <= 1e-5 * (1 + grad.abs().max().item()), key
        assert param.grad.abs().max() > 0, key
    for name, param in ours.named_parameters():
        assert ".lora_" in name or param.grad is None, name


def test_we_read_an_adapter_folder_of_peft(settings, model_folder, tmp_path, seed):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    alpha = round(settings.alpha / 2)
    peft_config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=alpha,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
        lora_dropout=0.1,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(base, peft_config).eval()
    theirs.save_pretrained(tmp_path)

    config, base_path = read_adapter_config(tmp_path)

    assert (config.r, config.alpha) == (settings.r, alpha)
    assert set(config.targets) == set(settings.targets)
    assert base_path == str(model_folder)
    ours = load_model(model_folder)
    tokens = tokens_for(ours)
    base_logits = logits_of(ours, tokens)
    attach_lora(ours, config)
    set_adapter_weights(ours, load_adapter(tmp_path))
    assert far(logits_of(ours, tokens), base_logits) > 0.001
    logits = theirs(tokens).logits  # random B makes them large: 1e-5 of their size
    assert far(logits_of(ours, tokens), logits) <= 1e-5 * max(1, float(logits.detach().abs().max()))


def test_a_fresh_adapter_starts_as_pefts_does(model_folder, seed):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    config = peft.LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(base, config))
    model = load_model(model_folder)
    attach_lora(model, LoraConfig(r=64, alpha=64, targets=("q_proj", "down_proj")))

    init_adapter(model, seed)

    ours = get_adapter_weights(model)
    assert ours.keys() == theirs.keys()
    for key in ours:
        for tensor in (ours[key], theirs[key]):
            if "lora_B" in key:
                assert not tensor.any()
                continue
            # uniform between -1 / sqrt(in) and 1 / sqrt(in): the same range and spread
            bound = tensor.shape[1] ** -0.5
            assert 0.95 * bound < tensor.abs().max() <= bound
            assert abs(tensor.std().item() / (bound / math.sqrt(3)) - 1) < 0.1
            assert abs(tensor.mean().item()) < 5 * bound / tensor.numel() ** 0.5


# ---- merging --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_equal_the_slot(settings, tied, seed):
    model = random_model(seed, tie_word_embeddings=tied)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    attach_lora(model, settings)
    fill(model, seed)
    merged = merge_adapter(model, plain)
    assert merged.keys() == plain.keys()
    for name, weight in merged.items():
        assert torch.equal(weight, plain[name]) != (name.split(".")[-2] in settings.targets), name
    bare = random_model(seed, tie_word_embeddings=tied)
    bare.load_state_dict(merged)
    tokens = tokens_for(model)
    assert far(logits_of(bare, tokens), logits_of(model, tokens)) <= 1e-5


def test_an_exported_folder_loads_in_transformers(settings, model_folder, tmp_path, seed):
    transformers = pytest.importorskip("transformers")
    model = load_model(model_folder)
    attach_lora(model, settings)
    fill(model, seed)
    export_merged(model, model_folder, tmp_path / "out/merged")
    theirs, notes = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out/merged", output_loading_info=True
    )
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = tokens_for(model)
    logits = theirs.eval()(tokens).logits
    assert far(logits_of(model, tokens), logits) <= 1e-5 * max(
        1, float(logits.detach().abs().max())
    )
    assert (tmp_path / "out/merged/tokenizer.model").read_bytes() == (
        model_folder / "tokenizer.model"
    ).read_bytes()


def test_an_export_keeps_how_to_talk_to_the_base(model_folder, tmp_path, tokenizer, seed):
    """Stop ids, sampling settings and the chat template are the base's own."""
    generation = {
        "bos_token_id": 1,
        "eos_token_id": [2, 7, 9],
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": True,
    }
    written = {
        "generation_config.json": json.dumps(generation),
        "tokenizer_config.json": json.dumps(
            {"chat_template": "{{ messages[0]['content'] }}!", "legacy": False}
        ),
        "special_tokens_map.json": json.dumps({"eos_token": "</s>"}),
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in written.items():
        (model_folder / name).write_text(text)
    model = load_model(model_folder)
    attach_lora(model, LoraConfig())
    fill(model, seed)
    export_merged(model, model_folder, tmp_path / "merged")
    assert {name: (tmp_path / "merged" / name).read_text() for name in written} == written
    assert (
        stop_ids(tmp_path / "merged", tokenizer) == stop_ids(model_folder, tokenizer) == {2, 7, 9}
    )
    (model_folder / "generation_config.json").unlink()
    export_merged(model, model_folder, tmp_path / "plain")
    ends = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    assert json.loads((tmp_path / "plain/generation_config.json").read_text()) == ends


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
def test_an_export_has_its_bases_dtype_whatever_it_was_loaded_in(
    stored, loaded, model_folder, tmp_path, seed
):
    file = model_folder / "model.safetensors"
    weights = {name: weight.to(stored) for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    model = load_model(model_folder, dtype=loaded)
    attach_lora(model, LoraConfig())
    fill(model, seed)

    dtype = export_merged(model, model_folder, tmp_path / "merged")

    assert dtype == str(stored).removeprefix("torch.")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == weights.keys()
    for name, weight in merged.items():
        assert weight.dtype == stored
        exact = weights[name].float()
        if name.split(".")[-2] in LoraConfig().targets:
            layer = model.get_submodule(name.removesuffix(".weight"))
            exact = exact + layer.scaling * layer.lora_B @ layer.lora_A
        assert torch.equal(weight, exact.to(stored)), name


def test_merging_in_bf16_rounds_once(seed):
    model = random_model(seed).to(torch.bfloat16)
    stored = model.state_dict()
    attach_lora(model, LoraConfig())
    fill(model, seed)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    delta = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    exact = layer.base.weight.double() + delta

    merged = merge_adapter(model, stored)[f"{name}.weight"]

    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


# ---- LoRA parameters ----------------------------------------------------------------------------


def test_a_zero_b_is_the_base_exactly(settings, seed):
    model = random_model(seed)
    tokens = tokens_for(model)
    plain = logits_of(model, tokens)
    attach_lora(model, settings)
    assert torch.equal(logits_of(model, tokens), plain)
    init_adapter(model, seed)
    assert torch.equal(logits_of(model, tokens), plain)
    fill(model, seed)
    assert far(logits_of(model, tokens), plain) > 0.001
    disable_adapter(model)
    assert torch.equal(logits_of(model, tokens), plain)


def test_reading_is_a_copy_and_writing_keeps_the_tensors(settings, seed):
    model = random_model(seed)
    attach_lora(model, settings)
    addresses = {key: param.data_ptr() for key, param in lora_params(model).items()}
    tensors = fill(model, seed)

    copy = get_adapter_weights(model)
    init_adapter(model, seed)
    for key, tensor in tensors.items():
        assert torch.equal(copy[key], tensor), key

    set_adapter_weights(model, copy)
    copy[next(iter(copy))].zero_()
    for key, param in lora_params(model).items():
        assert torch.equal(param, tensors[key]), key
        assert param.data_ptr() == addresses[key], "the optimiser would train another tensor"


def test_a_fresh_adapter_depends_on_its_seed_alone(settings, seed):
    def fresh(model_seed: int, adapter_seed: int, torch_seed: int) -> dict[str, torch.Tensor]:
        model = random_model(model_seed)
        attach_lora(model, settings)
        fill(model, torch_seed)
        torch.manual_seed(torch_seed)
        init_adapter(model, adapter_seed)
        return get_adapter_weights(model)

    first = fresh(seed, 11, torch_seed=0)
    again = fresh(seed + 1, 11, torch_seed=1)
    other = fresh(seed, 12, torch_seed=2)

    for key, tensor in first.items():
        assert torch.equal(tensor, again[key]), key
        assert torch.equal(tensor, other[key]) == key.endswith("lora_B.weight"), key
    # the first A is the generator's first numbers, and every other layer has numbers of its own
    first_key, *rest = (key for key in first if "lora_A" in key)
    expected = torch.empty(first[first_key].shape)
    generator = torch.Generator().manual_seed(11)
    torch.nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=generator)
    assert torch.equal(first[first_key], expected)
    assert not any(torch.equal(first[first_key], first[key]) for key in rest)


def test_training_leaves_the_base_bit_identical(settings, seed):
    model = random_model(seed)
    before = {name: param.clone() for name, param in model.named_parameters()}
    params = attach_lora(model, settings)
    init_adapter(model, seed)
    fresh = get_adapter_weights(model)
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)
    tokens = tokens_for(model)

    for _ in range(3):
        logits_of(model, tokens).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    after = {}
    for name, param in model.named_parameters():
        if ".lora_" not in name:
            after[name.replace(".base.", ".")] = param
    assert after.keys() == before.keys()
    for name, param in after.items():
        assert torch.equal(param, before[name]), name
        assert not param.requires_grad, name
    for key, param in lora_params(model).items():
        assert not torch.equal(param, fresh[key]), key


def test_adapters_are_fp32_beside_a_bf16_base(seed):
    model = random_model(seed).to(torch.bfloat16)
    params = attach_lora(model, LoraConfig())
    fill(model, seed)
    assert {p.dtype for p in params} == {torch.float32}
    hidden = model(tokens_for(model))
    hidden.float().sum().backward()
    assert hidden.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in params)


def test_the_keys_are_pefts(seed):
    model = random_model(seed, num_hidden_layers=1)
    params = attach_lora(model, LoraConfig(r=2, alpha=3.0, targets=("v_proj", "q_proj")))
    stem = f"{PEFT_PREFIX}model.layers.0.self_attn"
    wanted = [
        f"{stem}.{layer}.lora_{side}.weight" for layer in ("q_proj", "v_proj") for side in "AB"
    ]
    assert sorted(lora_params(model)) == sorted(wanted)
    assert [list(p.shape) for p in params] == [[2, 24], [40, 2], [2, 24], [20, 2]]
    assert all(a is b for a, b in zip(params, lora_params(model).values(), strict=True))


@pytest.mark.parametrize(
    "targets", [("q_proj", "w_proj"), ("lm_head",), ("embed_tokens",), ("mlp",), ("norm",), ("",)]
)
def test_a_target_that_is_no_linear_layer_is_refused(targets, seed):
    with pytest.raises(UserError, match=r"lora\.targets"):
        attach_lora(random_model(seed), LoraConfig(targets=targets))


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        ("missing", "lacks"),
        ("one too many", "unexpected"),
        ("transposed", "expected ["),
        ("of a lower rank", "expected ["),
        ("nan", "values that are not finite"),
        ("infinite", "values that are not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(problem, says, seed):
    model = random_model(seed)
    attach_lora(model, LoraConfig())
    tensors = fill(model, seed)
    key = sorted(tensors)[1]
    good = tensors.pop(key)
    if problem == "one too many":
        tensors[key] = good
        tensors[key + "_"] = good
    elif problem == "transposed":
        tensors[key] = good.T
    elif problem == "of a lower rank":
        tensors[key] = good[:, :1]
    elif problem == "nan":
        tensors[key] = good.clone()
        tensors[key][0, 0] = float("nan")
    elif problem == "infinite":
        tensors[key] = good / 0

    with pytest.raises(UserError) as caught:
        set_adapter_weights(model, tensors, "runs/x/adapter")

    text = str(caught.value)
    assert text.startswith("runs/x/adapter: ") and "\n" not in text
    assert says in text and key in text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bases_own_weights_beside_an_adapter_change_nothing(tied, dtype, seed):
    """PEFT saves embedding and head too where it cannot tell whether they are the base's."""
    model = random_model(seed, tie_word_embeddings=tied)
    beside = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        beside[PEFT_PREFIX + name] = model.get_parameter(name).clone()
    name = "model.layers.1.self_attn.q_proj.weight"  # within a LoraLinear
    beside[PEFT_PREFIX + name] = model.get_parameter(name).clone()
    model.to(dtype)
    attach_lora(model, LoraConfig())
    tensors = fill(model, seed)
    init_adapter(model, seed)

    set_adapter_weights(model, tensors | beside)

    for key, tensor in get_adapter_weights(model).items():
        assert torch.equal(tensor, tensors[key])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("model.embed_tokens.weight", lambda weight: weight + 1e-3, "other values"),
        ("lm_head.weight", lambda weight: weight * 2, "other values"),
        ("model.norm.weight", lambda weight: -weight, "other values"),
        ("model.embed_tokens.weight", lambda weight: weight[:-1], "shape [60, 24]"),
        ("lm_head.weight", lambda weight: torch.cat((weight, weight[:3])), "shape [64, 24]"),
    ],
)
def test_other_weights_beside_an_adapter_are_named(name, change, says, seed):
    """A trained or resized embedding: the adapter is for this base, but LoRA is not all of it."""
    model = random_model(seed)
    attach_lora(model, LoraConfig())
    tensors = fill(model, seed)
    before = get_adapter_weights(model)
    tensors[PEFT_PREFIX + name] = change(model.get_parameter(name).detach())

    with pytest.raises(UserError) as caught:
        set_adapter_weights(model, tensors, "runs/x/adapter")

    text = str(caught.value)
    assert text.startswith(f"runs/x/adapter: holds {name} beside the adapter, ")
    assert says in text and "merge_and_unload" in text and "another base" not in text
    for key, tensor in get_adapter_weights(model).items():
        assert torch.equal(tensor, before[key])


def test_what_is_neither_adapter_nor_base_is_named(seed):
    model = random_model(seed)
    attach_lora(model, LoraConfig())
    bias = {f"{PEFT_PREFIX}model.layers.0.self_attn.q_proj.bias": torch.ones(40)}
    with pytest.raises(UserError, match=r"q_proj\.bias beside the adapter, which is neither"):
        set_adapter_weights(model, fill(model, seed) | bias)


def test_an_empty_adapter_is_refused(seed):
    model = random_model(seed)
    attach_lora(model, LoraConfig())
    with pytest.raises(UserError):
        set_adapter_weights(model, {})


class LinearWithoutParameters(torch.nn.Module):
    """A frozen linear whose weight is no parameter, as a quantised one is."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.register_buffer("values", linear.weight.detach().clone())

    def forward(self, x):
        return x @ self.values.T


def test_an_adapter_fits_around_any_frozen_linear_module(seed):
    """It needs in_features, out_features and a forward."""
    tokens = torch.randint(0, 61, (2, 7))

    def logits_and_gradients(model) -> list[torch.Tensor]:
        params = attach_lora(model, LoraConfig(3, 6, ("q_proj",)))
        init_adapter(model, seed)
        with torch.no_grad():
            for param in params:
                param.add_(0.1)
        model(tokens).sum().backward()
        return [model(tokens).detach(), *(param.grad for param in params)]

    other = random_model(seed)
    for block in other.model["layers"]:
        block.self_attn.q_proj = LinearWithoutParameters(block.self_attn.q_proj)

    expected = logits_and_gradients(random_model(seed))
    assert len(expected) == 5  # A and B of two layers
    for result, exact in zip(logits_and_gradients(other), expected, strict=True):
        assert far(result, exact) < 1e-4


def test_the_settings_of_a_run_are_those_of_an_adapter():
    """config and core may not import each other, and say the same."""
    settings = schema.Lora()
    assert LoraConfig(settings.r, settings.alpha, settings.targets) == LoraConfig()
    assert schema.TARGET_MODULES == TARGET_MODULES
