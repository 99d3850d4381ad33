"""QuantizedLinear linears against hand-made codes in fp64, the de-quantised plain model, and every tensor that lives while they load."""

import copy
import dataclasses
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import far, logits_of, ragged, random_model
from living import Living
from runs import copy_run, differences, invoke, train, write_stub
from test_lora import fill
from test_sampling import GREEDY, new

from minmacpo.config.schema import LINEARS, Lora
from minmacpo.core import prepack as packed
from minmacpo.core.checkpoint import load_model, save_model, weight_bytes
from minmacpo.core.lora import attach_lora, lora_params
from minmacpo.core.sampling import generate
from minmacpo.kernels.fused_logps import masked_logps
from minmacpo.kernels.quantization import (
    NF4_BLOCK,
    QUANTIZED_LINEARS,
    QuantizedLinear,
    is_quantized,
    nf4_levels,
    quantize_linears,
    quantize_weight,
)
from minmacpo.runtime.files import read_json

# QLoRA's table (Dettmers et al. 2023, appendix E), to seven places
NF4 = [
    -1.0,
    -0.6961928,
    -0.5250731,
    -0.3949175,
    -0.2844414,
    -0.1847734,
    -0.0910500,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.3379152,
    0.4407098,
    0.5626170,
    0.7229568,
    1.0,
]


def quantise(model, form: str):
    """(the model with its linears in `form`, a plain one with the weights that they stand for)."""
    small, plain = copy.deepcopy(model), copy.deepcopy(model)
    quantize_linears(small, form)
    parts = [quantize_weight(small, name, tensor) for name, tensor in model.state_dict().items()]
    small.load_state_dict(
        {name: tensor for part in parts for name, tensor in part.items()}, assign=True
    )
    for name, layer in small.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(name).weight = torch.nn.Parameter(layer.dequantize(torch.float32))
    return small.requires_grad_(False), plain.requires_grad_(False)


def one(form: str, rows: int, columns: int, dtype=torch.float32, bias: bool = False):
    """(a quantised linear, the random weight [rows, columns] that it was made of)."""
    linear = torch.nn.Linear(columns, rows, bias=bias).to(dtype).requires_grad_(False)
    kind = QUANTIZED_LINEARS[form]
    layer = kind(linear)
    layer.load_state_dict(
        kind.quantize(linear.weight) | ({"bias": linear.bias} if bias else {}), assign=True
    )
    return layer.requires_grad_(False), linear.weight


def hand_scale(most: np.ndarray) -> np.ndarray:
    """The least bf16 numbers that are no smaller than `most`, from the bits of fp32."""
    bits = most.astype(np.float32).view(np.uint32)
    return (
        ((bits + np.where(bits & 0xFFFF, 0x10000, 0)) & 0xFFFF0000)
        .astype(np.uint32)
        .view(np.float32)
        .astype(float)
    )


def test_the_levels_are_those_of_qlora():
    assert far(nf4_levels(), torch.tensor(NF4)) < 1e-6 and nf4_levels().dtype == torch.float32


@pytest.mark.parametrize("form", QUANTIZED_LINEARS)
@pytest.mark.parametrize("shape", [(37, 45), (8, 64), (1, 3), (130, 200)])
def test_codes_are_the_nearest_by_hand(form, shape, seed):
    """In fp64, block by block; at a tie of two neighbours either will do."""
    layer, weight = one(form, *shape)
    wide = weight.double().numpy()
    blocks = (
        wide
        if form == "int8"
        else np.pad(wide.ravel(), (0, -wide.size % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
    )
    steps = np.arange(-127, 128.0) / 127 if form == "int8" else nf4_levels().double().numpy()
    scale = hand_scale(np.abs(blocks).max(1) / (127 if form == "int8" else 1)) * (
        127 if form == "int8" else 1
    )
    all_errors = np.abs(blocks[:, :, None] - scale[:, None, None] * steps)
    found = layer.dequantize(torch.float32).double().numpy()
    assert np.abs(found - wide).max() <= all_errors.min(2).max() * 1.0001 + 1e-7
    flat = np.abs(found - wide).ravel()
    assert (flat <= all_errors.min(2).ravel()[: wide.size] + 1e-6 * np.abs(wide).max()).all()


@pytest.mark.parametrize("form", QUANTIZED_LINEARS)
def test_what_can_be_kept_exactly_is(form, seed):
    """Whole multiples of a scale, and nf4_levels times a power of two, come back to the last bit; so do zeros."""
    layer, _ = one(form, 32, 96)
    if form == "int8":
        codes = torch.randint(-127, 128, (32, 96))
        codes[:, 0] = 127
        weight = codes.float() * 2.0 ** torch.randint(-8, 3, (32, 1))
    else:
        codes = torch.randint(0, 16, (48, NF4_BLOCK))
        codes[:, 7] = 15
        weight = (nf4_levels()[codes] * 2.0 ** torch.randint(-8, 3, (48, 1))).view(32, 96)
    layer.load_state_dict(QUANTIZED_LINEARS[form].quantize(weight), assign=True)
    assert torch.equal(layer.dequantize(torch.float32), weight)
    layer.load_state_dict(QUANTIZED_LINEARS[form].quantize(torch.zeros(32, 96)), assign=True)
    assert not layer.dequantize(torch.float32).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", QUANTIZED_LINEARS)
@pytest.mark.parametrize(("bias", "columns"), [(False, 80), (True, 80), (False, 172), (True, 24)])
def test_products_and_their_gradients_are_those_of_the_weight_kept(
    form, dtype, bias, columns, seed
):
    """At few rows too, where a CPU has a product of its own for int8; fp64 is the oracle."""
    near = 1e-5 if dtype == torch.float32 else 0.03
    for rows in (1, 3, 16, 17, 70):
        layer, _ = one(form, 48, columns, dtype, bias)
        x, grad = (
            torch.randn(rows, 2, columns).to(dtype).requires_grad_(),
            torch.randn(rows, 2, 48).to(dtype),
        )
        dense = layer.dequantize(torch.float32).double()
        y = layer(x)
        y.backward(grad)
        assert (
            y.dtype == dtype
            and far(y.double(), F.linear(x.double(), dense, layer.bias.double() if bias else None))
            <= near * 3
        )
        assert far(x.grad.double(), grad.double() @ dense) <= near * 3
        with torch.inference_mode():
            assert far(layer(x), y) <= near


@pytest.mark.parametrize("form", QUANTIZED_LINEARS)
def test_the_slot_learns_as_on_the_dequantised_model_and_nothing_is_kept(form, seed):
    model = random_model(seed, std=0.1, qkv_bias=True)
    pair, grads, lora = quantise(model, form), [], Lora(3, 6, LINEARS)
    tokens, mask = torch.randint(3, 60, (4, 20)), torch.zeros(4, 20, dtype=torch.bool)
    mask[:, 5:] = True  # 60 tokens: no tensor of theirs has the shape of a weight
    weights = {
        tuple(p.shape)
        for n, p in model.named_parameters()
        if n.split(".")[-2] in LINEARS and p.dim() == 2
    }
    for small in pair:
        attach_lora(small, lora)
        fill(small, seed)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t) or t, lambda t: t
        ):
            loss = -masked_logps(small, tokens, mask)[0].mean()
        loss.backward()
        grads.append({key: param.grad for key, param in lora_params(small).items()})
        held = {tuple(t.shape) for t in kept} | {tuple(t.shape[::-1]) for t in kept}
        assert bool(held & weights) == (small is pair[1]), (
            "only the plain model's backward holds its weights"
        )
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert grad.abs().max() > 0 and far(grad, grads[1][key]) <= 1e-5 * (
            1 + grads[1][key].abs().max().item()
        ), key


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("form", QUANTIZED_LINEARS)
def test_it_answers_as_the_dequantised_model(form, twin, seed, monkeypatch):
    """Greedy tokens are the same wherever the plain model's two likeliest are no nearer than rounding; with the packed twin too,
    which shares the codes."""
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 0 if twin else 10**9)
    small, plain = quantise(random_model(seed), form)
    prompts = ragged(seed, 5, 61)
    (mine, logp), (theirs, wanted) = (
        generate(m, prompts, range(5), new(GREEDY, max_new_tokens=12), {2}) for m in (small, plain)
    )
    for a, b, prompt in zip(mine, theirs, prompts, strict=True):
        first = next(
            (i for i, both in enumerate(zip(a, b, strict=False)) if both[0] != both[1]), None
        )
        if first is not None:
            top = logits_of(plain, torch.tensor([[*prompt, *b[:first]]]))[0, -1].topk(2).values
            assert top[0] - top[1] < 1e-3, "a tie"
    if mine == theirs:
        assert logp == pytest.approx(wanted, rel=1e-3, abs=1e-3)


# ---- loading and memory -------------------------------------------------------------------------


@pytest.mark.parametrize("form", QUANTIZED_LINEARS)
def test_loading_holds_what_it_keeps_and_one_tensor(form, tmp_path, tokenizer_bytes, seed):
    model = random_model(
        seed, hidden_size=256, intermediate_size=700, num_hidden_layers=6, head_dim=64
    )
    save_model(tmp_path, model.config, model.state_dict(), tokenizer_bytes)
    with Living() as living:
        found = load_model(tmp_path, quantization=form)
    kept = sum(t.nbytes for t in found.state_dict().values())
    assert kept == weight_bytes(model.config, 4, form) and kept < 0.35 * sum(
        p.nbytes for p in model.parameters()
    )
    linear = 4 * 256 * 700  # bytes of the largest tensor; beside it a part of it in work
    assert living.peak <= kept + 4 * linear, (living.peak, kept)
    wanted = quantise(model, form)[0].state_dict()
    assert found.state_dict().keys() == wanted.keys() and all(
        torch.equal(t, wanted[n]) for n, t in found.state_dict().items()
    )
    assert {
        t.dtype for t in load_model(tmp_path, dtype=torch.bfloat16, quantization=form).parameters()
    } == {torch.bfloat16}


@pytest.mark.parametrize("form", QUANTIZED_LINEARS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(form, bad, tmp_path, tokenizer_bytes, seed):
    model, name = random_model(seed), "model.layers.1.mlp.up_proj.weight"
    weights = model.state_dict()
    weights[name][3, 4] = bad
    save_model(tmp_path, model.config, weights, tokenizer_bytes)
    with pytest.raises(Exception, match=f"{name} holds values that are not finite"):
        load_model(tmp_path, quantization=form)


# ---- whole programs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(stub, tmp_path_factory):
    """The stub run with a student in nf4, beside the run without; begun after it, under its root."""
    root = tmp_path_factory.mktemp("quantised")
    copy_run(stub, root / "runs")
    train(write_stub(root), f"--run.root={root / 'runs'}", "--model.quantize=nf4")
    return root / "runs/stub-quantize=nf4"


def test_only_what_the_quantised_base_does_is_another_stage(quantised, stub):
    """Teachers' stages that do not depend on the student are taken from the other run; the student's say how they were made."""
    prints = {
        folder: {
            s.parent.relative_to(folder).as_posix(): read_json(s)
            for s in folder.glob("*/*/stage.json")
        }
        for folder in (stub, quantised)
    }
    assert prints[stub].keys() == prints[quantised].keys()
    for name, notes in prints[quantised].items():
        same = prints[stub][name]["fingerprint"] == notes["fingerprint"]
        if name.startswith(("data", "bases", "round0/teacher", "round0/weak")) or name in (
            "round1/positives_teacher1",
            "round0/negatives_teacher1",
        ):
            assert same and "quantize" not in (notes["settings"] or {}), name
        if name.startswith("round0/student") or name == "round1/pairs_student":
            assert not same and notes["settings"]["quantize"] == "nf4", name
    assert (quantised / "eval/table.json").is_file() and not differences(stub, stub)


def test_a_quantised_run_resumes_and_knows_itself(quantised, tmp_path, monkeypatch):
    from minmacpo.pipeline import model_pool as workshop

    seen, real = [], workshop.load_model
    monkeypatch.setattr(
        workshop, "load_model", lambda *words: seen.append(words[3]) or real(*words)
    )
    agent = quantised / "round1/student_pos"
    said = invoke("sample", agent, "who lives here ?", "--generate.max_new_tokens=4")
    assert said.code == 0 and seen == ["nf4"]
    assert invoke(
        "sample", quantised / "round1/teacher1_pos", "who ?", "--generate.max_new_tokens=4"
    ).code == 0 and seen[1:] == ["none"]
    assert invoke(
        "sample", agent, "who ?", "--generate.max_new_tokens=4", "--model.quantize=int8"
    ).code == 0 and seen[2:] == ["int8"]


def test_a_quantised_base_is_not_exported_but_the_adapter_merges_into_the_plain_one(
    quantised, tmp_path
):
    agent = quantised / "round1/student_pos"
    ended = invoke("sample", agent, f"--export={tmp_path / 'whole'}")
    assert (
        ended.code == 2
        and ended.err.count("\n") == 1
        and "--model.quantize=none" in ended.err
        and not list(tmp_path.iterdir())
    )
    assert (
        invoke("sample", agent, f"--export={tmp_path / 'whole'}", "--model.quantize=none").code == 0
    )
    merged, base = load_model(tmp_path / "whole"), load_model(quantised / "bases/strong")
    assert (
        not is_quantized(merged)
        and far(
            merged.model.layers[0].self_attn.q_proj.weight,
            base.model.layers[0].self_attn.q_proj.weight,
        )
        > 0
    )
    assert torch.equal(
        merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight
    )


def test_answers_of_another_form_are_not_gone_on_with(quantised, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "who lives here ?"}) + "\n")
    words = [
        quantised / "round1/student_pos",
        f"--prompts={tmp_path / 'prompts.jsonl'}",
        f"--out={tmp_path / 'out.jsonl'}",
        "--generate.max_new_tokens=4",
    ]
    assert invoke("sample", *words).code == 0 and invoke("sample", *words).code == 0
    ended = invoke("sample", *words, "--model.quantize=none")
    assert ended.code == 2 and "other settings" in ended.err


# ---- rows that are read where they are looked at, and answers where memory is short ---------------


def test_lines_are_the_rows_of_the_file(tmp_path, seed):
    from minmacpo import UserError
    from minmacpo.runtime.files import EVERY, JsonlView, batched, read_rows, write_rows

    for count in (0, 1, EVERY, 5 * EVERY + 3):
        rows = [
            {"i": i, "text": "é\u2028\n" * random.Random(seed + i).randrange(5)}
            for i in range(count)
        ]
        write_rows(tmp_path / "x.jsonl", iter(rows))
        lines = JsonlView(tmp_path / "x.jsonl", dict, lambda row: row["i"])
        assert read_rows(tmp_path / "x.jsonl") == rows and [*lines] == [
            lines[i] for i in range(len(lines))
        ] == [*range(count)]
        assert [len(run) for run in batched(lines, 7)] == [7] * (count // 7) + [count % 7] * (
            count % 7 > 0
        )
        with pytest.raises(IndexError):
            lines[count]
    (tmp_path / "x.jsonl").write_text('{"i": 1}\n{"i"')
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: is no JSON; the file is damaged"):
        list(JsonlView(tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        JsonlView(tmp_path / "none.jsonl")


def test_windows_change_no_row(stub, tmp_path, monkeypatch):
    """A run whose texts are scored and paired three at a time has the rows of one that takes all at once, in their order, and
    where no such row was learned from yet their log-probabilities up to rounding."""
    from minmacpo.pipeline import train_stage as stages

    monkeypatch.setattr(stages, "WINDOW", 3)
    train(write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--run.max_tokens_per_batch=170")
    for kind in ("pairs", "scores", "samples"):
        files = sorted(file.relative_to(stub) for file in stub.glob(f"*/*/{kind}.jsonl"))
        assert files
        for file in files:
            a, b = (
                [json.loads(line) for line in (root / file).read_text().splitlines()]
                for root in (stub, tmp_path / "runs/stub")
            )
            assert [row["id"] for row in a] == [row["id"] for row in b] and len(a) > 0, file
            if file.parts[0] == "eval" and "base_weak" in file.parts[1] and kind == "scores":
                assert [row["logp"] for row in a] == pytest.approx(
                    [row["logp"] for row in b], rel=1e-4
                )


def test_a_negative_is_found_by_its_prompt_in_any_order(tmp_path, stub):
    from minmacpo.method import selection as choose
    from minmacpo.pipeline.run import Stage
    from minmacpo.runtime.files import write_rows

    rows = [{"id": str(i), "prompt": [], "response": f"r{i}"} for i in (3, 1, 4, 0)]
    write_rows(tmp_path / "questions.jsonl", rows)
    write_rows(tmp_path / "scores.jsonl", [{"logp": -row} for row in range(4)])
    stage = Stage("x", tmp_path, "x")
    find = choose.negative_finder(choose.TextColumn(stage, "questions.jsonl", "question"), stage)
    assert [
        (found and (found[0].response, found[1]["logp"]))
        for found in map(find, ["1", "9", "0", "3", "1", "4"])
    ] == [("r1", -1), None, ("r0", -3), ("r3", 0), None, ("r4", -2)]


def test_sampling_goes_on_with_fewer_side_by_side_where_memory_is_short(stub, monkeypatch, capsys):
    from minmacpo import UserError
    from minmacpo.config.schema import Config
    from minmacpo.data.records import Example, Message
    from minmacpo.pipeline import model_pool as workshop

    config, real, tried = Config(), workshop.generate, []
    config = dataclasses.replace(
        config, generate=dataclasses.replace(config.generate, max_new_tokens=4)
    )
    loaded = workshop.LoadedModel(stub / "bases/strong", config)
    jobs = [(Example(str(i), (Message("user", f"who is {i} ?"),), ""), 0) for i in range(6)]
    wanted = workshop.answer(config, loaded, "x", jobs, 1)

    def short(*words):
        tried.append(words[7])
        if words[7] > limit:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            )
        return real(*words)

    monkeypatch.setattr(workshop, "generate", short)
    limit = 2
    assert [s.tokens for s in workshop.answer(config, loaded, "x", jobs, 1)] == [
        s.tokens for s in wanted
    ]
    assert tried == [6, 3, 1] and capsys.readouterr().err.count("out of memory") == 2
    limit = 0
    with pytest.raises(
        UserError,
        match=r"out of memory while answers are sampled, 1 side by side; lower generate\.max_new_tokens",
    ):
        workshop.answer(config, loaded, "x", jobs, 1)
