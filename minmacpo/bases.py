"""The first stages of a run: its texts on disk, a tokenizer, and the bases, made here or given."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from minmacpo import UserError
from minmacpo.checkpoint import check_model_folder, save_model, weight_files
from minmacpo.config import Config, shape
from minmacpo.data import Example
from minmacpo.files import fingerprint, read_records, sha256_file, write_atomic, write_json, write_records
from minmacpo.fit import Schedule, SftObjective, Unit, fit
from minmacpo.machine import device_of
from minmacpo.model import ModelConfig, new_model
from minmacpo.prepare import Prepared, base_names
from minmacpo.run import Run, Stage, Work, derive_seed
from minmacpo.tokenizer import Tokenizer, Tokens, load_tokenizer, render, show_mask


@dataclass(frozen=True, slots=True)
class Base:
    """A frozen pre-trained model: an HF folder, made by a stage of this run or given by the user."""

    name: str
    stage: Stage


@dataclass(frozen=True, slots=True)
class Ground:
    """What the algorithm stands on: `slices` holds d1, d2 and test; bases by name."""

    slices: Stage
    bases: dict[str, Base]


def given_base(name: str, folder: str) -> Base:
    """A base that exists already; its fingerprint covers its files (of big ones: size, both ends)."""
    path = Path(folder)
    check_model_folder(path)
    small = [path / "config.json", path / "tokenizer.model", path / "generation_config.json"]
    marks = [sha256_file(file) for file in small if file.is_file()]
    for file in weight_files(path):
        with file.open("rb") as stream:
            head = stream.read(1 << 20)
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            marks += [file.name, file.stat().st_size, head.hex()[:4096], fingerprint([head.hex(), stream.read().hex()])]
    return Base(name, Stage(str(path), path, fingerprint(marks), external=True))


def given_folders(config: Config) -> dict[str, str]:
    """{base name: HF folder} of the bases that the user gives."""
    folders = {"strong": config.model.student} if config.model.student else {}
    return folders | {f"weak{k + 1}": f for k, f in enumerate(config.model.teachers[: config.macpo.teachers])}


def given_tokenizers(config: Config) -> list[Tokenizer]:
    """The tokenizers of the given bases; UserError if a context is too short for the settings."""
    tokenizers = []
    for folder in given_folders(config).values():
        model, tokenizer = check_model_folder(Path(folder))
        needed = max(config.data.max_length, config.data.max_prompt + config.generate.max_new)
        if needed > model.max_position_embeddings:
            raise UserError(
                f"{folder}: its context is {model.max_position_embeddings} tokens, the settings need {needed};"
                " lower data.max_prompt, data.max_length or generate.max_new"
            )
        tokenizers.append(tokenizer)
    return tokenizers


def make_ground(run: Run, source: dict, prepared: Callable[[], Prepared]) -> Ground:
    """The stages data/* and bases/*. `source` identifies the texts; `prepared` reads them when needed."""
    config = run.config
    folders = given_folders(config)
    data = source | {"template": config.data.template, "vocab": config.model.vocab}
    given = {name: given_base(name, folder) for name, folder in folders.items()}
    lengths = {"max_prompt": config.data.max_prompt, "max_length": config.data.max_length, "long": config.data.long}
    settings = data | lengths | {"given": [base.stage.fingerprint for base in given.values()]}

    def write_slices(work: Work) -> dict:
        found = prepared()
        for name, pairs in found.slices.items():
            write_records(work.folder / f"{name}.jsonl", pairs)
        write_json(work.folder / "split.json", {n: [p.id for p in pairs] for n, pairs in found.slices.items()})
        return found.counts

    slices = run.stage("data/slices", "slices/1", settings, [], write_slices, ("data",))
    names = [name for name in base_names(config) if name not in given]
    if not names:
        return Ground(slices, given)

    def write_tokenizer(work: Work) -> dict:
        write_atomic(work.folder / "tokenizer.model", prepared().tokenizer)
        return {"pieces": Tokenizer(prepared().tokenizer).size}

    tokenizer = run.stage("bases/tokenizer", "tokenizer/1", data, [], write_tokenizer, ("data",))
    made = {name: make_base(run, name, data, tokenizer, prepared) for name in names}
    return Ground(slices, {name: given.get(name) or made[name] for name in base_names(config)})


def make_base(run: Run, name: str, data: dict, tokenizer: Stage, prepared: Callable[[], Prepared]) -> Base:
    """Two stages: the text of base `name`, and the base pre-trained on it from scratch."""
    config = run.config
    strong = name == "strong"
    part = config.pretrain
    text = config.model.strong if strong else config.model.weak[(int(name[4:]) - 1) % len(config.model.weak)]
    schedule = Schedule(
        lr=part.strong_lr if strong else part.weak_lr,
        steps=part.strong_steps if strong else part.weak_steps,
        batch=part.batch, floor=0.1, betas=(0.9, 0.95), weight_decay=0.1,
    )  # fmt: skip

    def write_corpus(work: Work) -> dict:
        write_records(work.folder / "texts.jsonl", prepared().corpora[name])
        return {"documents": len(prepared().corpora[name])}

    share = {"documents": schedule.steps * schedule.batch} if config.data.path is None else {"weak_share": part.weak_share}
    corpus = run.stage(f"data/corpus_{name}", "corpus/1", data | share | {"base": name}, [], write_corpus, ("data",))
    settings = {"shape": text, "context": config.model.context, "max_length": config.data.max_length,
                "template": config.data.template, "device": device_of(config),
                "micro_tokens": config.run.micro_tokens} | asdict(schedule)  # fmt: skip

    def pretrain(work: Work) -> dict:
        pieces = load_tokenizer(tokenizer.path)
        width, layers, heads, mlp = shape(text)
        size = (pieces.size, width, mlp, layers, heads, heads, width // heads, config.model.context)
        model_config = ModelConfig(*size, bos_token_id=pieces.bos, eos_token_id=pieces.eos)
        model = new_model(model_config, derive_seed(config.run.seed, name, "weights")).to(device_of(config))
        units, cut = documents(pieces, config, read_records(corpus.path / "texts.jsonl", Example))
        work.log(f"first row: {show_mask(pieces, units[0].rows[0])[:400]}")
        counts = fit(model, list(model.parameters()), units, SftObjective(), schedule, work)
        weights = {k: v.detach().cpu() for k, v in model.state_dict().items()}
        save_model(work.folder, model_config, weights, pieces.model)
        return counts | {"documents_cut": cut, "parameters": sum(p.numel() for p in model.parameters())}

    size = f"{schedule.steps} steps of {schedule.batch} documents, {text}"
    stage = run.stage(f"bases/{name}", "pretrain/1", settings, [tokenizer, corpus], pretrain, (name, "pretrain"), size)
    return Base(name, stage)


def documents(tokenizer: Tokenizer, config: Config, examples: list[Example]) -> tuple[list[Unit], int]:
    """Whole dialogues to pre-train on, every token trained, and how many were cut at max_length."""
    units, cut = [], 0
    for example in examples:
        ids = render(tokenizer, config.data.template, example.prompt, example.response).ids
        cut += len(ids) > config.data.max_length
        ids = ids[: config.data.max_length]
        units.append(Unit(example.id, (Tokens(ids, [False] + [True] * (len(ids) - 1)),)))
    return units, cut
