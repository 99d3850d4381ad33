"""Parts of documents under sentencepiece models of every kind, against sentencepiece itself."""

import random
import re

import pytest
import sentencepiece
from sentencepiece_models import Recipe, all_recipes, train

from minmacpo import UserError
from minmacpo.data.sentencepieces import SPACE, SentencePieces
from minmacpo.data.tokenizer_files import NO_NOTES

PARTS = [
    "hello world",
    "yes",
    " yes",
    "yes ",
    "\nyes",
    "\n\nHuman: where does kadol live ?",
    "\n\nAssistant:",
    " of course !",
    "### Response:\n",
    "two\n\nlines\n",
    "a  b",
    "  two",
    " \n two",
    "\t",
    "Once upon a time",
    "été 🎉 zebra",
    "ﬁ ½ Ａ\u00a0b\u3000c",
    "x\u200by\r\nz",
    "<|im_end|>",
    "▁a",
    "",
]


def oracle(model: bytes, **settings: bool) -> sentencepiece.SentencePieceProcessor:
    """The model with other settings of its normalizer, set by the package of protocol buffers."""
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for name, value in settings.items():
        setattr(proto.normalizer_spec, name, value)
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def check_recipe(recipe: Recipe) -> None:
    """Every part has the ids that sentencepiece gives it, and comes back but for what it loses."""
    model = train(recipe)
    ours = SentencePieces(model, "here", NO_NOTES)
    document = sentencepiece.SentencePieceProcessor(model_proto=model)
    part = oracle(model, add_dummy_prefix=False)
    spaced = oracle(model, add_dummy_prefix=True)
    exact = oracle(model, add_dummy_prefix=False, remove_extra_whitespaces=False)
    assert ours.adds_space == recipe.adds_space

    for text in PARTS:
        about = (recipe, text)
        assert ours.encode(text, start=True) == document.encode(text), about

        # what the normaliser makes of a text is the model's own affair
        normalized = exact.normalize(text)
        ids = ours.encode(text)
        if normalized.startswith(SPACE) and not part.normalize(text).startswith(SPACE):
            assert ids == spaced.encode(text), about
        else:
            assert ids == part.encode(text), about
        if not recipe.keeps_spaces:
            normalized = re.sub("▁+", SPACE, normalized).rstrip(SPACE)
        assert show(document, ids) == shown_unknown(document, exact, normalized), about
        if normalized:
            assert ids, about


def show(processor: sentencepiece.SentencePieceProcessor, ids: list[int]) -> list[str]:
    """The names of ids, an unknown piece as "?"."""
    names = []
    for token_id in ids:
        unknown = processor.is_unknown(token_id)
        names.append("?" if unknown else processor.id_to_piece(token_id))
    return names


def shown_unknown(processor, exact, normalized: str) -> list[str]:
    """What `exact` makes of a normalized text."""
    return show(processor, exact.encode(normalized.replace(SPACE, " ")))


SAMPLE = random.Random(19).sample(all_recipes(), 24)


@pytest.mark.parametrize("recipe", SAMPLE, ids=str)
def test_parts_lose_nothing_under_any_model(recipe):
    check_recipe(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", all_recipes(), ids=str)
def test_parts_lose_nothing_under_all_models(recipe):
    check_recipe(recipe)


@pytest.mark.parametrize("keeps_spaces", [False, True])
def test_spaces_behind_words_are_not_put_behind_parts(keeps_spaces):
    recipe = Recipe("unigram", "identity", keeps_spaces, True, True, False)
    ours = SentencePieces(train(recipe, treat_whitespace_as_suffix=True), "here", NO_NOTES)
    assert not ours.adds_space
    for start in (False, True):
        assert ours.decode(ours.encode("hello world", start)) == "hello world"


def test_what_is_no_model_is_refused():
    model = train(Recipe("bpe", "identity", True, True, True, False))
    for content in (b"", b"\x00\x01 no model", model[:1000]):
        with pytest.raises(UserError, match="here: is no sentencepiece model"):
            SentencePieces(content, "here", NO_NOTES)
