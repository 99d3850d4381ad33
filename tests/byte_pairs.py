"""Small tokenizer.json files of the families, made with `tokenizers`, which is the oracle too."""

import json
from collections.abc import Callable

import pytest

from minmacpo.data.bpe import byte_letters
from minmacpo.data.pre_tokenizers import KNOWN, PreTokenizer

SPECIAL = [
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
# {"smollm-2": the known way in which SmolLM 2 cuts texts into words}
STYLES = {known.name.lower().replace(" ", "-"): known for known in KNOWN}
SMOLLM_2_LACKS = b"\x04\x06\x13\x14\x16\x1d"  # bytes without a token in the published file
NOTES = {  # tokenizer_config.json
    "gpt-2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "smollm-2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "qwen-2": {"bos_token": None, "eos_token": "<|im_end|>"},
    "llama-3": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"content": "<|eot_id|>", "special": True},
    },
}


def pre_tokenizer_json(known: PreTokenizer) -> dict:
    """The pre_tokenizer of a tokenizer.json, as published files have it."""
    steps = []
    for step in known.steps:
        extra = {"trim_offsets": True} if step["type"] == "ByteLevel" else {}
        steps.append(step | extra)
    if len(steps) == 1:
        return steps[0]
    return {"type": "Sequence", "pretokenizers": steps}


def empty_file(pre_tokenizer: dict | None, **model) -> str:
    """The content of a tokenizer.json without vocabulary."""
    file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []} | model,
    }
    return json.dumps(file)


def train_file(style: str, texts: list[str], vocab: int = 700) -> str:
    """The content of a tokenizer.json in the style of a family; skips without the package."""
    tokenizers = pytest.importorskip("tokenizers")
    content = empty_file(pre_tokenizer_json(STYLES[style]), ignore_merges=style == "llama-3")
    tokenizer = tokenizers.Tokenizer.from_str(content)
    if style.startswith("qwen"):
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["<tool_call>"])
    return tokenizer.to_str()


def lacking_bytes(file: str, lacking: bytes) -> str:
    """The content of a tokenizer.json without tokens for some bytes, and what is merged of them."""
    content = json.loads(file)
    vocab = content["model"]["vocab"]
    for byte in lacking:
        vocab.pop(byte_letters()[byte])
    merges = []
    for left, right in content["model"]["merges"]:
        if left in vocab and right in vocab:
            merges.append([left, right])
        else:
            vocab.pop(left + right, None)
    content["model"]["merges"] = merges
    return json.dumps(content)


def oracle(file: str) -> Callable[[str], list[int]]:
    """A function text -> ids by the `tokenizers` package.

    Like this project it makes no special token from text.
    """
    package = pytest.importorskip("tokenizers")
    content = json.loads(file)
    content["added_tokens"] = [raw for raw in content["added_tokens"] if not raw["special"]]
    tokenizer = package.Tokenizer.from_str(json.dumps(content))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
