"""What must hold of a finished run, found from its files by other means than the library's.

Each check is a function that raises AssertionError. test_macpo.py calls them on good runs,
test_defects.py on runs with a defect put in on purpose, where they must fail. Models are those of
transformers and PEFT, ids come straight from sentencepiece, losses are written out again.
"""

import functools
import itertools
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import peft
import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from runs import rows_of, stages_of
from safetensors.torch import load_file

from minmacpo.core.batching import plan_steps


class Row(NamedTuple):
    """A prompt with an answer."""

    ids: list[int]
    answer_tokens: int  # how many of the last ids are the answer


@dataclass(frozen=True)
class TrainArgs:
    """How a training is worked out again."""

    lr: float
    batch: int
    steps: int


# ---- other people's models ------------------------------------------------------------------


@functools.cache
def plain_model(folder: Path):
    """A base as transformers loads it."""
    return transformers.LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def peft_model(base: Path, adapter: Path, trainable: bool = False):
    """A base with an adapter, as PEFT loads it."""
    model = transformers.LlamaForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=trainable).eval()


def base_of(run: Path, agent: str) -> Path:
    """The folder of an agent's base."""
    if agent.startswith("teacher"):
        return run / "bases" / agent.replace("teacher", "weak")
    return run / "bases/strong"


@functools.cache
def pieces_of(base: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))


def prompt_ids(base: Path, prompt: list[dict]) -> list[int]:
    """<user> … <bot> … of a prompt as it stands in a .jsonl file (template "turns")."""
    pieces = pieces_of(base)
    ids = []
    for message in prompt:
        content = pieces.encode(message["content"])
        if message["role"] == "user":
            ids += [pieces.piece_to_id("<user>"), *content]
        else:
            assert message["role"] == "assistant"
            ids += [pieces.piece_to_id("<bot>"), *content, pieces.eos_id()]
    return [*ids, pieces.piece_to_id("<bot>")]


def row_of(base: Path, prompt: list[dict], response: str) -> Row:
    answer = [*pieces_of(base).encode(response), pieces_of(base).eos_id()]
    return Row(prompt_ids(base, prompt) + answer, len(answer))


def column_of(base: Path, rows: list[dict], column: str) -> list[Row]:
    """The prompts of rows in a .jsonl file with the texts of one column."""
    return [row_of(base, row["prompt"], row[column]) for row in rows]


def logps_of(model, rows: list[Row]) -> torch.Tensor:
    """The answers' summed log-probabilities, (B,); all rows in one padded batch."""
    length = max(len(row.ids) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    is_answer = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        end = len(row.ids)
        tokens[number, :end] = torch.tensor(row.ids)
        is_answer[number, end - row.answer_tokens : end] = True
    logits = model(input_ids=tokens).logits[:, :-1]  # (B, T - 1, V)
    next_tokens = tokens[:, 1:, None]
    logps = logits.float().log_softmax(-1).gather(-1, next_tokens)[..., 0]  # (B, T - 1)
    return (logps * is_answer[:, 1:]).sum(1)


@torch.no_grad()
def scored(model, rows: list[Row]) -> list[float]:
    """As `logps_of`, for any number of rows."""
    logps = []
    for first in range(0, len(rows), 64):
        logps += logps_of(model, rows[first : first + 64]).tolist()
    return logps


def assert_close(values, expected, what: str) -> None:
    assert len(values) == len(expected) > 0, what
    worst = max(abs(a - b) / (1 + abs(b)) for a, b in zip(values, expected, strict=True))
    assert worst < 1e-4, f"{what}: off by {worst:.2g}"


# ---- reading a run --------------------------------------------------------------------------


def settings_of(run: Path) -> dict:
    return tomllib.loads((run / "config.toml").read_text())


def rounds_of(run: Path) -> range:
    return range(1, settings_of(run)["macpo"]["rounds"] + 1)


def teachers_of(run: Path) -> list[str]:
    count = settings_of(run)["macpo"]["teachers"]
    return [f"teacher{k}" for k in range(1, count + 1)]


def agents_of(run: Path) -> list[str]:
    return ["student", *teachers_of(run)]


def updated(run: Path) -> list[tuple[int, str]]:
    """(round, agent) of every contrastive step of a run."""
    agents = ["student"]
    if settings_of(run)["macpo"]["update_teachers"]:
        agents += teachers_of(run)
    return [(t, agent) for t in rounds_of(run) for agent in agents]


def samples(run: Path, name: str) -> dict[str, dict]:
    """The samples of a stage, one of each prompt, by the prompt's id."""
    rows = rows_of(run / name / "samples.jsonl")
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def pairs(run: Path, t: int, agent: str) -> list[dict]:
    return rows_of(run / f"round{t}" / f"pairs_{agent}" / "pairs.jsonl")


def latest(run: Path, agent: str, t: int) -> Path:
    """The agent's positive adapter as it stands after round t (frozen teachers stay at round 0)."""
    while t and not (run / f"round{t}" / f"{agent}_pos").exists():
        t -= 1
    return run / f"round{t}" / f"{agent}_pos"


# ---- the checks -----------------------------------------------------------------------------


def check_order(run: Path) -> None:
    """All files about D2 have its prompts in its order; pairs leave some out, and count them."""
    d2 = prompts_in(run / "data/slices/d2.jsonl")
    files = list(run.glob("round*/*/samples.jsonl"))
    assert len(files) > 5
    for file in files:
        assert prompts_in(file) == d2, file

    for t, agent in updated(run):
        prompts = prompts_in(run / f"round{t}/pairs_{agent}/pairs.jsonl")
        rest = iter(d2)
        for prompt in prompts:
            assert prompt in rest, (t, agent)  # and what comes before it is used up
        counts = stages_of(run)[f"round{t}/pairs_{agent}"]["counts"]
        assert counts["pairs"] == len(prompts)
        assert len(prompts) + dropped_pairs(counts) == len(d2)


def dropped_pairs(counts: dict) -> int:
    """How many prompts a stage of pairs has dropped, by its counts."""
    reasons = ("all_empty", "negative_empty", "negative_equal", "over_long")
    return sum(counts[reason] for reason in reasons)


def prompts_in(file: Path) -> list[tuple[str, list[dict]]]:
    """(id, prompt) of every row."""
    return [(row["id"], row["prompt"]) for row in rows_of(file)]


def check_negatives_are_cached(run: Path) -> None:
    """The rejected side is what the agent's negative twin said in round 0, in every round."""
    for t, agent in updated(run):
        cached = samples(run, f"round0/negatives_{agent}")
        for pair in pairs(run, t, agent):
            assert pair["rejected"] == cached[pair["id"]]["response"], (t, agent, pair["id"])
            assert pair["rejected_by"] == f"{agent}_neg"


def check_negatives_are_the_negative_twins(run: Path) -> None:
    """Cached negatives were sampled from ν, which continues π^(0)."""
    for agent in agents_of(run):
        check_samples(run, f"round0/negatives_{agent}", agent, run / f"round0/{agent}_neg")


def check_teachers_learn_the_student_s_answers(run: Path) -> None:
    """Chosen is equal over the teachers of a round: what the student said in that round."""
    for t in rounds_of(run):
        answers = samples(run, f"round{t}/positives_student")
        for teacher in teachers_of(run):
            for pair in pairs(run, t, teacher):
                assert pair["chosen"] == answers[pair["id"]]["response"], (t, teacher, pair["id"])
                assert pair["chosen_by"] == "student"


def check_student_answers_after_its_update(run: Path) -> None:
    """The student's answers of round t come from π_S^(t), not π_S^(t-1)."""
    for t in rounds_of(run):
        check_samples(run, f"round{t}/positives_student", "student", run / f"round{t}/student_pos")


def check_teachers_answer_before_their_update(run: Path) -> None:
    """The teachers' answers of round t come from π_k^(t-1)."""
    for t in rounds_of(run):
        for teacher in teachers_of(run):
            adapter = latest(run, teacher, t - 1)
            check_samples(run, f"round{t}/positives_{teacher}", teacher, adapter)


def check_samples(run: Path, name: str, agent: str, adapter: Path) -> None:
    """The log-probability stored with every sample is that of its tokens under this adapter."""
    base = base_of(run, agent)
    rows = list(samples(run, name).values())
    pieces = pieces_of(base)
    end = pieces.eos_id()
    sampled = []
    for row in rows:
        *words, last = row["tokens"]
        assert end not in words
        assert (row["finish"] == "stop") == (last == end)
        if last != end:
            words.append(last)
        assert row["response"] == pieces.decode(words).strip()
        ids = prompt_ids(base, row["prompt"]) + row["tokens"]
        sampled.append(Row(ids, len(row["tokens"])))
    check_logps(rows, sampled, peft_model(base, adapter), name)


def check_logps(stored: list[dict], rows: list[Row], model, what: str) -> None:
    """The stored log-probabilities and perplexities are those that the model gives the rows."""
    logps = scored(model, rows)
    log_perplexities = []
    for logp, row in zip(logps, rows, strict=True):
        log_perplexities.append(-logp / row.answer_tokens)
    assert_close([row["logp"] for row in stored], logps, what)
    assert_close([math.log(row["perplexity"]) for row in stored], log_perplexities, what)


def check_scores(run: Path) -> None:
    """The filter's scores are perplexities under the student before its update."""
    base = base_of(run, "student")
    for t in rounds_of(run):
        student = peft_model(base, run / f"round{t - 1}/student_pos")
        for teacher in teachers_of(run):
            answers = list(samples(run, f"round{t}/positives_{teacher}").values())
            rows = column_of(base, answers, "response")
            scores = rows_of(run / f"round{t}/scores_student/{teacher}.jsonl")
            assert [score["id"] for score in scores] == [answer["id"] for answer in answers]
            assert [score["tokens"] for score in scores] == [row.answer_tokens for row in rows]
            check_logps(scores, rows, student, f"round {t}, scores of {teacher}")


def check_evaluation(run: Path) -> None:
    """The held-out answers are scored and sampled under the agent that the stage names."""
    truth = rows_of(run / "data/slices/test.jsonl")
    after_sft = [(0, agent) for agent in agents_of(run)]
    for t, agent in after_sft + updated(run):
        base = base_of(run, agent)
        model = peft_model(base, run / f"round{t}/{agent}_pos")
        for side, column in (("truth", "chosen"), ("worse", "rejected")):
            scores = rows_of(run / f"eval/round{t}_{agent}_{side}/scores.jsonl")
            assert [score["id"] for score in scores] == [row["id"] for row in truth]
            assert [score["characters"] for score in scores] == [len(row[column]) for row in truth]
            stored = [score["logp"] for score in scores]
            expected = scored(model, column_of(base, truth, column))
            assert_close(stored, expected, f"{agent}, round {t}, {side}")


def check_filter(run: Path) -> None:
    """The student learns the teachers' least perplexing answer, the first of equals; never none."""
    for t in rounds_of(run):
        # Of every prompt the (perplexity, number of the teacher, answer) of those who answered
        candidates: dict[str, list[tuple[float, int, str]]] = {}
        for number, teacher in enumerate(teachers_of(run)):
            answers = samples(run, f"round{t}/positives_{teacher}")
            for row in rows_of(run / f"round{t}/scores_student/{teacher}.jsonl"):
                answer = answers[row["id"]]["response"]
                if answer:
                    candidate = (row["perplexity"], number, answer)
                    candidates.setdefault(row["id"], []).append(candidate)

        student_pairs = pairs(run, t, "student")
        assert student_pairs
        for pair in student_pairs:
            _, best, answer = min(candidates[pair["id"]])
            assert pair["chosen_by"] == teachers_of(run)[best], (t, pair["id"])
            assert pair["chosen"] == answer, (t, pair["id"])


def check_pairs_are_whole(run: Path) -> None:
    """No pair has an empty side or equal sides; the sides are answers of those who are named."""
    for t, agent in updated(run):
        for pair in pairs(run, t, agent):
            assert pair["chosen"]
            assert pair["rejected"]
            assert pair["chosen"] != pair["rejected"]
            answers = samples(run, f"round{t}/positives_{pair['chosen_by']}")
            assert pair["chosen"] == answers[pair["id"]]["response"]


def check_reference(run: Path) -> None:
    """The logps stored with the pairs are those of the reference that was asked for."""
    setting = settings_of(run)["dpo"]["reference"]
    for t, agent in updated(run):
        base = base_of(run, agent)
        if setting == "base":
            model = plain_model(base)
        elif setting == "init":
            model = peft_model(base, run / f"round0/{agent}_pos")
        else:
            model = peft_model(base, latest(run, agent, t - 1))
        agent_pairs = pairs(run, t, agent)
        for side in ("chosen", "rejected"):
            rows = column_of(base, agent_pairs, side)
            stored = [pair[f"ref_{side}_logps"] for pair in agent_pairs]
            assert_close(stored, scored(model, rows), f"round {t}, {agent}, {side}")


def margins_before_the_first_step(run: Path) -> dict[str, float]:
    """{stage: margin} of every contrastive step."""
    margins = {}
    for row in rows_of(run / "metrics.jsonl"):
        if row["step"] == 0:
            assert row["stage"] not in margins
            margins[row["stage"]] = row["rewards/margins"]
    assert len(margins) == len(updated(run))
    return margins


def check_prefer(run: Path, t: int, agent: str) -> None:
    """π^(t) is what one epoch of DPO + γ SFT from π^(t-1) gives, worked out again."""
    base = base_of(run, agent)
    dpo = settings_of(run)["dpo"]
    assert dpo["reference"] == "base"
    assert dpo["label_smoothing"] == 0
    has_contrast = settings_of(run)["macpo"]["hard_negatives"]
    agent_pairs = pairs(run, t, agent)
    chosen_rows = column_of(base, agent_pairs, "chosen")
    rejected_rows = column_of(base, agent_pairs, "rejected")
    reference = plain_model(base)
    ref_chosen = scored(reference, chosen_rows)
    ref_rejected = scored(reference, rejected_rows)

    def loss(model, numbers: list[int]) -> torch.Tensor:
        total = 0
        for number in numbers:
            chosen, rejected = logps_of(model, [chosen_rows[number], rejected_rows[number]])
            sft = -chosen / chosen_rows[number].answer_tokens
            if has_contrast:
                margin = (chosen - ref_chosen[number]) - (rejected - ref_rejected[number])
                total = total - F.logsigmoid(dpo["beta"] * margin) + dpo["sft_weight"] * sft
            else:
                total = total + sft
        return total / len(numbers)

    lengths = []
    for chosen, rejected in zip(chosen_rows, rejected_rows, strict=True):
        lengths.append(max(len(chosen.ids), len(rejected.ids)))
    lr = dpo["teacher_lr"] if agent.startswith("teacher") else dpo["student_lr"]
    steps = dpo["epochs"] * math.ceil(len(agent_pairs) / dpo["batch"])
    start = peft_model(base, latest(run, agent, t - 1), trainable=True)
    retrain(run, f"round{t}/{agent}_pos", start, lengths, loss, TrainArgs(lr, dpo["batch"], steps))


def check_sft(run: Path, name: str, start: Path, rows: list[Row], args: TrainArgs) -> None:
    """The adapter `name` is what SFT on these rows gives from `start`, worked out again."""

    def loss(model, numbers: list[int]) -> torch.Tensor:
        batch = [rows[number] for number in numbers]
        return -logps_of(model, batch).sum() / sum(row.answer_tokens for row in batch)

    config = json.loads((start / "adapter_config.json").read_text())
    base = (start / config["base_model_name_or_path"]).resolve()
    model = peft_model(base, start, trainable=True)
    retrain(run, name, model, [len(row.ids) for row in rows], loss, args)


def answered(run: Path, name: str) -> list[Row]:
    """The student's rows of the samples of a stage that are not empty."""
    answers = [answer for answer in samples(run, name).values() if answer["response"]]
    return column_of(base_of(run, "student"), answers, "response")


def check_negative_student(run: Path) -> None:
    """ν_S continues π_S^(0) on what teacher 1's negative twin said."""
    sft = settings_of(run)["sft"]
    rows = answered(run, "round0/weak_negatives")
    steps = sft["student_negative_epochs"] * math.ceil(len(rows) / sft["batch"])
    args = TrainArgs(sft["student_negative_lr"], sft["batch"], steps)
    check_sft(run, "round0/student_neg", run / "round0/student_pos", rows, args)


def check_negative_teacher(run: Path, teacher: str) -> None:
    """ν_k continues π_k^(0) on the rejected answers of D1."""
    sft = settings_of(run)["sft"]
    rows = column_of(base_of(run, teacher), rows_of(run / "data/slices/d1.jsonl"), "rejected")
    steps = sft["teacher_negative_epochs"] * math.ceil(len(rows) / sft["batch"])
    args = TrainArgs(sft["teacher_negative_lr"], sft["batch"], steps)
    check_sft(run, f"round0/{teacher}_neg", run / f"round0/{teacher}_pos", rows, args)


def retrain(run: Path, name: str, model, lengths: list[int], loss, args: TrainArgs) -> None:
    """The adapter `name` is the model's after AdamW on whole batches, worked out again.

    The learning rate falls to zero as a cosine; gradients are clipped at 1.

    Args:
        model: of PEFT, with the adapter that the training begins with.
        lengths: of all examples, in tokens.
        loss: of the model and the numbers of a batch's examples.
    """
    notes = stages_of(run)[name]
    assert notes["counts"]["steps"] == args.steps
    assert notes["counts"]["rows"] == len(lengths)
    params = {}
    for key, param in model.named_parameters():
        if param.requires_grad:
            params[key.replace(".default", "")] = param
    before = {key: param.detach().clone() for key, param in params.items()}

    optimizer = torch.optim.AdamW(
        params.values(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0
    )
    plan = plan_steps(lengths, args.batch, args.steps, notes["seed"])
    for step, micro_batches in enumerate(plan):
        cosine = math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * 0.5 * (1 + cosine)
        loss(model, list(itertools.chain.from_iterable(micro_batches))).backward()
        torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    stored = adapter_tensors(run / name)
    assert stored.keys() == params.keys()
    after = {key: param.detach() for key, param in params.items()}
    moved = distance(stored, before)
    off = distance(stored, after)
    assert moved > 0, name
    assert off < 0.02 * moved, f"{name}: {off / moved:.1%} of the way it went is not explained"


def distance(adapter: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The Euclidean distance of two adapters."""
    squares = [(adapter[key] - other[key]).square().sum().item() for key in adapter]
    return math.sqrt(sum(squares))


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def check_accumulation(run: Path) -> None:
    """Steps of several micro-batches are those of the whole batch, by tokens or by pairs."""
    settings = json.loads((run / "round1/student_pos/stage.json").read_bytes())["settings"]
    assert settings["max_tokens_per_batch"] < 200  # so small that a step has several
    check_negative_student(run)
    check_prefer(run, 1, "student")


def check_adapters_work(run: Path) -> None:
    """Every adapter loads in PEFT on the base that it names, changes it; logits are finite."""
    folders = sorted(file.parent for file in run.glob("*/*/adapter_config.json"))
    assert len(folders) >= 2 * len(agents_of(run)) + len(updated(run))
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        base = (folder / config["base_model_name_or_path"]).resolve()
        assert base.parent == (run / "bases").resolve()
        ids = torch.tensor([prompt_ids(base, [{"role": "user", "content": "where is it ?"}])])
        with torch.no_grad():
            logits = peft_model(base, folder)(input_ids=ids).logits
            base_logits = plain_model(base)(input_ids=ids).logits
        assert torch.isfinite(logits).all(), folder
        assert (logits - base_logits).abs().max() > 1e-4, folder
