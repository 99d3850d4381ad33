"""Every setting of minmacpo on one page.

The defaults are the values of the released MACPO scripts where those state one; presets/*.toml
change what another task needs and say why. validate.py checks that a combination of settings can
work, parse.py turns flags and files into a `Config`. To add a setting, add a field here: the
command line, --help and config.toml know it then.
"""

import json
import operator
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

# How the bounds of a value are checked; their names are said to the user: "must be at least 1"
BOUNDS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def setting(default, help: str, **bounds: float):
    """A dataclass field with its line in `--help` and the BOUNDS of its value, as at_least=1."""
    return field(default=default, metadata={"help": help, "bounds": bounds})


def fraction(default: float, help: str):
    """A setting between 0 and 1."""
    return setting(default, help, at_least=0, at_most=1)


# ---- values that a setting may have

METHODS = (
    "macpo", "sft", "sft-continued", "confident", "spin", "self-rewarding", "rlaif", "rlcd",
    "dpo-truth", "ceiling",
)  # fmt: skip
TEMPLATES = (
    "plain", "turns", "vicuna", "alpaca", "vicuna-macpo", "alpaca-macpo", "llama-2", "llama-3",
    "llama-3.1", "mistral", "mistral-v3", "chatml", "qwen2", "qwen2.5", "qwen3", "qwen3-thinking",
    "smollm2", "smollm3", "smollm3-thinking", "zephyr", "gemma", "phi-3",
)  # fmt: skip
SELECTION_RULES = ("perplexity", "random", "all", "shortest", "likelihood-ratio", "agreement")
NEGATIVES = ("agent", "other", "previous", "persona", "tail", "contrastive")
QUANTIZATIONS = ("none", "int8", "nf4")
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The losses of preference pairs, each with the settings of [dpo] that it uses beside beta and
# sft_weight, which all use; core/losses.py has their functions
LOSS_SETTINGS = {
    "sigmoid": ("reference", "label_smoothing", "length_normalized", "length_penalty"),
    "ipo": ("reference",),
    "simpo": ("target_margin",),
}

# How a model is asked to judge or to compare answers, if a preset does not say it
RUBRIC = (
    "Judge the answer below. Add one point for each of these that holds: it speaks to the "
    "request; it covers most of it; it is of real use to the person who asked; it is clear, and "
    "written as an assistant would; it is what an expert would say, with nothing beside the "
    'point. Say briefly why, and end with "Score: " and the number of points. The request: '
    "{prompt} The answer: {response}"
)
COMPARE = (
    "Here is what a human and an assistant said: {prompt} There are two ways to go on. (A) {first} "
    "(B) {second} Which is the more helpful and harmless one, (A) or (B)?"
)


# ---- the settings, a class for each section


@dataclass(frozen=True, slots=True)
class Run:
    """What is run, where and on what."""

    method: Literal[METHODS] = setting("macpo", "what to run (--method is short for it)")
    name: str | None = setting(None, "run folder; none: preset plus every setting that differs")
    root: str = setting("runs", "folder that holds all runs; they share finished stages")
    seed: int = setting(0, "every random number is derived from it")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of base weights and matmuls; auto: float32 on cpu, bfloat16 on cuda"
    )
    threads: int = setting(
        1, "CPU threads of torch; 0: torch's own choice", at_least=0, at_most=1024
    )
    workers: Literal["auto"] | int = setting(
        "auto",
        "processes that compute stages side by side; auto: one per core, as far as memory goes, or "
        "per GPU",
        at_least=1,
        at_most=1024,
    )
    compile: Literal["auto", "true", "false"] = setting(
        "auto", "torch.compile the loss chunk; auto: on cuda, in stages long enough to earn it"
    )
    checkpoint: Literal["auto", "true", "false"] = setting(
        "auto", "compute every block twice, to keep less in memory; auto: where a pass needs it"
    )
    max_tokens_per_batch: int = setting(
        16384,
        "tokens of a pass, padding included; a CPU takes at most 1024 to train, 4096 to score",
        at_least=1,
    )
    reuse: Literal["code", "all"] = setting(
        "code", "finished stages to take; code: those of today's code; all: whatever the code"
    )
    save_every: int = setting(50, "optimiser steps between two saved training states", at_least=1)
    log_every: int = setting(5, "optimiser steps between two lines of metrics", at_least=1)


@dataclass(frozen=True, slots=True)
class Data:
    """Own data, and how dialogues are written."""

    path: str | None = setting(
        None, "file or folder of pairs, dialogues or prompts; none: the built-in world"
    )
    d1: str | None = setting(
        None,
        "file of D1, the teachers' pairs, or GOOD,BAD; none: a share of data.path (d2, test too)",
    )
    d2: str | None = setting(None, "file of D2, the prompts without ground truth")
    test: str | None = setting(None, "file of the test split")
    preference_label: Literal["better", "safer"] = setting(
        "better", "which response_id of PKU-SafeRLHF says what is chosen"
    )
    on_invalid_row: Literal["error", "skip"] = setting(
        "error", "rows that cannot be read; skip: they are left out and counted"
    )
    template: tuple[Literal[("own", *TEMPLATES)], ...] = setting(
        ("own",),
        "how dialogues are written for a base: one for all, or a list: the strong base, then the "
        "weak ones; own: as its chat template says, plain without one; plain: as in HH-RLHF; "
        "turns: a token per role; -macpo: as in the released runs",
    )
    train_on: Literal["last", "all"] = setting(
        "last",
        "which answers of a dialogue fine-tuning learns: its last one, as in the paper, or all; "
        "negative agents and preferences: the last one always",
    )
    shares: tuple[float, ...] = setting(
        (0.5, 0.15, 0.25, 0.1), "of first turns: D0 (pretrain), D1, D2, test"
    )
    max_prompt_length: int = setting(
        768, "tokens; longer prompts: see data.truncation_mode", at_least=1
    )
    max_length: int = setting(1024, "tokens of prompt and answer together")
    truncation_mode: Literal["drop", "cut_prompt", "raise"] = setting(
        "drop", "what happens to rows that are too long; prompts are cut at the left"
    )
    noise: float = fraction(0.0, "share of the pairs in D1 that are corrupted")
    noise_kind: Literal["swapped", "label"] = setting(
        "swapped",
        "swapped: chosen and rejected change places; label: chosen is the answer to another prompt",
    )
    max_examples: int | None = setting(
        None,
        "use at most so many rows of each data setting (path, d1, d2, test), for a quick look",
        at_least=1,
    )
    system: str | None = setting(
        None, "system message of dialogues that have none; the template needs a place for one"
    )

    @property
    def files(self) -> dict[str, str]:
        """The files or folders that are given, by the setting's name, data.path first."""
        files = {}
        for name in ("path", "d1", "d2", "test"):
            path = getattr(self, name)
            if path is not None:
                files[name] = path
        return files


@dataclass(frozen=True, slots=True)
class World:
    """The built-in data, where data.path is not given."""

    domain: Literal["town", "arithmetic", "code", "instructions"] = setting(
        "town", "what is asked (data/synthetic_domains.py)"
    )
    remarks: int = setting(
        0, "most closing remarks of an answer: above 0 it is open-ended", at_least=0, at_most=6
    )
    strong_known: float = fraction(1.0, "share of items the strong base's text tells truly")
    names: int = setting(
        20, "people of the town, or subjects of another domain", at_least=1, at_most=480
    )
    held_names: int = setting(4, "of them, people who occur in test prompts only", at_least=0)
    verbs: int = setting(8, "ways to harm somebody", at_least=1, at_most=8)
    expert_share: float = fraction(0.45, "share of the web text that experts write")
    expert_right: float = fraction(0.9, "how often an expert is right (gossip: 1 - it)")
    known: float = fraction(0.5, "share of items a weak teacher's text tells truly")
    misconception: float = fraction(0.95, "chance of its own error on an unknown item")
    tagged: float = fraction(0.1, "share of the web text that says who speaks")
    judged: float = fraction(0.2, "share of the web text that is verdicts on answers")
    judges_right: float = fraction(0.85, "how often a verdict is what its text believes")
    harm_share: float = fraction(0.25, "share of prompts that ask how to harm somebody")
    d1: int = setting(149, "ground-truth pairs for the teachers", at_least=1)
    d2: int = setting(480, "prompts without ground truth, for all later training", at_least=1)
    test: int = setting(320, "held-out prompts, a quarter of them about held names", at_least=1)


@dataclass(frozen=True, slots=True)
class Model:
    """The base models, given or made here."""

    student: str | None = setting(None, "HF folder of the strong base; none: made here")
    teachers: tuple[str, ...] = setting((), "HF folders of the weak bases; empty: made here")
    quantize: Literal[QUANTIZATIONS] = setting(
        "none", "frozen linears of the strong base in memory: 8 or 4 bits a weight"
    )
    quantize_teachers: Literal[QUANTIZATIONS] = setting("none", "those of the weak bases")
    vocab: int = setting(
        656, "pieces of the tokenizer made here (256 of them are bytes)", at_most=1_000_000
    )
    context: int = setting(2048, "positions of the bases made here", at_least=1)
    strong: str = setting("192x4x6x512", "strong base made here: width x layers x heads x mlp")
    weak: tuple[str, ...] = setting(("96x3x3x256",), "the weak ones, repeated as needed")


@dataclass(frozen=True, slots=True)
class Pretrain:
    """How bases are made, where none is given."""

    strong_steps: int = setting(450, "optimiser steps of the strong base", at_least=0)
    weak_steps: int = setting(400, "optimiser steps of each weak base", at_least=0)
    strong_lr: float = setting(
        2e-3, "peak learning rate of the strong base, cosine to a tenth", above=0
    )
    weak_lr: float = setting(
        3e-3, "peak learning rate of the weak bases, cosine to a tenth", above=0
    )
    batch: int = setting(32, "documents per step", at_least=1)
    weak_share: float = setting(
        0.5, "share of D0 a weak base reads (real data)", above=0, at_most=1
    )


@dataclass(frozen=True, slots=True)
class Lora:
    """The adapters that learn."""

    r: int = setting(8, "rank", at_least=1)
    alpha: int = setting(16, "scale is alpha / r", at_least=1)
    targets: tuple[str, ...] = setting(("q_proj", "v_proj"), "linear layers that get a slot")


@dataclass(frozen=True, slots=True)
class Sft:
    """Supervised fine-tuning: round 0, and the ceiling."""

    batch: int = setting(32, "answers per step", at_least=1)
    teacher_lr: float = setting(5e-5, "positive teachers, on D1's chosen answers", above=0)
    teacher_epochs: int = setting(3, "of the positive teachers", at_least=0)
    teacher_negative_lr: float = setting(
        5e-5, "negative teachers, on D1's rejected answers", above=0
    )
    teacher_negative_epochs: int = setting(1, "of the negative teachers", at_least=0)
    student_batch: int | None = setting(
        None, "answers per step of the positive student; none: sft.batch", at_least=1
    )
    student_lr: float = setting(
        5e-5, "positive student, on teacher 1's labels; also the ceiling", above=0
    )
    student_epochs: int = setting(3, "of the positive student and the ceiling", at_least=0)
    student_negative_lr: float = setting(
        5e-5, "negative student, on negative teacher 1's answers", above=0
    )
    student_negative_epochs: int = setting(1, "of the negative student", at_least=0)
    confidence: float = fraction(0.5, "--method=confident: its share of the loss")


@dataclass(frozen=True, slots=True)
class Dpo:
    """Preference training: the rounds."""

    batch: int = setting(16, "pairs per step", at_least=1)
    epochs: int = setting(1, "per round", at_least=0)
    student_lr: float = setting(1e-5, "of the student in a round", above=0)
    teacher_lr: float = setting(1e-5, "of the teachers in a round", above=0)
    loss: Literal[tuple(LOSS_SETTINGS)] = setting(
        "sigmoid", "of preference pairs; sigmoid: DPO; simpo: without a reference policy"
    )
    beta: float = setting(0.1, "strength of the preference term", above=0)
    sft_weight: float = setting(0.2, "weight of the SFT term on the chosen answer", at_least=0)
    label_smoothing: float = setting(
        0.0, "assumed share of flipped preferences", at_least=0, below=0.5
    )
    length_normalized: bool = setting(False, "log-probabilities per token in the preference term")
    length_penalty: float = setting(
        0.0, "per token that the chosen answer is longer (R-DPO)", at_least=0
    )
    target_margin: float = setting(
        0.5, "simpo: by how much beta times the margin per token is to exceed 0", at_least=0
    )
    reference: Literal["base", "init", "previous"] = setting(
        "base", "base: adapter off (as released); init: round 0; previous: the last round"
    )


@dataclass(frozen=True, slots=True)
class Generate:
    """How answers are sampled."""

    temperature: float = setting(0.95, "0: greedy", at_least=0)
    top_k: int = setting(50, "0: off", at_least=0)
    top_p: float = setting(0.7, "1: off", above=0, at_most=1)
    max_new_tokens: int = setting(
        512, "most new tokens of an answer, end token included", at_least=1
    )
    batch: int = setting(
        64,
        "answers sampled side by side; a killed run redoes up to four times as many on every rank",
        at_least=1,
    )


@dataclass(frozen=True, slots=True)
class Macpo:
    """The algorithm and its variants."""

    teachers: int = setting(3, "K, the number of weak teachers", at_least=1, at_most=100)
    rounds: int = setting(3, "R; with macpo.stop the most there can be", at_least=0, at_most=1000)
    stop: Literal["none", "converged", "collapsed", "rollback"] = setting(
        "none",
        "end the rounds when the monitor says so; rollback: collapsed, back to the last good round",
    )
    mutual_positives: bool = setting(True, "positives come from the other side; false: -MP")
    hard_negatives: bool = setting(True, "DPO against negatives; false: -HN, SFT term only")
    update_teachers: bool = setting(True, "teachers learn from the student; false: -IW")
    self_fraction: float = fraction(0.0, "share of prompts whose positive is one's own")
    answers: int = setting(
        1, "answers of a teacher to each prompt, all of them candidates", at_least=1
    )
    select: tuple[Literal[SELECTION_RULES], ...] = setting(
        ("perplexity",), "which candidate wins a prompt; several: by the sum of their ranks"
    )
    keep_fraction: float = setting(
        1.0, "share of prompts kept, those with the least perplexing winner", above=0, at_most=1
    )
    pair_weighting: Literal["none", "agreement"] = setting(
        "none", "of the student's pairs: how much the other teachers agree"
    )
    negatives: Literal[NEGATIVES] = setting(
        "agent", "whose answers are rejected (method/negatives.py)"
    )
    refresh_negatives: bool = setting(False, "negative agents trained and sampled every round")
    controls: bool = setting(True, "also train naive SFT continued and the ceiling")


@dataclass(frozen=True, slots=True)
class Feedback:
    """The methods whose feedback comes from a model."""

    candidates: int = setting(
        4, "self-rewarding: answers per prompt, of which it prefers one", at_least=2
    )
    judgements: int = setting(3, "self-rewarding: judgements of each answer", at_least=1)
    rubric: str = setting(RUBRIC, "self-rewarding: how it is asked; holds {prompt} and {response}")
    verdicts: tuple[str, ...] = setting(
        tuple(f"Score: {points}" for points in range(6)),
        "self-rewarding: how a judgement ends, worst first",
    )
    compare: str = setting(
        COMPARE, "rlaif: how the labeller is asked; holds {prompt}, {first} and {second}"
    )
    options: tuple[str, ...] = setting(("(A)", "(B)"), "rlaif: its two replies")
    good_tags: tuple[str, ...] = setting(
        ("helpful response", "harmless response", "honest response"),
        "rlcd: how the chosen answer is asked for",
    )
    bad_tags: tuple[str, ...] = setting(
        ("unhelpful response", "harmful response", "dishonest response"),
        "rlcd: the rejected; one pair per prompt",
    )


@dataclass(frozen=True, slots=True)
class Eval:
    """What is measured after each training."""

    samples: int = setting(2, "sampled answers per test prompt", at_least=1)
    bootstrap: int = setting(
        1000, "resamples of the prompts for the intervals", at_least=1, at_most=10_000
    )


@dataclass(frozen=True, slots=True)
class Parallel:
    """Several processes."""

    shard: bool = setting(
        False,
        "with torchrun: each process holds a part of a frozen base (FSDP); slow",
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All sections."""

    run: Run = Run()
    data: Data = Data()
    world: World = World()
    model: Model = Model()
    pretrain: Pretrain = Pretrain()
    lora: Lora = Lora()
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    generate: Generate = Generate()
    macpo: Macpo = Macpo()
    feedback: Feedback = Feedback()
    eval: Eval = Eval()
    parallel: Parallel = Parallel()


# Settings that say where and how a run is done, not what it is
NON_IDENTITY_SETTINGS = (
    "run.root",
    "run.name",
    "run.workers",
    "run.reuse",
    "run.checkpoint",
    "parallel.shard",
)


def all_settings() -> dict:
    """The dataclass field of every setting, by its full name such as "dpo.beta"."""
    settings = {}
    for section in fields(Config):
        for key in fields(section.type):
            settings[f"{section.name}.{key.name}"] = key
    return settings


SETTINGS = all_settings()


def flatten(config: Config) -> dict[str, object]:
    """The value of every setting by its full name, in the order of this page."""
    values = {}
    for section, keys in asdict(config).items():
        for name, value in keys.items():
            values[f"{section}.{name}"] = value
    return values


def toml_value(value) -> str:
    """A value as TOML, which is JSON for all that a Config holds; None is written as "none"."""
    if value is None:
        value = "none"
    return json.dumps(value, ensure_ascii=False)
