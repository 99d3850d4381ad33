"""From files, or the built-in world, to the splits that a run uses."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.data.chat_template import dialogue_text, render
from minmacpo.data.formats import read_data
from minmacpo.data.readers import split_pair_paths
from minmacpo.data.records import Example, Message, Pair
from minmacpo.data.splits import join_sides, split_pairs
from minmacpo.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TOKENIZER_TEXTS = 6000  # documents of the strong base's text that the tokenizer is trained on


LEAST_PROMPT = 16  # tokens; where an answer leaves room for fewer, its prompt is not cut


LONGER = "true answers longer than generate.max_new_tokens"


JOIN = "; two files with one answer to a prompt each, as the released D1, are given as --data.d1=GOOD,BAD"


NEEDED = {
    "d1": "rejected",
    "test": "chosen",
}  # teachers learn both sides, tests score true answers; D2 gives prompts


@dataclass(slots=True)
class PreparedData:
    """`slices` d1, d2, test; `corpora` (D0) by base; `tokenizer` bytes where one is made here; counts."""

    slices: dict[str, list[Pair]]
    corpora: dict[str, list[Example]]
    tokenizer: bytes | None
    counts: dict


def base_names(config: Config) -> list[str]:
    """ "strong", "weak1" … "weakK"."""
    return ["strong", *(f"weak{k + 1}" for k in range(config.macpo.teachers))]


def model_dirs(config: Config) -> dict[str, Path]:
    """{base name: HF folder} of the bases that the user gives."""
    named = zip(base_names(config), [config.model.student, *config.model.teachers], strict=False)
    return {name: Path(folder) for name, folder in named if folder}


def given_tokenizers(config: Config) -> list[Tokenizer]:
    """The tokenizers of the given bases."""
    return [load_tokenizer(folder) for folder in model_dirs(config).values()]


def prepare_data(config: Config, given: Sequence[Tokenizer]) -> PreparedData:
    """Slices and corpora of the user's files; `given` are the tokenizers of bases that exist already.
    The strong base reads all of D0, a weak one a random share of its own."""
    data, found, reports, alone = config.data, {}, {}, 0
    for key, path in data.files.items():
        found[key], read = read_data(
            path,
            preference_label=data.preference_label,
            skip_invalid=data.on_invalid_row == "skip",
            max_rows=data.max_examples,
            setting=f"data.{key}",
        )
        reports |= (
            read if key == "path" else {f"{key} {name}": report for name, report in read.items()}
        )
        if key == "d1" and split_pair_paths(path):
            found[key], alone = join_sides(found[key], path)
    total, pairs = sum(map(len, found.values())), found.pop("path")
    slices, repeated = split_pairs(pairs, data.shares, config.run.seed, found)
    unused = total - sum(map(len, slices.values())) - sum(repeated.values())
    both = [
        (pair, text) for pair in slices.pop("d0") for text in (pair.chosen, pair.rejected) if text
    ]
    documents = [Example(pair.id, pair.prompt, text, pair.meta) for pair, text in both]
    corpora = {"strong": documents}
    for name in base_names(config)[1:]:
        rng = random.Random(f"{config.run.seed}/corpus/{name}")
        corpora[name] = [
            document for document in documents if rng.random() < config.pretrain.weak_share
        ]
    counts = {
        "rows": {name: dict(report.counts) for name, report in reports.items()},
        "kept": total,
        "repeated prompts left out": repeated,
        "in no slice": unused,
    }
    counts |= {"d1 answers without their other side": alone} if alone else {}
    counts |= {f"read {name}": str(report) for name, report in reports.items()}
    return prepare_splits(config, slices, corpora, given, counts)


def prepare_splits(
    config: Config, slices, corpora, given: Sequence[Tokenizer], counts: dict
) -> PreparedData:
    """Train the tokenizer if bases are made here; drop or cut rows that no model could read whole.
    Raises UserError if a slice, or the text to pre-train on, is left empty."""
    made, tokenizers = None, list(given)
    if missing := set(base_names(config)) - model_dirs(config).keys():
        if empty := [
            name for name in corpora if name in missing | {"strong"} and not corpora[name]
        ]:
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
        for pair in filter(
            None, (truncate_pair(config, pair, tokenizers, reasons) for pair in able)
        ):
            if name != "d1" and pair.prompt in prompts:
                reasons["equal after the cut"] += 1  # to one of this slice, or of another
            else:
                kept[name].append(pair)
            prompts.add(pair.prompt)
        if not kept[name]:
            lost = (
                ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
                or "too few rows, or their prompts are in another slice"
            )
            settings = (
                f"data.{name}, data.shares, data.max_prompt_length, data.truncation_mode"
                if config.data.path
                else f"world.{name}, world.names, data.max_prompt_length"
            )
            alone = JOIN if [*reasons] == ["without rejected answer"] else ""
            raise UserError(f"no row is left for {name} ({lost}); see {settings}{alone}")
        if name == "d1" and config.data.noise:
            kept[name] = corrupt(kept[name], config)
            reasons["corrupted"] = sum("corrupted" in pair.meta for pair in kept[name])
        sizes[name] = {"rows": len(kept[name])} | dict(reasons)
    check_disjoint(config, kept)
    told = [pair for pairs in kept.values() for pair in pairs if pair.chosen]
    longer = sum(
        longest(config, tokenizers, pair.prompt, pair.chosen)[1] > config.generate.max_new_tokens
        for pair in told
    )
    documents = {base: len(texts) for base, texts in corpora.items()}
    counts |= {"slices": sizes, "d0": documents} | ({LONGER: longer} if longer else {})
    return PreparedData(kept, corpora, made, counts)


def check_disjoint(config: Config, slices: dict[str, list[Pair]]) -> None:
    """No prompt stands in two slices; UserError where D2 lacks the answers that the method would train on."""
    prompts = [{pair.prompt for pair in pairs} for pairs in slices.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)), (
        "two slices have a prompt in common"
    )
    truth = {"dpo-truth": "rejected", "ceiling": "chosen"}.get(
        config.run.method, "chosen" * config.macpo.controls
    )
    if truth and not any(getattr(pair, truth) for pair in slices.get("d2", ())):
        remedy = "give a data.d2 that has them, or set macpo.controls=false (and another method)"
        raise UserError(
            f"no row of d2 has a {truth} answer, on which the ceiling or the method trains; {remedy}"
        )


def corrupt(pairs: list[Pair], config: Config) -> list[Pair]:
    """The pairs, data.noise of them corrupted and marked so: sides swapped, or chosen the answer to another prompt (a
    pair for which none is found stays true)."""

    def subject(pair: Pair):
        """What it asks about: two questions on one subject may have one right answer, and harm is always refused."""
        meta = pair.meta
        return (
            pair.prompt
            if "kind" not in meta
            else meta["kind"] == "harm" or (meta["item"], meta["name"])
        )

    rng = random.Random(f"{config.run.seed}/noise")
    picked, made = set(rng.sample(range(len(pairs)), round(config.data.noise * len(pairs)))), []
    for i, pair in enumerate(pairs):
        if i in picked:
            good, bad = pair.rejected, pair.chosen
            if config.data.noise_kind == "label":
                others = (rng.choice(pairs) for _ in pairs)  # as many tries as there are pairs
                wrong = (
                    p.chosen
                    for p in others
                    if subject(p) != subject(pair) and p.chosen not in (pair.chosen, pair.rejected)
                )
                good, bad = next(wrong, None), pair.rejected
            if good is not None:
                pair = replace(
                    pair,
                    chosen=good,
                    rejected=bad,
                    meta=pair.meta | {"corrupted": config.data.noise_kind},
                )
        made.append(pair)
    return made


def truncate_pair(
    config: Config, pair: Pair, tokenizers: Sequence[Tokenizer], reasons: Counter
) -> Pair | None:
    """The pair as every model can read it whole, its prompt cut if need be and wanted, or None; `reasons`
    counts both. The answer is at fault where a prompt within data.max_prompt_length has no room beside it."""
    data, texts = config.data, (pair.chosen, pair.rejected)
    size, answer = longest(config, tokenizers, pair.prompt, *texts)
    left = data.max_length - answer
    room = min(data.max_prompt_length, left)
    if size <= room:
        return pair
    if data.truncation_mode == "raise":
        start = repr(pair.prompt[0].content[:60])
        where = f"{pair.meta.get('file', 'data')}: the row that begins with {start}"
        raise UserError(
            f"{where} is too long ({size} + {answer} tokens); see data.max_prompt_length, data.max_length, data.truncation_mode"
        )
    wanted = data.truncation_mode == "cut_prompt" and left >= LEAST_PROMPT
    cut = (
        cut_prompt(
            pair.prompt, lambda messages: longest(config, tokenizers, messages, *texts)[0] <= room
        )
        if wanted
        else None
    )
    if cut is None:
        fault = "prompt" if size > data.max_prompt_length and left >= LEAST_PROMPT else "answer"
        reasons[f"over-long {fault}"] += 1
        return None
    reasons["prompt cut"] += 1
    return replace(pair, prompt=cut)


def longest(
    config: Config,
    tokenizers: Sequence[Tokenizer],
    prompt: tuple[Message, ...],
    *answers: str | None,
) -> tuple[int, int]:
    """Most tokens, under any of the tokenizers, of the prompt, and of an answer with its leading space and end token."""
    masks = [
        render(t, config.data.template, prompt, text).mask for t in tokenizers for text in answers
    ]
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
