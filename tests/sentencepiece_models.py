"""Small sentencepiece models of every kind, trained by sentencepiece itself."""

import io
import itertools
from dataclasses import dataclass

import sentencepiece
from conftest import TEXTS


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a sentencepiece model is trained with."""

    kind: str
    normalizer: str
    keeps_spaces: bool
    has_bytes: bool
    adds_space: bool
    has_newline: bool  # as a piece


def all_recipes() -> list[Recipe]:
    kinds = ("unigram", "bpe", "char", "word")
    normalizers = ("identity", "nfkc", "nfkc_cf", "nmt_nfkc", "nmt_nfkc_cf")
    flags = itertools.product((False, True), repeat=4)
    recipes = []
    for kind, normalizer, choice in itertools.product(kinds, normalizers, list(flags)):
        recipes.append(Recipe(kind, normalizer, *choice))
    return recipes


def train(recipe: Recipe, symbols: tuple[str, ...] = (), **options) -> bytes:
    """The content of a tokenizer.model; `symbols` are user-defined."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "hello world , yes . no !"] * 4),
        model_writer=model,
        model_type=recipe.kind,
        vocab_size=420 if recipe.has_bytes else 150,
        hard_vocab_limit=False,
        byte_fallback=recipe.has_bytes,
        normalization_rule_name=recipe.normalizer,
        remove_extra_whitespaces=not recipe.keeps_spaces,
        add_dummy_prefix=recipe.adds_space,
        user_defined_symbols=["\n"] if recipe.has_newline else list(symbols),
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()
