"""From rows to what a run works on: slices that fit the models' contexts, corpora, a tokenizer.

All of it happens in memory, before a run folder exists, so that bad input leaves nothing behind.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minmacpo import UserError
from minmacpo.config import Config
from minmacpo.data import Example, Message, Pair, read_hh, split_pairs
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
    repeated: Counter = Counter()
    slices = split_pairs(pairs, config.data.shares, config.run.seed, repeated)
    both = [(pair, text) for pair in slices.pop("d0") for text in (pair.chosen, pair.rejected)]
    documents = [Example(pair.id, pair.prompt, text, pair.meta) for pair, text in both]
    corpora = {name: weak_slice(config, documents, name) for name in base_names(config)}
    counts = {"rows": rows, "kept": len(pairs), "repeated prompts left out": dict(repeated)}
    return fit_slices(config, slices, corpora, given, counts)


def weak_slice(config: Config, documents: list[Example], base: str) -> list[Example]:
    """All documents for the strong base, a random share of its own for each weak one."""
    share, picked = config.pretrain.weak_share, random.Random(f"{config.run.seed}/corpus/{base}")
    return [document for document in documents if base == "strong" or picked.random() < share]


def fit_slices(config: Config, slices, corpora, given: Sequence[Tokenizer], counts: dict) -> Prepared:
    """Train the tokenizer if bases are made here; drop or cut rows that no model could read whole.
    Raises UserError if a slice, or the text to pre-train on, is left empty."""
    made, tokenizers = None, list(given)
    if not config.model.student or not config.model.teachers:
        needed = [name for name in corpora if name == "strong" or not config.model.teachers]
        for name in (name for name in needed if not corpora[name]):
            settings = "data.shares, pretrain.weak_share and the steps"
            raise UserError(f"D0 has no text to make {name} from; see {settings}")
        texts = [dialogue_text(d.prompt, d.response) for d in corpora["strong"][:TOKENIZER_TEXTS]]
        made = train_tokenizer(texts, config.model.vocab)
        tokenizers.append(Tokenizer(made))
    kept, sizes = {}, {}
    for name, pairs in slices.items():
        reasons = Counter()
        kept[name], prompts = [], set()
        for pair in filter(None, (fit_pair(config, pair, tokenizers, reasons) for pair in pairs)):
            if name != "d1" and pair.prompt in prompts:  # cutting can make two prompts equal
                reasons["equal after the cut"] += 1
            else:
                kept[name].append(pair)
            prompts.add(pair.prompt)
        sizes[name] = {"rows": len(kept[name])} | dict(reasons)
        if not kept[name]:
            settings = "data.shares, data.max_prompt, data.long"
            raise UserError(f"no row is left for {name} ({dict(reasons)}); see {settings}")
    sizes["d0"] = {base: len(documents) for base, documents in corpora.items()}
    return Prepared(kept, corpora, made, counts | {"slices": sizes})


def fit_pair(config: Config, pair: Pair, tokenizers: Sequence[Tokenizer], reasons: Counter) -> Pair | None:
    """The pair, its prompt cut from the left if need be and wanted; None (counted) if it cannot fit."""
    data = config.data
    answers = max(len(t.encode(text)) + 2 for t in tokenizers for text in (pair.chosen, pair.rejected))
    most = min(data.max_prompt, data.max_length - answers)

    def fits(messages: tuple[Message, ...]) -> bool:
        return all(len(render(t, data.template, messages).ids) <= most for t in tokenizers)

    if fits(pair.prompt):
        return pair
    if data.long == "drop" or most < 16:
        reasons["over-long answer" if most < 16 else "over-long prompt"] += 1
        return None
    reasons["prompt cut"] += 1
    prompt = pair.prompt
    while len(prompt) > 1 and not fits(prompt):  # whole turns first, then characters
        prompt = prompt[1:]
    role, text = prompt[0].role, prompt[0].content
    while not fits((Message(role, text), *prompt[1:])) and len(text) > 1:
        text = text[max(1, len(text) // 20) :].lstrip() or text[-1]
    return replace(pair, prompt=(Message(role, text), *prompt[1:]))
