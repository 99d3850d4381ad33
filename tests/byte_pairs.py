"""Small tokenizer.json files of the families, made with `tokenizers`, which is the oracle too."""

import json
from collections.abc import Callable

import pytest

# The patterns that split a text into words, from the files of Llama 3 and Qwen 2
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
SPECIAL = [
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
STYLES = ["gpt-2", "smollm-2", "qwen-2", "llama-3"]
NOTES = {  # tokenizer_config.json
    "gpt-2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "smollm-2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "qwen-2": {"bos_token": None, "eos_token": "<|im_end|>"},
    "llama-3": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"content": "<|eot_id|>", "special": True},
    },
}


def train_file(style: str, texts: list[str], vocab: int = 700) -> str:
    """The content of a tokenizer.json in the style of a family; skips without the package."""
    tokenizers = pytest.importorskip("tokenizers")
    splitters = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=style == "llama-3"))

    # How a text is split into words, as in the family's own files
    uses_gpt2_pattern = style in ("gpt-2", "smollm-2")
    steps = [splitters.ByteLevel(add_prefix_space=False, use_regex=uses_gpt2_pattern)]
    if style == "smollm-2":
        steps.insert(0, splitters.Digits(individual_digits=True))
    elif style == "llama-3":
        steps.insert(0, splitters.Split(tokenizers.Regex(LLAMA_3), "isolated"))
    elif style == "qwen-2":
        steps.insert(0, splitters.Split(tokenizers.Regex(QWEN_2), "isolated"))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else splitters.Sequence(steps)

    if style == "qwen-2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=splitters.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["<tool_call>"])
    return tokenizer.to_str()


def oracle(file: str) -> Callable[[str], list[int]]:
    """A function text -> ids by the `tokenizers` package.

    Like this project it makes no added token from text.
    """
    package = pytest.importorskip("tokenizers")
    content = json.loads(file) | {"added_tokens": []}
    tokenizer = package.Tokenizer.from_str(json.dumps(content))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
