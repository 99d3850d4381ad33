"""What the config.json of a model says, as one ModelConfig, for every family of FAMILIES.

Every field of the file is understood, or known to change nothing, or refused by its name. An
absent field means what transformers takes it for. There is no torch here: model.py makes the
tensors.

To add a family, add it to FAMILIES; what it has and no other (a norm, an activation) becomes a
field of ModelConfig, which model.py reads.
"""

from dataclasses import dataclass, fields

from minmacpo import UserError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary angles are stretched beyond the context of pre-training (rope_scaling)."""

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
class ModelConfig:
    """The structure of a model: fields of config.json, and what families differ in."""

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

    # what families differ in, as the first Llama has it
    hidden_act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"  # of queries and keys: "head" by head, or over their whole "width"
    norms: str = "before"  # attention and MLP, "after" them, or "around": both
    offset_norms: bool = False  # norms multiply by 1 + weight
    embedding_scale: float = 1.0
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    sliding_windows: tuple[int | None, ...] = ()  # by layer, None: sees all; empty: all layers do
    rope_scaling: RopeScaling = RopeScaling()
    layer_ropes: tuple[str, ...] = ()  # by layer "global", "local" or "none"; empty: all global
    local_rope_theta: float = 10000.0  # rope_theta of local layers, which have no rope_scaling


@dataclass(frozen=True, slots=True)
class Family:
    """What a model_type has beside the fields that all have."""

    defaults: dict  # its fields, and what each means where it is absent
    qkv_bias: bool = False  # always, whatever attention_bias says
    qk_norm: str = "none"
    norms: str = "before"
    offset_norms: bool = False
    scaled_embedding: bool = False  # by the root of hidden_size


QWEN_FIELDS = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Fields of SmolLM3 beside those of Llama: every fourth layer knows no positions
SMOLLM3_FIELDS = {
    "attention_bias": False,
    "mlp_bias": False,
    "num_key_value_heads": 4,
    "rope_theta": 2_000_000.0,
    "tie_word_embeddings": True,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": None,  # not used, but published
    "layer_types": None,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}

# Fields of Gemma 3's text models: five of six layers have a window and a rope of their own
GEMMA3_FIELDS = {
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "layer_types": None,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}

FAMILIES = {
    "llama": Family({"attention_bias": False, "mlp_bias": False}),
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family(QWEN_FIELDS, qkv_bias=True),
    "qwen3": Family(QWEN_FIELDS | {"head_dim": 128, "attention_bias": False}, qk_norm="head"),
    "smollm3": Family(SMOLLM3_FIELDS),
    "gemma3_text": Family(
        GEMMA3_FIELDS, qk_norm="head", norms="around", offset_norms=True, scaled_embedding=True
    ),
    "olmo2": Family(
        {
            "attention_bias": False,
            "rms_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": 50279,
        },
        qk_norm="width",
        norms="after",
    ),
}

# Models that are not read as they are, and what to do
REMEDIES = {
    "gemma3": "it reads images too; docs/models.md says how to save its text part by itself",
}

# The fields that ModelConfig takes from config.json as they are
COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)

ROPE_FIELDS = ("rope_scaling", "rope_parameters", "original_max_position_embeddings")

# Fields that would change the structure, with the values at which they do not
SUPPORTED_VALUES = {
    "hidden_act": ("silu", "swish", "gelu_pytorch_tanh"),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "is_encoder_decoder": (None, False),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "tie_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
}

# Notes of whoever wrote the file, settings of training, and settings of sampling from the time
# before generation_config.json
IGNORED_FIELDS = set(
    """
    model_type architectures torch_dtype dtype transformers_version _name_or_path name_or_path
    _commit_hash is_llama_config transformers.js_config unsloth_fixed unsloth_version
    cache_implementation _sliding_window_pattern tokenizer_class finetuning_task
    task_specific_params prefix problem_type id2label label2id num_labels use_cache return_dict
    output_hidden_states output_attentions output_scores return_dict_in_generate torchscript
    use_bfloat16 tf_legacy_loss _attn_implementation _attn_implementation_autoset
    attn_implementation pretraining_tp initializer_range attention_dropout classifier_dropout
    gradient_checkpointing chunk_size_feed_forward cross_attention_hidden_size
    max_sequence_length model_max_length pad_token_id unk_token_id sep_token_id cls_token_id
    mask_token_id decoder_start_token_id max_length min_length max_new_tokens do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids
    encoder_no_repeat_ngram_size num_return_sequences forced_bos_token_id forced_eos_token_id
    suppress_tokens begin_suppress_tokens remove_invalid_values exponential_decay_length_penalty
    auto_map use_flash_attn use_flash_attention use_flash_attention_2 _flash_attn_2_enabled
    loss_type neftune_noise_alpha embd_pdrop resid_pdrop attn_pdrop hidden_dropout
    base_model_tp_plan base_model_pp_plan
    """.split()
)

# Bounds beyond any model: a larger number would overflow, or building the model would never end
MAX_NUMBER = 10**15
MAX_WIDTH = 1 << 24
MAX_LAYERS = 1 << 10


def parse_config(raw: dict, where: str) -> ModelConfig:
    """The ModelConfig of a config.json's content.

    Args:
        raw: the JSON object.
        where: path of the file, with which every error begins.

    Raises:
        UserError: a field is missing, is not understood, or has a value that is not supported.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        remedy = REMEDIES.get(model_type) if isinstance(model_type, str) else None
        supported = remedy or f"only {', '.join(FAMILIES)}"
        raise UserError(f"{where}: model_type = {model_type!r} is not supported ({supported})")
    family = FAMILIES[model_type]
    for name, value in raw.items():
        check_field(name, value, model_type, where)

    # What the file says stands over the family's defaults, and those over transformers'
    values = {"rms_norm_eps": 1e-6, "max_position_embeddings": raw.get("max_sequence_length")}
    values |= family.defaults
    known = {*COMMON_FIELDS, *ROPE_FIELDS, *SUPPORTED_VALUES, *family.defaults}
    values |= {name: value for name, value in raw.items() if name in known}
    global_rope = values
    if "rope_local_base_freq" in family.defaults:
        global_rope, values["rope_local_base_freq"] = split_ropes(values, where)
    values["rope_theta"], rope_scaling = parse_rope(global_rope, where)
    complete_sizes(values, where)
    check_numbers(values, where)
    biases = parse_flags(values, ("attention_bias", "mlp_bias"), where)
    has_rope = parse_rope_layers(values, where)
    windows = parse_windows(values, family, has_rope, where)
    names_layers = isinstance(raw.get("layer_types"), list) and bool(raw["layer_types"])
    if windows and names_layers and "layer_types" not in family.defaults:
        # transformers 4 has windows then, and transformers 5 has none
        raise UserError(
            f"{where}: layer_types has full_attention for every layer, and sliding_window = "
            f"{values['sliding_window']} says otherwise; remove the one that is not meant"
        )

    common = {name: values[name] for name in COMMON_FIELDS if name in values}
    return ModelConfig(
        **common,
        hidden_act=values.get("hidden_activation", values.get("hidden_act", "silu")),
        qkv_bias=biases["attention_bias"] or family.qkv_bias,
        o_bias=biases["attention_bias"],
        mlp_bias=biases["mlp_bias"],
        qk_norm=family.qk_norm,
        norms=family.norms,
        offset_norms=family.offset_norms,
        embedding_scale=values["hidden_size"] ** 0.5 if family.scaled_embedding else 1.0,
        query_pre_attn_scalar=values.get("query_pre_attn_scalar"),
        sliding_windows=windows,
        rope_scaling=rope_scaling,
        layer_ropes=name_ropes(values, has_rope, windows),
        local_rope_theta=values.get("rope_local_base_freq", 10000.0),
    )


def check_field(name: str, value, model_type: str, where: str) -> None:
    """UserError for a field that is not understood, or has a value that no model here can have."""
    if name == "quantization_config" and value:
        raise UserError(
            f"{where}: quantization_config = {value!r:.60}: quantised weights are not read; take "
            "the folder that they were made from"
        )
    supported = SUPPORTED_VALUES.get(name)
    if name == "hidden_activation" and name in FAMILIES[model_type].defaults:
        supported = SUPPORTED_VALUES["hidden_act"]  # Gemma's name for it
    if supported is not None:
        if value not in supported:
            named = [repr(option) for option in supported if option is not None] or ["null"]
            raise unsupported(where, name, value, f"only {' or '.join(named)}")
        return
    if name in COMMON_FIELDS or name in ROPE_FIELDS or name in IGNORED_FIELDS:
        return
    if name in FAMILIES[model_type].defaults or changes_nothing(value):
        return
    if any(name in family.defaults for family in FAMILIES.values()):
        raise UserError(
            f"{where}: {name} = {value!r:.60} has no meaning for model_type = {model_type}"
        )
    raise UserError(
        f"{where}: the field {name!r} is not understood; remove it if it changes nothing"
    )


def changes_nothing(value) -> bool:
    """Whether a field that is not known says that something is not there.

    It does as null, false, 0, empty, or 1.0 (a factor), or where it names full_attention for every
    layer.
    """
    if type(value) is float:
        return value in (0.0, 1.0)
    if isinstance(value, list):
        return all(entry == "full_attention" for entry in value)
    return not value


def unsupported(where: str, name: str, value, expected: str) -> UserError:
    """The error for a field's value, which is shown in at most 60 characters."""
    return UserError(f"{where}: {name} = {value!r:.60} is not supported ({expected})")


# --- Sizes and numbers


def complete_sizes(values: dict, where: str) -> None:
    """Fill in the sizes that follow from others; UserError where they do not fit each other."""
    # Sizes that every file must have; layers first, before anything is made of each
    check_size(values, "num_hidden_layers", MAX_LAYERS, where)
    hidden = check_size(values, "hidden_size", MAX_WIDTH, where)
    heads = check_size(values, "num_attention_heads", MAX_WIDTH, where)
    for name in ("vocab_size", "intermediate_size"):
        check_size(values, name, MAX_WIDTH, where)
    check_size(values, "max_position_embeddings", MAX_NUMBER, where)

    # Without grouping, every query head has keys and values of its own
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    kv_heads = check_size(values, "num_key_value_heads", MAX_WIDTH, where)
    if heads % kv_heads != 0:
        raise UserError(
            f"{where}: num_attention_heads = {heads} is no multiple of "
            f"num_key_value_heads = {kv_heads}"
        )

    if values.get("head_dim") is None:
        if hidden % heads != 0:
            raise UserError(
                f"{where}: hidden_size = {hidden} is no multiple of num_attention_heads = {heads}, "
                "and there is no head_dim"
            )
        values["head_dim"] = hidden // heads
    head_dim = check_size(values, "head_dim", MAX_WIDTH, where)
    if head_dim % 2 != 0:
        raise UserError(f"{where}: head_dim = {head_dim} is odd; rotary positions need pairs")
    if heads * head_dim > MAX_WIDTH:
        raise UserError(
            f"{where}: num_attention_heads = {heads} of head_dim = {head_dim} are too wide"
        )


def check_size(values: dict, name: str, largest: int, where: str) -> int:
    """The size of that name; UserError unless it is a whole number from 1 to `largest`."""
    size = values.get(name)
    if size is None:
        raise UserError(f"{where}: {name} is missing; expected a whole number")
    if type(size) is not int or not 1 <= size <= largest:
        raise unsupported(where, name, size, f"only whole numbers from 1 to {largest}")
    return size


def check_numbers(values: dict, where: str) -> None:
    """UserError for rms_norm_eps, a rope or tie_word_embeddings out of range."""
    epsilon = values["rms_norm_eps"]
    if not is_number(epsilon) or not 0 < epsilon < 1:
        raise unsupported(where, "rms_norm_eps", epsilon, "only numbers between 0 and 1")
    for name in ("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"):
        number = values.get(name)
        if name in values and (not is_number(number) or not 1 < number < MAX_NUMBER):
            raise unsupported(where, name, number, "only numbers above 1")
    tied = values.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise unsupported(where, "tie_word_embeddings", tied, "only true or false")


def is_number(value) -> bool:
    """Whether a JSON value is a number; true and false are none."""
    return type(value) in (int, float)


def parse_flags(values: dict, names: tuple[str, ...], where: str) -> dict[str, bool]:
    """The true-or-false fields of these names; absent and null mean false."""
    flags = {}
    for name in names:
        value = values.get(name)
        if value is None:
            value = False
        if type(value) is not bool:
            raise unsupported(where, name, value, "only true or false")
        flags[name] = value
    return flags


# --- Rotary positions


@dataclass(frozen=True, slots=True)
class RopeType:
    """The fields of rope_scaling that a rope_type must have, and those that it may have."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


ROPE_TYPES = {
    "default": RopeType(),
    "linear": RopeType(
        required=("factor",),
        optional=("original_max_position_embeddings",),
    ),
    "llama3": RopeType(
        required=(
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
        ),
    ),
    "yarn": RopeType(
        required=("factor", "original_max_position_embeddings"),
        optional=(
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

# Fields of rope_scaling that stand beside those of its type
ROPE_COMMON_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
MAY_BE_ZERO = {"mscale", "mscale_all_dim"}


def split_ropes(raw: dict, where: str) -> tuple[dict, float]:
    """The fields of the rope of global layers, for `parse_rope`, and rope_theta of local ones.

    Newer files have one rope_parameters for each kind of layer, older ones rope_local_base_freq.
    """
    both = raw.get("rope_parameters")
    local_theta = raw["rope_local_base_freq"]
    if not isinstance(both, dict) or not both.keys() & {"full_attention", "sliding_attention"}:
        return raw, local_theta
    if both.keys() - {"full_attention", "sliding_attention"} or raw.get("rope_scaling"):
        raise unsupported(where, "rope_parameters", both, "only one object for each kind of layer")

    local = both.get("sliding_attention") or {}
    local_theta, scaling = parse_rope({"rope_parameters": local, "rope_theta": local_theta}, where)
    if scaling != RopeScaling():
        raise unsupported(where, "rope_parameters", local, "local layers have no scaling")
    return raw | {"rope_parameters": both.get("full_attention")}, local_theta


def parse_rope(raw: dict, where: str) -> tuple[float, RopeScaling]:
    """The base of the angles (rope_theta), and their scaling.

    Newer files have rope_parameters, older ones rope_theta and rope_scaling.
    """
    source = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(source) or {}
    if raw.get("rope_parameters") and raw["rope_parameters"] != rope:
        raise UserError(f"{where}: rope_scaling and rope_parameters say different things")
    if not isinstance(rope, dict):
        raise unsupported(where, source, rope, "only an object")

    # Its fields must be known for its type
    rope_type = parse_rope_type(rope, f"{where}: {source}")
    fields_of_type = ROPE_TYPES[rope_type]
    known = ROPE_COMMON_FIELDS | {*fields_of_type.required, *fields_of_type.optional}
    for name in sorted(rope):
        if name not in known and not changes_nothing(rope[name]):
            raise UserError(
                f"{where}: {source} has the field {name!r}, which is not understood for {rope_type}"
            )
    if "original_max_position_embeddings" in fields_of_type.required:
        rope = with_original_length(rope, raw, where)
    check_field("partial_rotary_factor", rope.get("partial_rotary_factor"), "llama", where)

    # Their values must be there, and of a meaning
    scaling_fields = {entry.name for entry in fields(RopeScaling)}
    scaling_values = {}
    for name in fields_of_type.required + fields_of_type.optional:
        if rope.get(name) is not None and name in scaling_fields:
            scaling_values[name] = check_rope_value(name, rope[name], f"{where}: {source}")
        elif name in fields_of_type.required:
            raise UserError(f"{where}: {source} of type {rope_type} lacks {name}")
    scaling = RopeScaling(rope_type, **scaling_values)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(f"{where}: {source} has low_freq_factor at or above high_freq_factor")
    if scaling.beta_slow > scaling.beta_fast:
        raise UserError(f"{where}: {source} has beta_slow above beta_fast")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    return theta, scaling


def with_original_length(rope: dict, raw: dict, where: str) -> dict:
    """A rope_scaling with the context of pre-training, which some files have beside it.

    Where none is said it is the model's own.
    """
    name = "original_max_position_embeddings"
    inner = rope.get(name)
    outer = raw.get(name)
    if inner is not None and outer is not None and inner != outer:
        raise UserError(
            f"{where}: {name} is {outer!r:.60}, and {inner!r:.60} in its rope_scaling; remove the "
            "one that is not meant"
        )
    if inner is not None:
        return rope
    return rope | {name: outer if outer is not None else raw.get("max_position_embeddings")}


def parse_rope_type(rope: dict, where: str) -> str:
    """The type of a rope_scaling, which older files call `type`; both may stand there."""
    names = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    for name in names:
        if name not in list(ROPE_TYPES) or name != names[0]:
            supported = ", ".join(ROPE_TYPES)
            raise UserError(f"{where} of type {name!r:.60} is not supported (only {supported})")
    return names[0] if names else "default"


def check_rope_value(name: str, value, where: str):
    """The value of a field of rope_scaling; UserError where it has no meaning."""
    if name == "truncate":
        valid = type(value) is bool
    elif name == "original_max_position_embeddings":
        valid = type(value) is int and 0 < value < MAX_NUMBER
    elif name in MAY_BE_ZERO:
        valid = is_number(value) and 0 <= value < MAX_NUMBER
    else:
        valid = is_number(value) and 0 < value < MAX_NUMBER
    if not valid:
        raise UserError(f"{where}: {name} = {value!r:.60} is not supported")
    return value


# --- Layers that differ: sliding windows and ropes


def parse_rope_layers(values: dict, where: str) -> list[bool]:
    """Whether each layer has rotary positions: those of no_rope_layers that are 1 (SmolLM3)."""
    layers = values["num_hidden_layers"]
    flags = values.get("no_rope_layers")
    if flags is None:
        interval = values.get("no_rope_layer_interval")
        if interval is None:
            return [True] * layers
        if type(interval) is not int or interval < 1:
            raise unsupported(where, "no_rope_layer_interval", interval, "only numbers above 0")
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    complete = isinstance(flags, list) and len(flags) >= layers
    if not complete or not all(flag in (0, 1) for flag in flags):
        raise UserError(f"{where}: no_rope_layers must say 1 or 0 for every layer")
    return [bool(flag) for flag in flags[:layers]]


def name_ropes(
    values: dict, has_rope: list[bool], windows: tuple[int | None, ...]
) -> tuple[str, ...]:
    """ModelConfig.layer_ropes: "none" without positions, "local" with a window (Gemma 3)."""
    has_local_rope = "rope_local_base_freq" in values
    names = []
    for layer, rotates in enumerate(has_rope):
        if not rotates:
            names.append("none")
        elif has_local_rope and windows and windows[layer] is not None:
            names.append("local")
        else:
            names.append("global")
    return tuple(names) if set(names) != {"global"} else ()


def parse_windows(
    values: dict, family: Family, has_rope: list[bool], where: str
) -> tuple[int | None, ...]:
    """The window of every layer; empty where no layer has one."""
    if "sliding_window" not in family.defaults:
        return ()
    window = values["sliding_window"]
    if "use_sliding_window" in family.defaults:
        used = parse_flags(values, ("use_sliding_window",), where)["use_sliding_window"]
        window = window if used else None
    if window is not None and (type(window) is not int or window < 1):
        raise unsupported(where, "sliding_window", window, "only a positive number or null")

    # Which layers have it
    if values.get("layer_types") is not None:
        sliding = named_sliding_layers(values, where)
    elif window is None:
        return ()
    elif "no_rope_layers" in family.defaults:
        sliding = [not rotates for rotates in has_rope]
    else:
        sliding = numbered_sliding_layers(values, where)
    if not any(sliding):
        return ()
    if window is None:
        raise UserError(
            f"{where}: layer_types has sliding_attention, but there is no sliding_window in use"
        )
    return tuple(window if slides else None for slides in sliding)


def named_sliding_layers(values: dict, where: str) -> list[bool]:
    """Whether each layer has a window, as layer_types says."""
    types = values["layer_types"]
    kinds = ("full_attention", "sliding_attention")
    if (
        not isinstance(types, list)
        or len(types) != values["num_hidden_layers"]
        or not all(kind in kinds for kind in types)
    ):
        raise UserError(
            f"{where}: layer_types must say full_attention or sliding_attention for every layer"
        )
    return [kind == "sliding_attention" for kind in types]


def numbered_sliding_layers(values: dict, where: str) -> list[bool]:
    """Whether each layer has a window, where layer_types does not say.

    All of Mistral's do; of Qwen those from max_window_layers on; of Gemma all but every sixth
    (sliding_window_pattern).
    """
    layers = range(values["num_hidden_layers"])
    pattern = values.get("sliding_window_pattern")
    if pattern is not None:
        if type(pattern) is not int or pattern < 1:
            raise unsupported(where, "sliding_window_pattern", pattern, "only numbers above 0")
        return [(layer + 1) % pattern != 0 for layer in layers]
    first = values.get("max_window_layers") or 0
    if type(first) is not int:
        raise unsupported(where, "max_window_layers", first, "only whole numbers")
    return [layer >= first for layer in layers]
