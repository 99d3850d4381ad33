"""tokenizer.json files of the families, made small with the `tokenizers` package; and that package as the oracle."""

import json

import pytest

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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


def made(style: str, texts: list[str], vocab: int = 700) -> str:
    """The content of a tokenizer.json in the style of a family, trained on `texts`; skips without the package."""
    tokenizers = pytest.importorskip("tokenizers")
    models, cut, trainers = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.trainers
    found = tokenizers.Tokenizer(models.BPE(ignore_merges=style == "llama-3"))
    steps = [cut.ByteLevel(add_prefix_space=False, use_regex=style in ("gpt-2", "smollm-2"))]
    if style == "smollm-2":
        steps.insert(0, cut.Digits(individual_digits=True))
    elif style != "gpt-2":
        pattern = LLAMA_3 if style == "llama-3" else LLAMA_3.replace("{1,3}", "")
        steps.insert(0, cut.Split(tokenizers.Regex(pattern), "isolated"))
    found.pre_tokenizer = steps[0] if len(steps) == 1 else cut.Sequence(steps)
    if style == "qwen-2":
        found.normalizer = tokenizers.normalizers.NFC()
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = cut.ByteLevel.alphabet()
    found.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
        ),
    )
    found.add_tokens(["<tool_call>"])
    return found.to_str()


def oracle(file: str):
    """text -> ids by the `tokenizers` package, that makes no added token from text, as nothing here does."""
    package = pytest.importorskip("tokenizers").Tokenizer.from_str(
        json.dumps(json.loads(file) | {"added_tokens": []})
    )
    return lambda text: package.encode(text, add_special_tokens=False).ids
