"""The systems beside MACPO.

Their losses, what their stages are made of, and that no two are the same.
"""

import pytest
import torch
from conftest import far, random_model
from runs import METHODS, invoke, rows_of, stages_of
from torch.autograd import gradcheck

from minmacpo.config.schema import Lora
from minmacpo.core.batching import Batch
from minmacpo.core.checkpoint import load_tensors
from minmacpo.core.lora import attach_lora, init_adapter
from minmacpo.core.sft_loss import SFTLoss, StepTotals
from minmacpo.evaluation import report
from minmacpo.evaluation.finished_run import agent_label, read_run
from minmacpo.evaluation.html import clip, escape
from minmacpo.kernels.fused_logps import CHUNK, chunk_logps_and_grad, token_logps


def adapter(run, name: str) -> torch.Tensor:
    tensors, _ = load_tensors(run / name / "adapter_model.safetensors")
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


# ---- the auxiliary confidence loss ------------------------------------------------------------


def mixed(hidden, weight, targets, share: float):
    """(1 - a) log p(w) + a log p(u), u the likeliest token, written as in the paper with all
    logits.
    """
    logps = (hidden @ weight.T).log_softmax(-1)
    own = logps.detach().argmax(-1)
    pick = [logps[range(len(ids)), ids] for ids in (targets, own)]
    return (1 - share) * pick[0] + share * pick[1]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("count", [1, 23, CHUNK + 5])
def test_confident_logps_equal_the_plain_formula(count, share, frozen, seed):
    values = []
    for function in (
        mixed,
        lambda h, w, t, a: token_logps(h, w, t, confidence_weight=torch.tensor(a, dtype=h.dtype)),
    ):
        torch.manual_seed(seed)
        hidden = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(13, 6, dtype=torch.float64, requires_grad=not frozen)
        targets, above = torch.randint(0, 13, (count,)), torch.randn(count, dtype=torch.float64)
        logps = function(hidden, weight, targets, share)
        (logps * above).sum().backward()
        values.append([logps, hidden.grad, weight.grad if not frozen else hidden.grad])
    assert all(far(a, b) < 1e-10 for a, b in zip(*values, strict=True))


def test_the_confident_direction_passes_gradcheck(seed):
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 9, (7,))
    own = torch.tensor(0.4, dtype=torch.float64)
    assert gradcheck(lambda h: token_logps(h, weight, targets, confidence_weight=own), hidden)
    logps, direction = chunk_logps_and_grad(hidden.detach(), weight, targets, own)
    assert logps.shape == (7,) and direction.shape == (7, 4)


def test_the_share_grows_over_the_first_fifth(seed):
    model = random_model(seed)
    attach_lora(model, Lora(3, 6.0, ("q_proj", "v_proj")))
    init_adapter(model, seed)
    tokens, mask = torch.randint(3, 61, (3, 9)), torch.zeros(3, 9, dtype=torch.bool)
    mask[:, 4:] = True
    batch, count = Batch(tokens, mask), int(mask.sum())
    losses = {}
    for progress in (0.0, 0.05, 0.1, 0.2, 0.6, 1.0):
        loss, _ = SFTLoss(False, 0.5)(model, batch, StepTotals(3, count, progress))
        losses[progress] = loss.item()
    plain = SFTLoss()(model, batch, StepTotals(3, count))[0].item()
    with torch.no_grad():
        logps = (model(tokens)[:, :-1] @ model.lm_head.weight.T).log_softmax(-1)[mask[:, 1:]]
    sure = -logps.amax(-1).mean().item()
    for progress, share in {0.0: 0.0, 0.05: 0.125, 0.1: 0.25, 0.2: 0.5, 0.6: 0.5, 1.0: 0.5}.items():
        assert losses[progress] == pytest.approx((1 - share) * plain + share * sure, abs=1e-5)
    assert sure < plain - 1e-3


# ---- what the stages are made of --------------------------------------------------------------


def test_all_start_from_the_same_naive_student(methods):
    names = [
        "round0/student_pos",
        "round0/weak_labels",
        "round0/teacher1_pos",
        "round0/teacher2_pos",
        "controls/ceiling",
    ]
    for name in names:
        assert len({stages_of(run)[name]["fingerprint"] for run in methods.values()}) == 1, name


def test_no_two_methods_give_the_same_student(methods):
    last = {m: f"round{0 if m == 'sft' else 2}/student_pos" for m in methods}
    found = [(m, adapter(run, last[m])) for m, run in methods.items()]
    found += [("ceiling", adapter(methods["sft"], "controls/ceiling"))]
    for i, (one, a) in enumerate(found):
        for other, b in found[:i]:
            assert not torch.equal(a, b), (one, other)


def test_methods_train_no_negative_agent_and_no_teacher_again(methods):
    for method in METHODS:
        names = stages_of(methods[method])
        assert not [n for n in names if "_neg" in n or "negatives" in n], method
        assert not [n for n in names if n.startswith(("round1/teacher", "round2/teacher"))], method


def test_all_take_the_steps_of_macpo_s_student(methods):
    """Of the stub's pairs none is dropped for spin; the others train on all labels or all truth."""
    train_args = {
        m: sum(
            s["counts"]["steps"]
            for n, s in stages_of(run).items()
            if n in ("round1/student_pos", "round2/student_pos")
        )
        for m, run in methods.items()
    }
    prompts, batch = 12, stages_of(methods["spin"])["round1/student_pos"]["settings"]["batch"]
    most = 2 * -(-prompts // batch)
    assert train_args["sft"] == 0 and train_args["sft-continued"] == train_args["dpo-truth"] == most
    assert all(train_args[m] <= most for m in ("macpo", "spin"))


def test_spin_prefers_the_labels_to_its_own_last_answers(methods):
    run, notes = methods["spin"], stages_of(methods["spin"])
    labels = {
        row["id"]: row["response"] for row in rows_of(run / "round0/weak_labels/samples.jsonl")
    }
    for t in (1, 2):
        own = {
            row["id"]: row["response"]
            for row in rows_of(run / f"round{t}/positives_student/samples.jsonl")
        }
        for pair in rows_of(run / f"round{t}/pairs_student/pairs.jsonl"):
            assert (pair["chosen"], pair["rejected"]) == (labels[pair["id"]], own[pair["id"]])
        settings, inputs = (notes[f"round{t}/student_pos"][key] for key in ("settings", "inputs"))
        assert settings["sft_weight"] == 0 and settings["reference"] == "previous"
        assert f"round{t - 1}/student_pos" in inputs
        first = rows_of(run / f"round{t}/student_pos/metrics.jsonl")[0]
        assert first["step"] == 0 and abs(first["rewards/margins"]) < 1e-3, (
            "its opponent is its reference"
        )


def test_dpo_truth_learns_the_true_pairs(methods):
    truth = {
        row["id"]: (row["chosen"], row["rejected"])
        for row in rows_of(methods["dpo-truth"] / "data/slices/d2.jsonl")
    }
    for pair in rows_of(methods["dpo-truth"] / "round2/pairs_student/pairs.jsonl"):
        assert (pair["chosen"], pair["rejected"]) == truth[pair["id"]]


def test_tables_of_methods_name_them_and_compare(methods):
    for method, run in methods.items():
        table = invoke("eval", run, "--json").out
        assert f'"method": "{method}"' in table
    compared = invoke("eval", "compare", *methods.values()).out
    assert all(f"stub-method={m}" in compared for m in METHODS) and len(
        compared.splitlines()
    ) == 1 + len(methods)


@pytest.mark.parametrize("method", ["spin", "dpo-truth", "self-rewarding", "rlaif", "rlcd"])
def test_the_report_shows_the_pairs_that_were_learned(methods, method):
    run = read_run(methods[method])
    shown = {pair.id for pair in report.spaced_prompts(run.stage("data/slices"))}
    html, found = "".join(report.sample_cards(run)), 0
    for t in (1, 2):
        for pair in rows_of(methods[method] / f"round{t}/pairs_student/pairs.jsonl"):
            if pair["id"] in shown:
                found += 1
                assert all(
                    f">{escape(clip(pair[side]))}<small>{agent_label(pair[f'{side}_by'])}" in html
                    for side in ("chosen", "rejected")
                )
    assert found == html.count("<tr>") - html.count("<thead>") > 0


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words,wanted",
    [
        (["--method=spim"], "spin"),
        (["--macpo.select=perplexty"], "perplexity"),
        (["--method=spin", "--macpo.mutual_positives=false"], "run.method"),
        (["--method=sft", "--macpo.select=random"], "run.method"),
        (["--method=confident", "--macpo.rounds=0"], "run.method"),
        (
            ["--method=rlcd", "--data.template=zephyr"],
            "data.template = zephyr has no place for a tag",
        ),
        (
            ["--macpo.negatives=persona", "--data.template=mistral"],
            "plain, turns, vicuna, alpaca have one",
        ),
    ],
)
def test_a_wrong_method_is_refused(place, words, wanted):
    ended = invoke("train", "@tiny", *words)
    assert ended.code == 2 and wanted in ended.err and not (place / "runs").exists()
