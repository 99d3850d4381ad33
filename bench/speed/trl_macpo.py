"""A round of MACPO as one would write it with TRL, PEFT and transformers' generate, each used as its documentation shows."""

from pathlib import Path

import torch
import torch.nn.functional as F

from bench.speed.peers import BETA, DTYPES, LR, word_tokenizer

GAMMA = 0.2  # weight of the SFT term


def load(folder: Path, dtype: str):
    """An agent: base and adapter, ready to sample and to train."""
    import peft
    import transformers

    transformers.utils.logging.set_verbosity_error()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=DTYPES[dtype])
    return peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)


@torch.no_grad()
def sample(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    """An answer to each prompt, side by side (the prompts are of one length)."""
    tokens = torch.tensor(prompts)
    model.eval()
    found = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        do_sample=True,
        temperature=0.95,
        top_k=50,
        top_p=0.7,
        eos_token_id=2,
        pad_token_id=0,
    )
    return [[token for token in row if token] for row in found[:, tokens.shape[1] :].tolist()]


@torch.no_grad()
def perplexities(
    model, prompts: list[list[int]], texts: list[list[int]], size: int = 8
) -> list[float]:
    """Of every text behind its prompt, in batches of `size` sorted by length."""
    rows, found = [p + t for p, t in zip(prompts, texts, strict=True)], [0.0] * len(texts)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    model.eval()
    for group in (order[start : start + size] for start in range(0, len(order), size)):
        width = max(len(rows[i]) for i in group)
        tokens = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in group])
        labels = torch.tensor(
            [[-100] * len(prompts[i]) + texts[i] + [-100] * (width - len(rows[i])) for i in group]
        )
        logits = (
            model(input_ids=tokens, attention_mask=(tokens > 0).long(), use_cache=False)
            .logits[:, :-1]
            .float()
        )
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
        for i, loss in zip(group, losses.tolist(), strict=True):
            found[i] = loss / len(texts[i])
    return found


def learn(model, place: Path, pairs: list[tuple], dtype: str, batch: int) -> list[float]:
    """DPO + GAMMA · SFT on (prompt, chosen, rejected), one epoch; the loss of every step. The reference is the adapter at its start."""
    import datasets
    import trl

    def words(ids: list[int]) -> str:
        return "".join(f" w{i}" for i in ids if i != 2)

    rows = [
        dict(zip(("prompt", "chosen", "rejected"), map(words, pair), strict=True)) for pair in pairs
    ]
    arguments = trl.DPOConfig(
        output_dir=str(place),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=LR,
        weight_decay=0.0,
        beta=BETA,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, GAMMA],
        lr_scheduler_type="constant",
        max_length=None,
        gradient_checkpointing=False,
        bf16=dtype == "bf16",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def whole(text: list[int]) -> list[int]:
    """A sampled answer with its end token; ids that are no words become one that is."""
    return [token if token > 2 else 3 for token in text if token != 2] + [2]


def macpo_round(
    place: Path,
    prompts: list[list[int]],
    negatives: dict[str, list[list[int]]],
    dtype: str,
    new: int,
    batch: int,
) -> None:
    """Teachers answer, the student takes the least perplexing answer and learns, answers, and the teachers learn from it."""
    agents = {name: load(place / name, dtype) for name in negatives}
    student, *teachers = agents
    offered = [[whole(text) for text in sample(agents[name], prompts, new)] for name in teachers]
    familiar = [perplexities(agents[student], prompts, texts) for texts in offered]
    columns = zip(zip(*familiar, strict=True), zip(*offered, strict=True), strict=True)
    chosen = [min(zip(column, texts, strict=True))[1] for column, texts in columns]
    learn(
        agents[student],
        place / "trl",
        [*zip(prompts, chosen, negatives[student], strict=True)],
        dtype,
        batch,
    )
    said = [whole(text) for text in sample(agents[student], prompts, new)]
    for name in teachers:
        learn(
            agents[name],
            place / "trl",
            [*zip(prompts, said, negatives[name], strict=True)],
            dtype,
            batch,
        )
