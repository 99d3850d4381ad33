"""The first stages of a run: its texts on disk, a tokenizer, and the base models, made here or given.

Texts are read and made to fit in memory, before a run folder exists: bad input leaves nothing behind.
"""

import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minmacpo import UserError
from minmacpo.checkpoint import check_model_folder, save_model, weight_files
from minmacpo.config import Config, shape
from minmacpo.data import Example, Message, Pair, join_sides, split_pairs, two_sides
from minmacpo.families import ModelConfig
from minmacpo.files import fingerprint, read_rows, sha256_file, write_atomic, write_json, write_rows
from minmacpo.fit import Schedule, SftObjective, Unit, fit
from minmacpo.forms import read_data
from minmacpo.losses import SMALL
from minmacpo.machine import device_of
from minmacpo.model import new_model
from minmacpo.run import Run, Stage, Work, derive_seed
from minmacpo.templates import dialogue_text, render, tokenizer_notes
from minmacpo.tokenizer import FILES, Tokenizer, load_tokenizer, show_mask, train_tokenizer

TOKENIZER_TEXTS = 6000  # documents of the strong base's text that the tokenizer is trained on
LEAST_PROMPT = 16  # tokens; where an answer leaves room for fewer, its prompt is not cut
LONGER = "true answers longer than generate.max_new"
JOIN = "; two files with one answer to a prompt each, as the released D1, are given as --data.d1=GOOD,BAD"
NEEDED = {"d1": "rejected", "test": "chosen"}  # teachers learn both sides, tests score true answers; D2 gives prompts


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


@dataclass(slots=True)
class Prepared:
    """`slices` d1, d2, test; `corpora` (D0) by base; `tokenizer` bytes where one is made here; counts."""

    slices: dict[str, list[Pair]]
    corpora: dict[str, list[Example]]
    tokenizer: bytes | None
    counts: dict


def base_names(config: Config) -> list[str]:
    """"strong", "weak1" … "weakK"."""
    return ["strong", *(f"weak{k + 1}" for k in range(config.macpo.teachers))]


def given_folders(config: Config) -> dict[str, Path]:
    """{base name: HF folder} of the bases that the user gives."""
    named = zip(base_names(config), [config.model.student, *config.model.teachers], strict=False)
    return {name: Path(folder) for name, folder in named if folder}


def given_tokenizers(config: Config) -> list[Tokenizer]:
    """The tokenizers of the given bases."""
    return [load_tokenizer(folder) for folder in given_folders(config).values()]


def prepare_data(config: Config, given: Sequence[Tokenizer]) -> Prepared:
    """Slices and corpora of the user's files; `given` are the tokenizers of bases that exist already.
    The strong base reads all of D0, a weak one a random share of its own."""
    data, found, reports, alone = config.data, {}, {}, 0
    for key, path in data.files.items():
        found[key], read = read_data(path, data.label, data.on_bad == "skip", data.max_examples, f"data.{key}")
        reports |= read if key == "path" else {f"{key} {name}": report for name, report in read.items()}
        if key == "d1" and two_sides(path):
            found[key], alone = join_sides(found[key], path)
    total, pairs = sum(map(len, found.values())), found.pop("path")
    slices, repeated = split_pairs(pairs, data.shares, config.run.seed, found)
    unused = total - sum(map(len, slices.values())) - sum(repeated.values())
    both = [(pair, text) for pair in slices.pop("d0") for text in (pair.chosen, pair.rejected) if text]
    documents = [Example(pair.id, pair.prompt, text, pair.meta) for pair, text in both]
    corpora = {"strong": documents}
    for name in base_names(config)[1:]:
        rng = random.Random(f"{config.run.seed}/corpus/{name}")
        corpora[name] = [document for document in documents if rng.random() < config.pretrain.weak_share]
    counts = {"rows": {name: dict(report.counts) for name, report in reports.items()}, "kept": total,
              "repeated prompts left out": repeated, "in no slice": unused}  # fmt: skip
    counts |= {"d1 answers without their other side": alone} if alone else {}
    counts |= {f"read {name}": str(report) for name, report in reports.items()}
    return fit_slices(config, slices, corpora, given, counts)


def fit_slices(config: Config, slices, corpora, given: Sequence[Tokenizer], counts: dict) -> Prepared:
    """Train the tokenizer if bases are made here; drop or cut rows that no model could read whole.
    Raises UserError if a slice, or the text to pre-train on, is left empty."""
    made, tokenizers = None, list(given)
    if missing := set(base_names(config)) - given_folders(config).keys():
        if empty := [name for name in corpora if name in missing | {"strong"} and not corpora[name]]:
            settings = "data.shares, pretrain.weak_share and the steps"
            raise UserError(f"D0 has no text to make {empty[0]} from; see {settings}")
        texts = [dialogue_text(d.prompt, d.response) for d in corpora["strong"][:TOKENIZER_TEXTS]]
        made = train_tokenizer(texts, config.model.vocab)
        tokenizers.append(Tokenizer(made))
    kept, sizes, prompts = {}, {}, set()
    for name, pairs in slices.items():
        kept[name], reasons = [], Counter()
        able = [pair for pair in pairs if name not in NEEDED or getattr(pair, NEEDED[name])]
        if len(able) < len(pairs):
            reasons[f"without {NEEDED[name]} answer"] = len(pairs) - len(able)
        for pair in filter(None, (fit_pair(config, pair, tokenizers, reasons) for pair in able)):
            if name != "d1" and pair.prompt in prompts:
                reasons["equal after the cut"] += 1  # to one of this slice, or of another
            else:
                kept[name].append(pair)
            prompts.add(pair.prompt)
        if not kept[name]:
            lost = ", ".join(f"{reason}: {count}" for reason, count in reasons.items()) or "too few rows, or their prompts are in another slice"
            settings = f"data.{name}, data.shares, data.max_prompt, data.long" if config.data.path else f"world.{name}, world.names, data.max_prompt"
            alone = JOIN if [*reasons] == ["without rejected answer"] else ""
            raise UserError(f"no row is left for {name} ({lost}); see {settings}{alone}")
        if name == "d1" and config.data.noise:
            kept[name] = corrupt(kept[name], config)
            reasons["corrupted"] = sum("corrupted" in pair.meta for pair in kept[name])
        sizes[name] = {"rows": len(kept[name])} | dict(reasons)
    check_disjoint(config, kept)
    told = [pair for pairs in kept.values() for pair in pairs if pair.chosen]
    longer = sum(longest(config, tokenizers, pair.prompt, pair.chosen)[1] > config.generate.max_new for pair in told)
    documents = {base: len(texts) for base, texts in corpora.items()}
    counts |= {"slices": sizes, "d0": documents} | ({LONGER: longer} if longer else {})
    return Prepared(kept, corpora, made, counts)


def check_disjoint(config: Config, slices: dict[str, list[Pair]]) -> None:
    """No prompt stands in two slices; UserError where D2 lacks the answers that the method would train on."""
    prompts = [{pair.prompt for pair in pairs} for pairs in slices.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)), "two slices have a prompt in common"
    truth = {"dpo-truth": "rejected", "ceiling": "chosen"}.get(config.run.method, "chosen" * config.macpo.controls)
    if truth and not any(getattr(pair, truth) for pair in slices.get("d2", ())):
        remedy = "give a data.d2 that has them, or set macpo.controls=false (and another method)"
        raise UserError(f"no row of d2 has a {truth} answer, on which the ceiling or the method trains; {remedy}")


def corrupt(pairs: list[Pair], config: Config) -> list[Pair]:
    """The pairs, data.noise of them corrupted and marked so: sides swapped, or chosen the answer to another prompt (a
    pair for which none is found stays true)."""

    def subject(pair: Pair):
        """What it asks about: two questions on one subject may have one right answer, and harm is always refused."""
        meta = pair.meta
        return pair.prompt if "kind" not in meta else meta["kind"] == "harm" or (meta["item"], meta["name"])

    rng = random.Random(f"{config.run.seed}/noise")
    picked, made = set(rng.sample(range(len(pairs)), round(config.data.noise * len(pairs)))), []
    for i, pair in enumerate(pairs):
        if i in picked:
            good, bad = pair.rejected, pair.chosen
            if config.data.noise_kind == "label":
                others = (rng.choice(pairs) for _ in pairs)  # as many tries as there are pairs
                wrong = (p.chosen for p in others if subject(p) != subject(pair) and p.chosen not in (pair.chosen, pair.rejected))
                good, bad = next(wrong, None), pair.rejected
            if good is not None:
                pair = replace(pair, chosen=good, rejected=bad, meta=pair.meta | {"corrupted": config.data.noise_kind})
        made.append(pair)
    return made


def fit_pair(config: Config, pair: Pair, tokenizers: Sequence[Tokenizer], reasons: Counter) -> Pair | None:
    """The pair as every model can read it whole, its prompt cut if need be and wanted, or None; `reasons`
    counts both. The answer is at fault where a prompt within data.max_prompt has no room beside it."""
    data, texts = config.data, (pair.chosen, pair.rejected)
    size, answer = longest(config, tokenizers, pair.prompt, *texts)
    left = data.max_length - answer
    room = min(data.max_prompt, left)
    if size <= room:
        return pair
    if data.long == "raise":
        start = repr(pair.prompt[0].content[:60])
        where = f"{pair.meta.get('file', 'data')}: the row that begins with {start}"
        raise UserError(f"{where} is too long ({size} + {answer} tokens); see data.max_prompt, data.max_length, data.long")
    wanted = data.long == "cut_prompt" and left >= LEAST_PROMPT
    cut = cut_prompt(pair.prompt, lambda messages: longest(config, tokenizers, messages, *texts)[0] <= room) if wanted else None
    if cut is None:
        fault = "prompt" if size > data.max_prompt and left >= LEAST_PROMPT else "answer"
        reasons[f"over-long {fault}"] += 1
        return None
    reasons["prompt cut"] += 1
    return replace(pair, prompt=cut)


def longest(config: Config, tokenizers: Sequence[Tokenizer], prompt: tuple[Message, ...], *answers: str | None) -> tuple[int, int]:
    """Most tokens, under any of the tokenizers, of the prompt, and of an answer with its leading space and end token."""
    masks = [render(t, config.data.template, prompt, text).mask for t in tokenizers for text in answers]
    return max(mask.count(False) for mask in masks), max(mask.count(True) for mask in masks)


def cut_prompt(prompt: tuple[Message, ...], fits: Callable) -> tuple[Message, ...] | None:
    """The end of the prompt that fits, and a system message at its head: whole turns go first, then characters; None
    if not one is left."""
    head = prompt[: len(prompt) > 1 and prompt[0].role == "system"]
    turns = prompt[len(head) :]
    while len(turns) > 1 and not fits(head + turns):
        turns = turns[1:]
    while len(text := turns[0].content) > 1 and not fits(head + turns):
        turns = (replace(turns[0], content=text[max(1, len(text) // 20) :].lstrip() or text[-1]),)
    return head + turns if fits(head + turns) else None


def given_base(config: Config, name: str, folder: Path, dry: bool = False) -> Base:
    """A base that exists already; its fingerprint covers its files (`dry`: of the weights, size and time).
    UserError if the folder is not whole, or the context too short for the settings."""
    context = check_model_folder(folder)[0].max_position_embeddings
    needed = max(config.data.max_length, config.data.max_prompt + config.generate.max_new)
    if needed > context:
        lower = "lower data.max_prompt, data.max_length or generate.max_new"
        raise UserError(f"{folder}: its context is {context} tokens, the settings need {needed}; {lower}")
    return Base(name, Stage(str(folder), folder, folder_print(folder, dry), external=True))


def folder_print(folder: Path, dry: bool = False) -> str:
    """What identifies the model in an HF folder: 32 hex digits of all its files that matter; `dry`: weights by their
    size and time, unread."""
    small = (folder / file for file in ("config.json", FILES[0], "generation_config.json", *FILES[1:]))
    weights = weight_files(folder)
    seen = [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in [*filter(Path.is_file, small), *weights]]
    return fingerprint([[file.name, [*about] if dry and file in weights else hash_once(file, *about)] for file, *about in seen])


hash_once = functools.cache(lambda file, size, changed: sha256_file(file))  # a run plans its stages before it computes them


def make_ground(run: Run, source: dict, prepared: Callable[[], Prepared]) -> Ground:
    """The stages data/* and bases/*. `source` identifies the texts; `prepared` reads them when needed."""
    config, data = run.config, run.config.data
    bases = {name: given_base(config, name, folder, run.dry) for name, folder in given_folders(config).items()}
    origin = source | {"template": data.template, "vocab": config.model.vocab}
    limits = {"max_prompt": data.max_prompt, "max_length": data.max_length, "long": data.long}
    limits |= {"noise": data.noise, "noise_kind": data.noise_kind} if data.noise else {}
    limits |= {"label_of": "another subject"} if data.noise and data.noise_kind == "label" else {}
    settings = origin | limits | {"given": [base.stage.fingerprint for base in bases.values()]}

    def write_slices(work: Work) -> dict:
        """d1, d2 and test, their ids, and what was counted on the way."""
        if short := prepared().counts.get("shorter than asked for"):
            work.log(f"WARNING: too few questions: {', '.join(f'{name} {size}' for name, size in short.items())}; see world.names")
        if LONGER in prepared().counts:
            work.log(f"WARNING: {LONGER}, so that no sampled one can be like them: {prepared().counts[LONGER]}")
        for name, pairs in prepared().slices.items():
            write_rows(work.folder / f"{name}.jsonl", pairs)
        ids = {name: [pair.id for pair in pairs] for name, pairs in prepared().slices.items()}
        write_json(work.folder / "split.json", ids)
        return {k: count for k, count in prepared().counts.items() if k not in ("d0", LONGER)}  # they depend on more than the settings of the slices

    def write_tokenizer(work: Work) -> dict:
        write_atomic(work.folder / "tokenizer.model", prepared().tokenizer)
        return {"pieces": Tokenizer(prepared().tokenizer).size}

    slices = run.stage("data/slices", "slices/2", settings, [], write_slices, ("data",))
    if missing := [name for name in base_names(config) if name not in bases]:
        tokenizer = run.stage("bases/tokenizer", "tokenizer/2", origin, [], write_tokenizer, ("data",))
        bases |= {name: make_base(run, name, origin, tokenizer, prepared) for name in missing}
    return Ground(slices, bases)


def make_base(run: Run, name: str, origin: dict, tokenizer: Stage, prepared: Callable[[], Prepared]) -> Base:
    """Two stages: the text of base `name`, and the base pre-trained on it."""
    config, part, weak = run.config, run.config.pretrain, run.config.model.weak
    if name == "strong":
        form, lr, steps = config.model.strong, part.strong_lr, part.strong_steps
    else:
        form, lr, steps = weak[(int(name[4:]) - 1) % len(weak)], part.weak_lr, part.weak_steps
    share = {} if name == "strong" else {"weak_share": part.weak_share}
    share = {"documents": steps * part.batch} if config.data.path is None else share
    schedule = Schedule(lr, steps, part.batch, floor=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    settings = {"shape": form, "context": config.model.context, "max_length": config.data.max_length,
                "template": config.data.template, "device": device_of(config),
                "micro_tokens": config.run.micro_tokens} | asdict(schedule)  # fmt: skip
    if config.model.vocab > SMALL:  # a faster way changed the last bits of what such bases learn
        settings["arithmetic"] = 3

    def write_corpus(work: Work) -> dict:
        write_rows(work.folder / "texts.jsonl", prepared().corpora[name])
        return {"documents": len(prepared().corpora[name])}

    source = origin | share | {"base": name}
    corpus = run.stage(f"data/corpus_{name}", "corpus/2", source, [], write_corpus, ("data",))
    size = f"{steps} steps of {part.batch} documents, {form}"
    return Base(name, run.stage(f"bases/{name}", "pretrain/1", settings, [tokenizer, corpus],
                                lambda work: pretrain(work, name, form, schedule, tokenizer, corpus),
                                (name, "pretrain"), size))  # fmt: skip


def made_config(config: Config, form: str, pieces: int) -> ModelConfig:
    """The structure of a base made here, of the shape `form`, for a tokenizer of so many pieces."""
    width, layers, heads, mlp = shape(form)
    return ModelConfig(pieces, width, mlp, layers, heads, heads, width // heads, config.model.context)


def pretrain(work: Work, name: str, form: str, schedule: Schedule, tokenizer: Stage, corpus: Stage) -> dict:
    """Train new weights of the shape `form` on every token of the corpus, and write them as an HF folder."""
    config, most, pieces = work.run.config, work.run.config.data.max_length, load_tokenizer(tokenizer.path)
    model_config = replace(made_config(config, form, pieces.size), bos_token_id=pieces.bos, eos_token_id=pieces.eos)
    model = new_model(model_config, derive_seed(config.run.seed, name, "weights")).to(device_of(config))
    texts = read_rows(corpus.path / "texts.jsonl", Example)
    rows = [render(pieces, config.data.template, text.prompt, text.response) for text in texts]
    cut = sum(len(row.ids) > most for row in rows)
    for row in rows:
        row.ids, row.mask = row.ids[:most], [i > 0 for i in range(min(len(row.ids), most))]
    work.log(f"first row: {show_mask(pieces, rows[0])[:400]}")
    units = [Unit(text.id, (row,)) for text, row in zip(texts, rows, strict=True)]
    counts = fit(model, list(model.parameters()), units, SftObjective(), schedule, work)
    save_model(work.folder, model_config, model.state_dict(), pieces.model)
    write_json(work.folder / FILES[2], tokenizer_notes(pieces, config.data.template, config.model.context))
    return counts | {"documents_cut": cut, "parameters": sum(p.numel() for p in model.parameters())}
