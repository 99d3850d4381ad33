"""What config.json files say: published ones are understood, and other things refused by name."""

import pytest
import torch
from conftest import config_of

from minmacpo import UserError
from minmacpo.core.lora import TARGET_MODULES
from minmacpo.core.model import ACTIVATIONS, Transformer
from minmacpo.core.model_config import (
    COMMON_FIELDS,
    FAMILIES,
    SUPPORTED_VALUES,
    parse_config,
)

# config.json as published by the makers of each model
# fmt: off
PUBLISHED = {
    "llama 1": {
        "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "initializer_range": 0.02, "max_sequence_length": 2048, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1,
        "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0",
        "use_cache": True, "vocab_size": 32000,
    },
    "llama 2": {
        "hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.45.0",
        "use_cache": True, "torch_dtype": "bfloat16", "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "vicuna 16k": {
        "hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.45.0",
        "use_cache": True, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "max_sequence_length": 16384, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 4.0,
        "type": "linear"}, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "llama 3.1": {
        "hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.45.0",
        "use_cache": True, "torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "llama 3.2, newer": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "dtype": "bfloat16", "eos_token_id": 128001, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pad_token_id": None, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_parameters": {"factor": 32.0, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
        "rope_type": "llama3"}, "tie_word_embeddings": True, "transformers_version": "5.0.0",
        "use_cache": True, "vocab_size": 128256,
    },
    "smollm2": {
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.45.0",
        "use_cache": True, "torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "mistral 0.1": {
        "hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.45.0",
        "use_cache": True, "torch_dtype": "bfloat16", "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "mistral nemo": {
        "hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.45.0",
        "use_cache": True, "torch_dtype": "bfloat16", "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128,
        "hidden_size": 5120, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 131072,
    },
    "qwen 2.5": {
        "hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.45.0",
        "use_cache": True, "torch_dtype": "bfloat16", "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen 2.5, long": {
        "hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.45.0",
        "use_cache": True, "torch_dtype": "bfloat16", "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768,
        "type": "yarn"}, "sliding_window": 131072, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 152064,
    },
    "qwen 3": {
        "hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.45.0",
        "use_cache": True, "torch_dtype": "bfloat16", "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen 3, newer": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 9728, "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 262144, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "pad_token_id": None, "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 5000000,
        "rope_type": "default"}, "sliding_window": None, "tie_word_embeddings": True,
        "transformers_version": "5.1.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
        "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "gemma 3": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
    },
    "gemma 3, newer": {
        "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "bos_token_id": 2, "dtype": "bfloat16", "eos_token_id": 1,
        "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_parameters": {
        "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}},
        "sliding_window": 512, "tie_word_embeddings": True, "transformers_version": "5.1.0",
        "use_bidirectional_attention": False, "use_cache": True, "vocab_size": 262144,
    },
    "olmo 2": {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "use_cache": True,
        "vocab_size": 100352,
    },
}
# fmt: on


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_files_are_understood(name):
    raw = PUBLISHED[name]
    config = parse_config(raw, "x")

    norms = {"qwen3": "head", "gemma3_text": "head", "olmo2": "width"}
    assert config.qk_norm == norms.get(raw["model_type"], "none")
    assert config.qkv_bias == (raw["model_type"] == "qwen2")
    assert not config.o_bias and not config.mlp_bias
    if raw["model_type"] != "gemma3_text":
        assert config.sliding_windows == ((4096,) * 32 if name == "mistral 0.1" else ())
    if raw["model_type"] == "smollm3":
        assert config.layer_ropes == ("global", "global", "global", "none") * 9
    hidden_per_head = raw["hidden_size"] // raw["num_attention_heads"]
    assert config.head_dim == raw.get("head_dim", hidden_per_head)
    assert config.max_position_embeddings == raw.get("max_position_embeddings", 2048)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    assert config.rope_theta == rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    assert config.rope_scaling.rope_type == rope_type
    assert config.rope_scaling.factor == rope.get("factor", 1.0)


@pytest.mark.parametrize("name", ["gemma 3", "gemma 3, newer"])
def test_five_of_six_layers_of_gemma_are_local(name):
    config = parse_config(PUBLISHED[name], "x")
    assert config.layer_ropes[:7] == ("local",) * 5 + ("global", "local")
    assert config.sliding_windows[:7] == (512,) * 5 + (None, 512)
    assert config.local_rope_theta == 10000 and config.rope_theta == 1_000_000
    assert config.embedding_scale == PUBLISHED[name]["hidden_size"] ** 0.5
    assert config.hidden_act == "gelu_pytorch_tanh" and config.tie_word_embeddings
    assert config.offset_norms and config.norms == "around"


# ---- what is refused ----------------------------------------------------------------------------

SMALL = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def refused(raw: dict, *words: str) -> None:
    """The config is refused in one sentence, which names the file and one of the words."""
    with pytest.raises(UserError) as caught:
        parse_config(raw, "here/config.json")
    text = str(caught.value)
    assert text.startswith("here/config.json: ") and "\n" not in text and len(text) < 300
    assert any(word in text for word in words), text


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"sliding_window": 4096},
        {"attention_bias": "yes"},
        {"mlp_bias": 2},
        {"hidden_act": "gelu"},
        {"quantization_config": {"bits": 4}},
        {"num_experts": 8},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
        {"rope_parameters": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": 5}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": "default"},
        {"rope_theta": "10000"},
        {"rope_theta": -1.0},
        {"rms_norm_eps": None},
        {"num_key_value_heads": 3},
        {"head_dim": 5},
        {"hidden_size": "24"},
        {"hidden_size": True},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"vocab_size": 40.0},
        {"vocab_size": 10**18},
        {"intermediate_size": None},
    ],
)
def test_a_value_that_is_not_supported_is_refused_by_its_fields_name(changes):
    nested = changes.get("rope_parameters")
    names = [*changes, *nested] if isinstance(nested, dict) else list(changes)
    refused(SMALL | changes, *names)


@pytest.mark.parametrize("absent", [name for name in SMALL if name != "num_key_value_heads"])
def test_a_size_that_is_missing_is_named(absent):
    raw = {name: value for name, value in SMALL.items() if name != absent}
    refused(raw, absent)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 99}
LLAMA3 = PUBLISHED["llama 3.1"]["rope_scaling"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama 2", {"sliding_window": 4096}),
        ("llama 2", {"layer_types": ["sliding_attention"] * 32}),
        ("llama 2", {"rope_interleaved": True}),
        ("llama 2", {"num_local_experts": 8}),
        ("llama 2", {"head_dim": None, "num_attention_heads": 30}),
        ("llama 2", {"rope_scaling": {"type": "linear", "factor": 0}}),
        ("llama 2", {"rope_scaling": {"type": "linear", "factor": "4"}}),
        ("llama 2", {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}}),
        ("llama 2", {"rope_scaling": YARN, "original_max_position_embeddings": 98}),
        ("llama 2", {"rope_scaling": YARN | {"extrapolation_factor": 2.0}}),
        ("llama 2", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}),
        ("llama 2", {"rope_scaling": YARN | {"beta_slow": 0}}),
        ("llama 2", {"rope_scaling": YARN | {"beta_slow": 40.0}}),
        ("llama 2", {"rope_scaling": {"full_attention": {"rope_type": "default"}}}),
        (
            "llama 2",
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default"},
            },
        ),
        ("llama 2", {"partial_rotary_factor": 0.5}),
        ("llama 2", {"tie_word_embeddings": "no"}),
        ("llama 2", {"rope_theta": 1.0}),
        ("llama 2", {"rope_theta": float("nan")}),
        ("llama 2", {"rms_norm_eps": float("nan")}),
        ("llama 3.1", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}),
        ("llama 3.1", {"rope_scaling": LLAMA3 | {"beta_fast": 32}}),
        ("llama 3.1", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192.0}}),
        ("llama 3.1", {"rope_scaling": LLAMA3 | {"factor": float("nan")}}),
        ("mistral 0.1", {"sliding_window": 0}),
        ("mistral 0.1", {"sliding_window": "4096"}),
        ("mistral 0.1", {"attention_bias": True}),
        ("mistral 0.1", {"layer_types": ["full_attention"] * 32}),
        ("mistral 0.1", {"attn_logit_softcapping": 30.0}),
        ("qwen 2.5", {"use_mrope": True}),
        ("qwen 2.5", {"layer_types": ["full_attention"]}),
        ("qwen 2.5", {"layer_types": ["sliding_attention"] * 24}),
        ("qwen 2.5", {"layer_types": ["linear_attention"] * 24}),
        ("qwen 2.5", {"use_sliding_window": "yes"}),
        ("qwen 2.5", {"dual_chunk_attention_config": {"chunk_size": 1}}),
        ("qwen 2.5", {"use_sliding_window": True, "max_window_layers": "3"}),
        ("qwen 2.5", {"quantization_config": {"quant_method": "awq", "x": "y" * 500}}),
        ("qwen 3", {"mlp_bias": True}),
        ("qwen 3", {"attention_bias": 3}),
        ("qwen 3", {"num_experts": 128}),
        ("smollm3", {"no_rope_layers": [1] * 35}),
        ("smollm3", {"no_rope_layers": [1, 2] * 18}),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}),
        ("smollm3", {"layer_types": ["sliding_attention"] * 36}),
        ("gemma 3", {"final_logit_softcapping": 30.0}),
        ("gemma 3", {"attn_logit_softcapping": 50.0}),
        ("gemma 3", {"use_bidirectional_attention": True}),
        ("gemma 3", {"hidden_activation": "gelu"}),
        ("gemma 3", {"hidden_activation": None}),
        ("gemma 3", {"query_pre_attn_scalar": 0}),
        ("gemma 3", {"rope_local_base_freq": "10000"}),
        ("gemma 3", {"sliding_window_pattern": 0}),
        ("gemma 3", {"sliding_window": None, "layer_types": ["sliding_attention"] * 26}),
        ("gemma 3, newer", {"rope_parameters": {"full_attention": {}, "other": {}}}),
        ("gemma 3, newer", {"rope_parameters": {"sliding_attention": LLAMA3}}),
        ("llama 2", {"no_rope_layers": [1] * 32}),
        ("llama 2", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("llama 2", {"query_pre_attn_scalar": 256}),
        ("olmo 2", {"clip_qkv": 8.0}),
        ("olmo 2", {"sliding_window": 4096}),
    ],
)
def test_a_change_of_a_published_file_that_is_not_understood_is_named(name, changes):
    refused(PUBLISHED[name] | changes, *changes)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("value", [None, False, 0, 0.0, 1.0, "", [], {}])
def test_an_unknown_field_that_says_that_something_is_not_there(name, value):
    """Also a field that another family knows: it is not mistaken for this one's."""
    raw = PUBLISHED[name]
    others = set().union(*(family.defaults for family in FAMILIES.values()))
    others -= FAMILIES[raw["model_type"]].defaults.keys() | set(COMMON_FIELDS)
    added = {field: value for field in ("residual_multiplier", "num_experts", *others)}

    assert parse_config(raw | added, "x") == parse_config(raw, "x")


@pytest.mark.parametrize("name", ["llama 2", "olmo 2"])
def test_layer_types_without_windows_change_nothing(name):
    raw = PUBLISHED[name]
    types = {"layer_types": ["full_attention"] * 32}
    assert parse_config(raw | types, "x") == parse_config(raw, "x")


@pytest.mark.parametrize("value", [True, 1, 2.0, "x", [1], {"a": 0}])
def test_an_unknown_field_that_says_something_is_named(value):
    refused(SMALL | {"residual_multiplier": value}, "residual_multiplier")


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "olmo", "gemma", "phi3"])
def test_other_models_are_refused_by_name(name):
    """Gemma 3 with images has a text part that can be saved by itself."""
    refused(SMALL | {"model_type": name}, name)
    with pytest.raises(UserError, match="docs/models.md" if name == "gemma3" else "only llama"):
        parse_config(SMALL | {"model_type": name}, "x")


def test_notes_and_training_settings_change_nothing():
    notes = {
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "architectures": ["LlamaForCausalLM"],
        "pad_token_id": 7,
    }
    plain = parse_config(SMALL, "x")
    assert parse_config(SMALL | notes, "x") == plain
    assert plain.head_dim == 6


# ---- defaults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma3Text", "Olmo2"]
)
def test_every_field_of_transformers_at_its_default_is_understood(family):
    """In a file with them all, and with any of them left out."""
    transformers = pytest.importorskip("transformers")
    defaults = getattr(transformers, f"{family}Config")().to_dict()
    config = parse_config(defaults, "x")

    assert config.bos_token_id == defaults["bos_token_id"]
    assert config.eos_token_id == defaults["eos_token_id"]
    for absent in defaults.keys() - SMALL.keys():
        shorter = {name: value for name, value in defaults.items() if name != absent}
        assert parse_config(shorter, "x") == config, absent


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_an_absent_field_means_what_transformers_takes_it_for(family):
    """Mistral has a window, Qwen3 heads of 128, and each its own number of key heads."""
    transformers = pytest.importorskip("transformers")
    defaults = getattr(transformers, f"{family}Config")()
    raw = {
        "model_type": family.lower(),
        "vocab_size": 9,
        "hidden_size": 4096,
        "intermediate_size": 8,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "max_position_embeddings": 64,
    }

    config = parse_config(raw, "x")

    assert config.num_key_value_heads == defaults.num_key_value_heads
    assert config.rms_norm_eps == defaults.rms_norm_eps
    assert config.tie_word_embeddings == defaults.tie_word_embeddings
    assert config.head_dim == getattr(defaults, "head_dim", 128)
    assert config.rope_theta == defaults.rope_parameters["rope_theta"]
    # a window is what Mistral has and Qwen can switch on, for its last layers
    without_window = parse_config(raw | {"use_sliding_window": False}, "x")
    assert without_window == config
    if family == "Mistral":
        assert config.sliding_windows == (defaults.sliding_window,) * 30
    else:
        assert config.sliding_windows == ()
        with_window = parse_config(raw | {"use_sliding_window": True}, "x")
        assert with_window.sliding_windows == (None,) * 28 + (4096,) * 2


# ---- what model.py makes of it ------------------------------------------------------------------


def test_every_activation_that_is_read_can_be_computed():
    assert set(SUPPORTED_VALUES["hidden_act"]) == set(ACTIVATIONS)


def test_the_names_of_linears_are_those_of_the_blocks():
    block = Transformer(config_of()).model.layers[0]
    linears = set()
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            linears.add(name.rpartition(".")[2])
    assert linears == set(TARGET_MODULES)
