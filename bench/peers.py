"""Both sides of the training benchmarks: one folder with a random base and adapter, this project's step and TRL's on it."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.measure import SHAPES
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
from minmacpo.core.losses import PreferenceLoss, SFTLoss
from minmacpo.core.model import Transformer, new_model
from minmacpo.core.model_config import ModelConfig
from minmacpo.core.scoring import score
from minmacpo.core.trainer import TrainExample, train_step
from minmacpo.data.tokenizer import Tokens

VOCAB, LORA, BETA, LR = 32_000, Lora(), 0.1, 1e-5  # LoRA: rank 8 on q and v
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Row = dict[str, list[int]]  # prompt and answers, as ids; answers end with the end token 2
Step = Callable[[], object]


def make_folder(place: Path, size: str, seed: int = 0) -> None:
    """place/base, an HF folder with random weights, and place/adapter, whose B is not zero."""
    width, layers, heads, mlp = parse_model_size(SHAPES[size])
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=2048,
    )
    model = new_model(config, seed)
    for name in ("base", "adapter"):
        (place / name).mkdir(parents=True, exist_ok=True)
    save_model(place / "base", config, model.state_dict(), b"")
    random_slot(model, seed)
    save_adapter(place / "adapter", get_adapter_weights(model), LORA, str(place / "base"))


def random_slot(model: Transformer, seed: int = 0) -> list[torch.nn.Parameter]:
    """The parameters of a new slot of rank 8 on q and v whose B is not zero."""
    params = attach_lora(model, LORA)
    init_adapter(model, seed)
    for key, tensor in lora_params(model).items():
        if key.endswith("lora_B.weight"):
            torch.nn.init.normal_(
                tensor, std=0.02, generator=torch.Generator(tensor.device).manual_seed(seed)
            )
    return params


def make_rows(
    count: int, prompt: int, answer: int, names: tuple[str, ...], seed: int = 0
) -> list[Row]:
    """`count` prompts of so many tokens, an answer of so many under each of `names`."""
    rng = random.Random(seed)

    def words(size: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(size)]

    return [
        {"prompt": words(prompt)} | {name: [*words(answer - 1), 2] for name in names}
        for _ in range(count)
    ]


def joined(row: Row, name: str) -> Tokens:
    """Prompt and answer, of which the answer is trained on."""
    return Tokens(row["prompt"] + row[name], [False] * len(row["prompt"]) + [True] * len(row[name]))


def own_model(place: Path, dtype: str):
    """(model with the adapter in its slot, the slot's parameters)."""
    model = load_model(place / "base", dtype=DTYPES[dtype])
    params = attach_lora(model, LORA)
    set_adapter_weights(model, load_adapter(place / "adapter"))
    return model, params


def own_step(
    place: Path, rows: list[Row], dtype: str, kind: str = "dpo", store: bool = True
) -> tuple[Step, float]:
    """(one optimiser step, the loss before it) of this project; `store`: the reference is computed before, once, as stages do."""
    model, params = own_model(place, dtype)
    names = ("chosen", "rejected") if kind == "dpo" else ("completion",)
    texts = [tuple(joined(row, name) for name in names) for row in rows]
    flat = [text for pair in texts for text in pair]

    def units() -> list[TrainExample]:
        adapter = get_adapter_weights(model)
        disable_adapter(model)
        refs = iter(score(model, flat, 16384, packed=True, log=lambda line: None))
        set_adapter_weights(model, adapter)
        return [
            TrainExample(str(i), pair, tuple(next(refs) for _ in pair))
            for i, pair in enumerate(texts)
        ]

    stored = (
        units() if kind == "dpo" else [TrainExample(str(i), pair) for i, pair in enumerate(texts)]
    )
    objective, packed = (PreferenceLoss(BETA, 0.0), True) if kind == "dpo" else (SFTLoss(), False)
    groups = group_by_token_budget(
        range(len(rows)), [len(pair[0].ids) for pair in texts], CPU_TOKENS // len(names)
    )  # as a stage plans them
    optimizer = torch.optim.AdamW(params, LR, weight_decay=0.0, fused=True)

    def step() -> float:
        used = stored if store or kind == "sft" else units()
        metrics = train_step(model, params, used, groups, objective, optimizer, packed=packed)
        return metrics["loss"].item()

    first = step()
    set_adapter_weights(model, load_adapter(place / "adapter"))
    return step, first


def word_tokenizer():
    """A tokenizer of transformers whose words are the ids: "w5" is 5."""
    import tokenizers
    import transformers

    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>"
    )


def trl_trainer(place: Path, rows: list[Row], dtype: str, kind: str, settings: dict):
    """TRL's trainer as its documentation sets it up with PEFT: a base, and a LoraConfig."""
    import datasets
    import peft
    import transformers
    import trl

    transformers.utils.logging.set_verbosity_error()
    texts = [
        {side: "".join(f" w{i}" for i in ids if i != 2) for side, ids in row.items()}
        for row in rows
    ]
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=DTYPES[dtype])
    config, trainer = (
        (trl.DPOConfig, trl.DPOTrainer) if kind == "dpo" else (trl.SFTConfig, trl.SFTTrainer)
    )
    settings = ({"beta": BETA} if kind == "dpo" else {"completion_only_loss": True}) | settings
    arguments = config(
        output_dir=str(place / "trl"),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        learning_rate=LR,
        weight_decay=0.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == "bf16",
        disable_tqdm=True,
        max_length=None,
        **settings,
    )
    lora = peft.LoraConfig(
        r=LORA.r, lora_alpha=LORA.alpha, target_modules=[*LORA.targets], task_type="CAUSAL_LM"
    )
    return trainer(
        base,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=word_tokenizer(),
        peft_config=lora,
    )


def trl_step(
    place: Path, rows: list[Row], dtype: str, kind: str = "dpo", **settings
) -> tuple[Step, float]:
    """(one optimiser step, the loss before it) of TRL: forward, backward, clip, AdamW, as in its loop."""
    trainer = trl_trainer(place, rows, dtype, kind, settings)
    step = step_of(trainer, load_adapter(place / "adapter"))
    return step, step()


def step_of(trainer, adapter: dict[str, torch.Tensor]) -> Step:
    """One optimiser step of a TRL trainer on its first batch, from the adapter (PEFT's keys); returns the loss before it."""
    trainer.train()  # one step, after which model and optimiser are prepared
    model, optimizer, batch = (
        trainer.model_wrapped,
        trainer.optimizer,
        next(iter(trainer.get_train_dataloader())),
    )
    params = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for key, tensor in adapter.items():
            params[key.replace(".weight", ".default.weight")].copy_(tensor)
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
