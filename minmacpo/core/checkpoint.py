"""Hugging Face folders and PEFT adapters, in and out; and the state of an unfinished training.

Only safetensors, memory-mapped, every tensor accounted for; transformers, PEFT and vLLM load what is written.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minmacpo import UserError
from minmacpo.config.schema import LINEARS, Lora
from minmacpo.core.lora import merged_weights
from minmacpo.core.model import Transformer
from minmacpo.core.model_config import COMMON_FIELDS, ModelConfig, parse_config
from minmacpo.data.tokenizer import FILES, Tokenizer, load_tokenizer
from minmacpo.kernels.quantization import is_quantised, pack_weight, quantize_linears
from minmacpo.runtime.files import read_json, write_atomic, write_json

# Settings of adapter_config.json that plain LoRA leaves at these values.
PLAIN = {
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


# Its other fields that change nothing about what an adapter computes once it is trained.
NOTES = {
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


MOST_RANK = 1 << 16


STARTS = (
    None,
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
)  # values of init_lora_weights that leave the base alone


# What a base may say of how to talk to it: an export has it unchanged.
MANNERS = (
    *FILES,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, by its header alone."""

    file: Path
    name: str
    shape: list[int]
    dtype: str

    def read(self) -> Tensor:
        """The tensor, in a memory mapping of its own."""
        with opened(self.file) as file:
            return file.get_tensor(self.name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an HF folder, one or those of its index; UserError if none, or outside the folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        if single.exists():
            return [single]
        pickles = (
            "; its .bin files are pickles, which are not read: save it again with save_pretrained"
        )
        raise UserError(
            f"{folder}: has no model.safetensors{pickles if any(folder.glob('*.bin')) else ''}"
        )
    weights = read_json(index).get("weight_map")
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(name, str) for name in weights.values())
    ):
        raise UserError(f"{index}: expected a weight_map of file names")
    home = folder.resolve()
    homes = (
        [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    )  # of the hub's cache
    for name in set(weights.values()):
        plain = 0 < len(name) <= 255 and name.isprintable() and name == Path(name).name
        if not plain or not any((folder / name).resolve().is_relative_to(place) for place in homes):
            raise UserError(f"{index}: names {name!r:.80}, which is no file of this folder")
    return [folder / name for name in sorted(set(weights.values()))]


def stored_weights(folder: Path) -> dict[str, Stored]:
    """All tensors of an HF folder by name, without the tables that a model computes itself. UserError if its index says
    something else of where they are."""
    found, files, index = {}, weight_files(folder), folder / "model.safetensors.index.json"
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in found:
                    raise UserError(f"{path}: has {name}, and so has {found[name].file.name}")
                part = file.get_slice(name)
                found[name] = Stored(path, name, part.get_shape(), part.get_dtype())
    places = {name: part.file.name for name, part in found.items()}
    said = places if files == [folder / "model.safetensors"] else read_json(index)["weight_map"]
    for name in sorted(said.keys() | places.keys()):
        if said.get(name) != (where := places.get(name)):
            raise UserError(
                f"{index}: says that {name} is in {said.get(name, 'no file')}; it is in {where or 'none of them'}"
            )
    return {name: part for name, part in found.items() if not name.endswith("rotary_emb.inv_freq")}


def read_weights(
    stored: dict[str, Stored], device, dtype: torch.dtype, form: str = "none"
) -> dict[str, Tensor]:
    """The tensors on `device` in `dtype`, linears in `form` (quant.py). Those that stay as they lie in a file share its mapping;
    one that is converted is read by itself, as the pages that a mapping has read stay in memory for as long as it lives."""
    stays = torch.device(device).type == "cpu"
    if form != "none":
        packed = (pack_weight(name, part.read().to(device), form) for name, part in stored.items())
        return {
            name: t.to(dtype, copy=True) if name in stored else t
            for found in packed
            for name, t in found.items()
        }
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(opened(path))
            for path in {part.file for part in stored.values()}
        }
        return {
            name: files[part.file].get_tensor(name)
            if stays and FLOATS[part.dtype] == dtype
            else part.read().to(device, dtype)
            for name, part in stored.items()
        }


def read_config(folder: Path) -> ModelConfig:
    """ModelConfig of an HF folder; UserError if there is none, or it is not understood."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {no_folder(folder)}")
    if not (file := folder / "config.json").exists():
        raise UserError(f"{folder}: has no config.json, so it is no model folder")
    return parse_config(read_json(file), str(file))


def no_folder(path: Path | str) -> str:
    """What to do where there is no model folder, as the end of a sentence."""
    if Path(path).is_file():
        return "is a file, where a model folder is expected"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return f"is no folder; if it is a model of the hub, get it with: hf download {path} --local-dir {path}"
    return "is no folder; download the model first and give its path"


def load_model(
    folder: Path, device="cpu", dtype: torch.dtype = torch.float32, form: str = "none"
) -> Transformer:
    """The model of an HF folder in `dtype`, whatever dtype it is stored in, its linears quantised one by one if `form` says so;
    on "meta" only the headers are read. UserError if a file is missing, damaged or not understood, or a tensor unexpected
    or not finite."""
    return assemble(folder, read_config(folder), stored_weights(folder), device, dtype, form)


def load_scorer(folder: Path) -> tuple[Transformer, Tensor]:
    """(model, weight [H] of its head) of a sequence classifier with one label, a reward model: its score is the
    weight times the last token's hidden state. UserError if the folder is none."""
    config, stored = read_config(folder), stored_weights(folder)
    score = stored.pop("score.weight", None)
    if score is None or score.shape != [1, config.hidden_size]:
        raise UserError(
            f"{folder}: is no reward model; expected a sequence classifier with one label (score.weight)"
        )
    tied = replace(config, tie_word_embeddings=True)  # it has no head, and none is used
    if not (weight := score.read()[0].float()).isfinite().all():
        raise UserError(f"{folder}: score.weight holds values that are not finite")
    return assemble(folder, tied, stored), weight


def assemble(
    folder: Path,
    config: ModelConfig,
    stored: dict[str, Stored],
    device="cpu",
    dtype: torch.dtype = torch.float32,
    form: str = "none",
) -> Transformer:
    """A model of these weights, each of which is looked for and looked at; a tied head may be among them."""
    with torch.device("meta"):
        model = Transformer(config)
    wanted, embedding, head = model.state_dict(), "model.embed_tokens.weight", None
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
        head = stored.pop("lm_head.weight", None)
    for name in sorted(wanted.keys() ^ stored.keys()):
        raise UserError(
            f"{folder}: {'lacks' if name in wanted else 'has an unexpected'} tensor {name}"
        )
    for name, part in stored.items():
        if part.shape != list(wanted[name].shape):
            raise UserError(
                f"{folder}: {name} is {part.shape}, expected {list(wanted[name].shape)}"
            )
        if part.dtype not in FLOATS:
            raise UserError(
                f"{folder}: {name} is stored as {part.dtype}; only floats of 16 bits or more are read"
            )
    if torch.device(device).type == "meta":
        return model.eval()
    weights = read_weights(stored, device, dtype, form)
    if odd := [
        name for name, weight in weights.items() if not all(v.isfinite() for v in weight.aminmax())
    ]:
        raise UserError(
            f"{folder}: {odd[0].replace('.scale', '.weight')} holds values that are not finite"
        )
    if form != "none":
        quantize_linears(model, form)
    if head and not torch.equal(head.read().to(device, dtype), weights[embedding]):
        raise UserError(
            f"{folder}: has a head of its own, though config.json ties it to the embedding"
        )
    model.load_state_dict(
        weights | ({"lm_head.weight": weights[embedding]} if config.tie_word_embeddings else {}),
        assign=True,
    )
    model.tie_head()
    return model.eval()


def check_model_folder(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """Config and tokenizer of an HF folder that is whole; UserError otherwise."""
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    check_sizes(folder, config, tokenizer)
    load_model(folder, "meta")
    stop_ids(folder, tokenizer)
    return config, tokenizer


def check_sizes(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """UserError where the tokenizer has ids that the model has no row for."""
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.size} pieces, the model only {config.vocab_size} rows"
        )


def save_model(
    folder: Path, config: ModelConfig, weights: dict[str, Tensor], tokenizer: bytes
) -> None:
    """An ordinary HF folder of a plain Llama: config.json, model.safetensors, generation_config.json, tokenizer.model."""
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    sizes = {name: getattr(config, name) for name in COMMON_FIELDS}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}
    fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    write_json(folder / "config.json", kind | sizes | fixed)
    write_generation(folder, config)
    write_atomic(folder / "tokenizer.model", tokenizer)
    save_weights(folder, config, weights)


def write_generation(folder: Path, config: ModelConfig) -> None:
    """generation_config.json with the two ids that a config.json has."""
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(folder / "generation_config.json", ends)


def save_weights(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """model.safetensors, where a tied head is the embedding."""
    left_out = "lm_head.weight" if config.tie_word_embeddings else None
    save_tensors(folder / "model.safetensors", {k: v for k, v in weights.items() if k != left_out})


def export_merged(model: Transformer, source: Path, folder: Path) -> None:
    """Write base and slot as one HF folder; all but the weights and their dtype is that of `source`, the base. UserError if
    the base is quantised."""
    if is_quantised(model):
        raise UserError(
            f"{source}: is quantised in memory, and its own weights are more exact: merge with --model.quantize=none"
        )
    folder.mkdir(parents=True)
    raw, weights = read_json(source / "config.json"), merged_weights(model)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", raw | {"dtype" if "dtype" in raw else "torch_dtype": dtype})
    write_generation(folder, model.config)
    for file in (source / name for name in MANNERS):
        if file.is_file():
            write_atomic(folder / file.name, file.read_bytes())
    save_weights(folder, model.config, weights)


def stop_ids(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Every id that ends an answer: the tokenizer's end token and those of both HF configs."""
    ids = {tokenizer.eos}
    for file in (folder / "config.json", folder / "generation_config.json"):
        eos = read_json(file).get("eos_token_id") if file.is_file() else None
        ends = eos if isinstance(eos, list) else [eos]
        if not all(end is None or type(end) is int for end in ends):
            raise UserError(
                f"{file}: eos_token_id = {eos!r}; expected a whole number, or a list of them"
            )
        ids |= set(ends)
    return ids - {None}


def save_adapter(folder: Path, tensors: dict[str, Tensor], config: Lora, base: str) -> None:
    """An adapter in PEFT's layout. `base` is the path of its base, relative to the adapter."""
    described = {
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
    write_json(folder / "adapter_config.json", described | PLAIN)
    save_tensors(folder / "adapter_model.safetensors", tensors)


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, as `set_adapter_weights` takes them; UserError if missing or damaged."""
    file = folder / "adapter_model.safetensors"
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder}: adapter_model.bin is a pickle, which is not read: save it again with save_pretrained"
        )
    tensors = load_tensors(file)[0]
    if odd := next(
        (name for name, tensor in tensors.items() if tensor.dtype not in FLOATS.values()), None
    ):
        raise UserError(
            f"{file}: {odd} is {str(tensors[odd].dtype).removeprefix('torch.')}; expected {', '.join(FLOATS)}"
        )
    return tensors


def read_adapter_config(folder: Path) -> tuple[Lora, str]:
    """(slot settings, path of the base as written) of an adapter folder; UserError if not plain LoRA.
    A rank-stabilised one, scaled by alpha / sqrt(r), is a plain one with a larger alpha."""
    file = folder / "adapter_config.json"
    raw = read_json(file)
    odd = [name for name, value in raw.items() if value and name not in NOTES]
    odd += [
        name
        for name, plain in {
            "peft_type": ("LORA",),
            "bias": (None, "none"),
            "init_lora_weights": STARTS,
        }.items()
        if raw.get(name) not in list(plain)
    ]
    if odd:
        raise UserError(
            f"{file}: {odd[0]} = {raw.get(odd[0])!r:.60} is not supported; only plain LoRA is read"
        )
    r, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    base, stable = raw.get("base_model_name_or_path") or "", raw.get("use_rslora") or False
    if isinstance(targets, str):
        targets = LINEARS if targets.lower() == "all-linear" else [targets]
    named = isinstance(targets, list | tuple) and all(
        isinstance(name, str) for name in [base, *targets]
    )
    scaled = (
        type(alpha) in (int, float) and abs(alpha) <= 1e9 and type(stable) is bool
    )  # nan is not, either
    if not named or not scaled or type(r) is not int or not 1 <= r <= MOST_RANK:
        raise UserError(
            f"{file}: expected r (1 to {MOST_RANK}), lora_alpha, target_modules and the path of the base"
        )
    try:
        for target in targets:
            re.compile(target)
    except re.error as error:
        raise UserError(f"{file}: target_modules holds a broken pattern ({error})") from None
    return Lora(r, alpha * math.sqrt(r) if stable else alpha, tuple(targets)), base


def save_state(path: Path, tensors: dict[str, Tensor], notes: dict) -> None:
    """Parameters and moments with the step's notes in one file, so that they cannot part, and a sum of all."""
    path.parent.mkdir(exist_ok=True)
    told = json.dumps(notes)
    save_tensors(path, tensors, {"notes": told, "sum": sum_of(tensors, told)})


def sum_of(tensors: dict[str, Tensor], notes: str) -> str:
    """Hex digest of tensors on the CPU and their notes: a state has no stage.json that tells whether it is undamaged."""
    digest = hashlib.sha256(notes.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_state` wrote; UserError if it is damaged."""
    try:
        tensors, metadata = load_tensors(path)
        if sum_of(tensors, metadata["notes"]) != metadata["sum"]:
            raise ValueError("damaged")
        return tensors, json.loads(metadata["notes"])
    except (UserError, KeyError, ValueError, RecursionError):
        raise UserError(
            f"{path}: is no whole training state; delete it, and the stage trains anew"
        ) from None


FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Tensors as one .safetensors file, atomically; no second copy of all of them is made, as the library's own writing would."""
    write_atomic(path, tensor_parts(tensors, metadata or {"format": "pt"}))


def tensor_parts(
    tensors: dict[str, Tensor], metadata: dict[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a .safetensors file (github.com/huggingface/safetensors, "Format"): the size of the header, the header, and the
    tensors, those of larger numbers first, so that all are aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    ends = [0, *accumulate(tensors[name].nbytes for name in order)]
    names = {dtype: name for name, dtype in FLOATS.items()}
    header = {"__metadata__": metadata} | {
        name: {
            "dtype": names[tensors[name].dtype],
            "shape": [*tensors[name].shape],
            "data_offsets": [*span],
        }
        for name, span in zip(order, pairwise(ends), strict=True)
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield bytes_of(tensors[name])


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


@contextmanager
def opened(path: Path) -> Iterator:
    """A .safetensors file, memory-mapped; UserError that says what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {fault(path, error)}") from None


def fault(path: Path, error: Exception) -> str:
    """What is wrong with a file that is no safetensors file, as the end of a sentence."""
    if path.is_dir():
        return "is a folder, where a file is expected"
    if not path.is_file():
        return "is missing"
    with path.open("rb") as stream:
        pointer = stream.read(23) == b"version https://git-lfs"
    return (
        "is a git-lfs pointer; get the file itself with git lfs pull"
        if pointer
        else f"is cut short or damaged ({error})"
    )


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a .safetensors file, on the CPU; UserError if missing or damaged."""
    with opened(path) as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
