"""Hugging Face folders and PEFT adapters, in and out; and the state of an unfinished training.

Only safetensors, memory-mapped, every tensor accounted for; transformers, PEFT and vLLM load what is written.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minmacpo import UserError
from minmacpo.config import Lora
from minmacpo.files import read_json, write_atomic, write_json
from minmacpo.lora import merged_weights
from minmacpo.model import ModelConfig, Transformer, parse_config
from minmacpo.tokenizer import Tokenizer, load_tokenizer

# Settings of adapter_config.json that plain LoRA leaves at these values.
PLAIN = {"use_rslora": False, "use_dora": False, "modules_to_save": None, "layers_to_transform": None,
         "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
# What a base may say of how to talk to it, beside tokenizer.model: an export has it unchanged.
MANNERS = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
           "added_tokens.json", "chat_template.jinja")  # fmt: skip


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors as one .safetensors file, atomically."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(tensors, metadata or {"format": "pt"}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a .safetensors file, on the CPU; UserError if missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is no readable safetensors file ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an HF folder, by its index if there is one; UserError if none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
            raise UserError(f"{index}: expected a weight_map of file names")
        return [folder / name for name in sorted(set(weights.values()))]
    if single.is_file():
        return [single]
    pickles = "; its .bin files are pickles, which are not read: save it again with save_pretrained"
    raise UserError(f"{folder}: has no model.safetensors{pickles if any(folder.glob('*.bin')) else ''}")


def read_config(folder: Path) -> ModelConfig:
    """ModelConfig of an HF folder; UserError if there is none, or it is not understood."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; download the model first and give its path")
    if not (file := folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json, so it is no model folder")
    return parse_config(read_json(file), str(file))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of an HF folder by name, without the tables that a model computes itself."""
    tensors = {k: v for file in weight_files(folder) for k, v in load_tensors(file)[0].items()}
    return {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}


def load_scorer(folder: Path) -> tuple[Transformer, Tensor]:
    """(model, weight [H] of its head) of a sequence classifier with one label, a reward model: its score is the
    weight times the last token's hidden state. UserError if the folder is none."""
    read_config(folder)
    tensors = read_weights(folder)
    score = tensors.pop("score.weight", None)
    if score is None or score.dim() != 2 or len(score) != 1:
        raise UserError(f"{folder}: is no reward model; expected a sequence classifier with one label (score.weight)")
    if "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # it has no head, and none is used
    return load_model(folder, tensors=tensors), score[0].float()


def load_model(folder: Path, device="cpu", dtype: torch.dtype = torch.float32,
               tensors: dict[str, Tensor] | None = None) -> Transformer:  # fmt: skip
    """The model of an HF folder, where a tied head may be missing; on "meta" it takes no memory. `tensors` in
    place of the folder's. UserError if a file is missing, damaged or not understood, or a tensor unexpected."""
    with torch.device("meta"):
        model = Transformer(read_config(folder))
    tensors = read_weights(folder) if tensors is None else tensors
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    wanted = model.state_dict()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise UserError(f"{folder}: {'lacks' if name in wanted else 'has an unexpected'} tensor {name}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(f"{folder}: {name} is {list(tensor.shape)}, expected {list(wanted[name].shape)}")
    model.load_state_dict({k: v.to(device, dtype) for k, v in tensors.items()}, assign=True)
    model.tie_head()
    return model.eval()


def check_model_folder(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """Config and tokenizer of an HF folder that is whole; UserError otherwise."""
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    if tokenizer.size > config.vocab_size:
        sizes = f"the tokenizer has {tokenizer.size} pieces, the model only {config.vocab_size} rows"
        raise UserError(f"{folder}: {sizes}")
    load_model(folder, "meta")
    stop_ids(folder, tokenizer)
    return config, tokenizer


def save_model(folder: Path, config: ModelConfig, weights: dict[str, Tensor], tokenizer: bytes) -> None:
    """An ordinary HF folder: config.json, model.safetensors, generation_config.json, tokenizer.model."""
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}
    fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    write_json(folder / "config.json", kind | asdict(config) | fixed)
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(folder / "generation_config.json", ends)
    write_atomic(folder / "tokenizer.model", tokenizer)
    left_out = "lm_head.weight" if config.tie_word_embeddings else None
    save_tensors(folder / "model.safetensors", {k: v for k, v in weights.items() if k != left_out})


def export_merged(model: Transformer, source: Path, folder: Path) -> None:
    """Write base and slot as one HF folder; tokenizer, stop ids and chat template are those of `source`."""
    folder.mkdir(parents=True)
    save_model(folder, model.config, merged_weights(model), (source / "tokenizer.model").read_bytes())
    for file in (source / name for name in MANNERS):
        if file.is_file():
            write_atomic(folder / file.name, file.read_bytes())


def stop_ids(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Every id that ends an answer: the tokenizer's end token and those of both HF configs."""
    ids = {tokenizer.eos}
    for file in (folder / "config.json", folder / "generation_config.json"):
        eos = read_json(file).get("eos_token_id") if file.is_file() else None
        ends = eos if isinstance(eos, list) else [eos]
        if not all(end is None or type(end) is int for end in ends):
            raise UserError(f"{file}: eos_token_id = {eos!r}; expected a whole number, or a list of them")
        ids |= set(ends)
    return ids - {None}


def save_adapter(folder: Path, tensors: dict[str, Tensor], config: Lora, base: str) -> None:
    """An adapter in PEFT's layout. `base` is the path of its base, relative to the adapter."""
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.r,
        "lora_alpha": config.alpha, "lora_dropout": 0.0, "target_modules": sorted(config.targets),
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    }  # fmt: skip
    write_json(folder / "adapter_config.json", described | PLAIN)
    save_tensors(folder / "adapter_model.safetensors", tensors)


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, as `write_adapter` takes them; UserError if missing or damaged."""
    return load_tensors(folder / "adapter_model.safetensors")[0]


def read_adapter_config(folder: Path) -> tuple[Lora, str]:
    """(slot settings, path of the base as written) of an adapter folder; UserError if not plain LoRA."""
    file = folder / "adapter_config.json"
    raw = read_json(file)
    odd = next((name for name in PLAIN if raw.get(name)), None)
    if raw.get("peft_type") != "LORA" or odd or raw.get("bias", "none") != "none":
        raise UserError(f"{file}: only plain LoRA adapters are read ({odd or 'peft_type or bias'} is set)")
    r, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    base = raw.get("base_model_name_or_path") or ""
    named = isinstance(targets, list) and all(isinstance(name, str) for name in [base, *targets])
    scaled = isinstance(alpha, int | float) and math.isfinite(alpha)
    if not named or not scaled or not isinstance(r, int) or r < 1:
        raise UserError(f"{file}: expected r, lora_alpha, a list of target_modules and the path of the base")
    return Lora(r, alpha, tuple(targets)), base


def save_state(path: Path, tensors: dict[str, Tensor], notes: dict) -> None:
    """Parameters and moments with the step's notes in one file, so that they cannot part."""
    path.parent.mkdir(exist_ok=True)
    save_tensors(path, tensors, {"notes": json.dumps(notes)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_state` wrote; UserError if it is damaged."""
    try:
        tensors, metadata = load_tensors(path)
        return tensors, json.loads(metadata["notes"])
    except (UserError, KeyError, ValueError):
        raise UserError(f"{path}: is no whole training state; delete it, and the stage trains anew") from None
