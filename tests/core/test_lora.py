"""The slot against PEFT: the same files, the same logits, the same gradients, the same start."""

import json
import math

import pytest
import torch
from conftest import far, logits_of, random_model

from minmacpo import UserError
from minmacpo.config.schema import Lora
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
    attach_lora,
    disable_adapter,
    get_adapter_weights,
    init_adapter,
    lora_params,
    merged_weights,
    set_adapter_weights,
)

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = {
    "paper": Lora(),
    "all layers": Lora(r=3, alpha=7.0, targets=ALL),
    "wide": Lora(r=16, alpha=4.0, targets=("down_proj",)),
    "rank one": Lora(r=1, alpha=1.5, targets=("o_proj", "k_proj")),
}


@pytest.fixture(params=SETTINGS)
def settings(request) -> Lora:
    return SETTINGS[request.param]


def fill(model, seed: int, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """A random adapter (B too) in the model's slot; returns it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: scale * torch.randn(t.shape, generator=generator)
        for key, t in get_adapter_weights(model).items()
    }
    set_adapter_weights(model, tensors)
    return tensors


def tokens_for(model) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (3, 30))


# ---- against PEFT ---------------------------------------------------------------------------


def test_peft_reads_our_adapter_folder(settings, model_folder, tmp_path, seed):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = load_model(model_folder)
    tokens = tokens_for(ours)
    plain = logits_of(ours, tokens)
    params = attach_lora(ours, settings)
    save_adapter(tmp_path, fill(ours, seed), settings, "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    a, b = logits_of(ours, tokens), theirs(tokens).logits
    assert far(a, plain) > 0.01 and far(a, b) <= 1e-5
    direction = torch.randn_like(a) / a.numel() ** 0.5
    a.backward(direction)
    b.backward(direction)
    wanted = {
        name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad
    }
    assert wanted.keys() == lora_params(ours).keys() and len(params) == len(wanted)
    for key, param in lora_params(ours).items():
        assert far(param.grad, wanted[key].grad) <= 1e-5 * (
            1 + wanted[key].grad.abs().max().item()
        ), key
        assert param.grad.abs().max() > 0, key
    assert all(p.grad is None for n, p in ours.named_parameters() if ".lora_" not in n)


def test_we_read_an_adapter_folder_of_peft(settings, model_folder, tmp_path, seed):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=round(settings.alpha / 2),
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
        lora_dropout=0.1,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    found, named = read_adapter_config(tmp_path)
    assert (found.r, found.alpha, set(found.targets)) == (
        settings.r,
        round(settings.alpha / 2),
        set(settings.targets),
    )
    assert named == str(model_folder)
    ours = load_model(model_folder)
    tokens = tokens_for(ours)
    plain = logits_of(ours, tokens)
    attach_lora(ours, found)
    set_adapter_weights(ours, load_adapter(tmp_path))
    assert far(logits_of(ours, tokens), plain) > 0.001
    logits = theirs(tokens).logits  # random B makes them large: 1e-5 of their size
    assert far(logits_of(ours, tokens), logits) <= 1e-5 * max(1, float(logits.detach().abs().max()))


def test_a_fresh_adapter_starts_as_pefts_does(model_folder, seed):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    config = peft.LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(base, config))
    ours = load_model(model_folder)
    attach_lora(ours, Lora(r=64, alpha=64, targets=("q_proj", "down_proj")))
    init_adapter(ours, seed)
    mine = get_adapter_weights(ours)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        if "lora_B" in key:
            assert not tensor.any() and not theirs[key].any()
        else:  # uniform in ± 1 / sqrt(in): the same range and spread
            bound = tensor.shape[1] ** -0.5
            for found in (tensor, theirs[key]):
                assert 0.95 * bound < found.abs().max() <= bound
                assert abs(found.std().item() / (bound / math.sqrt(3)) - 1) < 0.1
                assert abs(found.mean().item()) < 5 * bound / found.numel() ** 0.5


# ---- merging --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_equal_the_slot(settings, tied, seed):
    model = random_model(seed, tie_word_embeddings=tied)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    attach_lora(model, settings)
    fill(model, seed)
    merged = merged_weights(model)
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
    """Several stop ids, sampling settings and the chat template are the base's, not made up from config.json."""
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
    attach_lora(model, Lora())
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


def test_merging_in_bf16_rounds_once(seed):
    model = random_model(seed).to(torch.bfloat16)
    attach_lora(model, Lora())
    fill(model, seed)
    layer = model.model.layers[0].self_attn.q_proj
    exact = (
        layer.base.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    )
    merged = merged_weights(model)["model.layers.0.self_attn.q_proj.weight"]
    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


# ---- the slot -------------------------------------------------------------------------------


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
    places = {key: p.data_ptr() for key, p in lora_params(model).items()}
    tensors = fill(model, seed)
    copy = get_adapter_weights(model)
    init_adapter(model, seed)
    assert all(torch.equal(copy[key], tensors[key]) for key in tensors)
    set_adapter_weights(model, copy)
    copy[next(iter(copy))].zero_()
    assert all(torch.equal(p, tensors[key]) for key, p in lora_params(model).items())
    assert places == {key: p.data_ptr() for key, p in lora_params(model).items()}, (
        "the optimiser would train another tensor"
    )


def test_a_fresh_adapter_depends_on_its_seed_alone(settings, seed):
    found = []
    for number, (weights, own) in enumerate([(seed, 11), (seed + 1, 11), (seed, 12)]):
        model = random_model(weights)
        attach_lora(model, settings)
        fill(model, number)
        torch.manual_seed(number)
        init_adapter(model, own)
        found.append(get_adapter_weights(model))
    same, other = found[0], found[2]
    assert all(torch.equal(same[key], found[1][key]) for key in same)
    assert all(torch.equal(same[key], other[key]) != key.endswith("lora_A.weight") for key in same)
    first, *rest = (key for key in same if "lora_A" in key)
    wanted = torch.empty(same[first].shape)
    torch.nn.init.kaiming_uniform_(
        wanted, a=math.sqrt(5), generator=torch.Generator().manual_seed(11)
    )
    assert torch.equal(same[first], wanted)
    assert not any(torch.equal(same[first], same[key]) for key in rest), (
        "every layer has numbers of its own"
    )


def test_training_the_slot_leaves_the_base_bit_identical(settings, seed):
    model = random_model(seed)
    before = {name: p.clone() for name, p in model.named_parameters()}
    params = attach_lora(model, settings)
    init_adapter(model, seed)
    fresh = get_adapter_weights(model)
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)
    tokens = tokens_for(model)
    for _ in range(3):
        logits_of(model, tokens).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {
        name.replace(".base.", "."): p
        for name, p in model.named_parameters()
        if ".lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in after.values())
    assert all(not torch.equal(p, fresh[key]) for key, p in lora_params(model).items())


def test_the_slot_is_fp32_beside_a_bf16_base(seed):
    model = random_model(seed).to(torch.bfloat16)
    params = attach_lora(model, Lora())
    fill(model, seed)
    assert {p.dtype for p in params} == {torch.float32}
    hidden = model(tokens_for(model))
    hidden.float().sum().backward()
    assert hidden.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in params)


def test_the_keys_are_pefts(seed):
    model = random_model(seed, num_hidden_layers=1)
    params = attach_lora(model, Lora(r=2, alpha=3.0, targets=("v_proj", "q_proj")))
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
        attach_lora(random_model(seed), Lora(targets=targets))


def test_what_does_not_fit_the_slot_is_refused(seed):
    model = random_model(seed)
    attach_lora(model, Lora())
    good = fill(model, seed)
    key = sorted(good)[1]
    cases = {
        "lacks": {k: v for k, v in good.items() if k != key},
        "unexpected": good | {key + "_": good[key]},
        "expected": good | {key: good[key].T},
        "expected [": good | {key: good[key][:, :1]},
        "not finite": good
        | {
            key: good[key]
            .clone()
            .index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan")))
        },
        "values that are not finite": good | {key: good[key] / 0},
    }
    for word, tensors in cases.items():
        with pytest.raises(UserError) as caught:
            set_adapter_weights(model, tensors, "runs/x/adapter")
        text = str(caught.value)
        assert (
            word in text
            and key in text
            and text.startswith("runs/x/adapter: ")
            and "\n" not in text
        )
    with pytest.raises(UserError):
        set_adapter_weights(model, {})


def test_a_slot_fits_around_any_frozen_linear_module(seed):
    """Such as a quantised one, whose weight is no parameter: it needs in_features, out_features and a forward."""

    class Held(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("values", linear.weight.detach().clone())

        def forward(self, x):
            return x @ self.values.T

    tokens, answers = torch.randint(0, 61, (2, 7)), []
    for held in (False, True):
        model = random_model(seed)
        for block in model.model["layers"] if held else ():
            block.self_attn.q_proj = Held(block.self_attn.q_proj)
        params = attach_lora(model, Lora(3, 6, ("q_proj",)))
        init_adapter(model, seed)
        with torch.no_grad():
            for param in params:
                param.add_(0.1)
        model(tokens).sum().backward()
        answers.append([model(tokens).detach(), *(param.grad for param in params)])
    assert all(far(a, b) < 1e-4 for a, b in zip(*answers, strict=True)) and len(answers[0]) == 5
