"""Every family against transformers: logits, gradients, greedy text, adapters, scores, exports; published config files."""

import functools
import json

import pytest
import torch
from conftest import far, logits_of, ragged

from minmacpo import UserError
from minmacpo.config.schema import LINEARS, Lora
from minmacpo.core.checkpoint import (
    export_merged,
    load_adapter,
    load_model,
    read_adapter_config,
    save_adapter,
)
from minmacpo.core.lora import attach_lora, get_adapter_weights, set_adapter_weights
from minmacpo.core.model_config import parse_config
from minmacpo.core.sampling import SamplingParams, generate
from minmacpo.kernels.fused_logps import sequence_logps

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
QWEN_WINDOW = dict(use_sliding_window=True, sliding_window=6)
FAMILIES = {  # transformers' config class, heads, key heads, head_dim, hidden, what else it says
    "llama 1": ("Llama", 3, 3, None, 18, {}),
    "llama biased": ("Llama", 4, 1, 6, 20, dict(attention_bias=True, mlp_bias=True)),
    "llama 3.2, tied": ("Llama", 4, 2, 16, 24, dict(rope=LLAMA3, tie_word_embeddings=True)),
    "linear": ("Llama", 2, 2, 14, 28, dict(rope=dict(rope_type="linear", factor=2.5))),
    "mistral": ("Mistral", 4, 2, 10, 24, dict(sliding_window=None)),
    "mistral, window": ("Mistral", 6, 3, 4, 22, dict(sliding_window=7)),
    "mistral, narrow window": ("Mistral", 2, 1, 8, 12, dict(sliding_window=2)),
    "qwen2": ("Qwen2", 4, 2, None, 24, dict(tie_word_embeddings=True)),
    "qwen2, yarn": ("Qwen2", 2, 1, None, 32, dict(rope=dict(rope_type="yarn", factor=4.0))),
    "qwen2, upper window": ("Qwen2", 3, 1, None, 24, QWEN_WINDOW | dict(max_window_layers=1)),
    "qwen3": ("Qwen3", 4, 2, 12, 20, dict(tie_word_embeddings=True)),
    "qwen3, biased": ("Qwen3", 6, 2, 6, 14, dict(attention_bias=True)),
    "qwen3, layer types": (
        "Qwen3",
        2,
        2,
        10,
        16,
        QWEN_WINDOW | dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
    ),
    "qwen3, yarn as written": (
        "Qwen3",
        2,
        1,
        24,
        16,
        dict(
            rope=dict(
                rope_type="yarn",
                factor=6.0,
                beta_fast=8.0,
                beta_slow=2.0,
                mscale=0.8,
                mscale_all_dim=0.3,
                truncate=False,
            )
        ),
    ),
}
CONTEXT = 24  # of pre-training; the texts here are longer


def write_family(name: str, folder, **saving):
    """A transformers model of the family with random weights, norms and biases too, saved in the folder."""
    kind, heads, keys, dim, hidden, more = FAMILIES[name]
    rope = {"rope_theta": 500.0, "rope_type": "default"} | more.get("rope", {})
    if rope["rope_type"] in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = CONTEXT
    values = dict(
        vocab_size=61,
        hidden_size=hidden,
        intermediate_size=hidden + 11,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=160,
        rope_parameters=rope,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.25,
    )
    values |= {k: v for k, v in more.items() if k != "rope"} | ({"head_dim": dim} if dim else {})
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**values)
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn(weight.shape))
    model.save_pretrained(folder, **saving)
    return model


@pytest.fixture(params=FAMILIES)
def family(request, seed, tmp_path):
    """(transformers' model, its folder: one file, or shards)."""
    sharded = {"max_shard_size": "9KB"} if seed % 2 else {}
    return write_family(request.param, tmp_path / "base", **sharded), tmp_path / "base"


def adapted(theirs, folder, seed: int, **changes):
    """(PEFT's model with a random adapter around `theirs`, the folder it was saved in)."""
    settings = dict(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(theirs, peft.LoraConfig(**settings | changes)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    return model


def with_adapter(base, folder):
    """Our model of `base` with the adapter of `folder`."""
    model = load_model(base)
    attach_lora(model, read_adapter_config(folder)[0])
    set_adapter_weights(model, load_adapter(folder), str(folder))
    return model


@torch.no_grad()
def greedy_holds(ours, theirs, seed: int) -> None:
    """64 tokens after each of several ragged prompts, decoded side by side, are what transformers finds likeliest."""
    prompts = ragged(seed, 5, 61, 1, 30)
    found = generate(
        ours, prompts, range(5), SamplingParams(temperature=0.0, max_new_tokens=64), set()
    )[0]
    for prompt, row in zip(prompts, found, strict=True):
        assert len(row) == 64
        logits = theirs(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1]
        lost = logits.amax(-1) - logits.gather(-1, torch.tensor(row)[:, None])[:, 0]
        assert lost.max() < 2e-5, (prompt, row)  # 0, but where two logits are equal within rounding
    prompt, row = prompts[0], found[0]
    given = dict(
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=64,
    )
    whole = theirs.generate(
        input_ids=torch.tensor([prompt]), eos_token_id=None, pad_token_id=0, **given
    )[0, len(prompt) :].tolist()
    parts = next((i for i, (a, b) in enumerate(zip(row, whole, strict=True)) if a != b), 64)
    if parts < 64:
        top = theirs(torch.tensor([prompt + row[:parts]])).logits[0, -1].topk(2).values
        assert top[0] - top[1] < 2e-5


# ---- against transformers and PEFT ----------------------------------------------------------


def test_logits_and_every_gradient_equal_transformers(family):
    theirs, folder = family
    ours = load_model(folder)
    tokens = torch.randint(0, 61, (3, 90))
    a, b = logits_of(ours, tokens), theirs(tokens).logits
    assert b.std() > 0.1 and far(a, b) <= 1e-5 * max(1, float(b.detach().abs().max()))
    direction = torch.randn_like(a) / a.numel() ** 0.5
    ours.requires_grad_(True)
    logits_of(ours, tokens).backward(direction)
    b.backward(direction)
    wanted = dict(theirs.named_parameters())
    assert set(dict(ours.named_parameters())) == set(wanted)
    for name, weight in ours.named_parameters():
        size = 1 + wanted[name].grad.abs().max().item()
        assert far(weight.grad, wanted[name].grad) <= 2e-5 * size, name


def test_greedy_text_equals_transformers(family, seed):
    theirs, folder = family
    greedy_holds(load_model(folder), theirs, seed)


def test_an_adapter_of_peft(family, seed, tmp_path):
    """Logits, greedy text, scores and the slot's gradients through the fused loss, over biased linears too."""
    theirs = adapted(family[0], tmp_path / "adapter", seed)
    ours = with_adapter(family[1], tmp_path / "adapter")
    tokens = torch.randint(0, 61, (4, 70))
    logits = theirs(tokens).logits
    assert far(logits_of(ours, tokens), logits) <= 1e-5 * max(1, float(logits.detach().abs().max()))
    greedy_holds(ours, theirs, seed)
    mask = torch.rand(4, 70) < 0.5
    mine = sequence_logps(ours, tokens, mask)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    true = (logps * mask[:, 1:]).sum(1)
    assert far(mine, true) <= 1e-5 * float(true.detach().abs().max())
    weights = torch.randn(4) / 50
    (mine * weights).sum().backward()
    (true * weights).sum().backward()
    wanted = {
        k.replace(".default", ""): p.grad for k, p in theirs.named_parameters() if "lora_" in k
    }
    for name, weight in ours.named_parameters():
        if ".lora_" in name:
            grad = wanted[f"base_model.model.{name}.weight"]
            assert far(weight.grad, grad) <= 2e-5 * (1 + grad.abs().max().item()), name


def test_our_adapter_in_peft_and_merged(family, seed, tmp_path):
    theirs, base = family
    ours, config = load_model(base), Lora(4, 6, LINEARS)
    attach_lora(ours, config)
    torch.manual_seed(seed)
    set_adapter_weights(
        ours, {key: 0.05 * torch.randn(t.shape) for key, t in get_adapter_weights(ours).items()}
    )
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", get_adapter_weights(ours), config, "../base")
    for name in (
        "tokenizer.model",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "special_tokens_map.json",
    ):
        (base / name).write_text(name)
    export_merged(ours, base, tmp_path / "merged")
    tokens = torch.randint(0, 61, (3, 80))
    mine = logits_of(ours, tokens)
    bound = 1e-5 * max(1, float(mine.detach().abs().max()))
    again = logits_of(load_model(tmp_path / "merged"), tokens)
    merged, notes = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(merged) is type(theirs)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (base, tmp_path / "merged")
    )
    assert before == after
    assert {f.name for f in base.iterdir() if "safetensors" not in f.name} == {
        f.name for f in (tmp_path / "merged").iterdir()
    } - {"model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    for found in (again, merged.eval()(tokens).logits, loaded(tokens).logits):
        assert far(mine, found) <= bound
    assert far(mine, logits_of(load_model(base), tokens)) > 0.01


@pytest.mark.parametrize(
    "changes",
    [
        dict(target_modules="all-linear"),
        dict(target_modules=r".*\.(1|2)\.self_attn\.[qv]_proj"),
        dict(target_modules=["self_attn.o_proj", "model.layers.1.mlp.up_proj"]),
        dict(use_rslora=True, r=6),
        dict(lora_alpha=1, r=1, init_lora_weights="gaussian"),
        dict(target_modules=r"model\.layers\.0\.mlp\.\w+_proj", use_rslora=True),
    ],
)
def test_every_way_to_say_what_is_adapted(changes, seed, tmp_path):
    theirs = adapted(
        write_family("qwen2", tmp_path / "base"), tmp_path / "adapter", seed, **changes
    )
    tokens = torch.randint(0, 61, (3, 40))
    ours, logits = with_adapter(tmp_path / "base", tmp_path / "adapter"), theirs(tokens).logits
    assert far(logits_of(ours, tokens), logits) <= 1e-5 * max(1, float(logits.detach().abs().max()))
    assert far(logits, logits_of(load_model(tmp_path / "base"), tokens)) > 1e-3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(use_dora=True), "use_dora"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (dict(layers_to_transform=[1]), "layers_to_transform"),
        (dict(target_modules=["q_proj", "embed_tokens"]), "embed_tokens"),
        (dict(target_modules=["q_proj", "lm_head"]), "lm_head"),
        (dict(target_modules=".*(q_proj|lm_head)"), "lm_head"),
        (dict(bias="lora_only"), "bias"),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(changes, says, seed, tmp_path):
    adapted(write_family("qwen3", tmp_path / "base"), tmp_path / "adapter", seed, **changes)
    with pytest.raises(UserError, match=says):
        with_adapter(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("other", ["qwen3, biased", "llama 1", "mistral"])
def test_an_adapter_for_another_base_is_refused(other, seed, tmp_path):
    write_family("qwen3", tmp_path / "base")
    adapted(write_family(other, tmp_path / "other"), tmp_path / "adapter", seed)
    with pytest.raises(UserError, match="another base"):
        with_adapter(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype, seed, tmp_path):
    write_family("qwen2", tmp_path).to(dtype).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours, tokens = load_model(tmp_path), torch.randint(0, 61, (2, 50))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert far(logits_of(ours, tokens), theirs(tokens).logits) <= 1e-5
    assert {p.dtype for p in load_model(tmp_path, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def test_the_older_spelling_of_every_rope(family, seed):
    folder = family[1]
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    raw |= {
        "rope_scaling": None if kind == "default" else rope | {"type": kind},
        "torch_dtype": raw.pop("dtype"),
    }
    newer = load_model(folder).config
    (folder / "config.json").write_text(json.dumps(raw))
    assert load_model(folder).config == newer


# ---- config files as published --------------------------------------------------------------

COMMON = dict(
    hidden_act="silu",
    initializer_range=0.02,
    transformers_version="4.45.0",
    use_cache=True,
    torch_dtype="bfloat16",
)
sized = functools.partial(dict, **COMMON)
PUBLISHED = {
    "llama 1": dict(
        architectures=["LLaMAForCausalLM"],
        bos_token_id=0,
        eos_token_id=1,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=11008,
        initializer_range=0.02,
        max_sequence_length=2048,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=32,
        pad_token_id=-1,
        rms_norm_eps=1e-06,
        torch_dtype="float16",
        transformers_version="4.27.0.dev0",
        use_cache=True,
        vocab_size=32000,
    ),
    "llama 2": sized(
        _name_or_path="meta-llama/Llama-2-7b-hf",
        architectures=["LlamaForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=4096,
        intermediate_size=11008,
        max_position_embeddings=4096,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        tie_word_embeddings=False,
        vocab_size=32000,
    ),
    "vicuna 16k": sized(
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=4096,
        intermediate_size=11008,
        max_position_embeddings=4096,
        max_sequence_length=16384,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        pad_token_id=0,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling={"factor": 4.0, "type": "linear"},
        tie_word_embeddings=False,
        vocab_size=32000,
    ),
    "llama 3.1": sized(
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=131072,
        mlp_bias=False,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        tie_word_embeddings=False,
        vocab_size=128256,
    ),
    "llama 3.2, newer": dict(
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        dtype="bfloat16",
        eos_token_id=128001,
        head_dim=64,
        hidden_act="silu",
        hidden_size=2048,
        initializer_range=0.02,
        intermediate_size=8192,
        max_position_embeddings=131072,
        mlp_bias=False,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=16,
        num_key_value_heads=8,
        pad_token_id=None,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_parameters={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rope_type": "llama3",
        },
        tie_word_embeddings=True,
        transformers_version="5.0.0",
        use_cache=True,
        vocab_size=128256,
    ),
    "smollm2": {
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}
    }
    | sized(
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=576,
        intermediate_size=1536,
        is_llama_config=True,
        max_position_embeddings=8192,
        mlp_bias=False,
        model_type="llama",
        num_attention_heads=9,
        num_hidden_layers=30,
        num_key_value_heads=3,
        pad_token_id=2,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        tie_word_embeddings=True,
        vocab_size=49152,
    ),
    "mistral 0.1": sized(
        architectures=["MistralForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=32768,
        model_type="mistral",
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=10000.0,
        sliding_window=4096,
        tie_word_embeddings=False,
        vocab_size=32000,
    ),
    "mistral nemo": sized(
        architectures=["MistralForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        head_dim=128,
        hidden_size=5120,
        intermediate_size=14336,
        max_position_embeddings=131072,
        model_type="mistral",
        num_attention_heads=32,
        num_hidden_layers=40,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
        vocab_size=131072,
    ),
    "qwen 2.5": sized(
        architectures=["Qwen2ForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=151643,
        eos_token_id=151643,
        hidden_size=896,
        intermediate_size=4864,
        max_position_embeddings=32768,
        max_window_layers=24,
        model_type="qwen2",
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=True,
        use_mrope=False,
        use_sliding_window=False,
        vocab_size=151936,
    ),
    "qwen 2.5, long": sized(
        architectures=["Qwen2ForCausalLM"],
        bos_token_id=151643,
        eos_token_id=151645,
        hidden_size=3584,
        intermediate_size=18944,
        max_position_embeddings=32768,
        max_window_layers=28,
        model_type="qwen2",
        num_attention_heads=28,
        num_hidden_layers=28,
        num_key_value_heads=4,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        sliding_window=131072,
        tie_word_embeddings=False,
        use_sliding_window=False,
        vocab_size=152064,
    ),
    "qwen 3": sized(
        architectures=["Qwen3ForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=151643,
        eos_token_id=151645,
        head_dim=128,
        hidden_size=1024,
        intermediate_size=3072,
        max_position_embeddings=40960,
        max_window_layers=28,
        model_type="qwen3",
        num_attention_heads=16,
        num_hidden_layers=28,
        num_key_value_heads=8,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        tie_word_embeddings=True,
        use_sliding_window=False,
        vocab_size=151936,
    ),
    "qwen 3, newer": dict(
        architectures=["Qwen3ForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=151643,
        dtype="bfloat16",
        eos_token_id=151645,
        head_dim=128,
        hidden_act="silu",
        hidden_size=2560,
        initializer_range=0.02,
        intermediate_size=9728,
        layer_types=["full_attention"] * 36,
        max_position_embeddings=262144,
        max_window_layers=36,
        model_type="qwen3",
        num_attention_heads=32,
        num_hidden_layers=36,
        num_key_value_heads=8,
        pad_token_id=None,
        rms_norm_eps=1e-06,
        rope_parameters={"rope_theta": 5000000, "rope_type": "default"},
        sliding_window=None,
        tie_word_embeddings=True,
        transformers_version="5.1.0",
        use_cache=True,
        use_sliding_window=False,
        vocab_size=151936,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_files_are_understood(name):
    config, raw = parse_config(PUBLISHED[name], "x"), PUBLISHED[name]
    assert config.qk_norm == (raw["model_type"] == "qwen3") and config.qkv_bias == (
        raw["model_type"] == "qwen2"
    )
    assert not (config.o_bias or config.mlp_bias)
    assert config.sliding_windows == ((4096,) * 32 if name == "mistral 0.1" else ())
    assert config.head_dim == raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    assert config.max_position_embeddings == raw.get("max_position_embeddings", 2048)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    assert config.rope_theta == rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    assert config.rope_scaling.rope_type == (rope.get("rope_type") or rope.get("type") or "default")
    assert config.rope_scaling.factor == rope.get("factor", 1.0)


WRONG = {
    "llama 2": [
        dict(sliding_window=4096),
        dict(layer_types=["full_attention"] * 32),
        dict(rope_interleaved=True),
        dict(num_local_experts=8),
        dict(head_dim=None, num_attention_heads=30),
        dict(rope_scaling={"type": "linear", "factor": 0}),
        dict(rope_scaling={"type": "linear", "factor": "4"}),
        dict(rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 4.0}),
        dict(rope_scaling={"type": "yarn", "factor": 4.0}),
        dict(rope_scaling={"type": "longrope", "long_factor": [1.0]}),
        dict(partial_rotary_factor=0.5),
        dict(tie_word_embeddings="no"),
        dict(rope_theta=1.0),
        dict(rms_norm_eps=float("nan")),
        dict(rope_theta=float("nan")),
        dict(
            rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"}
        ),
        dict(
            rope_scaling={
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 99,
                "beta_slow": 0,
            }
        ),
        dict(rope_scaling={"full_attention": {"rope_type": "default"}}),
    ],
    "llama 3.1": [
        {"rope_scaling": PUBLISHED["llama 3.1"]["rope_scaling"] | change}
        for change in (
            {"low_freq_factor": 4.0},
            {"beta_fast": 32},
            {"original_max_position_embeddings": 8192.0},
            {"factor": float("nan")},
        )
    ],
    "mistral 0.1": [
        dict(sliding_window=0),
        dict(sliding_window="4096"),
        dict(attention_bias=True),
        dict(attn_logit_softcapping=30.0),
    ],
    "qwen 2.5": [
        dict(use_mrope=True),
        dict(layer_types=["full_attention"]),
        dict(layer_types=["sliding_attention"] * 24),
        dict(layer_types=["linear_attention"] * 24),
        dict(use_sliding_window="yes"),
        dict(dual_chunk_attention_config={"chunk_size": 1}),
        dict(use_sliding_window=True, max_window_layers="3"),
        dict(quantization_config={"quant_method": "awq", "x": "y" * 500}),
    ],
    "qwen 3": [dict(mlp_bias=True), dict(attention_bias=3), dict(num_experts=128)],
}


@pytest.mark.parametrize(
    ("name", "changes"), [(name, change) for name, changes in WRONG.items() for change in changes]
)
def test_a_field_that_is_not_understood_is_named(name, changes):
    with pytest.raises(UserError) as caught:
        parse_config(PUBLISHED[name] | changes, "here/config.json")
    text = str(caught.value)
    assert text.startswith("here/config.json: ") and "\n" not in text and len(text) < 300
    assert any(word in text for word in [*changes, "sizes"]), text


def test_an_absent_field_means_what_transformers_takes_it_for(seed, tmp_path):
    """Mistral has a window, Qwen3 heads of 128, and both their own number of key heads, unless they say otherwise."""
    for name in ("Mistral", "Qwen2", "Qwen3"):
        known = getattr(transformers, f"{name}Config")()
        raw = dict(
            model_type=name.lower(),
            vocab_size=9,
            hidden_size=4096,
            intermediate_size=8,
            num_hidden_layers=30,
            num_attention_heads=32,
            max_position_embeddings=64,
        )
        found = parse_config(raw, "x")
        for field in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
            assert getattr(found, field) == getattr(known, field), (name, field)
        assert (
            found.head_dim == getattr(known, "head_dim", 128)
            and found.rope_theta == known.rope_parameters["rope_theta"]
        )
        off = parse_config(
            raw | {"use_sliding_window": False}, "x"
        )  # of no meaning for Mistral, there as here
        assert off == found
        assert found.sliding_windows == ((known.sliding_window,) * 30 if name == "Mistral" else ())
        sliding = (
            parse_config(raw | {"use_sliding_window": True}, "x").sliding_windows
            if "Qwen" in name
            else ()
        )
        assert sliding in ((), (None,) * 28 + (4096,) * 2) and bool(sliding) == ("Qwen" in name)
