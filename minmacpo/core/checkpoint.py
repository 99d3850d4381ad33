"""Model folders in Hugging Face's layout, adapters in PEFT's, and states of unfinished trainings.

Only safetensors files are read, memory-mapped, and every tensor is accounted for. transformers,
PEFT and vLLM load what is written.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minmacpo import UserError
from minmacpo.core.lora import MERGE_INSTEAD, TARGET_MODULES, LoraConfig, merge_adapter
from minmacpo.core.model import Transformer
from minmacpo.core.model_config import COMMON_FIELDS, ModelConfig, parse_config
from minmacpo.data.tokenizer import Tokenizer, load_tokenizer
from minmacpo.data.tokenizer_files import FILES, read_stop_ids
from minmacpo.kernels.quantization import is_quantized, quantize_linears, quantize_weight
from minmacpo.runtime.files import read_json, write_atomic, write_json
from minmacpo.runtime.hub import HUB_NAME

# The dtypes of weights, by their names in a safetensors file
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class UnreadKind:
    """A kind of file in which models are kept, and which is not read."""

    what: str
    remedy: str


PICKLE = UnreadKind("a pickle", "load it with transformers and save it again with save_pretrained")
UNREAD_KINDS = {
    ".gguf": UnreadKind("made for llama.cpp", "give the safetensors folder that it was made from"),
    ".bin": PICKLE,
    ".pt": PICKLE,
    ".pth": PICKLE,
}

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Tables that older versions of transformers stored, and that a model computes itself
ROTARY_TABLE = re.compile(r"(.*\.)?rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)")

# What a base may say of how to talk to it: an export has it unchanged
TALKING_FILES = (
    *FILES,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


# --- safetensors files


@contextmanager
def open_safetensors(path: Path) -> Iterator:
    """The file, memory-mapped; UserError that says what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {why_unreadable(path, error)}") from None


def why_unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a file that is no safetensors file, as the end of a sentence."""
    if path.is_dir():
        return "is a folder, where a file is expected"
    if not path.is_file():
        return "is missing"
    with path.open("rb") as stream:
        first_bytes = stream.read(23)
    if first_bytes == b"version https://git-lfs":
        return "is a git-lfs pointer; get the file itself with git lfs pull"
    return f"is cut short or damaged ({error})"


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, on the CPU, and its metadata; UserError if missing or damaged."""
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as one file, whole or not at all; transformers needs the default metadata."""
    write_atomic(path, to_safetensors(tensors, metadata or {"format": "pt"}))


def to_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file with these tensors, on whatever device they are."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, known by the file's header alone."""

    file: Path
    name: str
    shape: list[int]
    dtype: str  # as in FLOATS

    def read(self) -> Tensor:
        """The tensor, in a memory mapping of its own."""
        with open_safetensors(self.file) as file:
            return file.get_tensor(self.name)


# --- Model folders: which tensors there are


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a model folder; UserError if there is none, or it is not understood."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {why_no_folder(folder)}")
    file = folder / "config.json"
    if not file.exists():
        raise UserError(
            f"{folder}: has no config.json, so it is no model folder{why_unread(folder)}"
        )
    return parse_config(read_json(file), str(file))


def why_no_folder(path: Path | str) -> str:
    """What to do where there is no model folder, as the end of a sentence."""
    if Path(path).is_file():
        kind = UNREAD_KINDS.get(Path(path).suffix)
        if kind:
            return f"is {kind.what}, which is not read: {kind.remedy}"
        return "is a file, where a model folder is expected; give the folder that it lies in"
    if HUB_NAME.fullmatch(str(path)):
        command = f"hf download {path} --local-dir {path}"
        return f"is no folder; if it is a model of the hub, get it with: {command}"
    return "is no folder; download the model first and give its path"


def why_unread(folder: Path) -> str:
    """The end of a sentence on a folder without safetensors: which other weights it has."""
    suffixes = {file.suffix for file in folder.iterdir()}
    for suffix, kind in UNREAD_KINDS.items():
        if suffix in suffixes:
            return f"; its {suffix} file is {kind.what}, which is not read: {kind.remedy}"
    return ""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the only one, or those that its index names.

    Raises:
        UserError: there is none, or one of them is not in the folder.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise UserError(f"{folder}: has no model.safetensors{why_unread(folder)}")

    # An index comes with the weights from anywhere, so its names are not trusted
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: expected a weight_map of file names")
    for name in weight_map.values():
        if not isinstance(name, str):
            raise UserError(f"{index}: expected a weight_map of file names")
        if not lies_within(name, folder):
            raise UserError(f"{index}: names {name!r:.80}, which is no file of this folder")
    return [folder / name for name in sorted(set(weight_map.values()))]


def lies_within(name: str, folder: Path) -> bool:
    """Whether a file of that name is in the folder, links followed, or in its hub cache."""
    if not 0 < len(name) <= 255 or not name.isprintable() or name != Path(name).name:
        return False
    home = folder.resolve()
    file = (folder / name).resolve()
    if file.is_relative_to(home):
        return True
    # the hub's cache has links from snapshots/REVISION to its blobs
    return home.parent.name == "snapshots" and file.is_relative_to(home.parents[1] / "blobs")


def stored_weights(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by name, but the rotary tables that a model computes itself.

    A model that was saved without its head names its tensors without "model.", which is added.

    Raises:
        UserError: a tensor is in two files, or elsewhere than the index says.
    """
    stored = {}
    files = weight_files(folder)
    for path in files:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in stored:
                    raise UserError(f"{path}: has {name}, and so has {stored[name].file.name}")
                header = file.get_slice(name)
                stored[name] = StoredTensor(path, name, header.get_shape(), header.get_dtype())
    if files != [folder / "model.safetensors"]:
        check_index(folder / "model.safetensors.index.json", stored)
    stored = {name: tensor for name, tensor in stored.items() if not ROTARY_TABLE.fullmatch(name)}
    if EMBEDDING.removeprefix("model.") in stored:
        stored = {with_model_prefix(name): tensor for name, tensor in stored.items()}
    return stored


def with_model_prefix(name: str) -> str:
    """The name of a tensor in a whole model, by its name in one that was saved without a head."""
    is_inner = name.startswith(("embed_tokens.", "layers.", "norm."))
    return f"model.{name}" if is_inner else name


def check_index(index: Path, stored: dict[str, StoredTensor]) -> None:
    """UserError where the index says something else of a tensor's file than the files do.

    It may name what no model needs: rotary tables, and the head of a model that ties it.
    """
    weight_map = read_json(index)["weight_map"]
    for name in sorted(weight_map.keys() | stored.keys()):
        if ROTARY_TABLE.fullmatch(name) or (name == HEAD and name not in stored):
            continue
        actual = stored[name].file.name if name in stored else None
        if weight_map.get(name) != actual:
            claimed = weight_map.get(name, "no file")
            raise UserError(
                f"{index}: says that {name} is in {claimed}; it is in {actual or 'none of them'}"
            )


# --- Model folders: loading


def weight_bytes(config: ModelConfig, bytes_per_number: int, quantization: str = "none") -> int:
    """Memory that the weights of a frozen base take; no weight is read or made.

    Args:
        bytes_per_number: of the dtype in which it is loaded.
        quantization: of the linear layers of its blocks: "none", "int8" or "nf4".
    """
    with torch.device("meta"):
        model = Transformer(config)
        if quantization != "none":
            quantize_linears(model, quantization)
    # an embedding that is the head too is one tensor under two names
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    total = 0
    for tensor in tensors.values():
        if tensor.dtype == torch.float32:  # not quantized: takes the dtype of the base
            total += tensor.numel() * bytes_per_number
        else:
            total += tensor.nbytes
    return total


def load_model(
    folder: Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str = "none",
) -> Transformer:
    """The model of a folder, in `dtype` whatever it is stored in.

    Args:
        device: "meta" reads the headers only.
        quantization: "none", or a name of QUANTIZED_LINEARS; linears are quantised one by one.

    Raises:
        UserError: a file is missing, damaged or not understood, or a tensor is missing, unexpected
            or not finite.
    """
    config = read_config(folder)
    stored = stored_weights(folder)
    return assemble(folder, config, stored, device=device, dtype=dtype, quantization=quantization)


@dataclass(frozen=True, slots=True)
class SequenceClassifier:
    """A reward model of transformers: a Transformer and a head with one label.

    The score of a text is `head` times the hidden state of its last token that is not padding.
    """

    model: Transformer
    head: Tensor  # (C,), fp32
    pad_token_id: int | None  # None: no token counts as padding


def load_classifier(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> SequenceClassifier:
    """The sequence classifier of a folder; UserError unless it holds one with one label."""
    config = read_config(folder)
    stored = stored_weights(folder)
    score = stored.pop("score.weight", None)
    if score is None or score.shape != [1, config.hidden_size]:
        shape = f", and its score.weight is {score.shape}" if score is not None else ""
        raise UserError(
            f"{folder}: is no reward model; expected a sequence classifier with one label "
            f"(score.weight of the shape [1, {config.hidden_size}]){shape}"
        )
    if "score.bias" in stored:
        raise UserError(
            f"{folder}: has a score.bias, which no classifier of transformers reads; a score "
            "without it is another one, give --scores from the model's own program"
        )
    stored.pop(HEAD, None)  # of the base that it was made from
    weight = score.read()[0].float()
    if not weight.isfinite().all():
        raise UserError(f"{folder}: score.weight holds values that are not finite")
    pad_token_id = read_json(folder / "config.json").get("pad_token_id")
    if pad_token_id is not None and type(pad_token_id) is not int:
        raise UserError(
            f"{folder / 'config.json'}: pad_token_id is {pad_token_id!r}; expected a whole number"
        )
    # there is no language head: with a tied one no tensor is missing
    tied = replace(config, tie_word_embeddings=True)
    model = assemble(folder, tied, stored, device=device, dtype=dtype)
    return SequenceClassifier(model, weight, pad_token_id)


def assemble(
    folder: Path,
    config: ModelConfig,
    stored: dict[str, StoredTensor],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str = "none",
) -> Transformer:
    """The model of these tensors, each of which is checked.

    A tied embedding may be stored as the embedding, as the head, or as both.
    """
    # On meta no memory is taken before every tensor is known to fit
    with torch.device("meta"):
        model = Transformer(config)
    head = stored.pop(HEAD, None) if config.tie_word_embeddings else None
    if head is not None:
        stored.setdefault(EMBEDDING, head)
    check_stored(folder, model, stored)
    if torch.device(device).type == "meta":
        return model.eval()

    if quantization == "none":
        weights = read_weights(stored, device, dtype)
    else:
        # Empty quantised linears first: they say how each weight is to be stored
        quantize_linears(model, quantization)
        weights = read_quantized_weights(model, stored, device, dtype)
    check_finite(folder, weights)
    if head is not None and not torch.equal(head.read().to(device, dtype), weights[EMBEDDING]):
        raise UserError(
            f"{folder}: has a head of its own, though config.json ties it to the embedding"
        )
    if config.tie_word_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    # Assigned, not copied; what was one tensor is two parameters then, and tied again
    model.load_state_dict(weights, assign=True)
    model.tie_head()
    return model.eval()


def check_stored(folder: Path, model: Transformer, stored: dict[str, StoredTensor]) -> None:
    """UserError unless exactly the model's tensors are stored, in their shapes, as floats."""
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected[HEAD]
    for name in sorted(expected.keys() ^ stored.keys()):
        problem = "lacks" if name in expected else "has an unexpected"
        remedy = ""
        if name == HEAD:
            remedy = "; where the embedding is the head too, config.json says tie_word_embeddings"
        raise UserError(f"{folder}: {problem} tensor {name}{remedy}")
    for name, tensor in stored.items():
        shape = list(expected[name].shape)
        if tensor.shape != shape:
            raise UserError(f"{folder}: {name} is {tensor.shape}, expected {shape}")
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{folder}: {name} is stored as {tensor.dtype}; "
                "only floats of 16 bits or more are read"
            )


def check_finite(folder: Path, weights: dict[str, Tensor]) -> None:
    """UserError that names the first tensor with a value that is not finite."""
    for name, weight in weights.items():
        smallest, largest = weight.aminmax()
        if not smallest.isfinite() or not largest.isfinite():
            name = name.replace(".scale", ".weight")  # of a quantised linear
            raise UserError(f"{folder}: {name} holds values that are not finite")


def read_weights(
    stored: dict[str, StoredTensor], device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors on `device` in `dtype`.

    Those that stay as they lie in a file share one mapping of it. One that is converted is read
    through a mapping of its own, since the pages that a mapping has read stay in memory for as
    long as it lives.
    """
    weights = {}
    with ExitStack() as stack:
        mappings = {}
        for path in {tensor.file for tensor in stored.values()}:
            mappings[path] = stack.enter_context(open_safetensors(path))
        for name, tensor in stored.items():
            if torch.device(device).type == "cpu" and FLOATS[tensor.dtype] == dtype:
                weights[name] = mappings[tensor.file].get_tensor(tensor.name)
            else:
                weights[name] = tensor.read().to(device, dtype)
    return weights


def read_quantized_weights(
    model: Transformer, stored: dict[str, StoredTensor], device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors as a model with quantised linears has them, read and quantised one by one."""
    weights = {}
    for name, tensor in stored.items():
        parts = quantize_weight(model, name, tensor.read().to(device))
        if name in parts:
            parts[name] = parts[name].to(dtype, copy=True)  # a copy ends the file's mapping
        weights.update(parts)
    return weights


def check_model_folder(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """Config and tokenizer of a model folder that is whole; UserError otherwise."""
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    check_sizes(folder, config, tokenizer)
    load_model(folder, "meta")
    stop_ids(folder, tokenizer)
    return config, tokenizer


def check_sizes(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """UserError where a text can have ids that the model has no row for.

    Llama 2's folders have a token <pad> without a row, which nothing uses. From here on the
    tokenizer does not know such tokens, so that a template which needs one says that it is missing.
    """
    tokenizer.forget_special_from(config.vocab_size)
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.size} pieces, the model only "
            f"{config.vocab_size} rows, and none for {tokenizer.piece(tokenizer.size - 1)!r}: "
            "take the tokenizer that the model was trained with"
        )


def stop_ids(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Every id that ends an answer: the tokenizer's end token and those of both config files."""
    return {tokenizer.eos} | read_stop_ids(folder)


# --- Model folders: writing


def save_model(
    folder: Path, config: ModelConfig, weights: dict[str, Tensor], tokenizer: bytes
) -> None:
    """Write a plain Llama as an ordinary model folder.

    Args:
        folder: an existing folder, for config.json, model.safetensors, generation_config.json and
            tokenizer.model.
        weights: the model's state_dict.
        tokenizer: content of tokenizer.model.
    """
    description = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype_name(weights),
    }
    description |= {name: getattr(config, name) for name in COMMON_FIELDS}
    description |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    write_json(folder / "config.json", description)
    write_generation_config(folder, config)
    write_atomic(folder / "tokenizer.model", tokenizer)
    save_weights(folder, config, weights)


def export_merged(model: Transformer, base: Path, folder: Path) -> str:
    """Write a base with its adapter merged in as one model folder; returns its dtype's name.

    The adapter is added to the weights as they are stored, in fp32, and every tensor keeps its
    dtype, whatever the model was loaded in.

    Args:
        base: the base's folder, of which all but the weights is copied.
        folder: is made.

    Raises:
        UserError: the base is quantised.
    """
    if is_quantized(model):
        raise UserError(
            f"{base}: is quantised in memory, and its own weights are more exact: "
            "merge with --model.quantize=none"
        )
    folder.mkdir(parents=True)
    stored = {name: tensor.read() for name, tensor in stored_weights(base).items()}
    weights = merge_adapter(model, stored)
    write_generation_config(folder, model.config)
    for name in ("config.json", *TALKING_FILES):
        if (base / name).is_file():
            write_atomic(folder / name, (base / name).read_bytes())
    save_tensors(folder / "model.safetensors", weights)
    return dtype_name(weights)


def dtype_name(weights: dict[str, Tensor]) -> str:
    """The dtype of the weights as config.json has it, such as bfloat16."""
    return str(next(iter(weights.values())).dtype).removeprefix("torch.")


def write_generation_config(folder: Path, config: ModelConfig) -> None:
    """Write generation_config.json with the two ids that a config.json has."""
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(folder / "generation_config.json", ends)


def save_weights(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Write model.safetensors, without a tied head, which is the embedding."""
    if config.tie_word_embeddings:
        weights = {name: tensor for name, tensor in weights.items() if name != HEAD}
    save_tensors(folder / "model.safetensors", weights)


# --- Adapters

# Settings of adapter_config.json that plain LoRA leaves at these values
PLAIN_LORA = {
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}

# Its fields that may have a value; any other one with a value is refused
ADAPTER_FIELDS = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "r",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "bias",
    "init_lora_weights",
    "layers_pattern",
    "eva_config",
    "loftq_config",
    "megatron_core",
    "qalora_group_size",
}

# Its fields with only some supported values. Other values of init_lora_weights change the base.
ADAPTER_VALUES = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}

MAX_RANK = 1 << 16
MAX_ALPHA = 1e9


def save_adapter(folder: Path, tensors: dict[str, Tensor], config: LoraConfig, base: str) -> None:
    """Write an adapter into an existing folder, in PEFT's layout.

    Args:
        tensors: as `get_adapter_weights` gives them.
        base: path of the base's folder, relative to the adapter's.
    """
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_json(folder / "adapter_config.json", description | PLAIN_LORA)
    save_tensors(folder / "adapter_model.safetensors", tensors)


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, for `set_adapter_weights`; UserError if damaged."""
    file = folder / "adapter_model.safetensors"
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder}: adapter_model.bin is a pickle, which is not read: "
            "save it again with save_pretrained"
        )
    tensors, _ = load_tensors(file)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{file}: {name} is {dtype}; expected {', '.join(FLOATS)}")
    return tensors


def read_adapter_config(folder: Path) -> tuple[LoraConfig, str]:
    """The adapter's LoraConfig, and the path of its base as it is written.

    A rank-stabilised adapter, scaled by alpha / sqrt(r), is a plain one with a larger alpha.

    Raises:
        UserError: the file is missing or broken, or the adapter is no plain LoRA.
    """
    file = folder / "adapter_config.json"
    raw = read_json(file)
    check_plain_lora(raw, file)

    rank = raw.get("r")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise UserError(f"{file}: r = {rank!r:.60}; expected a whole number from 1 to {MAX_RANK}")
    alpha = raw.get("lora_alpha")
    if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:  # nan is refused too
        raise UserError(f"{file}: lora_alpha = {alpha!r:.60}; expected a number")
    rank_stabilised = raw.get("use_rslora") or False
    if type(rank_stabilised) is not bool:
        raise UserError(f"{file}: use_rslora = {rank_stabilised!r:.60}; expected true or false")
    if rank_stabilised:
        alpha = alpha * math.sqrt(rank)
    base = raw.get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise UserError(f"{file}: base_model_name_or_path = {base!r:.60}; expected a path")
    return LoraConfig(rank, alpha, parse_targets(raw.get("target_modules"), file)), base


def check_plain_lora(raw: dict, file: Path) -> None:
    """UserError that names the first setting which is not one of plain LoRA."""
    for name, value in raw.items():
        if value and name not in ADAPTER_FIELDS:
            raise UserError(not_plain_lora(file, name, value))
    for name, supported in ADAPTER_VALUES.items():
        if raw.get(name) not in supported:
            raise UserError(not_plain_lora(file, name, raw.get(name)))


def not_plain_lora(file: Path, name: str, value) -> str:
    """The sentence for a setting that is not supported."""
    return f"{file}: {name} = {value!r:.60} is not supported; {MERGE_INSTEAD}"


def parse_targets(targets, file: Path) -> tuple[str, ...]:
    """The names and patterns of target_modules; UserError where one is none."""
    if isinstance(targets, str):
        targets = TARGET_MODULES if targets.lower() == "all-linear" else [targets]
    if not isinstance(targets, list | tuple):
        raise UserError(f"{file}: target_modules = {targets!r:.60}; expected a list of names")
    for target in targets:
        if not isinstance(target, str):
            raise UserError(f"{file}: target_modules holds {target!r:.60}, which is no name")
        try:
            re.compile(target)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{file}: target_modules holds a broken pattern ({error})") from None
    return tuple(targets)


# --- States of unfinished trainings


def save_state(path: Path, tensors: dict[str, Tensor], notes: dict) -> None:
    """Write parameters, moments and the trainer's notes in one file, so that they cannot part.

    A state has no stage.json that says whether it is undamaged, so it holds a digest of its own.
    """
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(notes)
    save_tensors(path, tensors, {"notes": text, "sha256": state_digest(tensors, text)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and notes that `save_state` wrote; UserError if they are damaged."""
    try:
        tensors, metadata = load_tensors(path)
        notes = metadata["notes"]
        undamaged = state_digest(tensors, notes) == metadata["sha256"]
    except (UserError, KeyError, ValueError, RuntimeError):
        undamaged = False
    if not undamaged:
        raise UserError(f"{path}: is no whole training state; delete it, and the stage trains anew")
    return tensors, json.loads(notes)


def state_digest(tensors: dict[str, Tensor], notes: str) -> str:
    """Hex digest of a state's tensors and notes."""
    return hashlib.sha256(to_safetensors(tensors) + notes.encode()).hexdigest()
