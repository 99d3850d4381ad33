"""Folders in and out: what we write loads in transformers, what is broken is refused in one sentence."""

import contextlib
import gc
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import far, logits_of, random_model
from safetensors.torch import load_file, save_file

from minmacpo import UserError
from minmacpo.config.schema import Lora
from minmacpo.core.checkpoint import (
    check_model_folder,
    load_adapter,
    load_model,
    load_state,
    load_tensors,
    read_adapter_config,
    save_adapter,
    save_model,
    save_state,
    save_tensors,
    stop_ids,
    weight_files,
)
from minmacpo.core.lora import attach_lora, get_adapter_weights, init_adapter, set_adapter_weights
from minmacpo.runtime.device import peak_mb, read_proc, reset_peaks


def refused(call, *words) -> str:
    """The UserError of `call`: one clear sentence that holds `words`."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400, text
    for word in words:
        assert str(word) in text, (word, text)
    return text


def rewrite(file, change) -> None:
    """Change a .safetensors file's tensors, or a .json file's object, in place."""
    if file.suffix == ".json":
        value = json.loads(file.read_text())
        file.write_text(json.dumps(change(value) or value))
    else:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})


# ---- HF model folders -----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ends", [(1, 2), (None, [2, 5])])
def test_a_folder_of_ours_loads_in_transformers(tied, ends, seed, tmp_path, tokenizer_bytes):
    transformers = pytest.importorskip("transformers")
    model = random_model(
        seed,
        vocab_size=400,
        tie_word_embeddings=tied,
        bos_token_id=ends[0],
        eos_token_id=ends[1],
        rope_theta=3e4,
        rms_norm_eps=1e-4,
    )
    save_model(tmp_path, model.config, model.state_dict(), tokenizer_bytes)
    theirs, notes = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(
        notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    tokens = torch.randint(0, 400, (2, 50))
    assert far(logits_of(model, tokens), theirs.eval()(tokens).logits) <= 1e-5
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == ends[1]
    again = load_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer_bytes


def test_shards_are_read_by_their_index(seed, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(weight_files(tmp_path)) > 2
    tokens = torch.randint(0, 50, (2, 30))
    assert far(logits_of(load_model(tmp_path), tokens), theirs(tokens).logits) <= 1e-5
    weight_files(tmp_path)[1].unlink()
    refused(
        lambda: load_model(tmp_path), sorted(tmp_path.glob("*.index.json"))[0].parent, "00002-of"
    )
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    refused(lambda: load_model(tmp_path), "model.safetensors.index.json")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_weights_get_the_dtype_that_is_asked_for(stored, wanted, seed, tmp_path, tokenizer_bytes):
    model = random_model(seed, vocab_size=400)
    weights = {k: v.to(stored) for k, v in model.state_dict().items()}
    save_model(tmp_path, model.config, weights, tokenizer_bytes)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(
        stored
    ).removeprefix("torch.")
    loaded = load_model(tmp_path, dtype=wanted)
    for name, weight in loaded.named_parameters():
        assert weight.dtype == wanted and torch.equal(weight, weights[name].to(wanted)), name
    assert loaded(torch.tensor([[3, 4, 5]])).dtype == wanted


def test_a_sound_folder_passes_the_check(model_folder, tokenizer):
    config, found = check_model_folder(model_folder)
    assert (
        config == load_model(model_folder).config
        and found.size == tokenizer.size == config.vocab_size
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_missing_extra_or_misshapen(name, tied, seed, tmp_path, tokenizer_bytes):
    model = random_model(seed, vocab_size=400, tie_word_embeddings=tied)
    save_model(tmp_path, model.config, model.state_dict(), tokenizer_bytes)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    if not (tied and name == "lm_head.weight"):
        rewrite(file, lambda tensors: tensors.pop(name))
        refused(lambda: load_model(tmp_path), tmp_path, "lacks", name if not tied else "weight")
        file.write_bytes(whole)
        rewrite(file, lambda tensors: tensors.update({name: tensors[name][..., :-1].contiguous()}))
        refused(lambda: load_model(tmp_path), tmp_path, name, "expected")
        file.write_bytes(whole)
    rewrite(file, lambda tensors: tensors.update({name + "_scale": torch.ones(3)}))
    refused(lambda: load_model(tmp_path), tmp_path, "unexpected", name + "_scale")


def test_old_rotary_buffers_are_passed_over(model_folder):
    before = load_model(model_folder).state_dict()
    rewrite(
        model_folder / "model.safetensors",
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}),
    )
    after = load_model(model_folder).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("keep", [0, 3, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(keep, model_folder):
    file = model_folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused(lambda: load_model(model_folder), file)


def test_pickles_and_missing_files_are_refused(model_folder, tmp_path):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    refused(lambda: load_model(model_folder), model_folder, ".bin", "pickle", "save_pretrained")
    (model_folder / "pytorch_model.bin").unlink()
    assert ".bin" not in refused(
        lambda: load_model(model_folder), model_folder, "model.safetensors"
    )
    refused(lambda: load_model(tmp_path / "nowhere"), tmp_path / "nowhere")
    (model_folder / "config.json").unlink()
    refused(lambda: load_model(model_folder), model_folder, "config.json")


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '"llama"', '{"model_type": "llama"}', "\udcff"]
)
def test_a_broken_config_is_refused(content, model_folder):
    file = model_folder / "config.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(lambda: load_model(model_folder), file)


def test_a_tokenizer_that_is_missing_broken_or_too_big(model_folder):
    file = model_folder / "tokenizer.model"
    file.write_bytes(b"this is no model")
    refused(lambda: check_model_folder(model_folder), file)
    file.unlink()
    refused(lambda: check_model_folder(model_folder), model_folder, "tokenizer.model")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(seed, tmp_path, tokenizer_bytes):
    model = random_model(seed, vocab_size=399)
    save_model(tmp_path, model.config, model.state_dict(), tokenizer_bytes)
    refused(lambda: check_model_folder(tmp_path), tmp_path, "400", "399")


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        (2, 2, {2}),
        ([2, 7], 5, {2, 5, 7}),
        (None, [9], {2, 9}),
        (3, None, {2, 3}),
        (None, None, {2}),
    ],
)
def test_stop_ids_are_those_of_all_three_files(config, generation, wanted, model_folder, tokenizer):
    rewrite(model_folder / "config.json", lambda raw: raw.update(eos_token_id=config))
    rewrite(
        model_folder / "generation_config.json", lambda raw: raw.update(eos_token_id=generation)
    )
    assert stop_ids(model_folder, tokenizer) == wanted
    (model_folder / "generation_config.json").unlink()
    assert stop_ids(model_folder, tokenizer) == wanted - ({5, 9} if generation != 2 else set())


# ---- damaged and hostile folders ------------------------------------------------------------


@pytest.fixture
def shards(model_folder):
    """The folder with its weights in three shards, and its index."""
    tensors = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file(
            {n: tensors[n] for n in names if places[n] == file},
            model_folder / file,
            {"format": "pt"},
        )
    (model_folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    assert load_model(model_folder)
    return model_folder


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "",
        "./x.safetensors",
        "link",
    ],
)
def test_an_index_that_leads_out_of_its_folder(name, shards, tmp_path):
    shard = shards / "model-00002-of-00003.safetensors"
    for place in (tmp_path / "other.safetensors", shards / "x.safetensors"):
        shutil.copy(shard, place)
    (shards / "sub").mkdir()
    shutil.copy(shard, shards / "sub/x.safetensors")
    (shards / "link").symlink_to("../other.safetensors")
    index = shards / "model.safetensors.index.json"
    rewrite(
        index,
        lambda raw: {
            "weight_map": {k: name if v == shard.name else v for k, v in raw["weight_map"].items()}
        },
    )
    refused(lambda: load_model(shards), index, "no file of this folder")


@pytest.mark.parametrize(
    "change",
    [
        lambda places, name: places.update({name: "model-00003-of-00003.safetensors"}),
        lambda places, name: places.__delitem__(name),
        lambda places, name: places.update(
            {"model.extra.weight": "model-00001-of-00003.safetensors"}
        ),
    ],
)
def test_an_index_that_says_something_else_than_the_shards(shards, change):
    index = shards / "model.safetensors.index.json"
    name = min(
        name
        for name, file in json.loads(index.read_text())["weight_map"].items()
        if "00002" in file
    )
    rewrite(index, lambda raw: change(raw["weight_map"], name))
    refused(lambda: load_model(shards), index, "says that")


def test_links_within_a_folder_and_those_of_the_hubs_cache(shards, tmp_path):
    before = load_model(shards).state_dict()
    (tmp_path / "hub/blobs").mkdir(parents=True)
    (tmp_path / "hub/snapshots").mkdir()
    home = shards.rename(tmp_path / "hub/snapshots/abc")
    for number, file in enumerate(home.iterdir()):
        file.rename(tmp_path / f"hub/blobs/{number}")
        file.symlink_to(f"../../blobs/{number}")
    (home / "copy").symlink_to("model-00001-of-00003.safetensors")
    after = load_model(home).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_shard_that_is_missing_doubled_or_a_folder(shards):
    shard, other = (shards / f"model-0000{i}-of-00003.safetensors" for i in (2, 3))
    rewrite(other, lambda tensors: tensors.update(load_file(shard)))
    refused(lambda: load_model(shards), "and so has", shard.name)
    shard.unlink()
    refused(lambda: load_model(shards), shard, "is missing")
    shard.mkdir()
    refused(lambda: load_model(shards), shard, "is a folder")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value, model_folder):
    file, name = model_folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    rewrite(file, lambda tensors: tensors[name][-1, -1:].fill_(value))
    refused(lambda: load_model(model_folder), name, "not finite")


def test_a_tied_head_may_be_stored_but_not_differ(model_folder):
    rewrite(model_folder / "config.json", lambda raw: raw.update(tie_word_embeddings=True))
    refused(lambda: load_model(model_folder), "head of its own")
    file = model_folder / "model.safetensors"
    rewrite(
        file,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    model = load_model(model_folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_no_weight_file(model_folder):
    file, name = model_folder / "model.safetensors", "model.norm.weight"
    rewrite(file, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(lambda: load_model(model_folder), name, "I8")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n")
    refused(lambda: load_model(model_folder), file, "git lfs pull")
    file.unlink()
    file.mkdir()
    refused(lambda: load_model(model_folder), file, "is a folder")
    (model_folder / "config.json").unlink()
    (model_folder / "config.json").mkdir()
    refused(lambda: load_model(model_folder), model_folder / "config.json")


def test_no_flipped_bit_of_a_header_goes_unseen(model_folder, seed):
    """Any of them: a sentence, or the tensors as they were (a space, or the note on the format)."""
    file = model_folder / "model.safetensors"
    whole, rng, told = file.read_bytes(), random.Random(seed), set()
    before = load_model(model_folder).state_dict()
    size = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(8), *rng.sample(range(8, size), 150)]:
        bad = bytearray(whole)
        bad[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        try:
            after = load_model(model_folder).state_dict()
        except UserError as error:
            assert (
                "\n" not in str(error) and str(model_folder) in str(error) and len(str(error)) < 600
            )
            told.add(str(error).split("(")[0])
        else:
            assert all(torch.equal(before[name], after[name]) for name in before), place
    assert len(told) > 3


def test_a_name_of_the_hub_is_answered_with_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refused(
        lambda: load_model(Path("org/some-Name.1")),
        "hf download org/some-Name.1 --local-dir org/some-Name.1",
    )
    assert "org/some-Name.1: is no folder" in text
    assert "hf " not in refused(lambda: load_model(tmp_path / "nowhere"), "is no folder")
    (tmp_path / "file").write_text("x")
    refused(lambda: load_model(tmp_path / "file"), "is a file")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loading_takes_the_memory_of_the_weights(stored, seed, tmp_path, tokenizer_bytes):
    model = random_model(seed, hidden_size=256, intermediate_size=1024, num_hidden_layers=12)
    save_model(
        tmp_path,
        model.config,
        {k: v.to(stored) for k, v in model.state_dict().items()},
        tokenizer_bytes,
    )
    del model
    load_model(tmp_path)
    gc.collect()
    size = (tmp_path / "model.safetensors").stat().st_size
    reset_peaks("cpu")
    before = int(read_proc("self/status", r"VmRSS:\s*(\d+)") or pytest.skip("needs /proc")) * 1024
    found = load_model(tmp_path)
    weights = sum(p.numel() * p.element_size() for p in found.parameters())
    assert (
        peak_mb() * 2**20 - before - weights < 0.3 * size + 2**21
    )  # read at once, it would be all of `size`


# ---- adapters -------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path, seed):
    """(folder, tensors) of an adapter that we wrote."""
    model = random_model(seed)
    config = Lora(r=3, alpha=5.0, targets=("up_proj", "k_proj"))
    attach_lora(model, config)
    init_adapter(model, seed)
    tensors = {
        key: tensor + torch.randn(tensor.shape)
        for key, tensor in get_adapter_weights(model).items()
    }
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, tensors, config, "../base")
    return folder, tensors


def test_an_adapter_comes_back_as_it_was(adapter):
    folder, tensors = adapter
    found = load_adapter(folder)
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[key], tensors[key]) for key in tensors
    )
    config, base = read_adapter_config(folder)
    assert (config.r, config.alpha, set(config.targets), base) == (
        3,
        5.0,
        {"up_proj", "k_proj"},
        "../base",
    )


def test_adapter_files_that_are_foreign_or_damaged(adapter, tmp_path):
    folder, tensors = adapter
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    refused(lambda: load_adapter(folder), file)
    save_tensors(file, tensors | {"lm_head.weight": torch.ones(2, 2)})
    model = random_model(0)
    attach_lora(model, read_adapter_config(folder)[0])
    refused(
        lambda: set_adapter_weights(model, load_adapter(folder), str(folder)),
        folder,
        "lm_head.weight",
    )
    file.rename(folder / "adapter_model.bin")
    refused(lambda: load_adapter(folder), "adapter_model.bin", "pickle", "save_pretrained")
    (folder / "adapter_model.bin").unlink()
    refused(lambda: load_adapter(folder), file, "missing")


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"use_rslora": "yes"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"layers_to_transform": [0]},
        {"lora_alpha": None},
        {"target_modules": "(q_proj"},
        {"target_modules": None},
        {"r": None},
        {"r": "8"},
        {"r": 0},
        {"lora_alpha": "16"},
        {"target_modules": [1]},
        {"lora_bias": True},
        {"exclude_modules": "x"},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["a"]},
        {"layer_replication": [[0, 1]]},
        {"init_lora_weights": "pissa"},
        {"fan_in_fan_out": True},
        {"use_qalora": True},
        {"something_new": {"a": 1}},
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(changes, adapter):
    file = adapter[0] / "adapter_config.json"
    rewrite(file, lambda raw: raw.update(changes))
    refused(lambda: read_adapter_config(adapter[0]), file)


@pytest.mark.parametrize("content", ["", "[]", "null"])
def test_an_adapter_config_that_is_no_object_is_refused(content, adapter):
    file = adapter[0] / "adapter_config.json"
    file.write_text(content)
    refused(lambda: read_adapter_config(adapter[0]), file)


# ---- states ---------------------------------------------------------------------------------


def test_a_state_comes_back_bit_for_bit(tmp_path, seed):
    file = tmp_path / "state.safetensors"
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).double(),
        "c": torch.randn(4, 4).T,
        "d": torch.tensor(3.0),
    }
    notes = {"step": 3, "rows": [{"loss": 0.1}, {"loss": float("1e-30")}], "text": "é\n"}
    save_state(file, tensors, notes)
    found, told = load_state(file)
    assert told == notes and found.keys() == tensors.keys()
    assert all(
        torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype
        for key in tensors
    )
    save_state(file, {"a": tensors["a"] + 1}, {"step": 4})
    assert torch.equal(found["a"], tensors["a"]), "a state in memory must not change with its file"
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("keep", [0, 7, 50, 0.5, -1])
def test_a_damaged_state_says_what_to_delete(keep, tmp_path):
    file = tmp_path / "state.safetensors"
    save_state(file, {"a": torch.ones(40)}, {"step": 3})
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused(lambda: load_state(file), file, "delete it")


def test_a_bit_flipped_in_a_state_is_noticed(tmp_path, seed):
    """Wherever it is; what is not noticed, such as another blank in the header, changes nothing."""
    file, rng, tensors = (
        tmp_path / "state.safetensors",
        random.Random(seed),
        {"a": torch.randn(40), "b": torch.tensor(3.0)},
    )
    for _ in range(60):
        save_state(file, tensors, {"step": 3})
        text, bit = bytearray(file.read_bytes()), rng.randrange(8 * file.stat().st_size)
        text[bit // 8] ^= 1 << bit % 8
        file.write_bytes(text)
        with contextlib.suppress(UserError):
            found, notes = load_state(file)
            assert notes == {"step": 3} and found.keys() == tensors.keys()
            assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("metadata", [None, {"notes": "{"}, {"note": "{}"}])
def test_a_state_without_notes_says_what_to_delete(metadata, tmp_path):
    file = tmp_path / "state.safetensors"
    save_tensors(file, {"a": torch.ones(2)}, metadata)
    refused(lambda: load_state(file), file, "delete it")


def test_tensors_of_any_shape_dtype_and_layout_come_back(tmp_path, seed):
    file = tmp_path / "x.safetensors"
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (0, 4), (7,), (2, 3, 4), (1, 1)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    tensors = {"transposed": torch.randn(5, 3, generator=generator).T}
    for shape in shapes:
        for dtype in dtypes:
            name = f"\u00e9 {shape} {dtype}"
            tensors[name] = torch.randn(shape, generator=generator).to(dtype)

    save_tensors(file, tensors)

    for loaded in (load_file(file), load_tensors(file)[0]):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor), name


def test_what_is_written_replaces_the_old_file_only_when_whole(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    save_tensors(file, {"a": torch.ones(2)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_tensors(file, {"a": torch.zeros(2)})
    assert torch.equal(load_tensors(file)[0]["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_metadata_is_what_transformers_asks_for(model_folder, tmp_path):
    assert load_tensors(model_folder / "model.safetensors")[1] == {"format": "pt"}
    shutil.copytree(model_folder, tmp_path / "copy")
    assert re.fullmatch(
        r"[a-z_.0-9 ]+", " ".join(sorted(p.name for p in (tmp_path / "copy").iterdir()))
    )
