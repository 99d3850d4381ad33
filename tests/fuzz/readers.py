"""The readers that are fuzzed: good files of each, how these are changed, and what reads them."""

import gzip
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import mutations as m
import torch
from byte_pairs import STYLES, pre_tokenizer_json

from minmacpo.cli import batch_sampling as answers
from minmacpo.config import parse as commandline
from minmacpo.config.schema import Lora
from minmacpo.core.checkpoint import (
    load_adapter,
    load_model,
    load_state,
    read_adapter_config,
    save_adapter,
    save_state,
    save_weights,
    stop_ids,
)
from minmacpo.core.lora import attach_lora, get_adapter_weights, init_adapter, set_adapter_weights
from minmacpo.core.model import new_model
from minmacpo.core.model_config import parse_config
from minmacpo.data import chat_template, formats, own_template, tokenizer
from minmacpo.data.bpe import byte_letters
from minmacpo.data.records import Example, Message, Pair, Sample
from minmacpo.evaluation import experiments, judge, report, table
from minmacpo.evaluation import reward_model as reward
from minmacpo.evaluation.finished_run import read_run, verify_once
from minmacpo.evaluation.gold import mean_gold_by_prompt, right_fraction
from minmacpo.evaluation.judge import JudgeCommand
from minmacpo.evaluation.judge_sheet import AnswerPair, read_sheet, write_sheet
from minmacpo.evaluation.remote_judge import Reply
from minmacpo.pipeline.run_dir import check_folder, read_metrics
from minmacpo.pipeline.sample_stage import Request
from minmacpo.runtime.files import read_rows, write_json, write_rows
from minmacpo.runtime.seeds import derive_seed

JSON = (m.structured, m.structured, m.raw)
LINES = (m.lined, m.lined, m.raw)
TEXT = (m.worded, m.worded, m.lined, m.raw)


@dataclass(frozen=True, slots=True)
class Reader:
    """Something that reads files, with good files that it can read.

    Attributes:
        share: how many inputs of every hundred it gets.
        make: writes the good files into a folder.
        files: {pattern of names: the mutators that change such files}.
        read: reads the folder, and is told which file was changed.
    """

    name: str
    share: float
    make: Callable[[Path], None]
    files: dict[str, tuple[m.Mutator, ...]]
    read: Callable[[Path, str], object]


# ---- rows --------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "what is it ?"},
]
SAID = {"role": "assistant", "content": "a fox"}
SHARED = [{"from": "human", "value": "what is it ?"}]
HH = "\n\nHuman: who ?\n\nAssistant: me\n\nHuman: and ?\n\nAssistant: "
FORMS = {
    "strings": {"prompt": "what is it ?", "chosen": "a fox", "rejected": "a dog"},
    "implicit": {
        "chosen": [*TALK, SAID],
        "rejected": [*TALK, {"role": "assistant", "content": "no"}],
    },
    "explicit": {"prompt": TALK, "chosen": [SAID], "rejected": "no"},
    "hh": {"chosen": HH + "you", "rejected": HH + "no"},
    "pku": {
        "prompt": "how ?",
        "response_0": "so",
        "response_1": "not",
        "better_response_id": 1,
        "safer_response_id": 0,
        "is_response_0_safe": True,
        "is_response_1_safe": False,
    },
    "sharegpt": {"conversations": [*SHARED, {"from": "gpt", "value": "a fox"}]},
    "sharegpt pairs": {
        "conversations": SHARED,
        "chosen": {"from": "gpt", "value": "a fox"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "alpaca": {"instruction": "name it", "input": "in a word", "output": "a fox"},
    "macpo": {"instruction": "USER: name it", "input": "", "output": ["a fox", "no"]},
    "completion": {"prompt": TALK, "completion": "a fox"},
    "messages": {"messages": [*TALK, SAID]},
    "prompts": {"prompt": "what is it ?"},
    "marked": {"prompt": HH, "response": "you", "chosen": " you", "rejected": " no"},
    "columns": {
        "system_prompt": "be kind",
        "history": [["who ?", "me"]],
        "question": "what is it ?",
        "response": "a fox",
        "label": True,
        "tools": [],
        "id": 7,
    },
    "scored": {"prompt": "what is it ?", "responses": ["no", "a fox"], "scores": [1, 2.5]},
    "ranked": {
        "instruction": "what is it ?",
        "answers": [{"answer": "no", "rank": 2}, {"answer": "a fox", "rank": 1}],
    },
    "both": {
        "prompt": "what is it ?",
        "messages": [{**turn, "weight": 1} for turn in [*TALK, SAID]],
        "rejected_response": "no",
        "score_chosen": 2,
        "score_rejected": 1,
    },
}


def make_rows(form: str, folder: Path) -> None:
    """Four good rows as lines, as an array, and both packed."""
    rows = [json.loads(json.dumps(FORMS[form]).replace("it", f"it {i}")) for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, text in (
        ("x.jsonl", lines),
        ("x.json", json.dumps(rows, indent=1)),
        ("x.txt", "why ?\nwho is it ?\n\nhow ?\n"),
    ):
        (folder / name).write_text(text)
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def read_rows_of(folder: Path, name: str) -> None:
    """Every row as it would come to a tokenizer, and back on the disk.

    How they are read is drawn from the content, so that this alone repeats it.
    """
    rng = Random((folder / name).read_bytes())
    pairs, reports = formats.read_data(
        str(folder / name),
        preference_label=rng.choice(("better", "safer")),
        skip_invalid=rng.random() < 0.3,
        max_rows=rng.choice((None, 2)),
        plain_prompts="txt" in name,
    )
    json.dumps([asdict(pair) for pair in pairs], ensure_ascii=False).encode()
    "".join(map(str, reports.values())).encode()


ROWS = [
    Reader(
        form,
        1.5,
        partial(make_rows, form),
        {
            "x.jsonl": LINES,
            "x.json": JSON,
            "x.jsonl.gz": (m.zipped,),
            "x.json.gz": (m.zipped,),
            "x.txt": TEXT,
            "x.txt.gz": (m.zipped,),
        },
        read_rows_of,
    )
    for form in FORMS
]

# ---- models ------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 300,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
LONG = {"original_max_position_embeddings": 16, "factor": 4.0}
CONFIGS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama 3": {
        "rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | LONG,
        "eos_token_id": [2, 3],
    },
    "linear": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "rope_scaling": {
            "type": "yarn",
            "attention_factor": 1.1,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "mscale": 0.8,
            "mscale_all_dim": 0.3,
            "truncate": False,
        }
        | LONG,
    },
    "qwen3": {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}


def make_model(kind: str, folder: Path) -> None:
    """A model of a family with its weights in one file and in two, with an index."""
    raw = {"model_type": "llama"} | SIZES | CONFIGS[kind]
    write_json(folder / "config.json", raw)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 5]})
    config = parse_config(raw, kind)
    torch.manual_seed(0)  # of the biases
    save_weights(folder, config, new_model(config, 0).state_dict())
    read_model(
        folder, ""
    )  # torch imports a part of itself when it is first used: not in every child


def make_sharded(folder: Path) -> None:
    """As `make_model`, in three files with their index."""
    make_model("llama", folder)
    config = parse_config(json.loads((folder / "config.json").read_text()), "")
    torch.manual_seed(0)
    weights, where = new_model(config, 0).state_dict(), {}
    for number in range(3):
        part = dict([*weights.items()][number::3])
        save_weights(folder, config, part)
        name = f"model-0000{number + 1}-of-00003.safetensors"
        (folder / "model.safetensors").rename(folder / name)
        where |= dict.fromkeys(part, name)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": 9}, "weight_map": where},
    )


@torch.inference_mode()
def read_model(folder: Path, name: str) -> None:
    """The whole model, and one pass."""
    model = load_model(folder)
    model(torch.arange(12).view(2, 6))
    stop_ids(folder, Namespace(eos=2))


@torch.inference_mode()
def run_model(folder: Path, name: str) -> None:
    """As `read_model`, but the loader alone of another device too."""
    load_model(folder, "meta")
    read_model(folder, name)


def make_adapter(folder: Path) -> None:
    """A base with an adapter beside it, and an unfinished training."""
    make_model("llama", folder)
    lora = Lora(2, 4, ("q_proj", "down_proj"))
    model = load_model(folder)
    attach_lora(model, lora)
    init_adapter(model, 0)
    (folder / "adapter").mkdir()
    save_adapter(folder / "adapter", get_adapter_weights(model), lora, "..")
    (folder / "state").mkdir()
    save_state(
        folder / "state/state.safetensors",
        {"0.param": torch.ones(3), "0.step": torch.ones(())},
        {"step": 1, "rows": [{"loss": 1.0}], "pending": []},
    )


def read_adapter_of(folder: Path, name: str) -> None:
    """The adapter on its base."""
    lora, _ = read_adapter_config(folder / "adapter")
    model = load_model(folder)
    attach_lora(model, lora)
    set_adapter_weights(model, load_adapter(folder / "adapter"))


def read_state_of(folder: Path, name: str) -> None:
    load_state(folder / "state/state.safetensors")


MODELS = [
    Reader(
        kind,
        1.5,
        partial(make_model, kind),
        {"config.json": (m.structured,) * 4 + (m.raw,)},
        read_model,
    )
    for kind in CONFIGS
] + [
    Reader(
        "weights",
        4,
        partial(make_model, "llama"),
        {"model.safetensors": (m.tensors, m.tensors, m.raw), "generation_config.json": JSON},
        run_model,
    ),
    Reader(
        "shards",
        5,
        make_sharded,
        {"model.safetensors.index.json": JSON, "model-*": (m.tensors, m.raw)},
        run_model,
    ),
    Reader(
        "adapter",
        8,
        make_adapter,
        {
            "adapter/adapter_config.json": (m.structured,) * 4 + (m.raw,),
            "adapter/*.safetensors": (m.tensors, m.raw),
        },
        read_adapter_of,
    ),
    Reader(
        "state", 3, make_adapter, {"state/state.safetensors": (m.tensors, m.raw)}, read_state_of
    ),
]

# ---- tokenizers --------------------------------------------------------------------------------


def notes(end: str) -> dict:
    """A tokenizer_config.json."""
    added = {"content": "<extra>", "special": True, "lstrip": False}
    return {
        "bos_token": "<s>",
        "eos_token": {"content": end, "special": True},
        "add_bos_token": False,
        "added_tokens_decoder": {"290": added},
        "chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}",
        "model_max_length": 64,
    }


def make_pieces(folder: Path) -> None:
    """A sentencepiece model that puts a space before a text, and what may lie beside it."""
    import sentencepiece

    texts = [
        "the quick brown fox jumps over the lazy dog 0123456789",
        "where does kadol live ? kadol lives on oak street .",
    ]
    with (folder / "tokenizer.model").open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 9),
            model_writer=out,
            model_type="bpe",
            vocab_size=310,
            byte_fallback=True,
            control_symbols=["<user>", "<bot>"],
            num_threads=1,
            minloglevel=2,
        )
    write_json(folder / "tokenizer_config.json", notes("</s>"))
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    write_json(folder / "added_tokens.json", {"<more>": 312})


def make_pairs(folder: Path) -> None:
    """A byte-level BPE with few merges, in the style of Llama 3."""
    letters = byte_letters()
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("f", "o"), ("fo", "x")]
    vocab = {piece: i for i, piece in enumerate([*letters, *(a + b for a, b in merges)])}
    added = [
        {"id": 280 + i, "content": name, "special": i < 3, "normalized": False}
        for i, name in enumerate(("<s>", "</s>", "<user>", "<bot>"))
    ]
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": pre_tokenizer_json(STYLES["llama-3"]),
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": [" ".join(pair) for pair in merges],
            },
        },
    )
    write_json(folder / "tokenizer_config.json", notes("</s>"))
    write_json(folder / "config.json", {"eos_token_id": [281], "bos_token_id": 280})


def read_tokenizer(folder: Path, name: str) -> None:
    """Text to ids and back, and as a log shows it."""
    loaded = tokenizer.load_tokenizer(folder)
    for text in ("the fox 's 12 é\n\n  ?", "", " \n" * 20 + "a" * 40):
        for start in (True, False):
            ids = loaded.encode(text, start)
            loaded.decode(ids).encode()
            for token_id in ids[:9]:
                loaded.piece(token_id)
    loaded.decode([0, loaded.eos, 5, loaded.size - 1]).encode()
    own_template.template_warning(folder, "plain")
    row = chat_template.render(loaded, "plain", [Message("user", "who ?")], "the fox")
    tokenizer.show_mask(loaded, row).encode()


NOTED = {"tokenizer_config.json": JSON, "special_tokens_map.json": JSON, "added_tokens.json": JSON}
TOKENIZERS = [
    Reader(
        "sentencepiece",
        9,
        make_pieces,
        {"tokenizer.model": (m.buffers,) * 3 + (m.raw,)} | NOTED,
        read_tokenizer,
    ),
    Reader(
        "byte pairs",
        9,
        make_pairs,
        {"tokenizer.json": JSON, "tokenizer_config.json": JSON, "config.json": JSON},
        read_tokenizer,
    ),
]

# ---- settings ----------------------------------------------------------------------------------


EXPERIMENT = """question = "which ?"
seeds = [0, 1]
[groups]
one = "@tiny"
two = "@tiny --dpo.beta=0.2"
[variants]
first = ""
"the other" = "--macpo.rounds=1"
"""


def make_toml(folder: Path) -> None:
    """Two presets, all settings, and an experiment."""
    for name in ("tiny.toml", "world.toml"):
        shutil.copy(commandline.PRESETS / name, folder / name)
    (folder / "whole.toml").write_text(commandline.to_toml(commandline.Config()))
    (folder / "experiments").mkdir()
    (folder / "experiments/x.toml").write_text(EXPERIMENT)


def read_toml_of(folder: Path, name: str) -> None:
    """A file as train.py takes it, or as the config.toml of a run folder."""
    if name.startswith("experiments"):
        experiments.PRESETS = folder
        experiment = experiments.read_experiment("x")
        for case in experiment.cases:
            commandline.parse([*case.flags, f"--run.seed={experiment.seeds[0]}"])
        return
    config = commandline.parse(["@tiny", f"@{folder / name}"]).config
    commandline.to_toml(config).encode()
    (folder / "run").mkdir(exist_ok=True)
    shutil.copy(folder / name, folder / "run/config.toml")
    check_folder(folder / "run", config)


TOML = [
    Reader("toml", 8, make_toml, {"[!x]*.toml": TEXT}, read_toml_of),
    Reader("experiment", 2, make_toml, {"experiments/x.toml": TEXT}, read_toml_of),
]

# ---- what programs have written ----------------------------------------------------------------

PROMPT = (Message("system", "be kind"), Message("user", "what is it ?"))
SAMPLES = [
    Sample(
        f"id{i}", PROMPT, f"a fox {i}", "stop", (5, 6, 2), -3.5, 4.5, "student", 7, {"file": "x"}
    )
    for i in range(3)
]
PAIRS = [
    Pair(f"id{i}", PROMPT, "a fox", "a dog", "student", "data", -1.0, None, {"n": i}, 0.5)
    for i in range(3)
]
JUDGE = JudgeCommand(a=Path("a"), b=Path("b"), out=Path("out"), judge=Path("m"))


def make_written(folder: Path) -> None:
    """Answers, pairs, a judge's verdicts, a sheet for people, and scores from elsewhere."""
    write_rows(folder / "samples.jsonl", SAMPLES)
    write_rows(folder / "b.jsonl", SAMPLES)
    write_rows(folder / "pairs.jsonl", PAIRS)
    write_rows(
        folder / "texts.jsonl", [Example("id0", PROMPT, "a fox"), Example("id1", PROMPT, "")]
    )
    pairs = [AnswerPair(sample, sample) for sample in SAMPLES]
    judge.judge_all(replace(JUDGE, out=folder), pairs, lambda question: Reply("[[A]]"))
    write_sheet(folder / "human.csv", pairs)
    text = (folder / "human.csv").read_text().replace(",\n", ",1\n").replace(",\r\n", ",tie\r\n")
    (folder / "human.csv").write_text(text, newline="")
    write_rows(
        folder / "scores.jsonl",
        [{"id": f"id{i}", "agent": "student", "round": 1, "score": 0.5 * i} for i in range(3)],
    )
    made = [
        {**asdict(sample), "seed": derive_seed(0, sample.id, 0), "meta": {"made": "x"}}
        for sample in SAMPLES
    ]
    write_rows(folder / "answers.jsonl", made)


def read_written(folder: Path, name: str) -> None:
    """The file that was changed, by its reader."""
    pairs = [AnswerPair(sample, sample) for sample in SAMPLES]
    match name:
        case "samples.jsonl":
            shutil.rmtree(folder / "out", ignore_errors=True)
            command = replace(
                JUDGE, out=folder / "out", a=folder / name, b=folder / "b.jsonl", most=10
            )
            judged = judge.read_pairs(command)
            write_sheet(folder / "sheet", judged)
            judge.judge_all(command, judged, lambda question: Reply("[[A]]"))
        case "pairs.jsonl":
            as_rows = [formats.released(pair) for pair in read_rows(folder / name, Pair)]
            json.dumps(as_rows, ensure_ascii=False).encode()
        case "texts.jsonl":
            read_rows(folder / name, Example)
        case "verdicts.jsonl":
            command = replace(JUDGE, out=folder)
            verdicts = judge.judge_all(command, pairs, lambda question: Reply("no mark"))
            judge.format_judgement(judge.summarize(command, pairs, verdicts)).encode()
        case "human.csv":
            verdicts = read_sheet(folder / name, pairs)
            judge.summarize(replace(JUDGE, out=folder), pairs, verdicts)
        case "scores.jsonl":
            reward.read_scores(folder / name, {(1, "student"): {"id0", "id1", "id2"}})
        case "answers.jsonl":
            requests = [
                Request(Example(sample.id, PROMPT, "", {"made": "x"})) for sample in SAMPLES
            ]
            with (folder / name).open("ab") as stream:
                answers.count_answers(folder / name, "student", requests, 0, stream)


WRITTEN = [
    Reader(
        "written",
        14,
        make_written,
        dict.fromkeys(
            (
                "samples.jsonl",
                "pairs.jsonl",
                "texts.jsonl",
                "verdicts.jsonl",
                "scores.jsonl",
                "answers.jsonl",
            ),
            LINES,
        )
        | {"human.csv": TEXT},
        read_written,
    )
]


def copied(run: Path, folder: Path) -> None:
    """A finished run."""
    shutil.copytree(run, folder / "run")


def read_run_folder(folder: Path, name: str) -> None:
    """Its table, its report, and whether it is finished."""
    for kept in (
        verify_once,
        mean_gold_by_prompt,
        right_fraction,
        table.read_prompt_scores,
        table.row_of,
        table.offered,
        table.signs_once,
        report.training_curve,
        report.spaced_prompts,
        report.read_records_of_prompts,
        report.read_cut_answers,
    ):
        kept.cache_clear()
    run = folder / "run"
    read_metrics(run, read_run(run).metadata)
    judge.read_answers(run)
    experiments.is_complete(run)
    report.write_report(run)


RUN = {
    "run/config.toml": TEXT,
    "run/env.json": JSON,
    "run/metrics.jsonl": LINES,
    "run/eval/table.json": JSON,
    "run/*/*/stage.json": JSON,
    "run/*/*/samples.jsonl": LINES,
    "run/*/*/pairs.jsonl": LINES,
    "run/*/*/scores.jsonl": LINES,
    "run/*/*/metrics.jsonl": LINES,
}


def readers(run: Path) -> list[Reader]:
    """All of them; `run` is a finished run."""
    return [
        *ROWS,
        *MODELS,
        *TOKENIZERS,
        *TOML,
        *WRITTEN,
        Reader("run", 1, partial(copied, run), RUN, read_run_folder),
    ]
