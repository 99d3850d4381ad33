"""The table "Which folder can I bring?" of docs/models.md: every row of it is tried here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO, random_model
from safetensors.torch import load_file, save_file
from test_checkpoint import edit_json, edit_tensors, write_shards

from minmacpo import UserError
from minmacpo.core.checkpoint import (
    check_model_folder,
    load_adapter,
    load_model,
    read_adapter_config,
    save_adapter,
    save_model,
)
from minmacpo.core.lora import (
    PEFT_PREFIX,
    LoraConfig,
    attach_lora,
    get_adapter_weights,
    set_adapter_weights,
)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def rows_of_table() -> dict[str, tuple[str, str]]:
    """{what you have: (what happens, what is said)} of the page, without backquotes."""
    page = (REPO / "docs/models.md").read_text(encoding="utf-8")
    table = page.split("### Which folder can I bring?")[1].split("\n\n")[1]
    rows = {}
    for line in table.splitlines()[2:]:
        have, happens, said = (cell.strip() for cell in line.strip("|").split("|"))
        rows[have.replace("`", "")] = (happens, said.replace("`", ""))
    return rows


ROWS = rows_of_table()


# ---- what a row is about, done to a folder with a model and an adapter ----------------------


def set_config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def set_adapter_config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter/adapter_config.json", **changes)


def to_half(folder: Path) -> None:
    edit_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].half()}),
    )


def tie_as(*, head: float | None, embedding: bool) -> Callable[[Path], None]:
    """Tie the model; its file has `head` times the embedding as a head, and perhaps the latter."""

    def tie(folder: Path) -> None:
        edit_json(folder / "config.json", tie_word_embeddings=True)

        def change(tensors) -> None:
            tensors[HEAD] = tensors[EMBEDDING] * head
            if not embedding:
                del tensors[EMBEDDING]

        edit_tensors(folder / "model.safetensors", change)

    return tie


def add_rotary_tables(folder: Path) -> None:
    """Store what transformers stored before version 4.32, in shards that an index lists."""
    name = "model.layers.0.self_attn.rotary_emb.{}"

    def change(tensors) -> None:
        for table in ("inv_freq", "cos_cached", "sin_cached"):
            tensors[name.format(table)] = torch.ones(4)

    edit_tensors(folder / "model.safetensors", change)
    write_shards(folder)


def change_index(**changes) -> Callable[[Path], None]:
    """Shards with an index in which some tensors are elsewhere; {name with _: file or None}."""

    def change(folder: Path) -> None:
        add_rotary_tables(folder)
        edit_json(folder / "config.json", tie_word_embeddings=True)
        index = folder / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        shard = folder / weight_map[HEAD]
        edit_tensors(shard, lambda tensors: tensors.pop(HEAD))
        weight_map |= {name.replace("__", "."): file for name, file in changes.items()}
        weight_map = {name: file for name, file in weight_map.items() if file}
        edit_json(index, weight_map=weight_map)

    return change


def drop_head(folder: Path) -> None:
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(HEAD))


def add_pad(**ends) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
        (folder / "tokenizer_config.json").write_text(json.dumps(ends))

    return add


def rename_weights(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def spoil(folder: Path) -> None:
    edit_tensors(
        folder / "model.safetensors", lambda tensors: tensors[EMBEDDING][0].fill_(float("nan"))
    )


def put_beside_adapter(change: Callable) -> Callable[[Path], None]:
    """Store the base's embedding, changed, with the adapter."""

    def put(folder: Path) -> None:
        file = folder / "adapter/adapter_model.safetensors"
        embedding = load_file(folder / "model.safetensors")[EMBEDDING]
        beside = {PEFT_PREFIX + EMBEDDING: change(embedding)}
        save_file(load_file(file) | beside, file, {"format": "pt"})

    return put


def nothing(folder: Path) -> None:
    pass


CASES = {
    "model.safetensors": [nothing],
    "shards with their index": [write_shards],
    "rotary tables beside the weights, or in the index alone": [
        add_rotary_tables,
        change_index(model__rotary_emb__inv_freq="model-00001-of-00003.safetensors"),
        change_index(model__layers__0__self_attn__rotary_emb__inv_freq=None),
    ],
    "no head, in a model that does not tie it": [drop_head],
    "bfloat16 or float16 weights": [to_half],
    "tied weights stored as lm_head.weight alone": [tie_as(head=1, embedding=False)],
    "tied weights stored as both, equal": [tie_as(head=1, embedding=True)],
    "tied weights stored as both, different": [tie_as(head=2, embedding=True)],
    "a token such as <pad> without a row in the embedding": [add_pad(pad_token="<pad>")],
    "an end token or a piece of text without a row": [add_pad(eos_token="<pad>")],
    "a field of config.json that is not known, as null, false, 0, 1.0 or empty": [
        set_config(residual_multiplier=1.0, num_experts=0, clip_qkv=None, mtp=False, scales=[])
    ],
    "a field of config.json that is not known, with another value": [
        set_config(residual_multiplier=0.5)
    ],
    "a model of another family": [set_config(model_type="gpt_neox")],
    "Gemma 3 with images (4b and larger)": [set_config(model_type="gemma3")],
    "a .gguf file, or a folder of it": [rename_weights("model.gguf")],
    "pickles: .bin, .pt, .pth": [
        rename_weights("pytorch_model.bin"),
        rename_weights("model.pt"),
        rename_weights("model.pth"),
    ],
    "quantised weights (GPTQ, AWQ, bitsandbytes)": [
        set_config(quantization_config={"quant_method": "gptq", "bits": 4})
    ],
    "weights that are not finite": [spoil],
    "a LoRA adapter of PEFT": [nothing],
    "a rank-stabilised adapter (use_rslora)": [set_adapter_config(use_rslora=True)],
    "an adapter beside the base's own embedding or head": [put_beside_adapter(torch.clone)],
    "an adapter beside a trained embedding or head": [put_beside_adapter(torch.neg)],
    "an adapter beside a resized embedding": [
        put_beside_adapter(lambda weight: torch.cat((weight, weight[:3])))
    ],
    "modules_to_save, trainable_token_indices, DoRA, ranks by pattern": [
        set_adapter_config(modules_to_save=["lm_head"]),
        set_adapter_config(trainable_token_indices=[3]),
        set_adapter_config(use_dora=True),
        set_adapter_config(rank_pattern={"q_proj": 2}),
    ],
}
NAME_IN_NO_CACHE = "org/name that is in no cache"


@pytest.fixture
def folder(tmp_path, tokenizer_bytes, seed) -> Path:
    """A model, and in its folder `adapter` one for it."""
    model = random_model(seed, vocab_size=400)
    save_model(tmp_path, model.config, model.state_dict(), tokenizer_bytes)
    attach_lora(model, LoraConfig())
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", get_adapter_weights(model), LoraConfig(), "..")
    return tmp_path


def read_folder(folder: Path) -> None:
    """Read the model and its adapter as the programs do."""
    check_model_folder(folder)
    model = load_model(folder)
    attach_lora(model, read_adapter_config(folder / "adapter")[0])
    set_adapter_weights(model, load_adapter(folder / "adapter"), str(folder / "adapter"))


def test_every_row_of_the_table_is_tried():
    assert set(ROWS) == {*CASES, NAME_IN_NO_CACHE}


@pytest.mark.parametrize(
    ("row", "change"), [(row, change) for row, changes in CASES.items() for change in changes]
)
def test_a_row_of_the_table_holds(row, change, folder):
    happens, said = ROWS[row]
    change(folder)

    if happens.startswith("read"):
        read_folder(folder)
        return
    assert happens == "refused"
    with pytest.raises(UserError) as caught:
        read_folder(folder)
    text = str(caught.value)
    assert said in text and "\n" not in text
    assert text.startswith(str(folder))


def test_a_name_that_is_in_no_cache():
    happens, said = ROWS[NAME_IN_NO_CACHE]
    assert happens == "refused"
    with pytest.raises(UserError) as caught:
        load_model(Path("org/name"))
    assert said in str(caught.value)
