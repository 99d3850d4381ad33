"""Every setting of minmacpo on one page, and the checks that a combination of them can work.

The defaults are the values of the released MACPO scripts where those state one; presets/*.toml
change what another task needs and say why. commandline.py turns flags and files into a `Config`.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal

from minmacpo import UserError


def setting(default, help: str):
    """A dataclass field whose `help` is its line in `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class Run:
    method: Literal["macpo"] = setting("macpo", "what to run (--method is short for it)")
    name: str | None = setting(None, "run folder; none: preset plus every setting that differs")
    root: str = setting("runs", "folder that holds all runs; they share finished stages")
    seed: int = setting(0, "every random number is derived from it")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of base weights and matmuls; auto: float32 on cpu, bfloat16 on cuda"
    )
    threads: int = setting(1, "CPU threads of torch; 0: torch's own choice")
    compile: Literal["auto", "true", "false"] = setting(
        "auto", "torch.compile the loss chunk; auto: on cuda only, where it pays"
    )
    micro_tokens: int = setting(16384, "most tokens, padding included, in one forward pass")
    save_every: int = setting(50, "optimiser steps between two saved training states")
    log_every: int = setting(5, "optimiser steps between two lines of metrics")


@dataclass(frozen=True, slots=True)
class Data:
    path: str | None = setting(None, "HH-RLHF file or folder; none: the built-in world")
    template: Literal["plain", "turns"] = setting(
        "plain", "plain: Human:/Assistant: as in the files; turns: one token per role"
    )
    shares: tuple[float, ...] = setting(
        (0.5, 0.15, 0.25, 0.1), "of first turns: D0 (pre-training text), D1, D2, test"
    )
    max_prompt: int = setting(768, "tokens; longer prompts: see data.long")
    max_length: int = setting(1024, "tokens of prompt and answer together")
    long: Literal["drop", "cut_prompt"] = setting(
        "drop", "over-long rows: drop, or cut the prompt from the left; both are counted"
    )
    max_examples: int | None = setting(None, "use at most so many rows, for a quick look")


@dataclass(frozen=True, slots=True)
class World:
    names: int = setting(20, "people of the town")
    held_names: int = setting(4, "of them, people who occur in test prompts only")
    verbs: int = setting(8, "ways to harm somebody (at most 8)")
    expert_share: float = setting(0.45, "share of the web text that experts write")
    expert_right: float = setting(0.9, "how often an expert tells the truth (a gossip: 1 - this)")
    known: float = setting(0.5, "share of the items that a weak teacher's text tells truly")
    misconception: float = setting(0.95, "how often an unknown item is told its own wrong way")
    harm_share: float = setting(0.25, "share of prompts that ask how to harm somebody")
    d1: int = setting(149, "ground-truth pairs for the teachers")
    d2: int = setting(480, "prompts without ground truth, for all later training")
    test: int = setting(320, "held-out prompts, a quarter of them about held names")


@dataclass(frozen=True, slots=True)
class Model:
    student: str | None = setting(None, "HF folder of the strong base; none: made here")
    teachers: tuple[str, ...] = setting((), "HF folders of the weak bases; empty: made here")
    vocab: int = setting(656, "pieces of the tokenizer made here (256 of them are bytes)")
    context: int = setting(2048, "positions of the bases made here")
    strong: str = setting("192x4x6x512", "strong base made here: width x layers x heads x mlp")
    weak: tuple[str, ...] = setting(("96x3x3x256",), "the weak ones, repeated as needed")


@dataclass(frozen=True, slots=True)
class Pretrain:
    strong_steps: int = setting(350, "optimiser steps of the strong base")
    weak_steps: int = setting(350, "optimiser steps of each weak base")
    strong_lr: float = setting(2e-3, "peak learning rate of the strong base, cosine to a tenth")
    weak_lr: float = setting(3e-3, "peak learning rate of the weak bases, cosine to a tenth")
    batch: int = setting(32, "documents per step")
    weak_share: float = setting(0.5, "share of D0 that each weak base reads (real data)")


@dataclass(frozen=True, slots=True)
class Lora:
    r: int = setting(8, "rank")
    alpha: float = setting(16, "scale is alpha / r")
    targets: tuple[str, ...] = setting(("q_proj", "v_proj"), "linear layers that get a slot")


@dataclass(frozen=True, slots=True)
class Sft:
    batch: int = setting(32, "answers per step")
    teacher_lr: float = setting(5e-5, "positive teachers, on D1's chosen answers")
    teacher_epochs: int = setting(3, "of the positive teachers")
    teacher_negative_lr: float = setting(5e-5, "negative teachers, on D1's rejected answers")
    teacher_negative_epochs: int = setting(1, "of the negative teachers")
    student_lr: float = setting(5e-5, "positive student, on teacher 1's labels; also the ceiling")
    student_epochs: int = setting(3, "of the positive student and the ceiling")
    student_negative_lr: float = setting(5e-5, "negative student, on negative teacher 1's answers")
    student_negative_epochs: int = setting(1, "of the negative student")


@dataclass(frozen=True, slots=True)
class Dpo:
    batch: int = setting(16, "pairs per step")
    epochs: int = setting(1, "per round")
    student_lr: float = setting(1e-5, "of the student in a round")
    teacher_lr: float = setting(1e-5, "of the teachers in a round")
    beta: float = setting(0.1, "strength of the preference term")
    gamma: float = setting(0.2, "weight of the SFT term on the chosen answer")
    label_smoothing: float = setting(0.0, "assumed share of flipped preferences, below 0.5")
    reference: Literal["base", "init", "previous"] = setting(
        "base", "base: adapter off (as released); init: round 0; previous: the last round"
    )


@dataclass(frozen=True, slots=True)
class Generate:
    temperature: float = setting(0.95, "0: greedy")
    top_k: int = setting(50, "0: off")
    top_p: float = setting(0.7, "1: off")
    max_new: int = setting(512, "most new tokens of an answer, end token included")
    batch: int = setting(64, "answers sampled side by side; a killed run redoes one such block")


@dataclass(frozen=True, slots=True)
class Macpo:
    teachers: int = setting(3, "K, the number of weak teachers")
    rounds: int = setting(3, "R")
    mutual: bool = setting(True, "positives come from the other side; false: -MP")
    hard_negatives: bool = setting(True, "DPO against negatives; false: -HN, SFT term only")
    update_teachers: bool = setting(True, "teachers learn from the student; false: -IW")
    select: Literal["perplexity", "random"] = setting(
        "perplexity", "which teacher's answer the student keeps per prompt"
    )
    refresh_negatives: bool = setting(False, "negative agents trained and sampled every round")
    controls: bool = setting(True, "also train naive SFT continued and the ceiling")


@dataclass(frozen=True, slots=True)
class Eval:
    samples: int = setting(2, "sampled answers per test prompt")
    bootstrap: int = setting(1000, "resamples of the prompts for the intervals")


@dataclass(frozen=True, slots=True)
class Config:
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
    eval: Eval = Eval()


def flatten(config: Config) -> dict[str, object]:
    """{"section.key": value} of every setting, in the order of this page."""
    return {f"{s}.{k}": v for s, keys in asdict(config).items() for k, v in keys.items()}


def toml_value(value) -> str:
    """One TOML value; None is written as "none"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, int | float):
        return repr(value)
    text = "none" if value is None else value
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# ---- checks ------------------------------------------------------------------------


def shape(text: str) -> tuple[int, int, int, int]:
    """(width, layers, heads, mlp) of a "192x4x6x512"; UserError if it is none."""
    parts = text.split("x")
    if len(parts) != 4 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise UserError(f"{text!r}: expected a shape such as 192x4x6x512 (width x layers x heads x mlp)")
    width, layers, heads, mlp = map(int, parts)
    if width % heads or width // heads % 2:
        raise UserError(f"{text!r}: width / heads must be an even whole number")
    return width, layers, heads, mlp


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOST = {"macpo.teachers": 100, "macpo.rounds": 1000, "run.threads": 1024, "model.vocab": 1_000_000}
AT_LEAST_1 = (
    "r batch teachers micro_tokens save_every log_every max_new max_prompt samples bootstrap context d1 d2 test"
    " names verbs max_examples"
).split()
SHARES = "expert_share expert_right known misconception harm_share".split()


def single_rule(name: str, value) -> str | None:
    """What the setting called `name` must be, if `value` is not that."""
    if name in AT_LEAST_1 and isinstance(value, int) and value < 1:
        return "at least 1"
    if (name.endswith(("lr", "beta", "alpha")) and value <= 0) or (name == "top_p" and not 0 < value <= 1):
        return "above 0" + (" and at most 1" if name == "top_p" else "")
    if name.endswith(("epochs", "steps", "rounds", "gamma", "top_k", "temperature", "threads")) and value < 0:
        return "not negative"
    if name in SHARES and not 0 <= value <= 1:
        return "between 0 and 1"
    return None


def check(config: Config) -> None:
    """Raise UserError for the first setting, or combination of settings, that cannot work."""
    flat = flatten(config)
    data, model, town, shares = config.data, config.model, config.world, config.data.shares
    longest = max(data.max_prompt + config.generate.max_new, data.max_length)
    rules = [(rule is None, key, rule) for key, value in flat.items() for rule in [single_rule(key.split(".")[1], value)]]
    rules += [(flat[key] <= most, key, f"at most {most}") for key, most in MOST.items()]
    rules += [
        (0 <= config.dpo.label_smoothing < 0.5, "dpo.label_smoothing", "at least 0 and below 0.5"),
        (0 < config.pretrain.weak_share <= 1, "pretrain.weak_share", "above 0 and at most 1"),
        (town.verbs <= 8, "world.verbs", "at most 8"),
        (0 <= town.held_names < town.names <= 480, "world.names", "above world.held_names and at most 480"),
        (len(shares) == 4 and shares[0] >= 0 and min(shares[1:]) > 0 and sum(shares) <= 1.000001, "data.shares",
         "four shares (D0, D1, D2, test) that sum to at most 1, the last three above 0"),
        (config.lora.targets and set(config.lora.targets) <= set(LINEARS), "lora.targets", f"some of {', '.join(LINEARS)}"),
        (not model.teachers or len(model.teachers) >= config.macpo.teachers, "model.teachers",
         f"at least macpo.teachers = {config.macpo.teachers} folders"),
        (data.max_prompt < data.max_length, "data.max_prompt", f"below data.max_length = {data.max_length}"),
        ((model.student and model.teachers) or longest <= model.context, "model.context",
         f"at least {longest}: the larger of data.max_length and data.max_prompt + generate.max_new"),
        (not set("/\\\0\n") & set(config.run.name or "") and config.run.name not in (".", ".."), "run.name",
         "a plain folder name"),
    ]  # fmt: skip
    for holds, key, wanted in rules:
        if not holds:
            raise UserError(f"{key} = {toml_value(flat[key])} must be {wanted}")
    for text in (model.strong, *model.weak):
        shape(text)
