"""Quantised bases: python -m bench.quant PATH --data=FILE, perplexity of FILE's answers in bf16, int8 and nf4, and ms of a product.

PATH is a model or adapter folder, FILE holds rows of any form in the README; other words are settings of `eval.py ppl`.
"""

import sys

import torch
from torch import nn

from bench.measure import clocked, words
from minmacpo.evaluation.likelihood import run_likelihood
from minmacpo.kernels.quantization import QUANTIZED_LINEARS

SIDE, ROWS = 2048, (1, 4, 16, 64, 256)


def perplexities(path: str, file: str, rest: list[str]) -> None:
    """A line for every form of the base, each with its distance from bf16."""
    first = None
    for form in ("none", *QUANTIZED_LINEARS):
        found = run_likelihood(
            "ppl", [path, file, "--run.dtype=bfloat16", f"--model.quantize={form}", *rest]
        )
        first = first or found["perplexity"]
        size = f"{found['rows']['kept']} rows, {found['tokens']} tokens"
        print(
            f"{'bf16' if form == 'none' else form:5} perplexity {found['perplexity']:.4f} ({found['perplexity'] / first - 1:+.2%}), {size}",
            flush=True,
        )


def products() -> None:
    """Milliseconds of x Wᵀ in bf16, one thread, the best of eight."""
    torch.set_num_threads(1)
    plain = nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layers = {"bf16": plain}
    for form, kind in QUANTIZED_LINEARS.items():
        layers[form] = kind(plain)
        layers[form].load_state_dict(kind.quantize(plain.weight), assign=True)
    for rows in ROWS:
        x = torch.randn(rows, SIDE, dtype=torch.bfloat16)
        times = {
            name: 1e3 * min(clocked(lambda layer=layer, x=x: layer(x))[0] for _ in range(9))
            for name, layer in layers.items()
        }
        print(
            f"{rows:4} rows of {SIDE}: "
            + ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()),
            flush=True,
        )


if __name__ == "__main__":
    given = words()
    data = [word for word in given if word.startswith("--data=")]
    if not data or len(given) < 2:
        sys.exit(f"{__doc__}\nerror: PATH and --data=FILE are needed")
    path, *rest = (word for word in given if word not in data)
    perplexities(path, data[0].removeprefix("--data="), rest)
    products()
