"""Folders in and out: transformers loads what we write; what is broken is refused in a sentence."""

import contextlib
import gc
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPO, far, logits_of, random_model
from safetensors.torch import load_file, save_file

from minmacpo import UserError
from minmacpo.core.checkpoint import (
    check_model_folder,
    check_sizes,
    load_adapter,
    load_model,
    load_state,
    load_tensors,
    read_adapter_config,
    read_config,
    save_adapter,
    save_model,
    save_state,
    save_tensors,
    stop_ids,
    weight_files,
)
from minmacpo.core.lora import (
    LoraConfig,
    attach_lora,
    get_adapter_weights,
    init_adapter,
    set_adapter_weights,
)
from minmacpo.data.bpe import BytePairs
from minmacpo.data.tokenizer import load_tokenizer
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


def edit_json(file: Path, **changes) -> None:
    """Set fields of the object in a .json file."""
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | changes))


def edit_tensors(file: Path, change) -> None:
    """Call `change` on the tensors of a .safetensors file, and write them back."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def assert_same_weights(model, other) -> None:
    assert model.keys() == other.keys()
    for name, weight in model.items():
        assert torch.equal(weight, other[name]), name


def cut_short(file: Path, length: int | float) -> None:
    """Leave so many bytes of a file, or such a fraction of them; -1: all but the last."""
    content = file.read_bytes()
    if isinstance(length, float):
        length = int(length * len(content))
    file.write_bytes(content[:length])


# ---- model folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bos", "eos"), [(1, 2), (None, [2, 5])])
def test_a_folder_of_ours_loads_in_transformers(tied, bos, eos, seed, tmp_path, tokenizer_bytes):
    transformers = pytest.importorskip("transformers")
    model = random_model(
        seed,
        vocab_size=400,
        tie_word_embeddings=tied,
        bos_token_id=bos,
        eos_token_id=eos,
        rope_theta=3e4,
        rms_norm_eps=1e-4,
    )

    save_model(tmp_path, model.config, model.state_dict(), tokenizer_bytes)

    theirs, notes = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not notes[problem], problem
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.dtype == torch.float32
    tokens = torch.randint(0, 400, (2, 50))
    assert far(logits_of(model, tokens), theirs.eval()(tokens).logits) <= 1e-5
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == eos

    again = load_model(tmp_path)
    assert again.config == model.config
    assert_same_weights(model.state_dict(), again.state_dict())
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
    refused(lambda: load_model(tmp_path), tmp_path, "00002-of")

    (tmp_path / "model.safetensors.index.json").write_text("[]")
    refused(lambda: load_model(tmp_path), "model.safetensors.index.json")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_weights_get_the_dtype_that_is_asked_for(stored, asked, seed, tmp_path, tokenizer_bytes):
    model = random_model(seed, vocab_size=400)
    weights = {name: weight.to(stored) for name, weight in model.state_dict().items()}
    save_model(tmp_path, model.config, weights, tokenizer_bytes)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == str(stored).removeprefix("torch.")

    loaded = load_model(tmp_path, dtype=asked)

    for name, weight in loaded.named_parameters():
        assert weight.dtype == asked
        assert torch.equal(weight, weights[name].to(asked)), name
    assert loaded(torch.tensor([[3, 4, 5]])).dtype == asked


def test_a_sound_folder_passes_the_check(model_folder, tokenizer):
    config, checked = check_model_folder(model_folder)
    assert config == load_model(model_folder).config
    assert checked.size == tokenizer.size == config.vocab_size


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

    if not (tied and name == "lm_head.weight"):  # which is not in the file
        edit_tensors(file, lambda tensors: tensors.pop(name))
        refused(lambda: load_model(tmp_path), tmp_path, "lacks", "weight" if tied else name)
        file.write_bytes(whole)

        def narrow(tensors):
            tensors[name] = tensors[name][..., :-1].contiguous()

        edit_tensors(file, narrow)
        refused(lambda: load_model(tmp_path), tmp_path, name, "expected")
        file.write_bytes(whole)

    extra = name + "_scale"
    edit_tensors(file, lambda tensors: tensors.update({extra: torch.ones(3)}))
    refused(lambda: load_model(tmp_path), tmp_path, "unexpected", extra)


def test_old_rotary_buffers_are_passed_over(model_folder):
    before = load_model(model_folder).state_dict()
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    edit_tensors(model_folder / "model.safetensors", lambda tensors: tensors.update(buffer))

    assert_same_weights(before, load_model(model_folder).state_dict())


@pytest.mark.parametrize("length", [0, 3, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(length, model_folder):
    file = model_folder / "model.safetensors"
    cut_short(file, length)
    refused(lambda: load_model(model_folder), file)


def test_pickles_and_missing_files_are_refused(model_folder, tmp_path):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    refused(lambda: load_model(model_folder), model_folder, ".bin", "pickle", "save_pretrained")

    (model_folder / "pytorch_model.bin").unlink()
    text = refused(lambda: load_model(model_folder), model_folder, "model.safetensors")
    assert ".bin" not in text

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
    refused(lambda: check_model_folder(tmp_path), tmp_path, "400", "399", "trained with")


PAD = {"content": "<pad>", "special": True}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<pad>": 400}),
        ("added_tokens.json", {"<pad>": 400, "<img>": 407}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": PAD}, "pad_token": "<pad>"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "<s>"}, "400": PAD}}),
    ],
)
def test_special_tokens_without_a_row_are_no_hindrance(file, content, model_folder, tokenizer):
    """Llama 2's <pad> is one; nothing uses it, and a template that would finds no such token."""
    (model_folder / file).write_text(json.dumps(content))
    config, checked = check_model_folder(model_folder)
    assert checked.size == config.vocab_size == 400
    assert checked.special == tokenizer.special
    assert checked.encode("a <pad> b") == tokenizer.encode("a <pad> b")
    assert checked.decode([*checked.encode("a b"), 400]) == "a b"


@pytest.mark.parametrize(("known", "pad"), [(True, 258), (True, 261), (False, 258)])
def test_special_tokens_of_a_tokenizer_json_without_a_row(known, pad, model_folder):
    """Read by own means or by `tokenizers`; ids that the file leaves out are none."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate([*letters, "</s>", "ab"])}
    content = {
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": known,
        },
        "normalizer": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "added_tokens": [
            {"id": 256, "content": "</s>", "special": True},
            {"id": pad, "content": "<pad>", "special": True},
        ],
    }
    for token in content["added_tokens"]:
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    (model_folder / "tokenizer.model").unlink()
    (model_folder / "tokenizer.json").write_text(json.dumps(content))
    (model_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    config = read_config(model_folder)
    tokenizer = load_tokenizer(model_folder)
    assert isinstance(tokenizer.processor, BytePairs) == known

    check_sizes(model_folder, replace(config, vocab_size=258), tokenizer)

    assert tokenizer.size == 258 and tokenizer.special == {"</s>": 256}
    assert tokenizer.encode("ab") == [257]
    with pytest.raises(UserError, match="258 pieces, the model only 257 rows, and none for 'ab'"):
        check_sizes(model_folder, replace(config, vocab_size=257), load_tokenizer(model_folder))


@pytest.mark.parametrize("end", ["bos", "eos"])
def test_a_begin_or_end_token_without_a_row_is_refused(end, model_folder):
    added = {"added_tokens_decoder": {"400": PAD}, f"{end}_token": "<pad>"}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(added))
    refused(lambda: check_model_folder(model_folder), "401 pieces", "400 rows", "<pad>")


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, 2, {2}),
        ([2, 7], 5, {2, 5, 7}),
        (None, [9], {2, 9}),
        (3, None, {2, 3}),
        (None, None, {2}),
    ],
)
def test_stop_ids_are_those_of_all_three_files(
    config, generation, expected, model_folder, tokenizer
):
    """The tokenizer's end token, which is 2, is always one of them."""
    edit_json(model_folder / "config.json", eos_token_id=config)
    edit_json(model_folder / "generation_config.json", eos_token_id=generation)
    assert stop_ids(model_folder, tokenizer) == expected

    (model_folder / "generation_config.json").unlink()
    only_in_generation = {5, 9}
    assert stop_ids(model_folder, tokenizer) == expected - only_in_generation


# ---- damaged and hostile folders ----------------------------------------------------------------


def write_shards(folder: Path) -> None:
    """Divide the weights of a folder among three files, with their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{number % 3 + 1:05}-of-00003.safetensors"
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def sharded_folder(model_folder):
    """The folder with its weights in three files, and their index."""
    write_shards(model_folder)
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
def test_an_index_that_leads_out_of_its_folder(name, sharded_folder, tmp_path):
    shard = sharded_folder / "model-00002-of-00003.safetensors"
    (sharded_folder / "sub").mkdir()
    for copy in ("x.safetensors", "sub/x.safetensors", "../other.safetensors"):
        shutil.copy(shard, sharded_folder / copy)
    (sharded_folder / "link").symlink_to("../other.safetensors")
    index = sharded_folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for tensor, file in weight_map.items():
        if file == shard.name:
            weight_map[tensor] = name
    edit_json(index, weight_map=weight_map)

    refused(lambda: load_model(sharded_folder), index, "no file of this folder")


@pytest.mark.parametrize("problem", ["in another file", "in no file", "a tensor too many"])
def test_an_index_that_says_something_else_than_the_files(problem, sharded_folder):
    index = sharded_folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = min(tensor for tensor, file in weight_map.items() if "00002" in file)
    if problem == "in another file":
        weight_map[name] = "model-00003-of-00003.safetensors"
    elif problem == "in no file":
        del weight_map[name]
    else:
        weight_map["model.extra.weight"] = "model-00001-of-00003.safetensors"
    edit_json(index, weight_map=weight_map)

    refused(lambda: load_model(sharded_folder), index, "says that")


def test_links_within_a_folder_and_those_of_the_hubs_cache(sharded_folder, tmp_path):
    before = load_model(sharded_folder).state_dict()
    (tmp_path / "hub/blobs").mkdir(parents=True)
    (tmp_path / "hub/snapshots").mkdir()
    folder = sharded_folder.rename(tmp_path / "hub/snapshots/abc")
    for number, file in enumerate(folder.iterdir()):
        file.rename(tmp_path / f"hub/blobs/{number}")
        file.symlink_to(f"../../blobs/{number}")
    (folder / "copy").symlink_to("model-00001-of-00003.safetensors")

    assert_same_weights(before, load_model(folder).state_dict())


def test_a_shard_that_is_missing_doubled_or_a_folder(sharded_folder):
    shard = sharded_folder / "model-00002-of-00003.safetensors"
    other = sharded_folder / "model-00003-of-00003.safetensors"
    edit_tensors(other, lambda tensors: tensors.update(load_file(shard)))
    refused(lambda: load_model(sharded_folder), "and so has", shard.name)

    shard.unlink()
    refused(lambda: load_model(sharded_folder), shard, "is missing")

    shard.mkdir()
    refused(lambda: load_model(sharded_folder), shard, "is a folder")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value, model_folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(
        model_folder / "model.safetensors", lambda tensors: tensors[name][-1, -1:].fill_(value)
    )
    refused(lambda: load_model(model_folder), name, "not finite")


def test_a_tied_head_may_be_stored_but_not_differ(model_folder):
    edit_json(model_folder / "config.json", tie_word_embeddings=True)
    refused(lambda: load_model(model_folder), "head of its own")

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(model_folder / "model.safetensors", tie)
    model = load_model(model_folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tied_embedding_may_be_stored_as_the_head_alone(sharded, seed, tmp_path, tokenizer_bytes):
    transformers = pytest.importorskip("transformers")
    model = random_model(seed, vocab_size=400, tie_word_embeddings=True)
    save_model(tmp_path, model.config, model.state_dict(), tokenizer_bytes)

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(tmp_path / "model.safetensors", rename)
    if sharded:
        write_shards(tmp_path)

    again = load_model(tmp_path)
    assert_same_weights(again.state_dict(), model.state_dict())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    quantized = load_model(tmp_path, dtype=torch.bfloat16, quantization="int8")
    assert torch.equal(quantized.lm_head.weight, model.lm_head.weight.bfloat16())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, again.lm_head.weight)

    # the head of a model that is not tied is no embedding
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    refused(lambda: load_model(tmp_path), "lacks tensor model.embed_tokens.weight")


def test_what_is_no_weight_file(model_folder):
    file = model_folder / "model.safetensors"
    name = "model.norm.weight"

    def to_int8(tensors):
        tensors[name] = tensors[name].to(torch.int8)

    edit_tensors(file, to_int8)
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
    """Any of them: a sentence, or the tensors as they were (a blank, or the note on the format)."""
    file = model_folder / "model.safetensors"
    whole = file.read_bytes()
    rng = random.Random(seed)
    before = load_model(model_folder).state_dict()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    sentences = set()
    for place in [*range(8), *rng.sample(range(8, header_end), 150)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            after = load_model(model_folder).state_dict()
        except UserError as error:
            text = str(error)
            assert "\n" not in text and str(model_folder) in text and len(text) < 600
            sentences.add(text.split("(")[0])
        else:
            assert_same_weights(before, after)
    assert len(sentences) > 3


def test_a_name_of_the_hub_is_answered_with_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refused(
        lambda: load_model(Path("org/some-Name.1")),
        "hf download org/some-Name.1 --local-dir org/some-Name.1",
    )
    assert "org/some-Name.1: is no folder" in text
    assert "hf " not in refused(lambda: load_model(tmp_path / "nowhere"), "is no folder")

    (tmp_path / "file").write_text("x")
    refused(lambda: load_model(tmp_path / "file"), "is a file", "give the folder")


@pytest.mark.parametrize(
    ("name", "what", "remedy"),
    [
        ("llama-2-7b.Q4_K_M.gguf", "llama.cpp", "safetensors"),
        ("pytorch_model.bin", "pickle", "save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "pickle", "save_pretrained"),
        ("consolidated.00.pth", "pickle", "save_pretrained"),
        ("model.pt", "pickle", "save_pretrained"),
    ],
)
def test_weights_of_other_kinds_are_named_with_the_remedy(name, what, remedy, model_folder):
    (model_folder / "model.safetensors").rename(model_folder / name)

    for path in (model_folder / name, model_folder):
        refused(lambda path=path: load_model(path), path, Path(name).suffix, what, remedy)
    (model_folder / "config.json").unlink()
    refused(lambda: load_model(model_folder), "config.json", Path(name).suffix, what, remedy)


def test_loading_a_model_leaves_torchs_compiler_alone(model_folder):
    """Its import takes a second and 78 MiB."""
    code = (
        "import sys; from pathlib import Path; from minmacpo.core.checkpoint import load_model; "
        f"load_model(Path({str(model_folder)!r})); print('torch._dynamo' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert ended.stdout == "False\n"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loading_takes_the_memory_of_the_weights(stored, seed, tmp_path, tokenizer_bytes):
    model = random_model(seed, hidden_size=256, intermediate_size=1024, num_hidden_layers=12)
    weights = {name: weight.to(stored) for name, weight in model.state_dict().items()}
    save_model(tmp_path, model.config, weights, tokenizer_bytes)
    del model, weights
    load_model(tmp_path)
    gc.collect()
    resident = read_proc("self/status", r"VmRSS:\s*(\d+)")
    if resident is None:
        pytest.skip("needs /proc")
    before = int(resident) * 1024
    reset_peaks("cpu")

    loaded = load_model(tmp_path)

    held = sum(param.nbytes for param in loaded.parameters())
    file_size = (tmp_path / "model.safetensors").stat().st_size
    beside = peak_mb() * 2**20 - before - held
    assert beside < 0.3 * file_size + 2**21  # read as a whole, it would be all of the file


# ---- adapters -----------------------------------------------------------------------------------


@pytest.fixture
def adapter_tensors(seed) -> dict[str, torch.Tensor]:
    """A random adapter for `random_model`."""
    model = random_model(seed)
    attach_lora(model, LoraConfig(r=3, alpha=5.0, targets=("up_proj", "k_proj")))
    init_adapter(model, seed)
    tensors = get_adapter_weights(model)
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape))
    return tensors


@pytest.fixture
def adapter_folder(tmp_path, adapter_tensors) -> Path:
    """The folder that such an adapter was saved in."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = LoraConfig(r=3, alpha=5.0, targets=("up_proj", "k_proj"))
    save_adapter(folder, adapter_tensors, config, "../base")
    return folder


def test_an_adapter_comes_back_as_it_was(adapter_folder, adapter_tensors):
    assert_same_weights(load_adapter(adapter_folder), adapter_tensors)
    config, base = read_adapter_config(adapter_folder)
    assert config == LoraConfig(r=3, alpha=5.0, targets=("k_proj", "up_proj"))
    assert base == "../base"


def test_adapter_files_that_are_foreign_or_damaged(adapter_folder, adapter_tensors):
    file = adapter_folder / "adapter_model.safetensors"
    cut_short(file, -5)
    refused(lambda: load_adapter(adapter_folder), file)

    save_tensors(file, adapter_tensors | {"lm_head.weight": torch.ones(2, 2)})
    model = random_model(0)
    attach_lora(model, read_adapter_config(adapter_folder)[0])
    tensors = load_adapter(adapter_folder)
    refused(
        lambda: set_adapter_weights(model, tensors, str(adapter_folder)),
        adapter_folder,
        "lm_head.weight",
    )

    file.rename(adapter_folder / "adapter_model.bin")
    refused(lambda: load_adapter(adapter_folder), "adapter_model.bin", "pickle", "save_pretrained")
    (adapter_folder / "adapter_model.bin").unlink()
    refused(lambda: load_adapter(adapter_folder), file, "missing")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("use_rslora", "yes"),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("layers_to_transform", [0]),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("target_modules", "(q_proj"),
        ("target_modules", None),
        ("target_modules", [1]),
        ("r", None),
        ("r", "8"),
        ("r", 0),
        ("base_model_name_or_path", 7),
        ("lora_bias", True),
        ("exclude_modules", "x"),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["a"]),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("something_new", {"a": 1}),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused_by_the_fields_name(
    field, value, adapter_folder
):
    file = adapter_folder / "adapter_config.json"
    edit_json(file, **{field: value})
    refused(lambda: read_adapter_config(adapter_folder), file, field)


@pytest.mark.parametrize("content", ["", "[]", "null"])
def test_an_adapter_config_that_is_no_object_is_refused(content, adapter_folder):
    file = adapter_folder / "adapter_config.json"
    file.write_text(content)
    refused(lambda: read_adapter_config(adapter_folder), file)


# ---- states of trainings ------------------------------------------------------------------------


def test_a_state_comes_back_bit_for_bit(tmp_path, seed):
    file = tmp_path / "state.safetensors"
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).double(),
        "c": torch.randn(4, 4).T,
        "d": torch.tensor(3.0),
    }
    notes = {"step": 3, "rows": [{"loss": 0.1}, {"loss": 1e-30}], "text": "\u00e9\n"}

    save_state(file, tensors, notes)
    loaded, loaded_notes = load_state(file)

    assert loaded_notes == notes
    assert_same_weights(loaded, tensors)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    save_state(file, {"a": tensors["a"] + 1}, {"step": 4})
    assert torch.equal(loaded["a"], tensors["a"]), "a state in memory must not change with its file"
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("length", [0, 7, 50, 0.5, -1])
def test_a_damaged_state_says_what_to_delete(length, tmp_path):
    file = tmp_path / "state.safetensors"
    save_state(file, {"a": torch.ones(40)}, {"step": 3})
    cut_short(file, length)
    refused(lambda: load_state(file), file, "delete it")


def test_a_bit_flipped_in_a_state_is_noticed(tmp_path, seed):
    """Wherever it is; one that is not, such as of a blank in the header, changes nothing."""
    file = tmp_path / "state.safetensors"
    rng = random.Random(seed)
    tensors = {"a": torch.randn(40), "b": torch.tensor(3.0)}
    for _ in range(60):
        save_state(file, tensors, {"step": 3})
        damaged = bytearray(file.read_bytes())
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with contextlib.suppress(UserError):
            loaded, notes = load_state(file)
            assert notes == {"step": 3}
            assert_same_weights(loaded, tensors)


@pytest.mark.parametrize("metadata", [None, {"notes": "{"}, {"note": "{}"}])
def test_a_state_without_notes_says_what_to_delete(metadata, tmp_path):
    file = tmp_path / "state.safetensors"
    save_tensors(file, {"a": torch.ones(2)}, metadata)
    refused(lambda: load_state(file), file, "delete it")


# ---- files of tensors ---------------------------------------------------------------------------


def test_tensors_of_any_shape_dtype_and_layout_come_back(tmp_path, seed):
    file = tmp_path / "x.safetensors"
    tensors = {"transposed": torch.randn(5, 3).T}
    for shape in [(3, 5), (), (0, 4), (7,), (2, 3, 4), (1, 1)]:
        for dtype in [torch.float32, torch.bfloat16, torch.float16, torch.float64]:
            tensors[f"\u00e9 {shape} {dtype}"] = torch.randn(shape).to(dtype)

    save_tensors(file, tensors)

    assert_same_weights(load_file(file), tensors)
    loaded, metadata = load_tensors(file)
    assert_same_weights(loaded, tensors)
    assert metadata == {"format": "pt"}, "transformers asks for it"
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype


def test_what_is_written_replaces_the_old_file_only_when_whole(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    save_tensors(file, {"a": torch.ones(2)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_tensors(file, {"a": torch.zeros(2)})

    assert torch.equal(load_tensors(file)[0]["a"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_no_other_file_is_left_in_a_model_folder(model_folder):
    assert {path.name for path in model_folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
    }
