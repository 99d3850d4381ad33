"""Decoding against transformers' generate: python -m bench.speed.generate [DTYPE]; and where a step's time goes (`decode_profile`).

16 prompts of 128 tokens, 128 new tokens each, an adapter on the base: here in its slot, merged on the peer's side, as PEFT
recommends for inference. The peer's cache is its default or the static one, whichever is faster here.
"""

import json
import random
import tempfile
from pathlib import Path

import torch

from bench.speed.peers import DTYPES, VOCAB, make_folder, make_rows, own_model
from bench.speed.timing import (
    PLACE,
    alternate,
    bf16_hardware,
    clocked,
    missing,
    read_words,
    spread,
    write_bench,
)
from minmacpo.config.schema import Generate
from minmacpo.core.prepack import can_prepack, prepack
from minmacpo.core.sampling import generate, pick_token

ROWS, PROMPT, NEW = 16, 128, 128
TITLE = f"{ROWS} prompts of {PROMPT} tokens, {NEW} new tokens each, 15M, one thread; the adapter in its slot, merged on the peer's side."
WAYS = {  # this project's settings and the peer's
    "sampling, top-p 0.7, top-k 50": (
        Generate(0.95, 50, 0.7, NEW),
        {"do_sample": True, "temperature": 0.95, "top_k": 50, "top_p": 0.7},
    ),
    "greedy": (Generate(0.0, 0, 1.0, NEW), {"do_sample": False}),
}


def peer_model(place: Path, dtype: str):
    """transformers' model with the adapter merged."""
    import peft
    import transformers

    transformers.utils.logging.set_verbosity_error()
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=DTYPES[dtype])
    return peft.PeftModel.from_pretrained(base, place / "adapter").merge_and_unload().eval()


def by_transformers(model, prompts: list[list[int]], new: int, **how) -> list[list[int]]:
    """`new` further tokens of every prompt; no token ends one, so that both sides do the same work."""
    tokens = torch.tensor(prompts)
    found = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
        **how,
    )
    return found[:, tokens.shape[1] :].tolist()


@torch.inference_mode()
def behind(model, prompts: list[list[int]], texts: list[list[int]]) -> float:
    """How far the chosen tokens' logits are behind the best ones of the peer's model, at most."""
    logits = (
        model(torch.tensor([p + t for p, t in zip(prompts, texts, strict=True)]))
        .logits[:, len(prompts[0]) - 1 : -1]
        .float()
    )
    return (
        (logits.amax(-1) - logits.gather(-1, torch.tensor(texts)[..., None])[..., 0]).max().item()
    )


def same_texts(model, peer, prompts: list[list[int]], dtype: str) -> str:
    """What is equal in both sides' greedy texts; ends the benchmark if a token is not the peer's best but for rounding."""
    mine, _ = generate(model, prompts, range(len(prompts)), Generate(0.0, 0, 1.0, NEW), set())
    theirs, gap = by_transformers(peer, prompts, NEW, do_sample=False), behind(peer, prompts, mine)
    if gap > (1e-3 if dtype == "fp32" else 0.25):
        raise SystemExit(f"{dtype}: a greedy token is {gap:.3g} behind the peer's best")
    equal = sum(a == b for a, b in zip(mine, theirs, strict=True))
    return f"{equal} of {len(mine)} greedy texts; every own token within {gap:.1g} of the peer's best logit"


def compare(place: Path, dtype: str, way: str, lacks: str) -> dict:
    """One row, timed after the greedy texts were found equal."""
    (settings, how), prompts = WAYS[way], [row["prompt"] for row in make_rows(ROWS, PROMPT, 1, ())]
    model = own_model(place, dtype)[0]
    target = ["generate"] if (dtype, way[:8]) == ("fp32", "sampling") else []
    row = {
        "work": way,
        "shape": "15M",
        "dtype": dtype,
        "peer": "transformers generate",
        "target": target,
        "note": lacks,
    }

    def mine():
        return generate(model, prompts, range(ROWS), settings, set())

    if lacks:
        return row | alternate(mine, None)
    peer = peer_model(place, dtype)
    equal, caches = (
        same_texts(model, peer, prompts, dtype),
        ({}, {"cache_implementation": "static"}),
    )
    cost = [
        clocked(lambda kind=kind: by_transformers(peer, prompts, NEW, **how, **kind))[1]
        for kind in caches
    ]
    kind = caches[cost[1] < cost[0]]
    row["note"] = (
        f"the peer's cache: {'static' if kind else 'dynamic'} ({cost[0]:.3g} s dynamic, {cost[1]:.3g} s static)"
    )
    return (
        row
        | alternate(mine, lambda: by_transformers(peer, prompts, NEW, **how, **kind))
        | {"equal": equal}
    )


def refilled(place: Path, dtype: str) -> dict:
    """The row of 64 answers of many lengths, 16 at a time: the next prompt gets a place that is free, or a block waits for its last."""
    rng, model, settings = random.Random(0), own_model(place, dtype)[0], Generate(1.0, 0, 1.0, NEW)
    prompts = sorted(
        (
            [rng.randrange(3, VOCAB) for _ in range(rng.randrange(PROMPT // 4, PROMPT + 1))]
            for _ in range(4 * ROWS)
        ),
        key=len,
    )
    stops = {
        *range(0, VOCAB, 60)
    }  # of random weights: an answer has 60 tokens on average, of at most 128

    def mine():
        return generate(model, prompts, range(4 * ROWS), settings, stops, batch_size=ROWS)[0]

    def theirs():
        parts = [range(start, start + ROWS) for start in range(0, 4 * ROWS, ROWS)]
        return [
            text
            for part in parts
            for text in generate(model, prompts[part.start : part.stop], part, settings, stops)[0]
        ]

    equal = sum(a == b for a, b in zip(mine(), theirs(), strict=True))
    if equal < (4 * ROWS if dtype == "fp32" else 1):
        raise SystemExit(f"{dtype}: {equal} of {4 * ROWS} texts are equal")
    row = {
        "work": f"{4 * ROWS} answers of 1 to {NEW} tokens, {ROWS} at a time",
        "shape": "15M",
        "dtype": dtype,
        "peer": f"own, blocks of {ROWS}",
    }
    return (
        row
        | {"target": [], "note": ""}
        | alternate(mine, theirs)
        | {"equal": f"{equal} of {4 * ROWS} texts"}
    )


@torch.inference_mode()
def decode_profile(place: Path, dtype: str) -> dict:
    """CPU milliseconds of the parts of one sampling step in the middle of an answer, beside one read of what it must read."""
    model, settings, used = (
        own_model(place, dtype)[0],
        WAYS["sampling, top-p 0.7, top-k 50"][0],
        PROMPT + NEW // 2,
    )
    fast = prepack(model, ROWS) if can_prepack(model) else model
    cache = fast.new_cache(ROWS, used)
    token, where, uniform = (
        torch.ones(ROWS, 1, dtype=torch.long),
        torch.full((ROWS,), used - 1),
        torch.rand(ROWS),
    )
    hidden = fast(token, positions=where, cache=cache)[:, 0]
    block, logits = fast.model.layers[0], fast.lm_head(hidden)
    x = fast.model.embed_tokens(token)
    linears = [m for name, m in block.named_modules() if name.endswith("_proj")]
    inputs = [
        torch.randn(ROWS, 1, m.in_features if hasattr(m, "in_features") else m.base.in_features).to(
            x.dtype
        )
        for m in linears
    ]
    heavy = torch.ones(2**26)
    weights = (
        sum(p.numel() * p.element_size() for p in model.parameters())
        - model.model.embed_tokens.weight.nbytes
    )
    bandwidth = heavy.nbytes / milliseconds(heavy.sum, 1)  # bytes per millisecond
    parts = {
        "floor: one read of weights and cache": (weights + cache.data.nbytes) / bandwidth,
        "whole step": milliseconds(
            lambda: pick_token(
                fast.lm_head(fast(token, positions=where, cache=cache)[:, 0]), settings, uniform
            )
        ),
        "linears of the blocks": milliseconds(
            lambda: [m(each) for m, each in zip(linears, inputs, strict=True)]
        )
        * len(fast.model.layers),
        "head": milliseconds(lambda: fast.lm_head(hidden)),
        "choice of the token": milliseconds(lambda: pick_token(logits, settings, uniform)),
    }
    parts["attention, norms, ropes, cache writes, dispatch"] = (
        2 * parts["whole step"]
        - sum(parts.values())
        + parts["floor: one read of weights and cache"]
    )
    return {
        "dtype": dtype,
        "weights_mb": weights / 1e6,
        "cache_mb": cache.data.nbytes / 1e6,
        "read_gb_s": bandwidth / 1e6,
        "ms": {name: round(value, 3) for name, value in parts.items()},
    }


def milliseconds(call, times: int = 20) -> float:
    """CPU milliseconds of a call, the median of seven measurements."""
    call()
    return (
        1e3
        * spread([clocked(lambda: [call() for _ in range(times)])[1] / times for _ in range(7)])[0]
    )


def paragraph(profile: dict) -> str:
    """A profile in a sentence."""
    ms = dict(profile["ms"])
    floor, whole = ms.pop("floor: one read of weights and cache"), ms.pop("whole step")
    rest = ", ".join(f"{name} {value:.2f}" for name, value in ms.items())
    return (
        f"One decode step ({profile['dtype']}, {ROWS} rows, position {PROMPT + NEW // 2}): {whole:.2f} ms of CPU, of which {rest}. One read of "
        f"{profile['weights_mb']:.1f} MB of weights and {profile['cache_mb']:.1f} MB of cache at the {profile['read_gb_s']:.1f} GB/s "
        f"measured beside it takes {floor:.2f} ms."
    )


def earlier_profiles(dtypes: list[str]) -> list[dict]:
    """The profiles in the file of dtypes that are not measured now."""
    file = PLACE / "generate.json"
    found = json.loads(file.read_text("utf-8")).get("profiles", []) if file.is_file() else []
    return [profile for profile in found if profile["dtype"] not in dtypes]


def main(dtypes: list[str]) -> None:
    torch.set_num_threads(1)
    lacks, rows, profiles = missing("transformers", "peft"), [], earlier_profiles(dtypes)
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), "15M")
        for dtype in dtypes:
            profiles.append(decode_profile(Path(folder), dtype))
            for way in WAYS:
                rows.append(compare(Path(folder), dtype, way, lacks))
            rows.append(refilled(Path(folder), dtype))
            write_bench(
                "generate",
                TITLE,
                rows,
                keep=True,
                profiles=profiles,
                notes=[paragraph(p) for p in profiles],
            )  # what there is so far


if __name__ == "__main__":
    main(read_words(DTYPES) or (["fp32", "bf16"] if bf16_hardware() else ["fp32"]))
