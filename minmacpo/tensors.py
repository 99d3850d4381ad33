"""Files of tensors, in and out: .safetensors, memory-mapped where they are read, and written without a second copy."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minmacpo import UserError
from minmacpo.files import write_atomic

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors as one .safetensors file, atomically; no second copy of all of them is made, as the library's own writing would."""
    write_atomic(path, tensor_parts(tensors, metadata or {"format": "pt"}))


def tensor_parts(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a .safetensors file (github.com/huggingface/safetensors, "Format"): the size of the header, the header, and the
    tensors, those of larger numbers first, so that all are aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    ends = [0, *accumulate(tensors[name].nbytes for name in order)]
    names = {dtype: name for name, dtype in FLOATS.items()}
    header = {"__metadata__": metadata} | {
        name: {"dtype": names[tensors[name].dtype], "shape": [*tensors[name].shape], "data_offsets": [*span]}
        for name, span in zip(order, pairwise(ends), strict=True)}  # fmt: skip
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
    return "is a git-lfs pointer; get the file itself with git lfs pull" if pointer else f"is cut short or damaged ({error})"


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a .safetensors file, on the CPU; UserError if missing or damaged."""
    with opened(path) as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
