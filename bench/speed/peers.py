"""Both sides of the training benchmarks: this project's step and TRL's, on one random model.

python -m bench.speed.peers FOLDER SHAPE        writes such a folder
"""

import itertools
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.speed.timing import SHAPES, bf16_hardware, read_words
from minmacpo.config.schema import Lora
from minmacpo.config.validate import parse_model_size
from minmacpo.core.batching import CPU_TOKENS, group_by_token_budget
from minmacpo.core.checkpoint import load_adapter, load_model, save_adapter, save_model
from minmacpo.core.lora import (
    attach_lora,
    disable_adapter,
    get_adapter_weights,
    init_adapter,
    lora_params,
    set_adapter_weights,
)
from minmacpo.core.losses import PreferenceLoss
from minmacpo.core.model import Transformer, new_model
from minmacpo.core.model_config import ModelConfig
from minmacpo.core.scoring import score
from minmacpo.core.sft_loss import SFTLoss
from minmacpo.core.trainer import TrainExample, train_step
from minmacpo.data.tokenizer import Tokens

VOCAB = 32_000
LORA = Lora()  # rank 8 on q and v
BETA = 0.1
LR = 1e-5
SCORING_TOKENS = 16384  # tokens of a forward pass
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ANSWERS = {"dpo": ("chosen", "rejected"), "sft": ("completion",)}  # of a row, by kind of step

Row = dict[str, list[int]]  # prompt and answers, as ids; answers end with the end token 2
Step = Callable[[], float]  # one optimiser step; it returns the loss before it


# ---- model and rows -------------------------------------------------------------------------


def usual_dtypes() -> list[str]:
    """fp32, and bf16 where the machine multiplies it."""
    return ["fp32", "bf16"] if bf16_hardware() else ["fp32"]


def read_dtypes() -> list[str]:
    """The dtypes that the command line names, the usual ones without any."""
    return read_words(DTYPES) or usual_dtypes()


def config_of(shape: Sequence[int], positions: int = 2048) -> ModelConfig:
    """The ModelConfig of a shape: width, layers, heads, key heads, width of the MLP, vocabulary."""
    width, layers, heads, key_heads, mlp, vocab = shape
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=width // heads,
        max_position_embeddings=positions,
    )


def random_ids(rng: random.Random, count: int, vocab: int) -> list[int]:
    """So many ids, none of them of the three special tokens."""
    return [rng.randrange(3, vocab) for _ in range(count)]


def make_folder(folder: Path, size: str, seed: int = 0) -> None:
    """Write folder/base, random weights, and folder/adapter, whose B is not zero."""
    width, layers, heads, mlp = parse_model_size(SHAPES[size])
    config = config_of((width, layers, heads, heads, mlp, VOCAB))
    model = new_model(config, seed)
    for name in ("base", "adapter"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    save_model(folder / "base", config, model.state_dict(), b"")
    random_slot(model, seed)
    save_adapter(folder / "adapter", get_adapter_weights(model), LORA, str(folder / "base"))


def random_slot(model: Transformer, seed: int = 0) -> list[torch.nn.Parameter]:
    """The parameters of a new adapter of rank 8 on q and v whose B is not zero."""
    params = attach_lora(model, LORA)
    init_adapter(model, seed)
    for name, tensor in lora_params(model).items():
        if name.endswith("lora_B.weight"):
            generator = torch.Generator(tensor.device).manual_seed(seed)
            torch.nn.init.normal_(tensor, std=0.02, generator=generator)
    return params


def make_rows(
    count: int, prompt: int, answer: int, names: tuple[str, ...], seed: int = 0
) -> list[Row]:
    """`count` prompts of so many tokens, an answer of so many under each of `names`."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        row = {"prompt": random_ids(rng, prompt, VOCAB)}
        for name in names:
            row[name] = [*random_ids(rng, answer - 1, VOCAB), 2]
        rows.append(row)
    return rows


def joined(row: Row, name: str) -> Tokens:
    """Prompt and answer, of which the answer is trained on."""
    prompt = row["prompt"]
    answer = row[name]
    return Tokens(prompt + answer, [False] * len(prompt) + [True] * len(answer))


# ---- this project ---------------------------------------------------------------------------


def own_model(folder: Path, dtype: str) -> tuple[Transformer, list[torch.nn.Parameter]]:
    """(Model with the adapter of the folder, the adapter's parameters)."""
    model = load_model(folder / "base", dtype=DTYPES[dtype])
    params = attach_lora(model, LORA)
    set_adapter_weights(model, load_adapter(folder / "adapter"))
    return model, params


def own_step(
    folder: Path, rows: list[Row], dtype: str, kind: str = "dpo", store: bool = True
) -> tuple[Step, float]:
    """(One optimiser step of this project, the loss before it).

    Args:
        kind: "dpo" or "sft".
        store: the reference is computed before, once, as stages do; else anew in every step.
    """
    model, params = own_model(folder, dtype)
    texts = []
    for row in rows:
        texts.append(tuple(joined(row, name) for name in ANSWERS[kind]))

    def examples_with_reference() -> list[TrainExample]:
        adapter = get_adapter_weights(model)
        disable_adapter(model)
        flat = list(itertools.chain.from_iterable(texts))
        logps = score(model, flat, SCORING_TOKENS, packed=True, log=lambda line: None)
        set_adapter_weights(model, adapter)
        examples = []
        for i, answers in enumerate(texts):
            references = (logps[2 * i], logps[2 * i + 1])
            examples.append(TrainExample(str(i), answers, references))
        return examples

    if kind == "dpo":
        loss = PreferenceLoss(BETA, 0.0)
        stored = examples_with_reference()
    else:
        loss = SFTLoss()
        stored = [TrainExample(str(i), answers) for i, answers in enumerate(texts)]

    # Micro-batches as a stage plans them
    lengths = [len(answers[0].ids) for answers in texts]
    budget = CPU_TOKENS // len(ANSWERS[kind])
    groups = group_by_token_budget(range(len(rows)), lengths, budget)
    optimizer = torch.optim.AdamW(params, LR, weight_decay=0.0, fused=True)

    def step() -> float:
        examples = stored
        if kind == "dpo" and not store:
            examples = examples_with_reference()
        metrics = train_step(model, params, examples, groups, loss, optimizer, packed=kind == "dpo")
        return metrics["loss"].item()

    first_loss = step()
    set_adapter_weights(model, load_adapter(folder / "adapter"))
    return step, first_loss


# ---- TRL ------------------------------------------------------------------------------------


def word_tokenizer():
    """A tokenizer of transformers whose words are the ids: "w5" is 5."""
    import tokenizers
    import transformers

    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2}
    for i in range(3, VOCAB):
        vocab[f"w{i}"] = i
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>"
    )


def as_words(ids: list[int]) -> str:
    """The text of ids for `word_tokenizer`; TRL adds the end token itself."""
    return "".join(f" w{i}" for i in ids if i != 2)


def words_of_row(row: Row) -> dict[str, str]:
    """A row as TRL reads it."""
    return {name: as_words(ids) for name, ids in row.items()}


def load_base(folder: Path, dtype: str):
    """The folder's base as transformers loads it."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=DTYPES[dtype])


def load_with_adapter(folder: Path, dtype: str, trainable: bool = False):
    """The folder's base with its adapter, as PEFT loads it."""
    import peft

    base = load_base(folder, dtype)
    return peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=trainable)


def trl_trainer(model, rows: list[Row], folder: Path, kind: str, settings: dict):
    """TRL's trainer as its documentation sets it up with PEFT: a base, and a LoraConfig.

    Args:
        model: the base, of transformers.
        folder: where the trainer may write.
        settings: of its configuration, beside the usual ones.
    """
    import datasets
    import peft
    import trl

    texts = [words_of_row(row) for row in rows]
    if kind == "dpo":
        config_class, trainer_class = trl.DPOConfig, trl.DPOTrainer
        settings = {"beta": BETA} | settings
    else:
        config_class, trainer_class = trl.SFTConfig, trl.SFTTrainer
        settings = {"completion_only_loss": True} | settings

    arguments = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        learning_rate=LR,
        weight_decay=0.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        max_length=None,
        **settings,
    )
    lora = peft.LoraConfig(
        r=LORA.r, lora_alpha=LORA.alpha, target_modules=list(LORA.targets), task_type="CAUSAL_LM"
    )
    return trainer_class(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=word_tokenizer(),
        peft_config=lora,
    )


def trl_step(
    folder: Path, rows: list[Row], dtype: str, kind: str = "dpo", **settings
) -> tuple[Step, float]:
    """(One optimiser step of TRL, the loss before it): forward, backward, clip, AdamW."""
    settings["bf16"] = dtype == "bf16"
    base = load_base(folder, dtype)
    trainer = trl_trainer(base, rows, folder / "trl", kind, settings)
    step = step_of(trainer, load_adapter(folder / "adapter"))
    return step, step()


def step_of(trainer, adapter: dict[str, torch.Tensor]) -> Step:
    """One optimiser step of a TRL trainer on its first batch, from the adapter (PEFT's names)."""
    trainer.train()  # one step, after which model and optimiser are prepared
    model = trainer.model_wrapped
    optimizer = trainer.optimizer
    batch = next(iter(trainer.get_train_dataloader()))
    params = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter.items():
            params[name.replace(".weight", ".default.weight")].copy_(tensor)
    model.train()

    def step() -> float:
        loss = trainer.training_step(model, dict(batch))
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    make_folder(Path(sys.argv[1]), sys.argv[2])
    print("{}")
