"""A round of MACPO as one would write it with TRL, PEFT and transformers' generate.

Each is used as its documentation shows.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from bench.speed.peers import BETA, DTYPES, LR, as_words, word_tokenizer

SFT_WEIGHT = 0.2

Texts = list[list[int]]  # ids
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def load(folder: Path, dtype: str):
    """An agent: base and adapter, ready to sample and to train."""
    import peft
    import transformers

    transformers.utils.logging.set_verbosity_error()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=DTYPES[dtype])
    return peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)


@torch.no_grad()
def sample(model, prompts: Texts, new: int) -> Texts:
    """An answer to each prompt, side by side (the prompts are of one length)."""
    tokens = torch.tensor(prompts)
    model.eval()
    rows = model.generate(
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
    answers = rows[:, tokens.shape[1] :].tolist()
    return [whole([token for token in answer if token]) for answer in answers]


def whole(text: list[int]) -> list[int]:
    """A sampled answer with its end token; ids that are no words become one that is."""
    words = [token if token > 2 else 3 for token in text if token != 2]
    return [*words, 2]


@torch.no_grad()
def perplexities(model, prompts: Texts, texts: Texts, size: int = 8) -> list[float]:
    """Mean negative log-probability per token, in batches of `size` sorted by length."""
    rows = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    values = [0.0] * len(texts)
    model.eval()
    for start in range(0, len(order), size):
        group = order[start : start + size]
        width = max(len(rows[i]) for i in group)
        tokens = torch.zeros(len(group), width, dtype=torch.long)  # (B, T)
        labels = torch.full((len(group), width), -100)  # (B, T)
        for number, i in enumerate(group):
            end = len(rows[i])
            tokens[number, :end] = torch.tensor(rows[i])
            labels[number, len(prompts[i]) : end] = torch.tensor(texts[i])

        attended = (tokens > 0).long()
        output = model(input_ids=tokens, attention_mask=attended, use_cache=False)
        logits = output.logits[:, :-1].float()  # (B, T - 1, V)
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        for i, loss in zip(group, losses.sum(1).tolist(), strict=True):
            values[i] = loss / len(texts[i])
    return values


def learn(model, folder: Path, pairs: list[Pair], dtype: str, batch: int) -> list[float]:
    """DPO + SFT on the pairs, one epoch; the loss of every step.

    The reference is the adapter at its start.
    """
    import datasets
    import trl

    rows = []
    for prompt, chosen, rejected in pairs:
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append({name: as_words(ids) for name, ids in row.items()})
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=LR,
        weight_decay=0.0,
        beta=BETA,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, SFT_WEIGHT],
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


def macpo_round(
    folder: Path,
    prompts: Texts,
    negatives: dict[str, Texts],
    dtype: str,
    new: int,
    batch: int,
) -> None:
    """Teachers answer, the student learns the least perplexing answer, teachers learn its own.

    Args:
        negatives: by agent, the student first.
        new: most tokens of an answer.
        batch: pairs of a step.
    """
    agents = {name: load(folder / name, dtype) for name in negatives}
    student_name, *teachers = agents
    student = agents[student_name]

    offered = [sample(agents[name], prompts, new) for name in teachers]
    values_of = [perplexities(student, prompts, texts) for texts in offered]
    chosen = []
    for i in range(len(prompts)):
        candidates = []
        for values, texts in zip(values_of, offered, strict=True):
            candidates.append((values[i], texts[i]))
        _, best = min(candidates)
        chosen.append(best)
    pairs = list(zip(prompts, chosen, negatives[student_name], strict=True))
    learn(student, folder / "trl", pairs, dtype, batch)

    answers = sample(student, prompts, new)
    for name in teachers:
        pairs = list(zip(prompts, answers, negatives[name], strict=True))
        learn(agents[name], folder / "trl", pairs, dtype, batch)
