"""The loop: accumulation, a hand-written loop, TRL's trainer, stops and resumes, bit for bit."""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import Keep, far, logits_of, ragged, random_model

from minmacpo import UserError
from minmacpo.config.parse import parse
from minmacpo.config.schema import Lora
from minmacpo.core import trainer as trainer_module
from minmacpo.core.batching import plan_steps
from minmacpo.core.checkpoint import load_model, save_adapter, save_model, save_tensors
from minmacpo.core.lora import (
    attach_lora,
    get_adapter_weights,
    init_adapter,
    lora_params,
    set_adapter_weights,
)
from minmacpo.core.losses import PREFERENCE_LOSSES, PreferenceLoss
from minmacpo.core.scoring import score
from minmacpo.core.sft_loss import SFTLoss
from minmacpo.core.trainer import (
    OptimizerConfig,
    TrainerHooks,
    TrainExample,
    plan_batches,
    train,
    train_step,
)
from minmacpo.data.tokenizer import Tokens
from minmacpo.pipeline import stage_maker
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.stage import StageContext
from minmacpo.pipeline.trainer_hooks import trainer_hooks

ALL = Lora(
    r=4,
    alpha=8.0,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


@pytest.fixture
def hooks_of(tmp_path) -> Callable[..., TrainerHooks]:
    """Makes the hooks of a training with a folder of its own; settings as in TrainerHooks."""

    def make(name: str = "run", **settings) -> TrainerHooks:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        usual = dict(
            name=f"training of {name}",
            seed=5,
            log_every=2,
            save_every=3,
            state_file=folder / "state/state.safetensors",
            metrics_file=folder / "metrics.jsonl",
        )
        return TrainerHooks(**usual | settings)

    return make


def metrics_of(hooks: TrainerHooks) -> list[dict]:
    """The rows that a training has written."""
    return [json.loads(line) for line in hooks.metrics_file.read_text().splitlines()]


def row(prompt: list[int], answer: list[int]) -> Tokens:
    return Tokens(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def answers(seed: int, count: int) -> list[TrainExample]:
    """Ragged prompts with ragged answers."""
    parts = zip(ragged(seed, count, 61, 1, 12), ragged(seed + 1, count, 61, 1, 12), strict=True)
    return [TrainExample(f"row{i}", (row(p, a),)) for i, (p, a) in enumerate(parts)]


def pairs(seed: int, count: int) -> list[TrainExample]:
    """Ragged prompts with two ragged answers and made-up reference logps."""
    parts = zip(*(ragged(seed + i, count, 61, 1, 12) for i in range(3)), strict=True)
    refs = (20 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) - 60).tolist()
    return [
        TrainExample(f"pair{i}", (row(p, a), row(p, b)), tuple(refs[i]))
        for i, (p, a, b) in enumerate(parts)
    ]


KINDS = {"sft": (answers, SFTLoss()), "pairs": (pairs, PreferenceLoss(0.2, 0.3, 0.1))}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def slotted(seed: int, **changes):
    """(model, parameters of its fresh slot)."""
    model = random_model(seed, **changes)
    params = attach_lora(model, ALL)
    init_adapter(model, seed)
    return model, params


# ---- accumulation ---------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_the_gradient_does_not_depend_on_the_micro_batches(kind, whole, seed):
    make, objective = kind
    units = make(seed, 9)
    if whole:  # pre-training of a tied model
        model = random_model(seed, tie_word_embeddings=True).double()
        params = list(model.parameters())
    else:
        model, params = slotted(seed)
        model.double()
        params = list(lora_params(model).values())
        for param in params:
            param.data.normal_(std=0.1)
    found = []
    for groups in ([[*range(9)]], [[8, 1], [0, 2, 3], [7], [4, 5, 6]], [[i] for i in range(9)]):
        keep = Keep(params)
        metrics = train_step(model, params, units, groups, objective, keep)
        found.append([torch.stack(list(metrics.values())), *keep.grads])
    for other in found[1:]:
        for i, (a, b) in enumerate(zip(found[0], other, strict=True)):
            most = 1e-9 if i else 1e-7  # of the metrics, accuracies are counted in fp32
            assert far(a, b) <= most * (1 + a.abs().max().item()) and a.abs().max() > 0


def test_the_sft_step_is_the_mean_over_all_trained_tokens(seed):
    """Not a mean of means: rows of every length, cut at random, against one cross-entropy."""
    model = random_model(seed).double()
    params, units = list(model.parameters()), answers(seed, 8)
    keep = Keep(params)
    metrics = train_step(model, params, units, [[3], [0, 1, 2], [4, 5, 6, 7]], SFTLoss(), keep)
    logps, trained = 0, 0
    for unit in units:
        ids, mask = unit.rows[0].ids, unit.rows[0].mask
        labels = [i if m else -100 for i, m in zip(ids, mask, strict=True)]
        logps = logps + F.cross_entropy(
            logits_of(model, torch.tensor([ids]))[0, :-1], torch.tensor(labels[1:]), reduction="sum"
        )
        trained += sum(mask)
    wanted = torch.autograd.grad(logps / trained, params)
    norm = torch.cat([g.flatten() for g in wanted]).norm()
    assert metrics["loss"].item() == pytest.approx((logps / trained).item(), rel=1e-9)
    assert metrics["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-6)
    for found, true in zip(keep.grads, wanted, strict=True):
        assert far(found, true / max(1.0, (norm + 1e-6).item())) <= 1e-6


@pytest.mark.parametrize("micro", [1, 75, 200, 10**6])
def test_micro_batches_of_answers_and_of_pairs_hold_at_most_micro_tokens(
    kind, micro, hooks_of, seed
):
    units = kind[0](seed, 40)
    longest = [unit.max_length for unit in units]
    hooks = hooks_of(max_tokens_per_batch=micro)
    for step in plan_batches(units, OptimizerConfig(1e-2, 9, 16), hooks, "cpu").steps:
        sizes = [
            max(longest[u] for u in group) * sum(len(units[u].rows) for u in group)
            for group in step
        ]
        assert all(
            size <= micro or len(group) == 1 for size, group in zip(sizes, step, strict=True)
        )
        more = [
            longest[after[0]] * len(units[0].rows) * (len(group) + 1)
            for group, after in itertools.pairwise(step)
        ]
        assert all(size > micro for size in more), "no micro-batch could be larger"


@pytest.mark.parametrize("micro", [20, 90])
def test_training_does_not_depend_on_micro_tokens(kind, micro, hooks_of, seed):
    make, objective = kind
    units, ends = make(seed, 20), []
    for name, budget in (("small", micro), ("large", 10**6)):
        model, params = slotted(seed)
        model.double()
        params = list(lora_params(model).values())
        train(
            model,
            params,
            units,
            objective,
            OptimizerConfig(1e-2, 7, 8),
            hooks_of(name, max_tokens_per_batch=budget),
        )
        ends.append([p.detach().clone() for p in params])
    for a, b in zip(*ends, strict=True):
        assert far(a, b) <= 1e-8 and a.any()


# ---- against other loops --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("floor", "betas", "decay"), [(0.0, (0.9, 0.999), 0.0), (0.1, (0.9, 0.95), 0.1)]
)
def test_training_equals_a_plain_loop(floor, betas, decay, hooks_of, seed):
    """Full logits, torch's own cross-entropy, clipping, AdamW and cosine: the same parameters."""
    units = answers(seed, 6)
    ours, theirs = random_model(seed), random_model(seed)
    work = hooks_of(log_every=1)
    counts = train(
        ours,
        list(ours.parameters()),
        units,
        SFTLoss(),
        OptimizerConfig(0.02, 9, 6, floor, betas, decay),
        work,
    )
    optimizer = torch.optim.AdamW(
        theirs.parameters(), lr=0.02, betas=betas, weight_decay=decay, foreach=False
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9, 0.02 * floor)
    rows = metrics_of(work)
    assert len(rows) == counts["steps"] == 9 and counts["rows"] == 6
    tokens = sum(len(unit.rows[0].ids) for unit in units)
    for step, logged in enumerate(rows):
        parts, trained = 0, sum(sum(unit.rows[0].mask) for unit in units)
        for unit in units:
            ids, mask = torch.tensor(unit.rows[0].ids), torch.tensor(unit.rows[0].mask)
            logits = logits_of(theirs, ids[None])[0, :-1]
            parts = parts + F.cross_entropy(
                logits, ids[1:].masked_fill(~mask[1:], -100), reduction="sum"
            )
        (parts / trained).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert logged["loss"] == pytest.approx((parts / trained).item(), rel=1e-3)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=2e-2)
        assert logged["lr"] == pytest.approx(cosine.get_last_lr()[0], rel=1e-9)
        assert (logged["step"], logged["epoch"], logged["tokens"]) == (
            step + 1,
            step + 1,
            tokens * (step + 1),
        )
        optimizer.step()
        optimizer.zero_grad()
        cosine.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert ((a - b).norm() / b.norm()).item() < 5e-3, name
        assert ((a - random_model(seed).get_parameter(name)).norm() / b.norm()).item() > 1e-2, name


def preference_words(seed: int, count: int, equal: bool) -> list[dict[str, list[int]]]:
    """Prompt, chosen and rejected ids of TRL's kind; `equal`: chosen answers of one length."""
    low, high = (6, 7) if equal else (1, 12)
    parts = (
        ragged(seed, count, 61, 1, 9),
        ragged(seed + 1, count, 61, low, high),
        ragged(seed + 2, count, 61, 1, 12),
    )
    return [dict(prompt=p, chosen=c, rejected=r) for p, c, r in zip(*parts, strict=True)]


def trl_history(folder, adapter, out, rows, steps: int, lr: float, **settings) -> list[dict]:
    """What TRL's DPOTrainer logs at every step, all `rows` in each; the reference is the base."""
    import datasets
    import peft
    import tokenizers
    import transformers
    import trl

    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 61)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>"
    )
    texts = [{side: "".join(f" w{i}" for i in ids) for side, ids in line.items()} for line in rows]
    base, reference = (transformers.AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    arguments = trl.DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=len(rows),
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_length=None,
        **settings,
    )
    trainer = trl.DPOTrainer(
        peft.PeftModel.from_pretrained(base, adapter, is_trainable=True),
        reference,
        arguments,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["attention_mask"].sum(1).tolist()) == sorted(
        len(line["prompt"]) + len(line[side]) + 1
        for line in rows
        for side in ("chosen", "rejected")
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "rewards/chosen" in line]


@pytest.fixture
def dpo(tmp_path, hooks_of, seed):
    """Runs TRL and this project on the same pairs, base and adapter; returns both histories."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    model, _ = slotted(seed)
    with torch.no_grad():
        for param in lora_params(model).values():
            param.add_(0.1 * torch.randn(param.shape))
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_model(base, model.config, random_model(seed).state_dict(), b"")
    save_adapter(adapter, get_adapter_weights(model), ALL, str(base))

    def run(rows, objective, steps: int, lr: float, **settings):
        theirs = trl_history(base, adapter, tmp_path / "trl", rows, steps, lr, **settings)
        units = [
            TrainExample(
                str(i),
                tuple(row(line["prompt"], [*line[side], 2]) for side in ("chosen", "rejected")),
            )
            for i, line in enumerate(rows)
        ]
        ours = load_model(base)
        scored = [[by_logits(ours, r) for r in unit.rows] for unit in units]
        units = [
            TrainExample(unit.id, unit.rows, tuple(refs))
            for unit, refs in zip(units, scored, strict=True)
        ]
        params = attach_lora(ours, ALL)
        set_adapter_weights(ours, get_adapter_weights(model))
        work = hooks_of(f"run{len(list(tmp_path.glob('run*')))}", log_every=1)
        train(ours, params, units, objective, OptimizerConfig(lr, steps, len(rows)), work)
        mine = metrics_of(work)
        assert len(mine) == len(theirs) == steps
        return mine, theirs

    return run


def by_logits(model, tokens: Tokens) -> float:
    """Summed log-probability of the trained tokens, from full logits."""
    logps = logits_of(model, torch.tensor([tokens.ids]))[0].log_softmax(-1)
    return sum(
        logps[i - 1, tokens.ids[i]].item() for i in range(1, len(tokens.ids)) if tokens.mask[i]
    )


SAME = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_training_equals_trl_step_by_step(beta, dpo, seed):
    """Same definitions: loss, β, summed logps, rewards, clipping, AdamW, cosine, over six steps."""
    mine, theirs = dpo(
        preference_words(seed, 7, False), PreferenceLoss(beta, 0.0), 6, 2e-3, beta=beta
    )
    start = [abs(mine[0][f"rewards/{side}"]) for side in ("chosen", "rejected", "margins")]
    assert max(start) > 1e-3, "policy and reference should differ at the start"
    for a, b in zip(mine, theirs, strict=True):
        for name in SAME:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), (a["step"], name)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
        assert a["lr"] == pytest.approx(b["learning_rate"], rel=1e-6, abs=1e-12)
    assert mine[-1]["loss"] < mine[0]["loss"], "it should have learned something"


def test_dpo_plus_sft_equals_trl(dpo, seed):
    """TRL has its SFT term per token of the batch, the paper per answer: equal at one length."""
    settings = dict(beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    mine, theirs = dpo(
        preference_words(seed, 5, True), PreferenceLoss(0.1, 0.7), 4, 2e-3, **settings
    )
    for a, b in zip(mine, theirs, strict=True):
        for name in SAME:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), (a["step"], name)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_training_equals_trl_step_by_step(beta, dpo, seed):
    """Losses and gradients from logps per token, rewards from summed ones, as in TRL."""
    loss = PreferenceLoss(beta, 0.0, loss_type="ipo")
    settings = dict(beta=beta, loss_type="ipo")
    mine, theirs = dpo(preference_words(seed, 7, False), loss, 6, 2e-3, **settings)
    for a, b in zip(mine, theirs, strict=True):
        for name in SAME:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), (a["step"], name)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    assert mine[0]["loss"] == mine[0]["ipo_loss"] != mine[-1]["loss"]


def test_label_smoothing_by_two_losses_of_trl(dpo, seed):
    """TRL has ours only as parts: "robust" R = ((1 - s) L(D) - s L(-D)) / (1 - 2 s)."""
    rows = preference_words(seed, 6, False)
    _, plain = dpo(rows, PreferenceLoss(0.4, 0.0), 1, 1e-3, beta=0.4)
    mine, robust = dpo(
        rows,
        PreferenceLoss(0.4, 0.0, 0.2),
        1,
        1e-3,
        beta=0.4,
        loss_type="robust",
        label_smoothing=0.2,
    )
    wanted = 2 * 0.8 * plain[0]["loss"] - 0.6 * robust[0]["loss"]
    assert mine[0]["dpo_loss"] == pytest.approx(wanted, abs=2e-4)
    assert abs(mine[0]["dpo_loss"] - plain[0]["loss"]) > 1e-6


# ---- what must stop a run -------------------------------------------------------------------


def stopped(call, *words) -> None:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.startswith("training of run")
    for word in words:
        assert word in text, (word, text)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_rows(kind, value, steps, hooks_of, seed):
    make, objective = kind
    model, params = slotted(seed)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = value
    clean = [unit for unit in make(seed, 40) if not any(60 in r.ids for r in unit.rows)][:8]
    poison = TrainExample(
        "the poisoned one",
        tuple(row([5], [60, 7]) for _ in clean[0].rows),
        clean[0].reference_logps,
    )
    work = hooks_of(save_every=1)
    stopped(
        lambda: train(
            model, params, [*clean, poison], objective, OptimizerConfig(1e-3, steps, 9), work
        ),
        "step 1",
        "not finite",
        "the poisoned one" if steps else "",
    )
    assert not work.state_file.exists(), "a poisoned state must not be resumed"


def test_a_run_that_diverges_later_says_at_which_step(hooks_of, seed):
    model, params = slotted(seed)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    clean = [unit for unit in answers(seed, 80) if 60 not in unit.rows[0].ids][:10]
    units = [*clean, TrainExample("bad", (row([5], [60, 7]),))]
    plan = plan_steps([len(unit.rows[0].ids) for unit in units], 1, 11, 5)
    step = next(i for i, groups in enumerate(plan) if groups == [[10]]) + 1
    stopped(
        lambda: train(
            model, params, units, SFTLoss(), OptimizerConfig(1e-3, 11, 1), hooks_of(log_every=4)
        ),
        f"step {step}:",
        "bad",
    )


def test_a_first_gradient_of_zero_stops(kind, hooks_of, seed):
    make, objective = kind
    model, params = slotted(seed)
    with torch.no_grad():
        for param in params:
            param.zero_()  # A and B zero: neither can ever move
    stopped(
        lambda: train(
            model, params, make(seed, 8), objective, OptimizerConfig(1e-3, 6, 4), hooks_of()
        ),
        "zero",
        "step 1",
        "lora.alpha",
    )


def test_no_row_at_all_stops(hooks_of, seed):
    model, params = slotted(seed)
    stopped(
        lambda: train(model, params, [], SFTLoss(), OptimizerConfig(1e-3, 6, 4), hooks_of()),
        "no row",
    )


def test_no_step_leaves_the_parameters(hooks_of, seed):
    model, params = slotted(seed)
    before = get_adapter_weights(model)
    counts = train(
        model, params, answers(seed, 3), SFTLoss(), OptimizerConfig(1e-3, 0, 4), hooks_of()
    )
    assert counts["steps"] == 0 and all(
        torch.equal(before[k], v) for k, v in get_adapter_weights(model).items()
    )


# ---- stop and resume ------------------------------------------------------------------------


class Killed(Exception):
    pass


class Stopped(Exception):
    pass


class Interruptions:
    """Ends a training after given numbers of steps: killed without warning, or asked to stop."""

    def __init__(self, stops: list[tuple[int, str]]):
        self.stops = list(stops)
        self.begin()

    def begin(self) -> None:
        """The training begins, or goes on."""
        self.steps = 0
        self.stopping = False

    def step(self) -> None:
        """What a progress bar gets after every step."""
        self.steps += 1
        if self.stops and self.steps == self.stops[0][0]:
            _, kind = self.stops.pop(0)
            if kind == "kill":
                raise Killed
            self.stopping = True

    def raise_if_stopped(self) -> None:
        if self.stopping:
            raise Stopped


def finish(
    hooks: TrainerHooks, seed: int, kind, stops: list[tuple[int, str]] = (), whole: bool = False
) -> tuple[dict, dict, bytes]:
    """Trains to the end with interruptions after the given steps, each time with a fresh model.

    Returns the trained tensors, the counts, and the metrics' file.
    """
    make, loss = kind
    units = make(seed, 20)
    interruptions = Interruptions(stops)
    hooks = replace(
        hooks,
        progress=lambda total, unit, done: contextlib.nullcontext(interruptions),
        should_stop=lambda: interruptions.stopping,
        raise_if_stopped=interruptions.raise_if_stopped,
    )
    while True:
        if whole:
            model = random_model(seed, tie_word_embeddings=True)
            params = list(model.parameters())
        else:
            model, params = slotted(seed)
        interruptions.begin()
        try:
            counts = train(model, params, units, loss, OptimizerConfig(1e-2, 17, 6), hooks)
            break
        except (Stopped, Killed):
            continue
    assert not interruptions.stops, "every interruption must have happened"
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    return tensors, counts, hooks.metrics_file.read_bytes()


INTERRUPTIONS = [
    [(1, "stop")],
    [(4, "stop")],
    [(7, "stop")],
    [(2, "stop"), (1, "stop"), (5, "stop")],
    [(15, "stop")],
    [(2, "kill")],
    [(5, "kill")],
    [(10, "kill"), (1, "kill"), (4, "stop")],
]


@pytest.mark.parametrize("whole", [False, True])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(whole, kind, hooks_of, seed):
    flags = dict(log_every=5, save_every=4)
    plain = finish(hooks_of("plain", **flags), seed, kind, whole=whole)
    for number, stops in enumerate(INTERRUPTIONS):
        broken = finish(hooks_of(f"broken{number}", **flags), seed, kind, stops, whole)
        assert all(torch.equal(plain[0][name], broken[0][name]) for name in plain[0]), stops
        assert plain[1] == broken[1], stops
        assert plain[2] == broken[2], f"{stops}: metrics.jsonl is one of the stage's files"
    other, *_ = finish(hooks_of("other", seed=6, **flags), seed, kind, whole=whole)
    assert not all(torch.equal(plain[0][name], other[name]) for name in other), (
        "nothing was compared"
    )


@pytest.mark.parametrize("moment", ["write_rows", "save_tensors", "describe", "replace_fsync"])
@pytest.mark.parametrize("save_every", [17, 5])
def test_a_kill_before_the_stage_is_sealed_loses_no_saved_step(
    save_every, moment, tmp_path, monkeypatch, seed
):
    """The state lasts until the stage is whole; one of the last step gives the same files."""
    taken = []

    def compute(context: StageContext) -> dict:
        model, params = slotted(seed)
        context.run.on_step = lambda: taken.append(1)
        counts = train(
            model,
            params,
            pairs(seed, 20),
            PreferenceLoss(0.2, 0.3),
            OptimizerConfig(1e-2, 17, 6),
            trainer_hooks(context),
        )
        save_tensors(context.folder / "slot.safetensors", get_adapter_weights(model))
        return counts

    def run_of(name: str) -> Run:
        words = [f"--run.root={tmp_path}", f"--run.name={name}", "--run.device=cpu"]
        run = Run(parse(["@tiny", *words, f"--run.save_every={save_every}"]).config)
        run.begin()
        return run

    def stage(run: Run):
        run.provided.clear()
        return run.stage("part/stage", "sft/1", {"run": run.path.name}, [], compute, ("key",))

    def killed(*args):
        raise Killed

    run = run_of("run")
    modules = {"write_rows": trainer_module, "save_tensors": sys.modules[__name__]}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(modules.get(moment, stage_maker), moment, killed)
        stage(run)
    assert len(taken) == 17
    taken.clear()
    done = stage(run)
    assert len(taken) == 17 % save_every, "saved steps were trained again"
    assert not list(run.path.rglob("state*")), "a sealed stage needs no state"

    whole = stage(run_of("whole"))
    assert done.notes()["counts"] == whole.notes()["counts"]
    assert sorted(done.notes()["files"]) == ["metrics.jsonl", "slot.safetensors"]
    for name in done.notes()["files"]:
        assert (done.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_the_metrics_do_not_depend_on_when_states_are_saved(kind, hooks_of, seed):
    found = {
        finish(hooks_of(f"every{n}", log_every=5, save_every=n), seed, kind)[2]
        for n in (1, 3, 4, 5, 100)
    }
    assert len(found) == 1 and [json.loads(line)["step"] for line in found.pop().splitlines()] == [
        5,
        10,
        15,
        17,
    ]


def test_training_leaves_the_base_bit_identical(kind, hooks_of, seed):
    trained, *_ = finish(hooks_of(), seed, kind)
    base = dict(random_model(seed).named_parameters())
    found = {name.replace(".base.", "."): t for name, t in trained.items() if ".lora_" not in name}
    assert found.keys() == base.keys() and all(
        torch.equal(found[name], base[name]) for name in base
    )


def test_the_metrics_are_means_over_their_steps(hooks_of, seed):
    """log_every changes which lines there are, never what is trained."""
    fine, coarse = (
        finish(hooks_of(f"every{n}", log_every=n), seed, KINDS["pairs"]) for n in (1, 6)
    )
    assert all(torch.equal(fine[0][name], coarse[0][name]) for name in fine[0])
    each, means = ([json.loads(line) for line in run[2].splitlines()] for run in (fine, coarse))
    assert [line["step"] for line in each] == list(range(1, 18))
    last = 0
    for line in means:
        part = each[last : line["step"]]
        last = line["step"]
        for name in KINDS["pairs"][1].metric_names:
            assert line[name] == pytest.approx(
                sum(one[name] for one in part) / len(part), rel=1e-5, abs=1e-6
            )
        assert (
            line["tokens"] == part[-1]["tokens"]
            and line["lr"] == part[-1]["lr"]
            and line["epoch"] == part[-1]["epoch"]
        )
    assert last == 17


def pairs_near_policy(seed: int, count: int) -> list[TrainExample]:
    """Pairs whose reference is the policy that the training starts from, as in a run.

    Far from it a loss may rise: IPO's is squared around its target.
    """
    model, _ = slotted(seed)
    examples = []
    for pair in pairs(seed, count):
        logps = score(model, pair.rows, 10**6, log=lambda line: None)
        examples.append(replace(pair, reference_logps=tuple(logps)))
    return examples


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_every_preference_loss_learns_and_resumes(name, hooks_of, seed):
    loss = PreferenceLoss(beta=0.5, sft_weight=0.0, loss_type=name)
    examples = pairs_near_policy(seed, 20)
    if not loss.requires_reference:
        examples = [replace(pair, reference_logps=None) for pair in examples]
    kind = (lambda seed, count: examples, loss)

    plain = finish(hooks_of("plain", log_every=1), seed, kind)
    broken = finish(hooks_of("broken", log_every=1), seed, kind, [(5, "stop"), (4, "kill")])

    assert all(torch.equal(plain[0][name], broken[0][name]) for name in plain[0])
    rows = [json.loads(line) for line in plain[2].splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows)
    losses = [row[loss.preference_name] for row in rows]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_state_of_another_training_is_refused(hooks_of, seed):
    """Also where all its shapes fit."""
    model, params = slotted(seed)
    words = (pairs(seed, 4), PreferenceLoss(0.2, 0.3), OptimizerConfig(1e-2, 3, 4))
    hooks = hooks_of(save_every=1)
    train(model, params, *words, hooks)
    with pytest.raises(UserError, match="is another stage's training state; delete it"):
        train(model, params, *words, replace(hooks, name="another"))


def test_the_cosine_falls_from_lr_to_its_floor():
    rates = [OptimizerConfig(2.0, 10, 1, min_lr_ratio=0.1).lr_at(step) for step in range(11)]
    assert rates[0] == 2.0 and rates[5] == pytest.approx(1.1) and rates[10] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)
