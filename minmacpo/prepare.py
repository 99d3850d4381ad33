"""From rows to what a run works on: slices that fit the models' contexts, corpora, a tokenizer.

All of it happens in memory, before a run folder exists, so that bad input leaves nothing behind.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minmacpo import UserError
from minmacpo.config import Config
from minmacpo.data import Example, Message, Pair, chosen_side, read_hh, rejected_side, split_pairs
from minmacpo.tokenizer import Tokenizer, dialogue_text, render, train_tokenizer

TOKENIZER_TEXTS = 6000  # documents of the strong base's text that the tokenizer is trained on


@dataclass(slots=True)
class Prepared:
    """`slices` d1, d2, test; `corpora` by base; `tokenizer` bytes where one is made here; counts."""

    slices: dict[str, list[Pair]]
    corpora: dict[str, list[Example]]
    tokenizer: bytes | None
    counts: dict


def base_names(config: Config) -> list[str]:
    """"strong", "weak1" … "weakK"."""
    return ["strong", *(f"weak{k + 1}" for k in range(config.macpo.teachers))]


def prepare_hh(config: Config, given: Sequence[Tokenizer]) -> Prepared:
    """Slices and corpora of HH-RLHF files; `given` are the tokenizers of bases that exist already."""
    pairs, rows = read_hh(config.data.path, config.data.max_examples)
    slices = split_pairs(pairs, config.data.shares, config.run.seed)
    documents = [side(pair) for pair in slices.pop("d0") for side in (chosen_side, rejected_side)]
    corpora = {name: weak_slice(config, documents, name) for name in base_names(config)}
    return fit_slices(config, slices, corpora, given, {"rows": rows, "kept": len(pairs)})


def weak_slice(config: Config, documents: list[Example], base: str) -> list[Example]:
    """All documents for the strong base, a random share of its own for each weak one."""
    if base == "strong":
        return documents
    picked = random.Random(f"{config.run.seed}/corpus/{base}")
    return [document for document in documents if picked.random() < config.pretrain.weak_share]


def fit_slices(config: Config, slices, corpora, given: Sequence[Tokenizer], counts: dict) -> Prepared:
    """Train the tokenizer if bases are made here; drop or cut rows that no model could read whole.

    Raises UserError if a slice, or the text to pre-train on, is left empty.
    """
    made = None
    if not config.model.student or not config.model.teachers:
        if not corpora["strong"]:
            raise UserError("D0 is empty, so no base can be made; raise its share (data.shares) or give models")
        texts = [dialogue_text(d.prompt, d.response) for d in corpora["strong"][:TOKENIZER_TEXTS]]
        made = train_tokenizer(texts, config.model.vocab)
    tokenizers = [*given, *([Tokenizer(made)] if made else [])]
    kept, sizes = {}, {}
    for name, pairs in slices.items():
        reasons = Counter()
        kept[name] = [p for p in (fit_pair(config, pair, tokenizers, reasons) for pair in pairs) if p]
        sizes[name] = {"rows": len(kept[name])} | dict(reasons)
        if not kept[name]:
            raise UserError(f"no row is left for {name} ({dict(reasons)}); see data.shares, data.max_prompt, data.long")
    sizes["d0"] = {base: len(documents) for base, documents in corpora.items()}
    return Prepared(kept, corpora, made, counts | {"slices": sizes})


def fit_pair(config: Config, pair: Pair, tokenizers: Sequence[Tokenizer], reasons: Counter) -> Pair | None:
    """The pair, its prompt cut from the left if need be and wanted; None (counted) if it cannot fit."""
    data = config.data
    prompt = max(len(render(t, data.template, pair.prompt).ids) for t in tokenizers)
    answers = max(
        len(t.encode(text)) + 2 for t in tokenizers for text in (pair.chosen, pair.rejected)
    )
    most = min(data.max_prompt, data.max_length - answers)
    if prompt <= most:
        return pair
    if data.long == "drop" or most < 16:
        reasons["over-long answer" if most < 16 else "over-long prompt"] += 1
        return None
    reasons["prompt cut"] += 1
    return replace(pair, prompt=cut_prompt(config, pair.prompt, tokenizers, most))


def cut_prompt(config: Config, prompt: tuple[Message, ...], tokenizers, most: int) -> tuple[Message, ...]:
    """The end of a prompt that renders to at most `most` tokens: whole turns first, then characters."""

    def fits(messages: tuple[Message, ...]) -> bool:
        return all(len(render(t, config.data.template, messages).ids) <= most for t in tokenizers)

    while len(prompt) > 1 and not fits(prompt):
        prompt = prompt[1:]
    role, text = prompt[0].role, prompt[0].content
    while not fits((Message(role, text), *prompt[1:])) and len(text) > 1:
        text = text[max(1, len(text) // 20) :].lstrip() or text[-1]
    return (Message(role, text), *prompt[1:])
