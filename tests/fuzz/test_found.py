"""What fuzzing has found, and what its limits are for: each input is refused in one sentence."""

import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from children import Reading
from readers import readers

from minmacpo import UserError


def put(value: object, *path) -> Callable[[bytes], bytes]:
    """A change of JSON: another value at this place."""

    def change(good: bytes) -> bytes:
        whole = json.loads(good)
        parent = whole
        for step in path[:-1]:
            parent = parent[step]
        parent[path[-1]] = value
        return json.dumps(whole).encode()

    return change


def line(value: object, *path) -> Callable[[bytes], bytes]:
    """A change of JSON lines: another value at this place of the first one."""

    def change(good: bytes) -> bytes:
        first, _, others = good.partition(b"\n")
        return put(value, *path)(first) + b"\n" + others

    return change


DEEP = b'{"a":' * 3000
UNDER = "run/eval/round0_teacher2_under_base/scores.jsonl"
TARGETS = ("adapter", "adapter/adapter_config.json")
# {what: (reader, file, its change)}
FOUND = {
    "layers without end": ("llama", "config.json", put(10**9, "num_hidden_layers")),
    "layers without end, by windows": ("mistral", "config.json", put(10**12, "num_hidden_layers")),
    "a table that no memory holds": ("llama", "config.json", put(10**18, "vocab_size")),
    "heads that are text": ("llama", "config.json", put("%s", "head_dim")),
    "a base that no float holds": ("llama", "config.json", put(10**400, "rope_theta")),
    "a context that no tensor holds": (
        "llama 3",
        "config.json",
        put(2**63, "rope_scaling", "original_max_position_embeddings"),
    ),
    "an endless name": (*TARGETS, put(["a" * 5000], "target_modules")),
    "an endless kind": ("llama 3", "config.json", put("a" * 5000, "model_type")),
    "notes of a state": (
        "state",
        "state/state.safetensors",
        lambda good: good.replace(b'"notes":', b'"n0tes":'),
    ),
    "a name that is no text": ("sentencepiece", "added_tokens.json", put(5, "<\ud800>")),
    "an id that is a list": ("sentencepiece", "added_tokens.json", put([], "<more>")),
    "an id that is text": ("sentencepiece", "added_tokens.json", put("5", "<more>")),
    "an end that is a list": ("sentencepiece", "tokenizer_config.json", put([], "eos_token")),
    "an end without name": (
        "sentencepiece",
        "tokenizer_config.json",
        put({"content": {}}, "bos_token"),
    ),
    "half a character": (
        "sentencepiece",
        "tokenizer.model",
        lambda good: good.replace(b"<0x16>", b"<0\xb216", 1),
    ),
    "a half id": ("byte pairs", "tokenizer.json", put(7.5, "model", "vocab", "a")),
    "an added token that is a number": (
        "byte pairs",
        "tokenizer.json",
        put(5, "added_tokens", 0, "content"),
    ),
    "nothing but brackets, in an experiment": (
        "experiment",
        "experiments/x.toml",
        lambda good: b"seeds = " + b"[" * 3000,
    ),
    "a key of many parts": (
        "toml",
        "tiny.toml",
        lambda good: good + b"\n[run]\nx" + b".a" * 20_000 + b" = 1\n",
    ),
    "a number of many digits": (
        "toml",
        "tiny.toml",
        lambda good: b"[macpo]\nrounds = 0x" + b"f" * 4000 + b"\n",
    ),
    "an answer that is a number": ("written", "samples.jsonl", line(5, "response")),
    "tokens that are text": ("written", "samples.jsonl", line(["a"], "tokens")),
    "half a surrogate pair": ("written", "samples.jsonl", line("\ud800", "response")),
    "nothing but brackets": ("written", "pairs.jsonl", lambda good: DEEP),
    "a message of numbers": ("written", "texts.jsonl", line(3, "prompt", 0, "content")),
    "a table of no stages": ("run", "run/eval/table.json", put([1], "cost")),
    "counts that are no numbers": (
        "run",
        "run/round1/pairs_student/stage.json",
        put([], "counts", "pairs"),
    ),
    "scores that are a text": ("written", "scores.jsonl", lambda good: b'"a"\n' + good),
    "teachers without end": (
        "run",
        "run/config.toml",
        lambda good: re.sub(rb"teachers = \d", b"teachers = 99999999999", good),
    ),
    "a seed of another world": (
        "run",
        "run/config.toml",
        lambda good: re.sub(rb"(?m)^seed = 0", b"seed = 16", good),
    ),
    "scores too many": ("run", UNDER, lambda good: good + good),
}


def read_changed(
    stub: Path, home: Path, name: str, file: str, change: Callable[[bytes], bytes]
) -> str:
    """What the reader does with this change of a file, "read" or "refused"; fails if neither."""
    reader = next(reader for reader in readers(stub) if reader.name == name)
    with_change = replace(reader, files={file: (lambda good, rng: change(good),)})
    with closing(Reading(with_change, home)) as reading:
        reading.read_changed(Random(0))
    return "read" if reading.read else "refused"


@pytest.mark.parametrize("what", FOUND)
def test_is_refused(stub, tmp_path, what):
    assert read_changed(stub, tmp_path / "home", *FOUND[what]) == "refused"


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        # what a kill has torn belongs to no finished stage
        ("run", "run/metrics.jsonl", lambda good: good + DEEP),
        # a verdict without its reply is asked again
        ("written", "verdicts.jsonl", line(5, "reply")),
        # a piece that is no bytes is text
        ("byte pairs", "tokenizer.json", put(5, "model", "vocab", "the fox \ud800")),
    ],
)
def test_what_only_looks_wrong_is_read(stub, tmp_path, name, file, change):
    assert read_changed(stub, tmp_path / "home", name, file, change) == "read"


def test_a_sentence_has_an_end():
    assert str(UserError("short")) == "short"
    assert str(UserError("a" * 10**6)) == "a" * 700 + " … " + "a" * 290
