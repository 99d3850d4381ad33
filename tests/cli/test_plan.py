"""The plan of a run before it starts: memory, tokens against finished runs, and refusals."""

import dataclasses
import json
import random
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REPO, random_model, shared
from living import Living, random_shape
from runs import copy_run, invoke, train, write_stub

from minmacpo.cli import dry_run
from minmacpo.cli.dry_run import find_memory_problem
from minmacpo.cli.plan import Plan, largest_pass
from minmacpo.config.parse import parse
from minmacpo.config.schema import TARGET_MODULES, Generate, Lora
from minmacpo.core.checkpoint import weight_bytes
from minmacpo.core.lora import attach_lora
from minmacpo.core.memory_estimate import MemoryEstimate, PassSize, estimate_memory
from minmacpo.core.model import Transformer
from minmacpo.core.model_config import parse_config
from minmacpo.core.sampling import generate
from minmacpo.data.chat_template import Renderer
from minmacpo.data.tokenizer import Tokenizer
from minmacpo.kernels.fused_logps import masked_logps, sequence_logps
from minmacpo.kernels.quantization import quantize_linears
from minmacpo.pipeline.prepare_data import prepare
from minmacpo.pipeline.run import Run
from minmacpo.runtime.files import read_json, write_rows
from train import run_all

# ---- memory -------------------------------------------------------------------------------------

NEW_TOKENS = 60


def peak_of_a_pass(kind, model, rows, length, scored) -> int:
    """Bytes of all tensors that live at the peak of a pass over random rows."""
    tokens = torch.randint(3, 60, (rows, length))
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[:, length - scored :] = True
    sampling = Generate(max_new_tokens=NEW_TOKENS, batch=rows, top_k=0, top_p=1.0, temperature=1.0)
    learns = kind in ("train", "pretrain")
    with Living() as living, torch.set_grad_enabled(learns):
        if kind == "sample":
            stop_ids = set(range(0, 500, 40))  # so that rows end and the cache is copied
            generate(model, tokens.tolist(), list(range(rows)), sampling, stop_ids)
        elif kind == "score":
            sequence_logps(model, tokens, mask)
        else:
            masked_logps(model, tokens, mask)[0].sum().backward()
    return living.peak


# What the layers of a family hold beside those of Llama
QWEN3 = {"qk_norm": "head"}
GEMMA3 = QWEN3 | {"norms": "around", "offset_norms": True, "hidden_act": "gelu_pytorch_tanh"}
OLMO2 = {"qk_norm": "width", "norms": "after"}


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("pretrain", {}),
        ("train", {}),
        ("train", QWEN3),
        ("train", GEMMA3),
        ("train", OLMO2),
        ("score", {}),
        ("sample", {}),
    ],
)
def test_the_estimate_is_good_to_about_a_third(kind, family, seed):
    rng = random.Random(seed)
    config = dataclasses.replace(random_shape(rng), **family)
    lora = Lora(4, 8, rng.choice([("q_proj", "v_proj"), TARGET_MODULES]))
    rows = rng.choice([4, 16])
    length = rng.choice([90, 200])
    model = random_model(seed, **dataclasses.asdict(config) | {"rope_scaling": config.rope_scaling})
    learning = 0
    if kind == "pretrain":
        learning = sum(parameter.nbytes for parameter in model.parameters())
    else:
        learning = sum(parameter.nbytes for parameter in attach_lora(model, lora))

    size = PassSize(
        kind,
        rows=rows,
        tokens=rows * length,
        scored_tokens=rows if kind == "sample" else rows * (length // 2),
        cache_length=length + NEW_TOKENS,
    )
    estimate = estimate_memory(size, config, lora, bytes_per_number=4)
    expected = estimate.activations + estimate.working + estimate.cache
    if kind in ("train", "pretrain"):
        expected += learning  # of what learns, the pass makes the gradients alone

    peak = peak_of_a_pass(kind, model, rows, length, length // 2)

    assert 0.7 * peak - 3e5 <= expected <= 1.4 * peak + 3e5, (expected, peak, config, size)


def test_weights_and_adapter_are_counted_exactly(seed):
    for changes in ({}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1, "head_dim": 16}):
        model = random_model(seed, **changes)
        lora = Lora(3, 8, ("q_proj", "v_proj", "down_proj"))
        base = sum(parameter.nbytes for parameter in model.parameters())
        size = PassSize("train", rows=1, tokens=1, scored_tokens=1)
        estimate = estimate_memory(size, model.config, lora, bytes_per_number=4)
        assert estimate.weights == base
        # values, gradients and two moments, all in fp32
        assert estimate.learning == 4 * sum(p.nbytes for p in attach_lora(model, lora))


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_weights_are_counted_exactly(quantization, seed):
    config = random_shape(random.Random(seed))
    model = random_model(seed, **dataclasses.asdict(config) | {"rope_scaling": config.rope_scaling})
    quantize_linears(model, quantization)
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert weight_bytes(config, 4, quantization) == held


def test_contrastive_decoding_holds_two_models():
    config = random_shape(random.Random(0))
    size = PassSize("sample", rows=4, tokens=40, scored_tokens=4, cache_length=50)
    one = estimate_memory(size, config, Lora(), bytes_per_number=4)
    two = estimate_memory(dataclasses.replace(size, models=2), config, Lora(), bytes_per_number=4)
    assert (two.weights, two.cache) == (2 * one.weights, 2 * one.cache)


def test_what_is_refused_is_surely_too_large():
    estimate = MemoryEstimate(weights=60, learning=0, activations=30, working=10)
    assert estimate.total == 100
    assert estimate.fits(70)
    assert not estimate.fits(69)


def test_the_largest_pass_has_the_longest_rows():
    rows = [10, 40, 20, 30]
    # two rows of 40 fit into 100 tokens: those of 40 and 30
    size = largest_pass("score", rows, answers=[1, 4, 2, 3], budget=100, batch=4)
    assert (size.rows, size.tokens, size.scored_tokens) == (2, 70, 7)
    assert largest_pass("train", rows, rows, budget=5, batch=4).rows == 1, "one row is always taken"
    assert largest_pass("train", rows, rows, budget=1000, batch=3).tokens == 90
    assert largest_pass("train", [], [], budget=9, batch=3).tokens == 0


# ---- tokens, against a finished run -------------------------------------------------------------


@dataclass(frozen=True)
class PlannedStage:
    """A stage in a dry run: its kind, and its whole line."""

    kind: str
    line: str

    @property
    def is_costly(self) -> bool:
        """Whether a model goes through texts in it, so that the plan counts tokens."""
        costly = ("pretrain", "sft", "prefer", "sample", "score", "pairs")
        return self.kind.partition("/")[0] in costly

    @property
    def tokens(self) -> "PlannedTokens | None":
        match = re.search(r"(<= )?([\d.e+]+)([kMG]?) tokens", self.line)
        if match is None:
            return None
        units = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
        return PlannedTokens(float(match[2]) * units[match[3]], is_bound=match[1] is not None)


@dataclass(frozen=True)
class PlannedTokens:
    count: float
    is_bound: bool  # "<= 12k": not known exactly


def planned(out: str) -> dict[str, PlannedStage]:
    """The stages of a dry run by their names."""
    _, _, plan = out.partition(" stages in ")
    stages = {}
    for line in plan.splitlines()[1:]:
        _, name, kind, *_ = line.split()
        stages[name] = PlannedStage(kind, line)
    return stages


@pytest.mark.parametrize(
    "method", ["macpo", "self-rewarding", "dpo-truth", "rlaif", "rlcd", "confident"]
)
def test_tokens_are_those_of_the_run(method, tiny, methods, tmp_path):
    """Those of unknown answers are no more than said, where models write words.

    Those of the stub write broken bytes, which are more tokens when they are read again.
    """
    if method == "macpo":
        run = tiny
        preset = "@tiny"
    else:
        run = methods[method]
        preset = write_stub(tmp_path)
    words = [preset, f"--run.root={tmp_path / 'none'}", f"--method={method}", "--dry_run"]
    exact = 0
    for name, stage in planned(train(*words).out).items():
        says_tokens = re.search(r" tokens, [\d.]+ (MB|GB)$", stage.line) is not None
        assert says_tokens == stage.is_costly, stage.line
        is_training = stage.kind.startswith(("pretrain/", "sft/", "prefer/"))
        if not is_training or not (run / name / "stage.json").exists():
            continue
        tokens = read_json(run / name / "stage.json")["counts"]["tokens"]
        if not stage.tokens.is_bound:
            exact += 1
            assert tokens == pytest.approx(stage.tokens.count, rel=0.006), stage.line
        elif method == "macpo":
            assert tokens <= 1.006 * stage.tokens.count, stage.line
    assert exact >= 3


def test_earlier_answers_that_are_trained_on_are_counted(tmp_path):
    """Their logits are computed too; how many tokens are read is the same."""
    rows = []
    for number in range(60):
        turns = []
        for text in (f"hi {number}", "a long answer here", "so ?", "and one more", "yes ?"):
            role = "assistant" if len(turns) % 2 else "user"
            turns.append({"role": role, "content": text})
        turns[3]["weight"] = 0
        rows.append({"prompt": turns, "chosen": "of course", "rejected": "no"})
    write_rows(tmp_path / "rows.jsonl", rows)
    passes = {}
    for train_on in ("last", "all"):
        words = (f"--data.path={tmp_path / 'rows.jsonl'}", f"--data.train_on={train_on}")
        run = planned_run(tmp_path / train_on, *words, "--model.vocab=300").run
        plan = Plan(run, prepare(run.config))
        for name in ("round0/teacher1_pos", "round0/student_pos", "round0/teacher1_neg"):
            passes[train_on, name] = plan.workload(name).largest_pass
    renderer = Renderer(Tokenizer(plan.prepared.tokenizer), "turns")
    more = len(renderer.tokenizer.encode("a long answer here")) + 1  # and its end token
    for name in ("round0/teacher1_pos", "round0/student_pos"):
        last, every = passes["last", name], passes["all", name]
        assert every.rows == last.rows and every.tokens == last.tokens
        assert every.scored_tokens == last.scored_tokens + every.rows * more
    name = "round0/teacher1_neg"
    assert passes["all", name] == passes["last", name]


def test_what_is_on_the_disk_is_read(tiny, tmp_path):
    """The tokens of a stage whose inputs are finished are those that it went through."""
    run = copy_run(tiny, tmp_path / "runs")
    names = ["round0/student_pos", "round0/student_neg", "round1/teacher2_pos"]
    tokens = {}
    for name in names:
        tokens[name] = read_json(run / name / "stage.json")["counts"]["tokens"]
        shutil.rmtree(run / name)
    stages = planned(train("@tiny", f"--run.root={run.parent}", "--dry_run").out)
    for name in names:
        plan = stages[name].tokens
        assert plan.is_bound  # pairs: by their longer side
        assert 0.85 * plan.count <= tokens[name] <= 1.006 * plan.count, stages[name].line


@pytest.mark.parametrize("stage", ["round1/positives_student", "round1/pairs_student"])
def test_a_stage_that_has_left_nothing_is_planned_with(stage, tiny, tmp_path):
    run = copy_run(tiny, tmp_path / "runs")
    for file in (run / stage).glob("*.jsonl"):
        file.write_text("")
    for other in (run / "round1").iterdir():
        if other.name != stage.partition("/")[2] and other.name != "pairs_student":
            shutil.rmtree(other)
    assert "round1/student_pos" in train("@tiny", f"--run.root={run.parent}", "--dry_run").out


# ---- what does not fit --------------------------------------------------------------------------


def planned_run(folder, *words):
    """A stub run with its stages listed, and its plan with every text as long as can be."""
    config = parse([write_stub(folder / "p"), f"--run.root={folder / 'runs'}", *words]).config
    run = Run(config)
    run_all(run, {}, None)
    return Plan(run, prepared=None)


def test_a_run_that_cannot_fit_is_refused_before_it_has_a_folder(place, monkeypatch):
    words = [write_stub(place / "p"), f"--run.root={place / 'runs'}"]
    monkeypatch.setattr(dry_run, "free_bytes", lambda device: 1 << 16)
    ended = invoke("train", *words)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert re.search(r"bases/strong needs about .* of memory, of which 0 MB are free", ended.err)
    assert not (place / "runs").exists()

    dry = invoke("train", *words, "--dry_run")
    assert dry.code == 0
    assert f"WARNING: {ended.err.removeprefix('error: ')}" in dry.err


def test_texts_are_read_only_where_the_longest_would_not_fit(place):
    plan = planned_run(place)

    def no_texts():
        raise AssertionError("the texts were read")

    dry_run.check_memory(plan.run, no_texts)


@pytest.mark.parametrize(
    ("stage", "words", "setting"),
    [
        ("round0/student_pos", ["--run.max_tokens_per_batch=20000"], "run.max_tokens_per_batch"),
        ("round0/student_pos", ["--run.max_tokens_per_batch=1"], "data.max_length"),
        ("round1/positives_student", ["--generate.batch=512"], "generate.batch"),
        ("round0/student_pos", ["--model.strong=512x4x4x1024"], "--model.quantize=int8"),
    ],
)
def test_the_sentence_names_the_setting_that_matters(stage, words, setting, place):
    plan = planned_run(place, *words)
    plan.run.only = stage
    needed = min(plan.memory(stage).total, plan.memory(stage, recompute=True).total)
    free = round(0.7 * needed) - 2
    problem = find_memory_problem(plan, free)
    assert problem.startswith(f"{stage} needs about")
    assert setting in problem
    assert find_memory_problem(plan, free + 4) is None


def test_a_quantised_base_is_planned_for_what_it_takes(place):
    words = ["--model.strong=512x4x4x1024", "--run.dtype=bfloat16"]
    plain = planned_run(place, *words).memory("round0/student_pos").weights
    small = planned_run(place, *words, "--model.quantize=nf4").memory("round0/student_pos").weights
    assert 0.25 * plain < small < 0.4 * plain


def test_a_finished_run_needs_nothing(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "free_bytes", lambda device: 0)
    run = copy_run(stub, tmp_path / "runs")
    train(write_stub(tmp_path), f"--run.root={run.parent}")


# ---- warnings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "onednn", "expected"),
    [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)],
)
def test_slow_products_are_told_of(dtype, onednn, expected, place, monkeypatch):
    monkeypatch.setattr(dry_run, "multiplies_bf16", lambda: onednn)
    plan = planned_run(place, f"--run.dtype={dtype}", "--run.device=cpu")
    warnings = " ".join(dry_run.hints(plan.run))
    assert ("run.dtype=float32 may be" in warnings) is expected


def test_few_test_rows_are_warned_of(tmp_path):
    rows = []
    for i in range(60):
        rows.append({"prompt": f"What is {i} ?", "chosen": f"It is {i} .", "rejected": "no ."})
    write_rows(tmp_path / "rows.jsonl", rows)
    words = ["@hh", f"--data.path={tmp_path / 'rows.jsonl'}", f"--run.root={tmp_path / 'runs'}"]
    words += ["--model.vocab=300", "--dry_run"]
    few = invoke("train", *words)
    assert few.code == 0, few.err
    assert re.search(r"WARNING: the test split has \d rows, which are too few", few.err)
    # of 60 rows half are test rows now
    enough = invoke("train", *words, "--data.shares=0.2,0.1,0.1,0.6")
    assert "too few" not in enough.err


# ---- real sizes, by their headers ---------------------------------------------------------------

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "hidden_act": "silu",
}


def make_hollow(folder: Path, raw: dict, tokenizer: bytes) -> Path:
    """A checkpoint of that shape in bf16, whose weights are a header with a hole behind it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    with torch.device("meta"):
        weights = Transformer(parse_config(raw, "config.json")).state_dict()
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        begin = end
        end += 2 * weight.numel()
        shape = list(weight.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return folder


@pytest.mark.slow
def test_a_dry_run_reads_no_weight_of_a_7b_base(tmp_path):
    tokenizer = shared("tokenizers/llama2-tokenizer.model").read_bytes()
    mistral_7b = LLAMA_7B | {
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
    }
    student = make_hollow(tmp_path / "s", LLAMA_7B, tokenizer)
    first = make_hollow(tmp_path / "a", LLAMA_7B, tokenizer)
    second = make_hollow(tmp_path / "b", mistral_7b, tokenizer)
    status = (student / "model.safetensors").stat()
    assert status.st_size > 13e9
    assert status.st_blocks * 512 < 1e6, "needs a file system with holes"

    rows = []
    for i in range(120):
        prompt = f"What is {i} and {i} ?"
        rows.append({"prompt": prompt, "chosen": f"It is {2 * i} .", "rejected": "no ."})
    write_rows(tmp_path / "rows.jsonl", rows)
    words = [
        "@paper-pku",
        f"--data.path={tmp_path / 'rows.jsonl'}",
        f"--model.student={student}",
        f"--model.teachers={first},{second},{first}",
        f"--run.root={tmp_path / 'runs'}",
        "--dry_run",
    ]
    # not ru_maxrss: a new process takes that over from the one that started it, which may be large
    code = """
import sys
import train
from minmacpo.runtime.device import peak_mb
code = train.main(sys.argv[1:])
print("peak", round(peak_mb()))
sys.exit(code)
"""
    command = [sys.executable, "-c", code, *words]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    out, _, peak = ended.stdout.rpartition("peak")
    assert int(peak) < 700, "in MB"
    assert not (tmp_path / "runs").exists()

    stages = planned(out)
    kinds = [stage.kind for stage in stages.values()]
    assert kinds.count("prefer/2") == 3 * 4
    (gigabytes,) = re.findall(r"([\d.]+) GB$", stages["round3/student_pos"].line)
    assert 13 < float(gigabytes) < 30


# ---- templates ----------------------------------------------------------------------------------


def test_the_hint_is_given_by_every_program(stub, tmp_path):
    """By a dry run, in the log of a run, and where a base is asked; not of bases made here."""
    base = tmp_path / "base"
    shutil.copytree(stub / "bases/strong", base)
    (base / "stage.json").unlink()
    words = [write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--run.name=x"]
    words += [f"--model.student={base}", f"--model.teachers={base},{base}", "--macpo.rounds=0"]
    assert "WARNING" not in invoke("train", *words, "--dry_run").err
    assert "WARNING" not in invoke("sample", base, "hi").err

    (base / "chat_template.jinja").write_text("{{'<|im_start|>'}}")
    hint = f"WARNING: {base}: its own chat template "
    assert invoke("train", *words, "--dry_run").err.count(hint) == 1
    assert hint in invoke("sample", base, "hi", "--data.template=turns").err
    train(*words)
    run = tmp_path / "runs/x"
    assert (run / "log.txt").read_text().count(hint) == 1
    answered = invoke("sample", run / "round0/student_pos", "hi")
    assert hint not in answered.err, "a run knows its template"
