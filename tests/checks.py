"""What must hold of a finished run, found from its files by other means than the library's.

Each check is a function that raises AssertionError. test_macpo.py calls them on good runs,
test_defects.py on runs with a defect put in on purpose, where they must fail. Models are those of
transformers and PEFT, ids come straight from sentencepiece, losses are written out again.
"""

import functools
import json
import math
from pathlib import Path

import peft
import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from runs import rows_of, stages_of

from minmacpo.core.batching import plan_steps

Row = tuple[list[int], int]  # ids, and how many of the last ones are the answer


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
    return run / "bases" / (f"weak{agent[7:]}" if agent.startswith("teacher") else "strong")


@functools.cache
def pieces_of(base: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))


def prompt_ids(base: Path, prompt: list[dict]) -> list[int]:
    """<user> … <bot> … of a prompt as it stands in a .jsonl file (template "turns")."""
    pieces, ids = pieces_of(base), []
    for message in prompt:
        mark = {"user": "<user>", "assistant": "<bot>"}[message["role"]]
        ids += [pieces.piece_to_id(mark), *pieces.encode(message["content"])]
        ids += [pieces.eos_id()] * (message["role"] == "assistant")
    return [*ids, pieces.piece_to_id("<bot>")]


def row_of(base: Path, prompt: list[dict], response: str) -> Row:
    answer = [*pieces_of(base).encode(response), pieces_of(base).eos_id()]
    return prompt_ids(base, prompt) + answer, len(answer)


def logps_of(model, rows: list[Row]) -> torch.Tensor:
    """[n]: the answers' summed log-probabilities, all rows in one padded batch."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    logps = model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1)
    logps = logps.gather(-1, tokens[:, 1:, None])[..., 0]
    index = torch.arange(1, width)
    spans = torch.tensor([[len(ids) - count, len(ids)] for ids, count in rows])
    return (logps * ((index >= spans[:, :1]) & (index < spans[:, 1:]))).sum(1)


@torch.no_grad()
def scored(model, rows: list[Row]) -> list[float]:
    return [
        value
        for i in range(0, len(rows), 64)
        for value in logps_of(model, rows[i : i + 64]).tolist()
    ]


def assert_close(found, wanted, what: str) -> None:
    assert len(found) == len(wanted) > 0, what
    worst = max(abs(a - b) / (1 + abs(b)) for a, b in zip(found, wanted, strict=True))
    assert worst < 1e-4, f"{what}: off by {worst:.2g}"


# ---- reading a run --------------------------------------------------------------------------


def settings_of(run: Path) -> dict:
    import tomllib

    return tomllib.loads((run / "config.toml").read_text())


def rounds_of(run: Path) -> range:
    return range(1, settings_of(run)["macpo"]["rounds"] + 1)


def teachers_of(run: Path) -> list[str]:
    return [f"teacher{k + 1}" for k in range(settings_of(run)["macpo"]["teachers"])]


def agents_of(run: Path) -> list[str]:
    return ["student", *teachers_of(run)]


def updated(run: Path) -> list[tuple[int, str]]:
    """(round, agent) of every contrastive step of a run."""
    frozen = not settings_of(run)["macpo"]["update_teachers"]
    return [
        (t, agent) for t in rounds_of(run) for agent in (["student"] if frozen else agents_of(run))
    ]


def samples(run: Path, name: str) -> dict[str, dict]:
    rows = rows_of(run / name / "samples.jsonl")
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


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
    d2 = [(row["id"], row["prompt"]) for row in rows_of(run / "data/slices/d2.jsonl")]
    files = [f for f in run.glob("round*/*/samples.jsonl")]
    assert len(files) > 5
    for file in files:
        assert [(row["id"], row["prompt"]) for row in rows_of(file)] == d2, file
    for t, agent in updated(run):
        made = [(row["id"], row["prompt"]) for row in pairs(run, t, agent)]
        rest = iter(d2)
        assert all(entry in rest for entry in made), (t, agent)
        counts = stages_of(run)[f"round{t}/pairs_{agent}"]["counts"]
        dropped = sum(
            counts[key] for key in ("all_empty", "negative_empty", "negative_equal", "over_long")
        )
        assert counts["pairs"] == len(made) == len(d2) - dropped


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
        said = samples(run, f"round{t}/positives_student")
        for teacher in teachers_of(run):
            for pair in pairs(run, t, teacher):
                assert pair["chosen"] == said[pair["id"]]["response"], (t, teacher, pair["id"])
                assert pair["chosen_by"] == "student"


def check_student_answers_after_its_update(run: Path) -> None:
    """The student's answers of round t come from π_S^(t), not π_S^(t-1)."""
    for t in rounds_of(run):
        check_samples(run, f"round{t}/positives_student", "student", run / f"round{t}/student_pos")


def check_teachers_answer_before_their_update(run: Path) -> None:
    """The teachers' answers of round t come from π_k^(t-1)."""
    for t in rounds_of(run):
        for teacher in teachers_of(run):
            check_samples(
                run, f"round{t}/positives_{teacher}", teacher, latest(run, teacher, t - 1)
            )


def check_samples(run: Path, name: str, agent: str, adapter: Path) -> None:
    """The log-probability stored with every sample is that of its tokens under this adapter."""
    base = base_of(run, agent)
    rows = list(samples(run, name).values())
    pieces = pieces_of(base)
    end = pieces.eos_id()
    spans = []
    for row in rows:
        *words, last = row["tokens"]
        assert end not in words
        assert (row["finish"] == "stop") == (last == end)
        if last != end:
            words.append(last)
        assert row["response"] == pieces.decode(words).strip()
        spans.append((prompt_ids(base, row["prompt"]) + row["tokens"], len(row["tokens"])))
    check_logps(rows, spans, peft_model(base, adapter), name)


def check_logps(rows: list[dict], spans: list[Row], model, what: str) -> None:
    """The log-probability and perplexity of every row are those that the model gives its span."""
    logps = scored(model, spans)
    assert_close([row["logp"] for row in rows], logps, what)
    log_perplexities = [-logp / count for logp, (_, count) in zip(logps, spans, strict=True)]
    assert_close([math.log(row["perplexity"]) for row in rows], log_perplexities, what)


def check_scores(run: Path) -> None:
    """The filter's scores are perplexities under the student before its update."""
    base = base_of(run, "student")
    for t in rounds_of(run):
        student = peft_model(base, run / f"round{t - 1}/student_pos")
        for teacher in teachers_of(run):
            texts = samples(run, f"round{t}/positives_{teacher}").values()
            rows = [row_of(base, row["prompt"], row["response"]) for row in texts]
            found = rows_of(run / f"round{t}/scores_student/{teacher}.jsonl")
            assert [row["id"] for row in found] == [row["id"] for row in texts]
            assert [row["tokens"] for row in found] == [count for _, count in rows]
            check_logps(found, rows, student, f"round {t}, scores of {teacher}")


def check_evaluation(run: Path) -> None:
    """The held-out answers are scored and sampled under the agent that the stage names."""
    truth = rows_of(run / "data/slices/test.jsonl")
    for t, agent in [(0, agent) for agent in agents_of(run)] + updated(run):
        base, adapter = base_of(run, agent), run / f"round{t}/{agent}_pos"
        model = peft_model(base, adapter)
        for side, key in (("truth", "chosen"), ("worse", "rejected")):
            rows = [row_of(base, row["prompt"], row[key]) for row in truth]
            found = rows_of(run / f"eval/round{t}_{agent}_{side}/scores.jsonl")
            assert [row["id"] for row in found] == [row["id"] for row in truth]
            assert_close(
                [row["logp"] for row in found], scored(model, rows), f"{agent}, round {t}, {side}"
            )
            assert [row["characters"] for row in found] == [len(row[key]) for row in truth]


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
            assert pair["chosen"] and pair["rejected"] and pair["chosen"] != pair["rejected"]
            said = samples(run, f"round{t}/positives_{pair['chosen_by']}")
            assert pair["chosen"] == said[pair["id"]]["response"]


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
            rows = [row_of(base, pair["prompt"], pair[side]) for pair in agent_pairs]
            stored = [pair[f"ref_{side}_logps"] for pair in agent_pairs]
            assert_close(stored, scored(model, rows), f"round {t}, {agent}, {side}")


def margins_before_the_first_step(run: Path) -> dict[str, float]:
    rows = [row for row in rows_of(run / "metrics.jsonl") if row["step"] == 0]
    found = {row["stage"]: row["rewards/margins"] for row in rows}
    assert len(rows) == len(found) == len(updated(run))
    return found


def check_prefer(run: Path, t: int, agent: str) -> None:
    """π^(t) is what one epoch of DPO + γ SFT from π^(t-1) gives, worked out again."""
    base, config = base_of(run, agent), settings_of(run)
    dpo, contrast = config["dpo"], config["macpo"]["hard_negatives"]
    made, name = pairs(run, t, agent), f"round{t}/{agent}_pos"
    rows = [
        [row_of(base, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        for pair in made
    ]
    assert dpo["reference"] == "base" and dpo["label_smoothing"] == 0
    refs = [scored(plain_model(base), unit) for unit in rows]

    def loss(model, units: list[int]) -> torch.Tensor:
        total = 0
        for unit in units:
            chosen, rejected = logps_of(model, rows[unit])
            margin = (chosen - rejected) - (refs[unit][0] - refs[unit][1])
            sft = -chosen / rows[unit][0][1]
            total = total + (
                -F.logsigmoid(dpo["beta"] * margin) + dpo["sft_weight"] * sft if contrast else sft
            )
        return total / len(units)

    steps = dpo["epochs"] * -(-len(made) // dpo["batch"])
    lr = dpo["teacher_lr" if agent.startswith("teacher") else "student_lr"]
    start = latest(run, agent, t - 1)
    retrain(
        run,
        name,
        base,
        start,
        [max(len(ids) for ids, _ in unit) for unit in rows],
        loss,
        lr,
        steps,
        dpo["batch"],
    )


def check_sft(
    run: Path,
    name: str,
    agent: str,
    start: Path,
    texts: list[dict],
    side: str,
    lr: float,
    batch: int,
    steps: int,
) -> None:
    """The adapter `name` is what SFT on `texts` from `start` gives, worked out again."""
    base = base_of(run, agent)
    rows = [row_of(base, row["prompt"], row[side]) for row in texts if row[side]]

    def loss(model, units: list[int]) -> torch.Tensor:
        picked = [rows[unit] for unit in units]
        return -logps_of(model, picked).sum() / sum(count for _, count in picked)

    retrain(run, name, base, start, [len(ids) for ids, _ in rows], loss, lr, steps, batch)


def check_negative_student(run: Path) -> None:
    """ν_S continues π_S^(0) on what teacher 1's negative twin said."""
    sft = settings_of(run)["sft"]
    texts = list(samples(run, "round0/weak_negatives").values())
    steps = sft["student_negative_epochs"] * -(
        -len([r for r in texts if r["response"]]) // sft["batch"]
    )
    check_sft(
        run,
        "round0/student_neg",
        "student",
        run / "round0/student_pos",
        texts,
        "response",
        sft["student_negative_lr"],
        sft["batch"],
        steps,
    )


def check_negative_teacher(run: Path, teacher: str) -> None:
    """ν_k continues π_k^(0) on the rejected answers of D1."""
    sft, texts = settings_of(run)["sft"], rows_of(run / "data/slices/d1.jsonl")
    steps = sft["teacher_negative_epochs"] * -(-len(texts) // sft["batch"])
    check_sft(
        run,
        f"round0/{teacher}_neg",
        teacher,
        run / f"round0/{teacher}_pos",
        texts,
        "rejected",
        sft["teacher_negative_lr"],
        sft["batch"],
        steps,
    )


def retrain(
    run: Path, name: str, base: Path, start: Path, lengths, loss, lr: float, steps: int, batch: int
) -> None:
    """The adapter `name` is `start` after AdamW on whole batches, cosine to zero, clipped at 1."""
    notes = stages_of(run)[name]
    assert notes["counts"]["steps"] == steps and notes["counts"]["rows"] == len(lengths)
    model = peft_model(base, start, trainable=True)
    params = {k.replace(".default", ""): p for k, p in model.named_parameters() if p.requires_grad}
    before = {k: p.detach().clone() for k, p in params.items()}
    optimizer = torch.optim.AdamW(
        params.values(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0
    )
    for step, groups in enumerate(plan_steps(lengths, batch, steps, notes["seed"])):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss(model, [unit for group in groups for unit in group]).backward()
        torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    made = adapter_tensors(run / name)
    assert made.keys() == params.keys()
    moved = math.sqrt(sum(float((made[k] - before[k]).square().sum()) for k in made))
    off = math.sqrt(sum(float((made[k] - params[k].detach()).square().sum()) for k in made))
    assert moved > 0, name
    assert off < 0.02 * moved, f"{name}: {off / moved:.1%} of the way it went is not explained"


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

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
            assert (
                torch.isfinite(logits).all()
                and (logits - plain_model(base)(input_ids=ids).logits).abs().max() > 1e-4
            ), folder
