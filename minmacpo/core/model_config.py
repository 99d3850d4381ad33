"""What a config.json of the Llama line says, as one ModelConfig: Llama, Mistral, Qwen2, Qwen3 and what is built so.

A field is understood, or known to change nothing, or refused by its name. An absent one means what transformers takes
it for. No torch here: model.py makes the tensors.
"""

from dataclasses import dataclass

from minmacpo import UserError


@dataclass(frozen=True, slots=True)
class Rope:
    """How rotary angles are stretched beyond the context of pre-training (fields as in rope_scaling)."""

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 1
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Variant:
    """In what a model departs from the first Llama. `windows`: of how many tokens, itself included, a token sees
    the last ones, by layer (None: all); empty where no layer has such a limit."""

    rope: Rope = Rope()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The structure of a model: sizes under their names in config.json, and the variant."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    variant: Variant = Variant()


SIZES = ModelConfig.__annotations__.keys() - {"variant"}


QWEN_WINDOW = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


# What a family has beside the sizes, and what it means there if a field is absent.
FAMILIES = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": QWEN_WINDOW | {"num_key_value_heads": 32},
    "qwen3": QWEN_WINDOW | {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False},
}


FOREIGN = {name for fields in FAMILIES.values() for name in fields} - SIZES


# Fields that would change the structure, with the values at which they do not.
FIXED = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "is_encoder_decoder": (None, False),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "tie_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
}


# Notes of whoever wrote the file, training settings, and sampling settings of the time before generation_config.json.
HARMLESS = set(
    """
    model_type architectures torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash
    is_llama_config transformers.js_config unsloth_fixed unsloth_version tokenizer_class finetuning_task
    task_specific_params prefix problem_type id2label label2id num_labels use_cache return_dict output_hidden_states
    output_attentions output_scores return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss
    _attn_implementation _attn_implementation_autoset attn_implementation pretraining_tp initializer_range
    attention_dropout gradient_checkpointing chunk_size_feed_forward cross_attention_hidden_size max_sequence_length
    model_max_length pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids
    encoder_no_repeat_ngram_size num_return_sequences forced_bos_token_id forced_eos_token_id suppress_tokens
    begin_suppress_tokens remove_invalid_values exponential_decay_length_penalty
""".split()
)


NUMBER = (int, float)


MOST, MOST_WIDE, MOST_LAYERS = (
    1e15,
    1 << 24,
    1 << 10,
)  # beyond any model; what is larger would overflow, or never end


SCALING = {"original_max_position_embeddings": (int,), "truncate": (bool,)} | dict.fromkeys(
    (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "beta_fast",
        "beta_slow",
    ),
    NUMBER,
)


# The fields that a rope_type must have, and those that it may have.
ROPES = {
    "default": ((), ()),
    "linear": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (
        ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        (
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "beta_fast",
            "beta_slow",
            "truncate",
            "finetuned",
        ),
    ),
}


def parse_config(raw: dict, where: str) -> ModelConfig:
    """ModelConfig of a config.json's content; UserError for a field that is missing or not understood."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{where}: model_type = {family!r} is not supported (only {', '.join(FAMILIES)})"
        )
    for name, value in raw.items():
        check_field(name, value, family, where)
    absent = {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": raw.get("max_sequence_length"),
    } | FAMILIES[family]
    values = absent | raw
    values["rope_theta"], rope = parse_rope(raw, where)
    try:
        heads, hidden, given = (
            values["num_attention_heads"],
            values["hidden_size"],
            values.get("head_dim"),
        )
        if not 0 < values["num_hidden_layers"] <= MOST_LAYERS:  # before anything is made of each
            raise TypeError
        derived = {"num_key_value_heads": heads, "head_dim": hidden // heads}
        values |= {name: value for name, value in derived.items() if values.get(name) is None}
        variant = parse_variant(values, family, rope, where)
        config = ModelConfig(
            **{name: values[name] for name in SIZES if name in values}, variant=variant
        )
        sizes = [values[name] for name, kind in ModelConfig.__annotations__.items() if kind is int]
        if not all(type(size) is int and 0 < size <= MOST for size in sizes):
            raise TypeError
        widest = max(config.vocab_size, hidden, config.intermediate_size, heads * config.head_dim)
        fit = (
            (given or hidden % heads == 0)
            and widest <= MOST_WIDE
            and heads % config.num_key_value_heads == 0
            and config.head_dim % 2 == 0
        )
        sound = (
            0 < config.rms_norm_eps < 1 < config.rope_theta < MOST
            and type(config.tie_word_embeddings) is bool
        )
        if not fit or not sound:
            raise TypeError
    except (KeyError, TypeError, ZeroDivisionError):
        raise UserError(
            f"{where}: sizes are missing, no whole numbers, too large, or do not fit each other"
        ) from None
    return config


def check_field(name: str, value, family: str, where: str) -> None:
    """UserError for a field that is not understood, or has a value that no model here can have."""
    if name in FIXED and value not in FIXED[name]:
        raise UserError(
            f"{where}: {name} = {value!r:.60} is not supported (only {FIXED[name][-1]!r})"
        )
    if name in FOREIGN - FAMILIES[family].keys() and value not in (None, False):
        raise UserError(f"{where}: {name} = {value!r:.60} has no meaning for model_type = {family}")
    if name not in SIZES | FOREIGN | FIXED.keys() | HARMLESS | {"rope_scaling", "rope_parameters"}:
        raise UserError(
            f"{where}: the field {name!r} is not understood; remove it if it changes nothing"
        )


def parse_rope(raw: dict, where: str) -> tuple[float, Rope]:
    """(theta, scaling) of a config.json, from rope_parameters (newer) or rope_theta and rope_scaling (older)."""
    place = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    found = raw.get(place) or {}
    if (raw.get("rope_parameters") or found) != found:
        raise UserError(f"{where}: rope_scaling and rope_parameters say different things")
    if not isinstance(found, dict):
        raise UserError(f"{where}: {place} = {found!r:.60} is not supported (only an object)")
    kinds = [found[name] for name in ("rope_type", "type") if found.get(name) is not None] or [
        "default"
    ]
    if kinds[0] not in list(ROPES) or kinds[0] != kinds[-1]:
        raise UserError(
            f"{where}: {place} of type {kinds[-1]!r:.60} is not supported (only {', '.join(ROPES)})"
        )
    need, may = ROPES[kinds[0]]
    if odd := sorted(
        found.keys() - {*need, *may, "rope_type", "type", "rope_theta", "partial_rotary_factor"}
    ):
        raise UserError(
            f"{where}: {place} has the field {odd[0]!r}, which is not understood for {kinds[0]}"
        )
    check_field("partial_rotary_factor", found.get("partial_rotary_factor"), "llama", where)
    given = {
        name: found[name]
        for name in (*need, *may)
        if name in SCALING and found.get(name) is not None
    }
    if lacking := [name for name in need if name not in given]:
        raise UserError(f"{where}: {place} of type {kinds[0]} lacks {lacking[0]}")
    for name, value in given.items():
        may_be_zero = name in ("truncate", "mscale", "mscale_all_dim")
        if type(value) not in SCALING[name] or not 0 <= value < MOST or not (value or may_be_zero):
            raise UserError(f"{where}: {place}: {name} = {value!r:.60} is not supported")
    rope = Rope(kinds[0], **given)
    if rope.low_freq_factor >= rope.high_freq_factor or rope.beta_slow > rope.beta_fast:
        raise UserError(f"{where}: {place} has a low bound above its high bound")
    return found.get("rope_theta", raw.get("rope_theta", 10000.0)), rope


def parse_variant(values: dict, family: str, rope: Rope, where: str) -> Variant:
    """The variant that the fields of a family describe; UserError where they are none of theirs."""
    flags = {
        name: values.get(name) or False
        for name in ("attention_bias", "mlp_bias", "use_sliding_window")
    }
    if odd := [name for name, value in flags.items() if type(value) is not bool]:
        raise UserError(
            f"{where}: {odd[0]} = {values[odd[0]]!r:.60} is not supported (only true or false)"
        )
    bias = flags["attention_bias"]
    windows = parse_windows(values, family, where) if "sliding_window" in FAMILIES[family] else ()
    return Variant(
        rope, bias or family == "qwen2", bias, flags["mlp_bias"], family == "qwen3", windows
    )


def parse_windows(values: dict, family: str, where: str) -> tuple[int | None, ...]:
    """The window of every layer: all of Mistral's, those of Qwen that layer_types or max_window_layers names."""
    layers, types, first = (
        values.get(name) for name in ("num_hidden_layers", "layer_types", "max_window_layers")
    )
    used = values["use_sliding_window"] if "use_sliding_window" in FAMILIES[family] else True
    window = values["sliding_window"] if used else None
    if type(layers) is not int or (window is not None and (type(window) is not int or window < 1)):
        raise UserError(
            f"{where}: sliding_window = {window!r:.60} is not supported (only a positive number or null)"
        )
    if types is None:
        sliding = [window is not None and layer >= (first or 0) for layer in range(layers)]
    elif (
        isinstance(types, list)
        and len(types) == layers
        and all(t in ("full_attention", "sliding_attention") for t in types)
    ):
        sliding = [t == "sliding_attention" for t in types]
    else:
        raise UserError(
            f"{where}: layer_types must say full_attention or sliding_attention for every layer"
        )
    if any(sliding) and window is None:
        raise UserError(
            f"{where}: layer_types has sliding_attention, but there is no sliding_window in use"
        )
    return tuple(window if slides else None for slides in sliding) if any(sliding) else ()
