"""A round of MACPO as one would write it with TRL, PEFT and transformers' generate.

Each is used as its documentation shows.
"""

from pathlib import Path

import torch

from bench.speed.peers import BETA, LR, joined, load_with_adapter, word_tokenizer, words_of_row
from bench.speed.score import by_transformers

SFT_WEIGHT = 0.2

Texts = list[list[int]]  # ids
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def load(folder: Path, dtype: str):
    """An agent: base and adapter, ready to sample and to train."""
    return load_with_adapter(folder, dtype, trainable=True)


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
    texts = []
    for answer in answers:
        unpadded = list(filter(None, answer))
        texts.append(whole(unpadded))
    return texts


def whole(text: list[int]) -> list[int]:
    """A sampled answer with its end token; ids that are no words become one that is."""
    words = [max(token, 3) for token in text if token != 2]
    return [*words, 2]


def perplexities(model, prompts: Texts, texts: Texts, size: int = 8) -> list[float]:
    """Mean negative log-probability per token, in batches of `size` sorted by length."""
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        rows.append(joined({"prompt": prompt, "text": text}, "text"))
    model.eval()
    logps = by_transformers(model, rows, size)
    return mean_losses(logps, texts)


def mean_losses(logps: list[float], texts: Texts) -> list[float]:
    """Mean negative log-probabilities per token, in which perplexity is monotone."""
    return [-logp / len(text) for logp, text in zip(logps, texts, strict=True)]


def choose(perplexities_of: list[list[float]], offered: list[Texts]) -> Texts:
    """Of every prompt the answer with the lowest perplexity.

    Args:
        perplexities_of: by source, of every prompt's answer.
        offered: by source, an answer to every prompt.
    """
    chosen = []
    for i in range(len(offered[0])):
        candidates = []
        for values, texts in zip(perplexities_of, offered, strict=True):
            candidates.append((values[i], texts[i]))
        _, best = min(candidates)
        chosen.append(best)
    return chosen


def learn(model, folder: Path, pairs: list[Pair], dtype: str, batch: int) -> list[float]:
    """DPO + SFT on the pairs, one epoch; the loss of every step.

    The reference is the adapter at its start.
    """
    import datasets
    import trl

    rows = []
    for prompt, chosen, rejected in pairs:
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append(words_of_row(row))
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

    offered = []
    values_of = []
    for name in teachers:
        answers = sample(agents[name], prompts, new)
        offered.append(answers)
        values_of.append(perplexities(student, prompts, answers))
    chosen = choose(values_of, offered)
    pairs = list(zip(prompts, chosen, negatives[student_name], strict=True))
    learn(student, folder / "trl", pairs, dtype, batch)

    answers = sample(student, prompts, new)
    for name in teachers:
        pairs = list(zip(prompts, answers, negatives[name], strict=True))
        learn(agents[name], folder / "trl", pairs, dtype, batch)
