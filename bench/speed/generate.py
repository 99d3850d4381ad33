"""Decoding against transformers' generate: python -m bench.speed.generate [DTYPE].

16 prompts of 128 tokens, 128 new tokens each, an adapter on the base: here beside it, merged on the
peer's side, as PEFT recommends for inference. The peer's cache is its default or the static one,
whichever is faster here. The notes of the table say where a step's time goes (`decode_profile`).
"""

import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.markdown import named_values
from bench.speed.peers import (
    VOCAB,
    load_with_adapter,
    make_folder,
    make_rows,
    own_model,
    random_ids,
    read_dtypes,
)
from bench.speed.timing import (
    PLACE,
    alternate,
    clocked,
    count_equal,
    missing,
    spread,
    write_bench,
)
from minmacpo.config.schema import Generate
from minmacpo.core.prepack import can_prepack, prepack
from minmacpo.core.sampling import generate, pick_token

ROWS = 16
PROMPT = 128
NEW = 128
MIDDLE = PROMPT + NEW // 2  # length of the cache in the middle of an answer
TITLE = (
    f"{ROWS} prompts of {PROMPT} tokens, {NEW} new tokens each, 15M, one thread; "
    "the adapter in its slot, merged on the peer's side."
)
SAMPLING = Generate(temperature=0.95, top_k=50, top_p=0.7, max_new_tokens=NEW)
GREEDY = Generate(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=NEW)


@dataclass(frozen=True, slots=True)
class Way:
    """A way of decoding: this project's settings and the peer's."""

    settings: Generate
    peer_settings: dict


WAYS = {
    "sampling, top-p 0.7, top-k 50": Way(
        SAMPLING, {"do_sample": True, "temperature": 0.95, "top_k": 50, "top_p": 0.7}
    ),
    "greedy": Way(GREEDY, {"do_sample": False}),
}


# ---- the peer -------------------------------------------------------------------------------


def by_transformers(model, prompts: list[list[int]], new: int, **settings) -> list[list[int]]:
    """`new` further tokens of every prompt; no token ends one, so that both sides do the same."""
    tokens = torch.tensor(prompts)
    texts = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    return texts[:, tokens.shape[1] :].tolist()


@torch.inference_mode()
def largest_gap(model, prompts: list[list[int]], texts: list[list[int]]) -> float:
    """How far the logits of chosen tokens are behind the best ones of the peer's model, at most."""
    answers = torch.tensor(texts)  # (B, T)
    rows = torch.cat([torch.tensor(prompts), answers], dim=1)
    start = len(prompts[0]) - 1
    logits = model(rows).logits[:, start:-1].float()  # (B, T, V)
    chosen = logits.gather(-1, answers[..., None])[..., 0]  # (B, T)
    return (logits.amax(-1) - chosen).max().item()


def compare_greedy(model, peer, prompts: list[list[int]], dtype: str) -> str:
    """What is equal in both sides' greedy texts.

    Ends the benchmark if a token is not the peer's best but for rounding.
    """
    own_texts, _ = generate(model, prompts, range(len(prompts)), GREEDY, set())
    peer_texts = by_transformers(peer, prompts, NEW, do_sample=False)
    gap = largest_gap(peer, prompts, own_texts)
    tolerance = 1e-3 if dtype == "fp32" else 0.25
    if gap > tolerance:
        raise SystemExit(f"{dtype}: a greedy token is {gap:.3g} behind the peer's best")
    equal = count_equal(own_texts, peer_texts)
    texts = f"{equal} of {len(own_texts)} greedy texts"
    return f"{texts}; every own token within {gap:.1g} of the peer's best logit"


# ---- rows -----------------------------------------------------------------------------------


def compare(folder: Path, dtype: str, work: str, lacks: str) -> dict:
    """One row, timed after the greedy texts were found equal."""
    way = WAYS[work]
    prompts = [row["prompt"] for row in make_rows(ROWS, PROMPT, 1, ())]
    model, _ = own_model(folder, dtype)
    row = {
        "work": work,
        "shape": "15M",
        "dtype": dtype,
        "peer": "transformers generate",
        "target": ["generate"] if dtype == "fp32" and work != "greedy" else [],
        "note": lacks,
    }

    def own():
        return generate(model, prompts, range(ROWS), way.settings, set())

    if lacks:
        return row | alternate(own, None)

    peer = load_with_adapter(folder, dtype).merge_and_unload().eval()
    row["equal"] = compare_greedy(model, peer, prompts, dtype)

    def with_dynamic_cache():
        return by_transformers(peer, prompts, NEW, **way.peer_settings)

    def with_static_cache():
        settings = way.peer_settings | {"cache_implementation": "static"}
        return by_transformers(peer, prompts, NEW, **settings)

    _, dynamic = clocked(with_dynamic_cache)
    _, static = clocked(with_static_cache)
    faster = "dynamic"
    by_peer = with_dynamic_cache
    if static < dynamic:
        faster = "static"
        by_peer = with_static_cache
    costs = f"{dynamic:.3g} s dynamic, {static:.3g} s static"
    row["note"] = f"the peer's cache: {faster} ({costs})"
    return row | alternate(own, by_peer)


def refilled(folder: Path, dtype: str) -> dict:
    """The row of 64 answers of many lengths, 16 at a time.

    The next prompt gets a place that is free, or a block waits for its last.
    """
    count = 4 * ROWS
    rng = random.Random(0)
    model, _ = own_model(folder, dtype)
    settings = Generate(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW)
    prompts = []
    for _ in range(count):
        length = rng.randrange(PROMPT // 4, PROMPT + 1)
        prompts.append(random_ids(rng, length, VOCAB))
    prompts.sort(key=len)
    # Weights are random: so an answer has 60 tokens on average, of at most 128
    stops = set(range(0, VOCAB, 60))

    def own() -> list[list[int]]:
        texts, _ = generate(model, prompts, range(count), settings, stops, batch_size=ROWS)
        return texts

    def in_blocks() -> list[list[int]]:
        texts = []
        for start in range(0, count, ROWS):
            seeds = range(start, start + ROWS)
            block, _ = generate(model, prompts[start : start + ROWS], seeds, settings, stops)
            texts += block
        return texts

    equal = count_equal(own(), in_blocks())
    least = count if dtype == "fp32" else 1
    if equal < least:
        raise SystemExit(f"{dtype}: {equal} of {count} texts are equal")
    row = {
        "work": f"{count} answers of 1 to {NEW} tokens, {ROWS} at a time",
        "shape": "15M",
        "dtype": dtype,
        "peer": f"own, blocks of {ROWS}",
        "target": [],
        "note": "",
        "equal": f"{equal} of {count} texts",
    }
    return row | alternate(own, in_blocks)


# ---- where a step's time goes ---------------------------------------------------------------


def milliseconds(call: Callable[[], object], times: int = 20) -> float:
    """CPU milliseconds of a call, the median of seven measurements."""

    def many_calls() -> None:
        for _ in range(times):
            call()

    call()
    costs = []
    for _ in range(7):
        _, cpu = clocked(many_calls)
        costs.append(cpu / times)
    return 1e3 * spread(costs)[0]


def input_width(linear) -> int:
    """Of a linear layer, with or without LoRA."""
    if hasattr(linear, "in_features"):
        return linear.in_features
    return linear.base.in_features


@torch.inference_mode()
def decode_profile(folder: Path, dtype: str) -> dict:
    """CPU milliseconds of the parts of one sampling step in the middle of an answer.

    Beside them stands one read of what the step must read.
    """
    model, _ = own_model(folder, dtype)
    packed = prepack(model, ROWS) if can_prepack(model) else model
    cache = packed.new_cache(ROWS, MIDDLE)
    token = torch.ones(ROWS, 1, dtype=torch.long)
    positions = torch.full((ROWS,), MIDDLE - 1)
    uniform = torch.rand(ROWS)
    hidden = packed(token, positions=positions, cache=cache)[:, 0]
    logits = packed.lm_head(hidden)

    embedded = packed.model.embed_tokens(token)
    linears = []
    for name, module in packed.model.layers[0].named_modules():
        if name.endswith("_proj"):
            linears.append((module, torch.randn(ROWS, 1, input_width(module)).to(embedded.dtype)))

    def whole_step():
        hidden = packed(token, positions=positions, cache=cache)[:, 0]
        return pick_token(packed.lm_head(hidden), SAMPLING, uniform)

    def linears_of_a_block():
        for linear, x in linears:
            linear(x)

    large = torch.ones(2**26)
    bandwidth = large.nbytes / milliseconds(large.sum, 1)  # bytes per millisecond
    weights = -model.model.embed_tokens.weight.nbytes
    for param in model.parameters():
        weights += param.nbytes

    times = {
        "floor: one read of weights and cache": (weights + cache.data.nbytes) / bandwidth,
        "whole step": milliseconds(whole_step),
        "linears of the blocks": milliseconds(linears_of_a_block) * len(packed.model.layers),
        "head": milliseconds(lambda: packed.lm_head(hidden)),
        "choice of the token": milliseconds(lambda: pick_token(logits, SAMPLING, uniform)),
    }
    rest = times["whole step"]
    for part in ("linears of the blocks", "head", "choice of the token"):
        rest -= times[part]
    times["attention, norms, ropes, cache writes, dispatch"] = rest
    return {
        "dtype": dtype,
        "weights_mb": weights / 1e6,
        "cache_mb": cache.data.nbytes / 1e6,
        "read_gb_s": bandwidth / 1e6,
        "ms": {name: round(value, 3) for name, value in times.items()},
    }


def paragraph(profile: dict) -> str:
    """A profile in two sentences."""
    times = dict(profile["ms"])
    floor = times.pop("floor: one read of weights and cache")
    whole = times.pop("whole step")
    parts = named_values(times, ".2f")
    return (
        f"One decode step ({profile['dtype']}, {ROWS} rows, position {MIDDLE}): "
        f"{whole:.2f} ms of CPU, of which {parts}. One read of {profile['weights_mb']:.1f} MB of "
        f"weights and {profile['cache_mb']:.1f} MB of cache at the {profile['read_gb_s']:.1f} GB/s "
        f"measured beside it takes {floor:.2f} ms."
    )


def earlier_profiles(dtypes: list[str]) -> list[dict]:
    """The profiles in the file of dtypes that are not measured now."""
    file = PLACE / "generate.json"
    if not file.is_file():
        return []
    profiles = json.loads(file.read_text("utf-8")).get("profiles", [])
    return [profile for profile in profiles if profile["dtype"] not in dtypes]


def main(dtypes: list[str]) -> None:
    """Measure every way in every dtype; what there is so far is always written."""
    torch.set_num_threads(1)
    lacks = missing("transformers", "peft")
    rows = []
    profiles = earlier_profiles(dtypes)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_folder(folder, "15M")
        for dtype in dtypes:
            profiles.append(decode_profile(folder, dtype))
            for work in WAYS:
                rows.append(compare(folder, dtype, work, lacks))
            rows.append(refilled(folder, dtype))
            notes = [paragraph(profile) for profile in profiles]
            write_bench("generate", TITLE, rows, keep=True, profiles=profiles, notes=notes)


if __name__ == "__main__":
    main(read_dtypes())
