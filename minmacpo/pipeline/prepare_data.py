"""From files, or from the built-in world, to the splits and the tokenizer of a run.

Texts are read and made to fit into memory before a run folder exists, so that bad input leaves
nothing behind. The stages at the end write them.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.data import synthetic
from minmacpo.data.chat_template import Renderer, dialogue_text
from minmacpo.data.dialogues import with_system
from minmacpo.data.formats import column_warnings, read_data
from minmacpo.data.own_template import own_template
from minmacpo.data.readers import find_files, split_pair_paths
from minmacpo.data.records import Example, Message, Pair
from minmacpo.data.splits import join_sides, split_pairs
from minmacpo.data.templates import TEMPLATES
from minmacpo.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from minmacpo.pipeline.run import Run
from minmacpo.pipeline.stage import Stage, StageContext
from minmacpo.runtime.files import sha256_file, write_atomic, write_json, write_rows
from minmacpo.runtime.hub import local_folder
from minmacpo.runtime.progress import escape_control_chars

TOKENIZER_TEXTS = 6000  # documents of the strong base's text that the tokenizer is trained on
MIN_PROMPT_TOKENS = 16  # a prompt is not cut to fewer, whatever room an answer leaves

# The side that a split must have: teachers learn from both sides of D1, true answers to the test
# prompts are scored; of D2 the prompts are enough
REQUIRED_SIDES = {"d1": "rejected", "test": "chosen"}

SHORTFALLS = "shorter than asked for"
LONGER = "true answers longer than generate.max_new_tokens"
LEFT_OUT = "characters without a token"


@dataclass(slots=True)
class PreparedData:
    """The texts of a run in memory.

    Attributes:
        splits: the pairs of d1, d2 and test.
        corpora: the documents that each base is pre-trained on (D0), by base.
        tokenizer: a sentencepiece model, where bases are made here.
        counts: what stage.json says of the rows that were read, dropped and cut.
        warnings: sentences on what is odd about the files.
    """

    splits: dict[str, list[Pair]]
    corpora: dict[str, list[Example]]
    tokenizer: bytes | None
    counts: dict
    warnings: list[str] = field(default_factory=list)


def base_names(config: Config) -> list[str]:
    """The names of the bases: "strong", "weak1" ... "weakK"."""
    return ["strong", *(f"weak{k}" for k in range(1, config.macpo.teachers + 1))]


def model_dirs(config: Config) -> dict[str, Path]:
    """The folders of the bases that the user gives, by base."""
    folders = [config.model.student, *config.model.teachers]
    named = zip(base_names(config), folders, strict=False)
    return {name: local_folder(folder) for name, folder in named if folder}


def base_templates(config: Config) -> dict[str, str]:
    """The template that dialogues are written in for each base.

    "own" is that of the folder that the user gives, and "plain" for a base that is made here.
    """
    names = base_names(config)
    chosen = config.data.template
    if len(chosen) == 1:
        chosen = chosen * len(names)
    folders = model_dirs(config)
    templates = {}
    for name, template in zip(names, chosen, strict=True):
        if template == "own":
            template = own_template(folders[name]) if name in folders else "plain"
        templates[name] = template
    return templates


def given_renderers(config: Config) -> list[Renderer]:
    """The tokenizers of the bases that the user gives, with their templates."""
    templates = base_templates(config)
    return [
        Renderer(load_tokenizer(folder), templates[name])
        for name, folder in model_dirs(config).items()
    ]


# --- Where the texts come from


def identify_source(config: Config) -> dict:
    """What identifies the texts: the world and its seed, or the content of the files."""
    data = config.data
    if data.path is None:
        return {
            "world": asdict(config.world),
            "seed": config.run.seed,
            "tokenizer_texts": min(
                config.pretrain.strong_steps * config.pretrain.batch, TOKENIZER_TEXTS
            ),
        }
    hashes = {}
    for name, path in data.files.items():
        files = find_files(path, f"data.{name}")
        hashes[name] = [[file.name, sha256_file(file)] for file in files]
    return {
        "shares": list(data.shares),
        "max_examples": data.max_examples,
        "preference_label": data.preference_label,
        "on_invalid_row": data.on_invalid_row,
        "seed": config.run.seed,
        "files": hashes,
    }


def prepare(config: Config) -> PreparedData:
    """Read or make the run's texts."""
    given = given_renderers(config)
    if config.data.path is not None:
        return prepare_data(config, given)
    return prepare_world(config, given)


def prepare_world(config: Config, given: Sequence[Renderer]) -> PreparedData:
    """Splits and corpora of the built-in world."""
    town = synthetic.make_town(config.world, config.run.seed)
    corpora = {}
    for name in base_names(config):
        steps = config.pretrain.strong_steps if name == "strong" else config.pretrain.weak_steps
        documents = steps * config.pretrain.batch
        corpora[name] = synthetic.make_corpus(town, config.world, name, documents)
    splits = synthetic.make_splits(town, config.world)
    counts = synthetic.shortfalls(splits, config.world)
    return prepare_splits(config, splits, corpora, given, counts)


def prepare_data(config: Config, given: Sequence[Renderer]) -> PreparedData:
    """Splits and corpora of the user's files.

    The strong base reads all of D0, a weak one a random part of its own.

    Args:
        given: the tokenizers of bases that exist already, with their templates.
    """
    data = config.data

    # --- Read every file that is named
    pairs: dict[str, list[Pair]] = {}  # by setting
    reports = {}  # by file
    without_other_side = 0
    for setting, path in data.files.items():
        rows, file_reports = read_data(
            path,
            preference_label=data.preference_label,
            skip_invalid=data.on_invalid_row == "skip",
            max_rows=data.max_examples,
            setting=f"data.{setting}",
        )
        for name, report in file_reports.items():
            reports[name if setting == "path" else f"{setting} {name}"] = report
        if setting == "d1" and split_pair_paths(path):
            rows, without_other_side = join_sides(rows, path)
        pairs[setting] = rows
    total = sum(len(rows) for rows in pairs.values())

    # --- Deal the rows to the splits
    shared_pairs = pairs.pop("path")
    splits, repeated = split_pairs(shared_pairs, data.shares, config.run.seed, pairs)
    used = sum(len(rows) for rows in splits.values())

    # --- The text to pre-train on
    documents = []
    for pair in splits.pop("d0"):
        for text in (pair.chosen, pair.rejected):
            if text:
                documents.append(Example(pair.id, pair.prompt, text, pair.meta))
    corpora = {"strong": documents}
    for name in base_names(config)[1:]:
        rng = random.Random(f"{config.run.seed}/corpus/{name}")
        corpora[name] = [
            document for document in documents if rng.random() < config.pretrain.weak_share
        ]

    warnings = column_warnings(reports)
    counts = {
        "rows": {name: dict(report.counts) for name, report in reports.items()},
        "kept": total,
        "repeated prompts left out": repeated,
        "in no split": total - used - sum(repeated.values()),
    }
    if without_other_side:
        counts["d1 answers without their other side"] = without_other_side
    for name, report in reports.items():
        counts[f"read {name}"] = str(report)
    made_here = set(base_names(config)) - model_dirs(config).keys()
    if not made_here:
        shares = ", ".join(f"{share:g}" for share in data.shares)
        counts["D0"] = f"not used, as all bases are given; data.shares = {shares}"
        if documents:
            warnings.append(
                f"data.shares gives D0 {data.shares[0]:.0%} of the first turns ({len(documents)} "
                "answers), which nothing reads, as all bases are given; set the first share to 0"
            )
    prepared = prepare_splits(config, splits, corpora, given, counts)
    prepared.warnings += warnings
    return prepared


# --- Making the texts fit


def prepare_splits(
    config: Config,
    splits: Mapping[str, Sequence[Pair]],
    corpora: dict[str, list[Example]],
    given: Sequence[Renderer],
    counts: dict,
) -> PreparedData:
    """Train a tokenizer if bases are made here; drop or cut rows that no model could read whole.

    Args:
        given: the tokenizers of bases that exist already, with their templates.
        counts: what is known of the rows; this adds to it.

    Raises:
        UserError: a split, or the text to pre-train on, is left empty.
    """
    system = config.data.system
    splits = {
        name: [replace(pair, prompt=with_system(pair.prompt, system)) for pair in pairs]
        for name, pairs in splits.items()
    }
    corpora = {
        name: [replace(document, prompt=with_system(document.prompt, system)) for document in texts]
        for name, texts in corpora.items()
    }
    check_system_messages(config, splits)

    renderers = list(given)
    tokenizer = None
    missing = set(base_names(config)) - model_dirs(config).keys()
    if missing:
        tokenizer = make_tokenizer(config, corpora, missing)
        made = Tokenizer(tokenizer, "the tokenizer of bases made here")
        templates = base_templates(config)
        for template in sorted({templates[name] for name in missing}):
            renderers.append(Renderer(made, template))

    fitted: dict[str, list[Pair]] = {}
    sizes = {}
    prompts: set[tuple[Message, ...]] = set()  # of all splits so far
    for name, pairs in splits.items():
        fitted[name], reasons = fit_split(config, name, pairs, renderers, prompts)
        if name == "d1" and config.data.noise:
            fitted[name] = corrupt(fitted[name], config)
            reasons["corrupted"] = sum("corrupted" in pair.meta for pair in fitted[name])
        sizes[name] = {"rows": len(fitted[name])} | dict(reasons)
    check_disjoint(fitted)
    check_truth(config, fitted)

    counts["splits"] = sizes
    counts["d0"] = {name: len(documents) for name, documents in corpora.items()}
    read = answers_read(config)
    longer = count_longer(config, fitted, renderers, read)
    if longer:
        counts[LONGER] = longer
    all_fitted = [pair for pairs in fitted.values() for pair in pairs]
    left_out = count_left_out(texts_of(all_fitted), [renderer.tokenizer for renderer in renderers])
    if left_out:
        counts[LEFT_OUT] = left_out
    return PreparedData(fitted, corpora, tokenizer, counts)


def make_tokenizer(
    config: Config, corpora: Mapping[str, Sequence[Example]], missing: set[str]
) -> bytes:
    """A sentencepiece model trained on the text of the strong base.

    Args:
        missing: the bases that are to be made here.

    Raises:
        UserError: there is no text for one of them.
    """
    for name, documents in corpora.items():
        if not documents and (name in missing or name == "strong"):
            settings = "data.shares, pretrain.weak_share and the steps"
            raise UserError(f"D0 has no text to make {name} from; see {settings}")
    documents = corpora["strong"][:TOKENIZER_TEXTS]
    texts = [dialogue_text(document.prompt, document.response) for document in documents]
    return train_tokenizer(texts, config.model.vocab)


def fit_split(
    config: Config,
    name: str,
    pairs: Sequence[Pair],
    renderers: Sequence[Renderer],
    prompts: set[tuple[Message, ...]],
) -> tuple[list[Pair], Counter]:
    """The rows of a split that can be used, and how many were dropped or cut, by reason.

    Args:
        prompts: those of the splits before; this adds to it.

    Raises:
        UserError: no row is left.
    """
    reasons: Counter[str] = Counter()
    usable = list(pairs)
    if name in REQUIRED_SIDES:
        side = REQUIRED_SIDES[name]
        usable = [pair for pair in pairs if getattr(pair, side)]
        if len(usable) < len(pairs):
            reasons[f"without {side} answer"] = len(pairs) - len(usable)

    fitting = []
    sides = answers_read(config)[name]
    for pair in usable:
        answers = [getattr(pair, side) for side in sides]
        truncated = truncate_pair(config, pair, renderers, reasons, answers)
        if truncated is None:
            continue
        if name != "d1" and truncated.prompt in prompts:
            reasons["equal after the cut"] += 1  # to one of this split, or of another
        else:
            fitting.append(truncated)
        prompts.add(truncated.prompt)
    if not fitting:
        raise UserError(why_empty(config, name, reasons))
    return fitting, reasons


def why_empty(config: Config, name: str, reasons: Mapping[str, int]) -> str:
    """The sentence on a split that no row is left for."""
    lost = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    if not lost:
        lost = "too few rows, or their prompts are in another split"
    if config.data.path:
        settings = f"data.{name}, data.shares, data.max_prompt_length, data.truncation_mode"
    else:
        settings = f"world.{name}, world.names, data.max_prompt_length"
    sentence = f"no row is left for {name} ({lost}); see {settings}"
    if list(reasons) == ["without rejected answer"]:
        sentence += (
            "; two files with one answer to a prompt each, as the released D1, are given as "
            "--data.d1=GOOD,BAD"
        )
    return sentence


def check_disjoint(splits: Mapping[str, Sequence[Pair]]) -> None:
    """Assert that no prompt stands in two splits."""
    prompts: set[tuple[Message, ...]] = set()
    for pairs in splits.values():
        own = {pair.prompt for pair in pairs}
        assert not own & prompts, "two splits have a prompt in common"
        prompts |= own


def check_truth(config: Config, splits: Mapping[str, Sequence[Pair]]) -> None:
    """Raise UserError where D2 lacks the answers that the ceiling or the method trains on."""
    if config.run.method == "dpo-truth":
        side = "rejected"
    elif config.run.method == "ceiling" or config.macpo.controls:
        side = "chosen"
    else:
        return
    if not any(getattr(pair, side) for pair in splits.get("d2", ())):
        raise UserError(
            f"no row of d2 has a {side} answer, on which the ceiling or the method trains; give a "
            "data.d2 that has them, or set macpo.controls=false (and another method)"
        )


def check_system_messages(config: Config, splits: Mapping[str, Sequence[Pair]]) -> None:
    """Raise UserError where rows have a system message, and a template no place for one."""
    unable = [name for name in base_templates(config).values() if TEMPLATES[name].system is None]
    if not unable:
        return
    template = unable[0]
    able = ", ".join(name for name, other in TEMPLATES.items() if other.system is not None)
    for pairs in splits.values():
        for pair in pairs:
            if pair.prompt[0].role == "system":
                whose = "data.system is"
                if config.data.system != pair.prompt[0].content:
                    whose = f"{pair.meta.get('file', 'the data')}: rows have"
                raise UserError(
                    f"{whose} a system message, for which data.template = {template} has no "
                    f"place; those that have one: {able}"
                )


def answers_read(config: Config) -> dict[str, tuple[str, ...]]:
    """The sides of each split that a model reads: only these have to fit.

    The ceiling and the controls train on D2's true answers, dpo-truth on both sides; all other
    training takes nothing of D2 but its prompts.
    """
    both = ("chosen", "rejected")
    d2 = both
    if config.data.path is not None and config.run.method != "dpo-truth":
        needs_truth = config.run.method == "ceiling" or config.macpo.controls
        d2 = ("chosen",) if needs_truth else ()
    return {"d1": both, "d2": d2, "test": both}


def count_longer(
    config: Config,
    splits: Mapping[str, Iterable[Pair]],
    renderers: Sequence[Renderer],
    read: Mapping[str, Sequence[str]],
) -> int:
    """How many true answers that are read are longer than any that can be sampled."""
    longer = 0
    for name, pairs in splits.items():
        for pair in pairs:
            if pair.chosen and "chosen" in read[name]:
                _, answer = max_token_counts(renderers, pair.prompt, [pair.chosen])
                longer += answer > config.generate.max_new_tokens
    return longer


def texts_of(pairs: Iterable[Pair]) -> list[str]:
    """What is said in prompts and answers."""
    texts = []
    for pair in pairs:
        texts += [message.content for message in pair.prompt]
        texts += [answer for answer in (pair.chosen, pair.rejected) if answer]
    return texts


def count_left_out(texts: Sequence[str], tokenizers: Sequence[Tokenizer]) -> dict[str, int]:
    """How many characters of the texts leave no trace, by file of the tokenizers that do so."""
    counts = {}
    for tokenizer in tokenizers:
        count = tokenizer.count_left_out(texts)
        if count:
            counts[tokenizer.where] = count
    return counts


def left_out_warnings(counts: Mapping[str, int]) -> list[str]:
    """A sentence for each tokenizer that leaves characters out."""
    sentences = []
    for where, count in counts.items():
        sentences.append(
            f"{where}: has no token for {count} characters of the texts, which are left out"
        )
    return sentences


def warn_of_left_out(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Say on stderr how many characters of the texts leave no trace, if some do."""
    for warning in left_out_warnings(count_left_out(texts, [tokenizer])):
        print(f"WARNING: {escape_control_chars(warning)}", file=sys.stderr)


# --- Noise in D1


def corrupt(pairs: Sequence[Pair], config: Config) -> list[Pair]:
    """The pairs with data.noise of them corrupted, and marked so.

    "swapped": the sides change places; "label": chosen is the answer to another prompt (a pair for
    which none is found stays true).
    """
    rng = random.Random(f"{config.run.seed}/noise")
    picked = set(rng.sample(range(len(pairs)), round(config.data.noise * len(pairs))))
    noisy = []
    for index, pair in enumerate(pairs):
        corrupted = None
        if index in picked and config.data.noise_kind == "swapped":
            corrupted = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        elif index in picked:
            answer = answer_to_another(pair, pairs, rng)
            if answer is not None:
                corrupted = replace(pair, chosen=answer)
        if corrupted is None:
            noisy.append(pair)
        else:
            meta = pair.meta | {"corrupted": config.data.noise_kind}
            noisy.append(replace(corrupted, meta=meta))
    return noisy


def answer_to_another(pair: Pair, pairs: Sequence[Pair], rng: random.Random) -> str | None:
    """A true answer on another subject; None where as many draws as there are pairs find none."""
    for _ in pairs:
        other = rng.choice(pairs)
        is_other_subject = subject(other) != subject(pair)
        if is_other_subject and other.chosen not in (pair.chosen, pair.rejected):
            return other.chosen
    return None


def subject(pair: Pair):
    """What a pair is about: two questions on one subject may have one right answer.

    In the world harm is a single subject, since it is always refused.
    """
    if "kind" not in pair.meta:
        return pair.prompt
    if pair.meta["kind"] == "harm":
        return True
    return (pair.meta["item"], pair.meta["name"])


# --- Over-long rows


def truncate_pairs(
    config: Config,
    renderer: Renderer,
    pairs: Iterable[Pair],
    max_prompt_length: int,
    max_length: int,
) -> tuple[list[Pair], Counter]:
    """The pairs that fit into so many tokens; how many were dropped or cut, by reason.

    Over-long ones are treated as data.truncation_mode says. Characters that the tokenizer leaves
    out are counted in a warning on stderr.

    Args:
        max_length: of the prompt and an answer together.
    """
    data = replace(config.data, max_prompt_length=max_prompt_length, max_length=max_length)
    config = replace(config, data=data)
    reasons: Counter[str] = Counter()
    fitting = []
    for pair in pairs:
        answers = [pair.chosen, pair.rejected]
        truncated = truncate_pair(config, pair, [renderer], reasons, answers)
        if truncated is not None:
            fitting.append(truncated)
    warn_of_left_out(renderer.tokenizer, texts_of(fitting))
    return fitting, reasons


def truncate_pair(
    config: Config,
    pair: Pair,
    renderers: Sequence[Renderer],
    reasons: Counter,
    answers: Sequence[str],
) -> Pair | None:
    """The pair as every model can read it whole, its prompt cut if need be; None if it is dropped.

    Args:
        reasons: counts what is cut and dropped. The answer is at fault where a prompt within
            data.max_prompt_length has no room beside it.
        answers: those of the pair that are read, and have to fit.

    Raises:
        UserError: it is too long, and data.truncation_mode is "raise".
    """
    data = config.data
    answers = answers or [""]  # the prompt is measured anyway
    prompt_tokens, answer_tokens = max_token_counts(renderers, pair.prompt, answers)
    beside_answer = data.max_length - answer_tokens
    room = min(data.max_prompt_length, beside_answer)
    if prompt_tokens <= room:
        return pair
    if data.truncation_mode == "raise":
        start = repr(pair.prompt[0].content[:60])
        raise UserError(
            f"{pair.meta.get('file', 'data')}: the row that begins with {start} is too long "
            f"({prompt_tokens} + {answer_tokens} tokens); see data.max_prompt_length, "
            "data.max_length, data.truncation_mode"
        )

    def fits(messages: tuple[Message, ...]) -> bool:
        tokens, _ = max_token_counts(renderers, messages, answers)
        return tokens <= room

    prompt = None
    if data.truncation_mode == "cut_prompt" and beside_answer >= MIN_PROMPT_TOKENS:
        prompt = cut_prompt(pair.prompt, fits)
    if prompt is not None:
        reasons["prompt cut"] += 1
        return replace(pair, prompt=prompt)
    if prompt_tokens > data.max_prompt_length and beside_answer >= MIN_PROMPT_TOKENS:
        reasons["over-long prompt"] += 1
    else:
        reasons["over-long answer"] += 1
    return None


def max_token_counts(
    renderers: Sequence[Renderer],
    prompt: tuple[Message, ...],
    answers: Sequence[str | None],
) -> tuple[int, int]:
    """Tokens of the prompt and of the longest answer, under the tokenizer that needs most of them.

    An answer has its leading space and its end token.
    """
    prompt_tokens = 0
    answer_tokens = 0
    for renderer in renderers:
        for answer in answers:
            mask = renderer.render(prompt, answer).mask
            prompt_tokens = max(prompt_tokens, mask.count(False))
            answer_tokens = max(answer_tokens, mask.count(True))
    return prompt_tokens, answer_tokens


def cut_prompt(
    prompt: tuple[Message, ...], fits: Callable[[tuple[Message, ...]], bool]
) -> tuple[Message, ...] | None:
    """The end of the prompt that fits, behind its system message; None if nothing fits.

    Whole turns are cut off first, then characters of the last one.
    """
    system: tuple[Message, ...] = ()
    turns = prompt
    if len(prompt) > 1 and prompt[0].role == "system":
        system = prompt[:1]
        turns = prompt[1:]

    # --- Whole turns, but for the last one
    while len(turns) > 1 and not fits(system + turns):
        turns = turns[1:]

    # --- Its characters, a twentieth at a time; the very last one stays
    while len(turns[0].content) > 1 and not fits(system + turns):
        text = turns[0].content
        cut = max(1, len(text) // 20)
        shorter = text[cut:].lstrip() or text[-1]
        turns = (replace(turns[0], content=shorter),)

    shortened = system + turns
    return shortened if fits(shortened) else None


# --- The stages that write the texts


def splits_stage(
    run: Run, source: dict, prepared: Callable[[], PreparedData], base_fingerprints: list[str]
) -> Stage:
    """The stage with d1.jsonl, d2.jsonl and test.jsonl, and the ids of their rows.

    Args:
        source: identifies the texts.
        prepared: reads them, when needed.
        base_fingerprints: of the bases that the user gives, whose tokenizers decide what fits.
    """
    data = run.config.data

    def write_splits(context: StageContext) -> dict:
        counts = prepared().counts
        if SHORTFALLS in counts:
            sizes = ", ".join(f"{name} {size}" for name, size in counts[SHORTFALLS].items())
            context.log(f"WARNING: too few questions: {sizes}; see world.names")
        if LONGER in counts:
            context.log(
                f"WARNING: {LONGER}, so that no sampled one can be like them: {counts[LONGER]}"
            )
        for warning in prepared().warnings:
            context.log(f"WARNING: {warning}")
        for warning in left_out_warnings(counts.get(LEFT_OUT, {})):
            context.log(f"WARNING: {warning}")
        ids = {}
        for name, pairs in prepared().splits.items():
            write_rows(context.folder / f"{name}.jsonl", pairs)
            ids[name] = [pair.id for pair in pairs]
        write_json(context.folder / "split.json", ids)
        # These depend on more than the settings of this stage
        others = ("d0", LONGER, LEFT_OUT)
        return {name: count for name, count in counts.items() if name not in others}

    return run.stage(
        name="data/slices",
        kind="slices/4",
        settings=source
        | {
            "templates": template_settings(run.config),
            "vocab": run.config.model.vocab,
            "max_prompt_length": data.max_prompt_length,
            "max_length": data.max_length,
            "truncation_mode": data.truncation_mode,
            "noise": data.noise,
            "noise_kind": data.noise_kind,
            "system": data.system,
            "answers_read": answers_read(run.config),
            "given": base_fingerprints,
        },
        inputs=[],
        compute=write_splits,
        seed_key=("data",),
    )


def template_settings(config: Config) -> dict:
    """The templates that the splits depend on.

    Those of given bases each by name; of the bases that are made here, which have one tokenizer,
    the templates that occur, however many bases have them.
    """
    given = model_dirs(config)
    templates = base_templates(config)
    made = {template for name, template in templates.items() if name not in given}
    return {
        "given": {name: templates[name] for name in templates if name in given},
        "made": sorted(made),
    }


def tokenizer_stage(run: Run, source: dict, prepared: Callable[[], PreparedData]) -> Stage:
    """The stage with the tokenizer of the bases that are made here."""

    def write_tokenizer(context: StageContext) -> dict:
        model = prepared().tokenizer
        write_atomic(context.folder / "tokenizer.model", model)
        return {"pieces": Tokenizer(model).size}

    return run.stage(
        name="bases/tokenizer",
        kind="tokenizer/3",
        settings=text_settings(run.config, source),
        inputs=[],
        compute=write_tokenizer,
        seed_key=("data",),
    )


def corpus_stage(run: Run, base: str, source: dict, prepared: Callable[[], PreparedData]) -> Stage:
    """The stage with the documents that a base is pre-trained on."""
    pretrain = run.config.pretrain
    if run.config.data.path is None:
        steps = pretrain.strong_steps if base == "strong" else pretrain.weak_steps
        amount = {"documents": steps * pretrain.batch}
    else:
        amount = {"weak_share": pretrain.weak_share if base != "strong" else 1.0}

    def write_corpus(context: StageContext) -> dict:
        documents = prepared().corpora[base]
        write_rows(context.folder / "texts.jsonl", documents)
        return {"documents": len(documents)}

    return run.stage(
        name=f"data/corpus_{base}",
        kind="corpus/3",
        settings=text_settings(run.config, source) | amount | {"base": base},
        inputs=[],
        compute=write_corpus,
        seed_key=("data",),
    )


def text_settings(config: Config, source: dict) -> dict:
    """What a tokenizer and a corpus depend on."""
    return source | {
        "system": config.data.system,
        "vocab": config.model.vocab,
    }
