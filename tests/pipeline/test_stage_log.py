"""What a stage logs of its first row."""

from types import SimpleNamespace

from minmacpo.data.chat_template import render
from minmacpo.data.records import Message
from minmacpo.data.tokenizer import load_tokenizer
from minmacpo.pipeline.stage_log import log_first_row, warn_dropped


def test_the_border_of_a_long_prompt_is_shown(stub):
    """A row is shown around its mask, however far that is from the start."""
    lines = []
    tokenizer = load_tokenizer(stub / "bases/strong")
    context = SimpleNamespace(log_detail=lines.append)
    loaded = SimpleNamespace(tokenizer=tokenizer)
    row = render(tokenizer, "turns", (Message("user", "where " * 300),), "here")

    log_first_row(context, loaded, "row", row)
    log_first_row(context, loaded, "row", None)

    assert lines[0].startswith("first row: ")
    assert lines[0].endswith("⟦here</s>⟧")
    assert 200 < len(lines[0]) < 230
    assert lines[1:] == ["first row: none"]


def test_a_warning_comes_where_more_than_a_tenth_is_dropped():
    lines = []
    context = SimpleNamespace(log=lines.append)

    warn_dropped(context, {"empty": 1, "over_long": 0}, remaining=9)
    assert lines == []
    warn_dropped(context, {"empty": 2, "over_long": 0}, remaining=9)
    assert lines == ["WARNING: 2 of 11 rows were dropped (empty 2)"]
