"""Every family against transformers and PEFT: logits, gradients, greedy text, adapters, exports."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import REPO, far, logits_of, ragged

from minmacpo import UserError
from minmacpo.core.checkpoint import (
    export_merged,
    load_adapter,
    load_model,
    read_adapter_config,
    save_adapter,
)
from minmacpo.core.lora import (
    PEFT_PREFIX,
    TARGET_MODULES,
    LoraConfig,
    attach_lora,
    get_adapter_weights,
    lora_params,
    set_adapter_weights,
)
from minmacpo.core.sampling import SamplingParams, generate
from minmacpo.kernels.fused_logps import sequence_logps

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CONTEXT = 24  # positions of pre-training, for scaled ropes; the texts here are longer


@dataclass(frozen=True)
class Family:
    """A small model of a family, as transformers is asked for it."""

    kind: str  # of transformers' classes: LlamaConfig, LlamaForCausalLM
    heads: int
    kv_heads: int
    head_dim: int | None  # None: hidden / heads
    hidden: int
    rope: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)  # other fields of its config


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
FULL_YARN = {
    "rope_type": "yarn",
    "factor": 6.0,
    "beta_fast": 8.0,
    "beta_slow": 2.0,
    "mscale": 0.8,
    "mscale_all_dim": 0.3,
    "truncate": False,
}
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 6}
UPPER_WINDOW = QWEN_WINDOW | {"max_window_layers": 1}
MIDDLE_WINDOW = QWEN_WINDOW | {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"]
}

NO_ROPE = {"no_rope_layers": [0, 1, 0]}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0}
BOTH_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
SCALED_GLOBAL = BOTH_ROPES | {"full_attention": LINEAR}
GEMMA = {"sliding_window": 7, "sliding_window_pattern": 3, "query_pre_attn_scalar": 17}
MIDDLE_FULL = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA_UNTIED = GEMMA | BIASED | {"tie_word_embeddings": False, "hidden_activation": "silu"}

# fmt: off
FAMILIES = {
    "llama 1": Family("Llama", 3, 3, None, 18),
    "llama biased": Family("Llama", 4, 1, 6, 20, more=BIASED | {"mlp_bias": True}),
    "llama 3.2, tied": Family("Llama", 4, 2, 16, 24, rope=LLAMA3_ROPE, more=TIED),
    "linear": Family("Llama", 2, 2, 14, 28, rope={"rope_type": "linear", "factor": 2.5}),
    "mistral": Family("Mistral", 4, 2, 10, 24, more={"sliding_window": None}),
    "mistral, window": Family("Mistral", 6, 3, 4, 22, more={"sliding_window": 7}),
    "mistral, narrow window": Family("Mistral", 2, 1, 8, 12, more={"sliding_window": 2}),
    "qwen2": Family("Qwen2", 4, 2, None, 24, more=TIED),
    "qwen2, yarn": Family("Qwen2", 2, 1, None, 32, rope=YARN),
    "qwen2, upper window": Family("Qwen2", 3, 1, None, 24, more=UPPER_WINDOW),
    "qwen3": Family("Qwen3", 4, 2, 12, 20, more=TIED),
    "qwen3, biased": Family("Qwen3", 6, 2, 6, 14, more=BIASED),
    "qwen3, layer types": Family("Qwen3", 2, 2, 10, 16, more=MIDDLE_WINDOW),
    "qwen3, yarn as written": Family("Qwen3", 2, 1, 24, 16, rope=FULL_YARN),
    "smollm3": Family("SmolLM3", 4, 2, None, 24, more=TIED | {"no_rope_layer_interval": 2}),
    "smollm3, named layers": Family("SmolLM3", 2, 1, None, 20, more=NO_ROPE | BIASED),
    "smollm3, windows": Family("SmolLM3", 4, 1, None, 24, more=QWEN_WINDOW | NO_ROPE),
    "smollm3, yarn": Family("SmolLM3", 2, 2, None, 16, rope=YARN, more=NO_ROPE),
    "gemma3": Family("Gemma3", 4, 2, 10, 24, rope=BOTH_ROPES, more=GEMMA),
    "gemma3, scaled": Family("Gemma3", 2, 1, 12, 20, rope=SCALED_GLOBAL, more=GEMMA | MIDDLE_FULL),
    "gemma3, untied": Family("Gemma3", 3, 1, 8, 24, rope=BOTH_ROPES, more=GEMMA_UNTIED),
    "olmo2": Family("Olmo2", 4, 2, None, 24),
    "olmo2, tied": Family("Olmo2", 3, 3, None, 18, rope=YARN, more=TIED | BIASED),
}
# fmt: on


def write_family(name: str, folder: Path, **saving):
    """A transformers model of the family with random weights, saved in the folder."""
    family = FAMILIES[name]
    rope = family.rope
    if "full_attention" not in rope:
        rope = {"rope_theta": 500.0, "rope_type": "default"} | rope
    if rope.get("rope_type") in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = CONTEXT
    config = {
        "vocab_size": 61,
        "hidden_size": family.hidden,
        "intermediate_size": family.hidden + 11,
        "num_hidden_layers": 3,
        "num_attention_heads": family.heads,
        "num_key_value_heads": family.kv_heads,
        "max_position_embeddings": 160,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "initializer_range": 0.25,
    }
    if family.head_dim is not None:
        config["head_dim"] = family.head_dim
    text = "Text" if family.kind == "Gemma3" else ""
    config_class = getattr(transformers, f"{family.kind}{text}Config")
    model_class = getattr(transformers, f"{family.kind}ForCausalLM")
    model = model_class(config_class(**config | family.more)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms and biases, which start as ones and zeros
                weight.add_(0.3 * torch.randn(weight.shape))
    model.save_pretrained(folder, **saving)
    return model


@pytest.fixture(params=FAMILIES)
def family(request, seed, tmp_path):
    """transformers' model, and its folder with one file of weights, or with shards."""
    sharded = {"max_shard_size": "9KB"} if seed % 2 else {}
    return write_family(request.param, tmp_path / "base", **sharded), tmp_path / "base"


def with_peft_adapter(theirs, folder: Path, seed: int, **changes):
    """PEFT's model with a random adapter around `theirs`, saved in the folder."""
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    model = peft.get_peft_model(theirs, peft.LoraConfig(**settings | changes)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    return model


def load_with_adapter(base: Path, adapter: Path):
    """Our model of a base folder with the adapter of another."""
    model = load_model(base)
    attach_lora(model, read_adapter_config(adapter)[0])
    set_adapter_weights(model, load_adapter(adapter), str(adapter))
    return model


def tolerance(logits: torch.Tensor) -> float:
    """1e-5, or 1e-5 of the largest logit where that is more than 1."""
    return 1e-5 * max(1, float(logits.detach().abs().max()))


@torch.no_grad()
def greedy_text(ours, theirs, seed: int, new_tokens: int) -> tuple[list[int], list[int]]:
    """A prompt and our greedy answer, checked beside four others to be what transformers would say.

    Only where its two likeliest are equal within rounding may they part.
    """
    prompts = ragged(seed, 5, 61, 1, 30)
    settings = SamplingParams(temperature=0.0, max_new_tokens=new_tokens)
    answers, _ = generate(ours, prompts, range(5), settings, set())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == new_tokens
        logits = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 2e-5, (prompt, answer)
    return prompts[0], answers[0]


# ---- bases --------------------------------------------------------------------------------------


def test_logits_and_every_gradient_equal_transformers(family):
    theirs, folder = family
    ours = load_model(folder).requires_grad_(True)
    tokens = torch.randint(0, 61, (3, 90))

    our_logits = logits_of(ours, tokens)
    their_logits = theirs(tokens).logits

    assert their_logits.std() > 0.1, "the oracle's logits are too flat to prove anything"
    assert far(our_logits, their_logits) <= tolerance(their_logits)
    upstream = torch.randn_like(our_logits) / our_logits.numel() ** 0.5
    our_logits.backward(upstream)
    their_logits.backward(upstream)
    their_params = dict(theirs.named_parameters())
    assert set(dict(ours.named_parameters())) == set(their_params)
    for name, param in ours.named_parameters():
        grad = their_params[name].grad
        assert far(param.grad, grad) <= 2e-5 * (1 + grad.abs().max().item()), name


@torch.no_grad()
def test_greedy_text_equals_transformers(family, seed):
    theirs, folder = family
    prompt, answer = greedy_text(load_model(folder), theirs, seed, 64)

    tokens = theirs.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    for place, expected in enumerate(tokens[0, len(prompt) :].tolist()):
        if answer[place] != expected:
            before = torch.tensor([prompt + answer[:place]])
            top = theirs(before).logits[0, -1].topk(2).values
            assert top[0] - top[1] < 2e-5
            break


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype, seed, tmp_path):
    write_family("qwen2", tmp_path).to(dtype).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_model(tmp_path)
    tokens = torch.randint(0, 61, (2, 50))
    assert {param.dtype for param in ours.parameters()} == {torch.float32}
    assert far(logits_of(ours, tokens), theirs.eval()(tokens).logits) <= 1e-5

    in_bf16 = load_model(tmp_path, dtype=torch.bfloat16)
    assert {param.dtype for param in in_bf16.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama 1", "smollm3", "gemma3", "gemma3, scaled", "olmo2"])
@torch.no_grad()
def test_logits_in_bf16_are_as_fine_as_those_of_transformers(name, seed, tmp_path):
    """Measured squared errors: 0.8 to 1.2 of theirs; OLMo-2, with angles in bf16, up to 1.5."""
    write_family(name, tmp_path).bfloat16().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = torch.randint(0, 61, (8, 60))
    exact = logits_of(load_model(tmp_path), tokens)

    our_error = (logits_of(load_model(tmp_path, dtype=torch.bfloat16), tokens) - exact).square()
    their_error = (theirs.eval()(tokens).logits - exact).square()

    assert 0 < our_error.mean() <= 2 * their_error.mean()


def test_the_older_spelling_of_every_rope(family):
    folder = family[1]
    newer = load_model(folder).config
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    if "full_attention" in rope:  # Gemma's two
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    raw["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    raw["rope_scaling"] = None if rope["type"] == "default" else rope
    raw["torch_dtype"] = raw.pop("dtype")
    (folder / "config.json").write_text(json.dumps(raw))

    assert load_model(folder).config == newer


YARN_ALONE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": YARN_ALONE},
        {"rope_parameters": YARN_ALONE, "original_max_position_embeddings": CONTEXT},
        {"rope_parameters": YARN_ALONE | {"attn_factor": 1.0}},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500.0}},
        {"hidden_act": "swish", "auto_map": {"AutoConfig": "x.Y"}, "loss_type": "ForCausalLM"},
    ],
)
@torch.no_grad()
def test_other_ways_to_say_it_in_config_json(changes, seed, tmp_path):
    write_family("llama 1", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 61, (3, 90))
    logits = theirs(tokens).logits
    assert far(logits_of(load_model(tmp_path), tokens), logits) <= tolerance(logits)


@torch.no_grad()
def test_a_model_saved_without_its_head_has_names_without_a_prefix(seed, tmp_path):
    """As AutoModel saves it; a tied model lacks nothing."""
    theirs = write_family("qwen2", tmp_path)
    theirs.model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 61, (3, 60))
    logits = theirs(tokens).logits
    ours = load_model(tmp_path)
    assert far(logits_of(ours, tokens), logits) <= tolerance(logits)

    attach_lora(ours, LoraConfig())
    export_merged(ours, tmp_path, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert far(merged(tokens).logits, logits) <= tolerance(logits)


def test_the_text_part_of_gemma_3_with_images_is_saved_as_the_docs_say(seed, tmp_path, monkeypatch):
    page = (REPO / "docs/models.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    text = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 7,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in whole.parameters():
            weight.normal_(std=0.2)
    whole.save_pretrained(tmp_path / "gemma-3-4b-it")
    with pytest.raises(UserError, match=r"gemma3.*docs/models\.md"):
        load_model(tmp_path / "gemma-3-4b-it")
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "docs/models.md", "exec"), {})

    tokens = torch.randint(1, 58, (3, 30))
    logits = whole(input_ids=tokens).logits
    ours = load_model(tmp_path / "gemma-3-4b-text")
    assert far(logits_of(ours, tokens), logits) <= tolerance(logits)


# ---- adapters -----------------------------------------------------------------------------------


def test_an_adapter_of_peft(family, seed, tmp_path):
    """Logits, greedy text, scores, and the adapter's gradients through the fused loss."""
    theirs = with_peft_adapter(family[0], tmp_path / "adapter", seed)
    ours = load_with_adapter(family[1], tmp_path / "adapter")
    tokens = torch.randint(0, 61, (4, 70))
    logits = theirs(tokens).logits
    assert far(logits_of(ours, tokens), logits) <= tolerance(logits)
    greedy_text(ours, theirs, seed, 24)

    mask = torch.rand(4, 70) < 0.5
    our_scores = sequence_logps(ours, tokens, mask)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    their_scores = (logps * mask[:, 1:]).sum(1)
    assert far(our_scores, their_scores) <= 1e-5 * float(their_scores.detach().abs().max())

    weights = torch.randn(4) / 50
    (our_scores * weights).sum().backward()
    (their_scores * weights).sum().backward()
    their_grads = {}
    for name, param in theirs.named_parameters():
        if "lora_" in name:
            their_grads[name.replace(".default", "")] = param.grad
    assert lora_params(ours).keys() == their_grads.keys()
    for key, param in lora_params(ours).items():
        grad = their_grads[key]
        assert far(param.grad, grad) <= 2e-5 * (1 + grad.abs().max().item()), key


def test_our_adapter_in_peft_and_merged(family, seed, tmp_path):
    theirs, base = family
    ours = load_model(base)
    config = LoraConfig(4, 6, TARGET_MODULES)
    attach_lora(ours, config)
    torch.manual_seed(seed)
    adapter = {}
    for key, tensor in get_adapter_weights(ours).items():
        adapter[key] = 0.05 * torch.randn(tensor.shape)
    set_adapter_weights(ours, adapter)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", adapter, config, "../base")
    for name in ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"):
        (base / name).write_text(name)
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (base / name).write_text(name)

    export_merged(ours, base, tmp_path / "merged")

    # the merged folder is the base's in everything but its weights
    base_config = json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "merged/config.json").read_text()) == base_config
    base_files = {file.name for file in base.iterdir() if "safetensors" not in file.name}
    merged_files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert base_files == merged_files - {"model.safetensors"}

    # all four ways to load it compute the same
    tokens = torch.randint(0, 61, (3, 80))
    logits = logits_of(ours, tokens)
    assert far(logits, logits_of(load_model(base), tokens)) > 0.01
    again = load_model(tmp_path / "merged")
    merged, notes = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not notes[problem], problem
    assert type(merged) is type(theirs)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert far(logits, adapted(tokens).logits) <= tolerance(logits)
    # the sum of two products, and the product with a sum, are rounded at different places
    assert far(logits, logits_of(again, tokens)) <= 2 * tolerance(logits)
    assert far(logits, merged.eval()(tokens).logits) <= 2 * tolerance(logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(1|2)\.self_attn\.[qv]_proj"},
        {"target_modules": ["self_attn.o_proj", "model.layers.1.mlp.up_proj"]},
        {"use_rslora": True, "r": 6},
        {"lora_alpha": 1, "r": 1, "init_lora_weights": "gaussian"},
        {"target_modules": r"model\.layers\.0\.mlp\.\w+_proj", "use_rslora": True},
    ],
)
def test_every_way_to_say_what_is_adapted(changes, seed, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    theirs = with_peft_adapter(write_family("qwen2", base), adapter, seed, **changes)
    tokens = torch.randint(0, 61, (3, 40))
    logits = theirs(tokens).logits

    ours = load_with_adapter(base, adapter)

    assert far(logits_of(ours, tokens), logits) <= tolerance(logits)
    assert far(logits, logits_of(load_model(base), tokens)) > 1e-3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*merge_and_unload"),
        ({"trainable_token_indices": [3, 5]}, "trainable_token_indices.*merge_and_unload"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ".*(q_proj|lm_head)"}, "lm_head"),
        ({"bias": "lora_only"}, "bias"),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(changes, named, seed, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with_peft_adapter(write_family("qwen3", base), adapter, seed, **changes)
    with pytest.raises(UserError, match=named):
        load_with_adapter(base, adapter)


@pytest.mark.parametrize("name", ["llama 1", "qwen3", "gemma3, untied"])
def test_embeddings_that_peft_saves_beside_an_adapter(name, seed, tmp_path):
    """They are the base's own where PEFT cannot tell; resized ones are named."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    theirs = with_peft_adapter(write_family(name, base), adapter, seed)
    theirs.save_pretrained(adapter, save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_adapter(adapter))
    tokens = torch.randint(0, 61, (3, 40))
    logits = theirs(tokens).logits
    ours = load_with_adapter(base, adapter)
    assert far(logits_of(ours, tokens), logits) <= tolerance(logits)

    theirs.base_model.model.resize_token_embeddings(64)
    theirs.save_pretrained(adapter, save_embedding_layers=True)
    with pytest.raises(UserError, match=r"\[64, \d+\], and the base has \[61, .*merge_and_unload"):
        load_with_adapter(base, adapter)


@pytest.mark.parametrize("other", ["qwen3, biased", "llama 1", "mistral"])
def test_an_adapter_for_another_base_is_refused(other, seed, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_family("qwen3", base)
    with_peft_adapter(write_family(other, tmp_path / "other"), adapter, seed)
    with pytest.raises(UserError, match="another base"):
        load_with_adapter(base, adapter)


def test_the_prefix_of_keys_is_pefts(seed, tmp_path):
    adapter = tmp_path / "adapter"
    with_peft_adapter(write_family("qwen3", tmp_path / "base"), adapter, seed)
    assert all(key.startswith(PEFT_PREFIX) for key in load_adapter(adapter))
