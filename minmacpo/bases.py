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
    small = [path / file for file in ("config.json", "tokenizer.model", "generation_config.json")]
    marks = [sha256_file(file) for file in small if file.is_file()]
    for file in weight_files(path):
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(1 << 20).hex()
            stream.seek(max(0, size - (1 << 20)))
            marks += [file.name, size, head[:4096], fingerprint([head, stream.read().hex()])]
    return Base(name, Stage(str(path), path, fingerprint(marks), external=True))


def given_folders(config: Config) -> dict[str, str]:
    """{base name: HF folder} of the bases that the user gives."""
    folders = {"strong": config.model.student} if config.model.student else {}
    return folders | {f"weak{k + 1}": f for k, f in enumerate(config.model.teachers[: config.macpo.teachers])}


def given_tokenizers(config: Config) -> list[Tokenizer]:
    """The tokenizers of the given bases; UserError if a context is too short for the settings."""
    needed, tokenizers = max(config.data.max_length, config.data.max_prompt + config.generate.max_new), []
    for folder in given_folders(config).values():
        model, tokenizer = check_model_folder(Path(folder))
        if needed > model.max_position_embeddings:
            raise UserError(
                f"{folder}: its context is {model.max_position_embeddings} tokens, the settings need"
                f" {needed}; lower data.max_prompt, data.max_length or generate.max_new"
            )
        tokenizers.append(tokenizer)
    return tokenizers


def make_ground(run: Run, source: dict, prepared: Callable[[], Prepared]) -> Ground:
    """The stages data/* and bases/*. `source` identifies the texts; `prepared` reads them when needed."""
    data, model = run.config.data, run.config.model
    origin = source | {"template": data.template, "vocab": model.vocab}
    given = {name: given_base(name, folder) for name, folder in given_folders(run.config).items()}
    limits = {"max_prompt": data.max_prompt, "max_length": data.max_length, "long": data.long}
    settings = origin | limits | {"given": [base.stage.fingerprint for base in given.values()]}

    def write_slices(work: Work) -> dict:
        ids = {}
        for name, pairs in prepared().slices.items():
            write_records(work.folder / f"{name}.jsonl", pairs)
            ids[name] = [pair.id for pair in pairs]
        write_json(work.folder / "split.json", ids)
        return prepared().counts

    def write_tokenizer(work: Work) -> dict:
        write_atomic(work.folder / "tokenizer.model", prepared().tokenizer)
        return {"pieces": Tokenizer(prepared().tokenizer).size}

    slices = run.stage("data/slices", "slices/1", settings, [], write_slices, ("data",))
    missing = [name for name in base_names(run.config) if name not in given]
    if not missing:
        return Ground(slices, given)
    tokenizer = run.stage("bases/tokenizer", "tokenizer/1", origin, [], write_tokenizer, ("data",))
    made = {name: make_base(run, name, origin, tokenizer, prepared) for name in missing}
    return Ground(slices, given | made)


def make_base(run: Run, name: str, origin: dict, tokenizer: Stage, prepared: Callable[[], Prepared]) -> Base:
    """Two stages: the text of base `name`, and the base pre-trained on every token of it from scratch."""
    config, part, weak = run.config, run.config.pretrain, run.config.model.weak
    template, most = config.data.template, config.data.max_length
    if name == "strong":
        text, lr, steps = config.model.strong, part.strong_lr, part.strong_steps
    else:
        text, lr, steps = weak[(int(name[4:]) - 1) % len(weak)], part.weak_lr, part.weak_steps
    schedule = Schedule(lr, steps, part.batch, floor=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    share = {"documents": steps * part.batch} if config.data.path is None else {"weak_share": part.weak_share}
    settings = {"shape": text, "context": config.model.context, "max_length": most, "template": template}
    settings |= {"device": device_of(config), "micro_tokens": config.run.micro_tokens} | asdict(schedule)

    def write_corpus(work: Work) -> dict:
        write_records(work.folder / "texts.jsonl", prepared().corpora[name])
        return {"documents": len(prepared().corpora[name])}

    def pretrain(work: Work) -> dict:
        pieces = load_tokenizer(tokenizer.path)
        width, layers, heads, mlp = shape(text)
        size = (pieces.size, width, mlp, layers, heads, heads, width // heads, config.model.context)
        model_config = ModelConfig(*size, bos_token_id=pieces.bos, eos_token_id=pieces.eos)
        model = new_model(model_config, derive_seed(config.run.seed, name, "weights")).to(device_of(config))
        examples = read_records(corpus.path / "texts.jsonl", Example)
        rows = [render(pieces, template, e.prompt, e.response).ids for e in examples]
        tokens = [Tokens(row[:most], [False, *[True] * (min(len(row), most) - 1)]) for row in rows]
        units = [Unit(e.id, (row,)) for e, row in zip(examples, tokens, strict=True)]
        work.log(f"first row: {show_mask(pieces, units[0].rows[0])[:400]}")
        counts = fit(model, list(model.parameters()), units, SftObjective(), schedule, work)
        weights = {k: v.cpu() for k, v in model.state_dict().items()}
        save_model(work.folder, model_config, weights, pieces.model)
        cut, parameters = sum(len(row) > most for row in rows), sum(p.numel() for p in model.parameters())
        return counts | {"documents_cut": cut, "parameters": parameters}

    source = origin | share | {"base": name}
    corpus = run.stage(f"data/corpus_{name}", "corpus/1", source, [], write_corpus, ("data",))
    inputs, key = [tokenizer, corpus], (name, "pretrain")
    size = f"{steps} steps of {part.batch} documents, {text}"
    return Base(name, run.stage(f"bases/{name}", "pretrain/1", settings, inputs, pretrain, key, size))
