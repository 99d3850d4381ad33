"""Prompts in common and padding left out: the same values and gradients as rows by themselves; memory that is short."""

import contextlib
import functools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ragged, random_model
from test_trainer import pairs as pair_units
from test_trainer import slotted, work_of  # noqa: F401  (a fixture)

from minmacpo import UserError
from minmacpo.config.schema import Lora
from minmacpo.core import scoring as score
from minmacpo.core import trainer as fit
from minmacpo.core.batching import collate, halved, plan_shared, token_counts, worth_sharing
from minmacpo.core.lora import attach_lora, init_adapter, slot
from minmacpo.core.losses import PreferenceLoss, SFTLoss
from minmacpo.core.trainer import OptimizerConfig, make_plan, train_step
from minmacpo.data.tokenizer import Tokens
from minmacpo.kernels import fused_logps as losses
from minmacpo.kernels.attention import eager_bf16_attention, sdpa
from minmacpo.kernels.fused_logps import masked_logps, sequence_logps
from minmacpo.pipeline import train_stage as stages
from minmacpo.pipeline.run import StageContext
from minmacpo.runtime import progress
from minmacpo.runtime.distributed import SINGLE_PROCESS

MODELS = {
    "plain": {"num_key_value_heads": 4},
    "grouped": {},
    "window": {"sliding_windows": (5, None)},
    "biases and norms": {"qkv_bias": True, "qk_norm": True},
}


def rows_of(seed: int, groups: int, vocab: int = 61) -> list[Tokens]:
    """Prompts of 1 to 20 tokens with one to four answers each, of 1 to 14."""
    rng, rows = random.Random(seed), []
    for i, prompt in enumerate(ragged(seed, groups, vocab, 1, 21)):
        prompt = prompt[: 1 if i == 0 else None]
        for _ in range(rng.randrange(1, 5)):
            answer = [rng.randrange(3, vocab) for _ in range(rng.randrange(1, 15))]
            rows.append(Tokens(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return rows


def measured(model, params, batch, upstream):
    """Summed logps of each row, and the gradients under `upstream`."""
    logps = sequence_logps(model, batch.tokens, batch.mask, shared=batch.shared)
    return [logps.detach(), *torch.autograd.grad(logps, params, upstream)]


def worst(found, wanted) -> float:
    """The largest difference of two lists of tensors, each against the largest value of its tensor."""
    return max(
        ((a - b).abs().max() / (b.abs().max() + 1e-12)).item()
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_shared_rows_equal_separate_ones_in_values_and_gradients(kind, whole, seed):
    """Exactly in fp64; in fp32 to 1e-5 beyond the rounding that separate rows have themselves (with q/k norms up to 2e-5)."""
    model = random_model(seed, **MODELS[kind])
    if not whole:
        attach_lora(model, Lora(targets=("q_proj", "k_proj", "v_proj", "down_proj")))
        init_adapter(model, seed)
        for param in slot(model).values():
            param.data.normal_(std=0.1)
    rows = rows_of(seed, 7)
    upstream = torch.randn(len(rows), dtype=torch.float64)

    def both_ways(dtype):
        params = [param for param in model.to(dtype).parameters() if param.requires_grad]
        shared, separate = (
            measured(model, params, collate(rows, share=share), upstream.to(dtype))
            for share in (True, False)
        )
        alone = [
            measured(model, params, collate([row]), upstream[i : i + 1].to(dtype))
            for i, row in enumerate(rows)
        ]
        summed = [
            torch.cat([each[0] for each in alone]),
            *(torch.stack(grads).sum(0) for grads in list(zip(*alone, strict=True))[1:]),
        ]
        return shared, separate, summed

    found, separate, alone = both_ways(torch.float32)
    found_exactly, separate_exactly, alone_exactly = both_ways(torch.float64)
    assert max(worst(found_exactly, separate_exactly), worst(found_exactly, alone_exactly)) <= 1e-12
    assert worst(found, alone_exactly) <= 1e-5 + max(
        worst(separate, alone_exactly), worst(alone, alone_exactly)
    )


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_bf16_is_as_far_from_fp32_shared_as_separate(kind, seed):
    """Stated tolerance: 2 % of the largest value, gradients 6 %, for weights of this size."""
    model, rows = random_model(seed, std=0.1, **MODELS[kind]), rows_of(seed, 7)
    params = attach_lora(model, Lora())
    for param in params:
        param.data.normal_(std=0.1)
    upstream = torch.ones(len(rows))
    exact = measured(model, params, collate(rows), upstream)
    for param in model.parameters():
        param.data = param.data if param.requires_grad else param.data.bfloat16()
    for share in (False, True):
        found = measured(model, params, collate(rows, share=share), upstream)
        assert worst(found[:1], exact[:1]) <= 0.02 and worst(found[1:], exact[1:]) <= 0.06


def test_only_distinct_tokens_are_computed(seed):
    rows = rows_of(seed, 9)
    shared = collate(rows, share=True).shared
    prompts = {tuple(row.ids[: row.mask.index(True)]) for row in rows}
    assert len(shared.token_index) == sum(sum(row.mask) for row in rows) + sum(map(len, prompts))
    width = max(len(row.ids) for row in rows)
    assert token_counts([rows]) == (
        width * len(rows),
        sum(len(row.ids) for row in rows),
        len(shared.token_index),
    )
    model, seen = random_model(seed), []
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape)
    )
    masked_logps(
        model, *(batch := collate(rows, share=True)).tokens[None], batch.mask, shared=batch.shared
    )
    assert seen == [(1, len(shared.token_index), 24)]


def test_rows_without_a_prompt_or_an_answer_share_nothing(seed):
    rows = [
        Tokens([5, 6, 7], [True] * 3),
        Tokens([5, 6], [True] * 2),
        Tokens([5, 6, 7], [False] * 3),
        Tokens([9], [True]),
    ]
    model = random_model(seed)
    found, wanted = (
        sequence_logps(model, b.tokens, b.mask, shared=b.shared)
        for b in (collate(rows, share=s) for s in (True, False))
    )
    assert worst([found], [wanted]) <= 1e-5 and found[2] == found[3] == 0


@pytest.mark.parametrize("objective", [PreferenceLoss(0.2, 0.3), SFTLoss(confidence=0.5)])
def test_a_step_with_shared_rows_is_the_step_without(objective, seed):
    units = pair_units(seed, 6)
    found = []
    for share in (False, True):
        model, params = slotted(seed)
        values = train_step(
            model,
            params,
            units,
            [[0, 3, 1], [2], [4, 5]],
            objective,
            torch.optim.SGD(params, 1e-2),
            1.0,
            share,
        )
        found.append([values, *(param.detach() for param in params)])
    assert worst(found[1], found[0]) <= 1e-4


def test_scoring_shares_where_it_saves_and_says_so(seed):
    model, rows, said = random_model(seed), rows_of(seed, 40), []
    random.Random(seed).shuffle(rows)
    wanted = score.score(model, rows, 300)
    assert score.score(model, rows, 300, log=said.append, share=True) == pytest.approx(
        wanted, rel=1e-5, abs=1e-5
    )
    assert len(said) == 1 and "each common prompt once outside attention" in said[0]
    groups = plan_shared(rows, 300)
    assert sorted(i for group in groups for i in group) == [*range(len(rows))]
    assert all(len(g) * max(len(rows[i].ids) for i in g) <= 300 or len(g) == 1 for g in groups)


def test_the_answers_of_a_prompt_are_divided_where_a_pass_has_no_room_for_them(seed):
    rng = random.Random(seed)
    rows = [
        Tokens([5, 6, *(rng.randrange(3, 60) for _ in range(n))], [False] * 2 + [True] * n)
        for n in rng.choices(range(2, 9), k=70)
    ]
    groups = plan_shared(rows, 100)
    assert sorted(i for group in groups for i in group) == [*range(70)] and 7 <= len(groups) <= 14
    assert all(len(g) * max(len(rows[i].ids) for i in g) <= 100 for g in groups)
    model = random_model(seed)
    assert score.score(model, rows, 100, log=print, share=True) == pytest.approx(
        score.score(model, rows, 10**6), rel=1e-5, abs=1e-5
    )


def test_equal_rows_without_prompts_in_common_are_left_as_they_are(seed):
    rows, said = [Tokens([4, 5, i], [False, False, True]) for i in range(3, 9)], []
    unlike = [Tokens([i, i + 1, 5], [False, False, True]) for i in range(3, 9)]
    assert worth_sharing([rows])[0] and not worth_sharing([unlike])[0]
    score.score(random_model(seed), unlike, 100, log=said.append, share=True)
    assert said == ["padding is 0.0% of 18 tokens in a pass over the rows"]


def test_the_bf16_attention_of_a_cpu_is_the_kernel_within_rounding(seed):
    q, k, v = (torch.randn(3, heads, 40, 16).bfloat16() for heads in (6, 2, 2))
    for mask in (None, torch.ones(40, 40, dtype=torch.bool).tril().triu(-7)):
        exact = sdpa(q.float(), k.float(), v.float(), mask)
        assert (eager_bf16_attention(q, k, v, mask).float() - exact).abs().max() <= 0.03
        assert (sdpa(q, k, v, mask).float() - exact).abs().max() <= 0.03


@pytest.mark.parametrize("size", [1, 3, 8])
def test_attention_in_bf16_is_no_coarser_than_that_of_transformers(size, seed):
    from transformers.models.llama.modeling_llama import eager_attention_forward

    torch.manual_seed(seed)
    q, k, v = ((torch.randn(4, 4, 64, 32) * scale).bfloat16() for scale in (size, size**0.5, 1))
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    exact = sdpa(q.double(), k.double(), v.double(), mask)
    hidden = torch.zeros(64, 64).masked_fill(~mask, -torch.inf).bfloat16()
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    theirs = eager_attention_forward(module, q, k, v, hidden[None, None], 32**-0.5)[0].transpose(
        1, 2
    )
    mine, other = (
        (found - exact).square().mean().sqrt()
        for found in (eager_bf16_attention(q, k, v, mask), theirs)
    )
    assert mine <= other


# ---- memory -------------------------------------------------------------------------------------


def short_memory(limit: int):
    """A forward pass that has no room for more than `limit` tokens."""

    def inject(model):
        inner = model.forward

        def forward(tokens, **more):
            if tokens.numel() > limit:
                raise (
                    torch.OutOfMemoryError("CUDA out of memory")
                    if tokens.numel() % 2
                    else RuntimeError("DefaultCPUAllocator: can't allocate memory")
                )
            return inner(tokens, **more)

        model.forward = forward

    return inject


def test_a_step_that_does_not_fit_is_done_in_halves_with_the_same_result(
    work_of, monkeypatch, seed
):
    units, schedule, found = pair_units(seed, 12), OptimizerConfig(1e-2, 4, 12), []
    for limit in (10**9, 200):
        model, params = slotted(seed)
        short_memory(limit)(model)
        work, said = work_of(f"run{limit}"), []
        monkeypatch.setattr(StageContext, "log", lambda self, line, said=said: said.append(line))
        fit.fit(model, params, units, PreferenceLoss(0.2, 0.3), schedule, work)
        found.append(([p.detach().clone() for p in params], said))
    (whole, quiet), (halves, told) = found
    assert worst(halves, whole) <= 1e-3 and not quiet
    assert told and all("out of memory" in line for line in told) and len(told) <= 4, (
        "later steps start with what fitted"
    )


def test_a_training_that_was_cut_goes_on_cut_to_the_same_bits(work_of, monkeypatch, seed):  # noqa: F811
    units, schedule, found, said = pair_units(seed, 12), OptimizerConfig(1e-2, 6, 12), [], []
    monkeypatch.setattr(StageContext, "log", lambda self, line: said.append(line))

    def trained(work):
        model, params = slotted(seed)
        short_memory(200)(model)
        fit.fit(model, params, units, PreferenceLoss(0.2, 0.3), schedule, work)
        found.append([p.detach().clone() for p in params])

    trained(work_of("whole"))
    stopped, real = work_of("stopped", save_every=2), fit.train_step
    monkeypatch.setattr(
        fit, "train_step", lambda *words: pytest.fail("a kill") if words[6] > 0.5 else real(*words)
    )
    with contextlib.suppress(pytest.fail.Exception):
        trained(stopped)
    monkeypatch.setattr(fit, "train_step", real)
    assert any("out of memory" in line for line in said)
    said.clear()
    trained(stopped)
    assert (
        all(map(torch.equal, *found)) and [line for line in said if "out of memory" in line] == []
    )


def test_only_passes_are_done_again(seed):
    """What comes after them is done by all ranks together, once a step."""
    model, params = slotted(seed)
    optimizer = torch.optim.SGD(params, 1e-2)
    optimizer.step = lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        train_step(
            model,
            params,
            pair_units(seed, 4),
            [[0, 1, 2, 3]],
            PreferenceLoss(0.2, 0.3),
            optimizer,
            again=pytest.fail,
        )


def test_a_look_before_training_takes_half_the_pairs_where_memory_is_short(
    work_of, monkeypatch, seed
):
    (model, _), work, objective, margins = slotted(seed), work_of(), PreferenceLoss(0.2, 0.3), []
    session = SimpleNamespace(use=lambda base, stage: SimpleNamespace(model=model))
    monkeypatch.setattr(StageContext, "log", lambda self, line: None)
    units = [
        replace(unit, refs=tuple(score.score(model, unit.rows, 10**6, log=lambda line: None)))
        for unit in pair_units(seed, 12)
    ]
    for limit in (10**9, 200, 3):
        short_memory(limit)(model)
        words = (session, work, None, None, None, units, objective, False)
        if limit == 3:
            with pytest.raises(UserError, match="out of memory before the first step"):
                stages.check_start(*words)
        else:
            margins += [row["rewards/margins"] for row in stages.check_start(*words)]
    assert margins == pytest.approx([0, 0], abs=1e-4)


def test_what_never_fits_is_one_sentence(work_of, seed):  # noqa: F811
    model, params = slotted(seed)
    short_memory(3)(model)
    with pytest.raises(UserError, match=r"one row or pair at a time; lower data\.max_length"):
        fit.fit(
            model,
            params,
            pair_units(seed, 4),
            PreferenceLoss(0.2, 0.3),
            OptimizerConfig(1e-2, 2, 4),
            work_of(),
        )
    with pytest.raises(UserError, match="too long to be scored here"):
        score.score(model, rows_of(seed, 3), 100, log=lambda line: None)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_is_short_anywhere_else_is_one_sentence(error, capsys):
    def fails(argv):
        raise error

    assert progress.call(fails) == 2
    assert capsys.readouterr().err == f"error: out of memory; {progress.RESUMES}\n"


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: an illegal memory access was encountered",
        "unsupported: refers to a single memory location",
    ],
)
def test_an_error_that_speaks_of_memory_is_not_hidden(said):
    def fails(argv):
        raise RuntimeError(said)

    with pytest.raises(RuntimeError, match=said):
        progress.call(fails)


def test_a_state_of_another_stage_is_refused(work_of, seed):  # noqa: F811
    """Also where all its shapes fit."""
    (model, params), work, other = (
        slotted(seed),
        work_of("one", save_every=1),
        work_of("other", save_every=1),
    )
    words = (pair_units(seed, 4), PreferenceLoss(0.2, 0.3), OptimizerConfig(1e-2, 3, 4))
    for each in (work, other):
        fit.fit(model, params, *words, each)
    work.folder, there = (
        work.folder.with_name("another"),
        work.folder.with_name(f"state-{work.folder.name}"),
    )
    there.rename(there.with_name("state-another"))
    with pytest.raises(UserError, match="is another stage's training state; delete it"):
        fit.fit(model, params, *words, work)


def test_scoring_goes_on_with_half_the_budget(seed):
    model, rows, said = random_model(seed), rows_of(seed, 30), []
    wanted = score.score(model, rows, 10**6)
    short_memory(150)(model)
    assert score.score(model, rows, 600, log=said.append) == pytest.approx(
        wanted, rel=1e-5, abs=1e-5
    )
    assert 1 <= len(said) <= 4 and said[0].startswith(
        "out of memory: from here at most 300 tokens per forward pass"
    )
    assert halved([[1, 2, 3], [4]]) == [[1], [2, 3], [4]]


def test_training_says_what_sharing_saves(work_of, monkeypatch, seed):  # noqa: F811
    work, said = work_of(), []
    monkeypatch.setattr(StageContext, "log", lambda self, line: said.append(line))
    assert make_plan(pair_units(seed, 12), OptimizerConfig(1e-2, 3, 4), work).share
    assert said[0].startswith("padding is ") and "saved)" in said[0]
    assert not make_plan([], OptimizerConfig(1e-2, 3, 4), work).share


# ---- compiled -----------------------------------------------------------------------------------


def test_ten_adapters_and_batches_of_any_size_compile_the_loss_once(monkeypatch, seed):
    """Dynamo's part of torch.compile, which decides on recompiling; the slot's tensors never change, only their values."""
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    monkeypatch.setattr(
        losses, "compile_once", functools.cache(functools.partial(torch.compile, backend="eager"))
    )
    model, params = slotted(seed)
    optimizer, graphs, before = (
        torch.optim.SGD(params, 1e-3),
        [],
        dynamo.counters["stats"]["unique_graphs"],
    )
    for number in range(11):
        init_adapter(model, number)
        units = pair_units(seed + number, 4 + number)
        train_step(
            model,
            params,
            units,
            [[*range(len(units))]],
            PreferenceLoss(0.2, 0.3, compiled=True),
            optimizer,
            1.0,
            number % 2 == 0,
        )
        graphs.append(dynamo.counters["stats"]["unique_graphs"] - before)
    for width in (24, 32, 40, 48):  # other bases: a head of another size is not another loss
        hidden, head = (
            torch.randn(60, width, requires_grad=True),
            torch.nn.Parameter(torch.randn(width + 5, width), requires_grad=False),
        )
        losses.token_logps(hidden, head, torch.arange(60) % width, True).sum().backward()
        graphs.append(dynamo.counters["stats"]["unique_graphs"] - before)
    assert graphs[0] == graphs[10] == 1 and graphs[-1] <= 2, f"recompiled: {graphs}"


@pytest.mark.parametrize(
    ("wanted", "device", "steps", "compiled"),
    [
        ("auto", "cpu", 10**9, False),
        ("auto", "cuda", 10, False),
        ("auto", "cuda", 10**9, True),
        ("true", "cpu", 1, True),
        ("false", "cuda", 10**9, False),
    ],
)
def test_auto_compiles_only_where_a_stage_is_long_enough(wanted, device, steps, compiled, seed):
    """On a CPU never: the default run does not wait for a compiler."""
    run = SimpleNamespace(compile=wanted)
    session = SimpleNamespace(
        config=SimpleNamespace(run=run),
        compiled=wanted == "true" or (wanted == "auto" and device == "cuda"),
    )
    loaded = SimpleNamespace(model=random_model(seed))
    assert (
        stages.compiles(session, loaded, pair_units(seed, 5), OptimizerConfig(1e-3, steps, 16))
        is compiled
    )


def test_candidates_of_several_files_are_scored_together_once_and_sides_are_told_apart(
    monkeypatch, tmp_path, seed
):
    """One pass for the group, its second stage takes what is known; another side of the same file is another text."""
    from minmacpo.data.records import Example, Message
    from minmacpo.pipeline.model_pool import TextColumn

    model, passes = random_model(seed), []
    monkeypatch.setattr(
        stages,
        "score",
        lambda model, rows, *rest, share: passes.append(len(rows)) or score.score(model, rows, 200),
    )
    monkeypatch.setattr(
        TextColumn,
        "read",
        lambda self: [
            Example(str(i), (Message("user", "ab"),), self.file + self.side, {}) for i in range(4)
        ],
    )
    render = lambda loaded, prompt, answer: Tokens(
        [3, 4, *(5 + ord(c) % 50 for c in answer)], [False] * 2 + [True] * len(answer)
    )
    progress = contextlib.nullcontext()
    session = SimpleNamespace(
        use=lambda *_: SimpleNamespace(model=model),
        render=render,
        scored=(None, {}),
        score_tokens=200,
    )
    work = SimpleNamespace(
        progress=lambda *_: progress, dist=SINGLE_PROCESS, log=None, folder=tmp_path
    )
    stage, base = (
        SimpleNamespace(fingerprint="s"),
        SimpleNamespace(stage=SimpleNamespace(fingerprint="b")),
    )
    a, b, other = (
        TextColumn(stage, "a", "chosen"),
        TextColumn(stage, "bcd", "chosen"),
        TextColumn(stage, "a", "rejected"),
    )

    def first(file) -> tuple[float, int]:
        file.seek(0)
        return stages.FOUND.unpack(file.read(stages.FOUND.size))

    found = stages.scored_together(session, work, base, None, [a, b])
    assert (
        stages.scored_together(session, work, base, None, [a, b]) is found
        and passes == [8]
        and set(found) == {a.key, b.key}
    )
    assert not list(tmp_path.iterdir())
    (logp, tokens), (of_a, _) = first(found[b.key]), first(found[a.key])
    alone = stages.scored_together(session, work, base, None, [other])
    assert passes == [8, 4] and first(alone[other.key])[0] != of_a
    row = render(None, None, "bcdchosen")
    assert tokens == sum(row.mask) and logp == pytest.approx(
        score.score(model, [row], 200)[0], rel=1e-5
    )
