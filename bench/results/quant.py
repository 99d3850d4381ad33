"""What quantising a base costs and gives: python -m bench.results.quant PATH --data=FILE.

Prints the perplexity of FILE's answers in bf16, int8 and nf4, and milliseconds of a product. PATH
is a model or adapter folder, FILE holds rows of any form that train.py reads; other words are
settings of `eval.py ppl`.
"""

import sys

import torch
from torch import nn

from bench.speed.timing import clocked, read_words
from minmacpo.evaluation.likelihood import run_likelihood
from minmacpo.kernels.quantization import QUANTIZED_LINEARS

SIDE = 2048
ROWS = (1, 4, 16, 64, 256)


def show_perplexities(path: str, data: str, words: list[str]) -> None:
    """Print a line for every form of the base, each with its distance from bf16."""
    plain_perplexity = None
    for quantization in ("none", *QUANTIZED_LINEARS):
        settings = ["--run.dtype=bfloat16", f"--model.quantize={quantization}"]
        result = run_likelihood("ppl", [path, data, *settings, *words])
        perplexity = result["perplexity"]
        if plain_perplexity is None:
            plain_perplexity = perplexity
        name = "bf16" if quantization == "none" else quantization
        distance = perplexity / plain_perplexity - 1
        size = f"{result['rows']['kept']} rows, {result['tokens']} tokens"
        print(f"{name:5} perplexity {perplexity:.4f} ({distance:+.2%}), {size}", flush=True)


def show_products() -> None:
    """Print milliseconds of x Wᵀ in bf16, one thread, the best of nine."""
    torch.set_num_threads(1)
    plain = nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layers = {"bf16": plain}
    for name, layer_class in QUANTIZED_LINEARS.items():
        layers[name] = layer_class(plain)
        layers[name].load_state_dict(layer_class.quantize(plain.weight), assign=True)

    for rows in ROWS:
        x = torch.randn(rows, SIDE, dtype=torch.bfloat16)
        times = []
        for name, layer in layers.items():
            times.append(f"{name} {milliseconds(layer, x):.2f} ms")
        print(f"{rows:4} rows of {SIDE}: {', '.join(times)}", flush=True)


def milliseconds(layer: nn.Module, x: torch.Tensor) -> float:
    """Wall milliseconds of a product, the best of nine."""
    best = float("inf")
    for _ in range(9):
        wall, _ = clocked(lambda: layer(x))
        best = min(best, wall)
    return 1e3 * best


if __name__ == "__main__":
    words = read_words()
    data_words = [word for word in words if word.startswith("--data=")]
    if not data_words or len(words) < 2:
        sys.exit(f"{__doc__}\nerror: PATH and --data=FILE are needed")
    path, *settings = [word for word in words if word not in data_words]
    show_perplexities(path, data_words[0].removeprefix("--data="), settings)
    show_products()
