"""Quantised linears against codes in fp64, and models of them against dequantised ones."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import far, logits_of, ragged, random_model
from living import Living
from runs import copy_run, invoke, train, write_stub
from test_lora import fill
from test_sampling import GREEDY, new

from minmacpo import UserError
from minmacpo.core import prepack
from minmacpo.core.checkpoint import load_model, save_model, weight_bytes
from minmacpo.core.lora import TARGET_MODULES, LoraConfig, attach_lora, lora_params
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

# The values of nf4 (Dettmers et al. 2023, appendix E), to seven places
# fmt: off
NF4_TABLE = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]
# fmt: on


def quantize_and_dequantize(model, quantization: str):
    """The model with quantised linears, and a plain one with the weights that they stand for."""
    quantized = copy.deepcopy(model)
    quantize_linears(quantized, quantization)
    weights = {}
    for name, tensor in model.state_dict().items():
        weights.update(quantize_weight(quantized, name, tensor))
    quantized.load_state_dict(weights, assign=True)

    plain = copy.deepcopy(model)
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = layer.dequantize(torch.float32)
            plain.get_submodule(name).weight = torch.nn.Parameter(weight)
    return quantized.requires_grad_(False), plain.requires_grad_(False)


def quantized_linear(
    quantization: str, rows: int, columns: int, dtype=torch.float32, bias: bool = False
):
    """A quantised linear, and the random weight (rows, columns) that it was made of."""
    linear = torch.nn.Linear(columns, rows, bias=bias).to(dtype).requires_grad_(False)
    layer = QUANTIZED_LINEARS[quantization](linear)
    tensors = layer.quantize(linear.weight)
    if bias:
        tensors["bias"] = linear.bias
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_(False), linear.weight


# ---- codes --------------------------------------------------------------------------------------


def ceil_bf16_by_bits(values: np.ndarray) -> np.ndarray:
    """The least bf16 numbers that are no smaller, from the bits of fp32."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded_up = bits + np.where(bits & 0xFFFF, 0x10000, 0)
    return (rounded_up & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(float)


def test_the_levels_are_those_of_qlora():
    assert far(nf4_levels(), torch.tensor(NF4_TABLE)) < 1e-6
    assert nf4_levels().dtype == torch.float32


@pytest.mark.parametrize("quantization", QUANTIZED_LINEARS)
@pytest.mark.parametrize("shape", [(37, 45), (8, 64), (1, 3), (130, 200)])
def test_every_code_is_the_nearest(quantization, shape, seed):
    """In fp64, block by block; at a tie of two neighbours either will do."""
    layer, weight = quantized_linear(quantization, *shape)
    exact = weight.double().numpy()
    if quantization == "int8":
        blocks = exact
        levels = np.arange(-127, 128.0)
        scale = ceil_bf16_by_bits(np.abs(blocks).max(1) / 127)
    else:
        padding = -exact.size % NF4_BLOCK
        blocks = np.pad(exact.ravel(), (0, padding)).reshape(-1, NF4_BLOCK)
        levels = nf4_levels().double().numpy()
        scale = ceil_bf16_by_bits(np.abs(blocks).max(1))
    errors = np.abs(blocks[:, :, None] - scale[:, None, None] * levels)
    least = errors.min(2)

    error = np.abs(layer.dequantize(torch.float32).double().numpy() - exact).ravel()

    assert error.max() <= least.max() * 1.0001 + 1e-7
    assert (error <= least.ravel()[: exact.size] + 1e-6 * np.abs(exact).max()).all()


@pytest.mark.parametrize("quantization", QUANTIZED_LINEARS)
def test_what_can_be_kept_exactly_is(quantization, seed):
    """Whole multiples of a scale, and levels times a power of two, come back to the last bit."""
    layer, _ = quantized_linear(quantization, 32, 96)
    if quantization == "int8":
        codes = torch.randint(-127, 128, (32, 96))
        codes[:, 0] = 127
        weight = codes.float() * 2.0 ** torch.randint(-8, 3, (32, 1))
    else:
        codes = torch.randint(0, 16, (48, NF4_BLOCK))
        codes[:, 7] = 15
        blocks = nf4_levels()[codes] * 2.0 ** torch.randint(-8, 3, (48, 1))
        weight = blocks.view(32, 96)

    layer.load_state_dict(layer.quantize(weight), assign=True)
    assert torch.equal(layer.dequantize(torch.float32), weight)

    layer.load_state_dict(layer.quantize(torch.zeros(32, 96)), assign=True)
    assert not layer.dequantize(torch.float32).any()


# ---- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", QUANTIZED_LINEARS)
@pytest.mark.parametrize(("bias", "columns"), [(False, 80), (True, 80), (False, 172), (True, 24)])
def test_products_and_gradients_are_those_of_the_dequantised_weight(
    quantization, dtype, bias, columns, seed
):
    """With few rows too, where a CPU has a product of its own for int8; fp64 is the oracle."""
    tolerance = 3e-5 if dtype == torch.float32 else 0.09
    for rows in (1, 3, 16, 17, 70):
        layer, _ = quantized_linear(quantization, 48, columns, dtype, bias)
        x = torch.randn(rows, 2, columns).to(dtype).requires_grad_()
        grad = torch.randn(rows, 2, 48).to(dtype)
        weight = layer.dequantize(torch.float32).double()
        exact = F.linear(x.double(), weight, layer.bias.double() if bias else None)

        y = layer(x)
        y.backward(grad)

        assert y.dtype == dtype
        assert far(y.double(), exact) <= tolerance
        assert far(x.grad.double(), grad.double() @ weight) <= tolerance
        with torch.inference_mode():
            assert far(layer(x), y) <= tolerance / 3


@pytest.mark.parametrize("quantization", QUANTIZED_LINEARS)
def test_an_adapter_learns_as_on_the_dequantised_model(quantization, seed):
    """And backward keeps no weight in 16 or 32 bits, while the plain model's keeps its own."""
    model = random_model(seed, std=0.1, qkv_bias=True)
    quantized, plain = quantize_and_dequantize(model, quantization)
    tokens = torch.randint(3, 60, (4, 20))
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[:, 5:] = True  # 60 tokens: no tensor of theirs has the shape of a weight
    weight_shapes = set()
    for name, param in model.named_parameters():
        if name.split(".")[-2] in TARGET_MODULES and param.dim() == 2:
            weight_shapes.update([tuple(param.shape), tuple(param.shape[::-1])])

    grads = {}
    keeps_weights = {}
    for kind, learner in {"quantized": quantized, "plain": plain}.items():
        attach_lora(learner, LoraConfig(3, 6, TARGET_MODULES))
        fill(learner, seed)
        saved_shapes = set()

        def save(tensor, saved_shapes=saved_shapes):
            saved_shapes.add(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = -masked_logps(learner, tokens, mask)[0].mean()
        loss.backward()
        grads[kind] = {key: param.grad for key, param in lora_params(learner).items()}
        keeps_weights[kind] = bool(saved_shapes & weight_shapes)

    assert keeps_weights == {"quantized": False, "plain": True}
    assert grads["quantized"].keys() == grads["plain"].keys()
    for key, grad in grads["quantized"].items():
        expected = grads["plain"][key]
        assert grad.abs().max() > 0
        assert far(grad, expected) <= 1e-5 * (1 + expected.abs().max().item()), key


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("quantization", QUANTIZED_LINEARS)
def test_it_answers_as_the_dequantised_model(quantization, prepacked, seed, monkeypatch):
    """Greedy tokens part only where the plain model's two likeliest are as likely as each other."""
    monkeypatch.setattr(prepack, "MIN_WEIGHTS", 0 if prepacked else 10**9)
    quantized, plain = quantize_and_dequantize(random_model(seed), quantization)
    prompts = ragged(seed, 5, 61)
    settings = new(GREEDY, max_new_tokens=12)

    answers, logps = generate(quantized, prompts, range(5), settings, {2})
    plain_answers, plain_logps = generate(plain, prompts, range(5), settings, {2})

    for prompt, answer, expected in zip(prompts, answers, plain_answers, strict=True):
        for place, (token, other) in enumerate(zip(answer, expected, strict=False)):
            if token != other:
                before = torch.tensor([[*prompt, *expected[:place]]])
                top = logits_of(plain, before)[0, -1].topk(2).values
                assert top[0] - top[1] < 1e-3, "no tie"
                break
    if answers == plain_answers:
        assert logps == pytest.approx(plain_logps, rel=1e-3, abs=1e-3)


# ---- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", QUANTIZED_LINEARS)
def test_loading_holds_the_quantised_weights_and_one_tensor(
    quantization, tmp_path, tokenizer_bytes, seed
):
    model = random_model(
        seed, hidden_size=256, intermediate_size=700, num_hidden_layers=6, head_dim=64
    )
    save_model(tmp_path, model.config, model.state_dict(), tokenizer_bytes)

    with Living() as living:
        loaded = load_model(tmp_path, quantization=quantization)

    held = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    plain = sum(param.nbytes for param in model.parameters())
    largest = 4 * 256 * 700  # beside it a part of it in work
    assert held == weight_bytes(model.config, 4, quantization)
    assert held < 0.35 * plain
    assert living.peak <= held + 4 * largest, (living.peak, held)

    expected = quantize_and_dequantize(model, quantization)[0].state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    in_bf16 = load_model(tmp_path, dtype=torch.bfloat16, quantization=quantization)
    assert {param.dtype for param in in_bf16.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("quantization", QUANTIZED_LINEARS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(quantization, bad, tmp_path, tokenizer_bytes, seed):
    model = random_model(seed)
    name = "model.layers.1.mlp.up_proj.weight"
    weights = model.state_dict()
    weights[name][3, 4] = bad
    save_model(tmp_path, model.config, weights, tokenizer_bytes)

    with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
        load_model(tmp_path, quantization=quantization)


# ---- whole programs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized_run(stub, tmp_path_factory):
    """The stub run with a student in nf4, made beside the plain one, from which it may take."""
    root = tmp_path_factory.mktemp("quantized")
    copy_run(stub, root / "runs")
    train(write_stub(root), f"--run.root={root / 'runs'}", "--model.quantize=nf4")
    return root / "runs/stub-quantize=nf4"


def stages_of(run) -> dict[str, dict]:
    """What stage.json says of every stage of a run."""
    stages = {}
    for file in run.glob("*/*/stage.json"):
        stages[file.parent.relative_to(run).as_posix()] = read_json(file)
    return stages


def test_only_what_the_quantised_base_does_is_another_stage(quantized_run, stub):
    plain_stages = stages_of(stub)
    quantized_stages = stages_of(quantized_run)

    assert plain_stages.keys() == quantized_stages.keys()
    for name, notes in quantized_stages.items():
        same = plain_stages[name]["fingerprint"] == notes["fingerprint"]
        if name.startswith(("data", "bases", "round0/teacher", "round0/weak")):
            assert same, name
        if name in ("round1/positives_teacher1", "round0/negatives_teacher1"):
            assert same, name
        if name.startswith("round0/student") or name == "round1/pairs_student":
            assert not same and notes["settings"]["quantize"] == "nf4", name
    assert (quantized_run / "eval/table.json").is_file()


@pytest.mark.parametrize(
    ("agent", "flags", "expected"),
    [
        ("student_pos", [], "nf4"),
        ("teacher1_pos", [], "none"),
        ("student_pos", ["--model.quantize=int8"], "int8"),
    ],
)
def test_an_agent_is_loaded_as_it_was_trained_unless_a_flag_says_otherwise(
    agent, flags, expected, quantized_run, monkeypatch
):
    from minmacpo.pipeline import model_pool

    loaded = []
    load = model_pool.load_model

    def recorded(folder, device, dtype, quantization):
        loaded.append(quantization)
        return load(folder, device, dtype, quantization)

    monkeypatch.setattr(model_pool, "load_model", recorded)
    folder = quantized_run / "round1" / agent
    ended = invoke("sample", folder, "who lives here ?", "--generate.max_new_tokens=4", *flags)

    assert ended.code == 0
    assert loaded == [expected]


def test_an_adapter_is_merged_into_the_plain_base_only(quantized_run, tmp_path):
    agent = quantized_run / "round1/student_pos"
    export = f"--export={tmp_path / 'merged'}"

    refused = invoke("sample", agent, export)
    assert refused.code == 2
    assert refused.err.count("\n") == 1 and "--model.quantize=none" in refused.err
    assert not list(tmp_path.iterdir())

    assert invoke("sample", agent, export, "--model.quantize=none").code == 0
    merged = load_model(tmp_path / "merged")
    base = load_model(quantized_run / "bases/strong")
    assert not is_quantized(merged)
    layer, base_layer = merged.model.layers[0], base.model.layers[0]
    assert far(layer.self_attn.q_proj.weight, base_layer.self_attn.q_proj.weight) > 0
    assert torch.equal(layer.mlp.up_proj.weight, base_layer.mlp.up_proj.weight)


def test_answers_of_another_quantisation_are_not_continued(quantized_run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "who lives here ?"}) + "\n")
    words = [
        quantized_run / "round1/student_pos",
        f"--prompts={prompts}",
        f"--out={tmp_path / 'out.jsonl'}",
        "--generate.max_new_tokens=4",
    ]

    assert invoke("sample", *words).code == 0
    assert invoke("sample", *words).code == 0
    other = invoke("sample", *words, "--model.quantize=none")

    assert other.code == 2 and "other settings" in other.err
